//! `dmsnap tree`: what stands on what, as indented lines.

use std::fmt::Write as _;

use dmsnap::find::{SnapshotInfo, Standing, TreeNode};

use crate::{Failure, output, print_readable};

pub(crate) fn tree(name: Option<&str>, json: bool) -> Result<(), Failure> {
    let found = match name {
        Some(name) => vec![Ok(dmsnap::find::tree_of(name)?)],
        None => dmsnap::find::tree()?,
    };
    print_readable(found, json, |readable| {
        let mut text = String::new();
        readable.iter().for_each(|node| lines(node, 0, &mut text));
        text
    })
}

/// A line for the node, and below it those of what stands on it.
fn lines(node: &TreeNode, depth: usize, text: &mut String) {
    let indent = depth * 2;
    let what = match &node.what {
        Standing::Image { path, .. } => match path {
            Some(path) => format!("image {}", path.display()),
            None => "image".to_owned(),
        },
        // A layer that is to be removed is one that nobody keeps.
        Standing::Layer(info) => {
            format!("layer {}", of(info)).replace("removal due", "goes with its last user")
        }
        Standing::Snapshot(info) => format!("snapshot {}", of(info)),
        Standing::Device { dev } => format!("device {dev}"),
        Standing::Nothing => "nothing that is known".to_owned(),
        _ => "unknown".to_owned(),
    };
    let size = match (&node.what, node.size_bytes) {
        (Standing::Image { .. } | Standing::Device { .. }, Some(bytes)) => {
            format!(", {bytes} bytes")
        }
        _ => String::new(),
    };
    let _ = writeln!(text, "{:indent$}{what}{size}", "");
    node.above
        .iter()
        .for_each(|above| lines(above, depth + 1, text));
}

/// Name, device, state, how full, COW file, and how many have it open.
fn of(info: &SnapshotInfo) -> String {
    let cow = info.cow.as_ref().and_then(|cow| cow.path.as_ref());
    let cow = cow.map_or("-".to_owned(), |path| path.display().to_string());
    format!(
        "{} {} {}, used {}, open {}, COW {cow}",
        info.name,
        info.device.display(),
        output::state(info),
        output::used(info),
        info.open_count,
    )
}
