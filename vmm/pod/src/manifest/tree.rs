//! A manifest's text as an untyped tree in which every value knows its line.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::problem::Step;

/// Manifests are far smaller; Kubernetes' own bound on an object is 1.5 MiB.
pub const MAX_TEXT: usize = 4 << 20;
const MAX_DEPTH: usize = 64;
const MAX_DOCUMENTS: usize = 1024;
const MAX_NODES: usize = 200_000;

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Counted from 1; 0: not known.
    pub line: u64,
    pub value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    String(String),
    Sequence(Vec<Node>),
    /// In the order of the text.
    Mapping(Vec<Entry>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub line: u64,
    pub key: String,
    pub value: Node,
}

impl Node {
    #[must_use]
    pub fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entries()
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| &entry.value)
    }

    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Mapping(entries) => entries,
            _ => &[],
        }
    }

    #[must_use]
    pub fn items(&self) -> &[Node] {
        match &self.value {
            Value::Sequence(items) => items,
            _ => &[],
        }
    }

    /// What is at a path, and its line; None with the line of the deepest part of
    /// the path that exists.
    #[must_use]
    pub fn locate(&self, steps: &[Step]) -> (Option<&Node>, u64) {
        let mut node = self;
        let mut line = self.line;
        for step in steps {
            let next = match step {
                Step::Index(index) => node.items().get(*index).map(|item| (item, item.line)),
                Step::Field(name) => node
                    .entries()
                    .iter()
                    .find(|entry| entry.key == *name)
                    .map(|entry| (&entry.value, entry.line)),
            };
            let Some((found, at)) = next else {
                return (None, line);
            };
            (node, line) = (found, at);
        }
        (Some(node), line)
    }
}

/// Of what has no text, and so no lines.
impl From<serde_json::Value> for Node {
    fn from(value: serde_json::Value) -> Self {
        let value = match value {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(value) => Value::Bool(value),
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(value), _) => Value::Int(value),
                (None, Some(value)) => Value::Uint(value),
                (None, None) => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => Value::String(text),
            serde_json::Value::Array(items) => {
                Value::Sequence(items.into_iter().map(Self::from).collect())
            }
            serde_json::Value::Object(fields) => Value::Mapping(
                fields
                    .into_iter()
                    .map(|(key, value)| Entry {
                        line: 0,
                        key,
                        value: value.into(),
                    })
                    .collect(),
            ),
        };
        Self { line: 0, value }
    }
}

/// Reads all documents of a YAML (or JSON) text. Empty documents are left out.
///
/// # Errors
/// What the parser says, in one line that begins with the place in the text.
pub fn parse(text: &str) -> Result<Vec<Node>, String> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_documents: MAX_DOCUMENTS,
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_aliases: 1024,
            max_anchors: 1024,
            max_total_scalar_bytes: MAX_TEXT,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 100_000,
            max_alias_expansions_per_anchor: 1024,
        },
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        legacy_octal_numbers: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    };
    let documents: Vec<Spanned<Raw>> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| {
            error
                .to_string()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        })?;
    Ok(documents
        .into_iter()
        .map(Node::from)
        .filter(|node| !node.is_null())
        .collect())
}

/// [`Value`] while it is read; `Spanned` brings the lines.
#[derive(Debug)]
struct Raw(Value);

impl From<Spanned<Raw>> for Node {
    fn from(raw: Spanned<Raw>) -> Self {
        Self {
            line: raw.referenced.line(),
            value: raw.value.0,
        }
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw, D::Error> {
        Raw::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw(Value::Int(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw(
            i64::try_from(value).map_or(Value::Uint(value), Value::Int)
        ))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw(Value::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw(Value::String(value.to_owned())))
    }

    fn visit_string<E>(self, value: String) -> Result<Raw, E> {
        Ok(Raw(Value::String(value)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Raw, A::Error> {
        let mut nodes = Vec::new();
        while let Some(item) = items.next_element::<Spanned<Raw>>()? {
            nodes.push(Node::from(item));
        }
        Ok(Raw(Value::Sequence(nodes)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Raw, A::Error> {
        let mut entries: Vec<Entry> = Vec::new();
        while let Some(key) = fields.next_key::<Spanned<String>>()? {
            let value = fields.next_value::<Spanned<Raw>>()?;
            if entries.iter().any(|entry| entry.key == key.value) {
                return Err(de::Error::custom(format_args!(
                    "duplicate field {:?}",
                    key.value
                )));
            }
            entries.push(Entry {
                line: key.referenced.line(),
                key: key.value,
                value: value.into(),
            });
        }
        Ok(Raw(Value::Mapping(entries)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Node {
        parse(text).unwrap().remove(0)
    }

    #[test]
    fn values_know_their_lines() {
        let tree = one("a: 1\nb:\n  - x\n  - c: z\n");
        let (node, line) = tree.locate(&[
            Step::Field("b".into()),
            Step::Index(1),
            Step::Field("c".into()),
        ]);
        assert_eq!(node.and_then(Node::as_str), Some("z"));
        assert_eq!(line, 4);
        assert_eq!(
            tree.locate(&[Step::Field("b".into()), Step::Index(7)]),
            (None, 2)
        );
    }

    #[test]
    fn yaml_1_1_habits_are_read() {
        let tree = one("mode: 0400\nnew: 0o17\nflag: yes\nquoted: \"yes\"\nempty:\n");
        assert_eq!(tree.get("mode").unwrap().value, Value::Int(0o400));
        assert_eq!(tree.get("new").unwrap().value, Value::Int(0o17));
        assert_eq!(tree.get("flag").unwrap().value, Value::Bool(true));
        assert_eq!(
            tree.get("quoted").unwrap().value,
            Value::String("yes".into())
        );
        assert!(tree.get("empty").unwrap().is_null());
    }

    #[test]
    fn merge_keys_and_folded_scalars_are_read() {
        let tree = one("base: &b {x: 1}\nother:\n  <<: *b\n  y: 2\nfold: >\n  a\n  b\n");
        assert_eq!(
            tree.get("other").unwrap().get("x").unwrap().value,
            Value::Int(1)
        );
        assert_eq!(tree.get("fold").unwrap().as_str(), Some("a b\n"));
    }

    #[test]
    fn json_is_read() {
        let tree = one("{\n\t\"a\": [1, true, null, \"\\u00e4\\/\"],\n\t\"b\": {\"c\": 1.5}\n}");
        assert_eq!(tree.get("a").unwrap().items()[3].as_str(), Some("ä/"));
        assert_eq!(
            tree.get("b").unwrap().get("c").unwrap().value,
            Value::Float(1.5)
        );
    }

    #[test]
    fn several_documents_are_read_and_empty_ones_left_out() {
        let documents = parse("---\n---\na: 1\n---\n# nothing\n---\nb: 2\n").unwrap();
        assert_eq!(documents.len(), 2);
    }

    #[test]
    fn faults_name_their_line() {
        let error = parse("a: 1\nb: [1, 2\nc: 3\n").unwrap_err();
        assert!(error.contains("line 3"), "{error}");
        let duplicate = parse("a: 1\na: 2\n").unwrap_err();
        assert!(duplicate.contains("line 2"), "{duplicate}");
    }

    #[test]
    fn alias_bombs_end_early() {
        let mut text = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
        for level in 1..9 {
            let below = format!("*a{}", level - 1);
            text.push_str(&format!(
                "a{level}: &a{level} [{}]\n",
                vec![below; 10].join(",")
            ));
        }
        assert!(parse(&text).is_err());
    }

    #[test]
    fn nesting_is_bounded() {
        assert!(parse(&"[".repeat(100_000)).is_err());
        assert!(parse(&format!("{}{}", "[".repeat(80), "]".repeat(80))).is_err());
    }
}
