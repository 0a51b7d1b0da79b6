//! rtnetlink in the calling thread's network namespace, one request at a time.

use std::io;

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

/// Most messages of one listing. A pod's network has some thousand at most.
const MAX_LISTED: usize = 65_536;
/// How often a listing is begun anew because things changed meanwhile.
const LISTINGS: usize = 10;

/// A netlink socket. It stays in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // The kernel: nobody else's messages are received.
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Makes a change; `flags` besides those of every request (NLM_F_CREATE, ...).
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags, |_| ())
    }

    /// Lists what `keep` makes something of.
    pub fn list<T>(
        &mut self,
        message: RouteNetlinkMessage,
        keep: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..LISTINGS {
            let mut listed = Vec::new();
            let listing = self.exchange(message.clone(), NLM_F_REQUEST | NLM_F_DUMP, |message| {
                if listed.len() < MAX_LISTED {
                    listed.extend(keep(message));
                }
            });
            match listing {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => continue,
                listing => listing?,
            }
            if listed.len() == MAX_LISTED {
                return Err(io::Error::other("more entries than a pod has"));
            }
            return Ok(listed);
        }
        Err(io::Error::other("it changes all the time"))
    }

    /// All interfaces.
    pub fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.list(message, |answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(message),
            _ => None,
        })
    }

    /// Changes an interface.
    pub fn set_link(&mut self, index: u32, attributes: Vec<LinkAttribute>) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = attributes;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Brings an interface up, or down.
    pub fn set_up(&mut self, index: u32, up: bool) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags.set(LinkFlags::Up, up);
        message.header.change_mask = LinkFlags::Up;
        self.change(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// # Errors
    /// `ResourceBusy` for a listing that may lack something, because of changes meanwhile.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut whole = true;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                // Messages begin at multiples of four.
                let length = usize::try_from(answer.header.length)
                    .ok()
                    .and_then(|length| length.checked_next_multiple_of(4))
                    .unwrap_or(usize::MAX);
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(done.code.saturating_neg()));
                    }
                    // An error of code 0 says that a change is made.
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) if whole => return Ok(()),
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => {
                        return Err(io::ErrorKind::ResourceBusy.into());
                    }
                    NetlinkPayload::InnerMessage(message) => each(message),
                    _ => {}
                }
            }
        }
    }
}
