//! `cargo +nightly fuzz run device_name --features libfuzzer fuzz/corpus/device_name fuzz/seeds/device_name`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dmsnap_fuzz::device_name(data));
