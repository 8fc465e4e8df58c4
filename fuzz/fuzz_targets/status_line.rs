//! `cargo +nightly fuzz run status_line --features libfuzzer fuzz/corpus/status_line fuzz/seeds/status_line`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dmsnap_fuzz::status_line(data));
