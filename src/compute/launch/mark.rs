//! Points of a device's stream, to wait for or to take the time between.

use cudarc::driver::sys;

use crate::compute::launch::device::{Device, check};
use crate::error::Result;

impl Device {
    /// Marks this point of the stream, for timing.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn mark(&self) -> Result<Mark> {
        self.enter()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: the out-pointer lives for the call.
        check(unsafe { sys::cuEventCreate(&raw mut event, 0) }, "creating an event")?;
        let mark = Mark { device: self.clone(), event };
        // SAFETY: event and stream live.
        check(unsafe { sys::cuEventRecord(event, self.stream()) }, "recording an event")?;
        Ok(mark)
    }
}

/// A point of a device's stream.
pub struct Mark {
    device: Device,
    event: sys::CUevent,
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: created by `mark`, destroyed once; the driver keeps it until it is past. An error has no reader.
            unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}

// SAFETY: handles of the driver may be used from any thread; each use first makes the context current.
unsafe impl Send for Mark {}

impl Mark {
    /// Marks this point of the stream instead.
    pub(in crate::compute) fn again(&self) -> Result<()> {
        self.device.enter()?;
        // SAFETY: event and stream live.
        check(unsafe { sys::cuEventRecord(self.event, self.device.stream()) }, "recording an event")
    }

    /// Waits until the device has come here.
    pub(super) fn wait(&self) -> Result<()> {
        self.device.enter()?;
        // SAFETY: the event lives.
        check(unsafe { sys::cuEventSynchronize(self.event) }, "waiting for an event")
    }

    /// Seconds that the device took from an earlier mark to this one, which it waits for.
    ///
    /// # Errors
    /// When the driver fails, or a launch in between did.
    pub fn seconds_since(&self, earlier: &Mark) -> Result<f64> {
        self.device.enter()?;
        let mut milliseconds = 0.0f32;
        // SAFETY: both events were recorded; the out-pointer lives for the call.
        unsafe {
            check(sys::cuEventSynchronize(self.event), "waiting for an event")?;
            check(sys::cuEventElapsedTime(&raw mut milliseconds, earlier.event, self.event), "reading the time")?;
        }
        Ok(f64::from(milliseconds) / 1e3)
    }
}
