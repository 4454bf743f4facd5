//! A VM moves from host to host under load: it is protected from the moment at which it goes on, by the host that it left.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::duo::{Duo, LONG};
use common::{Random, Site, kvm, wait};
use steadfast_types::HostId;
use steadfast_vmm::control::Request;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn instance_process() {
    common::instance_process();
}

fn duo(random: &mut Random, disk: bool) -> Duo {
    let mut site = Site::new(random);
    site.audit = true;
    site.disk = disk;
    if disk {
        site.cmdline = "pages=60 loop=dirty rate=200 disk=1 udp=1 tcp=1 ip=10.0.0.2".into();
    }
    Duo::new(site, [None, None])
}

/// Moves it to the other host while the client goes on; says where it is now.
fn move_it(duo: &mut Duo, random: &mut Random) -> usize {
    let (from, _) = duo.owner().unwrap();
    let to = HostId::new(duo.hosts[1 - from].host).unwrap();
    assert_eq!(duo.hosts[from].ask(&Request::HandOver { to })["ok"], true);
    for _ in 0..random.below(8) {
        duo.one();
    }
    wait("moved", LONG, || duo.owner().is_some_and(|(h, _)| h != from));
    1 - from
}

fn fills(duo: &Duo) -> [u64; 2] {
    let of = |h: usize| duo.hosts[h].status().unwrap()["fills"].as_u64().unwrap();
    [of(0), of(1)]
}

/// There and back, many times: both processes live on, and nothing is ever copied again.
fn there_and_back(test: &str, disk: bool, times: u32) {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded(test);
    let mut duo = duo(&mut random, disk);
    for _ in 0..times {
        move_it(&mut duo, &mut random);
        duo.protected();
        duo.one();
        assert_eq!(fills(&duo), [0, 1], "copied once, when it was protected first");
        duo.no_stale_page();
    }
    let (owner, _) = duo.owner().unwrap();
    duo.hosts[owner].kill();
    for _ in 0..5 {
        duo.one();
    }
}

#[test]
fn it_moves_there_and_back_and_is_never_copied_again() {
    there_and_back("it_moves_there_and_back_and_is_never_copied_again", false, 12);
}

#[test]
fn with_a_disk_it_moves_there_and_back_and_is_never_copied_again() {
    there_and_back(
        "with_a_disk_it_moves_there_and_back_and_is_never_copied_again",
        true,
        12,
    );
}

/// With many reads of the disk in flight, some of which come to their end while its state is loaded: memory of both hosts stays the same.
#[test]
fn it_moves_with_many_requests_in_flight() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("it_moves_with_many_requests_in_flight");
    let mut site = Site::new(&mut random);
    (site.audit, site.disk) = (true, true);
    site.cmdline = "pages=20 loop=diskbench op=randread bs=4096 qd=32 disk=1 udp=1 tcp=1 ip=10.0.0.2".into();
    // What is read differs from block to block; the guest's counter is in the first half.
    let mut image = vec![0; 12 << 20];
    for (n, word) in (0_u64..).zip(image[6 << 20..].chunks_exact_mut(8)) {
        word.copy_from_slice(&n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    }
    std::fs::write(site.path().join("a.raw"), image).unwrap();
    let mut duo = Duo::new(site, [None, None]);
    for _ in 0..10 {
        let now = move_it(&mut duo, &mut random);
        duo.protected();
        let compared = |duo: &Duo| duo.hosts[1 - now].status().unwrap()["audit_epochs"].as_u64();
        let before = compared(&duo);
        wait("epochs to be compared", LONG, || compared(&duo) > before);
        duo.one();
        duo.no_stale_page();
        assert_eq!(fills(&duo), [0, 1]);
    }
}

/// The host that it has moved to dies at any moment after that: the one that it left goes on, with all that anybody was told.
#[test]
fn the_new_host_dies_after_a_move_and_the_old_one_goes_on() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("the_new_host_dies_after_a_move_and_the_old_one_goes_on");
    let mut duo = duo(&mut random, true);
    for _ in 0..8 {
        let now = move_it(&mut duo, &mut random);
        duo.hosts[now].kill();
        for _ in 0..5 {
            duo.one();
        }
        assert_eq!(duo.owner().map(|(owner, _)| owner), Some(1 - now));
        duo.no_stale_page();
        duo.again(now, false);
        duo.protected();
    }
}
