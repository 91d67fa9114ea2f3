//! Seats: sequences that decode without the host between their steps, and graphs of whole steps.

use std::sync::Arc;

use azr::base::rng::{Purpose, Rng};
use azr::compute::cuda::CudaBackend;
use azr::compute::launch::device::Device;
use azr::compute::launch::head::DrawnRow;
use azr::compute::launch::seats::SeatState;
use azr::compute::ops::{Draw, Heads, PAGE, Seat};
use azr::model::forward::{Decoder, SeqRows};
use azr::model::params::ParamTable;
use azr::rollout::engine::{Completion, Engine, Finish, SampleRequest};
use azr::rollout::scheduler::Limits;
use azr::weights::spec::{Family, ModelSpec};
use azr_kernel_emu::{Emulator, Schedule};

use crate::harness::{Outcome, device, finds, holds, on_gpu};

const HEADS: Heads = Heads { num_heads: 2, num_kv_heads: 1, head_dim: 32 };
/// Draws that a seat makes in `check_seats`, and after which token it ends.
const DRAWS: [u32; 4] = [5, 6, 7, 8];
const STOP: u32 = 7;

/// `take_seats` and `next_tokens`: three seats over a page's end, of which one draws all, one stops at a token, one has two tokens left.
fn check_seats(device: &Device) -> Outcome {
    let wrong = |e: azr::Error| e.to_string();
    let mut state = SeatState::new(device, HEADS, 8, 64).map_err(wrong)?;
    let tables: Vec<Vec<u32>> = (0..3).map(|i| vec![10 * i + 3, 10 * i + 1, 10 * i + 2]).collect();
    let seats: Vec<(usize, usize, &[u32], usize)> = vec![(1, 14, &[], 30), (4, 14, &[99, STOP], 30), (6, 14, &[], 2)];
    let seat = |i: usize| {
        let (seat, pos, stop, left) = seats[i];
        let draw = Draw { seq: i as u64, temperature: 1.0, top_p: 1.0, top_k: 0 };
        Seat { seat, token: 50, pos, draw, stop, left, pages: &tables[i] }
    };
    state.take(device, &[seat(0), seat(1), seat(2)], &[]).map_err(wrong)?;
    let mut bits = Vec::new();
    for (n, token) in DRAWS.into_iter().enumerate() {
        let drawn: Vec<DrawnRow> = vec![bytemuck::cast([token, 0, 0, 0]); 8];
        let drawn = device.upload(&drawn).map_err(wrong)?;
        state.advance(device, &drawn.view()).map_err(wrong)?;
        let (tokens, positions) = (device.download(&state.tokens.view()), device.download(&state.positions.view()));
        let (tokens, positions) = (tokens.map_err(wrong)?, positions.map_err(wrong)?);
        let slots = device.download(&state.slots.view()).map_err(wrong)?;
        let rows = device.download(&state.rows.view()).map_err(wrong)?;
        for (i, (seat, pos, _, left)) in seats.iter().enumerate() {
            // Draws after which the seat moved on.
            let ends = if i == 1 { 2 } else { left - 1 };
            let moves = (n + 1).min(ends);
            let at = pos + moves;
            let slot = if n + 1 > ends { u32::MAX } else { tables[i][at / PAGE] * PAGE as u32 + (at % PAGE) as u32 };
            let token = if moves == 0 { 50 } else { DRAWS[moves - 1] };
            let head: [u32; 12] = bytemuck::cast(rows[*seat]);
            let found = (tokens[*seat], positions[*seat], slots[*seat], head[4], head[0]);
            if found != (token, at as u32, slot, at as u32 + 1, *seat as u32) {
                return Err(format!("seat {seat} after {} draws: {found:?}, not {token} at {at}, slot {slot}", n + 1));
            }
        }
        if slots[0] != u32::MAX || positions[0] != 0 {
            return Err("an empty seat has moved".to_owned());
        }
        bits.extend(bytemuck::cast_slice::<u32, u8>(&[tokens, positions, slots].concat()));
    }
    Ok(bits)
}

#[test]
fn take_seats_and_next_tokens_are_right() {
    holds(check_seats);
}

#[test]
fn planted_faults_are_found() {
    finds("seats_never_end", check_seats);
    finds("seats_same_noise", check_seats);
    finds("attention_ended_member", check_ended_members);
}

fn spec() -> ModelSpec {
    ModelSpec {
        family: Family::Qwen3,
        vocab_size: 48,
        hidden_size: 32,
        intermediate_size: 32,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 32,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        rope_scaling: None,
        tie_word_embeddings: true,
        max_position_embeddings: 900,
    }
}

fn decoder(backend: CudaBackend) -> Decoder<CudaBackend> {
    let weights: Vec<Vec<f32>> = ParamTable::new(&spec())
        .init(&spec(), 5)
        .into_iter()
        .map(|w| w.into_iter().map(|x| if x == 1.0 { x } else { 3.0 * x }).collect())
        .collect();
    Decoder::new(backend, spec(), &weights, false).expect("it fits")
}

/// The device under test, for what takes too long under every schedule.
fn plain_device() -> Device {
    let device = device();
    if !on_gpu() {
        Emulator::get().schedule(Schedule::PLAIN);
    }
    device
}

fn prompt(len: usize, stream: usize) -> Arc<[u32]> {
    (0..len).map(|i| ((i * i + 7 * i + stream) % 48) as u32).collect()
}

/// A sample that draws `max_new` tokens.
fn request(id: u64, prompt: &Arc<[u32]>, max_new: usize) -> SampleRequest {
    SampleRequest { id, prompt: prompt.clone(), max_new, stop: Arc::new([]), temperature: 1.0, top_p: 1.0, top_k: 0 }
}

/// Samples of every length up to 12, that stop or not, with top-k and top-p or without: two of a prompt with a whole chunk
/// of keys, and short ones.
fn requests() -> Vec<SampleRequest> {
    let (long, short) = (prompt(270, 0), prompt(17, 1));
    let long = (0..3).map(|i| request(i, &long, 6 + i as usize));
    let all = long.chain((3..15).map(|i| request(i, &short, i as usize - 2)));
    all.map(|r| SampleRequest {
        stop: if r.id.is_multiple_of(2) { Arc::new([3, 9]) } else { Arc::new([]) },
        temperature: if r.id == 5 { 0.0 } else { 1.0 },
        top_k: if r.id == 12 { 3 } else { 0 },
        top_p: if r.id == 14 { 0.5 } else { 1.0 },
        ..r
    })
    .collect()
}

/// One sample, each token of it through the host.
fn by_host(decoder: &Decoder<CudaBackend>, r: &SampleRequest) -> Completion {
    let pages: Vec<u32> = (0..60).collect();
    let mut kv = decoder.new_kv(60).expect("room");
    let draw = Draw { seq: r.id, temperature: r.temperature, top_p: r.top_p, top_k: r.top_k };
    let (mut tokens, mut logprobs, mut entropy) = (Vec::new(), Vec::new(), 0.0);
    let finish = loop {
        let (next, pos0): (&[u32], usize) = match tokens.as_slice() {
            [] => (&r.prompt, 0),
            drawn => (&drawn[drawn.len() - 1..], r.prompt.len() + drawn.len() - 1),
        };
        let row = SeqRows { tokens: next, pos0, pages: &pages, draw: Some(draw) };
        let drawn = decoder.step(&mut kv, &[row], 9).expect("it runs")[0].expect("it draws");
        tokens.push(drawn.token);
        logprobs.push(drawn.logprob);
        entropy += f64::from(drawn.entropy);
        if r.stop.contains(&drawn.token) {
            break Finish::Stop;
        } else if tokens.len() == r.max_new {
            break Finish::Length;
        }
    };
    Completion { id: r.id, entropy: entropy / tokens.len() as f64, tokens, logprobs, finish }
}

#[test]
fn graphs_batches_and_lateness_change_no_bit() {
    let (gpu, mut all) = (CudaBackend::on(plain_device()), requests());
    let plain = decoder(gpu.clone());
    let want: Vec<Completion> = all.iter().map(|r| by_host(&plain, r)).collect();
    assert!(want.iter().any(|c| c.finish == Finish::Stop) && want.iter().any(|c| c.finish == Finish::Length));
    for (backend, max_running, max_rows, backwards) in
        [(gpu.clone(), 64, 1024, false), (gpu.clone(), 3, 40, true), (gpu.clone().without_graphs(), 10, 300, true)]
    {
        if backwards {
            all.reverse();
        }
        let decoder = decoder(backend);
        let limits = Limits { max_rows, ..Engine::<CudaBackend>::limits(max_running, 300, 0) };
        let mut engine = Engine::new(&decoder, limits, 9).expect("room");
        // Broken off in the middle, with draws on their way, and begun again.
        for steps in [4, usize::MAX] {
            all.iter().for_each(|r| engine.submit(r.clone()).expect("it fits"));
            let mut done = Vec::new();
            for _ in 0..steps {
                if engine.is_idle() {
                    break;
                }
                done.extend(engine.step(&decoder).expect("it runs"));
            }
            if steps == 4 {
                engine.clear();
                continue;
            }
            done.sort_by_key(|c| c.id);
            assert_eq!(done, want, "{max_running} at once, {max_rows} rows");
        }
        // One whose stop tokens only the host knows changes nothing for those beside it.
        let unusual = SampleRequest { stop: (100..109).collect(), id: 13, ..all[0].clone() };
        let (long, short) = (all.iter().find(|r| r.id == 2), all.iter().find(|r| r.id == 4));
        let mixed = [long.cloned(), Some(unusual.clone()), short.cloned()];
        mixed.iter().flatten().for_each(|r| engine.submit(r.clone()).expect("it fits"));
        let done = engine.finish(&decoder).expect("it runs");
        assert_eq!(done, [want[2].clone(), want[4].clone(), by_host(&plain, &unusual)]);
    }
}

/// Runs batches of samples one after another in one engine: each draws what it draws alone.
fn check_in_turn(device: &Device, batches: &[Vec<SampleRequest>]) -> Outcome {
    let decoder = decoder(CudaBackend::on(device.clone()));
    let limits = Limits { max_rows: 1024, ..Engine::<CudaBackend>::limits(16, 850, 0) };
    let mut engine = Engine::new(&decoder, limits, 9).expect("room");
    for (n, batch) in batches.iter().enumerate() {
        batch.iter().for_each(|r| engine.submit(r.clone()).expect("it fits"));
        let done = engine.finish(&decoder).map_err(|e| e.to_string())?;
        for (found, r) in done.iter().zip(batch) {
            let want = by_host(&decoder, r);
            if *found != want {
                return Err(format!("sample {} of batch {n}: {found:?}, not {want:?}", r.id));
            }
        }
    }
    Ok(Vec::new())
}

/// Two samples of a prompt with three chunks of keys end while short ones go on, whose keys are one chunk.
fn check_ended_members(device: &Device) -> Outcome {
    let (long, short) = (prompt(800, 0), prompt(17, 1));
    let ended = (0..2).map(|id| request(id, &long, 2));
    check_in_turn(device, &[ended.chain((2..6).map(|id| request(id, &short, 9))).collect()])
}

#[test]
fn samples_that_have_ended_leave_their_neighbours_alone() {
    let device = plain_device();
    check_ended_members(&device).expect("the bits of samples alone");
    // Every second sample ends at once: the others move to the first seats, and the batch no longer covers their old ones.
    // The next batch covers these again, and has their pages.
    let prompts = [prompt(17, 1), prompt(19, 2)];
    let first = (0..12).map(|id| request(id, &prompts[0], if id % 2 == 0 { 2 } else { 40 }));
    let batches = [first.collect(), (20..29).map(|id| request(id, &prompts[1], 40)).collect()];
    check_in_turn(&device, &batches).expect("the bits of samples alone");
}

/// Samples of few prompts, some with chunks of keys to share, that come in waves while others run, to an engine with room for
/// few or many, in which one or the other is ended by the host, or has top-k or top-p: each draws what it draws alone.
fn check_waves(decoder: &Decoder<CudaBackend>, seed: u64) -> Outcome {
    let mut rng = Rng::new(seed, Purpose::Test, 3, 0);
    let prompts: Vec<Arc<[u32]>> =
        (0..4).map(|i| prompt([1 + rng.below(40), 520, 15, 290][i], seed as usize + i)).collect();
    let limits =
        Limits { max_rows: [30, 200, 1024][rng.below(3)], ..Engine::<CudaBackend>::limits(3 + rng.below(15), 600, 0) };
    let mut engine = Engine::new(decoder, limits, 9).expect("room");
    let (mut sent, mut done, mut wave) = (Vec::new(), Vec::new(), 0);
    while wave < 6 || !engine.is_idle() {
        if wave < 6 && (engine.is_idle() || rng.below(4) == 0) {
            if engine.is_idle() && rng.below(2) == 0 {
                engine.rest();
            }
            wave += 1;
            for _ in 0..1 + rng.below(8) {
                let which = if rng.below(4) == 0 { 1 + 2 * rng.below(2) } else { 2 * rng.below(2) };
                let longest = if rng.below(3) == 0 { 40 } else { 6 };
                let mut r = request(sent.len() as u64, &prompts[which], 1 + rng.below(longest));
                let unusual = rng.below(25) == 0;
                r.stop = if rng.below(3) == 0 { Arc::new([3, 9, 20, 31]) } else { Arc::new([]) };
                r.stop = if unusual { (100..109).collect() } else { r.stop };
                r.top_k = if r.id % 16 == 3 { 4 } else { 0 };
                r.top_p = if r.id % 16 == 11 { 0.7 } else { 1.0 };
                engine.submit(r.clone()).expect("it fits");
                sent.push(r);
            }
        }
        done.extend(engine.step(decoder).map_err(|e| e.to_string())?);
    }
    done.sort_by_key(|c| c.id);
    for (found, r) in done.iter().zip(&sent) {
        let want = by_host(decoder, r);
        if *found != want {
            return Err(format!("seed {seed}, sample {}: {found:?}, not {want:?}", r.id));
        }
    }
    if done.len() == sent.len() { Ok(Vec::new()) } else { Err(format!("{} of {} samples", done.len(), sent.len())) }
}

#[test]
fn samples_that_come_in_waves_draw_what_they_draw_alone() {
    let decoder = decoder(CudaBackend::on(plain_device()));
    // Of the first twelve seeds those that find old seats which are not emptied.
    for seed in [0, 6, 9] {
        check_waves(&decoder, seed).expect("the bits of samples alone");
    }
}

#[test]
fn what_a_graph_cannot_hold_is_an_error_that_leaves_the_stream_usable() {
    if on_gpu() {
        println!("SKIPPED: on a GPU the driver's own rules hold");
        return;
    }
    let device = device();
    let mut buf = device.upload(&[1.0f32, 2.0]).expect("room");
    assert!(device.record(|| device.synchronize()).is_err(), "waiting");
    assert!(device.record(|| device.zeros::<f32>(4).map(drop)).is_err(), "memory");
    assert!(device.record(|| device.write(&mut buf.view_mut(), &[3.0, 4.0])).is_err(), "values of the host");
    assert!(device.record(|| device.download(&buf.view()).map(drop)).is_err(), "a copy to pageable memory");
    let mut copy = device.zeros::<f32>(2).expect("room");
    let graph = device.record(|| device.copy(&buf.view(), &mut copy.view_mut())).expect("a copy on the device");
    let zeros = device.download(&copy.view()).expect("it runs");
    assert_eq!(zeros, [0.0, 0.0], "recorded, not done");
    graph.launch().expect("it runs");
    assert_eq!(device.download(&copy.view()).expect("it runs"), [1.0, 2.0]);
}
