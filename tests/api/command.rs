//! The command, as far as it goes without a device.

use std::io::Write;
use std::process::{Command, Output, Stdio};

const ALLOWED: &str = "(allowed: 0-9 A-Z a-z # + - . : = @ _)";

fn dmsnap(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dmsnap"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str], input: &str) -> Output {
    let mut command = dmsnap(args);
    command.stdin(Stdio::piped());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("dmsnap starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    // A command that has failed before it reads its input has closed the pipe.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    child.wait_with_output().expect("dmsnap ends")
}

#[track_caller]
fn check(output: &Output, status: i32, stdout: &str, stderr: &str) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let found = (text(&output.stdout), text(&output.stderr));
    assert_eq!(found, (stdout.to_owned(), stderr.to_owned()));
    assert_eq!(output.status.code(), Some(status));
}

#[test]
fn wrong_usage_is_status_2_and_nothing_on_stdout() {
    for args in [
        &[][..],
        &["frobnicate"],
        &["create", "image", "cow"],
        &["create", "--chunk-sectors", "3", "image", "cow", "vm"],
        &["create", "--store", "Q", "image", "cow", "vm"],
        &["create", "--make-cow", "2Q", "image", "cow", "vm"],
        &["create", "--reserve", "image", "cow", "vm"],
        &["reap", "--keep-open", "--defer"],
        &["remove", "--deadline", "soon", "vm"],
        &["remove", "--deadline", "-1s", "vm"],
        &["status"],
        &["grow", "vm"],
        &["grow", "vm", "64MB"],
        &["recover", "vm", "2Q"],
        &["watch"],
        &["watch", "--at", "0%", "vm"],
        &["watch", "--at", "101%", "vm"],
        &["watch", "--grow-by", "0", "vm"],
        &["watch", "--max", "1G", "vm"],
        &["merge", "--origin", "image"],
    ] {
        let output = run(args, "");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{args:?}"
        );
    }
    let output = run(
        &["create", "--chunk-sectors", "3", "image", "cow", "vm"],
        "",
    );
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let reason = "cannot use chunks of 3 sectors: need a power of two from 1 to 2097152";
    assert!(text.contains(reason), "{text}");
}

#[test]
fn help_and_version_are_status_0_on_stdout() {
    let help = run(&["--help"], "");
    let text = String::from_utf8_lossy(&help.stdout).into_owned();
    assert_eq!((help.status.code(), help.stderr.len()), (Some(0), 0));
    for command in [
        "create", "cleanup", "remove", "list", "adopt", "reap", "status", "grow", "recover",
        "watch", "merge",
    ] {
        assert!(text.contains(&format!("\n  {command} ")), "{text}");
    }
    let version = concat!("dmsnap ", env!("CARGO_PKG_VERSION"), "\n");
    check(&run(&["--version"], ""), 0, version, "");
}

#[test]
fn a_failure_is_status_1_and_one_line_with_the_whole_chain() {
    let slash =
        format!("dmsnap: cannot name a device \"a/b\": it has the character '/' {ALLOWED}\n");
    check(&run(&["create", "image", "cow", "a/b"], ""), 1, "", &slash);
    let newline =
        format!("dmsnap: cannot name a device \"a\\nb\": it has the character '\\n' {ALLOWED}\n");
    check(&run(&["remove", "a\nb"], ""), 1, "", &newline);
    check(
        &run(&["remove", "/dev/null"], ""),
        1,
        "",
        "dmsnap: \"/dev/null\" is not a block device\n",
    );
    check(
        &run(&["remove", "/dev/null/dm-0"], ""),
        1,
        "",
        "dmsnap: cannot query /dev/null/dm-0: Not a directory (os error 20)\n",
    );
    check(
        &run(&["cleanup", "/nowhere/handles.json"], ""),
        1,
        "",
        "dmsnap: cannot read /nowhere/handles.json: No such file or directory (os error 2)\n",
    );
}

#[test]
fn all_that_is_left_behind_is_on_that_line() {
    let output = run(
        &["cleanup"],
        r#"{"cow_loop": "/dev/zero", "origin_loop": "/dev/full"}"#,
    );
    let reason = |path| {
        format!("cannot inspect loop device {path}: Inappropriate ioctl for device (os error 25)")
    };
    let line = format!(
        "dmsnap: left behind /dev/zero, /dev/full: {}; {}\n",
        reason("/dev/zero"),
        reason("/dev/full")
    );
    check(&output, 1, "", &line);
}

#[test]
fn what_is_gone_is_status_0() {
    check(&run(&["cleanup"], "{}"), 0, "", "");
    check(
        &run(&["cleanup", "-"], "{\"device\": \"/nowhere/dm-0\"}\n"),
        0,
        "",
        "",
    );
    check(
        &run(&["remove", "/nowhere/dm-0"], ""),
        0,
        "already gone\n",
        "",
    );
    check(
        &run(&["remove", "--defer", "/nowhere/dm-0"], ""),
        0,
        "already gone\n",
        "",
    );
}

#[test]
fn handles_come_from_a_file_too() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(b"{\"cow_loop\": \"/nowhere/loop7\"}")
        .expect("written");
    let path = file.path().to_str().expect("a plain path");
    check(&run(&["cleanup", path], ""), 0, "", "");
}

#[test]
fn wrong_handles_are_status_1_and_one_line() {
    let slash = format!("cannot name a device \"a/b\": it has the character '/' {ALLOWED}");
    for (input, reason) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("nonsense", "expected ident at line 1 column 2"),
        (
            "{\"name\":\n\"a\"",
            "EOF while parsing an object at line 2 column 3",
        ),
        (
            "{\"name\":\"a/b\"}",
            &format!("{slash} at line 1 column 14"),
        ),
    ] {
        let line = format!("dmsnap: cannot read handles from stdin: {reason}\n");
        check(&run(&["cleanup"], input), 1, "", &line);
    }
    let output = run(&["cleanup"], "{\"name\": \"vm\"} {}");
    assert_eq!(output.status.code(), Some(1), "two values are one too many");
}

#[test]
fn a_closed_pipe_is_no_failure() {
    for args in [
        &["remove", "/nowhere/dm-0"][..],
        &["--help"],
        &["--version"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = dmsnap(args);
        command.stdout(writer).stderr(Stdio::piped());
        let output = command.output().expect("dmsnap ends");
        check(&output, 0, "", "");
    }
}
