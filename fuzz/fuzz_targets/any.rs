//! Any target of `steadfast-fuzz` under libFuzzer: `STEADFAST_FUZZ=NAME cargo fuzz run any`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use steadfast_fuzz::targets::{self, Target};

static TARGET: OnceLock<Target> = OnceLock::new();

fn chosen() -> Target {
    let name = std::env::var("STEADFAST_FUZZ").unwrap_or_default();
    targets::all()
        .into_iter()
        .find(|t| t.name == name)
        .unwrap_or_else(|| panic!("set STEADFAST_FUZZ to a target; `steadfast-fuzz` lists them"))
}

fuzz_target!(
    init: {
        // libFuzzer's hook aborts at any panic, also at those that a fence around third-party code catches. Panics
        // that nobody catches still end the run.
        let _ = std::panic::take_hook();
        TARGET.get_or_init(chosen);
    },
    |data: &[u8]| (TARGET.get_or_init(chosen).run)(data)
);
