//! Matrix products: every layout, epilogue and tile, the bits that they share, and faults.

use azr::compute::launch::device::{Device, View};
use azr::compute::launch::gemm::{
    Gpu, Plan, Product, forward, forward_with, input_gradient, input_gradient_with, plans, swiglu, swiglu_with,
    weight_gradient, weight_gradient_with,
};
use azr::compute::launch::rows::swiglu_forward;
use azr_kernel_emu::{Arithmetic, Emulator, Schedule};
use half::bf16;

use crate::harness::{Outcome, bytes, compare, device, finds, holds, on_gpu, random_bf16, random_f32, wide};

/// T, N, K of a product.
type Size = (usize, usize, usize);

/// Operands of a product and what it should give.
struct Case {
    product: Product,
    size: Size,
    /// Whether there is a bias (a gated product: whether gates and ups are kept).
    extra: bool,
    add: bool,
    x: Vec<bf16>,
    w: Vec<bf16>,
    dy: Vec<bf16>,
    bias: Vec<bf16>,
    /// What the output holds before.
    before: Vec<f32>,
    want: Vec<f64>,
}

/// `sum over s of a(i, s) b(j, s)`.
fn product(rows: usize, columns: usize, depth: usize, a: impl Fn(usize, usize) -> f64, b: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; rows * columns];
    for (i, row) in out.chunks_mut(columns).enumerate() {
        for s in 0..depth {
            let value = a(i, s);
            row.iter_mut().zip(&b[s * columns..]).for_each(|(y, b)| *y += value * b);
        }
    }
    out
}

fn transposed(x: &[f64], columns: usize) -> Vec<f64> {
    (0..columns).flat_map(|c| x.iter().skip(c).step_by(columns).copied()).collect()
}

impl Case {
    fn new(product_kind: Product, size: Size, extra: bool, add: bool) -> Case {
        let (t, n, k) = size;
        let weights = if product_kind == Product::Swiglu { 2 * n } else { n };
        let (x, w, dy) = (random_bf16(t * k, 1), random_bf16(weights * k, 2), random_bf16(t * n, 3));
        let bias = random_bf16(n, 4);
        let (wide_x, wide_w, wide_dy) = (wide(&x), wide(&w), wide(&dy));
        let (mut want, before) = match product_kind {
            Product::Forward | Product::Swiglu => {
                (product(t, weights, k, |i, s| wide_x[i * k + s], &transposed(&wide_w, k)), t * n)
            }
            Product::InputGradient => (product(t, k, n, |i, s| wide_dy[i * n + s], &wide_w), t * k),
            Product::WeightGradient => (product(n, k, t, |i, s| wide_dy[s * n + i], &wide_x), n * k),
        };
        let before: Vec<f32> = random_f32(before, 5).into_iter().map(|v| bf16::from_f32(v).to_f32()).collect();
        if product_kind == Product::Forward && extra {
            want.iter_mut().enumerate().for_each(|(i, v)| *v += f64::from(bias[i % n]));
        }
        if add {
            want.iter_mut().zip(&before).for_each(|(v, b)| *v += f64::from(*b));
        }
        Case { product: product_kind, size, extra, add, x, w, dy, bias, before, want }
    }

    /// Runs the product by a plan, or by the one that is chosen: the output's values, and gates and ups if kept.
    fn run(&self, device: &Device, plan: Option<Plan>) -> azr::Result<(Vec<f32>, Vec<bf16>)> {
        let (_, n, k) = self.size;
        let (x, w, dy, bias) =
            (device.upload(&self.x)?, device.upload(&self.w)?, device.upload(&self.dy)?, device.upload(&self.bias)?);
        let (x, w, dy, bias) = (x.view(), w.view(), dy.view(), bias.view());
        let short: Vec<bf16> = self.before.iter().map(|v| bf16::from_f32(*v)).collect();
        let mut y = device.upload(&short)?;
        let widened = |y: &View<'_, bf16>| Ok(device.download(y)?.iter().map(|v| v.to_f32()).collect::<Vec<f32>>());
        match self.product {
            Product::Forward => {
                let bias = self.extra.then_some(&bias);
                match plan {
                    Some(plan) => forward_with(device, plan, &x, &w, k, bias, &mut y.view_mut(), self.add)?,
                    None => forward(device, &x, &w, k, bias, &mut y.view_mut(), self.add)?,
                }
                Ok((widened(&y.view())?, vec![]))
            }
            Product::Swiglu => {
                let mut both = device.alloc::<bf16>(2 * y.len())?;
                let mut kept = both.view_mut();
                let kept = self.extra.then_some(&mut kept);
                match plan {
                    Some(plan) => swiglu_with(device, plan, &x, &w, k, kept, &mut y.view_mut())?,
                    None => swiglu(device, &x, &w, k, kept, &mut y.view_mut())?,
                }
                let both = if self.extra { device.download(&both.view())? } else { vec![] };
                Ok((widened(&y.view())?, both))
            }
            Product::InputGradient => {
                match plan {
                    Some(plan) => input_gradient_with(device, plan, &dy, &w, n, &mut y.view_mut(), self.add)?,
                    None => input_gradient(device, &dy, &w, n, &mut y.view_mut(), self.add)?,
                }
                Ok((widened(&y.view())?, vec![]))
            }
            Product::WeightGradient => {
                let mut dw = device.upload(&self.before)?;
                match plan {
                    Some(plan) => weight_gradient_with(device, plan, &dy, &x, (n, k), &mut dw.view_mut())?,
                    None => weight_gradient(device, &dy, &x, (n, k), &mut dw.view_mut())?,
                }
                Ok((device.download(&dw.view())?, vec![]))
            }
        }
    }

    /// Runs and compares with the reference.
    fn check(&self, device: &Device, plan: Option<Plan>) -> Outcome {
        let (y, both) = self.run(device, plan).map_err(|e| e.to_string())?;
        let short: Vec<bf16> = y.iter().map(|v| bf16::from_f32(*v)).collect();
        let named = |wrong: String| format!("{:?} {:?} {plan:?}: {wrong}", self.product, self.size);
        match self.product {
            Product::WeightGradient => compare("dw", &y, &self.want, 2e-4),
            Product::Swiglu => {
                let n = self.size.1;
                let gated = |row: &[f64], i: usize| row[i] / (1.0 + (-row[i]).exp()) * row[n + i];
                let want: Vec<f64> = self.want.chunks(2 * n).flat_map(|r| (0..n).map(move |i| gated(r, i))).collect();
                // Both factors are rounded to bf16 before.
                let close = |got: &bf16, want: f64| (got.to_f64() - want).abs() <= want.abs() * 0.05 + 0.05;
                let wrong = short.iter().zip(&want).position(|(got, want)| !close(got, *want));
                match wrong {
                    Some(i) => Err(format!("element {i} is {}, not {}", short[i], want[i])),
                    None if self.extra => compare("gates and ups", &both, &self.want, 2e-4),
                    None => Ok(()),
                }
            }
            _ => compare("y", &short, &self.want, 2e-4),
        }
        .map_err(named)?;
        Ok([bytes(&y), bytes(&both)].concat())
    }

    /// By one plan, under every schedule.
    fn holds_by(&self, plan: Plan) {
        holds(|device| self.check(device, Some(plan)));
    }
}

/// Sizes of one tile and of several, with every kind of edge; more steps of K than stages.
const SIZES: &[Size] = &[(1, 8, 8), (131, 264, 72), (67, 136, 520)];
/// More tiles than the emulated GPU's 3 multiprocessors hold.
const MANY_TILES: Size = (270, 392, 40);

const fn hopper(rows: usize, columns: usize, cluster: u32) -> Plan {
    Plan::Hopper { rows, columns, cluster }
}

const fn decode(tokens: usize, weights: usize) -> Plan {
    Plan::Decode { tokens, weights }
}

/// A product by these plans, the first for all sizes, the others for one with every edge.
fn every_size(product: Product, plans: &[Plan]) {
    for (i, size) in SIZES.iter().enumerate() {
        let add = i % 2 == 1 || product == Product::WeightGradient;
        let case = Case::new(product, *size, i != 2, add && product != Product::Swiglu);
        for plan in plans.iter().take(if i == 1 { plans.len() } else { 1 }) {
            case.holds_by(*plan);
        }
    }
}

fn on_hopper_only(check: impl Fn()) {
    if device().is_hopper() {
        check();
    }
}

/// `gemm_forward`.
#[test]
fn gemm_forward_is_right() {
    every_size(Product::Forward, &[Plan::Large]);
    Case::new(Product::Forward, MANY_TILES, true, true).holds_by(Plan::Large);
}

/// `gemm_swiglu`.
#[test]
fn gemm_swiglu_is_right() {
    every_size(Product::Swiglu, &[Plan::Large]);
}

/// `gemm_decode_64`.
#[test]
fn gemm_decode_64_is_right() {
    every_size(Product::Forward, &[decode(8, 64), decode(64, 64)]);
    Case::new(Product::Forward, (21, 1176, 72), true, true).holds_by(decode(16, 64));
    Case::new(Product::Forward, (21, 776, 72), true, false).holds_by(decode(32, 64));
}

/// `gemm_decode_16`.
#[test]
fn gemm_decode_16_is_right() {
    every_size(Product::Forward, &[decode(8, 16), decode(64, 16)]);
    Case::new(Product::Forward, (21, 408, 72), true, true).holds_by(decode(16, 16));
    Case::new(Product::Forward, (21, 408, 72), true, false).holds_by(decode(32, 16));
}

/// `gemm_decode_swiglu_64`.
#[test]
fn gemm_decode_swiglu_64_is_right() {
    every_size(Product::Swiglu, &[decode(8, 64), decode(32, 64)]);
}

/// `gemm_decode_swiglu_16`.
#[test]
fn gemm_decode_swiglu_16_is_right() {
    every_size(Product::Swiglu, &[decode(16, 16), decode(64, 16)]);
}

/// `gemm_input_128` and `gemm_input_64`.
#[test]
fn gemm_input_128_and_gemm_input_64_are_right() {
    every_size(Product::InputGradient, &[Plan::Large, Plan::Small]);
}

/// `gemm_weight_128` and `gemm_weight_64`.
#[test]
fn gemm_weight_128_and_gemm_weight_64_are_right() {
    every_size(Product::WeightGradient, &[Plan::Large, Plan::Small]);
}

/// `gemm_hopper_forward`.
#[test]
fn gemm_hopper_forward_is_right() {
    on_hopper_only(|| {
        every_size(Product::Forward, &[hopper(128, 256, 1), hopper(128, 256, 2), hopper(64, 128, 1)]);
        Case::new(Product::Forward, MANY_TILES, true, true).holds_by(hopper(128, 128, 2));
    });
}

/// `gemm_hopper_swiglu`.
#[test]
fn gemm_hopper_swiglu_is_right() {
    on_hopper_only(|| every_size(Product::Swiglu, &[hopper(128, 256, 2), hopper(128, 128, 1), hopper(64, 128, 2)]));
}

/// `gemm_hopper_input`.
#[test]
fn gemm_hopper_input_is_right() {
    on_hopper_only(|| {
        every_size(Product::InputGradient, &[hopper(128, 256, 2), hopper(128, 128, 1), hopper(64, 128, 2)])
    });
}

/// `gemm_hopper_weight`.
#[test]
fn gemm_hopper_weight_is_right() {
    on_hopper_only(|| {
        every_size(Product::WeightGradient, &[hopper(128, 256, 2), hopper(128, 128, 1), hopper(64, 128, 2)])
    });
}

#[test]
fn every_plan_and_every_number_of_rows_has_the_same_bits() {
    let device = device();
    let gpu = Gpu::of(&device);
    for arithmetic in [Arithmetic::Plain, Arithmetic::Hopper, Arithmetic::Ampere] {
        if on_gpu() && arithmetic != Arithmetic::Plain {
            continue;
        }
        if !on_gpu() {
            Emulator::get().schedule(Schedule { arithmetic, ..Schedule::PLAIN });
        }
        for kind in [Product::Forward, Product::Swiglu, Product::InputGradient, Product::WeightGradient] {
            let case = Case::new(kind, (70, 136, 200), true, kind != Product::Swiglu);
            let first = case.run(&device, None).expect("a product");
            let all = plans(gpu, kind);
            assert!(all.len() >= if gpu.hopper { 8 } else { 2 }, "{all:?}");
            for plan in all {
                let other = case.run(&device, Some(plan)).expect("a product");
                assert!(first == other, "{kind:?} by {plan:?} has other bits under {arithmetic:?}");
            }
            if kind == Product::WeightGradient {
                continue;
            }
            // The first rows alone, by whatever plan is chosen for so few.
            for t in [1, 5, 17, 64] {
                let few = Case::new(kind, (t, 136, 200), true, kind != Product::Swiglu);
                assert_eq!(few.x[..], case.x[..few.x.len()], "the same rows");
                let few = few.run(&device, None).expect("a product");
                assert!(few.0[..] == first.0[..few.0.len()], "{kind:?} of {t} rows has other bits");
                assert!(few.1[..] == first.1[..few.1.len()], "gates and ups of {t} rows have other bits");
            }
        }
    }
}

#[test]
fn the_gated_product_has_the_bits_of_the_product_and_swiglu_forward() {
    let (t, f, k) = (9, 72, 136);
    let (device, gated, plain) = (
        device(),
        Case::new(Product::Swiglu, (t, f, k), true, false),
        Case::new(Product::Forward, (t, 2 * f, k), false, false),
    );
    assert_eq!(gated.w, plain.w, "the same weight");
    let (h, both) = gated.run(&device, None).expect("a product");
    let (y, _) = plain.run(&device, None).expect("a product");
    let y: Vec<bf16> = y.iter().map(|v| bf16::from_f32(*v)).collect();
    assert_eq!(both, y, "gates and ups");
    let run = || {
        let (y, mut h) = (device.upload(&y)?, device.alloc::<bf16>(t * f)?);
        swiglu_forward(&device, &y.view(), f, &mut h.view_mut())?;
        device.download(&h.view())
    };
    let apart: Vec<f32> = run().expect("a launch").iter().map(|v| v.to_f32()).collect();
    assert_eq!(h, apart, "h");
}

#[test]
fn batches_without_rows_launch_nothing() {
    for kind in [Product::Forward, Product::Swiglu, Product::InputGradient, Product::WeightGradient] {
        let case = Case::new(kind, (0, 16, 24), true, kind == Product::WeightGradient);
        for plan in plans(Gpu::of(&device()), kind) {
            holds(|device| case.check(device, Some(plan)));
        }
    }
}

#[test]
fn fragments_load_without_bank_conflicts() {
    if on_gpu() {
        return;
    }
    let (device, emulator) = (device(), Emulator::get());
    emulator.schedule(Schedule::PLAIN);
    emulator.take_stats();
    for (kind, plans) in [
        (Product::Forward, vec![Plan::Large, decode(8, 64), decode(64, 16)]),
        (Product::InputGradient, vec![Plan::Large, Plan::Small]),
        (Product::WeightGradient, vec![Plan::Large, Plan::Small]),
    ] {
        let case = Case::new(kind, (64, 64, 64), false, false);
        for plan in plans {
            case.run(&device, Some(plan)).expect("a product");
            let stats = emulator.take_stats();
            assert!(stats.matrix_loads > 0 && stats.bank_replays == 0, "{kind:?} by {plan:?}: {stats:?}");
        }
    }
}

#[test]
fn planted_faults_are_found() {
    let case = Case::new(Product::Forward, (20, 136, 456), true, false);
    let (gated, dw) = (
        Case::new(Product::Swiglu, (20, 72, 72), false, false),
        Case::new(Product::WeightGradient, (9, 16, 24), false, true),
    );
    for plan in [Plan::Large, decode(32, 64)] {
        finds("gemm_no_barrier", |device| case.check(device, Some(plan)));
        finds("gemm_reads_past_k", |device| case.check(device, Some(plan)));
    }
    finds("gemm_row_pairs", |device| case.check(device, Some(Plan::Large)));
    finds("gemm_column_pairs", |device| case.check(device, Some(decode(32, 64))));
    finds("gemm_bias_index", |device| case.check(device, Some(Plan::Large)));
    finds("gemm_gate_twice", |device| gated.check(device, Some(Plan::Large)));
    finds("gemm_gradient_overwrites", |device| dw.check(device, Some(Plan::Small)));
    on_hopper_only(|| {
        finds("gemm_hopper_gate_twice", |device| gated.check(device, Some(hopper(64, 128, 1))));
        let case = Case::new(Product::Forward, (140, 136, 456), true, false);
        for fault in [
            "gemm_hopper_no_empty_wait",
            "gemm_hopper_early_release",
            "gemm_hopper_no_product_wait",
            "gemm_hopper_no_last_sync",
        ] {
            finds(fault, |device| case.check(device, Some(hopper(128, 256, 2))));
        }
    });
}

#[test]
fn every_entry_point_notices_a_missing_wait() {
    for kind in [Product::Forward, Product::Swiglu, Product::InputGradient, Product::WeightGradient] {
        let case = Case::new(kind, (20, 24, 40), false, false);
        for plan in [Plan::Large, Plan::Small, decode(16, 64), decode(16, 16)] {
            if plan.fits(Gpu::of(&device()), kind) {
                finds("gemm_waits_for_too_few", |device| case.check(device, Some(plan)));
            }
        }
        on_hopper_only(|| {
            finds("gemm_hopper_no_full_wait", |device| case.check(device, Some(hopper(64, 128, 1))));
        });
    }
}
