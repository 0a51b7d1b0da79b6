//! `start`: a container gets the address of its pod's shim, which is started for the pod's first one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use rustix::fs::Mode;
use sha2::{Digest, Sha256};

use crate::arguments::Arguments;
use crate::bundle::{Bundle, BundleError, Place};
use crate::options::{self, OptionsError};

/// Sockets are here unless containerd says where; their paths must be short (unix(7): 108 bytes).
const SOCKETS: &str = "/run/containerd/s";
/// What containerd says on standard input is never longer.
const INPUT_MAX: u64 = 10 << 20;
/// What a shim that did not start says is cut to this.
const REASON_MAX: u64 = 16 << 10;
/// The shim's word that it serves.
pub const READY: &str = "ready\n";
/// Set by containerd from 1.7 on: the newest version of this exchange that it knows.
const MAX_VERSION: &str = "MAX_SHIM_VERSION";
/// Of the first version whose answer isn't the bare address.
const FIRST_WITH_PARAMETERS: i32 = 3;
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("the shim of sandbox {0} is gone")]
    NoSandbox(String),
    #[error("the shim did not start: {0}")]
    NotReady(String),
    #[error("writing the answer")]
    Answer(#[from] containerd_shim_protos::protobuf::Error),
}

fn io_error(doing: impl Into<String>) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Io {
        doing: doing.into(),
        source,
    }
}

/// How containerd wants to be answered.
#[derive(Debug, Clone, PartialEq)]
enum Protocol {
    /// The address alone, which every containerd takes for version 2 of the task API.
    Address,
    /// JSON, where containerd says that it knows version 3.
    Json,
    /// A message for a message (containerd 2.3).
    Message(Box<BootstrapParams>),
}

/// Starts or finds the shim of the container whose bundle is the working directory, and returns what is to be
/// printed.
///
/// # Errors
/// See [`StartError`].
pub fn start(arguments: &Arguments) -> Result<Vec<u8>, StartError> {
    let mut input = Vec::new();
    io::stdin()
        .take(INPUT_MAX)
        .read_to_end(&mut input)
        .map_err(io_error("reading what containerd says"))?;
    let known = std::env::var(MAX_VERSION).ok();
    let configuration = options::on_start(&input, arguments)?;
    let protocol = protocol(&input, arguments, known.as_deref());
    let directory = std::env::current_dir().map_err(io_error("finding the bundle"))?;
    let bundle = Bundle::read(&directory)?;
    let owner = bundle.owner(&arguments.id);
    let socket = socket(arguments, &protocol, owner);
    let alive = UnixStream::connect(&socket).is_ok();
    let address = format!("unix://{}", socket.display());
    let tell = || write_whole(&directory.join("address"), &address);
    match &bundle.place {
        Place::Member { sandbox } if !alive => {
            return Err(StartError::NoSandbox(sandbox.clone()));
        }
        Place::Member { .. } => tell()?,
        Place::Sandbox | Place::Alone if alive => tell()?,
        Place::Sandbox | Place::Alone => {
            let listener = listen(&socket)?;
            // The address first: a shim is not left running because of it.
            let begun = tell()
                .and_then(|()| serve(arguments, &protocol, configuration.as_deref(), listener));
            if let Err(error) = begun {
                // Nobody listens there any more.
                let _ = std::fs::remove_file(&socket);
                return Err(error);
            }
        }
    }
    answer(&address, &protocol)
}

fn protocol(input: &[u8], arguments: &Arguments, known: Option<&str>) -> Protocol {
    if let Some(params) = parameters(input, arguments) {
        return Protocol::Message(Box::new(params));
    }
    match known.and_then(|known| known.parse::<i32>().ok()) {
        Some(version) if version >= FIRST_WITH_PARAMETERS => Protocol::Json,
        _ => Protocol::Address,
    }
}

/// What containerd 2.3 sends. Runtime options, which older ones send, can be read as this message, too: then the
/// names don't fit.
pub fn parameters(input: &[u8], arguments: &Arguments) -> Option<BootstrapParams> {
    BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|params| {
            params.instance_id == arguments.id && params.namespace == arguments.namespace
        })
}

/// The same for all containers of a pod, and for nobody else.
fn socket(arguments: &Arguments, protocol: &Protocol, owner: &str) -> PathBuf {
    let directory = match protocol {
        Protocol::Message(params) => params.socket_dir.as_deref().filter(|dir| !dir.is_empty()),
        Protocol::Address | Protocol::Json => None,
    };
    let name = [&arguments.address, &arguments.namespace, owner].join("/");
    let mut file = String::new();
    for byte in Sha256::digest(name) {
        file.push_str(&format!("{byte:02x}"));
    }
    Path::new(directory.unwrap_or(SOCKETS)).join(file)
}

/// Only for whom containerd is, too: who can ask a shim can run what they like in its pod.
fn listen(socket: &Path) -> Result<UnixListener, StartError> {
    let doing = || format!("listening at {}", socket.display());
    if let Some(directory) = socket.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(io_error(doing()))?;
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io_error(doing())(error));
        }
        _ => {}
    }
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(socket).map_err(io_error(doing()));
    rustix::process::umask(before);
    listener
}

/// Starts the shim, and waits until it serves.
fn serve(
    arguments: &Arguments,
    protocol: &Protocol,
    configuration: Option<&Path>,
    listener: UnixListener,
) -> Result<(), StartError> {
    let program = std::env::current_exe().map_err(io_error("finding this program"))?;
    let mut command = Command::new(program);
    command
        .args(["-namespace", &arguments.namespace])
        .args(["-id", &arguments.id])
        .args(["-address", &arguments.address])
        .args(["-publish-binary", &arguments.publish_binary])
        .envs(hull_pod::supervisor::ENVIRONMENT);
    if arguments.debug {
        command.arg("-debug");
    }
    if let Protocol::Message(params) = protocol {
        command.env(TTRPC_ADDRESS, &params.containerd_ttrpc_address);
    }
    if let Some(configuration) = configuration {
        command.env(options::CONFIGURATION, configuration);
    }
    let mut shim = command
        .arg("serve")
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(io_error("starting the shim"))?;
    let mut said = String::new();
    if let Some(output) = shim.stdout.take() {
        output
            .take(REASON_MAX)
            .read_to_string(&mut said)
            .map_err(io_error("waiting for the shim"))?;
    }
    if said == READY {
        return Ok(());
    }
    // It ends by itself; this way without a trace.
    let _ = shim.wait();
    Err(StartError::NotReady(said.trim_end().to_owned()))
}

fn write_whole(path: &Path, content: &str) -> Result<(), StartError> {
    let fresh = path.with_extension("new");
    let written = File::create(&fresh)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .and_then(|()| std::fs::rename(&fresh, path));
    written.map_err(io_error(format!("writing {}", path.display())))
}

fn answer(address: &str, protocol: &Protocol) -> Result<Vec<u8>, StartError> {
    Ok(match protocol {
        Protocol::Address => address.as_bytes().to_vec(),
        Protocol::Json => serde_json::json!({
            "version": TASK_API_VERSION,
            "address": address,
            "protocol": "ttrpc",
        })
        .to_string()
        .into_bytes(),
        Protocol::Message(_) => BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".into(),
            ..Default::default()
        }
        .write_to_bytes()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;
    use std::os::unix::fs::PermissionsExt;

    fn arguments() -> Arguments {
        Arguments {
            namespace: "k8s.io".into(),
            id: "web".into(),
            address: "/run/containerd/containerd.sock".into(),
            ..Arguments::default()
        }
    }

    #[test]
    fn each_containerd_is_answered_in_its_words() {
        let params = BootstrapParams {
            instance_id: "web".into(),
            namespace: "k8s.io".into(),
            ..Default::default()
        };
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"x".to_vec(),
            ..Default::default()
        };
        let protocol = |input: Vec<u8>, known| super::protocol(&input, &arguments(), known);

        let oldest = protocol(Vec::new(), None);
        let older = protocol(options.write_to_bytes().unwrap(), Some("2"));
        let newer = protocol(Vec::new(), Some("3"));
        let newest = protocol(params.write_to_bytes().unwrap(), Some("2"));

        assert_eq!((&oldest, &older), (&Protocol::Address, &Protocol::Address));
        assert_eq!(answer("unix:///a", &oldest).unwrap(), b"unix:///a");
        let json = answer("unix:///a", &newer).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(
            (&json["version"], &json["address"]),
            (&3.into(), &"unix:///a".into())
        );
        let message = answer("unix:///a", &newest).unwrap();
        let message = BootstrapResult::parse_from_bytes(&message).unwrap();
        assert_eq!((message.version, message.address), (3, "unix:///a".into()));
    }

    #[test]
    fn a_socket_is_one_pods_alone() {
        let protocol = Protocol::Address;
        let other = Arguments {
            namespace: "default".into(),
            ..arguments()
        };

        let path = socket(&arguments(), &protocol, "web");

        assert_eq!(path, socket(&arguments(), &protocol, "web"));
        assert_ne!(path, socket(&other, &protocol, "web"));
        assert!(path.starts_with(SOCKETS) && path.as_os_str().len() < 108);
    }

    /// CVE-2020-15257: nobody but root reaches a shim.
    #[test]
    fn a_socket_is_a_file_that_only_its_owner_can_use() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("s/socket");
        let stale = root.path().join("s");
        std::fs::create_dir(&stale).unwrap();
        std::fs::write(&path, "stale").unwrap();

        let listener = listen(&path).unwrap();

        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
    }
}
