//! The examples as programs: their command lines, and that what they write is whole or not there.

// The plain parts of `byte_model` are here twice: as the programs have them, and in f64.
#![allow(clippy::duplicate_mod)]

#[path = "examples/experts.rs"]
mod experts;
#[path = "examples/gradients.rs"]
mod gradients;
#[path = "examples/training.rs"]
mod training;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use experts::byte_model::whole_file;
use tempfile::TempDir;

/// An example as cargo built it beside this test.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let folder = test.parent().and_then(Path::parent).expect("tests lie in target/<profile>/deps");
    let path = folder.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(path.exists(), "{} is missing: `cargo test` builds it, or `cargo build --examples`", path.display());
    path
}

/// Runs `routers` in a folder.
fn routers<A: AsRef<OsStr>>(folder: &Path, arguments: &[A]) -> Output {
    Command::new(example("routers")).args(arguments).current_dir(folder).output().expect("the example starts")
}

fn folder() -> TempDir {
    TempDir::with_prefix("moe-kernels-").expect("a temporary folder can be made")
}

/// Names in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn routers_says_how_it_is_used() {
    let folder = folder();
    let output = routers(folder.path(), &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("Usage: routers [FILE.svg]") && text.contains("routers.svg"), "{text}");
    for arguments in [&["--frob"][..], &["a.svg", "b.svg"]] {
        let output = routers(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("unexpected argument") && text.contains("Usage"), "{text}");
    }
    assert!(names(folder.path()).is_empty(), "nothing is written: {:?}", names(folder.path()));
}

#[test]
fn routers_writes_its_drawing() {
    let folder = folder();
    assert!(routers(folder.path(), &[] as &[&str]).status.success());
    assert!(routers(folder.path(), &["other.svg"]).status.success());
    let drawing = fs::read_to_string(folder.path().join("routers.svg")).unwrap();
    assert!(drawing.starts_with("<svg ") && drawing.ends_with("</svg>\n"));
    assert_eq!(names(folder.path()), ["other.svg", "routers.svg"]);
    assert_eq!(fs::read_to_string(folder.path().join("other.svg")).unwrap(), drawing);
    let output = routers(folder.path(), &["no/such/folder.svg"]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("error: no/such/folder.svg: ") && text.lines().count() == 1, "{text}");
}

#[test]
#[cfg(target_os = "linux")]
fn routers_takes_any_name() {
    use std::os::unix::ffi::OsStrExt;
    let (folder, name) = (folder(), OsStr::from_bytes(b"dra\xffwing.svg"));
    let output = routers(folder.path(), &[name]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(folder.path().join(name).is_file());
}

/// A name that is no UTF-8 is an answer, not a panic, wherever the command line has room for text only.
#[test]
#[cfg(target_os = "linux")]
fn words_that_are_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let word = OsStr::from_bytes(b"\xff");
    for (program, arguments) in [
        ("sass_table", [OsStr::new("--only"), word]),
        ("sass_table", [word, word]),
        ("hf_layer", [OsStr::new("--dtype"), word]),
        ("train_switch", [OsStr::new("--rule"), word]),
        ("train_switch", [OsStr::new("--steps"), word]),
        ("distill_switch", [OsStr::new("--share"), word]),
        ("hf_layer", [OsStr::new("--tokens"), word]),
        ("hf_layer", [OsStr::new("/no/such/folder/"), word]),
    ] {
        let output = Command::new(example(program)).args(arguments).output().expect("the example starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{program} {arguments:?}: {text}");
        assert!(text.starts_with("error: "), "{program} {arguments:?}: {text}");
    }
}

/// Both programs put a new file in the place of the earlier one and never write into it: another name of the earlier file, a hard
/// link, still has what was in it.
#[test]
fn the_programs_replace_what_was_there() {
    for (program, arguments) in
        [("routers", &["earlier"][..]), ("hf_layer", &["--tokens", "1", "--dtype", "f32", "--out", "earlier"])]
    {
        let folder = folder();
        let (earlier, link) = (folder.path().join("earlier"), folder.path().join("link"));
        fs::write(&earlier, "what was here before").unwrap();
        fs::hard_link(&earlier, &link).unwrap();
        let output = Command::new(example(program)).args(arguments).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(fs::read_to_string(&link).unwrap(), "what was here before", "{program}");
        assert!(fs::read(&earlier).unwrap().len() > 1000, "{program}");
        assert_eq!(names(folder.path()), ["earlier", "link"], "{program}");
    }
}

/// A limit on the size of files makes a write fail half-way, as a full disk does. It holds for a process, so this test starts itself.
#[test]
#[cfg(unix)]
fn a_full_disk_leaves_the_earlier_file() {
    const CHILD: &str = "MOE_TEST_WRITE_TO";
    if let Some(path) = std::env::var_os(CHILD) {
        let error = whole_file::write(Path::new(&path), &[b'x'; 1 << 20]).expect_err("there is no room");
        assert_eq!(error.kind(), std::io::ErrorKind::FileTooLarge);
        return;
    }
    let folder = folder();
    let path = folder.path().join("file");
    let write = || {
        let output = Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" \"$@\""])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "a_full_disk_leaves_the_earlier_file"])
            .env(CHILD, &path)
            .output()
            .expect("a shell starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    };
    write();
    assert!(names(folder.path()).is_empty(), "no part of a file: {:?}", names(folder.path()));
    fs::write(&path, "what was here before").unwrap();
    write();
    assert_eq!(fs::read_to_string(&path).unwrap(), "what was here before");
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
#[cfg(target_os = "linux")]
fn the_programs_say_that_there_is_no_room() {
    for (program, arguments, code) in
        [("routers", &["/dev/full"][..], 1), ("hf_layer", &["--tokens", "1", "--out", "/dev/full"], 2)]
    {
        let output = Command::new(example(program)).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{program}: {text}");
        assert!(text.starts_with("error: /dev/full: ") && text.lines().count() == 1, "{program}: {text}");
    }
}

#[test]
fn files_are_replaced_whole() {
    let folder = folder();
    let path = folder.path().join("file");
    for contents in ["first", "second, which is longer", "", "3"] {
        whole_file::write(&path, contents.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), contents);
        assert_eq!(names(folder.path()), ["file"]);
    }
    whole_file::write(&folder.path().join("none/file"), b"x").unwrap_err();
    whole_file::write(folder.path(), b"x").unwrap_err();
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
#[cfg(unix)]
fn files_keep_what_others_may_do_with_them() {
    use std::os::unix::fs::PermissionsExt;
    let folder = folder();
    let (ours, plain) = (folder.path().join("ours"), folder.path().join("plain"));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    // A new file is like any other.
    whole_file::write(&ours, b"1").unwrap();
    fs::write(&plain, b"1").unwrap();
    assert_eq!(mode(&ours), mode(&plain));
    // An earlier one stays as it was; one that must not be written is not replaced.
    fs::set_permissions(&ours, PermissionsExt::from_mode(0o666)).unwrap();
    whole_file::write(&ours, b"2").unwrap();
    assert_eq!((mode(&ours), fs::read(&ours).unwrap()), (0o666, b"2".to_vec()));
    fs::set_permissions(&ours, PermissionsExt::from_mode(0o444)).unwrap();
    let error = whole_file::write(&ours, b"3").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    assert_eq!((mode(&ours), fs::read(&ours).unwrap()), (0o444, b"2".to_vec()));
}

#[test]
#[cfg(unix)]
fn links_are_followed() {
    use std::os::unix::fs::symlink;
    let (folder, other) = (folder(), folder());
    let (target, link) = (other.path().join("target"), folder.path().join("link"));
    fs::write(&target, b"1").unwrap();
    symlink(&target, &link).unwrap();
    whole_file::write(&link, b"2").unwrap();
    assert!(link.is_symlink() && fs::read(&target).unwrap() == b"2");
    assert_eq!((names(folder.path()), names(other.path())), (vec!["link".to_owned()], vec!["target".to_owned()]));
    // To nothing, or in a circle: nothing is written anywhere.
    fs::remove_file(&target).unwrap();
    whole_file::write(&link, b"3").unwrap_err();
    let circle = folder.path().join("circle");
    symlink("circle", &circle).unwrap();
    whole_file::write(&circle, b"3").unwrap_err();
    assert!(link.is_symlink() && circle.is_symlink());
    assert!(names(other.path()).is_empty());
}

#[test]
#[cfg(target_os = "linux")]
fn devices_are_written_to() {
    use std::os::unix::fs::FileTypeExt;
    whole_file::write(Path::new("/dev/null"), b"1").unwrap();
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device(), "the device is not replaced by a file");
    let error = whole_file::write(Path::new("/dev/full"), b"1").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
}
