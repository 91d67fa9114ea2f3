//! The kernels' images in this binary, and which one a device takes. `kernels/build.rs` makes the table.

use std::io::Read;

use crate::error::{Error, Result};

/// One compiled kernel file.
pub struct Image {
    /// Kernel file without extension.
    pub file: &'static str,
    /// Architecture: `sm_80`, `sm_90a`, or `compute_80` for PTX.
    pub arch: &'static str,
    /// Cubin, or PTX with a zero at its end, compressed with zlib.
    pub packed: &'static [u8],
}

/// All images; empty in a build without GPU kernels.
pub static IMAGES: &[Image] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Compute capability of a device: (9, 0) for Hopper.
pub type Capability = (u32, u32);

const ORIN: Capability = (8, 7);

/// How well an architecture suits a device: none when it does not run there, otherwise greater is better.
///
/// `sm_XYa` runs on X.Y alone; `sm_XY` on later chips of the same X, but not on Orin (8.7), which shares no code with the
/// others; PTX on everything later, compiled by the driver.
pub fn suits(arch: &str, capability: Capability) -> Option<u32> {
    let number = capability.0 * 10 + capability.1;
    if let Some(specific) = arch.strip_prefix("sm_").and_then(|a| a.strip_suffix('a')) {
        return (specific.parse() == Ok(number)).then_some(2000);
    }
    if let Some(text) = arch.strip_prefix("sm_") {
        let own: u32 = text.parse().ok()?;
        return (own / 10 == capability.0 && own <= number && capability != ORIN).then_some(1000 + own);
    }
    let own: u32 = arch.strip_prefix("compute_")?.parse().ok()?;
    (own <= number).then_some(own)
}

/// The best image of a file for a device, unpacked.
///
/// # Errors
/// When the build has no GPU kernels, or none for this device.
pub fn find(file: &str, capability: Capability) -> Result<Vec<u8>> {
    if IMAGES.is_empty() {
        return Err(Error::environment("this build has no GPU kernels")
            .with_hint("run kernels/nvrtc.sh --write and build again, or use --device cpu"));
    }
    let best = IMAGES
        .iter()
        .filter(|i| i.file == file)
        .filter_map(|i| Some((suits(i.arch, capability)?, i)))
        .max_by_key(|(score, _)| *score);
    let Some((_, image)) = best else {
        let (major, minor) = capability;
        return Err(Error::environment(format!("no `{file}` kernels for compute capability {major}.{minor}"))
            .with_hint("GPUs from Ampere (8.0) on are supported; use --device cpu"));
    };
    let mut bytes = Vec::new();
    flate2::read::ZlibDecoder::new(image.packed)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::failure(format!("the image of `{file}` for {} is damaged: {e}", image.arch)))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_takes_the_closest_image() {
        let best = |capability| {
            let arches = ["sm_80", "sm_89", "sm_90a", "compute_80"];
            arches.into_iter().filter_map(|a| Some((suits(a, capability)?, a))).max().map(|(_, a)| a)
        };
        assert_eq!(best((7, 5)), None);
        assert_eq!(best((8, 0)), Some("sm_80"));
        assert_eq!(best((8, 6)), Some("sm_80"));
        assert_eq!(best((8, 7)), Some("compute_80"));
        assert_eq!(best((8, 9)), Some("sm_89"));
        assert_eq!(best((9, 0)), Some("sm_90a"));
        assert_eq!(best((10, 0)), Some("compute_80"), "a chip newer than this build compiles the text");
    }

    #[test]
    fn every_image_unpacks() {
        for image in IMAGES {
            let capability = if image.arch == "sm_90a" { (9, 0) } else { (8, 0) };
            let bytes = find(image.file, capability).expect("an image of the table is found");
            assert!(bytes.starts_with(b"\x7fELF") || bytes.ends_with(&[0]), "{} {}", image.file, image.arch);
        }
    }
}
