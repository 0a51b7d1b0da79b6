//! Typed messages with descriptors over a `SOCK_SEQPACKET` socket.
//!
//! One message is one packet: JSON, and the descriptors that belong to it. Both
//! ends bound what they take, and every descriptor that a message should not have
//! brought is closed. A peer is never trusted for more than that.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    UCred,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;

/// Largest message in bytes; a longer one is refused by both ends.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors with one message. The kernel's own bound is 253.
pub const MAX_DESCRIPTORS: usize = 128;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// What travels over a channel.
pub trait Message: Serialize + DeserializeOwned {
    /// How many descriptors belong to this message, no more and no fewer.
    fn descriptors(&self) -> usize;
}

/// Why a message could not be sent or received. The channel is of no more use then,
/// but for [`Self::TooLong`] and [`Self::Descriptors`] when sending, and [`Self::Full`].
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("sending a message")]
    Send(#[source] io::Error),
    #[error("receiving a message")]
    Receive(#[source] io::Error),
    #[error("the peer does not read its messages")]
    Full,
    #[error("a message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("a message came with more than {MAX_DESCRIPTORS} descriptors")]
    TooManyDescriptors,
    #[error("a message that needs {expected} descriptors has {found}")]
    Descriptors { expected: usize, found: usize },
    #[error("a message that this program doesn't understand")]
    Format(#[source] serde_json::Error),
}

/// Why a socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error(
        "the socket path {path:?} has {length} bytes, more than the kernel's 107; choose a shorter directory"
    )]
    PathTooLong { path: PathBuf, length: usize },
    #[error("making a socket")]
    Create(#[source] io::Error),
    #[error("listening on {path:?}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("connecting to {path:?}")]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("accepting a connection")]
    Accept(#[source] io::Error),
}

/// A channel whose calls block.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Takes over a connected `SOCK_SEQPACKET` socket in blocking mode.
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Two connected ends, both closed on exec.
    ///
    /// # Errors
    /// When the process or the system is out of descriptors or memory.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self(one), Self(other)))
    }

    /// Connects to a [`Listener`]'s path.
    ///
    /// # Errors
    /// When nobody listens there, or this user may not connect.
    pub fn connect(path: &Path) -> Result<Self, SocketError> {
        Self::connect_with(path, SocketFlags::CLOEXEC)
    }

    fn connect_with(path: &Path, flags: SocketFlags) -> Result<Self, SocketError> {
        let address = address(path)?;
        let socket = socket(flags)?;
        rustix::net::connect(&socket, &address).map_err(|error| SocketError::Connect {
            path: path.to_owned(),
            source: error.into(),
        })?;
        Ok(Self(socket))
    }

    /// Sends a message, and waits for room in the socket.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub fn send<M: Message>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        send(
            self.0.as_fd(),
            &encode(message, descriptors)?,
            descriptors,
            SendFlags::empty(),
        )
        .map_err(ChannelError::Send)
    }

    /// Sends a message if there is room in the socket.
    ///
    /// # Errors
    /// [`ChannelError::Full`] when there is none; see [`ChannelError`].
    pub fn try_send<M: Message>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        send(
            self.0.as_fd(),
            &encode(message, descriptors)?,
            descriptors,
            SendFlags::DONTWAIT,
        )
        .map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => ChannelError::Full,
            _ => ChannelError::Send(error),
        })
    }

    /// Waits for a message. `None`: the peer has closed its end.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub fn receive<M: Message>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, ChannelError> {
        decode(receive(self.0.as_fd()).map_err(ChannelError::Receive)?)
    }

    /// The process that made the other end.
    ///
    /// # Errors
    /// When the socket isn't connected.
    pub fn peer(&self) -> io::Result<UCred> {
        Ok(socket_peercred(&self.0)?)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

/// A channel for tasks. May be shared: messages are whole whoever sends them.
#[derive(Debug)]
pub struct AsyncChannel(AsyncFd<OwnedFd>);

impl AsyncChannel {
    /// Makes a channel's socket non-blocking and registers it with the running tokio runtime.
    ///
    /// # Errors
    /// When the runtime can't watch it.
    pub fn new(channel: Channel) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&channel.0, true)?;
        Ok(Self(watch(channel.0)?))
    }

    /// See [`Channel::connect`]. A full backlog is an error, too, not a wait.
    ///
    /// # Errors
    /// When nobody listens there, or this user may not connect.
    pub fn connect(path: &Path) -> Result<Self, SocketError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        Self::new(Channel::connect_with(path, flags)?).map_err(SocketError::Create)
    }

    /// See [`Channel::send`]. Dropping the future sends all of the message or nothing.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub async fn send<M: Message>(
        &self,
        message: &M,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = encode(message, descriptors)?;
        loop {
            let mut ready = self.0.writable().await.map_err(ChannelError::Send)?;
            let sent = ready
                .try_io(|socket| send(socket.as_fd(), &bytes, descriptors, SendFlags::DONTWAIT));
            if let Ok(result) = sent {
                return result.map_err(ChannelError::Send);
            }
        }
    }

    /// See [`Channel::receive`]. Dropping the future loses no message.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub async fn receive<M: Message>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, ChannelError> {
        loop {
            let mut ready = self.0.readable().await.map_err(ChannelError::Receive)?;
            if let Ok(packet) = ready.try_io(|socket| receive(socket.as_fd())) {
                return decode(packet.map_err(ChannelError::Receive)?);
            }
        }
    }

    /// See [`Channel::peer`].
    ///
    /// # Errors
    /// When the socket isn't connected.
    pub fn peer(&self) -> io::Result<UCred> {
        Ok(socket_peercred(self.0.get_ref())?)
    }
}

/// A socket in the file system that takes connections of its own user and of root.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on a path that does not exist yet, with mode 0600 from the start.
    ///
    /// # Errors
    /// When the path exists or can't be made, or the runtime can't watch the socket.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let address = address(path)?;
        let socket = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        let listen = || -> io::Result<()> {
            // The file takes the socket's mode (unix(7)), so it is never open to others.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&socket, &address)?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(())
        };
        listen().map_err(|source| SocketError::Listen {
            path: path.to_owned(),
            source,
        })?;
        watch(socket).map(Self).map_err(SocketError::Create)
    }

    /// Waits for a connection. Peers of other users are turned away.
    ///
    /// # Errors
    /// When the process or the system is out of descriptors or memory.
    pub async fn accept(&self) -> Result<AsyncChannel, SocketError> {
        let own = rustix::process::geteuid();
        loop {
            let mut ready = self.0.readable().await.map_err(SocketError::Accept)?;
            let accepted = ready.try_io(|socket| {
                rustix::net::accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
                    .map_err(io::Error::from)
            });
            let Ok(socket) = accepted else { continue };
            let socket = socket.map_err(SocketError::Accept)?;
            let peer = socket_peercred(&socket).map_err(|e| SocketError::Accept(e.into()))?;
            if peer.uid == own || peer.uid.is_root() {
                return AsyncChannel::new(Channel(socket)).map_err(SocketError::Accept);
            }
        }
    }
}

/// Registers a descriptor with the running tokio runtime.
///
/// # Errors
/// When the runtime can't watch it.
pub fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` keeps the one descriptor open as long as it lives, and
    // nobody gets it out of the `AsyncFd` without ending the registration.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}

fn address(path: &Path) -> Result<SocketAddrUnix, SocketError> {
    SocketAddrUnix::new(path).map_err(|_| SocketError::PathTooLong {
        path: path.to_owned(),
        length: path.as_os_str().len(),
    })
}

fn socket(flags: SocketFlags) -> Result<OwnedFd, SocketError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|error| SocketError::Create(error.into()))
}

fn encode<M: Message>(
    message: &M,
    descriptors: &[BorrowedFd<'_>],
) -> Result<Vec<u8>, ChannelError> {
    let expected = message.descriptors();
    if expected != descriptors.len() {
        return Err(ChannelError::Descriptors {
            expected,
            found: descriptors.len(),
        });
    }
    if expected > MAX_DESCRIPTORS {
        return Err(ChannelError::TooManyDescriptors);
    }
    let bytes = serde_json::to_vec(message).map_err(ChannelError::Format)?;
    if bytes.len() > MAX_MESSAGE {
        return Err(ChannelError::TooLong);
    }
    Ok(bytes)
}

fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let iov = [IoSlice::new(bytes)];
    let flags = flags | SendFlags::NOSIGNAL;
    rustix::io::retry_on_intr(|| rustix::net::sendmsg(socket, &iov, &mut control, flags))?;
    Ok(())
}

/// A packet as it came, its descriptors already owned.
struct Packet {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    flags: ReturnFlags,
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Packet> {
    let mut bytes = vec![0; MAX_MESSAGE];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let mut receive = || {
        rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)
        })
    };
    let received = match receive() {
        // Said once, when the peer has closed its end with messages unread, and before the
        // messages that it has sent: those come now, or else the end.
        Err(rustix::io::Errno::CONNRESET) => receive(),
        received => received,
    }?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    bytes.truncate(received.bytes);
    Ok(Packet {
        bytes,
        descriptors,
        flags: received.flags,
    })
}

fn decode<M: Message>(packet: Packet) -> Result<Option<(M, Vec<OwnedFd>)>, ChannelError> {
    if packet.flags.contains(ReturnFlags::TRUNC) {
        return Err(ChannelError::TooLong);
    }
    if packet.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ChannelError::TooManyDescriptors);
    }
    // No message is empty, so this is the end of the stream.
    if packet.bytes.is_empty() {
        return Ok(None);
    }
    let message: M = serde_json::from_slice(&packet.bytes).map_err(ChannelError::Format)?;
    let expected = message.descriptors();
    if expected != packet.descriptors.len() {
        return Err(ChannelError::Descriptors {
            expected,
            found: packet.descriptors.len(),
        });
    }
    Ok(Some((message, packet.descriptors)))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Letter {
        text: String,
        descriptors: usize,
    }

    impl Message for Letter {
        fn descriptors(&self) -> usize {
            self.descriptors
        }
    }

    fn letter(text: &str, descriptors: usize) -> Letter {
        Letter {
            text: text.to_owned(),
            descriptors,
        }
    }

    /// A message of a peer that doesn't keep to the rules.
    fn send_raw(channel: &Channel, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        send(channel.as_fd(), bytes, descriptors, SendFlags::empty()).unwrap();
    }

    #[test]
    fn a_message_comes_with_its_descriptors_closed_on_exec() {
        let (one, other) = Channel::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();

        one.send(&letter("hello", 1), &[writer.as_fd()]).unwrap();
        drop(writer);
        let (message, mut descriptors) = other.receive::<Letter>().unwrap().unwrap();

        let received = descriptors.pop().unwrap();
        let flags = rustix::io::fcntl_getfd(&received).unwrap();
        assert_eq!(message.text, "hello");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        std::fs::File::from(received).write_all(b"x").unwrap();
        assert_eq!(reader.read(&mut [0; 8]).unwrap(), 1);
    }

    #[test]
    fn the_end_of_the_peer_is_none() {
        let (one, other) = Channel::pair().unwrap();

        drop(one);

        assert!(other.receive::<Letter>().unwrap().is_none());
    }

    #[test]
    fn what_a_peer_said_before_its_end_comes_although_it_did_not_listen() {
        let (one, other) = Channel::pair().unwrap();
        other.send(&letter("unread", 0), &[]).unwrap();
        one.send(&letter("last words", 0), &[]).unwrap();

        drop(one);
        let (message, _) = other.receive::<Letter>().unwrap().unwrap();
        let end = other.receive::<Letter>().unwrap();

        assert_eq!(message.text, "last words");
        assert!(end.is_none());
    }

    #[test]
    fn as_many_descriptors_as_allowed_come_at_once() {
        let (one, other) = Channel::pair().unwrap();
        let descriptors = [one.as_fd(); MAX_DESCRIPTORS];

        one.send(&letter("", MAX_DESCRIPTORS), &descriptors)
            .unwrap();
        let (_, received) = other.receive::<Letter>().unwrap().unwrap();

        assert_eq!(received.len(), MAX_DESCRIPTORS);
    }

    #[test]
    fn descriptors_that_a_message_should_not_have_are_refused_and_closed() {
        let (one, other) = Channel::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let bytes = serde_json::to_vec(&letter("", 0)).unwrap();

        send_raw(&one, &bytes, &[writer.as_fd()]);
        drop(writer);
        let error = other.receive::<Letter>().unwrap_err();

        assert!(matches!(
            error,
            ChannelError::Descriptors {
                expected: 0,
                found: 1
            }
        ));
        // Nobody holds the writing end any more.
        assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn more_descriptors_than_allowed_are_refused() {
        // The room for control messages is rounded up, so one more may still fit.
        const TOO_MANY: usize = MAX_DESCRIPTORS + 8;
        let (one, other) = Channel::pair().unwrap();
        let bytes = serde_json::to_vec(&letter("", 0)).unwrap();
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(TOO_MANY))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [one.as_fd(); TOO_MANY];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));

        let iov = [IoSlice::new(&bytes)];
        rustix::net::sendmsg(&one, &iov, &mut control, SendFlags::empty()).unwrap();
        let error = other.receive::<Letter>().unwrap_err();

        assert!(matches!(error, ChannelError::TooManyDescriptors));
    }

    #[test]
    fn a_long_message_is_refused_by_both_ends() {
        let (one, other) = Channel::pair().unwrap();
        let long = "x".repeat(MAX_MESSAGE);

        let sent = one.send(&letter(&long, 0), &[]).unwrap_err();
        send_raw(&one, format!("{long}x").as_bytes(), &[]);
        let received = other.receive::<Letter>().unwrap_err();

        assert!(matches!(sent, ChannelError::TooLong));
        assert!(matches!(received, ChannelError::TooLong));
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_waited_for() {
        let (one, _other) = Channel::pair().unwrap();

        let error = std::iter::repeat_with(|| one.try_send(&letter("x", 0), &[]))
            .take(1_000_000)
            .find_map(Result::err)
            .unwrap();

        assert!(matches!(error, ChannelError::Full));
    }

    #[tokio::test]
    async fn a_socket_in_the_file_system_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");

        let listener = Listener::bind(&path).unwrap();
        let client = Channel::connect(&path).unwrap();
        let server = listener.accept().await.unwrap();
        server.send(&letter("hello", 0), &[]).await.unwrap();

        let (message, _) = client.receive::<Letter>().unwrap().unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(message.text, "hello");
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(server.peer().unwrap().pid, rustix::process::getpid());
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_says_so() {
        let error = Listener::bind(Path::new(&format!("/{}", "x".repeat(108)))).unwrap_err();

        assert!(matches!(
            error,
            SocketError::PathTooLong { length: 109, .. }
        ));
    }
}
