//! The emulator's tensor cores and asynchronous machinery, by small products of all kinds (kernels/emu/probes/tensor.cu),
//! and faults that it must report. The tensor cores' arithmetic models against a slow, plain one.

use azr::compute::launch::device::{Arg, Device, Entry, Shape};
use azr_kernel_emu::{Arithmetic, Emulator, Schedule};
use half::bf16;

use crate::harness::{Outcome, bytes, compare, device, finds, holds, no_probes, on_gpu, random_bf16, random_f32, wide};

fn entry(name: &'static str) -> Entry {
    Entry { file: "tensor", name }
}

/// `a b^T` in f64: rows of k.
fn product(a: &[bf16], b: &[bf16], k: usize) -> Vec<f64> {
    let (a, b) = (wide(a), wide(b));
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    a.chunks(k).flat_map(|x| b.chunks(k).map(move |y| dot(x, y))).collect()
}

fn transposed(x: &[bf16], rows: usize, cols: usize) -> Vec<bf16> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| x[r * cols + c])).collect()
}

fn mma(device: &Device, a: &[bf16], b: &[bf16], k: usize) -> azr::Result<Vec<f32>> {
    let (a, b, mut c) = (device.upload(a)?, device.upload(b)?, device.alloc::<f32>(64 * 64)?);
    let args = [Arg::of(a.view().at()), Arg::of(b.view().at()), Arg::of(c.view_mut().at()), Arg::of(k as i32)];
    // SAFETY: 64 rows of k each, and 64 x 64 results.
    unsafe { device.launch(entry("probe_mma"), Shape::new((1, 1, 1), 128).smem(16 << 10), &args) }?;
    device.download(&c.view())
}

fn check_mma(device: &Device) -> Outcome {
    let k = 96;
    let (a, b) = (random_bf16(64 * k, 1), random_bf16(64 * k, 2));
    let c = mma(device, &a, &b, k).map_err(|e| e.to_string())?;
    compare("c", &c, &product(&a, &b, k), 1e-4)?;
    Ok(bytes(&c))
}

/// The 64 x 128 product through TMA and wgmma; `kind` as in the probe.
fn wgmma(device: &Device, a: &[bf16], b: &[bf16], k: usize, kind: i32) -> azr::Result<Vec<f32>> {
    let (a_mn, b_mn) = (matches!(kind, 1 | 3), matches!(kind, 2 | 3 | 5));
    let a = if a_mn { transposed(a, 64, k) } else { a.to_vec() };
    let b = if b_mn { transposed(b, 128, k) } else { b.to_vec() };
    let (a, b, mut c) = (device.upload(&a)?, device.upload(&b)?, device.alloc::<f32>(64 * 128)?);
    let map_a = device.tensor_map(&a.view(), if a_mn { (k, 64, 64) } else { (64, k, k) }, (64, 64))?;
    let map_b = device.tensor_map(&b.view(), if b_mn { (k, 128, 128) } else { (128, k, k) }, (64, 64))?;
    let args = [Arg::of(map_a), Arg::of(map_b), Arg::of(c.view_mut().at()), Arg::of(k as i32), Arg::of(kind)];
    // SAFETY: the maps cover the operands, and there are 64 x 128 results.
    unsafe { device.launch(entry("probe_wgmma"), Shape::new((1, 1, 1), 160).smem(2 * 24576 + 32), &args) }?;
    device.download(&c.view())
}

fn check_wgmma(device: &Device, kind: i32) -> Outcome {
    let k = 256;
    let (a, b) = (random_bf16(64 * k, 1), random_bf16(128 * k, 2));
    let c = wgmma(device, &a, &b, k, kind).map_err(|e| e.to_string())?;
    compare("c", &c, &product(&a, &b, k), 1e-4).map_err(|wrong| format!("kind {kind}: {wrong}"))?;
    Ok(bytes(&c))
}

fn check_proxy(device: &Device) -> Outcome {
    let (a, b) = (random_bf16(64 * 64, 1), random_bf16(128 * 64, 2));
    let run = || {
        let (a, b, mut c) = (device.upload(&a)?, device.upload(&b)?, device.alloc::<f32>(64 * 128)?);
        let args = [Arg::of(a.view().at()), Arg::of(b.view().at()), Arg::of(c.view_mut().at())];
        // SAFETY: operands and results have the probe's sizes.
        unsafe { device.launch(entry("probe_proxy"), Shape::new((1, 1, 1), 128).smem(24576), &args) }?;
        device.download(&c.view())
    };
    let c = run().map_err(|e: azr::Error| e.to_string())?;
    compare("c", &c, &product(&a, &b, 64), 1e-4)?;
    Ok(bytes(&c))
}

fn check_cluster(device: &Device) -> Outcome {
    let (x, numbers) = (random_bf16(128 * 64, 1), random_f32(64, 2));
    let run = || {
        let (from, mut to) = (device.upload(&x)?, device.alloc::<bf16>(128 * 64)?);
        let (numbers, mut out) = (device.upload(&numbers)?, device.alloc::<f32>(2)?);
        let map_from = device.tensor_map(&from.view(), (128, 64, 64), (64, 64))?;
        let map_to = device.tensor_map(&to.view_mut().as_view(), (128, 64, 64), (64, 64))?;
        let args = [Arg::of(map_from), Arg::of(map_to), Arg::of(numbers.view().at()), Arg::of(out.view_mut().at())];
        let shape = Shape::new((2, 1, 1), 128).smem(2 * 8192 + 256 + 16).cluster(2);
        // SAFETY: the maps cover both matrices; 64 numbers, 2 results.
        unsafe { device.launch(entry("probe_cluster"), shape, &args) }?;
        Ok((device.download(&to.view())?, device.download(&out.view())?))
    };
    let (copy, sums) = run().map_err(|e: azr::Error| e.to_string())?;
    if copy != x {
        return Err("the copy is not the matrix".to_owned());
    }
    let sum = wide(&x).iter().sum::<f64>() + numbers.iter().map(|n| f64::from(*n)).sum::<f64>();
    compare("sums", &sums, &[2.0 * sum + 1.0, 2.0 * sum + 1.0], 1e-3)?;
    Ok([bytes(&copy), bytes(&sums)].concat())
}

#[test]
fn warp_products_are_right_and_without_bank_conflicts() {
    if no_probes() {
        return;
    }
    holds(check_mma);
    if on_gpu() {
        return;
    }
    let emulator = Emulator::get();
    emulator.schedule(Schedule::PLAIN);
    emulator.take_stats();
    check_mma(&device()).expect("a right product");
    let stats = emulator.take_stats();
    // 4 warps, 3 steps, 2 of 16: 4 loads of 4 matrices and 8 products each.
    assert_eq!((stats.matrix_loads, stats.bank_replays, stats.mmas), (4 * 6 * 16, 0, 4 * 6 * 8));
    for fault in ["probe_mma_no_wait", "probe_mma_no_barrier", "probe_mma_no_second_barrier"] {
        finds(fault, check_mma);
    }
}

#[test]
fn warpgroup_products_are_right_in_every_layout() {
    if no_probes() {
        return;
    }
    for kind in 0..6 {
        holds(|device| check_wgmma(device, kind));
    }
    for fault in [
        "probe_wgmma_no_init_fence",
        "probe_wgmma_no_empty_wait",
        "probe_wgmma_no_full_wait",
        "probe_wgmma_wrong_bytes",
        "probe_wgmma_no_fence",
        "probe_wgmma_early_release",
        "probe_wgmma_no_product_wait",
    ] {
        finds(fault, |device| check_wgmma(device, 0));
    }
}

#[test]
fn ordinary_stores_need_a_fence_before_a_warpgroup_product() {
    if no_probes() {
        return;
    }
    holds(check_proxy);
    let said = finds("probe_proxy_no_fence", check_proxy);
    assert!(on_gpu() || said.contains("fence_proxy_async"), "{said}");
}

#[test]
fn clusters_share_loads_barriers_and_memory() {
    if no_probes() {
        return;
    }
    holds(check_cluster);
    for fault in ["probe_cluster_no_first_sync", "probe_cluster_no_store_wait", "probe_cluster_no_last_sync"] {
        finds(fault, check_cluster);
    }
}

/// Aligned, truncated, exact sum of 16 products and an accumulator, in integers: what arithmetic.cpp does with floats.
fn hopper_sum(a: &[bf16], b: &[bf16], c: f32) -> f32 {
    let exponent = |x: f32| ((x.to_bits() >> 23 & 255) as i32 - 127).max(-126);
    let factors = || a.iter().zip(b).map(|(x, y)| (x.to_f32(), y.to_f32()));
    let top = factors().map(|(x, y)| exponent(x) + exponent(y)).max().unwrap_or(0).max(exponent(c));
    let cut = |x: f64| (x * 2f64.powi(25 - top)).trunc() as i64;
    let sum = cut(f64::from(c)) + factors().map(|(x, y)| cut(f64::from(x) * f64::from(y))).sum::<i64>();
    let exact = sum as f64 * 2f64.powi(top - 25);
    let near = exact as f32;
    if f64::from(near).abs() > exact.abs() { f32::from_bits(near.to_bits() - 1) } else { near }
}

#[test]
fn hopper_arithmetic_follows_the_model_and_both_paths_agree_to_the_bit() {
    if no_probes() {
        return;
    }
    let device = device();
    if !on_gpu() {
        Emulator::get().schedule(Schedule { arithmetic: Arithmetic::Hopper, ..Schedule::PLAIN });
    }
    let k = 256;
    // Wide exponents, and zeros; the last rows leave the range of the fast path.
    let spread = |x: Vec<bf16>, rows: usize| -> Vec<bf16> {
        let scaled = |(i, x): (usize, bf16)| {
            let power = if i / k + 2 >= rows { (i as i32 * 37 % 121) - 60 } else { (i as i32 * 37 % 25) - 12 };
            if i % 11 == 3 { bf16::ZERO } else { bf16::from_f32(x.to_f32() * 2f32.powi(power)) }
        };
        x.into_iter().enumerate().map(scaled).collect()
    };
    let (a, b) = (spread(random_bf16(64 * k, 1), 64), spread(random_bf16(128 * k, 2), 128));
    let by_warpgroup = wgmma(&device, &a, &b, k, 0).expect("a product");
    let (mut other, mut wrong) = (0, 0);
    for i in 0..64 {
        for j in 0..128 {
            let want = (0..k).step_by(16).fold(0.0, |c, s| hopper_sum(&a[i * k + s..][..16], &b[j * k + s..][..16], c));
            wrong += usize::from(by_warpgroup[i * 128 + j].to_bits() != want.to_bits());
            let plain = (0..k).fold(0.0f32, |c, s| c + a[i * k + s].to_f32() * b[j * k + s].to_f32());
            other += usize::from(plain.to_bits() != want.to_bits());
        }
    }
    assert!(other > 1000, "the model is not plain f32");
    // A GPU that differs from the model is news; one whose two paths differ could not sample and train alike.
    println!("{wrong} of {} elements differ from the model of Hopper", 64 * 128);
    assert!(wrong == 0 || on_gpu());
    for half in 0..2 {
        let by_warp = mma(&device, &a, &b[half * 64 * k..][..64 * k], k).expect("a product");
        for i in 0..64 {
            assert_eq!(by_warp[i * 64..][..64], by_warpgroup[i * 128 + half * 64..][..64], "row {i}");
        }
    }
}
