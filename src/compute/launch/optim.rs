//! Launchers of the optimiser: global gradient norm, clip factor and AdamW. Parameters are flat arrays of a multiple of
//! 8 elements. A weight is a bf16 and a 16-bit tail that together are its f32 master ([`split_master`]).

use bytemuck::{Pod, Zeroable};
use half::bf16;

use crate::base::rng::{Purpose, stream_key};
use crate::compute::launch::device::{Device, Element, Entry, Param, Shape, View, ViewMut, args};
use crate::compute::ops::AdamW;
use crate::error::Result;

/// Threads and elements of a block of `norm_partials`.
const NORM_THREADS: u32 = 256;
const NORM_BLOCK: usize = 32_768;
/// Threads of `clip_factor`'s block.
const MERGE_THREADS: u32 = 1024;
/// Threads of the update's blocks; each has 8 elements.
const UPDATE_THREADS: usize = 256;

/// Norm of the gradient and what follows from it; lives on the device.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C, align(16))]
pub struct ClipState {
    /// Global norm before clipping.
    pub norm: f64,
    /// Factor on the gradient.
    pub scale: f32,
    /// 1 when the norm is not finite: updates then change nothing but clear the gradient.
    pub broken: u32,
}

impl Element for ClipState {}

/// Constants of a step as the kernels take them.
#[derive(Clone, Copy)]
#[repr(C)]
struct AdamStep {
    rate: f32,
    keep: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    correction2: f32,
    eps: f32,
}

impl Param for AdamStep {}

impl AdamStep {
    /// The CPU's constants, computed as it does; the clip factor comes from the device.
    fn new(h: &AdamW) -> Self {
        let step = h.step as f64;
        let correction1 = (1.0 - f64::from(h.beta1).powf(step)) as f32;
        let correction2 = (1.0 - f64::from(h.beta2).powf(step)).sqrt() as f32;
        AdamStep {
            rate: h.learning_rate / correction1,
            keep: 1.0 - h.learning_rate * h.weight_decay,
            beta1: h.beta1,
            rest1: 1.0 - h.beta1,
            beta2: h.beta2,
            rest2: 1.0 - h.beta2,
            correction2,
            eps: h.eps,
        }
    }
}

/// Noise that rounds a parameter's moments.
#[derive(Debug, Clone, Copy)]
pub struct Rounding {
    /// The run's seed.
    pub seed: u64,
    /// Number of the parameter in the table.
    pub parameter: u32,
}

/// Key and upper words of the counter as the kernel takes them.
#[derive(Clone, Copy)]
#[repr(C)]
struct RoundNoise {
    key: [u32; 2],
    stream: u32,
    step: [u32; 2],
}

impl Param for RoundNoise {}

/// bf16 (nearest, ties away from zero) and tail of an f32: exact, and both in 4 bytes.
pub fn split_master(x: f32) -> (bf16, u16) {
    (bf16::from_bits((x.to_bits().wrapping_add(0x8000) >> 16) as u16), x.to_bits() as u16)
}

/// The f32 of a bf16 and its tail.
pub fn join_master(bf: bf16, tail: u16) -> f32 {
    f32::from_bits(u32::from(bf.to_bits().wrapping_sub(tail >> 15)) << 16 | u32::from(tail))
}

/// Elements of a parameter; whole eights.
fn elements(n: usize) -> u64 {
    assert!(n.is_multiple_of(8), "parameters have a multiple of 8 elements, not {n}");
    n as u64
}

/// Sums that [`norm_partials`] leaves of `n` elements.
pub fn norm_blocks(n: usize) -> usize {
    n.div_ceil(NORM_BLOCK)
}

/// Leaves sums of squares of a gradient over fixed blocks in its part of the partial sums ([`norm_blocks`] of them).
///
/// # Errors
/// When the launch fails.
pub fn norm_partials(device: &Device, g: &View<'_, f32>, partial: &mut ViewMut<'_, f64>) -> Result<()> {
    assert_eq!(partial.len(), norm_blocks(g.len()), "partial sums of {} elements", g.len());
    let entry = Entry { file: "optim", name: "norm_partials" };
    let args = args![g.at(), partial.at(), elements(g.len())];
    // SAFETY: one block per sum; the kernel stops at the last element.
    unsafe { device.launch(entry, Shape::new((partial.len() as u32, 1, 1), NORM_THREADS), args) }
}

/// Norm and clip factor from the partial sums of all parameters, in the table's order. `max_norm` 0 does not clip.
///
/// # Errors
/// When the launch fails.
pub fn clip_factor(
    device: &Device,
    partial: &View<'_, f64>,
    max_norm: f32,
    clip: &mut ViewMut<'_, ClipState>,
) -> Result<()> {
    assert_eq!(clip.len(), 1, "one clip state");
    let count = i32::try_from(partial.len()).expect("a model has less than 2^46 elements");
    let entry = Entry { file: "optim", name: "clip_factor" };
    let args = args![partial.at(), clip.at(), count, max_norm];
    // SAFETY: one block reads the sums and writes the state.
    unsafe { device.launch(entry, Shape::new((1, 1, 1), MERGE_THREADS), args) }
}

/// A parameter that is updated: weight, tail and gradient, which is zero afterwards.
pub struct Parameter<'a> {
    /// Working weight.
    pub weight: ViewMut<'a, bf16>,
    /// Its tail.
    pub tail: ViewMut<'a, u16>,
    /// Gradient.
    pub grad: ViewMut<'a, f32>,
}

/// Grid of an update.
fn update_shape(n: usize) -> Shape {
    let blocks = u32::try_from((n / 8).div_ceil(UPDATE_THREADS)).expect("a parameter has less than 2^43 elements");
    Shape::new((blocks, 1, 1), UPDATE_THREADS as u32)
}

/// One AdamW step with f32 moments: the bits of the CPU's.
///
/// # Errors
/// When the launch fails.
pub fn adamw_f32(
    device: &Device,
    parameter: &mut Parameter<'_>,
    (m, v): (&mut ViewMut<'_, f32>, &mut ViewMut<'_, f32>),
    clip: &View<'_, ClipState>,
    hyper: &AdamW,
) -> Result<()> {
    let Parameter { weight, tail, grad } = parameter;
    let n = weight.len();
    assert_eq!((tail.len(), grad.len(), m.len(), v.len(), clip.len()), (n, n, n, n, 1), "arrays of one length");
    let entry = Entry { file: "optim", name: "adamw_f32" };
    let step = AdamStep::new(hyper);
    let args = args![weight.at(), tail.at(), grad.at(), m.at(), v.at(), clip.at(), step, elements(n)];
    // SAFETY: threads past the last eight return; lengths are asserted above.
    unsafe { device.launch(entry, update_shape(n), args) }
}

/// As [`adamw_f32`] with bf16 moments, rounded stochastically by noise of (seed, parameter, step, element).
///
/// # Errors
/// When the launch fails.
pub fn adamw_bf16(
    device: &Device,
    parameter: &mut Parameter<'_>,
    (m, v): (&mut ViewMut<'_, bf16>, &mut ViewMut<'_, bf16>),
    clip: &View<'_, ClipState>,
    hyper: &AdamW,
    rounding: Rounding,
) -> Result<()> {
    let Parameter { weight, tail, grad } = parameter;
    let n = weight.len();
    assert_eq!((tail.len(), grad.len(), m.len(), v.len(), clip.len()), (n, n, n, n, 1), "arrays of one length");
    let entry = Entry { file: "optim", name: "adamw_bf16" };
    let noise = RoundNoise {
        key: stream_key(rounding.seed, Purpose::Round),
        stream: rounding.parameter * 2,
        step: [hyper.step as u32, (hyper.step >> 32) as u32],
    };
    let step = AdamStep::new(hyper);
    let args = args![weight.at(), tail.at(), grad.at(), m.at(), v.at(), clip.at(), step, noise, elements(n)];
    // SAFETY: threads past the last eight return; lengths are asserted above.
    unsafe { device.launch(entry, update_shape(n), args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_survives_its_split() {
        for bits in (0..u32::MAX).step_by(65_521).chain([0x8000, 0x1_8000, 0x3f80_7fff, 0x3f80_8000, 0x7f7f_ffff]) {
            let x = f32::from_bits(bits);
            let (bf, tail) = split_master(x);
            assert_eq!(join_master(bf, tail).to_bits(), bits);
            let error = (bf.to_f32() - x).abs();
            assert!(!bf.is_finite() || !x.is_finite() || error <= (bf16::from_f32(x).to_f32() - x).abs(), "{x}");
        }
    }

    #[test]
    fn grids_cover_all_elements() {
        assert_eq!((norm_blocks(0), norm_blocks(8), norm_blocks(32_768), norm_blocks(32_776)), (0, 1, 1, 2));
        assert_eq!((update_shape(0).grid.0, update_shape(8).grid.0, update_shape(2_056).grid.0), (0, 1, 2));
    }
}
