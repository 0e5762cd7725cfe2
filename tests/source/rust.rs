//! As much of Rust's syntax as the checks need.

/// A source text in two layers. Both have the lines and columns of the text. Everything else in
/// them is blank.
pub(crate) struct Layers {
    /// The code, without what is in string and character literals.
    pub(crate) code: String,
    /// The comments.
    pub(crate) comments: String,
}

#[derive(Clone, Copy)]
enum Kind {
    Code,
    Comment,
    Literal,
}

/// Separates comments from code.
pub(crate) fn layers(text: &str) -> Layers {
    let mut layers = Layers { code: String::new(), comments: String::new() };
    let mut rest = text;
    let mut word_before = false;
    while !rest.is_empty() {
        let (length, kind) = piece(rest, word_before);
        let (piece, after) = rest.split_at(length);
        for c in piece.chars() {
            let blank = if c == '\n' { '\n' } else { ' ' };
            layers.code.push(if matches!(kind, Kind::Code) { c } else { blank });
            layers.comments.push(if matches!(kind, Kind::Comment) { c } else { blank });
        }
        word_before = piece.chars().next_back().is_some_and(is_word);
        rest = after;
    }
    layers
}

/// The length of the first piece of a text that is not empty. Outside of comments and literals a
/// piece is one character.
fn piece(text: &str, word_before: bool) -> (usize, Kind) {
    if text.starts_with("//") {
        return (text.find('\n').unwrap_or(text.len()), Kind::Comment);
    }
    if text.starts_with("/*") {
        return (block_comment(text), Kind::Comment);
    }
    if text.starts_with('"') {
        return (quoted(text, '"'), Kind::Literal);
    }
    if text.starts_with('\'') {
        return character(text).map_or((1, Kind::Code), |length| (length, Kind::Literal));
    }
    if !word_before {
        let raw = text.trim_start_matches(['b', 'c']).strip_prefix('r');
        if let Some(raw) = raw.filter(|_| text.find('r').is_some_and(|at| at < 2)) {
            let hashes = raw.len() - raw.trim_start_matches('#').len();
            if raw[hashes..].starts_with('"') {
                let end = format!("\"{}", "#".repeat(hashes));
                let body = text.len() - raw.len() + hashes + 1;
                let length = text[body..].find(&end).map_or(text.len(), |at| body + at + end.len());
                return (length, Kind::Literal);
            }
        }
    }
    (text.chars().next().map_or(0, char::len_utf8), Kind::Code)
}

/// Block comments nest.
fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// The length of a literal with its quotes.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of a character literal. A lifetime is none.
fn character(text: &str) -> Option<usize> {
    let mut characters = text.chars().skip(1);
    match (characters.next()?, characters.next()?) {
        ('\\', _) => Some(quoted(text, '\'')),
        (c, '\'') => Some(c.len_utf8() + 2),
        _ => None,
    }
}

pub(crate) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where a word stands in code by itself, from a place on.
pub(crate) fn find_word(code: &str, word: &str, from: usize) -> Option<usize> {
    code[from..].match_indices(word).map(|(at, _)| from + at).find(|at| {
        let (before, after) = (&code[..*at], &code[at + word.len()..]);
        !before.chars().next_back().is_some_and(is_word) && !after.chars().next().is_some_and(is_word)
    })
}

/// The place after the bracket that closes the one at `open`.
pub(crate) fn after_bracket(code: &str, open: usize) -> usize {
    let mut depth = 0;
    for (at, c) in code[open..].char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return open + at + 1;
        }
    }
    code.len()
}

/// Code without the items that only builds for tests have.
pub(crate) fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut from = 0;
    while let Some(at) = code[from..].find("#[cfg(").map(|at| from + at) {
        let end = after_bracket(code, at + 1);
        let condition = code[at + "#[cfg(".len()..end].trim_start();
        let only_tests = condition.starts_with("test)")
            || condition.strip_prefix("all(").is_some_and(|all| find_word(all, "test", 0) == Some(0));
        kept.push_str(&code[from..if only_tests { at } else { end }]);
        from = if only_tests { item_end(code, end) } else { end };
    }
    kept.push_str(&code[from..]);
    kept
}

/// The end of the item, field or match arm that begins at a place.
fn item_end(code: &str, begin: usize) -> usize {
    const ITEMS: &[&str] = &[
        "pub",
        "mod",
        "use",
        "fn",
        "impl",
        "struct",
        "enum",
        "const",
        "static",
        "trait",
        "type",
        "unsafe",
        "async",
        "extern",
        "macro_rules",
        "let",
    ];
    let mut at = begin;
    loop {
        at += code[at..].len() - code[at..].trim_start().len();
        if !code[at..].starts_with("#[") {
            break;
        }
        at = after_bracket(code, at + 1);
    }
    let is_item = ITEMS.iter().any(|item| find_word(&code[at..], item, 0) == Some(0));
    while at < code.len() {
        match code.as_bytes()[at] {
            b'{' if is_item => return after_bracket(code, at),
            b'(' | b'[' | b'{' => at = after_bracket(code, at),
            b';' => return at + 1,
            b',' if !is_item => return at + 1,
            b'}' | b')' => return at,
            _ => at += 1,
        }
    }
    code.len()
}
