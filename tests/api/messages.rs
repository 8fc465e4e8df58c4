//! What a user reads: every message, word for word.

use dmsnap::base::{InvalidName, NameFault};
use dmsnap::watch::Change;
use dmsnap::{Durability, Store, Warning};

use super::*;

/// The variants of a source file's enum: so that a golden list that misses one fails.
pub(crate) fn variants<'a>(source: &'a str, opening: &str) -> Vec<&'a str> {
    let body = source.split_once(opening).expect(opening).1;
    let lines = body.lines().skip(1).take_while(|line| *line != "}");
    let names = lines.filter_map(|line| line.strip_prefix("    "));
    names
        .filter(|line| line.starts_with(|first: char| first.is_ascii_uppercase()))
        .map(|line| line.split([' ', '(', ',']).next().unwrap_or(line))
        .collect()
}

/// The variant's name in what `Debug` prints.
pub(crate) fn variant(value: &impl std::fmt::Debug) -> String {
    let text = format!("{value:?}");
    let end = text.find(|c: char| !c.is_ascii_alphanumeric());
    text[..end.unwrap_or(text.len())].to_owned()
}

fn invalid_name(name: &str, fault: NameFault) -> Refusal {
    let mut invalid = DeviceName::new("").expect_err("it is empty");
    (invalid.name, invalid.fault) = (name.to_owned(), fault);
    Refusal::Name(invalid)
}

/// Every refusal, with what a user reads.
fn refusals() -> Vec<(Refusal, &'static str)> {
    let image = || Path::new("/images/base.ext4").to_owned();
    let cow = || Path::new("/run/vm 42.cow").to_owned();
    let name = |name: &str| Refusal::from(DeviceName::new(name).expect_err(name));
    let origin = |bytes, seconds: i64| dmsnap::base::OriginIdentity {
        size_bytes: bytes,
        mtime_ns: seconds * 1_000_000_000 + 5,
    };
    let chunk = |sectors| ChunkSize::new(sectors).expect("a power of two");
    vec![
        (name(""), r#"cannot name a device "": it is empty"#),
        (
            name("control"),
            r#"cannot name a device "control": it is reserved below /dev/mapper"#,
        ),
        (
            name("a\nb"),
            r#"cannot name a device "a\nb": it has the character '\n' (allowed: 0-9 A-Z a-z # + - . : = @ _)"#,
        ),
        (
            invalid_name("n...", NameFault::TooLong { bytes: 128 }),
            r#"cannot name a device "n...": it has 128 bytes, the kernel keeps 127"#,
        ),
        (
            DeviceUuid::new("LVM-1").expect_err("foreign").into(),
            r#""LVM-1" is not a uuid of a dmsnap device (DMSNAP-..., at most 128 bytes)"#,
        ),
        (
            Refusal::NotOurs {
                name: "vg-root".to_owned(),
                uuid: "LVM-1".to_owned(),
            },
            r#""vg-root" is not a dmsnap device: its uuid is "LVM-1""#,
        ),
        (
            "7:-1".parse::<DeviceNumber>().expect_err("negative").into(),
            r#""7:-1" is not a device number (major:minor)"#,
        ),
        (
            ChunkSize::new(1 << 31).expect_err("2^31").into(),
            "cannot use chunks of 2147483648 sectors: need a power of two from 1 to 2097152",
        ),
        (
            Refusal::NotAFile {
                path: image(),
                kind: "a FIFO",
            },
            r#""/images/base.ext4" is a FIFO, not a file or a block device"#,
        ),
        (
            Refusal::NotABlockDevice { path: cow() },
            r#""/run/vm 42.cow" is not a block device"#,
        ),
        (
            Refusal::NotADmDevice {
                path: Path::new("/dev/loop7").to_owned(),
            },
            r#""/dev/loop7" is not a dm device"#,
        ),
        (
            Refusal::OriginDiffers { path: image() },
            r#"origin image "/images/base.ext4" is another one: its size and modification time are those of the image that the snapshot was made over, its content is not"#,
        ),
        (
            Refusal::CowDeviceReadOnly { path: cow() },
            r#"COW device "/run/vm 42.cow" is read-only"#,
        ),
        (
            Refusal::CowHeadless {
                path: cow(),
                at: 4096,
            },
            r#"COW file "/run/vm 42.cow" begins with zeroes and has data at byte 4096: it is not blank, and has no header of a snapshot's exception store"#,
        ),
        (
            Refusal::ChunkUnderSector {
                chunk: chunk(4),
                sector_bytes: 4096,
            },
            "chunks of 4 sectors (2048 bytes) are smaller than the disk's sectors of 4096 bytes",
        ),
        (
            Refusal::NothingToKeep {
                name: "vm-42".to_owned(),
            },
            r#"nothing of "vm-42" can be kept: its store is transient, and goes with the device"#,
        ),
        (
            Refusal::StoreOfDurability {
                durability: Durability::ThrowAway,
                store: Store::Persistent,
            },
            r#"a disk of durability throw-away cannot have a store "P""#,
        ),
        (
            Refusal::OriginPartSector {
                path: image(),
                bytes: 5000,
                sector_bytes: 4096,
            },
            r#"origin image "/images/base.ext4" has 5000 bytes, no multiple of the disk's sectors of 4096 bytes"#,
        ),
        (
            Refusal::OriginTooShort {
                path: image(),
                bytes: 511,
            },
            r#"origin image "/images/base.ext4" has 511 bytes, less than one 512-byte sector"#,
        ),
        (
            Refusal::OriginInUse { path: image() },
            r#"origin image "/images/base.ext4" is locked: by another process, as a COW file, by a merge, or against one by the snapshots over it, which must be cleaned up first"#,
        ),
        (
            Refusal::OriginChanged {
                path: image(),
                expected: origin(1024, 17),
                found: origin(2048, -1),
            },
            r#"origin image "/images/base.ext4" has changed: 2048 bytes modified at -1.000000005, where the snapshot was made over 1024 bytes modified at 17.000000005"#,
        ),
        (
            Refusal::SameFile {
                origin: image(),
                cow: cow(),
            },
            r#"COW file "/run/vm 42.cow" and origin image "/images/base.ext4" are the same file"#,
        ),
        (
            Refusal::CowReadOnly {
                path: cow(),
                mode: 0o444,
            },
            r#"COW file "/run/vm 42.cow" is read-only (mode 0444)"#,
        ),
        (
            Refusal::CowTooSmall {
                path: cow(),
                bytes: 8192,
                chunk: chunk(8),
                needed: 12288,
            },
            r#"COW file "/run/vm 42.cow" has 8192 bytes, too small: chunks of 8 sectors need at least 12288 bytes"#,
        ),
        (Refusal::PoolEmpty, "no device of the pool is ready"),
        (
            invalid_name("dmsnap-pool-1", NameFault::Pool),
            r#"cannot name a device "dmsnap-pool-1": names that begin with dmsnap-pool- are a pool's"#,
        ),
        (
            Refusal::CowUnlinked { path: cow() },
            r#"COW file "/run/vm 42.cow" was removed meanwhile"#,
        ),
        (
            Refusal::CowTooLarge { path: cow() },
            r#"COW file "/run/vm 42.cow" would be too large for any file system"#,
        ),
        (
            Refusal::CowSizeTrap {
                path: cow(),
                bytes: 1056768,
                sound_bytes: 1060864,
            },
            r#"COW device "/run/vm 42.cow" has 1056768 bytes, and a full store of that size ends invalid: make it 1060864 bytes or a chunk shorter"#,
        ),
        (
            Refusal::CowDeviceShort {
                path: cow(),
                bytes: 1056768,
                asked: 2097152,
            },
            r#"COW device "/run/vm 42.cow" has 1056768 bytes, less than the 2097152 asked for: only files are made longer here"#,
        ),
        (
            Refusal::InUse {
                name: "vm-42".to_owned(),
                open_count: 2,
            },
            r#""vm-42" is in use: 2 have it open"#,
        ),
        (
            Refusal::AtWork {
                name: "vm-42".to_owned(),
            },
            r#"another process is at work on "vm-42""#,
        ),
        (
            Refusal::NotLive {
                name: "vm-42".to_owned(),
            },
            r#""vm-42" is not a live snapshot"#,
        ),
        (
            Refusal::FileElsewhere {
                name: "vm-42".to_owned(),
                path: cow(),
            },
            r#""/run/vm 42.cow" is not the file that "vm-42" has: it was removed, replaced or is mounted elsewhere"#,
        ),
        (
            Refusal::Overflowed {
                name: "vm-42".to_owned(),
            },
            r#""vm-42" has overflowed: its writes fail until it is removed and made again (recover)"#,
        ),
        (
            Refusal::Invalid {
                name: "vm-42".to_owned(),
            },
            r#""vm-42" is invalid: it overflowed or a write to its COW file failed, and the kernel has given it up"#,
        ),
        (
            Refusal::NotOverflowed {
                name: "vm-42".to_owned(),
            },
            r#""vm-42" has not overflowed: it can be grown as it is"#,
        ),
        (
            Refusal::CowInUse { path: cow() },
            r#"COW file "/run/vm 42.cow" is in use by another snapshot"#,
        ),
        (
            Refusal::CowForeign { path: cow() },
            r#"COW file "/run/vm 42.cow" holds foreign data: neither blank nor a snapshot's exception store"#,
        ),
        (
            Refusal::CowInvalid { path: cow() },
            r#"COW file "/run/vm 42.cow" holds a snapshot that the kernel has marked invalid (it overflowed or a write failed)"#,
        ),
        (
            Refusal::CowDamaged {
                path: cow(),
                field: "version",
                value: 2,
            },
            r#"COW file "/run/vm 42.cow" holds a damaged exception store: version is 2"#,
        ),
        (
            Refusal::CowChunkSize {
                path: cow(),
                found: chunk(32),
                asked: chunk(8),
            },
            r#"COW file "/run/vm 42.cow" was made with chunks of 32 sectors, not 8"#,
        ),
        (
            Refusal::CowBlank { path: cow() },
            r#"COW file "/run/vm 42.cow" is blank: it holds no exception store to merge"#,
        ),
        (
            Refusal::OriginReadOnly {
                path: image(),
                mode: 0o444,
            },
            r#"origin image "/images/base.ext4" is read-only (mode 0444)"#,
        ),
        (
            Refusal::CowNotBlank { path: cow() },
            r#"COW file "/run/vm 42.cow" is not blank (truncate it to reuse it)"#,
        ),
        (
            Refusal::CowUnsound {
                path: cow(),
                fault: dmsnap::store::StoreFault::MetadataChunk {
                    offset: 4112,
                    chunk: 258,
                },
            },
            r#"COW file "/run/vm 42.cow" holds no sound exception store: at byte 4112: COW chunk 258 is a metadata area"#,
        ),
        (
            Refusal::OutputExists { path: image() },
            r#"output "/images/base.ext4" exists"#,
        ),
        (
            Refusal::OutputIsInput { path: image() },
            r#"output "/images/base.ext4" is the origin image or the COW file"#,
        ),
        (
            Refusal::OutputNotAFile {
                path: image(),
                kind: "a block device",
            },
            r#"output "/images/base.ext4" is a block device, not a regular file"#,
        ),
        (
            Refusal::OriginUnknown {
                origin: image(),
                bytes: 4 << 20,
                cow: "/run/vm 42.cow".into(),
                end_bytes: 8192,
            },
            r#"COW file "/run/vm 42.cow" does not say what it was made over: its changes end at byte 8192 of that, and "/images/base.ext4" has 4194304 bytes; name the very device that it was made over, and allow any origin"#,
        ),
        (
            Refusal::PartOfFile {
                device: "/dev/loop7".into(),
                path: "/images/disk".into(),
                offset_bytes: 1_048_576,
                limit_bytes: 4096,
            },
            r#"loop device "/dev/loop7" shows a part of "/images/disk", from byte 1048576, 4096 bytes: only whole files are exported, grown or recovered"#,
        ),
        (
            Refusal::CowOfSnapshot {
                path: "/run/vm 42.cow".into(),
                name: "vm-42".to_owned(),
            },
            r#"COW file "/run/vm 42.cow" is in use by the snapshot "vm-42": export vm-42"#,
        ),
        (
            Refusal::PooledUuid {
                uuid: "DMSNAP-1-pool".to_owned(),
            },
            r#""DMSNAP-1-pool" is a pool's device, which serves one snapshot after another: say which by its name"#,
        ),
        (
            Refusal::DiscardChunk {
                chunk: ChunkSize::DEFAULT,
            },
            "discard with chunks of 8 sectors crashes kernels as new as this one: use 512 or more",
        ),
        (
            Refusal::DiscardUnaligned {
                chunk: ChunkSize::DEFAULT,
                sector_bytes: 512,
            },
            "discard with chunks of 8 sectors on a disk with sectors of 512 bytes is not safe: the kernel lets a discard that crosses two chunks destroy a third; make chunks and sectors of one size, or say that the guest's discards are aligned to chunks",
        ),
        (
            Refusal::TargetLacks {
                version: "1.15.0".to_owned(),
                feature: "discard_zeroes_cow (1.16.0)",
            },
            "the kernel's snapshot target 1.15.0 lacks discard_zeroes_cow (1.16.0)",
        ),
    ]
}

#[test]
fn every_refusal_reads_as_it_should() {
    let source = include_str!("../../src/error/refusal.rs");
    let mut listed = refusals();
    listed.extend(super::obstacles::refusals());
    for (refusal, message) in &listed {
        assert_eq!(refusal.to_string(), *message);
        let error = dmsnap::Error::from(refusal.clone());
        assert_eq!(chain(&error), *message, "printed once, also as an Error");
        assert_eq!(error.errno(), None);
        assert!(error.left().is_empty());
    }
    for name in variants(source, "pub enum Refusal {") {
        let seen = listed.iter().any(|(refusal, _)| variant(refusal) == name);
        assert!(seen, "Refusal::{name} has no golden message");
    }
    let faults: Vec<_> = listed
        .iter()
        .filter_map(|(refusal, _)| match refusal {
            Refusal::Name(InvalidName { fault, .. }) => Some(variant(fault)),
            _ => None,
        })
        .collect();
    for name in variants(
        include_str!("../../src/base/name.rs"),
        "pub enum NameFault {",
    ) {
        let seen = faults.iter().any(|fault| fault == name);
        assert!(seen, "NameFault::{name} has no golden message");
    }
}

#[test]
fn every_step_makes_a_sentence() {
    let steps = [
        (Step::OpenFile, "cannot open X"),
        (Step::MakeFile, "cannot make X"),
        (Step::SizeFile, "cannot set aside space for X"),
        (Step::InspectFile, "cannot inspect X"),
        (Step::LockFile, "cannot lock X"),
        (Step::ReadFile, "cannot read X"),
        (Step::FindData, "cannot find the data of X"),
        (Step::WriteFile, "cannot write X"),
        (Step::SyncFile, "cannot sync X"),
        (Step::MarkFile, "cannot mark X"),
        (Step::DateFile, "cannot set the modification time of X"),
        (Step::OpenLoopControl, "cannot open loop control X"),
        (Step::FindLoop, "cannot find a free loop device through X"),
        (Step::OpenLoop, "cannot open loop device X"),
        (Step::LockLoop, "cannot lock loop device X"),
        (Step::AttachLoop, "cannot attach X"),
        (Step::TestLock, "cannot test the lock of X"),
        (
            Step::ReadDiskseq,
            "cannot read the disk sequence number of X",
        ),
        (Step::InspectLoop, "cannot inspect loop device X"),
        (Step::SizeLoop, "cannot read the size of X"),
        (Step::ResizeLoop, "cannot resize loop device X"),
        (Step::DetachLoop, "cannot detach X"),
        (Step::OpenMapper, "cannot open device-mapper control X"),
        (
            Step::TargetVersion,
            "cannot find the snapshot target through X",
        ),
        (Step::Create, "cannot create X"),
        (Step::Load, "cannot load the table of X"),
        (Step::Clear, "cannot clear the inactive table of X"),
        (Step::Suspend, "cannot suspend X"),
        (Step::Resume, "cannot resume X"),
        (Step::EndFlushes, "cannot end the flushes of X"),
        (Step::MeasureFile, "cannot measure X"),
        (Step::Merge, "cannot merge by X"),
        (Step::SetUuid, "cannot give a uuid to X"),
        (Step::Remove, "cannot remove X"),
        (Step::Query, "cannot query X"),
        (Step::Status, "cannot read the status of X"),
        (Step::ArmPoll, "cannot watch for events through X"),
        (Step::List, "cannot list the devices of X"),
        (Step::Link, "cannot make X"),
        (Step::MoveFile, "cannot move X"),
        (Step::PunchHole, "cannot punch a hole into X"),
        (Step::AddLoop, "cannot add a loop device through X"),
        (Step::Rename, "cannot rename X"),
        (Step::StartThread, "cannot start the thread X"),
        (Step::Unlink, "cannot unlink X"),
        (Step::Random, "cannot draw a uuid for X"),
    ];
    for (step, sentence) in steps {
        assert_eq!(format!("cannot {step} X"), sentence);
    }
    for name in variants(include_str!("../../src/error/step.rs"), "\nsteps! {") {
        let seen = steps.iter().any(|(step, _)| variant(step) == name);
        assert!(seen, "Step::{name} has no golden text");
    }
}

#[test]
fn every_warning_reads_as_it_should() {
    let warnings = [
        (
            Warning::OriginTail { bytes: 3 },
            "the last 3 bytes of the origin image are no whole sector and not visible",
        ),
        (
            Warning::CowBelowWorstCase {
                bytes: 12288,
                worst_case_bytes: 1081344,
            },
            "the COW file has 12288 bytes; overwriting the whole origin takes 1081344",
        ),
        (
            Warning::CowLengthened {
                bytes: 1056768,
                sound_bytes: 1060864,
            },
            "the COW file was made 1060864 bytes long: one of 1056768 ends invalid when full",
        ),
        (
            Warning::DirectIoUnavailable,
            "the COW file's file system cannot do direct I/O in the disk's sectors: it is buffered",
        ),
        (
            Warning::DiscardUnavailable,
            "the COW file's file system cannot punch holes: the disk takes no discard",
        ),
        (
            Warning::NoAlias {
                alias: Path::new("/dev/mapper/vm").to_owned(),
                errno: 30,
            },
            "cannot make /dev/mapper/vm: Read-only file system (os error 30)",
        ),
        (
            Warning::FlushesKept { errno: 30 },
            "cannot end the guest's flushes at the dm device: Read-only file system (os error 30)",
        ),
    ];
    for (warning, text) in &warnings {
        assert_eq!(warning.to_string(), *text);
    }
    for name in variants(
        include_str!("../../src/backing/warning.rs"),
        "pub enum Warning {",
    ) {
        let seen = warnings.iter().any(|(warning, _)| variant(warning) == name);
        assert!(seen, "Warning::{name} has no golden text");
    }
}

#[test]
fn every_change_of_a_watched_snapshot_reads_as_it_should() {
    let usage = Usage {
        allocated: Sectors::new(1640),
        total: Sectors::new(2048),
        metadata: Sectors::new(16),
    };
    let chunk = ChunkSize::new(3).expect_err("no power of two");
    let changes = [
        (Change::Above(usage), "80% full, 1640 of 2048 sectors"),
        (
            Change::Overflow,
            "overflowed: its writes fail until it is recovered",
        ),
        (Change::Invalid, "invalid: it is lost"),
        (Change::MergeFailed, "merging failed"),
        (Change::Gone, "gone"),
        (
            Change::Unknown("Odd\n".to_owned()),
            r#"unknown status "Odd\n""#,
        ),
        (
            Change::Unreadable(chunk.into()),
            "cannot use chunks of 3 sectors: need a power of two from 1 to 2097152",
        ),
    ];
    for (change, text) in &changes {
        assert_eq!(change.to_string(), *text);
    }
    for name in variants(include_str!("../../src/watch/mod.rs"), "pub enum Change {") {
        let seen = changes.iter().any(|(change, _)| variant(change) == name);
        assert!(seen, "Change::{name} has no golden text");
    }
}
