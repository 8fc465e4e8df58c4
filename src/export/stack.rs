//! The COW files of a stack, and their export.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::{ExportOptions, Exported, Source, whose};
use crate::backing::{Backing, Ground, Place, in_order, open_origin, open_store, probe_store};
use crate::base::Progress;
use crate::error::Result;
use crate::kernel::{Host, MACHINE};

impl ExportOptions {
    /// Exports what the COW files of a stack make of the image that the lowest was made over: those of the layers, and
    /// of the disk on them if it is to be the disk's. They are given in any order; none may be in use.
    ///
    /// # Errors
    ///
    /// As [`export`](Self::export). [`LayerRefusal`](crate::error::LayerRefusal)'s `Missing`, `Foreign`, `Apart` and
    /// `Twice` for files that are not one stack over this image.
    pub fn export_stack<P: AsRef<Path>>(
        &self,
        origin: impl AsRef<Path>,
        cows: impl IntoIterator<Item = P>,
        output: impl AsRef<Path>,
    ) -> Result<Exported> {
        let go_on = &mut |_| ControlFlow::Continue(());
        let whole = self.export_stack_with(origin, cows, output, go_on)?;
        Ok(whole.unwrap_or_default())
    }

    /// Does what [`export_stack`](Self::export_stack) does, and calls `progress` as [`export_with`](Self::export_with)
    /// does.
    ///
    /// # Errors
    ///
    /// As [`export_stack`](Self::export_stack).
    pub fn export_stack_with<P: AsRef<Path>>(
        &self,
        origin: impl AsRef<Path>,
        cows: impl IntoIterator<Item = P>,
        output: impl AsRef<Path>,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Option<Exported>> {
        let cows: Vec<_> = cows
            .into_iter()
            .map(|cow| cow.as_ref().to_owned())
            .collect();
        let (origin, output) = (origin.as_ref(), output.as_ref());
        export_stack(&MACHINE, self, origin, &cows, output, progress)
    }
}

pub(super) fn export_stack<H: Host>(
    host: &H,
    options: &ExportOptions,
    origin: &Path,
    cows: &[PathBuf],
    output: &Path,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Exported>> {
    let lock = options.origin_options();
    let image = open_origin(host, origin, &lock)?;
    let open = |cow| open_store(host, cow, &lock).map_err(|error| whose(host, error));
    let opened = cows.iter().map(|cow| open(cow));
    let cows = in_stack_order(host, opened.collect::<Result<Vec<_>>>()?, Some(origin))?;
    let source = Source {
        host,
        origin: image,
        cows,
        end: None,
        live: false,
    };
    source.export(options, output, progress, || Ok(()))
}

/// The files from the bottom up, over the image `origin`, or over whatever the lowest was made over.
pub(super) fn in_stack_order<'a, H: Host>(
    host: &H,
    files: Vec<Backing<'a, H::File>>,
    origin: Option<&Path>,
) -> Result<Vec<Backing<'a, H::File>>> {
    let mut places = Vec::with_capacity(files.len());
    for file in &files {
        // What holds no store is told when that is read.
        let header = probe_store(host, file)?;
        places.push(Place {
            path: file.path,
            chain: header.and_then(|header| header.chain).unwrap_or_default(),
        });
    }
    let order = in_order(&places, origin.map(|path| Ground { path, id: 0 }))?;
    let mut files: Vec<_> = files.into_iter().map(Some).collect();
    Ok(order
        .into_iter()
        .filter_map(|index| files[index].take())
        .collect())
}
