//! The files of `/etc` that a pod's containers share.

use std::fmt::Write as _;
use std::io::Read;

use crate::manifest::PodManifest;

/// Where the host says how names are looked up, the better source first: the first
/// has the real servers where the second points to a resolver on the host itself.
const RESOLV_CONF: [&str; 2] = ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"];
/// More is not read of the host's.
const MAX_RESOLV_CONF: u64 = 64 << 10;

/// `/etc/hosts`, as the kubelet writes it.
pub fn hosts(manifest: &PodManifest, hostname: &str) -> String {
    let mut text = String::from(
        "# Written by Hull for this pod.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    // Writing to a String can't fail.
    let _ = writeln!(text, "127.0.0.1\t{hostname}");
    let aliases = manifest.spec().host_aliases.iter().flatten();
    for alias in aliases {
        let names = alias.hostnames.as_deref().unwrap_or_default();
        if !names.is_empty() {
            let _ = writeln!(text, "{}\t{}", alias.ip, names.join("\t"));
        }
    }
    text
}

/// `/etc/resolv.conf`: the host's. Empty where the host has none.
pub fn resolv_conf() -> Vec<u8> {
    let read = |path: &&str| {
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .ok()?
            .take(MAX_RESOLV_CONF)
            .read_to_end(&mut bytes)
            .ok()?;
        Some(bytes)
    };
    RESOLV_CONF.iter().find_map(read).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    #[test]
    fn host_aliases_are_in_hosts() {
        let text = "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {hostAliases: [{ip: 10.0.0.1, \
                    hostnames: [db, db.example]}], containers: [{name: a, image: b}]}}";
        let manifest = manifest::parse("f", text).unwrap().remove(0);
        let hosts = hosts(&manifest, "web");
        assert!(
            hosts.ends_with("127.0.0.1\tweb\n10.0.0.1\tdb\tdb.example\n"),
            "{hosts}"
        );
    }
}
