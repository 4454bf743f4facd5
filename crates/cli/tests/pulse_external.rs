//! A pool whose store is an etcd that somebody else runs: `pool init --etcd URL`. Two hosts need no third.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod common;

use common::{Pool, etcd, possible, wait, wait_for};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Etcd(Child);

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One member, of nobody's pool.
fn start(folder: &Path, ports: [u16; 2]) -> Etcd {
    let [client, peer] = ports.map(|port| format!("http://127.0.0.1:{port}"));
    let log = std::fs::File::create(folder.join("log")).unwrap();
    let child = Command::new(etcd().unwrap())
        .arg(format!("--data-dir={}", folder.join("data").display()))
        .arg("--name=theirs")
        .arg(format!("--listen-client-urls={client}"))
        .arg(format!("--advertise-client-urls={client}"))
        .arg(format!("--listen-peer-urls={peer}"))
        .arg(format!("--initial-advertise-peer-urls={peer}"))
        .arg(format!("--initial-cluster=theirs={peer}"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    // It listens once it leads: it is alone.
    wait("their etcd to listen", || {
        TcpStream::connect((Ipv4Addr::LOCALHOST, ports[0])).is_ok()
    });
    Etcd(child)
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// The pool runs no etcd of its own; a VM goes on while the store is away, and where the other host dies once it is back.
#[test]
fn the_store_is_somebody_elses() {
    if !possible() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let ports = [free_port(), free_port()];
    let theirs = start(folder.path(), ports);
    let url = format!("http://127.0.0.1:{}", ports[0]);
    let mut pool = Pool::begun(&["a", "b"], &["--lease-ms", "10000", "--etcd", &url], &[], None);
    assert_eq!(pool.other("").status()["store"], "external etcd");
    let client = pool.client("f");
    pool.create("f", "ft");
    let protected = |pool: &Pool| pool.other("").vm("f")["protection"] == "protected";
    wait("f to be protected", || protected(&pool));
    for host in &pool.hosts {
        let own = host
            .processes()
            .into_iter()
            .find(|(_, line)| line.contains("etcd "));
        assert_eq!(own, None, "{}: an etcd of its own", host.name);
    }

    drop(theirs);
    let gone = Instant::now();
    client.forget_gap();
    while gone.elapsed() < Duration::from_secs(4) {
        client.answer("", Instant::now());
    }
    println!(
        "f: longest wait while the store was away {:?}",
        client.seen().longest
    );
    let _theirs = start(folder.path(), ports);
    let primary = wait_for("the pool to be well again", || {
        let vm = pool.other("").vm("f");
        let well = vm["state"] == "running" && protected(&pool);
        well.then(|| vm["host"].as_str().map(str::to_owned))?
    });
    let killed = pool.host(&primary).power_off();
    let (to, gap) = client.answer(&primary, killed);
    println!("f: answers from {to} {gap:?} after the death of {primary}");
    assert_eq!(client.seen().boots, 0, "f never stopped");
}
