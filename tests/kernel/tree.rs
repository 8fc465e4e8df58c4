//! What stands on what, beside dmsetup's word for it.

use std::collections::BTreeSet;

use dmsnap::Origin;
use dmsnap::find::{Standing, State, TreeNode, tree, tree_of};

use crate::checkpoint::{fork, freeze, name_of, node, snapshot};
use crate::common::reading::number;
use crate::common::tools::{finish, success};
use crate::common::{Scene, chain, dmsnap, run};

/// Who stands on whom, by numbers: each device of ours, and what is right under it.
fn pairs(node: &TreeNode, into: &mut BTreeSet<(String, String)>) {
    for above in &node.above {
        let info = above.info().expect("a device of ours");
        let under = match node.info() {
            Some(info) => info.dev.to_string(),
            None => number(&info.origin.as_ref().expect("a loop device").device),
        };
        into.insert((info.dev.to_string(), under));
        pairs(above, into);
    }
}

/// The same by dmsetup: what a snapshot's table has first.
fn by_dmsetup(names: &[String]) -> BTreeSet<(String, String)> {
    let pair = |name: &String| {
        let table = run!("dmsetup", "table", name);
        let origin = table
            .split_whitespace()
            .nth(3)
            .expect("a snapshot's table")
            .to_owned();
        let deps = run!("dmsetup", "deps", "-o", "devno", name);
        let (major, minor) = origin.split_once(':').expect("a number");
        assert!(deps.contains(&format!("({major}, {minor})")), "{deps}");
        (number(&node(name)), origin)
    };
    names.iter().map(pair).collect()
}

/// An image with two layers one over the other, forks of both, a disk of its own, and a disk that is suspended.
#[test]
fn a_tree_is_what_dmsetup_says() {
    let scene = Scene::new();
    let v = snapshot(&scene);
    let (lower_name, lower) = freeze(&scene, &v);
    let (upper_name, upper) = freeze(&scene, &v);
    let forks = [
        fork(&scene, &lower),
        fork(&scene, &upper),
        fork(&scene, &upper),
    ];
    // The same image on a loop device of its own.
    let origin = Origin::open(scene.image()).expect("an image");
    let other = scene.snapshot();
    let mut names = vec![
        lower_name.clone(),
        upper_name.clone(),
        name_of(&v),
        name_of(&other),
    ];
    names.extend(forks.iter().map(name_of));

    let is_ours = |node: &TreeNode| matches!(&node.what, Standing::Image { path, .. } if path.as_deref() == Some(scene.image()));
    let all = tree().unwrap_or_else(|error| panic!("{}", chain(&error)));
    let ours: Vec<_> = all.into_iter().flatten().filter(is_ours).collect();
    let [ours] = &ours[..] else {
        panic!("one image: {ours:#?}");
    };
    let mut found = BTreeSet::new();
    pairs(ours, &mut found);
    assert_eq!(found, by_dmsetup(&names));
    assert_eq!(ours.size_bytes, Some(4 << 20));

    // One branch: the lower layer's own fork is not on it.
    let branch = tree_of(upper_name.as_str()).expect("it is there");
    let mut found = BTreeSet::new();
    pairs(&branch, &mut found);
    let not_on_it = [name_of(&other), name_of(&forks[0])];
    let on_it = names.iter().filter(|name| !not_on_it.contains(name));
    let on_it: Vec<_> = on_it.cloned().collect();
    assert_eq!(found, by_dmsetup(&on_it));

    run!("dmsetup", "suspend", name_of(&v));
    let json = success(dmsnap().args(["tree", "--json", &name_of(&v)]));
    let text = success(dmsnap().args(["tree", &upper_name]));
    run!("dmsetup", "resume", name_of(&v));
    println!("{text}");
    let read: Vec<TreeNode> = serde_json::from_str(&json).expect("a tree");
    let disk = &read[0].above[0].above[0].above[0];
    let info = disk.info().expect("a snapshot");
    assert_eq!(
        (disk.name(), info.state),
        (Some(name_of(&v).as_str()), State::Suspended)
    );
    assert!(info.interrupted, "{info:?}");
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 6);
    assert!(lines[0].starts_with(&format!("image {}, 4194304 bytes", scene.image().display())));
    assert!(lines[1].starts_with(&format!("  layer {lower_name} ")));
    assert!(lines[2].starts_with(&format!("    layer {upper_name} ")));
    assert!(
        lines[3..]
            .iter()
            .all(|line| line.starts_with("      snapshot "))
    );
    assert!(text.contains("suspended, interrupted"), "{text}");
    let nobody = finish(dmsnap().args(["tree", "dmsnap-test-nobody"]));
    assert!(!nobody.status.success() && nobody.stdout.is_empty());

    drop((lower, upper, origin));
    for each in forks.into_iter().chain([v, other]) {
        each.cleanup()
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
    }
    scene.assert_clean();
}
