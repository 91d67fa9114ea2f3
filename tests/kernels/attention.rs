//! Attention over KV pages: `attention_forward_32`, `attention_forward_64`, `attention_forward_128`, Hopper's own
//! `attention_hopper_forward_64` and `attention_hopper_forward_128`, decoding
//! (`attention_decode_32`, `attention_decode_64`, `attention_decode_128`, `attention_shared_32`, `attention_shared_64`,
//! `attention_shared_128`, `attention_merge`), and the backward pass (`attention_delta`, `attention_backward_q_32`,
//! `attention_backward_q_64`, `attention_backward_q_128`, `attention_backward_kv_32`, `attention_backward_kv_64`,
//! `attention_backward_kv_128`).

use azr::compute::launch::attention::{
    DecodePlan, DecodeSeq, ForwardKernel, Saved, SpanPlan, attention_backward_kv, attention_backward_q,
    attention_decode, attention_delta, attention_forward_by, attention_merge, attention_shared, choose_forward,
};
use azr::compute::launch::device::Device;
use azr::compute::ops::{Heads, PAGE};
use azr_kernel_emu::{Arithmetic, Emulator, Schedule};
use half::bf16;

use crate::harness::{Number, Outcome, bytes, device, finds, holds, on_gpu, random_bf16, wide};
use crate::rope::{lay_out, tables};

/// A batch: heads, and (position, rows) of its sequences.
type Case = (Heads, &'static [(usize, usize)]);

const fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { num_heads, num_kv_heads, head_dim }
}

/// One token, primes, page and block edges, empty sequences, several sequences, groups of 1 to 8, later positions, more
/// than one chunk.
const CASES: &[Case] = &[
    (heads(1, 1, 64), &[(0, 1)]),
    (heads(14, 2, 64), &[(0, 13), (0, 0), (15, 2)]),
    (heads(2, 2, 128), &[(0, 33)]),
    (heads(3, 1, 128), &[(16, 16), (31, 1), (0, 5)]),
    (heads(8, 1, 64), &[(0, 17), (30, 3)]),
    (heads(11, 1, 64), &[(2, 6)]),
    (heads(1, 1, 64), &[(250, 8)]),
    (heads(12, 2, 128), &[(509, 5)]),
    (heads(4, 2, 32), &[(0, 1), (0, 0), (14, 19)]),
    (heads(3, 1, 32), &[(253, 6)]),
    (heads(4, 1, 128), &[]),
];

/// A layer's pages with keys and values of some sequences; what no sequence has written is NaN.
struct Scene {
    heads: Heads,
    spans: Vec<(usize, usize)>,
    tables: Vec<Vec<u32>>,
    q: Vec<bf16>,
    k_pages: Vec<bf16>,
    v_pages: Vec<bf16>,
}

impl Scene {
    fn new((heads, spans): (Heads, &[(usize, usize)])) -> Self {
        let (tables, num_pages) = tables(spans);
        let rows: usize = spans.iter().map(|(_, len)| len).sum();
        let (mut k_pages, mut v_pages) =
            (random_bf16(num_pages * heads.page_len(), 1), random_bf16(num_pages * heads.page_len(), 2));
        let mut written = vec![false; num_pages * PAGE];
        for ((pos, len), table) in spans.iter().zip(&tables) {
            (0..pos + len).for_each(|i| written[table[i / PAGE] as usize * PAGE + i % PAGE] = true);
        }
        for (i, (k, v)) in k_pages.iter_mut().zip(&mut v_pages).enumerate() {
            let (page, slot) = (i / heads.page_len(), i / heads.head_dim % PAGE);
            if !written[page * PAGE + slot] {
                (*k, *v) = (bf16::NAN, bf16::NAN);
            }
        }
        let q = random_bf16(rows * heads.num_heads * heads.head_dim, 3);
        Scene { heads, spans: spans.to_vec(), tables, q, k_pages, v_pages }
    }

    /// Where key (or value) `pos` of sequence `s` and head `g` begins.
    fn at(&self, s: usize, g: usize, pos: usize) -> usize {
        let page = self.tables[s][pos / PAGE] as usize;
        ((page * self.heads.num_kv_heads + g) * PAGE + pos % PAGE) * self.heads.head_dim
    }

    /// Sequence and position of each row.
    fn rows(&self) -> Vec<(usize, usize)> {
        let rows = self.spans.iter().enumerate();
        rows.flat_map(|(s, (pos, len))| (0..*len).map(move |i| (s, pos + i))).collect()
    }
}

/// Sums with the sum of their terms' sizes, which bounds what rounding weights to bf16 may change.
#[derive(Default, Clone)]
struct Sums(Vec<(f64, f64)>);

impl Sums {
    fn new(len: usize) -> Self {
        Sums(vec![(0.0, 0.0); len])
    }

    fn add(&mut self, at: usize, x: f64) {
        self.0[at].0 += x;
        self.0[at].1 += x.abs();
    }

    fn compare(&self, what: &str, got: &[bf16]) -> Result<(), String> {
        if got.len() != self.0.len() {
            return Err(format!("{what}: {} values for {}", got.len(), self.0.len()));
        }
        for (i, (got, (want, size))) in got.iter().zip(&self.0).enumerate() {
            let error = (got.wide() - want).abs();
            if error.is_nan() || error > want.abs() / 256.0 + size / 256.0 + 1e-6 {
                return Err(format!("{what}: element {i} is {}, not {want}", got.wide()));
            }
        }
        Ok(())
    }
}

/// Outputs and log-sum-exp in f64.
fn reference(scene: &Scene) -> (Sums, Vec<f64>) {
    let (heads, c) = (scene.heads, scene.heads.head_dim);
    let (q, k, v) = (wide(&scene.q), wide(&scene.k_pages), wide(&scene.v_pages));
    let rows = scene.rows();
    let (mut out, mut lse) = (Sums::new(q.len()), Vec::new());
    for (row, (s, pos)) in rows.iter().enumerate() {
        for h in 0..heads.num_heads {
            let (at, g) = ((row * heads.num_heads + h) * c, h / heads.group());
            let score = |j: usize| {
                let key = &k[scene.at(*s, g, j)..][..c];
                q[at..][..c].iter().zip(key).map(|(x, y)| x * y).sum::<f64>() * f64::from(heads.scale())
            };
            let scores: Vec<f64> = (0..=*pos).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let row_lse = max + scores.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            for (j, score) in scores.iter().enumerate() {
                let value = &v[scene.at(*s, g, j)..][..c];
                (0..c).for_each(|i| out.add(at + i, (score - row_lse).exp() * value[i]));
            }
            lse.push(row_lse);
        }
    }
    (out, lse)
}

fn compare_lse(got: &[f32], want: &[f64]) -> Result<(), String> {
    let wrong = |(got, want): (&f32, &f64)| {
        let error = (f64::from(*got) - want).abs();
        error.is_nan() || error > 1e-5
    };
    match got.len() == want.len() && !got.iter().zip(want).any(wrong) {
        true => Ok(()),
        false => Err(format!("lse is {got:?}, not {want:?}")),
    }
}

/// Outputs and log-sum-exp of all rows by a kernel.
fn forward_by(device: &Device, scene: &Scene, kernel: ForwardKernel) -> azr::Result<(Vec<bf16>, Vec<f32>)> {
    let spans = lay_out(&scene.spans, &scene.tables);
    let plan = SpanPlan::new(scene.heads, &spans);
    let (packed, q) = (device.upload(&plan.packed())?, device.upload(&scene.q)?);
    let (k, v) = (device.upload(&scene.k_pages)?, device.upload(&scene.v_pages)?);
    let rows = scene.rows().len();
    let mut out = device.alloc::<bf16>(scene.q.len())?;
    let mut lse = device.alloc::<f32>(rows * scene.heads.num_heads)?;
    let (plan, layer) = ((&plan, &packed.view()), (&k.view(), &v.view()));
    let to = (&mut out.view_mut(), &mut lse.view_mut());
    attention_forward_by(kernel, device, scene.heads, plan, &q.view(), layer, to.0, to.1)?;
    Ok((device.download(&out.view())?, device.download(&lse.view())?))
}

/// The same by the kernel that is chosen.
fn forward(device: &Device, scene: &Scene) -> azr::Result<(Vec<bf16>, Vec<f32>)> {
    forward_by(device, scene, choose_forward(device.is_hopper(), scene.heads))
}

/// Every kernel that the device has for these heads.
fn forward_kernels(device: &Device, heads: Heads) -> Vec<ForwardKernel> {
    let chosen = choose_forward(device.is_hopper(), heads);
    if chosen == ForwardKernel::Warps { vec![chosen] } else { vec![ForwardKernel::Warps, chosen] }
}

fn check_forward_by(device: &Device, case: Case, kernel: ForwardKernel) -> Outcome {
    let scene = Scene::new(case);
    let (out, lse) = forward_by(device, &scene, kernel).map_err(|e| e.to_string())?;
    let (want, want_lse) = reference(&scene);
    want.compare("out", &out)?;
    compare_lse(&lse, &want_lse)?;
    Ok([bytes(&out), bytes(&lse)].concat())
}

fn check_forward(device: &Device, case: Case) -> Outcome {
    check_forward_by(device, case, ForwardKernel::Warps)
}

/// Decodes the named rows of a scene, each as a sequence of its own.
fn decode(device: &Device, scene: &Scene, rows: &[usize], share: bool) -> azr::Result<(Vec<bf16>, Vec<f32>)> {
    let (heads, all) = (scene.heads, scene.rows());
    let width = heads.num_heads * heads.head_dim;
    let sequence = |row: &usize| DecodeSeq { len: all[*row].1 + 1, pages: &scene.tables[all[*row].0] };
    let sequences: Vec<DecodeSeq<'_>> = rows.iter().map(sequence).collect();
    let q: Vec<bf16> = rows.iter().flat_map(|row| scene.q[row * width..][..width].to_vec()).collect();
    decode_sequences(device, scene, &sequences, &q, share)
}

fn decode_sequences(
    device: &Device,
    scene: &Scene,
    sequences: &[DecodeSeq<'_>],
    q: &[bf16],
    share: bool,
) -> azr::Result<(Vec<bf16>, Vec<f32>)> {
    let heads = scene.heads;
    let plan = DecodePlan::new(heads, sequences, share);
    let (packed, q) = (device.upload(&plan.packed())?, device.upload(q)?);
    let (k, v) = (device.upload(&scene.k_pages)?, device.upload(&scene.v_pages)?);
    let (len_o, len_ml) = plan.scratch(heads);
    let (mut part_o, mut part_ml) = (device.alloc::<f32>(len_o)?, device.alloc::<f32>(len_ml)?);
    let mut out = device.alloc::<bf16>(q.len())?;
    let mut lse = device.alloc::<f32>(sequences.len() * heads.num_heads)?;
    let (plan, layer) = (&plan.work(&packed.view()), (&k.view(), &v.view()));
    let parts = (&mut part_o.view_mut(), &mut part_ml.view_mut());
    attention_decode(device, heads, plan, &q.view(), layer, parts)?;
    let parts = (&mut part_o.view_mut(), &mut part_ml.view_mut());
    attention_shared(device, heads, plan, &q.view(), layer, parts)?;
    let parts = (&part_o.view(), &part_ml.view());
    attention_merge(device, heads, plan, parts, &mut out.view_mut(), &mut lse.view_mut())?;
    Ok((device.download(&out.view())?, device.download(&lse.view())?))
}

fn check_decode(device: &Device, case: Case, share: bool) -> Outcome {
    let scene = Scene::new(case);
    let rows: Vec<usize> = (0..scene.rows().len()).collect();
    let (out, lse) = decode(device, &scene, &rows, share).map_err(|e| e.to_string())?;
    let (want, want_lse) = reference(&scene);
    want.compare("out", &out)?;
    compare_lse(&lse, &want_lse)?;
    Ok([bytes(&out), bytes(&lse)].concat())
}

/// Outputs, log-sum-exp and the outputs' gradients, as the backward pass gets them.
struct After {
    out: Vec<bf16>,
    lse: Vec<f32>,
    dout: Vec<bf16>,
}

impl After {
    fn new(scene: &Scene) -> Self {
        let (out, lse) = reference(scene);
        After {
            out: out.0.iter().map(|(x, _)| bf16::from_f64(*x)).collect(),
            lse: lse.iter().map(|x| *x as f32).collect(),
            dout: random_bf16(scene.q.len(), 4),
        }
    }
}

/// Gradients of queries, keys and values by the kernels, `[T][Q]`.
fn gradients(device: &Device, scene: &Scene, after: &After) -> azr::Result<Vec<bf16>> {
    let heads = scene.heads;
    let width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    let spans = lay_out(&scene.spans, &scene.tables);
    let plan = SpanPlan::new(heads, &spans);
    let (packed, q) = (device.upload(&plan.packed())?, device.upload(&scene.q)?);
    let (k, v) = (device.upload(&scene.k_pages)?, device.upload(&scene.v_pages)?);
    let (out, dout, lse) = (device.upload(&after.out)?, device.upload(&after.dout)?, device.upload(&after.lse)?);
    let mut delta = device.alloc::<f32>(lse.len())?;
    let mut dqkv = device.alloc::<bf16>(scene.rows().len() * width)?;
    attention_delta(device, heads, &out.view(), &dout.view(), &mut delta.view_mut())?;
    let saved = Saved { q_thc: q.view(), dout_thc: dout.view(), lse_th: lse.view(), delta_th: delta.view() };
    let (plan, layer) = ((&plan, &packed.view()), (&k.view(), &v.view()));
    attention_backward_q(device, heads, plan, saved, layer, &mut dqkv.view_mut())?;
    attention_backward_kv(device, heads, plan, saved, layer, &mut dqkv.view_mut())?;
    device.download(&dqkv.view())
}

fn check_backward(device: &Device, case: Case) -> Outcome {
    let scene = Scene::new(case);
    let (heads, c) = (scene.heads, scene.heads.head_dim);
    let rows = scene.rows();
    let width = heads.num_heads + 2 * heads.num_kv_heads;
    let after = After::new(&scene);
    let dqkv = gradients(device, &scene, &after).map_err(|e| e.to_string())?;
    let lse = &after.lse;
    let (q, k, v) = (wide(&scene.q), wide(&scene.k_pages), wide(&scene.v_pages));
    let (out, dout, scale) = (wide(&after.out), wide(&after.dout), f64::from(heads.scale()));
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let mut want = Sums::new(dqkv.len());
    for (row, (s, pos)) in rows.iter().enumerate() {
        for h in 0..heads.num_heads {
            let (at, g) = ((row * heads.num_heads + h) * c, h / heads.group());
            let (q, dout) = (&q[at..][..c], &dout[at..][..c]);
            let delta = dot(&out[at..][..c], dout);
            for j in 0..=*pos {
                let (key, value) = (&k[scene.at(*s, g, j)..][..c], &v[scene.at(*s, g, j)..][..c]);
                let p = (dot(q, key) * scale - f64::from(lse[row * heads.num_heads + h])).exp();
                let ds = p * (dot(dout, value) - delta) * scale;
                let key_at = ((row - pos + j) * width + heads.num_heads + g) * c;
                for i in 0..c {
                    want.add((row * width + h) * c + i, ds * key[i]);
                    want.add(key_at + i, ds * q[i]);
                    want.add(key_at + heads.num_kv_heads * c + i, p * dout[i]);
                }
            }
        }
    }
    want.compare("dqkv", &dqkv)?;
    Ok(bytes(&dqkv))
}

#[test]
fn attention_forward_is_right() {
    for case in CASES {
        holds(|device| check_forward(device, *case).map_err(|wrong| format!("{case:?}: {wrong}")));
    }
}

/// For tiles of 128 packed rows: one or both warpgroups without rows, unequal numbers of blocks, a last page begun in
/// each place of a stage, more stages than the ring has, chunks that end with and after a stage.
const WIDE_CASES: &[Case] = &[
    (heads(1, 1, 64), &[(0, 129)]),
    (heads(16, 1, 64), &[(27, 9), (0, 0), (62, 1)]),
    (heads(2, 2, 128), &[(0, 64), (0, 65), (95, 2)]),
    (heads(7, 1, 128), &[(255, 1), (256, 19)]),
    (heads(4, 2, 64), &[(511, 1), (512, 33)]),
];

#[test]
fn attention_hopper_forward_is_right() {
    if on_gpu() && !device().is_hopper() {
        println!("SKIPPED: this GPU is not a Hopper");
        return;
    }
    for case in WIDE_CASES.iter().chain(CASES).filter(|case| case.0.head_dim > 32) {
        holds(|device| {
            check_forward_by(device, *case, ForwardKernel::Warpgroups).map_err(|wrong| format!("{case:?}: {wrong}"))
        });
    }
}

#[test]
fn both_forward_kernels_have_the_same_bits() {
    let device = device();
    for arithmetic in if on_gpu() { &[Arithmetic::Plain][..] } else { &[Arithmetic::Plain, Arithmetic::Hopper] } {
        for case in WIDE_CASES.iter().chain(CASES) {
            let scene = Scene::new(*case);
            let run = |kernel: ForwardKernel| {
                if !on_gpu() {
                    Emulator::get().schedule(Schedule { arithmetic: *arithmetic, ..Schedule::PLAIN });
                }
                let (out, lse) = forward_by(&device, &scene, kernel).expect("a forward pass");
                [bytes(&out), bytes(&lse)].concat()
            };
            let all: Vec<Vec<u8>> = forward_kernels(&device, scene.heads).into_iter().map(run).collect();
            assert!(all.iter().all(|bits| *bits == all[0]), "{case:?}, {arithmetic:?}");
        }
    }
}

#[test]
fn attention_decode_is_right() {
    for case in CASES {
        holds(|device| {
            let alone = check_decode(device, *case, false).map_err(|wrong| format!("{case:?}: {wrong}"))?;
            let shared = check_decode(device, *case, true).map_err(|wrong| format!("{case:?}, shared: {wrong}"))?;
            if alone == shared { Ok(alone) } else { Err(format!("{case:?}: sharing a prefix changes bits")) }
        });
    }
}

#[test]
fn a_row_without_keys_gets_zeros() {
    holds(|device| {
        let scene = Scene::new(CASES[1]);
        let width = scene.heads.num_heads * scene.heads.head_dim;
        let sequences = [
            DecodeSeq { len: 0, pages: &[] },
            DecodeSeq { len: 3, pages: &scene.tables[0] },
            DecodeSeq { len: 0, pages: &[] },
        ];
        let run = decode_sequences(device, &scene, &sequences, &scene.q[..3 * width], true);
        let (out, lse) = run.map_err(|e| e.to_string())?;
        let empty = |s: usize| {
            out[s * width..][..width].iter().all(|x| *x == bf16::ZERO)
                && lse[s * scene.heads.num_heads..][..scene.heads.num_heads].iter().all(|x| *x == f32::NEG_INFINITY)
        };
        if empty(0) && !empty(1) && empty(2) { Ok(bytes(&out)) } else { Err("rows without keys".to_owned()) }
    });
}

/// Backward cases: whole sequences.
const WHOLE: &[Case] = &[
    (heads(1, 1, 64), &[(0, 1)]),
    (heads(14, 2, 64), &[(0, 11), (0, 0), (0, 17)]),
    (heads(2, 2, 128), &[(0, 67)]),
    (heads(3, 1, 128), &[(0, 16), (0, 2)]),
    (heads(8, 1, 64), &[(0, 33)]),
    (heads(6, 1, 128), &[(0, 19)]),
    (heads(4, 2, 32), &[(0, 37), (0, 0), (0, 1)]),
    (heads(4, 1, 128), &[]),
];

#[test]
fn attention_backward_is_right() {
    for case in WHOLE {
        holds(|device| check_backward(device, *case).map_err(|wrong| format!("{case:?}: {wrong}")));
    }
}

#[test]
fn a_row_has_the_same_bits_in_prefill_decoding_and_any_batch() {
    let device = device();
    let models = [Arithmetic::Plain, Arithmetic::Hopper, Arithmetic::Ampere];
    for arithmetic in if on_gpu() { &models[..1] } else { &models[..] } {
        if !on_gpu() {
            Emulator::get().schedule(Schedule { arithmetic: *arithmetic, ..Schedule::PLAIN });
        }
        for (heads, spans) in [
            (heads(7, 1, 64), &[(0usize, 290usize)][..]),
            (heads(6, 2, 128), &[(0, 34), (500, 20)][..]),
            (heads(1, 1, 64), &[(0, 66)][..]),
            (heads(4, 2, 32), &[(0, 259)][..]),
        ] {
            let scene = Scene::new((heads, spans));
            let (out, lse) = forward(&device, &scene).expect("prefill");
            let num_rows = scene.rows().len();
            let edges = [0, 1, 7, 15, 16, 31, 32, 33, 45, 46, 53, 65, 255, 256, 257, 289];
            let rows: Vec<usize> = edges.into_iter().filter(|row| *row < num_rows).collect();
            let width = heads.num_heads * heads.head_dim;
            for share in [false, true] {
                let (decoded, decoded_lse) = decode(&device, &scene, &rows, share).expect("decoding");
                for (i, row) in rows.iter().enumerate() {
                    assert_eq!(decoded[i * width..][..width], out[row * width..][..width], "row {row}, {arithmetic:?}");
                    let (a, b) = (&decoded_lse[i * heads.num_heads..], &lse[row * heads.num_heads..]);
                    assert_eq!(a[..heads.num_heads], b[..heads.num_heads], "lse of row {row}, {arithmetic:?}");
                }
            }
            for row in &rows {
                let alone = decode(&device, &scene, &[*row], true).expect("decoding one row").0;
                assert_eq!(alone[..], out[row * width..][..width], "row {row} alone, {arithmetic:?}");
            }
        }
    }
}

#[test]
fn the_gradients_of_a_sequence_do_not_depend_on_the_batch() {
    let device = device();
    for heads in [heads(7, 1, 64), heads(4, 2, 128), heads(4, 2, 32)] {
        let batch = Scene::new((heads, &[(0, 5), (0, 43), (0, 0), (0, 18)]));
        let after = After::new(&batch);
        let all = gradients(&device, &batch, &after).expect("gradients of the batch");
        let (first, len) = (5, 43);
        let part = |x: &[bf16], width: usize| x[first * width..][..len * width].to_vec();
        let width = heads.num_heads * heads.head_dim;
        let q = part(&batch.q, width);
        let scene = Scene { q, spans: vec![(0, len)], tables: vec![batch.tables[1].clone()], ..batch };
        let alone = After {
            out: part(&after.out, width),
            lse: after.lse[first * heads.num_heads..][..len * heads.num_heads].to_vec(),
            dout: part(&after.dout, width),
        };
        let own = gradients(&device, &scene, &alone).expect("gradients of one sequence");
        assert!(own == part(&all, width + 2 * heads.num_kv_heads * heads.head_dim), "{heads:?}");
    }
}

#[test]
fn tiles_are_read_without_bank_conflicts() {
    if on_gpu() {
        return;
    }
    let (device, emulator) = (device(), Emulator::get());
    emulator.schedule(Schedule::PLAIN);
    for heads in [heads(6, 2, 32), heads(6, 2, 64), heads(6, 2, 128)] {
        emulator.take_stats();
        check_forward(&device, (heads, &[(0, 70)])).expect("prefill");
        check_decode(&device, (heads, &[(255, 2)]), true).expect("decoding");
        check_backward(&device, (heads, &[(0, 70)])).expect("the backward pass");
        let stats = emulator.take_stats();
        assert!(stats.matrix_loads > 0 && stats.bank_replays == 0, "{stats:?}");
    }
}

#[test]
fn planted_faults_are_found() {
    finds("attention_no_wait", |device| check_forward(device, (heads(1, 1, 128), &[(0, 70)])));
    finds("attention_no_barrier", |device| check_forward(device, (heads(1, 1, 128), &[(0, 70)])));
    finds("attention_no_rescale", |device| check_forward(device, (heads(1, 1, 64), &[(0, 34)])));
    finds("attention_sees_ahead", |device| check_forward(device, (heads(1, 1, 64), &[(0, 34)])));
    finds("attention_tail_not_zeroed", |device| check_forward(device, CASES[1]));
    for fault in ["decode_no_wait", "decode_no_warp_sync", "decode_early_refill"] {
        finds(fault, |device| check_decode(device, (heads(2, 1, 64), &[(90, 2)]), false));
    }
    for fault in [
        "attention_hopper_no_full_wait",
        "attention_hopper_no_empty_wait",
        "attention_hopper_early_release",
        "attention_hopper_no_product_wait",
        "attention_hopper_no_query_barrier",
        "attention_hopper_no_query_fence",
        "attention_hopper_tail_not_zeroed",
        "attention_hopper_no_tail_fence",
    ] {
        finds(fault, |device| check_forward_by(device, (heads(1, 1, 64), &[(320, 13)]), ForwardKernel::Warpgroups));
    }
    let two_chunks: Case = (heads(2, 1, 64), &[(300, 2)]);
    finds("merge_backwards", |device| {
        let scene = Scene::new(two_chunks);
        let run = || Ok((forward(device, &scene)?.0, decode(device, &scene, &[0, 1], false)?.0));
        let (prefill, decoded) = run().map_err(|e: azr::Error| e.to_string())?;
        if prefill == decoded { Ok(bytes(&decoded)) } else { Err("decoding has other bits than prefill".to_owned()) }
    });
    finds("attention_one_member", |device| check_decode(device, two_chunks, true));
    for fault in ["delta_half_a_head", "backward_q_no_barrier", "backward_q_no_delta", "backward_kv_no_barrier"] {
        finds(fault, |device| check_backward(device, (heads(1, 1, 64), &[(0, 70)])));
    }
    finds("backward_kv_one_key", |device| check_backward(device, WHOLE[4]));
}

#[test]
fn kernels_fit_gpus_with_little_shared_memory() {
    if on_gpu() {
        return;
    }
    for capability in [80, 86, 89] {
        Emulator::get().schedule(Schedule::PLAIN);
        Emulator::get().device(capability, 3);
        let device = Device::open_with(0, |_, _| Ok(b"STUB".to_vec())).expect("the emulated device");
        assert_eq!(device.max_smem_bytes(), if capability == 80 { 163 << 10 } else { 99 << 10 });
        let wide = heads(16, 1, 128);
        assert_eq!(choose_forward(device.is_hopper(), wide), ForwardKernel::Warps);
        check_forward(&device, (wide, &[(255, 3)])).expect("prefill");
        check_decode(&device, (wide, &[(255, 3)]), true).expect("decoding");
        check_backward(&device, (wide, &[(0, 5)])).expect("the backward pass");
    }
}
