//! Launchers of the matrix products, and the choice of their tiles. Shapes T rows (tokens), N and K a weight's rows and
//! columns, F feed-forward width; N, K and F are multiples of 8. An empty batch launches nothing.
//!
//! Every plan gives the same bits: a plan is a matter of speed alone, so it may follow the number of rows and the GPU.

use half::bf16;

use crate::compute::launch::device::{Device, Entry, Shape, TensorMap, View, ViewMut, args};
use crate::error::Result;

/// K of a step, and the columns of a TMA box.
const STEP_K: usize = 64;
/// Bytes of a row of a step.
const LINE_BYTES: usize = 128;
/// Threads of `gemm.cu`'s large and small tiles.
const WARP_THREADS: u32 = 128;
/// Rows of a consumer warpgroup of `gemm_hopper.cu`.
const GROUP_ROWS: usize = 64;
/// Bytes of shared memory that a block takes besides its own.
const RESERVED_SMEM: u32 = 1 << 10;
/// Most rows of the transposed product's tiles.
const MAX_DECODE_TOKENS: usize = 64;

/// Which product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Product {
    /// `y = x w^T`.
    Forward,
    /// `silu(gate) up` of the same.
    Swiglu,
    /// `dx = dy w`.
    InputGradient,
    /// `dw += dy^T x`.
    WeightGradient,
}

/// What a plan depends on of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpu {
    /// Whether it runs `gemm_hopper.cu`.
    pub hopper: bool,
    /// Number of multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block may have.
    pub smem_bytes: u32,
}

impl Gpu {
    /// Of a device.
    pub fn of(device: &Device) -> Self {
        Gpu {
            hopper: device.is_hopper(),
            multiprocessors: device.num_multiprocessors(),
            smem_bytes: device.max_smem_bytes(),
        }
    }
}

/// How a product is cut into tiles, of rows and columns of its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Plan {
    /// `gemm.cu`: 128 x 128.
    Large,
    /// `gemm.cu`: 64 x 64 (gradients only).
    Small,
    /// `gemm.cu`, transposed (forward only): 8, 16, 32 or 64 rows of x, 16 or 64 of the weight.
    Decode {
        /// Rows of x.
        tokens: usize,
        /// Rows of the weight.
        weights: usize,
    },
    /// `gemm_hopper.cu`: 128 x 256, 128 x 128 or 64 x 128, by clusters of 1 or 2 blocks.
    Hopper {
        /// Rows: 64 for each consumer warpgroup.
        rows: usize,
        /// Columns.
        columns: usize,
        /// Blocks of a cluster.
        cluster: u32,
    },
}

/// Plans for gradients on any GPU.
const GRADIENT_PLANS: &[Plan] = &[Plan::Large, Plan::Small];
/// Plans for forward products on any GPU.
const FORWARD_PLANS: &[Plan] = &[
    Plan::Large,
    Plan::Decode { tokens: 64, weights: 64 },
    Plan::Decode { tokens: 32, weights: 64 },
    Plan::Decode { tokens: 16, weights: 64 },
    Plan::Decode { tokens: 8, weights: 64 },
    Plan::Decode { tokens: 64, weights: 16 },
    Plan::Decode { tokens: 32, weights: 16 },
    Plan::Decode { tokens: 16, weights: 16 },
    Plan::Decode { tokens: 8, weights: 16 },
];
/// Plans on Hopper.
const HOPPER_PLANS: &[Plan] = &[
    Plan::Hopper { rows: 128, columns: 256, cluster: 2 },
    Plan::Hopper { rows: 128, columns: 256, cluster: 1 },
    Plan::Hopper { rows: 128, columns: 128, cluster: 2 },
    Plan::Hopper { rows: 128, columns: 128, cluster: 1 },
    Plan::Hopper { rows: 64, columns: 128, cluster: 2 },
    Plan::Hopper { rows: 64, columns: 128, cluster: 1 },
];

/// Multiply-adds of a multiprocessor per cycle: Hopper's warpgroups, and any GPU's warps.
const GROUP_RATE: f64 = 2048.0;
const WARP_RATE: f64 = 1024.0;
/// Bytes of operands that reach a multiprocessor per cycle.
const LOAD_RATE: f64 = 48.0;

impl Plan {
    /// Rows and columns of a tile of the output. A gated tile has half as many results as columns of gates and ups.
    pub fn tile(self, product: Product) -> (usize, usize) {
        let (rows, columns) = match self {
            Plan::Large => (128, 128),
            Plan::Small => (64, 64),
            Plan::Decode { tokens, weights } => (tokens, weights),
            Plan::Hopper { rows, columns, .. } => (rows, columns),
        };
        (rows, if product == Product::Swiglu { columns / 2 } else { columns })
    }

    /// Steps that are held in shared memory.
    fn stages(self) -> usize {
        match self {
            Plan::Large => 3,
            Plan::Small | Plan::Hopper { columns: 256, .. } => 4,
            Plan::Decode { weights: 64, .. } | Plan::Hopper { rows: 128, .. } => 6,
            Plan::Decode { .. } | Plan::Hopper { .. } => 8,
        }
    }

    /// Dynamic shared memory of a block.
    pub fn smem_bytes(self) -> u32 {
        let (rows, columns) = self.tile(Product::Forward);
        let barriers = if matches!(self, Plan::Hopper { .. }) { 2 * size_of::<u64>() } else { 0 };
        (self.stages() * ((rows + columns) * LINE_BYTES + barriers)) as u32
    }

    /// Threads of a block.
    fn threads(self) -> u32 {
        match self {
            Plan::Hopper { rows, .. } => (rows / GROUP_ROWS + 1) as u32 * 128,
            Plan::Decode { tokens, weights: 16 } => 32 * (tokens / 8).min(4) as u32,
            _ => WARP_THREADS,
        }
    }

    /// Whether there is such a kernel for the product, and the GPU has room for it.
    pub fn fits(self, gpu: Gpu, product: Product) -> bool {
        let forward = matches!(product, Product::Forward | Product::Swiglu);
        let exists = match self {
            Plan::Large => true,
            Plan::Small => !forward,
            Plan::Decode { tokens, weights } => {
                forward && matches!(tokens, 8 | 16 | 32 | 64) && matches!(weights, 16 | 64)
            }
            Plan::Hopper { .. } => gpu.hopper && HOPPER_PLANS.contains(&self),
        };
        exists && self.smem_bytes() <= gpu.smem_bytes
    }

    /// Tiles of an output, in rows and columns.
    fn tiles(self, product: Product, (rows, columns): (usize, usize)) -> (usize, usize) {
        let tile = self.tile(product);
        (rows.div_ceil(tile.0), columns.div_ceil(tile.1))
    }

    /// Cycles per step of K, roughly: whole rounds of the multiprocessors, each bound by products or by loads.
    fn cost(self, gpu: Gpu, product: Product, output: (usize, usize)) -> f64 {
        let (rows, columns) = self.tile(Product::Forward);
        let (rate, cluster) = match self {
            Plan::Hopper { cluster, .. } => (GROUP_RATE, cluster),
            _ => (WARP_RATE, 1),
        };
        let down = self.tiles(product, output).0.next_multiple_of(cluster as usize);
        let rounds = (down * self.tiles(product, output).1).div_ceil(gpu.multiprocessors as usize);
        let loads = (rows as f64 + columns as f64 / f64::from(cluster)) * 2.0;
        rounds as f64 * (rows as f64 * columns as f64 / rate).max(loads / LOAD_RATE)
    }

    /// Blocks, and dynamic shared memory: as many blocks as can be resident, or one per tile.
    fn shape(self, gpu: Gpu, product: Product, output: (usize, usize)) -> Shape {
        let (down, across) = self.tiles(product, output);
        let smem = self.smem_bytes();
        let blocks = match self {
            Plan::Hopper { cluster, .. } => {
                let clusters = down.div_ceil(cluster as usize) * across;
                clusters.min((gpu.multiprocessors / cluster).max(1) as usize) * cluster as usize
            }
            _ => {
                let resident = (gpu.smem_bytes + RESERVED_SMEM) / (smem + RESERVED_SMEM);
                (down * across).min((gpu.multiprocessors * resident.clamp(1, 8)) as usize)
            }
        };
        let cluster = if let Plan::Hopper { cluster, .. } = self { cluster } else { 1 };
        Shape::new((blocks as u32, 1, 1), self.threads()).smem(smem).cluster(cluster)
    }
}

/// Every plan that a GPU has for a product.
pub fn plans(gpu: Gpu, product: Product) -> Vec<Plan> {
    let forward = matches!(product, Product::Forward | Product::Swiglu);
    let common = if forward { FORWARD_PLANS } else { GRADIENT_PLANS };
    HOPPER_PLANS.iter().chain(common).copied().filter(|plan| plan.fits(gpu, product)).collect()
}

/// The plan for an output of so many rows and columns (for [`Product::Swiglu`], F). Up to 64 rows of a forward product
/// stream the weight once, through the transposed product; else the least cost decides, by larger tiles when equal.
pub fn choose(gpu: Gpu, product: Product, output: (usize, usize)) -> Plan {
    let forward = matches!(product, Product::Forward | Product::Swiglu);
    let few = forward && output.0 <= MAX_DECODE_TOKENS;
    let tokens = output.0.next_power_of_two().clamp(8, MAX_DECODE_TOKENS);
    let mut best = (Plan::Large, f64::INFINITY);
    for plan in plans(gpu, product) {
        let suits = match plan {
            Plan::Decode { tokens: own, .. } => own == tokens,
            Plan::Hopper { rows, cluster, .. } => !few && (cluster == 1 || output.0 > rows),
            _ => !few,
        };
        let cost = plan.cost(gpu, product, output);
        if suits && cost < best.1 {
            best = (plan, cost);
        }
    }
    best.0
}

fn as_i32(n: usize) -> i32 {
    i32::try_from(n).expect("sizes of a model and a batch fit 31 bits")
}

/// Number of rows; rows are whole, and begin at 16 bytes.
fn rows_of(len: usize, width: usize, what: &str) -> usize {
    assert!(width > 0 && width.is_multiple_of(8), "{what} has rows of a multiple of 8 elements, not {width}");
    assert!(len.is_multiple_of(width), "{what} of {len} has whole rows of {width}");
    len / width
}

/// The number of a Hopper tile, as `gemm_tile` counts them.
fn hopper_tile(rows: usize, columns: usize) -> i32 {
    match (rows, columns) {
        (128, 256) => 0,
        (128, _) => 1,
        _ => 2,
    }
}

/// How TMA sees an operand: `lines` of `width`, in boxes of 64 K by `rows` of the tile, or of 64 by 64 when K counts lines.
fn operand(device: &Device, from: &View<'_, bf16>, width: usize, rows: usize, k_in_lines: bool) -> Result<TensorMap> {
    let box_rows = if k_in_lines { STEP_K } else { rows };
    device.tensor_map(from, (from.len() / width, width, width), (box_rows as u32, STEP_K as u32))
}

/// Address of an operand that may be absent.
fn address<T>(of: Option<T>, at: impl Fn(T) -> u64) -> u64 {
    of.map_or(0, at)
}

/// `y = x w^T (+ bias)`, or `y += ..` with `add`, rounded once; `k` is the width of x.
///
/// # Errors
/// When the launch fails.
pub fn forward(
    device: &Device,
    x_tk: &View<'_, bf16>,
    w_nk: &View<'_, bf16>,
    k: usize,
    bias_n: Option<&View<'_, bf16>>,
    y_tn: &mut ViewMut<'_, bf16>,
    add: bool,
) -> Result<()> {
    let output = (x_tk.len() / k.max(1), w_nk.len() / k.max(1));
    let plan = choose(Gpu::of(device), Product::Forward, output);
    forward_with(device, plan, x_tk, w_nk, k, bias_n, y_tn, add)
}

/// [`forward`] by a plan of the caller's.
///
/// # Errors
/// When the launch fails.
pub fn forward_with(
    device: &Device,
    plan: Plan,
    x_tk: &View<'_, bf16>,
    w_nk: &View<'_, bf16>,
    k: usize,
    bias_n: Option<&View<'_, bf16>>,
    y_tn: &mut ViewMut<'_, bf16>,
    add: bool,
) -> Result<()> {
    let (t, n) = (rows_of(x_tk.len(), k, "x"), rows_of(w_nk.len(), k, "w"));
    assert_eq!(rows_of(y_tn.len(), n, "y"), t, "rows of y for {t} of x");
    assert!(bias_n.is_none_or(|b| b.len() == n), "a bias of {n}");
    let gpu = Gpu::of(device);
    assert!(plan.fits(gpu, Product::Forward), "{plan:?} is not for this product or GPU");
    let shape = plan.shape(gpu, Product::Forward, (t, n));
    let bias = address(bias_n, View::at);
    let (t, n, depth, add) = (as_i32(t), as_i32(n), as_i32(k), i32::from(add));
    if t == 0 {
        return Ok(());
    }
    if let Plan::Hopper { rows, columns, cluster } = plan {
        let entry = Entry { file: "gemm_hopper", name: "gemm_hopper_forward" };
        let (x, w) = (operand(device, x_tk, k, rows, false)?, operand(device, w_nk, k, columns / 2, false)?);
        let tile = hopper_tile(rows, columns);
        let args = args![x, w, bias, y_tn.at(), t, n, depth, add, cluster as i32, tile];
        // SAFETY: the maps cover the operands; results past t rows and n columns are dropped; lengths are asserted above.
        return unsafe { device.launch(entry, shape, args) };
    }
    if let Plan::Decode { tokens, weights } = plan {
        let name = if weights == 64 { "gemm_decode_64" } else { "gemm_decode_16" };
        let args = args![x_tk.at(), w_nk.at(), bias, y_tn.at(), t, n, depth, add, as_i32(tokens)];
        // SAFETY: copies past an operand's end write zeros, results past y's are dropped; lengths are asserted above.
        return unsafe { device.launch(Entry { file: "gemm", name }, shape, args) };
    }
    let entry = Entry { file: "gemm", name: "gemm_forward" };
    let args = args![x_tk.at(), w_nk.at(), bias, y_tn.at(), t, n, depth, add];
    // SAFETY: as above.
    unsafe { device.launch(entry, shape, args) }
}

/// `h = silu(gate) up` with `[gate F][up F] = x w^T`, both rounded before; they go to `gate_up` when there is one. The
/// bits are those of [`forward`] and `swiglu_forward`.
///
/// # Errors
/// When the launch fails.
pub fn swiglu(
    device: &Device,
    x_tk: &View<'_, bf16>,
    w: &View<'_, bf16>,
    k: usize,
    gate_up: Option<&mut ViewMut<'_, bf16>>,
    h_tf: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let output = (x_tk.len() / k.max(1), w.len() / k.max(1) / 2);
    swiglu_with(device, choose(Gpu::of(device), Product::Swiglu, output), x_tk, w, k, gate_up, h_tf)
}

/// [`swiglu`] by a plan of the caller's.
///
/// # Errors
/// When the launch fails.
pub fn swiglu_with(
    device: &Device,
    plan: Plan,
    x_tk: &View<'_, bf16>,
    w: &View<'_, bf16>,
    k: usize,
    gate_up: Option<&mut ViewMut<'_, bf16>>,
    h_tf: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let (t, f) = (rows_of(x_tk.len(), k, "x"), rows_of(w.len(), 2 * k, "gates and ups"));
    assert_eq!(rows_of(h_tf.len(), f, "h"), t, "rows of h for {t} of x");
    assert!(gate_up.as_ref().is_none_or(|b| b.len() == 2 * t * f), "gate and up for {t} rows of {f}");
    let gpu = Gpu::of(device);
    assert!(plan.fits(gpu, Product::Swiglu), "{plan:?} is not for this product or GPU");
    let shape = plan.shape(gpu, Product::Swiglu, (t, f));
    let both = address(gate_up, |g| g.at());
    let (t, f, depth) = (as_i32(t), as_i32(f), as_i32(k));
    if t == 0 {
        return Ok(());
    }
    if let Plan::Hopper { rows, columns, cluster } = plan {
        let entry = Entry { file: "gemm_hopper", name: "gemm_hopper_swiglu" };
        let (x, w) = (operand(device, x_tk, k, rows, false)?, operand(device, w, k, columns / 2, false)?);
        let args = args![x, w, both, h_tf.at(), t, f, depth, cluster as i32, hopper_tile(rows, columns)];
        // SAFETY: the maps cover the operands; results past t rows and f columns are dropped; lengths are asserted above.
        return unsafe { device.launch(entry, shape, args) };
    }
    if let Plan::Decode { tokens, weights } = plan {
        let name = if weights == 64 { "gemm_decode_swiglu_64" } else { "gemm_decode_swiglu_16" };
        let args = args![x_tk.at(), w.at(), both, h_tf.at(), t, f, depth, as_i32(tokens)];
        // SAFETY: copies past an operand's end write zeros, results past h's are dropped; lengths are asserted above.
        return unsafe { device.launch(Entry { file: "gemm", name }, shape, args) };
    }
    let args = args![x_tk.at(), w.at(), both, h_tf.at(), t, f, depth];
    // SAFETY: as above.
    unsafe { device.launch(Entry { file: "gemm", name: "gemm_swiglu" }, shape, args) }
}

/// `dx = dy w`, or `dx += ..` with `add`, rounded once; `n` is the width of dy.
///
/// # Errors
/// When the launch fails.
pub fn input_gradient(
    device: &Device,
    dy_tn: &View<'_, bf16>,
    w_nk: &View<'_, bf16>,
    n: usize,
    dx_tk: &mut ViewMut<'_, bf16>,
    add: bool,
) -> Result<()> {
    let output = (dy_tn.len() / n.max(1), w_nk.len() / n.max(1));
    let plan = choose(Gpu::of(device), Product::InputGradient, output);
    input_gradient_with(device, plan, dy_tn, w_nk, n, dx_tk, add)
}

/// [`input_gradient`] by a plan of the caller's.
///
/// # Errors
/// When the launch fails.
pub fn input_gradient_with(
    device: &Device,
    plan: Plan,
    dy_tn: &View<'_, bf16>,
    w_nk: &View<'_, bf16>,
    n: usize,
    dx_tk: &mut ViewMut<'_, bf16>,
    add: bool,
) -> Result<()> {
    let t = rows_of(dy_tn.len(), n, "dy");
    let k = w_nk.len() / n;
    assert_eq!(rows_of(w_nk.len(), k, "w"), n, "rows of w for dy of {n}");
    assert_eq!(dx_tk.len(), t * k, "dx for {t} rows of {k}");
    let gpu = Gpu::of(device);
    assert!(plan.fits(gpu, Product::InputGradient), "{plan:?} is not for this product or GPU");
    let shape = plan.shape(gpu, Product::InputGradient, (t, k));
    let (rows_t, rows_n, width, add) = (as_i32(t), as_i32(n), as_i32(k), i32::from(add));
    if t == 0 {
        return Ok(());
    }
    if let Plan::Hopper { rows, columns, cluster } = plan {
        let entry = Entry { file: "gemm_hopper", name: "gemm_hopper_input" };
        let (dy, w) = (operand(device, dy_tn, n, rows, false)?, operand(device, w_nk, k, columns / 2, true)?);
        let tile = hopper_tile(rows, columns);
        let args = args![dy, w, dx_tk.at(), rows_t, rows_n, width, add, cluster as i32, tile];
        // SAFETY: the maps cover the operands; results past t rows and k columns are dropped; lengths are asserted above.
        return unsafe { device.launch(entry, shape, args) };
    }
    let name = if plan == Plan::Large { "gemm_input_128" } else { "gemm_input_64" };
    let args = args![dy_tn.at(), w_nk.at(), dx_tk.at(), rows_t, rows_n, width, add];
    // SAFETY: copies past an operand's end write zeros, results past dx's are dropped; lengths are asserted above.
    unsafe { device.launch(Entry { file: "gemm", name }, shape, args) }
}

/// `dw += dy^T x` in f32, the rows of the batch in order; `n` is the width of dy, `k` that of x.
///
/// # Errors
/// When the launch fails.
pub fn weight_gradient(
    device: &Device,
    dy_tn: &View<'_, bf16>,
    x_tk: &View<'_, bf16>,
    (n, k): (usize, usize),
    dw_nk: &mut ViewMut<'_, f32>,
) -> Result<()> {
    let plan = choose(Gpu::of(device), Product::WeightGradient, (n, k));
    weight_gradient_with(device, plan, dy_tn, x_tk, (n, k), dw_nk)
}

/// [`weight_gradient`] by a plan of the caller's.
///
/// # Errors
/// When the launch fails.
pub fn weight_gradient_with(
    device: &Device,
    plan: Plan,
    dy_tn: &View<'_, bf16>,
    x_tk: &View<'_, bf16>,
    (n, k): (usize, usize),
    dw_nk: &mut ViewMut<'_, f32>,
) -> Result<()> {
    let t = rows_of(dy_tn.len(), n, "dy");
    assert_eq!(rows_of(x_tk.len(), k, "x"), t, "rows of x for {t} of dy");
    assert_eq!(dw_nk.len(), n * k, "a gradient of {n} x {k}");
    let gpu = Gpu::of(device);
    assert!(plan.fits(gpu, Product::WeightGradient), "{plan:?} is not for this product or GPU");
    let shape = plan.shape(gpu, Product::WeightGradient, (n, k));
    let (rows_t, rows_n, width) = (as_i32(t), as_i32(n), as_i32(k));
    if t == 0 {
        return Ok(());
    }
    if let Plan::Hopper { rows, columns, cluster } = plan {
        let entry = Entry { file: "gemm_hopper", name: "gemm_hopper_weight" };
        let (dy, x) = (operand(device, dy_tn, n, rows, true)?, operand(device, x_tk, k, columns / 2, true)?);
        let tile = hopper_tile(rows, columns);
        let args = args![dy, x, dw_nk.at(), rows_t, rows_n, width, cluster as i32, tile];
        // SAFETY: the maps cover the operands; results past n rows and k columns are dropped; lengths are asserted above.
        return unsafe { device.launch(entry, shape, args) };
    }
    let name = if plan == Plan::Large { "gemm_weight_128" } else { "gemm_weight_64" };
    let args = args![dy_tn.at(), x_tk.at(), dw_nk.at(), rows_t, rows_n, width];
    // SAFETY: copies past an operand's end write zeros, results past dw's are dropped; lengths are asserted above.
    unsafe { device.launch(Entry { file: "gemm", name }, shape, args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: Gpu = Gpu { hopper: true, multiprocessors: 132, smem_bytes: 227 << 10 };
    const A100: Gpu = Gpu { hopper: false, multiprocessors: 108, smem_bytes: 163 << 10 };
    const RTX4090: Gpu = Gpu { hopper: false, multiprocessors: 128, smem_bytes: 99 << 10 };
    const PRODUCTS: [Product; 4] = [Product::Forward, Product::Swiglu, Product::InputGradient, Product::WeightGradient];

    #[test]
    fn every_shape_has_a_plan_that_fits() {
        for gpu in [H100, A100, RTX4090] {
            for product in PRODUCTS {
                for rows in [1, 7, 8, 9, 64, 65, 256, 1000, 8192, 100_000] {
                    for columns in [8, 128, 896, 4864, 18944, 151_936] {
                        let plan = choose(gpu, product, (rows, columns));
                        assert!(plan.fits(gpu, product), "{plan:?} for {product:?} {rows} x {columns} on {gpu:?}");
                        let shape = plan.shape(gpu, product, (rows, columns));
                        assert!(shape.grid.0 > 0 && shape.grid.0.is_multiple_of(shape.cluster), "{shape:?}");
                        assert!(shape.smem_bytes <= gpu.smem_bytes, "{shape:?} on {gpu:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn few_rows_stream_the_weight_once() {
        for gpu in [H100, A100, RTX4090] {
            for rows in 1..=64 {
                for columns in [896, 4864, 37888] {
                    let Plan::Decode { tokens, .. } = choose(gpu, Product::Forward, (rows, columns)) else {
                        panic!("{rows} rows are decoded");
                    };
                    assert!(rows <= tokens && (tokens == 8 || tokens < 2 * rows), "{tokens} for {rows} rows");
                }
            }
        }
    }

    #[test]
    fn narrow_weights_get_narrow_tiles_and_wide_ones_wide_tiles() {
        let decode = |n| choose(H100, Product::Forward, (8, n));
        assert_eq!(decode(896), Plan::Decode { tokens: 8, weights: 16 });
        assert_eq!(decode(37888), Plan::Decode { tokens: 8, weights: 64 });
    }

    #[test]
    fn large_products_take_the_largest_tiles() {
        let wide = Plan::Hopper { rows: 128, columns: 256, cluster: 2 };
        for product in PRODUCTS {
            assert_eq!(choose(H100, product, (8192, 18944)), wide, "{product:?}");
            assert_eq!(choose(A100, product, (8192, 18944)), Plan::Large, "{product:?}");
        }
        assert_eq!(choose(A100, Product::WeightGradient, (896, 896)), Plan::Small);
    }

    #[test]
    fn shared_memory_is_what_the_kernels_lay_out() {
        assert_eq!(Plan::Large.smem_bytes(), 3 * 256 * 128);
        assert_eq!(Plan::Small.smem_bytes(), 4 * 128 * 128);
        assert_eq!(Plan::Decode { tokens: 8, weights: 16 }.smem_bytes(), 8 * 24 * 128);
        assert_eq!(Plan::Hopper { rows: 128, columns: 256, cluster: 2 }.smem_bytes(), 4 * (384 * 128 + 16));
        assert_eq!(Plan::Hopper { rows: 64, columns: 128, cluster: 1 }.smem_bytes(), 8 * (192 * 128 + 16));
    }
}
