//! A pool of one host, without etcd and without KVM: what is refused, and with which words.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::{Host, wait};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use steadfast_node::http::{Method, Target, ask};
use steadfast_node::tls;

struct Alone {
    host: Host,
    folder: tempfile::TempDir,
}

impl Alone {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let random = std::hash::RandomState::new();
        let random = std::hash::BuildHasher::hash_one(&random, folder.path());
        let [x, y, z, ..] = random.to_le_bytes();
        let address = Ipv4Addr::new(127, x.max(1), y, z.clamp(1, 254));
        let mut host = Host {
            name: "a".into(),
            address,
            folder: folder.path().join("a"),
            daemon: None,
            program: None,
        };
        host.run(&[
            "pool",
            "init",
            "alone",
            "--name",
            "a",
            "--address",
            &address.to_string(),
            "--vmm-arg=--cgroup=off",
            "--etcd-program",
            "/nowhere/etcd",
        ]);
        host.start_daemon();
        wait("the daemon to be well", || {
            host.try_run(&["status"]).status.success()
        });
        Self { host, folder }
    }

    fn refusal(&self, args: &[&str]) -> String {
        let out = self.host.try_run(args);
        assert!(!out.status.success(), "{args:?} was not refused");
        String::from_utf8_lossy(&out.stderr).into_owned()
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.host.folder.join("daemon.log")).unwrap_or_default();
            eprintln!("{log}");
        }
        self.host.power_off();
    }
}

#[test]
fn refusals_name_the_reason_and_the_way_out() {
    let alone = Alone::new();
    let elf = alone.folder.path().join("pulse.elf");
    std::fs::write(&elf, pulse::elf()).unwrap();
    let elf = elf.to_str().unwrap();
    let create = |name: &'static str, class: &'static str| {
        [
            "vm", "create", "--name", name, "--memory", "64MiB", "--flat", elf, "--class", class,
        ]
    };
    let text = alone.refusal(&create("f", "ft"));
    assert!(text.contains("second host"), "{text}");
    let text = alone.refusal(&create("x", "gold"));
    assert!(text.contains("none, restart, checkpoint, ft"), "{text}");
    // One host cannot absorb its own failure.
    let text = alone.refusal(&create("r", "restart"));
    assert!(text.contains("VM r"), "{text}");
    let plan = alone
        .host
        .run(&[&create("n", "none")[..], &["--dry-run"]].concat());
    assert!(plan.contains("start n on a"), "{plan}");
    assert!(
        alone.host.json(&["vm", "list"]).as_array().unwrap().is_empty(),
        "--dry-run wrote something"
    );
    alone.host.run(&[&create("n", "none")[..], &["--off"]].concat());
    let text = alone.refusal(&create("n", "none"));
    assert!(text.contains("already"), "{text}");
    let text = alone.refusal(&["migrate", "n", "--to", "a"]);
    assert!(text.contains("off"), "{text}");
    let text = alone.refusal(&["host", "drain", "nobody"]);
    assert!(text.contains("no host nobody"), "{text}");
    alone.host.run(&["protect", "n", "--class", "restart"]);
    assert_eq!(alone.host.vm("n")["class"], "restart");
    alone.host.run(&["vm", "delete", "n"]);
    let text = alone.refusal(&["vm", "show", "n"]);
    assert!(text.contains("no VM n"), "{text}");
    let events = alone.host.run(&["events"]);
    assert!(
        events.contains("it was created") && events.contains("it was deleted"),
        "{events}"
    );
    let text = alone.refusal(&["node"]);
    assert!(text.contains("a daemon runs"), "{text}");
}

#[test]
fn settings_are_checked_shown_and_kept() {
    let alone = Alone::new();
    let elf = alone.folder.path().join("pulse.elf");
    std::fs::write(&elf, pulse::elf()).unwrap();
    for name in ["db", "web"] {
        let elf = elf.to_str().unwrap();
        alone.host.run(&[
            "vm", "create", "--name", name, "--memory", "64MiB", "--flat", elf, "--off",
        ]);
    }
    let wanted = |vm: &str| alone.host.json(&["vm", "show", vm])["wanted"]["record"].clone();
    for (args, reason) in [
        (&["vm", "set", "db", "--standbys", "9"][..], "1 to 3"),
        (&["vm", "set", "db", "--after", "db"], "itself"),
        (&["vm", "set", "db", "--after", "nobody"], "no VM nobody"),
        (&["vm", "set", "db", "--group", "g"], "pool group g"),
        (&["vm", "set", "db"], "nothing to change"),
        (&["vm", "health", "db"], "1 to 16 checks"),
        (&["vm", "health", "db", "--tcp", "here"], "ADDRESS:PORT"),
        (&["app", "start", "shop"], "vm set VM --application shop"),
        (&["availability", "nobody"], "no VM nobody"),
    ] {
        let text = alone.refusal(args);
        assert!(text.contains(reason), "{args:?}: {text}");
    }
    alone.host.run(&["pool", "group", "g", "--rule", "apart"]);
    alone
        .host
        .run(&["vm", "set", "db", "--group", "g", "--priority", "7", "--dry-run"]);
    assert_eq!(
        wanted("db")["groups"],
        serde_json::json!([]),
        "--dry-run wrote something"
    );
    alone.host.run(&[
        "vm",
        "set",
        "db",
        "--group",
        "g",
        "--priority",
        "7",
        "--application",
        "shop",
    ]);
    alone
        .host
        .run(&["vm", "set", "web", "--after", "db", "--application", "shop"]);
    assert_eq!(wanted("db")["priority"], 7);
    assert_eq!(wanted("db")["groups"], serde_json::json!(["g"]));
    assert_eq!(wanted("web")["depends_on"], serde_json::json!(["db"]));
    let text = alone.refusal(&["app", "set", "shop", "--stage", "db,other"]);
    assert!(text.contains("no part of application shop"), "{text}");
    alone.host.run(&[
        "app", "set", "shop", "--keep", "together", "--stage", "db", "--stage", "web",
    ]);
    let shop = &alone.host.json(&["app", "list"])[0];
    assert_eq!(
        (&shop["state"], &shop["keep"]),
        (&"off".into(), &"together".into()),
        "{shop}"
    );
    assert_eq!(shop["start_order"], serde_json::json!([["db"], ["web"]]));
    assert_eq!(shop["vms"].as_array().unwrap().len(), 2);
    alone.host.run(&["app", "protect", "shop", "--class", "restart"]);
    assert_eq!(alone.host.vm("web")["class"], "restart");
    // One VM that cannot be of a class keeps the whole application from it.
    let text = alone.refusal(&["app", "protect", "shop", "--class", "ft"]);
    assert!(text.contains("second host"), "{text}");
    let before = alone.host.json(&["pool", "set"]);
    assert_eq!(
        (&before["host_failures"], &before["balance"]["enabled"]),
        (&1.into(), &false.into())
    );
    alone
        .host
        .run(&["pool", "set", "--host-failures", "0", "--balance", "true"]);
    let after = alone.host.json(&["pool", "set"]);
    assert_eq!(
        (&after["host_failures"], &after["balance"]["enabled"]),
        (&0.into(), &true.into())
    );
    assert_eq!(
        after["groups"],
        serde_json::json!({"g": "apart"}),
        "what was not given stays"
    );
    let text = alone.host.run(&["availability", "db"]);
    assert!(text.contains("db over"), "{text}");
}

#[test]
fn strangers_get_nothing_but_join_and_that_only_with_a_token() {
    let alone = Alone::new();
    let token = alone.host.json(&["pool", "token"]);
    let token = token["token"].as_str().unwrap();
    let fingerprint = token.rsplit('.').next().unwrap();
    let at = SocketAddr::new(alone.host.address.into(), 7440);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let get = |print: &str, path: &str| {
        let target = Target::Tls {
            at,
            name: rustls::pki_types::ServerName::IpAddress(at.ip().into()),
            config: tls::joining(print).unwrap(),
        };
        let asked =
            ask::<serde_json::Value>(&target, Method::GET, path, None::<&()>, Duration::from_secs(20));
        runtime.block_on(asked).map_err(|e| e.to_string())
    };
    for path in ["/v1/status", "/v1/vms", "/internal/v1/ping", "/v1/openapi.json"] {
        let said = get(fingerprint, path).unwrap_err();
        assert!(said.contains("404"), "{path}: {said}");
    }
    let other = "0".repeat(64);
    let said = get(&other, "/v1/status").unwrap_err();
    assert!(said.contains("fingerprint"), "{said}");
    let join = |token: &str| {
        let mut other = Host {
            name: "b".into(),
            address: alone.host.address,
            folder: alone.folder.path().join("b"),
            daemon: None,
            program: None,
        };
        let address = alone.host.address.to_string();
        let out = other.try_run(&[
            "pool",
            "join",
            &at.to_string(),
            "--token",
            token,
            "--name",
            "b",
            "--address",
            &address,
        ]);
        other.power_off();
        assert!(!out.status.success());
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let wrong = token.replacen(token.split('.').nth(1).unwrap(), &"0".repeat(32), 1);
    assert!(join(&wrong).contains("not known"));
    assert!(join("nonsense").contains("no join token"));
    // The right one is let in as far as this host can: there is no etcd to move to, and it is not used up by that.
    for _ in 0..2 {
        let said = join(token);
        assert!(said.contains("etcd"), "{said}");
    }
    assert!(
        alone.host.try_run(&["status"]).status.success(),
        "all is as before"
    );
}
