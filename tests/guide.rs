//! The programs of the guide's page on metrics, from the files that the page shows. They need
//! crates that the examples of `tokio-nfqueue` do without, so they are no doc tests.

#[path = "../src/guide/programs/metrics.rs"]
#[allow(unreachable_pub)]
mod export;
#[path = "../src/guide/programs/own_numbers.rs"]
#[allow(unreachable_pub)]
mod own_numbers;

#[test]
fn the_numbers_of_a_queue_are_exported() {
    export::main().unwrap();
}

#[test]
fn numbers_of_ones_own_are_exported() {
    own_numbers::main();
}
