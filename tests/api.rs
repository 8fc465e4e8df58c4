//! The public API without root.
