//! The forms of names that Kubernetes prescribes.

/// RFC 1123 label: names of containers and volumes, hostnames.
pub const LABEL: Form = Form {
    rule: "must be a name of lower-case letters, digits and '-', at most 63 long, that begins and ends with a letter or digit",
    fits: is_label,
};
/// RFC 1123 subdomain: names of Pods.
pub const SUBDOMAIN: Form = Form {
    rule: "must be a name of lower-case letters, digits, '-' and '.', at most 253 long, whose parts begin and end with a letter or digit",
    fits: is_subdomain,
};
/// Keys of labels and annotations.
pub const QUALIFIED: Form = Form {
    rule: "must be a name of letters, digits, '-', '_' and '.', at most 63 long, that begins and ends with a letter or digit, and may have a DNS prefix and '/' before it",
    fits: is_qualified,
};
/// Values of labels.
pub const LABEL_VALUE: Form = Form {
    rule: "must be empty or of letters, digits, '-', '_' and '.', at most 63 long, and begin and end with a letter or digit",
    fits: |text| text.is_empty() || is_label_text(text),
};
/// IANA service name: names of ports.
pub const PORT_NAME: Form = Form {
    rule: "must be a name of lower-case letters, digits and '-', at most 15 long, with a letter in it, and no '-' at an end or beside another",
    fits: is_port_name,
};
/// Names of environment variables.
pub const ENV_NAME: Form = Form {
    rule: "must be of printable ASCII characters without '='",
    fits: |text| !text.is_empty() && text.bytes().all(|c| (0x20..0x7f).contains(&c) && c != b'='),
};

/// A rule for a text, in words and as a check.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    pub rule: &'static str,
    pub fits: fn(&str) -> bool,
}

fn is_label(text: &str) -> bool {
    text.len() <= 63 && is_label_part(text)
}

fn is_label_part(text: &str) -> bool {
    let lower = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    framed(text, lower, |c| lower(c) || c == b'-')
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label_part)
}

fn is_label_text(text: &str) -> bool {
    let alphanumeric = |c: u8| c.is_ascii_alphanumeric();
    text.len() <= 63
        && framed(text, alphanumeric, |c| {
            alphanumeric(c) || b"-_.".contains(&c)
        })
}

fn is_qualified(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_label_text(name),
        None => is_label_text(text),
    }
}

fn is_port_name(text: &str) -> bool {
    text.len() <= 15
        && is_label_part(text)
        && !text.contains("--")
        && text.bytes().any(|c| c.is_ascii_lowercase())
}

/// Not empty, `edge` at both ends and `middle` everywhere.
fn framed(text: &str, edge: impl Fn(u8) -> bool, middle: impl Fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    bytes.first().is_some_and(|c| edge(*c))
        && bytes.last().is_some_and(|c| edge(*c))
        && bytes.iter().all(|c| middle(*c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        let good = ["a", "web-1", "0"];
        let bad = [
            "",
            "-a",
            "a-",
            "A",
            "a.b",
            "a_b",
            "ä",
            "a/b",
            "..",
            &"a".repeat(64),
        ];
        assert!(good.iter().all(|text| (LABEL.fits)(text)));
        assert!(!bad.iter().any(|text| (LABEL.fits)(text)));
    }

    #[test]
    fn subdomains() {
        let good = ["a", "a.b-c.d"];
        let bad = ["", ".", "a.", "..", "a..b", "a/b", &"a".repeat(254)];
        assert!(good.iter().all(|text| (SUBDOMAIN.fits)(text)));
        assert!(!bad.iter().any(|text| (SUBDOMAIN.fits)(text)));
    }

    #[test]
    fn qualified_names() {
        let good = ["app", "app.kubernetes.io/name", "A_b.c"];
        let bad = ["", "/a", "a/", "a/b/c", "UPPER.example/x", "-a"];
        assert!(good.iter().all(|text| (QUALIFIED.fits)(text)));
        assert!(!bad.iter().any(|text| (QUALIFIED.fits)(text)));
    }

    #[test]
    fn port_names() {
        let good = ["http", "x-1"];
        let bad = ["", "80", "a--b", "a-very-long-name-it-is", "Http"];
        assert!(good.iter().all(|text| (PORT_NAME.fits)(text)));
        assert!(!bad.iter().any(|text| (PORT_NAME.fits)(text)));
    }

    #[test]
    fn environment_names() {
        let good = ["PATH", "my.var-1", "A B"];
        let bad = ["", "a=b", "a\n", "ä"];
        assert!(good.iter().all(|text| (ENV_NAME.fits)(text)));
        assert!(!bad.iter().any(|text| (ENV_NAME.fits)(text)));
    }
}
