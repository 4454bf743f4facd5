//! VM records in a real etcd: what the epoch protocol's arbiter relies on.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

#[path = "../../store/tests/common/mod.rs"]
mod etcd;

use etcd::Server;
use std::time::{Duration, Instant};
use steadfast_epoch::arbiter::{CasOutcome, Instance, Nonce, StoreId, VmRecord};
use steadfast_protect::store::{RecordStore, Store};
use steadfast_store::{EtcdSpec, StoreSpec};
use steadfast_types::{HostId, Term, VmId};

fn open(spec: EtcdSpec) -> RecordStore {
    RecordStore::open(&StoreSpec::Etcd { etcd: spec }, VmId::new("v").unwrap()).unwrap()
}

fn record(owner: &str, term: u64, instance: u64, id: StoreId) -> VmRecord {
    VmRecord {
        term: Term(term),
        nonce: Nonce {
            instance: Instance(instance),
            count: term,
        },
        ..VmRecord::new(HostId::new(owner).unwrap(), id)
    }
}

fn read(store: &mut RecordStore) -> (StoreId, Option<VmRecord>) {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        match store.read() {
            Ok(read) => return read,
            Err(e) => assert!(Instant::now() < until, "{e}"),
        }
    }
}

#[test]
fn of_two_proposals_one_wins() {
    let Some(server) = Server::start() else {
        return etcd::skip();
    };
    let mut stores = [open(server.spec()), open(server.spec())];
    let (id, none) = read(&mut stores[0]);
    assert_eq!(none, None);
    stores[0].create(&HostId::new("a").unwrap()).unwrap();
    stores[1].create(&HostId::new("b").unwrap()).unwrap();
    let mut current = read(&mut stores[1]).1.unwrap();
    assert_eq!(current, VmRecord::new(HostId::new("a").unwrap(), id));
    for term in 1..=20 {
        let outcomes: Vec<_> = std::thread::scope(|s| {
            let tries = stores.iter_mut().enumerate().map(|(i, store)| {
                let (expect, new) = (&current, record(["a", "b"][i], term, i as u64 + 1, id));
                s.spawn(move || (store.cas(expect, &new), new))
            });
            let tries: Vec<_> = tries.collect();
            tries.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let won: Vec<_> = outcomes.iter().filter(|(o, _)| *o == CasOutcome::Done).collect();
        assert_eq!(won.len(), 1, "{outcomes:?}");
        let seen = read(&mut stores[0]).1.unwrap();
        assert_eq!(seen, won[0].1);
        let lost = outcomes.iter().find(|(o, _)| *o != CasOutcome::Done);
        assert_eq!(
            lost.unwrap().0,
            CasOutcome::Conflict {
                store: id,
                current: seen.clone()
            }
        );
        // The winner asks again, as after a lost answer.
        let winner = usize::from(seen.owner.as_str() == "b");
        assert_eq!(stores[winner].cas(&current, &seen), CasOutcome::Done);
        current = seen;
    }
}

#[test]
fn a_proposal_to_a_frozen_store_is_unknown_and_its_nonce_tells_later() {
    let Some(server) = Server::start() else {
        return etcd::skip();
    };
    let mut store = open(EtcdSpec {
        timeout_ms: 300,
        ..server.spec()
    });
    let (id, _) = read(&mut store);
    let never = VmRecord::new(HostId::new("a").unwrap(), id);
    let one = record("a", 1, 7, id);
    let until = Instant::now() + Duration::from_secs(30);
    while store.cas(&never, &one) != CasOutcome::Done {
        assert!(Instant::now() < until);
    }
    server.freeze();
    let two = record("a", 2, 7, id);
    let unknown = store.cas(&one, &two);
    let unread = store.read();
    server.thaw();
    assert_eq!(unknown, CasOutcome::Unknown);
    assert!(unread.is_err());
    let (_, now) = read(&mut store);
    let now = now.unwrap();
    assert!(now == one || now == two, "{now:?}");
    // The same proposal again: done, whatever became of the first.
    assert_eq!(store.cas(&one, &two), CasOutcome::Done);
    assert_eq!(read(&mut store).1, Some(two));
}

#[test]
fn a_restored_store_takes_no_proposal_of_before() {
    let Some(mut server) = Server::start() else {
        return etcd::skip();
    };
    let mut store = open(server.spec());
    let (id, _) = read(&mut store);
    let one = record("a", 1, 7, id);
    assert_eq!(
        store.cas(&VmRecord::new(one.owner.clone(), id), &one),
        CasOutcome::Done
    );
    let file = server.folder.path().join("snapshot");
    server.snapshot(&file);
    assert_eq!(store.cas(&one, &record("b", 2, 8, id)), CasOutcome::Done);
    server.restore(&file);
    let (now, old) = read(&mut store);
    assert_ne!(now, id);
    assert_eq!(old.as_ref(), Some(&one), "a record of the store as it was");
    let mut late = open(server.spec());
    assert!(
        matches!(late.cas(&one, &record("c", 2, 9, id)), CasOutcome::Conflict { store, .. } if store == now)
    );
    assert_eq!(late.cas(&one, &record("a", 9, 7, now)), CasOutcome::Done);
}
