//! `cargo +nightly fuzz run table_line --features libfuzzer fuzz/corpus/table_line fuzz/seeds/table_line`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dmsnap_fuzz::table_line(data));
