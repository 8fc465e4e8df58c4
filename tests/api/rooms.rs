//! The rooms of src: every import leads down, so that no circle crosses two rooms.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// From the ground up. A room may use those before it, and itself.
const FLOORS: [&str; 14] = [
    "base", "store", "dm", "error", "kernel", "call", "backing", "find", "teardown", "snapshot",
    "pool", "merge", "export", "watch",
];

pub(crate) fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The sources below a directory, without the tests that stand beside the stories.
pub(crate) fn sources(directory: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        let name = path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            sources(&path, into);
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") && name != "headers.rs" {
            into.push(path);
        }
    }
}

/// A source's code: no comments, and nothing from its tests on.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source");
    let code = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default();
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The rooms that the code names: `crate::room::...`, and each of `crate::{room, room::...}`.
fn named(code: &str) -> BTreeSet<String> {
    let word = |text: &str| {
        text.trim_start()
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    let mut rooms = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            rooms.insert(word(rest));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    rooms.insert(word(&item));
                    item.clear();
                    continue;
                }
                _ => (),
            }
            item.push(c);
        }
        rooms.insert(word(&item));
    }
    rooms
}

#[test]
fn every_import_leads_down() {
    let floor = |room: &str| FLOORS.iter().position(|each| *each == room);
    let mut wrong = Vec::new();
    for room in FLOORS {
        let mut files = Vec::new();
        sources(&src().join(room), &mut files);
        assert!(!files.is_empty(), "there is no room {room}");
        for file in files {
            let name = file
                .strip_prefix(src())
                .expect("below src")
                .display()
                .to_string();
            for target in named(&code(&file)) {
                match floor(&target) {
                    Some(below) if Some(below) <= floor(room) => (),
                    Some(_) => wrong.push(format!("{name} goes up to {target}")),
                    None if target.is_empty() => (),
                    None => wrong.push(format!(
                        "{name} names {target}, which is no room (a re-export of the root?)"
                    )),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_root_has_no_other_rooms_and_no_code() {
    let rooms: BTreeSet<_> = fs::read_dir(src())
        .expect("a directory")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let known = FLOORS
        .into_iter()
        .chain(["bin", "guide", "lib.rs"])
        .map(str::to_owned);
    assert_eq!(rooms, known.collect());
    assert!(rooms.len() <= 17, "at most 16 rooms beside lib.rs");
    let root = code(&src().join("lib.rs"));
    assert!(
        !root.contains("fn ") && !root.contains("struct "),
        "lib.rs has code"
    );
}

/// What only the kernel's room may name. The numbers of a device are arithmetic, and a type is no call.
const KERNEL_ALONE: [&str; 6] = ["std::fs", "fs::", "nix::", "libc::", "sys::", "File::open"];
const NO_CALLS: [&str; 5] = [
    "nix::errno::Errno",
    "std::fs::File;",
    "libc::major(",
    "libc::minor(",
    "libc::makedev(",
];

#[test]
fn nothing_but_the_kernels_room_calls_the_system() {
    let mut wrong = Vec::new();
    for room in FLOORS.into_iter().filter(|room| *room != "kernel") {
        let mut files = Vec::new();
        sources(&src().join(room), &mut files);
        for file in files {
            let text = NO_CALLS
                .iter()
                .fold(code(&file), |text, allowed| text.replace(allowed, ""));
            for line in text.lines() {
                let starts_word = |at: usize| {
                    !line[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                };
                let named = KERNEL_ALONE
                    .iter()
                    .find(|name| line.match_indices(*name).any(|(at, _)| starts_word(at)));
                if let Some(name) = named {
                    let file = file.strip_prefix(src()).expect("below src");
                    wrong.push(format!("{} has {name}: {}", file.display(), line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
