//! Volumes: what is shared, what is not, and what stays.

use std::time::Duration;

use hull_tests::eventually;
use hull_tests::hull::{Hull, assert_success};
use hull_tests::pod::Pod;

fn pod_with_volumes(hull: &Hull) -> String {
    let dir = hull.work_dir().display();
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: volumes}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  volumes:
  - {{name: data, hostPath: {{path: {dir}/data, type: DirectoryOrCreate}}}}
  - {{name: sealed, hostPath: {{path: {dir}/sealed, type: DirectoryOrCreate}}}}
  - {{name: file, hostPath: {{path: {dir}/one-file, type: FileOrCreate}}}}
  - {{name: scratch, emptyDir: {{}}}}
  - {{name: memory, emptyDir: {{medium: Memory, sizeLimit: 8Mi}}}}
  containers:
  - name: writer
    image: busybox
    args: [sleep, '100000']
    securityContext: {{capabilities: {{add: [SYS_ADMIN]}}, seccompProfile: {{type: Unconfined}}}}
    volumeMounts:
    - {{name: data, mountPath: /data}}
    - {{name: sealed, mountPath: /sealed, readOnly: true}}
    - {{name: file, mountPath: /etc/one-file}}
    - {{name: scratch, mountPath: /scratch}}
    - {{name: memory, mountPath: /memory}}
  - name: reader
    image: busybox
    args: [sleep, '100000']
    volumeMounts:
    - {{name: data, mountPath: /data, readOnly: true}}
    - {{name: scratch, mountPath: /inner, subPath: a/b}}
    - {{name: memory, mountPath: /memory}}
  - name: bystander
    image: busybox
    args: [sleep, '100000']
"
    )
}

#[test]
fn volumes_are_shared_as_declared() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "volumes", &pod_with_volumes(&hull));
    let dir = hull.work_dir();

    // Both ways between host and pod, and between containers.
    let _ = pod.sh(
        "writer",
        "echo from-guest > /data/guest; echo line >> /etc/one-file",
    );
    assert_eq!(
        std::fs::read_to_string(dir.join("data/guest")).unwrap(),
        "from-guest\n"
    );
    assert_eq!(
        std::fs::read_to_string(dir.join("one-file")).unwrap(),
        "line\n"
    );
    std::fs::write(dir.join("data/host"), "from-host\n").unwrap();
    assert_eq!(
        pod.sh("reader", "cat /data/host /data/guest"),
        "from-host\nfrom-guest"
    );
    let _ = pod.sh(
        "writer",
        "echo deep > /scratch/a/b/file; echo fast > /memory/file",
    );
    assert_eq!(
        pod.sh("reader", "cat /inner/file /memory/file"),
        "deep\nfast"
    );
    assert!(
        pod.sh("writer", "mount")
            .lines()
            .any(|l| l.contains(" /memory type tmpfs"))
    );

    // A container that does not declare a volume does not see it.
    let mounts = pod.sh(
        "bystander",
        "cat /proc/mounts; ls / /data /scratch 2>&1 || true",
    );
    assert!(
        !mounts.contains("/scratch ") && !mounts.contains(" /data "),
        "{mounts}"
    );
    assert!(
        !pod.exec("bystander", "find / -xdev -name guest | grep .")
            .status
            .success()
    );

    // Read-only refuses writes; also after root of the guest has remounted it,
    // since the host refuses them itself (CVE-2020-28914, CVE-2026-46695).
    assert!(!pod.exec("reader", "echo no > /data/no").status.success());
    let sealed = pod.exec(
        "writer",
        "mount -o remount,rw /sealed; echo no > /sealed/no",
    );
    assert!(!sealed.status.success());
    assert!(
        String::from_utf8_lossy(&sealed.stderr).contains("Read-only file system"),
        "{sealed:?}"
    );
    assert!(!dir.join("sealed/no").exists());

    pod.stop();
    assert_eq!(
        std::fs::read_to_string(dir.join("data/guest")).unwrap(),
        "from-guest\n"
    );
    assert_eq!(std::fs::read_dir(dir.join("sealed")).unwrap().count(), 0);
}

#[test]
fn file_systems_behave_on_a_share() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "volumes", &pod_with_volumes(&hull));
    let script = r#"set -e
cd /data
echo x > a; ln a b; [ $(stat -c %h a) = 2 ]
ln -s a c; [ "$(readlink c)" = a ]
truncate -s 64M sparse; [ $(stat -c %b sparse) -lt 1000 ]
fallocate -l 1M full; [ $(stat -c %b full) -ge 2048 ]
mkfifo pipe; (echo through > pipe &) ; [ "$(cat pipe)" = through ]
chown 1234:2345 a; [ $(stat -c %u:%g b) = 1234:2345 ]
chmod 4711 a; [ $(stat -c %a a) = 4711 ]
mkdir d; mv a d/a; [ -f d/a ]
dd if=/dev/zero of=direct bs=4096 count=4 oflag=direct 2>/dev/null
df /data >/dev/null
rm -r d pipe; echo ok"#;

    let printed = pod.sh("writer", script);

    assert_eq!(printed, "ok");
}

#[test]
fn locks_hold_between_containers() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "volumes", &pod_with_volumes(&hull));
    let data = hull.work_dir().join("data");
    std::fs::copy(env!("CARGO_BIN_EXE_lock"), data.join("lock")).unwrap();
    let _ = pod.sh(
        "writer",
        "touch /scratch/a/b/file; cp /data/lock /scratch/a/b/lock",
    );

    for kind in ["flock", "posix"] {
        let holder = pod
            .exec_command(
                "writer",
                &format!("exec /scratch/a/b/lock {kind} /scratch/a/b/file > /data/{kind}"),
            )
            .spawn()
            .unwrap();
        eventually("the lock is held", Duration::from_secs(5), || {
            std::fs::read_to_string(data.join(kind))
                .is_ok_and(|said| said == "locked\n")
                .then_some(())
        });
        let attempt = || {
            let script = format!("exec timeout 1 /inner/lock {kind} /inner/file");
            pod.exec("reader", &script).status.code()
        };

        assert_eq!(attempt(), Some(3), "{kind}: the other container has it");
        let _ = pod.sh("writer", "kill $(pidof lock)");
        let status = holder.wait_with_output().unwrap().status;
        assert!(!status.success(), "{kind}: {status}");
        // Held until the time-out's SIGTERM.
        assert_eq!(attempt(), Some(143), "{kind}: it is free again");
    }
}

#[test]
fn a_full_disk_is_the_containers_problem() {
    let hull = Hull::new();
    let small = hull.work_dir().join("data");
    std::fs::create_dir(&small).unwrap();
    let mount = |args: &[&str]| {
        let output = std::process::Command::new("mount")
            .args(args)
            .output()
            .unwrap();
        assert_success(&output, "mount");
    };
    mount(&[
        "-t",
        "tmpfs",
        "-o",
        "size=4m",
        "tmpfs",
        &small.to_string_lossy(),
    ]);
    let pod = Pod::start(&hull, "volumes", &pod_with_volumes(&hull));

    let full = pod.exec("writer", "dd if=/dev/zero of=/data/big bs=1M count=16");

    assert!(
        String::from_utf8_lossy(&full.stderr).contains("No space left on device"),
        "{full:?}"
    );
    assert_eq!(
        pod.sh(
            "writer",
            "rm /data/big; echo ok > /data/file; cat /data/file"
        ),
        "ok"
    );
    assert_eq!(pod.phase(), "Running");
    pod.stop();
    drop(pod);
    eventually("the volume is free", Duration::from_secs(5), || {
        rustix::mount::unmount(&small, rustix::mount::UnmountFlags::empty()).ok()
    });
}
