//! Which network a pod gets, as `hull run --network` says it.

use std::path::PathBuf;

use super::definition::{self, DEFAULT_NETWORK};

/// More interfaces than this the guest is not told of.
const MAX_NETWORKS: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// Loopback only.
    None,
    /// A network namespace that somebody else has set up and looks after.
    Namespace(PathBuf),
    /// Named networks, at least one; the first is the pod's way out.
    Named(Vec<String>),
}

impl Choice {
    /// Reads the values of `--network`; without any it is the default network.
    ///
    /// # Errors
    /// What is wrong, with the value.
    pub fn parse(values: &[String]) -> Result<Self, String> {
        if values.is_empty() {
            return Ok(Self::Named(vec![DEFAULT_NETWORK.to_owned()]));
        }
        let alone = |value: &str| match values.len() {
            1 => Ok(()),
            _ => Err(format!(
                "--network {value}: can't be set together with another network"
            )),
        };
        for value in values {
            if value == "none" {
                return alone(value).map(|()| Self::None);
            }
            if value == "host" {
                return Err(format!(
                    "--network {value}: a pod is a machine of its own and can't be in the host's network; \
                     --publish makes its ports the host's"
                ));
            }
            if let Some(path) = value.strip_prefix("ns:") {
                let path = PathBuf::from(path);
                if !path.is_absolute() {
                    return Err(format!(
                        "--network {value}: must be ns: and the absolute path of a network namespace"
                    ));
                }
                return alone(value).map(|()| Self::Namespace(path));
            }
            definition::check_name(value).map_err(|rule| format!("--network {value}: {rule}"))?;
        }
        if let Some(twice) = (1..values.len()).find(|n| values[..*n].contains(&values[*n])) {
            return Err(format!("--network {}: is there twice", values[twice]));
        }
        if values.len() > MAX_NETWORKS {
            return Err(format!(
                "--network: {} networks are too many; a pod has at most {MAX_NETWORKS}",
                values.len()
            ));
        }
        Ok(Self::Named(values.to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(values: &[&str]) -> Result<Choice, String> {
        let values: Vec<String> = values.iter().map(|v| (*v).to_owned()).collect();
        Choice::parse(&values)
    }

    #[test]
    fn choices_are_read() {
        assert_eq!(parse(&[]), Ok(Choice::Named(vec!["hull".into()])));
        assert_eq!(parse(&["none"]), Ok(Choice::None));
        assert_eq!(
            parse(&["ns:/run/netns/x"]),
            Ok(Choice::Namespace("/run/netns/x".into()))
        );
        assert_eq!(
            parse(&["a", "b"]),
            Ok(Choice::Named(vec!["a".into(), "b".into()]))
        );
    }

    #[test]
    fn what_is_no_choice_is_refused_with_its_value() {
        let faults: [(&[&str], &str); 6] = [
            (&["none", "a"], "--network none: can't be set together"),
            (&["a", "ns:/x"], "--network ns:/x: can't be set together"),
            (&["ns:x"], "--network ns:x: must be ns: and the absolute"),
            (&["host"], "--network host: a pod is a machine of its own"),
            (&["a", "a"], "--network a: is there twice"),
            (&["../x"], "--network ../x: must be a name"),
        ];
        for (values, wanted) in faults {
            let fault = parse(values).unwrap_err();
            assert!(fault.starts_with(wanted), "{fault}");
        }
    }
}
