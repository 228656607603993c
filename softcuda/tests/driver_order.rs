//! The race checker across streams: launches, copies, sets and releases of memory that nothing orders.

mod common;

use std::sync::Arc;

use common::device;
use cudarc::driver::{CudaContext, CudaStream, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;

/// `to[i] = from[i]`, and `to[i] = 5`.
const PTX: &str = ".version 7.0\n.target sm_80\n.address_size 64
.visible .entry copy(.param .u64 to, .param .u64 from) {
    .reg .u64 %to, %from, %at; .reg .u32 %i, %b, %v;
    ld.param.u64 %to, [to]; ld.param.u64 %from, [from];
    mov.u32 %i, %tid.x; mov.u32 %b, %ctaid.x; mad.lo.u32 %i, %b, 64, %i; mul.wide.u32 %at, %i, 4;
    add.u64 %from, %from, %at; add.u64 %to, %to, %at;
    ld.global.u32 %v, [%from];
    st.global.u32 [%to], %v;
    ret;
}
.visible .entry fill(.param .u64 to) {
    .reg .u64 %to, %at; .reg .u32 %i, %b;
    ld.param.u64 %to, [to];
    mov.u32 %i, %tid.x; mov.u32 %b, %ctaid.x; mad.lo.u32 %i, %b, 64, %i; mul.wide.u32 %at, %i, 4;
    add.u64 %to, %to, %at;
    st.global.u32 [%to], 5;
    ret;
}";

/// Words of a buffer, in four blocks.
const WORDS: usize = 256;

struct Streams {
    context: Arc<CudaContext>,
    /// Two that read, and one that overwrites or frees.
    streams: [Arc<CudaStream>; 3],
    /// What is read, and where the two copy it.
    buffers: [u64; 3],
}

impl Streams {
    fn launch(&self, name: &str, stream: usize, arguments: &[u64]) {
        let module = self.context.load_module(Ptx::from_src(PTX)).unwrap();
        let kernel = module.load_function(name).unwrap();
        let config = LaunchConfig { grid_dim: (4, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
        let mut launch = self.streams[stream].launch_builder(&kernel);
        arguments.iter().for_each(|argument| {
            launch.arg(argument);
        });
        // SAFETY: 256 threads touch 256 words of each buffer.
        unsafe { launch.launch(config) }.unwrap();
        std::mem::forget(module);
    }

    fn wait(&self, waits: usize, for_stream: usize) {
        let event = self.streams[for_stream].record_event(None).unwrap();
        self.streams[waits].wait(&event).unwrap();
    }
}

fn concurrent() -> bool {
    std::env::var("SOFTCUDA_STREAMS").is_ok_and(|mode| mode == "concurrent")
}

/// What the race checker finds in `work`, which gets two streams that read a buffer.
fn findings(work: impl FnOnce(&Streams)) -> Vec<String> {
    let (installed, _, _turn) = device();
    assert!(installed.control().set_checks("race"));
    let context = CudaContext::new_non_primary(0, 0).unwrap();
    // SAFETY: order is what these tests are about.
    unsafe { context.disable_event_tracking() };
    let streams = [(); 3].map(|()| context.new_stream().unwrap());
    let buffers = [(); 3].map(|()| unsafe { result::malloc_async(streams[0].cu_stream(), 4 * WORDS) }.unwrap());
    unsafe { result::memset_d8_async(buffers[0], 1, 4 * WORDS, streams[0].cu_stream()) }.unwrap();
    context.synchronize().unwrap();
    let all = Streams { context, streams, buffers };
    work(&all);
    let _ = all.context.synchronize();
    let found = installed.control().findings();
    assert!(installed.control().set_checks("none"));
    found
}

/// Both streams read, the third waits for some of them, and then does something to the buffer.
fn after_two_readers(waits_for: &[usize], then: Overwrite) -> Vec<String> {
    findings(|all| {
        let [from, a, b] = all.buffers;
        all.launch("copy", 0, &[a, from]);
        all.launch("copy", 1, &[b, from]);
        waits_for.iter().for_each(|&stream| all.wait(2, stream));
        // It comes later in time, though nothing makes it: else a release would be met as an illegal address.
        if concurrent() {
            std::thread::sleep(std::time::Duration::from_millis(60));
        }
        then(all);
    })
}

/// Something that the third stream does to the buffer.
type Overwrite = fn(&Streams);

const OVERWRITES: [(&str, Overwrite); 4] = [
    ("a launch", |all| all.launch("fill", 2, &[all.buffers[0]])),
    ("a set", |all| unsafe {
        result::memset_d8_async(all.buffers[0], 3, 4 * WORDS, all.streams[2].cu_stream()).unwrap();
    }),
    ("a copy", |all| unsafe {
        result::memcpy_htod_async(all.buffers[0] + 16, &[9u32; 8], all.streams[2].cu_stream()).unwrap();
    }),
    ("a release", |all| unsafe { result::free_async(all.buffers[0], all.streams[2].cu_stream()).unwrap() }),
];

#[test]
fn whoever_overwrites_or_frees_waits_for_every_reader() {
    for (what, then) in OVERWRITES {
        assert_eq!(after_two_readers(&[0, 1], then), Vec::<String>::new(), "{what}");
    }
}

#[test]
fn whoever_overwrites_or_frees_without_waiting_races() {
    for (what, then) in OVERWRITES {
        for waits_for in [&[][..], &[0], &[1]] {
            let found = after_two_readers(waits_for, then);
            assert!(!found.is_empty(), "{what}, having waited for {waits_for:?}");
            let all = found.iter().all(|text| text.contains("which no stream and no event orders before"));
            assert!(all && found[0].contains("`ld.global.u32 %v, [%from];`"), "{what}: {found:?}");
        }
    }
    let found = after_two_readers(&[1], OVERWRITES[3].1);
    assert!(found[0].starts_with("race: release of 1024 bytes of global memory at 0x"), "{found:?}");
    assert!(found[0].contains("is not ordered after the read by a launch") && found[0].contains("kernel `copy`"));
    let found = after_two_readers(&[1], OVERWRITES[2].1);
    assert!(found[0].starts_with("race: copy to 32 bytes of global memory at 0x"), "{found:?}");
}

#[test]
fn copies_and_launches_that_nothing_orders_race_either_way() {
    let [set, copy, launch]: [fn(&Streams, usize); 3] = [
        |all, stream| unsafe {
            result::memset_d8_async(all.buffers[0], 3, 4 * WORDS, all.streams[stream].cu_stream()).unwrap();
        },
        |all, stream| unsafe {
            let [from, to, _] = all.buffers;
            result::memcpy_dtod_async(to, from, 4 * WORDS, all.streams[stream].cu_stream()).unwrap();
        },
        |all, stream| all.launch("copy", stream, &[all.buffers[2], all.buffers[0]]),
    ];
    for (what, first, second) in [
        ("a copy from what is being set", set, copy),
        ("a set of what is being copied", copy, set),
        ("a launch on what is being set", set, launch),
        ("two sets", set, set),
    ] {
        let found = findings(|all| {
            first(all, 0);
            second(all, 1);
        });
        assert_eq!(found.len(), 1, "{what}: {found:?}");
        let ordered = findings(|all| {
            first(all, 0);
            all.wait(1, 0);
            second(all, 1);
        });
        assert_eq!(ordered, Vec::<String>::new(), "{what}");
    }
    // Two that only read do no harm.
    let found = findings(|all| {
        copy(all, 0);
        launch(all, 1);
    });
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn what_the_host_has_waited_for_comes_before() {
    let found = findings(|all| {
        let [from, a, _] = all.buffers;
        all.launch("copy", 0, &[a, from]);
        // Copies to pageable memory return when they are done.
        let mut got = [0u8; 4];
        unsafe { result::memcpy_dtoh_async(&mut got, a, all.streams[0].cu_stream()) }.unwrap();
        all.launch("fill", 1, &[from]);
        unsafe { result::memcpy_dtoh_async(&mut got, from, all.streams[1].cu_stream()) }.unwrap();
        all.launch("copy", 2, &[a, from]);
        // Waits for the whole context.
        unsafe { result::free_sync(from) }.unwrap();
    });
    assert_eq!(found, Vec::<String>::new());
}

/// All of the above once more, in a process whose streams overlap.
#[test]
fn the_same_with_concurrent_streams() {
    if concurrent() {
        return;
    }
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    let output = again.env("SOFTCUDA_STREAMS", "concurrent").output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{text}");
}
