//! A terminal as somebody has who types at `ctr`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use hull_tests::scaled;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

const LIMIT: Duration = Duration::from_secs(20);

/// A program with a terminal of its own.
pub struct Terminal {
    child: Child,
    controller: File,
    output: Receiver<Vec<u8>>,
    text: String,
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminal {
    /// Starts a command on one that is so large.
    pub fn start(command: &Command, columns: u16, rows: u16) -> Self {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        tcsetwinsize(&controller, size(columns, rows)).unwrap();
        let path = ptsname(&controller, Vec::new()).unwrap();
        let path = OsStr::new(path.to_str().unwrap());
        let open = || File::options().read(true).write(true).open(path).unwrap();
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(open())
            .stdout(open())
            .stderr(open())
            .spawn()
            .expect("util-linux is installed");
        let controller = File::from(controller);
        let (sender, output) = channel();
        let mut reader = controller.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            // EIO: nobody has the terminal any more.
            while let Ok(length @ 1..) = reader.read(&mut chunk) {
                if sender.send(chunk[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            controller,
            output,
            text: String::new(),
        }
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        tcsetwinsize(&self.controller, size(columns, rows)).unwrap();
    }

    pub fn type_in(&mut self, text: &str) {
        self.controller.write_all(text.as_bytes()).unwrap();
    }

    /// Until this has been shown.
    pub fn wait_for(&mut self, text: &str) {
        let end = Instant::now() + scaled(LIMIT);
        while !self.text.contains(text) {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(more) = self.output.recv_timeout(left) else {
                panic!("no {text:?} in {:?}", self.text);
            };
            self.text.push_str(&String::from_utf8_lossy(&more));
        }
    }

    /// The command's end, and all that was shown.
    pub fn finish(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        while let Ok(more) = self.output.recv_timeout(scaled(Duration::from_millis(100))) {
            self.text.push_str(&String::from_utf8_lossy(&more));
        }
        (status, std::mem::take(&mut self.text))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended, if all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
