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

/// Does the work once before it is collected: `tracing` registers a span's place in the code in two steps, and a
/// collector that comes between them, while another test is there for the first time, never hears of that place.
fn known(work: impl FnOnce()) {
    work();
}

#[test]
fn an_operation_and_its_calls_are_spans_with_object_and_errno() {
    known(|| assert!(remove("/nowhere/dm-0").is_ok()));
    let notes = Notes::default();
    tracing::subscriber::with_default(notes.clone(), || {
        assert!(remove("/nowhere/dm-0").is_ok());
    });
    assert_eq!(
        *notes.lines.lock().expect("no panic"),
        [
            "DEBUG remove on=/nowhere/dm-0",
            "TRACE step step=Query on=/nowhere/dm-0",
            "record errno=2",
        ]
    );
}

#[test]
fn spans_of_helping_threads_reach_the_same_collector() {
    let notes = Notes::default();
    let handles = |nth| {
        let mut handles = Handles::default();
        handles.cow_loop = Some(LoopHandle::at(format!("/nowhere/loop{nth}")));
        handles
    };
    let fleet: Vec<_> = (0..40).map(handles).collect();
    known(|| assert!(Teardown::new().cleanup_all(&fleet[..1])[0].is_ok()));
    tracing::subscriber::with_default(notes.clone(), || {
        assert!(
            Teardown::new()
                .cleanup_all(&fleet)
                .iter()
                .all(Result::is_ok)
        );
    });
    let lines = notes.lines.lock().expect("no panic");
    let cleanups = lines.iter().filter(|line| *line == "DEBUG cleanup").count();
    assert_eq!(cleanups, 40, "{lines:#?}");
}
