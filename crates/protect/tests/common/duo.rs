//! Two hosts, one guest, and a client that counts: what it was told is never lost and never done twice.

use super::switch::{self, Switch};
use super::{Instance, Site, wait};
use pulse::client::Client;
use pulse::kind;
use std::time::Duration;

/// Bound of every wait.
pub const LONG: Duration = Duration::from_secs(25);

/// See the module.
pub struct Duo {
    /// Where they meet.
    pub site: Site,
    /// Host `a`, host `b`.
    pub hosts: [Instance; 2],
    client: Client<Switch>,
    last: u64,
}

impl Duo {
    /// Starts both, `a` with `die_at[0]`, `b` with `die_at[1]`; waits until the VM is protected, or one has died.
    pub fn new(mut site: Site, die_at: [Option<String>; 2]) -> Self {
        let client = switch::client(site.path().join("client"), vec![site.nic("a"), site.nic("b")]);
        let [for_a, for_b] = die_at;
        site.die_at = for_a;
        let a = site.spawn("a", true);
        site.die_at = for_b;
        let b = site.spawn("b", false);
        let mut duo = Self {
            site,
            hosts: [a, b],
            client,
            last: 0,
        };
        wait("protected", LONG, || {
            let ready = match duo.site.shared {
                Some(_) => duo.hosts[0].could_move(),
                None => duo.hosts[0].role() == (true, true),
            };
            ready || duo.hosts.iter_mut().any(|h| !h.runs())
        });
        duo
    }

    /// Starts both, where `b` is not expected to become a standby.
    pub fn apart(mut site: Site) -> Self {
        let client = switch::client(site.path().join("client"), vec![site.nic("a"), site.nic("b")]);
        let hosts = [site.spawn("a", true), site.spawn("b", false)];
        Self {
            site,
            hosts,
            client,
            last: 0,
        }
    }

    /// The guest was started anew: it counts from the beginning.
    pub fn restarted(&mut self) {
        wait("a guest that counts from the beginning", LONG, || {
            self.client
                .ask(pulse::kind::INC, LONG)
                .is_ok_and(|r| r.counter <= self.last)
        });
        self.last = 0;
        let r = self.client.ask(pulse::kind::INC, LONG).unwrap();
        self.last = r.counter;
    }

    fn ask(&mut self) -> pulse::Reply {
        let kind = if self.site.disk {
            kind::FLUSH_INC
        } else {
            kind::INC
        };
        let r = self.client.ask(kind, LONG).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!((r.errors, r.status), (0, 0), "the guest's own checks: {r:?}");
        if self.site.disk {
            assert_eq!(r.disk_counter, r.counter, "disk and memory: {r:?}");
        }
        r
    }

    /// Asks for one more and does not wait for the answer.
    pub fn poke(&mut self) {
        self.client.tell(kind::FLUSH_INC).unwrap();
    }

    /// Adds one to the guest's counter, in memory and, if it has one, on disk: the answer is one more than the last.
    pub fn one(&mut self) {
        let r = self.ask();
        assert_eq!(
            r.counter,
            self.last + 1,
            "nothing lost, nothing done twice: {r:?}"
        );
        self.last = r.counter;
    }

    /// As [`Duo::one`], of a guest that was, or may have been, powered on again from its disk: what was done and never answered may be there.
    pub fn one_after_boot(&mut self) {
        let r = self.ask();
        let more = r.counter.checked_sub(self.last);
        assert!(
            matches!(more, Some(1 | 2)),
            "{} was answered; now {r:?}",
            self.last
        );
        self.last = r.counter;
    }

    /// Which host runs the VM, and whether it is protected there.
    pub fn owner(&self) -> Option<(usize, bool)> {
        (0..2).find_map(|h| match self.hosts[h].role() {
            (true, protected) => Some((h, protected)),
            _ => None,
        })
    }

    /// Waits until the VM runs on one of the two and is protected by the other.
    pub fn protected(&self) {
        wait("protected again", LONG, || self.owner().is_some_and(|(_, p)| p));
    }

    /// Waits until the VM runs on one of the two and could be handed to the other.
    pub fn could_move(&self) {
        wait("could move again", LONG, || {
            self.hosts.iter().any(Instance::could_move)
        });
    }

    /// Starts a host's instance again, after its end.
    pub fn again(&mut self, host: usize, start: bool) {
        let _ = self.hosts[host].ended(LONG);
        let name = self.hosts[host].host;
        self.hosts[host] = self.site.spawn(name, start);
    }

    /// No instance that runs found a page that differs from its epoch.
    pub fn no_stale_page(&self) {
        for host in &self.hosts {
            if let Some(status) = host.status() {
                assert_eq!(status["audit_stale_pages"], 0, "{status:#}");
            }
        }
    }
}

impl Drop for Duo {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.site.logs());
            for host in &self.hosts {
                eprintln!("--- {}: {:#}", host.host, host.status().unwrap_or_default());
            }
        }
    }
}
