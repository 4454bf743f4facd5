//! A pool of three daemons goes from one binary to another and back, with a protected flat guest on this machine's KVM.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::{Pool, possible, wait, wait_for};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const NAMES: [&str; 3] = ["a", "b", "c"];

/// A copy of the binary under test, without what only debuggers need: it goes over the network several times.
fn stripped(folder: &Path) -> PathBuf {
    let (from, to) = (Path::new(env!("CARGO_BIN_EXE_steadfast")), folder.join("old"));
    let done = Command::new("strip").arg("-o").arg(&to).arg(from).status();
    if !done.is_ok_and(|s| s.success()) {
        fs::copy(from, &to).unwrap();
    }
    to
}

/// Another build of the same release: bytes behind the end of an ELF file do nothing.
fn another(of: &Path, folder: &Path) -> PathBuf {
    let to = folder.join("new");
    fs::copy(of, &to).unwrap();
    let mut file = fs::File::options().append(true).open(&to).unwrap();
    file.write_all(b"another build").unwrap();
    to
}

fn script(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn versions(pool: &Pool) -> Vec<String> {
    let status = pool.other("").status();
    let hosts = status["hosts"].as_array().cloned().unwrap_or_default();
    hosts
        .iter()
        .filter_map(|h| h["version"].as_str().map(str::to_owned))
        .collect()
}

fn admins(pool: &Pool) -> Vec<String> {
    let status = pool.other("").status();
    let hosts = status["hosts"].as_array().cloned().unwrap_or_default();
    hosts
        .iter()
        .filter_map(|h| h["admin"].as_str().map(str::to_owned))
        .collect()
}

fn task(pool: &Pool, id: &str) -> Value {
    let tasks = pool.other("").json(&["pool", "tasks"]);
    let all = tasks.as_array().cloned().unwrap_or_default();
    all.into_iter().find(|t| t["id"] == id).unwrap_or(Value::Null)
}

/// Begins an upgrade; the task's name.
fn begin(pool: &Pool, args: &[&str]) -> String {
    let done = pool.other("").json(&[&["pool", "upgrade"][..], args].concat());
    done["task"].as_str().expect("a task").to_owned()
}

/// Waits until it ends, and prints its steps.
fn end(pool: &Pool, id: &str) -> Value {
    // Three hosts are emptied and filled again, one after the other.
    let (began, mut last) = (Instant::now(), String::new());
    loop {
        let now = task(pool, id);
        let text = now["text"].as_str().unwrap_or_default();
        if !text.is_empty() && text != last {
            last = text.to_owned();
            println!("{:>6.1} s: {text}", began.elapsed().as_secs_f32());
        }
        if now["state"].is_string() && now["state"] != "running" {
            return now;
        }
        assert!(
            began.elapsed() < Duration::from_secs(420),
            "it does not end: {now}"
        );
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Every host runs the new binary afterwards, the protected guest never stopped, and the way back is the same. What does not run,
/// or does not speak the same stream, is refused with nothing touched.
#[test]
fn a_pool_is_upgraded_and_goes_back() {
    if !possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let old = stripped(folder.path());
    let new = another(&old, folder.path());
    // The VM beside must not lose its lease on a busy machine while a daemon becomes another.
    let pool = Pool::with(&NAMES, 30_000, &["--vmm-arg=--cgroup=off"], Some(&old));
    let (client, beside) = (pool.client("f"), pool.client("r"));
    pool.create("f", "ft");
    pool.create("r", "restart");
    let protected = || pool.other("").vm("f")["protection"] == "protected";
    wait("f to be protected", protected);
    beside.answer("", Instant::now());
    let before = versions(&pool);
    assert_eq!(before.len(), 3);
    assert!(before.iter().all(|v| *v == before[0]), "{before:?}");

    let refused = |file: &str| {
        let out = pool.other("").try_run(&["pool", "upgrade", "--binary", file]);
        assert!(!out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let broken = script(folder.path(), "broken", "exit 1");
    let said = refused(&broken);
    assert!(said.contains("does not run on this host"), "{said}");
    let stranger = r#"echo '{"package":"9.0.0","wire_min":77,"wire_max":78}'"#;
    let said = refused(&script(folder.path(), "stranger", stranger));
    assert!(said.contains("versions 77 to 78 of the epoch stream"), "{said}");
    // It runs on the host that is asked, and not on another: no host is touched.
    let picky = format!(
        "case \"$*\" in *{}*) exit 1;; esac\nexec {} \"$@\"",
        pool.hosts[2].folder.join("data").display(),
        old.display()
    );
    let said = refused(&script(folder.path(), "picky", &picky));
    assert!(
        said.contains("host c") && said.contains("nothing was changed"),
        "{said}"
    );
    assert!(admins(&pool).iter().all(|a| a == "in use"));
    assert_eq!(versions(&pool), before);

    client.forget_gap();
    let new_file = new.to_str().unwrap();
    let plan = pool
        .other("")
        .run(&["pool", "upgrade", "--binary", new_file, "--dry-run"]);
    assert!(plan.contains("is upgraded"), "{plan}");
    let pids: Vec<u32> = pool
        .hosts
        .iter()
        .map(|h| h.daemon.as_ref().unwrap().id())
        .collect();
    let id = begin(&pool, &["--binary", new_file]);
    let ended = end(&pool, &id);
    assert_eq!(ended["state"], "done", "{ended}");
    let after = versions(&pool);
    assert!(
        after.iter().all(|v| *v == after[0] && *v != before[0]),
        "{after:?}"
    );
    assert!(admins(&pool).iter().all(|a| a == "in use"));
    for (host, pid) in pool.hosts.iter().zip(pids) {
        let program = fs::read(host.program.as_ref().unwrap()).unwrap();
        assert!(program.ends_with(b"another build"), "{}: not replaced", host.name);
        let running = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        assert_eq!(
            Some(&running),
            host.program.as_ref(),
            "the same process, become the new one"
        );
        let zombies = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        for child in zombies.split_whitespace() {
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            assert!(
                !stat.contains(") Z "),
                "{}: a child is left as a zombie: {stat}",
                host.name
            );
        }
    }
    let seen = client.seen();
    println!(
        "f: longest time without an answer during the upgrade {:?}",
        seen.longest
    );
    assert_eq!(seen.boots, 0, "it never stopped");
    assert_eq!(
        beside.seen().boots,
        0,
        "nor did the VM whose process outlives the daemon of its host"
    );
    assert!(protected());

    let id = begin(&pool, &["--back"]);
    // Two at a time are refused.
    let again = pool.other("").try_run(&["pool", "upgrade", "--back"]);
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && said.contains("is under way"), "{said}");
    let ended = end(&pool, &id);
    assert_eq!(ended["state"], "done", "{ended}");
    assert_eq!(versions(&pool), before, "back to what it was");
    assert_eq!(client.seen().boots, 0, "nor on the way back");
    wait("the pool to be well", || {
        pool.other("").try_run(&["status"]).status.success()
    });
}

/// A host that cannot replace its binary ends the upgrade with the reason; all hosts are in use again. An upgrade that waits can be
/// cancelled.
#[test]
fn an_upgrade_stops_at_the_host_that_fails() {
    if !possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let old = stripped(folder.path());
    let new = another(&old, folder.path());
    let pool = Pool::with(&["a", "b"], 6000, &["--vmm-arg=--cgroup=off"], Some(&old));
    // A folder in the way of the file that would take the program's place.
    for host in &pool.hosts {
        fs::create_dir_all(host.folder.join(".steadfast.new/in-the-way")).unwrap();
    }
    let id = begin(&pool, &["--binary", new.to_str().unwrap()]);
    let ended = end(&pool, &id);
    let text = ended["text"].as_str().unwrap();
    assert!(
        ended["state"] == "failed" && text.contains("stopped at host") && text.contains("in the place of"),
        "{ended}"
    );
    wait("the host to be used again", || {
        admins(&pool).iter().all(|a| a == "in use")
    });
    let first = versions(&pool);
    assert!(
        first.iter().all(|v| *v == first[0]),
        "nothing was replaced: {first:?}"
    );
    // With one host alone nothing is protected, so the upgrade waits, and says what for.
    pool.create("f", "ft");
    wait("f to be protected", || {
        pool.other("").vm("f")["protection"] == "protected"
    });
    pool.other("").run(&["vm", "set", "f", "--standbys", "2"]);
    let id = begin(&pool, &["--binary", new.to_str().unwrap()]);
    let text = wait_for("it to say what it waits for", || {
        let text = task(&pool, &id)["text"].as_str()?.to_owned();
        text.contains("not protected in full").then_some(text)
    });
    println!("{text}");
    pool.other("").run(&["pool", "cancel", &id]);
    assert_eq!(task(&pool, &id)["state"], "cancelled");
    assert!(admins(&pool).iter().all(|a| a == "in use"));
}
