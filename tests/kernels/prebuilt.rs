//! The committed images: made from these sources, without spills, one entry point for each that the sources declare, with
//! Hopper's instructions where they belong. And nvcc, which profilers and sanitizers want, takes the sources too.

use std::path::{Path, PathBuf};
use std::process::Command;

use azr_kernel_emu::compile::{DEFAULT_ARCHES, OPTIONS, decompress, read_manifest, sources};

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

/// One of NVIDIA's tools: on the path, in the toolkit's usual place, or as `kernels/nvrtc.sh` (or pip) put it into target/.
fn tool(name: &str) -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let own = ["nvdisasm", "nvcc"].map(|folder| target.join(folder).join("nvidia/cu13/bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([PathBuf::from("/usr/local/cuda/bin")]).chain(own);
    folders.map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// A folder for one test's files.
fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("azr-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a scratch folder");
    folder
}

#[test]
fn hopper_images_multiply_and_load_as_hopper_does() {
    let Some(nvdisasm) = tool("nvdisasm") else {
        println!("SKIPPED: no nvdisasm to read the images with (kernels/nvrtc.sh fetches it)");
        return;
    };
    let (prebuilt, folder) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/prebuilt"), scratch("sass"));
    for name in ["gemm_hopper", "attention_hopper"] {
        let packed = std::fs::read(prebuilt.join(format!("{name}.sm_90a.z"))).expect("the image");
        let cubin = folder.join(format!("{name}.cubin"));
        std::fs::write(&cubin, decompress(&packed).expect("an image unpacks")).expect("a scratch file");
        let run = Command::new(&nvdisasm).arg("-c").arg(&cubin).output().expect("nvdisasm starts");
        assert!(run.status.success(), "{name}: {}", String::from_utf8_lossy(&run.stderr));
        let text = String::from_utf8_lossy(&run.stdout);
        for function in text.split(".section\t.text.").skip(1) {
            let entry = function.split(',').next().unwrap_or_default();
            let count = |word: &str| function.matches(word).count();
            let (products, waits) = (count(" HGMMA."), count(" WARPGROUP.DEPBAR"));
            println!("{entry}: {products} HGMMA, {waits} waits, {} UTMALDG", count("UTMALDG."));
            assert!(products > 0 && count("UTMALDG.") > 0, "{entry} has neither wgmma nor TMA");
            assert_eq!(count(" LDL") + count(" STL"), 0, "{entry} keeps values in local memory");
            assert!(2 * waits < products, "{entry}: the compiler waits for products one by one");
            let (fences, barriers) = (count(" MEMBAR.ALL.GPU"), count(" UCGABAR_ARV"));
            assert!(fences <= barriers, "{entry}: {fences} fences of the device, {barriers} barriers of the cluster");
        }
        assert!(text.contains(".section\t.text."), "{name} has code");
    }
    std::fs::remove_dir_all(folder).expect("the scratch folder goes");
}

#[test]
fn nvcc_takes_the_sources() {
    let Some(nvcc) = tool("nvcc") else {
        println!("SKIPPED: no nvcc on the path, in /usr/local/cuda/bin or in target/nvcc");
        return;
    };
    let (kernels, folder) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels"), scratch("nvcc"));
    let options = OPTIONS.iter().filter(|o| !o.starts_with("--ptxas"));
    for source in sources(&kernels).expect("the kernels' sources") {
        let run = Command::new(&nvcc)
            .args(["-cubin", "-arch=sm_90a", "-o"])
            .arg(folder.join("image.cubin"))
            .args(options.clone())
            .arg(kernels.join(format!("{}.cu", source.name)))
            .output()
            .expect("nvcc starts");
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success() && !said.contains("warning"), "{}: {said}", source.name);
    }
    std::fs::remove_dir_all(folder).expect("the scratch folder goes");
}
