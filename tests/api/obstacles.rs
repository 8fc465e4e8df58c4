//! What a user reads of the refusals that have reasons of their own: what is in the way, and what has to do with layers.

use dmsnap::error::{AdoptObstacle, ExportObstacle, FreezeObstacle, LayerRefusal, RepairObstacle};

use super::messages::{variant, variants};
use super::*;

const FREEZE: [(FreezeObstacle, &str); 10] = [
    (
        FreezeObstacle::Transient,
        r#"cannot freeze "vm-42": its store is transient"#,
    ),
    (
        FreezeObstacle::Suspended,
        r#"cannot freeze "vm-42": it is suspended"#,
    ),
    (
        FreezeObstacle::InactiveTable,
        r#"cannot freeze "vm-42": it is about to get another table"#,
    ),
    (
        FreezeObstacle::Layer,
        r#"cannot freeze "vm-42": it is a layer"#,
    ),
    (
        FreezeObstacle::Pooled,
        r#"cannot freeze "vm-42": its device is a pool's"#,
    ),
    (
        FreezeObstacle::NoHeader,
        r#"cannot freeze "vm-42": its store has no header"#,
    ),
    (
        FreezeObstacle::ImageUnknown,
        r#"cannot freeze "vm-42": its image is not known"#,
    ),
    (
        FreezeObstacle::TooDeep,
        r#"cannot freeze "vm-42": it stands on as many layers as a stack may have"#,
    ),
    (
        FreezeObstacle::OwnFileSystem,
        r#"cannot freeze "vm-42": the new COW file is on its own file system"#,
    ),
    (
        FreezeObstacle::TableTaken,
        r#"cannot freeze "vm-42": its new table was taken away meanwhile"#,
    ),
];

const EXPORT: [(ExportObstacle, &str); 4] = [
    (
        ExportObstacle::Transient,
        r#"cannot export "vm-42" live: its store is transient"#,
    ),
    (
        ExportObstacle::Suspended,
        r#"cannot export "vm-42" live: it is suspended"#,
    ),
    (
        ExportObstacle::NoLiveTable,
        r#"cannot export "vm-42" live: it has no live table"#,
    ),
    (
        ExportObstacle::LoopsUnreadable,
        r#"cannot export "vm-42" live: its loop devices cannot be read"#,
    ),
];

const REPAIR: [(RepairObstacle, &str); 5] = [
    (
        RepairObstacle::TableGone,
        r#"cannot repair "vm-42": the table that it was to go on with is gone"#,
    ),
    (
        RepairObstacle::LayerWithoutTable,
        r#"cannot repair "vm-42": the layer that it stands on has no table"#,
    ),
    (
        RepairObstacle::TableUnreadable,
        r#"cannot repair "vm-42": its own table cannot be read"#,
    ),
    (
        RepairObstacle::WriteFailed,
        r#"cannot repair "vm-42": a write failed while the layer that it stands on could not be read"#,
    ),
    (
        RepairObstacle::ImageUnknown,
        r#"cannot repair "vm-42": its image is not known"#,
    ),
];

fn adopt() -> [(AdoptObstacle, &'static str); 5] {
    let number = DeviceNumber::new(253, 7).expect("within bounds");
    [
        (
            AdoptObstacle::NoLiveTable,
            r#"cannot adopt "vm-42": it has no live table"#,
        ),
        (
            AdoptObstacle::Target {
                target: "linear".to_owned(),
            },
            r#"cannot adopt "vm-42": its target is linear"#,
        ),
        (
            AdoptObstacle::OriginNotALoop { number },
            r#"cannot adopt "vm-42": its origin 253:7 is no loop device"#,
        ),
        (
            AdoptObstacle::CowNotALoop { number },
            r#"cannot adopt "vm-42": its COW device 253:7 is no loop device"#,
        ),
        (
            AdoptObstacle::TableChanged,
            r#"cannot adopt "vm-42": it has another table by now"#,
        ),
    ]
}

fn layers() -> Vec<(LayerRefusal, &'static str)> {
    let image = || Path::new("/images/base.ext4").to_owned();
    let cow = || Path::new("/run/vm 42.cow").to_owned();
    vec![
        (
            LayerRefusal::Frozen {
                path: "/run/vm 42.cow".into(),
            },
            r#"COW file "/run/vm 42.cow" is a layer's, and never to be written again"#,
        ),
        (
            LayerRefusal::NotFrozen {
                path: "/run/vm 42.cow".into(),
            },
            r#"COW file "/run/vm 42.cow" is no layer's"#,
        ),
        (
            LayerRefusal::Twice {
                first: cow(),
                second: image(),
            },
            r#"COW files "/run/vm 42.cow" and "/images/base.ext4" are of one and the same layer"#,
        ),
        (
            LayerRefusal::Apart {
                first: cow(),
                second: image(),
            },
            r#"COW files "/run/vm 42.cow" and "/images/base.ext4" were made over the same, and are of two stacks"#,
        ),
        (
            LayerRefusal::Missing { cow: cow() },
            r#"the layer that COW file "/run/vm 42.cow" was made over is missing"#,
        ),
        (
            LayerRefusal::TooDeep {
                layers: 33,
                most: 32,
            },
            "a stack of 33 layers: at most 32 are taken, unless more are asked for",
        ),
        (
            LayerRefusal::Foreign {
                cow: "/run/vm 42.cow".into(),
                origin: "/dev/mapper/noon".into(),
            },
            r#"COW file "/run/vm 42.cow" was not made over "/dev/mapper/noon", but over another layer or image"#,
        ),
        (
            LayerRefusal::NotALayer {
                name: "vm-42".to_owned(),
            },
            r#""vm-42" is no layer"#,
        ),
        (
            LayerRefusal::NotOnLayer {
                name: "vm-42".to_owned(),
            },
            r#""vm-42" stands on no layer"#,
        ),
    ]
}

/// Every variant of the enum in the source has a message.
fn all_are_told<T: std::fmt::Debug>(source: &str, name: &str, told: &[(T, &str)]) {
    for wanted in variants(source, &format!("pub enum {name} {{")) {
        let seen = told.iter().any(|(each, _)| variant(each) == wanted);
        assert!(seen, "{name}::{wanted} has no golden message");
    }
}

/// All of these refusals, with what a user reads.
pub(crate) fn refusals() -> Vec<(Refusal, &'static str)> {
    let source = include_str!("../../src/error/obstacle.rs");
    all_are_told(source, "FreezeObstacle", &FREEZE);
    all_are_told(source, "ExportObstacle", &EXPORT);
    all_are_told(source, "RepairObstacle", &REPAIR);
    all_are_told(source, "AdoptObstacle", &adopt());
    let source = include_str!("../../src/error/layer_refusal.rs");
    all_are_told(source, "LayerRefusal", &layers());

    let name = || "vm-42".to_owned();
    let freeze = FREEZE.map(|(why, text)| (Refusal::NotFreezable { name: name(), why }, text));
    let export = EXPORT.map(|(why, text)| (Refusal::NotExportable { name: name(), why }, text));
    let repair = REPAIR.map(|(why, text)| (Refusal::Irreparable { name: name(), why }, text));
    let adopt = adopt().map(|(why, text)| (Refusal::NotAdoptable { name: name(), why }, text));
    let layers = layers().into_iter();
    let layers = layers.map(|(layer, text)| (Refusal::from(layer), text));
    let all = freeze.into_iter().chain(export).chain(repair);
    all.chain(adopt).chain(layers).collect()
}
