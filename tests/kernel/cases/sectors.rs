//! The sector size that a guest's disk shows.

use std::fs::File;
use std::path::Path;

use crate::common::tools::{complaint, finish, success};
use crate::common::{Mounted, Scene, dmsnap, output, run};

fn sector_size(name: &str) -> String {
    run!("blockdev", "--getss", format!("/dev/mapper/{name}"))
}

/// A file system on a disk with sectors of 4096 bytes.
fn on_4kn(scene: &Scene) -> (Mounted, String) {
    let disk = scene.sparse("disk", 64 << 20);
    let device = run!("losetup", "-b", "4096", "-f", "--show", &disk);
    run!("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", &device);
    let mounted = Mounted::mount(["-t", "ext4", &device], &scene.path("host"));
    (mounted, device)
}

fn create(options: &[&str], image: &Path, cow: &Path, name: &str) -> std::process::Output {
    let mut command = dmsnap();
    command.arg("create").args(options).arg(image).arg(cow);
    finish(command.arg(name))
}

// A loop device over a file on such a disk took the disk's sectors with direct I/O, and the guest's disk with it: file
// systems with blocks of 1 KiB did not mount.
#[test]
fn direct_io_leaves_the_sector_size_as_it_is() {
    let scene = Scene::new();
    let (host, device) = on_4kn(&scene);
    let (image, name) = (host.at().join("image"), scene.name());
    let file = File::create_new(&image).expect("a new file");
    file.set_len(8 << 20).expect("room");
    drop(file);
    run!("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", &image);
    let cow = host.at().join("cow");
    let done = create(&["--direct-io", "--make-cow", "9M"], &image, &cow, &name);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    let seen = sector_size(&name);
    println!("direct I/O on 4Kn: {seen}; {said}");
    assert_eq!(seen, "512");
    assert!(said.contains("direct I/O"), "{said}");
    let mapper = format!("/dev/mapper/{name}");
    drop(Mounted::mount(
        ["-t", "ext4", &mapper],
        &scene.path("guest"),
    ));
    success(dmsnap().arg("remove").arg(&name));

    let cow = host.at().join("cow-4096");
    let options = ["--direct-io", "--sector-size", "4096", "--make-cow", "9M"];
    let done = create(&options, &image, &cow, &name);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{said}");
    assert_eq!(sector_size(&name), "4096");
    assert!(!said.contains("direct I/O"), "{said}");
    let listed = run!("losetup", "-n", "-O", "DIO,LOG-SEC,BACK-FILE", "-l");
    println!("{listed}");
    let of_cow = |line: &&str| line.ends_with("cow-4096");
    let line = listed.lines().find(of_cow).expect("it is attached");
    assert!(line.split_whitespace().take(2).eq(["1", "4096"]), "{line}");
    success(dmsnap().arg("remove").arg(&name));
    drop(host);
    output!("losetup", "-d", device);
}

#[test]
fn sectors_of_4096_bytes_are_an_option_and_want_chunks_of_their_size() {
    let scene = Scene::new();
    let (cow, name) = (scene.cow("cow"), scene.name());
    let done = create(&["--sector-size", "4096"], scene.image(), &cow, &name);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(sector_size(&name), "4096");
    success(dmsnap().arg("remove").arg(&name));

    let small = ["--sector-size", "4096", "--chunk-sectors", "4"];
    let said = complaint(&create(&small, scene.image(), &scene.cow("c2"), &name));
    println!("chunk under sector: {said}");
    assert_eq!(
        said,
        "chunks of 4 sectors (2048 bytes) are smaller than the disk's sectors of 4096 bytes"
    );
    let odd = scene.sparse("odd", (1 << 20) + 512);
    let wide = ["--sector-size", "4096"];
    let said = complaint(&create(&wide, &odd, &scene.cow("c3"), &name));
    println!("image of odd length: {said}");
    assert_eq!(
        said,
        format!(
            "origin image {odd:?} has 1049088 bytes, no multiple of the disk's sectors of 4096 bytes"
        )
    );
}
