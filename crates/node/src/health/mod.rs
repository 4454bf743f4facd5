//! Health of services in guests: checked by the host that runs the VM, remedied by the VM's policy.
//!
//! ```text
//! node's round --due?--> task: checks, bounded in time --> cluster::health (pure) --> remedy, event
//!                             | TCP, HTTP; over vsock: the guest's agent (commands), heartbeats of the application
//!                                                           \--> state, in this host's report
//! ```
//! A starved host does not judge (I7): its checks would fail for its own sake. After a restart of the daemon, or a move, a service has
//! its grace again; what was tried for it goes along, in the VM's record (`VmMemory::tried`).

pub mod agent;
pub mod beats;
pub mod check;

use crate::guard::boot_ms;
use crate::journal::About;
use crate::migrate;
use crate::node::Node;
use crate::pool::Pool;
use crate::records::{
    ServiceReport, StoredTask, StoredTried, TaskState, VmMemory, json, now_ms, update, vm_state,
};
use agent::Agent;
use beats::Beats;
use check::Inside;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use steadfast_cluster::events::What;
use steadfast_cluster::health::{Health, Means, Tried};
use steadfast_cluster::model::{Check, HealthPolicy, MoveCause, Phase, Power, Remedy, Task};
use steadfast_types::{HostId, VmId};
use steadfast_vmm::control::Request;
use tokio::runtime::Handle;

/// How long a VM's process may take to answer.
const RESET_BOUND: Duration = Duration::from_secs(10);

/// How long the command that restarts a service may take, and its agent to say that it is there.
const RESTART_BOUND: Duration = Duration::from_secs(60);
const PING_BOUND: Duration = Duration::from_secs(2);

/// The ways into a guest with a vsock device.
#[derive(Clone, Default)]
struct Ways {
    agent: Option<Arc<Agent>>,
    beats: Option<Arc<Beats>>,
}

impl Ways {
    /// Those that a policy needs.
    fn of(policy: &HealthPolicy, vsock: Option<&Path>) -> Self {
        let Some(vsock) = vsock else {
            return Self::default();
        };
        let beats = hears(policy).then(|| Beats::listen(vsock));
        Self {
            agent: Some(Arc::new(Agent::at(vsock))),
            beats: beats.and_then(|made| match made {
                Ok(beats) => Some(Arc::new(beats)),
                Err(error) => {
                    tracing::warn!(%error, path = %vsock.display(), "heartbeats of a VM's application cannot be heard");
                    None
                }
            }),
        }
    }

    fn inside(&self) -> Inside<'_> {
        Inside {
            agent: self.agent.as_deref(),
            beats: self.beats.as_deref(),
        }
    }
}

/// A VM that is looked after.
struct Watched {
    policy: HealthPolicy,
    /// As [`Services::look`] has it.
    life: u64,
    machine: Arc<Mutex<Health>>,
    why: Arc<Mutex<String>>,
    busy: Arc<AtomicBool>,
    ways: Ways,
    /// How often its host has reset its guest.
    resets: u64,
    next_ms: u64,
}

/// See the module.
#[derive(Default)]
pub struct Services {
    vms: HashMap<VmId, Watched>,
}

impl Services {
    /// Begins the checks that are due, of VMs that run here.
    pub fn look(&mut self, node: &Arc<Node>, pool: &Pool, me: &HostId, starved: bool) {
        let now = boot_ms();
        let mut here = Vec::new();
        for (id, vm) in &pool.vms {
            let spec = &vm.stored.record;
            let Some(policy) = spec.health.as_ref().filter(|p| !p.checks.is_empty()) else {
                continue;
            };
            let report = pool.reports.get(me).and_then(|r| r.instances.get(id));
            let runs = report.is_some_and(|i| i.phase == Phase::Running);
            if vm.owner() != Some(me) || spec.power == Power::Off {
                continue;
            }
            here.push(id);
            if !runs {
                // It starts, or its process was slow to answer: what was tried so far is not forgotten for that.
                continue;
            }
            // What changes when its guest is booted again. The term of a VM that is mirrored changes for smaller reasons too.
            let life = match (spec.standbys_wanted(), spec.disks_suffice()) {
                (0, _) => vm.term().0,
                (_, true) => node.instances.meta(id).map_or(0, |meta| meta.started_ms),
                (_, false) => 0,
            };
            let known = self.vms.get(id).is_some_and(|w| w.policy == *policy);
            if !known {
                let tried = vm.memory.tried.as_ref().filter(|t| t.policy == name_of(policy));
                let vsock = node.instances.vsock(&vm.stored);
                let ways = Ways::of(policy, vsock.as_deref());
                self.vms
                    .insert(id.clone(), Watched::new(policy, life, now, tried, ways));
            }
            let Some(watched) = self.vms.get_mut(id) else {
                continue;
            };
            if std::mem::replace(&mut watched.life, life) != life {
                watched.restarted(now);
            }
            let resets = report.map_or(0, |i| i.mishaps.panic_resets + i.mishaps.watchdog_resets);
            if std::mem::replace(&mut watched.resets, resets) < resets {
                // In place, by its own process.
                watched.restarted(now);
            }
            if now < watched.next_ms || starved || watched.busy.swap(true, Ordering::AcqRel) {
                continue;
            }
            watched.next_ms = now.saturating_add(policy.interval_ms);
            match &watched.ways.beats {
                Some(beats) => beats.keep(),
                // What kept them from being heard may be over.
                None if watched.ways.agent.is_some() && hears(policy) => {
                    let vsock = node.instances.vsock(&vm.stored);
                    watched.ways = Ways::of(policy, vsock.as_deref());
                }
                None => {}
            }
            let standby = vm
                .memory
                .standbys
                .iter()
                .find(|h| pool.can_take_over(id, vm, h))
                .cloned();
            let round = Round {
                node: Arc::clone(node),
                vm: id.clone(),
                me: me.clone(),
                standby,
                policy: policy.clone(),
                machine: Arc::clone(&watched.machine),
                why: Arc::clone(&watched.why),
                ways: watched.ways.clone(),
            };
            let busy = Arc::clone(&watched.busy);
            Handle::current().spawn(async move {
                round.play().await;
                busy.store(false, Ordering::Release);
            });
        }
        self.vms.retain(|id, _| here.contains(&id));
    }

    /// How the services here are.
    #[must_use]
    pub fn report(&self) -> BTreeMap<VmId, ServiceReport> {
        let each = self.vms.iter().map(|(vm, w)| {
            let report = ServiceReport {
                state: lock(&w.machine).state(),
                why: lock(&w.why).clone(),
            };
            (vm.clone(), report)
        });
        each.collect()
    }
}

/// Whether it is about heartbeats.
fn hears(policy: &HealthPolicy) -> bool {
    let heartbeat = |c: &Check| matches!(c, Check::Heartbeat { .. });
    policy.checks.iter().any(heartbeat)
}

impl Watched {
    /// Its guest starts anew.
    fn restarted(&self, now: u64) {
        lock(&self.machine).restarted(now);
        if let Some(beats) = &self.ways.beats {
            beats.begin();
        }
    }

    fn new(policy: &HealthPolicy, life: u64, now: u64, tried: Option<&StoredTried>, ways: Ways) -> Self {
        let machine = match tried {
            Some(t) => Health::resumed(policy.clone(), &t.tried, now, now_ms()),
            None => Health::new(policy.clone(), now),
        };
        Self {
            policy: policy.clone(),
            life,
            machine: Arc::new(Mutex::new(machine)),
            why: Arc::default(),
            busy: Arc::default(),
            ways,
            resets: 0,
            next_ms: now,
        }
    }
}

/// Names a policy: what was tried under another one does not count.
fn name_of(policy: &HealthPolicy) -> String {
    crate::pki::fingerprint(&json(policy).unwrap_or_default())
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One round of checks of a VM, and what follows.
struct Round {
    node: Arc<Node>,
    vm: VmId,
    me: HostId,
    standby: Option<HostId>,
    policy: HealthPolicy,
    machine: Arc<Mutex<Health>>,
    why: Arc<Mutex<String>>,
    ways: Ways,
}

impl Round {
    async fn play(self) {
        let bound = Duration::from_millis(self.policy.timeout_ms);
        let made = tokio::time::timeout(bound, all(&self.policy.checks, self.ways.inside())).await;
        let failed = match made {
            // Nothing could be said yet.
            Ok(Ok(false)) => return,
            Ok(Ok(true)) => None,
            Ok(Err(why)) => Some(why),
            Err(_) => Some(format!("no answer within {} ms", self.policy.timeout_ms)),
        };
        let means = Means {
            agent: failed.is_some() && self.can_restart().await,
            standby: self.standby.is_some(),
        };
        let good = failed.is_none();
        let why = failed.unwrap_or_default();
        lock(&self.why).clone_from(&why);
        let (before, after, remedy) = {
            let mut machine = lock(&self.machine);
            let (now, wall) = (boot_ms(), now_ms());
            let before = machine.tried(now, wall);
            let remedy = machine.result(now, good, means);
            (before, machine.tried(now, wall), remedy)
        };
        if before != after {
            // Before the remedy: it may bring the VM to another host.
            self.keep(after).await;
        }
        if let Some(remedy) = remedy {
            self.remedy(remedy, why).await;
        }
    }

    /// Whether the service can be restarted: the policy says how, and the agent answers.
    async fn can_restart(&self) -> bool {
        let wanted = !self.policy.restart.is_empty()
            && self
                .policy
                .ladder
                .iter()
                .any(|r| r.remedy == Remedy::RestartService);
        match &self.ways.agent {
            Some(agent) if wanted => {
                let asked = tokio::time::timeout(PING_BOUND, agent.ping()).await;
                asked.is_ok_and(|answer| answer.is_ok())
            }
            _ => false,
        }
    }

    /// Restarts the service in the guest.
    async fn restart(&self) -> Result<String, String> {
        let agent = self.ways.agent.as_ref().ok_or("there is no agent")?;
        match tokio::time::timeout(RESTART_BOUND, agent.run(&self.policy.restart)).await {
            Ok(Ok(())) => Ok(format!("`{}` in the guest", self.policy.restart.join(" "))),
            Ok(Err(why)) => Err(why),
            Err(_) => Err(format!("it takes longer than {} s", RESTART_BOUND.as_secs())),
        }
    }

    /// Writes down what was tried, for whoever looks after the VM next.
    async fn keep(&self, tried: Tried) {
        let (key, policy) = (vm_state(&self.vm), name_of(&self.policy));
        let kept = self.node.blocking(move |n| {
            update(&*n.kv(), &key, |old: Option<VmMemory>| {
                Ok(old.map(|mut memory| {
                    memory.tried = Some(StoredTried {
                        policy: policy.clone(),
                        tried: tried.clone(),
                    });
                    memory
                }))
            })
            .map(|_| ())
        });
        if let Err(error) = kept.await {
            tracing::warn!(%error, vm = %self.vm, "what was tried for its service could not be written down");
        }
    }

    /// What was known when the round began may be over by now.
    async fn still_wanted(&self) -> Option<Pool> {
        let pool = self.node.blocking(|n| Pool::load(&*n.kv())).await.ok()?;
        let vm = pool.vms.get(&self.vm)?;
        let spec = &vm.stored.record;
        let wanted = vm.owner() == Some(&self.me)
            && spec.power == Power::On
            && spec.health.as_ref() == Some(&self.policy);
        let moving = |t: &StoredTask| {
            let Task::Migrate { vm, .. } = &t.task else {
                return false;
            };
            *vm == self.vm && t.state == TaskState::Running
        };
        (wanted && !pool.tasks.iter().any(moving)).then_some(pool)
    }

    async fn remedy(&self, remedy: Remedy, why: String) {
        let Some(pool) = self.still_wanted().await else {
            return;
        };
        let done = match remedy {
            Remedy::RebootVm => {
                if let Some(beats) = &self.ways.beats {
                    beats.begin();
                }
                let vm = self.vm.clone();
                let reset = move |n: &Node| n.instances.ask(&vm, &Request::Reset, RESET_BOUND);
                self.node
                    .blocking(reset)
                    .await
                    .map(|_| "reboot the VM".to_owned())
            }
            Remedy::RollOver => match &self.standby {
                Some(to) => migrate::begin(&self.node, &pool, &self.vm, &self.me, to, MoveCause::Relief)
                    .await
                    .map(|_| format!("roll over to {to}")),
                None => return,
            },
            // The alarm stands as long as the report says that the service failed.
            Remedy::Alert => Ok("none is left: people are told".into()),
            Remedy::RestartService => {
                let done = self.restart().await;
                Ok(done.unwrap_or_else(|why| format!("restart the service: failed, {why}")))
            }
        };
        let remedy = done.unwrap_or_else(|error| format!("{remedy:?} failed: {error}"));
        let about = About::On(self.vm.clone(), self.me.clone());
        let told = self.node.blocking(move |n| {
            n.event(
                about,
                What::Remedy { remedy },
                format!("its service fails: {why}"),
            );
            Ok(())
        });
        let _ = told.await;
    }
}

/// Whether anything could be checked.
async fn all(checks: &[Check], inside: Inside<'_>) -> Result<bool, String> {
    let mut any = false;
    for one in checks {
        if let Check::Heartbeat { within_ms } = one
            && inside.beats.is_none_or(|b| b.is_early(*within_ms))
        {
            // It has not had its time yet, or it is this host that does not hear: neither is held against it.
            continue;
        }
        check::make(one, inside).await?;
        any = true;
    }
    Ok(any)
}

#[cfg(test)]
mod testing {
    /// What a test's futures run on.
    pub(super) fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }
}
