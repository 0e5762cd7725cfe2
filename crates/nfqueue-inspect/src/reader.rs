//! Reads numbers and bytes from the front of a slice.

/// Every method returns `None` if too few bytes are left. What it has read by then is unspecified.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    pub(crate) fn short(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    /// A number of three bytes.
    pub(crate) fn medium(&mut self) -> Option<u32> {
        let bytes = self.take(3)?;
        Some(u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]))
    }

    pub(crate) fn word(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// A length of one byte, and as many bytes.
    pub(crate) fn bytes_of_byte(&mut self) -> Option<Self> {
        let length = self.byte()?;
        self.take(length.into()).map(Self)
    }

    /// A length of two bytes, and as many bytes.
    pub(crate) fn bytes_of_short(&mut self) -> Option<Self> {
        let length = self.short()?;
        self.take(length.into()).map(Self)
    }

    /// A number of QUIC: the upper two bits of the first byte say how long it is. RFC 9000, section
    /// 16.
    #[cfg(feature = "quic")]
    pub(crate) fn variable(&mut self) -> Option<u64> {
        let length = 1 << (self.0.first()? >> 6);
        let number = self.take(length)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        // Without the two bits.
        Some(number & (u64::MAX >> (66 - 8 * length)))
    }
}
