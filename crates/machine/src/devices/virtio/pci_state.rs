//! State of the transport: negotiation, queues, vectors, configuration space; and of the device behind it.

use super::pci::{Negotiation, STATUS_FEATURES_OK, VirtioPci};
use crate::devices::pci::config::ConfigState;
use crate::devices::pci::msix::MsixState;
use crate::devices::virtio::DeviceError;
use crate::state::{MachineState, StateError, StateKind, StateRecord};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

const STATE_VERSION: u16 = 1;

/// History: 1, the first.
#[derive(Serialize, Deserialize)]
struct TransportState {
    device_kind: u16,
    config: ConfigState,
    msix: MsixState,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    generation: u8,
    config_vector: u16,
    isr: u8,
    active: bool,
    queues: Vec<SavedQueue>,
}

#[derive(Serialize, Deserialize)]
struct SavedQueue {
    vector: u16,
    max_size: u16,
    size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl VirtioPci {
    /// Takes the state of transport and device. vCPUs stand still and the caller holds this device's lock.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn save(&mut self, out: &mut MachineState) -> Result<(), StateError> {
        let instance = u16::from(self.slot);
        let queues = (0u16..).zip(&self.queues).map(|(i, q)| {
            let s = q.state();
            SavedQueue {
                vector: self.vectors.queue_vector(i),
                max_size: s.max_size,
                size: s.size,
                next_avail: s.next_avail,
                next_used: s.next_used,
                event_idx: s.event_idx_enabled,
                ready: s.ready,
                desc_table: s.desc_table,
                avail_ring: s.avail_ring,
                used_ring: s.used_ring,
            }
        });
        let state = TransportState {
            device_kind: self.device.kind() as u16,
            config: self.config.save(),
            msix: self.vectors.msix().save(),
            status: self.n.status,
            device_feature_select: self.n.device_feature_select,
            driver_feature_select: self.n.driver_feature_select,
            driver_features: self.n.driver_features,
            queue_select: self.n.queue_select,
            generation: self.n.generation,
            config_vector: self.vectors.config_vector(),
            isr: self.vectors.isr(),
            active: self.active,
            queues: queues.collect(),
        };
        out.push(StateRecord::encode(
            StateKind::VirtioPci,
            instance,
            STATE_VERSION,
            &state,
        )?);
        out.push(self.device.save(instance)?);
        Ok(())
    }

    /// Kind of the record that the device behind this transport keeps.
    fn device_state_kind(&self) -> StateKind {
        use super::VirtioKind as K;
        match self.device.kind() {
            K::Net => StateKind::VirtioNet,
            K::Block => StateKind::VirtioBlock,
            K::Console => StateKind::VirtioConsole,
            K::Rng => StateKind::VirtioRng,
            K::Balloon => StateKind::VirtioBalloon,
            K::Vsock => StateKind::VirtioVsock,
        }
    }

    /// Gives transport and device their state back and starts the device if it was active. RAM is already in
    /// place. [`VirtioPci::kick`] follows when the whole machine is restored.
    ///
    /// # Errors
    /// [`StateError`]; the machine must not run then.
    pub fn restore(&mut self, from: &mut MachineState) -> Result<(), StateError> {
        let instance = u16::from(self.slot);
        let s: TransportState = from.take(StateKind::VirtioPci, instance)?.decode(STATE_VERSION)?;
        let record = from.take(self.device_state_kind(), instance)?;
        let refuse = |why: String| StateError::Refused(format!("device in PCI slot {instance}: {why}"));
        if s.device_kind != self.device.kind() as u16 {
            return Err(refuse(format!(
                "saved as virtio type {}, here it is {:?}",
                s.device_kind,
                self.device.kind()
            )));
        }
        if s.queues.len() != self.queues.len() {
            return Err(refuse(format!(
                "saved with {} queues, here it has {}",
                s.queues.len(),
                self.queues.len()
            )));
        }
        // Before FEATURES_OK the driver may have written anything; only what was agreed binds the device.
        if s.status & STATUS_FEATURES_OK != 0 && s.driver_features & !self.offered() != 0 {
            return Err(refuse(format!(
                "the guest uses features {:#x} that this device does not offer",
                s.driver_features & !self.offered()
            )));
        }
        self.config
            .restore(&s.config)
            .map_err(|at| refuse(format!("configuration space differs at {at:#x}")))?;
        for (i, (q, saved)) in (0u16..).zip(self.queues.iter_mut().zip(&s.queues)) {
            if saved.max_size != q.max_size() {
                return Err(refuse(format!(
                    "queue {i} had at most {} entries, here {}",
                    saved.max_size,
                    q.max_size()
                )));
            }
            *q = Queue::try_from(QueueState {
                max_size: saved.max_size,
                next_avail: saved.next_avail,
                next_used: saved.next_used,
                event_idx_enabled: saved.event_idx,
                size: saved.size,
                ready: saved.ready,
                desc_table: saved.desc_table,
                avail_ring: saved.avail_ring,
                used_ring: saved.used_ring,
            })
            .map_err(|e| refuse(format!("queue {i}: {e}")))?;
            self.vectors.set_queue_vector(i, saved.vector);
        }
        self.vectors.set_config_vector(s.config_vector);
        self.vectors.set_isr(s.isr);
        if !self.vectors.msix().restore(s.msix) {
            return Err(refuse("another number of interrupt vectors".into()));
        }
        self.n = Negotiation {
            status: s.status,
            device_feature_select: s.device_feature_select,
            driver_feature_select: s.driver_feature_select,
            driver_features: s.driver_features,
            queue_select: s.queue_select,
            generation: s.generation,
        };
        self.device.restore(&record)?;
        if s.active {
            match self.start() {
                Ok(()) => {}
                // What a guest did to its own rings must not keep its VM from being restored: it is told, as if it
                // had gone on where it was.
                Err(error @ DeviceError::Driver { .. }) if self.active => self.needs_reset(&error),
                Err(error) => return Err(refuse(error.to_string())),
            }
        }
        Ok(())
    }
}
