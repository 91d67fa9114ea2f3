//! Opens the device under test, runs a check under every schedule, and shows that a check finds a planted fault.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use azr::base::rng::{Purpose, Rng};
use azr::compute::launch::device::Device;
use azr::compute::launch::images::{self, Capability};
use azr_kernel_emu::{Emulator, Schedule};
use half::bf16;

/// Variable that names the folder of the probes' images.
const PROBES: &str = "AZR_PROBES";

/// Whether the tests run on a real GPU.
pub fn on_gpu() -> bool {
    std::env::var("AZR_TEST_DEVICE").is_ok_and(|d| d == "gpu")
}

/// Whether a test of the emulator's probes is skipped: on a GPU they need Hopper, and their images in the folder AZR_PROBES.
pub fn no_probes() -> bool {
    let none = on_gpu() && (std::env::var_os(PROBES).is_none() || !device().is_hopper());
    if none {
        println!("SKIPPED: probes run on Hopper, from the folder {PROBES}");
    }
    none
}

/// An image of the build, or of a probe.
fn find_image(file: &str, capability: Capability) -> azr::Result<Vec<u8>> {
    let probe = std::env::var_os(PROBES).map(|folder| Path::new(&folder).join(format!("{file}.cubin")));
    probe.and_then(|path| std::fs::read(path).ok()).map_or_else(|| images::find(file, capability), Ok)
}

/// The device under test. A GPU is opened once, as a context takes long to make, and again after a fault. The emulator runs
/// kernels as compiled from the sources, whatever images the build has.
pub fn device() -> Device {
    static GPU: Mutex<Option<Device>> = Mutex::new(None);
    if on_gpu() {
        let mut gpu = GPU.lock().unwrap_or_else(PoisonError::into_inner);
        gpu.take_if(|gpu| gpu.synchronize().is_err());
        return gpu
            .get_or_insert_with(|| Device::open_with(0, find_image).expect("a GPU, as AZR_TEST_DEVICE says"))
            .clone();
    }
    Emulator::get().device(90, 3);
    let device = Device::open_with(0, |_, _| Ok(b"STUB".to_vec())).expect("the emulated device");
    assert_eq!(device.name(), "azr emulator", "the emulated driver answers; for a GPU set AZR_TEST_DEVICE=gpu");
    device
}

/// Result of one run of a check: bytes that no schedule may change, or what was wrong.
pub type Outcome = Result<Vec<u8>, String>;

/// Runs a check under every schedule (once on a GPU): all must pass with the same bits.
pub fn holds(check: impl Fn(&Device) -> Outcome) {
    let device = device();
    if on_gpu() {
        let first = check(&device).unwrap_or_else(|wrong| panic!("{wrong}"));
        assert_eq!(check(&device), Ok(first), "a second run has the same bits");
        return;
    }
    let emulator = Emulator::get();
    let mut first: Option<Vec<u8>> = None;
    for schedule in Schedule::all() {
        emulator.schedule(schedule);
        emulator.take_stats();
        match check(&device) {
            Err(wrong) => panic!("{wrong}\nunder {schedule:?}"),
            Ok(bits) => {
                let first = first.get_or_insert_with(|| bits.clone());
                assert!(*first == bits, "other bits under {schedule:?}");
            }
        }
    }
}

/// Plants a fault (see kernels/README.md); the check must fail under at least one schedule. Returns what it said first.
pub fn finds(fault: &str, check: impl Fn(&Device) -> Outcome) -> String {
    if on_gpu() {
        return "SKIPPED: faults are planted on the emulator only".to_owned();
    }
    let (device, emulator) = (device(), Emulator::get());
    let mut found = Vec::new();
    for schedule in Schedule::all() {
        emulator.schedule(schedule);
        emulator.plant(fault);
        let outcome = check(&device);
        emulator.plant("");
        emulator.take_stats();
        if let Err(wrong) = outcome {
            found.push(format!("{wrong} under {schedule:?}"));
        }
    }
    println!("{fault}: found under {} of {} schedules", found.len(), Schedule::all().len());
    found.into_iter().next().unwrap_or_else(|| panic!("no schedule finds the fault {fault}"))
}

/// Normal numbers, rounded to bf16.
pub fn random_bf16(len: usize, stream: u32) -> Vec<bf16> {
    let mut rng = Rng::new(9, Purpose::Test, 0, stream);
    (0..len).map(|_| bf16::from_f64(rng.normal())).collect()
}

/// Normal numbers.
pub fn random_f32(len: usize, stream: u32) -> Vec<f32> {
    let mut rng = Rng::new(9, Purpose::Test, 1, stream);
    (0..len).map(|_| rng.normal() as f32).collect()
}

/// Exact values.
pub fn wide(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|v| v.to_f64()).collect()
}

/// Numbers that can be compared.
pub trait Number: Copy + bytemuck::Pod {
    /// Exact value.
    fn wide(self) -> f64;
    /// Relative rounding error of the type.
    const EPSILON: f64;
}

impl Number for bf16 {
    fn wide(self) -> f64 {
        self.to_f64()
    }
    const EPSILON: f64 = 1.0 / 256.0;
}

impl Number for f32 {
    fn wide(self) -> f64 {
        f64::from(self)
    }
    const EPSILON: f64 = 1.0 / 16_777_216.0;
}

/// Compares results with their reference: each may be off by one rounding of its type plus `slack`, an absolute error.
pub fn compare<T: Number>(what: &str, got: &[T], want: &[f64], slack: f64) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{what}: {} values for {}", got.len(), want.len()));
    }
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got.wide() - want).abs();
        if error.is_nan() || error > want.abs() * T::EPSILON * 1.01 + slack {
            return Err(format!("{what}: element {i} is {}, not {want}", got.wide()));
        }
    }
    Ok(())
}

/// Bytes of results.
pub fn bytes<T: bytemuck::Pod>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}
