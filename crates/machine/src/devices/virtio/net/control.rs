//! The control queue's commands (virtio 1.2, 5.1.6.5).
//!
//! Filters are accepted and remembered, but not applied: the specification calls filtering best-effort, and the
//! bridge in front of the device has done it already.

use serde::{Deserialize, Serialize};

/// Longest command; MAC tables are the longest.
pub(super) const COMMAND_MAX: u32 = 4096;

/// What the driver wants to receive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Filter {
    /// One bit per command of the receive-mode class.
    modes: u8,
    /// Addresses in the unicast and multicast tables.
    unicast: u16,
    multicast: u16,
}

/// A change of the filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Mode { bit: u8, on: bool },
    Table { unicast: u16, multicast: u16 },
}

impl Filter {
    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Mode { bit, on: true } => self.modes |= 1 << bit,
            Change::Mode { bit, on: false } => self.modes &= !(1 << bit),
            Change::Table { unicast, multicast } => (self.unicast, self.multicast) = (unicast, multicast),
        }
    }
}

/// A valid command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Filter(Change),
    SetMac([u8; 6]),
    Announced,
}

/// Reads class, command and data; `None` for what is not valid.
pub(super) fn parse(bytes: &[u8]) -> Option<Command> {
    let (class, rest) = bytes.split_first()?;
    let (command, data) = rest.split_first()?;
    match (class, command, data) {
        (0, bit @ 0..=5, [on @ (0 | 1)]) => Some(Command::Filter(Change::Mode {
            bit: *bit,
            on: *on == 1,
        })),
        (1, 0, tables) => {
            let (unicast, rest) = table(tables)?;
            let (multicast, rest) = table(rest)?;
            rest.is_empty()
                .then_some(Command::Filter(Change::Table { unicast, multicast }))
        }
        (1, 1, mac) => Some(Command::SetMac(mac.try_into().ok()?)),
        (3, 0, []) => Some(Command::Announced),
        _ => None,
    }
}

fn table(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let (count, rest) = bytes.split_first_chunk::<4>()?;
    let count = u16::try_from(u32::from_le_bytes(*count)).ok()?;
    Some((count, rest.get(usize::from(count) * 6..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_understood_or_refused() {
        let on = Change::Mode { bit: 0, on: true };
        assert_eq!(parse(&[0, 0, 1]), Some(Command::Filter(on)));
        assert_eq!(
            parse(&[1, 1, 2, 0, 0, 0, 0, 9]),
            Some(Command::SetMac([2, 0, 0, 0, 0, 9]))
        );
        assert_eq!(parse(&[3, 0]), Some(Command::Announced));
        let tables = [&[1, 0, 1, 0, 0, 0][..], &[7; 6], &[2, 0, 0, 0], &[7; 12]].concat();
        let change = Change::Table {
            unicast: 1,
            multicast: 2,
        };
        assert_eq!(parse(&tables), Some(Command::Filter(change)));
        for bad in [
            &[0, 0][..],
            &[0, 6, 1],
            &[0, 0, 2],
            &[1, 0, 255, 255, 255, 255],
            &[1, 1, 2],
            &[9, 9],
            &[3, 0, 0],
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        assert_eq!(parse(&tables[..tables.len() - 1]), None);
    }
}
