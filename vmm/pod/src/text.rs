//! Text of foreign origin, made fit for a terminal and a log.

/// The longest start of `text` that has at most `max` bytes.
#[must_use]
pub fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// Printable text: control characters (terminal escapes among them) become `\u{..}` escapes,
/// what is not UTF-8 becomes U+FFFD. Tabs stay.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for c in String::from_utf8_lossy(bytes).chars() {
        if c == '\t' || !c.is_control() {
            out.push(c);
        } else {
            out.extend(c.escape_default());
        }
    }
    out
}

/// An error and all its causes in one line: what was being done, to what, and why it failed.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors show their cause themselves.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("starting {0}")]
    struct Outer(&'static str, #[source] std::io::Error);

    #[test]
    fn a_chain_is_one_line() {
        let error = Outer("web", std::io::Error::other("no room"));

        assert_eq!(chain(&error), "starting web: no room");
    }

    #[test]
    fn cutting_keeps_characters_whole() {
        assert_eq!(cut("añb", 2), "a");
        assert_eq!(cut("añb", 3), "añ");
        assert_eq!(cut("ab", 9), "ab");
    }

    #[test]
    fn terminal_escapes_are_shown_not_obeyed() {
        assert_eq!(printable(b"a\x1b[2Jb\tc\xff"), "a\\u{1b}[2Jb\tc\u{fffd}");
    }
}
