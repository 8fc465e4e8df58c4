//! `cargo +nightly fuzz run handles_json --features libfuzzer fuzz/corpus/handles_json fuzz/seeds/handles_json`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dmsnap_fuzz::handles_json(data));
