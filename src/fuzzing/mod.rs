//! What the fuzz targets of `fuzz/` do. Each function takes any bytes, and panics if a promise is
//! broken. The unit tests call the same functions with the seeds and with random changes to them.
#![cfg(all(feature = "conntrack", feature = "divert", feature = "edit", feature = "test-util"))]

mod checksums;
mod datagrams;
mod edits;
mod input;
mod ledger;
mod received;
mod records;
mod requests;
#[cfg(test)]
mod seeds;
#[cfg(test)]
mod tests;

pub use self::{
    datagrams::datagrams,
    edits::edits,
    ledger::ledger,
    received::received,
    records::{captures, records},
    requests::requests,
};
