//! Tests only: `azr`'s CUDA kernels on a CPU. The build script compiles `kernels/*.cu` with the host's C++ compiler
//! into a library that exports the CUDA driver API. A test opens it with [`Emulator::get`] before it touches the
//! driver, or gives a program its folder as `LD_LIBRARY_PATH`; either then runs its GPU path here.

use std::ffi::{CString, c_char, c_int};
use std::path::Path;
use std::sync::OnceLock;

use libloading::Library;
use libloading::os::unix::{Library as UnixLibrary, RTLD_GLOBAL, RTLD_NOW};

#[path = "../../compile.rs"]
pub mod compile;

/// Path of the emulated `libcuda.so.1`.
pub const LIBRARY: &str = env!("AZR_EMU_LIBRARY");

/// Folder of the library, for `LD_LIBRARY_PATH`.
pub fn folder() -> &'static Path {
    Path::new(LIBRARY).parent().expect("a library lies in a folder")
}

/// Order in which threads and blocks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Order {
    /// Lowest index first, as far ahead as barriers let it.
    Ascending = 0,
    /// Highest index first.
    Descending = 1,
    /// By the seed, with changes on the way.
    Random = 2,
}

/// When asynchronous copies and products happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Landing {
    /// When somebody waits for them.
    Late = 0,
    /// When they are issued.
    Early = 1,
    /// Each by chance.
    Any = 2,
}

/// Arithmetic of the tensor cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Arithmetic {
    /// Sums in f32.
    Plain = 0,
    /// The published model of Hopper.
    Hopper = 1,
    /// The published model of Ampere.
    Ampere = 2,
}

/// How launches of this thread run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Order of threads and blocks.
    pub order: Order,
    /// When asynchronous work lands.
    pub landing: Landing,
    /// Seed of the random choices.
    pub seed: u32,
    /// Race detector.
    pub race: bool,
    /// Arithmetic of the tensor cores.
    pub arithmetic: Arithmetic,
}

impl Schedule {
    /// Ascending order, late landing, no detector, plain arithmetic.
    pub const PLAIN: Schedule = Schedule {
        order: Order::Ascending,
        landing: Landing::Late,
        seed: 0,
        race: false,
        arithmetic: Arithmetic::Plain,
    };

    /// Every schedule that a kernel's result must not depend on: all orders, early and late, and the race detector
    /// under two of them.
    pub fn all() -> Vec<Schedule> {
        let mut all = Vec::new();
        for (order, seed) in [(Order::Ascending, 0), (Order::Descending, 0), (Order::Random, 1), (Order::Random, 2)] {
            for landing in [Landing::Late, Landing::Early] {
                all.push(Schedule { order, landing, seed, ..Schedule::PLAIN });
            }
        }
        all.push(Schedule { order: Order::Random, landing: Landing::Any, seed: 3, ..Schedule::PLAIN });
        all.push(Schedule { race: true, ..Schedule::PLAIN });
        all.push(Schedule { order: Order::Random, landing: Landing::Any, seed: 4, race: true, ..Schedule::PLAIN });
        all
    }
}

/// What launches of a thread did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Stats {
    /// Switches from thread to thread.
    pub switches: u64,
    /// 8x8 matrices loaded from shared memory.
    pub matrix_loads: u64,
    /// Extra passes that bank conflicts cost them.
    pub bank_replays: u64,
    /// Products of a warp.
    pub mmas: u64,
    /// Products of a warpgroup.
    pub wgmmas: u64,
    /// Bytes of asynchronous copies.
    pub async_bytes: u64,
}

/// The opened library.
pub struct Emulator {
    library: Library,
}

impl Emulator {
    /// Opens the library, once per process; a later search for `libcuda` finds it.
    pub fn get() -> &'static Emulator {
        static OPEN: OnceLock<Emulator> = OnceLock::new();
        OPEN.get_or_init(|| {
            // SAFETY: the library's initialisers only register kernels.
            let library = unsafe { UnixLibrary::open(Some(LIBRARY), RTLD_NOW | RTLD_GLOBAL) };
            Emulator { library: library.expect("the emulated driver opens").into() }
        })
    }

    fn set(&self, option: &str, value: u32) {
        let option = CString::new(option).expect("an option has no zero byte");
        // SAFETY: driver.cpp defines it with this signature.
        let code = unsafe {
            let set = self.library.get::<unsafe extern "C" fn(*const c_char, u32) -> c_int>(b"azr_emu_set");
            set.expect("the emulator has azr_emu_set")(option.as_ptr(), value)
        };
        assert_eq!(code, 0, "the emulator has no option {option:?}");
    }

    /// How the calling thread's launches run from now on.
    pub fn schedule(&self, schedule: Schedule) {
        self.set("order", schedule.order as u32);
        self.set("landing", schedule.landing as u32);
        self.set("seed", schedule.seed);
        self.set("race", u32::from(schedule.race));
        self.set("arithmetic", schedule.arithmetic as u32);
    }

    /// Compute capability (for example 90) and number of multiprocessors that the calling thread sees.
    pub fn device(&self, capability: u32, multiprocessors: u32) {
        self.set("capability", capability);
        self.set("sms", multiprocessors);
    }

    /// Host threads that share the calling thread's grids.
    pub fn workers(&self, workers: u32) {
        self.set("workers", workers);
    }

    /// Plants a fault (`PLANTED` in the kernels) in the calling thread's launches; an empty name plants none.
    pub fn plant(&self, fault: &str) {
        let fault = CString::new(fault).expect("a fault's name has no zero byte");
        // SAFETY: driver.cpp defines it with this signature.
        unsafe {
            let plant = self.library.get::<unsafe extern "C" fn(*const c_char) -> c_int>(b"azr_emu_plant");
            plant.expect("the emulator has azr_emu_plant")(fault.as_ptr());
        }
    }

    /// Counts of the calling thread's launches since the last call. Also forgets an error, so that it can go on.
    pub fn take_stats(&self) -> Stats {
        let mut stats = Stats::default();
        // SAFETY: driver.cpp defines it with this signature, and `Stats` mirrors its structure.
        unsafe {
            let take = self.library.get::<unsafe extern "C" fn(*mut Stats) -> c_int>(b"azr_emu_take_stats");
            take.expect("the emulator has azr_emu_take_stats")(&raw mut stats);
        }
        stats
    }
}
