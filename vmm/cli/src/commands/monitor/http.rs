//! The metrics over HTTP.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Mutex, Semaphore};

use super::Place;
use super::exposition::exposition;
use super::node::Node;
use crate::failure::Failure;

/// At a time. More wait to be accepted.
const CONNECTIONS: usize = 16;
/// For a request's head, and between requests.
const HEAD: Duration = Duration::from_secs(30);
/// Longer nobody needs: who scrapes comes again.
const CONNECTION: Duration = Duration::from_secs(600);
/// After a failure to accept (no descriptors, no memory), so that it isn't tried without a pause.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

type Body = Full<Bytes>;

/// Serves until the future is dropped.
///
/// # Errors
/// When it can't listen there.
pub async fn serve(place: &Place, node: Node) -> Result<(), Failure> {
    let node = Arc::new(Mutex::new(node));
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    match place {
        Place::Address(address) => {
            let failed = |e| Failure::io(format!("listening on {address}"), e);
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?;
            eprintln!("hull: metrics are at http://{bound}/metrics");
            loop {
                // It is never closed.
                let permit = Arc::clone(&places).acquire_owned().await.ok();
                let stream = listener.accept().await.map(|(stream, _)| stream);
                take(stream, &node, permit).await;
            }
        }
        Place::Unix(path) => {
            let (_socket, listener) = listen(path)?;
            eprintln!("hull: metrics are at {}", path.display());
            loop {
                let permit = Arc::clone(&places).acquire_owned().await.ok();
                let stream = listener.accept().await.map(|(stream, _)| stream);
                take(stream, &node, permit).await;
            }
        }
    }
}

/// A socket's file, which goes with this.
struct SocketFile<'a>(&'a Path);

impl Drop for SocketFile<'_> {
    fn drop(&mut self) {
        // Who finds it later would find nobody.
        let _ = std::fs::remove_file(self.0);
    }
}

/// Only for its own user. What is there already is somebody else's, unless it is a socket at which nobody listens.
fn listen(path: &Path) -> Result<(SocketFile<'_>, UnixListener), Failure> {
    let failed = |e: io::Error| Failure::io(format!("listening at {}", path.display()), e);
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)?;
        }
        _ => {}
    }
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path).map_err(failed);
    rustix::process::umask(before);
    Ok((SocketFile(path), listener?))
}

async fn take<S, P>(stream: io::Result<S>, node: &Arc<Mutex<Node>>, permit: P)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    P: Send + 'static,
{
    let stream = match stream {
        Ok(stream) => stream,
        Err(error) => {
            eprintln!("hull: accepting a connection: {error}");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            return;
        }
    };
    let node = Arc::clone(node);
    tokio::spawn(async move {
        let service = service_fn(move |request| answer(request, Arc::clone(&node)));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .serve_connection(TokioIo::new(stream), service);
        // Who has gone, or says nonsense, is not to be told.
        let _ = tokio::time::timeout(CONNECTION, connection).await;
        drop(permit);
    });
}

async fn answer(
    request: Request<Incoming>,
    node: Arc<Mutex<Node>>,
) -> Result<Response<Body>, Infallible> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            let seen = node.lock().await.look().await;
            match exposition(seen) {
                Ok(text) => (StatusCode::OK, text),
                Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
            }
        }
        (&Method::GET | &Method::HEAD, "/") => (StatusCode::OK, "See /metrics\n".into()),
        (&Method::GET | &Method::HEAD, _) => (StatusCode::NOT_FOUND, "See /metrics\n".into()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, String::new()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(TEXT));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_pod::state::{Directories, Registry};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    async fn asked(path: &Path, head: &str) -> String {
        let mut stream = UnixStream::connect(path).await.unwrap();
        let request = format!("{head} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn it_serves_metrics_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::new(root.path().join("run"), root.path().join("data"));
        let registry = Registry::open(directories, |_, _| Ok(())).unwrap();
        let node = Node::new(registry, Duration::from_secs(1));
        let path = root.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());

        let answers = tokio::select! {
            _ = async { serve(&Place::Unix(path.clone()), node).await } => panic!("it ended"),
            answers = async {
                while std::os::unix::net::UnixStream::connect(&path).is_err() {
                    tokio::task::yield_now().await;
                }
                [
                    asked(&path, "GET /metrics").await,
                    asked(&path, "GET /etc/passwd").await,
                    asked(&path, "POST /metrics").await,
                ]
            } => answers,
        };

        assert!(answers[0].contains("version=0.0.4"), "{}", answers[0]);
        assert!(answers[0].contains("\nhull_monitor_scrape_seconds "));
        assert!(answers[1].starts_with("HTTP/1.0 404"), "{}", answers[1]);
        assert!(answers[2].starts_with("HTTP/1.0 405"), "{}", answers[2]);
        assert!(!path.exists());
    }
}
