//! What the host's operator has decided for its pods: a file in TOML.
//!
//! The environment of whoever starts Hull goes before the file where it says the same (`HULL_VHOST_NET`,
//! `HULL_TIMEOUT_SCALE`, `HULL_TEMPLATES`, `HULL_GUEST_DIR`). A manifest and its annotations have no say in any of it.

use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tracing::level_filters::LevelFilter;

use crate::network::VhostNet;
use crate::oci::Sizing;
use crate::templates::Policy;

/// Read if no other is named, and if it is there.
pub const DEFAULT_PATH: &str = "/etc/hull/config.toml";
/// A file that is longer is not one of ours.
const SIZE_MAX: u64 = 1 << 20;

const VCPUS: RangeInclusive<u64> = 1..=64;
const DEFAULT_MIB: RangeInclusive<u64> = 256..=1 << 20;
const OVERHEAD_MIB: RangeInclusive<u64> = 64..=1 << 14;
const TIMEOUT_SCALE: RangeInclusive<u64> = 1..=1000;

/// Settings that hold for all pods that are started with it. The default is what an empty file means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    pub sizing: Sizing,
    /// None: the one that was installed with Hull.
    pub kernel: Option<PathBuf>,
    /// As [`Self::kernel`].
    pub initramfs: Option<PathBuf>,
    pub vhost_net: VhostNet,
    /// Whether machines begin with templates.
    pub templates: Policy,
    /// A factor for [`crate::supervisor::Limits`]. None: by the host.
    pub timeout_scale: Option<u32>,
    /// Of supervisors and shims.
    pub log_level: LevelFilter,
}

impl Default for Configuration {
    fn default() -> Self {
        Self {
            sizing: Sizing::default(),
            kernel: None,
            initramfs: None,
            vhost_net: VhostNet::default(),
            templates: Policy::default(),
            timeout_scale: None,
            log_level: LevelFilter::INFO,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    #[error("reading configuration {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("configuration {} is longer than {SIZE_MAX} bytes", .0.display())]
    TooLong(PathBuf),
    /// The reader's words name line, field and value.
    #[error("configuration {}: {reason}", path.display())]
    Format { path: PathBuf, reason: String },
    #[error("configuration {}: {field} = {value}: {must}", path.display())]
    Value {
        path: PathBuf,
        field: &'static str,
        value: String,
        must: String,
    },
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Written {
    default_vcpus: Option<u64>,
    default_memory_mib: Option<u64>,
    guest_overhead_mib: Option<u64>,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    vhost_net: Option<VhostNet>,
    templates: Option<Policy>,
    timeout_scale: Option<u64>,
    log_level: Option<LogLevel>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Trace => Self::TRACE,
        }
    }
}

impl Configuration {
    /// Reads a file. None: [`DEFAULT_PATH`], which need not be there.
    ///
    /// # Errors
    /// See [`ConfigurationError`].
    pub fn load(named: Option<&Path>) -> Result<Self, ConfigurationError> {
        let path = named.unwrap_or(Path::new(DEFAULT_PATH));
        let io_error = |source| ConfigurationError::Io {
            path: path.to_owned(),
            source,
        };
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => {
                return Ok(Self::default());
            }
            opened => opened.map_err(io_error)?,
        };
        let mut text = String::new();
        file.take(SIZE_MAX + 1)
            .read_to_string(&mut text)
            .map_err(io_error)?;
        if text.len() as u64 > SIZE_MAX {
            return Err(ConfigurationError::TooLong(path.to_owned()));
        }
        Self::parse(path, &text)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ConfigurationError> {
        let written: Written =
            toml::from_str(text).map_err(|error| ConfigurationError::Format {
                path: path.to_owned(),
                reason: error.to_string().trim_end().to_owned(),
            })?;
        let default = Self::default();
        let within = |field, value: Option<u64>, range: RangeInclusive<u64>| match value {
            Some(value) if !range.contains(&value) => Err(ConfigurationError::Value {
                path: path.to_owned(),
                field,
                value: value.to_string(),
                must: format!("must be {} to {}", range.start(), range.end()),
            }),
            value => Ok(value),
        };
        let absolute = |field, file: Option<PathBuf>| match file {
            Some(file) if !file.is_absolute() => Err(ConfigurationError::Value {
                path: path.to_owned(),
                field,
                value: format!("{file:?}"),
                must: "must be an absolute path".into(),
            }),
            file => Ok(file),
        };
        let vcpus = within("default_vcpus", written.default_vcpus, VCPUS)?;
        let scale = within("timeout_scale", written.timeout_scale, TIMEOUT_SCALE)?;
        Ok(Self {
            sizing: Sizing {
                unlimited_vcpus: vcpus
                    .and_then(|vcpus| u8::try_from(vcpus).ok())
                    .unwrap_or(default.sizing.unlimited_vcpus),
                unlimited_mib: within(
                    "default_memory_mib",
                    written.default_memory_mib,
                    DEFAULT_MIB,
                )?
                .unwrap_or(default.sizing.unlimited_mib),
                guest_mib: within(
                    "guest_overhead_mib",
                    written.guest_overhead_mib,
                    OVERHEAD_MIB,
                )?
                .unwrap_or(default.sizing.guest_mib),
            },
            kernel: absolute("kernel", written.kernel)?,
            initramfs: absolute("initramfs", written.initramfs)?,
            vhost_net: written.vhost_net.unwrap_or(default.vhost_net),
            templates: written.templates.unwrap_or(default.templates),
            timeout_scale: scale.and_then(|scale| u32::try_from(scale).ok()),
            log_level: written
                .log_level
                .map_or(default.log_level, LevelFilter::from),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `scripts/install` puts in place.
    const INSTALLED: &str = include_str!("../../../scripts/config.toml");

    fn parsed(text: &str) -> Result<Configuration, String> {
        Configuration::parse(Path::new("/etc/x.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parsed(""), Ok(Configuration::default()));
    }

    #[test]
    fn what_is_installed_changes_nothing_and_shows_every_setting() {
        let shown: String = INSTALLED
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| !line.starts_with(' ') && line.contains(" = "))
            .flat_map(|line| [line, "\n"])
            .collect();
        let paths = ["kernel", "initramfs"];

        let (with_paths, without): (Vec<&str>, Vec<&str>) = shown
            .lines()
            .partition(|line| paths.iter().any(|path| line.starts_with(path)));

        assert_eq!(parsed(INSTALLED), Ok(Configuration::default()));
        // By the host, if it isn't set.
        let mut default = parsed(&without.join("\n")).unwrap();
        assert_eq!(default.timeout_scale.take(), Some(1));
        assert_eq!(default, Configuration::default());
        assert_eq!((with_paths.len(), without.len()), (2, 7));
        parsed(&shown).unwrap();
    }

    #[test]
    fn every_setting_counts() {
        let read = parsed(
            "default_vcpus = 4\ndefault_memory_mib = 2048\nguest_overhead_mib = 192\n\
             kernel = '/k'\ninitramfs = '/i'\nvhost_net = 'off'\ntemplates = 'host'\ntimeout_scale = 3\nlog_level = 'debug'",
        )
        .unwrap();

        assert_eq!(
            read,
            Configuration {
                sizing: Sizing {
                    unlimited_vcpus: 4,
                    unlimited_mib: 2048,
                    guest_mib: 192,
                },
                kernel: Some("/k".into()),
                initramfs: Some("/i".into()),
                vhost_net: VhostNet::Off,
                templates: Policy::Host,
                timeout_scale: Some(3),
                log_level: LevelFilter::DEBUG,
            }
        );
    }

    #[test]
    fn errors_name_file_field_and_value() {
        for (text, field, value) in [
            ("default_vcpus = 65", "default_vcpus", "65"),
            ("default_memory_mib = 16", "default_memory_mib", "16"),
            ("guest_overhead_mib = 0", "guest_overhead_mib", "0"),
            ("timeout_scale = 0", "timeout_scale", "0"),
            ("kernel = 'vmlinux'", "kernel", "vmlinux"),
            ("vhost_net = 'never'", "vhost_net", "never"),
            ("templates = 'on'", "templates", "on"),
            ("log_level = 'loud'", "log_level", "loud"),
            ("default_vcpus = 'two'", "default_vcpus", "two"),
            ("default_vcpus = -1", "default_vcpus", "-1"),
            ("jailer = '/bin/sh'", "jailer", "/bin/sh"),
            ("default_vcpus = 1\ndefault_vcpus = 2", "default_vcpus", "2"),
        ] {
            let error = parsed(text).unwrap_err();

            for word in ["/etc/x.toml", field, value] {
                assert!(error.contains(word), "{text}: {error}");
            }
        }
    }

    #[test]
    fn only_the_default_file_need_not_be_there() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("config.toml");

        let refused = Configuration::load(Some(&missing)).unwrap_err();
        std::fs::write(&missing, "vhost_net = 'off'").unwrap();
        let read = Configuration::load(Some(&missing)).unwrap();

        assert!(matches!(refused, ConfigurationError::Io { .. }));
        assert_eq!(read.vhost_net, VhostNet::Off);
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let refused = Configuration::load(Some(Path::new("/dev/zero"))).unwrap_err();

        assert!(matches!(refused, ConfigurationError::TooLong(_)));
    }
}
