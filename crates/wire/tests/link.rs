//! Links over loopback: paths that die, stall, damage bytes; peers that restart.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::*;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use steadfast_types::Term;
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

#[test]
fn frames_pass_both_ways_in_order_over_two_paths() {
    let b = listener(2, |_| {});
    let a = connector(&addresses(&b), |_| {});
    a.wait_up(2);
    b.wait_up(2);
    std::thread::scope(|s| {
        s.spawn(|| (0..2000).for_each(|n| a.send(&numbered(n))));
        s.spawn(|| (0..2000).for_each(|n| b.send(&numbered(n))));
        b.expect_numbers(0, 2000);
        a.expect_numbers(0, 2000);
    });
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
