//! fio writes, trims and flushes a disk, and says afterwards whether each block is one that it wrote.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use dmsnap::export::ExportOptions;
use dmsnap::{CowSize, SnapshotOptions, Store};

use crate::common::tools::{Running, start, success};
use crate::common::{Scene, chain, dmsnap, eventually, run, stated_kernel};

const MIB: u64 = 1 << 20;

/// One fio, which tests/vm/image.sh brings into the guest: its jobs run at once, as far as none waits for those before it.
pub(crate) struct Fio(pub(crate) Command);

impl Fio {
    pub(crate) fn new(scene: &Scene) -> Self {
        let here = std::env::current_dir().expect("there is one").join("fio");
        let there = fs::exists(&here).expect("it can be looked for");
        assert!(
            there,
            "no fio here: `tests/vm/run exec --fio` and `test` bring it"
        );
        let mut fio = Command::new(here);
        fio.current_dir(scene.dir());
        Self(fio)
    }

    /// A job over `mib` MiB from `from` on, in blocks of a chunk; what it writes or reads has a CRC in each.
    pub(crate) fn job(
        &mut self,
        rw: &str,
        on: &Path,
        from: u64,
        mib: u64,
        more: &[&str],
    ) -> &mut Self {
        let Self(fio) = self;
        fio.args(["--name", rw, "--rw", rw, "--bs=4k", "--thread"]);
        fio.arg(format!("--offset={from}m"))
            .arg(format!("--size={mib}m"));
        fio.arg("--filename").arg(on).args(more);
        if !rw.contains("trim") {
            fio.args(["--verify=crc32c", "--verify_state_save=0"]);
        }
        self
    }

    /// Whether each block of the range is one that fio wrote, whole and in its place.
    pub(crate) fn reads(&mut self, on: &Path, from: u64, mib: u64) -> &mut Self {
        self.job("read", on, from, mib, &["--ioengine=psync", "--stonewall"])
    }
}

/// Ends fio in the middle of its work. What it has begun to write it finishes.
pub(crate) fn interrupt(fio: Running) {
    run!("kill", "-INT", fio.id().to_string());
    let done = fio.join();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    // 128 is what fio ends with when a signal has ended it; an I/O error would be 1, and a line.
    assert_eq!(done.status.code(), Some(128), "{done:?}");
    assert!(!said.contains("error"), "{said}");
}

/// Writes over one range and over and over, trims over another, with a flush after every eighth; in the meantime the disk
/// is grown, exported and asked for its status. The first COW file has no room for all of it.
#[test]
fn what_fio_wrote_is_on_the_disk_and_in_its_exports() {
    // Later kernels crash when they load a table with such chunks and discards (stores.rs).
    let trims = ["5.10", "6.1", "6.12"].contains(&stated_kernel().as_str());
    let scene = Scene::new();
    let (name, cow) = (scene.name(), scene.path("cow"));
    let mut options = SnapshotOptions::new();
    options
        .store(Store::PersistentOverflow)
        .make_cow(CowSize::Bytes(2 * MIB + MIB / 4));
    // No trim here crosses from one chunk into another.
    options.discard(trims).trust_discards(trims);
    let snapshot = options.create(scene.image(), &cow, &name);
    let snapshot = snapshot.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let disk = snapshot.device();

    // Each block of the first MiB is fio's from here on, in all that is exported.
    let deep = ["--direct=1", "--ioengine=libaio", "--iodepth=8"];
    let unchecked = [&deep[..], &["--fsync=8", "--do_verify=0"]].concat();
    success(&mut Fio::new(&scene).job("randwrite", disk, 0, 1, &unchecked).0);
    let endless = [&unchecked[..], &["--time_based", "--runtime=100000"]].concat();
    let mut fio = Fio::new(&scene);
    fio.job("randwrite", disk, 0, 1, &endless);
    if trims {
        fio.job("randwrite", disk, 1, 1, &endless);
        fio.job("randtrim", disk, 1, 1, &endless);
    }
    let beside = start(&mut fio.0);
    let mut found = Fio::new(&scene);
    for round in 1..=2 {
        goes_on(disk);
        let grown = dmsnap::snapshot::grow(name.as_str(), (3 + round) * MIB);
        let grown = grown.unwrap_or_else(|error| panic!("{}", chain(&error)));
        let out = scene.path(format!("out.{round}"));
        let exported = ExportOptions::new().export_live(name.as_str(), &out);
        exported.unwrap_or_else(|error| panic!("{}", chain(&error)));
        let line = success(dmsnap().args(["status", &name]));
        println!(
            "round {round}: {grown}, {} writes by then; {line}",
            writes(disk)
        );
        found.reads(&out, 0, 1);
    }
    goes_on(disk);
    interrupt(beside);

    // In one run, fio also knows that what it finds is the last that it wrote. The third MiB had no room at first.
    let checked = [&deep[..], &["--fsync=8", "--do_verify=1", "--stonewall"]].concat();
    let mut fio = Fio::new(&scene);
    fio.job("randwrite", disk, 0, 3, &checked);
    if trims {
        fio.job(
            "randtrim",
            disk,
            1,
            1,
            &["--direct=1", "--ioengine=psync", "--stonewall"],
        );
    }
    success(&mut fio.0);
    let live = scene.path("live");
    let exported = ExportOptions::new().export_live(name.as_str(), &live);
    exported.unwrap_or_else(|error| panic!("{}", chain(&error)));
    run!("cmp", disk, &live);
    found.reads(disk, 0, 1).reads(&live, 2, 1);
    success(&mut found.0);
    snapshot.cleanup().expect("nobody has it open");

    let out = scene.path("out");
    let mut export = dmsnap();
    export.args(["export", "--origin"]).arg(scene.image());
    success(export.arg("--cow").arg(&cow).arg(&out));
    run!("cmp", &live, &out);
    if trims {
        let zeroes = scene.sparse("zeroes", MIB);
        let bytes = MIB.to_string();
        run!("cmp", "-n", &bytes, &out, zeroes, &bytes, "0");
    }
}

/// Waits until the kernel has completed one more write on a device.
pub(crate) fn goes_on(device: &Path) {
    let before = writes(device);
    let soon = Duration::from_secs(60);
    assert!(
        eventually(soon, || writes(device) > before),
        "fio writes on"
    );
}

/// How many writes the kernel has completed on a device.
fn writes(device: &Path) -> u64 {
    let name = device.file_name().expect("a node");
    let stat = fs::read_to_string(Path::new("/sys/block").join(name).join("stat"));
    let stat = stat.expect("the device is there");
    let writes = stat.split_whitespace().nth(4).expect("the fifth number");
    writes.parse().expect("a number")
}
