//! The parts that need no kernel: the wire codec, the ledger, the flush policy.
#![allow(missing_docs)]

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group};

use nfqueue_proto::{
    state::{
        Storage,
        flush::{FlushContext, FlushPolicy, FlushReason},
        ledger::{Decision, Ledger, Origin},
    },
    types::Action::Accept as ACCEPT,
    wire::{
        Message, Messages,
        verdict::{Attachments, VerdictFields, encode_batch, encode_single},
    },
};

const SIZES: [usize; 5] = [1, 8, 64, 512, 4096];
/// Verdicts between two flushes.
const FLUSH: usize = 64;

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600));
    targets = decode, encode, settle, ask
}

fn main() {
    // criterion knows no bench gate.
    if std::env::args().any(|argument| argument == "--gate") {
        return;
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}

fn decode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("wire/decode packets");
    for size in SIZES {
        let packets: Vec<_> = (0..size as u32).map(packet).collect();
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                for datagram in &packets {
                    for message in Messages::new(black_box(datagram)) {
                        assert!(matches!(black_box(message), Message::Packet(_)));
                    }
                }
            });
        });
    }
}

fn encode(criterion: &mut Criterion) {
    let payload = [0x45; 1400];
    let ways: [(&str, Option<&[u8]>); 2] =
        [("wire/encode verdicts", None), ("wire/encode verdicts with 1400 bytes", Some(&payload))];
    for (name, payload) in ways {
        let mut group = criterion.benchmark_group(name);
        let attachments = Attachments { payload, ..Attachments::default() };
        let mut buffer = Vec::new();
        for size in SIZES {
            group.throughput(Throughput::Elements(size as u64));
            group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
                bencher.iter(|| {
                    buffer.clear();
                    for id in 0..size as u32 {
                        let fields = black_box(VerdictFields::plain(ACCEPT));
                        encode_single(&mut buffer, (id, false), 0, id, &fields, &attachments);
                    }
                    black_box(&buffer);
                });
            });
        }
    }
    criterion.bench_function("wire/encode a batch verdict", |bencher| {
        let mut buffer = Vec::new();
        bencher.iter(|| {
            buffer.clear();
            encode_batch(&mut buffer, 1, 0, black_box(9), &VerdictFields::plain(ACCEPT));
            black_box(&buffer);
        });
    });
}

/// `size` packets arrive and are decided in one of three orders. The ledger settles after each
/// [`FLUSH`] verdicts.
fn settle(criterion: &mut Criterion) {
    for order in ["arrival", "reverse", "scattered"] {
        let mut group = criterion.benchmark_group(format!("ledger/{order} order"));
        for size in SIZES {
            let ids: Vec<u32> = match order {
                "arrival" => (0..size as u32).collect(),
                "reverse" => (0..size as u32).rev().collect(),
                // All sizes are powers of two, so multiples of an odd number visit all ids.
                _ => (0..size as u32).map(|n| n.wrapping_mul(0x9e37_79b1) % size as u32).collect(),
            };
            let (mut ledger, mut first, mut settled) = (Ledger::<()>::new(1), 1_u32, Vec::new());
            group.throughput(Throughput::Elements(size as u64));
            group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
                bencher.iter(|| {
                    for offset in 0..size as u32 {
                        ledger.arrive(first.wrapping_add(offset), Storage::None);
                    }
                    for together in ids.chunks(FLUSH) {
                        for offset in together {
                            let decision =
                                Decision { fields: VerdictFields::plain(ACCEPT), extras: None, origin: Origin::Owner };
                            ledger.decide(first.wrapping_add(*offset), decision).expect("it is undecided");
                        }
                        ledger.settle(std::iter::empty(), &mut settled);
                        black_box(&settled);
                        settled.clear();
                    }
                    first = first.wrapping_add(size as u32);
                });
            });
        }
    }
}

fn ask(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("policy/adaptive");
    for size in SIZES {
        let mut policy = FlushPolicy::adaptive(Duration::from_micros(500));
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                for decided in 1..=size {
                    let mut context = FlushContext::new(FlushReason::Verdict);
                    context.gathered = decided;
                    context.undecided = size - decided;
                    context.backlog = true;
                    context.waited = Duration::from_micros(20);
                    black_box(policy.decide(black_box(&context)));
                }
            });
        });
    }
}

/// A packet message as the kernel sends it for a UDP packet at the output hook.
fn packet(id: u32) -> Vec<u8> {
    let mut bytes = vec![0; 20];
    let mut attribute = |kind: u16, value: &[u8]| {
        bytes.extend((4 + value.len() as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    };
    let [a, b, c, d] = id.to_be_bytes();
    attribute(1, &[a, b, c, d, 8, 0, 3]);
    attribute(6, &1_u32.to_be_bytes());
    attribute(14, &1_u32.to_be_bytes());
    attribute(10, &[0x45; 92]);
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..6].copy_from_slice(&(3_u16 << 8).to_ne_bytes());
    bytes
}
