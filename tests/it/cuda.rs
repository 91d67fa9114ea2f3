//! `--device cuda` on the emulated driver: the executable as it is, with an emulated libcuda in its way. Kernels run as
//! compiled from the sources; which of the embedded images the device would take is the executable's choice.

use std::process::{Command, Output};

use crate::command::{azr, expect_code, stderr};

/// The executable on an emulated GPU.
fn on_emulator(args: &[&str], options: &[(&str, &str)]) -> Command {
    let mut command = azr(args);
    command.env("LD_LIBRARY_PATH", azr_kernel_emu::folder());
    command.envs(options.iter().map(|(name, value)| (format!("AZR_EMU_{name}"), value)));
    command
}

fn run(args: &[&str], options: &[(&str, &str)]) -> Output {
    on_emulator(args, options).output().expect("the executable starts")
}

#[test]
fn the_self_test_passes_on_emulated_ampere_and_hopper() {
    for capability in ["80", "90"] {
        let output = run(&["selftest", "--device", "cuda", "--quick"], &[("CC", capability), ("ARITHMETIC", "1")]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "capability {capability}:\n{said}{}", stderr(&output));
        assert!(said.contains("azr emulator") && said.lines().filter(|l| l.starts_with("ok ")).count() == 11, "{said}");
    }
}

#[test]
fn what_is_wrong_with_a_gpu_is_said_in_one_line() {
    for (options, code, words) in [
        (&[("NO_DEVICE", "1")][..], 4, "sees no CUDA device"),
        (&[("DRIVER", "11080")], 4, "12.0 or newer is needed"),
        (&[("CC", "75")], 4, "compute capability 7.5"),
        (&[("MEMORY", "1000000")], 5, "allocating"),
    ] {
        let output = run(&["selftest", "--device", "cuda", "--quick"], options);
        expect_code(&output, code);
        let said = stderr(&output);
        assert!(said.contains(words) && said.contains("hint:") && said.lines().count() == 2, "{options:?}: {said}");
    }
}
