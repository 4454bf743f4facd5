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
