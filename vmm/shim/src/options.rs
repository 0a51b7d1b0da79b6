//! Runtime options, as containerd's configuration has them for a handler: the file with Hull's configuration.
//!
//! They come on the standard input of `start`, which passes the file on to the shim, and again with each Create: by
//! then the shim has long read it.

use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::protobuf::{Error, Message, UnknownValueRef};

use crate::arguments::Arguments;
use crate::start::parameters;

/// Names the file to the shim, and without options also to `start`: it is containerd's environment.
pub const CONFIGURATION: &str = "HULL_CONFIG";
/// The message's name, in whatever form of URL. Options of other runtimes (`SystemdCgroup`) come from clients
/// that send them to all, and say nothing here.
const MESSAGE: &str = "runtimeoptions.v1.Options";
/// Its fields.
const CONFIG_PATH: u32 = 2;
const CONFIG_BODY: u32 = 3;

#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    #[error("the runtime's options can't be read")]
    Format(#[source] Error),
    #[error("option ConfigPath = {0:?} must be an absolute path")]
    NoPath(String),
    /// What containerd makes of all but ConfigPath in the handler's options.
    #[error(
        "the runtime's only option is ConfigPath, the file with Hull's configuration; not {0:?}"
    )]
    Body(String),
    #[error(
        "the pod was started with configuration {started}, and a container of it asks for {asked}"
    )]
    Differs { started: String, asked: String },
}

/// The file that is named to `start`.
///
/// # Errors
/// When there are options that can't be understood.
pub fn on_start(input: &[u8], arguments: &Arguments) -> Result<Option<PathBuf>, OptionsError> {
    if let Some(parameters) = parameters(input, arguments) {
        let mut all = parameters
            .extensions
            .iter()
            .filter_map(|extension| extension.value.as_ref());
        return all.try_fold(None, |found, any| Ok(found.or(file(any)?)));
    }
    match Any::parse_from_bytes(input) {
        Ok(any) => file(&any),
        Err(error) => Err(OptionsError::Format(error)),
    }
}

/// Checks what comes with a Create.
///
/// # Errors
/// When it can't be understood, or names another file than the shim was started with.
pub fn on_create(options: Option<&Any>) -> Result<(), OptionsError> {
    let asked = options.map(file).transpose()?.flatten();
    agree(configuration_of_the_shim().as_deref(), asked.as_deref())
}

/// What [`crate::start`] has told the shim. None: the default one.
#[must_use]
pub fn configuration_of_the_shim() -> Option<PathBuf> {
    std::env::var_os(CONFIGURATION)
        .filter(|file| !file.is_empty())
        .map(PathBuf::from)
}

fn agree(started: Option<&Path>, asked: Option<&Path>) -> Result<(), OptionsError> {
    match asked {
        Some(asked) if Some(asked) != started => Err(OptionsError::Differs {
            started: started.map_or("by default".into(), |file| file.display().to_string()),
            asked: asked.display().to_string(),
        }),
        _ => Ok(()),
    }
}

fn file(options: &Any) -> Result<Option<PathBuf>, OptionsError> {
    if options.type_url.rsplit('/').next() != Some(MESSAGE) {
        return Ok(None);
    }
    // The message has no type here: it is read as one without fields, which keeps those that it doesn't know.
    let message = Empty::parse_from_bytes(&options.value).map_err(OptionsError::Format)?;
    let text = |field| match message.special_fields.unknown_fields().get(field) {
        Some(UnknownValueRef::LengthDelimited(bytes)) => {
            String::from_utf8_lossy(bytes).into_owned()
        }
        _ => String::new(),
    };
    let (path, body) = (text(CONFIG_PATH), text(CONFIG_BODY));
    if !path.is_empty() {
        let file = PathBuf::from(&path);
        return if file.is_absolute() {
            Ok(Some(file))
        } else {
            Err(OptionsError::NoPath(path))
        };
    }
    if body.trim().is_empty() {
        Ok(None)
    } else {
        Err(OptionsError::Body(body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::{BootstrapParams, Extension};

    fn options(url: &str, fields: &[(u32, &str)]) -> Any {
        let mut message = Empty::new();
        for (number, text) in fields {
            let unknown = message.special_fields.mut_unknown_fields();
            unknown.add_length_delimited(*number, text.as_bytes().to_vec());
        }
        Any {
            type_url: url.into(),
            value: message.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    fn arguments() -> Arguments {
        Arguments {
            namespace: "k8s.io".into(),
            id: "web".into(),
            ..Arguments::default()
        }
    }

    #[test]
    fn the_file_is_found_in_each_containerds_words() {
        let any = options(MESSAGE, &[(1, "io.containerd.hull.v2"), (2, "/etc/x.toml")]);
        let with_host = options(
            "types.googleapis.com/runtimeoptions.v1.Options",
            &[(2, "/y")],
        );
        let params = BootstrapParams {
            instance_id: "web".into(),
            namespace: "k8s.io".into(),
            extensions: vec![Extension {
                value: Some(any.clone()).into(),
                ..Extension::default()
            }],
            ..BootstrapParams::default()
        };
        let found = |input: Vec<u8>| on_start(&input, &arguments()).unwrap();

        assert_eq!(
            found(any.write_to_bytes().unwrap()),
            Some("/etc/x.toml".into())
        );
        assert_eq!(
            found(params.write_to_bytes().unwrap()),
            Some("/etc/x.toml".into())
        );
        assert_eq!(
            found(with_host.write_to_bytes().unwrap()),
            Some("/y".into())
        );
        assert_eq!(found(Vec::new()), None);
    }

    #[test]
    fn options_of_other_runtimes_say_nothing() {
        let runc = options("containerd.runc.v1.Options", &[(2, "/etc/x.toml")]);

        assert_eq!(file(&runc).unwrap(), None);
        assert_eq!(file(&options(MESSAGE, &[])).unwrap(), None);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let relative = file(&options(MESSAGE, &[(2, "x.toml")])).unwrap_err();
        let body = file(&options(MESSAGE, &[(3, "Debug = true\n")])).unwrap_err();
        let broken = Any {
            type_url: MESSAGE.into(),
            value: vec![0x12, 0xff],
            ..Any::default()
        };

        assert!(relative.to_string().contains("x.toml"));
        assert!(body.to_string().contains("Debug"));
        assert!(matches!(file(&broken), Err(OptionsError::Format(_))));
    }

    #[test]
    fn a_pod_has_one_configuration() {
        let (one, other) = (Path::new("/one"), Path::new("/other"));

        assert!(agree(Some(one), Some(one)).is_ok());
        assert!(agree(Some(one), None).is_ok());
        assert!(agree(Some(one), Some(other)).is_err());
        assert!(agree(None, Some(other)).is_err());
    }
}
