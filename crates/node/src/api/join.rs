//! Letting a new host in: `POST /v1/join`, the only thing that a client without a certificate may ask.

use super::handlers::load;
use super::types::{JoinAnswer, JoinRequest};
use super::{Answer, Failure};
use crate::certs;
use crate::config::StoreChoice;
use crate::error::{NodeError, Result, refused};
use crate::node::Node;
use crate::pool::Pool;
use crate::records::{HostInfo, StoredToken, host_info, json, now_ms, update};
use crate::{etcd, pki, relocate};
use axum::Json;
use axum::extract::State;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steadfast_cluster::model::{HostRecord, Network, Resources};
use steadfast_store::Commit;

/// How long etcd may refuse a new member.
const ADD_BOUND: Duration = Duration::from_secs(60);
/// How long a new member of etcd may take to catch up.
const PROMOTE_TRIES: u32 = 240;

/// Lets a host in. Asking again with the same name is allowed until the host has been heard of.
pub async fn join(State(node): State<Arc<Node>>, Json(request): Json<JoinRequest>) -> Answer<JoinAnswer> {
    let (id, secret) = request.token.clone();
    node.blocking(move |n| take_token(n, &id, &secret)).await?;
    let done = let_in(&node, &request).await;
    if done.is_err() {
        // The token was not used up.
        let id = request.token.0.clone();
        let _ = node.blocking(move |n| give_back(n, &id)).await;
    }
    done.map(Json).map_err(Failure)
}

fn token_key(id: &str) -> Result<String> {
    match id.len() == 8 && id.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => Ok(format!("p/token/{id}")),
        false => refused("this token is not known"),
    }
}

fn take_token(node: &Node, id: &str, secret: &str) -> Result<()> {
    let hash = pki::fingerprint(secret.as_bytes());
    update(&*node.kv(), &token_key(id)?, |old: Option<StoredToken>| match old {
        // Hashes are compared: how far they agree tells nothing about the secret.
        Some(mut t) if t.hash == hash && t.uses > 0 && now_ms() < t.expires_ms => {
            t.uses -= 1;
            Ok(Some(t))
        }
        _ => refused(
            "this token is not known, was used, or has ended; make a new one with `steadfast pool token` on a host of the pool",
        ),
    })
    .map(|_| ())
}

fn give_back(node: &Node, id: &str) -> Result<()> {
    update(&*node.kv(), &token_key(id)?, |old: Option<StoredToken>| {
        Ok(old.map(|mut t| {
            t.uses += 1;
            t
        }))
    })
    .map(|_| ())
}

async fn let_in(node: &Arc<Node>, request: &JoinRequest) -> Result<JoinAnswer> {
    let host = &request.host;
    let pool = load(node).await?;
    if pool.hosts.contains_key(host) && pool.reports.contains_key(host) {
        return refused(format!(
            "there is a host {host} in this pool already; give the new one another name (--name), or take the old one out \
             (`steadfast host remove {host}`)"
        ));
    }
    let config = node.config();
    if config.store == StoreChoice::Embedded {
        relocate::to_etcd(node).await?;
    }
    let config = node.config();
    let authority = node.blocking(|n| certs::ca(&*n.kv())).await?;
    let addresses: Vec<_> = [request.address]
        .into_iter()
        .chain(request.replication.clone())
        .collect();
    let certificate = {
        let (request, host) = (request.request.clone(), host.clone());
        let lifetime = pool.timings.certificate_ms;
        node.blocking(move |n| certs::issue(&*n.kv(), &request, &host, &addresses, lifetime))
            .await?
    };
    let store = member(node, request).await?;
    let site = request.site.clone().unwrap_or(config.site.clone());
    let own_etcd = matches!(store, StoreChoice::Managed { member: true, .. });
    let record = HostRecord {
        id: host.clone(),
        site: site.clone(),
        rack: None,
        addresses: BTreeMap::from([(Network::Management, vec![request.address.to_string()])]),
        witness: request.witness,
        capacity: request.capacity,
        reserved: Resources::ZERO,
        baselines: request.baselines.clone(),
        storages: request.storages.clone(),
        link_bytes_per_s: request.link_bytes_per_s,
        admin: Default::default(),
        health: Default::default(),
    };
    let info = HostInfo {
        record,
        index: pool.hosts.get(host).map_or_else(
            || Pool::free_index(pool.hosts.values().map(|h| h.index)),
            |h| h.index,
        ),
        api: SocketAddr::new(request.address, request.ports.api),
        replication: match request.replication.is_empty() {
            true => vec![request.address],
            false => request.replication.clone(),
        },
        admin_since_ms: None,
        fence: None,
        etcd: own_etcd.then(|| {
            format!(
                "https://{}",
                SocketAddr::new(request.address, request.ports.etcd_client)
            )
        }),
    };
    add_host(node, info).await?;
    Ok(JoinAnswer {
        pool: config.pool,
        site,
        ca: authority.certificate,
        certificate,
        crl: pool.crl.map(|c| c.pem).unwrap_or_default(),
        store,
    })
}

/// Writes a host's info under a number that no other has.
async fn add_host(node: &Arc<Node>, info: HostInfo) -> Result<()> {
    node.blocking(move |n| {
        let (kv, id) = (n.kv(), info.record.id.clone());
        let (key, index) = (host_info(&id), format!("p/hostindex/{}", info.index));
        let now = kv.read(&[&key, &index])?;
        if now.get(&index).is_some_and(|e| e.value != id.as_str().as_bytes()) {
            return Err(NodeError::Conflict("the list of hosts".into()));
        }
        let commit = Commit::default()
            .unchanged(&index, now.get(&index))
            .unchanged(&key, now.get(&key))
            .put(&index, id.as_str())
            .put(&key, json(&info)?);
        if !kv.commit(&commit)?.is_done() {
            return Err(NodeError::Conflict("the list of hosts".into()));
        }
        n.note(&id, "it joined the pool");
        Ok(())
    })
    .await
}

/// The store as the new host reaches it; with a member of its own if the pool has too few.
async fn member(node: &Arc<Node>, request: &JoinRequest) -> Result<StoreChoice> {
    let config = node.config();
    let StoreChoice::Managed { .. } = &config.store else {
        return Ok(config.store);
    };
    // All of them: the one that lets it in may be the next to die.
    let endpoints = load(node).await?.store_endpoints();
    let spec = config.store_spec(&node.folders);
    let at = |port| format!("https://{}", SocketAddr::new(request.address, port));
    let (peer, own) = (at(request.ports.etcd_peer), at(request.ports.etcd_client));
    let known = etcd::members(&spec).await?;
    if known.len() >= etcd::MEMBERS_MAX && !known.iter().any(|m| m.peer == peer) {
        return Ok(StoreChoice::Managed {
            member: false,
            initial: String::new(),
            state: String::new(),
            endpoints,
        });
    }
    // While another new member catches up, or has just got its vote, etcd refuses.
    let until = Instant::now() + ADD_BOUND;
    let initial = loop {
        match etcd::add(&spec, request.host.as_str(), &peer).await {
            Ok(initial) => break initial,
            Err(error) if Instant::now() > until => return Err(error),
            Err(error) => tracing::info!(%error, "tried again"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    // It votes as soon as it has caught up.
    tokio::spawn(async move {
        for _ in 0..PROMOTE_TRIES {
            if matches!(etcd::promote_learners(&spec).await, Ok(true)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    });
    Ok(StoreChoice::Managed {
        member: true,
        initial,
        state: "existing".into(),
        endpoints: endpoints.into_iter().chain([own]).collect(),
    })
}
