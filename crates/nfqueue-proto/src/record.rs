//! The bytes in which one process describes its queues, and what is handed over with them, to
//! another process.
//!
//! A record begins with [`MAGIC`] and a version. A reader understands only its own version. All
//! numbers are little-endian; texts, bytes and lists begin with their length. Reading cannot panic
//! on any input, and a length in the input never sizes an allocation.

/// The first bytes of a record.
pub const MAGIC: [u8; 16] = *b"tokio-nfqueue\0ho";
/// The version of the format. It changes with every change of the format.
pub const VERSION: u32 = 1;
/// Magic and version.
pub const HEADER: usize = MAGIC.len() + 4;

/// What is handed over.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// The queues.
    pub queues: Vec<QueueRecord>,
    /// What goes along with them.
    pub parts: Vec<PartRecord>,
}

/// A queue, and how far its packets have been read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueRecord {
    /// The kernel's unique number of the socket (`SO_COOKIE`).
    pub cookie: u64,
    /// The netlink port id of the socket.
    pub port_id: u32,
    /// The number of the queue.
    pub queue: u16,
    /// How many packets the kernel queues at most.
    pub max_len: u32,
    /// The copy range in force, in bytes.
    pub payload: u32,
    /// The longest copy range of messages that may be unread, in bytes.
    pub longest: u32,
    /// Connection tracking entries were requested.
    pub conntrack: bool,
    /// Bytes of optional attributes in a message.
    pub attributes: u32,
    /// The packet id that is expected next.
    pub next: u32,
    /// The sequence number of the last message to the kernel.
    pub sequence: u32,
    /// Whether batches are allowed: it is known which packets the kernel holds.
    pub batches: bool,
    /// Packets whose id could not be read, since the last one whose id could.
    pub unknown: u32,
    /// Received and not handed out: packet ids and datagrams.
    pub unread: Vec<(u32, Vec<u8>)>,
}

impl QueueRecord {
    /// One whose fields all differ, for tests.
    #[doc(hidden)]
    pub fn example() -> Self {
        Self {
            cookie: 1 << 40,
            port_id: u32::MAX - 5,
            queue: 7,
            max_len: 4096,
            payload: 100,
            longest: 65_531,
            conntrack: true,
            attributes: 640,
            next: 12,
            sequence: u32::MAX,
            batches: false,
            unknown: 3,
            unread: vec![(10, b"one".to_vec()), (11, Vec::new())],
        }
    }
}

/// What goes along with queues, for example an nf_tables table: a socket, and bytes that say what
/// it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartRecord {
    /// The kernel's unique number of the socket (`SO_COOKIE`).
    pub cookie: u64,
    /// What the socket is for. Only the reader of this kind of part understands it.
    pub body: Vec<u8>,
}

/// Why a record cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    /// It does not begin with [`MAGIC`], or it is damaged.
    Malformed,
    /// It has another version.
    Version(u32),
}

/// The first bytes of a record of this version.
pub fn header() -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..MAGIC.len()].copy_from_slice(&MAGIC);
    header[MAGIC.len()..].copy_from_slice(&VERSION.to_le_bytes());
    header
}

/// Checks the first bytes of a record; returns the rest.
pub fn check_header(bytes: &[u8]) -> Result<&[u8], Unreadable> {
    let rest = bytes.strip_prefix(&MAGIC).ok_or(Unreadable::Malformed)?;
    match rest.split_first_chunk() {
        Some((version, rest)) if *version == VERSION.to_le_bytes() => Ok(rest),
        Some((version, _)) => Err(Unreadable::Version(u32::from_le_bytes(*version))),
        None => Err(Unreadable::Malformed),
    }
}

impl Record {
    /// The bytes of the record, with [`header`] in front.
    pub fn encode(&self) -> Vec<u8> {
        let mut fields = FieldWriter(header().to_vec());
        fields.u32(self.queues.len() as u32);
        for queue in &self.queues {
            fields.u64(queue.cookie).u32(queue.port_id).u32(queue.queue.into()).u32(queue.max_len);
            fields.u32(queue.payload).u32(queue.longest).flag(queue.conntrack).u32(queue.attributes);
            fields.u32(queue.next).u32(queue.sequence).flag(queue.batches).u32(queue.unknown);
            fields.u32(queue.unread.len() as u32);
            for (id, datagram) in &queue.unread {
                fields.u32(*id).bytes(datagram);
            }
        }
        fields.u32(self.parts.len() as u32);
        for part in &self.parts {
            fields.u64(part.cookie).bytes(&part.body);
        }
        fields.0
    }

    /// Reads a record and its header.
    ///
    /// # Errors
    /// It has another version, is damaged, or has bytes behind its end.
    pub fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        let mut fields = FieldReader(check_header(bytes)?);
        let record = Self::read(&mut fields).ok_or(Unreadable::Malformed)?;
        if fields.is_at_end() { Ok(record) } else { Err(Unreadable::Malformed) }
    }

    fn read(fields: &mut FieldReader<'_>) -> Option<Self> {
        let mut record = Self::default();
        for _ in 0..fields.u32()? {
            record.queues.push(QueueRecord {
                cookie: fields.u64()?,
                port_id: fields.u32()?,
                queue: fields.u32()?.try_into().ok()?,
                max_len: fields.u32()?,
                payload: fields.u32().filter(|payload| *payload as usize <= crate::wire::MAX_PAYLOAD)?,
                longest: fields.u32().filter(|payload| *payload as usize <= crate::wire::MAX_PAYLOAD)?,
                conntrack: fields.flag()?,
                attributes: fields.u32().filter(|attributes| *attributes <= LONGEST_ATTRIBUTES)?,
                next: fields.u32()?,
                sequence: fields.u32()?,
                batches: fields.flag()?,
                unknown: fields.u32()?,
                unread: {
                    let mut unread = Vec::new();
                    for _ in 0..fields.u32()? {
                        unread.push((fields.u32()?, fields.bytes()?.to_vec()));
                    }
                    unread
                },
            });
        }
        for _ in 0..fields.u32()? {
            record.parts.push(PartRecord { cookie: fields.u64()?, body: fields.bytes()?.to_vec() });
        }
        Some(record)
    }
}

/// More than the optional attributes of a message take.
const LONGEST_ATTRIBUTES: u32 = 65_536;

/// Appends fields.
#[derive(Debug, Default)]
pub struct FieldWriter(pub Vec<u8>);

impl FieldWriter {
    /// Appends 4 bytes.
    pub fn u32(&mut self, number: u32) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// Appends 8 bytes.
    pub fn u64(&mut self, number: u64) -> &mut Self {
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// Appends 0 or 1 as 4 bytes.
    pub fn flag(&mut self, flag: bool) -> &mut Self {
        self.u32(flag.into())
    }

    /// Appends the length as 4 bytes, then the bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(bytes.len() as u32);
        self.0.extend_from_slice(bytes);
        self
    }
}

/// Takes fields from the front. `None` if there is no such field.
#[derive(Debug)]
pub struct FieldReader<'a>(pub &'a [u8]);

impl<'a> FieldReader<'a> {
    /// Whether every byte has been taken.
    pub fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    /// Takes 4 bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    /// Takes 8 bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// Takes 4 bytes. `None` for a value other than 0 and 1.
    pub fn flag(&mut self) -> Option<bool> {
        match self.u32()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    /// Takes a length of 4 bytes, and so many bytes.
    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()? as usize;
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> Record {
        let queue = QueueRecord::example();
        let part = PartRecord { cookie: 9, body: b"table".to_vec() };
        Record { queues: vec![queue.clone(), QueueRecord { queue: 8, unread: Vec::new(), ..queue }], parts: vec![part] }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        for record in [record(), Record::default()] {
            assert_eq!(Record::decode(&record.encode()), Ok(record));
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = record().encode();
        bytes[MAGIC.len()] = 2;
        assert_eq!(Record::decode(&bytes), Err(Unreadable::Version(2)));
    }

    #[test]
    fn shorter_and_longer_records_are_malformed() {
        let bytes = record().encode();
        for length in 0..bytes.len() {
            assert_eq!(Record::decode(&bytes[..length]), Err(Unreadable::Malformed), "{length}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(Record::decode(&longer), Err(Unreadable::Malformed));
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0..400_usize, value: u8) {
            let _ = Record::decode(&bytes);
            let _ = Record::decode(&[&header()[..], &bytes].concat());
            let mut damaged = record().encode();
            let at = at % damaged.len();
            damaged[at] = value;
            let _ = Record::decode(&damaged);
        }
    }
}
