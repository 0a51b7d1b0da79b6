//! Whether pods begin with templates, and whose.

use std::env;

use serde::{Deserialize, Serialize};

use super::TemplateError;
use crate::configuration::Configuration;

/// The host's choice.
const VARIABLE: &str = "HULL_TEMPLATES";
/// Whose all are with [`Policy::Host`]. No tenant can be called so: theirs have letters.
const EVERYBODY: &str = "*";

/// Who begins with the same templates. What clones of one have in common is in `docs/threat-model.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Nobody: every machine boots.
    Off,
    /// Pods of one tenant.
    #[default]
    Tenant,
    /// All pods of the host.
    Host,
}

impl Policy {
    /// By `HULL_TEMPLATES`: `off`, `tenant` or `host`. Without it as the configuration has it.
    ///
    /// # Errors
    /// [`TemplateError::BadPolicy`] when it is something else.
    pub fn of(configuration: &Configuration) -> Result<Self, TemplateError> {
        match env::var_os(VARIABLE) {
            None => Ok(configuration.templates),
            Some(value) => Self::parse(&value.to_string_lossy()),
        }
    }

    fn parse(value: &str) -> Result<Self, TemplateError> {
        match value {
            "off" => Ok(Self::Off),
            "tenant" => Ok(Self::Tenant),
            "host" => Ok(Self::Host),
            _ => Err(TemplateError::BadPolicy(value.into())),
        }
    }

    /// Whose the templates of a tenant's pods are. None: there are none.
    #[must_use]
    pub fn owner(self, tenant: &str) -> Option<String> {
        match self {
            Self::Off => None,
            Self::Tenant => Some(tenant.to_owned()),
            Self::Host => Some(EVERYBODY.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_chooses_with_three_words() {
        assert_eq!(Policy::parse("off").unwrap(), Policy::Off);
        assert_eq!(Policy::parse("tenant").unwrap(), Policy::Tenant);
        assert_eq!(Policy::parse("host").unwrap(), Policy::Host);
        for wrong in ["", "on", "HOST", "tenant "] {
            assert!(matches!(
                Policy::parse(wrong),
                Err(TemplateError::BadPolicy(value)) if value == wrong
            ));
        }
    }

    #[test]
    fn tenants_have_templates_of_their_own_unless_the_host_says_otherwise() {
        assert_eq!(Policy::Off.owner("a"), None);
        assert_ne!(Policy::Tenant.owner("a"), Policy::Tenant.owner("b"));
        assert_eq!(Policy::Host.owner("a"), Policy::Host.owner("b"));
        assert_ne!(Policy::Host.owner("a"), Policy::Tenant.owner("a"));
    }
}
