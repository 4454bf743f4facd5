//! Certificates while the pool lives: each host's ends after a time and is renewed by its daemon before; a host that is taken out is
//! on the list of revoked certificates, which every daemon has.
//!
//! ```text
//! p/cert/HOST/SERIAL   every certificate that was given out, and when it ends
//! p/crl                the list, signed by the pool's CA  -->  DATA/ca.crl on each host: API, etcd, replication links
//! ```
//! A renewed certificate is for the same key, so that only one file changes, atomically: whoever reads key and certificate always
//! finds a pair. What a host takes note of is checked in each handshake; connections of a revoked host are closed.

use crate::config::{Folders, NodeConfig, StoreChoice, write_file};
use crate::error::{IoContext, NodeError, Result, refused};
use crate::node::Node;
use crate::pki::{self, Made, Pair};
use crate::pool::Pool;
use crate::records::{CA, CRL, Crl, get, json, now_ms, parse};
use std::net::IpAddr;
use steadfast_store::{CHANGES_MAX, Commit, Kv};
use steadfast_types::HostId;

fn given_out(host: &HostId) -> String {
    format!("p/cert/{host}/")
}

/// The pool's CA. Blocks.
///
/// # Errors
/// The store's.
pub fn ca(kv: &dyn Kv) -> Result<Pair> {
    let found: Option<(String, String)> = get(kv, CA)?;
    let (certificate, key) = found.ok_or_else(|| NodeError::NotFound("CA in the store".into()))?;
    Ok(Pair { certificate, key })
}

/// Signs a certificate for a host, and writes down that it was given out before anybody has it. Blocks.
///
/// # Errors
/// The store's, or a request that is none.
pub fn issue(
    kv: &dyn Kv,
    request: &str,
    host: &HostId,
    addresses: &[IpAddr],
    lifetime_ms: u64,
) -> Result<String> {
    let made = pki::sign(&ca(kv)?, request, host, addresses, lifetime_ms)?;
    note_down(kv, host, &made)?;
    Ok(made.certificate)
}

/// Writes down a certificate that was given out; forgets those of the host that have ended.
fn note_down(kv: &dyn Kv, host: &HostId, made: &Made) -> Result<()> {
    let mut commit = Commit::default().put(
        format!("{}{}", given_out(host), made.serial),
        json(&made.ends_ms)?,
    );
    for entry in kv
        .list(&given_out(host))?
        .entries
        .into_iter()
        .take(CHANGES_MAX / 2)
    {
        if parse::<u64>(&entry.key, &entry.value)? < now_ms() {
            commit = commit.delete(entry.key);
        }
    }
    kv.commit(&commit)?;
    Ok(())
}

/// Revokes all certificates of a host. Doing it again changes nothing. Blocks.
///
/// # Errors
/// The store's, or somebody else changed the list.
pub fn revoke(kv: &dyn Kv, host: &HostId) -> Result<()> {
    let listed = kv.list(&given_out(host))?.entries;
    let now = kv.read(&[CRL])?;
    let entry = now.get(CRL);
    let mut crl: Crl = entry
        .map(|e| parse(CRL, &e.value))
        .transpose()?
        .unwrap_or_default();
    // What has ended by itself need not be listed.
    crl.revoked.retain(|_, ends_ms| *ends_ms > now_ms());
    let mut commit = Commit::default();
    for given in listed.into_iter().take(CHANGES_MAX - 2) {
        let serial = given.key.rsplit('/').next().unwrap_or_default().to_owned();
        crl.revoked.insert(serial, parse(&given.key, &given.value)?);
        commit = commit.delete(given.key);
    }
    crl.number += 1;
    crl.pem = pki::sign_crl(&ca(kv)?, crl.number, crl.revoked.keys())?;
    let commit = commit.unchanged(CRL, entry).put(CRL, json(&crl)?);
    match kv.commit(&commit)?.is_done() {
        true => Ok(()),
        false => Err(NodeError::Conflict("the list of revoked certificates".into())),
    }
}

/// This host's own certificate.
///
/// # Errors
/// It cannot be read.
pub fn own(folders: &Folders) -> Result<Made> {
    let path = folders.tls().certificate;
    let certificate = std::fs::read_to_string(&path).what(|| format!("read {}", path.display()))?;
    pki::read(certificate)
}

/// Whether this host's certificate can be used, at the daemon's start.
///
/// # Errors
/// It has ended, and what to do.
pub fn check(folders: &Folders, config: &NodeConfig) -> Result<()> {
    if config.store == StoreChoice::Embedded || own(folders)?.ends_ms > now_ms() {
        return Ok(());
    }
    refused(format!(
        "this host's certificate ({}) has ended: no other host and no store lets it in. If its clock is right it was away for too \
         long: take it out (`steadfast host remove {}` on another host), remove {}, and let it join again",
        folders.tls().certificate.display(),
        config.host,
        folders.data.display()
    ))
}

/// Keeps this host's certificate and list as they should be; called by the agent's rounds. Blocks.
#[derive(Default)]
pub struct Keeper {
    own: Option<Made>,
}

impl Keeper {
    /// One look.
    ///
    /// # Errors
    /// Files or the store.
    pub fn look(&mut self, node: &Node, pool: &Pool) -> Result<()> {
        if let Some(crl) = pool.crl.as_ref().filter(|c| !c.pem.is_empty()) {
            let path = node.folders.crl();
            let known = std::fs::read(&path).unwrap_or_default();
            if known != crl.pem.as_bytes() {
                write_file(&path, crl.pem.as_bytes())?;
                node.reload_tls()?;
                node.close_revoked(crl.revoked.keys().cloned().collect());
            }
        }
        let config = node.config();
        let kv = node.kv();
        let own = match self.own.take() {
            Some(own) => own,
            None => {
                // One that an older version gave out is not written down yet.
                let own = own(&node.folders)?;
                note_down(&*kv, &config.host, &own)?;
                own
            }
        };
        let lifetime = pool.timings.certificate_ms;
        if now_ms() < own.ends_ms.saturating_sub(lifetime / 3)
            && own.ends_ms < now_ms().saturating_add(lifetime * 2)
        {
            self.own = Some(own);
            return Ok(());
        }
        let key_path = node.folders.tls().key;
        let key = std::fs::read_to_string(&key_path).what(|| format!("read {}", key_path.display()))?;
        let request = pki::request_of(&key)?;
        let addresses: Vec<IpAddr> = [config.address]
            .into_iter()
            .chain(config.replication.clone())
            .collect();
        let certificate = issue(&*kv, &request, &config.host, &addresses, lifetime)?;
        write_file(&node.folders.tls().certificate, certificate.as_bytes())?;
        node.reload_tls()?;
        node.note(&config.host, "its certificate was renewed");
        self.own = Some(pki::read(certificate)?);
        Ok(())
    }
}
