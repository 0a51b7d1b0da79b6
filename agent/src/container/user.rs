//! The user a process runs as, looked up in the container's own files.
//!
//! The files belong to the container: they are opened beneath its root, must be
//! regular, and are read up to a bound. Nothing else of them is trusted.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

use crate::error::{Doing, Error, Result};

/// Largest passwd or group file that is read.
const MAX_FILE: u64 = 1024 * 1024;
/// Most groups that the kernel lets a process have (NGROUPS_MAX).
const MAX_GROUPS: usize = 65536;

/// Who a process runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    pub home: String,
}

/// Looks `user` up ("", "uid", "uid:gid", "name", "name:group") beneath `root`.
pub fn look_up(root: impl AsFd, user: &str, additional: &[u32]) -> Result<User> {
    let passwd = read(&root, "etc/passwd")?;
    let group = read(&root, "etc/group")?;
    find(&passwd, &group, user, additional)
}

fn read(root: impl AsFd, path: &str) -> Result<String> {
    let doing = || format!("reading the container's /{path}");
    let fd = match openat2(
        root,
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    ) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(error).doing(doing),
    };
    let kind = FileType::from_raw_mode(fstat(&fd).doing(doing)?.st_mode);
    if kind != FileType::RegularFile {
        return Err(Error::Invalid(format!(
            "the container's /{path} is not a regular file"
        )));
    }
    let mut bytes = Vec::new();
    File::from(fd)
        .take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .doing(doing)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE) {
        return Err(Error::Invalid(format!(
            "the container's /{path} is larger than {MAX_FILE} bytes"
        )));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd_entries(passwd: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(PasswdEntry {
            name,
            uid,
            gid,
            home,
        })
    })
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn group_entries(group: &str) -> impl Iterator<Item = GroupEntry<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        let members = fields.next().unwrap_or_default();
        Some(GroupEntry { name, gid, members })
    })
}

fn find(passwd: &str, group: &str, user: &str, additional: &[u32]) -> Result<User> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // A number is a uid, whatever names there are.
    let number: Option<u32> = user.parse().ok();
    let entry = passwd_entries(passwd).find(|entry| match number {
        Some(uid) => entry.uid == uid,
        None => entry.name == user,
    });
    let uid = match (&entry, number) {
        (Some(entry), _) => entry.uid,
        (None, Some(uid)) => uid,
        (None, None) => {
            return Err(Error::Invalid(format!(
                "user {user:?} is not in the container's /etc/passwd"
            )));
        }
    };
    let mut groups = Vec::new();
    let gid = match wanted_group {
        Some(wanted) => match wanted.parse() {
            Ok(gid) => gid,
            Err(_) => {
                group_entries(group)
                    .find(|entry| entry.name == wanted)
                    .ok_or_else(|| {
                        Error::Invalid(format!(
                            "group {wanted:?} is not in the container's /etc/group"
                        ))
                    })?
                    .gid
            }
        },
        None => entry.as_ref().map_or(0, |entry| entry.gid),
    };
    if let Some(entry) = &entry {
        groups.extend(
            group_entries(group)
                .filter(|group| group.members.split(',').any(|name| name == entry.name))
                .map(|group| group.gid)
                .filter(|&other| other != gid),
        );
    }
    groups.extend(additional);
    groups.sort_unstable();
    groups.dedup();
    groups.truncate(MAX_GROUPS);
    let home = entry
        .map(|entry| entry.home)
        .filter(|home| home.starts_with('/'))
        .unwrap_or("/");
    Ok(User {
        uid,
        gid,
        groups,
        home: home.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        broken\n\
        web:x:33:34::/srv:/bin/false\n\
        nohome:x:70:70\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:web\nlogs:x:4:syslog,web\nops:x:50:web\n";

    fn found(user: &str, additional: &[u32]) -> User {
        find(PASSWD, GROUP, user, additional).unwrap()
    }

    #[test]
    fn nothing_said_is_root() {
        let user = found("", &[]);
        assert_eq!((user.uid, user.gid, user.home.as_str()), (0, 0, "/root"));
    }

    #[test]
    fn a_name_brings_its_group_its_memberships_and_its_home() {
        let user = found("web", &[2000, 4]);
        assert_eq!(
            user,
            User {
                uid: 33,
                gid: 34,
                groups: vec![4, 50, 2000],
                home: "/srv".into()
            }
        );
        assert_eq!(found("33", &[2000, 4]), user);
    }

    #[test]
    fn an_unknown_number_is_itself_with_group_0() {
        let user = found("12345", &[]);
        assert_eq!((user.uid, user.gid, user.home.as_str()), (12345, 0, "/"));
    }

    #[test]
    fn groups_are_numbers_or_names() {
        assert_eq!(found("5:6", &[]).gid, 6);
        assert_eq!(found("web:logs", &[]).gid, 4);
        assert_eq!(found("nohome:", &[]).gid, 70);
    }

    #[test]
    fn unknown_names_are_errors() {
        assert!(find(PASSWD, GROUP, "nobody", &[]).is_err());
        assert!(find(PASSWD, GROUP, "web:nogroup", &[]).is_err());
        assert!(find("", "", "-1", &[]).is_err());
        assert!(find("", "", "4294967296", &[]).is_err());
    }

    #[test]
    fn links_stay_beneath_the_root_and_other_kinds_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        std::os::unix::fs::symlink("../../../../../../etc/passwd", etc.join("group")).unwrap();
        std::fs::write(etc.join("passwd"), "me:x:7:8::/me:\n").unwrap();
        let open = || File::open(root.path()).unwrap();

        // The link to /etc/passwd means the container's own.
        assert_eq!(look_up(open(), "me", &[]).unwrap().uid, 7);

        rustix::fs::mknodat(
            rustix::fs::CWD,
            etc.join("fifo"),
            FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        std::fs::rename(etc.join("fifo"), etc.join("passwd")).unwrap();
        assert!(matches!(look_up(open(), "me", &[]), Err(Error::Invalid(_))));
    }

    #[test]
    fn large_files_are_refused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let file = File::create(root.path().join("etc/passwd")).unwrap();
        file.set_len(MAX_FILE + 1).unwrap();
        assert!(look_up(File::open(root.path()).unwrap(), "", &[]).is_err());
    }
}
