//! The service in a VM is checked and remedied: a pool of one host, a flat guest on this machine's KVM.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::{Pool, possible, wait};
use std::net::TcpListener;

/// It is rebooted when its service fails, people are told when that does not help, and it is well when it answers again.
#[test]
fn a_service_that_fails_is_remedied_and_then_reported() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a"], 6000);
    pool.create("x", "none");
    let host = pool.other("");
    // What the checks find: the test's own socket stands for the service in the guest.
    let service = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = service.local_addr().unwrap();
    let policy = [
        "--interval-ms=1000",
        "--timeout-ms=500",
        "--failures=2",
        "--grace-ms=1500",
        "--backoff-ms=500",
        "--do=reboot",
        "--do=alert",
    ];
    let tcp = format!("--tcp={at}");
    host.run(&[&["vm", "health", "x", &tcp][..], &policy].concat());
    let service_of = || host.vm("x")["service"].as_str().unwrap_or_default().to_owned();
    wait("the service to be found well", || service_of() == "healthy");
    let resets = || host.json(&["vm", "status", "x"])["guest_resets"].as_u64();
    assert_eq!(resets(), Some(0));
    assert!(host.try_run(&["status"]).status.success());
    drop(service);
    wait("the guest to be rebooted", || resets() == Some(1));
    wait("the service to be reported", || {
        service_of().starts_with("failed")
    });
    wait("people to be told", || {
        host.run(&["events", "--subject", "x"])
            .contains("people are told")
    });
    let status = host.try_run(&["status"]);
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        !status.status.success() && text.contains("the service in VM x failed"),
        "{text}"
    );
    assert_eq!(resets(), Some(1), "the ladder has one reboot");
    // The next daemon goes on where this one stood: it has found the service failed only when nothing is left to try.
    pool.host("a").stop_daemon();
    pool.host("a").start_daemon();
    let host = pool.other("");
    let service_of = || host.vm("x")["service"].as_str().unwrap_or_default().to_owned();
    let resets = || host.json(&["vm", "status", "x"])["guest_resets"].as_u64();
    wait("the service to be found failed again", || {
        service_of().starts_with("failed")
    });
    assert_eq!(resets(), Some(1), "nothing is tried twice");
    let service = TcpListener::bind(at).unwrap();
    wait("the service to be well again", || service_of() == "healthy");
    wait("the pool to be well again", || {
        host.try_run(&["status"]).status.success()
    });
    drop(service);
    host.run(&["vm", "health", "x", "--off"]);
    wait("the checks to end", || host.vm("x")["service"].is_null());
    let events = host.run(&["events", "--subject", "x"]);
    println!("{events}");
    assert_eq!(events.matches("remedy: reboot").count(), 1, "{events}");
}

/// Heartbeats of the application in a VM, over its vsock device, are heard wherever the VM runs: after a change of its class, which gives it
/// another process, and after its host died. Silence is noticed.
#[test]
fn an_application_is_heard_wherever_its_vm_runs() {
    if !possible() {
        return;
    }
    let mut pool = Pool::made(&["a", "b", "w"], 6000, &[]);
    // Its guest connects to the host five times a second; the other's never does.
    pool.create_with("x", "none", "vsock=200", &["--agent"]);
    pool.create_with("mute", "none", "vsock=0", &["--agent"]);
    pool.create("plain", "none");
    let health = |host: &common::Host, vm: &str| {
        let policy = [
            "--heartbeat-ms=1500",
            "--interval-ms=1000",
            "--timeout-ms=500",
            "--failures=2",
            "--grace-ms=1500",
            "--do=alert",
        ];
        host.try_run(&[&["vm", "health", vm][..], &policy].concat())
    };
    let host = pool.other("");
    for vm in ["x", "mute"] {
        assert!(health(host, vm).status.success());
    }
    let refused = health(host, "plain");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("--agent"), "{text}");
    let service =
        |host: &common::Host, vm: &str| host.vm(vm)["service"].as_str().unwrap_or_default().to_owned();
    wait("heartbeats to be heard", || service(host, "x") == "healthy");
    wait("silence to be noticed", || {
        service(host, "mute").contains("sent no heartbeat yet")
    });
    host.run(&["protect", "x", "--class", "ft"]);
    wait("it to be protected", || host.vm("x")["protection"] == "protected");
    wait("heartbeats of its new process to be heard", || {
        service(host, "x") == "healthy"
    });
    // A copy of its standby has ears of its own.
    let drilled = host.json(&["drill", "x"]);
    assert!(
        drilled["ok"] == true && drilled["checks"][0] == "a heartbeat within 1500 ms: passed",
        "{drilled}"
    );
    let owner = host.vm("x")["host"].as_str().unwrap().to_owned();
    pool.host(&owner).power_off();
    let host = pool.other(&owner);
    wait("it to go on elsewhere", || {
        let vm = host.vm("x");
        vm["state"] == "running" && vm["host"] != owner.as_str()
    });
    wait("heartbeats to be heard there", || service(host, "x") == "healthy");
    // It stays so: the last beat is not one from before.
    let events = host.run(&["events", "--subject", "x"]);
    assert!(!events.contains("remedy"), "{events}");
}

/// A host whose kernel tells of a failing part is emptied before it fails, of all its VMs, while they run; used again by somebody's word it is
/// used, until there is more evidence.
#[test]
fn a_host_that_expects_to_fail_is_emptied() {
    if !possible() {
        return;
    }
    let mut pool = Pool::made(&["a", "b", "c"], 6000, &[]);
    pool.create("f", "ft");
    pool.create("n", "none");
    let host = pool.other("");
    wait("f to be protected", || host.vm("f")["protection"] == "protected");
    wait("n to run", || host.vm("n")["state"] == "running");
    let failing = host.vm("n")["host"].as_str().unwrap().to_owned();
    let mc = pool
        .host(&failing)
        .sys_root()
        .join("sys/devices/system/edac/mc/mc0");
    std::fs::create_dir_all(&mc).unwrap();
    let corrected = |n: u64| std::fs::write(mc.join("ce_count"), n.to_string()).unwrap();
    corrected(0);
    // Seen once, it grows.
    let host = pool.other(&failing);
    let emptied = |host: &common::Host| {
        let hosts = host.json(&["host", "list"]);
        let mut hosts = hosts.as_array().into_iter().flatten();
        hosts.any(|h| h["host"] == failing.as_str() && h["admin"] == "maintenance")
    };
    let mut errors = 0;
    wait("it to be emptied", || {
        errors += 100;
        corrected(errors);
        emptied(host)
    });
    for vm in ["f", "n"] {
        let shown = host.vm(vm);
        assert!(
            shown["state"] == "running" && shown["host"] != failing.as_str(),
            "{shown}"
        );
    }
    wait("f to be protected elsewhere", || {
        host.vm("f")["protection"] == "protected"
    });
    let events = host.run(&["events"]);
    assert!(
        events.contains("corrected memory errors of mc0 in a day"),
        "{events}"
    );
    let status = host.try_run(&["status"]);
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        !status.status.success() && text.contains("is expected to fail"),
        "people are told: {text}"
    );
    host.run(&["host", "resume", &failing]);
    wait("it to be used again, and all to be well", || {
        !emptied(host) && host.try_run(&["status"]).status.success()
    });
    wait("it to be emptied again", || {
        errors += 100;
        corrected(errors);
        emptied(host)
    });
}

/// Limits of a protected VM are set for its process and its standby's, live, and refused when they cannot be.
#[test]
fn limits_hold_on_every_host_of_a_vm() {
    if !possible() {
        return;
    }
    let pool = Pool::made(&["a", "b", "w"], 6000, &[]);
    let host = pool.other("");
    // Its own name: the cgroup is this machine's.
    let vm = format!("limits-{}", std::process::id());
    pool.create(&vm, "ft");
    wait("it to be protected", || host.vm(&vm)["protection"] == "protected");
    let of = |host: &common::Host| host.json(&["vm", "limits", &vm]);
    if of(host).is_null() {
        println!("SKIPPED: limits: this host's cgroups cannot be used");
        return;
    }
    let refused = host.try_run(&["vm", "limit", &vm, "--memory-max", "1MiB"]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && text.contains("less than the guest's memory"),
        "{text}"
    );
    host.run(&["vm", "limit", &vm, "--cpu-weight", "50", "--cpu-max", "150%"]);
    let quota = |shown: &serde_json::Value| {
        let file = ["cpu.max", "cpu.cfs_quota_us"]
            .into_iter()
            .find_map(|f| shown[f].as_str());
        file.and_then(|text| text.split(' ').next()).map(str::to_owned)
    };
    for host in pool.hosts.iter().filter(|h| h.name != "w") {
        wait("the limit to hold", || {
            quota(&of(host)).as_deref() == Some("150000")
        });
    }
    host.run(&["vm", "limit", &vm, "--cpu-max", "max"]);
    wait("the limit to end", || {
        let now = quota(&of(host));
        now.as_deref() == Some("max") || now.as_deref() == Some("-1")
    });
    assert_eq!(host.vm(&vm)["protection"], "protected");
}
