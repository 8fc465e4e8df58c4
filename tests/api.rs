//! The public API on any host: nothing here needs root, and nothing here makes or removes a device.

#![allow(missing_docs, reason = "a test has no API")]

#[path = "api/documented.rs"]
mod documented;
#[path = "api/exhaustive.rs"]
mod exhaustive;
#[path = "api/export.rs"]
mod export;
#[path = "api/failures.rs"]
mod failures;
#[path = "api/flatten.rs"]
mod flatten;
#[path = "../fuzz/src/made_store.rs"]
#[allow(
    clippy::cast_possible_truncation,
    unreachable_pub,
    reason = "shared with the fuzz targets; its numbers are small"
)]
mod made_store;
#[path = "api/memory.rs"]
mod memory;
#[path = "api/messages.rs"]
mod messages;
#[path = "api/obstacles.rs"]
mod obstacles;
#[path = "api/rooms.rs"]
mod rooms;
#[path = "api/store.rs"]
mod store;
#[path = "api/threads.rs"]
mod threads;

#[cfg(feature = "tracing")]
#[path = "api/spans.rs"]
mod spans;

#[cfg(feature = "cli")]
#[path = "api/command.rs"]
mod command;
#[cfg(feature = "serde")]
#[path = "api/json.rs"]
mod json;

use std::error::Error;
use std::path::Path;

use dmsnap::base::{DeviceName, DeviceNumber, DeviceUuid, OriginIdentity, Sectors};
use dmsnap::dm::{Discard, SnapshotParams, SnapshotStatus, TableError, Target, TargetLine, Usage};
use dmsnap::error::{Refusal, Step};
use dmsnap::teardown::Outcome;
use dmsnap::{ChunkSize, Store};
use proptest::prelude::*;

/// What a reporter prints: each level once, joined.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// No regression files beside the sources: a failure prints its smallest case, which then becomes a plain test.
fn cases() -> ProptestConfig {
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(512)
    }
}

fn device_numbers() -> impl Strategy<Value = DeviceNumber> + Clone {
    (0..=0xfffu32, 0..=0xf_ffffu32)
        .prop_map(|(major, minor)| DeviceNumber::new(major, minor).expect("within bounds"))
}

fn sectors() -> impl Strategy<Value = Sectors> {
    any::<u64>().prop_map(Sectors::new)
}

fn chunk_sizes() -> impl Strategy<Value = ChunkSize> + Clone {
    (0..=21u32).prop_map(|power| ChunkSize::new(1 << power).expect("a power of two"))
}

const STORES: [Store; 3] = [
    Store::Persistent,
    Store::PersistentOverflow,
    Store::Transient,
];
const DISCARDS: [Discard; 3] = [Discard::Unsupported, Discard::ZeroesCow, Discard::Passdown];

fn lines() -> impl Strategy<Value = TargetLine> {
    let parts = (
        device_numbers(),
        device_numbers(),
        prop::sample::select(&STORES[..]),
        chunk_sizes(),
        prop::sample::select(&DISCARDS[..]),
    );
    let params = parts.prop_map(|(origin, cow, store, chunk, discard)| {
        let mut params = SnapshotParams::new(origin, cow, store, chunk);
        params.discard = discard;
        params
    });
    let target = prop_oneof![
        params.clone().prop_map(Target::Snapshot),
        params.prop_map(Target::SnapshotMerge),
        (device_numbers(), sectors())
            .prop_map(|(device, offset)| Target::Linear { device, offset }),
        Just(Target::Zero),
        Just(Target::Error),
    ];
    (sectors(), sectors(), target).prop_map(|(start, length, target)| TargetLine {
        start,
        length,
        target,
    })
}

fn usages() -> impl Strategy<Value = Usage> {
    (sectors(), sectors(), sectors()).prop_map(|(allocated, total, metadata)| Usage {
        allocated,
        total,
        metadata,
    })
}

fn names() -> impl Strategy<Value = DeviceName> {
    "[0-9A-Za-z#+:=@_.-]{1,127}"
        .prop_filter_map("a reserved name", |name| DeviceName::new(name).ok())
}

fn uuids() -> impl Strategy<Value = DeviceUuid> {
    "DMSNAP-[!-~]{0,121}".prop_map(|uuid| DeviceUuid::new(uuid).expect("a uuid of ours"))
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn table_lines_read_back_as_they_were_printed(line in lines()) {
        let text = line.to_string();
        prop_assert_eq!(text.parse::<TargetLine>(), Ok(line.clone()));
        let (kind, params) = (line.target.kind(), line.target.params());
        prop_assert_eq!(Target::parse(kind, &params), Ok(line.target));
    }

    #[test]
    fn any_text_is_a_table_line_or_a_one_line_error(text in "\\PC*|[0-9a-zPON: _-]*") {
        match text.parse::<TargetLine>() {
            Ok(line) => prop_assert_eq!(line.to_string().parse::<TargetLine>(), Ok(line)),
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
    }

    #[test]
    fn status_lines_read_back_as_they_were_printed(usage in usages(), text in "\\PC*") {
        let Ok(status) = SnapshotStatus::Usage(usage).to_string().parse::<SnapshotStatus>();
        prop_assert_eq!(status, SnapshotStatus::Usage(usage));
        let Ok(status) = text.parse::<SnapshotStatus>();
        let Ok(again) = status.to_string().parse::<SnapshotStatus>();
        prop_assert_eq!(again, status);
    }

    #[test]
    fn a_name_is_taken_as_it_is_or_refused_with_itself(name in "[ -~]{0,130}|\\PC{0,4}|[0-9a-z.]{1,8}") {
        let plain = |c: char| c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c);
        let good = (1..=127).contains(&name.len())
            && name.chars().all(plain)
            && !["control", ".", ".."].contains(&name.as_str());
        match DeviceName::new(name.as_str()) {
            Ok(taken) => {
                prop_assert!(good);
                prop_assert_eq!(taken.as_str(), &name);
                let path = taken.mapper_path();
                prop_assert_eq!(path.parent(), Some(Path::new("/dev/mapper")));
                prop_assert_eq!(path.file_name(), Some(name.as_ref()));
            }
            Err(refused) => {
                prop_assert!(!good);
                prop_assert_eq!(refused.name, name);
            }
        }
    }

    #[test]
    fn names_uuids_and_numbers_read_back(name in names(), uuid in uuids(), number in device_numbers()) {
        prop_assert_eq!(name.to_string().parse(), Ok(name));
        prop_assert_eq!(uuid.to_string().parse(), Ok(uuid));
        prop_assert_eq!(number.to_string().parse(), Ok(number));
        prop_assert_eq!(DeviceNumber::from_dev_t(number.to_dev_t()), number);
    }

    #[test]
    fn chunk_sizes_and_sectors_keep_their_number(chunk in chunk_sizes(), other in any::<u64>(), bytes in any::<u64>()) {
        prop_assert_eq!(ChunkSize::new(u64::from(chunk)), Ok(chunk));
        prop_assert_eq!(Some(chunk.bytes()), chunk.sectors().to_bytes());
        let possible = other.is_power_of_two() && other <= 1 << 21;
        prop_assert_eq!(ChunkSize::new(other).is_ok(), possible);
        let back = Sectors::from_bytes_floor(bytes).to_bytes();
        prop_assert_eq!(back, Some(bytes - bytes % 512));
    }
}

#[test]
fn what_the_kernel_prints_is_understood() {
    let line: TargetLine = "0 2097152 snapshot 7:0 7:1 P 8".parse().expect("our table");
    let Target::Snapshot(params) = &line.target else {
        panic!("{line:?}");
    };
    assert_eq!(
        (params.store, params.chunk),
        (Store::Persistent, ChunkSize::DEFAULT)
    );
    assert_eq!(line.length.to_bytes(), Some(1 << 30));
    for (text, status) in [
        ("Invalid", SnapshotStatus::Invalid),
        ("Overflow", SnapshotStatus::Overflow),
        ("Merge failed", SnapshotStatus::MergeFailed),
        ("Unknown", SnapshotStatus::Unknown("Unknown".to_owned())),
        ("16/ 16", SnapshotStatus::Unknown("16/ 16".to_owned())),
    ] {
        assert_eq!(text.parse(), Ok(status));
    }
    assert_eq!(STORES.map(Store::letters), ["P", "PO", "N"]);
    assert_eq!(STORES.map(Store::is_persistent), [true, true, false]);
    assert_eq!(Store::default(), Store::Persistent);
    assert_eq!(u64::from(ChunkSize::default()), 8);
}

#[test]
fn a_uuid_carries_what_its_origin_was() {
    let uuid = |text: &str| DeviceUuid::new(text).expect(text);
    let whole = "DMSNAP-00000000000000000000000000000042-40000000-fffffffffffffffb-7";
    let origin = OriginIdentity {
        size_bytes: 1 << 30,
        mtime_ns: -5,
    };
    assert_eq!(uuid(whole).origin(), Some(origin));
    for other in ["DMSNAP-", "DMSNAP-vm-42", "DMSNAP-00-40000000-xyz-7"] {
        assert_eq!(uuid(other).origin(), None, "{other}");
    }
}

#[test]
fn malformed_table_lines_say_which_part() {
    let read = |line: &str| line.parse::<TargetLine>().expect_err(line);
    assert_eq!(
        read("0 8 snapshot 7:0"),
        TableError::Missing { part: "COW device" }
    );
    assert_eq!(
        read("0 8 snapshot 7:0").to_string(),
        "table line has no COW device"
    );
    assert_eq!(
        read("0 8 snapshot 7:0 7:1 P 2147483648").to_string(),
        r#"table line has a bad chunk size: "2147483648""#
    );
    assert_eq!(
        Target::parse("thin\n", "")
            .expect_err("no target of ours")
            .to_string(),
        r#"table line has a bad target: "thin\n""#
    );
}
