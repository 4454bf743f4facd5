//! Where the pool's store should be led from: not from a host whose death would make others ask the store.
//!
//! When the host dies whose etcd member leads, the store takes nothing until the others have elected one of them: one to two election
//! timeouts. A takeover waits for the store's grant, and a restart for its host's lease to be seen ending. So the lead goes to the host
//! with the fewest VMs that somebody would have to take over: a witness, or a host that runs none. Each daemon looks after its own
//! member: only the leader can give the lead away, and when it has died there is nothing to decide.

use crate::config::StoreChoice;
use crate::error::Result;
use crate::etcd::{self, Cluster};
use crate::node::Node;
use crate::pool::{Pool, PoolVm};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use steadfast_cluster::model::{HostAdmin, HostHealth, Power, Protection};
use steadfast_types::HostId;

/// A host that is not better by more than so many VMs is not worth a move.
const SLACK: usize = 1;

/// A host with a vote in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seat {
    host: HostId,
    /// VMs that others would take over, or start again, if it died.
    burden: usize,
    witness: bool,
    /// Not drained, and not in maintenance.
    in_use: bool,
    /// Up, and not short of CPU, memory or disk.
    well: bool,
}

impl Seat {
    fn of(pool: &Pool, host: HostId) -> Option<Self> {
        let info = pool.hosts.get(&host)?;
        let counts = |vm: &&PoolVm| {
            let record = &vm.stored.record;
            vm.owner() == Some(&host) && record.power == Power::On && record.protection != Protection::None
        };
        let starved = pool.reports.get(&host).is_some_and(|r| r.status.starved);
        Some(Self {
            burden: pool.vms.values().filter(counts).count(),
            witness: info.record.witness,
            in_use: info.record.admin == HostAdmin::InUse,
            well: info.record.health == HostHealth::Up && !starved,
            host,
        })
    }
}

/// Whose member should lead instead of mine, which does.
fn better<'s>(mine: &Seat, others: &'s [Seat]) -> Option<&'s HostId> {
    let fit = others.iter().filter(|s| s.in_use && s.well);
    let best = fit.min_by_key(|s| (s.burden, !s.witness, &s.host))?;
    let worth = mine.burden > best.burden && (best.burden == 0 || mine.burden > best.burden + SLACK);
    (worth || !mine.in_use).then_some(&best.host)
}

/// Notes what this host's member is in the cluster; gives the lead away if this host's member has it and another should.
///
/// # Errors
/// The store does not answer, or refuses.
pub async fn look(node: &Arc<Node>, cluster: &Cluster) -> Result<()> {
    let config = node.config();
    let leader = cluster.members.iter().find(|m| m.id == cluster.leader);
    let leads = leader.is_some_and(|m| m.name == config.host.as_str());
    node.leads_store.store(leads, Ordering::Relaxed);
    let own = cluster.members.iter().find(|m| m.name == config.host.as_str());
    node.store_vote
        .store(own.is_some_and(|m| !m.learner), Ordering::Relaxed);
    if !leads || !matches!(config.store, StoreChoice::Managed { member: true, .. }) {
        return Ok(());
    }
    let pool = node.blocking(Node::load_pool).await?.pool;
    let voters = cluster.members.iter().filter(|m| !m.learner);
    let seats = voters.filter_map(|m| Seat::of(&pool, HostId::new(m.name.as_str()).ok()?));
    let (mine, others): (Vec<Seat>, Vec<Seat>) = seats.partition(|s| s.host == config.host);
    let Some(best) = mine.first().and_then(|mine| better(mine, &others)) else {
        return Ok(());
    };
    let Some(to) = cluster.members.iter().find(|m| m.name == best.as_str()) else {
        return Ok(());
    };
    let (spec, own) = (
        config.store_spec(&node.folders),
        config.url(config.ports.etcd_client),
    );
    etcd::give_lead(&spec, &own, to).await?;
    node.leads_store.store(false, Ordering::Relaxed);
    tracing::info!(
        to = to.name,
        "the store is led from another host from now on: its death would cost less"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(host: &str, burden: usize) -> Seat {
        Seat {
            host: HostId::new(host).unwrap(),
            burden,
            witness: host == "w",
            in_use: true,
            well: true,
        }
    }

    #[test]
    fn the_lead_goes_where_a_death_costs_least() {
        let to = |mine: &Seat, others: &[Seat]| better(mine, others).map(ToString::to_string);
        let (two, none) = (seat("a", 2), seat("a", 0));
        assert_eq!(to(&two, &[seat("b", 0), seat("w", 0)]).as_deref(), Some("w"));
        assert_eq!(to(&two, &[seat("b", 1)]), None, "not worth it");
        assert_eq!(to(&two, &[seat("b", 0)]).as_deref(), Some("b"));
        assert_eq!(
            to(&seat("a", 4), &[seat("c", 1), seat("b", 1)]).as_deref(),
            Some("b")
        );
        assert_eq!(
            to(&none, &[seat("b", 0), seat("w", 0)]),
            None,
            "nothing is gained"
        );
        assert_eq!(to(&two, &[]), None);
        let (mut sick, mut away) = (seat("b", 0), seat("c", 0));
        (sick.well, away.in_use) = (false, false);
        assert_eq!(to(&two, &[sick.clone(), away.clone()]), None);
        let leaving = Seat {
            in_use: false,
            ..none
        };
        assert_eq!(to(&leaving, &[sick, away, seat("d", 7)]).as_deref(), Some("d"));
    }
}
