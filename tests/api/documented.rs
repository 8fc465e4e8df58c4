//! The examples of README, the crate's page and the guide: what is run in the guest is what is written there.
//!
//! `tests/kernel/documented` holds each example as a Rust expression, which the kernel tests run.
//! `DMSNAP_WRITE_EXAMPLES=1 cargo test --test api` writes those files anew after an example was changed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README and the chapters of the guide, by their names.
fn documents() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let guide = fs::read_dir(root().join("src/guide")).expect("the guide");
    let paths = guide.map(|entry| entry.expect("an entry").path());
    let chapters = paths.filter(|path| path.extension().is_some_and(|end| end == "md"));
    for path in chapters.chain([root().join("README.md")]) {
        let name = path.file_stem().expect("a name").to_string_lossy();
        let name = name.to_lowercase().replace('-', "_");
        found.insert(name, fs::read_to_string(&path).expect("text"));
    }
    found
}

/// The fenced blocks of a language, in their order.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let (mut found, mut open) = (Vec::new(), None::<String>);
    for line in text.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(word)) if word.starts_with(language) => open = Some(String::new()),
            (Some(block), None) => *block += &format!("{line}\n"),
            (Some(_), Some(_)) => found.extend(open.take()),
            (None, _) => {}
        }
    }
    found
}

/// A block as an expression: rustdoc's hidden lines are shown, and a `main` is called.
fn expression(block: &str) -> String {
    let mut text = String::from("{\n");
    for line in block.lines() {
        let shown = line.strip_prefix("# ").unwrap_or(line);
        text += &format!("{shown}\n");
    }
    if block.contains("fn main()") {
        text += "main()\n";
    }
    text + "}\n"
}

#[test]
fn the_examples_that_run_are_those_that_are_shown() {
    let crate_page = fs::read_to_string(root().join("src/lib.rs")).expect("text");
    let lines = crate_page
        .lines()
        .filter_map(|line| line.strip_prefix("//!"));
    let lines = lines.map(|line| line.strip_prefix(' ').unwrap_or(line));
    let mut all = BTreeMap::new();
    for (nth, block) in blocks(&lines.collect::<Vec<_>>().join("\n"), "no_run")
        .iter()
        .enumerate()
    {
        all.insert(format!("lib_{}.rs", nth + 1), expression(block));
    }
    for (name, text) in documents() {
        for (nth, block) in blocks(&text, "rust").iter().enumerate() {
            all.insert(format!("{name}_{}.rs", nth + 1), expression(block));
        }
    }
    assert!(all.len() >= 14, "{:?}", all.keys());
    let dir: PathBuf = root().join("tests/kernel/documented");
    let player = fs::read_to_string(dir.join("mod.rs")).expect("the tests that run them");
    for (file, text) in &all {
        if std::env::var_os("DMSNAP_WRITE_EXAMPLES").is_some() {
            fs::write(dir.join(file), text).expect("a writable tree");
        }
        let found = fs::read_to_string(dir.join(file)).unwrap_or_default();
        assert!(
            found == *text,
            "{file} is not what is shown: DMSNAP_WRITE_EXAMPLES=1 writes it"
        );
        assert!(
            player.contains(&format!("include!(\"{file}\")")),
            "nothing runs {file}"
        );
    }
    for entry in fs::read_dir(&dir).expect("the examples") {
        let name = entry
            .expect("an entry")
            .file_name()
            .to_string_lossy()
            .into_owned();
        assert!(
            name == "mod.rs" || all.contains_key(&name),
            "nothing shows {name}"
        );
    }
}

#[test]
fn readmes_commands_are_those_that_run() {
    let readme = fs::read_to_string(root().join("README.md")).expect("text");
    let shell = blocks(&readme, "sh").concat();
    let commands: Vec<&str> = shell
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .collect();
    // The demo is run by a kernel test, and all of it by the continuous integration.
    assert_eq!(commands, ["./tests/vm/run demo", "./tests/vm/run test"]);
    let ci = fs::read_to_string(root().join(".ci/run")).expect("text");
    assert!(ci.lines().any(|line| line == "./tests/vm/run test"), "{ci}");
}

/// `dmsnap WORD ...` in a line of code: the command has that word, and each option is one of the word's.
#[cfg(feature = "cli")]
#[test]
fn the_guides_commands_are_those_of_the_command_line() {
    let help = |words: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_dmsnap"));
        let done = command
            .args(words)
            .arg("--help")
            .output()
            .expect("it starts");
        assert!(done.status.success(), "dmsnap {words:?}: no such command");
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let mut seen = 0;
    for (name, text) in documents() {
        let flat = text.replace('\n', " ");
        let spans = flat.split('`').skip(1).step_by(2);
        let fenced = blocks(&text, "sh").concat();
        for line in spans.chain(fenced.lines()) {
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let (Some("dmsnap"), Some(word)) = (words.next(), words.next()) else {
                continue;
            };
            let page = help(&[word]);
            for option in words.filter_map(|word| word.trim_matches(['[', ']']).strip_prefix("--"))
            {
                assert!(page.contains(&format!("--{option}")), "{name}: {line}");
            }
            seen += 1;
        }
    }
    assert!(seen >= 8, "{seen}");
}
