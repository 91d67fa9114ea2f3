//! TensorBoard event files: every number of a step as a scalar, under its path in the metrics record.
//!
//! An event is a protobuf message (`tensorflow.Event`) in a TFRecord frame: length, masked CRC-32C of the length, bytes,
//! masked CRC-32C of the bytes, all little-endian. The three message types used here are written by hand.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::error::{Error, Result};

/// What TensorBoard expects in a file's first event.
const VERSION: &str = "brain.Event:2";
/// CRC-32C polynomial, reversed.
const CASTAGNOLI: u32 = 0x82f6_3b78;
/// Most tags that begin alike. Rejections name what programs define, such as classes of exceptions: a viewer must not be
/// filled with them.
const MAX_TAGS: usize = 1000;

/// A file of events. Each start of a run has its own; TensorBoard joins those of one directory.
pub struct EventFile {
    path: PathBuf,
    file: File,
    /// Tags so far, by what stands before their first stroke.
    tags: HashMap<String, HashSet<String>>,
}

impl EventFile {
    /// Creates the file in a run's directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(dir: &Path) -> Result<Self> {
        let path = (0u32..)
            .map(|n| dir.join(format!("events.out.tfevents.{:010}.{n}.azr", seconds() as u64)))
            .find(|p| !p.exists())
            .expect("numbers do not end");
        let file = File::create(&path).map_err(|e| Error::io("create", &path, &e))?;
        let mut events = EventFile { path, file, tags: HashMap::new() };
        let mut event = header(0);
        bytes_field(&mut event, 3, VERSION.as_bytes());
        events.write(&event)?;
        Ok(events)
    }

    /// Writes the numbers of a record as scalars of a step; without those whose tags would be too many.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn scalars(&mut self, step: u64, record: &Value) -> Result<()> {
        let mut summary = Vec::new();
        flatten("", record, &mut |tag, value| {
            let group = tag.split('/').next().unwrap_or_default();
            let known = self.tags.entry(group.to_owned()).or_default();
            if known.len() == MAX_TAGS && !known.contains(tag) {
                return;
            }
            known.insert(tag.to_owned());
            let mut scalar = Vec::new();
            bytes_field(&mut scalar, 1, tag.as_bytes());
            scalar.push(2 << 3 | 5);
            scalar.extend((value as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &scalar);
        });
        let mut event = header(step);
        bytes_field(&mut event, 5, &summary);
        self.write(&event)
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&frame(event)).map_err(|e| Error::io("write", &self.path, &e))
    }
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Wall time and step of an event.
fn header(step: u64) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(seconds().to_le_bytes());
    event.push(2 << 3);
    varint(&mut event, step);
    event
}

fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn bytes_field(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn frame(bytes: &[u8]) -> Vec<u8> {
    let len = (bytes.len() as u64).to_le_bytes();
    [&len[..], &masked(&len).to_le_bytes(), bytes, &masked(bytes).to_le_bytes()].concat()
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ CASTAGNOLI } else { crc >> 1 })
    })
}

/// Calls `take` with every number of a JSON value and its path.
fn flatten(path: &str, value: &Value, take: &mut impl FnMut(&str, f64)) {
    match value {
        Value::Number(n) => take(path, n.as_f64().unwrap_or(f64::NAN)),
        Value::Object(fields) => {
            for (key, value) in fields {
                flatten(&if path.is_empty() { key.clone() } else { format!("{path}/{key}") }, value, take);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn checksums_are_the_published_ones() {
        // RFC 3720, appendix B.4, and the usual check value.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_file_is_frames_of_events() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut file = EventFile::create(dir.path()).expect("created");
        file.scalars(300, &json!({"reward": 0.5, "configs": {"a": {"n": 2}}, "name": "x"})).expect("written");
        let bytes = std::fs::read(&file.path).expect("there");
        let (mut at, mut events) = (0, Vec::new());
        while at < bytes.len() {
            let len = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize;
            let body = &bytes[at + 12..at + 12 + len];
            assert_eq!(frame(body), bytes[at..at + 16 + len], "length and checksums");
            events.push(body.to_vec());
            at += 16 + len;
        }
        assert_eq!(events.len(), 2);
        let has = |event: &[u8], part: &[u8]| event.windows(part.len()).any(|w| w == part);
        assert!(has(&events[0], VERSION.as_bytes()));
        // Step 300 as varint, then tag and value of each scalar.
        assert!(has(&events[1], &[2 << 3, 0xac, 0x02]));
        let scalar = |tag: &str, value: f32| {
            [&[1 << 3 | 2, tag.len() as u8], tag.as_bytes(), &[2 << 3 | 5], &value.to_le_bytes()].concat()
        };
        assert!(has(&events[1], &scalar("reward", 0.5)) && has(&events[1], &scalar("configs/a/n", 2.0)));
        assert!(!has(&events[1], b"name"));
    }

    #[test]
    fn what_programs_name_does_not_fill_a_viewer() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut file = EventFile::create(dir.path()).expect("created");
        let written = |file: &mut EventFile, step: u64| {
            let before = file.file.metadata().expect("there").len() as usize;
            let reasons: serde_json::Map<_, _> =
                (0..600).map(|i| (format!("class E{step}x{i:03}"), json!(1))).collect();
            let record = json!({"reward": 1.0, "rejections": reasons});
            file.scalars(step, &record).expect("written");
            let bytes = std::fs::read(&file.path).expect("there");
            let count = |tag: &[u8]| bytes[before..].windows(tag.len()).filter(|w| *w == tag).count();
            (count(b"rejections/class E"), count(b"reward"))
        };
        assert_eq!(written(&mut file, 1), (600, 1));
        assert_eq!(written(&mut file, 2), (MAX_TAGS - 600, 1));
        assert_eq!(written(&mut file, 3), (0, 1));
        assert_eq!(written(&mut file, 1), (600, 1), "known ones go on");
    }
}
