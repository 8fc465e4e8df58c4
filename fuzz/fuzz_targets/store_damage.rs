//! `cargo +nightly fuzz run store_damage --features libfuzzer fuzz/corpus/store_damage fuzz/seeds/store_damage`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dmsnap_fuzz::store_damage(data));
