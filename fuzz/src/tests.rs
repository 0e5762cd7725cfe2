//! The targets with their seeds, and with random changes to them.

use std::{fs, path::PathBuf};

use super::{captures, datagrams, edits, first_bytes, initials, ledger, received, records, requests, seeds, segments};

/// Calls a target with its seeds, those in `fuzz/seeds` too, and with this many changed inputs.
fn smoke(name: &str, target: fn(&[u8]), changed: usize) {
    let mut inputs = seeds::of(name);
    assert!(!inputs.is_empty());
    // A published package has no `fuzz/`, and an ordinary user may be unable to read it.
    let files = fs::read_dir(committed(name)).into_iter().flatten();
    inputs.extend(files.filter_map(|file| fs::read(file.ok()?.path()).ok()));
    inputs.iter().for_each(|input| target(input));
    let number = |name| std::env::var(name).ok().and_then(|number| number.parse::<u64>().ok());
    // More of them, and others, for those who want to look longer without cargo-fuzz.
    let times = number("NFQUEUE_FUZZ_TIMES").unwrap_or(1);
    let mut random = Random(number("NFQUEUE_FUZZ_SEED").unwrap_or(0).wrapping_add(0x9e37_79b9_7f4a_7c15).max(1));
    for _ in 0..changed * times as usize {
        let mut input = inputs[random.below(inputs.len())].clone();
        for _ in 0..=random.below(4) {
            change(&mut input, &inputs, &mut random);
        }
        target(&input);
    }
}

fn change(input: &mut Vec<u8>, inputs: &[Vec<u8>], random: &mut Random) {
    let at = random.below(input.len() + 1);
    match random.below(6) {
        0 => input.truncate(at),
        1 => input.insert(at, random.next() as u8),
        2 => {
            let other = &inputs[random.below(inputs.len())];
            input.truncate(at);
            input.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
        3 => {
            let value = [0, 1, 0x7f, 0xff][random.below(4)];
            input.iter_mut().skip(at).take(random.below(4)).for_each(|byte| *byte = value);
        }
        _ => input.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
    }
}

/// xorshift64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// The targets.
const SEEDED: [&str; 10] = [
    "captures",
    "datagrams",
    "edits",
    "first_bytes",
    "initials",
    "ledger",
    "received",
    "records",
    "requests",
    "segments",
];

fn committed(name: &str) -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(package).join("seeds").join(name)
}

#[test]
fn any_datagram_is_decoded_without_a_panic() {
    smoke("datagrams", datagrams, 5000);
}

#[test]
fn a_queue_goes_on_after_any_datagram() {
    smoke("received", received, 2000);
}

#[test]
fn a_simulated_kernel_takes_any_datagram() {
    smoke("requests", requests, 3000);
}

#[test]
fn the_ledger_agrees_with_its_model() {
    smoke("ledger", ledger, 2000);
}

#[test]
fn edited_packets_have_right_lengths_and_checksums() {
    smoke("edits", edits, 5000);
}

#[test]
fn any_record_is_decoded_or_refused() {
    smoke("records", records, 2000);
}

#[test]
fn any_capture_file_is_parsed_or_refused() {
    smoke("captures", captures, 3000);
}

#[test]
fn the_first_bytes_of_a_client_are_read_the_same_when_more_follow() {
    smoke("first_bytes", first_bytes, 20_000);
}

#[test]
fn all_accepted_segments_agree_about_the_judged_bytes() {
    smoke("segments", segments, 5000);
}

#[test]
fn all_accepted_initial_packets_agree_about_the_judged_bytes() {
    smoke("initials", initials, 2000);
}

/// After a change of a format, write the seeds again:
/// `NFQUEUE_FUZZ_WRITE_SEEDS=1 cargo test -p nfqueue-fuzz`.
#[test]
fn the_committed_seeds_are_as_long_as_those_of_the_present_formats() {
    let write = std::env::var_os("NFQUEUE_FUZZ_WRITE_SEEDS").is_some();
    for name in SEEDED {
        let folder = committed(name);
        let seeds = seeds::of(name);
        assert!(!seeds.is_empty(), "{name}");
        for (number, seed) in seeds.iter().enumerate() {
            let path = folder.join(format!("{number:02}"));
            if write {
                fs::create_dir_all(&folder).unwrap();
                fs::write(&path, seed).unwrap();
            }
            // Some contain the time of a running clock, so that only the lengths are compared.
            assert_eq!(fs::read(&path).unwrap().len(), seed.len(), "{}", path.display());
        }
    }
}
