//! etcd on the simulated servers: one member a server, its data on the data disk, so that a restarted server rejoins.

use crate::error::{Result, RigError};
use crate::host::server::Server;
use std::time::{Duration, Instant};

/// How long a cluster may take to answer after its start.
pub const READY_BOUND: Duration = Duration::from_secs(180);

fn address(server: &Server) -> Result<&str> {
    server
        .address("repl0")
        .ok_or_else(|| RigError::Unknown(format!("server {} has no NIC repl0", server.name())))
}

/// The endpoints of a cluster, as etcd clients take them: `http://10.91.0.11:2379,...`.
pub fn endpoints(members: &[Server]) -> Result<String> {
    let all: Result<Vec<String>> = members
        .iter()
        .map(|server| Ok(format!("http://{}:2379", address(server)?)))
        .collect();
    Ok(all?.join(","))
}

/// Starts the member of one server in the background: first start or rejoin, as its data disk says. `members` is the same for
/// all of them. Its log is `/data/etcd.log`.
///
/// Timeouts are wide (heartbeat 0.5 s, election 5 s): software emulation is slow, and elections are not what is tested.
pub fn start_member(server: &Server, members: &[Server]) -> Result<u32> {
    let own = address(server)?;
    let peers: Result<Vec<String>> = members
        .iter()
        .map(|member| Ok(format!("{}=http://{}:2380", member.name(), address(member)?)))
        .collect();
    let command = format!(
        "etcd --name {} --data-dir /data/etcd --heartbeat-interval 500 --election-timeout 5000 \
         --listen-peer-urls http://{own}:2380 --initial-advertise-peer-urls http://{own}:2380 \
         --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://{own}:2379 \
         --initial-cluster-token rig --initial-cluster {} --logger zap --log-level warn",
        server.name(),
        peers?.join(",")
    );
    server.exec("mkdir -p -m 700 /data/etcd")?;
    server.spawn(&command, "/data/etcd.log")
}

/// Starts a cluster on these servers and waits until it takes writes.
///
/// # Errors
/// [`RigError::Timeout`] with what `etcdctl` said last.
pub fn start(members: &[Server]) -> Result<()> {
    for server in members {
        start_member(server, members)?;
    }
    for server in members {
        wait_ready(server, READY_BOUND)?;
    }
    Ok(())
}

/// Waits until the cluster, asked through this server's member, answers a linearizable read.
///
/// # Errors
/// [`RigError::Timeout`], at once when the member is gone, with the end of its log and the room on its disk.
pub fn wait_ready(server: &Server, bound: Duration) -> Result<()> {
    const HEALTH: &str =
        "ETCDCTL_API=3 etcdctl --endpoints http://127.0.0.1:2379 --command-timeout=20s endpoint health 2>&1";
    let start = Instant::now();
    loop {
        let health = server.shell(HEALTH, Duration::from_secs(25))?;
        if health.success() {
            return Ok(());
        }
        let runs = server.shell("pgrep -x etcd", Duration::from_secs(20))?.success();
        if runs && start.elapsed() < bound {
            std::thread::sleep(Duration::from_millis(200));
            continue;
        }
        let more = "tail -n 8 /data/etcd.log | cut -c1-400; df -h /data | tail -n 1";
        let log = server.shell(more, Duration::from_secs(20))?.text();
        return Err(RigError::Timeout {
            what: format!(
                "etcd on {}, which {},",
                server.name(),
                if runs { "runs" } else { "has ended" }
            ),
            after_ms: start.elapsed().as_millis() as u64,
            detail: format!("; it last said: {}\n{log}", health.text()),
        });
    }
}

/// Makes this server's member the leader, and waits until it is.
///
/// # Errors
/// [`RigError::CommandFailed`] with what `etcdctl` said, [`RigError::Unknown`] when no member says that it leads.
pub fn move_leader(members: &[Server], to: &Server) -> Result<()> {
    const CTL: &str = "ETCDCTL_API=3 etcdctl --command-timeout=20s --dial-timeout=5s";
    // One line for each member that answers: endpoint, id, version, size, leader?, ...
    let status = |server: &Server| -> Result<(String, bool)> {
        let line = server.exec(&format!(
            "{CTL} --endpoints http://127.0.0.1:2379 endpoint status"
        ))?;
        let fields: Vec<&str> = line.split(", ").collect();
        match fields[..] {
            [_, id, _, _, leads, ..] => Ok((id.to_string(), leads == "true")),
            _ => Err(RigError::malformed("etcdctl endpoint status", line)),
        }
    };
    let (id, leads) = status(to)?;
    if leads {
        return Ok(());
    }
    for member in members.iter().filter(|m| m.is_ready() && m.name() != to.name()) {
        if status(member)?.1 {
            member.exec(&format!(
                "{CTL} --endpoints http://127.0.0.1:2379 move-leader {id}"
            ))?;
            return Ok(());
        }
    }
    Err(RigError::Unknown(
        "no member of etcd says that it leads".to_string(),
    ))
}
