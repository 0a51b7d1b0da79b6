//! The fields of a Pod that its containers can be told of (`valueFrom.fieldRef`).

use k8s_openapi::api::core::v1::Pod;

/// Whether a path can be answered by [`value`].
///
/// # Errors
/// What can be asked for, in words.
pub fn check(path: &str) -> Result<(), String> {
    match parse(path) {
        Some(_) => Ok(()),
        None => Err(
            "not supported yet; only metadata.name, metadata.namespace, metadata.uid, \
                     metadata.labels['KEY'] and metadata.annotations['KEY']"
                .to_owned(),
        ),
    }
}

/// The value of a field; None where [`check`] refuses the path. A label that isn't
/// set is an empty text, as in Kubernetes.
#[must_use]
pub fn value(pod: &Pod, uid: &str, path: &str) -> Option<String> {
    let metadata = &pod.metadata;
    let entry = |map: &Option<std::collections::BTreeMap<String, String>>, key: &str| {
        map.as_ref()
            .and_then(|map| map.get(key))
            .cloned()
            .unwrap_or_default()
    };
    Some(match parse(path)? {
        Field::Name => metadata.name.clone().unwrap_or_default(),
        Field::Namespace => metadata
            .namespace
            .clone()
            .unwrap_or_else(|| "default".to_owned()),
        Field::Uid => uid.to_owned(),
        Field::Label(key) => entry(&metadata.labels, key),
        Field::Annotation(key) => entry(&metadata.annotations, key),
    })
}

enum Field<'a> {
    Name,
    Namespace,
    Uid,
    Label(&'a str),
    Annotation(&'a str),
}

fn parse(path: &str) -> Option<Field<'_>> {
    let subscript = |prefix: &str| {
        let key = path
            .strip_prefix(prefix)?
            .strip_prefix("['")?
            .strip_suffix("']")?;
        (!key.is_empty()).then_some(key)
    };
    match path {
        "metadata.name" => Some(Field::Name),
        "metadata.namespace" => Some(Field::Namespace),
        "metadata.uid" => Some(Field::Uid),
        _ => subscript("metadata.labels")
            .map(Field::Label)
            .or_else(|| subscript("metadata.annotations").map(Field::Annotation)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_metadata_are_answered() {
        let mut pod = Pod::default();
        pod.metadata.name = Some("web".into());
        pod.metadata.labels = Some([("app/x".to_owned(), "y".to_owned())].into());
        let asked = [
            "metadata.name",
            "metadata.namespace",
            "metadata.uid",
            "metadata.labels['app/x']",
            "metadata.annotations['z']",
        ];
        let answers: Vec<_> = asked
            .iter()
            .map(|path| value(&pod, "u-1", path).unwrap())
            .collect();
        assert_eq!(answers, ["web", "default", "u-1", "y", ""]);
    }

    #[test]
    fn other_fields_are_refused() {
        assert!(check("status.podIP").is_err());
        assert!(check("metadata.labels").is_err());
        assert!(check("metadata.labels['']").is_err());
    }
}
