//! Many forks of one layer: each begins with what the layer has, they all work, and nothing is left of them.

use std::fs;

use dmsnap::find::tree_of;
use dmsnap::{CowSize, SnapshotOptions};

use super::scale::clean_all;
use super::worker::use_disk;
use super::{repeated, timed};
use crate::checkpoint::{SOON, freeze, name_of, node, snapshot, sum};
use crate::common::reading::{dm_exists, dm_info};
use crate::common::{Scene, chain, eventually, settle};

#[test]
fn forks_of_one_layer_are_made_written_listed_and_taken_down() {
    let scene = Scene::new();
    let count = repeated(40, 1000);
    let v = snapshot(&scene);
    use_disk(v.device(), 1).expect("it works");
    let old = scene.path(format!("{}.cow", name_of(&v)));
    let (layer_name, layer) = freeze(&scene, &v);
    let (held, frozen) = (fs::read(&old).expect("a COW file"), sum(&node(&layer_name)));
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::WorstCase);
    let make = || {
        let name = scene.name();
        let cow = scene.path(format!("{name}.cow"));
        let made = options.create_on(layer.origin(), cow, &name);
        made.unwrap_or_else(|error| panic!("{name}: {}", chain(&error)))
            .into_handles()
    };
    let (mut forks, making) = timed(|| (0..count).map(|_| make()).collect::<Vec<_>>());
    let last = forks[count - 1].device.as_deref().expect("a device");
    assert_eq!(sum(last), frozen, "a fork begins with what its layer has");
    let ((), writing) = timed(|| {
        for (nth, fork) in (2..).zip(&forks) {
            let device = fork.device.as_deref().expect("a device");
            use_disk(device, nth).unwrap_or_else(|error| panic!("fork {nth}: {error}"));
        }
    });
    assert_eq!(sum(&node(&layer_name)), frozen, "the layer has changed");
    assert!(
        fs::read(&old).expect("a COW file") == held,
        "its COW file has changed"
    );

    let (tree, showing) = timed(|| tree_of(layer_name.as_str()));
    let tree = tree.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let names = |above: &[dmsnap::find::TreeNode]| {
        let mut names: Vec<_> = above
            .iter()
            .filter_map(|each| each.name())
            .map(str::to_owned)
            .collect();
        names.sort();
        names
    };
    forks.push(v.into_handles());
    let all = forks
        .iter()
        .map(|each| each.name.clone().expect("a name").to_string());
    let mut all: Vec<_> = all.collect();
    all.sort();
    assert_eq!(names(&tree.above[0].above), all, "what stands on the layer");
    // The value here, and each that stands on it, by dmsetup.
    assert_eq!(dm_info(&layer_name, "open"), (count + 2).to_string());
    drop(layer);

    let ((), clearing) = timed(|| clean_all(forks));
    assert!(
        eventually(SOON, || !dm_exists(&layer_name)),
        "it goes with its last user"
    );
    println!(
        "{count} forks of one layer: made in {making:.1?}, written to in {writing:.1?}, shown as a tree in {showing:.1?}, \
         taken down by 8 threads in {clearing:.1?}"
    );
    settle();
}
