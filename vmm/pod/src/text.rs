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

#[cfg(test)]
mod tests {
    use super::*;

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
