use std::io::Write;

use hull_machine::memory::working_set::{PageRange, WorkingSet};

use super::kind::tests::kind;
use super::*;

fn made(templates: &Templates, kind: &Kind) {
    let unfinished = templates.begin(kind.clone()).unwrap();
    let files = unfinished.files().unwrap();
    File::from(files.memory).write_all(b"memory").unwrap();
    unfinished.finish().unwrap();
}

fn store() -> (tempfile::TempDir, Templates) {
    let data = tempfile::tempdir().unwrap();
    let templates = Templates::open(data.path()).unwrap();
    (data, templates)
}

#[test]
fn a_template_is_found_by_its_kind_once_it_is_finished() {
    let (_data, templates) = store();
    let kind = kind(&[]);
    assert!(templates.find(&kind).unwrap().is_none());

    made(&templates, &kind);

    let template = templates.find(&kind).unwrap().unwrap();
    let mut memory = String::new();
    File::from(template.files.memory)
        .read_to_string(&mut memory)
        .unwrap();
    assert_eq!(memory, "memory");
    let other = Kind {
        vcpus: 7,
        ..kind.clone()
    };
    assert!(templates.find(&other).unwrap().is_none());
    let all = templates.list().unwrap();
    assert_eq!((all.len(), &all[0].id), (1, &kind.id()));
    assert!(all[0].current);
}

#[test]
fn a_template_is_made_by_one_at_a_time_and_goes_with_its_maker() {
    let (data, templates) = store();
    let first = templates.begin(kind(&[])).unwrap();
    first.files().unwrap();

    let second = templates.begin(kind(&[]));
    drop(first);

    assert!(matches!(second, Err(TemplateError::BeingMade(_))));
    let left: Vec<_> = fs::read_dir(data.path().join("templates"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(left.iter().all(|path| path.is_file()), "{left:?}");
    templates.begin(kind(&[])).unwrap();
}

#[test]
fn a_file_that_was_changed_makes_it_broken() {
    for name in [STATE, MEMORY, DESCRIPTION] {
        for change in ["truncated", "written", "gone"] {
            let (data, templates) = store();
            let kind = kind(&[]);
            made(&templates, &kind);
            let path = data.path().join("templates").join(kind.id()).join(name);
            match change {
                "truncated" => {
                    let file = File::options().write(true).open(&path).unwrap();
                    file.set_len(1).unwrap();
                }
                "written" => {
                    let mut file = File::options().append(true).open(&path).unwrap();
                    file.write_all(b"x").unwrap();
                }
                _ => fs::remove_file(&path).unwrap(),
            }

            let found = templates.find(&kind);

            if (name, change) == (DESCRIPTION, "gone") {
                assert!(found.unwrap().is_none());
                continue;
            }
            let error = found.unwrap_err();
            assert!(
                matches!(&error, TemplateError::Broken { why, .. } if why.contains(name)),
                "{name} {change}: {error}"
            );
            assert!(error.to_string().contains(&kind.id()), "{error}");
        }
    }
}

#[test]
fn what_no_pod_can_begin_with_is_removed() {
    let (data, templates) = store();
    let kernel = data.path().join("vmlinux");
    fs::write(&kernel, "one").unwrap();
    let (old, current) = (kind(&[&kernel]), kind(&[]));
    made(&templates, &old);
    made(&templates, &current);
    fs::write(&kernel, "another").unwrap();

    templates.tidy().unwrap();

    assert!(templates.find(&old).unwrap().is_none());
    assert!(templates.find(&current).unwrap().is_some());
}

#[test]
fn only_templates_are_removed_by_id() {
    let (data, templates) = store();
    made(&templates, &kind(&[]));
    let id = kind(&[]).id();
    for name in ["../templates", "..", "", "/etc", "0123"] {
        assert!(
            matches!(templates.remove(name), Err(TemplateError::NotFound(_))),
            "{name}"
        );
    }

    templates.remove(&id).unwrap();

    assert!(templates.list().unwrap().is_empty());
    assert_eq!(
        fs::read_dir(data.path().join("templates")).unwrap().count(),
        0
    );
}

#[test]
fn one_that_is_no_good_is_discarded_and_not_the_next_in_its_place() {
    let (_data, templates) = store();
    let kind = kind(&[]);
    made(&templates, &kind);
    let first = templates.find(&kind).unwrap().unwrap();
    templates.discard(&first.id, first.created_at).unwrap();
    assert!(templates.find(&kind).unwrap().is_none());
    templates.discard(&first.id, first.created_at).unwrap();

    made(&templates, &kind);
    templates.discard(&first.id, first.created_at).unwrap();

    assert!(templates.find(&kind).unwrap().is_some());
}

#[test]
fn those_that_nobody_uses_go_when_there_are_many() {
    let (data, templates) = store();
    let kinds: Vec<_> = (1..=MOST as u64 + 1)
        .map(|mib| Kind {
            memory_mib: mib,
            ..kind(&[])
        })
        .collect();
    for (kind, seconds) in kinds.iter().zip(1..) {
        made(&templates, kind);
        let path = data.path().join("templates").join(kind.id());
        let used = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        File::open(path.join(DESCRIPTION))
            .unwrap()
            .set_modified(used)
            .unwrap();
    }
    // So the second is the one that nobody has used for longest.
    templates.find(&kinds[0]).unwrap().unwrap();

    templates.tidy().unwrap();

    assert_eq!(templates.list().unwrap().len(), MOST);
    assert!(templates.find(&kinds[0]).unwrap().is_some());
    assert!(templates.find(&kinds[1]).unwrap().is_none());
}

#[test]
fn who_makes_one_can_be_seen() {
    let (_data, templates) = store();
    let kind = kind(&[]);
    assert!(!templates.is_being_made(&kind));

    let unfinished = templates.begin(kind.clone()).unwrap();

    assert!(templates.is_being_made(&kind));
    drop(unfinished);
    assert!(!templates.is_being_made(&kind));
}

#[test]
fn what_a_maker_left_that_died_is_removed() {
    let (data, templates) = store();
    let place = data.path().join("templates").join(".new-0123");
    fs::create_dir(&place).unwrap();
    let alive = templates.begin(kind(&[])).unwrap();

    templates.tidy().unwrap();

    assert!(!place.exists());
    assert!(alive.directory().exists());
}

#[test]
fn what_clones_access_is_noted_once() {
    let (data, templates) = store();
    let kind = kind(&[]);
    made(&templates, &kind);
    let found = || templates.find(&kind).unwrap().unwrap();
    let first = found();
    assert_eq!(first.accesses, Accesses::ToBeSeen);
    let accessed = WorkingSet {
        written: [(1, 2), (7, 1)].map(PageRange::from).into(),
        read: [(3, 4)].map(PageRange::from).into(),
    };

    first.recording.unwrap().note(&accessed).unwrap();

    let second = found();
    assert_eq!(second.accesses, Accesses::Known(accessed));
    assert!(second.recording.is_none());
    let path = data.path().join("templates").join(kind.id());
    fs::write(path.join("working-set.json"), "[[1").unwrap();
    assert_eq!(found().accesses, Accesses::ToBeSeen);
}

#[test]
fn a_template_that_was_replaced_says_nothing_of_the_new_one() {
    let (_data, templates) = store();
    let kind = kind(&[]);
    made(&templates, &kind);
    let old = templates.find(&kind).unwrap().unwrap();
    made(&templates, &kind);

    let accessed = WorkingSet::default();
    old.recording.unwrap().note(&accessed).unwrap();

    let new = templates.find(&kind).unwrap().unwrap();
    assert!(new.recording.is_some());
}
