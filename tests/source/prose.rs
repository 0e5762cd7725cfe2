//! How wide comments and documents are.

use crate::rust::layers;

/// The longest line of prose, in characters.
pub(crate) const WIDTH: usize = 100;

/// The numbers of a Rust file's lines that hold a comment and are too long.
pub(crate) fn long_comments(text: &str) -> Vec<usize> {
    let layers = layers(text);
    let lines = text.lines().zip(layers.comments.lines()).enumerate();
    let long = lines.filter(|(_, (line, comment))| {
        let comment = comment.trim().trim_start_matches(['/', '!', '*']);
        !comment.is_empty() && is_long(line) && !may_be_long(comment)
    });
    long.map(|(index, _)| index + 1).collect()
}

/// The numbers of a Markdown file's lines that hold prose and are too long.
pub(crate) fn long_lines(text: &str) -> Vec<usize> {
    let mut in_code = false;
    let mut long = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        } else if !in_code && is_long(line) && !may_be_long(line) {
            long.push(index + 1);
        }
    }
    long
}

fn is_long(line: &str) -> bool {
    line.chars().count() > WIDTH
}

/// Rows of tables, lines with an address, and lines that are only a link cannot be wrapped.
fn may_be_long(text: &str) -> bool {
    let text = text.trim();
    let is_link = text.starts_with('[') && (text.ends_with(')') && text.matches("](").count() == 1)
        || text.starts_with('[') && text.contains("]: ");
    text.starts_with('|') || text.contains("://") || is_link
}

#[cfg(test)]
mod tests {
    use super::{WIDTH, long_comments, long_lines};

    fn words(length: usize) -> String {
        "word ".repeat(length / 5 + 1)[..length].to_owned()
    }

    #[test]
    fn a_comment_may_have_100_columns() {
        for start in ["// ", "/// ", "    //! ", "let x = 1; // "] {
            let fits = format!("{start}{}", "x".repeat(WIDTH - start.len()));
            assert_eq!(long_comments(&fits), [] as [usize; 0]);
            assert_eq!(long_comments(&format!("fn f() {{}}\n{fits}x\n")), [2]);
        }
        assert_eq!(long_comments(&format!("/*\n{}\n*/", words(101))), [2]);
        // Characters are counted, not bytes.
        assert_eq!(long_comments(&format!("// {}", "µ".repeat(WIDTH - 3))), [] as [usize; 0]);
    }

    #[test]
    fn code_tables_and_addresses_may_be_longer() {
        let long = words(120);
        for line in [
            format!("/// | {long} |"),
            format!("// https://example.org {long}"),
            format!("/// [`a`]: {long}"),
            format!("let text = \"// {long}\";"),
            format!("#[doc = \"{long}\"]"),
        ] {
            assert_eq!(long_comments(&line), [] as [usize; 0], "{line}");
        }
    }

    #[test]
    fn a_document_is_measured_outside_of_code() {
        let long = words(120);
        let text = format!("{long}\n```\n{long}\n```\n| {long} |\n[{long}](target)\n- {long}\n");
        assert_eq!(long_lines(&text), [1, 7]);
    }
}
