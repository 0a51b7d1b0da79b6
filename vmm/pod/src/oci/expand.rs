//! `$(NAME)` in commands, arguments and values, as Kubernetes expands it.

/// Replaces `$(NAME)` by what `lookup` knows. `$$` stands for `$`, so that `$$(NAME)`
/// stays as `$(NAME)`; a name that isn't known stays as it is, and is reported.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> Expanded {
    let mut result = String::with_capacity(text.len());
    let mut unknown = None;
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        result.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            result.push('$');
            rest = after;
            continue;
        }
        let reference = rest
            .strip_prefix('(')
            .and_then(|inner| inner.split_once(')'));
        let Some((name, after)) = reference else {
            result.push('$');
            continue;
        };
        rest = after;
        if let Some(value) = lookup(name) {
            result.push_str(&value);
        } else {
            result.push_str("$(");
            result.push_str(name);
            result.push(')');
            unknown.get_or_insert_with(|| name.to_owned());
        }
    }
    result.push_str(rest);
    Expanded {
        text: result,
        unknown,
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct Expanded {
    pub text: String,
    /// The first name that isn't known.
    pub unknown: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(text: &str) -> String {
        let known = |name: &str| (name == "A").then(|| "1".to_owned());
        expand(text, known).text
    }

    #[test]
    fn kubernetes_own_examples() {
        let cases = [
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$$$$(A)", "$$(A)"),
            ("$(B)", "$(B)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$()", "$()"),
            ("$", "$"),
            ("$$", "$"),
            ("a$", "a$"),
            ("$($(A))", "$($(A))"),
        ];
        for (text, wanted) in cases {
            assert_eq!(expanded(text), wanted, "{text}");
        }
    }

    #[test]
    fn values_are_not_expanded_again() {
        assert_eq!(expand("$(A)", |_| Some("$(A)".into())).text, "$(A)");
    }

    #[test]
    fn unknown_names_are_reported() {
        assert_eq!(
            expand("$(A)$(B)$(C)", |name| (name == "A").then(String::new))
                .unknown
                .as_deref(),
            Some("B")
        );
    }
}
