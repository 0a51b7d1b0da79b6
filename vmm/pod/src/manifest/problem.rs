//! What is wrong with a manifest: where, which value, and what is allowed there.

use std::fmt;

use super::tree::{Node, Value};

/// At most so many faults are told of at once.
const MAX_PROBLEMS: usize = 10;
/// Longer values are cut in messages.
const MAX_VALUE: usize = 80;

/// Where a field is, from the root of its document.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldPath(Vec<Step>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Field(String),
    Index(usize),
}

impl FieldPath {
    #[must_use]
    pub fn field(&self, name: &str) -> Self {
        let mut steps = self.0.clone();
        // A dotted name is a shorthand of the callers for a field in a field; keys
        // of maps, which may have dots of their own, go through `key`.
        steps.extend(name.split('.').map(|part| Step::Field(part.to_owned())));
        Self(steps)
    }

    #[must_use]
    pub fn key(&self, name: &str) -> Self {
        let mut steps = self.0.clone();
        steps.push(Step::Field(name.to_owned()));
        Self(steps)
    }

    #[must_use]
    pub fn index(&self, index: usize) -> Self {
        let mut steps = self.0.clone();
        steps.push(Step::Index(index));
        Self(steps)
    }

    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.0
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Field(name) if name.contains(['.', '[']) => write!(f, "[{name:?}]")?,
                Step::Field(name) if position == 0 => f.write_str(name)?,
                Step::Field(name) => write!(f, ".{name}")?,
            }
        }
        Ok(())
    }
}

/// One fault of one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub path: FieldPath,
    /// What is wrong with the value, and what would be right.
    pub message: String,
}

/// Faults as they are found, so that the user hears of several at once.
#[derive(Debug, Default)]
pub struct Problems(Vec<Problem>);

impl Problems {
    pub fn add(&mut self, path: FieldPath, message: impl Into<String>) {
        self.0.push(Problem {
            path,
            message: message.into(),
        });
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Why a manifest was refused. Displayed, it is one line for each fault, with file,
/// line where known, field, value and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ManifestError {
    message: String,
}

impl ManifestError {
    /// A fault of the file as a whole.
    pub(super) fn of_file(source: &str, message: impl fmt::Display) -> Self {
        Self {
            message: format!("{source}: {message}"),
        }
    }

    /// Faults of fields, with lines and values looked up in the document.
    pub(super) fn of_fields(source: &str, document: &Node, problems: &Problems) -> Self {
        let mut lines: Vec<String> = problems
            .0
            .iter()
            .take(MAX_PROBLEMS)
            .map(|problem| describe(source, document, problem))
            .collect();
        let more = problems.0.len().saturating_sub(MAX_PROBLEMS);
        if more > 0 {
            lines.push(format!("{source}: and {more} more"));
        }
        Self {
            message: lines.join("\n"),
        }
    }
}

fn describe(source: &str, document: &Node, problem: &Problem) -> String {
    let (node, line) = document.locate(problem.path.steps());
    let place = if line == 0 {
        source.to_owned()
    } else {
        format!("{source}:{line}")
    };
    let value = node
        .and_then(scalar_text)
        .map(|text| format!(" {text}:"))
        .unwrap_or_default();
    let path = problem.path.to_string();
    let field = if path.is_empty() {
        String::new()
    } else {
        format!(" {path}:")
    };
    format!("{place}:{field}{value} {}", problem.message)
}

/// A scalar as JSON writes it; None for what takes more than a line.
fn scalar_text(node: &Node) -> Option<String> {
    let text = match &node.value {
        Value::Null | Value::Sequence(_) | Value::Mapping(_) => return None,
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Uint(value) => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::String(value) => {
            let mut shown: String = value.chars().take(MAX_VALUE).collect();
            if shown.len() < value.len() {
                shown.push('…');
            }
            format!("{shown:?}")
        }
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_written_as_kubernetes_writes_it() {
        let path = FieldPath::default()
            .field("spec.containers")
            .index(1)
            .field("volumeMounts")
            .index(0)
            .field("name");
        assert_eq!(path.to_string(), "spec.containers[1].volumeMounts[0].name");
    }

    #[test]
    fn keys_with_dots_are_quoted() {
        let path = FieldPath::default()
            .field("metadata.labels")
            .key("example.com/role");
        assert_eq!(path.to_string(), "metadata.labels[\"example.com/role\"]");
    }
}
