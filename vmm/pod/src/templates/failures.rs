//! What is remembered of templates that came to nothing, so that not every pod has another made.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Kind, TemplateError, Templates, io_error};
use crate::state::replace_file;
use crate::text::{cut, printable};

const FAILED: &str = "failed";
/// Until one is made again after the first failure; twice as long after each further one, up to the longest.
const FIRST_WAIT: SignedDuration = SignedDuration::from_mins(10);
const LONGEST_WAIT: SignedDuration = SignedDuration::from_hours(6);
/// Since the last one.
const FORGOTTEN: SignedDuration = SignedDuration::from_hours(24);
/// So many a host keeps.
const MOST: usize = 64;
/// Bytes of a reason, and of a file, at most.
const REASON_MAX: usize = 1 << 10;
const FILE_MAX: u64 = 1 << 16;

/// `<id>.failed`: no template of this kind could be made, or no clone of one answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Failure {
    pub kind: Kind,
    /// Of the last one.
    pub why: String,
    pub failed_at: Timestamp,
    /// In a row.
    pub count: u32,
}

impl Failure {
    /// From when on pods have another one made.
    #[must_use]
    pub fn until(&self) -> Timestamp {
        let doublings = self.count.saturating_sub(1).min(16);
        let wait = FIRST_WAIT.saturating_mul(1 << doublings).min(LONGEST_WAIT);
        self.failed_at
            .saturating_add(wait)
            .unwrap_or(self.failed_at)
    }

    /// A clock that was set back makes no wait longer.
    fn holds_at(&self, now: Timestamp) -> bool {
        (self.failed_at..self.until()).contains(&now)
    }

    fn is_forgotten_at(&self, now: Timestamp) -> bool {
        now < self.failed_at || now.duration_since(self.failed_at) > FORGOTTEN
    }
}

impl Templates {
    /// Remembers that there is none of this kind that is any good. What can't be written is logged: then it is tried
    /// again earlier.
    pub fn note_failure(&self, kind: &Kind, why: &str) {
        self.note_failure_at(kind, why, Timestamp::now());
    }

    fn note_failure_at(&self, kind: &Kind, why: &str, now: Timestamp) {
        let known = self.failure(&kind.id());
        let before = known.filter(|failure| !failure.is_forgotten_at(now));
        let failure = Failure {
            kind: kind.clone(),
            why: cut(&printable(why.as_bytes()), REASON_MAX).to_owned(),
            failed_at: now,
            count: before.map_or(0, |failure| failure.count).saturating_add(1),
        };
        let path = self.failure_file(&kind.id());
        let written = serde_json::to_vec(&failure)
            .map_err(|error| error.to_string())
            .and_then(|text| {
                replace_file(&path, &text).map_err(|error| crate::text::chain(&error))
            });
        if let Err(error) = written {
            tracing::warn!(error, "noting that a template came to nothing");
        }
        if let Err(error) = self.forget_failures_at(now) {
            let error = crate::text::chain(&error);
            tracing::warn!(error, "forgetting old failures");
        }
    }

    /// Why none of this kind is to be made at present. None: one can be.
    #[must_use]
    pub fn waits_after(&self, kind: &Kind) -> Option<Failure> {
        let failure = self.failure(&kind.id())?;
        failure.holds_at(Timestamp::now()).then_some(failure)
    }

    /// Of which kinds there is none because it failed, the last one first.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn failures(&self) -> Result<Vec<Failure>, TemplateError> {
        let now = Timestamp::now();
        let mut all = self.all_failures()?;
        all.retain(|failure| {
            let there = self.root.join(failure.kind.id()).exists();
            !there && !failure.is_forgotten_at(now) && failure.kind.is_current()
        });
        Ok(all)
    }

    /// Removes those that are old, and the oldest beyond a bound.
    pub(super) fn forget_failures(&self) -> Result<(), TemplateError> {
        self.forget_failures_at(Timestamp::now())
    }

    fn forget_failures_at(&self, now: Timestamp) -> Result<(), TemplateError> {
        for (place, failure) in self.all_failures()?.into_iter().enumerate() {
            if place >= MOST || failure.is_forgotten_at(now) {
                self.forget_failure(&failure.kind.id());
            }
        }
        Ok(())
    }

    /// Removes what is known of one, and its log.
    pub(super) fn forget_failure(&self, id: &str) {
        for path in [self.failure_file(id), self.log_of(id)] {
            // Not there is as good.
            let _ = fs::remove_file(path);
        }
    }

    /// Whether there is one by this name.
    pub(super) fn has_failed(&self, id: &str) -> bool {
        let known = self.all_failures().unwrap_or_default();
        known.iter().any(|failure| failure.kind.id() == id)
    }

    /// The last one first.
    fn all_failures(&self) -> Result<Vec<Failure>, TemplateError> {
        let doing = || format!("reading {}", self.root.display());
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io_error(doing))? {
            let name = entry.map_err(io_error(doing))?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(FAILED));
            let id = id.and_then(|id| id.strip_suffix('.'));
            all.extend(id.and_then(|id| self.failure(id)));
        }
        all.sort_by_key(|failure| std::cmp::Reverse(failure.failed_at));
        Ok(all)
    }

    fn failure_file(&self, id: &str) -> PathBuf {
        self.root.join(format!("{id}.{FAILED}"))
    }

    /// What can't be read is as if it weren't there: then another one is made.
    fn failure(&self, id: &str) -> Option<Failure> {
        let file = File::open(self.failure_file(id)).ok()?;
        let mut text = Vec::new();
        file.take(FILE_MAX).read_to_end(&mut text).ok()?;
        let failure: Failure = serde_json::from_slice(&text).ok()?;
        (failure.kind.id() == id).then_some(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::super::kind::tests::kind;
    use super::*;

    fn store() -> (tempfile::TempDir, Templates) {
        let data = tempfile::tempdir().unwrap();
        let templates = Templates::open(data.path()).unwrap();
        (data, templates)
    }

    fn minutes_of_wait(templates: &Templates) -> i64 {
        let failure = templates.failure(&kind(&[]).id()).unwrap();
        failure.until().duration_since(failure.failed_at).as_mins()
    }

    #[test]
    fn each_failure_is_waited_after_longer_than_the_one_before() {
        let (_data, templates) = store();
        let mut now = Timestamp::now();
        let mut waits = Vec::new();

        for _ in 0..8 {
            templates.note_failure_at(&kind(&[]), "no room", now);
            waits.push(minutes_of_wait(&templates));
            now += SignedDuration::from_hours(6);
        }

        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 360, 360]);
    }

    #[test]
    fn a_failure_is_told_until_it_is_forgotten() {
        let (_data, templates) = store();
        assert!(templates.waits_after(&kind(&[])).is_none());

        templates.note_failure(&kind(&[]), "no room\x1b[2J");

        let failure = templates.waits_after(&kind(&[])).unwrap();
        assert_eq!((failure.count, &*failure.why), (1, "no room\\u{1b}[2J"));
        assert_eq!(templates.failures().unwrap().len(), 1);
        let long_ago = Timestamp::now() - SignedDuration::from_hours(25);
        templates.note_failure_at(&kind(&[]), "no room", long_ago);
        assert!(templates.failures().unwrap().is_empty());
        templates.note_failure(&kind(&[]), "no room");
        assert_eq!(minutes_of_wait(&templates), 10);
    }

    #[test]
    fn a_clock_that_was_set_back_lets_one_be_made() {
        let (_data, templates) = store();
        let later = Timestamp::now() + SignedDuration::from_hours(1);

        templates.note_failure_at(&kind(&[]), "no room", later);

        assert!(templates.waits_after(&kind(&[])).is_none());
    }

    #[test]
    fn what_is_no_failure_is_none() {
        let (data, templates) = store();
        let id = kind(&[]).id();
        let file = data.path().join("templates").join(format!("{id}.failed"));
        for text in ["", "{}", "x"] {
            fs::write(&file, text).unwrap();
            assert!(templates.waits_after(&kind(&[])).is_none(), "{text}");
        }

        templates.note_failure(&kind(&[]), "no room");

        assert_eq!(minutes_of_wait(&templates), 10);
    }

    #[test]
    fn no_more_are_kept_than_a_host_has_kinds() {
        let (_data, templates) = store();
        let now = Timestamp::now();
        for number in 0..=MOST as u64 {
            let kind = Kind {
                memory_mib: number,
                ..kind(&[])
            };
            let ago = i64::try_from(MOST as u64 - number).unwrap();
            let at = now - SignedDuration::from_secs(ago);
            templates.note_failure_at(&kind, "no room", at);
        }

        let all = templates.all_failures().unwrap();

        assert_eq!(all.len(), MOST);
        assert!(all.iter().all(|failure| failure.kind.memory_mib != 0));
    }

    #[test]
    fn a_failure_is_removed_as_a_template_is() {
        let (_data, templates) = store();
        templates.note_failure(&kind(&[]), "no room");

        templates.remove(&kind(&[]).id()).unwrap();

        assert!(templates.failures().unwrap().is_empty());
        assert!(templates.remove(&kind(&[]).id()).is_err());
    }
}
