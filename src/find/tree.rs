//! Who stands on whom: images, the layers over them, and the snapshots over those.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::list::{Read, SnapshotInfo, read_all};
#[cfg(feature = "serde")]
use crate::base::lossy;
use crate::base::{DeviceId, DeviceNumber, FileId, Kind};
use crate::error::{Error, Result, Step, policy};
use crate::kernel::{Host, MACHINE};

/// An image, a layer or a snapshot, and what stands on it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct TreeNode {
    /// What it is.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub what: Standing,
    /// The size of the disk that it shows, in bytes, where a uuid of dmsnap's says so.
    pub size_bytes: Option<u64>,
    /// What stands on it, in the order of the names.
    pub above: Vec<TreeNode>,
}

/// What a [`TreeNode`] is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "kebab-case")
)]
#[non_exhaustive]
pub enum Standing {
    /// An image, on one loop device or on several.
    Image {
        /// Its path, as the kernel has it: with ` (deleted)` behind it once it is unlinked.
        #[cfg_attr(feature = "serde", serde(serialize_with = "lossy::known"))]
        path: Option<PathBuf>,
        /// Which file it is; `None` when its loop device could not be read.
        backing: Option<FileId>,
    },
    /// A layer: a checkpoint made it, and any number of snapshots may stand on it.
    Layer(SnapshotInfo),
    /// A snapshot.
    Snapshot(SnapshotInfo),
    /// A device that is neither dmsnap's nor a loop device.
    Device {
        /// Its number.
        dev: DeviceNumber,
    },
    /// Not known: the device over it has no table yet, or not one that says so.
    Nothing,
}

impl TreeNode {
    /// Returns the dm device's name, if it is one of dmsnap's.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.info().map(|info| info.name.as_str())
    }

    /// Returns what is known of it, if it is one of dmsnap's devices.
    #[must_use]
    pub fn info(&self) -> Option<&SnapshotInfo> {
        match &self.what {
            Standing::Layer(info) | Standing::Snapshot(info) => Some(info),
            _ => None,
        }
    }

    /// Keeps what leads to the device of that number, and what stands on it; says whether it is there.
    fn keep(&mut self, dev: DeviceNumber) -> bool {
        if self.info().is_some_and(|info| info.dev == dev) {
            return true;
        }
        self.above.retain_mut(|above| above.keep(dev));
        !self.above.is_empty()
    }
}

/// Lists all of dmsnap's devices by what they stand on: a node for each image, with the layers and snapshots over it.
///
/// A device that cannot be read is an `Err` in the list and hides no other; what stands on it has a node of kind
/// `Device`.
///
/// ```no_run
/// fn print(node: &dmsnap::find::TreeNode, depth: usize) {
///     println!("{:depth$}{}", "", node.name().unwrap_or("an image"));
///     node.above.iter().for_each(|above| print(above, depth + 2));
/// }
/// for image in dmsnap::find::tree()? {
///     match image {
///         Ok(image) => print(&image, 0),
///         Err(error) => eprintln!("{}", error.one_line()),
///     }
/// }
/// # Ok::<(), dmsnap::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Failed`] when device-mapper cannot be asked at all.
pub fn tree() -> Result<Vec<Result<TreeNode>>> {
    tree_of_all(&MACHINE)
}

/// Returns what one of dmsnap's devices stands on, down to the image, and what stands on it.
///
/// # Errors
///
/// As [`status`](crate::status), and the failure of a device that it may stand on.
pub fn tree_of(device: impl Into<DeviceId>) -> Result<TreeNode> {
    tree_of_one(&MACHINE, &device.into())
}

pub(crate) fn tree_of_one<H: Host>(host: &H, device: &DeviceId) -> Result<TreeNode> {
    let (device, _) = super::lookup::find(host, device)?;
    let mut failed = None;
    for image in tree_of_all(host)? {
        match image {
            Ok(mut image) => {
                if image.keep(device.number) {
                    return Ok(image);
                }
            }
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    let gone = || Error::failed(Step::Query, device.number.dm_node(), policy::GONE);
    Err(failed.unwrap_or_else(gone))
}

pub(crate) fn tree_of_all<H: Host>(host: &H) -> Result<Vec<Result<TreeNode>>> {
    let (mut devices, mut failed) = (Vec::new(), Vec::new());
    for (_, read) in read_all(host)? {
        match read {
            Ok(read) => devices.push(read),
            Err(error) => failed.push(Err(error)),
        }
    }
    let trees = grow(devices).into_iter().map(Ok);
    Ok(trees.chain(failed).collect())
}

/// What a root is told from others by, and in which order they come.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Root {
    File([u64; 3]),
    Device(DeviceNumber),
    Nothing,
}

/// Puts each device on what it stands on.
fn grow(devices: Vec<Read>) -> Vec<TreeNode> {
    let mut roots: BTreeMap<Root, (Standing, Vec<Read>)> = BTreeMap::new();
    let mut over: BTreeMap<DeviceNumber, Vec<Read>> = BTreeMap::new();
    let numbers: Vec<_> = devices.iter().map(|read| read.info.dev).collect();
    for read in devices {
        match read.origin {
            Some(origin) if numbers.contains(&origin) => over.entry(origin).or_default().push(read),
            _ => {
                let (root, what) = root_of(&read);
                let (_, above) = roots.entry(root).or_insert_with(|| (what, Vec::new()));
                above.push(read);
            }
        }
    }
    let node = |(what, above): (Standing, Vec<Read>)| {
        let above: Vec<_> = above
            .into_iter()
            .map(|read| stack(read, &mut over))
            .collect();
        TreeNode {
            what,
            size_bytes: above.iter().find_map(|each| each.size_bytes),
            above,
        }
    };
    let mut trees: Vec<_> = roots.into_values().map(node).collect();
    trees.sort_by(|one, other| path_of(&one.what).cmp(&path_of(&other.what)));
    trees
}

fn path_of(what: &Standing) -> Option<&PathBuf> {
    match what {
        Standing::Image { path, .. } => path.as_ref(),
        _ => None,
    }
}

fn root_of(read: &Read) -> (Root, Standing) {
    let facts = read.info.origin.as_ref();
    let image = facts.map(|facts| Standing::Image {
        path: facts.path.clone(),
        backing: facts.backing,
    });
    // By its file: it may be on several loop devices.
    let file = facts
        .and_then(|facts| facts.backing)
        .map(|file| Root::File([file.dev.major().into(), file.dev.minor().into(), file.inode]));
    match (image, file, read.origin) {
        (Some(image), Some(file), _) => (file, image),
        (Some(image), None, Some(dev)) => (Root::Device(dev), image),
        (_, _, Some(dev)) => (Root::Device(dev), Standing::Device { dev }),
        _ => (Root::Nothing, Standing::Nothing),
    }
}

/// A device with all that stands on it; a stack has an end, as no device is under itself.
fn stack(read: Read, over: &mut BTreeMap<DeviceNumber, Vec<Read>>) -> TreeNode {
    let info = read.info;
    let above = over.remove(&info.dev).unwrap_or_default();
    TreeNode {
        size_bytes: info.uuid.origin().map(|origin| origin.size_bytes),
        above: above.into_iter().map(|read| stack(read, over)).collect(),
        what: match info.uuid.kind() {
            Kind::Layer => Standing::Layer(info),
            _ => Standing::Snapshot(info),
        },
    }
}
