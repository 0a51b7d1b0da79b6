//! The command line as containerd writes it: flags of one dash, then what to do.

use std::ffi::OsString;
use std::path::PathBuf;

use hull_pod::supervisor::MAKE_TEMPLATE;

/// What containerd asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a shim, or find the one there is, and print its address.
    Start,
    /// Remove what a shim that is gone has left.
    Delete,
    /// Be the shim. Asked for by ourselves.
    Serve,
    Version,
    /// Make a template. Asked for by ourselves.
    MakeTemplate,
    /// Describe the runtime.
    Info,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Arguments {
    /// containerd's namespace.
    pub namespace: String,
    /// Of the container.
    pub id: String,
    /// containerd's main socket.
    pub address: String,
    /// The program that publishes an event, should its socket not.
    pub publish_binary: String,
    /// Only for `delete`; otherwise it is the working directory.
    pub bundle: PathBuf,
    pub debug: bool,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArgumentError {
    #[error("argument {0:?} is not UTF-8")]
    NotText(OsString),
    #[error("unknown flag {0:?}")]
    Unknown(String),
    #[error("flag {0:?} needs a value")]
    NoValue(String),
    #[error(
        "{0:?} is neither start nor delete; containerd starts this program, see docs/kubernetes.md"
    )]
    NoAction(String),
    #[error("-namespace and -id are needed, and can be no path: {0:?}")]
    BadName(String),
}

/// Reads what follows the program's name.
///
/// # Errors
/// See [`ArgumentError`].
pub fn parse(
    arguments: impl IntoIterator<Item = OsString>,
) -> Result<(Action, Arguments), ArgumentError> {
    let mut rest = arguments.into_iter();
    let mut read = Arguments::default();
    let mut action = None;
    while let Some(argument) = rest.next() {
        let text = argument.into_string().map_err(ArgumentError::NotText)?;
        let Some(flag) = text.strip_prefix('-') else {
            action = match text.as_str() {
                "start" => Some(Action::Start),
                "delete" => Some(Action::Delete),
                "serve" => Some(Action::Serve),
                // It comes alone.
                MAKE_TEMPLATE => return Ok((Action::MakeTemplate, read)),
                _ => return Err(ArgumentError::NoAction(text)),
            };
            continue;
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        match name {
            "v" | "version" => return Ok((Action::Version, read)),
            "info" => return Ok((Action::Info, read)),
            "debug" => {
                read.debug = value.as_deref() != Some("false");
                continue;
            }
            _ => {}
        }
        let mut value = || match value.clone() {
            Some(value) => Ok(value),
            None => rest
                .next()
                .ok_or_else(|| ArgumentError::NoValue(text.clone()))?
                .into_string()
                .map_err(ArgumentError::NotText),
        };
        match name {
            "namespace" => read.namespace = value()?,
            "id" => read.id = value()?,
            "address" => read.address = value()?,
            "publish-binary" => read.publish_binary = value()?,
            "bundle" => read.bundle = value()?.into(),
            _ => return Err(ArgumentError::Unknown(text)),
        }
    }
    let action = action.ok_or_else(|| ArgumentError::NoAction(String::new()))?;
    for name in [&read.namespace, &read.id] {
        if name.is_empty() || name.contains(['/', '\0']) || name.starts_with('.') {
            return Err(ArgumentError::BadName(name.clone()));
        }
    }
    Ok((action, read))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &[&str]) -> Result<(Action, Arguments), ArgumentError> {
        parse(line.iter().map(OsString::from))
    }

    #[test]
    fn containerds_line_is_understood() {
        let (action, arguments) = parsed(&[
            "-namespace",
            "k8s.io",
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id=web",
            "-debug",
            "start",
        ])
        .unwrap();

        assert_eq!(action, Action::Start);
        assert_eq!(arguments.namespace, "k8s.io");
        assert_eq!(arguments.id, "web");
        assert_eq!(arguments.publish_binary, "/usr/bin/containerd");
        assert!(arguments.debug);
    }

    #[test]
    fn the_version_needs_nothing_else() {
        assert_eq!(parsed(&["-v"]).unwrap().0, Action::Version);
        assert_eq!(parsed(&["--info"]).unwrap().0, Action::Info);
        assert_eq!(parsed(&[MAKE_TEMPLATE]).unwrap().0, Action::MakeTemplate);
    }

    #[test]
    fn names_that_are_paths_are_refused() {
        for name in ["", "..", "../x", "a/b"] {
            let refused = parsed(&["-namespace", "default", "-id", name, "delete"]);

            assert_eq!(refused.unwrap_err(), ArgumentError::BadName(name.into()));
        }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert_eq!(
            parsed(&["-id", "a", "-namespace", "b", "-runc", "start"]).unwrap_err(),
            ArgumentError::Unknown("-runc".into())
        );
        assert_eq!(
            parsed(&["-id"]).unwrap_err(),
            ArgumentError::NoValue("-id".into())
        );
    }
}
