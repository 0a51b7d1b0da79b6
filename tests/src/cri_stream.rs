//! containerd's streams for CRI's `Exec`, `Attach` and `PortForward`, over a WebSocket: frames of a channel's number
//! and its bytes (`v4.channel.k8s.io`).

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::cri::Cri;
use crate::scaled;

pub const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
/// How it ended, as a `Status` of Kubernetes in JSON.
pub const STATUS: u8 = 3;
pub const RESIZE: u8 = 4;
/// Of `PortForward`, with one port.
pub const DATA: u8 = 0;
pub const ERROR: u8 = 1;

const LIMIT: Duration = Duration::from_secs(20);

/// A stream that is open.
#[derive(Debug)]
pub struct CriStream<'a> {
    cri: &'a Cri,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    /// What has come so far, by channel.
    received: [Vec<u8>; 5],
}

impl<'a> CriStream<'a> {
    /// Connects to where containerd says that it is.
    ///
    /// # Panics
    /// When it isn't.
    #[must_use]
    pub fn open(cri: &'a Cri, url: &str) -> Self {
        let url = url.replacen("http", "ws", 1);
        let mut request = url.into_client_request().expect("a URL");
        request.headers_mut().insert(
            "Sec-WebSocket-Protocol",
            HeaderValue::from_static("v4.channel.k8s.io"),
        );
        let connect = async { timeout(scaled(LIMIT), connect_async(request)).await };
        let connected = cri.runtime().block_on(connect).expect("in time");
        let (socket, _) = connected.expect("containerd speaks WebSocket");
        Self {
            cri,
            socket,
            received: Default::default(),
        }
    }

    /// # Panics
    /// When the other end is gone.
    pub fn send(&mut self, channel: u8, data: &[u8]) {
        let mut frame = vec![channel];
        frame.extend(data);
        let sent = self.socket.send(Message::binary(frame));
        self.cri
            .runtime()
            .block_on(sent)
            .expect("containerd listens");
    }

    /// Tells how large the terminal is.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let size = serde_json::json!({"Width": columns, "Height": rows});
        self.send(RESIZE, size.to_string().as_bytes());
    }

    /// Takes the next frame. False: there is none any more.
    fn receive(&mut self) -> bool {
        let next = async { timeout(scaled(LIMIT), self.socket.next()).await };
        let message = self.cri.runtime().block_on(next);
        let message = message.unwrap_or_else(|_| panic!("nothing after {:?}", self.received));
        match message {
            Some(Ok(Message::Binary(frame))) => {
                if let [channel, data @ ..] = &*frame
                    && let Some(received) = self.received.get_mut(usize::from(*channel))
                {
                    received.extend(data);
                }
                true
            }
            Some(Ok(Message::Close(_)) | Err(_)) | None => false,
            Some(Ok(_)) => true,
        }
    }

    /// All that has come of a channel so far.
    #[must_use]
    pub fn received(&self, channel: u8) -> String {
        String::from_utf8_lossy(&self.received[usize::from(channel)]).into_owned()
    }

    /// Until a channel has brought this.
    ///
    /// # Panics
    /// When it ends before.
    pub fn wait_for(&mut self, channel: u8, text: &str) {
        while !self.received(channel).contains(text) {
            assert!(
                self.receive(),
                "no {text:?} before the end: {:?}",
                self.received
            );
        }
    }

    /// Until its end, and how it ended: 0, or the exit code. None: nothing was said.
    ///
    /// # Panics
    /// When what was said can't be read.
    pub fn finish(&mut self) -> Option<i32> {
        while self.receive() {}
        let status = self.received(STATUS);
        if status.is_empty() {
            return None;
        }
        let status: serde_json::Value = serde_json::from_str(&status).expect("a status");
        if status["status"] == "Success" {
            return Some(0);
        }
        let code = &status["details"]["causes"][0]["message"];
        code.as_str().and_then(|code| code.parse().ok())
    }
}
