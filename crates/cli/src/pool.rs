//! The verbs on a pool: they ask this host's daemon, over its unix socket.

pub mod settings;
mod show;
mod upgrade;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use steadfast_node::api::drill::DrillSchedule;
use steadfast_node::api::types::{
    Availability, Done, HostStatus, HowToStop, MoveTo, NewClass, NewToken, NewVm, PoolStatus, Storages,
    VmStatus,
};
use steadfast_node::api::vms::{Console, Shown};
use steadfast_node::config::Ports;
use steadfast_node::fence::FenceAgent;
use steadfast_node::http::{Method, Target, ask};
use steadfast_node::journal::Told;
use steadfast_node::records::{DrillReport, StoredTask, Timings};
use steadfast_node::setup::{self, HostChoice};
use steadfast_node::watchdog::Choice;
use steadfast_node::{Ended, Folders, binary};
use steadfast_protect::EtcdSpec;
use steadfast_types::{HostId, SiteId, VmId};
use steadfast_vmm::resident;
use steadfast_vmm::spec::VmSpec;

type Outcome = Result<ExitCode, Box<dyn Error>>;

/// How long the daemon may take to answer.
const BOUND: Duration = Duration::from_secs(60);

/// Where the daemon keeps its files.
#[derive(Args, Clone)]
pub struct FolderArgs {
    /// Files that are kept across restarts of the host.
    #[arg(long, env = "STEADFAST_DATA_DIR", default_value = "/var/lib/steadfast")]
    data: PathBuf,
    /// Sockets and what runs here.
    #[arg(long, env = "STEADFAST_RUN_DIR", default_value = "/run/steadfast")]
    run: PathBuf,
}

impl FolderArgs {
    fn folders(&self) -> Result<Folders, Box<dyn Error>> {
        Ok(Folders {
            data: std::path::absolute(&self.data)?,
            run: std::path::absolute(&self.run)?,
        })
    }
}

/// What makes a host.
#[derive(Args)]
pub struct HostArgs {
    /// Name of this host; by default the machine's.
    #[arg(long)]
    name: Option<HostId>,
    /// This host's address, at which all others of the pool reach it.
    #[arg(long)]
    address: IpAddr,
    /// Address for replication links; once for each path. By default the same.
    #[arg(long)]
    replication: Vec<IpAddr>,
    /// Where it stands.
    #[arg(long)]
    site: Option<SiteId>,
    /// A shared storage (SAN, NFS) that this host reaches, by a name of your choice. May be repeated.
    #[arg(long)]
    storage: Vec<String>,
    /// Port of the API.
    #[arg(long, default_value_t = Ports::default().api)]
    api_port: u16,
    /// Port of the etcd member for clients.
    #[arg(long, default_value_t = Ports::default().etcd_client)]
    etcd_client_port: u16,
    /// Port of the etcd member for other members.
    #[arg(long, default_value_t = Ports::default().etcd_peer)]
    etcd_peer_port: u16,
    /// The etcd program, if not `etcd` on the PATH.
    #[arg(long)]
    etcd_program: Option<PathBuf>,
    /// Milliseconds between two heartbeats of the pool's own etcd; an election, or an answer, may take ten times as long. More where
    /// hosts are slow or far apart; the same on all of them.
    #[arg(long, default_value_t = steadfast_node::config::etcd_heartbeat_ms())]
    etcd_heartbeat_ms: u64,
    /// The host's watchdog device, such as /dev/watchdog0: it resets the host when that cannot end its `restart` VMs after its lease.
    /// Nobody else may use it.
    #[arg(long)]
    watchdog: Option<PathBuf>,
    /// One more argument for each `steadfast vmm`, for example --vmm-arg=--cgroup=off. May be repeated.
    #[arg(long, allow_hyphen_values = true)]
    vmm_arg: Vec<String>,
    #[command(flatten)]
    folders: FolderArgs,
}

impl HostArgs {
    fn choice(&self) -> Result<HostChoice, Box<dyn Error>> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => HostId::new(std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim())?,
        };
        Ok(HostChoice {
            host: name,
            address: self.address,
            replication: self.replication.clone(),
            site: self.site.clone(),
            storages: self.storage.iter().cloned().collect(),
            ports: Ports {
                api: self.api_port,
                etcd_client: self.etcd_client_port,
                etcd_peer: self.etcd_peer_port,
            },
            vmm_args: self.vmm_arg.clone(),
            etcd_program: self.etcd_program.clone(),
            etcd_heartbeat_ms: self.etcd_heartbeat_ms,
            watchdog: self.watchdog.clone(),
        })
    }
}

#[derive(Subcommand)]
pub enum PoolVerb {
    /// Make a pool of this host. Then start `steadfast node`.
    Init {
        /// Name of the pool.
        #[arg(default_value = "pool")]
        pool: String,
        #[command(flatten)]
        host: Box<HostArgs>,
        /// Use this etcd cluster instead of one of the pool's own: URL. May be repeated.
        #[arg(long)]
        etcd: Vec<String>,
        /// Certificates for that cluster: CA, certificate, key.
        #[arg(long, num_args = 3, value_names = ["CA", "CERTIFICATE", "KEY"], requires = "etcd")]
        etcd_tls: Vec<PathBuf>,
        /// Milliseconds in which a host must renew its lease; `restart` VMs of a dead host wait for it. How often hosts report, and
        /// when a silent one is suspect or dead, goes with it.
        #[arg(long, default_value_t = Timings::default().lease_ms, value_parser = clap::value_parser!(u64).range(2000..=600_000))]
        lease_ms: u64,
        /// Milliseconds that a host's certificate lives; its daemon renews it when a third is left.
        #[arg(long, default_value_t = Timings::default().certificate_ms)]
        certificate_ms: u64,
        /// Milliseconds of silence after which a protected VM's standby suspects its primary; more where hosts are slow or far
        /// apart.
        #[arg(long, default_value_t = Timings::default().vm_suspect_ms, value_parser = clap::value_parser!(u64).range(50..=60_000))]
        vm_suspect_ms: u64,
    },
    /// Let this host join a pool. Then start `steadfast node`.
    Join {
        /// API address of a host of the pool, IP:PORT.
        at: SocketAddr,
        /// What `steadfast pool token` printed there.
        #[arg(long)]
        token: String,
        /// Vote in the store only; run no VMs.
        #[arg(long)]
        witness: bool,
        #[command(flatten)]
        host: Box<HostArgs>,
    },
    /// Print a token that lets one host join within an hour.
    Token {
        #[command(flatten)]
        folders: FolderArgs,
    },
    /// The pool on one screen; as `steadfast status`.
    Status {
        #[command(flatten)]
        folders: FolderArgs,
    },
    /// What the pool would do now.
    Plan {
        #[command(flatten)]
        folders: FolderArgs,
    },
    /// Long actions: under way, and those that ended lately.
    Tasks {
        #[command(flatten)]
        folders: FolderArgs,
    },
    /// Cancel a task.
    Cancel {
        task: String,
        #[command(flatten)]
        folders: FolderArgs,
    },
    /// Bring all hosts to another binary, one after the other, while protected VMs go on.
    Upgrade(upgrade::UpgradeArgs),
    /// Change the pool's settings; without any, show them.
    Set(settings::PoolSetArgs),
    /// Give a placement group its rule.
    Group(settings::GroupArgs),
}

#[derive(Subcommand)]
pub enum HostVerb {
    /// All hosts.
    List {
        #[command(flatten)]
        folders: FolderArgs,
    },
    /// Empty a host: move its VMs, replace its standbys.
    Drain(OnHost),
    /// Use a host again.
    Resume(OnHost),
    /// Say how a host is fenced from outside when it is dead: by a fence agent that cuts its power. Its VMs of class `restart` need not
    /// wait for its lease then.
    Fence(FenceArgs),
    /// Say which shared storages a host reaches, all of them: VMs with disks there can run on it.
    Storage(StorageArgs),
    /// Take a host out of the pool that is empty or gone for good.
    Remove(OnHost),
}

#[derive(Args)]
pub struct StorageArgs {
    #[command(flatten)]
    on: OnHost,
    /// Their names.
    #[arg(required_unless_present = "none")]
    storages: Vec<String>,
    /// It reaches none.
    #[arg(long, conflicts_with = "storages")]
    none: bool,
}

#[derive(Args)]
pub struct FenceArgs {
    #[command(flatten)]
    on: OnHost,
    /// The agent, such as fence_ipmilan; it must be on every host. It is asked for the host's power first.
    #[arg(long, required_unless_present = "none")]
    agent: Option<String>,
    /// One of its options: NAME=VALUE, such as ip=10.0.0.9. May be repeated.
    #[arg(long = "option", value_parser = parse_option)]
    options: Vec<(String, String)>,
    /// Whether it is switched off and on, or off.
    #[arg(long, default_value = "reboot", value_parser = ["reboot", "off"])]
    action: String,
    /// By its lease alone.
    #[arg(long, conflicts_with_all = ["agent", "options", "action"])]
    none: bool,
}

fn parse_option(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("an option is NAME=VALUE")?;
    Ok((name.into(), value.into()))
}

#[derive(Args)]
pub struct OnHost {
    host: HostId,
    /// Only print the plan.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    folders: FolderArgs,
}

/// The daemon of this host.
pub struct Api {
    target: Target,
    runtime: tokio::runtime::Runtime,
    json: bool,
}

impl Api {
    /// Whose socket is in this folder.
    pub fn new(folders: &Folders, json: bool) -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            target: Target::Unix(folders.socket()),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?,
            json,
        })
    }

    fn ask<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<A, Box<dyn Error>> {
        Ok(self
            .runtime
            .block_on(ask(&self.target, method, path, body, BOUND))?)
    }

    fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, Box<dyn Error>> {
        self.ask(Method::GET, path, None::<&()>)
    }

    fn print<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Outcome {
        match self.json {
            true => println!("{}", serde_json::to_string(value)?),
            false => print!("{}", text(value)),
        }
        Ok(ExitCode::SUCCESS)
    }

    fn done(&self, method: Method, path: &str, dry: bool, body: Option<&impl Serialize>) -> Outcome {
        let path = if dry {
            format!("{path}?dry_run=true")
        } else {
            path.into()
        };
        let done: Done = self.ask(method, &path, body)?;
        self.print(&done, show::done)
    }
}

fn api(folders: &FolderArgs, json: bool) -> Result<Api, Box<dyn Error>> {
    Api::new(&folders.folders()?, json)
}

/// Runs `steadfast pool VERB`.
pub fn pool(verb: PoolVerb, json: bool) -> Outcome {
    match verb {
        PoolVerb::Init {
            pool,
            host,
            etcd,
            etcd_tls,
            lease_ms,
            certificate_ms,
            vm_suspect_ms,
        } => {
            let external = (!etcd.is_empty()).then(|| external(etcd, &etcd_tls));
            let timings = Timings {
                certificate_ms,
                vm_suspect_ms,
                ..Timings::for_lease(lease_ms)
            };
            setup::init(&host.folders.folders()?, &pool, host.choice()?, external, timings)?;
            println!("this host is pool {pool} now; start its daemon: steadfast node");
            Ok(ExitCode::SUCCESS)
        }
        PoolVerb::Join {
            at,
            token,
            witness,
            host,
        } => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let folders = host.folders.folders()?;
            let config = runtime.block_on(setup::join(&folders, at, &token, host.choice()?, witness))?;
            println!(
                "host {} is in pool {} now; start its daemon: steadfast node",
                config.host, config.pool
            );
            Ok(ExitCode::SUCCESS)
        }
        PoolVerb::Token { folders } => {
            let api = api(&folders, json)?;
            let token: NewToken = api.ask(Method::POST, "/v1/tokens", None::<&()>)?;
            api.print(&token, |t| {
                format!(
                    "steadfast pool join {} --token {} --address THIS-HOST'S-ADDRESS\n",
                    t.address, t.token
                )
            })
        }
        PoolVerb::Status { folders } => status(&folders, json),
        PoolVerb::Plan { folders } => {
            let api = api(&folders, json)?;
            let done: Done = api.get("/v1/plan")?;
            api.print(&done, show::done)
        }
        PoolVerb::Tasks { folders } => {
            let api = api(&folders, json)?;
            let tasks: Vec<StoredTask> = api.get("/v1/tasks")?;
            api.print(&tasks, |t| show::tasks(t))
        }
        PoolVerb::Cancel { task, folders } => {
            api(&folders, json)?.done(Method::DELETE, &format!("/v1/tasks/{task}"), false, None::<&()>)
        }
        PoolVerb::Upgrade(args) => upgrade::upgrade(&args, json),
        PoolVerb::Set(args) => settings::set_pool(args, json),
        PoolVerb::Group(args) => settings::group(args, json),
    }
}

fn external(endpoints: Vec<String>, tls: &[PathBuf]) -> EtcdSpec {
    let mut spec = EtcdSpec::new(endpoints);
    if let [ca, certificate, key] = tls {
        spec.tls = Some(steadfast_node::TlsFiles {
            ca: ca.clone(),
            certificate: certificate.clone(),
            key: key.clone(),
        });
    }
    spec
}

/// Runs `steadfast status`: the exit code is 0 only if nothing needs attention.
pub fn status(folders: &FolderArgs, json: bool) -> Outcome {
    let api = api(folders, json)?;
    let status: PoolStatus = api.get("/v1/status")?;
    api.print(&status, show::status)?;
    Ok(match status.healthy {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Runs `steadfast host VERB`.
pub fn host(verb: HostVerb, json: bool) -> Outcome {
    let (what, on, method) = match &verb {
        HostVerb::List { folders } => {
            let api = api(folders, json)?;
            let hosts: Vec<HostStatus> = api.get("/v1/hosts")?;
            return api.print(&hosts, |h| show::hosts(h));
        }
        HostVerb::Drain(on) => ("/drain", on, Method::POST),
        HostVerb::Resume(on) => ("/resume", on, Method::POST),
        HostVerb::Remove(on) => ("", on, Method::DELETE),
        HostVerb::Storage(args) => {
            let path = format!("/v1/hosts/{}/storages", args.on.host);
            let wanted = Storages {
                storages: args.storages.iter().cloned().collect(),
            };
            let api = api(&args.on.folders, json)?;
            return api.done(Method::PUT, &path, args.on.dry_run, Some(&wanted));
        }
        HostVerb::Fence(args) => {
            let path = format!("/v1/hosts/{}/fence", args.on.host);
            let api = api(&args.on.folders, json)?;
            let Some(agent) = args.agent.clone().filter(|_| !args.none) else {
                return api.done(Method::DELETE, &path, args.on.dry_run, None::<&()>);
            };
            let agent = FenceAgent {
                agent,
                options: args.options.iter().cloned().collect(),
                action: args.action.clone(),
            };
            return api.done(Method::PUT, &path, args.on.dry_run, Some(&agent));
        }
    };
    let path = format!("/v1/hosts/{}{what}", on.host);
    api(&on.folders, json)?.done(method, &path, on.dry_run, None::<&()>)
}

#[derive(Args)]
pub struct EventsArgs {
    /// At most so many of the newest.
    #[arg(long, default_value_t = 50)]
    limit: usize,
    /// Only those about this VM or host.
    #[arg(long)]
    subject: Option<String>,
    /// Go on with those that come, until interrupted.
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    folders: FolderArgs,
}

/// How often `events --follow` asks.
const FOLLOW: Duration = Duration::from_secs(1);

/// Runs `steadfast events`; with --json one event a line.
pub fn events(args: &EventsArgs, json: bool) -> Outcome {
    let api = api(&args.folders, json)?;
    let subject = args
        .subject
        .as_ref()
        .map_or_else(String::new, |s| format!("&subject={s}"));
    let (mut limit, mut after) = (args.limit, 0);
    loop {
        let events: Vec<Told> = api.get(&format!("/v1/events?limit={limit}&after={after}{subject}"))?;
        for told in &events {
            match json {
                true => println!("{}", serde_json::to_string(told)?),
                false => println!("{}", show::event(told)),
            }
            after = after.max(told.event.id);
        }
        if !args.follow {
            return Ok(ExitCode::SUCCESS);
        }
        limit = usize::MAX;
        std::thread::sleep(FOLLOW);
    }
}

#[derive(Args)]
pub struct AvailabilityArgs {
    vm: VmId,
    /// The last so many hours; by default all that is known.
    #[arg(long)]
    hours: Option<u64>,
    #[command(flatten)]
    folders: FolderArgs,
}

/// Runs `steadfast availability VM`.
pub fn availability(args: &AvailabilityArgs, json: bool) -> Outcome {
    let from = args.hours.map_or(0, |hours| {
        steadfast_node::records::now_ms().saturating_sub(hours.saturating_mul(3_600_000))
    });
    let api = api(&args.folders, json)?;
    let found: Availability = api.get(&format!("/v1/vms/{}/availability?from_ms={from}", args.vm))?;
    api.print(&found, show::availability)
}

#[derive(Args)]
pub struct ProtectArgs {
    vm: VmId,
    /// none, restart, checkpoint or ft.
    #[arg(long)]
    class: String,
    #[command(flatten)]
    on: OnVm,
}

#[derive(Args)]
pub struct MigrateArgs {
    vm: VmId,
    /// The host.
    #[arg(long)]
    to: HostId,
    #[command(flatten)]
    on: OnVm,
}

#[derive(Args, Clone)]
pub struct OnVm {
    /// Only print the plan.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    folders: FolderArgs,
}

#[derive(Args)]
pub struct DrillArgs {
    vm: VmId,
    /// Drill it by itself from now on: a number with s, m, h or d, for example 1d; or `off`.
    #[arg(long, value_parser = every)]
    every: Option<Every>,
    /// Only show the last report.
    #[arg(long, conflicts_with = "every")]
    last: bool,
    #[command(flatten)]
    folders: FolderArgs,
}

/// How often; none: never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Every(Option<u64>);

fn every(text: &str) -> Result<Every, String> {
    if text == "off" {
        return Ok(Every(None));
    }
    let last = text.char_indices().last().map_or(0, |(at, _)| at);
    let (number, unit) = text.split_at(last);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err("give a number with s, m, h or d, for example 1d, or `off`".into()),
    };
    let number: u64 = number.parse().map_err(|_| format!("{number:?} is no number"))?;
    Ok(Every(Some(number.saturating_mul(seconds).saturating_mul(1000))))
}

/// A drill copies the VM's memory and waits for its service.
const DRILL_BOUND: Duration = Duration::from_secs(320);

/// Runs `steadfast drill VM`: the exit code is 0 only if the drill passed.
pub fn drill(args: &DrillArgs, json: bool) -> Outcome {
    let api = api(&args.folders, json)?;
    let path = format!("/v1/vms/{}/drill", args.vm);
    if let Some(Every(every_ms)) = args.every {
        let body = DrillSchedule { every_ms };
        return api.done(Method::POST, &format!("{path}/schedule"), false, Some(&body));
    }
    let report: Option<DrillReport> = if args.last {
        api.get(&path)?
    } else {
        let asked = ask(&api.target, Method::POST, &path, None::<&()>, DRILL_BOUND);
        Some(api.runtime.block_on(asked)?)
    };
    let Some(report) = report else {
        return Err(format!("VM {} was never drilled: steadfast drill {0}", args.vm).into());
    };
    api.print(&report, |r| {
        let checks: String = r.checks.iter().map(|c| format!("  {c}\n")).collect();
        format!("{r}\n{checks}")
    })?;
    Ok(match report.ok {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Runs `steadfast protect`.
pub fn protect(args: ProtectArgs, json: bool) -> Outcome {
    let body = NewClass { class: args.class };
    let path = format!("/v1/vms/{}/protection", args.vm);
    api(&args.on.folders, json)?.done(Method::POST, &path, args.on.dry_run, Some(&body))
}

/// Runs `steadfast migrate`.
pub fn migrate(args: MigrateArgs, json: bool) -> Outcome {
    let body = MoveTo { to: args.to };
    let path = format!("/v1/vms/{}/migrate", args.vm);
    api(&args.on.folders, json)?.done(Method::POST, &path, args.on.dry_run, Some(&body))
}

/// Settings of a new VM beside what it is made of.
#[derive(Args)]
pub struct CreateArgs {
    /// none, restart, checkpoint or ft.
    #[arg(long, default_value = "none")]
    class: String,
    /// Name of the shared storage that its disks are on, which all hosts reach under the same path.
    #[arg(long)]
    shared: Option<String>,
    /// Do not start it.
    #[arg(long)]
    off: bool,
    /// Higher is served first when room is short.
    #[arg(long, default_value_t = 100)]
    priority: u16,
    #[command(flatten)]
    on: OnVm,
}

/// Runs `steadfast vm create`.
pub fn create(machine: VmSpec, args: CreateArgs, json: bool) -> Outcome {
    let body = NewVm {
        machine,
        class: args.class,
        shared: args.shared,
        start: !args.off,
        priority: args.priority,
    };
    api(&args.on.folders, json)?.done(Method::POST, "/v1/vms", args.on.dry_run, Some(&body))
}

/// Runs `steadfast vm start`.
pub fn start(vm: &VmId, on: &OnVm, json: bool) -> Outcome {
    api(&on.folders, json)?.done(
        Method::POST,
        &format!("/v1/vms/{vm}/start"),
        on.dry_run,
        None::<&()>,
    )
}

/// Runs `steadfast vm delete`.
pub fn delete(vm: &VmId, on: &OnVm, json: bool) -> Outcome {
    api(&on.folders, json)?.done(Method::DELETE, &format!("/v1/vms/{vm}"), on.dry_run, None::<&()>)
}

/// Runs `steadfast vm list`.
pub fn list(folders: &FolderArgs, json: bool) -> Outcome {
    let api = api(folders, json)?;
    let vms: Vec<VmStatus> = api.get("/v1/vms")?;
    api.print(&vms, |v| show::vms(v))
}

/// Runs `steadfast vm show`.
pub fn show(vm: &VmId, folders: &FolderArgs, json: bool) -> Outcome {
    let api = api(folders, json)?;
    let shown: Shown = api.get(&format!("/v1/vms/{vm}"))?;
    api.print(&shown, |s| {
        let wanted = serde_json::to_string_pretty(&s.wanted).unwrap_or_default();
        format!("{}{wanted}\n", show::vms(std::slice::from_ref(&s.status)))
    })
}

/// Runs `steadfast vm console`: the end of what it has written.
pub fn console(vm: &VmId, folders: &FolderArgs, json: bool) -> Outcome {
    let api = api(folders, json)?;
    let console: Console = api.get(&format!("/v1/vms/{vm}/console"))?;
    api.print(&console, |c| c.text.clone())
}

/// Stops a VM of the pool; `None` when there is no daemon here, or its pool does not know the VM.
pub fn stop(vm: &VmId, now: bool, on: &OnVm, json: bool) -> Option<Outcome> {
    let folders = on.folders.folders().ok()?;
    folders.socket().exists().then_some(())?;
    let api = Api::new(&folders, json).ok()?;
    api.get::<serde_json::Value>(&format!("/v1/vms/{vm}")).ok()?;
    let path = format!("/v1/vms/{vm}/stop");
    Some(api.done(Method::POST, &path, on.dry_run, Some(&HowToStop { now })))
}

#[derive(Args)]
pub struct NodeArgs {
    /// Only say which binary this is, as JSON, and whether it could serve this host.
    #[arg(long, hide = true)]
    describe: bool,
    #[command(flatten)]
    folders: FolderArgs,
}

/// Runs `steadfast node`.
pub fn node(args: &NodeArgs) -> Outcome {
    let folders = args.folders.folders()?;
    if args.describe {
        println!("{}", serde_json::to_string(&binary::describe(&folders)?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let program = std::env::current_exe()?;
    // Before there are other threads, which inherit it.
    steadfast_node::take_precedence();
    resident::stay(resident::ESSENTIAL);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()?;
    let done = runtime.block_on(steadfast_node::run(folders, program.clone()));
    // A thread that waits for a VM's process must not hold the daemon.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match done? {
        Ended::Told => Ok(ExitCode::SUCCESS),
        Ended::Replaced => Err(binary::become_new(&program).into()),
    }
}

#[derive(Args)]
pub struct GuardArgs {
    /// The daemon's run folder.
    #[arg(long)]
    run: PathBuf,
    /// The host's watchdog device.
    #[arg(long, requires = "watchdog_seconds")]
    watchdog: Option<PathBuf>,
    /// From the guard's last sign of life to the reset.
    #[arg(long)]
    watchdog_seconds: Option<u32>,
}

/// Runs `steadfast guard`.
pub fn guard(args: GuardArgs) -> Outcome {
    let folders = Folders {
        data: PathBuf::new(),
        run: args.run,
    };
    resident::stay(resident::ESSENTIAL);
    let watchdog = args.watchdog.zip(args.watchdog_seconds);
    let watchdog = watchdog.map(|(device, seconds)| Choice { device, seconds });
    steadfast_node::run_guard(&folders, watchdog)?;
    Ok(ExitCode::SUCCESS)
}
