//! Replaces the text in a UDP datagram.

use tokio_nfqueue::{Error, Packet};

/// What the sender says, and what the receiver gets to hear. Not of the same length, on purpose.
pub(crate) const SAID: &[u8] = b"the quick brown fox";
pub(crate) const HEARD: &[u8] = b"the slow green tortoise";

/// The packet with the new text; lengths and checksums are seen to.
pub(crate) fn rewritten(packet: &Packet) -> Result<Vec<u8>, Error> {
    let mut edit = packet.edit()?;
    edit.replace_payload(HEARD)?;
    Ok(edit.finish())
}
