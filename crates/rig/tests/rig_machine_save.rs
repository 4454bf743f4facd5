//! A loaded Linux guest with 2 vCPUs, saved and restored into a new process, round after round: nothing corrupt, no console
//! byte lost or repeated, no clock jump, and its TCP connections stay.
//!
//! Load: the mini guest checks its memory and writes its disk with checksums all the time; the client holds a TCP connection
//! that counts, and sends a ping stream and a stream of UDP datagrams. What arrives while no process runs the guest is lost,
//! as on a wire; TCP makes up for it, the others may lose but never get a wrong answer.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use steadfast_rig::vm::mini_arguments;
use steadfast_rig::{Client, Mini, Rig, Server, Vm, tools};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 110);
const VCPUS: u32 = 2;
const SHORT: Duration = Duration::from_secs(60);
/// In the server's memory: a pause is the monitor's, not the emulated disk's.
const FILE: &str = "/dev/shm/mini.save";
/// How long the guest stands still in the one round that tells whether its clocks do too.
const OUTAGE: Duration = Duration::from_secs(3);

fn can_run(test: &str) -> bool {
    // SAFETY: no memory is passed, it cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !tools::qemu_present() {
        println!("SKIPPED: {test}: qemu-system-x86_64 is not installed; run `steadfast-rig setup`");
    } else if !root {
        println!("SKIPPED: {test}: a client on the client switch takes root");
    }
    tools::qemu_present() && root
}

#[test]
#[ignore = "ten rounds take minutes on a busy machine"]
fn long_rig_save_restore_ten() {
    if can_run("rig_save_restore") {
        rounds(10, 3, Duration::from_secs(180));
    }
}

#[test]
#[ignore = "takes about half an hour"]
fn long_rig_save_restore() {
    if can_run("long_rig_save_restore") {
        rounds(100, 100, Duration::from_secs(6600));
    }
}

/// A stream of questions in the background; every answer must be right, not every question must have one.
struct Stream {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Stream {
    fn start(mut ask: impl FnMut(u64) -> bool + Send + 'static) -> Stream {
        let (stop, asked, lost) = (
            Arc::<AtomicBool>::default(),
            Arc::<AtomicU64>::default(),
            Arc::<AtomicU64>::default(),
        );
        let theirs = (Arc::clone(&stop), Arc::clone(&asked), Arc::clone(&lost));
        let thread = std::thread::spawn(move || {
            let (stop, asked, lost) = theirs;
            while !stop.load(Ordering::Acquire) {
                let number = asked.fetch_add(1, Ordering::AcqRel);
                if !ask(number) {
                    lost.fetch_add(1, Ordering::AcqRel);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Stream {
            stop,
            asked,
            lost,
            thread,
        }
    }

    /// Questions asked, and those without an answer. A wrong answer panicked the thread, which panics here.
    fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap();
        (
            self.asked.load(Ordering::Acquire),
            self.lost.load(Ordering::Acquire),
        )
    }
}

fn ping_stream(client: &Client) -> Stream {
    let mut pinger = client.pinger(ADDRESS).unwrap();
    Stream::start(move |_| pinger.ping(Duration::from_millis(500)).is_ok())
}

fn udp_stream(client: &Client) -> Stream {
    let socket = client.udp().unwrap();
    socket.connect(SocketAddr::from((ADDRESS, 7))).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let datagram = |number: u64| -> Vec<u8> {
        let mut bytes = number.to_le_bytes().to_vec();
        bytes.extend((0..1000).map(|at| (number.wrapping_mul(31) + at) as u8));
        bytes
    };
    let mut answered = std::collections::HashSet::new();
    Stream::start(move |number| {
        // The port is closed for nobody: an error here is a lost datagram too (host unreachable while no process runs it).
        if socket.send(&datagram(number)).is_err() {
            return false;
        }
        let mut buffer = [0; 2048];
        // Answers that were late come first.
        while let Ok(n) = socket.recv(&mut buffer) {
            let of = u64::from_le_bytes(buffer[..8].try_into().unwrap());
            assert_eq!(buffer[..n], datagram(of), "a datagram came back changed");
            assert!(answered.insert(of), "datagram {of} came back twice");
            if of == number {
                return true;
            }
        }
        false
    })
}

/// What the rounds measured, in milliseconds.
#[derive(Default)]
struct Times {
    state: Vec<f64>,
    pause: Vec<f64>,
    save: Vec<f64>,
    gap: Vec<f64>,
    tcp: Vec<f64>,
}

fn line_of(name: &str, values: &mut [f64]) -> String {
    values.sort_unstable_by(f64::total_cmp);
    let at = |percent: usize| values[(values.len() - 1) * percent / 100];
    format!("{name:<44} {:>9.1} {:>9.1} {:>9.1}", at(50), at(90), at(100))
}

/// Up to `most` rounds; after `bound` no more are begun, and there must have been `least`.
fn rounds(most: usize, least: usize, bound: Duration) {
    let rig = Rig::builder().memory_mib(1024).start().unwrap();
    let (server, client) = (rig.server(0), rig.client().unwrap());
    server.exec("truncate -s 64M /data/mini.raw").unwrap();
    let words = "mini.mem=16 mini.mem_rate=1000 mini.disk=vda mini.disk_mib=8 mini.disk_rate=50 mini.tick_ms=50 mini.hvc";
    let arguments =
        mini_arguments(VCPUS, 128, ADDRESS, words) + " --disk /data/mini.raw --virtio-console /run/hvc";
    let mut vm = Vm::run(server, "mini", &arguments).unwrap();
    vm.wait_console("READY ", 1, Duration::from_secs(240)).unwrap();
    let mini = Mini::new(client, ADDRESS);
    let counting = mini
        .counter(SHORT)
        .unwrap()
        .go_on(Duration::from_millis(20))
        .unwrap();
    counting.wait_steps(20, SHORT).unwrap();
    let (pings, datagrams) = (ping_stream(client), udp_stream(client));
    let first = mini.status(SHORT).unwrap();
    assert_eq!(first.faults, Vec::<String>::new());

    let began = Instant::now();
    let mut times = Times::default();
    let mut before = first.clone();
    let mut count = 0;
    while count < most && (count < least || began.elapsed() < bound) {
        count += 1;
        let round = count;
        if round % 3 == 0 {
            // Console bytes that are known exactly, in flight while the guest is stopped.
            let mini = mini.clone();
            std::thread::spawn(move || mini.command("flood 40", SHORT));
        }
        one_round(server, &mut vm, &counting, &mut times);
        let now = mini.status(SHORT).unwrap();
        assert_eq!(now.faults, Vec::<String>::new(), "after round {round}");
        assert_eq!(now.clock_jumps, 0, "after round {round}");
        assert!(
            now.memory_checked > before.memory_checked
                && now.disk_writes > before.disk_writes
                && now.ticks > before.ticks,
            "round {round}: the guest's work stands still: {before:?} {now:?}"
        );
        println!(
            "round {round}: {:?} since the first, guest up {} ms, {} steps, {} blocks written",
            began.elapsed(),
            now.uptime_ms,
            counting.steps(),
            now.disk_writes
        );
        before = now;
        assert!(began.elapsed() < bound * 2, "the rounds take too long");
    }
    clocks_stand_still(&mut vm, &mini, &counting);
    let (pings, pings_lost) = pings.end();
    let (datagrams, datagrams_lost) = datagrams.end();
    let mut counter = counting.stop().unwrap();
    counter.step().unwrap();
    let last = mini.status(SHORT).unwrap();
    assert_eq!((last.faults, last.clock_jumps), (Vec::new(), 0));
    assert_eq!(mini.command("tick_ms 0", SHORT).unwrap(), "ok");
    vm.control("shutdown", "").unwrap();
    vm.wait_gone(SHORT).unwrap();
    let log = server.exec(&format!("cat {}", vm.log())).unwrap();
    assert!(!log.contains("failed"), "the monitor complains: {log}");
    let lines = console_is_whole(&vm.console_bytes().unwrap(), last.ticks);
    let hvc = server.get_bytes("/run/hvc").unwrap();
    let hvc_lines = ticks_are_whole(&hvc, last.ticks);

    println!("{count} rounds in {:.1?}, milliseconds:", began.elapsed());
    println!("{:<44} {:>9} {:>9} {:>9}", "", "median", "90 %", "longest");
    println!("{}", line_of("stop and take the state", &mut times.state));
    println!("{}", line_of("... and write 128 MiB of RAM", &mut times.pause));
    println!("{}", line_of("save, until its process is gone", &mut times.save));
    println!(
        "{}",
        line_of("from save to the next answer over TCP", &mut times.gap)
    );
    println!(
        "{}",
        line_of("longest step of the TCP connection", &mut times.tcp)
    );
    println!("console: {lines} lines whole on the serial port, {hvc_lines} on hvc0");
    println!(
        "guest: {} pages checked, {} blocks written and {} read, {} flushes, no fault, no clock jump",
        last.memory_checked, last.disk_writes, last.disk_reads, last.disk_flushes
    );
    println!(
        "pings: {pings}, of which lost {pings_lost}; datagrams: {datagrams}, of which lost {datagrams_lost}"
    );
    assert!(
        pings_lost < pings / 2 + 1 && datagrams_lost < datagrams / 2 + 1,
        "most were lost"
    );
}

fn one_round(server: &Server, vm: &mut Vm, counting: &steadfast_rig::Counting, times: &mut Times) {
    counting.take_longest();
    let start = Instant::now();
    let said = vm.save(FILE).unwrap();
    times.save.push(start.elapsed().as_secs_f64() * 1000.0);
    let steps = counting.steps();
    vm.restore(FILE).unwrap();
    // The one in flight, and one that was asked afterwards.
    counting.wait_steps(steps + 2, SHORT).unwrap_or_else(|e| {
        panic!(
            "{e}; {}",
            server.exec(&format!("cat {}", vm.log())).unwrap_or_default()
        )
    });
    times.gap.push(start.elapsed().as_secs_f64() * 1000.0);
    times.tcp.push(counting.take_longest().as_secs_f64() * 1000.0);
    vm.wait_running(SHORT).unwrap();
    server.exec(&format!("rm {FILE}")).unwrap();
    times.state.push(said["state_us"].as_f64().unwrap() / 1000.0);
    times.pause.push(said["pause_us"].as_f64().unwrap() / 1000.0);
}

/// While nobody runs it the guest's clocks stand: afterwards they go on from where they were.
fn clocks_stand_still(vm: &mut Vm, mini: &Mini, counting: &steadfast_rig::Counting) {
    let before = mini.status(SHORT).unwrap();
    let start = Instant::now();
    vm.save(FILE).unwrap();
    let stood = Instant::now();
    std::thread::sleep(OUTAGE);
    let stood = stood.elapsed();
    let steps = counting.steps();
    vm.restore(FILE).unwrap();
    counting.wait_steps(steps + 2, SHORT).unwrap();
    let after = mini.status(SHORT).unwrap();
    let guest_ms = after.uptime_ms - before.uptime_ms;
    let guest_wall_ms = after.wall_ms - before.wall_ms;
    let most_ms = (start.elapsed() - stood).as_millis() as u64;
    assert!(
        guest_ms <= most_ms && guest_wall_ms <= most_ms + 5,
        "the guest's clocks went {guest_ms} and {guest_wall_ms} ms while it ran for at most {most_ms} ms"
    );
}

/// Every line of the serial console is one that the guest wrote, in order, each once. Gives the number of lines.
fn console_is_whole(bytes: &[u8], ticks: u64) -> usize {
    let text = std::str::from_utf8(bytes).expect("the console is text");
    let mut floods = Vec::new();
    let mut ticked = String::new();
    let mut count = 0;
    for line in text.split_terminator("\r\n") {
        count += 1;
        if line.starts_with("TICK ") {
            ticked.push_str(line);
            ticked.push('\n');
        } else if line.starts_with("FLOOD ") {
            floods.push(line);
        } else {
            let known = ["READY ", "MEMORY ", "DISK ", "[", "INIT"];
            assert!(
                known.iter().any(|start| line.starts_with(start)) || line.is_empty(),
                "a line that the guest did not write: {line:?}"
            );
        }
    }
    ticks_are_whole(ticked.as_bytes(), ticks);
    // Floods run at times side by side, so each number comes as often as there were floods: all equally often.
    let mut seen = std::collections::BTreeMap::new();
    for line in &floods {
        *seen.entry(*line).or_insert(0) += 1;
    }
    let times = floods.len() / 40;
    for number in 0..40 {
        let line = format!("FLOOD {number:073}");
        assert_eq!(seen.remove(line.as_str()).unwrap_or(0), times, "{line}");
    }
    assert!(seen.is_empty(), "lines that the guest did not write: {seen:?}");
    count
}

/// `TICK n monotonic wall`: n from 1 on without a gap, the clocks forward and together. Gives the number of lines.
fn ticks_are_whole(bytes: &[u8], ticks: u64) -> usize {
    let text = String::from_utf8_lossy(bytes);
    let (mut expected, mut last, mut apart) = (1u64, 0i64, None);
    for line in text.lines() {
        let words: Vec<i64> = line
            .strip_prefix("TICK ")
            .unwrap_or_else(|| panic!("not a tick: {line:?}"))
            .split(' ')
            .map(|word| word.parse().unwrap_or_else(|_| panic!("not a tick: {line:?}")))
            .collect();
        let [number, mono, wall] = words[..] else {
            panic!("not a tick: {line:?}")
        };
        assert_eq!(number as u64, expected, "a tick is lost or came twice: {line:?}");
        assert!(mono >= last, "the clock went from {last} back to {mono}");
        let apart = *apart.get_or_insert(wall - mono);
        // The two are read one after the other; the guest may be off its CPU in between.
        assert!(
            (-2000..2000).contains(&(wall - mono - apart)),
            "wall and monotonic clock moved apart: {line:?}"
        );
        (expected, last) = (expected + 1, mono);
    }
    // The status was asked before the last ones.
    assert!(
        expected > ticks && ticks > 0,
        "the console ends at tick {expected}, the guest was at {ticks}"
    );
    expected as usize - 1
}

#[test]
fn the_console_check_notices_lost_and_repeated_bytes() {
    let whole: String = (1..=50)
        .map(|n| {
            let flood: String = (0..40)
                .filter(|_| n == 20)
                .map(|f| format!("FLOOD {f:073}\r\n"))
                .collect();
            format!(
                "{flood}TICK {n} {} {}\r\n",
                900 + n * 50,
                1_700_000_000_900u64 + n * 50
            )
        })
        .collect();
    assert_eq!(console_is_whole(whole.as_bytes(), 49), 90);
    let notices = |broken: &str| {
        let broken = broken.to_string();
        std::panic::catch_unwind(move || console_is_whole(broken.as_bytes(), 49)).is_err()
    };
    let at = whole.find("TICK 30 ").unwrap();
    let line = whole[at..].find('\n').unwrap() + 1;
    // A line lost, a line twice, a byte of a number lost or twice, a line end lost, the end lost, a byte of known text changed.
    assert!(notices(&format!("{}{}", &whole[..at], &whole[at + line..])));
    assert!(notices(&format!("{}{}", &whole[..at + line], &whole[at..])));
    assert!(notices(&format!("{}{}", &whole[..at + 9], &whole[at + 10..])));
    assert!(notices(&format!("{}{}", &whole[..at + 10], &whole[at + 9..])));
    assert!(notices(&format!(
        "{}{}",
        &whole[..at + line - 1],
        &whole[at + line..]
    )));
    assert!(notices(&whole[..at]));
    assert!(notices(&whole.replacen("FLOOD 00", "FLOOD 0", 1)));
}
