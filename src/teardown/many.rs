//! The story of many teardowns at once, as after a host's VMs have all been stopped.

use std::path::PathBuf;

use super::cleanup::{self, Claims};
use super::remove::{self, Outcome};
use crate::base::Handles;
use crate::call::{Wait, overlapped, spans};
use crate::error::{Result, Retry, Verdict};
use crate::kernel::Host;

/// A snapshot that is still to be taken down.
struct Due<'a> {
    /// Its place among those given.
    nth: usize,
    handles: &'a Handles,
    claims: Claims<'a>,
}

/// Takes down what each of the handles names, side by side.
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
        .map(|(nth, handles)| Due {
            nth,
            handles,
            claims: cleanup::claims(host, handles),
        })
        .collect();
    let mut wait = Wait::new(host, retry);
    loop {
        let attempts = overlapped(&ready, |due| due.attempt(host, &left()));
        for (due, attempt) in ready.drain(..).zip(attempts) {
            match attempt {
                Some(result) => results[due.nth] = result,
                None => busy.push(due),
            }
        }
        if busy.is_empty() {
            return results;
        }
        let nodes = || {
            let nodes = busy.iter().filter_map(|due: &Due<'_>| due.node(host));
            nodes.collect()
        };
        if !wait.pause(busy.len(), nodes) {
            break;
        }
        (busy, ready) = busy.into_iter().partition(|due| due.is_busy(host));
    }
    let last = match *retry {
        Retry::ONCE => Retry::ONCE,
        _ => Retry::LAST,
    };
    let attempts = overlapped(&busy, |due| {
        cleanup::clean_claimed(host, due.handles, &due.claims, &last)
    });
    for (due, result) in busy.iter().zip(attempts) {
        results[due.nth] = result;
    }
    results
}

impl Due<'_> {
    /// `None` when somebody has the dm device open.
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

    /// A look from the calling thread, which is a thousandth of a removal. Whatever else it finds is for the attempt to
    /// name.
    fn is_busy<H: Host>(&self, host: &H) -> bool {
        let device = remove::look(host, self.handles);
        device.is_some_and(|device| device.open_count > 0)
    }

    fn node<H: Host>(&self, host: &H) -> Option<PathBuf> {
        remove::look(host, self.handles).map(|device| device.number.dm_node())
    }
}
