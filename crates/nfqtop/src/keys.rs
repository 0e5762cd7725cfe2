//! The keys in the bytes that a terminal sends.
//!
//! `crossterm` can read them, too, but waits for nothing else, and may leave a key unread if the
//! terminal is resized at the same time.

/// A key that means something here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    Char(char),
    /// ctrl-c
    Interrupt,
    Escape,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
}

/// Keeps a sequence that has not come whole.
#[derive(Debug, Default)]
pub(crate) struct Keys(Vec<u8>);

impl Keys {
    /// Unknown keys are skipped.
    pub(crate) fn read(&mut self, bytes: &[u8]) -> Vec<Key> {
        self.0.extend_from_slice(bytes);
        let (mut keys, mut used) = (Vec::new(), 0);
        while let Some((key, length)) = next(&self.0[used..]) {
            keys.extend(key);
            used += length;
        }
        self.0.drain(..used);
        keys
    }
}

/// The first key, if it is known, and its length in bytes. `None` if there is none, or a part.
fn next(bytes: &[u8]) -> Option<(Option<Key>, usize)> {
    match bytes {
        [] => None,
        [0x1b, b'[' | b'O', rest @ ..] => {
            // Parameters, and a final byte.
            let end = rest.iter().position(|byte| (0x40..=0x7e).contains(byte))?;
            Some((sequence(&rest[..=end]), end + 3))
        }
        // The key Esc, or alt with another key, which is taken for both.
        [0x1b, ..] => Some((Some(Key::Escape), 1)),
        [0x03, ..] => Some((Some(Key::Interrupt), 1)),
        [byte @ 0x20..=0x7e, ..] => Some((Some(Key::Char(char::from(*byte))), 1)),
        [_, ..] => Some((None, 1)),
    }
}

fn sequence(bytes: &[u8]) -> Option<Key> {
    match bytes {
        b"A" => Some(Key::Up),
        b"B" => Some(Key::Down),
        b"H" | b"1~" | b"7~" => Some(Key::Home),
        b"F" | b"4~" | b"8~" => Some(Key::End),
        b"5~" => Some(Key::PageUp),
        b"6~" => Some(Key::PageDown),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_keys() {
        let keys = Keys::default().read(b"j\x1b[A\x1bOB\x1b[6~\x1b[1;5C\x1b[H\x03\xc3\xa4q\x1b");
        let expected =
            [Key::Char('j'), Key::Up, Key::Down, Key::PageDown, Key::Home, Key::Interrupt, Key::Char('q'), Key::Escape];
        assert_eq!(keys, expected);
    }

    #[test]
    fn a_sequence_may_come_in_parts() {
        let mut keys = Keys::default();
        assert_eq!(keys.read(b"\x1b["), []);
        assert_eq!(keys.read(b"5"), []);
        assert_eq!(keys.read(b"~k"), [Key::PageUp, Key::Char('k')]);
    }
}
