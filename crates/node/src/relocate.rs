//! The way of a pool's store from the folder of its first host into etcd, when a second host joins.
//!
//! ```text
//! start a new etcd member here -> refuse changes -> copy all keys -> node.json names etcd (the point of no return) -> go on there
//! ```
//! Killed before the last step, the host starts with its folder again, and what etcd has is thrown away at the next try. Nothing
//! protected can run yet (it needs a second host), so no process but this daemon knows the store. The arbiter's records are marked
//! as written under the new store.

use crate::config::{NodeConfig, StoreChoice};
use crate::error::{IoContext, NodeError, Result, refused};
use crate::etcd::Member;
use crate::journal;
use crate::node::Node;
use crate::records::host_info;
use rustix::process::{Pid, Signal, kill_process};
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_store::{CHANGES_MAX, Commit, Committed, Kv, Snapshot, StoreError, Wake, WatchGuard};

/// How long a new etcd may take to answer.
const READY: Duration = Duration::from_secs(60);
/// How long changes that are under way may take to end.
const QUIET: Duration = Duration::from_secs(10);

/// A store that can only be read for now.
pub struct ReadOnly(pub Arc<dyn Kv>);

impl Kv for ReadOnly {
    fn read(&self, keys: &[&str]) -> std::result::Result<Snapshot, StoreError> {
        self.0.read(keys)
    }

    fn list_all(&self, prefixes: &[&str]) -> std::result::Result<Snapshot, StoreError> {
        self.0.list_all(prefixes)
    }

    fn commit(&self, _: &Commit) -> std::result::Result<Committed, StoreError> {
        Err(StoreError::Refused(
            "it is being moved to etcd; try again in a moment".into(),
        ))
    }

    fn watch(&self, prefix: &str, wake: Wake) -> WatchGuard {
        self.0.watch(prefix, wake)
    }
}

/// Moves the store. When it fails, all is as before.
///
/// # Errors
/// There is no etcd program, it does not start, or the store's.
pub async fn to_etcd(node: &Arc<Node>) -> Result<()> {
    node.blocking(move_store).await
}

fn move_store(node: &Node) -> Result<()> {
    let began = Instant::now();
    let old = node.config();
    if old.store != StoreChoice::Embedded {
        return Ok(());
    }
    let new = NodeConfig {
        store: StoreChoice::Managed {
            member: true,
            initial: format!("{}={}", old.host, old.url(old.ports.etcd_peer)),
            state: "new".into(),
            endpoints: vec![old.url(old.ports.etcd_client)],
        },
        ..old.clone()
    };
    crate::etcd::program(&new)?;
    throw_away(node)?;
    let mut member = Member::new(node.folders.clone());
    let target = steadfast_store::open(&new.store_spec(&node.folders))?;
    let until = Instant::now() + READY;
    loop {
        member.supervise(&new)?;
        match target.read(&[]) {
            Ok(_) => break,
            Err(e) if Instant::now() > until => {
                throw_away(node)?;
                return Err(NodeError::Etcd(format!(
                    "the new member does not answer: {e}; see etcd.log"
                )));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
    let source = node.freeze_store(QUIET)?;
    let done = copy(&*source, &*target).and_then(|()| node.set_config(new.clone()));
    if done.is_err() {
        node.thaw_store(source);
        throw_away(node)?;
        return done;
    }
    let url = new.url(new.ports.etcd_client);
    crate::records::update(
        &*node.kv(),
        &host_info(&new.host),
        |old: Option<crate::records::HostInfo>| {
            Ok(old.map(|mut info| {
                info.etcd = Some(url.clone());
                info
            }))
        },
    )?;
    let took = began.elapsed().as_millis() as u64;
    let moved = journal::done("move the store from a folder into etcd", took, None);
    node.event(&new.host, moved, "a second host joins");
    Ok(())
}

fn copy(source: &dyn Kv, target: &dyn Kv) -> Result<()> {
    let identity = target.read(&[])?.identity;
    let all = source.list("")?.entries;
    for part in all.chunks(CHANGES_MAX / 2) {
        let mut commit = Commit::default();
        for entry in part {
            let mut value = entry.value.clone();
            if entry.key.starts_with("vm/") && entry.key.ends_with("/record") {
                let mut record: serde_json::Value = crate::records::parse(&entry.key, &value)?;
                record["store"] = identity.0.into();
                record["record_store"] = identity.0.into();
                value = crate::records::json(&record)?;
            }
            commit = commit.put(&entry.key, value);
        }
        target.commit(&commit)?;
    }
    let there = target.list("")?.entries.len();
    match there == all.len() {
        true => Ok(()),
        false => refused(format!("{there} of {} keys arrived in etcd", all.len())),
    }
}

/// Ends and removes what an earlier try left. Only called while node.json names the folder.
fn throw_away(node: &Node) -> Result<()> {
    let member = Member::new(node.folders.clone());
    let until = Instant::now() + QUIET;
    while let Some(pid) = member.pid() {
        if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
            let _ = kill_process(pid, Signal::KILL);
        }
        if Instant::now() > until {
            return refused("an etcd of an earlier try does not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let data = node.folders.data.join("etcd");
    match std::fs::remove_dir_all(&data) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).what(|| format!("remove {}", data.display()))
        }
        _ => Ok(()),
    }
}
