//! From the untyped tree to Kubernetes' types, with every fault at its field.
//!
//! The types of k8s-openapi skip unknown fields. They do name the fields that they
//! know to the deserializer, so this one looks for strangers itself.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess,
    Visitor,
};
use serde::forward_to_deserialize_any;

use super::problem::{FieldPath, Problems};
use super::tree::{Entry, Node, Value};

/// Deserializes a node. Unknown fields are added to `problems`; so is what else is
/// wrong, and then the answer is None.
pub fn deserialize<T: DeserializeOwned>(
    node: &Node,
    path: &FieldPath,
    problems: &mut Problems,
) -> Option<T> {
    match T::deserialize(Typed {
        node,
        path: path.clone(),
        problems,
    }) {
        Ok(value) => Some(value),
        Err(error) => {
            problems.add(error.path.unwrap_or_else(|| path.clone()), error.message);
            None
        }
    }
}

#[derive(Debug)]
struct TypeError {
    path: Option<FieldPath>,
    message: String,
}

impl TypeError {
    /// The innermost place wins: it is the first to be told.
    fn at(mut self, path: &FieldPath) -> Self {
        self.path.get_or_insert_with(|| path.clone());
        self
    }
}

impl fmt::Display for TypeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for TypeError {}

impl de::Error for TypeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self {
            path: None,
            message: message.to_string(),
        }
    }

    fn invalid_type(unexpected: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let hint = match unexpected {
            de::Unexpected::Bool(_) | de::Unexpected::Signed(_) | de::Unexpected::Float(_) => {
                "; a text that looks like one needs quotes"
            }
            _ => "",
        };
        Self::custom(format_args!(
            "must be {}, not {}{hint}",
            plain_name(&expected.to_string()),
            kind(unexpected)
        ))
    }
}

/// serde's names for what a type expects, in the words of a manifest's author.
fn plain_name(expected: &str) -> String {
    match expected {
        "i32" | "i64" | "u16" | "u32" | "u64" => "a whole number".to_owned(),
        "f64" => "a number".to_owned(),
        "IntOrString" => "a number or a text".to_owned(),
        "Quantity" => "a quantity such as 500m, 2 or 64Mi".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" => "a text".to_owned(),
        "a sequence" => "a list".to_owned(),
        other => other.to_owned(),
    }
}

fn kind(unexpected: de::Unexpected<'_>) -> &'static str {
    match unexpected {
        de::Unexpected::Bool(_) => "true or false",
        de::Unexpected::Signed(_) | de::Unexpected::Unsigned(_) => "a whole number",
        de::Unexpected::Float(_) => "a number",
        de::Unexpected::Str(_) => "a text",
        de::Unexpected::Seq => "a list",
        de::Unexpected::Map => "a mapping",
        de::Unexpected::Unit | de::Unexpected::Option => "nothing",
        _ => "that",
    }
}

struct Typed<'a> {
    node: &'a Node,
    path: FieldPath,
    problems: &'a mut Problems,
}

impl<'a> Typed<'a> {
    fn visit<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        let path = self.path.clone();
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(value) => visitor.visit_i64(*value),
            Value::Uint(value) => visitor.visit_u64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::String(value) => visitor.visit_str(value),
            Value::Sequence(items) => visitor.visit_seq(Items {
                items: items.iter().enumerate(),
                path: self.path,
                problems: self.problems,
            }),
            Value::Mapping(entries) => visitor.visit_map(Fields {
                entries: entries.iter(),
                pending: None,
                path: self.path,
                problems: self.problems,
            }),
        }
        .map_err(|error| error.at(&path))
    }

    fn report_unknown(&mut self, known: &[&str]) {
        for entry in self.node.entries() {
            if !known.contains(&entry.key.as_str()) {
                let hint = closest(&entry.key, known)
                    .map(|name| format!("; did you mean {name}?"))
                    .unwrap_or_default();
                self.problems
                    .add(self.path.key(&entry.key), format!("unknown field{hint}"));
            }
        }
    }
}

impl<'de> Deserializer<'de> for Typed<'_> {
    type Error = TypeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        self.visit(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, TypeError> {
        match self.node.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        let path = self.path.clone();
        visitor
            .visit_newtype_struct(self)
            .map_err(|error| error.at(&path))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        mut self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, TypeError> {
        if !matches!(self.node.value, Value::Mapping(_)) {
            return Err(de::Error::invalid_type(unexpected(self.node), &"a mapping"))
                .map_err(|error: TypeError| error.at(&self.path));
        }
        self.report_unknown(fields);
        self.visit(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

fn unexpected(node: &Node) -> de::Unexpected<'_> {
    match &node.value {
        Value::Null => de::Unexpected::Unit,
        Value::Bool(value) => de::Unexpected::Bool(*value),
        Value::Int(value) => de::Unexpected::Signed(*value),
        Value::Uint(value) => de::Unexpected::Unsigned(*value),
        Value::Float(value) => de::Unexpected::Float(*value),
        Value::String(value) => de::Unexpected::Str(value),
        Value::Sequence(_) => de::Unexpected::Seq,
        Value::Mapping(_) => de::Unexpected::Map,
    }
}

struct Items<'a> {
    items: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
    path: FieldPath,
    problems: &'a mut Problems,
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = TypeError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, TypeError> {
        let Some((index, node)) = self.items.next() else {
            return Ok(None);
        };
        seed.deserialize(Typed {
            node,
            path: self.path.index(index),
            problems: self.problems,
        })
        .map(Some)
    }
}

struct Fields<'a> {
    entries: std::slice::Iter<'a, Entry>,
    pending: Option<&'a Entry>,
    path: FieldPath,
    problems: &'a mut Problems,
}

impl<'de> MapAccess<'de> for Fields<'_> {
    type Error = TypeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, TypeError> {
        // A field that is null is a field that is not set.
        let Some(entry) = self.entries.by_ref().find(|entry| !entry.value.is_null()) else {
            return Ok(None);
        };
        self.pending = Some(entry);
        let key: StrDeserializer<'_, TypeError> = entry.key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, TypeError> {
        let entry = self
            .pending
            .take()
            .ok_or_else(|| de::Error::custom("a value without a key"))?;
        let path = self.path.key(&entry.key);
        seed.deserialize(Typed {
            node: &entry.value,
            path: path.clone(),
            problems: self.problems,
        })
        .map_err(|error| error.at(&path))
    }
}

/// The known name that a typing slip most likely meant.
pub fn closest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let lower = name.to_lowercase();
    known
        .iter()
        .map(|candidate| (distance(&lower, &candidate.to_lowercase()), *candidate))
        .filter(|(distance, candidate)| *distance <= 1 + candidate.len() / 5)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance. Both texts are field names; a longer one is no slip.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 || b.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;

    use super::super::problem::ManifestError;
    use super::super::tree;
    use super::*;

    fn faults(text: &str) -> String {
        let document = tree::parse(text).unwrap().remove(0);
        let mut problems = Problems::default();
        let _: Option<Pod> = deserialize(&document, &FieldPath::default(), &mut problems);
        ManifestError::of_fields("f.yaml", &document, &problems).to_string()
    }

    #[test]
    fn unknown_fields_are_named_with_a_guess() {
        let text = "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - name: a\n    imagee: b\n    qwertz: 1\n";
        assert_eq!(
            faults(text),
            "f.yaml:6: spec.containers[0].imagee: \"b\": unknown field; did you mean image?\n\
             f.yaml:7: spec.containers[0].qwertz: 1: unknown field"
        );
    }

    #[test]
    fn wrong_types_are_named() {
        let text = "apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  - name: a\n    env:\n    - name: X\n      value: 8080\n";
        assert_eq!(
            faults(text),
            "f.yaml:8: spec.containers[0].env[0].value: 8080: must be a text, not a whole number; \
             a text that looks like one needs quotes"
        );
        assert_eq!(
            faults("apiVersion: v1\nkind: Pod\nspec:\n  containers: {a: b}\n"),
            "f.yaml:4: spec.containers: must be a list, not a mapping"
        );
        assert_eq!(
            faults("apiVersion: v1\nkind: Pod\nspec: [1]\n"),
            "f.yaml:3: spec: must be a mapping, not a list"
        );
    }

    #[test]
    fn null_is_not_set() {
        assert_eq!(
            faults("apiVersion: v1\nkind: Pod\nspec:\n  containers:\n  volumes: null\n"),
            ""
        );
    }

    #[test]
    fn numbers_become_quantities() {
        let document = tree::parse("apiVersion: v1\nkind: Pod\nspec: {containers: [{name: a, resources: {limits: {cpu: 2, memory: 1.5Gi}}}]}").unwrap().remove(0);
        let mut problems = Problems::default();
        let pod: Pod = deserialize(&document, &FieldPath::default(), &mut problems).unwrap();
        let limits = pod
            .spec
            .unwrap()
            .containers
            .remove(0)
            .resources
            .unwrap()
            .limits
            .unwrap();
        assert_eq!(limits["cpu"].0, "2");
        assert_eq!(limits["memory"].0, "1.5Gi");
    }

    #[test]
    fn a_slip_is_guessed_and_a_stranger_is_not() {
        assert_eq!(
            closest("volumemounts", &["volumeMounts", "volumes"]),
            Some("volumeMounts")
        );
        assert_eq!(closest("sidecar", &["volumeMounts", "volumes"]), None);
    }
}
