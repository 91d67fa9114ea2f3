//! How kernels become images: which sources and architectures, NVRTC, and the manifest of `kernels/prebuilt/`. Shared by
//! the build script and by the `prebuild` tool; not part of the binary.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use libloading::Library;

/// Version of NVRTC that the committed images come from (`kernels/nvrtc.sh` pins its hash). 12.6 code runs on every
/// driver from R525 on; some R535 drivers reject that of 12.8.
pub const NVRTC_VERSION: &str = "12.6";

/// Options of every compilation; part of the sources' hash. Contraction is off: kernels spell out multiply-adds.
pub const OPTIONS: &[&str] = &["--std=c++17", "--fmad=false", "--ptxas-options=-v"];

/// Architectures of a source that names none: Ampere and Ada, Hopper, and text that newer drivers compile themselves.
pub const DEFAULT_ARCHES: &[&str] = &["sm_80", "sm_90a", "compute_80"];

/// Name of the manifest in `kernels/prebuilt/`.
pub const MANIFEST: &str = "manifest.txt";

/// One `.cu` file.
#[derive(Debug, Clone)]
pub struct KernelSource {
    /// File name without extension.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Architectures: the file's line `// arch: ...`, or [`DEFAULT_ARCHES`].
    pub arches: Vec<String>,
    /// Hash of the text, the shared headers and the options.
    pub hash: String,
}

/// A compiled image and what the compiler says about it.
#[derive(Debug, Clone)]
pub struct CompiledImage {
    /// Cubin, or PTX with a zero at its end.
    pub bytes: Vec<u8>,
    /// Entry points.
    pub entries: Vec<EntryUse>,
}

/// What an entry point needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryUse {
    /// Name.
    pub name: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of static shared memory.
    pub smem: u32,
    /// Bytes spilled to memory.
    pub spill: u32,
}

/// A line of the manifest: one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestLine {
    /// Source file without extension.
    pub file: String,
    /// Architecture.
    pub arch: String,
    /// Hash of the sources.
    pub source_hash: String,
    /// Hash of the image, not compressed.
    pub image_hash: String,
    /// Entry points as `name:registers:smem:spill`, with commas between; `-` for PTX.
    pub entries: String,
}

impl ManifestLine {
    /// Name of the image's file.
    pub fn file_name(&self) -> String {
        format!("{}.{}.z", self.file, self.arch)
    }
}

fn read_sorted(folder: &Path, extension: &str) -> Result<Vec<(String, String)>, String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("cannot read {}: {e}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| e.to_string())?.path();
        if path.extension().is_some_and(|e| e == extension) {
            let text = fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
            let name = path.file_stem().ok_or("a file has a name")?.to_string_lossy().into_owned();
            found.push((name, text));
        }
    }
    found.sort();
    Ok(found)
}

/// Shared headers of the kernels, name and text.
///
/// # Errors
/// When they cannot be read.
pub fn headers(kernels: &Path) -> Result<Vec<(String, String)>, String> {
    Ok(read_sorted(kernels, "h")?.into_iter().map(|(name, text)| (format!("{name}.h"), text)).collect())
}

/// All kernel sources of a folder.
///
/// # Errors
/// When they cannot be read.
pub fn sources(kernels: &Path) -> Result<Vec<KernelSource>, String> {
    let headers = headers(kernels)?;
    let source = |(name, text): (String, String)| {
        let mut hasher = blake3::Hasher::new();
        let own = [(name.clone(), text.clone())];
        for (name, text) in headers.iter().chain(&own) {
            hasher.update(format!("{name} {}\n", text.len()).as_bytes()).update(text.as_bytes());
        }
        hasher.update(OPTIONS.join(" ").as_bytes()).update(NVRTC_VERSION.as_bytes());
        let named = text.lines().find_map(|l| l.strip_prefix("// arch: "));
        let arches = match named {
            Some(named) => named.split_whitespace().map(str::to_owned).collect(),
            None => DEFAULT_ARCHES.iter().map(|a| (*a).to_owned()).collect(),
        };
        KernelSource { name, text, arches, hash: hasher.finalize().to_hex().to_string() }
    };
    Ok(read_sorted(kernels, "cu")?.into_iter().map(source).collect())
}

/// Reads `manifest.txt`; an absent one is empty.
pub fn read_manifest(prebuilt: &Path) -> Vec<ManifestLine> {
    let text = fs::read_to_string(prebuilt.join(MANIFEST)).unwrap_or_default();
    text.lines()
        .filter(|l| !l.starts_with('#'))
        .filter_map(|l| {
            let mut words = l.split_whitespace().map(str::to_owned);
            Some(ManifestLine {
                file: words.next()?,
                arch: words.next()?,
                source_hash: words.next()?,
                image_hash: words.next()?,
                entries: words.next()?,
            })
        })
        .collect()
}

/// Hash of an image.
pub fn hash_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Compresses an image.
///
/// # Errors
/// Not in practice: memory takes any write.
pub fn compress(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).map_err(|e| e.to_string())
}

/// Reverses [`compress`].
///
/// # Errors
/// When the bytes are damaged.
pub fn decompress(bytes: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    flate2::read::ZlibDecoder::new(bytes).read_to_end(&mut out).map_err(|e| e.to_string())?;
    Ok(out)
}

/// The library of a fetched NVRTC below `target`.
pub fn fetched_nvrtc(target: &Path) -> Option<PathBuf> {
    let library = target.join("nvrtc/nvidia/cuda_nvrtc/lib/libnvrtc.so.12");
    library.exists().then_some(library)
}

/// NVRTC, opened from a path.
pub struct Nvrtc {
    library: Library,
    _builtins: Vec<Library>,
}

type Program = *mut c_void;

/// Calls a function of the library that returns an `nvrtcResult`; 0 is success.
macro_rules! nvrtc_call {
    ($nvrtc:expr, $name:expr, ($($ty:ty),*), ($($arg:expr),*)) => {{
        // SAFETY: the signature is that of nvrtc.h.
        let function = unsafe { $nvrtc.library.get::<unsafe extern "C" fn($($ty),*) -> c_int>($name.as_bytes()) }
            .map_err(|e| format!("{}: {e}", $name))?;
        // SAFETY: pointers are valid for the call.
        unsafe { function($($arg),*) }
    }};
}

impl Nvrtc {
    /// Opens the library at a path.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(path: &Path) -> Result<Self, String> {
        // NVRTC looks for its builtins by name; opening them first by path lets it find them.
        let mut builtins = Vec::new();
        for entry in fs::read_dir(path.parent().unwrap_or(Path::new("."))).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so") {
                // SAFETY: NVIDIA's library; its initialisers have no requirements.
                builtins.extend(unsafe { Library::new(entry.path()) });
            }
        }
        // SAFETY: as above.
        let library = unsafe { Library::new(path) }.map_err(|e| format!("cannot open {}: {e}", path.display()))?;
        Ok(Nvrtc { library, _builtins: builtins })
    }

    /// Version as `major.minor`.
    ///
    /// # Errors
    /// When the library is not NVRTC.
    pub fn version(&self) -> Result<String, String> {
        let (mut major, mut minor) = (0, 0);
        let code = nvrtc_call!(self, "nvrtcVersion", (*mut c_int, *mut c_int), (&raw mut major, &raw mut minor));
        if code == 0 { Ok(format!("{major}.{minor}")) } else { Err(format!("nvrtcVersion: {code}")) }
    }

    /// Compiles a source for an architecture (`sm_80` gives a cubin, `compute_80` PTX).
    ///
    /// # Errors
    /// The compiler's log.
    pub fn compile(
        &self,
        source: &KernelSource,
        headers: &[(String, String)],
        arch: &str,
    ) -> Result<CompiledImage, String> {
        let c = |s: &str| CString::new(s).map_err(|e| e.to_string());
        let (text, name) = (c(&source.text)?, c(&format!("{}.cu", source.name))?);
        let header_texts = headers.iter().map(|(_, text)| c(text)).collect::<Result<Vec<_>, _>>()?;
        let header_names = headers.iter().map(|(name, _)| c(name)).collect::<Result<Vec<_>, _>>()?;
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
        let mut options = vec![c(&format!("--gpu-architecture={arch}"))?];
        options.extend(OPTIONS.iter().map(|o| c(o)).collect::<Result<Vec<_>, _>>()?);
        let (texts, names, options) = (pointers(&header_texts), pointers(&header_names), (pointers(&options), options));
        let mut program: Program = std::ptr::null_mut();
        let code = nvrtc_call!(
            self,
            "nvrtcCreateProgram",
            (*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char),
            (&raw mut program, text.as_ptr(), name.as_ptr(), texts.len() as c_int, texts.as_ptr(), names.as_ptr())
        );
        if code != 0 {
            return Err(format!("nvrtcCreateProgram: {code}"));
        }
        let code = nvrtc_call!(
            self,
            "nvrtcCompileProgram",
            (Program, c_int, *const *const c_char),
            (program, options.0.len() as c_int, options.0.as_ptr())
        );
        let log = self.bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
        let log = CStr::from_bytes_until_nul(&log).map(|l| l.to_string_lossy().into_owned()).unwrap_or_default();
        if code != 0 {
            return Err(format!("{}.cu for {arch}: {log}", source.name));
        }
        let bytes = if arch.starts_with("sm_") {
            self.bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")?
        } else {
            self.bytes(program, "nvrtcGetPTXSize", "nvrtcGetPTX")?
        };
        nvrtc_call!(self, "nvrtcDestroyProgram", (*mut Program), (&raw mut program));
        Ok(CompiledImage { bytes, entries: entries_of(&log) })
    }

    fn bytes(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>, String> {
        let mut len = 0usize;
        let code = nvrtc_call!(self, size, (Program, *mut usize), (program, &raw mut len));
        let mut bytes = vec![0u8; len];
        let code = code | nvrtc_call!(self, get, (Program, *mut u8), (program, bytes.as_mut_ptr()));
        if code == 0 { Ok(bytes) } else { Err(format!("{get}: {code}")) }
    }
}

/// Reads ptxas's report.
fn entries_of(log: &str) -> Vec<EntryUse> {
    let number_before = |line: &str, word: &str| -> u32 {
        let before = line.split(word).next().unwrap_or("").trim_end();
        let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or("");
        if line.contains(word) { digits.parse().unwrap_or(0) } else { 0 }
    };
    let mut entries: Vec<EntryUse> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let name = rest.split('\'').next().unwrap_or("").to_owned();
            entries.push(EntryUse { name, registers: 0, smem: 0, spill: 0 });
        }
        let Some(entry) = entries.last_mut() else { continue };
        if line.contains("spill stores") {
            entry.spill = number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
        }
        if line.contains("Used ") {
            entry.registers = number_before(line, " registers");
            entry.smem = number_before(line, " bytes smem");
        }
    }
    entries
}

/// The manifest's field of entry points.
pub fn entries_field(entries: &[EntryUse]) -> String {
    if entries.is_empty() {
        return "-".to_owned();
    }
    let one = |e: &EntryUse| format!("{}:{}:{}:{}", e.name, e.registers, e.smem, e.spill);
    entries.iter().map(one).collect::<Vec<_>>().join(",")
}
