//! The store of a pool: an etcd cluster, asked from blocking callers.
//!
//! One thread with a tokio runtime of its own carries the requests; callers wait for their answer with a bound. Each
//! endpoint has its own connection, made when first needed and thrown away when it fails; the nearest endpoint
//! is asked first as long as it answers (`order.rs`).
//!
//! - Reads are transactions without changes: linearizable, and all keys as of one revision. While one endpoint is late, or when it
//!   fails, the next is asked as well, and the first answer counts: a member whose host died costs a quarter of the timeout. A
//!   member that was reached and has no answer, as while the cluster elects a leader, is asked again.
//! - A commit is one transaction and is *not* repeated once it may have been sent: what then failed is
//!   [`StoreError::Unknown`].
//! - Members come and go while a client lives: [`Kv::set_endpoints`]. What was seen of the cluster stays.
//! - Identity: the cluster's id mixed with the key `.generation`, made once, at random. etcd restored from a snapshot under the
//!   same settings keeps its cluster id, and the key; but its revision goes back. Who notices that replaces the
//!   generation, so that from then on everybody sees another identity. Who was started after the restore cannot notice;
//!   restoring through `steadfast` gives the cluster a new id.

use crate::members::Members;
use crate::{
    Change, Check, Commit, Committed, Entry, EtcdSpec, Identity, Kv, Snapshot, StoreError, Wake, WatchGuard,
    random_u64,
};
use etcd_client::{
    Certificate, Compare, CompareOp, ConnectOptions, GetOptions, Identity as TlsIdentity, KeyValue,
    TlsOptions, Txn, TxnOp, TxnOpResponse, TxnResponse, WatchOptions,
};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// Key that is part of the identity, below the prefix.
const GENERATION: &str = ".generation";
/// Longest answer in bytes.
const ANSWER_MAX: usize = 64 << 20;
/// Interval of HTTP/2 pings on a connection with a watch; etcd closes connections that ping more often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(6);
/// Pause before a member that was reached and did not answer is asked again, in parts of the timeout.
const ASK_AGAIN_PART: u32 = 20;
/// A connection is there sooner than an answer may be: so many parts of the timeout, and no less than that.
const CONNECT_PART: u32 = 4;
const CONNECT_MIN: Duration = Duration::from_millis(500);
/// Pause before a watch that failed is set up again.
const WATCH_AGAIN: Duration = Duration::from_secs(1);

/// See the module.
pub struct Etcd {
    shared: Arc<Shared>,
    runtime: Handle,
    /// Ends the thread when dropped.
    _stop: oneshot::Sender<()>,
}

struct Shared {
    spec: EtcdSpec,
    options: ConnectOptions,
    members: Mutex<Arc<Members>>,
    seen: Mutex<Seen>,
}

/// What was seen of the cluster so far.
#[derive(Clone, Default)]
struct Seen {
    cluster: u64,
    revision: i64,
    generation: Vec<u8>,
}

impl Seen {
    fn identity(&self) -> Identity {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for byte in self.cluster.to_le_bytes().iter().chain(&self.generation) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Identity(hash.max(1))
    }
}

/// Why one try failed.
enum Failed {
    /// It never reached a member.
    NotSent(String),
    /// Nobody knows.
    Sent(String),
}

impl Failed {
    fn why(self) -> String {
        match self {
            Self::NotSent(why) | Self::Sent(why) => why,
        }
    }
}

impl Etcd {
    /// A client of this cluster. Nothing is sent yet.
    ///
    /// # Errors
    /// Bad settings, certificate files that cannot be read, or no thread to be had.
    pub fn new(spec: &EtcdSpec) -> Result<Self, StoreError> {
        let setting = |text: String| StoreError::Setting(text);
        if spec.endpoints.is_empty() {
            return Err(setting("name at least one etcd endpoint".into()));
        }
        let timeout = Duration::from_millis(spec.timeout_ms.max(1));
        let mut options = ConnectOptions::new()
            .with_connect_timeout((timeout / CONNECT_PART).max(CONNECT_MIN).min(timeout))
            .with_timeout(timeout)
            .with_keep_alive(PING_EVERY.max(timeout), timeout);
        if let Some(tls) = &spec.tls {
            let read = |path: &std::path::Path| {
                std::fs::read(path).map_err(|e| setting(format!("{}: {e}", path.display())))
            };
            options = options.with_tls(
                TlsOptions::new()
                    .ca_certificate(Certificate::from_pem(read(&tls.ca)?))
                    .identity(TlsIdentity::from_pem(read(&tls.certificate)?, read(&tls.key)?)),
            );
        } else if let Some(https) = spec.endpoints.iter().find(|e| e.starts_with("https:")) {
            return Err(setting(format!("{https} needs certificates: set tls")));
        }
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("etcd".into())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                match runtime {
                    Ok(runtime) => {
                        let _ = tell.send(Ok(runtime.handle().clone()));
                        let _ = runtime.block_on(stopped);
                        runtime.shutdown_background();
                    }
                    Err(e) => {
                        let _ = tell.send(Err(e));
                    }
                }
            })
            .map_err(|e| setting(format!("no thread for etcd: {e}")))?;
        let runtime = told
            .recv()
            .map_err(|e| setting(format!("no runtime for etcd: {e}")))?
            .map_err(|e| setting(format!("no runtime for etcd: {e}")))?;
        Ok(Self {
            shared: Arc::new(Shared {
                members: Mutex::new(Arc::new(Members::new(spec.endpoints.clone()))),
                spec: spec.clone(),
                options,
                seen: Mutex::default(),
            }),
            runtime,
            _stop: stop,
        })
    }

    /// Runs a request of so many tries, each at most the timeout, on the client's thread.
    fn wait<T: Send + 'static>(
        &self,
        tries: usize,
        request: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, String> {
        let (tell, told) = mpsc::sync_channel(1);
        let task = self.runtime.spawn(async move {
            let _ = tell.send(request.await);
        });
        // The request itself is bounded; this holds if its thread is starved, and a little longer than that.
        let bound = Duration::from_millis(self.shared.spec.timeout_ms) * (tries as u32 + 1);
        told.recv_timeout(bound).map_err(|_| {
            task.abort();
            "no answer in time".to_string()
        })
    }

    fn unreachable(&self, why: String) -> StoreError {
        StoreError::Unreachable {
            at: self.shared.at(),
            why,
        }
    }

    /// Reads: a transaction without changes whose first operation reads the generation.
    fn look(&self, ops: Vec<TxnOp>) -> Result<Snapshot, StoreError> {
        let shared = Arc::clone(&self.shared);
        self.wait(2 * shared.members().len(), async move { shared.look(ops).await })
            .map_err(|why| self.unreachable(why))?
            .map_err(|failed| self.unreachable(failed.why()))
    }
}

impl Shared {
    fn members(&self) -> Arc<Members> {
        Arc::clone(&self.members.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn at(&self) -> String {
        self.members().endpoints().join(",")
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.spec.prefix)
    }

    /// One transaction at one endpoint.
    async fn send(&self, members: &Members, index: usize, txn: Txn) -> Result<TxnResponse, Failed> {
        let connected = members.connection(index, &self.options).await;
        let client = connected.map_err(|why| {
            members.order().failed(index, Instant::now());
            Failed::NotSent(why)
        })?;
        let mut kv = client.kv_client().max_decoding_message_size(ANSWER_MAX);
        let bound = Duration::from_millis(self.spec.timeout_ms);
        let answer = tokio::time::timeout(bound, kv.txn(txn)).await;
        let endpoint = &members.endpoints()[index];
        let mut broken = true;
        let failed = match answer {
            Ok(Ok(response)) => {
                members.order().answered(index, Instant::now());
                return Ok(response);
            }
            Ok(Err(error)) if refused(&error) => Failed::NotSent(format!("{endpoint}: connection refused")),
            Ok(Err(error)) if still_learns(&error) => {
                broken = false;
                Failed::NotSent(format!("{endpoint}: a new member that has no vote yet"))
            }
            Ok(Err(error)) => {
                broken = !said_by_member(&error);
                Failed::Sent(format!("{endpoint}: {error}"))
            }
            Err(_) => Failed::Sent(format!("{endpoint}: no answer within {} ms", bound.as_millis())),
        };
        if broken {
            members.disconnect(index);
        }
        members.order().failed(index, Instant::now());
        Err(failed)
    }

    /// A transaction that may be repeated, at whichever endpoint answers first.
    async fn send_anywhere(self: &Arc<Self>, txn: Txn) -> Result<TxnResponse, Failed> {
        let members = self.members();
        let (first, many) = (members.order().for_read(Instant::now()), members.len());
        let timeout = Duration::from_millis(self.spec.timeout_ms);
        let deadline = tokio::time::Instant::now() + timeout * many as u32;
        let ask = |index: usize, after: Duration| {
            let (shared, members, txn) = (Arc::clone(self), Arc::clone(&members), txn.clone());
            async move {
                tokio::time::sleep(after).await;
                (index, shared.send(&members, index, txn).await)
            }
        };
        let mut last = Failed::NotSent("no endpoint".into());
        // What still runs when the answer is there ends with the set.
        let mut asked = JoinSet::new();
        let mut count = 0;
        loop {
            // At the begin, when one failed, and when one is late.
            if count < many {
                asked.spawn(ask((first + count) % many, Duration::ZERO));
                count += 1;
            }
            tokio::select! {
                done = asked.join_next() => match done {
                    Some(Ok((_, Ok(response)))) => return Ok(response),
                    Some(Ok((index, Err(failed)))) => {
                        if matches!(failed, Failed::Sent(_)) {
                            asked.spawn(ask(index, timeout / ASK_AGAIN_PART));
                        }
                        last = failed;
                    }
                    Some(Err(_)) => {}
                    None if count == many => return Err(last),
                    None => {}
                },
                () = tokio::time::sleep(timeout / 4), if count < many => {}
                () = tokio::time::sleep_until(deadline) => return Err(last),
            }
        }
    }

    async fn look(self: &Arc<Self>, ops: Vec<TxnOp>) -> Result<Snapshot, Failed> {
        let generation = self.key(GENERATION);
        let mut all = vec![TxnOp::get(generation.as_str(), None)];
        all.extend(ops);
        loop {
            let floor = self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let response = self.send_anywhere(Txn::new().and_then(all.clone())).await?;
            let (cluster, revision) = header(&response)?;
            let mut found = answers(&response);
            let current = found.first_mut().and_then(|g| g.drain(..).next());
            let went_back = cluster == floor.cluster && revision < floor.revision;
            match current {
                Some(current) if !went_back => {
                    let seen = Seen {
                        cluster,
                        revision,
                        generation: current.value().to_vec(),
                    };
                    let identity = seen.identity();
                    self.saw(seen);
                    return Ok(Snapshot {
                        identity,
                        revision: revision as u64,
                        entries: found
                            .into_iter()
                            .skip(1)
                            .flatten()
                            .map(|kv| self.entry(&kv))
                            .collect(),
                    });
                }
                other => {
                    if went_back {
                        tracing::error!(
                            from = floor.revision,
                            to = revision,
                            "the store went back in time: it was restored"
                        );
                    }
                    let at = other.map_or(0, |kv| kv.mod_revision());
                    let new = random_u64().map_err(|e| Failed::NotSent(e.to_string()))?;
                    let renew = Txn::new()
                        .when([Compare::mod_revision(generation.as_str(), CompareOp::Equal, at)])
                        .and_then([TxnOp::put(generation.as_str(), new.to_string(), None)]);
                    let answer = self.send_anywhere(renew).await?;
                    // Whether this one or another's took effect: the next look tells. What was seen before counts no more.
                    let (cluster, revision) = header(&answer)?;
                    let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                    *seen = Seen {
                        cluster,
                        revision,
                        generation: Vec::new(),
                    };
                }
            }
        }
    }

    fn saw(&self, new: Seen) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if new.cluster != seen.cluster || new.revision >= seen.revision {
            *seen = new;
        }
    }

    fn entry(&self, kv: &KeyValue) -> Entry {
        let key = String::from_utf8_lossy(kv.key());
        Entry {
            key: key.strip_prefix(&self.spec.prefix).unwrap_or(&key).into(),
            value: kv.value().to_vec(),
            revision: kv.mod_revision() as u64,
        }
    }

    fn below(&self, prefix: &str) -> TxnOp {
        let options = GetOptions::new().with_prefix();
        TxnOp::get(self.key(prefix), Some(options))
    }

    fn transaction(&self, commit: &Commit, prefixes: &[&str], seen: &Seen) -> Txn {
        let generation = self.key(GENERATION);
        let mut when = vec![Compare::value(
            generation.as_str(),
            CompareOp::Equal,
            seen.generation.clone(),
        )];
        when.extend(commit.checks.iter().map(|(key, check)| match check {
            Check::Absent => Compare::create_revision(self.key(key), CompareOp::Equal, 0),
            Check::Revision(r) => Compare::mod_revision(self.key(key), CompareOp::Equal, *r as i64),
            Check::Value(v) => Compare::value(self.key(key), CompareOp::Equal, v.clone()),
        }));
        let mut then: Vec<_> = commit
            .changes
            .iter()
            .map(|(key, change)| match change {
                Change::Put(value) => TxnOp::put(self.key(key), value.clone(), None),
                Change::Delete => TxnOp::delete(self.key(key), None),
            })
            .collect();
        then.extend(prefixes.iter().map(|prefix| self.below(prefix)));
        let mut otherwise = vec![TxnOp::get(generation, None)];
        otherwise.extend(
            commit
                .checks
                .iter()
                .map(|(key, _)| TxnOp::get(self.key(key), None)),
        );
        Txn::new().when(when).and_then(then).or_else(otherwise)
    }

    /// Sends a transaction until it may have reached a member.
    async fn commit(&self, txn: Txn) -> Result<TxnResponse, Failed> {
        let members = self.members();
        let (first, many) = (members.order().for_change(), members.len());
        let mut last = Failed::NotSent("no endpoint".into());
        for turn in 0..many {
            match self.send(&members, (first + turn) % many, txn.clone()).await {
                Err(Failed::NotSent(why)) => last = Failed::NotSent(why),
                known => return known,
            }
        }
        Err(last)
    }

    async fn watch(&self, prefix: &str, wake: &Wake, alive: &std::sync::Weak<()>) {
        let mut index = self.members().order().for_change();
        while alive.strong_count() > 0 {
            let members = self.members();
            index %= members.len();
            if let Ok(client) = members.connection(index, &self.options).await {
                let options = WatchOptions::new().with_prefix();
                if let Ok(mut stream) = client.watch_client().watch(self.key(prefix), Some(options)).await {
                    // Something may have happened before the watch stood.
                    wake();
                    loop {
                        match tokio::time::timeout(WATCH_AGAIN, stream.message()).await {
                            Ok(Ok(Some(message))) if !message.canceled() => wake(),
                            Ok(_) => break,
                            Err(_) if alive.strong_count() == 0 => return,
                            Err(_) => {}
                        }
                    }
                }
            }
            index += 1;
            tokio::time::sleep(WATCH_AGAIN).await;
        }
    }
}

/// Whether the member itself said so, as that there is no leader: the connection is good, and a new one would cost both sides a handshake.
fn said_by_member(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if std::error::Error::source(status).is_none())
}

/// Whether the member has no vote yet, so that it neither reads nor changes anything for clients (etcd's `ErrGRPCNotSupportedForLearner`).
fn still_learns(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if status.message().contains("not supported for learner"))
}

/// Whether an error says that no connection could be made.
fn refused(error: &etcd_client::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = match error {
        etcd_client::Error::GRpcStatus(status) => Some(status),
        etcd_client::Error::TransportError(transport) => Some(transport),
        etcd_client::Error::IoError(io) => Some(io),
        _ => None,
    };
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && io.kind() == std::io::ErrorKind::ConnectionRefused
        {
            return true;
        }
        cause = error.source();
    }
    false
}

fn header(response: &TxnResponse) -> Result<(u64, i64), Failed> {
    let header = response
        .header()
        .ok_or_else(|| Failed::Sent("an answer without a header".into()))?;
    Ok((header.cluster_id(), header.revision()))
}

/// The key-values of each read of a transaction.
fn answers(response: &TxnResponse) -> Vec<Vec<KeyValue>> {
    let ops = response.op_responses().into_iter();
    ops.map(|op| match op {
        TxnOpResponse::Get(mut get) => get.take_kvs(),
        _ => Vec::new(),
    })
    .collect()
}

impl Kv for Etcd {
    fn read(&self, keys: &[&str]) -> Result<Snapshot, StoreError> {
        self.look(
            keys.iter()
                .map(|k| TxnOp::get(self.shared.key(k), None))
                .collect(),
        )
    }

    fn list_all(&self, prefixes: &[&str]) -> Result<Snapshot, StoreError> {
        let below = prefixes.iter().map(|prefix| self.shared.below(prefix));
        let mut all = self.look(below.collect())?;
        all.entries.retain(|e| e.key != GENERATION);
        Ok(all)
    }

    fn commit(&self, commit: &Commit) -> Result<Committed, StoreError> {
        self.commit_and_list(commit, &[]).map(|(done, _)| done)
    }

    fn commit_and_list(
        &self,
        commit: &Commit,
        prefixes: &[&str],
    ) -> Result<(Committed, Option<Snapshot>), StoreError> {
        commit.validate()?;
        let shared = &self.shared;
        let mut seen = shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let known = !seen.generation.is_empty() && commit.identity.is_none_or(|i| i == seen.identity());
        if !known {
            let keys: Vec<&str> = commit.checks.iter().map(|(k, _)| k.as_str()).collect();
            let now = self.read(&keys)?;
            if commit.identity.is_some_and(|i| i != now.identity) {
                return Ok((Committed::Conflict(now), None));
            }
            seen = shared.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        }
        let txn = shared.transaction(commit, prefixes, &seen);
        let unknown = |why: String| StoreError::Unknown { at: shared.at(), why };
        let sender = Arc::clone(shared);
        let response = self
            .wait(shared.members().len(), async move { sender.commit(txn).await })
            .map_err(unknown)?
            .map_err(|failed| match failed {
                Failed::NotSent(why) => self.unreachable(why),
                Failed::Sent(why) => unknown(why),
            })?;
        let (cluster, revision) = header(&response).map_err(|failed| unknown(failed.why()))?;
        if response.succeeded() && revision < seen.revision {
            // It landed in a restored store that nobody had noticed to be one. Who reads back sees a new identity.
            return Err(unknown("the store went back in time".into()));
        }
        if response.succeeded() {
            let identity = seen.identity();
            shared.saw(Seen {
                cluster,
                revision,
                generation: seen.generation,
            });
            let revision = revision as u64;
            let read = answers(&response).into_iter().flatten();
            let all = Snapshot {
                identity,
                revision,
                entries: read
                    .map(|kv| shared.entry(&kv))
                    .filter(|e| e.key != GENERATION)
                    .collect(),
            };
            return Ok((Committed::Done { revision }, Some(all)));
        }
        // The keys as they were at that instant, under the generation that was read with them.
        let mut found = answers(&response);
        let generation = found.first_mut().and_then(|g| g.drain(..).next());
        let now = Seen {
            cluster,
            revision,
            generation: generation.map_or_else(Vec::new, |kv| kv.value().to_vec()),
        };
        let moved = now.identity() != seen.identity();
        if moved || revision < seen.revision {
            // Restored, or a new generation: a look sorts it out.
            let keys: Vec<&str> = commit.checks.iter().map(|(k, _)| k.as_str()).collect();
            return Ok((Committed::Conflict(self.read(&keys)?), None));
        }
        let identity = now.identity();
        shared.saw(now);
        let now = Snapshot {
            identity,
            revision: revision as u64,
            entries: found
                .into_iter()
                .skip(1)
                .flatten()
                .map(|kv| shared.entry(&kv))
                .collect(),
        };
        Ok((Committed::Conflict(now), None))
    }

    fn set_endpoints(&self, endpoints: &[String]) {
        let mut members = self.shared.members.lock().unwrap_or_else(PoisonError::into_inner);
        if !endpoints.is_empty() && members.endpoints() != endpoints {
            *members = Arc::new(members.changed(endpoints.to_vec()));
        }
    }

    fn watch(&self, prefix: &str, wake: Wake) -> WatchGuard {
        let alive = Arc::new(());
        let (weak, shared, prefix) = (
            Arc::downgrade(&alive),
            Arc::clone(&self.shared),
            prefix.to_owned(),
        );
        self.runtime
            .spawn(async move { shared.watch(&prefix, &wake, &weak).await });
        WatchGuard { _alive: alive }
    }
}
