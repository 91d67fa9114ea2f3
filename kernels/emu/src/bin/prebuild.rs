//! Compiles all kernels with NVRTC: `--write` brings `kernels/prebuilt/` up to date, `--check` compares it bit for bit.
//! `--probes FOLDER` compiles the emulator's probes for Hopper instead, for the tests on a GPU.
//! `kernels/nvrtc.sh` fetches the compiler and calls this.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use azr_kernel_emu::compile::{
    MANIFEST, ManifestLine, NVRTC_VERSION, Nvrtc, compress, decompress, entries_field, fetched_nvrtc, hash_of, headers,
    read_manifest, sources,
};

fn main() -> ExitCode {
    let mode = std::env::args().nth(1).unwrap_or_default();
    let done = match mode.as_str() {
        "--write" => run(true),
        "--check" => run(false),
        "--probes" => probes(Path::new(&std::env::args().nth(2).unwrap_or_default())),
        _ => Err("usage: prebuild --write | --check | --probes FOLDER".to_owned()),
    };
    match done {
        Ok(message) => {
            println!("{message}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Images of all sources: manifest line and bytes.
fn compile_all(kernels: &Path, nvrtc: &Nvrtc) -> Result<Vec<(ManifestLine, Vec<u8>)>, String> {
    let headers = headers(kernels)?;
    let mut all = Vec::new();
    for source in sources(kernels)? {
        for arch in &source.arches {
            let image = nvrtc.compile(&source, &headers, arch)?;
            if let Some(entry) = image.entries.iter().find(|e| e.spill > 0) {
                return Err(format!("{} spills {} bytes on {arch}", entry.name, entry.spill));
            }
            let line = ManifestLine {
                file: source.name.clone(),
                arch: arch.clone(),
                source_hash: source.hash.clone(),
                image_hash: hash_of(&image.bytes),
                entries: entries_field(&image.entries),
            };
            all.push((line, image.bytes));
        }
    }
    Ok(all)
}

/// The folder of the kernels.
fn kernels() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in kernels/")
}

/// NVRTC of the version that the images are made with.
fn nvrtc() -> Result<Nvrtc, String> {
    let target = kernels().parent().ok_or("kernels/ lies in the repository")?.join("target");
    let library = std::env::var_os("NVRTC_LIB").map(PathBuf::from).or_else(|| fetched_nvrtc(&target));
    let nvrtc = Nvrtc::open(&library.ok_or("no NVRTC: run kernels/nvrtc.sh")?)?;
    let version = nvrtc.version()?;
    if version != NVRTC_VERSION {
        return Err(format!("the images are made with NVRTC {NVRTC_VERSION}, this is {version}"));
    }
    Ok(nvrtc)
}

/// Probes that tests launch, as cubins; those that make mistakes are for the emulator alone.
fn probes(to: &Path) -> Result<String, String> {
    let (nvrtc, headers) = (nvrtc()?, headers(kernels())?);
    for source in sources(&kernels().join("emu/probes"))?.iter().filter(|s| s.name != "faults") {
        let image = nvrtc.compile(source, &headers, "sm_90a")?;
        fs::write(to.join(format!("{}.cubin", source.name)), image.bytes).map_err(|e| e.to_string())?;
    }
    Ok("the probes are compiled".to_owned())
}

fn run(write: bool) -> Result<String, String> {
    let images = compile_all(kernels(), &nvrtc()?)?;
    let prebuilt = kernels().join("prebuilt");
    if write { write_images(&prebuilt, &images) } else { check_images(&prebuilt, &images) }
}

fn write_images(prebuilt: &Path, images: &[(ManifestLine, Vec<u8>)]) -> Result<String, String> {
    let io = |e: std::io::Error| e.to_string();
    fs::create_dir_all(prebuilt).map_err(io)?;
    let before = read_manifest(prebuilt);
    for line in before.iter().filter(|old| !images.iter().any(|(new, _)| new.file_name() == old.file_name())) {
        fs::remove_file(prebuilt.join(line.file_name())).map_err(io)?;
    }
    let mut manifest = String::from(
        "# Made by kernels/nvrtc.sh. File, architecture, hash of the sources, hash of the image, entry points as\n# name:registers:static shared bytes:spilled bytes.\n",
    );
    let mut written = 0;
    for (line, bytes) in images {
        let path = prebuilt.join(line.file_name());
        if !before.iter().any(|old| old.image_hash == line.image_hash && old.file_name() == line.file_name())
            || !path.exists()
        {
            fs::write(&path, compress(bytes)?).map_err(io)?;
            written += 1;
        }
        manifest += &format!("{} {} {} {} {}\n", line.file, line.arch, line.source_hash, line.image_hash, line.entries);
    }
    fs::write(prebuilt.join(MANIFEST), manifest).map_err(io)?;
    Ok(format!("{} images, {written} of them new", images.len()))
}

fn check_images(prebuilt: &Path, images: &[(ManifestLine, Vec<u8>)]) -> Result<String, String> {
    let lines: Vec<ManifestLine> = images.iter().map(|(line, _)| line.clone()).collect();
    if read_manifest(prebuilt) != lines {
        return Err("kernels/prebuilt/ is out of date: run kernels/nvrtc.sh --write".to_owned());
    }
    for (line, bytes) in images {
        let stored = fs::read(prebuilt.join(line.file_name())).map_err(|e| format!("{}: {e}", line.file_name()))?;
        if decompress(&stored)? != *bytes {
            return Err(format!("{} is not what NVRTC makes of the sources", line.file_name()));
        }
    }
    Ok(format!("{} images are what NVRTC {NVRTC_VERSION} makes of the sources", images.len()))
}
