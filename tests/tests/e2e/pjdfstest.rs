//! POSIX conformance of a shared volume, against QEMU's virtiofsd on the same kernel.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::Pod;

/// Test name to `ok`, `FAILED`, `skipped`, as pjdfstest prints them.
type Results = BTreeMap<String, String>;

fn results(printed: &str) -> Results {
    printed
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (name, result) = (words.next()?, words.next()?);
            (name.contains("::") && words.next().is_none()).then(|| (name.into(), result.into()))
        })
        .collect()
}

fn files(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("pjdfstest")
        .join(name)
}

/// The program, its configuration and its users, in one directory.
fn tools(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/bin/pjdfstest");
    std::fs::copy(&built, dir.join("pjdfstest"))
        .unwrap_or_else(|error| panic!("{} (made by scripts/test): {error}", built.display()));
    // Of this pjdfstest runs a copy under another name, which busybox's would not take.
    std::fs::copy(env!("CARGO_BIN_EXE_sleep"), dir.join("sleep")).unwrap();
    for file in ["pjdfstest.toml", "passwd", "group"] {
        std::fs::copy(files(file), dir.join(file)).unwrap();
    }
}

fn on_hull() -> Results {
    let hull = Hull::new();
    let dir = hull.work_dir();
    tools(&dir.join("tools"));
    let shown = dir.display();
    let manifest = format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: posix}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  volumes:
  - {{name: tools, hostPath: {{path: {shown}/tools}}}}
  - {{name: passwd, hostPath: {{path: {shown}/tools/passwd, type: File}}}}
  - {{name: group, hostPath: {{path: {shown}/tools/group, type: File}}}}
  - {{name: share, hostPath: {{path: {shown}/share}}}}
  containers:
  - name: main
    image: busybox
    args: [sleep, '100000']
    volumeMounts:
    - {{name: tools, mountPath: /tools, readOnly: true}}
    - {{name: passwd, mountPath: /etc/passwd, readOnly: true}}
    - {{name: group, mountPath: /etc/group, readOnly: true}}
    - {{name: share, mountPath: /share}}
"
    );
    let pod = Pod::start(&hull, "posix", &manifest);
    let output = pod.exec(
        "main",
        "chmod 777 /share; PATH=/tools:$PATH /tools/pjdfstest -c /tools/pjdfstest.toml -p /share 2>/dev/null",
    );
    results(&String::from_utf8_lossy(&output.stdout))
}

fn on_qemu() -> Results {
    let work = tempfile::tempdir().unwrap();
    let dir = work.path();
    let root = dir.join("root");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::create_dir_all(dir.join("share")).unwrap();
    tools(&root.join("tools"));
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    std::fs::copy(files("qemu-init"), root.join("init")).unwrap();
    for file in ["passwd", "group"] {
        std::fs::copy(files(file), root.join("etc").join(file)).unwrap();
    }
    let script = r#"set -e
chmod +x root/init
(cd root && find . | cpio --quiet -o -H newc) > initramfs.cpio
/usr/lib/qemu/virtiofsd --socket-path="$PWD/fs.sock" -o source="$PWD/share" -o xattr -o cache=auto > virtiofsd.log 2>&1 &
server=$!
until [ -S fs.sock ]; do kill -0 $server; /bin/sleep 0.1; done
timeout 600 qemu-system-x86_64 -M microvm,pcie=on,pic=off,pit=off,rtc=off,memory-backend=memory \
  -accel kvm -cpu host -m 512 -object memory-backend-memfd,id=memory,size=512M,share=on \
  -chardev socket,id=fs,path=fs.sock -device vhost-user-fs-pci,chardev=fs,tag=share \
  -kernel "$HULL_GUEST_DIR/vmlinux" -initrd initramfs.cpio -append 'console=hvc0 quiet panic=-1' \
  -nodefaults -no-user-config -device virtio-serial-pci -chardev stdio,id=console \
  -device virtconsole,chardev=console -display none -no-reboot < /dev/null
wait $server || true"#;
    let output = Command::new("sh")
        .args(["-c", script])
        .current_dir(dir)
        .output()
        .unwrap();
    assert_success(&output, "pjdfstest under QEMU");
    results(&String::from_utf8_lossy(&output.stdout))
}

/// How many of each result.
fn counts(results: &Results) -> BTreeMap<&str, usize> {
    results
        .values()
        .fold(BTreeMap::new(), |mut counts, result| {
            *counts.entry(result.as_str()).or_default() += 1;
            counts
        })
}

#[test]
fn a_share_is_as_posix_as_with_qemus_virtiofsd() {
    let expected = std::fs::read_to_string(files("expected-differences")).unwrap();
    let expected: Vec<&str> = expected
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_whitespace().next())
        .collect();

    let qemu = on_qemu();
    let hull = on_hull();

    println!("QEMU's virtiofsd: {:?}", counts(&qemu));
    println!("Hull:             {:?}", counts(&hull));
    assert!(qemu.len() > 300, "the peer ran {} tests", qemu.len());
    let mut worse = Vec::new();
    for (test, peer) in &qemu {
        let ours = hull.get(test).map_or("not run", String::as_str);
        if ours != peer {
            println!("{test}: {peer} with QEMU's virtiofsd, {ours} with Hull");
            if peer == "ok" && !expected.contains(&test.as_str()) {
                worse.push(test.as_str());
            }
        }
    }
    assert!(worse.is_empty(), "worse than the peer: {worse:?}");
    let gone: Vec<_> = expected
        .iter()
        .filter(|test| hull.get(**test) == qemu.get(**test))
        .collect();
    assert!(gone.is_empty(), "no longer expected: {gone:?}");
}
