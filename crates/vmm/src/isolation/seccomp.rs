//! System call filters: one per kind of thread. A call that is not on a thread's list is not done and ends the process by
//! SIGSYS, which says first what it was ([`crate::last_words`]). A thread that blocks or ignores the signal is killed.
//!
//! ```text
//! main/control  (all threads inherit it)  files by descriptor, KVM set-up, threads; no exec, no ptrace, no root
//!   +-- vcpu    KVM_RUN and vCPU state, queue notifications, device (de)activation; no open, no socket, no thread
//!   +-- io      epoll, data transfer, unix sockets for vsock; no open, no thread, no KVM_RUN
//! ```
//! Filters stack: a vCPU thread's calls pass both its own filter and the one that it inherited, so the main list
//! contains the others. ioctl is limited by request number (type and number; for KVM numbers that mean two things,
//! by the whole request), mmap and mprotect to memory that cannot be executed, socket to unix sockets, tgkill to
//! our own threads. A process that may be neither patched with code nor replaced by exec keeps to the code it has.
//!
//! `STEADFAST_SECCOMP=log` only reports (kernel log, audit type 1326), to find what a list lacks; `off` switches
//! filters off. Both say so at start. Source: seccomp(2); lists found by reading the code and by running pulse.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use steadfast_machine::machine::ThreadHooks;

/// What happens to a forbidden call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeccompMode {
    /// The process ends by SIGSYS, saying which call it was.
    #[default]
    Enforce,
    /// The kernel logs the call and lets it pass.
    Log,
    /// There are no filters.
    Off,
}

impl SeccompMode {
    /// Reads `STEADFAST_SECCOMP`: unset or `on`, `log`, `off`.
    ///
    /// # Errors
    /// What would be right; a typo must not switch filters off.
    pub fn from_env() -> Result<Self, String> {
        match std::env::var("STEADFAST_SECCOMP").as_deref() {
            Err(std::env::VarError::NotPresent) | Ok("on") => Ok(Self::Enforce),
            Ok("log") => Ok(Self::Log),
            Ok("off") => Ok(Self::Off),
            Ok(other) => Err(format!("STEADFAST_SECCOMP={other}: use on, log or off")),
            Err(e) => Err(format!("STEADFAST_SECCOMP: {e}")),
        }
    }
}

/// A filter that cannot be made or set.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// A list is wrong.
    #[error("system call filter {0}: {1}; report this, and start with STEADFAST_SECCOMP=off meanwhile")]
    Build(Kind, seccompiler::BackendError),
    /// The kernel refuses it.
    #[error(
        "the kernel refuses the system call filter {0}: {1}; it needs CONFIG_SECCOMP_FILTER, or STEADFAST_SECCOMP=off"
    )]
    Apply(Kind, seccompiler::Error),
}

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The main loop, the control socket and disk workers; inherited by all others.
    Main,
    /// A vCPU.
    Vcpu,
    /// A device I/O thread.
    Io,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Io => "io",
        })
    }
}

/// The filters, compiled before any thread needs one.
pub struct Filters {
    main: BpfProgram,
    vcpu: Arc<BpfProgram>,
    io: Arc<BpfProgram>,
}

impl Filters {
    /// Compiles the filters; none for [`SeccompMode::Off`].
    ///
    /// # Errors
    /// [`SeccompError::Build`].
    pub fn new(mode: SeccompMode) -> Result<Option<Self>, SeccompError> {
        let otherwise = match mode {
            SeccompMode::Enforce => SeccompAction::Trap,
            SeccompMode::Log => SeccompAction::Log,
            SeccompMode::Off => {
                tracing::warn!(
                    "STEADFAST_SECCOMP=off: a monitor that is taken over may call anything of the kernel"
                );
                return Ok(None);
            }
        };
        if mode == SeccompMode::Log {
            tracing::warn!(
                "STEADFAST_SECCOMP=log: forbidden system calls are only reported in the kernel's log"
            );
        }
        let build = |kind| compile(kind, otherwise.clone()).map_err(|e| SeccompError::Build(kind, e));
        Ok(Some(Self {
            main: build(Kind::Main)?,
            vcpu: Arc::new(build(Kind::Vcpu)?),
            io: Arc::new(build(Kind::Io)?),
        }))
    }

    /// Puts the main filter on every thread that the process has, and so on all it will have.
    ///
    /// # Errors
    /// [`SeccompError::Apply`].
    pub fn confine_process(&self) -> Result<(), SeccompError> {
        tracing::info!(
            main = self.main.len(),
            vcpu = self.vcpu.len(),
            io = self.io.len(),
            "system call filters, in BPF instructions"
        );
        seccompiler::apply_filter_all_threads(&self.main).map_err(|e| SeccompError::Apply(Kind::Main, e))
    }

    /// Hooks that put each thread's own filter on it, and then run `then`.
    #[must_use]
    pub fn hooks(&self, then: &ThreadHooks) -> ThreadHooks {
        let (vcpu, io) = (Arc::clone(&self.vcpu), Arc::clone(&self.io));
        let (vcpu_then, io_then) = (Arc::clone(&then.vcpu), Arc::clone(&then.io));
        ThreadHooks {
            vcpu: Arc::new(move |index| {
                apply_or_end(Kind::Vcpu, &vcpu);
                vcpu_then(index);
            }),
            io: Arc::new(move |name| {
                apply_or_end(Kind::Io, &io);
                io_then(name);
            }),
        }
    }
}

/// A thread that cannot be confined must not meet the guest: the VM ends before it has run.
fn apply_or_end(kind: Kind, filter: &BpfProgram) {
    if let Err(error) = seccompiler::apply_filter(filter) {
        tracing::error!(%error, %kind, "a thread cannot be confined: the VM ends");
        crate::last_words::said();
        std::process::exit(1);
    }
}

/// What may be called of one system call.
enum Rule {
    /// Anything.
    Any(&'static [i64]),
    /// Only if argument `.1` has, in the bits `.2`, the value `.3`.
    Bits(i64, u8, u64, u64),
}
use Rule::{Any, Bits};

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// Of every thread: memory, locks, time, its end, its log.
const COMMON: &[Rule] = &[
    Any(&[
        libc::SYS_brk,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_close,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_futex,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_gettimeofday,
        libc::SYS_madvise,
        libc::SYS_munmap,
        libc::SYS_nanosleep,
        libc::SYS_read,
        libc::SYS_restart_syscall,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_yield,
        libc::SYS_sigaltstack,
        libc::SYS_write,
        libc::SYS_writev,
    ]),
    Bits(libc::SYS_mmap, 2, PROT_EXEC, 0),
    Bits(libc::SYS_mprotect, 2, PROT_EXEC, 0),
    // The C library, at moments of its own choosing (seen: once per process, on whatever thread is first): it reads
    // files of /sys and /proc that anybody may read, and asks about itself. This user can open nothing else.
    Bits(libc::SYS_open, 1, READ_ONLY, 0),
    // Without privileges, and with no_new_privs set, nothing that prctl can change widens what this process may do.
    Any(&[libc::SYS_prctl]),
    // Growing and moving a heap block; the protection stays.
    Any(&[libc::SYS_mremap]),
];

/// Of a thread that (de)activates devices: a vCPU's MMIO write may do that as well as an I/O thread.
const DEVICES: &[Rule] = &[Any(&[
    libc::SYS_dup,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_getsockopt,
    libc::SYS_io_uring_enter,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
])];

/// Type and number of an ioctl, without size and direction.
const NUMBER: u64 = 0xffff;
const WHOLE: u64 = 0xffff_ffff;
/// Bits of open flags that are clear in one that only reads.
const READ_ONLY: u64 = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;

/// `(request, bits)`; the most frequent first.
type Ioctls = &'static [(u64, u64)];

const fn kvm(nr: u64) -> (u64, u64) {
    (0xae00 | nr, NUMBER)
}

const KVM_RUN: (u64, u64) = (0xae80, WHOLE);

/// A vCPU's state, as its own thread saves it.
const IOCTLS_VCPU: Ioctls = &[
    kvm(0x81),       // GET_REGS
    kvm(0x83),       // GET_SREGS
    kvm(0x88),       // GET_MSRS
    kvm(0x8c),       // GET_FPU
    kvm(0x8e),       // GET_LAPIC
    kvm(0x91),       // GET_CPUID2
    kvm(0x98),       // GET_MP_STATE
    kvm(0x9f),       // GET_VCPU_EVENTS
    kvm(0xa1),       // GET_DEBUGREGS
    (0xaea3, WHOLE), // GET_TSC_KHZ
    kvm(0xa4),       // GET_XSAVE
    kvm(0xa6),       // GET_XCRS
    kvm(0xad),       // KVMCLOCK_CTRL
    kvm(0xcc),       // GET_SREGS2
    kvm(0xcf),       // GET_XSAVE2
    kvm(0xe3),       // HAS_DEVICE_ATTR (TSC offset)
    kvm(0xe2),       // GET_DEVICE_ATTR
];

/// Interrupts and doorbells, as a device's (de)activation sets them.
const IOCTLS_DEVICE: Ioctls = &[
    kvm(0x61),            // IRQ_LINE
    kvm(0x6a),            // SET_GSI_ROUTING
    kvm(0x76),            // IRQFD
    kvm(0x79),            // IOEVENTFD
    (0x4020_aea5, WHOLE), // SIGNAL_MSI
    kvm(0xc7),            // RESET_DIRTY_RINGS
    (0x4004_54d0, WHOLE), // TUNSETOFFLOAD
    (0x5421, WHOLE),      // FIONBIO
];

/// Making a machine, giving it state, tracking its memory; the terminal; TAPs that are open already.
const IOCTLS_MAIN: Ioctls = &[
    kvm(0x00),            // GET_API_VERSION
    kvm(0x01),            // CREATE_VM
    kvm(0x02),            // GET_MSR_INDEX_LIST
    kvm(0x03),            // CHECK_EXTENSION
    kvm(0x04),            // GET_VCPU_MMAP_SIZE
    kvm(0x05),            // GET_SUPPORTED_CPUID
    kvm(0x0a),            // GET_MSR_FEATURE_INDEX_LIST
    kvm(0x41),            // CREATE_VCPU
    kvm(0x42),            // GET_DIRTY_LOG
    kvm(0x46),            // SET_USER_MEMORY_REGION
    kvm(0x47),            // SET_TSS_ADDR
    kvm(0x48),            // SET_IDENTITY_MAP_ADDR
    kvm(0x49),            // SET_USER_MEMORY_REGION2
    kvm(0x60),            // CREATE_IRQCHIP
    kvm(0x62),            // GET_IRQCHIP
    kvm(0x63),            // SET_IRQCHIP
    kvm(0x77),            // CREATE_PIT2
    kvm(0x7b),            // SET_CLOCK
    kvm(0x7c),            // GET_CLOCK
    kvm(0x82),            // SET_REGS
    kvm(0x84),            // SET_SREGS
    kvm(0x89),            // SET_MSRS
    kvm(0x8d),            // SET_FPU
    kvm(0x8f),            // SET_LAPIC
    kvm(0x90),            // SET_CPUID2
    kvm(0x99),            // SET_MP_STATE
    kvm(0xa0),            // SET_VCPU_EVENTS, SET_PIT2
    kvm(0xa2),            // SET_DEBUGREGS, SET_TSC_KHZ
    kvm(0xa3),            // ENABLE_CAP
    kvm(0xa5),            // SET_XSAVE
    kvm(0xa7),            // SET_XCRS
    kvm(0xc0),            // CLEAR_DIRTY_LOG
    kvm(0xcd),            // SET_SREGS2
    kvm(0xe1),            // SET_DEVICE_ATTR
    (0x5401, WHOLE),      // TCGETS
    (0x5402, WHOLE),      // TCSETS
    (0x802c_542a, WHOLE), // TCGETS2
    (0x402c_542b, WHOLE), // TCSETS2
    (0x5413, WHOLE),      // TIOCGWINSZ
    (0x5451, WHOLE),      // FIOCLEX
    (0x1268, WHOLE),      // BLKSSZGET
    (0x8008_1272, WHOLE), // BLKGETSIZE64
    (0x8004_54d2, WHOLE), // TUNGETIFF
    (0x4004_54d8, WHOLE), // TUNSETVNETHDRSZ
];

/// Of an I/O thread: waiting, and the host's side of vsock.
const IO: &[Rule] = &[
    Any(&[
        libc::SYS_accept4,
        libc::SYS_connect,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_wait,
        libc::SYS_io_uring_register,
        libc::SYS_setsockopt,
    ]),
    Bits(libc::SYS_socket, 0, WHOLE, libc::AF_UNIX as u64),
];

/// Of the main thread and what it starts: files (as a user who may open almost nothing), threads, a new machine
/// after a guest's reset.
const MAIN: &[Rule] = &[
    Any(&[
        // Argument structures cannot be filtered; a new process would be as confined as this one.
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_epoll_create1,
        libc::SYS_flock,
        libc::SYS_fstat,
        libc::SYS_ftruncate,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_io_uring_setup,
        libc::SYS_lseek,
        libc::SYS_memfd_create,
        libc::SYS_newfstatat,
        libc::SYS_openat,
        libc::SYS_prlimit64,
        libc::SYS_rename,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        libc::SYS_set_robust_list,
        libc::SYS_statx,
        libc::SYS_sysinfo,
        libc::SYS_unlink,
    ]),
    // A thread adds its own, stricter filter.
    Any(&[libc::SYS_seccomp]),
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn when(arg: u8, bits: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = SeccompCondition::new(arg, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits), value)?;
    SeccompRule::new(vec![condition])
}

fn add(rules: &mut Rules, list: &[Rule]) -> Result<(), seccompiler::BackendError> {
    for rule in list {
        match *rule {
            Any(calls) => calls.iter().for_each(|&call| {
                rules.insert(call, Vec::new());
            }),
            Bits(call, arg, bits, value) => rules.entry(call).or_default().push(when(arg, bits, value)?),
        }
    }
    Ok(())
}

fn compile(kind: Kind, otherwise: SeccompAction) -> Result<BpfProgram, seccompiler::BackendError> {
    let (lists, ioctls): (&[&[Rule]], Vec<Ioctls>) = match kind {
        Kind::Main => (
            &[COMMON, DEVICES, IO, MAIN],
            vec![&[KVM_RUN], IOCTLS_DEVICE, IOCTLS_VCPU, IOCTLS_MAIN],
        ),
        Kind::Vcpu => (&[COMMON, DEVICES], vec![&[KVM_RUN], IOCTLS_DEVICE, IOCTLS_VCPU]),
        Kind::Io => (&[COMMON, DEVICES, IO], vec![IOCTLS_DEVICE]),
    };
    let mut rules = Rules::new();
    for list in lists {
        add(&mut rules, list)?;
    }
    let ioctls: Result<Vec<_>, _> = ioctls
        .into_iter()
        .flatten()
        .map(|&(request, bits)| when(1, bits, request))
        .collect();
    rules.insert(libc::SYS_ioctl, ioctls?);
    // Kicking a vCPU, and ending after a fault; other processes are none of our business.
    rules.insert(
        libc::SYS_tgkill,
        vec![when(0, WHOLE, u64::from(std::process::id()))?],
    );
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_compiles_and_is_stricter_than_main() {
        let len = |k| compile(k, SeccompAction::Trap).unwrap().len();
        let (main, vcpu, io) = (len(Kind::Main), len(Kind::Vcpu), len(Kind::Io));
        assert!(vcpu < main && io < main, "{main} {vcpu} {io}");
        // The kernel takes at most 4096 instructions.
        assert!(main < 4096);
    }

    #[test]
    fn no_call_is_listed_with_and_without_a_condition() {
        // An unconditional entry would be undone, or would undo the condition, by order of the lists.
        let mut any = std::collections::BTreeSet::new();
        let mut conditional = std::collections::BTreeSet::new();
        for rule in [COMMON, DEVICES, IO, MAIN].into_iter().flatten() {
            match *rule {
                Any(calls) => calls.iter().for_each(|c| assert!(any.insert(*c), "{c} twice")),
                Bits(call, ..) => drop(conditional.insert(call)),
            }
        }
        assert!(any.is_disjoint(&conditional));
        for never in [
            libc::SYS_execve,
            libc::SYS_ptrace,
            libc::SYS_setuid,
            libc::SYS_bpf,
            libc::SYS_mount,
        ] {
            assert!(!any.contains(&never));
        }
    }
}
