//! What tests of networks look at from the host: HTTP answers, frames, and what is left.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType};

use crate::hull::{Hull, assert_success};
use crate::scaled;

static HOST: Mutex<()> = Mutex::new(());

/// The host's network for one test at a time: what is left of a test is seen in it.
pub fn host_network() -> MutexGuard<'static, ()> {
    HOST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names in a network's `hull network inspect`: its bridge, and the addresses of the host in it.
#[must_use]
pub fn bridge(hull: &Hull, network: &str) -> (String, Vec<String>) {
    let network = hull.json(["network", "inspect", network]);
    let network = network.get(0).unwrap_or(&network);
    let text = |value: &serde_json::Value| value.as_str().expect("a text").to_owned();
    let subnets = network["subnets"].as_array().expect("a list");
    (
        text(&network["network_interface"]),
        subnets.iter().map(|s| text(&s["gateway"])).collect(),
    )
}

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// Asks for a page.
///
/// # Errors
/// When nobody answers, or in another language.
pub fn get(server: SocketAddr, path: &str) -> io::Result<Answer> {
    request(server, "GET", path, "", "")
}

/// Sends a document.
///
/// # Errors
/// When nobody answers, or in another language.
pub fn post(server: SocketAddr, path: &str, kind: &str, body: &str) -> io::Result<Answer> {
    request(server, "POST", path, kind, body)
}

fn request(
    server: SocketAddr,
    method: &str,
    path: &str,
    kind: &str,
    body: &str,
) -> io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, scaled(Duration::from_secs(5)))?;
    stream.set_read_timeout(Some(scaled(Duration::from_secs(30))))?;
    let length = body.len();
    // 1.0: the answer is not in chunks, and ends with the connection.
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: {server}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::other(format!("no HTTP: {text}")))?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok(Answer {
        status: status.ok_or_else(|| io::Error::other(format!("no status: {head}")))?,
        head: head.to_owned(),
        body: body.to_owned(),
    })
}

/// Counts the frames on all interfaces of the host that have a mark in them.
#[derive(Debug)]
pub struct Frames {
    counting: JoinHandle<BTreeMap<String, usize>>,
    done: Arc<AtomicBool>,
}

impl Frames {
    /// Counts frames with a text of the form `<mark:NAME>` by its name.
    ///
    /// # Panics
    /// When there are no packet sockets.
    #[must_use]
    pub fn count() -> Self {
        /// `ETH_P_ALL` in linux/if_ether.h, in the network's order of bytes.
        const ALL: u32 = 0x0003_u16.to_be() as u32;
        let socket = rustix::net::socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            std::num::NonZero::new(ALL).map(Protocol::from_raw),
        )
        .expect("a packet socket");
        let limit = Some(Duration::from_millis(200));
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Recv,
            limit,
        )
        .expect("a time-out");
        let done = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&done);
        let counting = std::thread::spawn(move || {
            let mut counts = BTreeMap::new();
            let mut frame = vec![0; 65536];
            loop {
                // First, so that what had come before is counted.
                let last = stop.load(Ordering::Relaxed);
                while let Ok((_, length)) =
                    rustix::net::recv(&socket, frame.as_mut_slice(), RecvFlags::empty())
                {
                    let text = String::from_utf8_lossy(&frame[..length.min(frame.len())]);
                    let mark = text
                        .split_once("<mark:")
                        .and_then(|(_, m)| m.split_once('>'));
                    if let Some((mark, _)) = mark {
                        *counts.entry(mark.to_owned()).or_default() += 1;
                    }
                }
                if last {
                    return counts;
                }
            }
        });
        Self { counting, done }
    }

    /// Ends the count.
    ///
    /// # Panics
    /// When it has failed.
    #[must_use]
    pub fn end(self) -> BTreeMap<String, usize> {
        self.done.store(true, Ordering::Relaxed);
        self.counting.join().expect("the count goes on")
    }
}

/// What networks of pods are made of, as far as it is on the host.
#[must_use]
pub fn traces(hull: &Hull) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = |what: &str, program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        assert_success(&output, program);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        found.extend(
            text.lines()
                .filter(|line| !line.starts_with('#') && !line.starts_with(':'))
                .map(|line| format!("{what}: {}", line.trim_end())),
        );
    };
    lines("interface", "ip", &["-brief", "link"]);
    lines("address", "ip", &["-brief", "address"]);
    lines("route", "ip", &["route"]);
    lines("route", "ip", &["-6", "route"]);
    lines("queueing", "tc", &["qdisc"]);
    for save in ["iptables-save", "ip6tables-save"] {
        lines(save, save, &[]);
    }
    lines(
        "namespace",
        "lsns",
        &["-t", "net", "-n", "-o", "NETNSID,COMMAND"],
    );
    found.extend(programs("aardvark-dns"));
    files(&hull.run_dir(), &mut found);
    found.sort();
    found
}

fn programs(name: &str) -> Vec<String> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("comm")).ok())
        .filter(|comm| comm.trim_end() == name)
        .map(|comm| format!("process: {}", comm.trim_end()))
        .collect()
}

/// Files of networks and pods below a run directory.
fn files(directory: &std::path::Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(format!("file: {}", path.display()));
        }
    }
}
