//! What hosts report of their paths, in as few lines as it takes: one for the cable or the switch that they all mean.

use crate::pool::Pool;
use std::collections::{BTreeMap, BTreeSet};
use steadfast_cluster::model::HostHealth;
use steadfast_types::HostId;

/// Pairs of hosts, the smaller name first, for each path.
pub type Pairs = BTreeMap<u8, BTreeSet<(HostId, HostId)>>;

/// Whether what a host says of its paths counts, and what is said of it: it is up, and not of an older version that answers nobody. Who is not
/// up is silent on all paths, which is told otherwise.
pub fn counts(pool: &Pool, host: &HostId) -> bool {
    let info = pool.hosts.get(host);
    info.is_some_and(|i| i.record.health == HostHealth::Up)
        && pool.reports.get(host).is_some_and(|r| r.lost_paths.is_some())
}

/// Which hosts do not hear each other on which path.
#[must_use]
pub fn lost(pool: &Pool) -> Pairs {
    let mut lost = Pairs::new();
    for (host, report) in pool.reports.iter().filter(|(host, _)| counts(pool, host)) {
        for path in report.lost_paths.iter().flatten().filter(|p| counts(pool, &p.to)) {
            let pair = match *host < path.to {
                true => (host.clone(), path.to.clone()),
                false => (path.to.clone(), host.clone()),
            };
            lost.entry(path.path).or_default().insert(pair);
        }
    }
    lost
}

/// In words, each about a host; `what` happened to the paths.
#[must_use]
pub fn told(pool: &Pool, pairs: &Pairs, what: &str) -> Vec<(HostId, String)> {
    let on_path = |path: u8| {
        let has = |host: &&HostId| {
            pool.hosts
                .get(*host)
                .is_some_and(|i| i.replication.len() > usize::from(path))
        };
        let known = pool.reports.keys().filter(|host| counts(pool, host));
        known.filter(has).count()
    };
    let lines = |(path, pairs): (&u8, &BTreeSet<_>)| lines(*path, pairs.clone(), on_path(*path), what);
    pairs.iter().flat_map(lines).collect()
}

fn lines(path: u8, mut pairs: BTreeSet<(HostId, HostId)>, hosts: usize, what: &str) -> Vec<(HostId, String)> {
    let mut lines = Vec::new();
    let number = u32::from(path) + 1;
    if pairs.len() == hosts * hosts.saturating_sub(1) / 2
        && hosts > 2
        && let Some((first, _)) = pairs.first()
    {
        let text = format!("replication path {number} {what} between all hosts");
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
        let text = format!("replication path {number} {what} from here to {}", to.join(", "));
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
        let lines = lines(1, pairs, hosts, "is down");
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
            ["a: replication path 2 is down between all hosts"]
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
        let silent = crate::paths::LostPath {
            to: b.clone(),
            path: 0,
            address: [10, 0, 0, 2].into(),
        };
        pool.reports.get_mut(&a).unwrap().lost_paths = Some(vec![silent]);
        assert!(lost(&pool).is_empty(), "b is of an older version");
        pool.reports.get_mut(&b).unwrap().lost_paths = Some(Vec::new());
        let one = lost(&pool);
        assert_eq!(one[&0], BTreeSet::from([(a.clone(), b.clone())]));
        assert_eq!(told(&pool, &one, "is down").len(), 1);
        pool.hosts.get_mut(&b).unwrap().record.health = HostHealth::Suspect;
        assert!(lost(&pool).is_empty(), "it is silent on all paths");
    }
}
