//! Heartbeats over every replication path: which cables and switches work, whether a VM is mirrored over them now or not.
//!
//! ```text
//! path i here --ask(nonce)--> path i of another host       once a second
//!             <--answer------
//! ```
//! One datagram each way, to the port of the API. It carries no secret and decides about nobody's VM: a path that is silent is told to
//! people, before the other one fails too, and a host that is late with its report counts as there while it answers on any path. An
//! answer counts only if it has the number that was sent, and comes from whom it was sent to; only hosts of the pool are answered.

mod told;

pub use told::{Pairs, counts, lost, told};

use crate::node::Node;
use crate::pool::Pool;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use steadfast_store::random_u64;
use steadfast_types::HostId;
use tokio::net::UdpSocket;

/// Each host is asked so often, on each path.
const EVERY: Duration = Duration::from_secs(1);
/// So many questions without an answer, and the path is lost. They are counted, not the time: a host that stood still asked nobody. And only
/// those count between which the other host has reported: one that does not live is silent everywhere, which is told otherwise.
const LOST: usize = 5;
/// An address that cannot be used is tried again after so long.
const AGAIN: Duration = Duration::from_secs(10);
/// What the pool knows of its hosts may be so old.
const POOL_AGE: Duration = Duration::from_secs(30);

const ASK: u8 = 1;
const ANSWER: u8 = 2;
/// `SFP`, version, kind, three zeroes, number.
const LEN: usize = 16;

/// A path to another host that is silent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LostPath {
    /// The host.
    pub to: HostId,
    /// Its number, from 0: the place of its addresses in the hosts' settings.
    pub path: u8,
    /// Its address there.
    pub address: IpAddr,
}

/// What was asked on one path, and heard.
#[derive(Default)]
struct Talk {
    /// The last questions, while they have no answer.
    asked: VecDeque<u64>,
    missed: usize,
    /// The other's last report: its daemon's run and counter.
    report: Option<(u64, u64)>,
    heard: Option<Instant>,
}

impl Talk {
    fn ask(&mut self, nonce: u64, report: Option<(u64, u64)>) {
        if !self.asked.is_empty() && report != self.report {
            self.missed += 1;
        }
        self.report = report;
        if self.asked.len() == LOST {
            self.asked.pop_front();
        }
        self.asked.push_back(nonce);
    }

    fn hear(&mut self, nonce: u64, now: Instant) {
        if self.asked.contains(&nonce) {
            self.asked.clear();
            (self.missed, self.heard) = (0, Some(now));
        }
    }

    fn lost(&self) -> bool {
        self.missed >= LOST
    }
}

type Talks = BTreeMap<(HostId, u8), (IpAddr, Talk)>;

/// See the module.
#[derive(Default)]
pub struct Paths(Mutex<Talks>);

impl Paths {
    fn talks(&self) -> MutexGuard<'_, Talks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Paths that are silent.
    #[must_use]
    pub fn lost(&self) -> Vec<LostPath> {
        let talks = self.talks();
        let lost = talks.iter().filter(|(_, (_, talk))| talk.lost());
        lost.map(|((to, path), (address, _))| LostPath {
            to: to.clone(),
            path: *path,
            address: *address,
        })
        .collect()
    }

    /// When a host answered last, on any path.
    #[must_use]
    pub fn heard(&self, host: &HostId) -> Option<Instant> {
        let talks = self.talks();
        let of_host = talks.iter().filter(|((to, _), _)| to == host);
        of_host.filter_map(|(_, (_, talk))| talk.heard).max()
    }

    /// Whom to ask on path `path`, and which number goes with each question.
    fn ask(&self, pool: &Pool, me: &HostId, path: u8) -> Vec<(SocketAddr, u64)> {
        let others =
            |(host, at): &(HostId, u8)| *at != path || host != me && address(pool, host, path).is_some();
        let mut talks = self.talks();
        talks.retain(|key, _| others(key));
        let mut questions = Vec::new();
        for (host, info) in pool.hosts.iter().filter(|(host, _)| *host != me) {
            let (Some(ip), Ok(nonce)) = (address(pool, host, path), random_u64()) else {
                continue;
            };
            let entry = talks.entry((host.clone(), path));
            let (known, talk) = entry.or_insert_with(|| (ip, Talk::default()));
            if *known != ip {
                (*known, *talk) = (ip, Talk::default());
            }
            let report = pool.reports.get(host).map(|r| (r.daemon, r.seq));
            talk.ask(nonce, report);
            questions.push((SocketAddr::new(ip, info.api.port()), nonce));
        }
        questions
    }

    fn hear(&self, path: u8, from: IpAddr, nonce: u64) {
        let mut talks = self.talks();
        let mine = talks
            .iter_mut()
            .filter(|((_, at), (ip, _))| *at == path && *ip == from);
        mine.for_each(|(_, (_, talk))| talk.hear(nonce, Instant::now()));
    }
}

/// A host's address on a path.
fn address(pool: &Pool, host: &HostId, path: u8) -> Option<IpAddr> {
    pool.hosts.get(host)?.replication.get(usize::from(path)).copied()
}

fn datagram(kind: u8, nonce: u64) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..5].copy_from_slice(&[b'S', b'F', b'P', 1, kind]);
    bytes[8..].copy_from_slice(&nonce.to_le_bytes());
    bytes
}

fn read(bytes: &[u8]) -> Option<(u8, u64)> {
    let whole: &[u8; LEN] = bytes.try_into().ok()?;
    let nonce = u64::from_le_bytes(whole[8..].try_into().ok()?);
    (whole[..4] == *b"SFP\x01").then_some((whole[4], nonce))
}

/// Asks and answers on this host's paths until the daemon ends.
pub async fn run(node: Arc<Node>) {
    let own = node.config();
    let mut all = tokio::task::JoinSet::new();
    for (path, ip) in (0_u8..).zip(own.replication()) {
        all.spawn(on_path(
            Arc::clone(&node),
            path,
            SocketAddr::new(ip, own.ports.api),
        ));
    }
    while all.join_next().await.is_some() {}
    // A daemon without paths does what else it does.
    std::future::pending::<()>().await;
}

async fn on_path(node: Arc<Node>, path: u8, at: SocketAddr) {
    let mut told = false;
    loop {
        match UdpSocket::bind(at).await {
            Ok(socket) => {
                told = false;
                talk(&node, path, &socket).await;
            }
            Err(error) if !std::mem::replace(&mut told, true) => {
                tracing::warn!(%at, %error, "no heartbeats on this path; tried again");
            }
            Err(_) => {}
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Until the socket fails for good.
async fn talk(node: &Node, path: u8, socket: &UdpSocket) {
    let (me, mut buffer) = (node.host(), [0; LEN + 1]);
    let mut tick = tokio::time::interval(EVERY);
    // One that stood still does not ask five times at once.
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {
                let Some(pool) = node.latest_pool(POOL_AGE).map(|r| r.pool) else { continue };
                for (to, nonce) in node.paths.ask(&pool, &me, path) {
                    // A network that cannot be reached says so here, and is silent.
                    let _ = socket.try_send_to(&datagram(ASK, nonce), to);
                }
            }
            got = socket.recv_from(&mut buffer) => match got {
                Ok((len, from)) => match read(&buffer[..len]) {
                    Some((ANSWER, nonce)) => node.paths.hear(path, from.ip(), nonce),
                    Some((ASK, nonce)) if known(node, from) => {
                        let _ = socket.try_send_to(&datagram(ANSWER, nonce), from);
                    }
                    _ => {}
                },
                // What an earlier datagram met on its way is told with the next receive.
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {}
                Err(error) => {
                    tracing::debug!(path, %error, "heartbeats");
                    return;
                }
            }
        }
    }
}

/// Whether a host of the pool has this address.
fn known(node: &Node, from: SocketAddr) -> bool {
    let pool = node.latest_pool(POOL_AGE).map(|r| r.pool);
    let has = |info: &crate::records::HostInfo| info.replication.contains(&from.ip());
    pool.is_some_and(|pool| pool.hosts.values().any(has))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::testing::two_hosts;

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn two_paths() -> Pool {
        let mut pool = two_hosts(1, 1);
        for (n, info) in (1_u8..).zip(pool.hosts.values_mut()) {
            info.replication = vec![[10, 0, 0, n].into(), [10, 0, 1, n].into()];
        }
        pool
    }

    /// One question to b on a path, after b has reported once more.
    fn asks(paths: &Paths, pool: &mut Pool, path: u8) -> u64 {
        pool.reports.get_mut(&host("b")).unwrap().seq += 1;
        let asked = paths.ask(pool, &host("a"), path);
        assert_eq!(asked.len(), 1);
        asked[0].1
    }

    #[test]
    fn a_path_is_lost_when_questions_are_not_answered_and_back_with_any_answer() {
        let (paths, mut pool) = (Paths::default(), two_paths());
        let (first, second): (IpAddr, IpAddr) = ([10, 0, 0, 2].into(), [10, 0, 1, 2].into());
        let mut late = 0;
        for n in 0..=LOST {
            assert!(paths.lost().is_empty(), "after {n}");
            let asked = asks(&paths, &mut pool, 0);
            paths.hear(0, first, asked);
            // The other is answered by somebody else, and with a number that was not sent.
            late = asks(&paths, &mut pool, 1);
            paths.hear(1, first, late);
            paths.hear(0, second, late);
            paths.hear(1, second, late.wrapping_add(1));
        }
        let lost = LostPath {
            to: host("b"),
            path: 1,
            address: second,
        };
        assert_eq!(paths.lost(), [lost]);
        assert!(paths.heard(&host("b")).is_some(), "it answers on the first");
        asks(&paths, &mut pool, 1);
        paths.hear(1, second, late);
        assert!(paths.lost().is_empty(), "an answer that is late is one");
    }

    #[test]
    fn who_left_and_what_has_another_address_begins_anew() {
        let (paths, mut pool) = (Paths::default(), two_paths());
        let lose = |pool: &mut Pool| {
            for _ in 0..=LOST {
                asks(&paths, pool, 1);
            }
            assert_eq!(paths.lost().len(), 1);
        };
        lose(&mut pool);
        pool.hosts.get_mut(&host("b")).unwrap().replication[1] = [10, 0, 1, 9].into();
        asks(&paths, &mut pool, 1);
        assert!(paths.lost().is_empty());
        lose(&mut pool);
        pool.hosts.remove(&host("b"));
        assert!(paths.ask(&pool, &host("a"), 1).is_empty());
        assert!(paths.lost().is_empty());
    }

    #[test]
    fn a_host_that_died_has_lost_no_path() {
        let (paths, mut pool) = (Paths::default(), two_paths());
        asks(&paths, &mut pool, 0);
        for _ in 0..3 * LOST {
            paths.ask(&pool, &host("a"), 0);
        }
        assert!(paths.lost().is_empty());
    }

    #[test]
    fn what_is_no_heartbeat_is_none() {
        assert_eq!(read(&datagram(ASK, 7)), Some((ASK, 7)));
        assert_eq!(read(&datagram(ASK, 7)[..15]), None);
        assert_eq!(read(&[0; LEN]), None);
        assert_eq!(read(&[0; LEN + 1]), None);
    }
}
