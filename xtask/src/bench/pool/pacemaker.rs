//! Their side: corosync and Pacemaker of Debian on three simulated servers, one VM as a resource.

use super::{BOUND, MEMORY_MIB, kill, servers, until_answer};
use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use steadfast_rig::{Rig, Server};

const PACKAGES: [&str; 4] = ["corosync", "pacemaker", "pacemaker-cli-utils", "qemu-system-x86"];
const START_BOUND: Duration = Duration::from_secs(90);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 90, 0, 123);
const AGENT: &str = "/usr/lib/ocf/resource.d/rig/guest";

/// What packages that are unpacked but not configured lack.
const PREPARE: &str = "set -e
grep -q haclient /etc/group || echo 'haclient:x:910:' >> /etc/group
grep -q hacluster /etc/passwd || echo 'hacluster:x:910:910::/var/lib/pacemaker:/usr/sbin/nologin' >> /etc/passwd
mkdir -p /dev/shm /var/lib/corosync /var/log/corosync /run/corosync /usr/lib/ocf/resource.d/rig
mountpoint -q /dev/shm || mount -t tmpfs tmpfs /dev/shm
for d in /var/lib/pacemaker /var/lib/pacemaker/cib /var/lib/pacemaker/pengine /var/lib/pacemaker/blackbox \\
         /var/lib/pacemaker/cores /var/log/pacemaker /run/crm; do
  mkdir -p $d; chown hacluster:haclient $d; chmod 750 $d
done";

/// Seconds from kill to answer.
pub fn measure(rounds: usize) -> Result<Vec<f64>> {
    let rig = servers(Rig::builder().packages(&PACKAGES))?;
    let measured = rounds_of(&rig, rounds);
    if measured.is_err() {
        for server in rig.servers().iter().filter(|s| s.is_ready()) {
            let said = server.shell(
                "crm_mon -1 2>&1; tail -n 20 /run/corosync.log /run/pacemaker.log /run/corosync.out /run/pacemaker.out",
                BOUND,
            );
            eprintln!(
                "--- {}\n{}",
                server.name(),
                said.map_or_else(|e| e.to_string(), |o| o.text())
            );
        }
    }
    rig.end();
    measured
}

fn rounds_of(rig: &Rig, rounds: usize) -> Result<Vec<f64>> {
    // No quorum before two of them are there.
    for server in rig.servers() {
        start_corosync(rig, server)?;
    }
    for server in rig.servers() {
        start_pacemaker(server)?;
    }
    let first = rig.server(0);
    first.wait_for(
        "crm_node -q | grep -qx 1 && crm_mon -1 | grep -q 'Online:.* s1 s2 s3 '",
        BOUND,
    )?;
    // Without fencing nothing is started anywhere unless it is said to be meant so.
    first.exec("crm_attribute -t crm_config -n stonith-enabled -v false && crm_attribute -t rsc_defaults -n resource-stickiness -v 100")?;
    first.put_bytes(RESOURCE.as_bytes(), "/run/resource.xml", 0o644)?;
    first.exec("cibadmin -o resources -C -x /run/resource.xml")?;
    let mut found = Vec::new();
    for round in 0..rounds {
        until_answer(rig.client()?, ADDRESS, Instant::now())?;
        let on = host_of(rig)?;
        let server = rig.server_named(&on)?;
        let took = kill(rig, server, ADDRESS)?;
        eprintln!(
            "round {} of {rounds}: Pacemaker, from {on} to {}: {took:.2} s",
            round + 1,
            host_of(rig)?
        );
        found.push(took);
        server.start()?;
        start_corosync(rig, server)?;
        start_pacemaker(server)?;
        server.wait_for("crm_mon -1 | grep -q 'Online:.* s1 s2 s3 '", START_BOUND)?;
    }
    Ok(found)
}

fn host_of(rig: &Rig) -> Result<String> {
    let on = rig
        .servers()
        .iter()
        .find(|s| s.is_ready())
        .context("no server is on")?;
    let said = on.exec("crm_resource --resource guest --locate --quiet")?;
    match said.trim() {
        "" => bail!("Pacemaker runs the guest nowhere"),
        host => Ok(host.to_string()),
    }
}

fn start_corosync(rig: &Rig, server: &Server) -> Result<()> {
    server.exec(PREPARE)?;
    server.put_bytes(agent().as_bytes(), AGENT, 0o755)?;
    server.put_bytes(
        corosync_conf(rig)?.as_bytes(),
        "/etc/corosync/corosync.conf",
        0o644,
    )?;
    server.spawn("corosync -f", "/run/corosync.out")?;
    Ok(())
}

fn start_pacemaker(server: &Server) -> Result<()> {
    server.wait_for("corosync-quorumtool -s", START_BOUND)?;
    let start = "env PCMK_logfile=/run/pacemaker.log PCMK_logfacility=none pacemakerd -f";
    server.spawn(start, "/run/pacemaker.out")?;
    server.wait_for("crm_mon -1", START_BOUND)?;
    Ok(())
}

fn corosync_conf(rig: &Rig) -> Result<String> {
    let mut text = "totem {\n version: 2\n cluster_name: rig\n transport: knet\n crypto_cipher: none\n crypto_hash: none\n}\n\
        quorum {\n provider: corosync_votequorum\n}\n\
        logging {\n to_logfile: yes\n logfile: /run/corosync.log\n to_syslog: no\n timestamp: on\n}\nnodelist {\n"
        .to_string();
    for (i, server) in rig.servers().iter().enumerate() {
        let address = |nic| {
            server
                .address(nic)
                .with_context(|| format!("{} has no {nic}", server.name()))
        };
        text.push_str(&format!(
            " node {{\n  name: {}\n  nodeid: {}\n  ring0_addr: {}\n  ring1_addr: {}\n }}\n",
            server.name(),
            i + 1,
            address("repl0")?,
            address("repl1")?
        ));
    }
    text.push_str("}\n");
    Ok(text)
}

const RESOURCE: &str = "<primitive id=\"guest\" class=\"ocf\" provider=\"rig\" type=\"guest\"><operations>\
    <op id=\"guest-start\" name=\"start\" interval=\"0\" timeout=\"120s\"/>\
    <op id=\"guest-stop\" name=\"stop\" interval=\"0\" timeout=\"60s\"/>\
    <op id=\"guest-monitor\" name=\"monitor\" interval=\"10s\" timeout=\"60s\"/></operations></primitive>";

/// A resource agent that runs QEMU.
fn agent() -> String {
    format!(
        "#!/bin/bash
pid=/run/guest.pid
runs() {{ [ -s $pid ] && kill -0 $(cat $pid) 2>/dev/null; }}
case $1 in
start)
  runs && exit 0
  ip link del guest0 2>/dev/null
  ip tuntap add guest0 mode tap vnet_hdr && ip link set guest0 master br0 up || exit 1
  qemu-system-x86_64 -M q35,accel=kvm -cpu host -m {MEMORY_MIB} -smp 1 -nodefaults -no-user-config -display none \\
    -serial file:/run/guest.console -kernel /guests/mini/bzImage -initrd /guests/mini/initrd \\
    -append \"$(cat /guests/mini/cmdline) mini.ip={ADDRESS}/24 mini.tick_ms=0 mini.clock_ms=200\" \\
    -netdev tap,id=n0,ifname=guest0,script=no,downscript=no -device virtio-net-pci,netdev=n0,mac=52:54:00:00:00:97,romfile= \\
    -daemonize -pidfile $pid </dev/null >/run/guest.log 2>&1 || exit 1
  exit 0 ;;
stop)
  runs || exit 0
  kill -9 $(cat $pid); while runs; do sleep 0.05; done
  exit 0 ;;
monitor) runs && exit 0; exit 7 ;;
meta-data)
  cat <<XML
<?xml version=\"1.0\"?>
<resource-agent name=\"guest\"><version>1.0</version><longdesc lang=\"en\">A VM</longdesc><shortdesc lang=\"en\">A VM</shortdesc>
<parameters/><actions><action name=\"start\" timeout=\"120s\"/><action name=\"stop\" timeout=\"60s\"/>
<action name=\"monitor\" timeout=\"60s\" interval=\"10s\"/><action name=\"meta-data\" timeout=\"5s\"/></actions></resource-agent>
XML
  exit 0 ;;
*) exit 3 ;;
esac
"
    )
}
