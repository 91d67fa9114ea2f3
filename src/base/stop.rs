//! Shutdown: the first SIGINT, SIGTERM or SIGHUP (a terminal that closes) asks for a clean stop, the second ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::error::{Error, Result};

/// Exit code after the second signal, as shells report SIGINT.
const SECOND_SIGNAL_EXIT: i32 = 130;

/// Whether a stop was asked for.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// A flag that signals set.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn on_signals() -> Result<Self> {
        let flag = StopFlag::default();
        let hangup = (!is_ignored(SIGHUP)).then_some(SIGHUP);
        for signal in [SIGINT, SIGTERM].into_iter().chain(hangup) {
            // In this order: the exit looks at the flag before the same signal sets it.
            signal_hook::flag::register_conditional_shutdown(signal, SECOND_SIGNAL_EXIT, flag.0.clone())
                .and_then(|_| signal_hook::flag::register(signal, flag.0.clone()))
                .map_err(|e| Error::environment(format!("cannot handle signals: {e}")))?;
        }
        Ok(flag)
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets it.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Whether whoever started this process has a signal ignored, as `nohup` does.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.unwrap_or(0) >> (signal - 1) & 1 == 1
}
