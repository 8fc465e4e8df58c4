//! `cargo +nightly fuzz run store_reader --features libfuzzer fuzz/corpus/store_reader fuzz/seeds/store_reader`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dmsnap_fuzz::store_reader(data));
