//! Runs jobs that mostly wait in parallel, on a bounded number of threads.

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::call::{spans, timings};

/// The most threads that work at once, the caller included.
///
/// A removal is one wait after the other for RCU's grace periods, which the kernel shares among all that wait.
const THREADS: usize = 16;

/// The stack of a thread: several times what the deepest job needs. Only pages that are touched take memory.
const STACK_BYTES: usize = 256 << 10;

/// Runs `job` for every item and returns the results in the order of the items.
///
/// A single item is done by the caller, without a thread; so is every item when no thread can be started. A job that
/// panics does not stop the others: the panic is resumed in the caller when all are done.
pub(crate) fn in_parallel<T, R>(items: &[T], job: impl Fn(&T) -> R + Sync) -> Vec<R>
where
    T: Sync,
    R: Send,
{
    in_parallel_on(THREADS, items, job)
}

fn in_parallel_on<T, R>(threads: usize, items: &[T], job: impl Fn(&T) -> R + Sync) -> Vec<R>
where
    T: Sync,
    R: Send,
{
    let (entrusted, surroundings) = (timings::entrusted(), spans::surroundings());
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(nth) else {
                return done;
            };
            let result = panic::catch_unwind(AssertUnwindSafe(|| job(item)));
            done.push((nth, result));
        }
    };
    let mut done = thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads.min(items.len()))
            .map_while(|_| {
                let builder = thread::Builder::new().name("dmsnap".to_owned());
                builder
                    .stack_size(STACK_BYTES)
                    .spawn_scoped(scope, || entrusted.keep(|| surroundings.within(work)))
                    .ok()
            })
            .collect();
        let mut done = work();
        for helper in helpers {
            match helper.join() {
                Ok((theirs, record)) => {
                    done.extend(theirs);
                    record.iter().for_each(timings::absorb);
                }
                Err(panic) => panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(nth, _)| *nth);
    let unwound = |(_, result)| match result {
        Ok(result) => result,
        Err(panic) => panic::resume_unwind(panic),
    };
    done.into_iter().map(unwound).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, Mutex};

    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items_from_no_more_threads_than_told() {
        let seen = Mutex::new(Vec::new());
        let items: Vec<usize> = (0..100).collect();
        let doubled = in_parallel_on(4, &items, |item| {
            seen.lock().expect("no panic").push(thread::current().id());
            thread::yield_now();
            item * 2
        });
        assert_eq!(
            doubled,
            items.iter().map(|item| item * 2).collect::<Vec<_>>()
        );
        let mut seen = seen.into_inner().expect("no panic");
        seen.sort_by_key(|id| format!("{id:?}"));
        seen.dedup();
        assert!(seen.len() <= 4, "{seen:?}");
    }

    #[test]
    fn jobs_run_side_by_side() {
        let together = Barrier::new(8);
        in_parallel_on(8, &[(); 8], |()| together.wait());
    }

    #[test]
    fn one_item_is_done_by_the_caller_and_none_by_nobody() {
        let caller = thread::current().id();
        let ran_on = in_parallel(&[()], |()| thread::current().id());
        assert_eq!(ran_on, [caller]);
        assert_eq!(in_parallel(&[(); 0], |()| ()), []);
    }

    #[test]
    fn a_panic_is_passed_on_when_all_others_are_done() {
        for threads in [1, 4] {
            let done = AtomicUsize::new(0);
            let items: Vec<usize> = (0..20).collect();
            let caught = panic::catch_unwind(AssertUnwindSafe(|| {
                in_parallel_on(threads, &items, |item| {
                    assert_ne!(*item, 3);
                    done.fetch_add(1, Ordering::Relaxed);
                })
            }));
            assert!(caught.is_err());
            assert_eq!(done.into_inner(), 19);
        }
    }
}
