//! Alarms: the set that holds now, against the set that is up.

use super::world::World;
use crate::action::{Action, Because};
use crate::model::{AlarmKey, HostHealth};

/// Raises what is new and clears what is over.
pub(crate) fn update(w: &mut World) {
    let mut texts = Vec::new();
    for h in 0..w.hosts.len() {
        let (id, status) = (w.host_id(h), &w.hosts[h].host.status);
        if let HostHealth::Dead { .. } = w.health(h) {
            texts.push((AlarmKey::HostDead(id.clone()), "it answers nobody".to_owned()));
        }
        if let Some(p) = &status.prediction {
            let text = format!("{:?}: {}", p.part, p.evidence);
            texts.push((AlarmKey::HostPredictsFailure(id.clone()), text));
        }
        if status.starved {
            let text = "it is short of CPU, memory or I/O".to_owned();
            texts.push((AlarmKey::HostStarved(id), text));
        }
    }
    for vm in w.vms.iter().filter(|vm| vm.vm.state.service_failed) {
        let text = "its service fails its checks; see its events".to_owned();
        texts.push((AlarmKey::ServiceFailed(vm.id().clone()), text));
    }
    if let Err(because) = room(w) {
        texts.push((AlarmKey::NoFailoverRoom, because.to_string()));
    }
    let mut wanted = std::mem::take(&mut w.alarms_wanted);
    wanted.extend(texts.iter().map(|(k, _)| k.clone()));
    for alarm in wanted.difference(&w.alarms).cloned().collect::<Vec<_>>() {
        let text = texts.iter().find(|(k, _)| *k == alarm).map(|(_, t)| t.clone());
        let why = text.unwrap_or_else(|| refusal_text(w, &alarm));
        w.act(Action::RaiseAlarm { alarm }, why);
    }
    for alarm in w.alarms.difference(&wanted).cloned().collect::<Vec<_>>() {
        w.act(Action::ClearAlarm { alarm }, "it is over".into());
    }
}

fn room(w: &World) -> Result<(), Because> {
    let usable: Vec<usize> = (0..w.hosts.len()).filter(|&h| w.hosts[h].usable()).collect();
    w.absorbs(&usable)
}

/// The reason that the refusals give.
fn refusal_text(w: &World, alarm: &AlarmKey) -> String {
    let found = w.out.refusals.iter().find(|r| match alarm {
        AlarmKey::VmDown(vm) | AlarmKey::VmDegraded(vm) | AlarmKey::VmNotApart(vm) => {
            r.vm.as_ref() == Some(vm)
        }
        AlarmKey::DrainStuck(h) => r.host.as_ref() == Some(h),
        AlarmKey::UpgradeWaits => r.wanted == crate::action::Wanted::Upgrade,
        _ => false,
    });
    let none = match alarm {
        AlarmKey::DrainStuck(_) => "it is not empty after a long time; see the events of what is left on it",
        _ => "it is being seen to",
    };
    found.map_or_else(|| none.to_owned(), |r| r.because.to_string())
}
