//! A real etcd on loopback, its data in a temporary folder.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use rustix::process::{Pid, Signal, kill_process};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use steadfast_store::{Etcd, EtcdSpec, Kv};

/// How long an etcd may take to answer after its start, on a busy machine.
const READY: Duration = Duration::from_secs(60);

/// A program of the Debian packages etcd-server and etcd-client: installed, or unpacked into the cache by
/// `scripts/setup.sh`.
pub fn program(name: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let cache = std::env::var_os("STEADFAST_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("XDG_CACHE_HOME").map(|c| PathBuf::from(c).join("steadfast")))
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache/steadfast")));
    std::env::split_paths(&paths)
        .chain(cache.map(|c| c.join("etcd/usr/bin")))
        .map(|folder| folder.join(name))
        .find(|p| p.is_file())
}

/// Says loudly that there is no etcd here.
pub fn skip() {
    eprintln!(
        "SKIPPED: no etcd here; scripts/setup.sh unpacks the Debian package etcd-server into the cache"
    );
}

pub struct Server {
    child: Child,
    pub folder: tempfile::TempDir,
    pub client: u16,
    peer: u16,
}

fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

impl Server {
    /// Starts an etcd of one member and waits until it takes writes; none if there is no etcd here.
    pub fn start() -> Option<Self> {
        let etcd = program("etcd")?;
        for _ in 0..5 {
            let folder = tempfile::tempdir().unwrap();
            let (client, peer) = (free_port(), free_port());
            let child = spawn(&etcd, folder.path(), client, peer, &[]);
            let mut server = Self {
                child,
                folder,
                client,
                peer,
            };
            // Another test may have taken the port meanwhile.
            if server.ready() {
                return Some(server);
            }
        }
        panic!("etcd does not start");
    }

    pub fn spec(&self) -> EtcdSpec {
        EtcdSpec::new(vec![format!("http://127.0.0.1:{}", self.client)])
    }

    fn ready(&mut self) -> bool {
        let kv = Etcd::new(&self.spec()).unwrap();
        let until = Instant::now() + READY;
        loop {
            if kv.read(&["x"]).is_ok() {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(
                Instant::now() < until,
                "etcd is not ready within {READY:?}:\n{log}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Writes a snapshot of the data to a file.
    pub fn snapshot(&self, file: &Path) {
        self.etcdctl(&["snapshot", "save", file.to_str().unwrap()]);
    }

    fn etcdctl(&self, args: &[&str]) {
        let done = Command::new(program("etcdctl").expect("etcdctl beside etcd"))
            .env("ETCDCTL_API", "3")
            .arg(format!("--endpoints=http://127.0.0.1:{}", self.client))
            .args(args)
            .output()
            .unwrap();
        assert!(done.status.success(), "etcdctl {args:?}: {done:?}");
    }

    /// Starts one more member, without a vote, and waits until it takes connections.
    pub fn learner(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (client, peer) = (free_port(), free_port());
        let (own, other) = (
            format!("http://127.0.0.1:{peer}"),
            format!("http://127.0.0.1:{}", self.peer),
        );
        self.etcdctl(&[
            "member",
            "add",
            "learner",
            "--learner",
            &format!("--peer-urls={own}"),
        ]);
        let child = spawn(
            &program("etcd").unwrap(),
            folder.path(),
            client,
            peer,
            &[
                "--name=learner",
                &format!("--initial-cluster=m={other},learner={own}"),
                "--initial-cluster-state=existing",
            ],
        );
        let until = Instant::now() + READY;
        while TcpStream::connect(("127.0.0.1", client)).is_err() {
            assert!(Instant::now() < until, "the new member does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self {
            child,
            folder,
            client,
            peer,
        }
    }

    /// Ends the server and goes on from a snapshot, on the same addresses and with the same settings.
    pub fn restore(&mut self, file: &Path) {
        self.kill();
        std::fs::remove_dir_all(self.folder.path().join("data")).unwrap();
        let data = self.folder.path().join("data");
        let peer = format!("http://127.0.0.1:{}", self.peer);
        self.etcdctl(&[
            "snapshot",
            "restore",
            file.to_str().unwrap(),
            "--name=m",
            &format!("--data-dir={}", data.display()),
            &format!("--initial-cluster=m={peer}"),
            &format!("--initial-advertise-peer-urls={peer}"),
            "--initial-cluster-token=t",
        ]);
        self.child = spawn(
            &program("etcd").unwrap(),
            self.folder.path(),
            self.client,
            self.peer,
            &[],
        );
        assert!(self.ready(), "the restored etcd does not start");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(etcd: &Path, folder: &Path, client: u16, peer: u16, more: &[&str]) -> Child {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(folder.join("log"))
        .unwrap();
    let (client, peer) = (
        format!("http://127.0.0.1:{client}"),
        format!("http://127.0.0.1:{peer}"),
    );
    Command::new(etcd)
        .arg("--name=m")
        .arg(format!("--data-dir={}", folder.join("data").display()))
        .args([
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=m={peer}"),
        ])
        .args(["--initial-cluster-token=t", "--logger=zap", "--log-level=warn"])
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}
