//! How much a host must keep free so that it can take over what others would leave to it when they fail.
//!
//! For each host `h` that may fail, [`Reserve`] knows what this host would be asked for: the promotion of standbys, the boot of
//! replicas. Since at most `n` hosts fail at once, the reserve is the sum of the `n` largest demands, part by part. So several
//! hosts share one reserve, and an exact check for one failure costs no more than a lookup.

use crate::model::Resources;
use std::collections::BTreeMap;

/// See the module.
#[derive(Debug)]
pub(crate) struct Reserve {
    failures: u8,
    by_failed: BTreeMap<usize, Resources>,
    sum: Resources,
}

impl Reserve {
    pub fn new(failures: u8) -> Self {
        Self {
            failures,
            by_failed: BTreeMap::new(),
            sum: Resources::ZERO,
        }
    }

    pub fn add(&mut self, failed: usize, r: Resources) {
        let e = self.by_failed.entry(failed).or_default();
        *e = e.plus(r);
        self.sum = self.top(None);
    }

    pub fn remove(&mut self, failed: usize, r: Resources) {
        if let Some(e) = self.by_failed.get_mut(&failed) {
            *e = e.minus(r);
            if e.is_zero() {
                self.by_failed.remove(&failed);
            }
        }
        self.sum = self.top(None);
    }

    /// What must be kept free.
    pub fn sum(&self) -> Resources {
        self.sum
    }

    /// What would have to be kept free if the failure of `failed` asked for `r` more.
    pub fn sum_with(&self, failed: usize, r: Resources) -> Resources {
        if self.failures == 0 || r.is_zero() {
            self.sum
        } else {
            self.top(Some((failed, r)))
        }
    }

    /// What would have to be kept free if the failure of `failed` asked for `r` less.
    pub fn sum_without(&self, failed: usize, r: Resources) -> Resources {
        let mut other = Self {
            failures: self.failures,
            by_failed: self.by_failed.clone(),
            sum: self.sum,
        };
        other.remove(failed, r);
        other.sum
    }

    /// What the failure of `failed` asks for.
    pub fn of(&self, failed: usize) -> Resources {
        self.by_failed.get(&failed).copied().unwrap_or_default()
    }

    /// The failure that asks for most of the part in which `short` is largest.
    pub fn worst(&self, short: Resources) -> Option<usize> {
        let key = |r: &Resources| {
            if short.memory_bytes > 0 {
                r.memory_bytes
            } else if short.cpu_milli > 0 {
                r.cpu_milli
            } else {
                r.disk_bytes
            }
        };
        self.by_failed.iter().max_by_key(|(_, r)| key(r)).map(|(h, _)| *h)
    }

    fn top(&self, extra: Option<(usize, Resources)>) -> Resources {
        let n = usize::from(self.failures);
        let part = |get: fn(&Resources) -> u64| -> u64 {
            let with = |h: usize, r: &Resources| match extra {
                Some((e, more)) if e == h => get(r).saturating_add(get(&more)),
                _ => get(r),
            };
            let new = extra
                .filter(|(e, _)| !self.by_failed.contains_key(e))
                .map(|(_, r)| get(&r));
            let values = self.by_failed.iter().map(|(h, r)| with(*h, r)).chain(new);
            if n == 1 {
                return values.max().unwrap_or(0);
            }
            let mut all: Vec<u64> = values.collect();
            all.sort_unstable_by(|a, b| b.cmp(a));
            all.iter().take(n).fold(0, |s, v| s.saturating_add(*v))
        };
        Resources {
            cpu_milli: part(|r| r.cpu_milli),
            memory_bytes: part(|r| r.memory_bytes),
            disk_bytes: part(|r| r.disk_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_do_not_fail_together_share_one_reserve() {
        let gib = |n| Resources::new(1, n << 10, 0);
        let mut r = Reserve::new(1);
        r.add(1, gib(4));
        r.add(2, gib(3));
        r.add(2, gib(2));
        assert_eq!(r.sum(), Resources::new(2, 5 << 10, 0));
        assert_eq!(r.sum_with(1, gib(4)).memory_bytes, 8 << 30);
        assert_eq!(r.sum_with(9, gib(1)).memory_bytes, 5 << 30);
        r.remove(2, gib(3));
        assert_eq!(r.sum().memory_bytes, 4 << 30);
        let mut two = Reserve::new(2);
        for h in 0..5 {
            two.add(h, gib(h as u64));
        }
        assert_eq!(two.sum().memory_bytes, 7 << 30);
        let mut none = Reserve::new(0);
        none.add(1, gib(4));
        assert!(none.sum().is_zero() && none.sum_with(1, gib(4)).is_zero());
        assert_eq!(none.of(1), gib(4));
    }
}
