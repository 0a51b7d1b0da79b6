//! What a container runs: command, environment, directory, user.

use k8s_openapi::api::core::v1::Container;
use oci_spec::OciSpecError;
use oci_spec::image::Config;
use oci_spec::runtime::{
    PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process, ProcessBuilder,
};

use super::expand::expand;
use crate::manifest::{PodManifest, field_value};

/// Open files: the soft limit is what `select` can take, the hard one is for programs
/// that raise it themselves. systemd's defaults, too.
const OPEN_FILES: (u64, u64) = (1024, 524_288);
const SIGTERM: u32 = 15;

/// The environment of a container.
#[derive(Debug)]
pub struct Environment {
    /// All of it, in order, each name once.
    all: Vec<(String, String)>,
    /// What the manifest sets, which alone `$(NAME)` refers to.
    own: Vec<(String, String)>,
}

impl Environment {
    pub fn new(
        manifest: &PodManifest,
        container: &Container,
        config: Option<&Config>,
        uid: &str,
    ) -> Self {
        let mut all = Vec::new();
        let image = config.and_then(|config| config.env().as_ref());
        for entry in image.into_iter().flatten() {
            let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
            set(&mut all, name, value.to_owned());
        }
        set(&mut all, "HOSTNAME", super::infra(manifest).hostname);
        let mut own = Vec::new();
        for variable in container.env.iter().flatten() {
            let field = variable
                .value_from
                .as_ref()
                .and_then(|source| source.field_ref.as_ref());
            let value = match field {
                Some(field) => {
                    field_value(&manifest.pod, uid, &field.field_path).unwrap_or_default()
                }
                // What stands before it can be referred to.
                None => {
                    expand(variable.value.as_deref().unwrap_or_default(), |name| {
                        get(&own, name)
                    })
                    .text
                }
            };
            set(&mut own, &variable.name, value.clone());
            set(&mut all, &variable.name, value);
        }
        Self { all, own }
    }

    /// What `$(NAME)` stands for.
    pub fn get(&self, name: &str) -> Option<String> {
        get(&self.own, name)
    }

    pub fn into_list(self) -> Vec<String> {
        self.all
            .into_iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect()
    }
}

fn set(list: &mut Vec<(String, String)>, name: &str, value: String) {
    match list.iter_mut().find(|(known, _)| known == name) {
        Some(entry) => entry.1 = value,
        None => list.push((name.to_owned(), value)),
    }
}

fn get(list: &[(String, String)], name: &str) -> Option<String> {
    list.iter()
        .find(|(known, _)| known == name)
        .map(|(_, value)| value.clone())
}

/// What is run: `command` replaces the image's entrypoint and its arguments, `args`
/// its arguments alone. None: nothing is left.
pub fn args(
    container: &Container,
    config: Option<&Config>,
    env: &Environment,
) -> Option<Vec<String>> {
    let own = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter()
            .flatten()
            .map(|text| expand(text, |name| env.get(name)).text)
            .collect()
    };
    let (command, arguments) = (own(&container.command), own(&container.args));
    let image = |list: Option<&Option<Vec<String>>>| {
        list.and_then(Option::as_ref).cloned().unwrap_or_default()
    };
    let (entrypoint, cmd) = (
        image(config.map(Config::entrypoint)),
        image(config.map(Config::cmd)),
    );
    let (first, rest) = match (command.is_empty(), arguments.is_empty()) {
        (false, _) => (command, arguments),
        (true, false) => (entrypoint, arguments),
        (true, true) => (entrypoint, cmd),
    };
    let all = [first, rest].concat();
    all.first()
        .is_some_and(|program| !program.is_empty())
        .then_some(all)
}

pub fn working_dir(container: &Container, config: Option<&Config>) -> String {
    let given = |dir: &Option<String>| dir.clone().filter(|dir| !dir.is_empty());
    given(&container.working_dir)
        .or_else(|| config.and_then(|config| given(config.working_dir())))
        .map_or_else(
            || "/".to_owned(),
            |dir| {
                if dir.starts_with('/') {
                    dir
                } else {
                    format!("/{dir}")
                }
            },
        )
}

/// A process with our limits, and nothing of the builder's own defaults.
pub fn base(args: Vec<String>, env: Vec<String>, cwd: String) -> Result<Process, OciSpecError> {
    ProcessBuilder::default()
        .args(args)
        .env(env)
        .cwd(cwd)
        .terminal(false)
        .rlimits(vec![
            rlimit(PosixRlimitType::RlimitNofile, OPEN_FILES.0, OPEN_FILES.1)?,
            // The cgroup bounds a container's processes; this would bound a user's in all
            // containers together.
            rlimit(PosixRlimitType::RlimitNproc, u64::MAX, u64::MAX)?,
        ])
        .build()
}

fn rlimit(kind: PosixRlimitType, soft: u64, hard: u64) -> Result<PosixRlimit, OciSpecError> {
    PosixRlimitBuilder::default()
        .typ(kind)
        .soft(soft)
        .hard(hard)
        .build()
}

/// USER for the agent: what the manifest says, of which the container's own counts
/// before the pod's, and the image's for the rest.
///
/// # Errors
/// When it would be root, or can't be told, where runAsNonRoot is set.
pub fn user(
    manifest: &PodManifest,
    container: &Container,
    config: Option<&Config>,
) -> Result<String, String> {
    let own = container.security_context.as_ref();
    let pod = manifest.spec().security_context.as_ref();
    let run_as_user = own
        .and_then(|c| c.run_as_user)
        .or(pod.and_then(|c| c.run_as_user));
    let run_as_group = own
        .and_then(|c| c.run_as_group)
        .or(pod.and_then(|c| c.run_as_group));
    let non_root = own
        .and_then(|c| c.run_as_non_root)
        .or(pod.and_then(|c| c.run_as_non_root));
    let image = config
        .and_then(|config| config.user().as_deref())
        .unwrap_or_default();
    let (image_user, image_group) = image
        .split_once(':')
        .map_or((image, None), |(user, group)| (user, Some(group)));
    let user = run_as_user.map_or_else(|| image_user.to_owned(), |id| id.to_string());
    if non_root == Some(true) {
        match user.parse::<u32>() {
            Ok(0) => {
                return Err("true, but the container would run as user 0; set runAsUser".into());
            }
            Ok(_) => {}
            Err(_) if user.is_empty() => {
                return Err("true, but the image runs as root; set runAsUser".into());
            }
            Err(_) => {
                return Err(format!(
                    "true, but the image's user {user:?} has no number by which to tell that it isn't root; set runAsUser"
                ));
            }
        }
    }
    // The image's group belongs to the image's user.
    let image_group = image_group
        .filter(|_| run_as_user.is_none())
        .map(ToOwned::to_owned);
    let group = run_as_group.map(|id| id.to_string()).or(image_group);
    Ok(match group {
        Some(group) if user.is_empty() => format!("0:{group}"),
        Some(group) => format!("{user}:{group}"),
        None => user,
    })
}

/// The number of the image's STOPSIGNAL; SIGTERM where it has none that is known.
pub fn stop_signal(config: Option<&Config>) -> u32 {
    let name = config
        .and_then(|config| config.stop_signal().as_deref())
        .unwrap_or_default();
    crate::signal::parse(name).unwrap_or(SIGTERM)
}
