//! What hosts report of their paths, in as few lines as it takes: one for the cable or the switch that they all mean.

use crate::pool::Pool;
use std::collections::{BTreeMap, BTreeSet};
use steadfast_cluster::model::HostHealth;
use steadfast_types::HostId;

type Pairs = BTreeSet<(HostId, HostId)>;

/// For each host that a line is about: which replication path is silent, and to whom. Hosts that are not up are silent on all paths, which
/// others tell; one of an older version answers nobody.
#[must_use]
pub fn told(pool: &Pool) -> Vec<(HostId, String)> {
    let knows = |host: &HostId| {
        let up = pool
            .hosts
            .get(host)
            .is_some_and(|info| info.record.health == HostHealth::Up);
        up && pool.reports.get(host).is_some_and(|r| r.lost_paths.is_some())
    };
    let mut lost: BTreeMap<u8, Pairs> = BTreeMap::new();
    for (host, report) in pool.reports.iter().filter(|(host, _)| knows(host)) {
        for path in report.lost_paths.iter().flatten().filter(|p| knows(&p.to)) {
            let pair = match *host < path.to {
                true => (host.clone(), path.to.clone()),
                false => (path.to.clone(), host.clone()),
            };
            lost.entry(path.path).or_default().insert(pair);
        }
    }
    let on_path = |path: u8| {
        let has = |host: &&HostId| {
            pool.hosts
                .get(*host)
                .is_some_and(|i| i.replication.len() > usize::from(path))
        };
        pool.reports.keys().filter(|h| knows(h)).filter(has).count()
    };
    lost.into_iter()
        .flat_map(|(path, pairs)| lines(path, pairs, on_path(path)))
        .collect()
}

fn lines(path: u8, mut pairs: Pairs, hosts: usize) -> Vec<(HostId, String)> {
    let mut lines = Vec::new();
    let number = u32::from(path) + 1;
    if pairs.len() == hosts * hosts.saturating_sub(1) / 2
        && hosts > 2
        && let Some((first, _)) = pairs.first()
    {
        let text = format!("replication path {number} is down between all hosts: is its switch?");
        return vec![(first.clone(), text)];
    }
    // The host that most are about comes first: its cable explains them all.
    loop {
        let mut count: BTreeMap<&HostId, usize> = BTreeMap::new();
        for (one, two) in &pairs {
            *count.entry(one).or_default() += 1;
            *count.entry(two).or_default() += 1;
        }
        let most = count.into_iter().max_by(|(h, n), (i, m)| n.cmp(m).then(i.cmp(h)));
        let Some(host) = most.map(|(host, _)| host.clone()) else {
            return lines;
        };
        let mut to = Vec::new();
        pairs.retain(|(one, two)| {
            if *one == host || *two == host {
                to.push(if *one == host { two } else { one }.to_string());
                return false;
            }
            true
        });
        let text = format!("replication path {number} is down from here to {}", to.join(", "));
        lines.push((host, text));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostId {
        HostId::new(name).unwrap()
    }

    fn said(pairs: &[(&str, &str)], hosts: usize) -> Vec<String> {
        let pairs = pairs.iter().map(|(a, b)| (host(a), host(b))).collect();
        let lines = lines(1, pairs, hosts);
        lines
            .into_iter()
            .map(|(h, text)| format!("{h}: {text}"))
            .collect()
    }

    #[test]
    fn a_cable_and_a_switch_are_one_line_each() {
        assert_eq!(
            said(&[("a", "c"), ("b", "c"), ("c", "d")], 4),
            ["c: replication path 2 is down from here to a, b, d"]
        );
        assert_eq!(
            said(&[("a", "b"), ("a", "c"), ("b", "c")], 3),
            ["a: replication path 2 is down between all hosts: is its switch?"]
        );
        assert_eq!(
            said(&[("a", "b"), ("c", "d")], 4),
            [
                "a: replication path 2 is down from here to b",
                "c: replication path 2 is down from here to d"
            ]
        );
        assert_eq!(
            said(&[("a", "b")], 2),
            ["a: replication path 2 is down from here to b"]
        );
        assert!(said(&[], 0).is_empty());
    }

    #[test]
    fn only_hosts_that_are_up_and_know_of_paths_are_believed() {
        let mut pool = crate::pool::testing::two_hosts(1, 1);
        let (a, b) = (host("a"), host("b"));
        for (n, info) in (1_u8..).zip(pool.hosts.values_mut()) {
            info.record.health = HostHealth::Up;
            info.replication = vec![[10, 0, 0, n].into()];
        }
        let lost = crate::paths::LostPath {
            to: b.clone(),
            path: 0,
            address: [10, 0, 0, 2].into(),
        };
        pool.reports.get_mut(&a).unwrap().lost_paths = Some(vec![lost]);
        assert!(told(&pool).is_empty(), "b is of an older version");
        pool.reports.get_mut(&b).unwrap().lost_paths = Some(Vec::new());
        assert_eq!(told(&pool).len(), 1);
        pool.hosts.get_mut(&b).unwrap().record.health = HostHealth::Suspect;
        assert!(told(&pool).is_empty(), "it is silent on all paths");
    }
}
