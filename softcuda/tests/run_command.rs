//! `softcuda run` with programs that know nothing of softcuda.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs};

/// `softcuda run OPTIONS -- PROGRAM ARGUMENTS`, with temporary folders below `scratch`.
fn run(scratch: &Path, options: &[&str], program: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_softcuda"));
    command.arg("run").args(options).arg("--").arg(program).args(arguments).env("TMPDIR", scratch);
    for variable in ["SOFTCUDA_DEVICE", "SOFTCUDA_SEED", "SOFTCUDA_CHECKS", "SOFTCUDA_PROFILE", "SOFTCUDA_DEVICES"] {
        command.env_remove(variable);
    }
    command.output().expect("softcuda starts")
}

#[track_caller]
fn ends(output: &Output, code: i32) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{stdout}{stderr}");
    (stdout, stderr)
}

/// An empty folder of the test's own.
fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("run_{name}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a scratch folder");
    folder
}

/// Compiles with the system's C compiler; `None`, said so, where there is none.
fn cc(arguments: &[&str]) -> Option<()> {
    match Command::new("cc").args(arguments).output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(())
        }
        Err(error) => {
            eprintln!("skipped: cc: {error}");
            None
        }
    }
}

fn client() -> String {
    format!("{}/tests/clients/saxpy.c", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_c_program_that_loads_the_driver() {
    let folder = scratch("c");
    let program = folder.join("saxpy");
    if cc(&[&client(), "-o", program.to_str().unwrap(), "-ldl"]).is_none() {
        return;
    }
    let temporary = folder.join("tmp");
    fs::create_dir(&temporary).unwrap();
    let (out, _) = ends(&run(&temporary, &[], &program, &[]), 0);
    assert_eq!(out, "saxpy on softcuda H100 (software device)\n");
    let (out, _) = ends(&run(&temporary, &["--device", "a100", "--seed", "5"], &program, &["7"]), 7);
    assert_eq!(out, "saxpy on softcuda A100 (software device)\n");
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "private folders remain");
}

#[test]
fn a_c_program_linked_with_the_driver() {
    let folder = scratch("linked");
    let (program, stub) = (folder.join("saxpy"), folder.join("libcuda.so"));
    // As CUDA's stub library: whoever links with it asks the loader for `libcuda.so.1`.
    let source = folder.join("stub.c");
    let text = fs::read_to_string(client()).unwrap();
    let names = text.split("API(").skip(3).filter_map(|rest| rest.split_once(',')).map(|(name, _)| name);
    let names = names.filter(|name| name.starts_with("cu")).collect::<Vec<_>>();
    assert_eq!(names.len(), 12);
    fs::write(&source, names.iter().map(|name| format!("int {name}() {{ return 34; }}\n")).collect::<String>())
        .unwrap();
    let (source, stub) = (source.to_str().unwrap(), stub.to_str().unwrap());
    for name in ["libcuda.so.1", "libcuda.so"] {
        if cc(&["-shared", "-fPIC", &format!("-Wl,-soname,{name}"), source, "-o", stub]).is_none() {
            return;
        }
        cc(&["-DLINKED", &client(), stub, "-o", program.to_str().unwrap()]).unwrap();
        let (out, _) = ends(&run(&folder, &[], &program, &[]), 0);
        assert_eq!(out, "saxpy on softcuda H100 (software device)\n");
    }
    // Linked with softcuda itself, it asks for the driver by the name that NVIDIA's has, and no other.
    let library = softcuda::library().unwrap();
    cc(&["-DLINKED", &client(), library.to_str().unwrap(), "-o", program.to_str().unwrap()]).unwrap();
    let (out, _) = ends(&run(&folder, &[], &program, &[]), 0);
    assert_eq!(out, "saxpy on softcuda H100 (software device)\n");
    let bytes = fs::read(&program).unwrap();
    let names = |name: &[u8]| bytes.windows(name.len()).any(|window| window == name);
    assert!(names(b"\0libcuda.so.1\0") && !names(b"\0libcuda.so\0"));
}

/// Not a test: a plain cudarc program, which the next test runs in a process of its own.
#[test]
#[ignore = "run by a_cudarc_program"]
fn plain_cudarc_client() {
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let numbers = stream.clone_htod(&[1u32, 2, 3]).unwrap();
    println!("{:?} on {}", stream.clone_dtoh(&numbers).unwrap(), context.name().unwrap());
}

/// Not a test: a program that reads device memory which nobody has written.
#[test]
#[ignore = "run by findings_show_in_the_exit_code"]
fn careless_cudarc_client() {
    use cudarc::driver::{LaunchConfig, PushKernelArg};
    const COPY: &str = ".version 7.0\n.target sm_80\n.address_size 64
        .visible .entry copy(.param .u64 from, .param .u64 to) {
            .reg .b32 %r1; .reg .b64 %d<3>;
            ld.param.u64 %d1, [from]; ld.param.u64 %d2, [to];
            ld.global.u32 %r1, [%d1]; st.global.u32 [%d2], %r1; ret; }";
    let context = cudarc::driver::CudaContext::new(0).unwrap();
    let stream = context.default_stream();
    let module = context.load_module(cudarc::nvrtc::Ptx::from_src(COPY)).unwrap();
    let kernel = module.load_function("copy").unwrap();
    let from = unsafe { stream.alloc::<u32>(1) }.unwrap();
    let mut to = stream.alloc_zeros::<u32>(1).unwrap();
    let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
    unsafe { stream.launch_builder(&kernel).arg(&from).arg(&mut to).launch(config) }.unwrap();
    stream.synchronize().unwrap();
}

#[test]
fn findings_show_in_the_exit_code() {
    let folder = scratch("findings");
    let program = env::current_exe().unwrap();
    let arguments = ["--ignored", "--exact", "careless_cudarc_client"];
    ends(&run(&folder, &[], &program, &arguments), 0);
    let (_, error) = ends(&run(&folder, &["--checks", "init"], &program, &arguments), 97);
    assert!(error.contains("kernel `copy`") && error.contains("ld.global.u32"), "{error}");
    // A correct program has none, whatever is checked.
    let arguments = ["--ignored", "--exact", "plain_cudarc_client"];
    ends(&run(&folder, &["--checks", "memory,init"], &program, &arguments), 0);
}

#[test]
fn findings_that_no_file_takes_show_in_the_exit_code() {
    let folder = scratch("untold");
    let program = env::current_exe().unwrap();
    let careless = |before: &str| {
        let script = format!("{before}; exec \"$0\" --ignored --exact careless_cudarc_client");
        run(&folder, &["--checks", "init"], Path::new("sh"), &["-c", &script, program.to_str().unwrap()])
    };
    // Not even an empty file can be made there.
    let (_, error) = ends(&careless("mkdir $SOFTCUDA_FINDINGS"), 97);
    assert!(error.contains("SOFTCUDA_FINDINGS: 1 findings are not in "), "{error}");
    // The disk is full: /dev/full takes no byte.
    ends(&careless("ln -s /dev/full $SOFTCUDA_FINDINGS"), 97);
    // What cannot even be counted is an error from the start.
    let (out, error) = ends(&careless("rm $SOFTCUDA_TALLY"), 125);
    assert!(error.contains("SOFTCUDA_TALLY must be"), "{out}{error}");
}

/// Not a test: a program that is in a bad way after it has used the device.
#[test]
#[ignore = "run by profiles_that_are_not_written_show_in_the_exit_code"]
fn hindered_cudarc_client() {
    plain_cudarc_client();
    match env::var("HINDRANCE").unwrap().as_str() {
        // SAFETY: ends the process without exit handlers.
        "hurry" => unsafe { libc::_exit(0) },
        "full" => {
            // As a disk that is full: files end after 100 bytes.
            let limit = libc::rlimit { rlim_cur: 100, rlim_max: 100 };
            // SAFETY: plain calls of the system.
            unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
            }
        }
        other => panic!("{other}"),
    }
}

#[test]
fn profiles_that_are_not_written_show_in_the_exit_code() {
    let folder = scratch("profile");
    let program = env::current_exe().unwrap();
    let (file, place) = (folder.join("out.json"), folder.to_str().unwrap());
    let option = format!("--profile={place}/out");
    for hindrance in ["hurry", "full"] {
        fs::write(&file, "an earlier profile").unwrap();
        let script = format!("HINDRANCE={hindrance} exec \"$0\" --ignored --exact hindered_cudarc_client");
        let output = run(&folder, &[&option], Path::new("sh"), &["-c", &script, program.to_str().unwrap()]);
        let (_, error) = ends(&output, 98);
        assert!(error.contains("the program ended without its profile being written"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "an earlier profile");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "parts of files remain");
    }
    let arguments = ["--ignored", "--exact", "plain_cudarc_client"];
    ends(&run(&folder, &[&option], &program, &arguments), 0);
    assert!(fs::read_to_string(&file).unwrap().starts_with('{'));
}

#[test]
fn a_cudarc_program() {
    let folder = scratch("cudarc");
    let program = env::current_exe().unwrap();
    let arguments = ["--ignored", "--exact", "plain_cudarc_client", "--nocapture"];
    let (out, _) = ends(&run(&folder, &["--device=a100"], &program, &arguments), 0);
    assert!(out.contains("[1, 2, 3] on softcuda A100 (software device)"), "{out}");
}

#[test]
fn what_goes_wrong_is_told_apart() {
    let folder = scratch("wrong");
    let (_, error) = ends(&run(&folder, &["--device", "tpu"], Path::new("true"), &[]), 125);
    assert!(error.contains("SOFTCUDA_DEVICE must be") && error.contains("not `tpu`"), "{error}");
    let (_, error) = ends(&run(&folder, &["--seeds", "1"], Path::new("true"), &[]), 125);
    assert!(error.contains("`--seeds` is not an option"), "{error}");
    let (_, error) = ends(&run(&folder, &[], Path::new("/no/such/program"), &[]), 127);
    assert!(error.contains("cannot run `/no/such/program`"), "{error}");
    ends(&run(&folder, &[], Path::new("/dev/null"), &[]), 126);
    ends(&run(&folder, &[], Path::new("sh"), &["-c", "kill -s KILL $$"]), 137);
    // A shell that ends well; the driver wrote findings.
    ends(&run(&folder, &[], Path::new("sh"), &["-c", "echo race >> $SOFTCUDA_FINDINGS"]), 97);
    ends(&run(&folder, &[], Path::new("sh"), &["-c", "echo race >> $SOFTCUDA_FINDINGS; exit 3"]), 3);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "private folders remain");
}

#[test]
fn signals_reach_the_program_and_the_folder_goes() {
    let folder = scratch("signal");
    let mut child = Command::new(env!("CARGO_BIN_EXE_softcuda"));
    let ready = folder.join("ready");
    let script = format!("trap 'exit 9' TERM; : > {}; while :; do sleep 0.05; done", ready.display());
    let mut child = child.args(["run", "--", "sh", "-c", &script]).env("TMPDIR", &folder).spawn().unwrap();
    while !ready.exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // SAFETY: a signal to the child just started.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(9));
    fs::remove_file(ready).unwrap();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "the private folder remains");
}

#[test]
fn a_killed_command_leaves_neither_program_nor_folder() {
    let folder = scratch("killed");
    let mut child = Command::new(env!("CARGO_BIN_EXE_softcuda"));
    let ready = folder.join("ready");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; while :; do sleep 0.05; done", ready.display());
    let mut child = child.args(["run", "--", "sh", "-c", &script]).env("TMPDIR", &folder).spawn().unwrap();
    while !ready.exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let program: i32 = fs::read_to_string(&ready).unwrap().trim().parse().unwrap();
    fs::remove_file(ready).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let left = || {
        // SAFETY: signal 0 only asks whether there is such a process. One that nobody waits for yet has ended too.
        let there = unsafe { libc::kill(program, 0) } == 0;
        let state = fs::read_to_string(format!("/proc/{program}/stat")).unwrap_or_default();
        (there && !state.contains(") Z ")) || fs::read_dir(&folder).unwrap().count() > 0
    };
    let since = std::time::Instant::now();
    while left() {
        assert!(since.elapsed().as_secs() < 20, "the program or its folder remains");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
