//! Ports of the pod on the host: published, and forwarded.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, Stdio};
use std::time::Duration;

use hull_tests::hull::Hull;
use hull_tests::network::{bridge, host_network};
use hull_tests::pod::Pod;
use hull_tests::{eventually, scaled};

pub const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub const ANY: u16 = 18100;
const LOCAL: u16 = 18101;
/// Connections in all, and of those so many at a time.
const CONNECTIONS: usize = 1000;
const AT_ONCE: usize = 50;

/// A pod that echoes, with ports of the host's.
pub fn published(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: network
    command: [echo-server, '7000']
    securityContext: {{capabilities: {{add: [NET_ADMIN]}}}}
    ports:
    - {{containerPort: 7000, hostPort: {ANY}}}
    - {{containerPort: 7000, hostPort: {ANY}, protocol: UDP}}
    - {{containerPort: 7000, hostPort: {LOCAL}, hostIP: 127.0.0.1}}
"
    )
}

fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, scaled(Duration::from_secs(2)))?;
    stream.set_read_timeout(Some(scaled(Duration::from_secs(10))))?;
    Ok(stream)
}

/// Whether a connection echoes.
pub fn echoes(address: SocketAddr) -> bool {
    let echo = || -> std::io::Result<bool> {
        let mut stream = connect(address)?;
        stream.write_all(b"hello")?;
        let mut back = [0; 5];
        stream.read_exact(&mut back)?;
        Ok(&back == b"hello")
    };
    echo().unwrap_or(false)
}

/// Whether a datagram comes back.
pub fn echoes_datagrams(address: SocketAddr) -> bool {
    let any: IpAddr = if address.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket
        .set_read_timeout(Some(scaled(Duration::from_millis(500))))
        .unwrap();
    socket.connect(address).unwrap();
    let mut back = [0; 16];
    // A datagram may be lost.
    (0..5).any(|_| {
        socket.send(b"hello").is_ok()
            && socket.recv(&mut back).is_ok_and(|n| &back[..n] == b"hello")
    })
}

/// `hull port-forward`, and where it listens.
fn port_forward(hull: &Hull, pod: &str, port: u16) -> (Child, SocketAddr) {
    let mut child = hull
        .command(["port-forward", pod, &format!(":{port}")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    // It goes on to say what it does.
    std::thread::spawn(move || output.lines().for_each(drop));
    let address = line.split(' ').nth(2).unwrap_or_default();
    let address = address.parse().unwrap_or_else(|_| panic!("{line:?}"));
    (child, address)
}

#[test]
fn published_ports_lead_into_the_pod() {
    let _host = host_network();
    let hull = Hull::with_images(&["network"]);
    let _ = hull.ok(["network", "create", "--ipv6", "dual"]);
    let start = |name: &str| Pod::start_with(&hull, name, &published(name), &["--network", "dual"]);
    let pod = start("published");
    let hosts: Vec<IpAddr> = bridge(&hull, "dual")
        .1
        .iter()
        .map(|ip| ip.parse().unwrap())
        .collect();
    let (host4, host6) = (hosts[0], hosts[1]);
    assert!(host4.is_ipv4() && host6.is_ipv6());
    let at = SocketAddr::new;
    eventually("the server is there", Duration::from_secs(3), || {
        echoes(at(LOCALHOST, ANY)).then_some(())
    });

    for ip in [LOCALHOST, host4, host6] {
        assert!(echoes(at(ip, ANY)), "TCP at {ip}");
        assert!(echoes_datagrams(at(ip, ANY)), "UDP at {ip}");
    }
    assert!(echoes(at(LOCALHOST, LOCAL)));
    assert!(!echoes(at(host4, LOCAL)), "it is 127.0.0.1's alone");
    assert!(!echoes(at(host6, LOCAL)), "it is 127.0.0.1's alone");

    // None is lost of many, each with bytes of its own.
    for round in 0..CONNECTIONS / AT_ONCE {
        let mut open: Vec<(String, TcpStream)> = (0..AT_ONCE)
            .map(|n| {
                let ip = [LOCALHOST, host4, host6][n % 3];
                let stream = connect(at(ip, ANY)).unwrap_or_else(|e| panic!("{round}/{n}: {e}"));
                (format!("connection {n} of round {round:>4}"), stream)
            })
            .collect();
        for (text, stream) in &mut open {
            stream.write_all(text.as_bytes()).unwrap();
        }
        for (text, stream) in &mut open {
            let mut back = vec![0; text.len()];
            stream
                .read_exact(&mut back)
                .unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(String::from_utf8_lossy(&back), *text);
        }
    }

    // The port is taken while the pod is there, however it ends, and free then.
    let second = hull.manifest("second.yaml", &published("second"));
    let refused = hull
        .command(["run", "-d", "--network", "dual"])
        .arg(&second)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && stderr.contains(&ANY.to_string()),
        "{stderr}"
    );
    drop(pod);
    assert!(!echoes(at(LOCALHOST, ANY)), "nobody is there any more");
    let _second = start("second");
    eventually("the second pod has it", Duration::from_secs(3), || {
        echoes(at(LOCALHOST, ANY)).then_some(())
    });
}

#[test]
fn ports_are_forwarded_whatever_the_network() {
    let _host = host_network();
    let hull = Hull::with_images(&["network"]);
    let pod = Pod::start(&hull, "published", &published("published"));
    let ip = pod.addresses()[0];
    eventually("the server is there", Duration::from_secs(3), || {
        echoes(SocketAddr::new(ip, 7000)).then_some(())
    });
    let (mut forward, address) = port_forward(&hull, "published", 7000);

    assert!(echoes(address));
    let _ = pod.sh(
        "main",
        "ip link set eth0 down; iptables -P INPUT DROP; iptables -A INPUT -i lo -j ACCEPT",
    );
    assert!(!echoes(SocketAddr::new(ip, 7000)), "the network is down");
    for n in 0..20 {
        assert!(echoes(address), "forwarded all the same: {n}");
    }

    drop(pod);
    let status = eventually("it ends with the pod", Duration::from_secs(3), || {
        forward.try_wait().unwrap()
    });
    assert!(!status.success());
}
