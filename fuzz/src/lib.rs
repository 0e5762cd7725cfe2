//! What the fuzz targets do (`targets/`). Each function takes any bytes, and panics if a promise is
//! broken. The unit tests call the same functions with the seeds and with random changes to them.

mod checksums;
mod datagrams;
mod edits;
mod input;
mod inspect;
mod ledger;
mod ledger_model;
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
    inspect::{first_bytes, initials, segments},
    ledger::ledger,
    received::received,
    records::{captures, records},
    requests::requests,
};
