//! Norms of heads, rotation and page writes: `rope_forward` and `rope_backward`; copies of pages: `copy_pages`.

use azr::compute::launch::attention::{
    Angles, HeadNorms, NO_SLOT, RopePlan, copy_pages, rope_backward, rope_forward, rope_scratch,
};
use azr::compute::launch::device::Device;
use azr::compute::launch::rows::add_partials;
use azr::compute::ops::{Heads, PAGE, Span};
use half::bf16;

use crate::harness::{Outcome, bytes, compare, finds, holds, random_bf16, random_f32, wide};

const EPS: f32 = 1e-6;

/// A batch: heads, whether they are normed, and (position, rows) of its sequences.
#[derive(Debug, Clone, Copy)]
struct Case {
    heads: Heads,
    norms: bool,
    spans: &'static [(usize, usize)],
}

const fn case(
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    norms: bool,
    spans: &'static [(usize, usize)],
) -> Case {
    Case { heads: Heads { num_heads, num_kv_heads, head_dim }, norms, spans }
}

/// One token, primes, page edges, empty sequences, several sequences, more rows than a block of the backward pass.
const CASES: &[Case] = &[
    case(1, 1, 64, false, &[(0, 1)]),
    case(14, 2, 64, false, &[(0, 7), (3, 0), (15, 2)]),
    case(4, 2, 128, true, &[(31, 1), (0, 16)]),
    case(3, 1, 64, true, &[(5, 17), (0, 0), (16, 3)]),
    case(8, 1, 128, true, &[(0, 1)]),
    case(4, 2, 32, false, &[(0, 9), (13, 5)]),
    case(5, 1, 32, true, &[(14, 18), (0, 0), (2, 1)]),
    case(2, 2, 128, false, &[]),
];

/// Sequences' page tables without a page in common, highest first, and the number of pages.
pub fn tables(spans: &[(usize, usize)]) -> (Vec<Vec<u32>>, usize) {
    let counts: Vec<usize> = spans.iter().map(|(pos, len)| (pos + len).div_ceil(PAGE)).collect();
    let mut next = counts.iter().sum::<usize>() + 1;
    let total = next + 1;
    let mut take = |count: usize| {
        next -= count;
        (0..count).rev().map(|i| (next + i) as u32).collect()
    };
    (counts.iter().map(|count| take(*count)).collect(), total)
}

/// Spans one after another, as rows of a batch.
pub fn lay_out<'a>(spans: &[(usize, usize)], tables: &'a [Vec<u32>]) -> Vec<Span<'a>> {
    let mut row = 0;
    let place = |((pos, len), pages): (&(usize, usize), &'a Vec<u32>)| {
        row += len;
        Span { row: row - len, len: *len, pos: *pos, pages }
    };
    spans.iter().zip(tables).map(place).collect()
}

fn angle_tables(positions: usize, c: usize) -> (Vec<f32>, Vec<f32>) {
    let angle = |i: usize| (i / (c / 2)) as f64 / 10_000f64.powf((i % (c / 2)) as f64 / (c / 2) as f64);
    (0..positions * c / 2).map(|i| (angle(i).cos() as f32, angle(i).sin() as f32)).unzip()
}

/// Rotates a head by row `pos` of the tables.
fn rotate(x: &[f64], (cos, sin): (&[f32], &[f32]), pos: usize, direction: f64) -> Vec<f64> {
    let half = x.len() / 2;
    let mut out = vec![0.0; x.len()];
    for i in 0..half {
        let (c, s) = (f64::from(cos[pos * half + i]), f64::from(sin[pos * half + i]) * direction);
        out[i] = x[i] * c - x[half + i] * s;
        out[half + i] = x[half + i] * c + x[i] * s;
    }
    out
}

fn rstd(x: &[f64]) -> f64 {
    1.0 / (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + f64::from(EPS)).sqrt()
}

fn check_forward(device: &Device, case: Case) -> Outcome {
    let (heads, c) = (case.heads, case.heads.head_dim);
    let (tables, num_pages) = tables(case.spans);
    let spans = lay_out(case.spans, &tables);
    // A row outside all sequences at the end.
    let t = spans.iter().map(|s| s.len).sum::<usize>() + 1;
    let width = heads.num_heads + 2 * heads.num_kv_heads;
    let (qkv, w) = (random_bf16(t * width * c, 1), (random_bf16(c, 2), random_bf16(c, 3)));
    let (cos, sin) = angle_tables(64, c);
    let plan = RopePlan::new(t, &spans);
    let run = || {
        let (qkv, wq, wk) = (device.upload(&qkv)?, device.upload(&w.0)?, device.upload(&w.1)?);
        let (cos, sin) = (device.upload(&cos)?, device.upload(&sin)?);
        let (positions, slots) = (device.upload(&plan.positions)?, device.upload(&plan.slots)?);
        let mut q = device.alloc::<bf16>(t * heads.num_heads * c)?;
        let mut k = device.alloc::<bf16>(num_pages * heads.page_len())?;
        let mut v = device.alloc::<bf16>(num_pages * heads.page_len())?;
        let angles = Angles { cos: cos.view(), sin: sin.view(), positions: positions.view() };
        let norms: HeadNorms<'_> = case.norms.then(|| (wq.view(), wk.view(), EPS));
        let pages = (&mut k.view_mut(), &mut v.view_mut());
        rope_forward(device, heads, &qkv.view(), angles, &slots.view(), norms, &mut q.view_mut(), pages)?;
        Ok((device.download(&q.view())?, device.download(&k.view())?, device.download(&v.view())?))
    };
    let (q, k, v) = run().map_err(|e: azr::Error| e.to_string())?;
    let raw = wide(&qkv);
    let head = |row: usize, head: usize| {
        let x = &raw[(row * width + head) * c..][..c];
        let w = wide(if head < heads.num_heads { &w.0 } else { &w.1 });
        let r = rstd(x);
        let x: Vec<f64> = if case.norms { x.iter().zip(&w).map(|(x, w)| x * r * w).collect() } else { x.to_vec() };
        rotate(&x, (&cos, &sin), plan.positions[row] as usize, 1.0)
    };
    let mut kept = Vec::new();
    for row in 0..t {
        for h in 0..heads.num_heads {
            compare("q", &q[(row * heads.num_heads + h) * c..][..c], &head(row, h), 1e-5)?;
        }
        let slot = plan.slots[row];
        if slot == NO_SLOT {
            continue;
        }
        for g in 0..heads.num_kv_heads {
            let at = ((slot as usize / PAGE * heads.num_kv_heads + g) * PAGE + slot as usize % PAGE) * c;
            compare("k", &k[at..][..c], &head(row, heads.num_heads + g), 1e-5)?;
            let value = &qkv[(row * width + heads.num_heads + heads.num_kv_heads + g) * c..][..c];
            if v[at..][..c] != *value {
                return Err(format!("the value of row {row} is not in its slot"));
            }
            kept.extend(bytes(&k[at..][..c]));
        }
    }
    Ok([bytes(&q), kept].concat())
}

fn check_backward(device: &Device, case: Case) -> Outcome {
    let (heads, c) = (case.heads, case.heads.head_dim);
    let (tables, _) = tables(case.spans);
    let spans = lay_out(case.spans, &tables);
    let t = spans.iter().map(|s| s.len).sum::<usize>();
    let width = heads.num_heads + 2 * heads.num_kv_heads;
    let (raw, d0) = (random_bf16(t * width * c, 1), random_bf16(t * width * c, 4));
    let (w, dw0) = ((random_bf16(c, 2), random_bf16(c, 3)), (random_f32(c, 5), random_f32(c, 6)));
    let (cos, sin) = angle_tables(64, c);
    let plan = RopePlan::new(t, &spans);
    let run = || {
        let (raw, mut d) = (device.upload(&raw)?, device.upload(&d0)?);
        let (wq, wk) = (device.upload(&w.0)?, device.upload(&w.1)?);
        let (mut dq, mut dk) = (device.upload(&dw0.0)?, device.upload(&dw0.1)?);
        let (cos, sin, positions) = (device.upload(&cos)?, device.upload(&sin)?, device.upload(&plan.positions)?);
        let angles = Angles { cos: cos.view(), sin: sin.view(), positions: positions.view() };
        let norms: HeadNorms<'_> = case.norms.then(|| (wq.view(), wk.view(), EPS));
        let mut partial = device.alloc::<f32>(if case.norms { rope_scratch(t, heads) } else { 0 })?;
        rope_backward(device, heads, &mut d.view_mut(), &raw.view(), angles, norms, &mut partial.view_mut())?;
        if case.norms {
            let half = partial.len() / 2;
            add_partials(device, &partial.view().part(0, half), &mut dq.view_mut())?;
            add_partials(device, &partial.view().part(half, half), &mut dk.view_mut())?;
        }
        Ok((device.download(&d.view())?, device.download(&dq.view())?, device.download(&dk.view())?))
    };
    let (d, dq, dk) = run().map_err(|e: azr::Error| e.to_string())?;
    let mut want = wide(&d0);
    let mut dw = [&dw0.0, &dw0.1].map(|w| w.iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
    for row in 0..t {
        for h in 0..heads.num_heads + heads.num_kv_heads {
            let at = (row * width + h) * c;
            let kind = usize::from(h >= heads.num_heads);
            let mut dx = rotate(&want[at..][..c], (&cos, &sin), plan.positions[row] as usize, -1.0);
            if case.norms {
                let (x, w) = (wide(&raw[at..][..c]), wide([&w.0, &w.1][kind]));
                let r = rstd(&x);
                let mean = (0..c).map(|i| dx[i] * w[i] * x[i]).sum::<f64>() * r * r / c as f64;
                for i in 0..c {
                    dw[kind][i] += x[i] * r * dx[i];
                    dx[i] = r * (dx[i] * w[i] - x[i] * mean);
                }
            }
            want[at..][..c].copy_from_slice(&dx);
        }
    }
    compare("gradient", &d, &want, 1e-5)?;
    compare("gradient of the query norm", &dq, &dw[0], 1e-4)?;
    compare("gradient of the key norm", &dk, &dw[1], 1e-4)?;
    Ok([bytes(&d), bytes(&dq), bytes(&dk)].concat())
}

#[test]
fn rope_forward_is_right() {
    for case in CASES {
        holds(|device| check_forward(device, *case).map_err(|wrong| format!("{case:?}: {wrong}")));
    }
    finds("rope_angle_index", |device| check_forward(device, CASES[1]));
    finds("rope_page_slot", |device| check_forward(device, CASES[1]));
}

#[test]
fn rope_backward_is_right() {
    for case in CASES {
        holds(|device| check_backward(device, *case).map_err(|wrong| format!("{case:?}: {wrong}")));
    }
    finds("rope_turns_on", |device| check_backward(device, CASES[3]));
    finds("rope_no_barrier", |device| check_backward(device, CASES[3]));
}

/// Three arrays of seven pages; two pages are copied, one of them twice.
fn check_copies(device: &Device, page_len: usize) -> Outcome {
    const PAGES: usize = 7;
    let (copies, before) = ([(3, 0), (5, 6), (3, 2)], random_bf16(3 * PAGES * page_len, 9));
    let run = || {
        let mut arrays = device.upload(&before)?;
        copy_pages(device, &mut arrays.view_mut(), PAGES * page_len, page_len, &[])?;
        copy_pages(device, &mut arrays.view_mut(), PAGES * page_len, page_len, &copies)?;
        device.download(&arrays.view())
    };
    let found = run().map_err(|e| e.to_string())?;
    for (i, page) in found.chunks(page_len).enumerate() {
        let from =
            copies.iter().find(|(_, to)| *to as usize == i % PAGES).map_or(i % PAGES, |(from, _)| *from as usize);
        let start = (i / PAGES * PAGES + from) * page_len;
        if page != &before[start..start + page_len] {
            return Err(format!("page {} of array {} is not page {from}", i % PAGES, i / PAGES));
        }
    }
    Ok(bytes(&found))
}

#[test]
fn copy_pages_is_right() {
    for page_len in [8, 512, 2 * PAGE * 64, 8 * PAGE * 128] {
        holds(|device| check_copies(device, page_len));
    }
    finds("copy_pages_cut", |device| check_copies(device, 512));
}
