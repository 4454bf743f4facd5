//! `steadfast pool init` and `steadfast pool join`: what makes a machine a host of a pool. Both can be run again after they failed.

use crate::api::types::{JoinAnswer, JoinRequest};
use crate::config::{Folders, NodeConfig, Ports, StoreChoice};
use crate::error::{IoContext, NodeError, Result, refused};
use crate::http::{Target, ask};
use crate::pki::{self, Pair, Token};
use crate::records::{CA, CRL, Crl, HostInfo, SETTINGS, TIMINGS, Timings, host_info, json};
use crate::{measure, tls};
use hyper::Method;
use rustls::pki_types::ServerName;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use steadfast_cluster::model::{BalanceSettings, HostRecord, Network, PoolSettings, Resources};
use steadfast_store::{Check, Commit, EtcdSpec};
use steadfast_types::{HostId, SiteId};

/// How long letting a host in may take: the first one starts an etcd for it.
const JOIN_BOUND: Duration = Duration::from_secs(150);

/// What an operator says about a host.
#[derive(Clone, Debug)]
pub struct HostChoice {
    /// Its name.
    pub host: HostId,
    /// Its address for the other hosts.
    pub address: IpAddr,
    /// Addresses for replication, one for each path.
    pub replication: Vec<IpAddr>,
    /// Where it stands.
    pub site: Option<SiteId>,
    /// Shared storages that it reaches.
    pub storages: BTreeSet<String>,
    /// Ports.
    pub ports: Ports,
    /// More arguments for `steadfast vmm`.
    pub vmm_args: Vec<String>,
    /// The etcd program.
    pub etcd_program: Option<PathBuf>,
    /// Between two heartbeats of the pool's own etcd, ms; the same on all hosts.
    pub etcd_heartbeat_ms: u64,
    /// The watchdog device.
    pub watchdog: Option<PathBuf>,
}

fn make_folders(folders: &Folders) -> Result<()> {
    if NodeConfig::exists(folders) {
        return refused(format!(
            "{} belongs to a host of a pool already; choose another --data, or remove it if that host is gone for good",
            folders.data.display()
        ));
    }
    for folder in [&folders.data, &folders.run] {
        std::fs::create_dir_all(folder).what(|| format!("make {}", folder.display()))?;
    }
    Ok(())
}

/// Makes a pool of this host. Returns nothing: a token for the next host is made by the daemon.
///
/// # Errors
/// Files cannot be written, or the store cannot be used.
pub fn init(
    folders: &Folders,
    pool: &str,
    choice: HostChoice,
    external: Option<EtcdSpec>,
    timings: Timings,
) -> Result<()> {
    make_folders(folders)?;
    let ca = pki::new_ca(pool)?;
    let (key, request) = pki::new_request()?;
    let addresses: Vec<IpAddr> = [choice.address]
        .into_iter()
        .chain(choice.replication.clone())
        .collect();
    let made = pki::sign(&ca, &request, &choice.host, &addresses, timings.certificate_ms)?;
    let crl = Crl {
        pem: pki::sign_crl(&ca, 0, [].iter())?,
        ..Crl::default()
    };
    let certificate = made.certificate;
    pki::install(folders, &ca.certificate, &Pair { certificate, key }, &crl.pem)?;
    let site = match choice.site {
        Some(site) => site,
        None => SiteId::new("site").map_err(|e| NodeError::Refused(e.to_string()))?,
    };
    let config = NodeConfig {
        pool: pool.into(),
        host: choice.host.clone(),
        site: site.clone(),
        address: choice.address,
        replication: choice.replication,
        ports: choice.ports,
        witness: false,
        store: external.map_or(StoreChoice::Embedded, StoreChoice::External),
        vmm_args: choice.vmm_args,
        etcd: choice.etcd_program,
        etcd_heartbeat_ms: choice.etcd_heartbeat_ms,
        watchdog: choice.watchdog,
    };
    let info = HostInfo {
        record: HostRecord {
            id: choice.host.clone(),
            site,
            rack: None,
            addresses: BTreeMap::from([(Network::Management, vec![choice.address.to_string()])]),
            witness: false,
            capacity: measure::capacity(&folders.data),
            reserved: Resources::ZERO,
            baselines: measure::baselines(),
            storages: choice.storages,
            link_bytes_per_s: measure::link_bytes_per_s(),
            admin: Default::default(),
            health: Default::default(),
        },
        index: 0,
        api: config.api(),
        replication: config.replication(),
        etcd: None,
        admin_since_ms: None,
        fence: None,
    };
    let settings = PoolSettings {
        name: pool.into(),
        // Somebody's word is needed before VMs are moved for their own good.
        balance: BalanceSettings {
            enabled: false,
            ..BalanceSettings::default()
        },
        ..PoolSettings::default()
    };
    let kv = steadfast_store::open(&config.store_spec(folders))?;
    let commit = Commit {
        checks: vec![(CA.into(), Check::Absent)],
        ..Commit::default()
    };
    let commit = commit
        .put(CA, json(&(&ca.certificate, &ca.key))?)
        .put(CRL, json(&crl)?)
        .put(SETTINGS, json(&settings)?)
        .put(TIMINGS, json(&timings)?)
        .put(format!("p/hostindex/{}", info.index), choice.host.as_str())
        .put(host_info(&choice.host), json(&info)?);
    if !kv.commit(&commit)?.is_done() {
        return refused(
            "there is a pool in this store already; let this host join it (`steadfast pool join`), or use another --data or prefix",
        );
    }
    config.save(folders)
}

/// Lets this host join a pool.
///
/// # Errors
/// The token is not accepted, the pool cannot be reached, or files cannot be written.
pub async fn join(
    folders: &Folders,
    at: SocketAddr,
    token: &str,
    choice: HostChoice,
    witness: bool,
) -> Result<NodeConfig> {
    let token = Token::parse(token)?;
    make_folders(folders)?;
    let (key, request) = pki::new_request()?;
    let target = Target::Tls {
        at,
        name: ServerName::IpAddress(at.ip().into()),
        config: tls::joining(&token.fingerprint)?,
    };
    let body = JoinRequest {
        token: (token.id, token.secret),
        host: choice.host.clone(),
        site: choice.site,
        address: choice.address,
        replication: choice.replication.clone(),
        ports: choice.ports,
        witness,
        request,
        capacity: measure::capacity(&folders.data),
        baselines: measure::baselines(),
        link_bytes_per_s: measure::link_bytes_per_s(),
        storages: choice.storages,
    };
    let answer: JoinAnswer = ask(&target, Method::POST, "/v1/join", Some(&body), JOIN_BOUND).await?;
    let certificate = answer.certificate;
    pki::install(folders, &answer.ca, &Pair { certificate, key }, &answer.crl)?;
    let config = NodeConfig {
        pool: answer.pool,
        host: choice.host,
        site: answer.site,
        address: choice.address,
        replication: choice.replication,
        ports: choice.ports,
        witness,
        store: answer.store,
        vmm_args: choice.vmm_args,
        etcd: choice.etcd_program,
        etcd_heartbeat_ms: choice.etcd_heartbeat_ms,
        watchdog: choice.watchdog,
    };
    if matches!(config.store, StoreChoice::Managed { member: true, .. }) {
        crate::etcd::program(&config)?;
    }
    config.save(folders)?;
    Ok(config)
}
