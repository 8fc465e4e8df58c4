//! Removes one dm device, and its alias.

use std::path::{Path, PathBuf};

use crate::backing::{Binding, binding};
use crate::base::{DeviceId, DeviceName, DeviceUuid, Handles, Kind, LoopHandle, MAPPER_DIR};
use crate::call::{absent, ask, spans, watchfully};
use crate::dm::Address;
use crate::error::{Error, Refusal, Result, Retry, Step, Verdict, policy};
use crate::find;
use crate::kernel::{Device, Host, MACHINE, MAPPER_CONTROL};

/// The result of removing a dm device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "outcome", rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Outcome {
    /// The device was removed, with its node and its alias.
    Removed,
    /// There was no such device.
    AlreadyGone,
    /// The kernel removes the device when its last user closes it. Until then it works, and its name stays taken; its
    /// alias below /dev/mapper is gone already.
    Deferred {
        /// How many users have it open.
        open_count: u32,
    },
}

/// Removes a dm device; waits up to 15 seconds while it is busy. [`Teardown`](crate::Teardown) has the options.
///
/// A device that is not there counts as success. Loop devices that were attached with autoclear, as dmsnap's are, are
/// detached with it; the files stay. Any dm device can be removed with this, also another program's: nothing is
/// checked.
///
/// # Errors
///
/// [`Error::Failed`] of kind [`Busy`](crate::ErrorKind::Busy) if it is still open at the deadline, with the open count
/// and who has it open; [`Error::Failed`] at once on any other failure. [`Error::Refused`] for a name or path that no
/// dm device can have, and for a device of another driver.
pub fn remove(device: impl Into<DeviceId>) -> Result<Outcome> {
    remove_id(&MACHINE, &device.into(), &Retry::default(), When::Now)
}

/// When a device is to be removed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Now,
    LastClose,
}

/// The dm device to remove, and the path that messages name it by.
pub(crate) struct Subject {
    key: Key,
    pub(crate) path: PathBuf,
}

enum Key {
    Plain(find::Key),
    /// A pool's device that was claimed. It keeps its uuid from one snapshot to the next, so it is checked to still
    /// have the handles' name.
    Claimed(DeviceUuid, DeviceName),
}

impl Subject {
    /// Returns the device that the handles name: by uuid if they have one, so that it is the right device or none.
    /// `None` if the handles name no device, a path that leads nowhere any more, or a pool's device that has another
    /// COW file by now.
    pub(crate) fn of<H: Host>(host: &H, handles: &Handles) -> Result<Option<Self>> {
        let path = handles.path();
        match (&handles.uuid, &handles.name) {
            (Some(uuid), name) if uuid.kind() == Kind::Pooled => {
                Self::claimed(host, uuid, name.as_ref(), handles.cow_loop.as_ref())
            }
            (Some(uuid), _) => {
                let key = find::Key::Uuid(uuid.to_string());
                let path = path.unwrap_or_else(|| key.path());
                let key = Key::Plain(key);
                Ok(Some(Self { key, path }))
            }
            (None, Some(name)) => Ok(Some(find::Key::Name(name.clone()).into())),
            (None, None) => match (path, handles.dev) {
                (Some(path), _) => Self::select(host, &DeviceId::Path(path)),
                (None, Some(number)) => Ok(Some(find::Key::Number(number).into())),
                (None, None) => Ok(None),
            },
        }
    }

    /// Names dmsnap's device of that uuid; for a pool's device, only while it has that name.
    pub(crate) fn ours(uuid: DeviceUuid, name: &DeviceName) -> Self {
        let key = match uuid.kind() {
            Kind::Pooled => Key::Claimed(uuid, name.clone()),
            Kind::Own | Kind::Adopted | Kind::Shared | Kind::Layer => {
                Key::Plain(find::Key::Uuid(uuid.into()))
            }
        };
        let path = name.mapper_path();
        Self { key, path }
    }

    /// Returns a pool's device if it still is the handles' snapshot: the loop device has its COW file for exactly as
    /// long.
    fn claimed<H: Host>(
        host: &H,
        uuid: &DeviceUuid,
        name: Option<&DeviceName>,
        cow_loop: Option<&LoopHandle>,
    ) -> Result<Option<Self>> {
        let subject = match name {
            Some(name) => Self::ours(uuid.clone(), name),
            None => find::Key::Uuid(uuid.to_string()).into(),
        };
        // Handles with a name of the pool's are the pool's own, or a sweep's: they mean the device, whatever COW file
        // it has.
        let changes = |handle: &&LoopHandle| {
            handle.has_identity() && !name.is_some_and(DeviceName::is_pooled)
        };
        Ok(match cow_loop.filter(changes) {
            Some(handle) if !matches!(binding(host, handle)?, Binding::Bound(..)) => None,
            _ => Some(subject),
        })
    }

    /// Returns the device that `id` means; `None` for a path that leads nowhere. Messages name it by a path that was
    /// given.
    fn select<H: Host>(host: &H, id: &DeviceId) -> Result<Option<Self>> {
        let key = find::select(host, id)?;
        Ok(key.map(Self::from).map(|mut subject| {
            if let (DeviceId::Path(path), Key::Plain(find::Key::Number(_))) = (id, &subject.key) {
                subject.path.clone_from(path);
            }
            subject
        }))
    }

    fn address(&self) -> Address<'_> {
        match &self.key {
            Key::Plain(key) => key.address(),
            Key::Claimed(uuid, _) => Address::Uuid(uuid.as_str()),
        }
    }

    /// Asks the kernel about the device; `None` if it is not there.
    pub(crate) fn query<H: Host>(&self, host: &H) -> Result<Option<Device>> {
        let found = absent(ask(Step::Query, &self.path, || host.query(self.address())))?;
        Ok(match &self.key {
            Key::Claimed(_, name) => found.filter(|device| device.name == name.as_str()),
            _ => found,
        })
    }
}

impl From<find::Key> for Subject {
    fn from(key: find::Key) -> Self {
        let path = key.path();
        let key = Key::Plain(key);
        Self { key, path }
    }
}

/// Returns the dm device that the handles name, if it can be found.
pub(crate) fn look<H: Host>(host: &H, handles: &Handles) -> Option<Device> {
    let subject = Subject::of(host, handles).ok().flatten()?;
    subject.query(host).ok().flatten()
}

pub(super) fn remove_id<H: Host>(
    host: &H,
    device: &DeviceId,
    retry: &Retry,
    when: When,
) -> Result<Outcome> {
    let _span = spans::remove(device);
    match Subject::select(host, device)? {
        Some(subject) => remove_subject(host, &subject, retry, when),
        None => Ok(Outcome::AlreadyGone),
    }
}

pub(crate) fn remove_subject<H: Host>(
    host: &H,
    subject: &Subject,
    retry: &Retry,
    when: When,
) -> Result<Outcome> {
    ask(Step::OpenMapper, Path::new(MAPPER_CONTROL), || {
        host.open_mapper()
    })?;
    let node = || {
        let device = subject.query(host).ok().flatten();
        device
            .map(|device| device.number.dm_node())
            .into_iter()
            .collect()
    };
    let attempt = || try_once(host, subject, when);
    let outcome = watchfully(host, retry, Verdict::Busy, node, attempt);
    host.sweep_nodes();
    match outcome {
        // Looking for holders takes far longer than an attempt, so it is done only after a wait, and not for a caller
        // that asks from an event loop.
        Err(error) if *retry != Retry::ONCE && error.verdict() == Some(Verdict::Busy) => {
            let device = subject.query(host).ok().flatten();
            let holders = device
                .map(|device| host.holders(device.number))
                .unwrap_or_default();
            Err(holders.into_iter().fold(error, Error::noted))
        }
        outcome => outcome,
    }
}

/// Makes one attempt.
///
/// An alias of dmsnap's is removed before the device: from the moment that the removal begins, another process can have
/// the name, and the alias may be its. Another program's device has an alias of udev's or libdm's, which goes after it.
fn try_once<H: Host>(host: &H, subject: &Subject, when: When) -> Result<Outcome> {
    let path = &subject.path;
    let Some(device) = subject.query(host)? else {
        if matches!(subject.key, Key::Plain(find::Key::Number(number)) if host.is_present(number)) {
            return Err(Refusal::NotADmDevice { path: path.clone() }.into());
        }
        sweep_alias(host, path)?;
        return Ok(Outcome::AlreadyGone);
    };
    let open_count = device.open_count;
    if open_count > 0 && when == When::Now {
        let busy = Error::failed(Step::Remove, path, policy::BUSY);
        return Err(busy.noted(format!("open count {open_count}")));
    }
    let alias = Path::new(MAPPER_DIR).join(&device.name);
    let unlink = || {
        ask(Step::Unlink, &alias, || {
            host.remove_alias(&alias, device.number)
        })
    };
    let is_ours = device.uuid.starts_with(DeviceUuid::PREFIX);
    let unlinked = if is_ours { unlink()? } else { false };
    let removed = ask(Step::Remove, path, || {
        host.remove(unchanging(&device), when == When::LastClose)
    });
    match absent(removed) {
        Ok(Some(true)) => Ok(Outcome::Deferred { open_count }),
        Ok(gone) => {
            if !is_ours {
                unlink()?;
            } else if alias != *path {
                // Another program renamed the device, and may have left the alias of its first name.
                sweep_alias(host, path)?;
            }
            Ok(gone.map_or(Outcome::AlreadyGone, |_| Outcome::Removed))
        }
        Err(error) => {
            if unlinked {
                // The device stays, so it gets its alias back. If that fails, /dev/dm-N still leads to it.
                let node = host.find_node(device.number);
                let _ = host.make_alias(&alias, device.number, node.as_deref());
            }
            Err(error)
        }
    }
}

/// True if `path` is an alias of dmsnap's whose device is gone.
pub(crate) fn is_stale_alias<H: Host>(host: &H, path: &Path) -> Result<bool> {
    let Some(name) = path.strip_prefix(MAPPER_DIR).ok().and_then(Path::to_str) else {
        return Ok(false);
    };
    let gone = || absent(ask(Step::Query, path, || host.query(Address::Name(name))));
    Ok(host.is_our_alias(path) && gone()?.is_none())
}

/// Removes an alias of dmsnap's whose device is gone, as another program's removal leaves it; returns true if there was
/// one.
pub(crate) fn sweep_alias<H: Host>(host: &H, path: &Path) -> Result<bool> {
    if !is_stale_alias(host, path)? {
        return Ok(false);
    }
    absent(ask(Step::Unlink, path, || host.unlink(path))).map(|unlinked| unlinked.is_some())
}

/// Returns what identifies the device for longest: its uuid, if it has one, and its name otherwise. For a pool's device
/// it is the name, as the uuid stays from one snapshot to the next.
fn unchanging(device: &Device) -> Address<'_> {
    let pooled = |uuid: &DeviceUuid| uuid.kind() == Kind::Pooled;
    if DeviceUuid::new(device.uuid.as_str()).is_ok_and(|uuid| pooled(&uuid)) {
        Address::Name(&device.name)
    } else if !device.uuid.is_empty() {
        Address::Uuid(&device.uuid)
    } else if device.name.contains(char::REPLACEMENT_CHARACTER) {
        Address::Number(device.number)
    } else {
        Address::Name(&device.name)
    }
}
