//! What `divert` decodes, for the fuzz targets.

use super::{dump, handover, socket};

/// Decodes bytes as everything that the kernel or a predecessor sends.
pub(crate) fn decode(bytes: &[u8]) {
    let messages = socket::messages(bytes).count();
    assert!(messages <= bytes.len() / 16, "{messages} messages in {} bytes", bytes.len());
    for message in socket::messages(bytes) {
        decode_attributes(message.payload().get(4..).unwrap_or_default());
    }
    assert!(socket::replies(bytes).len() <= messages);
    decode_attributes(bytes);
}

fn decode_attributes(bytes: &[u8]) {
    if let Some((chain, _)) = dump::counter(bytes) {
        // A byte that is not UTF-8 becomes a character of three.
        assert!(chain.len() <= bytes.len() * 3);
    }
    let elements = dump::elements(bytes);
    assert!(elements.iter().map(|(key, _)| key.len()).sum::<usize>() <= bytes.len());
}

/// Decodes the description of a table in a record.
pub(crate) fn decode_table(body: &[u8]) {
    let _ = handover::decode(body);
}

/// The description of a table, to begin with.
#[cfg(test)]
pub(crate) fn table() -> Vec<u8> {
    handover::tests::body()
}
