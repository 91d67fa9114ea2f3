//! Operations on rows: RMSNorm, RoPE with query and key norms, SwiGLU, AdamW. Bodies are plain Rust, compiled once per
//! instruction set by [`multiversion`].

use crate::compute::cpu::math::{LANES, dot, exp};
use crate::compute::ops::{AdamW, Heads};

/// Compiles a body for AVX-512, AVX2 and the base instruction set, and picks by [`Isa`]. The bits are the same.
macro_rules! multiversion {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path) => {
        $(#[$doc])*
        $vis fn $name(isa: $crate::compute::cpu::gemm::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                match isa {
                    // SAFETY: `Isa::detect` found the instruction set.
                    $crate::compute::cpu::gemm::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::compute::cpu::gemm::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::compute::cpu::gemm::Isa::Portable => {}
                }
            }
            let _ = isa;
            $body($($arg),*)
        }
    };
}
pub(crate) use multiversion;

multiversion! {
    /// RMSNorm of rows of `x`.
    pub fn rmsnorm(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) = rmsnorm_body
}

#[inline(always)]
fn rmsnorm_body(x: &[f32], w: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
    let d = w.len();
    for ((x, y), rstd) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(rstd) {
        *rstd = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
        for i in 0..d {
            y[i] = x[i] * *rstd * w[i];
        }
    }
}

multiversion! {
    /// Input gradient of RMSNorm, added to `dx`.
    pub fn rmsnorm_dx(x: &[f32], w: &[f32], rstd: &[f32], dy: &[f32], dx: &mut [f32]) = rmsnorm_dx_body
}

#[inline(always)]
fn rmsnorm_dx_body(x: &[f32], w: &[f32], rstd: &[f32], dy: &[f32], dx: &mut [f32]) {
    let d = w.len();
    let mut dyw = vec![0.0f32; d];
    for (((x, dy), dx), r) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d)).zip(rstd) {
        for i in 0..d {
            dyw[i] = dy[i] * w[i];
        }
        let c = dot(&dyw, x) * r * r / d as f32;
        for i in 0..d {
            dx[i] += r * (dyw[i] - x[i] * c);
        }
    }
}

multiversion! {
    /// Weight gradient of RMSNorm, rows in order, added to `dw` (columns `from..from + dw.len()` of the rows).
    pub fn rmsnorm_dw(x: &[f32], rstd: &[f32], dy: &[f32], d: usize, from: usize, dw: &mut [f32]) = rmsnorm_dw_body
}

#[inline(always)]
fn rmsnorm_dw_body(x: &[f32], rstd: &[f32], dy: &[f32], d: usize, from: usize, dw: &mut [f32]) {
    for ((x, dy), r) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(rstd) {
        let (x, dy) = (&x[from..][..dw.len()], &dy[from..][..dw.len()]);
        for i in 0..dw.len() {
            dw[i] = (x[i] * r).mul_add(dy[i], dw[i]);
        }
    }
}

multiversion! {
    /// Sum of rows of `dy`, in order, added to `db` (columns `from..from + db.len()`).
    pub fn column_sums(dy: &[f32], n: usize, from: usize, db: &mut [f32]) = column_sums_body
}

#[inline(always)]
fn column_sums_body(dy: &[f32], n: usize, from: usize, db: &mut [f32]) {
    for dy in dy.chunks_exact(n) {
        for (b, x) in db.iter_mut().zip(&dy[from..]) {
            *b += x;
        }
    }
}

multiversion! {
    /// `h = silu(gate) * up` of rows `[gate F][up F]`.
    pub fn swiglu(gate_up: &[f32], f: usize, h: &mut [f32]) = swiglu_body
}

#[inline(always)]
fn swiglu_body(gate_up: &[f32], f: usize, h: &mut [f32]) {
    for (row, h) in gate_up.chunks_exact(2 * f).zip(h.chunks_exact_mut(f)) {
        let (gate, up) = row.split_at(f);
        for i in 0..f {
            h[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i];
        }
    }
}

multiversion! {
    /// Gradient of [`swiglu`].
    pub fn swiglu_backward(gate_up: &[f32], dh: &[f32], f: usize, d: &mut [f32]) = swiglu_backward_body
}

#[inline(always)]
fn swiglu_backward_body(gate_up: &[f32], dh: &[f32], f: usize, d: &mut [f32]) {
    for ((row, dh), d) in gate_up.chunks_exact(2 * f).zip(dh.chunks_exact(f)).zip(d.chunks_exact_mut(2 * f)) {
        let ((gate, up), (dgate, dup)) = (row.split_at(f), d.split_at_mut(f));
        for i in 0..f {
            let sigmoid = 1.0 / (1.0 + exp(-gate[i]));
            let silu = gate[i] * sigmoid;
            dgate[i] = dh[i] * up[i] * (sigmoid + silu * (1.0 - sigmoid));
            dup[i] = dh[i] * silu;
        }
    }
}

/// RMSNorm of one head in place.
#[inline(always)]
fn norm_head(x: &mut [f32], w: &[f32], eps: f32) {
    let rstd = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for (x, w) in x.iter_mut().zip(w) {
        *x = *x * rstd * w;
    }
}

/// Rotates one head by the angles of a position; `direction` -1 rotates back.
#[inline(always)]
fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32], direction: f32) {
    let (a, b) = x.split_at_mut(cos.len());
    for i in 0..cos.len() {
        let (s, p, q) = (sin[i] * direction, a[i], b[i]);
        a[i] = p.mul_add(cos[i], -(q * s));
        b[i] = q.mul_add(cos[i], p * s);
    }
}

/// One fused row: query and key heads normed (if asked) and rotated.
#[inline(always)]
pub fn rope_row(heads: Heads, row: &mut [f32], cos: &[f32], sin: &[f32], norms: Option<(&[f32], &[f32], f32)>) {
    for (h, x) in row.chunks_exact_mut(heads.head_dim).take(heads.num_heads + heads.num_kv_heads).enumerate() {
        if let Some((q, k, eps)) = norms {
            norm_head(x, if h < heads.num_heads { q } else { k }, eps);
        }
        rotate(x, cos, sin, 1.0);
    }
}

/// Backward of [`rope_row`] in place; with norms also adds the gradients of their weights.
#[inline(always)]
pub fn rope_row_backward(
    heads: Heads,
    row: &mut [f32],
    raw: &[f32],
    cos: &[f32],
    sin: &[f32],
    norms: Option<(&[f32], &[f32], f32)>,
    mut dnorms: Option<(&mut [f32], &mut [f32])>,
) {
    let c = heads.head_dim;
    for (h, dx) in row.chunks_exact_mut(c).take(heads.num_heads + heads.num_kv_heads).enumerate() {
        rotate(dx, cos, sin, -1.0);
        let Some((q, k, eps)) = norms else { continue };
        let x = &raw[h * c..][..c];
        let w = if h < heads.num_heads { q } else { k };
        let rstd = 1.0 / (dot(x, x) / c as f32 + eps).sqrt();
        if let Some((dq, dk)) = &mut dnorms {
            let dw: &mut [f32] = if h < heads.num_heads { dq } else { dk };
            for i in 0..c {
                dw[i] = (x[i] * rstd).mul_add(dx[i], dw[i]);
            }
        }
        let mut mean = 0.0;
        for i in 0..c {
            dx[i] *= w[i];
            mean = dx[i].mul_add(x[i], mean);
        }
        let mean = mean * rstd * rstd / c as f32;
        for i in 0..c {
            dx[i] = rstd * (dx[i] - x[i] * mean);
        }
    }
}

multiversion! {
    /// One AdamW step of a piece of a parameter.
    pub fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], grad_scale: f32, h: &AdamW) = adamw_body
}

#[inline(always)]
fn adamw_body(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], grad_scale: f32, h: &AdamW) {
    let step = h.step as f64;
    let correction1 = (1.0 - f64::from(h.beta1).powf(step)) as f32;
    let correction2 = (1.0 - f64::from(h.beta2).powf(step)).sqrt() as f32;
    let rate = h.learning_rate / correction1;
    let keep = 1.0 - h.learning_rate * h.weight_decay;
    for i in 0..p.len() {
        let g = g[i] * grad_scale;
        m[i] = h.beta1 * m[i] + (1.0 - h.beta1) * g;
        v[i] = h.beta2 * v[i] + (1.0 - h.beta2) * g * g;
        p[i] = p[i] * keep - rate * m[i] / (v[i].sqrt() / correction2 + h.eps);
    }
}

multiversion! {
    /// Sum of squares in f64 over 16 lanes.
    pub fn sum_of_squares(x: &[f32]) -> f64 = sum_of_squares_body
}

#[inline(always)]
fn sum_of_squares_body(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for chunk in x.chunks(LANES) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::{Purpose, Rng};
    use crate::compute::cpu::gemm::Isa;

    #[test]
    fn vector_and_portable_bodies_agree_to_the_bit() {
        let mut rng = Rng::new(2, Purpose::Test, 0, 0);
        let mut random = |n: usize| (0..n).map(|_| rng.normal() as f32 * 3.0).collect::<Vec<_>>();
        let (x, w, rows, d) = (random(5 * 37), random(37), 5, 37);
        let run = |isa: Isa| {
            let (mut y, mut rstd, mut h) = (vec![0.0; rows * d], vec![0.0; rows], vec![0.0; 5 * 18]);
            rmsnorm(isa, &x, &w, 1e-6, &mut y, &mut rstd);
            let mut dx = vec![0.0; rows * d];
            rmsnorm_dx(isa, &x, &w, &rstd, &y, &mut dx);
            swiglu(isa, &x[..5 * 36], 18, &mut h);
            (y, rstd, dx, h)
        };
        assert_eq!(run(Isa::detect()), run(Isa::Portable));
    }
}
