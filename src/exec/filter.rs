//! Which system calls a worker may make, as seccomp filters.
//!
//! A zygote's filter holds for its children too; theirs comes on top and leaves them nothing but their memory. Both are
//! allow-lists: a call that is not here ends the process.

use seccompiler::{BpfProgram, sock_filter};

/// `prctl` option by which the allocator names its mappings.
const PR_SET_VMA: u32 = 0x5356_4d41;

/// What an argument of a system call must be, by its position; the low 32 bits, which are all that these arguments have.
#[derive(Clone, Copy)]
enum Must {
    BeAtMost(u32, u32),
    Equal(u32, u32),
    Have(u32, u32),
    Lack(u32, u32),
}

/// Stands for the number of the process that a filter is for, until [`of_process`] puts it in.
const OWN: u32 = u32::MAX;

/// A child's filter for the process with this number.
pub fn of_process(filter: &BpfProgram, pid: u32) -> BpfProgram {
    filter.iter().map(|step| sock_filter { k: if step.k == OWN { pid } else { step.k }, ..step.clone() }).collect()
}

/// The allow-list of a child, or of a zygote, which besides makes and reaps children. Anything else kills the process.
///
/// # Errors
/// In one line, on an architecture that has no filter.
pub fn filter(zygote: bool) -> Result<BpfProgram, String> {
    use Must::{BeAtMost, Equal, Have, Lack};
    // Memory, time, randomness, ending. Nothing here can wait: a child of one thread has nobody to wait for.
    let free = [
        libc::SYS_brk,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_exit_group,
        libc::SYS_exit,
        libc::SYS_getrandom,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigprocmask,
        libc::SYS_sigaltstack,
        libc::SYS_clock_gettime,
        libc::SYS_gettid,
        libc::SYS_getpid,
        libc::SYS_restart_syscall,
    ];
    let zygotes = [
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_futex,
        libc::SYS_wait4,
        libc::SYS_rt_sigtimedwait,
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
        libc::SYS_setitimer,
        libc::SYS_getppid,
    ];
    let (exec, anonymous) = (libc::PROT_EXEC as u32, libc::MAP_ANONYMOUS as u32);
    let abort = Equal(2, libc::SIGABRT as u32);
    let bound: [(i64, &[Must]); 5] = [
        // What programs print goes to /dev/null.
        (libc::SYS_write, &[BeAtMost(0, 2)]),
        (libc::SYS_mmap, &[Lack(2, exec), Have(3, anonymous)]),
        (libc::SYS_mprotect, &[Lack(2, exec)]),
        (libc::SYS_prctl, &[Equal(0, PR_SET_VMA)]),
        // A child's abort() is its own. What a zygote may do holds for its children, too, whose numbers it cannot know.
        (libc::SYS_tgkill, &[abort, if zygote { abort } else { Equal(0, OWN) }]),
    ];
    let mut rules: Vec<(i64, &[Must])> = free.iter().map(|call| (*call, &[][..])).collect();
    if zygote {
        rules.extend(zygotes.iter().map(|call| (*call, &[][..])));
    }
    rules.extend(bound.iter().filter(|(call, _)| !zygote || !zygotes.contains(call)));
    compile(&rules)
}

/// A filter as short as it can be, since the kernel compiles it anew for each child: one comparison per call, then the
/// checks of arguments, then the two ends. Calls of other architectures, and of the 32-bit and x32 tables, find no rule.
fn compile(rules: &[(i64, &[Must])]) -> Result<BpfProgram, String> {
    let arch: u32 = match std::env::consts::ARCH {
        "x86_64" => 0xc000_003e,
        "aarch64" => 0xc000_00b7,
        "riscv64" => 0xc000_00f3,
        other => return Err(format!("seccomp: there is no filter for {other}")),
    };
    let step =
        |code: u32, jt: usize, jf: usize, k: u32| sock_filter { code: code as u16, jt: jt as u8, jf: jf as u8, k };
    // Offsets in `struct seccomp_data`: number 0, architecture 4, arguments from 16 on, each of 8 bytes, low half first.
    let load = |offset: u32| step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let jump = |op: u32, k: u32, jt: usize, jf: usize| step(libc::BPF_JMP | op | libc::BPF_K, jt, jf, k);
    let end = |k: u32| step(libc::BPF_RET | libc::BPF_K, 0, 0, k);
    let checks: usize = rules.iter().map(|(_, musts)| 2 * musts.len()).sum();
    let kill = 4 + rules.len() + 1 + checks;
    let (allow, mut block) = (kill + 1, 4 + rules.len() + 1);
    if allow > usize::from(u8::MAX) {
        return Err("seccomp: the filter is too long".to_owned());
    }
    let mut program = vec![load(4), jump(libc::BPF_JEQ, arch, 1, 0), end(libc::SECCOMP_RET_KILL_PROCESS), load(0)];
    for (call, musts) in rules {
        let to = if musts.is_empty() { allow } else { block };
        block += 2 * musts.len();
        program.push(jump(libc::BPF_JEQ, *call as u32, to - program.len() - 1, 0));
    }
    program.push(end(libc::SECCOMP_RET_KILL_PROCESS));
    for (_, musts) in rules {
        for (i, must) in musts.iter().enumerate() {
            let (arg, op, k, wanted) = match *must {
                Must::BeAtMost(arg, k) => (arg, libc::BPF_JGT, k, false),
                Must::Equal(arg, k) => (arg, libc::BPF_JEQ, k, true),
                Must::Have(arg, k) => (arg, libc::BPF_JSET, k, true),
                Must::Lack(arg, k) => (arg, libc::BPF_JSET, k, false),
            };
            program.push(load(16 + 8 * arg));
            let next = program.len() + 1;
            let (good, bad) = (if i + 1 == musts.len() { allow - next } else { 0 }, kill - next);
            let (jt, jf) = if wanted { (good, bad) } else { (bad, good) };
            program.push(jump(op, k, jt, jf));
        }
    }
    program.extend([end(libc::SECCOMP_RET_KILL_PROCESS), end(libc::SECCOMP_RET_ALLOW)]);
    Ok(program)
}
