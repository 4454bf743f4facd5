//! Links over loopback: paths that die, stall, damage bytes; peers that restart.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use steadfast_types::Term;
use steadfast_wire::frame::hello::Status;
use steadfast_wire::link::{Addr, Down, PathConfig, Role, SendError};
use steadfast_wire::{Event, Frame};

/// Two paths, each through a proxy.
fn through_proxies() -> (End, End, Vec<Proxy>) {
    let b = listener(2, |_| {});
    let proxies: Vec<Proxy> = addresses(&b).into_iter().map(Proxy::new).collect();
    let a = connector(&proxies.iter().map(|p| p.addr).collect::<Vec<_>>(), |_| {});
    a.wait_up(2);
    b.wait_up(2);
    (a, b, proxies)
}

/// Sends 0 to `n` both ways, in the background; `during` runs meanwhile. Everything must arrive, once, in order.
fn exchange(a: &End, b: &End, n: u64, during: impl FnOnce()) {
    let (to_b, to_a) = (a.link.sender(), b.link.sender());
    std::thread::scope(|s| {
        s.spawn(move || (0..n).for_each(|i| send_on(&to_b, &numbered(i))));
        s.spawn(move || (0..n).for_each(|i| send_on(&to_a, &numbered(i))));
        during();
        b.expect_numbers(0, n);
        a.expect_numbers(0, n);
    });
}

/// Waits until so many more bytes went through a proxy, so that a fault falls into traffic; but not for long, as the
/// link may just prefer the other path.
fn wait_bytes(p: &Proxy, bytes: u64) {
    let end = Instant::now() + Duration::from_millis(150);
    let from = p.faults.bytes.load(Ordering::Relaxed);
    while p.faults.bytes.load(Ordering::Relaxed) < from + bytes && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn frames_pass_both_ways_in_order_over_two_paths() {
    let b = listener(2, |_| {});
    let a = connector(&addresses(&b), |_| {});
    a.wait_up(2);
    b.wait_up(2);
    exchange(&a, &b, 2000, || {});
    let stats = a.link.stats();
    assert!(
        stats.paths.iter().all(|p| p.frames_out > 100),
        "both paths are used: {stats:?}"
    );
    assert!(
        stats.paths.iter().all(|p| p.rtt_us.is_some()),
        "round trips are measured: {stats:?}"
    );
}

#[test]
fn a_path_that_is_killed_loses_nothing_and_comes_back() {
    let (a, b, proxies) = through_proxies();
    exchange(&a, &b, 3000, || {
        for round in 0..6 {
            wait_bytes(&proxies[round % 2], 3_000_000);
            proxies[round % 2].kill();
        }
    });
    a.wait_up(2);
    let (sa, sb) = (a.link.stats(), b.link.stats());
    assert!(sa.paths[0].connects >= 2, "{sa:?}");
    assert!(
        sa.paths.iter().chain(&sb.paths).any(|p| p.frames_resent > 0),
        "{sa:?} {sb:?}"
    );
    assert_eq!((sa.resets, sb.resets), (0, 0));
}

#[test]
fn a_cut_cable_delays_but_loses_nothing() {
    let (a, b, proxies) = through_proxies();
    let cut = Instant::now();
    proxies[1].faults.cut.store(true, Ordering::Relaxed);
    exchange(&a, &b, 500, || {});
    let took = cut.elapsed();
    let silent = |e| match e {
        Event::PathDown {
            path,
            why: Down::Silent { .. } | Down::Stalled { .. } | Down::Unacknowledged,
            left,
        } => Some((path, left)),
        _ => None,
    };
    assert_eq!(a.wait("the cut path to be given up", silent), (1, 1));
    assert!(
        took < Duration::from_millis(900),
        "went over the other path before the timeout: {took:?}"
    );
    proxies[1].faults.cut.store(false, Ordering::Relaxed);
    proxies[1].kill();
    a.wait_up(2);
}

#[test]
fn with_all_paths_down_the_session_waits_and_goes_on() {
    let (a, b, proxies) = through_proxies();
    exchange(&a, &b, 2000, || {
        wait_bytes(&proxies[0], 3_000_000);
        for p in &proxies {
            p.faults.down.store(true, Ordering::Relaxed);
            p.kill();
        }
        let end = Instant::now() + WAIT;
        while a.link.stats().paths.iter().any(|p| p.up) {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
        for p in &proxies {
            p.faults.down.store(false, Ordering::Relaxed);
        }
    });
    assert_eq!((a.link.stats().resets, b.link.stats().resets), (0, 0));
}

#[test]
fn damaged_bytes_are_noticed_and_sent_again() {
    let (a, b, proxies) = through_proxies();
    exchange(&a, &b, 3000, || {
        for round in 0..6 {
            wait_bytes(&proxies[round % 2], 3_000_000);
            proxies[round % 2].faults.corrupt.store(1, Ordering::Relaxed);
        }
    });
    let (sa, sb) = (a.link.stats(), b.link.stats());
    let corrupt: u64 = sa.paths.iter().chain(&sb.paths).map(|p| p.corrupt).sum();
    assert!(corrupt >= 3, "damage was noticed: {sa:?} {sb:?}");
    assert_eq!((sa.resets, sb.resets), (0, 0));
}

#[test]
fn a_slow_path_does_not_hold_up_the_other() {
    let (a, b, proxies) = through_proxies();
    proxies[0].faults.delay_ms.store(3, Ordering::Relaxed);
    exchange(&a, &b, 1000, || {});
    let s = a.link.stats();
    assert!(
        s.paths[1].bytes_out > s.paths[0].bytes_out,
        "the fast path carries more: {s:?}"
    );
}

#[test]
fn a_restarted_listener_is_a_reset_for_the_connector() {
    let b = listener(1, |_| {});
    let addr = addresses(&b)[0];
    let a = connector(&[addr], |_| {});
    a.wait_up(1);
    a.send(&numbered(0));
    b.expect_numbers(0, 1);
    drop(b);
    a.wait("the end of the session", |e| {
        matches!(e, Event::PathDown { why, .. } if why.is_process_gone()).then_some(())
    });
    a.send(&numbered(77));
    let b = End::open({
        let mut c = config(Role::Listen, vec![PathConfig::new(addr)]);
        c.generation = 3;
        c
    });
    a.wait("the reset", |e| matches!(e, Event::PeerReset).then_some(()));
    a.wait("a new session", |e| {
        matches!(e, Event::SessionUp { .. }).then_some(())
    });
    a.send(&numbered(1));
    // What was queued for the old instance is gone; the new session begins with what was sent after the reset.
    assert_eq!(number_of(&b.frame()), 1);
}

#[test]
fn a_restarted_connector_is_a_reset_for_the_listener_and_older_generations_are_refused() {
    let b = listener(1, |_| {});
    let addr = addresses(&b);
    let a = connector(&addr, |c| c.generation = 1);
    a.wait_up(1);
    a.send(&numbered(0));
    b.expect_numbers(0, 1);
    // The old one still lives (it was frozen, say) when its successor comes.
    let newer = connector(&addr, |c| c.generation = 2);
    b.wait("the reset", |e| matches!(e, Event::PeerReset).then_some(()));
    newer.wait_up(1);
    newer.send(&numbered(5));
    assert_eq!(number_of(&b.frame()), 5);
    a.wait("the old one to be refused", |e| match e {
        Event::ConnectFailed {
            why: Down::RefusedBy(s),
            ..
        } => (s == Status::Stale).then_some(()),
        _ => None,
    });
    newer.send(&numbered(6));
    assert_eq!(number_of(&b.frame()), 6);
}

#[test]
fn frames_of_an_old_term_come_with_their_term() {
    let b = listener(1, |_| {});
    let a = connector(&addresses(&b), |_| {});
    for term in [5, 3, 9] {
        a.send(&Frame::control(numbered(0).vm, Term(term), vec![1]));
    }
    assert_eq!(
        [b.frame().term, b.frame().term, b.frame().term],
        [Term(5), Term(3), Term(9)]
    );
}

#[test]
fn a_receiver_that_does_not_use_frames_stops_the_sender() {
    let small = |c: &mut steadfast_wire::LinkConfig| {
        (c.window_bytes, c.payload_bytes_max, c.manual_credit) = (1 << 20, 256 << 10, true);
    };
    let b = listener(1, small);
    let a = connector(&addresses(&b), |_| {});
    a.wait_up(1);
    let frame = Frame::control(numbered(0).vm, Term(1), vec![7; 100_000]);
    let mut sent = 0;
    let end = Instant::now() + WAIT;
    while a.link.try_send(&frame).is_ok() {
        sent += 1;
        assert!(
            sent < 30 && Instant::now() < end,
            "not stopped by the window of 1 MiB"
        );
    }
    assert!(sent >= 10);
    assert_eq!(a.link.try_send(&frame), Err(SendError::Full));
    let too_long = Frame::control(numbered(0).vm, Term(1), vec![7; 300_000]);
    assert_eq!(a.link.try_send(&too_long), Err(SendError::TooLong(300_000)));
    let received: Vec<Frame> = (0..sent).map(|_| b.frame()).collect();
    // All of it has arrived, nothing was used: still full after several heartbeats.
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(a.link.try_send(&frame), Err(SendError::Full));
    received.iter().for_each(|f| b.link.sender().consumed(f));
    a.wait("room", |e| matches!(e, Event::Writable).then_some(()));
    assert_eq!(a.link.try_send(&frame), Ok(()));
}

#[test]
fn strangers_and_hostile_bytes_do_no_harm() {
    let b = listener(1, |_| {});
    let addr = addresses(&b)[0];
    let a = connector(&[addr], |_| {});
    a.wait_up(1);
    let mut strangers = Vec::new();
    for i in 0..60u32 {
        let mut s = std::net::TcpStream::connect(addr).unwrap();
        let junk: Vec<u8> = match i % 4 {
            0 => b"GET / HTTP/1.1\r\n\r\n"
                .iter()
                .copied()
                .cycle()
                .take(200)
                .collect(),
            1 => vec![0xff; 70_000],
            2 => b"SFW1".iter().copied().chain(vec![0; 100]).collect(),
            _ => Vec::new(),
        };
        let _ = s.write_all(&junk);
        strangers.push(s);
    }
    b.wait("strangers to be reported", |e| {
        matches!(
            e,
            Event::ConnectFailed {
                path: None,
                why: Down::Frame(_)
            }
        )
        .then_some(())
    });
    a.send(&numbered(1));
    assert_eq!(number_of(&b.frame()), 1);
    // Other names are refused with a reason.
    let other = connector(&[addr], |c| c.vm = steadfast_types::VmId::new("other").unwrap());
    let reason = |e| match e {
        Event::ConnectFailed {
            why: Down::RefusedBy(s),
            ..
        } => Some(format!("{s:?}")),
        _ => None,
    };
    // While strangers hold all places for greeting, the refusal may take until they time out.
    drop(strangers);
    assert_eq!(other.wait("a refusal", reason), "WrongVm");
    let other = connector(&[addr], |c| {
        c.host = steadfast_types::HostId::new("gamma").unwrap()
    });
    assert_eq!(other.wait("a refusal", reason), "WrongHost");
    assert_eq!(
        a.link.stats().paths[0].connects,
        1,
        "the link itself was not disturbed"
    );
}

#[test]
fn a_killed_process_is_noticed_at_once() {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_listener", "--ignored", "--nocapture"])
        .env("WIRE_TEST_CHILD", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = String::new();
    let mut pipe = child.stdout.take().unwrap();
    let mut byte = [0u8; 1];
    let port: u16 = loop {
        assert_eq!(pipe.read(&mut byte).unwrap(), 1, "the child ended: {out}");
        out.push(byte[0] as char);
        if let Some(port) = out.split("PORT=").nth(1).and_then(|t| t.strip_suffix('\n')) {
            break port.parse().unwrap();
        }
    };
    let a = connector(&[std::net::SocketAddr::from(([127, 0, 0, 1], port))], |_| {});
    a.wait_up(1);
    let killed = Instant::now();
    child.kill().unwrap();
    let at = a.wait("the end of the peer", |e| match e {
        Event::PathDown { why, left: 0, .. } if why.is_process_gone() => Some(killed.elapsed()),
        _ => None,
    });
    child.wait().unwrap();
    a.wait("the host to be known alive", |e| {
        matches!(
            e,
            Event::ConnectFailed {
                why: Down::Refused,
                ..
            }
        )
        .then_some(())
    });
    println!("kill -9 noticed after {at:?}");
    assert!(at < Duration::from_millis(50), "noticed after {at:?}");
}

/// Not a test: the process that the test above kills. It ends by itself when its parent does.
#[test]
#[ignore = "helper process of a_killed_process_is_noticed_at_once"]
fn child_listener() {
    if std::env::var_os("WIRE_TEST_CHILD").is_none() {
        return;
    }
    let b = listener(1, |_| {});
    println!("PORT={}", addresses(&b)[0].port());
    let _ = std::io::stdin().read(&mut [0u8; 1]);
}

#[test]
fn a_silent_peer_is_reported() {
    let b = listener(1, |_| {});
    let proxy = Proxy::new(addresses(&b)[0]);
    let a = connector(&[proxy.addr], |_| {});
    a.wait_up(1);
    let cut = Instant::now();
    proxy.faults.cut.store(true, Ordering::Relaxed);
    let ms = a.wait("silence", |e| match e {
        Event::PeerSilent { silent_ms } => Some(silent_ms),
        _ => None,
    });
    let took = cut.elapsed();
    assert!(
        ms >= 100 && took < Duration::from_millis(300),
        "{ms} ms, reported after {took:?}"
    );
}

#[test]
fn unix_sockets_and_mptcp_carry_links_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = Addr::Unix(dir.path().join("link.sock"));
    let b = End::open(config(Role::Listen, vec![PathConfig::new(path.clone())]));
    let a = End::open(config(Role::Connect, vec![PathConfig::new(path)]));
    exchange(&a, &b, 200, || {});
    if !steadfast_wire::link::mptcp_available() {
        println!("SKIPPED: this kernel has no MPTCP (net.mptcp.enabled)");
        return;
    }
    let b = listener(1, |c| c.mptcp = true);
    let a = connector(&addresses(&b), |c| c.mptcp = true);
    exchange(&a, &b, 200, || {});
}
