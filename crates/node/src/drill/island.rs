//! Where a copy of a VM runs: cut off from everything, but so that its own health checks can be made.
//!
//! ```text
//! network namespace:   NIC's TAP -- bridge of the same name -- an address in the guest's network, from which checks are made
//! ```
//! Nothing connects it to the host's networks: the copy has the addresses of the VM that it is of. A VM without a NIC on a bridge
//! needs no namespace; checks over the network are not made then.

use crate::error::{NodeError, Result, refused};
use crate::health::check::{self, Inside};
use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use steadfast_cluster::model::Check;
use steadfast_types::VmId;
use steadfast_vmm::spec::{NicTarget, VmSpec};

/// Between two tries of a check.
const AGAIN: Duration = Duration::from_millis(500);
/// One try.
const TRY: Duration = Duration::from_secs(5);

/// See the module. Its namespace goes with it.
pub(super) struct Island {
    /// None: no NIC needs one.
    namespace: Option<String>,
}

fn ip(arguments: &str) -> Result<()> {
    let out = Command::new("ip").args(arguments.split(' ')).output();
    let out = out.map_err(|e| {
        NodeError::Refused(format!(
            "`ip` cannot be run ({e}); a drill needs it: install iproute2"
        ))
    })?;
    match out.status.success() {
        true => Ok(()),
        false => refused(format!(
            "ip {arguments}: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        )),
    }
}

/// Where a check goes, if that is an address.
fn address(check: &Check) -> Option<IpAddr> {
    let host = match check {
        Check::Tcp { to } => to.rsplit_once(':')?.0.to_owned(),
        Check::Http { url } => url.parse::<hyper::Uri>().ok()?.host()?.to_owned(),
        _ => return None,
    };
    host.trim_matches(['[', ']']).parse().ok()
}

/// An address for the checker in the network of a guest: the last of its /24 that is not the guest's own.
fn neighbour(of: Ipv4Addr) -> Ipv4Addr {
    let [a, b, c, d] = of.octets();
    Ipv4Addr::new(a, b, c, if d == 254 { 253 } else { 254 })
}

impl Island {
    fn name(vm: &str) -> String {
        format!("drill-{vm}")
    }

    /// Removes one that was left.
    pub(super) fn sweep(vm: &str) {
        // There is none in most cases, and no `ip` in some.
        let _ = ip(&format!("netns del {}", Self::name(vm)));
    }

    /// Makes it for a VM with these checks.
    pub(super) fn make(vm: &VmId, spec: &VmSpec, checks: &[Check]) -> Result<Self> {
        let bridges: BTreeSet<&str> = spec
            .nics
            .iter()
            .filter_map(|n| match &n.to {
                NicTarget::Bridge(name) => Some(name.as_str()),
                _ => None,
            })
            .collect();
        let taps = spec.nics.iter().any(|n| matches!(n.to, NicTarget::Tap(_)));
        if bridges.is_empty() && !taps {
            return Ok(Self { namespace: None });
        }
        let name = Self::name(vm.as_str());
        ip(&format!("netns add {name}"))?;
        let island = Self {
            namespace: Some(name.clone()),
        };
        ip(&format!("-n {name} link set lo up"))?;
        for bridge in &bridges {
            ip(&format!("-n {name} link add {bridge} type bridge"))?;
            ip(&format!("-n {name} link set {bridge} up"))?;
        }
        // All on the first: which NIC a check is for is not known, and there is one in nearly all cases.
        if let Some(bridge) = bridges.iter().next() {
            let guests = checks.iter().filter_map(address).filter_map(|a| match a {
                IpAddr::V4(a) => Some(neighbour(a)),
                IpAddr::V6(_) => None,
            });
            for own in guests.collect::<BTreeSet<_>>() {
                ip(&format!("-n {name} addr add {own}/24 dev {bridge}"))?;
            }
        }
        Ok(island)
    }

    /// The program, run there.
    pub(super) fn command(&self, program: &Path) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(program);
                command
            }
        }
    }

    /// Makes a check from there until it passes. `Some`: why it cannot be made.
    ///
    /// # Errors
    /// It does not pass within `bound`; what it said last.
    pub(super) fn check(
        &self,
        check: &Check,
        bound: Duration,
    ) -> std::result::Result<Option<String>, String> {
        let Some(name) = &self.namespace else {
            return Ok(Some("the VM has no NIC on a bridge".into()));
        };
        match address(check) {
            Some(IpAddr::V4(_)) => {}
            Some(IpAddr::V6(_)) => return Ok(Some("checks by IPv6 are not made in a drill".into())),
            None => return Ok(Some("it names no address".into())),
        }
        let path = format!("/run/netns/{name}");
        // A thread of its own: it never comes back from there.
        let work = move || {
            let there = File::open(&path).map_err(|e| format!("{path}: {e}"))?;
            let kind = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(there.as_fd(), kind)
                .map_err(|e| format!("enter {path}: {e}"))?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| e.to_string())?;
            runtime.block_on(until_it_passes(check, Inside::default(), bound))
        };
        let done = std::thread::scope(|scope| scope.spawn(work).join());
        match done {
            Ok(done) => done.map(|()| None),
            Err(_) => Err("the check ended badly".into()),
        }
    }
}

/// Makes a check again and again.
///
/// # Errors
/// It did not pass within `bound`; what it said last.
pub(super) async fn until_it_passes(
    check: &Check,
    inside: Inside<'_>,
    bound: Duration,
) -> std::result::Result<(), String> {
    let until = Instant::now() + bound;
    loop {
        let said = match tokio::time::timeout(TRY, check::make(check, inside)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => why,
            Err(_) => format!("no answer within {} s", TRY.as_secs()),
        };
        if Instant::now() > until {
            return Err(said);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

impl Drop for Island {
    fn drop(&mut self) {
        if let Some(name) = &self.namespace
            && let Err(error) = ip(&format!("netns del {name}"))
        {
            tracing::warn!(%error, "a drill's network namespace stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_made_from_the_guests_network() {
        let tcp = |to: &str| address(&Check::Tcp { to: to.into() });
        let http = |url: &str| address(&Check::Http { url: url.into() });
        assert_eq!(tcp("10.1.2.3:80"), Some(Ipv4Addr::new(10, 1, 2, 3).into()));
        assert_eq!(http("http://10.1.2.3/x"), Some(Ipv4Addr::new(10, 1, 2, 3).into()));
        assert!(http("http://[fd00::1]:8080/").is_some_and(|a| a.is_ipv6()));
        assert_eq!(tcp("db.example:5432"), None);
        assert_eq!(
            neighbour(Ipv4Addr::new(10, 1, 2, 3)),
            Ipv4Addr::new(10, 1, 2, 254)
        );
        assert_eq!(
            neighbour(Ipv4Addr::new(10, 1, 2, 254)),
            Ipv4Addr::new(10, 1, 2, 253)
        );
    }
}
