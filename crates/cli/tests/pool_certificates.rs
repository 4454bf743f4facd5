//! Certificates of a pool's hosts end and are renewed, and those of a host that was taken out are refused: two hosts and a witness,
//! without guests.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::{Host, Pool, etcd, wait, wait_for};
use serde_json::Value;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use steadfast_node::http::{Method, Target, ask};
use steadfast_node::{TlsFiles, pki, records::now_ms, tls};

/// Short, so that the test is; a third of it is left for a renewal on a busy machine.
const LIFETIME_MS: u64 = 60_000;

fn certificate(host: &Host) -> String {
    fs::read_to_string(host.folder.join("data/host.pem")).unwrap()
}

/// Asks at an address, as whoever has these files.
fn ask_as(files: &TlsFiles, at: SocketAddr, name: &str, path: &str) -> Result<Value, String> {
    let target = Target::Tls {
        at,
        name: rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap(),
        config: tls::client(files, Path::new("/nonexistent")).unwrap(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let asked = ask(&target, Method::GET, path, None::<&()>, Duration::from_secs(20));
    runtime.block_on(asked).map_err(|e| e.to_string())
}

/// What a thief would have taken from a host.
fn copied(host: &Host, to: &Path) -> TlsFiles {
    fs::create_dir_all(to).unwrap();
    let file = |name: &str| {
        fs::copy(host.folder.join("data").join(name), to.join(name)).unwrap();
        to.join(name)
    };
    TlsFiles {
        ca: file("ca.pem"),
        certificate: file("host.pem"),
        key: file("host.key"),
    }
}

#[test]
fn certificates_are_renewed_and_those_of_a_removed_host_refused() {
    if etcd().is_none() {
        eprintln!(
            "SKIPPED: no etcd here; scripts/setup.sh unpacks the Debian package etcd-server into the cache"
        );
        return;
    }
    let lifetime = LIFETIME_MS.to_string();
    let of_pool = ["--lease-ms", "6000", "--certificate-ms", &lifetime];
    let mut pool = Pool::begun(&["a", "b", "w"], &of_pool, &[], None);
    let folder = tempfile::tempdir().unwrap();
    let api = |pool: &Pool, n: usize| SocketAddr::new(pool.hosts[n].address.into(), 7440);
    let first: Vec<String> = pool.hosts.iter().map(certificate).collect();
    let old = copied(&pool.hosts[1], &folder.path().join("old"));
    let ping = "/internal/v1/ping";
    assert!(ask_as(&old, api(&pool, 0), "a", ping).is_ok());

    wait("all certificates to be renewed", || {
        pool.hosts
            .iter()
            .map(certificate)
            .zip(&first)
            .all(|(now, first)| now != *first)
    });
    let ends = first
        .iter()
        .map(|c| pki::read(c.clone()).unwrap().ends_ms)
        .max()
        .unwrap();
    wait("the first ones to have ended", || now_ms() > ends + 1000);
    let said = ask_as(&old, api(&pool, 0), "a", ping).unwrap_err();
    assert!(
        said.contains("CertificateExpired") && said.contains("clocks"),
        "{said}"
    );
    // Nobody noticed: reports, which go by way of etcd with all three members, and the hosts among each other.
    wait("the pool to be well", || {
        pool.hosts[0].try_run(&["status"]).status.success()
    });
    let events = pool.hosts[0].run(&["events", "--limit", "200"]);
    assert!(!events.contains("host dead"), "{events}");

    // It is lost, and taken out; whoever has its disk has its certificate.
    pool.host("b").power_off();
    let thief = wait_for("its certificate to be whole", || {
        let files = copied(&pool.hosts[1], &folder.path().join("stolen"));
        ask_as(&files, api(&pool, 0), "a", ping).ok().map(|_| files)
    });
    let store = SocketAddr::new(pool.hosts[0].address.into(), 2379);
    let health = ask_as(&thief, store, "a", "/health").unwrap();
    assert_eq!(health["health"], "true", "etcd lets it in as yet");
    wait("it to be known as dead, and taken out", || {
        pool.hosts[0].try_run(&["host", "remove", "b"]).status.success()
    });
    for (n, name) in [(0, "a"), (2, "w")] {
        let said = wait_for("its certificate to be refused", || {
            // A connection that was there when the host learned of it is closed without a word.
            let said = ask_as(&thief, api(&pool, n), name, ping).err()?;
            said.contains("CertificateRevoked").then_some(said)
        });
        assert!(said.contains("taken out"), "{name}: {said}");
    }
    assert!(
        ask_as(&thief, store, "a", "/health").is_err(),
        "nor does etcd let it in"
    );
    // Those that stay are not touched.
    let own = copied(&pool.hosts[2], &folder.path().join("w"));
    assert!(ask_as(&own, api(&pool, 0), "a", ping).is_ok());
    assert!(ask_as(&own, store, "a", "/health").is_ok());
}
