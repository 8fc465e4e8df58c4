//! Stacks of layers put together from their files, on this host and from copies that were carried elsewhere.
//!
//! What a layer holds is said by md5sum and e2fsck, who stands on whom by dmsetup; files are copied by cp and head.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use dmsnap::error::{LayerRefusal, Refusal};
use dmsnap::export::FlattenOptions;
use dmsnap::snapshot::{Layer, StackOptions};
use dmsnap::{Error, Origin, SnapshotOptions};

use crate::checkpoint::{SOON, fork, freeze, mounted, name_of, node, snapshot, sum};
use crate::common::reading::{dm_names, loops_below};
use crate::common::scene::ext4;
use crate::common::tools::{complaint, finish, success};
use crate::common::{Scene, chain, dmsnap, eventually, run};

/// Over an image with a small file system.
fn small() -> Scene {
    Scene::over(|image| ext4(image, 6 << 20))
}

/// A disk that was frozen three times, taken down: its COW files from the bottom up, the last one its own, and the sums
/// of what each of the layers and the disk held.
struct Frozen {
    cows: Vec<PathBuf>,
    sums: Vec<String>,
}

fn frozen(scene: &Scene) -> Frozen {
    let v = snapshot(scene);
    let mut cows = vec![scene.path(format!("{}.cow", name_of(&v)))];
    let mut layers = Vec::new();
    for nth in 0..4 {
        let at = mounted(v.device(), &scene.path("v"), "rw");
        fs::write(at.at().join("all"), [b'a' + nth; 100_000]).expect("room for a file");
        fs::write(at.at().join(format!("file.{nth}")), [nth; 50_000]).expect("room for a file");
        if nth < 3 {
            let (name, layer) = freeze(scene, &v);
            cows.push(scene.path(format!("{name}.cow")));
            layers.push((name, layer));
        }
        drop(at);
    }
    let mut sums: Vec<_> = layers.iter().map(|(name, _)| sum(&node(name))).collect();
    sums.push(sum(v.device()));
    v.cleanup().expect("nobody has it open");
    drop(layers);
    gone(scene, &[]);
    Frozen { cows, sums }
}

/// Waits until no loop device has a file of the scene, but for the image's.
fn gone(scene: &Scene, but: &[&Path]) {
    let left = || {
        let all = loops_below(scene.dir())
            .into_iter()
            .map(|each| each.backing);
        all.filter(|backing| !but.contains(&backing.as_path()))
            .count()
    };
    assert!(
        eventually(SOON, || left() == 0),
        "{:?}",
        loops_below(scene.dir())
    );
}

/// What a device stands on, from the top down, by dmsetup.
fn below(name: &str) -> Vec<String> {
    let all = dm_names();
    let mut found = vec![name.to_owned()];
    while let Some(last) = found.last() {
        let deps = run!("dmsetup", "deps", "-o", "devname", last);
        let under = deps
            .split(['(', ')'])
            .find(|word| all.iter().any(|name| name == word));
        let Some(under) = under else { break };
        found.push(under.to_owned());
    }
    found
}

fn refused(made: dmsnap::Result<Layer>) -> Refusal {
    match made {
        Err(Error::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

/// The bytes of a COW file that are in use.
fn used(cow: &Path) -> u64 {
    let json = success(dmsnap().args(["cow", "inspect", "--json"]).arg(cow));
    let summary: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    summary["used_bytes"].as_u64().expect("a number")
}

/// As another host gets it: a copy of the image with a time of its own, and of each COW file its used bytes.
fn carried(scene: &Scene, of: &Frozen) -> (PathBuf, Vec<PathBuf>) {
    let there = scene.path("there");
    fs::create_dir(&there).expect("room for a directory");
    let image = there.join("image");
    run!("cp", scene.image(), &image);
    let file = File::options().write(true).open(&image);
    let then = SystemTime::UNIX_EPOCH + Duration::from_millis(981_173_106_789);
    file.and_then(|file| file.set_modified(then))
        .expect("a copy");
    let (mut cows, mut moved) = (Vec::new(), 0);
    for (nth, cow) in of.cows.iter().enumerate() {
        let copy = there.join(format!("delta.{nth}"));
        if nth + 1 < of.cows.len() {
            let bytes = used(cow);
            let from = cow.to_str().expect("ASCII");
            let to = copy.to_str().expect("ASCII");
            run!("sh", "-c", format!("head -c {bytes} {from} > {to}"));
            moved += fs::metadata(&copy).expect("a copy").len();
        } else {
            run!("cp", cow, &copy);
        }
        cows.push(copy);
    }
    let all: u64 = of.cows[..of.cows.len() - 1]
        .iter()
        .map(|cow| used(cow))
        .sum();
    println!("{moved} bytes moved of {all} used");
    assert_eq!(moved, all);
    (image, cows)
}

/// An image and three deltas, copied: every order makes the same disk, and each wrong combination is refused.
#[test]
fn a_stack_is_rebuilt_from_copies_of_its_files_in_any_order_and_from_no_others() {
    let scene = small();
    let of = frozen(&scene);
    let (image, cows) = carried(&scene, &of);
    let deltas = &cows[..3];
    let before: Vec<_> = cows
        .iter()
        .map(|cow| fs::read(cow).expect("a copy"))
        .collect();

    let origin = Origin::open(&image).expect("an image");
    let options = StackOptions::new();
    let name = scene.name();
    let (first, second) = (format!("{name}.1"), format!("{name}.2"));
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let given = order.map(|nth| &deltas[nth]);
        let layer = options.open(&origin, given, &name);
        let layer = layer.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(below(&name), [name.as_str(), &second, &first]);
        drop(layer);
        gone(&scene, &[&image]);
    }

    wrong_combinations(&scene, &origin, &options, &cows);
    gone(&scene, &[&image]);

    // By the command, which keeps the topmost; and the disk over it goes on as it was.
    let mut command = dmsnap();
    command
        .arg("layer")
        .arg(&image)
        .args([&cows[1], &cows[2], &cows[0]]);
    success(command.arg(&name));
    for (device, expected) in [&first, &second, &name].into_iter().zip(&of.sums) {
        assert_eq!(sum(&node(device)), *expected, "{device}");
        run!("e2fsck", "-f", "-n", node(device));
    }
    let layer = Layer::open(name.as_str()).expect("it is there");
    let disk = SnapshotOptions::new().create_on(layer.origin(), &cows[3], &scene.name());
    let disk = disk.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(sum(disk.device()), of.sums[3]);
    run!("e2fsck", "-f", "-n", disk.device());
    disk.cleanup().expect("nobody has it open");
    let handles = layer.handles().clone();
    drop(layer);
    dmsnap::cleanup(&handles).unwrap_or_else(|error| panic!("{}", chain(&error)));
    drop(origin);
    gone(&scene, &[]);
    let after: Vec<_> = deltas
        .iter()
        .map(|cow| fs::read(cow).expect("a copy"))
        .collect();
    assert!(after == before[..3], "a delta was written to");
    scene.assert_clean();
}

fn wrong_combinations(scene: &Scene, origin: &Origin, options: &StackOptions, cows: &[PathBuf]) {
    let name = scene.name();
    let open = |files: &[&PathBuf]| refused(options.open(origin, files, &name));
    let [one, two, three, own] = [&cows[0], &cows[1], &cows[2], &cows[3]];
    let told = |refusal: &Refusal, about: &Path| {
        println!("message: {refusal}");
        let path = format!("{about:?}");
        assert!(refusal.to_string().contains(&path), "{refusal}");
    };
    let found = open(&[one, three]);
    assert!(
        matches!(found, Refusal::Layer(LayerRefusal::Missing { .. })),
        "{found}"
    );
    told(&found, three);
    let found = open(&[two, three]);
    assert!(
        matches!(found, Refusal::Layer(LayerRefusal::Missing { .. })),
        "{found}"
    );
    told(&found, two);
    let found = open(&[three, two, one, own]);
    assert!(
        matches!(found, Refusal::Layer(LayerRefusal::NotFrozen { .. })),
        "{found}"
    );
    told(&found, own);

    let copy = scene.path("copy");
    run!("cp", two, &copy);
    let found = open(&[one, two, three, &copy]);
    assert!(
        matches!(found, Refusal::Layer(LayerRefusal::Twice { .. })),
        "{found}"
    );
    told(&found, &copy);
    // Of another stack over the same image, frozen by itself.
    let v = snapshot(scene);
    let foreign = scene.path(format!("{}.cow", name_of(&v)));
    let (_, layer) = freeze(scene, &v);
    v.cleanup().expect("nobody has it open");
    drop(layer);
    assert!(eventually(SOON, || loops_below(scene.dir())
        .iter()
        .all(|each| each.backing != foreign)));
    let found = open(&[one, &foreign, three]);
    assert!(
        matches!(found, Refusal::Layer(LayerRefusal::Apart { .. })),
        "{found}"
    );
    told(&found, &foreign);

    let short = scene.path("short");
    run!("cp", three, &short);
    let file = File::options().write(true).open(&short).expect("a copy");
    let bytes = file.metadata().expect("a copy").len();
    file.set_len(bytes - 4096).expect("shorter");
    let found = open(&[one, two, &short]);
    assert!(matches!(found, Refusal::CowUnsound { .. }), "{found}");
    told(&found, &short);
    file.set_len(bytes).expect("longer");
    file.write_all_at(&[0xff], 128 + 40).expect("a byte");
    let found = open(&[one, two, &short]);
    assert!(matches!(found, Refusal::CowDamaged { .. }), "{found}");
    told(&found, &short);

    let other = scene.path("other");
    run!("cp", origin.path(), &other);
    let file = File::options().write(true).open(&other).expect("a copy");
    file.write_all_at(b"another's", 1024 + 120).expect("room");
    let changed = Origin::open(&other).expect("an image");
    let found = refused(options.open(&changed, [one, two, three], &name));
    assert!(matches!(found, Refusal::OriginChanged { .. }), "{found}");
    told(&found, &other);

    // What has been attached by then goes again.
    let held = File::open(three).expect("a file");
    let held = nix::fcntl::Flock::lock(held, nix::fcntl::FlockArg::LockExclusiveNonblock);
    let held = held.map_err(|(_, errno)| errno).expect("nobody has it");
    let mut options = options.clone();
    let options = options.deadline(Duration::from_secs(1));
    let found = refused(options.open(origin, [one, two, three], &name));
    assert!(matches!(found, Refusal::CowInUse { .. }), "{found}");
    told(&found, three);
    drop(held);
    // The kernel takes a layer down behind its last user, in a worker of its own.
    let is_left = || dm_names().iter().any(|each| each.starts_with(&name));
    assert!(eventually(SOON, || !is_left()), "{:?}", dm_names());
}

/// Disks that share layers are put together at the same moment: each layer is there once.
#[test]
fn stacks_that_share_layers_are_opened_side_by_side() {
    let scene = small();
    let of = frozen(&scene);
    let origin = Origin::open(scene.image()).expect("an image");
    let names: Vec<_> = (0..4).map(|_| scene.name()).collect();
    let open = |nth: usize| {
        let mut cows = of.cows[..3].to_vec();
        cows.rotate_left(nth % 3);
        // Two of them want less of it.
        cows.retain(|cow| nth % 2 == 0 || *cow != of.cows[2]);
        let layer = StackOptions::new().open(&origin, cows, &names[nth]);
        layer.unwrap_or_else(|error| panic!("{}", chain(&error)))
    };
    let layers: Vec<_> = thread::scope(|scope| {
        let opening: Vec<_> = (0..4).map(|nth| scope.spawn(move || open(nth))).collect();
        opening
            .into_iter()
            .map(|each| each.join().expect("no panic"))
            .collect()
    });
    let there = dm_names();
    let ours = there
        .iter()
        .filter(|name| names.iter().any(|ours| name.starts_with(ours.as_str())));
    assert_eq!(ours.count(), 3, "{there:?}");
    let uuid = |nth: usize| layers[nth].handles().uuid.clone();
    assert_eq!((uuid(0), uuid(1)), (uuid(2), uuid(3)));
    let forks: Vec<_> = layers.iter().map(|layer| fork(&scene, layer)).collect();
    for (nth, fork) in forks.iter().enumerate() {
        assert_eq!(sum(fork.device()), of.sums[2 - nth % 2]);
    }
    drop(layers);
    for fork in forks {
        fork.cleanup()
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
    }
    drop(origin);
    gone(&scene, &[]);
    scene.assert_clean();
}

/// The layers' files as one, and theirs and the disk's as one: the kernel reads of it what it read of the stack, and
/// writes to it.
#[test]
fn a_flattened_stack_is_the_same_disk() {
    let scene = small();
    let of = frozen(&scene);
    let [one, two, three, own] = [0, 1, 2, 3].map(|nth| of.cows[nth].clone());
    let origin = Origin::open(scene.image()).expect("an image");

    // Out of use alone.
    let name = scene.name();
    let layer = StackOptions::new().open(&origin, [&one, &two], &name);
    let layer = layer.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let flat = scene.path("flat");
    let flatten = |cows: &[&PathBuf], output: &Path| {
        let mut command = dmsnap();
        command.arg("flatten").args(cows).arg(output);
        command
    };
    let refused = complaint(&finish(&mut flatten(&[&one, &two, &three], &flat)));
    assert!(refused.contains("is in use by"), "{refused}");
    drop(layer);
    gone(&scene, &[scene.image()]);

    println!("{}", success(&mut flatten(&[&three, &one, &two], &flat)));
    let layer = StackOptions::new().open(&origin, [&flat], &name);
    let layer = layer.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(sum(&node(&name)), of.sums[2]);
    let disk = SnapshotOptions::new().create_on(layer.origin(), &own, &scene.name());
    let disk = disk.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(sum(disk.device()), of.sums[3]);
    disk.cleanup().expect("nobody has it open");
    drop(layer);
    drop(origin);
    gone(&scene, &[]);

    let out = scene.path("out");
    let mut export = dmsnap();
    export.arg("export").arg("--origin").arg(scene.image());
    of.cows.iter().rev().for_each(|cow| {
        export.arg("--cow").arg(cow);
    });
    println!("{}", success(export.arg(&out)));
    // Not every file system has direct I/O.
    let read = format!("md5sum < {}", out.display());
    assert_eq!(run!("sh", "-c", read), of.sums[3]);
    let whole = scene.path("whole");
    println!(
        "{}",
        success(&mut flatten(
            &[&own, &one, &flat_of(&scene, [&two, &three])],
            &whole
        ))
    );
    let disk = SnapshotOptions::new().create(scene.image(), &whole, &scene.name());
    let disk = disk.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(sum(disk.device()), of.sums[3]);
    run!("e2fsck", "-f", "-n", disk.device());
    let at = mounted(disk.device(), &scene.path("v"), "rw");
    let new = vec![b'n'; 2_000_000];
    fs::write(at.at().join("new"), &new).expect("room for a file");
    drop(at);
    run!("e2fsck", "-f", "-n", disk.device());
    let at = mounted(disk.device(), &scene.path("v"), "ro");
    assert!(fs::read(at.at().join("all")).expect("a file") == [b'd'; 100_000]);
    assert!(fs::read(at.at().join("new")).expect("a file") == new);
    drop(at);
    disk.cleanup().expect("nobody has it open");
    scene.assert_clean();
}

/// Two of the layers' files as one.
fn flat_of(scene: &Scene, cows: [&PathBuf; 2]) -> PathBuf {
    let flat = scene.path("two");
    let done = FlattenOptions::new().flatten(cows, &flat);
    done.unwrap_or_else(|error| panic!("{}", chain(&error)));
    flat
}
