//! A layer: what a snapshot had at one moment, for any number of snapshots over it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::build::{MappedDevice, load, undone};
use super::create::{link, open_controls};
use super::origin::MadeNode;
use super::{Base, CheckpointOptions, Origin};
use crate::backing::{Attached, Backing, attach, loop_length, open_layer_cow, probe_store};
use crate::base::{
    ChunkSize, DeviceId, DeviceName, DeviceNumber, DeviceUuid, FileId, Handles, MAPPER_DIR,
    SectorSize, Sectors, Store,
};
use crate::call::ask;
use crate::dm::{Address, Discard, SnapshotParams, Target, TargetLine};
use crate::error::{LayerRefusal, Result, Step};
use crate::find::{bound, find, reach};
use crate::kernel::{DevId, FileFacts, FileKind, Host, LO_AUTOCLEAR, LoopDevice, MACHINE};
use crate::store::{self, CHAIN_AT, Chain};

/// What a snapshot had when it was frozen: a dm device that never changes again.
///
/// [`CheckpointOptions`](super::CheckpointOptions) makes one of a live snapshot, which goes on over it. A snapshot over
/// [`origin`](Self::origin) is a fork: it begins with what the layer has, and costs what any snapshot over a shared image
/// does. A pool over it hands out forks.
///
/// It belongs to the kernel, and goes with its last user, a snapshot over it or a value of this type, unless it is to be
/// kept. It has a link below /dev/mapper if it is kept.
/// [`attach_layer`](super::CheckpointOptions::attach_layer) makes it once more from its COW file, which has to
/// stay, and to stay as it is, for as long as there is a snapshot over it.
#[derive(Clone, Debug)]
pub struct Layer {
    pub(super) origin: Origin,
    pub(super) handles: Handles,
}

impl Layer {
    /// Finds a layer that is there, by its dm device, and holds it.
    ///
    /// # Errors
    ///
    /// Those of [`status`](crate::status); [`LayerRefusal::NotALayer`] for any other device of dmsnap's;
    /// [`Refusal::FileElsewhere`](crate::error::Refusal::FileElsewhere) when its COW file cannot be reached by the path
    /// that the kernel has for it.
    pub fn open(device: impl Into<DeviceId>) -> Result<Self> {
        open(&MACHINE, &device.into()).map(Self::over)
    }

    pub(super) fn over((base, handles): (Base<LoopDevice>, Handles)) -> Self {
        Self {
            origin: Origin(Arc::new(base)),
            handles,
        }
    }

    /// Returns what snapshots are made over, by [`create_on`](crate::SnapshotOptions::create_on) or a
    /// [`Pool`](crate::Pool): [`Origin::path`] and [`Origin::device`] are the layer's node, [`Origin::identity`] is that
    /// of the image at the bottom.
    #[must_use]
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Returns the handles to store. [`cleanup`](crate::cleanup()) takes a kept layer down when nobody stands on it any
    /// more: neither a snapshot nor a value of this type. So clone them, drop the value, and clean up the disks over it
    /// first.
    #[must_use]
    pub fn handles(&self) -> &Handles {
        &self.handles
    }
}

/// Opens the layer that `id` means, which keeps it there.
pub(super) fn open<H: Host>(host: &H, id: &DeviceId) -> Result<(Base<H::Loop>, Handles)> {
    open_with_file(host, id).map(|(base, handles, _)| (base, handles))
}

/// The same, and which file it has.
pub(super) fn open_with_file<H: Host>(
    host: &H,
    id: &DeviceId,
) -> Result<(Base<H::Loop>, Handles, FileId)> {
    let (device, uuid) = find(host, id)?;
    let name = device.name.clone();
    let path = Path::new(MAPPER_DIR).join(&name);
    let node = host
        .find_node(device.number)
        .unwrap_or_else(|| path.clone());
    let no_layer = || LayerRefusal::NotALayer { name: name.clone() };
    uuid.layer().ok_or_else(no_layer)?;
    let open = hold(host, &node)?;
    let table = ask(Step::Status, &path, || {
        host.table(DevId::Uuid(&uuid), false)
    })?;
    let Some(Ok(Target::Snapshot(params))) = table.map(|(kind, text)| Target::parse(&kind, &text))
    else {
        return Err(no_layer().into());
    };
    let cow = bound(host, params.cow)?;
    let (file, facts) = reach(host, &cow, &name, false)?;
    let store = Backing {
        path: &cow.path,
        file,
        facts,
        above: None,
    };
    let chain = probe_store(host, &store)?.and_then(|header| header.chain);
    let depth = chain.ok_or_else(no_layer)?.depth;
    let handles = Handles {
        name: DeviceName::new(name.as_str()).ok(),
        dev: Some(device.number),
        device: Some(node.clone()),
        mapper: Some(path),
        origin: uuid.origin(),
        uuid: Some(uuid.clone()),
        ..Handles::default()
    };
    let base = base(host, node, &uuid, device.number, depth, open)?;
    Ok((base, handles, store.facts.id))
}

/// Makes the layer of that COW file once more.
pub(super) fn attach_layer<H: Host>(
    host: &H,
    below: &Base<H::Loop>,
    cow: &Path,
    name: &DeviceName,
    options: &CheckpointOptions,
) -> Result<(Base<H::Loop>, Handles)> {
    open_controls(host)?;
    let image = below.image();
    let take = || Ok(below.content());
    let evidence = below.evidence(&take, None);
    let (cow, header, chain) = open_layer_cow(host, cow, &image, evidence, &options.cow)?;
    attach_file(host, below, &cow, header.chunk, chain, name, options.keep)
}

/// Attaches a layer's COW file, which was looked at, and makes its device.
pub(super) fn attach_file<H: Host>(
    host: &H,
    below: &Base<H::Loop>,
    cow: &Backing<'_, H::File>,
    chunk: ChunkSize,
    chain: Chain,
    name: &DeviceName,
    keep: bool,
) -> Result<(Base<H::Loop>, Handles)> {
    let image = below.image();
    let mut handles = Handles {
        origin: Some(image.identity()),
        ..Handles::default()
    };
    let mut attached = || {
        let flags = LO_AUTOCLEAR;
        let sectors = SectorSize::default();
        // Open, and with it locked, to the end.
        let cow_loop = attach(host, cow, flags, sectors, cow.path, &mut handles.cow_loop)?;
        let origin = below.over();
        let line = TargetLine {
            start: Sectors::default(),
            length: origin.length,
            target: Target::Snapshot(SnapshotParams {
                origin: origin.device,
                cow: cow_loop.dev,
                store: Store::Persistent,
                chunk,
                discard: Discard::Unsupported,
            }),
        };
        let identity = image.identity();
        let uuid = DeviceUuid::of_layer(chain.id, identity, cow_loop.number, keep);
        let mapper = name.mapper_path();
        let dev = ask(Step::Create, &mapper, || host.create(name, &uuid))?;
        let made = MappedDevice {
            name: name.clone(),
            uuid,
            mapper,
            dev,
        };
        made.note(&mut handles);
        load(host, &made, &line)?;
        if !chain.frozen {
            // Its checkpoint was cut off behind the pause.
            let mark = store::chain(Chain {
                frozen: true,
                ..chain
            });
            ask(Step::MarkFile, cow.path, || {
                host.write_at(&cow.file, &mark, CHAIN_AT)
            })?;
        }
        ask(Step::Resume, &made.mapper, || host.resume(&made.uuid))?;
        let device = match host.find_node(made.dev) {
            Some(node) if !keep => node,
            _ => link(host, &made)?,
        };
        let open = hold(host, &device)?;
        // Its mark says how many were below it once: some may be one by now.
        let depth = below.above.map_or(0, |above| above.depth);
        let made_base = base(host, device.clone(), &made.uuid, dev, depth, open)?;
        if !keep {
            // It is open here, so this is for later.
            let address = Address::Uuid(made.uuid.as_str());
            ask(Step::Remove, &made.mapper, || host.remove(address, true))?;
        }
        handles.device = Some(device);
        Ok(made_base)
    };
    match attached() {
        Ok(base) => Ok((base, handles)),
        Err(error) => Err(undone(host, error, &handles)),
    }
}

/// Opens the dm device, which keeps it from being removed.
pub(super) fn hold<H: Host>(host: &H, node: &Path) -> Result<H::Loop> {
    ask(Step::OpenFile, node, || host.open_loop(node, false))
}

/// What a snapshot over the layer is made over, from the layer's open device. `depth` is how many are below the layer.
pub(super) fn base<H: Host>(
    host: &H,
    path: PathBuf,
    uuid: &DeviceUuid,
    number: DeviceNumber,
    depth: u32,
    device: H::Loop,
) -> Result<Base<H::Loop>> {
    let refusal = || LayerRefusal::NotALayer {
        name: path.display().to_string(),
    };
    let (id, facts) = uuid.layer().zip(facts(uuid, number)).ok_or_else(refusal)?;
    let device = Attached {
        path: number.dm_node(),
        number: number.minor(),
        dev: number,
        device,
    };
    Ok(Base {
        length: loop_length(host, &device)?,
        path,
        facts,
        content: None,
        digest: None,
        device,
        _node: MadeNode,
        handle: None,
        above: Some(Chain {
            parent: id,
            depth: depth + 1,
            ..Chain::default()
        }),
    })
}

/// A device of ours as an origin, with what is known of the image at the bottom; `None` when that is nothing.
pub(super) fn facts(uuid: &DeviceUuid, number: DeviceNumber) -> Option<FileFacts> {
    let origin = uuid.origin()?;
    Some(FileFacts {
        id: FileId {
            dev: number,
            inode: 0,
        },
        kind: FileKind::BlockDevice(number),
        mode: 0o600,
        size_bytes: origin.size_bytes,
        mtime_ns: origin.mtime_ns,
        links: 1,
        read_only: false,
        has_blocks: true,
    })
}
