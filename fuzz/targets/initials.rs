//! See the function of this name in `nfqueue_fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nfqueue_fuzz::initials(data));
