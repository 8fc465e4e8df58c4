//! What a collector of spans sees.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dmsnap::base::LoopHandle;
use dmsnap::{Handles, Teardown, remove};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Notes every span as `level name field=value ...`, and what is recorded later, indented as deep as it is nested.
#[derive(Clone, Default)]
struct Notes {
    lines: Arc<Mutex<Vec<String>>>,
    last: Arc<AtomicU64>,
}

struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0 += &format!(" {field}={value:?}");
    }
}

impl Notes {
    fn note(&self, line: String) {
        self.lines.lock().expect("no panic").push(line);
    }
}

impl Subscriber for Notes {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields(String::new());
        span.record(&mut fields);
        let metadata = span.metadata();
        self.note(format!(
            "{} {}{}",
            metadata.level(),
            metadata.name(),
            fields.0
        ));
        Id::from_u64(self.last.fetch_add(1, Ordering::Relaxed) + 1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        let mut fields = Fields(String::new());
        values.record(&mut fields);
        self.note(format!("record{}", fields.0));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// What a collector sees of the work, as soon as that is what is `expected` of it.
///
/// `tracing` registers a span's place in the code in two steps, and a collector that comes between them, while another
/// test is there for the first time, never hears of that place. The next collector does.
fn collected(work: impl Fn(), expected: impl Fn(&[String]) -> bool) -> Vec<String> {
    let mut seen = Vec::new();
    for _ in 0..100 {
        let notes = Notes::default();
        tracing::subscriber::with_default(notes.clone(), &work);
        seen = std::mem::take(&mut *notes.lines.lock().expect("no panic"));
        if expected(&seen) {
            break;
        }
        std::thread::yield_now();
    }
    seen
}

#[test]
fn an_operation_and_its_calls_are_spans_with_object_and_errno() {
    let expected = [
        "DEBUG remove on=/nowhere/dm-0",
        "TRACE step step=Query on=/nowhere/dm-0",
        "record errno=2",
    ];
    let work = || assert!(remove("/nowhere/dm-0").is_ok());
    assert_eq!(collected(work, |seen| seen == expected), expected);
}

#[test]
fn spans_of_helping_threads_reach_the_same_collector() {
    let handles = |nth| {
        let mut handles = Handles::default();
        handles.cow_loop = Some(LoopHandle::at(format!("/nowhere/loop{nth}")));
        handles
    };
    let fleet: Vec<_> = (0..40).map(handles).collect();
    let work = || {
        let done = Teardown::new().cleanup_all(&fleet);
        assert!(done.iter().all(Result::is_ok));
    };
    let cleanups = |seen: &[String]| seen.iter().filter(|line| *line == "DEBUG cleanup").count();
    let seen = collected(work, |seen| cleanups(seen) == 40);
    assert_eq!(cleanups(&seen), 40, "{seen:#?}");
}
