//! Spans for whoever collects them through `tracing`: one for each operation, one for each kernel call.
//!
//! Without the feature `tracing` all of this is nothing.

#[cfg(not(feature = "tracing"))]
pub(crate) use off::*;
#[cfg(feature = "tracing")]
pub(crate) use on::*;

#[cfg(feature = "tracing")]
mod on {
    use std::path::Path;

    use nix::errno::Errno;
    use tracing::span::EnteredSpan;
    use tracing::{Dispatch, Span, debug_span, dispatcher, field, trace_span};

    use crate::base::{DeviceId, DeviceName, Handles};
    use crate::error::Step;

    pub(crate) fn create(origin: &Path, cow: &Path, name: &DeviceName) -> EnteredSpan {
        let (origin, cow) = (origin.display(), cow.display());
        debug_span!("create", %name, %origin, %cow).entered()
    }

    pub(crate) fn cleanup(handles: &Handles) -> EnteredSpan {
        let span = debug_span!("cleanup", on = field::Empty);
        if !span.is_disabled() {
            if let Some(path) = handles.path() {
                span.record("on", field::display(path.display()));
            }
        }
        span.entered()
    }

    pub(crate) fn remove(device: &DeviceId) -> EnteredSpan {
        debug_span!("remove", on = %device).entered()
    }

    pub(crate) fn step(step: Step, on: &Path) -> EnteredSpan {
        trace_span!("step", ?step, on = %on.display(), errno = field::Empty).entered()
    }

    pub(crate) fn answered<T>(span: &EnteredSpan, answer: &Result<T, Errno>) {
        if let Err(errno) = answer {
            span.record("errno", *errno as i32);
        }
    }

    /// What another thread needs, so that its spans are this one's.
    pub(crate) struct Surroundings(Dispatch, Span);

    pub(crate) fn surroundings() -> Surroundings {
        Surroundings(dispatcher::get_default(Dispatch::clone), Span::current())
    }

    impl Surroundings {
        pub(crate) fn within<T>(&self, work: impl FnOnce() -> T) -> T {
            dispatcher::with_default(&self.0, || self.1.in_scope(work))
        }
    }
}

#[cfg(not(feature = "tracing"))]
mod off {
    use std::path::Path;

    use nix::errno::Errno;

    use crate::base::{DeviceId, DeviceName, Handles};
    use crate::error::Step;

    pub(crate) struct NoSpan;

    pub(crate) fn create(_origin: &Path, _cow: &Path, _name: &DeviceName) -> NoSpan {
        NoSpan
    }

    pub(crate) fn cleanup(_handles: &Handles) -> NoSpan {
        NoSpan
    }

    pub(crate) fn remove(_device: &DeviceId) -> NoSpan {
        NoSpan
    }

    pub(crate) fn step(_step: Step, _on: &Path) -> NoSpan {
        NoSpan
    }

    pub(crate) fn answered<T>(_span: &NoSpan, _answer: &Result<T, Errno>) {}

    pub(crate) struct Surroundings;

    pub(crate) fn surroundings() -> Surroundings {
        Surroundings
    }

    impl Surroundings {
        pub(crate) fn within<T>(&self, work: impl FnOnce() -> T) -> T {
            work()
        }
    }
}
