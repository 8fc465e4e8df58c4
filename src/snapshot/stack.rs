//! The story of a stack that is put together again from its files: all of them judged, then a layer made of each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::build::undone;
use super::create::open_controls;
use super::layer::{attach_file, open_with_file};
use super::{Base, Layer, Origin};
use crate::backing::{
    Backing, Ground, Place, Reader, admit_file, check_header, in_order, open_cow_file,
    open_unlocked, probe_store, shallow, unsound, valid,
};
use crate::base::{DeviceId, DeviceName, DeviceUuid, FileId, Handles};
use crate::call::{absent, ask, patiently};
use crate::dm::Address;
use crate::error::{Error, LayerRefusal, Refusal, Result, Retry, Step, Verdict};
use crate::find::layers_of;
use crate::kernel::{Host, MACHINE};
use crate::store::{Chain, ExceptionStore, Header};

/// Options for putting a stack of layers together again from its COW files, after a reboot or on another host, and the
/// call that does it.
///
/// ```no_run
/// use dmsnap::snapshot::StackOptions;
/// use dmsnap::{Origin, SnapshotOptions};
///
/// let image = Origin::open("/images/base.ext4")?;
/// let noon = StackOptions::new()
///     .keep(true)
///     .open(&image, ["/vms/42.1.cow", "/vms/42.0.cow"], "vm-42-noon")?;
/// SnapshotOptions::new().create_on(noon.origin(), "/vms/42.2.cow", "vm-42")?;
/// # Ok::<(), dmsnap::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StackOptions {
    keep: bool,
    any_depth: bool,
    deadline: Duration,
}

impl Default for StackOptions {
    fn default() -> Self {
        Self {
            keep: false,
            any_depth: false,
            deadline: Duration::from_secs(5),
        }
    }
}

impl StackOptions {
    /// Makes the default options: layers that go with their last user, at most 32 of them, and up to 5 seconds for
    /// whoever puts the same ones together just now.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether the topmost layer stays when nobody stands on it any more, until it is removed. The others go with
    /// it.
    pub fn keep(&mut self, keep: bool) -> &mut Self {
        self.keep = keep;
        self
    }

    /// Sets whether more than 32 layers are taken: a read may have to go through all of them.
    pub fn any_depth(&mut self, any_depth: bool) -> &mut Self {
        self.any_depth = any_depth;
        self
    }

    /// Sets for how long another process that has one of the files is waited for, 5 seconds unless set: it may be making
    /// the same layer.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.deadline = deadline;
        self
    }

    /// Makes the layers of the COW files `cows`, given in whatever order, and returns the topmost one, `name`. Those
    /// below it are called `name.1`, `name.2` and so on from the bottom up. `origin` is the image that the lowest was
    /// made over, or a copy of it with another modification time, or the layer that it was made over.
    ///
    /// All files are judged before anything is attached: their order is in their marks. A layer that is there already,
    /// as under another disk, is used as it is, with the name that it has; if it is the topmost, it is the answer, kept
    /// or not as it was made.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with nothing done, and the file's name in it: [`LayerRefusal::Missing`],
    /// [`LayerRefusal::Foreign`] and [`LayerRefusal::Apart`] for files that are not one stack over this origin,
    /// [`LayerRefusal::Twice`], [`LayerRefusal::NotFrozen`], [`Refusal::CowInUse`], [`Refusal::OriginChanged`],
    /// [`Refusal::CowUnsound`] for one that was cut short, [`LayerRefusal::TooDeep`].
    /// [`Error::Failed`] names the first step that failed; what was attached is gone again, or in [`Error::Debris`].
    pub fn open<P: AsRef<Path>>(
        &self,
        origin: &Origin,
        cows: impl IntoIterator<Item = P>,
        name: &str,
    ) -> Result<Layer> {
        let name = DeviceName::given(name)?;
        let cows: Vec<_> = cows
            .into_iter()
            .map(|cow| cow.as_ref().to_owned())
            .collect();
        open_stack(&MACHINE, self, &origin.0, &cows, &name).map(Layer::over)
    }
}

/// A COW file that was judged: it is one of this stack.
struct Judged<'a> {
    path: &'a Path,
    file: FileId,
    header: Header,
    chain: Chain,
}

pub(crate) fn open_stack<H: Host>(
    host: &H,
    options: &StackOptions,
    ground: &Base<H::Loop>,
    cows: &[PathBuf],
    name: &DeviceName,
) -> Result<(Base<H::Loop>, Handles)> {
    let names = names(name, cows.len())?;
    open_controls(host)?;
    let stack = judge(host, options, ground, cows)?;
    let mut made: Vec<Made<H>> = Vec::with_capacity(stack.len());
    // What is under a layer that is there is there too.
    for (nth, judged) in stack.iter().enumerate().rev() {
        if let Some((base, handles)) = there(host, judged)? {
            made.push(Made {
                nth,
                base,
                handles,
                own: false,
            });
            break;
        }
    }
    let first = made.first().map_or(0, |there| there.nth + 1);
    for (nth, judged) in stack.iter().enumerate().skip(first) {
        let below = made.last().map_or(ground, |made| &made.base);
        let keep = options.keep && nth + 1 == stack.len();
        match add(host, options, below, judged, &names[nth], keep) {
            Ok((base, handles, own)) => made.push(Made {
                nth,
                base,
                handles,
                own,
            }),
            Err(error) => return Err(undo(host, error, made)),
        }
    }
    match made.pop() {
        Some(top) => Ok((top.base, top.handles)),
        None => Err(LayerRefusal::NotALayer {
            name: name.to_string(),
        }
        .into()),
    }
}

/// A layer of the stack, open.
struct Made<H: Host> {
    nth: usize,
    base: Base<H::Loop>,
    handles: Handles,
    /// Whether it was made here.
    own: bool,
}

/// Whether somebody else uses the layer by now: with that one it goes.
fn is_used<H: Host>(host: &H, handles: &Handles) -> bool {
    let (path, uuid) = (handles.path().unwrap_or_default(), handles.uuid.as_ref());
    let query = |uuid: &DeviceUuid| {
        let query = || host.query(Address::Uuid(uuid.as_str()));
        absent(ask(Step::Query, &path, query)).ok().flatten()
    };
    uuid.and_then(query)
        .is_some_and(|device| device.open_count > 0)
}

/// From the top down, each as its last user.
fn undo<H: Host>(host: &H, error: Error, mut made: Vec<Made<H>>) -> Error {
    let mut error = error;
    while let Some(Made {
        base, handles, own, ..
    }) = made.pop()
    {
        drop(base);
        if own && !is_used(host, &handles) {
            error = undone(host, error, &handles);
        }
    }
    error
}

/// The topmost layer has the name; those below have their place behind it.
fn names(name: &DeviceName, files: usize) -> Result<Vec<DeviceName>> {
    let name_of = |nth: usize| match nth == files {
        true => Ok(name.clone()),
        false => Ok(DeviceName::given(&format!("{name}.{nth}"))?),
    };
    (1..=files).map(name_of).collect()
}

/// Holds every file against its mark, the others' and the origin, from the bottom up.
fn judge<'a, H: Host>(
    host: &H,
    options: &StackOptions,
    ground: &Base<H::Loop>,
    cows: &'a [PathBuf],
) -> Result<Vec<Judged<'a>>> {
    let image = ground.image();
    let mut read = Vec::with_capacity(cows.len());
    for path in cows {
        let file = open_unlocked(host, path)?;
        admit_file(&file, &image)?;
        let not_frozen = || LayerRefusal::NotFrozen { path: path.clone() };
        let header = probe_store(host, &file)?.ok_or_else(not_frozen)?;
        let header = valid(&file, header)?;
        let chain = header.chain.filter(|chain| chain.id != 0);
        let chain = chain.ok_or_else(not_frozen)?;
        read.push((file, header, chain));
    }
    let place = |(file, _, chain): &(Backing<'a, H::File>, Header, Chain)| Place {
        path: file.path,
        chain: *chain,
    };
    let places: Vec<_> = read.iter().map(place).collect();
    let on = Ground {
        path: image.path,
        id: image.above.map_or(0, |above| above.parent),
    };
    let order = in_order(&places, Some(on))?;
    shallow(
        cows.len(),
        ground.above.map_or(0, |above| above.depth),
        options.any_depth,
    )?;
    let take = || Ok(ground.content());
    let evidence = ground.evidence(&take, None);
    let length = ground.over().length;
    let mut stack = Vec::with_capacity(order.len());
    for (nth, index) in order.into_iter().enumerate() {
        let (file, header, chain) = &read[index];
        if nth == 0 {
            check_header(&image, file, header, evidence, false)?;
        }
        let store = ExceptionStore::open(Reader::of(host, file));
        let read = store.and_then(|store| store.over(length).summary());
        read.map_err(|error| unsound(file.path, error))?;
        stack.push(Judged {
            path: file.path,
            file: file.facts.id,
            header: *header,
            chain: *chain,
        });
    }
    Ok(stack)
}

/// The layer of this very file, if it is there.
fn there<H: Host>(host: &H, judged: &Judged<'_>) -> Result<Option<(Base<H::Loop>, Handles)>> {
    for uuid in layers_of(host, judged.chain.id)? {
        match open_with_file(host, &DeviceId::from(&uuid)) {
            Ok((base, handles, file)) if file == judged.file => return Ok(Some((base, handles))),
            // Half made, or of a copy of the file that has been moved.
            Ok(_)
            | Err(Error::Refused(
                Refusal::Layer(LayerRefusal::NotALayer { .. }) | Refusal::FileElsewhere { .. },
            )) => (),
            // Its node comes with its first resume.
            Err(error) if error.verdict() == Some(Verdict::Missing) => (),
            Err(error) => drop(absent(Err::<(), _>(error))?),
        }
    }
    Ok(None)
}

/// Makes the layer of the file, or uses the one that somebody else has made meanwhile; says which.
fn add<H: Host>(
    host: &H,
    options: &StackOptions,
    below: &Base<H::Loop>,
    judged: &Judged<'_>,
    name: &DeviceName,
    keep: bool,
) -> Result<(Base<H::Loop>, Handles, bool)> {
    let path = || judged.path.to_owned();
    let file = open_cow_file(host, judged.path, true)?;
    let retry = Retry::until(options.deadline).sparing();
    let found = patiently(host, &retry, Verdict::InUse, || {
        if let Some(found) = there(host, judged)? {
            return Ok(Some(found));
        }
        ask(Step::LockFile, judged.path, || {
            host.lock_file(&file.file, true)
        })
        .map(|()| None)
    });
    match found {
        Ok(Some((base, handles))) => return Ok((base, handles, false)),
        Ok(None) => (),
        Err(error) if error.verdict() == Some(Verdict::InUse) => {
            return Err(Refusal::CowInUse { path: path() }.into());
        }
        Err(error) => return Err(error),
    }
    // As it was when it was judged.
    if file.facts.id != judged.file || probe_store(host, &file)? != Some(judged.header) {
        let (cow, origin) = (path(), below.image().path.to_owned());
        return Err(LayerRefusal::Foreign { cow, origin }.into());
    }
    let chunk = judged.header.chunk;
    let (base, handles) = attach_file(host, below, &file, chunk, judged.chain, name, keep)?;
    Ok((base, handles, true))
}
