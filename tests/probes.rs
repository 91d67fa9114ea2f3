//! The sandbox from inside: what each layer denies alone, that the whole denies every probe, and that the command works, or
//! refuses to, where a layer cannot be had. One thread and no test harness, because every probe runs in a forked child.
//!
//! Prints the matrix: rows are probes, columns layers; `-` is allowed, `E` an error that says no, `K` killed.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Output, Stdio};

use azr::exec::filter::{filter, of_process};
use azr::exec::sandbox::{self, Ending};
use seccompiler::{SeccompAction, SeccompFilter};

/// A probe: its name, what it tries (0 or more when it was let), and the layers that claim to deny it: R limits, K no
/// capabilities (for root), L Landlock, Z the zygote's filter, C the child's filter. All of them together must.
type Probe = (&'static str, fn() -> i64, &'static str);

/// The result of a system call with the address of something that exists or not.
macro_rules! call {
    ($number:expr $(, $arg:expr)*) => {{
        // SAFETY: arguments are numbers or point to memory that lives through the call; the process ends after it.
        unsafe { libc::syscall($number $(, $arg)*) }
    }};
}

fn socket(domain: i32, kind: i32) -> i64 {
    call!(libc::SYS_socket, domain, kind, 0)
}

fn connect(fd: i64, address: &[u8]) -> i64 {
    if fd < 0 { fd } else { call!(libc::SYS_connect, fd, address.as_ptr(), address.len()) }
}

fn parent() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::getppid() }
}

/// No process has such a number.
const NOBODY: i32 = i32::MAX;

/// Sends this process the signal of `abort()`, which is blocked so that it does not end the probe.
fn abort_itself() -> i64 {
    let signals = 1u64 << (libc::SIGABRT - 1);
    call!(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const signals, 0, 8);
    let thread = call!(libc::SYS_gettid);
    call!(libc::SYS_tgkill, std::process::id(), thread, libc::SIGABRT)
}

const LOCALHOST_9: [u8; 16] = [2, 0, 0, 9, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
const ABSTRACT: &[u8] = b"\x01\x00\0azr-probe";

#[cfg(target_arch = "x86_64")]
fn old_call() -> i64 {
    let result: i64;
    // SAFETY: number 20 of the 32-bit table is getpid, which touches no memory.
    unsafe { std::arch::asm!("int 0x80", inlateout("rax") 20i64 => result) };
    result
}

#[cfg(not(target_arch = "x86_64"))]
fn old_call() -> i64 {
    -1
}

const PROBES: &[Probe] = &[
    ("open a file", || call!(libc::SYS_openat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), 0), "RLZC"),
    (
        "create a file",
        || call!(libc::SYS_openat, libc::AT_FDCWD, c"/tmp/azr-probe".as_ptr(), libc::O_CREAT | libc::O_WRONLY, 0o600),
        "RLZC",
    ),
    ("open a folder", || call!(libc::SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), libc::O_DIRECTORY), "RLZC"),
    ("open a path only", || call!(libc::SYS_openat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), libc::O_PATH), "RZC"),
    ("make a folder", || call!(libc::SYS_mkdirat, libc::AT_FDCWD, c"/tmp/azr-probe-dir".as_ptr(), 0o700), "LZC"),
    (
        "make a link",
        || call!(libc::SYS_symlinkat, c"/etc/passwd".as_ptr(), libc::AT_FDCWD, c"/tmp/azr-probe-link".as_ptr()),
        "LZC",
    ),
    (
        "execute a program",
        || {
            call!(
                libc::SYS_execve,
                c"/bin/true".as_ptr(),
                [c"true".as_ptr(), std::ptr::null()].as_ptr(),
                [std::ptr::null::<u8>()].as_ptr()
            )
        },
        "LZC",
    ),
    ("stat", || call!(libc::SYS_newfstatat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), [0u64; 32].as_mut_ptr(), 0), "ZC"),
    ("access", || call!(libc::SYS_faccessat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), 0), "ZC"),
    ("change folder", || call!(libc::SYS_chdir, c"/tmp".as_ptr()), "ZC"),
    ("change mode", || call!(libc::SYS_fchmodat, libc::AT_FDCWD, c"/proc/self/comm".as_ptr(), 0o644), "ZC"),
    (
        "read a link",
        || call!(libc::SYS_readlinkat, libc::AT_FDCWD, c"/proc/self/exe".as_ptr(), [0u8; 256].as_mut_ptr(), 256),
        "ZC",
    ),
    ("change root", || call!(libc::SYS_chroot, c"/".as_ptr()), "KZC"),
    ("mount", || call!(libc::SYS_mount, c"none".as_ptr(), c"/mnt".as_ptr(), c"no-such-type".as_ptr(), 0, 0), "KLZC"),
    ("TCP socket", || socket(libc::AF_INET, libc::SOCK_STREAM), "RZC"),
    ("TCP connection", || connect(socket(libc::AF_INET, libc::SOCK_STREAM), &LOCALHOST_9), "R4ZC"),
    (
        "UDP message",
        || {
            let fd = socket(libc::AF_INET, libc::SOCK_DGRAM);
            if fd < 0 { fd } else { call!(libc::SYS_sendto, fd, b"x".as_ptr(), 1, 0, LOCALHOST_9.as_ptr(), 16) }
        },
        "RZC",
    ),
    ("abstract socket to the outside", || connect(socket(libc::AF_UNIX, libc::SOCK_STREAM), ABSTRACT), "R6ZC"),
    ("unix socket", || socket(libc::AF_UNIX, libc::SOCK_STREAM), "RZC"),
    ("netlink", || socket(libc::AF_NETLINK, libc::SOCK_RAW), "RZC"),
    ("raw socket", || socket(libc::AF_INET, libc::SOCK_RAW), "KRZC"),
    ("socket pair", || call!(libc::SYS_socketpair, libc::AF_UNIX, libc::SOCK_STREAM, 0, [0i32; 2].as_mut_ptr()), "RZC"),
    ("signal to the parent", || call!(libc::SYS_kill, parent(), 0), "6C"),
    ("thread signal to the parent", || call!(libc::SYS_tgkill, parent(), parent(), 0), "6ZC"),
    // There is no such process: where the call is let through, that is what it says.
    ("end another process", || call!(libc::SYS_tgkill, NOBODY, NOBODY, libc::SIGABRT) + 1000, "C"),
    ("descriptor of a process", || call!(libc::SYS_pidfd_open, parent(), 0), "RZC"),
    ("trace the parent", || call!(libc::SYS_ptrace, libc::PTRACE_SEIZE, parent(), 0, 0), "LZC"),
    (
        "read the parent's memory",
        || {
            let mut byte = 0u8;
            let to = libc::iovec { iov_base: std::ptr::from_mut(&mut byte).cast(), iov_len: 1 };
            let from = libc::iovec { iov_base: ABSTRACT.as_ptr().cast_mut().cast(), iov_len: 1 };
            call!(libc::SYS_process_vm_readv, parent(), &to, 1, &from, 1, 0)
        },
        "LZC",
    ),
    (
        "fork",
        || match call!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
            0 => sandbox::exit_now(0),
            pid => pid,
        },
        "C",
    ),
    (
        "fork by clone3",
        || match call!(libc::SYS_clone3, [0u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0].as_ptr(), 64) {
            0 => sandbox::exit_now(0),
            pid => pid,
        },
        "C",
    ),
    ("wait for a child", || call!(libc::SYS_wait4, -1, 0, libc::WNOHANG, 0) + 1000, "C"),
    ("new user namespace", || call!(libc::SYS_unshare, libc::CLONE_NEWUSER), "ZC"),
    ("join a namespace", || call!(libc::SYS_setns, 1, 0) + 1000, "ZC"),
    ("bpf", || call!(libc::SYS_bpf, 100, 0, 0) + 1000, "ZC"),
    ("io_uring", || call!(libc::SYS_io_uring_setup, 4, [0u8; 120].as_mut_ptr()), "RZC"),
    ("userfaultfd", || call!(libc::SYS_userfaultfd, 1), "RZC"),
    ("performance counter", || call!(libc::SYS_perf_event_open, [0u8; 128].as_ptr(), 0, -1, -1, 0) + 1000, "ZC"),
    ("memory file", || call!(libc::SYS_memfd_create, c"x".as_ptr(), 0), "RZC"),
    ("pipe", || call!(libc::SYS_pipe2, [0i32; 2].as_mut_ptr(), 0), "RZC"),
    ("duplicate a descriptor", || call!(libc::SYS_dup, 1), "RZC"),
    ("epoll", || call!(libc::SYS_epoll_create1, 0), "RZC"),
    ("event descriptor", || call!(libc::SYS_eventfd2, 0, 0), "RZC"),
    ("timer descriptor", || call!(libc::SYS_timerfd_create, libc::CLOCK_MONOTONIC, 0), "RZC"),
    ("watch files", || call!(libc::SYS_inotify_init1, 0), "RZC"),
    (
        "message queue",
        || call!(libc::SYS_mq_open, c"azr-probe".as_ptr(), libc::O_CREAT | libc::O_RDWR, 0o600, 0),
        "RZC",
    ),
    (
        "executable memory",
        || call!(libc::SYS_mmap, 0, 4096, 7, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).min(1),
        "ZC",
    ),
    (
        "memory made executable",
        || {
            let page = call!(libc::SYS_mmap, 0, 4096, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            call!(libc::SYS_mprotect, page, 4096, 5)
        },
        "ZC",
    ),
    ("map a file", || call!(libc::SYS_mmap, 0, 4096, 1, libc::MAP_PRIVATE, 0, 0) + 1000, "ZC"),
    ("shared memory", || call!(libc::SYS_shmget, libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o600), "ZC"),
    ("semaphores", || call!(libc::SYS_semget, libc::IPC_PRIVATE, 1, libc::IPC_CREAT | 0o600), "ZC"),
    ("keys", || call!(libc::SYS_keyctl, 0, -3, 0, 0, 0) + 1000, "ZC"),
    ("become root", || call!(libc::SYS_setuid, 0) + 1000, "ZC"),
    ("change capabilities", || call!(libc::SYS_capset, 0, 0) + 1000, "ZC"),
    ("raise priority", || call!(libc::SYS_setpriority, 0, 0, -5), "KZC"),
    ("lock memory", || call!(libc::SYS_mlockall, 1) + 1000, "ZC"),
    ("change limits", || call!(libc::SYS_prlimit64, 0, libc::RLIMIT_CORE, 0, [0u64; 2].as_mut_ptr()), "C"),
    ("be traceable", || call!(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0), "C"),
    ("another filter", || call!(libc::SYS_seccomp, 2, 0, [0x7fff_0000u32].as_ptr()), "C"),
    ("read standard input", || call!(libc::SYS_read, 0, [0u8; 4].as_mut_ptr(), 0), "C"),
    ("write beyond standard error", || call!(libc::SYS_write, 3, b"x".as_ptr(), 1) + 1000, "C"),
    ("control a terminal", || call!(libc::SYS_ioctl, 1, libc::TIOCSTI, b"x".as_ptr()) + 1000, "ZC"),
    ("control a descriptor", || call!(libc::SYS_fcntl, 1, libc::F_GETFL), "ZC"),
    ("reset the CPU timer", || call!(libc::SYS_setitimer, libc::ITIMER_PROF, [0u64; 4].as_ptr(), 0), "C"),
    ("ignore the CPU timer", || call!(libc::SYS_rt_sigaction, libc::SIGPROF, [1u64, 0, 0, 0].as_ptr(), 0, 8), "ZC"),
    ("make a timer", || call!(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, 0, [0i32; 2].as_mut_ptr()), "ZC"),
    ("sleep", || call!(libc::SYS_clock_nanosleep, 1, 0, [0u64, 1].as_ptr(), 0), "ZC"),
    ("pause", || call!(libc::SYS_ppoll, 0, 0, [0u64, 1].as_ptr(), 0, 8) + 1000, "C"),
    ("wait for a lock", || call!(libc::SYS_futex, [0u32].as_ptr(), 128, 0, [0u64, 1].as_ptr()) + 1000, "C"),
    ("choose a processor", || call!(libc::SYS_sched_getaffinity, 0, 128, [0u8; 128].as_mut_ptr()), "ZC"),
    ("change personality", || call!(libc::SYS_personality, 0xffff_ffffu32), "ZC"),
    ("kernel log", || call!(libc::SYS_syslog, 10, 0, 0) + 1000, "ZC"),
    ("reboot with a wrong word", || call!(libc::SYS_reboot, 0, 0, 0, 0) + 1000, "ZC"),
    ("host name", || call!(libc::SYS_uname, [0u8; 512].as_mut_ptr()), "ZC"),
    ("system information", || call!(libc::SYS_sysinfo, [0u8; 256].as_mut_ptr()), "ZC"),
    ("32-bit system call", old_call, if cfg!(target_arch = "x86_64") { "ZC" } else { "" }),
    ("x32 system call", || call!(0x4000_0000 + 39) + 1000, if cfg!(target_arch = "x86_64") { "ZC" } else { "" }),
];

/// What a program needs must stay allowed under everything.
const NEEDED: &[Probe] = &[
    ("memory", || call!(libc::SYS_mmap, 0, 4096, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0), ""),
    ("the time", || call!(libc::SYS_clock_gettime, 1, [0u64; 2].as_mut_ptr()), ""),
    ("random bytes", || call!(libc::SYS_getrandom, [0u8; 8].as_mut_ptr(), 8, 0), ""),
    ("aborting itself", abort_itself, ""),
    ("printing", || call!(libc::SYS_write, 1, b"".as_ptr(), 0), ""),
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Found {
    Allowed,
    Refused,
    Killed,
}

/// Runs a probe in a child behind layers.
fn probe(attempt: fn() -> i64, layers: &str) -> Found {
    let pid = match sandbox::fork().expect("a child") {
        None => {
            let has = |layer| layers.contains(layer);
            // As in a worker: a program that one probe executes would else be ended by the file size limit when it
            // complains into a log file.
            let null = call!(libc::SYS_open, c"/dev/null".as_ptr(), libc::O_WRONLY);
            call!(libc::SYS_dup2, null, 1);
            call!(libc::SYS_dup2, null, 2);
            call!(libc::SYS_close, null);
            let _ = sandbox::no_new_privileges();
            let entered = (!has('K') || sandbox::drop_capabilities().is_ok())
                && (!has('R') || sandbox::set_rlimits().is_ok())
                && (!has('L') || sandbox::enter_landlock().is_ok())
                && (!has('Z') || filter(true).and_then(|f| sandbox::apply_filter(&f)).is_ok())
                && (!has('R') || sandbox::set_child_rlimits().is_ok())
                && (!has('C')
                    || filter(false).and_then(|f| sandbox::apply_filter(&of_process(&f, std::process::id()))).is_ok());
            sandbox::exit_now(if !entered { 2 } else { i32::from(attempt() < 0) })
        }
        Some(pid) => pid,
    };
    match sandbox::wait_for(pid, None).expect("the child ends").expect("no limit").0 {
        Ending::Exited(1) => Found::Refused,
        Ending::Exited(2) => panic!("the layers {layers} cannot be entered here"),
        // Other codes are those of the program that one probe executes.
        Ending::Exited(_) => Found::Allowed,
        Ending::Killed(libc::SIGSYS) => Found::Killed,
        other => panic!("a probe behind {layers} ended as {other:?}"),
    }
}

fn matrix(wrong: &mut Vec<String>) {
    let version = sandbox::landlock_version().unwrap_or(0);
    // SAFETY: no arguments.
    let root = unsafe { libc::geteuid() } == 0;
    println!("Landlock version {version}, {}", if root { "root" } else { "ordinary user" });
    println!("{:32} none R K L Z C all", "");
    for (name, attempt, claims) in PROBES {
        let layers = ["", "R", "K", "L", "Z", "C", "RKLZC"];
        let found: BTreeMap<&str, Found> = layers.iter().map(|l| (*l, probe(*attempt, l))).collect();
        let letter = |f: &Found| match f {
            Found::Allowed => '-',
            Found::Refused => 'E',
            Found::Killed => 'K',
        };
        println!("{name:32} {}", layers.map(|l| letter(&found[l]).to_string()).join("    "));
        for claim in claims.chars() {
            let layer = match claim {
                '4' if version >= 4 => "L",
                '6' if version >= 6 => "L",
                '4' | '6' => continue,
                'K' if !root => continue,
                'R' => "R",
                'K' => "K",
                'L' => "L",
                'Z' => "Z",
                _ => "C",
            };
            if found[layer] == Found::Allowed {
                wrong.push(format!("{name}: layer {layer} does not deny it alone"));
            }
        }
        if !claims.is_empty() && found["RKLZC"] == Found::Allowed {
            wrong.push(format!("{name}: everything together does not deny it"));
        }
    }
    for (name, attempt, _) in NEEDED {
        if probe(*attempt, "RKLZC") != Found::Allowed {
            wrong.push(format!("{name}: denied, and programs need it"));
        }
    }
}

const LINE: &str = "{\"program\": \"def f(): return 1\", \"input\": \"\", \"output\": \"1\"}\n";

/// Runs a command on one line of input.
fn output(mut command: Command) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the command starts");
    let _ = child.stdin.take().expect("piped").write_all(LINE.as_bytes());
    child.wait_with_output().expect("the command ends")
}

fn azr(mode: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_azr"));
    command.args(["exec", "--executors", "1", "--sandbox", mode]);
    command
}

/// The command where some system calls give an error, as on an old kernel or in a strict container.
fn azr_without(mode: &str, calls: &[i64], error: i32) -> Output {
    without(azr(mode), calls, error)
}

fn without(mut command: Command, calls: &[i64], error: i32) -> Output {
    let rules = calls.iter().map(|c| (*c, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().expect("an architecture with a filter");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(error as u32), arch);
    let filter: seccompiler::BpfProgram = filter.and_then(TryInto::try_into).expect("a filter");
    // SAFETY: between fork and exec only system calls are made.
    unsafe { command.pre_exec(move || sandbox::apply_filter(&filter).map_err(std::io::Error::other)) };
    output(command)
}

fn passed(output: &Output) -> bool {
    output.status.success() && String::from_utf8_lossy(&output.stdout).contains("\"passed\":true")
}

fn machines(wrong: &mut Vec<String>) {
    let mut check = |what: &str, right: bool, output: &Output| {
        println!("{what}: {}", if right { "ok" } else { "WRONG" });
        if !right {
            wrong.push(format!("{what}: {:?} {}", output.status, String::from_utf8_lossy(&output.stderr)));
        }
    };
    let warned = |o: &Output, word: &str| {
        let text = String::from_utf8_lossy(&o.stderr).into_owned();
        text.matches("WARNING").count() == 1 && text.contains(word)
    };
    let landlock = [libc::SYS_landlock_create_ruleset];
    let found = azr_without("strict", &landlock, libc::ENOSYS);
    check("without Landlock, strict refuses", found.status.code() == Some(6), &found);
    let found = azr_without("best-effort", &landlock, libc::ENOSYS);
    check("without Landlock, best effort runs and says so once", passed(&found) && warned(&found, "landlock"), &found);
    let doctor = |mode: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_azr"));
        command.args(["doctor", "--json", "--sandbox", mode]);
        let found = without(command, &landlock, libc::ENOSYS);
        let report: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap_or_default();
        let strict = report["checks"].as_array().into_iter().flatten().find(|c| c["name"] == "strict").cloned();
        let strict = strict.unwrap_or_default();
        let hinted = strict["hint"].as_str().is_some_and(|h| h.contains("best-effort"));
        (
            report["works"].clone(),
            strict["state"].clone(),
            hinted && strict["detail"].to_string().contains("landlock"),
            found,
        )
    };
    let (works, state, told, found) = doctor("strict");
    let right = works == false && state == "missing" && told && found.status.code() == Some(6);
    check("without Landlock, the doctor says what strict lacks and ends as a run would", right, &found);
    let (works, state, told, found) = doctor("best-effort");
    let right = works == true && state == "absent" && told && found.status.success();
    check("without Landlock, the doctor says that best effort works", right, &found);
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_azr"));
    command
        .args(["--steps", "1", "--sandbox", "best-effort", "--set", "selfplay.batch_size=2", "--out"])
        .arg(dir.path());
    let found = without(command, &landlock, libc::ENOSYS);
    let layers = std::fs::read_to_string(dir.path().join("sandbox.json")).unwrap_or_default();
    let layers: Vec<serde_json::Value> = serde_json::from_str(&layers).unwrap_or_default();
    let lacking: Vec<&str> =
        layers.iter().filter(|l| l["in_force"] == false).filter_map(|l| l["name"].as_str()).collect();
    let warned_once = String::from_utf8_lossy(&found.stderr).matches("the sandbox lacks landlock").count() == 1;
    let right = found.status.success() && warned_once && lacking == ["landlock"];
    check("without Landlock, a best-effort run warns once and notes it in sandbox.json", right, &found);
    let found = azr_without("strict", &[libc::SYS_seccomp], libc::EPERM);
    check("without seccomp, strict refuses", found.status.code() == Some(6), &found);
    let found = azr_without("best-effort", &[libc::SYS_seccomp], libc::EPERM);
    check(
        "without seccomp, best effort fails closed or runs and says so",
        !passed(&found) || warned(&found, "seccomp"),
        &found,
    );
    let found = azr_without("strict", &[libc::SYS_unshare, libc::SYS_setns, libc::SYS_clone3], libc::ENOSYS);
    check("where namespaces are refused, everything works", passed(&found), &found);
    let found = azr_without("strict", &[libc::SYS_capset], libc::EPERM);
    check("where capabilities cannot be dropped, everything works", passed(&found), &found);
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        println!("SKIPPED: as another user and as process 1: this is not root");
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let copy = dir.path().join("azr");
    std::fs::copy(env!("CARGO_BIN_EXE_azr"), &copy).expect("a copy that everyone can read");
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.path(), all).expect("own folder");
    let mut command = Command::new(&copy);
    command.args(["exec", "--executors", "1"]).uid(65534).gid(65534);
    let found = output(command);
    check("as an ordinary user", passed(&found), &found);
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc"]).arg(env!("CARGO_BIN_EXE_azr")).args(["exec", "--executors", "1"]);
    match Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).status() {
        Ok(status) if status.success() => {
            let found = output(command);
            check("as process 1", passed(&found), &found);
        }
        _ => println!("SKIPPED: as process 1: this machine makes no process namespace"),
    }
}

fn main() -> ExitCode {
    let listener = <SocketAddr as SocketAddrExt>::from_abstract_name("azr-probe")
        .and_then(|address| UnixListener::bind_addr(&address));
    let _ = std::fs::remove_dir("/tmp/azr-probe-dir");
    let _ = std::fs::remove_file("/tmp/azr-probe-link");
    let mut wrong = Vec::new();
    matrix(&mut wrong);
    machines(&mut wrong);
    drop(listener);
    for path in ["/tmp/azr-probe", "/tmp/azr-probe-link"] {
        let _ = std::fs::remove_file(path);
    }
    let _ = std::fs::remove_dir("/tmp/azr-probe-dir");
    for line in &wrong {
        eprintln!("wrong: {line}");
    }
    ExitCode::from(u8::from(!wrong.is_empty()))
}
