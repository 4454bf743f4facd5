//! The etcd store against a real etcd.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::Server;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use steadfast_store::{Commit, Committed, Etcd, EtcdSpec, Kv, StoreError};

#[test]
fn reads_commits_and_conflicts() {
    let Some(server) = Server::start() else {
        return common::skip();
    };
    let kv = Etcd::new(&server.spec()).unwrap();
    let first = Commit::default()
        .unchanged("a/1", None)
        .put("a/1", "one")
        .put("a/2", [0, 255]);
    assert!(kv.commit(&first).unwrap().is_done());
    let all = kv.list("a/").unwrap();
    let keys: Vec<_> = all.entries.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys, ["a/1", "a/2"]);
    // The generation of the identity is nobody's key.
    assert_eq!(kv.list("").unwrap().entries.len(), 2);
    let Committed::Conflict(now) = kv.commit(&first).unwrap() else {
        panic!("a key that exists was found absent");
    };
    assert_eq!(now.get("a/1"), all.get("a/1"));
    let more = Commit::default().put("a/3", "three");
    let (done, then) = kv.commit_and_list(&more, &["a/", "b/"]).unwrap();
    let then = then.unwrap();
    let keys: Vec<_> = then.entries.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys, ["a/1", "a/2", "a/3"], "what it changed is read");
    assert!(done.is_done() && then.identity == all.identity && then.revision > all.revision);
    let (conflict, nothing) = kv.commit_and_list(&first, &["a/"]).unwrap();
    assert!(!conflict.is_done() && nothing.is_none());
    assert!(kv.commit(&Commit::default().delete("a/3")).unwrap().is_done());
    let seen = all.get("a/1");
    assert!(
        kv.commit(&Commit::default().unchanged("a/1", seen).delete("a/1"))
            .unwrap()
            .is_done()
    );
    assert!(
        !kv.commit(&Commit::default().unchanged("a/1", seen).put("a/2", "x"))
            .unwrap()
            .is_done()
    );
    let after = kv.read(&["a/1", "a/2"]).unwrap();
    assert_eq!(after.entries.len(), 1);
    assert_eq!(after.entries[0].value, [0, 255]);
    assert_eq!(
        Etcd::new(&server.spec()).unwrap().read(&[]).unwrap().identity,
        all.identity
    );
}

#[test]
fn two_writers_lose_nothing() {
    let Some(server) = Server::start() else {
        return common::skip();
    };
    const EACH: u64 = 25;
    let spec = server.spec();
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                let kv = Etcd::new(&spec).unwrap();
                let mut done = 0;
                while done < EACH {
                    let now = kv.read(&["n"]).unwrap();
                    let old = now.get("n");
                    let n: u64 = old.map_or(0, |e| String::from_utf8_lossy(&e.value).parse().unwrap());
                    let commit = Commit::default()
                        .unchanged("n", old)
                        .put("n", (n + 1).to_string());
                    done += u64::from(kv.commit(&commit).unwrap().is_done());
                }
            });
        }
    });
    let kv = Etcd::new(&spec).unwrap();
    assert_eq!(
        kv.read(&["n"]).unwrap().entries[0].value,
        (2 * EACH).to_string().into_bytes()
    );
}

#[test]
fn frozen_is_unknown_and_dead_is_unreachable() {
    let Some(mut server) = Server::start() else {
        return common::skip();
    };
    let spec = EtcdSpec {
        timeout_ms: 300,
        ..server.spec()
    };
    let kv = Etcd::new(&spec).unwrap();
    let put = |v: &str| Commit::default().put("k", v);
    // A busy machine may need a moment for the first connection.
    let until = Instant::now() + Duration::from_secs(30);
    while kv.commit(&put("1")).is_err() {
        assert!(Instant::now() < until);
    }
    server.freeze();
    let began = Instant::now();
    let unknown = kv.commit(&put("2"));
    let took = began.elapsed();
    let unread = kv.read(&["k"]);
    server.thaw();
    assert!(matches!(unknown, Err(StoreError::Unknown { .. })), "{unknown:?}");
    assert!(
        matches!(unread, Err(StoreError::Unreachable { .. })),
        "{unread:?}"
    );
    assert!(took < Duration::from_secs(5), "not bounded: {took:?}");
    server.kill();
    let dead = kv.commit(&put("3"));
    assert!(matches!(dead, Err(StoreError::Unreachable { .. })), "{dead:?}");
}

/// The member that is asked first hangs: the next one's answer counts, long before the first is given up.
#[test]
fn a_read_does_not_wait_for_a_member_that_hangs() {
    let (Some(hangs), Some(answers)) = (Server::start(), Server::start()) else {
        return common::skip();
    };
    let timeout = Duration::from_secs(8);
    let spec = EtcdSpec {
        endpoints: [hangs.spec().endpoints, answers.spec().endpoints].concat(),
        timeout_ms: timeout.as_millis() as u64,
        ..answers.spec()
    };
    let kv = Etcd::new(&answers.spec()).unwrap();
    kv.commit(&Commit::default().put("k", "v")).unwrap();
    hangs.freeze();
    let kv = Etcd::new(&spec).unwrap();
    let began = Instant::now();
    let found = kv.read(&["k"]).unwrap();
    let took = began.elapsed();
    assert_eq!(found.entries[0].value, b"v");
    assert!(took < timeout, "it waited for the first: {took:?}");
    for _ in 0..2 {
        kv.read(&["k"]).unwrap();
    }
    let again = Instant::now();
    kv.read(&["k"]).unwrap();
    assert!(again.elapsed() < timeout / 4, "it is known to hang now");
}

/// Members come and go while a client lives.
#[test]
fn a_client_goes_on_with_other_members() {
    let Some(server) = Server::start() else {
        return common::skip();
    };
    let nobody = EtcdSpec {
        endpoints: vec!["http://127.0.0.1:9".into()],
        timeout_ms: 2000,
        ..server.spec()
    };
    let kv = Etcd::new(&nobody).unwrap();
    let put = Commit::default().put("k", "v");
    assert!(matches!(kv.commit(&put), Err(StoreError::Unreachable { .. })));
    kv.set_endpoints(&[]);
    assert!(kv.read(&["k"]).is_err(), "an empty list is none");
    kv.set_endpoints(&[nobody.endpoints, server.spec().endpoints].concat());
    assert!(kv.commit(&put).unwrap().is_done());
    assert_eq!(kv.read(&["k"]).unwrap().entries[0].value, b"v");
}

/// It is the nearest one of a host that has just joined.
#[test]
fn a_member_without_a_vote_is_passed_over() {
    let Some(server) = Server::start() else {
        return common::skip();
    };
    let learner = server.learner();
    let spec = EtcdSpec {
        endpoints: [learner.spec().endpoints, server.spec().endpoints].concat(),
        timeout_ms: 5000,
        ..server.spec()
    };
    let kv = Etcd::new(&spec).unwrap();
    let seen = kv.commit(&Commit::default().put("k", "v"));
    assert!(matches!(seen, Ok(Committed::Done { .. })), "{seen:?}");
    let only = Etcd::new(&learner.spec()).unwrap();
    let alone = only.read(&["k"]);
    assert!(
        matches!(&alone, Err(StoreError::Unreachable { why, .. }) if why.contains("no vote yet")),
        "{alone:?}"
    );
}

#[test]
fn a_restored_store_has_another_identity() {
    let Some(mut server) = Server::start() else {
        return common::skip();
    };
    let kv = Etcd::new(&server.spec()).unwrap();
    let put = |v: &str| Commit::default().put("k", v);
    kv.commit(&put("old")).unwrap();
    let before = kv.read(&["k"]).unwrap();
    let file = server.folder.path().join("snapshot");
    server.snapshot(&file);
    for i in 0..5 {
        kv.commit(&put(&i.to_string())).unwrap();
    }
    assert_eq!(kv.read(&["k"]).unwrap().identity, before.identity);
    server.restore(&file);
    let until = Instant::now() + Duration::from_secs(30);
    let after = loop {
        // The old connection is found broken first.
        match kv.read(&["k"]) {
            Ok(after) => break after,
            Err(e) => assert!(Instant::now() < until, "{e}"),
        }
    };
    assert_eq!(after.entries[0].value, b"old");
    assert_ne!(after.identity, before.identity, "who saw more notices");
    let others = Etcd::new(&server.spec()).unwrap();
    assert_eq!(
        others.read(&[]).unwrap().identity,
        after.identity,
        "and all see it from then on"
    );
    let stale = Commit {
        identity: Some(before.identity),
        ..put("stale")
    };
    assert!(!kv.commit(&stale).unwrap().is_done());
    assert!(!others.commit(&stale).unwrap().is_done());
}

#[test]
fn a_watch_wakes_and_ends() {
    let Some(server) = Server::start() else {
        return common::skip();
    };
    let kv = Etcd::new(&server.spec()).unwrap();
    let woken = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&woken);
    let guard = kv.watch("w/", Box::new(move || _ = counter.fetch_add(1, Ordering::SeqCst)));
    let until = Instant::now() + Duration::from_secs(30);
    let wait = |n: usize| {
        while woken.load(Ordering::SeqCst) < n {
            assert!(Instant::now() < until, "not woken {n} times");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    wait(1);
    let standing = woken.load(Ordering::SeqCst);
    kv.commit(&Commit::default().put("w/1", "x")).unwrap();
    wait(standing + 1);
    drop(guard);
}
