#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tokio_nfqueue::fuzzing::datagrams(data));
