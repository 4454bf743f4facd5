//! Plans to print: what would be decided, step by step, if everything succeeded. For `--dry-run` of `host drain`, `protect`,
//! `pool upgrade` and the like: change the snapshot as the command would, then [`project`] it.

use crate::action::Decisions;
use crate::apply::{apply, settle};
use crate::decide::decide;
use crate::model::Snapshot;
use std::fmt;

/// A plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// One list of decisions after the other; each begins when all of the one before has succeeded. The last one has no
    /// actions, only what is refused in the end, unless the plan was cut off.
    pub steps: Vec<Decisions>,
    /// The plan has an end within the number of steps that was asked for.
    pub complete: bool,
    /// The pool as it would be.
    pub after: Snapshot,
}

/// Plays the decisions through, at most `steps_max` steps of a second each.
#[must_use]
pub fn project(snapshot: &Snapshot, steps_max: usize) -> Plan {
    let mut plan = Plan {
        after: snapshot.clone(),
        ..Plan::default()
    };
    let s = &mut plan.after;
    for _ in 0..steps_max {
        let d = decide(s);
        let before = d.actions.is_empty().then(|| s.clone());
        for x in &d.actions {
            apply(s, &x.action);
        }
        s.now_ms = s.now_ms.saturating_add(if before.is_none() { 1_000 } else { 0 });
        settle(s);
        match before {
            // Something was under way before: it has ended now.
            Some(b) if b != *s => {}
            Some(_) => {
                plan.steps.push(d);
                plan.complete = true;
                return plan;
            }
            None => plan.steps.push(d),
        }
    }
    plan
}

/// Numbered steps; what is refused in the end; nothing is said twice.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps = self.steps.iter().filter(|d| !d.actions.is_empty());
        let mut any = false;
        for (i, d) in steps.enumerate() {
            any = true;
            writeln!(f, "step {}", i + 1)?;
            for x in &d.actions {
                writeln!(f, "  {x}")?;
            }
        }
        if !any {
            writeln!(f, "nothing to do")?;
        }
        if let Some(last) = self.steps.last() {
            for r in &last.refusals {
                writeln!(f, "not possible: {r}")?;
            }
        }
        if !self.complete {
            writeln!(f, "... and further steps; the plan was cut off here")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DrainWhy, HostAdmin, Protection};
    use crate::synthetic::{add, pool, run, vm};

    #[test]
    fn a_drain_prints_its_steps_and_leaves_the_pool_alone() {
        let mut s = pool(3, 0).unwrap();
        add(&mut s, vm("db", Protection::Ft).unwrap());
        run(&mut s, 10, |_| {});
        assert_eq!(project(&s, 10).to_string(), "nothing to do\n");
        let host = s.vms.values().next().unwrap().state.owner.clone().unwrap();
        s.hosts.get_mut(&host).unwrap().record.admin = HostAdmin::Draining(DrainWhy::Operator);
        let plan = project(&s, 10);
        let text = plan.to_string();
        assert!(plan.complete && text.contains("step 1\n  "), "{text}");
        assert!(text.contains(&format!("move db from {host}")), "{text}");
        assert!(text.contains("Maintenance"), "{text}");
        assert!(!project(&s, 1).complete);
    }
}
