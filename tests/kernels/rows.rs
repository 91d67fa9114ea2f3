//! Row-wise kernels: RMSNorm, embedding, column sums, SwiGLU.

use azr::compute::launch::device::Device;
use azr::compute::launch::rows::{
    EmbedPlan, add_partials, column_sums, column_sums_scratch, embed_backward, embed_forward, rmsnorm_add_forward,
    rmsnorm_backward, rmsnorm_forward, rmsnorm_scratch, swiglu_backward, swiglu_forward,
};
use half::bf16;

use crate::harness::{Outcome, bytes, compare, finds, holds, random_bf16, random_f32, wide};

const EPS: f32 = 1e-6;
/// Rows and widths: the smallest, primes, one thread more than a warp, more than one pass of a block, the widest.
const SHAPES: &[(usize, usize)] = &[(1, 8), (3, 24), (9, 64), (17, 136), (2, 264), (5, 1048), (1, 5120)];

fn fail(e: azr::Error) -> String {
    e.to_string()
}

/// 1 / rms of every row.
fn rstd_reference(x: &[f64], d: usize) -> Vec<f64> {
    x.chunks(d).map(|r| 1.0 / (r.iter().map(|v| v * v).sum::<f64>() / d as f64 + f64::from(EPS)).sqrt()).collect()
}

fn norm_reference(x: &[f64], w: &[f64]) -> Vec<f64> {
    let d = w.len();
    let rstd = rstd_reference(x, d);
    x.iter().enumerate().map(|(i, v)| v * rstd[i / d] * w[i % d]).collect()
}

fn check_rmsnorm(device: &Device, (t, d): (usize, usize)) -> Outcome {
    let (x, w) = (random_bf16(t * d, 1), random_bf16(d, 2));
    let run = || {
        let (x, w) = (device.upload(&x)?, device.upload(&w)?);
        let (mut y, mut rstd) = (device.alloc::<bf16>(t * d)?, device.alloc::<f32>(t)?);
        rmsnorm_forward(device, &x.view(), &w.view(), EPS, &mut y.view_mut(), &mut rstd.view_mut())?;
        Ok((device.download(&y.view())?, device.download(&rstd.view())?))
    };
    let (y, rstd) = run().map_err(fail)?;
    let (x, w) = (wide(&x), wide(&w));
    compare("rstd", &rstd, &rstd_reference(&x, d), 1e-5)?;
    compare("y", &y, &norm_reference(&x, &w), 1e-5)?;
    Ok([bytes(&y), bytes(&rstd)].concat())
}

fn check_rmsnorm_add(device: &Device, (t, d): (usize, usize)) -> Outcome {
    let (x, delta, w) = (random_bf16(t * d, 1), random_bf16(t * d, 3), random_bf16(d, 2));
    let run = || {
        let (mut xs, deltas, w) = (device.upload(&x)?, device.upload(&delta)?, device.upload(&w)?);
        let (mut y, mut rstd) = (device.alloc::<bf16>(t * d)?, device.alloc::<f32>(t)?);
        let (y_out, rstd_out) = (&mut y.view_mut(), &mut rstd.view_mut());
        rmsnorm_add_forward(device, &mut xs.view_mut(), &deltas.view(), &w.view(), EPS, y_out, rstd_out)?;
        Ok((device.download(&xs.view())?, device.download(&y.view())?, device.download(&rstd.view())?))
    };
    let (sum, y, rstd) = run().map_err(fail)?;
    let expected: Vec<bf16> = x.iter().zip(&delta).map(|(a, b)| bf16::from_f32(a.to_f32() + b.to_f32())).collect();
    if sum != expected {
        return Err("the stream is not x + delta".to_owned());
    }
    let (expected, w) = (wide(&expected), wide(&w));
    compare("rstd", &rstd, &rstd_reference(&expected, d), 1e-5)?;
    compare("y", &y, &norm_reference(&expected, &w), 1e-5)?;
    Ok([bytes(&sum), bytes(&y), bytes(&rstd)].concat())
}

fn check_rmsnorm_backward(device: &Device, (t, d): (usize, usize)) -> Outcome {
    let (x, w, dy) = (random_bf16(t * d, 1), random_bf16(d, 2), random_bf16(t * d, 4));
    let (dx0, dw0) = (random_bf16(t * d, 5), random_f32(d, 6));
    let rstd: Vec<f32> = rstd_reference(&wide(&x), d).iter().map(|r| *r as f32).collect();
    let run = || {
        let (x, w, rstd, dy) = (device.upload(&x)?, device.upload(&w)?, device.upload(&rstd)?, device.upload(&dy)?);
        let (mut dx, mut dw) = (device.upload(&dx0)?, device.upload(&dw0)?);
        let mut partial = device.alloc::<f32>(rmsnorm_scratch(t, d))?;
        let saved = (&x.view(), &w.view(), &rstd.view());
        rmsnorm_backward(device, saved, &dy.view(), &mut dx.view_mut(), &mut partial.view_mut())?;
        add_partials(device, &partial.view(), &mut dw.view_mut())?;
        Ok((device.download(&dx.view())?, device.download(&dw.view())?))
    };
    let (dx, dw) = run().map_err(fail)?;
    let (x, w, dy) = (wide(&x), wide(&w), wide(&dy));
    let (mut want_dx, mut want_dw) = (wide(&dx0), dw0.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
    for (row, r) in rstd.iter().enumerate() {
        let (r, at) = (f64::from(*r), row * d);
        let c = (0..d).map(|i| dy[at + i] * w[i] * x[at + i]).sum::<f64>() * r * r / d as f64;
        for i in 0..d {
            want_dx[at + i] += r * (dy[at + i] * w[i] - x[at + i] * c);
            want_dw[i] += x[at + i] * r * dy[at + i];
        }
    }
    compare("dx", &dx, &want_dx, 1e-4)?;
    compare("dw", &dw, &want_dw, 1e-4)?;
    Ok([bytes(&dx), bytes(&dw)].concat())
}

fn check_column_sums(device: &Device, (t, n): (usize, usize)) -> Outcome {
    let (dy, db0) = (random_bf16(t * n, 1), random_f32(n, 2));
    let run = || {
        let (dy, mut db) = (device.upload(&dy)?, device.upload(&db0)?);
        let mut partial = device.alloc::<f32>(column_sums_scratch(t, n))?;
        column_sums(device, &dy.view(), n, &mut partial.view_mut())?;
        add_partials(device, &partial.view(), &mut db.view_mut())?;
        device.download(&db.view())
    };
    let db = run().map_err(fail)?;
    let mut want: Vec<f64> = db0.iter().map(|v| f64::from(*v)).collect();
    for (i, v) in wide(&dy).iter().enumerate() {
        want[i % n] += v;
    }
    compare("db", &db, &want, 1e-4)?;
    Ok(bytes(&db))
}

/// Tokens with repetitions, of a vocabulary of `v`.
fn tokens(t: usize, v: usize) -> Vec<u32> {
    (0..t).map(|i| ((i * i * 7 + i) % v) as u32).collect()
}

fn check_embedding(device: &Device, (t, d): (usize, usize)) -> Outcome {
    let (v, tokens) = (13, tokens(t, 13));
    let (table, dx, dtable0) = (random_bf16(v * d, 1), random_bf16(t * d, 2), random_f32(v * d, 3));
    let plan = EmbedPlan::new(&tokens);
    let run = || {
        let (ids, rows) = (device.upload(&tokens)?, device.upload(&table)?);
        let mut out = device.alloc::<bf16>(t * d)?;
        embed_forward(device, &ids.view(), &rows.view(), d, &mut out.view_mut())?;
        let (packed, dx, mut dtable) = (device.upload(&plan.packed())?, device.upload(&dx)?, device.upload(&dtable0)?);
        embed_backward(device, &packed.view(), plan.ids.len(), &dx.view(), d, &mut dtable.view_mut())?;
        Ok((device.download(&out.view())?, device.download(&dtable.view())?))
    };
    let (out, dtable) = run().map_err(fail)?;
    let mut want = dtable0;
    for (row, token) in tokens.iter().enumerate() {
        let at = *token as usize * d;
        if out[row * d..][..d] != table[at..][..d] {
            return Err(format!("row {row} is not that of token {token}"));
        }
        for i in 0..d {
            want[at + i] += dx[row * d + i].to_f32();
        }
    }
    if dtable != want {
        return Err("the table's gradient is not the sum in token order, to the bit".to_owned());
    }
    Ok([bytes(&out), bytes(&dtable)].concat())
}

fn check_swiglu(device: &Device, (t, f): (usize, usize)) -> Outcome {
    let (gate_up, dh) = (random_bf16(2 * t * f, 1), random_bf16(t * f, 2));
    let run = || {
        let (gate_up, dh) = (device.upload(&gate_up)?, device.upload(&dh)?);
        let (mut h, mut d) = (device.alloc::<bf16>(t * f)?, device.alloc::<bf16>(2 * t * f)?);
        swiglu_forward(device, &gate_up.view(), f, &mut h.view_mut())?;
        swiglu_backward(device, &gate_up.view(), &dh.view(), f, &mut d.view_mut())?;
        Ok((device.download(&h.view())?, device.download(&d.view())?))
    };
    let (h, d) = run().map_err(fail)?;
    let (gate_up, dh) = (wide(&gate_up), wide(&dh));
    let (mut want_h, mut want_d) = (Vec::new(), vec![0.0; 2 * t * f]);
    for (row, gate_up) in gate_up.chunks(2 * f).enumerate() {
        for i in 0..f {
            let (gate, up, dh) = (gate_up[i], gate_up[f + i], dh[row * f + i]);
            let sigmoid = 1.0 / (1.0 + (-gate).exp());
            want_h.push(gate * sigmoid * up);
            want_d[row * 2 * f + i] = dh * up * (sigmoid + gate * sigmoid * (1.0 - sigmoid));
            want_d[row * 2 * f + f + i] = dh * gate * sigmoid;
        }
    }
    compare("h", &h, &want_h, 1e-6)?;
    compare("gradient", &d, &want_d, 1e-6)?;
    Ok([bytes(&h), bytes(&d)].concat())
}

/// Checks every shape.
fn every_shape(check: fn(&Device, (usize, usize)) -> Outcome) {
    for shape in SHAPES {
        holds(|device| check(device, *shape).map_err(|wrong| format!("{shape:?}: {wrong}")));
    }
}

#[test]
fn rmsnorm_forward_is_right() {
    every_shape(check_rmsnorm);
}

#[test]
fn rmsnorm_add_forward_is_right() {
    every_shape(check_rmsnorm_add);
}

#[test]
fn rmsnorm_backward_and_add_partials_are_right() {
    every_shape(check_rmsnorm_backward);
}

#[test]
fn column_sums_are_right() {
    every_shape(check_column_sums);
    holds(|device| check_column_sums(device, (1100, 24)));
}

#[test]
fn embed_forward_and_embed_backward_are_right() {
    every_shape(check_embedding);
}

#[test]
fn swiglu_forward_and_swiglu_backward_are_right() {
    every_shape(check_swiglu);
}

#[test]
fn batches_without_rows_launch_nothing() {
    holds(|device| {
        check_rmsnorm(device, (0, 64))?;
        check_rmsnorm_backward(device, (0, 64))?;
        check_column_sums(device, (0, 64))?;
        check_embedding(device, (0, 64))?;
        check_swiglu(device, (0, 64))
    });
}

#[test]
fn planted_faults_are_found() {
    finds("block_sum_no_barrier", |device| check_rmsnorm(device, (3, 264)));
    finds("rmsnorm_weight_index", |device| check_rmsnorm_add(device, (3, 264)));
    finds("rmsnorm_scratch_reuse", |device| check_rmsnorm_backward(device, (9, 264)));
    finds("reduce_row_overlap", |device| check_column_sums(device, (130, 16)));
    finds("reduce_no_barrier", |device| check_column_sums(device, (130, 16)));
    finds("embedding_skips_a_row", |device| check_embedding(device, (17, 24)));
    finds("swiglu_up_index", |device| check_swiglu(device, (3, 24)));
    finds("swiglu_gradient_overlap", |device| check_swiglu(device, (3, 24)));
}
