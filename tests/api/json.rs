//! Handles and words as JSON.

use std::path::Path;

use dmsnap::Handles;
use dmsnap::base::{FileId, LoopHandle};
use dmsnap::dm::{SnapshotStatus, Usage};
use dmsnap::export::Flattened;
use dmsnap::find::{SnapshotInfo, Standing, State, TreeNode};
use dmsnap::merge::MergeOutcome;
use dmsnap::teardown::{Fate, Outcome};
use dmsnap::watch::Change;
use serde_json::{from_str, json, to_string};

use super::*;

/// What callers keep in their databases: these keys are for ever.
const WHOLE: &str = r#"{
  "name": "vm-42",
  "uuid": "DMSNAP-00000000000000000000000000000042",
  "dev": "254:3",
  "device": "/dev/dm-3",
  "mapper": "/dev/mapper/vm-42",
  "cow_loop": {
    "path": "/dev/loop7",
    "diskseq": 31,
    "backing": {
      "dev": "0:25",
      "inode": 1234
    }
  },
  "origin_loop": {
    "path": "/dev/loop6",
    "diskseq": null,
    "backing": null
  },
  "origin": {
    "size_bytes": 1073741824,
    "mtime_ns": -5
  }
}"#;

fn whole() -> Handles {
    let mut cow = LoopHandle::at("/dev/loop7");
    cow.diskseq = Some(31);
    cow.backing = Some(FileId {
        dev: DeviceNumber::new(0, 25).expect("within bounds"),
        inode: 1234,
    });
    let mut handles = Handles::default();
    handles.name = DeviceName::new("vm-42").ok();
    handles.uuid = DeviceUuid::new("DMSNAP-00000000000000000000000000000042").ok();
    handles.dev = "254:3".parse().ok();
    handles.device = Some("/dev/dm-3".into());
    handles.mapper = Some("/dev/mapper/vm-42".into());
    handles.cow_loop = Some(cow);
    handles.origin_loop = Some(LoopHandle::at("/dev/loop6"));
    handles.origin = Some(OriginIdentity {
        size_bytes: 1 << 30,
        mtime_ns: -5,
    });
    handles
}

#[test]
fn handles_have_stable_keys() {
    let text = serde_json::to_string_pretty(&whole()).expect("serialises");
    assert_eq!(text, WHOLE);
    assert_eq!(from_str::<Handles>(WHOLE).expect("reads back"), whole());
}

#[test]
fn empty_fields_may_be_missing_null_or_empty() {
    let empty = Handles::default();
    let keys = [
        "name",
        "uuid",
        "dev",
        "device",
        "mapper",
        "cow_loop",
        "origin_loop",
    ];
    for key in keys {
        for nothing in [json!(null), json!("")] {
            let text = json!({ key: nothing }).to_string();
            assert_eq!(from_str::<Handles>(&text).expect(&text), empty, "{text}");
        }
    }
    for text in ["{}", r#"{"origin":null}"#, r#"{"cow_loop":{"path":""}}"#] {
        assert_eq!(from_str::<Handles>(text).expect(text), empty, "{text}");
    }
    let text = to_string(&empty).expect("serialises");
    assert_eq!(from_str::<Handles>(&text).expect("reads back"), empty);
}

#[test]
fn a_loop_may_be_its_bare_path_and_unknown_keys_are_for_later_versions() {
    let text = r#"{"cow_loop":"/dev/loop7","origin_loop":{"path":"/dev/loop6"},"added":1}"#;
    let handles: Handles = from_str(text).expect(text);
    assert_eq!(handles.cow_loop, Some(LoopHandle::at("/dev/loop7")));
    assert_eq!(handles.origin_loop, Some(LoopHandle::at("/dev/loop6")));
}

#[test]
fn wrong_json_is_told_by_what_is_wrong_with_it() {
    let long = "n".repeat(128);
    for (value, part) in [
        (
            json!({"name": "a/b"}),
            r#"cannot name a device "a/b": it has the character '/'"#,
        ),
        (
            json!({"name": long}),
            "it has 128 bytes, the kernel keeps 127",
        ),
        (
            json!({"name": 7}),
            "invalid type: integer `7`, expected a string",
        ),
        (
            json!({"uuid": "LVM-1"}),
            r#""LVM-1" is not a uuid of a dmsnap device"#,
        ),
        (
            json!({"dev": "254"}),
            r#""254" is not a device number (major:minor)"#,
        ),
        (
            json!({"device": ["/dev/dm-3"]}),
            "invalid type: sequence, expected path string",
        ),
        (
            json!({"origin": {"size_bytes": 1}}),
            "missing field `mtime_ns`",
        ),
        (
            json!(7),
            "invalid type: integer `7`, expected struct Handles",
        ),
    ] {
        let error = from_str::<Handles>(&value.to_string()).expect_err("wrong");
        let message = error.to_string();
        assert!(message.contains(part), "{value}: {message}");
        assert_eq!(message.lines().count(), 1);
    }
    for value in [json!({"cow_loop": 7}), json!({"cow_loop": {"diskseq": 1}})] {
        assert!(from_str::<Handles>(&value.to_string()).is_err(), "{value}");
    }
}

#[test]
fn words_and_numbers_are_plain() {
    let text = |value: serde_json::Result<String>| value.expect("serialises");
    assert_eq!(
        text(to_string(&STORES)),
        r#"["persistent","persistent-overflow","transient"]"#
    );
    let states = [State::NoTable, State::Loaded, State::Live, State::Suspended];
    assert_eq!(
        text(to_string(&states)),
        r#"["no-table","loaded","live","suspended"]"#
    );
    let Ok(SnapshotStatus::Usage(usage)) = "16/2048 8".parse() else {
        panic!("a usage line");
    };
    assert_eq!(
        text(to_string(&usage)),
        r#"{"allocated":16,"total":2048,"metadata":8}"#
    );
    assert_eq!(text(to_string(&ChunkSize::DEFAULT)), "8");
    let error = from_str::<ChunkSize>("24").expect_err("no power of two");
    assert!(
        error
            .to_string()
            .starts_with("cannot use chunks of 24 sectors"),
        "{error}"
    );
}

fn loop_handles() -> impl Strategy<Value = LoopHandle> {
    let backing = (device_numbers(), any::<u64>()).prop_map(|(dev, inode)| FileId { dev, inode });
    let parts = (
        "\\PC{1,20}",
        any::<Option<u64>>(),
        prop::option::of(backing),
    );
    parts.prop_map(|(path, diskseq, backing)| {
        let mut handle = LoopHandle::at(path);
        handle.diskseq = diskseq;
        handle.backing = backing;
        handle
    })
}

fn handles() -> impl Strategy<Value = Handles> {
    use prop::option::of;
    let device = (of(names()), of(uuids()), of(device_numbers()));
    let paths = (of("\\PC{1,20}"), of("\\PC{1,20}"));
    let loops = (of(loop_handles()), of(loop_handles()));
    let origin = of((any::<u64>(), any::<i64>()));
    (device, paths, loops, origin).prop_map(|(device, paths, loops, origin)| {
        let mut handles = Handles::default();
        (handles.name, handles.uuid, handles.dev) = device;
        (handles.device, handles.mapper) = (paths.0.map(Into::into), paths.1.map(Into::into));
        (handles.cow_loop, handles.origin_loop) = loops;
        handles.origin = origin.map(|(size_bytes, mtime_ns)| OriginIdentity {
            size_bytes,
            mtime_ns,
        });
        handles
    })
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn handles_read_back_as_they_were_written(handles in handles()) {
        let text = to_string(&handles).expect("serialises");
        prop_assert_eq!(from_str::<Handles>(&text).expect("reads back"), handles);
    }
}

#[test]
fn timings_are_printed_in_nanoseconds_with_the_steps_in_words() {
    let (_, timings) = dmsnap::timings::Timings::of(|| dmsnap::remove("/nowhere/dm-0"));
    let printed = serde_json::to_value(&timings).expect("JSON");
    let took = printed["calls"][0]["took_ns"].as_u64();
    let start = printed["calls"][0]["start_ns"].as_u64();
    let expected = json!({
        "total_ns": u64::try_from(timings.total.as_nanos()).expect("not long"),
        "waited_ns": 0,
        "calls": [{"step": "query", "on": "/nowhere/dm-0", "start_ns": start, "took_ns": took, "errno": 2}],
    });
    assert_eq!(printed, expected);
    assert!(took.is_some() && start.is_some());
}

#[test]
fn what_a_snapshot_is_reads_back_as_it_was_written() {
    let info = json!({
        "name": "vm-42", "uuid": "DMSNAP-42", "dev": "254:3", "device": "/dev/dm-3", "state": "live", "merging": false,
        "deferred_remove": false,
        "interrupted": false, "open_count": 1,
        "params": {"origin": "7:0", "cow": "7:1", "store": "persistent", "chunk_sectors": 8, "discard": "unsupported"},
        "origin": null,
        "cow": {"device": "/dev/loop1", "path": "/run/vm-42.cow", "backing": {"dev": "0:25", "inode": 7},
            "diskseq": 9, "part_bytes": [0, 0], "autoclear": true},
        "status": {"usage": {"allocated": 16, "total": 2048, "metadata": 16}},
    });
    let read: SnapshotInfo = serde_json::from_value(info.clone()).expect("it reads");
    assert_eq!(read.device, Path::new("/dev/dm-3"));
    assert_eq!(serde_json::to_value(&read).expect("serialises"), info);
    for (status, text) in [
        (SnapshotStatus::Invalid, json!("invalid")),
        (SnapshotStatus::Overflow, json!("overflow")),
        (SnapshotStatus::MergeFailed, json!("merge-failed")),
        (
            SnapshotStatus::Unknown("x".to_owned()),
            json!({"unknown": "x"}),
        ),
    ] {
        assert_eq!(serde_json::to_value(status).expect("serialises"), text);
    }
}

#[test]
fn a_tree_is_nested_objects_each_with_its_kind() {
    let device = |name: &str, uuid: &str| {
        json!({
            "name": name, "uuid": uuid, "dev": "254:3", "device": "/dev/dm-3", "state": "live", "merging": false,
            "deferred_remove": true, "interrupted": false, "open_count": 1, "params": null, "origin": null, "cow": null,
            "status": null,
        })
    };
    let node = |mut what: serde_json::Value, above: serde_json::Value| {
        what["size_bytes"] = json!(4096);
        what["above"] = above;
        what
    };
    let kind = |mut what: serde_json::Value, kind: &str| {
        what["kind"] = json!(kind);
        what
    };
    let disk = node(kind(device("vm", "DMSNAP-2"), "snapshot"), json!([]));
    let layer = node(kind(device("noon", "DMSNAP-1"), "layer"), json!([disk]));
    let image =
        json!({"kind": "image", "path": "/base.img", "backing": {"dev": "8:1", "inode": 7}});
    let tree = node(image, json!([layer]));
    let read: TreeNode = serde_json::from_value(tree.clone()).expect("it reads");
    assert_eq!(read.above[0].name(), Some("noon"));
    assert!(matches!(read.above[0].above[0].what, Standing::Snapshot(_)));
    assert_eq!(serde_json::to_value(&read).expect("serialises"), tree);
    for (what, text) in [
        (
            json!({"kind": "device", "dev": "253:0"}),
            r#"Device { dev: "#,
        ),
        (json!({"kind": "nothing"}), "Nothing"),
    ] {
        let read: TreeNode = serde_json::from_value(node(what, json!([]))).expect("it reads");
        assert!(format!("{:?}", read.what).starts_with(text));
    }
    let flattened = json!({"bytes": 12288, "changed_bytes": 4096, "written_bytes": 4096});
    let read: Flattened = serde_json::from_value(flattened.clone()).expect("it reads");
    assert_eq!(serde_json::to_value(read).expect("serialises"), flattened);
}

#[test]
fn outcomes_events_and_errors_are_flat_objects() {
    fn printed(value: &impl serde::Serialize) -> serde_json::Value {
        serde_json::to_value(value).expect("serialises")
    }
    let bad = dmsnap::Error::from(DeviceName::new("a/b").expect_err("no name"));
    let error = printed(&bad);
    assert_eq!(
        (&error["kind"], &error["errno"]),
        (&json!("bad-request"), &json!(null))
    );
    assert_eq!(error["message"], bad.one_line());
    assert_eq!(error["left"], json!([]));
    assert_eq!(
        printed(&Fate::Busy { open_count: 2 }),
        json!({"fate": "busy", "open_count": 2})
    );
    assert_eq!(
        printed(&Outcome::AlreadyGone),
        json!({"outcome": "already-gone"})
    );
    let merged_bytes = 4096;
    assert_eq!(
        printed(&MergeOutcome::Complete { merged_bytes }),
        json!({"outcome": "complete", "merged_bytes": 4096})
    );
    assert_eq!(printed(&Change::Gone), json!({"event": "gone"}));
    let usage = Usage::default();
    assert_eq!(
        printed(&Change::Above(usage)),
        json!({"event": "above", "usage": {"allocated": 0, "total": 0, "metadata": 0}})
    );
    assert_eq!(
        printed(&Change::Unreadable(bad))["error"]["kind"],
        json!("bad-request")
    );
}
