//! The walls around untrusted programs, and the only system calls of the crate: fork, pipes, timers, limits, Landlock,
//! seccomp, and an allocator that counts.
//!
//! A worker process has two stages. The zygote (interpreter warm, nothing untrusted run yet) drops privileges, enters
//! Landlock with no rules and a first seccomp filter. Each forked child adds a CPU timer, limits, a memory budget and a
//! second filter that leaves it nothing but memory and one pipe.

use std::alloc::{GlobalAlloc, Layout};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Exit status of a child that went over its memory budget.
pub const EXIT_OUT_OF_MEMORY: i32 = 77;

/// Descriptor on which a zygote reads jobs.
pub const JOBS_FD: RawFd = 3;
/// Descriptor on which a zygote writes results.
pub const RESULTS_FD: RawFd = 4;
/// Descriptor on which a child writes outcomes.
pub const OUTCOMES_FD: RawFd = 5;

/// Processor time after which the kernel kills a child whatever else fails, in seconds.
const RLIMIT_CPU_S: u64 = 60;
/// Address space of a child; the allocator's budget is the real limit.
const RLIMIT_AS_BYTES: u64 = 8 << 30;
/// `prctl` option by which the allocator names its mappings.
const PR_SET_VMA: u64 = 0x5356_4d41;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static BUDGET_BYTES: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The global allocator: mimalloc, and a budget that ends a child the moment it is overdrawn.
pub struct CountingAllocator;

/// Counts only while a budget is set: the trainer's threads share no counter.
#[inline(always)]
fn grow(bytes: usize) {
    if BUDGET_BYTES.load(Relaxed) != usize::MAX {
        // A child has one thread: plain loads and stores do.
        let live = LIVE_BYTES.load(Relaxed).saturating_add(bytes);
        LIVE_BYTES.store(live, Relaxed);
        if live > BUDGET_BYTES.load(Relaxed) {
            exit_now(EXIT_OUT_OF_MEMORY);
        }
    }
}

#[inline(always)]
fn shrink(bytes: usize) {
    if BUDGET_BYTES.load(Relaxed) != usize::MAX {
        LIVE_BYTES.store(LIVE_BYTES.load(Relaxed).saturating_sub(bytes), Relaxed);
    }
}

// SAFETY: every call is passed on to mimalloc unchanged; counting touches no memory of the caller.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's contract is mimalloc's.
        unsafe { mimalloc::MiMalloc.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller's contract is mimalloc's.
        unsafe { mimalloc::MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        shrink(layout.size());
        // SAFETY: the caller's contract is mimalloc's.
        unsafe { mimalloc::MiMalloc.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if size > layout.size() {
            grow(size - layout.size());
        } else {
            shrink(layout.size() - size);
        }
        // SAFETY: the caller's contract is mimalloc's.
        unsafe { mimalloc::MiMalloc.realloc(ptr, layout, size) }
    }
}

/// Lets this process allocate so many bytes more. For children: the process ends when it asks for more.
pub fn set_memory_budget(bytes: usize) {
    LIVE_BYTES.store(0, Relaxed);
    BUDGET_BYTES.store(bytes, Relaxed);
}

/// Ends the process without running anything else of it.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` takes any status and does not return.
    unsafe { libc::_exit(status) }
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A pipe: (read end, write end), closed on exec.
///
/// # Errors
/// When descriptors have run out.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array has room for the two descriptors, which are then owned by nobody else.
    unsafe {
        check(i64::from(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC)))?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// Makes `to` mean what `from` means.
///
/// # Errors
/// When `from` is not open.
pub fn duplicate(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: dup2 works on numbers; the descriptors replaced here belong to this module's own plan (0 to 5).
    check(i64::from(unsafe { libc::dup2(from, to) })).map(drop)
}

/// Closes every descriptor from `first` on.
pub fn close_from(first: RawFd) {
    // SAFETY: only called in worker processes, where nothing else uses these descriptors.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// An owned descriptor as a file.
pub fn file_at(fd: RawFd) -> std::fs::File {
    // SAFETY: called once per fixed descriptor of a worker process, which owns it.
    unsafe { std::fs::File::from_raw_fd(fd) }
}

/// The process ends when its parent does.
pub fn die_with_parent() {
    // SAFETY: prctl with constant arguments.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Forks. In the child the result is `None`. For single-threaded processes.
///
/// # Errors
/// When no process can be made.
pub fn fork() -> io::Result<Option<i32>> {
    // SAFETY: the zygote has one thread, so the child's memory is consistent.
    let pid = check(i64::from(unsafe { libc::fork() }))?;
    Ok((pid != 0).then_some(pid as i32))
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Exit status.
    Exited(i32),
    /// Signal.
    Killed(i32),
}

/// Waits for a child: how it ended and its CPU time in microseconds.
///
/// # Errors
/// When there is no such child.
pub fn wait_for(pid: i32) -> io::Result<(Ending, u64)> {
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both pointers are to memory of the right type.
    check(i64::from(unsafe { libc::wait4(pid, &mut status, 0, usage.as_mut_ptr()) }))?;
    // SAFETY: zeroed rusage is valid, and wait4 has filled it.
    let usage = unsafe { usage.assume_init() };
    let micros = |t: libc::timeval| t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64;
    let ending = if libc::WIFSIGNALED(status) {
        Ending::Killed(libc::WTERMSIG(status))
    } else {
        Ending::Exited(libc::WEXITSTATUS(status))
    };
    Ok((ending, micros(usage.ru_utime) + micros(usage.ru_stime)))
}

/// Kills a child.
pub fn kill(pid: i32) {
    // SAFETY: kill takes any numbers; the child is not yet reaped, so its number is its own.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Waits until a descriptor can be read (or its other side is closed); false after the timeout.
pub fn wait_readable(fd: &impl AsRawFd, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let millis = timeout.as_millis().min(i32::MAX as u128) as i32;
    // SAFETY: one pollfd, and its count is one.
    unsafe { libc::poll(&mut poll, 1, millis) > 0 }
}

/// The kernel kills this process after so much CPU time.
///
/// # Errors
/// When the timer cannot be set.
pub fn set_cpu_timer(millis: u64) -> io::Result<()> {
    let value = libc::timeval { tv_sec: (millis / 1000) as i64, tv_usec: (millis % 1000 * 1000) as i64 };
    let timer = libc::itimerval { it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 }, it_value: value };
    // SAFETY: the timer is read during the call only.
    check(unsafe { libc::syscall(libc::SYS_setitimer, libc::ITIMER_PROF, &timer, std::ptr::null_mut::<u8>()) })
        .map(drop)
}

/// Limits of a child, as a second line behind timer, budget and filters.
///
/// # Errors
/// When a limit cannot be set.
pub fn set_rlimits() -> io::Result<()> {
    for (resource, value) in [
        (libc::RLIMIT_AS, RLIMIT_AS_BYTES),
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_FSIZE, 0),
        (libc::RLIMIT_NPROC, 0),
        (libc::RLIMIT_CPU, RLIMIT_CPU_S),
        (libc::RLIMIT_MEMLOCK, 0),
    ] {
        let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
        // SAFETY: the limit is read during the call only.
        check(i64::from(unsafe { libc::setrlimit(resource, &limit) }))?;
    }
    Ok(())
}

/// No set-user-id program will give this process or its children more rights.
///
/// # Errors
/// When the kernel is older than 3.5.
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: prctl with constant arguments.
    check(i64::from(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })).map(drop)
}

/// Enters a Landlock domain that allows nothing: no file, no TCP, no signal or abstract socket to the outside.
///
/// # Errors
/// In one line, when the kernel does not enforce all of it.
pub fn enter_landlock() -> Result<(), String> {
    let enter = || {
        Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(ABI::V5))?
            .handle_access(AccessNet::from_all(ABI::V4))?
            .scope(Scope::from_all(ABI::V6))?
            .create()?
            .restrict_self()
    };
    match enter() {
        Ok(status) if status.ruleset == RulesetStatus::FullyEnforced => Ok(()),
        Ok(status) => Err(format!("Landlock is {:?}", status.ruleset)),
        Err(e) => Err(format!("Landlock: {e}")),
    }
}

fn condition(arg: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(arg, SeccompCmpArgLen::Dword, op, value)
}

/// The allow-list of a child, or of a zygote, which besides makes and reaps children. Anything else kills the process.
///
/// # Errors
/// In one line, on an architecture that the filter compiler does not know.
pub fn filter(zygote: bool) -> Result<BpfProgram, String> {
    let compile = || -> Result<BpfProgram, seccompiler::BackendError> {
        let rule = |conditions| SeccompRule::new(conditions);
        let mut rules = std::collections::BTreeMap::new();
        // Memory, time, randomness, ending.
        for call in [
            libc::SYS_brk,
            libc::SYS_munmap,
            libc::SYS_mremap,
            libc::SYS_madvise,
            libc::SYS_exit_group,
            libc::SYS_exit,
            libc::SYS_futex,
            libc::SYS_getrandom,
            libc::SYS_rt_sigreturn,
            libc::SYS_rt_sigprocmask,
            libc::SYS_sigaltstack,
            libc::SYS_clock_gettime,
            libc::SYS_sched_yield,
            libc::SYS_gettid,
            libc::SYS_getpid,
            libc::SYS_restart_syscall,
        ] {
            rules.insert(call, Vec::new());
        }
        let to = |fd: RawFd| rule(vec![condition(0, SeccompCmpOp::Eq, fd as u64)?]);
        rules.insert(libc::SYS_write, vec![to(OUTCOMES_FD)?, to(1)?, to(2)?]);
        let not_executable = || condition(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0);
        let anonymous = libc::MAP_ANONYMOUS as u64;
        let mapped = vec![not_executable()?, condition(3, SeccompCmpOp::MaskedEq(anonymous), anonymous)?];
        rules.insert(libc::SYS_mmap, vec![rule(mapped)?]);
        rules.insert(libc::SYS_mprotect, vec![rule(vec![not_executable()?])?]);
        rules.insert(libc::SYS_prctl, vec![rule(vec![condition(0, SeccompCmpOp::Eq, PR_SET_VMA)?])?]);
        // Only abort() on itself.
        rules.insert(libc::SYS_tgkill, vec![rule(vec![condition(2, SeccompCmpOp::Eq, libc::SIGABRT as u64)?])?]);
        if zygote {
            for call in [
                libc::SYS_clone,
                libc::SYS_clone3,
                libc::SYS_wait4,
                libc::SYS_pipe2,
                libc::SYS_read,
                libc::SYS_write,
                libc::SYS_close,
                libc::SYS_close_range,
                libc::SYS_poll,
                libc::SYS_ppoll,
                libc::SYS_kill,
                libc::SYS_setrlimit,
                libc::SYS_prlimit64,
                libc::SYS_seccomp,
                libc::SYS_prctl,
                libc::SYS_set_robust_list,
                libc::SYS_rseq,
                libc::SYS_dup2,
                libc::SYS_setitimer,
                libc::SYS_fcntl,
            ] {
                rules.insert(call, Vec::new());
            }
        }
        let arch = std::env::consts::ARCH.try_into()?;
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?.try_into()
    };
    compile().map_err(|e| format!("seccomp: {e}"))
}

/// Puts this process behind a filter for good.
///
/// # Errors
/// In one line, when the kernel refuses.
pub fn apply_filter(filter: &BpfProgram) -> Result<(), String> {
    seccompiler::apply_filter(filter).map_err(|e| format!("seccomp: {e}"))
}
