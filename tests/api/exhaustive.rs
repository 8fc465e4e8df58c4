//! Which public types may get more fields or variants, and which never will.

use std::collections::BTreeMap;
use std::fs;

use super::rooms::{sources, src};

/// All there is to say of these. A caller may build them and take them apart.
const COMPLETE: [(&str, &str); 6] = [
    ("FileId", "a file is known by its file system and its inode"),
    ("OriginIdentity", "two numbers in every uuid and every mark"),
    ("Usage", "the three numbers of the kernel's status line"),
    ("TargetLine", "a line of a dm table: start, length, target"),
    (
        "Exception",
        "an entry of the kernel's store has two numbers",
    ),
    ("Extent", "a range has two beginnings and a length"),
];

/// The public types of a source: true if nobody but the crate can build it, or match it to the last.
fn public_types(source: &str) -> BTreeMap<String, bool> {
    let lines: Vec<_> = source.lines().collect();
    let mut types = BTreeMap::new();
    for (at, line) in lines.iter().enumerate() {
        let is_enum = line.starts_with("pub enum ");
        if !is_enum && !line.starts_with("pub struct ") {
            continue;
        }
        let attributes = lines[..at].iter().rev();
        let mut attributes = attributes.take_while(|line| !line.is_empty() && **line != "}");
        let marked = attributes.any(|line| *line == "#[non_exhaustive]");
        let body = lines[at..].iter().take_while(|line| **line != "}");
        let hides = |line: &&str| {
            let field = line.trim_start();
            line.starts_with("    ")
                && !line.starts_with("     ")
                && !field.starts_with(['/', '#', '}', ')'])
                && !field.starts_with("pub ")
        };
        let closed = match (is_enum, line.ends_with('{')) {
            (true, _) => false,
            (false, true) => body.skip(1).copied().any(|line| hides(&line)),
            (false, false) => !line.contains("(pub "),
        };
        let name = line.split([' ', '<', '(']).nth(2).expect("a name");
        types.insert(name.to_owned(), marked || closed);
    }
    types
}

#[test]
fn every_public_type_may_grow_unless_it_is_complete_by_its_nature() {
    let mut files = Vec::new();
    sources(&src(), &mut files);
    let mut open = Vec::new();
    let mut seen = 0;
    for file in files {
        if file.starts_with(src().join("bin")) || file.starts_with(src().join("kernel")) {
            continue;
        }
        let source = fs::read_to_string(&file).expect("a source");
        for (name, may_grow) in public_types(&source) {
            seen += 1;
            if !may_grow {
                open.push(name);
            }
        }
    }
    assert!(seen > 80, "{seen} types are not all");
    open.sort();
    let mut complete = COMPLETE.map(|(name, _)| name);
    complete.sort_unstable();
    assert_eq!(open, complete, "mark it #[non_exhaustive], or say why not");
}
