//! Hypervisors boot from snapshots: QEMU with a kernel of Debian's, and user-mode Linux.
//!
//! The VMs say what they see of their disks. What is true of it is said by e2fsck, md5sum, cmp, dmsetup and a mount of
//! what was exported.

mod vm;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use dmsnap::error::{Retry, Step};
use dmsnap::timings::Timings;
use dmsnap::{CowSize, ErrorKind, Handles, Snapshot, SnapshotOptions, Store, Teardown};

use crate::common::reading::{alias_exists, dm_exists, dm_info, loops_over};
use crate::common::tools::{Running, start, success};
use crate::common::{Mounted, Scene, chain, dmsnap, eventually, run, stated_kernel};
use crate::proof::long;
use vm::{Vm, Vmm, brought, qemu};

const MIB: u64 = 1 << 20;

/// Nothing that is waited for here without a VM takes so long.
const SOON: Duration = Duration::from_secs(60);

/// Over the image that all VMs boot from. Every test has a copy of its own.
fn scene() -> Scene {
    Scene::over(|image| {
        fs::copy(brought("vmm-root.img"), image).expect("room for an image");
    })
}

fn takes_discards() -> bool {
    ["5.10", "6.1", "6.12"].contains(&stated_kernel().as_str())
}

/// As for a VM that discards what it no longer needs.
fn for_vms() -> SnapshotOptions {
    let mut options = SnapshotOptions::new();
    options.make_cow(CowSize::Bytes(32 * MIB));
    // Its file system has blocks of a chunk. On later kernels such chunks crash the loading of the table (stores.rs), and
    // with larger ones discards destroy data (discard.rs).
    if takes_discards() {
        options.discard(true).trust_discards(true);
    }
    options
}

struct Disk {
    name: String,
    cow: PathBuf,
    handles: Handles,
    device: PathBuf,
}

fn disk(scene: &Scene, options: &SnapshotOptions) -> Disk {
    let name = scene.name();
    let cow = scene.path(format!("{name}.cow"));
    let snapshot = options.create(scene.image(), &cow, &name);
    let snapshot: Snapshot = snapshot.expect("a snapshot");
    Disk {
        device: snapshot.device().to_owned(),
        handles: snapshot.into_handles(),
        name,
        cow,
    }
}

impl Disk {
    fn is_gone(&self) -> bool {
        !dm_exists(&self.name) && !alias_exists(&self.name) && loops_over(&self.cow) == 0
    }

    /// A raw image of the disk when no VM has it, by the command line.
    fn export(&self, scene: &Scene) -> PathBuf {
        let out = scene.path(format!("{}.raw", self.name));
        let mut export = dmsnap();
        export.args(["export", "--replace", "--origin"]);
        export.arg(scene.image()).arg("--cow");
        success(export.arg(&self.cow).arg(&out));
        out
    }

    /// A raw image of the running disk.
    fn export_live(&self, scene: &Scene) -> PathBuf {
        let out = scene.path(format!("{}.live", self.name));
        success(dmsnap().args(["export", &self.name]).arg(&out));
        out
    }

    /// A program that waits for the VMM's exit, to take everything down.
    fn cleanup_beside(&self, scene: &Scene) -> Running {
        let json = serde_json::to_string(&self.handles).expect("plain data");
        let file = scene.file(format!("{}.json", self.name), json);
        start(dmsnap().args(["cleanup", "--deadline", "600s"]).arg(file))
    }
}

/// The MD5 of a file by md5sum.
fn md5(file: &Path) -> String {
    let line = run!("md5sum", file);
    line.split(' ').next().expect("a sum").to_owned()
}

/// A file system in an image, for reading.
fn mounted(scene: &Scene, image: &Path) -> Mounted {
    let image = image.to_str().expect("UTF-8");
    Mounted::mount(["-o", "ro,loop,noload", image], &scene.path("mounted"))
}

fn listed(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory").flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The file system is sound as it is.
fn assert_sound(image: &Path) {
    run!("e2fsck", "-f", "-n", image);
}

/// The file system of a VM that lost its power is sound once its journal was replayed, which a kernel does at a mount.
fn replay(scene: &Scene, image: &Path) {
    let at = scene.path("replayed");
    drop(Mounted::mount(
        ["-o", "rw,loop", image.to_str().expect("UTF-8")],
        &at,
    ));
    assert!(
        eventually(SOON, || loops_over(image) == 0),
        "the mount's loop device stays"
    );
    assert_sound(image);
}

/// The first number of `dmsetup status`, sectors in use, and the second, of how many.
fn used_of(name: &str) -> (u64, u64) {
    let line = run!("dmsetup", "status", name);
    let numbers = line.split(' ').nth(3).and_then(|word| word.split_once('/'));
    let (used, total) = numbers.unwrap_or_else(|| panic!("{name}: {line}"));
    let number = |word: &str| word.parse().expect("a number of sectors");
    (number(used), number(total))
}

fn blob_of(scene: &Scene) -> String {
    md5(&mounted(scene, scene.image()).at().join("data/blob"))
}

#[test]
fn three_vms_at_once_each_see_their_own_disk() {
    let scene = scene();
    let blob = blob_of(&scene);
    let image = md5(scene.image());
    let vmms = [
        Vmm::Qemu("none"),
        Vmm::Uml { synchronous: false },
        Vmm::Uml { synchronous: true },
    ];
    let disks = vmms.map(|_| disk(&scene, &for_vms()));
    let mut vms: Vec<_> = vmms
        .iter()
        .zip(&disks)
        .map(|(vmm, disk)| Vm::start(*vmm, &disk.device))
        .collect();
    let mut sums = Vec::new();
    for (nth, vm) in vms.iter_mut().enumerate() {
        vm.up(vmms[nth]);
        assert_eq!(vm.sum("/data/blob"), blob, "the image's, by md5sum");
        vm.order(&format!("own vm{nth}"), "owns");
        vm.fill("/data/mine", 8);
        sums.push(vm.sum("/data/mine"));
    }
    for (nth, vm) in vms.iter_mut().enumerate() {
        assert_eq!(
            vm.order("list /etc", "list"),
            format!("own-vm{nth}"),
            "isolation"
        );
    }
    assert!(
        sums[0] != sums[1] && sums[1] != sums[2],
        "each wrote something else"
    );

    // Who has the disk open is named.
    for ((disk, vm), comm) in disks.iter().zip(&vms).zip(["qemu-system-x86", "linux.uml"]) {
        let error = Teardown::new()
            .retry(Retry::until(Duration::from_millis(50)))
            .remove(&disk.name);
        let error = error.expect_err("a VM runs from it");
        println!("message: a disk that a VM runs from: {}", chain(&error));
        assert_eq!(error.kind(), ErrorKind::Busy);
        let named = chain(&error);
        let by_proc = fs::read_to_string(format!("/proc/{}/comm", vm.pid())).expect("it runs");
        assert_eq!(by_proc.trim_end(), comm);
        assert!(
            named.contains(&format!("{comm} (pid {})", vm.pid())),
            "{named}"
        );
        assert!(dm_exists(&disk.name) && alias_exists(&disk.name));
    }

    // A VM's idle disk, its root mounted for writing, is exported and grown.
    let live = disks[0].export_live(&scene);
    replay(&scene, &live);
    assert_eq!(
        listed(&mounted(&scene, &live).at().join("etc")),
        ["own-vm0"]
    );
    let (_, total) = used_of(&disks[1].name);
    assert_eq!(total, 32 * MIB / 512);
    success(dmsnap().args(["grow", &disks[1].name, "48M"]));
    let (_, total) = used_of(&disks[1].name);
    assert_eq!(total, 48 * MIB / 512);
    vms[1].fill("/data/more", 8);

    // What the VM discards, the COW file gives back.
    let allocated = || {
        run!("sync");
        512 * fs::metadata(&disks[0].cow).expect("it is there").blocks()
    };
    if takes_discards() {
        vms[0].fill("/data/trash", 64);
        let full = allocated();
        vms[0].order("unlink /data/trash", "unlinked");
        vms[0].order("trim", "trimmed");
        let trimmed = allocated();
        println!("figure: a VM's fstrim after 4 MiB: {full} -> {trimmed} bytes in the COW file");
        assert!(trimmed + 2 * MIB <= full, "{full} -> {trimmed}");
    }

    // And nothing else of it.
    assert_eq!(vms[0].sum("/data/mine"), sums[0], "after the discards");
    assert_eq!(vms[0].sum("/data/blob"), blob, "after the discards");

    // Each is taken down as soon as its VM has gone, by who waited for it.
    for (nth, vm) in vms.into_iter().enumerate() {
        let waiting = disks[nth].cleanup_beside(&scene);
        assert!(dm_exists(&disks[nth].name), "while the VM runs");
        vm.shut_down(if nth == 0 { "reset" } else { "halt" });
        let done = waiting.join();
        assert!(done.status.success(), "vm{nth}: {done:?}");
        assert!(disks[nth].is_gone(), "vm{nth}");
    }

    // What is on each disk is what its VM saw there, and nothing of the others.
    for (nth, disk) in disks.iter().enumerate() {
        let raw = disk.export(&scene);
        // To the byte what the kernel makes of the same files again.
        let again = SnapshotOptions::new().create(scene.image(), &disk.cow, &scene.name());
        let again = again.expect("a snapshot");
        run!("cmp", &raw, again.device());
        again.cleanup().expect("nobody has it open");
        assert_sound(&raw);
        let mounted = mounted(&scene, &raw);
        let own = format!("own-vm{nth}");
        assert_eq!(listed(&mounted.at().join("etc")), [own.as_str()]);
        let text = fs::read_to_string(mounted.at().join("etc").join(own)).expect("it is there");
        assert_eq!(text, format!("vm{nth} was here\n"));
        assert_eq!(md5(&mounted.at().join("data/mine")), sums[nth]);
        assert_eq!(md5(&mounted.at().join("data/blob")), blob);
        drop(mounted);
    }
    assert_eq!(md5(scene.image()), image, "three VMs wrote");
}

#[test]
fn a_vm_that_writes_is_exported_grown_and_killed() {
    let scene = scene();
    let blob = blob_of(&scene);
    let image = md5(scene.image());
    let disk = disk(&scene, &for_vms());
    let mut vm = Vm::boot(Vmm::Qemu("writeback"), &disk.device);
    vm.order("own killed", "owns");
    vm.tell("forever");
    let round = |vm: &mut Vm| -> u64 { vm.answer("round").parse().expect("a number") };
    while round(&mut vm) < 3 {}

    // Under its writes, the file system is one that lost its power.
    let live = disk.export_live(&scene);
    let after_export = round(&mut vm);
    replay(&scene, &live);
    let check = |raw: &Path| {
        let mounted = mounted(&scene, raw);
        assert_eq!(listed(&mounted.at().join("etc")), ["own-killed"]);
        assert_eq!(md5(&mounted.at().join("data/blob")), blob);
    };
    check(&live);

    success(dmsnap().args(["grow", &disk.name, "64M"]));
    assert_eq!(used_of(&disk.name).1, 64 * MIB / 512);
    // It goes on: these are rounds that began after the growth, since one at most was on its way.
    let mut last = after_export;
    for _ in 0..3 {
        last = round(&mut vm);
    }
    assert!(last >= after_export + 3);

    // The power goes.
    let waiting = disk.cleanup_beside(&scene);
    vm.kill();
    let status = vm.exited();
    assert!(!status.success(), "{status}");
    let done = waiting.join();
    assert!(done.status.success(), "{done:?}");
    assert!(disk.is_gone());
    let raw = disk.export(&scene);
    replay(&scene, &raw);
    check(&raw);
    assert_eq!(md5(scene.image()), image);
}

#[test]
fn a_cow_file_that_a_vm_fills_is_grown_in_time() {
    const FILES: usize = 12;
    let scene = scene();
    let mut options = SnapshotOptions::new();
    options.store(Store::PersistentOverflow);
    options.make_cow(CowSize::Bytes(6 * MIB));
    let disk = disk(&scene, &options);
    let mut watch = dmsnap();
    watch.args(["watch", "--at", "60%", "--grow-by", "4M", "--max", "64M"]);
    let watch = start(watch.arg(&disk.name));
    let mut vm = Vm::boot(Vmm::Uml { synchronous: true }, &disk.device);
    for nth in 0..FILES {
        // A MiB, and the journal's part, fit above the threshold however long the watcher gets no processor. What a
        // watcher is promised of a faster VM is not for a machine under load to say.
        let room = || {
            let (used, total) = used_of(&disk.name);
            used * 100 < total * 60
        };
        assert!(eventually(SOON, room), "{:?}", used_of(&disk.name));
        vm.fill(&format!("/data/f{nth}"), 16);
    }
    let sums: Vec<_> = (0..FILES)
        .map(|nth| vm.sum(&format!("/data/f{nth}")))
        .collect();
    let (used, total) = used_of(&disk.name);
    println!("figure: a VM filled {used} sectors of what were 12288 and are {total}");
    assert!(used > 6 * MIB / 512, "it would have overflowed: {used}");
    vm.shut_down("halt");
    let done = disk.cleanup_beside(&scene).join();
    assert!(done.status.success(), "{done:?}");
    // With its last snapshot, the watcher ends.
    let watched = watch.join();
    let said = String::from_utf8_lossy(&watched.stdout).into_owned();
    println!("message: watch of a VM that fills its disk: {said}");
    assert!(watched.status.success(), "{watched:?}");
    assert!(said.contains("grown"), "{said}");
    let raw = disk.export(&scene);
    assert_sound(&raw);
    let mounted = mounted(&scene, &raw);
    for (nth, sum) in sums.iter().enumerate() {
        assert_eq!(&md5(&mounted.at().join(format!("data/f{nth}"))), sum);
    }
}

/// How soon after a VMM's exit its disk is removed, and how long the kernel takes for that: most of it is the kernel's
/// grace periods, as in any removal. The figures are printed, of many exits in the long form; what is asserted is the order.
#[test]
fn a_disk_goes_with_the_exit_of_its_vmm() {
    let times = if long() { 99 } else { 9 };
    let scene = scene();
    let (mut noticed, mut removed, mut gone) = (Vec::new(), Vec::new(), Vec::new());
    for nth in 0..times {
        let disk = disk(&scene, &for_vms());
        // QEMU as it stands before a VM runs: the disk is open, as it is for all of the VM's life.
        let mut command = qemu();
        command.args(["-M", "none", "-nodefaults", "-display", "none", "-S"]);
        command.args(["-drive"]).arg(format!(
            "if=none,file={},format=raw,cache=none",
            disk.device.display()
        ));
        command.stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("a VMM starts");
        let open = eventually(SOON, || dm_info(&disk.name, "open") != "0");
        assert!(open, "QEMU does not open its disk: {:?}", child.try_wait());
        let handles = disk.handles.clone();
        let waiting = thread::spawn(move || {
            let mut teardown = Teardown::new();
            teardown.retry(Retry::until(SOON));
            let start = Instant::now();
            let (done, timings) = Timings::of(|| teardown.cleanup(&handles));
            (done, start, timings)
        });
        assert!(!waiting.is_finished(), "while the VMM runs");
        let (signal, pid) = (["-TERM", "-KILL"][nth % 2], child.id().to_string());
        let killer = thread::spawn(move || run!("kill", signal, pid));
        child.wait().expect("it is a child of ours");
        let exit = Instant::now();
        let (done, start, timings) = waiting.join().expect("no panic");
        killer.join().expect("it ran");
        done.expect("its VMM has gone");
        assert!(disk.is_gone());
        // Its files are closed before a process has exited, so the disk may be gone first.
        let mut removals = timings
            .calls
            .iter()
            .filter(|call| call.step == Step::Remove);
        let removal = removals.next_back().expect("it was removed");
        let after = |since: Duration| (start + since).saturating_duration_since(exit);
        noticed.push(after(removal.start));
        removed.push(removal.took);
        gone.push(after(timings.total));
    }
    let soon = noticed
        .iter()
        .filter(|each| **each <= Duration::from_millis(5));
    println!(
        "figure: {times} exits of a VMM: its disk's removal begins within 5 ms of {} of them",
        soon.count()
    );
    for (what, took) in [
        ("from a VMM's exit to the removal", &mut noticed),
        ("the kernel's removal of a VM's disk", &mut removed),
        (
            "from a VMM's exit to the end of its disk's cleanup",
            &mut gone,
        ),
    ] {
        took.sort();
        println!(
            "figure: {what}: median {:?}, 9 of 10 within {:?}, longest {:?}",
            took[times / 2],
            took[times * 9 / 10],
            took[times - 1]
        );
    }
}
