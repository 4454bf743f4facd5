//! The CPU of the guest: it sees the same one on whatever host it goes on, and a host that cannot show it that one is no standby.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::duo::{Duo, LONG};
use common::{Random, Site, kvm, wait};
use serde_json::json;
use steadfast_machine::cpuid::{CpuFeatures, KvmCaps};
use steadfast_machine::kvm::Hypervisor;
use steadfast_types::HostId;
use steadfast_vmm::control::Request;

#[test]
#[ignore = "not a test: the process of one instance, started by the tests"]
fn instance_process() {
    common::instance_process();
}

/// A host without a feature that the guest sees is refused before anything is copied to it, and says why; the guest does not notice. Once it
/// has the feature (another process, here), it is a standby like any other.
#[test]
fn a_host_without_a_feature_is_refused_before_it_matters() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("a_host_without_a_feature_is_refused_before_it_matters");
    let mut site = Site::new(&mut random);
    site.cpu_without = vec!["sse2", "no such feature"];
    let mut duo = Duo::apart(site);
    let unfit = |duo: &Duo| {
        let status = duo.hosts[0].status()?;
        status["protocol"]["unfit"]["b"].as_str().map(str::to_owned)
    };
    wait("b to be refused", LONG, || {
        duo.one();
        unfit(&duo).is_some()
    });
    let why = unfit(&duo).unwrap();
    assert!(why.contains("sse2") && !why.contains("no such"), "{why}");
    for _ in 0..50 {
        duo.one();
    }
    let [a, b] = [0, 1].map(|h| duo.hosts[h].status().unwrap());
    assert_eq!(a["protocol"]["protected"], false, "{a:#}");
    assert_eq!(b["fills"], 0, "nothing was copied there: {b:#}");
    assert!(b["protocol"]["staged"].is_null(), "{b:#}");
    let to = HostId::new("b").unwrap();
    duo.hosts[0].ask(&Request::HandOver { to });
    for _ in 0..5 {
        duo.one();
    }
    assert!(
        duo.hosts[0].role().0,
        "it is not handed over to a host that cannot run it"
    );

    duo.hosts[1].kill();
    duo.site.cpu_without.clear();
    duo.again(1, false);
    duo.protected();
    assert_eq!(unfit(&duo), None);
    duo.hosts[0].kill();
    for _ in 0..5 {
        duo.one();
    }
}

/// A host that would only boot the guest, from its disk, need not have the CPU of the one that runs now.
#[test]
fn a_host_that_only_boots_the_guest_may_lack_a_feature() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("a_host_that_only_boots_the_guest_may_lack_a_feature");
    let mut site = Site::new(&mut random);
    (site.disk, site.memory, site.boot_after_ms) = (true, false, 300);
    site.cmdline = "pages=60 loop=dirty rate=200 disk=1 udp=1 tcp=1 ip=10.0.0.2".into();
    site.cpu_without = vec!["sse2"];
    let mut duo = Duo::new(site, [None, None]);
    duo.one();
    duo.hosts[0].kill();
    duo.one_after_boot();
    assert!(duo.hosts[1].role().0);
}

/// Each host would make up another CPU for the VM by itself. The guest compares what it is told with what it was told at boot: over a
/// failover, moves, and its own reset (after which it remembers anew, and a standby must go on with that).
#[test]
fn a_guest_sees_its_cpu_wherever_it_goes_on() {
    if !kvm() {
        return;
    }
    let mut random = Random::seeded("a_guest_sees_its_cpu_wherever_it_goes_on");
    let mut site = Site::new(&mut random);
    // All that this host has, as the baseline of a pool: other leaves than its own.
    let hypervisor = Hypervisor::open().unwrap();
    let caps = KvmCaps {
        tsc_deadline: true,
        ..KvmCaps::default()
    };
    let features = CpuFeatures::of(&hypervisor.supported_cpuid().unwrap(), &caps);
    site.cpu = [("b", json!({"Pool": features}))].into();
    let mut duo = Duo::new(site, [None, None]);
    let mut at = 0;
    for round in 0..6 {
        for _ in 0..10 {
            duo.one();
        }
        if round == 1 {
            // It dies; a new process begins there, with a CPU of its own making.
            duo.hosts[at].kill();
            duo.one();
            duo.again(at, false);
        } else if round == 3 {
            assert_eq!(duo.hosts[at].ask(&Request::Reset)["ok"], true);
            duo.restarted();
            duo.protected();
            continue;
        } else {
            let to = HostId::new(duo.hosts[1 - at].host).unwrap();
            assert_eq!(duo.hosts[at].ask(&Request::HandOver { to })["ok"], true);
        }
        wait("on the other host", LONG, || {
            duo.owner().is_some_and(|(h, _)| h != at)
        });
        at = 1 - at;
        duo.protected();
    }
    for _ in 0..2000 {
        duo.one();
    }
}
