//! Finds out what an image holds, for images whose modification time is no evidence.

use super::Backing;
use super::sample::sample;
use crate::base::Digest;
use crate::call::ask;
use crate::error::{Result, Step, Verdict};
use crate::kernel::{FileKind, Files};
use crate::store::{Content, DigestOf};

/// Returns the image's fingerprint, and the digest that the kernel has of it where the image is a file with fs-verity.
/// The fingerprint is for a copy on a file system without that.
pub(crate) fn content<H: Files>(host: &H, image: &Backing<'_, H::File>) -> Result<Content> {
    let digest = match image.facts.kind {
        FileKind::Regular => measured(host, image)?,
        _ => None,
    };
    let sample = sample(host, image)?;
    Ok(Content {
        sample: Some(sample),
        digest,
    })
}

fn measured<H: Files>(
    host: &H,
    image: &Backing<'_, H::File>,
) -> Result<Option<(DigestOf, Digest)>> {
    let measure = || host.measure_file(&image.file);
    match ask(Step::MeasureFile, image.path, measure) {
        // Without fs-verity: this file, its file system or the kernel.
        Err(error) if error.verdict() == Some(Verdict::Unsupported) => Ok(None),
        found => found.map(|(algorithm, digest)| {
            let algorithm = DigestOf::Verity(algorithm);
            Some(algorithm).zip(Digest::from_slice(&digest))
        }),
    }
}
