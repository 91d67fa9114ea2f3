//! The committed images: made from these sources, without spills, one entry point for each that the sources declare.

use std::path::Path;

use azr_kernel_emu::compile::{DEFAULT_ARCHES, read_manifest, sources};

/// Entry points of a kernel source.
fn entry_points(text: &str) -> Vec<&str> {
    let starts = text.lines().filter(|l| l.starts_with("KERNEL"));
    starts.filter_map(|l| l.split_once(", ")?.1.split(')').next()).collect()
}

#[test]
fn prebuilt_images_belong_to_the_sources() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let manifest = read_manifest(&kernels.join("prebuilt"));
    for source in sources(&kernels).expect("the kernels' sources") {
        for arch in &source.arches {
            let line = manifest.iter().find(|l| l.file == source.name && l.arch == *arch);
            let line =
                line.unwrap_or_else(|| panic!("no image of {} for {arch}: kernels/nvrtc.sh --write", source.name));
            assert_eq!(line.source_hash, source.hash, "{}: run kernels/nvrtc.sh --write", line.file_name());
            if arch.starts_with("compute_") {
                continue;
            }
            let mut listed: Vec<&str> = line.entries.split(',').filter_map(|e| e.split(':').next()).collect();
            let mut declared = entry_points(&source.text);
            listed.sort_unstable();
            declared.sort_unstable();
            assert_eq!(listed, declared, "entry points of {}", line.file_name());
            assert!(line.entries.split(',').all(|e| e.ends_with(":0")), "{} spills", line.file_name());
        }
    }
    assert!(!DEFAULT_ARCHES.is_empty());
}
