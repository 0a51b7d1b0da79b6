//! The pod's network, and connections into it.

use std::sync::Arc;

use hull_protocol::agent::{ConfigureNetworkRequest, ForwardRequest};

use super::Pod;
use crate::error::{Error, Result};
use crate::network::forward::{self, Target};
use crate::network::{self, Plan};

/// Forwarded connections at a time.
pub(super) const MAX_FORWARDS: usize = 512;

impl Pod {
    /// Makes infra's network what the request says.
    pub async fn configure_network(&self, request: &ConfigureNetworkRequest) -> Result<()> {
        let plan = Plan::new(request)?;
        let infra = self.infra()?;
        // Two at a time would take each other's for what is no longer planned.
        let _one_at_a_time = self.network.lock().await;
        network::configure(&infra.process, plan, infra.interface_sysctls.clone()).await
    }

    /// Connects a stream to a port. The connection goes on when this has returned.
    pub async fn forward(&self, request: &ForwardRequest) -> Result<()> {
        let target = Target::new(request)?;
        let infra = self.infra()?;
        let Some(stream) = self.streams.claim(request.stream).await? else {
            return Err(Error::Invalid("a port is forwarded to a stream".into()));
        };
        let place = Arc::clone(&self.forwards)
            .try_acquire_owned()
            .map_err(|_| Error::TooMany {
                what: "forwarded connections",
                limit: MAX_FORWARDS,
            })?;
        let connection = target.connect(&infra.process).await?;
        tokio::spawn(async move {
            forward::copy(stream, connection).await;
            drop(place);
        });
        Ok(())
    }
}
