//! The NFQUEUE protocol and the whole logic of a queue, without sockets, threads, locks or a
//! runtime. [tokio-nfqueue](https://docs.rs/tokio-nfqueue) uses it on Tokio; programs with another
//! runtime can use it directly.
//!
//! | module | contents |
//! |---|---|
//! | [`types`] | the types that all layers share: [`Action`](types::Action), [`PacketId`](types::PacketId), [`Error`](types::Error), [`Stats`](types::Stats) |
//! | [`wire`] | the kernel's bytes: messages and attributes, decoded and encoded. It cannot panic on any input |
//! | [`record`] | the bytes in which one process describes its queues to its successor |
//! | [`state`] | the logic of a queue, [`Machine`](state::Machine): what is in flight, when to send, deadlines, the life cycle, acknowledgements, counters |
//!
//! Events come in as method calls; what must be done comes out as effects and datagrams. The time
//! is handed in.
//!
//! # Stability
//!
//! The API follows the needs of tokio-nfqueue. Any release may change it.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![deny(unsafe_code)]

pub mod record;
pub mod state;
pub mod types;
pub mod wire;
