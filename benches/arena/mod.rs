//! Where contestants meet: each scenario's turns, all contestants of it in every round.

pub(crate) mod calls;
pub(crate) mod place;
pub(crate) mod scenarios;

use std::fs::File;
use std::path::Path;
use std::sync::{Barrier, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dmsnap::SnapshotOptions;
use place::{Fresh, Place, dm_devices, dm_nodes};
use scenarios::Scenario;

use crate::contestants::{Contestant, Job, Result};
use crate::figures::{Outcome, Sample, Series};

/// One contestant, once for each thread.
type Crew = Vec<Box<dyn Contestant>>;

/// Every contestant in every round, in an order in which each follows each other equally often, so that neither drift
/// nor what the one before leaves behind (deferred frees, warm slabs) favours anybody.
pub(crate) fn contest(place: &Place, scenario: &Scenario, rounds: usize) -> Result<Outcome> {
    let warm_up = if scenario.each > 1 { 1 } else { 2 };
    let mut crews = Vec::new();
    for make in scenario.contestants {
        let crew: Crew = (0..scenario.threads)
            .map(|_| make())
            .collect::<Result<_>>()?;
        crews.push(crew);
    }
    let mut series: Vec<_> = crews
        .iter()
        .map(|crew| Series::new(crew[0].name()))
        .collect();
    let neighbours = neighbours(place, scenario)?;
    let mut numbers = Numbers(1);
    for member in crews.iter_mut().flatten() {
        member.begin(place.image())?;
    }
    for round in 0..warm_up + rounds {
        for nth in order(round, crews.len()) {
            let hold = scenario.busy.then(|| numbers.hold());
            let sample = turn(place, scenario, &mut crews[nth], hold).map_err(|error| {
                format!("{}: {}: {error}", scenario.name, series[nth].contestant)
            })?;
            if round >= warm_up {
                series[nth].push(sample);
            }
        }
    }
    for member in crews.iter_mut().flatten() {
        member.end()?;
    }
    for neighbour in neighbours {
        neighbour.0.cleanup()?;
    }
    place.check_empty()?;
    let name = scenario.name;
    Ok(Outcome { name, series })
}

fn neighbours<'a>(
    place: &'a Place,
    scenario: &Scenario,
) -> Result<Vec<(dmsnap::Snapshot, Fresh<'a>)>> {
    let mut options = SnapshotOptions::new();
    options.store(scenario.store).chunk_size(scenario.chunk()?);
    let one = |nth| {
        let fresh = place.fresh(scenario, &format!("neighbour-{nth}"))?;
        let job = fresh.job();
        Ok((options.create(job.image, job.cow, job.name)?, fresh))
    };
    (0..scenario.neighbours).map(one).collect()
}

/// Rows of a Williams square: 0 1 3 2, 1 2 0 3, 2 3 1 0, 3 0 2 1 for four. For an odd number it takes a second one,
/// which is the first one backwards.
fn order(round: usize, count: usize) -> impl Iterator<Item = usize> {
    let is_backwards = count % 2 == 1 && round / count % 2 == 1;
    (0..count).map(move |nth| {
        let turn = if is_backwards { count - 1 - nth } else { nth };
        let step = match turn % 2 {
            0 => count - turn / 2,
            _ => turn.div_ceil(2),
        };
        (round + step) % count
    })
}

/// All creates of a turn, then all removes. Whether they did what they said is looked at off the clock.
fn turn(
    place: &Place,
    scenario: &Scenario,
    crew: &mut Crew,
    hold: Option<Duration>,
) -> Result<Sample> {
    let mut fresh = Vec::new();
    for member in 0..crew.len() {
        let jobs =
            (0..scenario.each).map(|nth| place.fresh(scenario, &format!("turn-{member}-{nth:03}")));
        fresh.push(jobs.collect::<Result<Vec<_>>>()?);
    }
    let jobs: Vec<Vec<_>> = fresh
        .iter()
        .map(|jobs| jobs.iter().map(Fresh::job).collect())
        .collect();
    let count = u32::try_from(crew.len() * scenario.each)?;
    for member in crew.iter_mut() {
        member.before_turn(scenario.each)?;
    }

    let (begin, end) = all_at_once(crew, &jobs, |member, jobs| {
        jobs.iter().try_for_each(|job| member.create(*job))
    })?;
    let create = (end - begin) / count;
    for name in fresh.iter().flatten().map(|fresh| fresh.job().name) {
        let sectors = dm_devices(name)?;
        if sectors != [(place::IMAGE_BYTES / 512).to_string()] {
            return Err(format!("made {sectors:?}").into());
        }
    }

    for member in crew.iter_mut() {
        member.between()?;
    }
    let holder = match hold {
        Some(pause) => Some(Holder::of(&dm_nodes(jobs[0][0].name)?, pause)?),
        None => None,
    };
    let (begin, end) = all_at_once(crew, &jobs, |member, jobs| member.remove_all(jobs))?;
    let was_late = fresh.iter().flatten().any(|fresh| fresh.is_there());
    let closed = holder.map(Holder::closed).transpose()?;
    let reaction = closed.and_then(|closed| crew[0].last_try()?.checked_duration_since(closed));
    let begin = closed.unwrap_or(begin);
    let remove = end.saturating_duration_since(begin) / count;

    for member in crew.iter_mut() {
        member.after_turn()?;
    }
    for fresh in fresh.iter().flatten() {
        place.settle(fresh)?;
    }
    place.settle_udev()?;
    Ok(Sample {
        create,
        remove,
        reaction,
        was_late,
    })
}

/// Has every member work through its jobs at the same time; from the first one's beginning to the last one's end.
fn all_at_once(
    crew: &mut Crew,
    jobs: &[Vec<Job<'_>>],
    work: impl Fn(&mut dyn Contestant, &[Job<'_>]) -> Result<()> + Sync,
) -> Result<(Instant, Instant)> {
    if let ([member], [jobs]) = (crew.as_mut_slice(), jobs) {
        let begin = Instant::now();
        work(member.as_mut(), jobs)?;
        return Ok((begin, Instant::now()));
    }
    let barrier = Barrier::new(crew.len());
    let (barrier, work) = (&barrier, &work);
    let spans = thread::scope(|scope| {
        let pairs = crew.iter_mut().zip(jobs);
        let threads: Vec<_> = pairs
            .map(|(member, jobs)| {
                scope.spawn(move || {
                    barrier.wait();
                    let begin = Instant::now();
                    work(member.as_mut(), jobs).map(|()| (begin, Instant::now()))
                })
            })
            .collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a thread panicked")?);
        joined.collect::<Result<Vec<_>>>()
    })?;
    let begin = spans.iter().map(|(begin, _)| *begin).min();
    let end = spans.iter().map(|(_, end)| *end).max();
    begin.zip(end).ok_or("no threads".into())
}

/// Somebody who has the device open when it is to be removed, and closes it some time later.
struct Holder(JoinHandle<Instant>);

impl Holder {
    fn of(nodes: &[std::path::PathBuf], pause: Duration) -> Result<Self> {
        let device = File::open(nodes.first().map_or(Path::new(""), |node| node))?;
        let (ready, begins) = mpsc::channel();
        let thread = thread::spawn(move || {
            // Nobody listens any more only if the turn has failed.
            let _ = ready.send(());
            thread::sleep(pause);
            let closing = Instant::now();
            drop(device);
            closing
        });
        begins.recv()?;
        Ok(Self(thread))
    }

    /// When it began to close.
    fn closed(self) -> Result<Instant> {
        self.0.join().map_err(|_| "the holder panicked".into())
    }
}

/// Pauses that are the same ones in every run.
struct Numbers(u64);

impl Numbers {
    /// From 20 to 275 ms: no contestant's rhythm fits all of them.
    fn hold(&mut self) -> Duration {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        Duration::from_millis(20 + (self.0 >> 56))
    }
}
