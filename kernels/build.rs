//! Puts the kernels' images into the binary. First that works, for all files: `NVRTC_LIB` (a libnvrtc, named on
//! purpose); the committed images of `kernels/prebuilt/` where their source hashes match; NVRTC as `kernels/nvrtc.sh`
//! fetched it into `target/`; otherwise the build has no GPU kernels, and says so.

use std::path::{Path, PathBuf};
use std::{env, fs};

#[expect(dead_code, reason = "the prebuild tool uses the rest")]
mod compile;

use compile::{KernelSource, ManifestLine, Nvrtc, compress, fetched_nvrtc, headers, read_manifest, sources};

fn main() {
    let kernels = Path::new("kernels");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        // Segments begin at huge pages, which executor processes move their code to: see `exec::sandbox::to_huge_pages`.
        println!("cargo:rustc-link-arg-bins=-Wl,-z,separate-loadable-segments,-z,max-page-size=0x200000");
    }
    println!("cargo:rerun-if-env-changed=NVRTC_LIB");
    println!("cargo:rerun-if-changed=kernels/compile.rs");
    println!("cargo:rerun-if-changed=kernels/prebuilt");
    for entry in fs::read_dir(kernels).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "cu" || e == "h") {
            println!("cargo:rerun-if-changed={}", entry.path().display());
        }
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let images = match find_images(kernels, &out) {
        Ok(images) => images,
        Err(reason) => {
            println!("cargo:warning=building without GPU kernels: {reason}");
            Vec::new()
        }
    };
    let mut code = String::from("&[\n");
    for (file, arch, path) in &images {
        let path = path.display().to_string();
        code += &format!("    Image {{ file: {file:?}, arch: {arch:?}, packed: include_bytes!({path:?}) }},\n");
    }
    code += "]\n";
    fs::write(out.join("images.rs"), code).expect("OUT_DIR takes a file");
}

/// All images as (file, architecture, path of the compressed image).
fn find_images(kernels: &Path, out: &Path) -> Result<Vec<(String, String, PathBuf)>, String> {
    let sources = sources(kernels)?;
    if let Some(library) = env::var_os("NVRTC_LIB") {
        return compile(kernels, &sources, Path::new(&library), out);
    }
    let prebuilt = fs::canonicalize(kernels.join("prebuilt")).unwrap_or_default();
    let manifest = read_manifest(&prebuilt);
    let stale = sources.iter().find(|s| s.arches.iter().any(|arch| find(&manifest, s, arch).is_none()));
    let Some(stale) = stale else {
        let lines = sources.iter().flat_map(|s| s.arches.iter().filter_map(|arch| find(&manifest, s, arch)));
        return Ok(lines.map(|l| (l.file.clone(), l.arch.clone(), prebuilt.join(l.file_name()))).collect());
    };
    match fetched_nvrtc(Path::new("target")) {
        Some(library) => compile(kernels, &sources, &library, out),
        None => Err(format!(
            "kernels/{}.cu has changed since kernels/prebuilt was made; run kernels/nvrtc.sh --write",
            stale.name
        )),
    }
}

fn find<'a>(manifest: &'a [ManifestLine], source: &KernelSource, arch: &str) -> Option<&'a ManifestLine> {
    manifest.iter().find(|l| l.file == source.name && l.arch == arch && l.source_hash == source.hash)
}

fn compile(
    kernels: &Path,
    sources: &[KernelSource],
    library: &Path,
    out: &Path,
) -> Result<Vec<(String, String, PathBuf)>, String> {
    let nvrtc = Nvrtc::open(library)?;
    let headers = headers(kernels)?;
    let mut images = Vec::new();
    for source in sources {
        for arch in &source.arches {
            let image = nvrtc.compile(source, &headers, arch)?;
            let path = out.join(format!("{}.{arch}.z", source.name));
            fs::write(&path, compress(&image.bytes)?).map_err(|e| format!("{}: {e}", path.display()))?;
            images.push((source.name.clone(), arch.clone(), path));
        }
    }
    Ok(images)
}
