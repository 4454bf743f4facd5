//! One observer's view of one peer: which paths work, and whether it is silent, starved, or only without its daemon.

use super::{OwnClock, PathClock, Settings};
use crate::model::Network;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a peer says of itself in each heartbeat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfReport {
    /// It is short of CPU, memory or I/O.
    pub starved: bool,
    /// Drawn anew at each boot of the host. A new one proves that nothing from before runs.
    pub boot_id: u64,
}

/// What an observer concludes about a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// What it is.
    pub class: PeerClass,
    /// Paths that are lost although others work (or all).
    pub lost: Vec<Network>,
    /// It called itself starved.
    pub starved: bool,
    /// Its boot, as last heard.
    pub boot_id: Option<u64>,
    /// The observer was starved when it made this view: it does not count.
    pub blind: bool,
}

/// See [`View::class`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerClass {
    /// Heard on at least one path.
    #[default]
    Heard,
    /// The host answers, its daemon does not: connections are refused. Its VMs run.
    DaemonDown,
    /// Silent on every path, not yet for long enough.
    Fading,
    /// Silent on every path.
    Silent,
}

/// The evidence about one peer.
#[derive(Clone, Debug)]
pub struct Peer {
    paths: BTreeMap<Network, PathClock>,
    refused_ms: Option<u64>,
    report: SelfReport,
    heard_once: bool,
    all_lost_since_ms: Option<u64>,
}

impl Peer {
    /// A peer with these paths, expected to be heard from now on.
    #[must_use]
    pub fn new(paths: &[Network], own: &OwnClock, s: &Settings) -> Self {
        let clock = |n: &Network| (*n, PathClock::new(own.awake_ms(), s));
        Self {
            paths: paths.iter().map(clock).collect(),
            refused_ms: None,
            report: SelfReport::default(),
            heard_once: false,
            all_lost_since_ms: None,
        }
    }

    /// A heartbeat arrived on a path.
    pub fn heartbeat(&mut self, path: Network, report: SelfReport, own: &OwnClock, s: &Settings) {
        let awake = own.awake_ms();
        self.paths
            .entry(path)
            .or_insert_with(|| PathClock::new(awake, s))
            .heard(awake);
        self.report = report;
        self.heard_once = true;
        self.refused_ms = None;
    }

    /// The peer's kernel refused a connection to its daemon (or answered a ping): the host is alive.
    pub fn refused(&mut self, own: &OwnClock) {
        self.refused_ms = Some(own.awake_ms());
    }

    /// What is to be thought of it now. To be called after each [`OwnClock::tick`].
    pub fn view(&mut self, own: &OwnClock, s: &Settings) -> View {
        let awake = own.awake_ms();
        let factor = if self.report.starved { s.starved_factor } else { 1 };
        let lost: Vec<Network> = self
            .paths
            .iter()
            .filter(|(_, p)| p.lost(awake, factor, s))
            .map(|(n, _)| *n)
            .collect();
        let all = lost.len() == self.paths.len();
        if all {
            self.all_lost_since_ms.get_or_insert(awake);
        } else {
            self.all_lost_since_ms = None;
        }
        let refused = self
            .refused_ms
            .is_some_and(|t| awake.saturating_sub(t) <= s.path_timeout_max_ms);
        let class = match self.all_lost_since_ms {
            None => PeerClass::Heard,
            Some(_) if refused => PeerClass::DaemonDown,
            Some(since) if awake.saturating_sub(since) >= s.confirm_ms => PeerClass::Silent,
            Some(_) => PeerClass::Fading,
        };
        View {
            class,
            lost,
            starved: self.report.starved,
            boot_id: self.heard_once.then_some(self.report.boot_id),
            blind: own.starved(),
        }
    }
}
