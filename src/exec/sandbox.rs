//! The walls around untrusted programs, and the only system calls of the crate: fork, shared memory, timers, limits,
//! Landlock, seccomp, and an allocator that counts.
//!
//! A worker process has two stages. The zygote (interpreter warm, nothing untrusted run yet) drops capabilities, enters
//! Landlock with no rules and a first seccomp filter. Each forked child closes its descriptors, adds a CPU timer, limits,
//! a memory budget and a second filter that leaves it nothing but its memory and a shared slot for results.
//!
//! Every layer only takes rights away, needs no user namespace and no privilege, and works the same for root, an ordinary
//! user and process 1 of a container. `tests/probes.rs` shows what each layer denies alone.

use std::alloc::{GlobalAlloc, Layout};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};
use seccompiler::BpfProgram;

use crate::exec::protocol::MAX_CPU_S;

/// Exit status of a child that went over its memory budget.
pub const EXIT_OUT_OF_MEMORY: i32 = 77;

/// Descriptor on which a zygote reads jobs.
pub const JOBS_FD: RawFd = 3;
/// Descriptor on which a zygote writes results.
pub const RESULTS_FD: RawFd = 4;

/// Stack of a zygote and its children.
const STACK_BYTES: u64 = 64 << 20;
/// Address space of a child; the allocator's budget is the real limit.
const RLIMIT_AS_BYTES: u64 = 8 << 30;

/// Size of a huge page on the architectures that have a filter.
const HUGE_PAGE: usize = 2 << 20;
/// Bytes before the results in a slot: their length, and the memory peak.
const SLOT_HEADER: usize = 16;

/// Whether this is a worker, whose memory is counted and comes from an arena: the trainer's threads share no counter.
static COUNTING: AtomicBool = AtomicBool::new(false);
static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);
static BUDGET_BYTES: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The global allocator: mimalloc, and for workers a budget and an arena.
///
/// A child lives for a millisecond, and what it pays for memory is the pages that it is the first to write to: each costs
/// two or three microseconds. So it takes small blocks one after another from a fresh mapping, gives freed ones out again
/// by size, and never writes to free blocks of the pages that it shares with its zygote. The zygote does the same, so that
/// what is used together lies together. A worker has one thread: plain loads and stores do.
pub struct CountingAllocator;

/// Blocks up to this size come from a worker's arena.
const MAX_SMALL: usize = 1 << 20;
/// Arena on top of twice the budget: sizes are rounded up, and a freed block only serves its own size again.
const ARENA_SLACK: usize = 64 << 20;
/// Part of the arena that every program uses, mapped at once.
const ARENA_FIRST: usize = 72 << 10;

/// Part of the stack that every program uses.
const STACK_FIRST: usize = 24 << 10;

static ARENA_START: AtomicUsize = AtomicUsize::new(0);
static ARENA_NEXT: AtomicUsize = AtomicUsize::new(0);
static ARENA_END: AtomicUsize = AtomicUsize::new(0);
/// First free block of each size; a free block holds the address of the next.
static FREE_BLOCKS: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];

/// Index and size of the blocks that serve a size up to [`MAX_SMALL`]: in steps of 16 bytes up to 256, then four per
/// doubling.
#[inline]
fn size_class(size: usize) -> (usize, usize) {
    if size <= 256 {
        let steps = size.div_ceil(16).max(1);
        return (steps - 1, steps * 16);
    }
    let doubling = (size - 1).ilog2() as usize;
    let step = 1 << (doubling - 2);
    let steps = size.div_ceil(step);
    (16 + (doubling - 8) * 4 + (steps - 5), steps * step)
}

#[inline(always)]
fn in_arena(ptr: *mut u8) -> bool {
    (ARENA_START.load(Relaxed)..ARENA_END.load(Relaxed)).contains(&(ptr as usize))
}

/// Whether a small block comes from the newest arena.
pub fn is_new(ptr: *const u8) -> bool {
    in_arena(ptr.cast_mut())
}

#[inline(always)]
fn is_worker() -> bool {
    COUNTING.load(Relaxed)
}

#[inline(always)]
fn grow(bytes: usize) {
    let live = LIVE_BYTES.load(Relaxed).saturating_add(bytes);
    LIVE_BYTES.store(live, Relaxed);
    if live > PEAK_BYTES.load(Relaxed) {
        PEAK_BYTES.store(live, Relaxed);
        if live > BUDGET_BYTES.load(Relaxed) {
            exit_now(EXIT_OUT_OF_MEMORY);
        }
    }
}

#[inline(always)]
fn shrink(bytes: usize) {
    LIVE_BYTES.store(LIVE_BYTES.load(Relaxed).saturating_sub(bytes), Relaxed);
}

/// A small block, and whether it is fresh and so zero; none where there is no arena.
#[inline]
fn take_block(layout: Layout) -> Option<(*mut u8, bool)> {
    if layout.size() > MAX_SMALL || layout.align() > 16 || ARENA_START.load(Relaxed) == 0 {
        return None;
    }
    let (class, size) = size_class(layout.size());
    let free = FREE_BLOCKS[class].load(Relaxed);
    if free != 0 {
        // SAFETY: only free blocks of the arena are in the list, and each begins with the address of the next.
        FREE_BLOCKS[class].store(unsafe { *(free as *const usize) }, Relaxed);
        return Some((free as *mut u8, false));
    }
    let next = ARENA_NEXT.load(Relaxed);
    if next + size > ARENA_END.load(Relaxed) {
        exit_now(EXIT_OUT_OF_MEMORY);
    }
    ARENA_NEXT.store(next + size, Relaxed);
    Some((next as *mut u8, true))
}

/// Lets the arena's last block grow where it is: a growing list then touches each page once.
fn extend_last(ptr: *mut u8, old: usize, new: usize) -> bool {
    let (start, (_, old), (_, block)) = (ptr as usize, size_class(old), size_class(new));
    let last = start + old == ARENA_NEXT.load(Relaxed);
    let fits = new <= MAX_SMALL && old < block && start + block <= ARENA_END.load(Relaxed);
    if last && fits {
        ARENA_NEXT.store(start + block, Relaxed);
    }
    last && fits
}

/// Takes a block back. Small blocks from before this arena are left as they are: their pages stay shared.
///
/// # Safety
/// The block must have been given out for this layout.
#[inline]
unsafe fn give_block(ptr: *mut u8, layout: Layout) {
    if in_arena(ptr) {
        let (class, _) = size_class(layout.size());
        // SAFETY: the block is unused from now on and has room for an address: the smallest has 16 bytes.
        unsafe { *ptr.cast::<usize>() = FREE_BLOCKS[class].load(Relaxed) };
        FREE_BLOCKS[class].store(ptr as usize, Relaxed);
    } else if layout.size() > MAX_SMALL || layout.align() > 16 || ARENA_START.load(Relaxed) == 0 {
        // SAFETY: blocks outside the arena are mimalloc's.
        unsafe { mimalloc::MiMalloc.dealloc(ptr, layout) };
    }
}

// SAFETY: blocks are mimalloc's, passed on unchanged, or a child's arena's, which are aligned to 16 bytes, large enough for
// their layout, and in use once at a time.
unsafe impl GlobalAlloc for CountingAllocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_worker() {
            grow(layout.size());
            if let Some((block, _)) = take_block(layout) {
                return block;
            }
        }
        // SAFETY: the caller's contract is mimalloc's.
        unsafe { mimalloc::MiMalloc.alloc(layout) }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_worker() {
            grow(layout.size());
            if let Some((block, fresh)) = take_block(layout) {
                if !fresh {
                    // SAFETY: the block has at least this size.
                    unsafe { block.write_bytes(0, layout.size()) };
                }
                return block;
            }
        }
        // SAFETY: the caller's contract is mimalloc's.
        unsafe { mimalloc::MiMalloc.alloc_zeroed(layout) }
    }

    #[inline]
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if is_worker() {
            shrink(layout.size());
            // SAFETY: the caller's contract.
            return unsafe { give_block(ptr, layout) };
        }
        // SAFETY: the caller's contract is mimalloc's.
        unsafe { mimalloc::MiMalloc.dealloc(ptr, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let small = layout.size().min(size) <= MAX_SMALL && ARENA_START.load(Relaxed) != 0;
        if !is_worker() {
            // SAFETY: the caller's contract is mimalloc's.
            return unsafe { mimalloc::MiMalloc.realloc(ptr, layout, size) };
        }
        if !small {
            grow(size.saturating_sub(layout.size()));
            shrink(layout.size().saturating_sub(size));
            // SAFETY: without an arena, or with both sizes above its blocks', the block is mimalloc's.
            return unsafe { mimalloc::MiMalloc.realloc(ptr, layout, size) };
        }
        if in_arena(ptr) && size <= MAX_SMALL && size_class(size) == size_class(layout.size()) {
            grow(size.saturating_sub(layout.size()));
            shrink(layout.size().saturating_sub(size));
            return ptr;
        }
        if in_arena(ptr) && extend_last(ptr, layout.size(), size) {
            grow(size.saturating_sub(layout.size()));
            return ptr;
        }
        // SAFETY: the new layout is valid as the caller promises; both blocks hold the bytes that are copied.
        unsafe {
            let block = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !block.is_null() {
                std::ptr::copy_nonoverlapping(ptr, block, layout.size().min(size));
                self.dealloc(ptr, layout);
            }
            block
        }
    }
}

/// From now on small blocks of this process come from a fresh arena of so many bytes of address space; with `huge` of huge
/// pages, which a fork shares in one page table entry each. For processes of one thread. False when there is no room.
pub fn start_arena(len: usize, huge: bool) -> bool {
    let (len, flags) = (len + HUGE_PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice; advice does not change contents.
    let start = unsafe {
        let start = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return false;
        }
        libc::madvise(start, len, if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE });
        start as usize
    };
    FREE_BLOCKS.iter().for_each(|first| first.store(0, Relaxed));
    ARENA_START.store(start, Relaxed);
    ARENA_NEXT.store(if huge { start.next_multiple_of(HUGE_PAGE) } else { start }, Relaxed);
    ARENA_END.store(start + len, Relaxed);
    COUNTING.store(true, Relaxed);
    true
}

/// Lets this process allocate so many bytes more, from an arena where there is address space for one. For children: the
/// process ends when it asks for more.
pub fn set_memory_budget(bytes: usize) {
    if start_arena(bytes.saturating_mul(2).saturating_add(ARENA_SLACK), false) {
        let start = ARENA_START.load(Relaxed) as *mut libc::c_void;
        // SAFETY: the range is the new mapping's own; mapping its pages at once changes no contents.
        unsafe { libc::madvise(start, ARENA_FIRST, libc::MADV_POPULATE_WRITE) };
    }
    COUNTING.store(true, Relaxed);
    LIVE_BYTES.store(0, Relaxed);
    PEAK_BYTES.store(0, Relaxed);
    BUDGET_BYTES.store(bytes, Relaxed);
}

/// Maps the part of the stack that every program uses, at once. For children, whose stack is their zygote's until they write
/// to it.
pub fn map_stack() {
    let here = 0u8;
    let top = (&raw const here as usize).next_multiple_of(4096);
    // SAFETY: the pages are the stack's; mapping them changes no contents, and what lies below the stack is refused.
    unsafe { libc::madvise((top - STACK_FIRST) as *mut libc::c_void, STACK_FIRST, libc::MADV_POPULATE_WRITE) };
}

/// Most bytes that were allocated at once since the budget was set.
pub fn memory_peak() -> usize {
    PEAK_BYTES.load(Relaxed)
}

/// Ends the process without running anything else of it.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: `_exit` takes any status and does not return.
    unsafe { libc::_exit(status) }
}

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes `to` mean what `from` means.
///
/// # Errors
/// When `from` is not open.
pub fn duplicate(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: dup2 works on numbers; the descriptors replaced here belong to this module's own plan (0 to 4).
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

/// Waits for a child for so long: how it ended and its CPU time in microseconds, or `None` while it runs. Signal SIGCHLD
/// must be blocked, as [`reset_signals`] leaves it.
///
/// # Errors
/// When there is no such child.
pub fn wait_for(pid: i32, limit: Option<Duration>) -> io::Result<Option<(Ending, u64)>> {
    let deadline = limit.map(|l| Instant::now() + l);
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    loop {
        if let Some(deadline) = deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = libc::timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            // SAFETY: set and time are read during the call only; no information is asked for.
            unsafe { libc::sigtimedwait(&signal_set(libc::SIGCHLD), std::ptr::null_mut(), &left) };
        }
        let flags = if deadline.is_some() { libc::WNOHANG } else { 0 };
        // SAFETY: both pointers are to memory of the right type.
        let found = check(i64::from(unsafe { libc::wait4(pid, &mut status, flags, usage.as_mut_ptr()) }))?;
        if found != 0 {
            break;
        }
        if deadline.is_some_and(|d| Instant::now() >= d) {
            return Ok(None);
        }
    }
    // SAFETY: zeroed rusage is valid, and wait4 has filled it.
    let usage = unsafe { usage.assume_init() };
    let micros = |t: libc::timeval| t.tv_sec as u64 * 1_000_000 + t.tv_usec as u64;
    let ending = if libc::WIFSIGNALED(status) {
        Ending::Killed(libc::WTERMSIG(status))
    } else {
        Ending::Exited(libc::WEXITSTATUS(status))
    };
    Ok(Some((ending, micros(usage.ru_utime) + micros(usage.ru_stime))))
}

fn signal_set(signal: i32) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: sigemptyset makes the set valid, sigaddset changes it.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        set.assume_init()
    }
}

/// Gives every signal its default effect and blocks only SIGCHLD: whoever started this process may have left timers'
/// signals ignored or blocked.
pub fn reset_signals() {
    for signal in 1..=libc::SIGSYS {
        // SAFETY: the default action is no handler of this process; the two that cannot be changed give an error.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set is read during the call only.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &signal_set(libc::SIGCHLD), std::ptr::null_mut()) };
}

/// Memory that a zygote shares with its children: a child leaves its results here.
pub struct Slot {
    start: *mut u8,
    capacity: usize,
}

impl Slot {
    /// A slot for so many bytes of results.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(capacity: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), SLOT_HEADER + capacity, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Slot { start: start.cast(), capacity })
        }
    }

    /// One of the two numbers at the slot's start.
    fn number(&self, which: usize) -> &AtomicU64 {
        // SAFETY: the mapping is page-aligned, lives as long as the process, and holds two such numbers at its start.
        unsafe { &*self.start.cast::<AtomicU64>().add(which) }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.number(0).store(0, Relaxed);
        self.number(1).store(0, Relaxed);
    }

    /// Length of the results so far, in bytes; a child may have written anything there.
    pub fn len(&self) -> usize {
        (self.number(0).load(Acquire) as usize).min(self.capacity)
    }

    /// Whether there are no results.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds results, with the memory peak so far; false when they do not fit.
    pub fn append(&self, bytes: &[u8], peak: usize) -> bool {
        let len = self.len();
        if bytes.len() > self.capacity - len {
            return false;
        }
        // SAFETY: the range was just checked to lie inside the mapping; the zygote reads it only when this process is gone.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(SLOT_HEADER + len), bytes.len()) };
        self.number(1).store(peak as u64, Relaxed);
        self.number(0).store((len + bytes.len()) as u64, Release);
        true
    }

    /// The results and the memory peak. Only when no child lives.
    pub fn take(&self) -> (Vec<u8>, u64) {
        let mut bytes = vec![0; self.len()];
        // SAFETY: the length is at most the capacity, and nobody else has the mapping by now.
        unsafe { std::ptr::copy_nonoverlapping(self.start.add(SLOT_HEADER), bytes.as_mut_ptr(), bytes.len()) };
        (bytes, self.number(1).load(Relaxed))
    }
}

/// Kills a child.
pub fn kill(pid: i32) {
    // SAFETY: kill takes any numbers; the child is not yet reaped, so its number is its own.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Waits until a descriptor can be read (or its other side is closed); false after the timeout. A signal that this
/// thread handles does not end the wait.
pub fn wait_readable(fd: &impl AsRawFd, timeout: Duration) -> bool {
    let start = Instant::now();
    loop {
        let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let left = timeout.saturating_sub(start.elapsed());
        let millis = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
        // SAFETY: one pollfd, and its count is one.
        let ready = unsafe { libc::poll(&mut poll, 1, millis) };
        if ready > 0 {
            return true;
        }
        if ready == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return false;
        }
    }
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

/// Lowers limits for good; one that is lower already stays.
fn set_limits(limits: &[(libc::__rlimit_resource_t, u64)]) -> io::Result<()> {
    for (resource, value) in limits {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the limit is written and read during the calls only.
        unsafe {
            check(i64::from(libc::getrlimit(*resource, &raw mut limit)))?;
            let value = (*value).min(limit.rlim_max);
            limit = libc::rlimit { rlim_cur: value, rlim_max: value };
            check(i64::from(libc::setrlimit(*resource, &limit)))?;
        }
    }
    Ok(())
}

/// How far this process's stack may grow: always the same, whatever the shell's limit, as how deep a program can go is part
/// of its verdict. A thousand levels of calls through native code fit, and the kernel leaves twice as much room.
///
/// # Errors
/// When the limit cannot be asked for or set.
pub fn set_stack() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit is written and read during the calls only.
    unsafe {
        check(i64::from(libc::getrlimit(libc::RLIMIT_STACK, &raw mut limit)))?;
        limit.rlim_cur = STACK_BYTES.min(limit.rlim_max);
        check(i64::from(libc::setrlimit(libc::RLIMIT_STACK, &limit))).map(drop)
    }
}

/// Limits of a zygote and so of its children, as a second line behind budget and filters: address space, files, core
/// dumps, locked memory.
///
/// # Errors
/// When a limit cannot be set.
pub fn set_rlimits() -> io::Result<()> {
    set_limits(&[
        (libc::RLIMIT_AS, RLIMIT_AS_BYTES),
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_FSIZE, 0),
        (libc::RLIMIT_MEMLOCK, 0),
        (libc::RLIMIT_MSGQUEUE, 0),
    ])
}

/// Further limits of a child: no process of its own, no new descriptor, CPU time.
///
/// # Errors
/// When a limit cannot be set.
pub fn set_child_rlimits() -> io::Result<()> {
    set_limits(&[(libc::RLIMIT_NPROC, 0), (libc::RLIMIT_NOFILE, 0), (libc::RLIMIT_CPU, MAX_CPU_S)])
}

/// Gives up every capability for good. For an ordinary user this changes nothing.
///
/// # Errors
/// When the kernel refuses, which it has no reason to.
pub fn drop_capabilities() -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 capabilities each.
    const VERSION: u32 = 0x2008_0522;
    let (header, none) = ([VERSION, 0], [0u32; 6]);
    // SAFETY: header and sets have the layout of that version and are read during the call only.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) }).map(drop)
}

/// No set-user-id program will give this process or its children more rights.
///
/// # Errors
/// When the kernel is older than 3.5.
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: prctl with constant arguments.
    check(i64::from(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })).map(drop)
}

/// The kernel's Landlock version, if it has Landlock.
pub fn landlock_version() -> Option<u32> {
    // SAFETY: with this flag the call only returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, 1) };
    u32::try_from(version).ok().filter(|v| *v > 0)
}

/// Enters a Landlock domain that allows nothing: no file, and as far as the kernel's version goes no TCP and no signal or
/// abstract socket to the outside. What an older version lacks, the filters deny as well. Returns what is denied.
///
/// # Errors
/// In one line, when the kernel has no Landlock.
pub fn enter_landlock() -> Result<String, String> {
    let enter = || {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V5))?
            .handle_access(AccessNet::from_all(ABI::V4))?
            .scope(Scope::from_all(ABI::V6))?
            .create()?
            .restrict_self()
    };
    let version = landlock_version().ok_or("the kernel has no Landlock")?;
    match enter() {
        Ok(status) if status.ruleset != RulesetStatus::NotEnforced => {
            let tcp = if version >= 4 { ", TCP" } else { "" };
            let scopes = if version >= 6 { ", signals and abstract sockets to the outside" } else { "" };
            Ok(format!("version {version}: denies files{tcp}{scopes}"))
        }
        Ok(_) => Err("the kernel does not enforce Landlock".to_owned()),
        Err(e) => Err(format!("Landlock: {e}")),
    }
}

/// Puts this process behind a filter for good.
///
/// # Errors
/// In one line, when the kernel refuses.
pub fn apply_filter(filter: &BpfProgram) -> Result<(), String> {
    seccompiler::apply_filter(filter).map_err(|e| format!("seccomp: {e}"))
}

/// A mapping of this process: where, rights as `rwxp`, and what it is.
struct Mapping {
    start: usize,
    end: usize,
    rights: String,
    name: String,
}

fn mappings() -> Vec<Mapping> {
    let read = |line: &str| -> Option<Mapping> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let number = |s| usize::from_str_radix(s, 16).ok();
        let rights = words.next()?.to_owned();
        let name = words.nth(3).unwrap_or("").to_owned();
        Some(Mapping { start: number(start)?, end: number(end)?, rights, name })
    };
    std::fs::read_to_string("/proc/self/maps").unwrap_or_default().lines().filter_map(read).collect()
}

/// Moves this executable's machine code and constants to anonymous huge pages. A fork shares those in a few page table
/// entries, while small pages are copied one by one, and mappings of files cost a child one fault per 16 pages that it runs
/// through. Where the kernel has no huge pages or forbids such a mapping, everything stays as it was.
///
/// For single-threaded processes that have not entered the filters yet.
pub fn code_to_huge_pages() {
    let here = code_to_huge_pages as *const () as usize;
    let all = mappings();
    let Some(code) = all.iter().find(|m| (m.start..m.end).contains(&here) && m.rights == "r-xp") else { return };
    for mapping in all.iter().filter(|m| m.name == code.name && ["r-xp", "r--p"].contains(&m.rights.as_str())) {
        // The linker lets segments begin at a huge page; a last one that is not full is filled up where nothing follows.
        let (start, end) = (mapping.start.next_multiple_of(HUGE_PAGE), mapping.end.next_multiple_of(HUGE_PAGE));
        let free = !all.iter().any(|m| (mapping.end..end).contains(&m.start));
        let end = if free { end } else { end - HUGE_PAGE };
        if start < end {
            to_huge_pages(start, mapping.end.min(end) - start, end - start, mapping.rights == "r-xp");
        }
    }
}

/// Puts huge pages with the same bytes in the place of `len` bytes at `start`, and zeroes up to `huge_len`.
fn to_huge_pages(start: usize, len: usize, huge_len: usize, executable: bool) {
    let room_len = huge_len + HUGE_PAGE;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the copy is made in a fresh mapping large enough for it, and put in the original's place in one step; nothing
    // else lies there, and the bytes are the same, so that this very code runs on.
    unsafe {
        let room = libc::mmap(std::ptr::null_mut(), room_len, protection, flags, -1, 0);
        if room == libc::MAP_FAILED {
            return;
        }
        let copy = (room as usize).next_multiple_of(HUGE_PAGE);
        libc::madvise(room, room_len, libc::MADV_HUGEPAGE);
        std::ptr::copy_nonoverlapping(start as *const u8, copy as *mut u8, len);
        let pages = copy as *mut libc::c_void;
        let protection = libc::PROT_READ | if executable { libc::PROT_EXEC } else { 0 };
        if libc::mprotect(pages, huge_len, protection) == 0 {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            libc::mremap(pages, huge_len, huge_len, flags, start as *mut libc::c_void);
        } else {
            libc::munmap(pages, huge_len);
        }
        libc::munmap(room, copy - room as usize);
        let end = copy + huge_len;
        libc::munmap(end as *mut libc::c_void, room as usize + room_len - end);
    }
}

/// New memory of this process and its children comes in small pages: a child that needs a little would otherwise have
/// two MiB cleared for it. Huge pages that are there stay: a fork shares each in one page table entry. For processes that
/// have not entered the filters yet.
pub fn no_new_huge_pages() {
    for mapping in mappings().iter().filter(|m| m.rights == "rw-p" && (m.name.is_empty() || m.name.starts_with('['))) {
        // SAFETY: advice does not change contents.
        unsafe {
            libc::madvise(mapping.start as *mut libc::c_void, mapping.end - mapping.start, libc::MADV_NOHUGEPAGE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_classes_are_large_enough_and_not_much_larger() {
        let mut last = (0, 0);
        for size in 0..=MAX_SMALL {
            let (class, block) = size_class(size);
            assert!(block >= size.max(16) && block % 16 == 0 && class < FREE_BLOCKS.len(), "{size}");
            assert!(block <= size + 16 || block <= size + size / 4, "{size}");
            assert!((class, block) == last || (class > last.0 || last.1 == 0) && block > last.1, "{size}");
            assert_eq!(size_class(block), (class, block), "a block serves its own size");
            last = (class, block);
        }
    }

    #[test]
    fn a_signal_does_not_end_a_wait() {
        let seen = std::sync::Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(libc::SIGUSR1, seen.clone()).expect("a handler");
        let (reader, mut writer) = io::pipe().expect("a pipe");
        let (tell, told) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            // SAFETY: asks for the calling thread.
            tell.send(unsafe { libc::pthread_self() }).expect("the other side listens");
            wait_readable(&reader, Duration::from_secs(60))
        });
        let thread = told.recv().expect("the thread runs");
        for _ in 0..50 {
            // SAFETY: the thread has not been joined.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(seen.load(Acquire), "signals arrived");
        io::Write::write_all(&mut writer, b"x").expect("written");
        assert!(waiter.join().expect("no panic"), "the wait went on until there was something");
        let (reader, _writer) = io::pipe().expect("a pipe");
        assert!(!wait_readable(&reader, Duration::from_millis(1)), "and it ends in time");
    }
}
