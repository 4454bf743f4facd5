//! The targets: name, function, seeds, dictionary.

mod disk;
mod kernel;
mod pci;
mod peer;
mod virtio;
mod wire;

/// A function that any bytes may be fed to.
pub struct Target {
    /// Name on the command line.
    pub name: &'static str,
    /// One line for the list.
    pub what: &'static str,
    /// Runs one input; a panic is a finding.
    pub run: fn(&[u8]),
    /// Inputs that reach deep.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the format.
    pub dictionary: &'static [&'static [u8]],
    /// Why the target cannot run here.
    pub cannot_run: fn() -> Option<String>,
}

/// All targets.
#[must_use]
pub fn all() -> Vec<Target> {
    let mut all = disk::targets();
    all.push(kernel::target());
    all.extend(virtio::targets());
    all.push(pci::target());
    all.extend(wire::targets());
    all.extend(peer::targets());
    all
}

fn runs_anywhere() -> Option<String> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn seeds_of_every_target_run() {
        let mut names = HashSet::new();
        for t in all() {
            assert!(names.insert(t.name), "two targets {}", t.name);
            if let Some(why) = (t.cannot_run)() {
                println!("SKIPPED: fuzz seeds of {}: {why}", t.name);
                continue;
            }
            let seeds = (t.seeds)();
            assert!(!seeds.is_empty(), "{} has no seed", t.name);
            for s in &seeds {
                (t.run)(s);
            }
        }
    }
}
