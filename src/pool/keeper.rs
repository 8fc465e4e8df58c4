//! A pool's keeper: the dm device that marks the pool as alive.

use std::fmt;
use std::path::Path;

use crate::backing::{Backing, attach};
use crate::base::{ChunkSize, DeviceName, Handles, Kind, SectorSize, Sectors, Store};
use crate::call::ask;
use crate::dm::{Discard, SnapshotParams, Target, TargetLine};
use crate::error::{Result, Retry, Step};
use crate::kernel::Host;
use crate::kernel::LO_AUTOCLEAR;
use crate::snapshot::{Base, MappedDevice, link, load, make_device, undone};
use crate::teardown;

/// The size in bytes of the keeper's COW file, in which nothing is ever written.
const COW_BYTES: u64 = 64 << 10;

/// A dm device without data that the pool's process has open as long as it lives: by that, others know that the pool is
/// alive.
///
/// It also makes removals on the host faster. From Linux 6.12 on, removing the last device with tables of a kind frees
/// the slab of their bios, and waits for a grace period or two (`bio_put_slab`, `block/bio.c`). The keeper has an
/// `error` table live and a snapshot's table loaded, which is never resumed, so that no other device is ever the last.
pub(crate) struct Keeper<H: Host> {
    pub(crate) made: MappedDevice,
    handles: Handles,
    open: H::File,
}

impl<H: Host> fmt::Debug for Keeper<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.made.fmt(f)
    }
}

pub(crate) fn make<H: Host>(
    host: &H,
    base: &Base<H::Loop>,
    name: &DeviceName,
) -> Result<Keeper<H>> {
    let mut handles = Handles::default();
    build(host, base, name, &mut handles).map_err(|error| undone(host, error, &handles))
}

fn build<H: Host>(
    host: &H,
    base: &Base<H::Loop>,
    name: &DeviceName,
    handles: &mut Handles,
) -> Result<Keeper<H>> {
    let path = Path::new("memfd:dmsnap");
    let file = ask(Step::MakeFile, path, || host.make_memory_file())?;
    ask(Step::SizeFile, path, || {
        host.size_file(&file, COW_BYTES, false)
    })?;
    let facts = ask(Step::InspectFile, path, || host.inspect_file(&file))?;
    let cow = Backing {
        path,
        file,
        facts,
        above: None,
    };
    // Its lock tells sweeps that the pool is alive, until the keeper's node is open.
    let cow_loop = attach(
        host,
        &cow,
        LO_AUTOCLEAR,
        SectorSize::Bytes512,
        path,
        &mut handles.cow_loop,
    )?;
    let identity = base.image().identity();
    let line = |target| TargetLine {
        start: Sectors::default(),
        length: base.over().length,
        target,
    };
    let kind = Kind::Shared;
    let error = line(Target::Error);
    let made = make_device(host, name, identity, kind, &cow_loop, &error, handles)?;
    ask(Step::Resume, &made.mapper, || host.resume(&made.uuid))?;
    let params = SnapshotParams {
        origin: base.over().device,
        cow: cow_loop.dev,
        store: Store::Transient,
        chunk: ChunkSize::default(),
        discard: Discard::Unsupported,
    };
    load(host, &made, &line(Target::Snapshot(params)))?;
    let node = link(host, &made)?;
    let open = ask(Step::OpenFile, &node, || host.open_backing(&node, false))?;
    Ok(Keeper {
        made,
        handles: handles.clone(),
        open,
    })
}

impl<H: Host> Keeper<H> {
    pub(crate) fn remove(self, host: &H, retry: &Retry) -> Result<()> {
        drop(self.open);
        teardown::clean(host, &self.handles, retry).map(drop)
    }
}
