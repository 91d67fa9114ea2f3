//! Work that the device does without the host: launches recorded as a graph and launched as one, and page-locked memory
//! that it reads and writes while the host goes on.

use std::marker::PhantomData;

use cudarc::driver::sys;

use crate::compute::launch::device::{Device, Element, View, ViewMut, check};
use crate::compute::launch::mark::Mark;
use crate::error::Result;

/// Launches that were recorded, with the arguments that they had then. What they read and write must live and stay in
/// place as long as the graph is launched.
pub struct Graph {
    device: Device,
    executable: sys::CUgraphExec,
}

// SAFETY: handles of the driver may be used from any thread; each use first makes the context current.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: made by `record`, destroyed once; the driver keeps it until it has run. An error has no reader.
            unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}

impl Graph {
    /// Launches everything, in the order of the stream.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn launch(&self) -> Result<()> {
        self.device.enter()?;
        // SAFETY: graph and stream live.
        let launch = || unsafe { sys::cuGraphLaunch(self.executable, self.device.stream()) };
        check(self.device.with_room(launch), "launching a graph")
    }
}

impl Device {
    /// Records what `work` launches and copies instead of doing it. It must neither allocate, free nor wait, nor launch a
    /// kernel for the first time.
    ///
    /// # Errors
    /// What `work` reports, or when the driver cannot record it.
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        check(unsafe { sys::cuStreamBeginCapture_v2(self.stream(), mode) }, "recording a graph")?;
        self.set_recording(true);
        let done = work();
        self.set_recording(false);
        let (mut graph, mut executable) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the stream is being captured, and out-pointers live for the calls. A graph that came is given back: the
        // executable one does not need it.
        let (ended, made) = unsafe {
            let ended = check(sys::cuStreamEndCapture(self.stream(), &raw mut graph), "recording a graph");
            let mut made = Ok(());
            if done.is_ok() && ended.is_ok() {
                let code = self.with_room(|| sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0));
                made = check(code, "preparing a graph");
            }
            if !graph.is_null() {
                sys::cuGraphDestroy(graph);
            }
            (ended, made)
        };
        done.and(ended).and(made)?;
        Ok(Graph { device: self.clone(), executable })
    }
}

/// Page-locked host memory: values come from the device or go there while the host goes on.
pub struct Pinned<T: Element> {
    device: Device,
    at: *mut T,
    len: usize,
    mark: Option<Mark>,
    element: PhantomData<T>,
}

// SAFETY: it owns its memory, which the host touches only when the device has done with it.
unsafe impl<T: Element> Send for Pinned<T> {}

impl<T: Element> Drop for Pinned<T> {
    fn drop(&mut self) {
        // What is on its way lands first. Errors have been reported by the operations that caused them.
        if self.device.synchronize().is_ok() || self.device.enter().is_ok() {
            // SAFETY: allocated by `new`, freed once.
            unsafe { sys::cuMemFreeHost(self.at.cast()) };
        }
    }
}

impl<T: Element> Pinned<T> {
    /// Room for `len` values.
    ///
    /// # Errors
    /// When the memory cannot be had.
    pub fn new(device: &Device, len: usize) -> Result<Self> {
        device.enter()?;
        let mut at = std::ptr::null_mut();
        // SAFETY: the out-pointer lives for the call.
        let code = unsafe { sys::cuMemHostAlloc(&raw mut at, (len * size_of::<T>()).max(1), 0) };
        check(code, "allocating page-locked memory")?;
        Ok(Pinned { device: device.clone(), at: at.cast(), len, mark: None, element: PhantomData })
    }

    /// Asks for the values of an array as they are after everything launched so far; [`Pinned::wait`] gives them.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn fetch(&mut self, from: &View<'_, T>) -> Result<()> {
        assert!(from.len() <= self.len, "room for {} values, not {}", self.len, from.len());
        self.device.enter()?;
        let bytes = from.len() * size_of::<T>();
        // SAFETY: both ranges have so many bytes; the host's lives until the stream has been waited for.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(self.at.cast(), from.at(), bytes, self.device.stream()) };
        check(code, "copying from the device")?;
        self.note()
    }

    /// Overwrites an array by what `fill` writes, once the values that were sent before have gone.
    ///
    /// # Errors
    /// When the driver fails, or a launch before did.
    pub fn send(&mut self, to: &mut ViewMut<'_, T>, fill: impl FnOnce(&mut [T])) -> Result<()> {
        assert!(to.len() <= self.len, "room for {} values, not {}", self.len, to.len());
        self.wait(0)?;
        // SAFETY: the memory holds `len` numbers of a plain type, and the device has done with it.
        let values = unsafe { std::slice::from_raw_parts_mut(self.at, to.len()) };
        fill(values);
        self.device.enter()?;
        let (from, bytes) = (values.as_ptr().cast(), size_of_val(values));
        // SAFETY: both ranges have so many bytes; the host's is not touched before the mark is reached.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to.at(), from, bytes, self.device.stream()) };
        check(code, "copying to the device")?;
        self.note()
    }

    /// What was asked for so far is to be waited for.
    fn note(&mut self) -> Result<()> {
        match &self.mark {
            Some(mark) => mark.again()?,
            None => self.mark = Some(self.device.mark()?),
        }
        Ok(())
    }

    /// The first `len` values, once they have come.
    ///
    /// # Errors
    /// When a launch before them failed.
    pub fn wait(&self, len: usize) -> Result<&[T]> {
        assert!(len <= self.len, "{len} of {} values", self.len);
        if let Some(mark) = &self.mark {
            mark.wait()?;
        }
        // SAFETY: the memory holds `len` numbers of a plain type, which nobody writes until the next `fetch`.
        Ok(unsafe { std::slice::from_raw_parts(self.at, len) })
    }
}
