//! The seeds of every fuzz target, on any toolchain and without libFuzzer.

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

#[test]
fn every_seed_of_every_target_holds() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    let mut broken = Vec::new();
    for (name, target) in dmsnap_fuzz::TARGETS {
        let mut replayed = 0;
        for entry in fs::read_dir(seeds.join(name)).expect("each target has seeds") {
            let path = entry.expect("an entry").path();
            let data = fs::read(&path).expect("a seed");
            if catch_unwind(|| target(&data)).is_err() {
                broken.push(path);
            }
            replayed += 1;
        }
        assert!(replayed > 0, "{name} has no seeds");
    }
    assert!(broken.is_empty(), "these broke their target: {broken:#?}");
}

#[test]
fn every_directory_of_seeds_has_its_target() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    for entry in fs::read_dir(seeds).expect("seeds") {
        let name = entry.expect("an entry").file_name();
        let known = dmsnap_fuzz::TARGETS
            .iter()
            .any(|(target, _)| name == *target);
        assert!(known, "no target {}", name.display());
    }
}

#[test]
fn short_inputs_hold_too() {
    for (_, target) in dmsnap_fuzz::TARGETS {
        target(b"");
        for first in 0..=u8::MAX {
            target(&[first]);
            for second in 0..=u8::MAX {
                target(&[first, second]);
            }
        }
    }
}
