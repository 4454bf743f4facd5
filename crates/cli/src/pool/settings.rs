//! What people set: a VM's health policy and its place in the pool, the pool's settings, applications.

use super::{Api, FolderArgs, OnVm, Outcome, api, show};
use clap::{Args, Subcommand, ValueEnum};
use std::collections::BTreeSet;
use steadfast_node::api::apps::{AppChange, AppStatus};
use steadfast_node::api::settings::{PoolChange, VmChange};
use steadfast_node::api::types::{HowToStop, NewClass, NewHealth};
use steadfast_node::http::Method;
use steadfast_node::limits::VmLimits;
use steadfast_node::model::{Check, GroupRule, HealthPolicy, Keep, Remedy, Rung};
use steadfast_types::{AppId, GroupId, VmId};

/// What is done about a service that fails.
#[derive(Clone, Copy, ValueEnum)]
pub enum Do {
    /// Restart the service in the guest, by its agent (--restart-command).
    RestartService,
    /// Reset the guest.
    Reboot,
    /// Go on on the standby's host.
    RollOver,
    /// Only tell people.
    Alert,
}

#[derive(Args)]
pub struct HealthArgs {
    /// A TCP connection to ADDRESS:PORT is accepted. May be repeated; all checks must pass.
    #[arg(long)]
    tcp: Vec<String>,
    /// A GET of this URL answers with 2xx or 3xx. May be repeated.
    #[arg(long)]
    http: Vec<String>,
    /// This shell command exits with 0 in the guest, run by its agent (the VM has --agent). May be repeated.
    #[arg(long)]
    command: Vec<String>,
    /// The application in the guest has sent a heartbeat within so many milliseconds (the VM has --agent).
    #[arg(long)]
    heartbeat_ms: Option<u64>,
    /// Shell command that restarts the service in the guest, by its agent.
    #[arg(long)]
    restart_command: Option<String>,
    /// Milliseconds between two rounds of checks.
    #[arg(long, default_value_t = HealthPolicy::default().interval_ms)]
    interval_ms: u64,
    /// A round that takes longer has failed.
    #[arg(long, default_value_t = HealthPolicy::default().timeout_ms)]
    timeout_ms: u64,
    /// Failed rounds in a row after which the service has failed.
    #[arg(long, default_value_t = HealthPolicy::default().failures)]
    failures: u8,
    /// After a start or a remedy failures do not count for so long.
    #[arg(long, default_value_t = HealthPolicy::default().grace_ms)]
    grace_ms: u64,
    /// Pause before the second remedy; doubles for each further one.
    #[arg(long, default_value_t = HealthPolicy::default().backoff_ms)]
    backoff_ms: u64,
    /// What is done, in this order. May be repeated: the same again is one more try. By default restart-service twice (with
    /// --restart-command), reboot twice, roll-over, alert.
    #[arg(long = "do", value_enum)]
    remedies: Vec<Do>,
    /// Look after it no more.
    #[arg(long, conflicts_with_all = ["tcp", "http", "command", "heartbeat_ms"])]
    off: bool,
}

impl HealthArgs {
    fn policy(self) -> Option<HealthPolicy> {
        if self.off {
            return None;
        }
        let tcp = self.tcp.into_iter().map(|to| Check::Tcp { to });
        let http = self.http.into_iter().map(|url| Check::Http { url });
        let shell = |text: String| vec!["/bin/sh".to_owned(), "-c".to_owned(), text];
        let command = self
            .command
            .into_iter()
            .map(|c| Check::Command { argv: shell(c) });
        let heartbeat = self.heartbeat_ms.map(|within_ms| Check::Heartbeat { within_ms });
        let mut remedies = self.remedies;
        if remedies.is_empty() {
            let restarts = if self.restart_command.is_some() { 2 } else { 0 };
            remedies.extend(std::iter::repeat_n(Do::RestartService, restarts));
            remedies.extend([Do::Reboot, Do::Reboot, Do::RollOver, Do::Alert]);
        }
        let mut ladder: Vec<Rung> = Vec::new();
        for remedy in remedies {
            let remedy = match remedy {
                Do::RestartService => Remedy::RestartService,
                Do::Reboot => Remedy::RebootVm,
                Do::RollOver => Remedy::RollOver,
                Do::Alert => Remedy::Alert,
            };
            match ladder.last_mut() {
                Some(last) if last.remedy == remedy => last.tries = last.tries.saturating_add(1),
                _ => ladder.push(Rung { remedy, tries: 1 }),
            }
        }
        Some(HealthPolicy {
            checks: tcp.chain(http).chain(command).chain(heartbeat).collect(),
            restart: self.restart_command.map(shell).unwrap_or_default(),
            interval_ms: self.interval_ms,
            timeout_ms: self.timeout_ms,
            failures: self.failures,
            grace_ms: self.grace_ms,
            backoff_ms: self.backoff_ms,
            ladder,
            ..HealthPolicy::default()
        })
    }
}

/// Runs `steadfast vm health`.
pub fn health(vm: &VmId, args: HealthArgs, on: &OnVm, json: bool) -> Outcome {
    let body = NewHealth {
        policy: args.policy(),
    };
    let path = format!("/v1/vms/{vm}/health");
    api(&on.folders, json)?.done(Method::POST, &path, on.dry_run, Some(&body))
}

#[derive(Args)]
pub struct LimitArgs {
    /// Share when CPUs are short: 1 to 10000, 100 is normal.
    #[arg(long)]
    cpu_weight: Option<u32>,
    /// Most CPU time, in percent of one core, e.g. 150%; or max.
    #[arg(long)]
    cpu_max: Option<String>,
    /// Most memory of guest and monitor together, e.g. 2GiB, or max.
    #[arg(long)]
    memory_max: Option<String>,
    /// Most I/O per second on each of its disks: read=SIZE,write=SIZE,read-ops=N,write-ops=N, each optional; or max.
    #[arg(long)]
    io_max: Option<String>,
    /// Most that each of its network cards carries per second: in=SIZE,out=SIZE, each optional; or max.
    #[arg(long)]
    net_max: Option<String>,
}

/// Runs `steadfast vm limit`.
pub fn limit(vm: &VmId, args: LimitArgs, on: &OnVm, json: bool) -> Outcome {
    let body = VmLimits {
        cpu_weight: args.cpu_weight,
        cpu_max: args.cpu_max,
        memory_max: args.memory_max,
        io_max: args.io_max,
        net_max: args.net_max,
    };
    let path = format!("/v1/vms/{vm}/limits");
    api(&on.folders, json)?.done(Method::POST, &path, on.dry_run, Some(&body))
}

#[derive(Args)]
pub struct SetArgs {
    /// Higher is served first when room or time is short.
    #[arg(long)]
    priority: Option<u16>,
    /// Standbys, 1 to 3.
    #[arg(long)]
    standbys: Option<u8>,
    /// A VM that must be ready before it starts. May be repeated; those given replace those before.
    #[arg(long)]
    after: Vec<VmId>,
    /// A placement group. May be repeated; those given replace those before.
    #[arg(long)]
    group: Vec<GroupId>,
    /// The application it is a part of; an empty name: of none.
    #[arg(long)]
    application: Option<String>,
    /// Whether the balancer leaves it alone.
    #[arg(long)]
    pinned: Option<bool>,
}

/// Runs `steadfast vm set`.
pub fn set_vm(vm: &VmId, args: SetArgs, on: &OnVm, json: bool) -> Outcome {
    let body = VmChange {
        priority: args.priority,
        standbys: args.standbys,
        depends_on: (!args.after.is_empty()).then(|| args.after.into_iter().collect()),
        groups: (!args.group.is_empty()).then(|| args.group.into_iter().collect()),
        application: args.application,
        pinned: args.pinned,
    };
    let path = format!("/v1/vms/{vm}/settings");
    api(&on.folders, json)?.done(Method::POST, &path, on.dry_run, Some(&body))
}

#[derive(Args)]
pub struct PoolSetArgs {
    /// How many hosts may fail at once with every protected VM going on; 0: no check.
    #[arg(long)]
    host_failures: Option<u8>,
    /// How much virtual CPU may be promised per real CPU, in thousandths.
    #[arg(long)]
    cpu_overcommit_permille: Option<u32>,
    /// Whether VMs are moved from hot hosts by themselves.
    #[arg(long)]
    balance: Option<bool>,
    /// Whether a host that predicts its failure is emptied.
    #[arg(long)]
    evacuate: Option<bool>,
    /// For how long after a drain VMs go back to their host, ms; 0: never.
    #[arg(long)]
    bring_back_ms: Option<u64>,
    #[command(flatten)]
    on: OnVm,
}

/// Runs `steadfast pool set`: shows the settings when nothing is given.
pub fn set_pool(args: PoolSetArgs, json: bool) -> Outcome {
    let body = PoolChange {
        host_failures: args.host_failures,
        cpu_overcommit_permille: args.cpu_overcommit_permille,
        balance: args.balance,
        evacuate_on_prediction: args.evacuate,
        bring_back_ms: args.bring_back_ms,
        group: None,
    };
    let api = api(&args.on.folders, json)?;
    if body == PoolChange::default() {
        let settings: serde_json::Value = api.get("/v1/settings")?;
        return api.print(&settings, |s| {
            format!("{}\n", serde_json::to_string_pretty(s).unwrap_or_default())
        });
    }
    api.done(Method::POST, "/v1/settings", args.on.dry_run, Some(&body))
}

/// The rule of a placement group.
#[derive(Clone, Copy, ValueEnum)]
pub enum Rule {
    /// Never two of its VMs, or their copies, on one host.
    Apart,
    /// On one host where possible.
    Together,
    /// None: the group is without effect.
    None,
}

#[derive(Args)]
pub struct GroupArgs {
    group: GroupId,
    #[arg(long, value_enum)]
    rule: Rule,
    #[command(flatten)]
    on: OnVm,
}

/// Runs `steadfast pool group`.
pub fn group(args: GroupArgs, json: bool) -> Outcome {
    let rule = match args.rule {
        Rule::Apart => Some(GroupRule::Apart),
        Rule::Together => Some(GroupRule::Together),
        Rule::None => None,
    };
    let body = PoolChange {
        group: Some((args.group, rule)),
        ..PoolChange::default()
    };
    api(&args.on.folders, json)?.done(Method::POST, "/v1/settings", args.on.dry_run, Some(&body))
}

/// How an application's VMs are kept.
#[derive(Clone, Copy, ValueEnum)]
pub enum KeepArg {
    /// Each where it fits.
    Free,
    /// On one host where possible, moved and drained together.
    Together,
    /// Never two on one host.
    Apart,
}

#[derive(Subcommand)]
pub enum AppVerb {
    /// All applications, each with its VMs.
    List {
        #[command(flatten)]
        folders: FolderArgs,
    },
    /// How its VMs are kept, and in which order they start.
    Set {
        application: AppId,
        #[arg(long, value_enum)]
        keep: Option<KeepArg>,
        /// A stage of its start: VM,VM,... May be repeated, first stage first; VMs in no stage start last.
        #[arg(long)]
        stage: Vec<String>,
        #[command(flatten)]
        on: OnVm,
    },
    /// Power on all its VMs, stage by stage.
    Start {
        application: AppId,
        #[command(flatten)]
        on: OnVm,
    },
    /// Power off all its VMs.
    Stop {
        application: AppId,
        /// At once, as if the power failed.
        #[arg(long)]
        now: bool,
        #[command(flatten)]
        on: OnVm,
    },
    /// Change the class of all its VMs.
    Protect {
        application: AppId,
        /// none, restart, checkpoint or ft.
        #[arg(long)]
        class: String,
        #[command(flatten)]
        on: OnVm,
    },
}

/// Runs `steadfast app VERB`.
pub fn app(verb: AppVerb, json: bool) -> Outcome {
    let at = |app: &AppId, what: &str| format!("/v1/applications/{app}/{what}");
    match verb {
        AppVerb::List { folders } => list(&api(&folders, json)?),
        AppVerb::Set {
            application,
            keep,
            stage,
            on,
        } => {
            let stages = stage.iter().map(|s| s.split(',').map(VmId::new).collect());
            let stages = stages.collect::<Result<Vec<BTreeSet<VmId>>, _>>()?;
            let body = AppChange {
                keep: keep.map(|k| match k {
                    KeepArg::Free => Keep::Free,
                    KeepArg::Together => Keep::Together,
                    KeepArg::Apart => Keep::Apart,
                }),
                start_order: (!stages.is_empty()).then_some(stages),
            };
            let path = at(&application, "settings");
            api(&on.folders, json)?.done(Method::POST, &path, on.dry_run, Some(&body))
        }
        AppVerb::Start { application, on } => {
            let path = at(&application, "start");
            api(&on.folders, json)?.done(Method::POST, &path, on.dry_run, None::<&()>)
        }
        AppVerb::Stop { application, now, on } => {
            let path = at(&application, "stop");
            api(&on.folders, json)?.done(Method::POST, &path, on.dry_run, Some(&HowToStop { now }))
        }
        AppVerb::Protect {
            application,
            class,
            on,
        } => {
            let path = at(&application, "protection");
            api(&on.folders, json)?.done(Method::POST, &path, on.dry_run, Some(&NewClass { class }))
        }
    }
}

fn list(api: &Api) -> Outcome {
    let apps: Vec<AppStatus> = api.get("/v1/applications")?;
    api.print(&apps, |a| show::applications(a))
}
