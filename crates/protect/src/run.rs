//! The process of a protected VM, on any of its hosts.

use crate::config::{COPY_RATE_MIN, ProtectSpec, TakeOver};
use crate::disks::{Disks, SLOTS};
use crate::engine::{Engine, Holds, Parts};
use crate::input::{Input, Inputs};
use crate::life::Remains;
use crate::shared::SharedDisks;
use crate::store::RecordStore;
use crate::taking::{TakeControl, still_wanted};
use std::fs::File;
use std::sync::mpsc::{channel, sync_channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use steadfast_disk::image::BlockIo;
use steadfast_machine::devices::legacy::OutputSink;
use steadfast_net::{Hold, HoldBackend, HoldMode};
use steadfast_types::HostId;
use steadfast_vmm::control::{self, Answers, Bound, Call};
use steadfast_vmm::process::{Ended, Options, ProcessError};
use steadfast_vmm::spec::VmSpec;
use steadfast_vmm::{AssembleError, Surroundings, assemble, assemble_from};

/// Answers to requests are waited for so long at the end.
const ANSWER_BOUND: Duration = Duration::from_secs(5);
/// The store is asked again for so long at the start, and after so long each time.
const STORE_BOUND: Duration = Duration::from_secs(30);
const STORE_AGAIN: Duration = Duration::from_millis(500);
/// Bytes of frames that wait for their epoch, per NIC, before the guest is held back.
const HELD_BYTES_MAX: usize = 32 << 20;

/// Runs this host's instance of a protected VM until it ends.
///
/// # Errors
/// [`ProcessError`].
pub fn run(spec: VmSpec, protect: ProtectSpec, options: Options) -> Result<Ended, ProcessError> {
    let setting = |text: String| ProcessError::Assemble(AssembleError::Setting(text));
    if let Some(disk) = protect
        .mirrored_disks(&spec)
        .map(|(_, d)| d)
        .find(|_| !protect.hold_outputs)
    {
        return Err(setting(format!(
            "disk {} is writable and outputs are not held: a flush that the guest reports could be lost; hold outputs, \
             or make the disk read-only (,ro)",
            disk.path.display()
        )));
    }
    if !protect.memory && protect.mirrored_disks(&spec).next().is_none() {
        return Err(setting(
            "only disks are to be mirrored, and the VM has none that is writable: mirror all of it (memory)"
                .into(),
        ));
    }
    if protect.peers.len() > SLOTS && protect.mirrored_disks(&spec).next().is_some() {
        return Err(setting(format!(
            "a VM with writable disks has at most {SLOTS} other hosts; name fewer peers"
        )));
    }
    if (1..COPY_RATE_MIN).contains(&protect.copy_bytes_per_s) {
        return Err(setting(format!(
            "a copy cannot be slower than {COPY_RATE_MIN} bytes a second (0: as fast as the link)"
        )));
    }
    if let Some(from) = &protect.takes_over {
        still_wanted(from).map_err(setting)?;
    }
    let store =
        RecordStore::open(&protect.store, spec.name.clone()).map_err(|e| setting(format!("store: {e}")))?;
    if protect.start {
        first_record(&store, &protect.host).map_err(|e| setting(format!("store: {e}")))?;
    }
    let (queue, incoming) = channel();
    let inputs = Inputs::new(queue);
    let disks = Disks::open(&spec, &protect, &inputs).map_err(setting)?;
    let blocks = disks.blocks();
    let shared = SharedDisks::open(&spec, &protect, &inputs).map_err(setting)?;
    let shared_blocks = shared.blocks();
    let taken = protect.takes_over.as_ref();
    let at_first = taken.map(|t| t.control.as_path()).or(options.control.as_deref());
    let bound = at_first.map(Bound::new).transpose();
    let bound = bound.map_err(ProcessError::Control)?.map(Arc::new);
    let take_control = match (&bound, &options.control) {
        (Some(bound), Some(name)) if taken.is_some() => {
            let (bound, name) = (Arc::clone(bound), name.clone());
            Some(Box::new(move || bound.rename(&name)) as TakeControl)
        }
        _ => None,
    };
    let answers = bound
        .as_ref()
        .map(|bound| serve_control(bound, &inputs))
        .transpose();
    let answers = answers.map_err(ProcessError::Control)?;
    let holds = Holds::default();
    let memory = taken.map(|t| memory_of_another(t, spec.memory_bytes)).transpose();
    let memory = memory.map_err(setting)?;
    let (name, ram_bytes, in_memory) = (spec.name.clone(), spec.memory_bytes, protect.memory);
    let make_vm = {
        let (holds, inputs) = (Arc::clone(&holds), inputs.clone());
        move |before: Option<&Remains>| {
            let (holds, outputs) = (Arc::clone(&holds), inputs.clone());
            let (blocks, shared) = (blocks.clone(), shared_blocks.clone());
            let again =
                |e: std::io::Error| AssembleError::Setting(format!("memory that is there already: {e}"));
            let memory = match before {
                None => memory.as_ref(),
                Some(remains) => remains.memory(),
            };
            let around = Surroundings {
                events: Arc::new(inputs.clone()),
                serial: (options.serial)() as Box<dyn OutputSink>,
                debugcon: (options.debugcon)(),
                hooks: options.hooks.clone(),
                wrap_net: Some(Arc::new(move |index, backend| {
                    // After a reset the queue stays, with the frames that wait in it.
                    let mut holds = holds.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(hold) = holds.get(index) {
                        return Box::new(HoldBackend(Arc::clone(hold)));
                    }
                    let outputs = outputs.clone();
                    // Silent until the protocol says that this instance may speak.
                    let wake = Box::new(move || outputs.send(Input::Output));
                    let hold = Hold::new(backend, HoldMode::Mute, HELD_BYTES_MAX, wake);
                    holds.push(Arc::clone(&hold));
                    Box::new(HoldBackend(hold))
                })),
                give_disk: Some(Arc::new(move |index| {
                    let blocks = blocks.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(block) = blocks.get(&index) {
                        return Some(Arc::clone(block) as Arc<dyn BlockIo>);
                    }
                    let shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    shared.get(&index).map(|b| Arc::clone(b) as Arc<dyn BlockIo>)
                })),
                give_ram: memory.map(File::try_clone).transpose().map_err(again)?,
            };
            let vm = match before {
                None => assemble(&spec, around)?,
                Some(r) => assemble_from(r.spec.clone(), Arc::clone(&r.resources), around)?,
            };
            (options.on_serial)(&vm.serial);
            // First touch is dear; a standby must not pay for it when it takes over.
            if before.is_none() && memory.is_none() && in_memory {
                vm.machine.ram().prefault();
            }
            Ok(vm)
        }
    };
    let mut engine = Engine::new(Parts {
        name,
        spec: protect,
        make_vm: Box::new(make_vm),
        holds,
        disks,
        shared,
        ram_bytes,
        store: Box::new(store),
        inputs,
        reset_panicked: options.reset_panicked,
        take_control,
    })?;
    let ended = engine.run(&incoming);
    engine.disks.close();
    let rests = engine.shared.close();
    if engine.abandoned || !rests || engine.disks.hung() {
        // Its threads would be waited for; whoever called this ends the process.
        std::mem::forget(engine);
    } else {
        engine.disks.settle();
    }
    if let Some(bound) = bound {
        bound.leave();
    }
    // Who asked something that nobody took is told that the VM ends; and nobody's answer is lost with the process.
    drop(incoming);
    if let Some(owed) = answers.map(|a| a.settle(ANSWER_BOUND)).filter(|owed| *owed > 0) {
        tracing::warn!(owed, "requests without an answer");
    }
    ended
}

/// The memory of a VM that another process leaves to this one.
fn memory_of_another(from: &TakeOver, bytes: u64) -> Result<File, String> {
    let named = |e: std::io::Error| format!("memory {}: {e}", from.memory.display());
    let file = File::options()
        .read(true)
        .write(true)
        .open(&from.memory)
        .map_err(named)?;
    let there = file.metadata().map_err(named)?.len();
    match there == bytes {
        true => Ok(file),
        false => Err(format!(
            "memory {} has {there} bytes, the VM {bytes}",
            from.memory.display()
        )),
    }
}

/// Makes the VM's record where there is none. A store that does not answer now may do so in a moment: the hosts of a pool
/// start together, and so do its VMs.
fn first_record(store: &RecordStore, host: &HostId) -> std::io::Result<()> {
    let until = Instant::now() + STORE_BOUND;
    loop {
        match store.create(host) {
            Err(error) if Instant::now() < until => {
                tracing::warn!(%error, "the store does not answer; asking again");
                std::thread::sleep(STORE_AGAIN);
            }
            done => return done,
        }
    }
}

fn serve_control(bound: &Bound, inputs: &Inputs) -> std::io::Result<Answers> {
    let (calls, incoming) = sync_channel::<Call>(4);
    let answers = control::serve(bound.try_clone()?, calls)?;
    let inputs = inputs.clone();
    std::thread::Builder::new()
        .name("control-queue".into())
        .spawn(move || {
            incoming
                .into_iter()
                .for_each(|call| inputs.send(Input::Control(call)))
        })?;
    Ok(answers)
}
