//! Compiles the emulator and all kernels with the host's C++ compiler into a `libcuda.so.1`.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Files with extension `extension` in a folder, sorted.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("cannot read {}: {e}", folder.display()));
    let mut found: Vec<PathBuf> = entries
        .map(|e| e.expect("a readable entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == extension))
        .collect();
    found.sort();
    found
}

/// Compiler settings that the emulator and the kernels share. Contraction of a * b + c is off, as on the device.
fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").pic(true).warnings(false).opt_level(2).include("..");
    for flag in ["-g1", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"] {
        build.flag_if_supported(flag);
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        build.flag("-march=x86-64-v3");
    }
    build
}

fn main() {
    let here = Path::new(".");
    let kernels = Path::new("..");
    let mut objects = Vec::new();
    for source in files(here, "cpp") {
        let mut build = compiler();
        // The tensor cores' loops are worth vectorising.
        if source.ends_with("arithmetic.cpp") {
            build.opt_level(3);
        }
        objects.extend(build.file(&source).compile_intermediates());
    }
    let mut build = compiler();
    // The thread sanitizer's hooks, which race.cpp defines; its library is not linked.
    build.flag("-fsanitize=thread").flag("-Wno-unknown-pragmas").flag("-xc++");
    for source in files(kernels, "cu").into_iter().chain(files(&here.join("probes"), "cu")) {
        build.file(source);
    }
    objects.extend(build.compile_intermediates());

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let folder = out.join("driver");
    fs::create_dir_all(&folder).expect("a folder for the library");
    let library = folder.join("libcuda.so.1");
    // cudarc asks for libcuda.so first; with this name a library that is already open answers.
    let status = compiler()
        .get_compiler()
        .to_command()
        .args(["-shared", "-Wl,-soname,libcuda.so", "-Wl,-Bsymbolic", "-o"])
        .arg(&library)
        .args(&objects)
        .args(["-lpthread", "-ldl"])
        .status()
        .expect("the C++ compiler starts");
    assert!(status.success(), "linking {} failed", library.display());

    println!("cargo:rustc-env=AZR_EMU_LIBRARY={}", library.display());
    for folder in [here, kernels, &here.join("probes")] {
        for extension in ["cpp", "h", "cu"] {
            for file in files(folder, extension) {
                println!("cargo:rerun-if-changed={}", file.display());
            }
        }
        println!("cargo:rerun-if-changed={}", folder.display());
    }
}
