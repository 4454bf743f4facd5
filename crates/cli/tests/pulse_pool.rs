//! A pool of three daemons on this machine, with flat guests on its KVM: init, join, create, and a host dies.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::{Pool, possible, wait, wait_for};
use std::time::{Duration, Instant};
use steadfast_vmm::control::{Request as ControlRequest, ask};

/// Short, so that tests are; longer than any pause of a busy machine.
const LEASE_MS: u64 = 6000;
/// An answer of a monitor takes no longer.
const ANSWER: Duration = Duration::from_secs(5);

fn protected(pool: &Pool, vm: &str) -> bool {
    pool.other("").vm(vm)["protection"] == "protected"
}

fn host_of(pool: &Pool, vm: &str) -> Option<String> {
    let found = pool.other("").vm(vm);
    (found["state"] == "running").then(|| found["host"].as_str().map(str::to_owned))?
}

/// `ft` goes on, `restart` is up elsewhere, both are as they should be again, and the host that comes back is used again.
#[test]
fn a_host_dies() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b", "c"], LEASE_MS);
    let (ft, restart) = (pool.client("f"), pool.client("r"));
    pool.create("f", "ft");
    pool.create("r", "restart");
    wait("f to be protected", || protected(&pool, "f"));
    let lost = wait_for("r to run", || host_of(&pool, "r"));
    ft.answer("", Instant::now());
    restart.answer("", Instant::now());
    // Both on one host, so that one death takes both.
    let primary = host_of(&pool, "f").unwrap();
    if primary != lost {
        pool.other("").run(&["migrate", "f", "--to", &lost]);
        wait("f to be moved, and protected again", || {
            host_of(&pool, "f").as_ref() == Some(&lost) && protected(&pool, "f")
        });
    }
    assert_eq!(ft.seen().boots, 0, "a move is no boot");
    let killed = pool.host(&lost).power_off();
    let (to, gap) = ft.answer(&lost, killed);
    println!("f: answers from {to} {gap:?} after the death of {lost}");
    let (to, gap) = restart.answer(&lost, killed);
    println!("r: answers from {to} {gap:?} after the death of {lost}");
    assert!(
        gap >= Duration::from_millis(LEASE_MS),
        "r was booted before its host's lease had run out"
    );
    assert_eq!(ft.seen().boots, 0, "f never stopped");
    assert_eq!(restart.seen().boots, 1, "r was booted once");
    wait("f to be protected again", || protected(&pool, "f"));
    println!(
        "f: protected again {:?} after the death of {lost}",
        killed.elapsed()
    );
    assert!(
        !pool.other(&lost).try_run(&["status"]).status.success(),
        "a dead host needs attention"
    );
    pool.host(&lost).start_daemon();
    wait("all to be well again", || {
        pool.other(&lost).try_run(&["status"]).status.success()
    });
    let events = pool.other(&lost).run(&["events", "--limit", "100"]);
    println!("{events}");
    assert!(
        events.contains("start r on"),
        "the action and its reason are an event"
    );
    assert!(
        events.contains("host dead") && events.contains("its standby took over, detected in"),
        "so are the detection, and the takeover with its parts"
    );
    // What the events say of availability is what the clients saw.
    let of = |vm: &str| pool.other("").json(&["availability", vm]);
    let (f, r) = (of("f"), of("r"));
    assert!(
        f["gaps"] == 1 && f["longest_gap_ms"].as_u64() < r["longest_gap_ms"].as_u64(),
        "{f} {r}"
    );
    assert!(f["degraded_ms"].as_u64() > Some(0), "{f}");
    assert!(
        r["longest_gap_ms"].as_u64() >= Some(1000) && r["nines"].is_number(),
        "{r}"
    );
    assert_eq!((ft.seen().boots, restart.seen().boots), (0, 1));
}

/// Class `restart` with a disk of each host's own: a copy of the disk follows, and the guest is booted from it; with all that a client was told.
#[test]
fn a_guest_is_booted_from_a_copy_of_its_disk() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b", "c"], LEASE_MS);
    for host in ["a", "b", "c"] {
        std::fs::write(pool.path(&format!("d-{host}.raw")), vec![0; 12 << 20]).unwrap();
    }
    let disk = format!("{},format=raw", pool.path("d-{host}.raw").display());
    let client = pool.disk_client("d");
    pool.create_with("d", "restart", "disk=1", &["--disk", &disk]);
    let safe = |pool: &Pool| pool.other("").vm("d")["protection"] == "restart elsewhere";
    wait("a copy of its disk to be there", || safe(&pool));
    let only_disks = |pool: &Pool| {
        let host = host_of(pool, "d")?;
        let host = pool.hosts.iter().find(|h| h.name == host)?;
        let status = ask(&host.run_folder().join("d.sock"), &ControlRequest::Status, ANSWER).ok()?;
        (status["whole"] == false && status["protocol"]["protected"] == true).then_some(())
    };
    assert_eq!(only_disks(&pool), Some(()));
    let at_first = host_of(&pool, "d").unwrap();
    client.answer("", Instant::now());
    // It moves without a boot.
    let to = pool.other(&at_first).name.clone();
    pool.other("").run(&["migrate", "d", "--to", &to]);
    wait("d to be moved, and a copy of its disk to be there", || {
        host_of(&pool, "d").as_ref() == Some(&to) && safe(&pool)
    });
    client.answer(&at_first, Instant::now());
    assert_eq!(client.seen().boots, 0, "a move is no boot");
    // All of it was mirrored for that, so it could do without a boot for a while longer.
    wait("its disk to be enough again", || {
        host_of(&pool, "d").as_ref() == Some(&to) && safe(&pool) && only_disks(&pool).is_some()
    });
    // Its process dies: it is booted where it was.
    let monitors = pool.host(&to).processes();
    let (pid, _) = monitors.iter().find(|(_, line)| line.contains(" vmm ")).unwrap();
    let killed = Instant::now();
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    wait("a boot", || client.seen().boots == 1);
    let (host, gap) = client.answer("", killed);
    assert_eq!(host, to, "where it was");
    println!("d: answers {gap:?} after the death of its process");
    wait("a copy of its disk to be there again", || safe(&pool));
    // Its host dies: it is booted where the copy is.
    let killed = pool.host(&to).power_off();
    let (host, gap) = client.answer(&to, killed);
    println!("d: answers from {host} {gap:?} after the death of {to}");
    assert_eq!(client.seen().boots, 2);
    wait("a copy of its disk on the third host", || {
        safe(&pool) && host_of(&pool, "d") == Some(host.clone())
    });
    assert_eq!(client.seen().boots, 2, "once");
    // Off is off.
    pool.other(&to).run(&["vm", "stop", "d", "--now"]);
    wait("d to be off", || pool.other(&to).vm("d")["state"] == "off");
    pool.host(&to).start_daemon();
    wait("all to be well again", || {
        pool.other(&to).try_run(&["status"]).status.success()
    });
    assert_eq!(pool.other(&to).vm("d")["state"], "off");
    let seen = client.seen();
    assert_eq!(seen.boots, 2);
    assert!(
        seen.counter >= seen.replies,
        "nothing that was answered is lost: {seen:?}"
    );
}

/// The daemons of all hosts are restarted, one after the other; no VM notices.
#[test]
fn daemons_are_restarted_while_vms_go_on() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b", "c"], LEASE_MS);
    let (ft, restart) = (pool.client("f"), pool.client("r"));
    pool.create("f", "ft");
    pool.create("r", "restart");
    wait("f to be protected", || protected(&pool, "f"));
    restart.answer("", Instant::now());
    let before: Vec<_> = pool
        .hosts
        .iter()
        .flat_map(common::Host::processes)
        .filter(|(_, line)| line.contains(" vmm "))
        .collect();
    assert!(before.len() >= 3, "{before:?}");
    for name in ["a", "b", "c"] {
        pool.host(name).stop_daemon();
        let restarted = Instant::now();
        pool.host(name).start_daemon();
        wait("the pool to be well", || {
            pool.host(name).try_run(&["status"]).status.success()
        });
        println!("daemon of {name}: well again after {:?}", restarted.elapsed());
    }
    let after: Vec<_> = pool
        .hosts
        .iter()
        .flat_map(common::Host::processes)
        .filter(|(_, line)| line.contains(" vmm "))
        .collect();
    assert_eq!(before, after, "the same processes run the VMs");
    assert_eq!((ft.seen().boots, restart.seen().boots), (0, 0));
}

/// Two hosts and a witness: the pool goes on without its witness, and without either host.
#[test]
fn two_hosts_and_a_witness_survive_each_one() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b", "w"], LEASE_MS);
    let ft = pool.client("f");
    pool.create("f", "ft");
    for _ in 0..2 {
        wait("f to be protected", || protected(&pool, "f"));
        let dies = host_of(&pool, "f").unwrap();
        wait("the store to be led where no VM runs", || {
            let led_by = pool.other("").status()["store_led_by"].clone();
            led_by.is_string() && led_by != dies.as_str()
        });
        let killed = pool.host(&dies).power_off();
        let (to, gap) = ft.answer(&dies, killed);
        println!("f: answers from {to} {gap:?} after the death of {dies}");
        pool.host(&dies).start_daemon();
    }
    wait("all to be well again", || {
        pool.other("").try_run(&["status"]).status.success()
    });
    pool.host("w").power_off();
    let without = Instant::now();
    ft.answer("", without + Duration::from_secs(2));
    wait("the witness to be missed", || {
        let hosts = pool.other("").status()["hosts"].clone();
        hosts
            .as_array()
            .into_iter()
            .flatten()
            .any(|h| h["host"] == "w" && h["health"] != "up")
    });
    assert!(protected(&pool, "f"), "its death takes nothing from a VM");
    assert_eq!(ft.seen().boots, 0);
}

/// A drain moves what is protected without a gap in its protection, and the host can be used again.
#[test]
fn a_host_is_drained_and_used_again() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b", "c"], LEASE_MS);
    let ft = pool.client("f");
    pool.create("f", "ft");
    wait("f to be protected", || protected(&pool, "f"));
    let from = host_of(&pool, "f").unwrap();
    let plan = pool.other("").run(&["host", "drain", &from, "--dry-run"]);
    assert!(plan.contains("would do"), "{plan}");
    assert_eq!(
        host_of(&pool, "f"),
        Some(from.clone()),
        "--dry-run changes nothing"
    );
    ft.forget_gap();
    let degraded_ms = || {
        let found = pool.other(&from).json(&["availability", "f"]);
        found["degraded_ms"].as_u64().unwrap()
    };
    let before = degraded_ms();
    pool.other("").run(&["host", "drain", &from]);
    wait("the host to be empty", || {
        let hosts = pool.other("").json(&["host", "list"]);
        hosts
            .as_array()
            .into_iter()
            .flatten()
            .any(|h| h["host"] == from.as_str() && h["admin"] == "maintenance")
    });
    wait("f to be protected elsewhere", || protected(&pool, "f"));
    let seen = ft.seen();
    let without = degraded_ms() - before;
    println!(
        "f: longest time without an answer during the drain {:?}, without a standby for {without} ms (as seen once a second)",
        seen.longest
    );
    let events = pool.other(&from).run(&["events", "--subject", "f"]);
    assert!(
        events.contains("this one is filled before it leaves"),
        "its next standby is filled before it is moved: {events}"
    );
    assert_eq!(seen.boots, 0);
    assert_ne!(host_of(&pool, "f"), Some(from.clone()));
    let left = pool.host(&from).processes();
    assert!(!left.iter().any(|(_, line)| line.contains(" vmm ")), "{left:?}");
    pool.other("").run(&["host", "resume", &from]);
    wait("all to be well", || {
        pool.other("").try_run(&["status"]).status.success()
    });
}

/// A standby is tried while the VM runs on; a drill that fails is a problem until one succeeds.
#[test]
fn a_standby_is_drilled() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b"], LEASE_MS);
    let ft = pool.client("f");
    pool.create("f", "ft");
    wait("f to be protected", || protected(&pool, "f"));
    ft.answer("", Instant::now());
    ft.forget_gap();
    let epoch = |report: &serde_json::Value| report["epoch"].as_u64().unwrap();
    let first = pool.other("").json(&["drill", "f"]);
    assert!(first["ok"] == true && epoch(&first) > 0, "{first}");
    println!("{first}");
    let primary = host_of(&pool, "f").unwrap();
    assert_ne!(first["host"], primary.as_str(), "the standby is drilled");
    let second = pool.other("").json(&["drill", "f"]);
    assert!(
        second["ok"] == true && epoch(&second) > epoch(&first),
        "the standby goes on between drills: {second}"
    );
    println!(
        "f: longest time without an answer during two drills {:?}",
        ft.seen().longest
    );
    assert!(protected(&pool, "f") && ft.seen().boots == 0);
    let gone = |pool: &Pool| {
        let left = pool.hosts.iter().map(common::Host::copies).sum::<usize>();
        assert_eq!(left, 0, "copies outlive their drill");
    };
    gone(&pool);

    // No room for the copy: it fails, is told, and does nothing to the VM.
    let folder = pool
        .hosts
        .iter()
        .find(|h| h.name != primary)
        .unwrap()
        .folder
        .join("data/drill");
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::write(&folder, "in the way").unwrap();
    let out = pool.other("").try_run(&["drill", "f"]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(!out.status.success() && said.contains("drill FAILED"), "{said}");
    let status = pool.other("").run_anyway(&["status"]);
    assert!(status.contains("VM f: its last drill FAILED"), "{status}");
    std::fs::remove_file(&folder).unwrap();
    pool.other("").run(&["drill", "f"]);
    pool.other("").run(&["drill", "f", "--last"]);
    wait("all to be well", || {
        pool.other("").try_run(&["status"]).status.success()
    });
    let events = pool.other("").run(&["events", "--subject", "f"]);
    assert!(
        events.contains("drill passed") && events.contains("drill FAILED"),
        "{events}"
    );
    gone(&pool);

    // A daemon that is killed in the middle of a drill takes the copy along, and the next one removes the rest.
    let standby = pool.hosts.iter().position(|h| h.name != primary).unwrap();
    let asker = std::thread::scope(|scope| {
        let asked = scope.spawn(|| pool.hosts[standby].try_run(&["drill", "f"]));
        let copies = || pool.hosts[standby].copies();
        wait("the copy to run", || copies() > 0);
        pool.hosts[standby].kill_daemon();
        wait("the copy to end with the daemon", || copies() == 0);
        asked.join().unwrap()
    });
    assert!(
        !asker.status.success(),
        "nobody answers for a drill that was cut off"
    );
    assert!(folder.is_dir(), "it leaves its files");
    let host = &mut pool.hosts[standby];
    drop(host.daemon.take().map(|mut d| d.wait()));
    host.start_daemon();
    wait("what it left to be removed", || !folder.exists());
    wait("f to be protected, all the same", || protected(&pool, "f"));
    assert_eq!(ft.seen().boots, 0);

    pool.create("n", "none");
    let out = pool.other("").try_run(&["drill", "n"]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        !out.status.success() && said.contains("no standby that could take over"),
        "{said}"
    );

    // By itself: one more soon, and then not again for a day.
    let at = |pool: &Pool| {
        pool.other("").json(&["drill", "f", "--last"])["at_ms"]
            .as_u64()
            .unwrap()
    };
    let before = at(&pool);
    let said = pool.other("").try_run(&["drill", "f", "--every", "5s"]);
    assert!(!said.status.success(), "once a minute at most");
    pool.other("").run(&["drill", "f", "--every", "1m"]);
    wait("a drill that is due", || at(&pool) > before);
    pool.other("").run(&["drill", "f", "--every", "off"]);
    assert!(protected(&pool, "f") && ft.seen().boots == 0);
}

/// A dead host whose power an agent cuts is fenced at once: its `restart` VM does not wait for its lease. An agent that does not reach the
/// power is refused, one that fails changes nothing.
#[test]
fn a_fence_agent_spares_the_lease() {
    use std::os::unix::fs::PermissionsExt;
    if !possible() {
        return;
    }
    const LONG_LEASE_MS: u64 = 40_000;
    let mut pool = Pool::new(&["a", "b", "c"], LONG_LEASE_MS);
    let client = pool.client("r");
    pool.create("r", "restart");
    let lost = wait_for("r to run", || host_of(&pool, "r"));
    client.answer("", Instant::now());
    let (agent, said) = (pool.path("fence_test"), pool.path("said"));
    let write = |script: &str| {
        std::fs::write(&agent, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let set = [
        "host",
        "fence",
        &lost,
        "--agent",
        agent.to_str().unwrap(),
        "--option",
        "plug=7",
    ];
    write("echo no such plug >&2; exit 1");
    let out = pool.other(&lost).try_run(&set);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && text.contains("no such plug"), "{text}");
    let out = pool.hosts.iter().find(|h| h.name == lost).unwrap().try_run(&set);
    assert!(!out.status.success(), "no host fences itself");
    // The first time it does not get through.
    write(&format!(
        "options=$(cat)\ncase $options in *action=status*) exit 0;; esac\n\
         echo \"$options\" | tr '\\n' ' ' >> {0}; echo >> {0}\n[ $(wc -l < {0}) -gt 1 ]",
        said.display()
    ));
    pool.other(&lost).run(&set);
    let killed = pool.host(&lost).power_off();
    let (to, gap) = client.answer(&lost, killed);
    println!("r: answers from {to} {gap:?} after the death of {lost}");
    let asked = std::fs::read_to_string(&said).unwrap();
    assert_eq!(asked, "action=reboot plug=7 \naction=reboot plug=7 \n");
    let events = pool.other(&lost).run(&["events", "--subject", &lost]);
    assert!(
        events.contains("could not be cut") && events.contains("it is fenced"),
        "{events}"
    );
    assert!(
        gap < Duration::from_millis(LONG_LEASE_MS),
        "it waited for the lease of {lost}"
    );
}

/// The members of the store that this file of a host names, at JSON path `at`.
fn store_members(pool: &Pool, host: &str, file: &str, at: &str) -> usize {
    let path = pool.path(host).join("data").join(file);
    let text = std::fs::read(path).unwrap_or_default();
    let found: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
    found.pointer(at).and_then(|e| e.as_array()).map_or(0, Vec::len)
}

/// Each host, and each protected VM that runs, knows all members of the store: who knew only the one that dies could neither read
/// what the others have decided nor take over.
#[test]
fn everybody_knows_all_of_the_store_also_a_running_vm() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b"], 3000);
    pool.create("r", "ft");
    wait("r to be protected", || protected(&pool, "r"));
    pool.admit("c", &["--vmm-arg=--cgroup=off"]);
    let of_host = "/store/managed/endpoints";
    assert_eq!(
        store_members(&pool, "c", "node.json", of_host),
        3,
        "the new one, from its first moment"
    );
    for host in ["a", "b"] {
        wait(&format!("{host} to know of all"), || {
            store_members(&pool, host, "node.json", of_host) == 3
        });
        // Written once the process has taken it.
        wait(&format!("the VM on {host} to know of all"), || {
            store_members(&pool, host, "vm/r/protect.json", "/store/etcd/endpoints") == 3
        });
    }
    pool.all_up();
    wait("r to be protected", || protected(&pool, "r"));
}
