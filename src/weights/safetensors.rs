//! Weights on disk: a safetensors file, a sharded set with its index, or a folder that holds either.
//!
//! The header is checked through a memory map before anything else is believed, and the map asks the kernel to read
//! ahead. Tensor bytes are then copied out with positioned reads of the same open file: when somebody truncates it
//! meanwhile, that is a short read and an error, where a load from the map would be a SIGBUS.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use half::{bf16, f16};
use memmap2::{Advice, Mmap};
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use crate::error::{Error, Result};

/// What to do about a damaged file.
const COPY_AGAIN: &str = "download or copy it again";
/// Values converted at a time.
const CHUNK: usize = 1 << 20;

/// Where values go, piece after piece.
pub type Sink<'a> = &'a mut dyn FnMut(&[f32]) -> Result<()>;

/// Where a tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    offset: u64,
    dtype: Dtype,
    shape: Vec<usize>,
}

#[derive(Debug)]
struct Source {
    path: PathBuf,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Disk { file: File, len: u64, modified: Option<SystemTime>, _map: Mmap },
    Memory(&'static [u8]),
}

impl Source {
    /// Fills `bytes` from an offset; false when the file no longer has them.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> bool {
        match &self.data {
            Data::Disk { file, .. } => file.read_exact_at(bytes, offset).is_ok(),
            Data::Memory(all) => {
                bytes.copy_from_slice(&all[offset as usize..][..bytes.len()]);
                true
            }
        }
    }

    /// Whether the file is still the one that was opened.
    fn is_unchanged(&self) -> bool {
        match &self.data {
            Data::Disk { file, len, modified, .. } => {
                file.metadata().is_ok_and(|m| m.len() == *len && m.modified().ok() == *modified)
            }
            Data::Memory(_) => true,
        }
    }
}

/// Tensors of a checkpoint by name.
#[derive(Debug)]
pub struct TensorFiles {
    sources: Vec<Source>,
    entries: BTreeMap<String, Entry>,
}

impl TensorFiles {
    /// Opens a .safetensors file, a model.safetensors.index.json, or a folder with either.
    ///
    /// # Errors
    /// When there is nothing to open, or a header is not what its file holds.
    pub fn open(path: &Path) -> Result<Self> {
        let mut files = TensorFiles { sources: Vec::new(), entries: BTreeMap::new() };
        if path.is_dir() {
            let single = path.join("model.safetensors");
            let index = path.join("model.safetensors.index.json");
            if index.is_file() && !single.is_file() {
                files.add_index(&index)?;
            } else if single.is_file() {
                files.add_file(&single)?;
            } else {
                return Err(Error::config(format!("{} holds no model.safetensors", path.display()))
                    .with_hint("give a folder as transformers saves it, or a .safetensors file"));
            }
        } else if path.to_string_lossy().ends_with(".index.json") {
            files.add_index(path)?;
        } else {
            files.add_file(path)?;
        }
        Ok(files)
    }

    /// Tensors of a safetensors file that is part of the executable.
    ///
    /// # Errors
    /// When the bytes are no such file.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self> {
        let (header_len, header) = SafeTensors::read_metadata(bytes)
            .map_err(|e| Error::failure(format!("the embedded weights are damaged: {e}")))?;
        let mut files = TensorFiles { sources: Vec::new(), entries: BTreeMap::new() };
        files.add(PathBuf::from("the embedded model"), Data::Memory(bytes), header_len as u64, &header)?;
        Ok(files)
    }

    fn add(&mut self, path: PathBuf, data: Data, header_len: u64, header: &Metadata) -> Result<()> {
        for (name, info) in header.tensors() {
            let entry = Entry {
                file: self.sources.len(),
                offset: 8 + header_len + info.data_offsets.0 as u64,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            if self.entries.insert(name.clone(), entry).is_some() {
                return Err(Error::config(format!(
                    "the tensor {name} is in two files, {} one of them",
                    path.display()
                ))
                .with_hint(COPY_AGAIN));
            }
        }
        self.sources.push(Source { path, data });
        Ok(())
    }

    fn add_index(&mut self, index: &Path) -> Result<()> {
        let text = std::fs::read_to_string(index).map_err(|e| Error::io("read", index, &e))?;
        let bad = |what: &str| Error::config(format!("{} {what}", index.display())).with_hint(COPY_AGAIN);
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| bad(&format!("is not JSON: {e}")))?;
        let map = json.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| bad("has no `weight_map`"))?;
        let mut names = std::collections::BTreeSet::new();
        for file in map.values() {
            let name = file.as_str().ok_or_else(|| bad("maps a tensor to something that is no file name"))?;
            if name.contains(['/', '\\']) || name.starts_with('.') {
                return Err(bad(&format!("names {name:?}, which is not a file beside it")));
            }
            names.insert(name.to_owned());
        }
        let folder = index.parent().unwrap_or(Path::new("."));
        for name in names {
            self.add_file(&folder.join(name))?;
        }
        match map.keys().find(|name| !self.entries.contains_key(*name)) {
            Some(name) => Err(bad(&format!("names the tensor {name}, which no shard holds"))),
            None => Ok(()),
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let io = |e: std::io::Error| Error::io("read", path, &e).with_hint("is the path right?");
        let file = File::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(Error::config(format!("{} is not a file", path.display()))
                .with_hint("give a folder as transformers saves it, or a .safetensors file"));
        }
        let bad = |what: String| {
            Error::config(format!("{} is not a whole safetensors file: {what}", path.display())).with_hint(COPY_AGAIN)
        };
        if meta.len() < 8 {
            return Err(bad(format!("it has {} bytes", meta.len())));
        }
        let mut len = [0; 8];
        file.read_exact_at(&mut len, 0).map_err(io)?;
        let header_len = u64::from_le_bytes(len);
        if header_len > meta.len() - 8 {
            return Err(bad(format!("its header has {header_len} bytes and the file {}", meta.len())));
        }
        // SAFETY: the map is read here only, right after the length was taken, and otherwise only advised.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        // The crate checks the header: JSON, known types, sizes that fit the shapes, offsets without gap or overlap.
        let (_, header) = SafeTensors::read_metadata(&map).map_err(|e| bad(e.to_string()))?;
        // Read-ahead is a favour; nothing depends on it.
        let _ = map.advise(Advice::WillNeed);
        let (len, modified) = (meta.len(), meta.modified().ok());
        self.add(path.to_owned(), Data::Disk { file, len, modified, _map: map }, header_len, &header)
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| e.shape.as_slice())
    }

    /// Values of a tensor as f32.
    ///
    /// # Errors
    /// When it is missing, has another shape or type, or its file changed since it was opened.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.check(name, shape)?;
        let mut values = Vec::with_capacity(shape.iter().product());
        self.stream(name, shape, &mut |piece| {
            values.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(values)
    }

    /// Whether a tensor is there, in this shape and a type that can be read.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        self.entry(name, shape).map(drop)
    }

    /// Where a tensor of this shape lies, and the bytes of a value.
    fn entry(&self, name: &str, shape: &[usize]) -> Result<(&Entry, usize)> {
        let Some(entry) = self.entries.get(name) else {
            return Err(Error::config(format!("the weights lack the tensor {name}"))
                .with_hint("config.json and weights must belong together"));
        };
        if entry.shape != shape {
            return Err(Error::config(format!("the tensor {name} has shape {:?}, not {shape:?}", entry.shape))
                .with_hint("config.json and weights must belong together"));
        }
        let width = match entry.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => {
                return Err(Error::config(format!("the tensor {name} has type {other:?}"))
                    .with_hint("azr reads F32, F16 and BF16"));
            }
        };
        Ok((entry, width))
    }

    /// Hands a tensor's values to `sink` as f32, piece after piece, so that no more than a piece is in memory.
    ///
    /// # Errors
    /// As [`TensorFiles::read`], and what the sink reports.
    pub fn stream(&self, name: &str, shape: &[usize], sink: Sink<'_>) -> Result<()> {
        let (entry, width) = self.entry(name, shape)?;
        let source = &self.sources[entry.file];
        let changed = || {
            Error::new(crate::error::Kind::Io, format!("{} changed while it was being read", source.path.display()))
                .with_hint("do not write to weights that a run has open")
        };
        let count: usize = shape.iter().product();
        let mut values = Vec::with_capacity(count.min(CHUNK));
        let mut bytes = vec![0u8; count.min(CHUNK) * width];
        for from in (0..count).step_by(CHUNK) {
            let bytes = &mut bytes[..(count - from).min(CHUNK) * width];
            values.clear();
            if !source.read_at(bytes, entry.offset + (from * width) as u64) {
                return Err(changed());
            }
            let pair = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
            match entry.dtype {
                Dtype::F32 => {
                    values.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
                }
                Dtype::F16 => values.extend(bytes.chunks_exact(2).map(|b| f16::from_bits(pair(b)).to_f32())),
                _ => values.extend(bytes.chunks_exact(2).map(|b| bf16::from_bits(pair(b)).to_f32())),
            }
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                return Err(Error::config(format!("the tensor {name} holds {} at element {}", values[at], from + at))
                    .with_hint("the checkpoint is damaged or its training diverged"));
            }
            sink(&values)?;
        }
        if source.is_unchanged() { Ok(()) } else { Err(changed()) }
    }
}

/// How values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredAs {
    /// 4 bytes.
    F32,
    /// 2 bytes, rounded to nearest even.
    Bf16,
}

struct Stored<'a> {
    shape: &'a [usize],
    dtype: Dtype,
    bytes: Vec<u8>,
}

impl safetensors::View for &Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes[..]).into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Bytes of a safetensors file with these tensors.
///
/// # Errors
/// When two tensors have one name.
pub fn to_bytes(tensors: &[(String, Vec<usize>, Vec<f32>)], stored_as: StoredAs) -> Result<Vec<u8>> {
    let stored: Vec<(&str, Stored<'_>)> = tensors
        .iter()
        .map(|(name, shape, values)| {
            let (dtype, bytes) = match stored_as {
                StoredAs::F32 => (Dtype::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()),
                StoredAs::Bf16 => {
                    (Dtype::BF16, values.iter().flat_map(|x| bf16::from_f32(*x).to_bits().to_le_bytes()).collect())
                }
            };
            (name.as_str(), Stored { shape, dtype, bytes })
        })
        .collect();
    safetensors::serialize(stored.iter().map(|(n, s)| (*n, s)), Some(pytorch()))
        .map_err(|e| Error::failure(format!("cannot write tensors: {e}")))
}

/// A tensor of a file to be written, whose values are read when their turn comes.
pub struct Later<'a> {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Gives its values.
    pub read: Box<dyn Fn() -> Result<Vec<f32>> + 'a>,
}

/// A tensor that is being written, and where an error of its values goes.
struct Turn<'a> {
    tensor: &'a Later<'a>,
    failure: &'a RefCell<Option<Error>>,
}

impl safetensors::View for Turn<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        let values = (self.tensor.read)().unwrap_or_else(|e| {
            self.failure.borrow_mut().get_or_insert(e);
            Vec::new()
        });
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }
    fn data_len(&self) -> usize {
        4 * self.tensor.shape.iter().product::<usize>()
    }
}

/// Writes a safetensors file of f32, with one tensor in memory at a time.
///
/// # Errors
/// What a tensor's values report, when two have one name, or when the disk fails.
pub fn write(path: &Path, tensors: &[Later<'_>]) -> Result<()> {
    let failure = RefCell::new(None);
    // The crate's temporary file is for its owner alone; this one is as any other.
    let file = File::create(path).and_then(|f| f.metadata()).map_err(|e| Error::io("write", path, &e))?;
    let turns = tensors.iter().map(|tensor| (tensor.name.as_str(), Turn { tensor, failure: &failure }));
    let written = safetensors::serialize_to_file(turns, Some(pytorch()), path);
    if let Some(e) = failure.into_inner() {
        return Err(e);
    }
    match written {
        Err(SafeTensorError::IoError(e)) => return Err(Error::io("write", path, &e)),
        Err(e) => return Err(Error::failure(format!("cannot write tensors: {e}"))),
        Ok(()) => {}
    }
    std::fs::set_permissions(path, file.permissions()).map_err(|e| Error::io("write", path, &e))
}

/// transformers refuses files whose metadata does not name the framework.
fn pytorch() -> HashMap<String, String> {
    HashMap::from([("format".to_owned(), "pt".to_owned())])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> Vec<(String, Vec<usize>, Vec<f32>)> {
        vec![("a".into(), vec![2, 2], vec![1.0, -2.5, 3.0, 4.0]), ("b".into(), vec![3], vec![0.1, 0.2, 0.3])]
    }

    #[test]
    fn tensors_are_written_one_by_one_as_all_at_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("x");
        let later = |broken: bool| -> Vec<Later<'_>> {
            let read =
                move |values: Vec<f32>| move || if broken { Err(Error::failure("gone")) } else { Ok(values.clone()) };
            let one = |(name, shape, values)| Later { name, shape, read: Box::new(read(values)) };
            tensors().into_iter().rev().map(one).collect()
        };
        write(&path, &later(false)).expect("written");
        assert_eq!(std::fs::read(&path).expect("there"), to_bytes(&tensors(), StoredAs::F32).expect("bytes"));
        assert_eq!(write(&path, &later(true)).map_err(|e| e.to_string()), Err("gone".to_owned()));
        assert!(write(&dir.path().join("no/x"), &later(false)).is_err());
    }

    #[test]
    fn tensors_come_back_whole_or_rounded() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("model.safetensors");
        for stored_as in [StoredAs::F32, StoredAs::Bf16] {
            std::fs::write(&path, to_bytes(&tensors(), stored_as).expect("bytes")).expect("written");
            let files = TensorFiles::open(dir.path()).expect("opens");
            assert_eq!(files.read("a", &[2, 2]).expect("exact in both"), tensors()[0].2);
            let b = files.read("b", &[3]).expect("reads");
            let exact = b == tensors()[1].2;
            assert_eq!(exact, stored_as == StoredAs::F32, "{b:?}");
            assert!(files.read("b", &[4]).is_err() && files.read("c", &[3]).is_err());
        }
    }

    #[test]
    fn every_truncation_and_a_change_after_opening_is_an_error() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("w.safetensors");
        let bytes = to_bytes(&tensors(), StoredAs::F32).expect("bytes");
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).expect("written");
            let error = TensorFiles::open(&path).expect_err("cut off");
            assert_eq!(error.exit_code(), 3, "{error}");
        }
        std::fs::write(&path, &bytes).expect("written");
        let files = TensorFiles::open(&path).expect("whole");
        File::options().write(true).open(&path).and_then(|f| f.set_len(40)).expect("truncated");
        assert_eq!(files.read("a", &[2, 2]).expect_err("gone").exit_code(), 74);
    }

    #[test]
    fn overlapping_offsets_are_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("w.safetensors");
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 12]);
        std::fs::write(&path, bytes).expect("written");
        assert!(TensorFiles::open(&path).is_err());
    }
}
