//! Takes many snapshots down at once, as after a host's VMs have all been stopped.

use std::path::PathBuf;

use super::cleanup::{self, Claims};
use super::remove::{self, Outcome};
use crate::base::Handles;
use crate::call::{Wait, in_parallel, spans};
use crate::error::{Result, Retry, Verdict};
use crate::kernel::Host;

/// A snapshot that has not been taken down yet.
struct Pending<'a> {
    /// Its index among the given handles.
    nth: usize,
    handles: &'a Handles,
    claims: Claims<'a>,
}

/// Takes down what each of the handles names, in parallel.
pub(super) fn clean_all<H: Host + Sync>(
    host: &H,
    all: &[&Handles],
    retry: &Retry,
) -> Vec<Result<Outcome>> {
    let start = host.now();
    let left = || retry.less(host.now().saturating_sub(start));
    let mut results = vec![Ok(Outcome::AlreadyGone); all.len()];
    let mut busy = Vec::new();
    let mut ready: Vec<_> = (0..)
        .zip(all)
        .map(|(nth, handles)| Pending {
            nth,
            handles,
            claims: cleanup::claims(host, handles),
        })
        .collect();
    let mut wait = Wait::new(host, retry);
    loop {
        let attempts = in_parallel(&ready, |pending| pending.attempt(host, &left()));
        for (pending, attempt) in ready.drain(..).zip(attempts) {
            match attempt {
                Some(result) => results[pending.nth] = result,
                None => busy.push(pending),
            }
        }
        if busy.is_empty() {
            return results;
        }
        let nodes = || {
            let nodes = busy
                .iter()
                .filter_map(|pending: &Pending<'_>| pending.node(host));
            nodes.collect()
        };
        if !wait.pause(busy.len(), nodes) {
            break;
        }
        (busy, ready) = busy.into_iter().partition(|pending| pending.is_busy(host));
    }
    let last = match *retry {
        Retry::ONCE => Retry::ONCE,
        _ => Retry::LAST,
    };
    let attempts = in_parallel(&busy, |pending| {
        cleanup::clean_claimed(host, pending.handles, &pending.claims, &last)
    });
    for (pending, result) in busy.iter().zip(attempts) {
        results[pending.nth] = result;
    }
    results
}

impl Pending<'_> {
    /// Takes it down; `None` if somebody has the dm device open.
    fn attempt<H: Host>(&self, host: &H, retry: &Retry) -> Option<Result<Outcome>> {
        let _span = spans::cleanup(self.handles);
        let removed = cleanup::remove_device(host, self.handles, &Retry::ONCE);
        match removed {
            Err(error) if error.verdict() == Some(Verdict::Busy) => None,
            settled => Some(cleanup::release_loops(
                host,
                self.handles,
                settled,
                &self.claims,
                retry,
            )),
        }
    }

    /// True if somebody has the device open. The calling thread asks this, as it takes a thousandth of a removal's
    /// time. Any failure shows in the removal.
    fn is_busy<H: Host>(&self, host: &H) -> bool {
        let device = remove::look(host, self.handles);
        device.is_some_and(|device| device.open_count > 0)
    }

    fn node<H: Host>(&self, host: &H) -> Option<PathBuf> {
        remove::look(host, self.handles).map(|device| device.number.dm_node())
    }
}
