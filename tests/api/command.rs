//! The command, as far as it goes without a device.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::made_store::{MadeStore, content};

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
        &["cow"],
        &["cow", "inspect"],
        &["cow", "size"],
        &["cow", "size", "--origin", "1G", "--chunk-sectors", "3"],
        &["export", "out"],
        &["export", "--origin", "image", "out"],
        &["export", "--origin", "image", "--cow", "cow", "vm", "out"],
        &["flatten", "out"],
        &["layer", "image", "name"],
        &["tree", "vm", "vm"],
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
        "create",
        "cleanup",
        "remove",
        "list",
        "adopt",
        "reap",
        "repair",
        "status",
        "grow",
        "recover",
        "watch",
        "merge",
        "cow",
        "export",
        "flatten",
        "layer",
        "tree",
        "checkpoint",
        "rollback",
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
fn how_long_steps_took_is_on_stderr() {
    let output = run(&["remove", "--timings", "/nowhere/dm-0"], "");
    assert_eq!(output.stdout, b"already gone\n");
    let table = String::from_utf8(output.stderr).expect("text");
    let firsts = table.lines().filter_map(|line| line.split(' ').next());
    assert_eq!(
        firsts.collect::<Vec<_>>(),
        ["step", "Query", "elsewhere", "total"],
        "{table}"
    );
    let output = run(&["cleanup", "--timings", "-"], "[]");
    assert!(output.stdout.is_empty() && !output.stderr.is_empty());
}

#[test]
fn handles_come_from_a_file_too() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(b"{\"cow_loop\": \"/nowhere/loop7\"}")
        .expect("written");
    let path = file.path().to_str().expect("a plain path");
    check(&run(&["cleanup", path], ""), 0, "", "");
    check(&run(&["cleanup", path, path, "-"], "[]"), 0, "", "");
}

#[test]
fn of_many_snapshots_each_that_fails_has_a_line_and_keeps_no_other() {
    let input = r#"[{"cow_loop": "/dev/zero"}, {}, {"origin_loop": "/dev/full"}]"#;
    let line = |path| {
        format!(
            "dmsnap: left behind {path}: cannot inspect loop device {path}: \
             Inappropriate ioctl for device (os error 25)\n"
        )
    };
    let lines = format!(
        "{}{}dmsnap: cannot clean up 2 of the snapshots\n",
        line("/dev/zero"),
        line("/dev/full")
    );
    check(&run(&["cleanup"], input), 1, "", &lines);
    let output = run(&["cleanup"], r#"[{"name": "vm"}, {"name": "a/b"}]"#);
    assert_eq!(output.status.code(), Some(1));
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

/// A directory with an origin of that many bytes and a COW file with these chunks of 4 KiB.
fn stage(bytes: usize, chunks: &[u64]) -> (TempDir, [String; 3]) {
    let dir = TempDir::with_prefix("dmsnap-test-").expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let paths = [path("origin"), path("cow"), path("out")];
    std::fs::write(&paths[0], vec![0xa5; bytes]).expect("room");
    std::fs::write(&paths[1], MadeStore::new(8, chunks, 2).file).expect("room");
    (dir, paths)
}

#[test]
fn a_cow_file_is_inspected_and_its_changes_are_listed() {
    let (_dir, [_, cow, _]) = stage(4096, &[7, 8, 3]);
    let inspected = "chunk       8 sectors\nvalid       yes\norigin      unknown\n\
        layer       no\nover        unknown\nexceptions  3\nareas       1\nused        20480 of 28672 bytes\n";
    check(&run(&["cow", "inspect", &cow], ""), 0, inspected, "");
    let diff = "12288 4096 16384\n28672 8192 8192\n";
    check(&run(&["cow", "diff", &cow], ""), 0, diff, "");
    let json = |args: &[&str]| -> serde_json::Value {
        let output = run(args, "");
        assert_eq!(output.status.code(), Some(0));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    assert_eq!(
        json(&["cow", "inspect", "--json", &cow]),
        serde_json::json!({
            "file_bytes": 28672, "chunk_sectors": 8, "valid": true, "origin": null,
            "place": null, "exceptions": 3, "areas": 1, "used_bytes": 20480,
        })
    );
    assert_eq!(
        json(&["cow", "diff", "--json", &cow]),
        serde_json::json!({
            "chunk_sectors": 8,
            "extents": [
                { "origin_offset": 12288, "length": 4096, "cow_offset": 16384 },
                { "origin_offset": 28672, "length": 8192, "cow_offset": 8192 },
            ],
        })
    );
    std::fs::write(&cow, [0; 8192]).expect("room");
    let line = format!(
        "dmsnap: COW file {cow:?}: at byte 0: blank, no persistent snapshot was made on it\n"
    );
    check(&run(&["cow", "inspect", &cow], ""), 1, "", &line);
    check(&run(&["cow", "diff", &cow], ""), 1, "", &line);
    let line = "dmsnap: cannot read /nowhere/cow: No such file or directory (os error 2)\n";
    check(&run(&["cow", "diff", "/nowhere/cow"], ""), 1, "", line);
}

#[test]
fn sizes_are_told_for_an_image_and_for_a_number_of_bytes() {
    let sized = "least       12288 bytes (3 chunks)\n\
        worst case  8429568 bytes (2058 chunks)\n\
        avoid       1 + n * 257 chunks: such a file ends invalid instead of full\n";
    let (dir, _) = stage(4096, &[]);
    let image = dir.path().join("image");
    let file = std::fs::File::create(&image).expect("a new file");
    file.set_len(8 << 20).expect("room");
    for origin in ["8M", "8388608", image.to_str().expect("UTF-8")] {
        check(&run(&["cow", "size", "--origin", origin], ""), 0, sized, "");
    }
    let transient = "least       16384 bytes (1 chunks)\nworst case  8388608 bytes (512 chunks)\n";
    let args = ["cow", "size", "--origin", "8M", "--store", "transient"];
    let args = [&args[..], &["--chunk-sectors", "32"]].concat();
    check(&run(&args, ""), 0, transient, "");
    let json = run(&["cow", "size", "--json", "--origin", "8M"], "").stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    let expected = serde_json::json!({
        "least_bytes": 12288, "worst_case_bytes": 8429568, "trap_every_chunks": 257,
    });
    assert_eq!(json, expected);
    let line = "dmsnap: a COW file for such an origin would be too large for any file system\n";
    let largest = u64::MAX.to_string();
    check(
        &run(&["cow", "size", "--origin", &largest], ""),
        1,
        "",
        line,
    );
}

#[test]
fn an_export_tells_what_it_did_and_needs_no_terminal() {
    let (_dir, [origin, cow, out]) = stage(1 << 20, &[7]);
    let export = ["export", "--no-reflink", "--any-origin", "--origin"];
    let export = [&export[..], &[&origin, "--cow", &cow]].concat();
    let done = "1048576 bytes, 4096 of them changed; 1048576 written\n";
    let export = |more: &[&str]| run(&[&export[..], more].concat(), "");
    check(&export(&[&out]), 0, done, "");
    let found = std::fs::read(&out).expect("the export");
    let (changed, rest) = found[7 * 4096..].split_at(4096);
    assert!(changed.iter().all(|byte| *byte == content(7)));
    assert!(rest.iter().all(|byte| *byte == 0xa5));
    let line = format!("dmsnap: output {out:?} exists\n");
    check(&export(&[&out]), 1, "", &line);
    let json = export(&["--json", "--replace", &out]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    let expected = serde_json::json!({
        "bytes": 1 << 20, "changed_bytes": 4096, "written_bytes": 1 << 20, "reflinked": false,
    });
    assert_eq!(json, expected);
}

#[test]
fn a_flattening_tells_what_it_did_and_its_output_is_exported_the_same() {
    let (_dir, [origin, cow, out]) = stage(1 << 20, &[7]);
    let flat = format!("{out}.cow");
    let done = "32768 bytes, for 4096 changed bytes of a disk; 4096 written\n";
    check(&run(&["flatten", &cow, &flat], ""), 0, done, "");
    let line = format!("dmsnap: output {flat:?} exists\n");
    check(&run(&["flatten", &cow, &flat], ""), 1, "", &line);
    let json = run(&["flatten", "--json", "--replace", &cow, &flat], "").stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    let expected = serde_json::json!({
        "bytes": 32_768, "changed_bytes": 4096, "written_bytes": 4096,
    });
    assert_eq!(json, expected);
    let export = ["export", "--any-origin", "--origin", &origin, "--cow"];
    let exported = [&cow, &flat].map(|cow| {
        let done = run(&[&export[..], &[cow, "--replace", &out]].concat(), "");
        assert!(done.status.success(), "{done:?}");
        std::fs::read(&out).expect("the export")
    });
    assert!(exported[0] == exported[1]);
}

#[test]
fn an_interrupted_export_leaves_nothing_and_says_so() {
    for (signal, status) in [("INT", 130), ("TERM", 143)] {
        // On a busy machine an export may be over before the signal comes.
        let interrupted = (0..5).any(|_| interrupted(signal, status));
        assert!(interrupted, "SIG{signal} never came in time");
    }
}

/// Whether the signal came before the export was over.
fn interrupted(signal: &str, status: i32) -> bool {
    let (dir, [origin, cow, out]) = stage(192 << 20, &[7]);
    let mut command = dmsnap(&["export", "--no-reflink", "--any-origin"]);
    command.args(["--origin", &origin, "--cow", &cow, &out]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("dmsnap starts");
    // Nothing is written before the signals are listened for.
    let files = format!("/proc/{}/fd", child.id());
    let start = Instant::now();
    while !writes_below(Path::new(&files), dir.path()) {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "it writes nothing"
        );
        thread::yield_now();
    }
    let (signal, id) = (format!("-{signal}"), child.id().to_string());
    let sent = Command::new("kill").args([signal, id]).status();
    sent.expect("kill starts");
    let output = child.wait_with_output().expect("dmsnap ends");
    if output.status.success() {
        return false;
    }
    let line = "dmsnap: interrupted, nothing was written\n";
    check(&output, status, "", line);
    let left = std::fs::read_dir(dir.path()).expect("a directory");
    assert_eq!(left.count(), 2);
    true
}

/// Whether a nameless file below `dir` is among the open ones.
fn writes_below(files: &Path, dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(files) else {
        return false;
    };
    let targets = entries
        .flatten()
        .filter_map(|entry| std::fs::read_link(entry.path()).ok());
    targets
        .filter(|target| target.starts_with(dir))
        .any(|target| target.to_string_lossy().ends_with(" (deleted)"))
}
