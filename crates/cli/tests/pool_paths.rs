//! Heartbeats over the replication paths of two daemons on this machine, without KVM.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::{Pool, etcd, wait};

/// A path that was never plugged in: told to people, and nothing else comes of it.
#[test]
fn a_replication_path_that_is_silent_is_told() {
    if etcd().is_none() {
        eprintln!(
            "SKIPPED: no etcd here; scripts/setup.sh unpacks the Debian package etcd-server into the cache"
        );
        return;
    }
    let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 1);
    let [x, y, ..] = random.to_le_bytes();
    let path = |n: u8| format!("--replication=127.{}.{y}.{n}", x.max(1));
    let mut pool = Pool::made(&["a"], 6000, &[&path(101), &path(102)]);
    // An address that is nobody's (RFC 5737).
    pool.admit("b", &[&path(103), "--replication=192.0.2.77"]);
    let told = |pool: &Pool| {
        let all = pool.hosts[0].status()["problems"].clone();
        let all: Vec<String> = serde_json::from_value(all).unwrap();
        all.into_iter()
            .filter(|p| p.contains("replication path"))
            .collect::<Vec<_>>()
    };
    wait("the path to be told of", || !told(&pool).is_empty());
    let line = "replication path 2 is down from here to b";
    assert_eq!(told(&pool), [format!("host a: {line}")]);
    wait("an event of it", || {
        pool.hosts[0].run(&["events", "--subject", "a"]).contains(line)
    });
    let status = pool.hosts[0].status();
    let hosts = status["hosts"].as_array().unwrap();
    assert!(
        hosts.len() == 2 && hosts.iter().all(|h| h["health"] == "up"),
        "{status}"
    );
}
