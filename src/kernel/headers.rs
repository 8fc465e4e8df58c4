//! What the kernel's own headers say, asked of the C compiler. They are linux-libc-dev's.

use std::io::Write;
use std::process::{Command, Stdio};

const INCLUDED: &str = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/dm-ioctl.h>\n\
    #include <linux/fs.h>\n#include <linux/fsverity.h>\n#include <linux/loop.h>\n";

/// Asserts that each C expression has the value beside it.
pub(crate) fn assert_agree<T: Into<u64> + Copy>(pins: &[(T, &str)]) {
    let asked: Vec<_> = pins.iter().map(|(_, theirs)| *theirs).collect();
    let theirs = values(&asked);
    assert_eq!(theirs.len(), pins.len());
    for ((ours, name), theirs) in pins.iter().zip(theirs) {
        let ours: u64 = (*ours).into();
        assert_eq!(
            ours, theirs,
            "{name}: ours is {ours:#x}, the kernel's {theirs:#x}"
        );
    }
}

fn values(expressions: &[&str]) -> Vec<u64> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = dir.path().join("values");
    let lines: String = expressions
        .iter()
        .map(|each| format!("    printf(\"%llu\\n\", (unsigned long long)({each}));\n"))
        .collect();
    let source = format!("{INCLUDED}int main(void) {{\n{lines}    return 0;\n}}\n");
    let mut compiler = Command::new("cc")
        .args(["-x", "c", "-", "-o"])
        .arg(&program)
        .stdin(Stdio::piped())
        .spawn()
        .expect("a C compiler");
    let mut input = compiler.stdin.take().expect("piped");
    input.write_all(source.as_bytes()).expect("it reads");
    drop(input);
    assert!(compiler.wait().expect("it ends").success(), "{source}");
    let printed = Command::new(&program).output().expect("it runs").stdout;
    let printed = String::from_utf8(printed).expect("digits");
    printed
        .lines()
        .map(|line| line.parse().expect("a number"))
        .collect()
}
