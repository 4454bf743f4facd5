//! Hosts that stop and come back, cables that are cut, both hosts dead at once, certificates (FAULTS 3, 4, 7, 22, 23, 27, 49).

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::duo::{Duo, LONG};
use common::proxy::Cable;
use common::{FENCED, Random, Site, free_port, kvm, wait};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use steadfast_vmm::control::Request;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn instance_process() {
    common::instance_process();
}

fn site(test: &str) -> (Site, Random) {
    let mut random = Random::seeded(test);
    let mut site = Site::new(&mut random);
    site.audit = true;
    (site, random)
}

/// A primary that stands still is replaced; when it goes on it finds that, says nothing and ends.
#[test]
fn a_primary_that_was_frozen_is_fenced() {
    if !kvm() {
        return;
    }
    let (site, _) = site("a_primary_that_was_frozen_is_fenced");
    let mut duo = Duo::new(site, [None, None]);
    for _ in 0..20 {
        duo.one();
    }
    duo.hosts[0].signal(Signal::STOP);
    for _ in 0..20 {
        duo.one();
    }
    duo.hosts[0].signal(Signal::CONT);
    for _ in 0..20 {
        duo.one();
    }
    assert_eq!(duo.hosts[0].ended(LONG), Some(FENCED));
    duo.again(0, false);
    duo.protected();
    duo.no_stale_page();
    duo.one();
}

/// A standby that stands still costs no failover: the primary goes on, alone, and fills it again when it is back.
#[test]
fn a_standby_that_was_frozen_comes_back() {
    if !kvm() {
        return;
    }
    let (site, _) = site("a_standby_that_was_frozen_comes_back");
    let mut duo = Duo::new(site, [None, None]);
    for _ in 0..3 {
        duo.one();
        duo.hosts[1].signal(Signal::STOP);
        for _ in 0..20 {
            duo.one();
        }
        let a = &duo.hosts[0];
        wait("alone", LONG, || a.role() == (true, false));
        duo.hosts[1].signal(Signal::CONT);
        duo.protected();
        assert_eq!(duo.owner(), Some((0, true)), "nobody took over");
    }
    duo.hosts[0].kill();
    for _ in 0..20 {
        duo.one();
    }
    duo.no_stale_page();
}

fn cables(site: &mut Site, random: &mut Random) -> [Cable; 2] {
    let far = [free_port(random), free_port(random)];
    let near = site.paths[0];
    // Host `a` has the smaller name and listens at `near`; `b` connects to the cables.
    site.paths[1] = far;
    [Cable::new(far[0], near[0]), Cable::new(far[1], near[1])]
}

/// One of two cables is cut and mended, again and again: no failover, and not a moment without protection in the end.
#[test]
fn one_of_two_cables_is_not_missed() {
    if !kvm() {
        return;
    }
    let (mut site, mut random) = site("one_of_two_cables_is_not_missed");
    let cables = cables(&mut site, &mut random);
    let mut duo = Duo::new(site, [None, None]);
    let term = |d: &Duo| d.hosts[0].status().unwrap()["protocol"]["term"].as_u64().unwrap();
    for round in 0..6 {
        cables[round % 2].cut([true, true]);
        for _ in 0..40 {
            duo.one();
        }
        cables[round % 2].cut([false, false]);
        for _ in 0..20 {
            duo.one();
        }
        duo.protected();
        assert_eq!(duo.owner(), Some((0, true)), "round {round}: no failover");
    }
    assert!(term(&duo) >= 2);
    duo.no_stale_page();
}

/// Both cables are cut, both ways or one way: exactly one of the two goes on, what clients were told stays true, and when
/// the cables are mended the VM is protected again, whoever runs it.
#[test]
fn a_partition_has_one_winner() {
    if !kvm() {
        return;
    }
    for ways in [[true, true], [true, false], [false, true]] {
        let (mut site, mut random) = site(&format!("a_partition_has_one_winner {ways:?}"));
        let cables = cables(&mut site, &mut random);
        let mut duo = Duo::new(site, [None, None]);
        for _ in 0..10 {
            duo.one();
        }
        cables.iter().for_each(|c| c.cut(ways));
        for _ in 0..30 {
            duo.one();
        }
        // The loser has found out from the store by the time that the detector and the store's timeouts allow.
        wait("one owner", LONG, || {
            let primaries = duo.hosts.iter().filter(|h| h.role().0).count();
            primaries == 1
        });
        cables.iter().for_each(|c| c.cut([false, false]));
        for host in 0..2 {
            if !duo.hosts[host].runs() {
                duo.again(host, false);
            }
        }
        duo.protected();
        for _ in 0..10 {
            duo.one();
        }
        duo.no_stale_page();
    }
}

/// Both hosts lose power at once and return in either order: the VM comes up from a disk that has all that was answered.
#[test]
fn both_die_and_return_in_either_order() {
    if !kvm() {
        return;
    }
    for first in [0, 1] {
        let (mut site, _) = site(&format!("both_die_and_return_in_either_order {first}"));
        site.disk = true;
        site.cmdline = "pages=60 loop=dirty rate=200 disk=1 udp=1 tcp=1 ip=10.0.0.2".into();
        let mut duo = Duo::new(site, [None, None]);
        for _ in 0..20 {
            duo.one();
        }
        duo.hosts[first].kill();
        duo.hosts[1 - first].kill();
        for host in [first, 1 - first] {
            duo.again(host, true);
        }
        duo.one_after_boot();
        duo.protected();
        duo.one();
        let (owner, _) = duo.owner().unwrap();
        duo.hosts[owner].kill();
        duo.one();
    }
}

/// A guest that dirties all its memory as fast as it can: it is slowed down and never stopped, what is in flight stays within
/// its bound, clients are answered, and its standby is as good as any (FAULTS 10).
#[test]
fn a_guest_that_dirties_everything_goes_on() {
    if !kvm() {
        return;
    }
    let (mut site, mut random) = site("a_guest_that_dirties_everything_goes_on");
    let cables = cables(&mut site, &mut random);
    site.audit = false;
    // The cables are threads of this test, which a busy machine may keep waiting.
    site.suspect_ms = 1500;
    site.cmdline = "pages=24000 loop=dirty udp=1 tcp=1 ip=10.0.0.2".into();
    let mut duo = Duo::new(site, [None, None]);
    let pages = |d: &Duo| d.hosts[0].status().unwrap()["pages"].as_u64().unwrap();
    let before = pages(&duo);
    // Much less than this guest makes, even as deltas; how much that is depends on the machine.
    cables.iter().for_each(|c| c.slow(1_000_000));
    let (mut most, mut slowed) = (0, 0);
    let until = Instant::now() + LONG;
    while pages(&duo) - before < 200_000 || slowed == 0 {
        assert!(
            Instant::now() < until,
            "the guest makes no progress, or is not slowed down ({slowed} %, {most} bytes in flight) by cables that it outruns"
        );
        duo.one();
        let status = duo.hosts[0].status().unwrap();
        most = most.max(status["protocol"]["lag_bytes"].as_u64().unwrap());
        slowed = slowed.max(status["throttle_most_percent"].as_u64().unwrap());
        assert_eq!(duo.owner().map(|o| o.0), Some(0), "no failover");
    }
    // The window's bound, and one epoch that was under way when it was reached.
    assert!(most <= (256 << 20) + (128 << 20), "{most} bytes in flight");
    println!("at most {most} bytes in flight, slowed down by at most {slowed} %");
    cables.iter().for_each(|c| c.slow(0));
    let held = duo.hosts[0].resident_bytes();
    assert!(
        held < 1 << 30,
        "the primary holds {held} bytes for a guest of 128 MiB"
    );
    duo.protected();
    duo.hosts[0].kill();
    for _ in 0..5 {
        duo.one();
    }
}

/// With certificates of one authority the hosts mirror; a host whose certificate is another authority's is no standby, and
/// the VM runs on.
#[test]
fn only_hosts_of_the_pool_mirror() {
    if !kvm() {
        return;
    }
    let (mut site, _) = site("only_hosts_of_the_pool_mirror");
    site.tls = true;
    issue(&site, &["a", "b"]);
    let mut duo = Duo::new(site, [None, None]);
    for _ in 0..10 {
        duo.one();
    }
    duo.hosts[0].kill();
    for _ in 0..10 {
        duo.one();
    }
    // A stranger: same name, another authority.
    let ca = std::fs::read(duo.site.path().join("ca.pem")).unwrap();
    issue(&duo.site, &["a"]);
    std::fs::write(duo.site.path().join("ca.pem"), ca).unwrap();
    duo.again(0, false);
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        duo.one();
        assert_eq!(duo.hosts[1].role(), (true, false), "a stranger is no standby");
    }
}

/// Makes an authority and a certificate for each name, in the site's folder.
fn issue(site: &Site, names: &[&str]) {
    let key = KeyPair::generate().unwrap();
    let mut p = CertificateParams::default();
    p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    p.distinguished_name.push(DnType::CommonName, "pool CA");
    let ca = p.self_signed(&key).unwrap().pem();
    let issuer = Issuer::new(p, key);
    std::fs::write(site.path().join("ca.pem"), ca).unwrap();
    for name in names {
        let key = KeyPair::generate().unwrap();
        let p = CertificateParams::new(vec![(*name).to_owned()]).unwrap();
        let cert = p.signed_by(&key, &issuer).unwrap();
        std::fs::write(site.path().join(format!("{name}.pem")), cert.pem()).unwrap();
        std::fs::write(site.path().join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

/// A copy that is held to a rate, so that pieces of it wait for their turn, loses its link again and again and goes on in new
/// sessions: what waited for an old one is not sent in the new one, where it would be dropped and yet count as there.
#[test]
fn a_slow_copy_goes_on_in_new_sessions() {
    if !kvm() {
        return;
    }
    let (mut site, mut random) = site("a_slow_copy_goes_on_in_new_sessions");
    site.audit = true;
    site.cmdline = "pages=6000 loop=dirty rate=3000 udp=1 tcp=1 ip=10.0.0.2".into();
    let cables = cables(&mut site, &mut random);
    let mut duo = Duo::new(site, [None, None]);
    let rate = |d: &Duo, bytes_per_s| d.hosts[0].ask(&Request::CopyRate { bytes_per_s });
    for round in 0..4 {
        duo.hosts[1].kill();
        let _ = duo.hosts[1].ended(LONG);
        duo.one();
        rate(&duo, steadfast_protect::config::COPY_RATE_MIN);
        duo.again(1, false);
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(150 + random.below(300)));
            cables.iter().for_each(|c| c.cut([true, true]));
            std::thread::sleep(Duration::from_millis(650));
            cables.iter().for_each(|c| c.cut([false, false]));
            duo.one();
        }
        assert!(!duo.hosts[0].role().1, "the copy was to last longer than that");
        rate(&duo, 0);
        duo.protected();
        for _ in 0..20 {
            duo.one();
        }
        duo.no_stale_page();
        let log = duo.hosts[1].status().unwrap()["log"].to_string();
        assert!(!log.contains("diverged"), "round {round}: {log}");
    }
    duo.hosts[0].kill();
    for _ in 0..20 {
        duo.one();
    }
    duo.no_stale_page();
}
