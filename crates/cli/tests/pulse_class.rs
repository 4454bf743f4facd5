//! The class of a VM is changed while it runs, and VMs of all classes move while they run: no guest is booted, no answer is lost.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::{Pool, possible, wait, wait_for};
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use steadfast_disk::image::{self, ImageFormat, create};

const LEASE_MS: u64 = 6000;

fn host_of(pool: &Pool, vm: &str) -> Option<String> {
    let found = pool.other("").vm(vm);
    (found["state"] == "running").then(|| found["host"].as_str().map(str::to_owned))?
}

/// The same, also of one whose host is dead.
fn host_of_any(pool: &Pool, vm: &str) -> String {
    pool.other("").vm(vm)["host"].as_str().unwrap().to_owned()
}

fn protection(pool: &Pool, vm: &str) -> String {
    pool.other("").vm(vm)["protection"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

/// The monitor's processes of a VM, on all hosts.
fn processes(pool: &Pool, vm: &str) -> usize {
    let path = format!("/vm/{vm}/");
    let all = pool.hosts.iter().flat_map(common::Host::processes);
    all.filter(|(_, line)| line.contains(" vmm ") && line.contains(&path))
        .count()
}

/// The same on one host.
fn processes_on(pool: &Pool, vm: &str, host: &str) -> usize {
    let path = format!("/vm/{vm}/");
    let of = |h: &common::Host| {
        h.processes()
            .iter()
            .filter(|(_, line)| line.contains(&path))
            .count()
    };
    pool.hosts.iter().filter(|h| h.name == host).map(of).sum()
}

fn kill(process: u32) {
    let process = rustix::process::Pid::from_raw(process as i32).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
}

fn class(pool: &Pool, vm: &str, class: &str) {
    pool.other("").run(&["protect", vm, "--class", class]);
}

#[test]
fn the_class_of_a_running_vm_is_changed() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b", "c"], LEASE_MS);
    let client = pool.client("r");
    pool.create("r", "none");
    let first = wait_for("r to run", || host_of(&pool, "r"));
    client.answer("", Instant::now());
    client.forget_gap();
    pool.other("")
        .run(&["vm", "limit", "r", "--net-max", "in=2MiB,out=1MiB"]);
    let limited = || {
        let on = host_of(&pool, "r")?;
        let host = pool.hosts.iter().find(|h| h.name == on)?;
        let rate = host.json(&["vm", "status", "r"])["net_rate"].clone();
        (rate["in_bytes_per_s"] == 2 << 20 && rate["out_bytes_per_s"] == 1 << 20).then_some(())
    };
    wait_for("its cards to be limited", limited);
    // What a daemon leaves that is killed at the end of a change.
    let former = pool.path(&first).join("run/r.former");
    drop(std::os::unix::net::UnixListener::bind(former).unwrap());
    for protected in ["ft", "checkpoint", "ft"] {
        class(&pool, "r", protected);
        wait(&format!("r to be protected as {protected}"), || {
            protection(&pool, "r") == "protected" && processes(&pool, "r") == 2
        });
        println!("r: {protected}, the longest gap was {:?}", client.seen().longest);
    }
    wait_for("the cards of the new process to be limited too", limited);
    class(&pool, "r", "restart");
    wait("nothing to be mirrored any more", || {
        protection(&pool, "r") == "restart elsewhere" && processes(&pool, "r") == 1
    });
    client.answer("", Instant::now());
    class(&pool, "r", "ft");
    wait("r to be protected again", || {
        protection(&pool, "r") == "protected"
    });
    assert_eq!(host_of(&pool, "r").as_ref(), Some(&first), "it was moved");
    let seen = client.seen();
    println!(
        "r: {} answers, the longest gap was {:?}",
        seen.replies, seen.longest
    );
    assert_eq!(seen.boots, 0, "it was booted");
    // And the promise holds.
    let killed = pool.host(&first).power_off();
    client.answer(&first, killed);
    assert_eq!(client.seen().boots, 0, "it was booted");
}

/// A VM that nobody protects is moved by hand, and off a host that is emptied.
#[test]
fn a_vm_without_protection_moves_while_it_runs() {
    if !possible() {
        return;
    }
    let pool = Pool::new(&["a", "b", "c"], LEASE_MS);
    let (none, restart) = (pool.client("n"), pool.client("r"));
    pool.create("n", "none");
    pool.create("r", "restart");
    let from = wait_for("n to run", || host_of(&pool, "n"));
    wait_for("r to run", || host_of(&pool, "r"));
    for client in [&none, &restart] {
        client.answer("", Instant::now());
        client.forget_gap();
    }
    let to = ["a", "b", "c"].into_iter().find(|h| *h != from).unwrap();
    pool.other("").run(&["migrate", "n", "--to", to]);
    wait("n to be moved", || host_of(&pool, "n").as_deref() == Some(to));
    wait("nothing of it to be left", || processes(&pool, "n") == 1);
    let lost = host_of(&pool, "r").unwrap();
    pool.other("").run(&["host", "drain", &lost]);
    wait("r to leave", || host_of(&pool, "r").is_some_and(|h| h != lost));
    wait("nothing of it to be left", || processes(&pool, "r") == 1);
    for (vm, client) in [("n", &none), ("r", &restart)] {
        let moved = host_of(&pool, vm).unwrap();
        let (from, _) = client.answer("", Instant::now());
        assert_eq!(from, moved, "{vm} answers from where it is said to be");
        let seen = client.seen();
        println!("{vm}: the longest gap was {:?}", seen.longest);
        assert_eq!(seen.boots, 0, "{vm} was booted");
    }
    assert_eq!(protection(&pool, "r"), "restart elsewhere");
}

/// The process with the engine cannot begin: the one before goes on, and why is told.
#[test]
fn a_vm_that_cannot_be_mirrored_runs_on() {
    if !possible() {
        return;
    }
    let pool = Pool::new(&["a", "b"], LEASE_MS);
    let client = pool.client("r");
    pool.create("r", "restart");
    let on = wait_for("r to run", || host_of(&pool, "r"));
    client.answer("", Instant::now());
    client.forget_gap();
    // The new process cannot open the console's file.
    let console = pool.path(&on).join("data/vm/r/console");
    let aside = console.with_extension("aside");
    std::fs::rename(&console, &aside).unwrap();
    std::fs::create_dir(&console).unwrap();
    class(&pool, "r", "ft");
    wait("people to be told", || {
        pool.other("")
            .run(&["events", "--subject", "r"])
            .contains("it cannot be mirrored, and runs as before")
    });
    let since = Instant::now();
    client.answer("", since);
    assert_eq!(client.seen().boots, 0, "it was booted");
    assert_ne!(protection(&pool, "r"), "protected");
    println!("r: the longest gap was {:?}", client.seen().longest);
    // It is tried again by itself.
    std::fs::remove_dir(&console).unwrap();
    std::fs::rename(&aside, &console).unwrap();
    wait("r to be protected", || protection(&pool, "r") == "protected");
    assert_eq!(client.seen().boots, 0, "it was booted");
}

/// The process with the engine waits for its console: a pipe that nobody reads.
fn block_console(pool: &Pool, host: &str) -> PathBuf {
    let console = pool.path(host).join("data/vm/r/console");
    let _ = std::fs::remove_file(&console);
    let made = Command::new("mkfifo").arg(&console).status().unwrap();
    assert!(made.success());
    console
}

/// Longer than a process that is ready may take, as on a host whose CPUs are all taken: the guest runs meanwhile. It can be stopped
/// and reset as before.
#[test]
fn a_process_that_is_long_in_beginning_keeps_nobody_waiting() {
    if !possible() {
        return;
    }
    let pool = Pool::new(&["a", "b"], LEASE_MS);
    let client = pool.client("r");
    pool.create("r", "restart");
    let begin = || {
        let on = wait_for("r to run", || host_of(&pool, "r"));
        client.answer("", Instant::now());
        let console = block_console(&pool, &on);
        class(&pool, "r", "ft");
        let change = pool.path(&on).join("run/r.change");
        wait("the change to begin", || {
            change.exists() && processes(&pool, "r") >= 2
        });
        (on, console, change)
    };
    let (_, console, change) = begin();
    client.forget_gap();
    let until = Instant::now() + Duration::from_secs(12);
    while Instant::now() < until {
        assert!(change.exists(), "it is not waited for");
        std::thread::sleep(Duration::from_millis(50));
    }
    client.answer("", Instant::now());
    let longest = client.seen().longest;
    println!("r: the longest gap was {longest:?}");
    assert!(longest < Duration::from_secs(2), "the guest stood still");

    let stopped = Instant::now();
    pool.other("").run(&["vm", "stop", "r", "--now"]);
    wait("r to be off", || pool.other("").vm("r")["state"] == "off");
    wait("nothing of it to be left", || processes(&pool, "r") == 0);
    assert!(
        stopped.elapsed() < Duration::from_secs(60),
        "it waited for the change"
    );
    std::fs::remove_file(console).unwrap();
    class(&pool, "r", "restart");
    wait("r to be let on", || {
        pool.other("").try_run(&["vm", "start", "r"]).status.success()
    });

    // Nobody but the change's own daemon would see this death.
    let (on, console, change) = begin();
    let boots = client.seen().boots;
    std::fs::remove_file(&console).unwrap();
    let host = pool.hosts.iter().find(|h| h.name == on).unwrap();
    let runs = host
        .processes()
        .into_iter()
        .find(|(_, line)| line.contains(" vmm ") && line.contains("/vm/r/") && !line.contains("--protect"));
    let died = Instant::now();
    kill(runs.unwrap().0);
    wait("r to be booted again", || client.seen().boots > boots);
    println!(
        "r: booted again {:?} after its process was killed",
        died.elapsed()
    );
    assert!(
        died.elapsed() < Duration::from_secs(60),
        "it waited for the change"
    );
    wait("the change to have ended", || !change.exists());
    class(&pool, "r", "restart");
    wait("r to run without", || {
        protection(&pool, "r") == "restart elsewhere" && processes(&pool, "r") == 1
    });
    // It may have been started with the engine: then it is no use for what follows.
    pool.other("").run(&["vm", "stop", "r", "--now"]);
    wait("r to be off", || pool.other("").vm("r")["state"] == "off");
    wait("r to be let on", || {
        pool.other("").try_run(&["vm", "start", "r"]).status.success()
    });

    let (on, console, _) = begin();
    let boots = client.seen().boots;
    let host = pool.hosts.iter().find(|h| h.name == on).unwrap();
    host.run(&["vm", "reset", "r"]);
    wait("the guest to start anew", || client.seen().boots == boots + 1);
    // Its reader stays; what is written is little.
    let _console = File::open(console).unwrap();
    wait("r to be protected", || {
        protection(&pool, "r") == "protected" && processes(&pool, "r") == 2
    });
    client.answer("", Instant::now());
    assert_eq!(client.seen().boots, boots + 1, "it was booted");
}

/// The end of the old process is an end like any other: what turned itself off is not booted again.
#[test]
fn a_guest_that_turns_itself_off_meanwhile_stays_off() {
    if !possible() {
        return;
    }
    let pool = Pool::new(&["a", "b"], LEASE_MS);
    let client = pool.client("r");
    pool.create("r", "none");
    let on = wait_for("r to run", || host_of(&pool, "r"));
    client.answer("", Instant::now());
    let console = block_console(&pool, &on);
    class(&pool, "r", "ft");
    let change = pool.path(&on).join("run/r.change");
    wait("the change to begin", || {
        change.exists() && processes(&pool, "r") >= 2
    });
    let boots = client.seen().boots;
    // This guest has no power button: its process ends as if it had.
    let mut control = std::os::unix::net::UnixStream::connect(pool.path(&on).join("run/r.sock")).unwrap();
    control.write_all(b"{\"verb\":\"stop\"}\n").unwrap();
    wait("the change to have ended", || !change.exists());
    std::fs::remove_file(console).unwrap();
    wait("r to be off", || pool.other("").vm("r")["state"] == "off");
    wait("nothing of it to be left", || processes(&pool, "r") == 0);
    let events = pool.other("").run(&["events", "--subject", "r"]);
    assert!(events.contains("its guest shut itself down"), "{events}");
    assert_eq!(client.seen().boots, boots, "it was booted");
}

/// The daemon is killed in the middle of the change, again and again: its next run brings it to an end, and the guest runs once.
#[test]
fn a_change_that_its_daemon_did_not_survive_is_brought_to_an_end() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b"], LEASE_MS);
    let client = pool.client("r");
    pool.create("r", "none");
    for delay_ms in [0, 25, 90, 150, 300] {
        let on = wait_for("r to run", || host_of(&pool, "r"));
        client.answer("", Instant::now());
        let boots = client.seen().boots;
        let change = pool.host(&on).run_folder().join("r.change");
        class(&pool, "r", "ft");
        let until = Instant::now() + Duration::from_secs(60);
        while !change.exists() && protection(&pool, "r") != "protected" {
            assert!(Instant::now() < until, "the change does not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay_ms));
        pool.host(&on).crash_daemon();
        wait("r to be protected", || protection(&pool, "r") == "protected");
        wait("the change to have ended", || {
            !change.exists() && processes(&pool, "r") == 2
        });
        client.answer("", Instant::now());
        assert_eq!(client.seen().boots, boots, "it was booted, {delay_ms} ms");
        // Back in a process without the engine, for the next time.
        pool.other("").run(&["vm", "stop", "r", "--now"]);
        wait("r to be off", || pool.other("").vm("r")["state"] == "off");
        class(&pool, "r", "none");
        // What is left of it on its hosts is in the way for a moment.
        wait("r to be let on", || {
            pool.other("").try_run(&["vm", "start", "r"]).status.success()
        });
        wait("r to be booted", || client.seen().boots > boots);
    }
}

/// A qcow2 disk as libvirt and Proxmox make them, of a VM that runs: it is protected, its copy made where there was none, it moves, is drilled,
/// and survives its host.
#[test]
fn a_running_vm_on_a_qcow2_disk_is_protected() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a", "b", "c"], LEASE_MS);
    let image_of = |pool: &Pool, host: &str| pool.path(&format!("d-{host}.qcow2"));
    for host in ["a", "b", "c"] {
        create::create_qcow2(&image_of(&pool, host), 12 << 20).unwrap();
    }
    let client = pool.disk_client("d");
    // The format is not told: it is what the image is when the VM is made.
    let disk = pool.path("d-{host}.qcow2").display().to_string();
    pool.create_with("d", "none", "disk=verify ring=48", &["--disk", &disk]);
    let first = wait_for("d to run", || host_of(&pool, "d"));
    client.answer("", Instant::now());
    for host in ["a", "b", "c"].into_iter().filter(|h| *h != first) {
        std::fs::remove_file(image_of(&pool, host)).unwrap();
    }
    class(&pool, "d", "ft");
    wait("d to be protected", || protection(&pool, "d") == "protected");
    let in_sync = pool.other("").vm("d")["in_sync"].clone();
    let other = in_sync[0].as_str().unwrap().to_owned();
    let made = image::look_at(&image_of(&pool, &other), None).unwrap();
    assert_eq!((made.format, made.capacity_bytes), (ImageFormat::Qcow2, 12 << 20));
    let report = pool.other("").json(&["drill", "d"]);
    assert!(report["ok"] == true, "{report}");
    client.answer("", Instant::now());
    pool.other("").run(&["migrate", "d", "--to", &other]);
    wait("d to be moved, and protected", || {
        host_of(&pool, "d").as_ref() == Some(&other) && protection(&pool, "d") == "protected"
    });
    client.answer(&first, Instant::now());
    let killed = pool.host(&other).power_off();
    let (host, gap) = client.answer(&other, killed);
    println!("d: answers from {host} {gap:?} after the death of {other}");
    let seen = client.seen();
    assert_eq!(seen.boots, 0, "its guest was never booted again");
    assert!(
        seen.counter >= seen.replies,
        "nothing that was answered is lost: {seen:?}"
    );
}

/// One host has another CPU: it stands by for nobody, the pool looks for another one, and nothing is moved to it.
#[test]
fn a_host_with_another_cpu_is_passed_over() {
    if !possible() {
        return;
    }
    let mut pool = Pool::new(&["a"], LEASE_MS);
    pool.create("v", "none");
    wait("v to run", || host_of(&pool, "v").is_some());
    pool.admit("b", &["--vmm-arg=--cgroup=off", "--vmm-arg=--cpu-without=sse2"]);
    pool.all_up();
    class(&pool, "v", "ft");
    let of_b = "unprotected: b cannot be its standby";
    wait("people to be told", || protection(&pool, "v").starts_with(of_b));
    wait("b to be left alone", || {
        !pool
            .host("b")
            .processes()
            .iter()
            .any(|(_, line)| line.contains("/vm/v/"))
    });
    let tried = pool.other("").try_run(&["migrate", "v", "--to", "b"]);
    assert!(
        String::from_utf8_lossy(&tried.stderr).contains("cannot go on on b"),
        "{tried:?}"
    );
    assert!(
        protection(&pool, "v").starts_with(of_b),
        "{}",
        protection(&pool, "v")
    );
    pool.admit("c", &["--vmm-arg=--cgroup=off"]);
    wait("v to be protected by c", || {
        protection(&pool, "v") == "protected" && pool.other("").vm("v")["in_sync"] == serde_json::json!(["c"])
    });
    assert_eq!(host_of(&pool, "v").as_deref(), Some("a"));
}

/// A VM on a storage that all hosts reach moves while it runs, by hand and off a host that is emptied; a host that dies while it is on its way
/// costs a boot, once its lease is out, and never two that run it.
#[test]
fn a_vm_on_shared_storage_moves_while_it_runs() {
    if !possible() {
        return;
    }
    let mut pool = Pool::made(
        &["a", "b", "c"],
        LEASE_MS,
        &["--vmm-arg=--cgroup=off", "--storage", "san"],
    );
    std::fs::create_dir(pool.path("san")).unwrap();
    for host in ["a", "b", "c"] {
        std::os::unix::fs::symlink(pool.path("san"), pool.path(&format!("san-{host}"))).unwrap();
    }
    std::fs::create_dir(pool.path("other")).unwrap();
    for (vm, class) in [("r", "restart"), ("n", "none")] {
        for storage in ["san", "other"] {
            let image = pool.path(&format!("{storage}/{vm}.raw"));
            match vm {
                "n" => create::create_qcow2(&image, 12 << 20).unwrap(),
                _ => create::create_raw(&image, 12 << 20).unwrap(),
            }
        }
        let disk = pool.path(&format!("san-{{host}}/{vm}.raw")).display().to_string();
        let settings = ["--disk", &disk, "--shared", "san"];
        pool.create_with(vm, class, "disk=verify ring=48", &settings);
    }
    let clients = [pool.disk_client("r"), pool.disk_client("n")];
    for vm in ["r", "n"] {
        wait_for(&format!("{vm} to run"), || host_of(&pool, vm));
    }
    for client in &clients {
        client.answer("", Instant::now());
        client.forget_gap();
    }
    let refused = pool.other("").try_run(&["protect", "r", "--class", "ft"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("only disks of a host's own are mirrored"),
        "{said}"
    );
    // One host says that it reaches the storage, and does not: it stays where it is, and who asked is told.
    let from = host_of(&pool, "n").unwrap();
    let to = ["a", "b", "c"].into_iter().find(|h| *h != from).unwrap();
    std::fs::remove_file(pool.path(&format!("san-{to}"))).unwrap();
    pool.other("").run(&["migrate", "n", "--to", to]);
    wait("people to be told", || {
        let told = pool.other("").run(&["events", "--subject", "n"]);
        told.contains(&format!("{to} cannot take it")) && told.contains("No such file or directory")
    });
    wait("nothing of it to be there", || processes_on(&pool, "n", to) == 0);
    // Its path leads to another disk.
    let lead = |to: &str, storage: &str| {
        let path = pool.path(&format!("san-{to}"));
        let _ = std::fs::remove_file(&path);
        std::os::unix::fs::symlink(pool.path(storage), path).unwrap();
    };
    lead(to, "other");
    pool.other("").run(&["migrate", "n", "--to", to]);
    wait("people to be told", || {
        let told = pool.other("").run(&["events", "--subject", "n"]);
        told.contains("it is not the disk that the VM has")
    });
    wait("nothing of it to be there", || processes_on(&pool, "n", to) == 0);
    lead(to, "san");
    let refused = pool.other("").try_run(&["host", "storage", &from, "--none"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && said.contains("needs its storage: move it first"),
        "{said}"
    );
    // There and back: the former host is no standby that stays.
    let from = host_of(&pool, "n").unwrap();
    let to = ["a", "b", "c"].into_iter().find(|h| *h != from).unwrap();
    for to in [to, from.as_str()] {
        pool.other("").run(&["migrate", "n", "--to", to]);
        wait("n to be moved", || host_of(&pool, "n").as_deref() == Some(to));
        wait("nothing of it to be left", || processes(&pool, "n") == 1);
    }
    let left = host_of(&pool, "r").unwrap();
    pool.other("").run(&["host", "drain", &left]);
    wait("r to leave", || host_of(&pool, "r").is_some_and(|h| h != left));
    wait("nothing of it to be left", || processes(&pool, "r") == 1);
    pool.other("").run(&["host", "resume", &left]);
    for (vm, client) in ["r", "n"].into_iter().zip(&clients) {
        let (from, _) = client.answer("", Instant::now());
        assert_eq!(
            Some(from),
            host_of(&pool, vm),
            "{vm} answers from where it is said to be"
        );
        let seen = client.seen();
        println!("{vm}: the longest gap was {:?}", seen.longest);
        assert_eq!(seen.boots, 0, "{vm} was booted");
    }
    assert_eq!(protection(&pool, "r"), "restart elsewhere");
    // Its host dies when the other one could be handed it.
    let from = host_of(&pool, "r").unwrap();
    let to = ["a", "b", "c"].into_iter().find(|h| *h != from).unwrap();
    pool.other(&from).run(&["migrate", "r", "--to", to]);
    wait("it to be on its way", || processes_on(&pool, "r", to) > 0);
    let killed = pool.host(&from).power_off();
    let (host, after) = clients[0].answer(&from, killed);
    println!("r: answers from {host} {after:?} after the death of {from}");
    let seen = clients[0].seen();
    assert!(
        seen.counter >= seen.replies,
        "nothing that was answered is lost: {seen:?}"
    );
    wait("it to be well again", || {
        protection(&pool, "r") == "restart elsewhere"
    });
    let only_on = |pool: &Pool, vm: &str, host: &str| {
        let mut hosts = pool.hosts.iter();
        hosts.all(|h| (processes_on(pool, vm, &h.name) > 0) == (h.name == host))
    };
    wait("nothing of it to be elsewhere", || only_on(&pool, "r", &host));
    // What promises nothing is started where it was, once that host is back; a standby that was left behind goes.
    let on = host_of_any(&pool, "n");
    pool.host(&from).start_daemon();
    pool.all_up();
    if on != from {
        pool.host(&on).power_off();
        pool.host(&on).start_daemon();
    }
    let back = Instant::now();
    let (host, after) = clients[1].answer("", back);
    println!("n: answers from {host} {after:?} after the return of {on}");
    assert_eq!(host, on);
    let seen = clients[1].seen();
    assert!(
        seen.counter >= seen.replies,
        "nothing that was answered is lost: {seen:?}"
    );
    wait("nothing of it to be elsewhere", || only_on(&pool, "n", &on));
}
