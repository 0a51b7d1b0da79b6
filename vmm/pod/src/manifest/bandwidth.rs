//! How much a pod may receive and send, as Kubernetes' annotations for it say.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Quantity;
use super::problem::{FieldPath, Problems};

/// What the pod receives, and what it sends.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Kubernetes' bounds.
const BITS_PER_SECOND: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// In bits a second, for each interface of the pod. None: as much as there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// 1,000 to 10^15.
    pub ingress: Option<u64>,
    /// 1,000 to 10^15.
    pub egress: Option<u64>,
}

impl Bandwidth {
    /// What a checked manifest says.
    pub fn of(metadata: &ObjectMeta) -> Self {
        let read = |key| value(metadata, key).and_then(|text| bits(text).ok());
        Self {
            ingress: read(INGRESS),
            egress: read(EGRESS),
        }
    }
}

pub fn check(metadata: &ObjectMeta, path: &FieldPath, problems: &mut Problems) {
    for key in [INGRESS, EGRESS] {
        if let Some(Err(problem)) = value(metadata, key).map(bits) {
            problems.add(path.field("annotations").key(key), problem);
        }
    }
}

fn value<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn bits(text: &str) -> Result<u64, String> {
    let bits = Quantity::parse(text)
        .map_err(|problem| format!("{text:?} {problem}"))?
        .units();
    if BITS_PER_SECOND.contains(&bits) {
        Ok(bits)
    } else {
        Err(format!("{text:?} must be 1k to 1P bits per second"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    fn manifest(annotations: &str) -> String {
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p, annotations: {{{annotations}}}}}, \
             spec: {{containers: [{{name: a, image: b}}]}}}}"
        )
    }

    #[test]
    fn each_way_has_its_own() {
        let text = manifest("kubernetes.io/ingress-bandwidth: 10M");

        assert_eq!(
            parse("f", &text).unwrap()[0].bandwidth(),
            Bandwidth {
                ingress: Some(10_000_000),
                egress: None
            }
        );
    }

    #[test]
    fn what_is_no_bandwidth_is_refused() {
        for value in ["fast", "10", "-1M", "2P"] {
            let text = manifest(&format!("kubernetes.io/egress-bandwidth: '{value}'"));
            let refused = parse("f", &text).unwrap_err().to_string();
            assert!(
                refused.contains("metadata.annotations[\"kubernetes.io/egress-bandwidth\"]")
                    && refused.contains(value),
                "{refused}"
            );
        }
    }
}
