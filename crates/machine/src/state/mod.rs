//! The state of a machine: typed, versioned records, and the rules that keep them honest.
//!
//! Each part of the machine (vCPU, irqchip, clock, every device) is one [`StateRecord`]: its kind, its instance,
//! the version of its payload, and the payload. A machine restores from a [`MachineState`] only if every part
//! finds exactly its record and no record is left over: unknown, missing, surplus or half-read state is an error.
//!
//! Payloads are postcard. A version number changes whenever a payload's meaning does; the reader of version N
//! keeps reading N-1 (the history stands beside each codec), and refuses what is newer.

mod file;
mod pending;

pub use file::{SAVE_FORMAT, SaveError, SaveReader, SaveWriter};
pub use pending::PendingFile;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt;

/// What a record belongs to. The numbers are part of the format: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u16)]
#[allow(missing_docs)]
pub enum StateKind {
    Vcpu = 1,
    Irqchip = 2,
    Pit = 3,
    Clock = 4,
    Serial = 16,
    I8042 = 17,
    PvPanic = 18,
    AcpiPower = 19,
    Rtc = 20,
    Watchdog = 21,
    PciRoot = 32,
    VirtioPci = 33,
    VirtioBlock = 48,
    VirtioNet = 49,
    VirtioConsole = 50,
    VirtioRng = 51,
    VirtioVsock = 52,
    VirtioBalloon = 53,
}

/// State of one part of the machine.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateRecord {
    /// Which kind of part.
    pub kind: StateKind,
    /// Which one of that kind: vCPU index, or PCI device number.
    pub instance: u16,
    /// Version of the payload's layout.
    pub version: u16,
    /// The payload, postcard.
    pub payload: Vec<u8>,
}

impl fmt::Debug for StateRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}#{} v{} ({} bytes)",
            self.kind,
            self.instance,
            self.version,
            self.payload.len()
        )
    }
}

/// State that cannot be taken or given back.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A payload that does not parse, or has bytes left over.
    #[error("state of {kind:?}#{instance} (version {version}) is damaged: {why}")]
    Payload {
        /// Kind of the record.
        kind: StateKind,
        /// Instance of the record.
        instance: u16,
        /// Version of the record.
        version: u16,
        /// What is wrong.
        why: String,
    },
    /// A version this build cannot read.
    #[error(
        "state of {kind:?}#{instance} has version {found}, this build reads up to {known}; \
             restore it with the Steadfast version that saved it, or a newer one"
    )]
    Version {
        /// Kind of the record.
        kind: StateKind,
        /// Instance of the record.
        instance: u16,
        /// Version found.
        found: u16,
        /// Newest version known.
        known: u16,
    },
    /// The machine has a part for which no state came.
    #[error("no state for {0:?}#{1}: the saved machine has other devices than this one")]
    Missing(StateKind, u16),
    /// State came for a part that the machine does not have.
    #[error("state for {0:?}#{1} belongs to no device of this machine")]
    Surplus(StateKind, u16),
    /// Two records for one part.
    #[error("two states for {0:?}#{1}")]
    Twice(StateKind, u16),
    /// KVM or the kernel refused.
    #[error("{what}: {source}")]
    Kvm {
        /// Which call.
        what: String,
        /// What KVM said.
        source: std::io::Error,
    },
    /// The part itself refused the state.
    #[error("{0}")]
    Refused(String),
}

impl StateError {
    /// Wraps what a KVM call said.
    pub fn kvm(what: impl Into<String>) -> impl FnOnce(vmm_sys_util::errno::Error) -> Self {
        let what = what.into();
        move |e| Self::Kvm {
            what,
            source: e.into(),
        }
    }
}

impl StateRecord {
    /// Encodes a payload.
    ///
    /// # Errors
    /// [`StateError::Payload`] if the value cannot be encoded (a map or sequence of unknown length).
    pub fn encode<T: Serialize>(
        kind: StateKind,
        instance: u16,
        version: u16,
        value: &T,
    ) -> Result<Self, StateError> {
        match postcard::to_stdvec(value) {
            Ok(payload) => Ok(Self {
                kind,
                instance,
                version,
                payload,
            }),
            Err(e) => Err(StateError::Payload {
                kind,
                instance,
                version,
                why: e.to_string(),
            }),
        }
    }

    /// Decodes a payload of version `known`; every byte must be read.
    ///
    /// # Errors
    /// [`StateError::Version`] or [`StateError::Payload`].
    pub fn decode<T: DeserializeOwned>(&self, known: u16) -> Result<T, StateError> {
        if self.version != known {
            return Err(StateError::Version {
                kind: self.kind,
                instance: self.instance,
                found: self.version,
                known,
            });
        }
        let damaged = |why: String| StateError::Payload {
            kind: self.kind,
            instance: self.instance,
            version: self.version,
            why,
        };
        let (value, rest) = postcard::take_from_bytes(&self.payload).map_err(|e| damaged(e.to_string()))?;
        if rest.is_empty() {
            Ok(value)
        } else {
            Err(damaged(format!("{} bytes left over", rest.len())))
        }
    }
}

/// All records of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    records: Vec<StateRecord>,
}

impl MachineState {
    /// Adds a record.
    pub fn push(&mut self, record: StateRecord) {
        self.records.push(record);
    }

    /// Adds all records of another state.
    pub fn append(&mut self, mut other: Self) {
        self.records.append(&mut other.records);
    }

    /// The records, in the order in which they were saved.
    #[must_use]
    pub fn records(&self) -> &[StateRecord] {
        &self.records
    }

    /// Payload bytes of all records.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.records.iter().map(|r| r.payload.len()).sum()
    }

    /// Takes the one record of a part out.
    ///
    /// # Errors
    /// [`StateError::Missing`] or [`StateError::Twice`].
    pub fn take(&mut self, kind: StateKind, instance: u16) -> Result<StateRecord, StateError> {
        let mut found = None;
        let mut i = 0;
        while i < self.records.len() {
            if self.records[i].kind == kind && self.records[i].instance == instance {
                if found.is_some() {
                    return Err(StateError::Twice(kind, instance));
                }
                found = Some(self.records.remove(i));
            } else {
                i += 1;
            }
        }
        found.ok_or(StateError::Missing(kind, instance))
    }

    /// Ends a restore: nothing may be left.
    ///
    /// # Errors
    /// [`StateError::Surplus`] names the first record that nobody took.
    pub fn finish(self) -> Result<(), StateError> {
        match self.records.first() {
            Some(r) => Err(StateError::Surplus(r.kind, r.instance)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_taken_once_and_none_may_be_left() {
        let mut s = MachineState::default();
        s.push(StateRecord::encode(StateKind::Pit, 0, 1, &7u32).unwrap());
        s.push(StateRecord::encode(StateKind::Vcpu, 1, 1, &8u32).unwrap());
        assert!(matches!(
            s.take(StateKind::Vcpu, 0),
            Err(StateError::Missing(StateKind::Vcpu, 0))
        ));
        assert_eq!(s.take(StateKind::Vcpu, 1).unwrap().decode::<u32>(1).unwrap(), 8);
        assert!(matches!(
            s.clone().finish(),
            Err(StateError::Surplus(StateKind::Pit, 0))
        ));
        s.push(StateRecord::encode(StateKind::Pit, 0, 1, &7u32).unwrap());
        assert!(matches!(s.take(StateKind::Pit, 0), Err(StateError::Twice(..))));
    }

    #[test]
    fn damaged_payloads_are_refused() {
        let mut r = StateRecord::encode(StateKind::Pit, 0, 1, &(7u32, 8u64)).unwrap();
        assert!(matches!(
            r.decode::<(u32, u64)>(2),
            Err(StateError::Version {
                found: 1,
                known: 2,
                ..
            })
        ));
        r.payload.push(0);
        assert!(matches!(
            r.decode::<(u32, u64)>(1),
            Err(StateError::Payload { .. })
        ));
        r.payload.truncate(1);
        assert!(matches!(
            r.decode::<(u32, u64)>(1),
            Err(StateError::Payload { .. })
        ));
    }
}
