//! `kernels/numerics.h` has the bits of the CPU's functions.

use azr::base::rng::philox4x32_10;
use azr::compute::cpu::math;
use azr::compute::launch::device::{Arg, Device, Entry, Shape};

use crate::harness::{Outcome, holds, no_probes, random_f32};

fn check(device: &Device) -> Outcome {
    let mut x = random_f32(1000, 1);
    x.extend([0.0, 1.0, -86.9, -87.1, -200.0, -3e38, f32::NEG_INFINITY, 87.9, 300.0, 1e-30, 3e38]);
    x.extend(random_f32(500, 2).iter().map(|v| v * 40.0));
    let n = x.len();
    let run = || {
        let input = device.upload(&x)?;
        let (mut out, mut words) = (device.alloc::<f32>(4 * n)?, device.alloc::<u32>(4 * n)?);
        let (at, out_at, words_at) = (input.view().at(), out.view_mut().at(), words.view_mut().at());
        let args = [Arg::of(at), Arg::of(out_at), Arg::of(words_at), Arg::of(n as i32)];
        let entry = Entry { file: "numerics", name: "probe_numerics" };
        // SAFETY: arrays of the lengths that the kernel writes.
        unsafe { device.launch(entry, Shape::new((n.div_ceil(64) as u32, 1, 1), 64), &args) }?;
        Ok((device.download(&out.view())?, device.download(&words.view())?))
    };
    let (out, words) = run().map_err(|e: azr::Error| e.to_string())?;
    for (i, x) in x.iter().enumerate() {
        let positive = x.abs();
        let want = [math::exp(*x), math::ln(positive), 1.0 / positive.sqrt(), math::exp(x.min(88.0))];
        for (which, want) in want.iter().enumerate() {
            let got = out[which * n + i];
            // The logarithms of 0 and of infinity are no numbers that anybody reads.
            if got.to_bits() != want.to_bits() && !(which == 1 && (positive == 0.0 || positive.is_infinite())) {
                return Err(format!("function {which} of {x}: {got} for {want}"));
            }
        }
        if words[4 * i..][..4] != philox4x32_10([i as u32, 1, 2, 3], [4, 5]) {
            return Err(format!("philox of {i}"));
        }
    }
    Ok(Vec::new())
}

#[test]
fn elementary_functions_have_the_bits_of_the_cpu() {
    if no_probes() {
        return;
    }
    holds(check);
}
