//! rtnetlink in the namespace of one pod.

use std::io;

use futures::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::task::JoinHandle;

/// Most messages of one listing: some more than a pod can have of anything.
const MAX_LISTED: usize = 65_536;

/// A netlink socket. It stays in the namespace of the thread that opened it, whatever thread uses it.
#[derive(Debug)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    connection: JoinHandle<()>,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace. Needs a runtime.
    pub fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// Makes a change; `flags` besides those of every request (NLM_F_CREATE, ...).
    pub async fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags, |_| Ok(()))
            .await
    }

    /// Lists all that a request is answered with.
    pub async fn list(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut listed = Vec::new();
        self.exchange(message, NLM_F_REQUEST | NLM_F_DUMP, |message| {
            if listed.len() == MAX_LISTED {
                return Err(io::Error::other("more entries than a pod has"));
            }
            listed.push(message);
            Ok(())
        })
        .await?;
        Ok(listed)
    }

    async fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        let mut answers = self
            .handle
            .clone()
            .request(request)
            .map_err(io::Error::other)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(message) => each(message)?,
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
