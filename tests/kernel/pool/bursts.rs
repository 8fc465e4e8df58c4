//! Bursts: many VMs begin at once, and many end at once, while the pool refills and recycles. What a claim and a release
//! take is printed; that each is warm, and each device taken back, is asserted.

use std::thread;
use std::time::Duration;

use dmsnap::Pool;
use dmsnap::pool::{Claimed, CowFate};
use dmsnap::timings::Timings;

use super::{PATIENCE, claim, pool};
use crate::common::{Scene, chain};
use crate::proof::short_or_long;

/// A burst, and the pool's size is twice that.
const BURST: usize = 16;

/// Prints the median, the 99th percentile and the worst, with the steps of that one.
fn show(what: &str, mut timings: Vec<Timings>) {
    timings.sort_by_key(|each| each.total);
    let at = |percent: usize| timings[(timings.len() - 1) * percent / 100].total;
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let worst = timings.last().expect("some");
    let steps: Vec<_> = worst.by_step();
    let steps: Vec<_> = steps
        .iter()
        .map(|step| format!("{:?} {:.2}", step.step, ms(step.took)))
        .collect();
    let [half, most] = [at(50), at(99)].map(ms);
    println!(
        "{what}, {} of them: p50 {half:.3} ms, p99 {most:.3}, {:.1} times; worst {:.3}: {}",
        timings.len(),
        most / half,
        ms(worst.total),
        steps.join(", ")
    );
}

fn release(pool: &Pool, claimed: &Claimed) {
    let released = pool.release(claimed.snapshot.handles(), CowFate::Delete);
    let released = released.unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert!(released.taken_back);
}

#[test]
fn bursts_are_served_from_what_is_ready_while_the_pool_refills_and_recycles() {
    let scene = Scene::new();
    let pool = pool(&scene, 2 * BURST);
    let (mut claims, mut releases, mut at_once) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..short_or_long(2, 60) {
        assert!(pool.wait_ready(BURST, PATIENCE), "{:?}", pool.status());
        let mut vms = Vec::new();
        for _ in 0..BURST {
            let (claimed, timings) = Timings::of(|| claim(&scene, &pool));
            assert!(claimed.warm);
            claims.push(timings);
            vms.push(claimed);
        }
        for claimed in &vms {
            releases.push(Timings::of(|| release(&pool, claimed)).1);
        }
    }
    for _ in 0..short_or_long(1, 60) {
        assert!(pool.wait_ready(BURST, PATIENCE), "{:?}", pool.status());
        let vms = thread::scope(|scope| {
            let one = || scope.spawn(|| Timings::of(|| claim(&scene, &pool)));
            let threads: Vec<_> = (0..8).map(|_| one()).collect();
            let vms = threads.into_iter().map(|vm| vm.join().expect("no panic"));
            vms.collect::<Vec<_>>()
        });
        for (claimed, timings) in vms {
            at_once.push(timings);
            release(&pool, &claimed);
        }
    }
    show("claims in bursts", claims);
    show("releases in bursts", releases);
    show("claims by 8 threads at once", at_once);
    pool.drain().expect("nobody has any open");
}
