//! A VM's process never ends without saying why.
//!
//! ```text
//! orderly end, error        whoever called process::run says it
//! SIGTERM, SIGINT, SIGHUP   said at once; then an orderly end, or with `At::Once` the signal's own
//! SIGSYS (a filter), SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT   said; then the signal's own end
//! SIGKILL, out of memory    nobody can say it but the janitor, who sees the pipe close without a word
//! ```
//! A signal handler may run on any thread, at any instruction, under that thread's filter: it formats into its own stack and uses
//! only `write`, `prctl(PR_GET_NAME)`, `getpid`, `gettid` and `tgkill`, which every filter allows (signal-safety(7)).

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// What follows a request to end (SIGTERM, SIGINT, SIGHUP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The main loop sees [`asked_to_end`] and ends the VM in order. A second signal ends it at once.
    MainLoop,
    /// The process ends by the signal.
    Once,
}

/// The signal that asked for the end; 0: none.
static ASKED: AtomicI32 = AtomicI32::new(0);
static BY_MAIN_LOOP: AtomicBool = AtomicBool::new(false);
/// The janitor's pipe; -1: none.
static JANITOR: AtomicI32 = AtomicI32::new(-1);

/// A thread has met a fault, and says so.
static FAULTED: AtomicBool = AtomicBool::new(false);
/// Another waits so long for it at most: some tenths of a second.
const SPINS_MAX: u32 = 1 << 25;
const FAULTS: [i32; 6] = [
    libc::SIGSYS,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
];
const REQUESTS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Has faults of this process reported before it dies of them.
pub fn of_faults() {
    FAULTS.into_iter().for_each(handle);
}

/// Has requests to end reported. One that was ignored from the start (nohup) stays so.
pub fn of_requests(then: At) {
    BY_MAIN_LOOP.store(then == At::MainLoop, Ordering::Relaxed);
    for signal in REQUESTS {
        // SAFETY: an all-zero sigaction is a valid value of that plain C structure.
        let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: only asks; `now` lives through the call.
        let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut now) };
        if asked == 0 && now.sa_sigaction == libc::SIG_IGN {
            continue;
        }
        handle(signal);
    }
}

fn handle(signal: i32) {
    // SAFETY: an all-zero sigaction is a valid value of that plain C structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_signal as *const () as usize;
    // ONSTACK: it may be for want of stack.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    if REQUESTS.contains(&signal) {
        // The second time the signal does what it always does.
        action.sa_flags |= libc::SA_RESETHAND;
    } else {
        // A fault within the handler is not handled, but deadly. SAFETY: fills the mask of this very structure.
        unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    }
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and does only what signal handlers may. It fails
    // for no signal that is listed above.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
}

/// The signal that asked this process to end, once there was one.
#[must_use]
pub fn asked_to_end() -> Option<i32> {
    Some(ASKED.load(Ordering::Acquire)).filter(|&signal| signal != 0)
}

/// Names the pipe on which [`said`] tells the janitor that a reason was or will be given.
pub(crate) fn to_janitor(pipe: Option<RawFd>) {
    JANITOR.store(pipe.unwrap_or(-1), Ordering::Release);
}

/// The reason of the end is told, or on its way to be: the janitor need not.
pub(crate) fn said() {
    let pipe = JANITOR.load(Ordering::Acquire);
    if pipe >= 0 {
        // SAFETY: one byte of a constant; a pipe that is full or gone is no harm.
        unsafe { libc::write(pipe, b"\n".as_ptr().cast(), 1) };
    }
}

/// One line, made without allocating.
struct Line {
    bytes: [u8; 320],
    len: usize,
}

impl Line {
    fn text(&mut self, text: &[u8]) -> &mut Self {
        let room = &mut self.bytes[self.len..];
        let n = text.len().min(room.len());
        room[..n].copy_from_slice(&text[..n]);
        self.len += n;
        self
    }

    fn number(&mut self, mut value: u64, base: u64) -> &mut Self {
        let mut digits = [0; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdef"[(value % base) as usize];
            value /= base;
            if value == 0 || at == 0 {
                break;
            }
        }
        self.text(&digits[at..])
    }
}

fn name_of(signal: i32) -> &'static [u8] {
    match signal {
        libc::SIGSYS => b"SIGSYS",
        libc::SIGSEGV => b"SIGSEGV",
        libc::SIGBUS => b"SIGBUS",
        libc::SIGILL => b"SIGILL",
        libc::SIGFPE => b"SIGFPE",
        libc::SIGABRT => b"SIGABRT",
        libc::SIGTERM => b"SIGTERM",
        libc::SIGINT => b"SIGINT",
        libc::SIGHUP => b"SIGHUP",
        _ => b"a signal",
    }
}

extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: this thread's own errno; what it interrupted may be about to read it.
    let errno = unsafe { *libc::__errno_location() };
    let mut thread = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes with a final zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr(), 0, 0, 0) };
    let thread = &thread[..thread.iter().position(|&b| b == 0).unwrap_or(0)];
    let mut line = Line {
        bytes: [0; 320],
        len: 0,
    };
    line.text(b"steadfast: ");
    let request = REQUESTS.contains(&signal);
    if !request && FAULTED.swap(true, Ordering::AcqRel) {
        // Another thread met its end at the same time and is saying so: this one must not end the process before that.
        for _ in 0..SPINS_MAX {
            std::hint::spin_loop();
        }
    }
    // SAFETY: with SA_SIGINFO the kernel gives a siginfo, whose code says which fields are valid.
    let (code, sender) = unsafe { ((*info).si_code, (*info).si_pid()) };
    // SI_USER and what is below it come from processes, what is above from the kernel.
    if code <= 0 {
        line.text(name_of(signal)).text(b" from process ");
        line.number(u64::from(sender.unsigned_abs()), 10);
    } else {
        line.text(name_of(signal));
    }
    line.text(b": the VM's process ends");
    if code > 0 && signal == libc::SIGSYS {
        // siginfo_t of SIGSYS: three ints, padding, the call's address, then its number (sigaction(2)).
        // SAFETY: within the 128 bytes of siginfo_t, and set by the kernel for SIGSYS of a filter.
        let call = unsafe { *info.cast::<i32>().add(6) };
        line.text(b"; its filter forbids system call ");
        line.number(u64::from(call.unsigned_abs()), 10);
    } else if code > 0 && matches!(signal, libc::SIGSEGV | libc::SIGBUS) {
        // SAFETY: valid for these signals when the kernel sent them.
        let address = unsafe { (*info).si_addr() } as u64;
        line.text(b"; access to address 0x").number(address, 16);
    }
    line.text(b", in thread ").text(thread).text(b"\r\n");
    // SAFETY: writes initialized bytes of this frame. If nobody can hear it, nothing can be done.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.len) };
    said();
    if request && BY_MAIN_LOOP.load(Ordering::Relaxed) {
        ASKED.store(signal, Ordering::Release);
    } else {
        if !request {
            // SAFETY: an all-zero sigaction is the default action; a filter that forbids the call ends the process as well.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
            }
        }
        // SAFETY: our own thread; the signal is blocked until this handler returns, and then has its default effect.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_not_overrun() {
        let mut line = Line {
            bytes: [0; 320],
            len: 0,
        };
        line.text(b"x").number(0, 10).text(b" ").number(u64::MAX, 10);
        line.text(b" ").number(0xbeef, 16);
        assert_eq!(&line.bytes[..line.len], b"x0 18446744073709551615 beef");
        for _ in 0..100 {
            line.text(b"more and more");
        }
        assert_eq!(line.len, 320);
    }
}
