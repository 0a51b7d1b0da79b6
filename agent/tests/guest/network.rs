//! The pod's network: sysctls, ports that are forwarded, and what is refused.

use hull_protocol::agent::{ConfigureNetworkRequest, ForwardRequest, Interface};

use crate::world::{World, limit, read_all, script};

crate::tests!(
    sysctls_of_the_pod_are_set_before_it_has_an_interface,
    a_network_without_interfaces_is_one,
    an_interface_without_a_device_is_refused,
    a_port_is_forwarded_with_its_half_close,
    a_port_nobody_listens_on_is_refused_at_once,
);

async fn sysctls_of_the_pod_are_set_before_it_has_an_interface(world: World) {
    let text =
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/conf/all/forwarding";
    let (_, out, _) = world.output("n1", &script(text)).await;
    assert_eq!(out, "0\n1\n");
    // Only the pod's.
    let ours = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    assert_eq!(ours, "1024\n");
}

async fn a_network_without_interfaces_is_one(world: World) {
    let request = ConfigureNetworkRequest::default();
    for _ in 0..2 {
        let configured = world.client.configure_network(limit(), &request).await;
        configured.unwrap();
    }
}

async fn an_interface_without_a_device_is_refused(world: World) {
    let request = ConfigureNetworkRequest {
        interfaces: vec![Interface {
            device: 31,
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1],
            mtu: 1500,
            ..Default::default()
        }],
        ..Default::default()
    };
    let refused = world.client.configure_network(limit(), &request).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("31 for interface eth0"), "{error}");
}

async fn a_port_is_forwarded_with_its_half_close(world: World) {
    let text = "nc -l -p 8080 -e sh -c 'read line; echo got $line; cat >&2; echo end'";
    let served = world.run("n2", &script(text), false).await;

    let stream = connected(&world, 8080).await;
    stream.write_all(b"hello\nrest").await.unwrap();
    stream.shutdown_write().unwrap();

    assert_eq!(read_all(&stream).await, "got hello\nend\n");
    assert_eq!(read_all(served.stderr.as_ref().unwrap()).await, "rest");
    world.end("n2").await;
}

async fn a_port_nobody_listens_on_is_refused_at_once(world: World) {
    let started = std::time::Instant::now();
    let error = forward(&world, 9, "").await.unwrap_err().to_string();
    assert!(error.contains("nothing listens on port 9"), "{error}");
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    for (port, host) in [(0, ""), (65_536, ""), (80, "example.org")] {
        assert!(forward(&world, port, host).await.is_err());
    }
}

type Stream = hull_agent::endpoint::Endpoint;

async fn forward(world: &World, port: u32, host: &str) -> ttrpc::Result<Stream> {
    let (stream, number) = world.stream().await;
    let request = ForwardRequest {
        stream: number,
        port,
        host: host.into(),
        ..Default::default()
    };
    world.client.forward(limit(), &request).await?;
    Ok(stream)
}

/// A forwarded connection, as soon as the container listens.
async fn connected(world: &World, port: u32) -> Stream {
    for _ in 0..500 {
        if let Ok(stream) = forward(world, port, "").await {
            return stream;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("nobody listens on port {port}");
}
