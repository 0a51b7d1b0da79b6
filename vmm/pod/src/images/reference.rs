//! An image's name as people write it, taken apart.
//!
//! The library's parser is a regular expression over Unicode. To compile it takes some 60 million instructions and
//! 6 MiB, which each start of a pod would pay twice; names in their usual form are taken apart here, and the
//! library has the last word on all others.

use oci_spec::distribution::{ParseError, Reference};

const DEFAULT_REGISTRY: &str = "docker.io";
/// Older clients' name for it.
const LEGACY_REGISTRY: &str = "index.docker.io";
const OFFICIAL: &str = "library";
const DEFAULT_TAG: &str = "latest";
/// Characters of a repository's name, and of a tag.
const MAX_REPOSITORY: usize = 255;
const MAX_TAG: usize = 128;
/// Hexadecimal digits of a SHA-256 digest.
const SHA256_DIGITS: usize = 64;

/// Takes a name apart, with the registry and the tag that it leaves out.
///
/// # Errors
/// When it is no image's name.
pub fn parse(name: &str) -> Result<Reference, ParseError> {
    usual(name).map_or_else(|| name.parse(), Ok)
}

/// None: it has another form, or none.
fn usual(name: &str) -> Option<Reference> {
    let (name, digest) = match name.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (name, None),
    };
    // A colon before the last slash is that of a registry's port.
    let path = name.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match name[path..].split_once(':') {
        Some((last, tag)) => (&name[..path + last.len()], Some(tag)),
        None => (name, None),
    };
    let (registry, repository) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (first, rest),
        _ => (DEFAULT_REGISTRY, name),
    };
    let registry = match registry {
        LEGACY_REGISTRY => DEFAULT_REGISTRY,
        registry => registry,
    };
    let repository = match repository.contains('/') || registry != DEFAULT_REGISTRY {
        true => repository.to_owned(),
        false => format!("{OFFICIAL}/{repository}"),
    };
    let fits = is_registry(registry)
        && repository.len() <= MAX_REPOSITORY
        && repository.split('/').all(is_component)
        && tag.is_none_or(is_tag)
        && digest.is_none_or(is_sha256);
    let (registry, tag) = (registry.to_owned(), tag.map(str::to_owned));
    let digest = digest.map(str::to_owned);
    fits.then(|| match (tag, digest) {
        (Some(tag), Some(digest)) => {
            Reference::with_tag_and_digest(registry, repository, tag, digest)
        }
        (None, Some(digest)) => Reference::with_digest(registry, repository, digest),
        (tag, None) => {
            let tag = tag.unwrap_or_else(|| DEFAULT_TAG.to_owned());
            Reference::with_tag(registry, repository, tag)
        }
    })
}

fn is_registry(name: &str) -> bool {
    let (host, port) = name.split_once(':').unwrap_or((name, "0"));
    let digits = !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit());
    // Neither may an underscore be in a host's name.
    digits && !host.contains('_') && is_component(host)
}

/// Lower-case letters and digits, with single separators between them.
fn is_component(name: &str) -> bool {
    let words = |c: char| matches!(c, '.' | '_' | '-');
    name.split(words).all(|word| {
        let mut bytes = word.bytes();
        !word.is_empty() && bytes.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    })
}

fn is_tag(tag: &str) -> bool {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|c| word(c) || matches!(c, b'.' | b'-'))
}

fn is_sha256(digest: &str) -> bool {
    digest.strip_prefix("sha256:").is_some_and(|digits| {
        let mut bytes = digits.bytes();
        digits.len() == SHA256_DIGITS
            && bytes.all(|c| c.is_ascii_digit() || matches!(c, b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn usual_names_need_no_library() {
        let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
        for name in [
            "busybox",
            "library/busybox:1.36",
            "index.docker.io/busybox",
            "localhost/web",
            "ghcr.io/some-body/some_thing.else:v1.2.3-rc1",
            "registry.example.com:5000/team/web",
            &format!("web@{digest}"),
            &format!("quay.io/team/web:2@{digest}"),
        ] {
            let known = usual(name).expect(name);
            assert_eq!(Ok(known), name.parse::<Reference>(), "{name}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused_as_the_library_does() {
        for name in ["", "UPPER", "a//b", "/a", "a:", "a b", "a@sha256:1", ":tag"] {
            assert_eq!(usual(name), None, "{name}");
            assert!(parse(name).is_err(), "{name}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_taken_apart_otherwise_than_the_library_does(
            name in "[a-cA._:/@-]{0,12}|([a-c]{1,3}[._/:-]{1,2}){0,4}[a-c0-9]{1,4}(:[a-zA-Z0-9_.-]{1,5})?(@sha256:[0-9a-f]{64})?"
        ) {
            if let Some(known) = usual(&name) {
                prop_assert_eq!(Ok(known), name.parse::<Reference>());
            }
        }
    }
}
