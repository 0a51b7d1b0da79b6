//! `hull exec`: streams, terminals and exit codes.

use std::io::{Read, Write};
use std::process::Stdio;

use hull_tests::hull::Hull;
use hull_tests::pod::{Pod, sleepers};

#[test]
fn exec_passes_streams_and_exit_codes() {
    let hull = Hull::new();
    let pod = Pod::start(&hull, "streams", &sleepers("streams", &[("one", "")], ""));

    // Exit codes, and the two output streams apart.
    let output = pod.exec("one", "echo out; echo err >&2; exit 7");
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(
        (&*output.stdout, &*output.stderr),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(pod.exec("one", "kill -9 $$").status.code(), Some(137));
    let missing = hull.run(["exec", "streams", "--", "/no/such/program"]);
    assert!(!missing.status.success());
    assert!(
        String::from_utf8_lossy(&missing.stderr).contains("/no/such/program"),
        "{missing:?}"
    );

    // Without -i, standard input is empty.
    assert_eq!(pod.sh("one", "wc -c"), "0");

    // With -i, its end passes through, several bursts arrive, and output after it too.
    hull_tests::hull::bursts_pass(&mut hull.command([
        "exec",
        "-i",
        "streams",
        "--",
        "sh",
        "-c",
        "cat; echo end",
    ]));

    // Binary data, both ways, unchanged.
    let bytes: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    let mut child = hull
        .command(["exec", "-i", "streams", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("hull is on PATH");
    let mut stdin = child.stdin.take().expect("a pipe");
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let mut echoed = Vec::new();
    let _ = child
        .stdout
        .take()
        .expect("a pipe")
        .read_to_end(&mut echoed);
    writer.join().expect("a thread").expect("hull reads");
    assert!(child.wait().expect("a child").success());
    assert!(echoed == bytes, "{} bytes came back", echoed.len());
}

#[test]
fn exec_with_a_terminal() {
    let hull = Hull::new();
    let _pod = Pod::start(&hull, "terminal", &sleepers("terminal", &[("one", "")], ""));

    // `script` gives hull a terminal; its size must be the container's.
    let inside = "exec hull exec -it terminal -- sh -c 'tty; stty size; exit 5'";
    let output = hull
        .script(&format!("stty rows 33 cols 111; {inside}"))
        .output()
        .expect("script is installed");

    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(
        printed.contains("/dev/pts/") || printed.contains("/dev/console"),
        "{printed}"
    );
    assert!(printed.contains("33 111"), "{printed}");
    assert_eq!(output.status.code(), Some(5), "{printed}");
}
