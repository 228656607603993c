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
    if cc(&["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", stub]).is_none() {
        return;
    }
    cc(&["-DLINKED", &client(), stub, "-o", program.to_str().unwrap()]).unwrap();
    let (out, _) = ends(&run(&folder, &[], &program, &[]), 0);
    assert_eq!(out, "saxpy on softcuda H100 (software device)\n");
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
