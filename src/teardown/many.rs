//! The story of many teardowns at once, as after a host's VMs have all been stopped.

use std::path::PathBuf;

use super::cleanup::{self, Claims};
use super::remove;
use crate::base::Handles;
use crate::call::{Wait, overlapped, spans};
use crate::error::{Result, Retry, Verdict};
use crate::kernel::{Host, MACHINE};

/// Takes down what each of the handles names, as [`cleanup`](crate::cleanup) does; results in the order given.
///
/// A removal mostly waits for the kernel, so many are waited for side by side, by at most 16 threads, which end before
/// this returns. One busy device keeps no other waiting: what can be removed is, and then all busy ones together are
/// waited for, up to 15 seconds in all.
///
/// ```no_run
/// # let fleet: Vec<dmsnap::Handles> = Vec::new();
/// for (handles, result) in fleet.iter().zip(dmsnap::cleanup_all(&fleet)) {
///     if let Err(error) = result {
///         eprintln!("{:?}: {error}", handles.name);
///     }
/// }
/// ```
pub fn cleanup_all<'a>(handles: impl IntoIterator<Item = &'a Handles>) -> Vec<Result<()>> {
    cleanup_all_with(handles, &Retry::default())
}

/// As [`cleanup_all`], waiting as `retry` says; its deadline is one for all.
pub fn cleanup_all_with<'a>(
    handles: impl IntoIterator<Item = &'a Handles>,
    retry: &Retry,
) -> Vec<Result<()>> {
    let all: Vec<&Handles> = handles.into_iter().collect();
    match all[..] {
        [] => Vec::new(),
        [one] => vec![cleanup::clean(&MACHINE, one, retry)],
        _ => clean_all(&MACHINE, &all, retry),
    }
}

/// A snapshot that is still to be taken down.
struct Due<'a> {
    /// Its place among those given.
    nth: usize,
    handles: &'a Handles,
    claims: Claims<'a>,
}

fn clean_all<H: Host + Sync>(host: &H, all: &[&Handles], retry: &Retry) -> Vec<Result<()>> {
    let start = host.now();
    let left = || retry.less(host.now().saturating_sub(start));
    let mut results = vec![Ok(()); all.len()];
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
    fn attempt<H: Host>(&self, host: &H, retry: &Retry) -> Option<Result<()>> {
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
