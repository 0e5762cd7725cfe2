//! Replaces the text in a UDP datagram.

use tokio_nfqueue::{Error, Packet};

/// What is sent, and what is received. The lengths differ on purpose.
pub(crate) const SAID: &[u8] = b"the quick brown fox";
pub(crate) const HEARD: &[u8] = b"the slow green tortoise";

/// The packet with the new text. `finish` corrects lengths and checksums.
pub(crate) fn rewritten(packet: &Packet) -> Result<Vec<u8>, Error> {
    let mut edit = packet.edit()?;
    edit.replace_payload(HEARD)?;
    Ok(edit.finish())
}
