//! What is known of the content of the image under a live snapshot, by which its layers know a copy of the image.

use crate::backing::{Backing, content};
use crate::base::OriginIdentity;
use crate::find::{Live, bound, reach, whole};
use crate::kernel::Host;
use crate::store::Content;

/// `None` for an image that cannot be reached by the path that the kernel has for it, or is not `identity` any more:
/// then a copy of it is not known again, and nothing else is lost.
pub(super) fn of_image<H: Host>(
    host: &H,
    live: &Live<H::Loop>,
    identity: OriginIdentity,
) -> Option<Content> {
    let bound = bound(host, live.params.origin).ok()?;
    whole(&bound).ok()?;
    let (file, facts) = reach(host, &bound, &live.device.name, false).ok()?;
    let image = Backing {
        path: &bound.path,
        file,
        facts,
        above: None,
    };
    let same = image.identity() == identity;
    content(host, &image).ok().filter(|_| same)
}
