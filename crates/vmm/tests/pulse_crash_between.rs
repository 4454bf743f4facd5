//! A crash between save and restore, at any instant, and a save that cannot be done: the source goes on, and its peer
//! notices nothing but time.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::peer::Peer;
use common::{LONG, World, busy, came, can_run, wait_for};
use std::fs;
use std::time::Duration;
use steadfast_vmm::control::{Request, Then};

const SOURCE: &str = "source";
const TARGET: &str = "target";

/// Two xorshift words are random enough to spread kills over a restore.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn stands_still(world: &World) -> bool {
    world.ask(SOURCE, &Request::Status).unwrap()["state"] == "paused"
}

#[test]
fn pulse_crash_between() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let _source = world.boot(SOURCE, &busy(), 2);
    let peer = Peer::start(&world);
    peer.fresh();
    let mut seed = 0x5eed_0001u64;
    let mut reached = 0;
    for round in 0..16u32 {
        let before = peer.latest();
        world.save(SOURCE, "vm.save", Then::Pause).unwrap();
        assert!(stands_still(&world));
        let saved = world.check_save("vm.save");
        saved
            .summary
            .covers(&before)
            .unwrap_or_else(|e| panic!("round {round}: {e}"));
        // Killed from before it has read a byte to after it is ready to run. It is never let go: one owner.
        let mut target = world.begin_restore(TARGET, "vm.save", true);
        if round % 4 == 3 {
            world.reachable(TARGET, &mut target);
            reached += 1;
        } else {
            std::thread::sleep(Duration::from_micros(random(&mut seed) % 40_000));
        }
        target.kill();
        let again = world.check_save("vm.save");
        assert_eq!(
            again.summary, saved.summary,
            "round {round}: a restore that was never let go wrote to the disk"
        );
        world.ask(SOURCE, &Request::Resume).unwrap();
        let after = peer.fresh();
        assert!(after.counter > saved.summary.counter, "round {round}");
    }
    assert_eq!(reached, 4);
    // All the way at last: the restored VM goes on, and the source cannot any more.
    world.save(SOURCE, "vm.save", Then::Pause).unwrap();
    let _target = world.restore(TARGET, "vm.save");
    peer.fresh();
    let refused = world.ask(SOURCE, &Request::Resume).unwrap_err().to_string();
    assert!(refused.contains("disk.raw"), "{refused}");
    assert!(stands_still(&world));
    peer.fresh();
    world.ask(SOURCE, &Request::Stop).unwrap();
    peer.finish();
    world.console_lines();
    world.serial_is_clean();
}

#[test]
fn pulse_damaged_save_is_refused() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let _source = world.boot(SOURCE, &busy(), 2);
    let peer = Peer::start(&world);
    peer.fresh();
    world.save(SOURCE, "vm.save", Then::Pause).unwrap();
    let whole = fs::read(world.at("vm.save")).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    let mut header = whole.clone();
    header[40] ^= 4;
    let mut version = whole.clone();
    version[8] = 99;
    let cases: [(&str, &[u8], &str); 7] = [
        ("cut in the middle", &whole[..whole.len() / 2], "ends early"),
        ("cut by one byte", &whole[..whole.len() - 1], "ends early"),
        ("a bit of memory", &flipped, "is damaged"),
        ("a bit of state", &header, "checksum of its header"),
        ("another version", &version, "save format 99"),
        ("empty", &[], "is not a saved machine"),
        ("another file", pulse::elf(), "is not a saved machine"),
    ];
    for (what, bytes, why) in cases {
        fs::write(world.at("bad.save"), bytes).unwrap();
        let mut target = world.begin_restore(TARGET, "bad.save", false);
        let status = target.wait();
        let said = fs::read_to_string(world.at("target.log")).unwrap();
        assert_eq!(status.code(), Some(1), "{what}: {said}");
        assert!(said.contains("bad.save") && said.contains(why), "{what}: {said}");
        fs::remove_file(world.at("target.log")).unwrap();
        world.ask(SOURCE, &Request::Resume).unwrap();
        peer.fresh();
        world.save(SOURCE, "vm.save", Then::Pause).unwrap();
    }
    world.ask(SOURCE, &Request::Resume).unwrap();
    peer.finish();
    world.console_lines();
    world.serial_is_clean();
}

#[test]
fn pulse_save_without_room() {
    if !can_run() {
        return;
    }
    let world = World::of_one_user();
    // The limits are beyond all that the guest writes to its disk, and below the memory that it has filled.
    let source = world.boot(SOURCE, &busy().dirty(1024), 2);
    let peer = Peer::start(&world);
    peer.fresh();
    let files = || fs::read_dir(world.path()).unwrap().count();
    let before = files();
    for limit in [3 << 20, 4 << 20, 8 << 20] {
        source.limit_file_size(limit);
        for then in [Then::Stop, Then::Pause, Then::Resume] {
            let error = world.save(SOURCE, "vm.save", then).unwrap_err().to_string();
            source.limit_file_size(libc::RLIM_INFINITY);
            assert!(error.contains("vm.save") && error.contains("arge"), "{error}");
            assert_eq!(files(), before, "something was left behind");
            assert!(!stands_still(&world), "the VM goes on by itself");
            peer.fresh();
            source.limit_file_size(limit);
        }
    }
    source.limit_file_size(libc::RLIM_INFINITY);
    let error = world
        .save(SOURCE, "no/such/folder", Then::Stop)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no/such/folder"), "{error}");
    peer.fresh();
    world.save(SOURCE, "vm.save", Then::Resume).unwrap();
    peer.finish();
    world.console_lines();
    world.serial_is_clean();
}

#[test]
fn pulse_killed_while_saving() {
    if !can_run() {
        return;
    }
    let world = World::new();
    let mut seed = 0x5eed_0002u64;
    let (mut torn, mut whole) = (0, 0);
    for round in 0..8 {
        let mut source = world.boot(SOURCE, &busy(), 2);
        let peer = Peer::start(&world);
        let told = peer.fresh();
        let file = format!("save-{round}");
        std::thread::scope(|s| {
            let save = s.spawn(|| world.save(SOURCE, &file, Then::Stop));
            if round == 0 {
                // Once for certain in the middle: the temporary file is there.
                wait_for("a save to begin", || partial(&world) || world.at(&file).exists());
            } else {
                std::thread::sleep(Duration::from_micros(random(&mut seed) % 20_000));
            }
            source.kill();
            let _ = save.join().unwrap();
        });
        if world.at(&file).exists() {
            // Then it is all there, and the VM goes on from it.
            whole += 1;
            world.check_save(&file).summary.covers(&told).unwrap();
            let _target = world.restore(TARGET, &file);
            peer.finish();
        } else {
            torn += 1;
            drop(peer);
        }
        // As after a loss of power: the next boot takes the counter and the ring up from the disk.
        for left in fs::read_dir(world.path()).unwrap().flatten() {
            let name = left.file_name().into_string().unwrap();
            if name.contains(".partial-") || name == "console" || name == "serial" {
                fs::remove_file(left.path()).unwrap();
            }
        }
    }
    println!("{torn} saves were cut short and left no file under the final name, {whole} were done");
    assert!(torn > 0);
    // What the last life wrote holds up to a boot's own check of the disk.
    let _source = world.boot(SOURCE, &busy(), 2);
    Peer::start(&world).finish();
    assert!(came(LONG, || world.text("serial").contains("pulse 1 ready")));
    world.serial_is_clean();
}

fn partial(world: &World) -> bool {
    fs::read_dir(world.path())
        .unwrap()
        .flatten()
        .any(|f| f.file_name().to_string_lossy().contains(".partial-"))
}
