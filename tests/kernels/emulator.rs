//! The emulator reports mistakes, and nothing else; its driver answers like NVIDIA's.

use std::process::Command;

use azr::compute::launch::device::{Arg, Device, Entry, Shape, probe};
use azr_kernel_emu::{Arithmetic, Emulator, Landing, Order, Schedule};

use crate::harness::{device, on_gpu};

/// Runs the probe under a schedule; what the driver said.
fn fault(device: &Device, which: i32, schedule: Schedule) -> Result<Vec<f32>, String> {
    let emulator = Emulator::get();
    emulator.schedule(schedule);
    let run = || {
        let mut x = device.zeros::<f32>(64)?;
        let at = x.view_mut().at();
        let entry = Entry { file: "faults", name: "probe_fault" };
        // SAFETY: 64 elements; what goes wrong is the test.
        unsafe { device.launch(entry, Shape::new((1, 1, 1), 64).smem(1024), &[Arg::of(at), Arg::of(which)]) }?;
        device.download(&x.view())
    };
    let outcome = run().map_err(|e: azr::Error| e.to_string());
    emulator.take_stats();
    outcome
}

fn blocks(device: &Device, which: i32) -> Result<Vec<f32>, String> {
    let run = || {
        let mut x = device.zeros::<f32>(5)?;
        let at = x.view_mut().at();
        let entry = Entry { file: "faults", name: "probe_blocks" };
        // SAFETY: 5 blocks, 5 elements.
        unsafe { device.launch(entry, Shape::new((5, 1, 1), 1), &[Arg::of(at), Arg::of(which)]) }?;
        device.download(&x.view())
    };
    let outcome = run().map_err(|e: azr::Error| e.to_string());
    Emulator::get().take_stats();
    outcome
}

#[test]
fn mistakes_are_reported_with_their_place() {
    if on_gpu() {
        return;
    }
    let device = device();
    let race = Schedule { race: true, ..Schedule::PLAIN };
    let expected = [
        (0, false, "deadlock"),
        (1, false, "warp 0 has diverged: its lanes are at faults.cu:"),
        (2, false, "32 threads in block_sync at faults.cu:"),
        (3, true, "race in shared memory"),
        (4, true, "race in shared memory"),
        (6, false, "illegal memory access"),
        (6, true, "outside device memory"),
        (7, true, "race in global memory"),
        (8, false, "misaligned access of 16 bytes"),
    ];
    for (which, with_race, text) in expected {
        let wrong = fault(&device, which, if with_race { race } else { Schedule::PLAIN }).expect_err("a mistake");
        assert!(wrong.contains(text) && wrong.contains("probe_fault"), "{which}: {wrong}");
    }
}

#[test]
fn right_code_is_not_reported() {
    if on_gpu() {
        return;
    }
    let device = device();
    for schedule in Schedule::all() {
        let exchanged = fault(&device, 5, schedule).expect("warp_sync orders memory");
        assert!(exchanged.iter().enumerate().all(|(i, v)| *v == (i ^ 1) as f32), "{exchanged:?} under {schedule:?}");
        let handed = fault(&device, 9, schedule).expect("a named barrier orders memory");
        assert!(handed.iter().enumerate().all(|(i, v)| *v == (i % 32) as f32), "{handed:?} under {schedule:?}");
    }
}

#[test]
fn blocks_must_not_share_what_they_write() {
    if on_gpu() {
        return;
    }
    let (device, emulator) = (device(), Emulator::get());
    emulator.schedule(Schedule { race: true, ..Schedule::PLAIN });
    assert!(blocks(&device, 0).expect_err("all write one element").contains("another block"));
    assert_eq!(blocks(&device, 1), Ok(vec![0.0, 1.0, 2.0, 3.0, 4.0]));
    emulator.schedule(Schedule::PLAIN);
    assert_eq!(blocks(&device, 0).map(|x| x[0]), Ok(4.0), "the last block in order wins");
    emulator.schedule(Schedule { order: Order::Descending, landing: Landing::Early, ..Schedule::PLAIN });
    assert_eq!(blocks(&device, 0).map(|x| x[0]), Ok(0.0));
    emulator.schedule(Schedule { arithmetic: Arithmetic::Hopper, ..Schedule::PLAIN });
}

#[test]
fn launches_are_checked_like_by_the_driver() {
    if on_gpu() {
        return;
    }
    let device = device();
    assert_eq!(probe().map(|(count, _)| count).map_err(|e| e.to_string()), Ok(1));
    let at = 0u64;
    let entry = Entry { file: "faults", name: "probe_fault" };
    let launch = |shape: Shape, args: &[Arg]| {
        // SAFETY: the launch is refused before anything runs.
        let refused = unsafe { device.launch(entry, shape, args) };
        Emulator::get().take_stats();
        refused.expect_err("the launch is refused").to_string()
    };
    let one = Shape::new((1, 1, 1), 64);
    let number = 0i32;
    let args = [Arg::of(at), Arg::of(number)];
    assert!(launch(one, &args[..1]).contains("takes arguments of [8, 4] bytes, its launcher gives [8]"));
    assert!(launch(Shape::new((1, 1, 1), 65), &args).contains("launch bound"));
    assert!(launch(one.smem(300 << 10), &args).contains("bytes of shared memory"));
    assert!(launch(Shape::new((3, 1, 1), 64).cluster(2), &args).contains("whole clusters"));
    let none = Entry { file: "faults", name: "no_such_kernel" };
    // SAFETY: as above.
    let missing = unsafe { device.launch(none, one, &args) }.expect_err("no such kernel").to_string();
    assert!(missing.contains("no kernel no_such_kernel"), "{missing}");
}

#[test]
fn memory_is_counted_and_ends_where_it_ends() {
    if on_gpu() {
        return;
    }
    let device = device();
    let error = device.alloc::<f32>(1 << 40).err().expect("4 TiB do not fit");
    assert_eq!(error.kind(), azr::error::Kind::OutOfMemory);
    let buf = device.upload(&[1.0f32, 2.0, 3.0]).expect("12 bytes fit");
    assert_eq!(device.download(&buf.view().part(1, 2)).expect("a download"), [2.0, 3.0]);
    assert!(std::panic::catch_unwind(|| buf.view().part(2, 2)).is_err(), "a part lies inside");
    // More than the page-locked blocks hold, in pieces that begin anywhere in them.
    let numbers: Vec<u32> = (0..1_000_003).collect();
    for at in [1, 300_000, 1_000_000] {
        device.upload(&numbers[..at]).expect("room");
        let all = device.upload(&numbers).expect("room");
        assert!(device.download(&all.view()).expect("a download") == numbers, "after {at}");
    }
    // Together more than the device has, each of its own length: what is freed is joined.
    for i in 0..45 {
        device.alloc::<u8>((100 << 20) + i).expect("room");
    }
}

/// These tests as tests/gpu/run.sh runs them, the emulator in the GPU's place: a GPU's time is not for faults of the tests.
#[test]
fn what_runs_on_a_gpu_runs_with_the_emulated_driver() {
    if on_gpu() {
        return;
    }
    let probes = std::env::temp_dir().join(format!("azr-probes-{}", std::process::id()));
    std::fs::create_dir_all(&probes).expect("a scratch folder");
    for probe in ["tensor.cubin", "numerics.cubin"] {
        std::fs::write(probes.join(probe), "STUB").expect("a scratch file");
    }
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--test-threads=1", "--skip", "prebuilt"])
        .env("LD_LIBRARY_PATH", azr_kernel_emu::folder())
        .envs([("AZR_TEST_DEVICE", "gpu"), ("AZR_PROBES", probes.to_str().expect("UTF-8"))])
        .output()
        .expect("it starts");
    std::fs::remove_dir_all(probes).expect("the scratch folder goes");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
