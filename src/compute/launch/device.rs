//! The device layer over the CUDA driver: probing, memory, launches. One context and one stream per [`Device`]; every
//! operation is ordered by that stream, and only [`Device::synchronize`] and downloads wait.
//!
//! The driver library is looked for before its first use: a machine without it gets an error, not a panic. What
//! kernels exist and how they are launched is *not* here: one launcher per entry point stands in the files beside this.

use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use half::bf16;

use crate::compute::launch::images::{self, Capability};
use crate::compute::launch::staging::Staging;
use crate::error::{Error, Kind, Result};

/// Oldest driver that has every function used here (tensor maps came with CUDA 12.0).
const MIN_DRIVER: i32 = 12_000;
/// First driver that tells the parameters of a kernel.
const PARAM_INFO_DRIVER: i32 = 12_040;
/// Most parameters of a kernel.
const MAX_PARAMS: usize = 32;
/// Dynamic shared memory that needs no permission.
const FREE_SMEM_BYTES: u32 = 48 << 10;

/// Numbers that a device holds.
pub trait Element: Copy + Send + Sync + bytemuck::Pod {}
impl Element for f32 {}
impl Element for f64 {}
impl Element for bf16 {}
impl Element for u32 {}
impl Element for u16 {}
impl Element for u8 {}

/// Turns a driver's answer into an error that says what was being done.
pub(super) fn check(code: CUresult, doing: &str) -> Result<()> {
    check_as(code, || doing.to_owned())
}

/// [`check`] with a text that is only made when it is needed: launches come by the hundred thousand per second.
fn check_as(code: CUresult, doing: impl FnOnce() -> String) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(driver_error(code, &doing()))
}

#[cold]
fn driver_error(code: CUresult, doing: &str) -> Error {
    let mut text: *const std::ffi::c_char = std::ptr::null();
    // SAFETY: the library is open, since it answered; the text is static or valid until this thread's next call.
    let text = unsafe {
        if sys::cuGetErrorString(code, &raw mut text) == CUresult::CUDA_SUCCESS && !text.is_null() {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        } else {
            String::new()
        }
    };
    let message = format!("{doing}: {code:?}: {text}");
    match code {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::new(Kind::OutOfMemory, message)
            .with_hint("use a smaller batch or a shorter context; `azr plan` computes what fits"),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_INVALID_IMAGE
        | CUresult::CUDA_ERROR_INVALID_PTX
        | CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED => Error::environment(message)
            .with_hint("the driver does not take this build's kernels: update it, or use --device cpu"),
        _ => Error::failure(message),
    }
}

/// Number of CUDA devices and the driver's CUDA version (12080 for 12.8).
///
/// # Errors
/// When there is no driver, it does not start, is too old, or sees no device; each with its own text.
pub fn probe() -> Result<(usize, i32)> {
    const CPU: &str = "install NVIDIA's driver, or use --device cpu";
    // SAFETY: opens the library, whose initialisers have no requirements.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::environment("no NVIDIA driver: libcuda.so.1 was not found").with_hint(CPU));
    }
    // SAFETY: plain calls of an open library.
    let (started, version, count) = unsafe {
        let (mut version, mut count) = (0, 0);
        let started = sys::cuInit(0);
        if started == CUresult::CUDA_SUCCESS {
            check(sys::cuDriverGetVersion(&raw mut version), "asking for the driver's version")?;
            check(sys::cuDeviceGetCount(&raw mut count), "counting devices")?;
        }
        (started, version, count)
    };
    if started == CUresult::CUDA_ERROR_NO_DEVICE || (started == CUresult::CUDA_SUCCESS && count == 0) {
        return Err(Error::environment("the NVIDIA driver sees no CUDA device")
            .with_hint("check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"));
    }
    check(started, "starting the NVIDIA driver").map_err(|e| Error::environment(e.to_string()).with_hint(CPU))?;
    if version < MIN_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(Error::environment(format!(
            "the NVIDIA driver is for CUDA {major}.{minor}; 12.0 or newer is needed"
        ))
        .with_hint("update the driver (R525 or newer)"));
    }
    Ok((count as usize, version))
}

/// Where a device gets a kernel file's image from.
pub type FindImage = fn(&str, Capability) -> Result<Vec<u8>>;

/// An entry point: kernel file without extension, and its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    /// `kernels/FILE.cu`.
    pub file: &'static str,
    /// Name of the `__global__` function.
    pub name: &'static str,
}

/// Grid, block and dynamic shared memory of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Blocks in x, y, z.
    pub grid: (u32, u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Blocks of a cluster in x (1: none).
    pub cluster: u32,
    /// Bytes of dynamic shared memory.
    pub smem_bytes: u32,
}

impl Shape {
    /// A grid without clusters or dynamic shared memory.
    pub fn new(grid: (u32, u32, u32), threads: u32) -> Self {
        Shape { grid, threads, cluster: 1, smem_bytes: 0 }
    }

    /// With bytes of dynamic shared memory.
    #[must_use]
    pub fn smem(self, smem_bytes: u32) -> Self {
        Shape { smem_bytes, ..self }
    }

    /// With clusters of so many blocks.
    #[must_use]
    pub fn cluster(self, cluster: u32) -> Self {
        Shape { cluster, ..self }
    }

    fn blocks(self) -> u64 {
        u64::from(self.grid.0) * u64::from(self.grid.1) * u64::from(self.grid.2)
    }
}

/// Largest kernel argument: a tensor map.
const MAX_ARG_BYTES: usize = 128;

/// One kernel argument, by value.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Arg {
    value: [u8; MAX_ARG_BYTES],
    bytes: usize,
}

/// What kernels take as parameters.
pub trait Param: Copy {}
impl Param for u64 {}
impl Param for u32 {}
impl Param for i32 {}
impl Param for f32 {}
impl Param for TensorMap {}

impl Arg {
    /// The argument with this value.
    pub fn of<T: Param>(value: T) -> Self {
        const { assert!(size_of::<T>() <= MAX_ARG_BYTES, "an argument has room") };
        let (mut arg, bytes) = (Arg { value: [0; MAX_ARG_BYTES], bytes: size_of::<T>() }, size_of::<T>());
        // SAFETY: `value` has room for T, asserted above, and parameters have no padding that matters.
        unsafe { std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), arg.value.as_mut_ptr(), bytes) };
        arg
    }
}

/// The arguments of a launch, by value: buffers' addresses, numbers, tensor maps.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::compute::launch::device::Arg::of($value)),*] };
}
pub(crate) use args;

/// A CUtensorMap: how TMA sees a matrix.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap(sys::CUtensorMap);

struct Function {
    handle: sys::CUfunction,
    smem_bytes: u32,
    checked: bool,
}

struct Inner {
    context: sys::CUcontext,
    stream: sys::CUstream,
    pool: sys::CUmemoryPool,
    device: sys::CUdevice,
    name: String,
    capability: Capability,
    driver: i32,
    num_multiprocessors: u32,
    max_smem_bytes: u32,
    find_image: FindImage,
    staging: Mutex<Staging>,
    /// Whether launches are being recorded.
    recording: AtomicBool,
    modules: Mutex<HashMap<&'static str, usize>>,
    /// By the address of the entry point's name: texts of a program stay where they are, and addresses compare fast.
    functions: Mutex<BTreeMap<usize, Function>>,
}

// SAFETY: handles of the driver may be used from any thread; each use first makes the context current.
unsafe impl Send for Inner {}
// SAFETY: as above; what changes lies behind mutexes.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the last owner; nothing can be launched any more. Errors at the end of a process have no reader.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuStreamSynchronize(self.stream);
            self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).free();
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A GPU: context, stream, kernels. Clones share it.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

impl Device {
    /// Opens a device with the kernels of this binary.
    ///
    /// # Errors
    /// When there is no usable driver or device, or no kernels for it.
    pub fn open(ordinal: usize) -> Result<Self> {
        Self::open_with(ordinal, images::find)
    }

    /// Opens a device with kernels from elsewhere, for tests.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_with(ordinal: usize, find_image: FindImage) -> Result<Self> {
        let (count, driver) = probe()?;
        if ordinal >= count {
            return Err(Error::environment(format!("there is no CUDA device {ordinal}; the driver sees {count}")));
        }
        // SAFETY: out-pointers live for the calls; handles are used in the order that the driver gives them.
        let inner = unsafe {
            let (mut device, mut context, mut stream) = (0, std::ptr::null_mut(), std::ptr::null_mut());
            check(sys::cuDeviceGet(&raw mut device, ordinal as i32), "opening the CUDA device")?;
            let code = sys::cuDevicePrimaryCtxRetain(&raw mut context, device);
            check(code, "opening a CUDA context").map_err(|e| {
                Error::environment(e.to_string())
                    .with_hint("is the GPU taken? nvidia-smi shows by whom, and its compute mode")
            })?;
            check(sys::cuCtxSetCurrent(context), "entering the CUDA context")?;
            // 1: CU_STREAM_NON_BLOCKING.
            check(sys::cuStreamCreate(&raw mut stream, 1), "creating a CUDA stream")?;
            // Freed memory stays with the process: otherwise every wait would give it back to the driver, and the next
            // step would ask for it again.
            let (mut pool, mut keep) = (std::ptr::null_mut(), u64::MAX);
            let code = sys::cuDeviceGetDefaultMemPool(&raw mut pool, device);
            check(code, "asking for the memory pool").map_err(|e| {
                Error::environment(e.to_string())
                    .with_hint("a GPU with memory pools is needed; some virtual ones have none")
            })?;
            let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            check(sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut keep).cast()), "setting up the memory pool")?;
            let mut name = [0; 128];
            check(sys::cuDeviceGetName(name.as_mut_ptr(), 127, device), "asking for the device's name")?;
            let attribute = |which: Attribute| {
                let mut value = 0;
                check(sys::cuDeviceGetAttribute(&raw mut value, which, device), "asking for a device attribute")?;
                Ok::<u32, Error>(value as u32)
            };
            let capability = (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            );
            Inner {
                context,
                stream,
                pool,
                device,
                name: CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
                capability,
                driver,
                num_multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                max_smem_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
                find_image,
                staging: Mutex::new(Staging::new()?),
                recording: AtomicBool::new(false),
                modules: Mutex::default(),
                functions: Mutex::default(),
            }
        };
        let (major, minor) = inner.capability;
        if major < 8 {
            return Err(Error::environment(format!("{} has compute capability {major}.{minor}", inner.name))
                .with_hint("GPUs from Ampere (8.0) on are supported; use --device cpu"));
        }
        Ok(Device(Arc::new(inner)))
    }

    /// Name that the driver gives the device.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Compute capability, (9, 0) for Hopper.
    pub fn capability(&self) -> Capability {
        self.0.capability
    }

    /// Whether the device runs Hopper's own kernels (TMA, wgmma).
    pub fn is_hopper(&self) -> bool {
        self.0.capability == (9, 0)
    }

    /// Number of multiprocessors. Grids of persistent kernels follow it; results never do.
    pub fn num_multiprocessors(&self) -> u32 {
        self.0.num_multiprocessors
    }

    /// Shared memory that a block may have.
    pub fn max_smem_bytes(&self) -> u32 {
        self.0.max_smem_bytes
    }

    /// Free and total bytes of device memory.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        self.enter()?;
        // SAFETY: out-pointers live for the call.
        check(unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }, "asking for free memory")?;
        Ok((free, total))
    }

    /// Makes the context current in this thread.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        check(unsafe { sys::cuCtxSetCurrent(self.0.context) }, "entering the CUDA context")
    }

    pub(super) fn stream(&self) -> sys::CUstream {
        self.0.stream
    }

    /// Waits for everything launched so far.
    ///
    /// # Errors
    /// What went wrong in it.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        check(unsafe { sys::cuStreamSynchronize(self.0.stream) }, "waiting for the device")
    }

    /// Memory for `len` elements with unspecified content.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn alloc<T: Element>(&self, len: usize) -> Result<Buf<T>> {
        self.enter()?;
        let mut at = 0;
        let bytes = len.checked_mul(size_of::<T>());
        let bytes = bytes.ok_or_else(|| Error::new(Kind::OutOfMemory, format!("an array of {len} is too large")))?;
        if bytes > 0 {
            // SAFETY: the out-pointer lives for the call.
            let code = self.with_room(|| unsafe { sys::cuMemAllocAsync(&raw mut at, bytes, self.0.stream) });
            check_as(code, || format!("allocating {bytes} bytes of device memory"))?;
        }
        Ok(Buf { device: self.clone(), at, len, element: PhantomData })
    }

    /// Calls again when memory ran out, once everything launched is done and what was freed has gone back to the driver:
    /// the pool does not always join its pieces, and gives none of them to graphs and to code, which is loaded as late as by
    /// a kernel's first launch. Not while launches are recorded: a recorded stream cannot be waited for.
    pub(super) fn with_room(&self, mut call: impl FnMut() -> CUresult) -> CUresult {
        let code = call();
        if self.0.recording.load(Ordering::Relaxed) {
            return code;
        }
        // SAFETY: stream and pool live as long as `self`.
        let trim = || unsafe {
            sys::cuStreamSynchronize(self.0.stream) == CUresult::CUDA_SUCCESS
                && sys::cuMemPoolTrimTo(self.0.pool, 0) == CUresult::CUDA_SUCCESS
        };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY && trim() { call() } else { code }
    }

    /// Zeros.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn zeros<T: Element>(&self, len: usize) -> Result<Buf<T>> {
        let mut buf = self.alloc(len)?;
        self.clear(&mut buf.view_mut())?;
        Ok(buf)
    }

    /// An array with these values.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<Buf<T>> {
        let mut buf = self.alloc(values.len())?;
        self.write(&mut buf.view_mut(), values)?;
        Ok(buf)
    }

    /// Overwrites an array. Returns when `values` has been read.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn write<T: Element>(&self, to: &mut ViewMut<'_, T>, values: &[T]) -> Result<()> {
        assert_eq!(to.len, values.len(), "as many values as elements");
        if values.is_empty() {
            return Ok(());
        }
        if self.0.recording.load(Ordering::Relaxed) {
            return Err(Error::failure("values of the host cannot be part of a graph"));
        }
        self.enter()?;
        let mut staging = self.0.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the array has `len` elements; context and stream are this device's.
        unsafe { staging.send(self.0.stream, to.at, bytemuck::cast_slice(values)) }
    }

    /// Whether launches are being recorded from now on.
    pub(super) fn set_recording(&self, recording: bool) {
        self.0.recording.store(recording, Ordering::Relaxed);
    }

    /// The values of an array, after everything launched so far.
    ///
    /// # Errors
    /// When the driver fails, or a launch before it did.
    pub fn download<T: Element>(&self, from: &View<'_, T>) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); from.len];
        if from.len > 0 {
            self.enter()?;
            let bytes = size_of_val(values.as_slice());
            // SAFETY: both ranges have `len` elements, and the host's lives until the stream has been waited for.
            let code = unsafe { sys::cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), from.at, bytes, self.0.stream) };
            check(code, "copying from the device")?;
        }
        self.synchronize()?;
        Ok(values)
    }

    /// Copies an array.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn copy<T: Element>(&self, from: &View<'_, T>, to: &mut ViewMut<'_, T>) -> Result<()> {
        assert_eq!(from.len, to.len, "arrays of one length");
        if from.len == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: both ranges have `len` elements, and borrows keep them apart.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to.at, from.at, from.len * size_of::<T>(), self.0.stream) };
        check(code, "copying on the device")
    }

    /// Sets an array to zero.
    ///
    /// # Errors
    /// When the driver fails.
    pub fn clear<T: Element>(&self, to: &mut ViewMut<'_, T>) -> Result<()> {
        if to.len == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: the range has `len` elements.
        check(unsafe { sys::cuMemsetD8Async(to.at, 0, to.len * size_of::<T>(), self.0.stream) }, "clearing memory")
    }

    /// How TMA sees a bf16 matrix of `rows` x `cols` with rows `stride` elements apart: boxes of `box_rows` x
    /// `box_cols`, 128-byte swizzle, zeros outside.
    ///
    /// # Errors
    /// When the driver does not take it: addresses and strides are multiples of 16 bytes.
    pub fn tensor_map(
        &self,
        matrix: &View<'_, bf16>,
        (rows, cols, stride): (usize, usize, usize),
        (box_rows, box_cols): (u32, u32),
    ) -> Result<TensorMap> {
        assert!(rows == 0 || (rows - 1) * stride + cols <= matrix.len, "{rows} rows of {cols} in {}", matrix.len);
        let (sizes, strides) = ([cols as u64, rows as u64], [stride as u64 * 2]);
        let (boxes, steps) = ([box_cols, box_rows], [1, 1]);
        // SAFETY: a CUtensorMap is plain bytes; the driver overwrites it.
        let mut map = TensorMap(unsafe { std::mem::zeroed() });
        self.enter()?;
        // SAFETY: arrays have the rank's length; the address is only stored.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map.0,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix.at as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check_as(code, || format!("describing a {rows} x {cols} matrix (rows {stride} apart) to TMA"))?;
        Ok(map)
    }

    /// The module of a kernel file, loaded at its first use.
    fn module(&self, file: &'static str) -> Result<sys::CUmodule> {
        let mut modules = self.0.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(file) {
            return Ok(*module as sys::CUmodule);
        }
        let image = (self.0.find_image)(file, self.0.capability)?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is a whole cubin or zero-terminated PTX; the driver copies it.
        let code = self.with_room(|| unsafe { sys::cuModuleLoadData(&raw mut module, image.as_ptr().cast()) });
        check_as(code, || format!("loading the `{file}` kernels"))?;
        modules.insert(file, module as usize);
        Ok(module)
    }

    /// An entry point's function, ready for so much dynamic shared memory and checked against its arguments.
    fn function(&self, entry: Entry, smem_bytes: u32, args: &[Arg]) -> Result<sys::CUfunction> {
        let mut functions = self.0.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let function = match functions.entry(entry.name.as_ptr() as usize) {
            Slot::Occupied(known) => known.into_mut(),
            Slot::Vacant(slot) => {
                let name = std::ffi::CString::new(entry.name).map_err(|e| Error::failure(e.to_string()))?;
                let (module, mut handle) = (self.module(entry.file)?, std::ptr::null_mut());
                // SAFETY: the module is loaded, and lives as long as the context.
                let code =
                    self.with_room(|| unsafe { sys::cuModuleGetFunction(&raw mut handle, module, name.as_ptr()) });
                check_as(code, || format!("finding the kernel {}", entry.name))?;
                slot.insert(Function { handle, smem_bytes: FREE_SMEM_BYTES, checked: false })
            }
        };
        if !function.checked && self.0.driver >= PARAM_INFO_DRIVER {
            check_params(entry, function.handle, args)?;
            function.checked = true;
        }
        if smem_bytes > function.smem_bytes {
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let code = self.with_room(|| unsafe { sys::cuFuncSetAttribute(function.handle, which, smem_bytes as i32) });
            check_as(code, || format!("giving {} {smem_bytes} bytes of shared memory", entry.name))?;
            function.smem_bytes = smem_bytes;
        }
        Ok(function.handle)
    }

    /// Launches a kernel. A grid without blocks launches nothing.
    ///
    /// # Errors
    /// When the kernel cannot be loaded or launched.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and its accesses stay inside their buffers: what launchers assert.
    pub unsafe fn launch(&self, entry: Entry, shape: Shape, args: &[Arg]) -> Result<()> {
        if shape.blocks() == 0 {
            return Ok(());
        }
        if shape.smem_bytes > self.0.max_smem_bytes {
            let (name, needs, has) = (entry.name, shape.smem_bytes, self.0.max_smem_bytes);
            return Err(Error::failure(format!("{name} needs {needs} bytes of shared memory; a block has {has} here")));
        }
        self.enter()?;
        let function = self.function(entry, shape.smem_bytes, args)?;
        let mut params = [std::ptr::null_mut(); MAX_PARAMS];
        for (param, arg) in params.iter_mut().zip(args) {
            *param = arg.value.as_ptr().cast_mut().cast();
        }
        let (x, y, z) = shape.grid;
        // SAFETY: an attribute is plain data; the fields that its kind reads are set.
        let mut cluster: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        cluster.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        cluster.value.clusterDim.x = shape.cluster;
        cluster.value.clusterDim.y = 1;
        cluster.value.clusterDim.z = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.smem_bytes,
            hStream: self.0.stream,
            attrs: &raw mut cluster,
            numAttrs: u32::from(shape.cluster > 1),
        };
        // SAFETY: the caller vouches for the arguments; they live until the call returns, and the driver copies them. A launch
        // that failed has enqueued nothing.
        let code = self.with_room(|| unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, params.as_mut_ptr(), std::ptr::null_mut())
        });
        check_as(code, || format!("launching {}", entry.name))
    }
}

/// Compares number and sizes of arguments with what the driver knows of the kernel.
fn check_params(entry: Entry, function: sys::CUfunction, args: &[Arg]) -> Result<()> {
    assert!(args.len() <= MAX_PARAMS, "{} has at most {MAX_PARAMS} parameters", entry.name);
    let mut expected = Vec::new();
    for index in 0..=args.len() {
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: the function is loaded; out-pointers live for the call. An index past the end is an ordinary error.
        let code = unsafe { sys::cuFuncGetParamInfo(function, index, &raw mut offset, &raw mut bytes) };
        if code != CUresult::CUDA_SUCCESS {
            break;
        }
        expected.push(bytes);
    }
    let given: Vec<usize> = args.iter().map(|a| a.bytes).collect();
    if given != expected {
        let name = entry.name;
        return Err(Error::failure(format!(
            "{name} takes arguments of {expected:?} bytes, its launcher gives {given:?}"
        )));
    }
    Ok(())
}

/// An array on a device.
pub struct Buf<T: Element> {
    device: Device,
    at: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Drop for Buf<T> {
    fn drop(&mut self) {
        if self.at != 0 && self.device.enter().is_ok() {
            // SAFETY: allocated by `alloc`, freed once; the stream's order keeps it until its last use. An error here
            // has been reported by the operation that caused it.
            unsafe { sys::cuMemFreeAsync(self.at, self.device.0.stream) };
        }
    }
}

impl<T: Element> Buf<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The whole array.
    pub fn view(&self) -> View<'_, T> {
        View { at: self.at, len: self.len, element: PhantomData }
    }

    /// The whole array, to be written.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { at: self.at, len: self.len, element: PhantomData }
    }
}

/// A part of an array on a device.
#[derive(Clone, Copy)]
pub struct View<'a, T: Element> {
    at: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<&'a T>,
}

impl<'a, T: Element> View<'a, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address on the device, as a kernel argument.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Elements `from..from + len`.
    pub fn part(&self, from: usize, len: usize) -> View<'a, T> {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.len), "{from} + {len} in {}", self.len);
        View { at: self.at + (from * size_of::<T>()) as u64, len, element: PhantomData }
    }
}

/// A part of an array on a device, to be written.
pub struct ViewMut<'a, T: Element> {
    at: sys::CUdeviceptr,
    len: usize,
    element: PhantomData<&'a mut T>,
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// The first `at` elements, and the others.
    pub fn split(self, at: usize) -> (ViewMut<'a, T>, ViewMut<'a, T>) {
        assert!(at <= self.len, "{at} of {}", self.len);
        let part =
            |from: usize, len| ViewMut { at: self.at + (from * size_of::<T>()) as u64, len, element: PhantomData };
        (part(0, at), part(at, self.len - at))
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address on the device, as a kernel argument.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Elements `from..from + len`.
    pub fn part(&mut self, from: usize, len: usize) -> ViewMut<'_, T> {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.len), "{from} + {len} in {}", self.len);
        ViewMut { at: self.at + (from * size_of::<T>()) as u64, len, element: PhantomData }
    }

    /// The same part, to be read.
    pub fn as_view(&self) -> View<'_, T> {
        View { at: self.at, len: self.len, element: PhantomData }
    }
}
