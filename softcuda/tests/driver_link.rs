//! Linking, libraries and what a failed compilation says.

mod common;

use std::ffi::{CStr, CString, c_void};
use std::ptr::{null, null_mut};

use common::{device, says, status};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUjit_option, CUresult};

const HEAD: &str = ".version 7.0\n.target sm_80\n.address_size 64\n";

/// `out = twice(table[1])`, with both defined elsewhere.
const USER: &str = "
.extern .func (.param .b32 r) twice(.param .b32 x);
.extern .global .u32 table[4];
.global .u32 own = 100;
.visible .entry user(.param .u64 out) {
    .reg .b32 %r<4>; .reg .b64 %d<2>;
    ld.param.u64 %d1, [out];
    ld.global.u32 %r1, [table+4];
    { .param .b32 x; .param .b32 y; st.param.b32 [x], %r1; call (y), twice, (x); ld.param.b32 %r2, [y]; }
    ld.global.u32 %r3, [own]; add.u32 %r2, %r2, %r3;
    st.global.u32 [%d1], %r2; ret;
}";

const MAKER: &str = "
.visible .global .u32 table[4] = {10, 20, 30, 40};
.global .u32 own = 1000;
.visible .func (.param .b32 r) twice(.param .b32 x) {
    .reg .b32 %r<3>;
    ld.param.b32 %r1, [x]; add.u32 %r1, %r1, %r1;
    ld.global.u32 %r2, [own]; add.u32 %r1, %r1, %r2;
    st.param.b32 [r], %r1; ret;
}";

fn text(body: &str) -> CString {
    CString::new(format!("{HEAD}{body}")).unwrap()
}

fn add(link: sys::CUlinkState, body: &str, name: &CStr) -> CUresult {
    let text = text(body);
    let (data, bytes) = (text.as_ptr() as *mut c_void, text.as_bytes_with_nul().len());
    let kind = sys::CUjitInputType::CU_JIT_INPUT_PTX;
    unsafe { sys::cuLinkAddData_v2(link, kind, data, bytes, name.as_ptr(), 0, null_mut(), null_mut()) }
}

/// A buffer for an error log, as options.
struct Log {
    buffer: Vec<u8>,
    keys: [CUjit_option; 2],
    values: [*mut c_void; 2],
}

impl Log {
    fn new(room: usize) -> Box<Log> {
        use CUjit_option::*;
        let mut log = Box::new(Log {
            buffer: vec![0xaa; room],
            keys: [CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES],
            values: [null_mut(), room as *mut c_void],
        });
        log.values[0] = log.buffer.as_mut_ptr().cast();
        log
    }

    fn text(&self) -> String {
        let text = CStr::from_bytes_until_nul(&self.buffer).unwrap().to_string_lossy().into_owned();
        assert_eq!(self.values[1] as usize, text.len());
        text
    }
}

fn run(function: sys::CUfunction) -> u32 {
    let mut got = [0u32];
    unsafe {
        let addr = result::malloc_sync(4).unwrap();
        let mut params = [(&raw const addr) as *mut c_void];
        let launched = sys::cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, null_mut(), params.as_mut_ptr(), null_mut());
        launched.result().unwrap();
        result::memcpy_dtoh_sync(&mut got, addr).unwrap();
        result::free_sync(addr).unwrap();
    }
    got[0]
}

#[test]
fn modules_link() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let mut link = null_mut();
    let (mut image, mut bytes) = (null_mut(), 0);
    let mut module = null_mut();
    let mut function = null_mut();
    unsafe {
        sys::cuLinkCreate_v2(0, null_mut(), null_mut(), &mut link).result().unwrap();
        add(link, USER, c"user.ptx").result().unwrap();
        let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("maker.ptx");
        std::fs::write(&folder, text(MAKER).as_bytes()).unwrap();
        let path = CString::new(folder.to_str().unwrap()).unwrap();
        let kind = sys::CUjitInputType::CU_JIT_INPUT_PTX;
        sys::cuLinkAddFile_v2(link, kind, path.as_ptr(), 0, null_mut(), null_mut()).result().unwrap();
        sys::cuLinkComplete(link, &mut image, &mut bytes).result().unwrap();
        assert_eq!(*image.cast::<u8>().add(bytes - 1), 0, "an image ends in NUL");
        sys::cuModuleLoadData(&mut module, image).result().unwrap();
        sys::cuLinkDestroy(link).result().unwrap();
        assert_eq!(sys::cuLinkDestroy(link), CUresult::CUDA_ERROR_INVALID_HANDLE);
        sys::cuModuleGetFunction(&mut function, module, c"user".as_ptr()).result().unwrap();
    }
    // 2 * 20 + 1000 in the one module, + 100 in the other: each has its own `own`.
    assert_eq!(run(function), 1140);
    unsafe { sys::cuModuleUnload(module) }.result().unwrap();
}

#[test]
fn links_that_fail_say_why() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let mut log = Log::new(1000);
    let mut link = null_mut();
    unsafe {
        sys::cuLinkCreate_v2(2, log.keys.as_mut_ptr(), log.values.as_mut_ptr(), &mut link).result().unwrap();
        add(link, USER, c"user.ptx").result().unwrap();
        let (mut image, mut bytes) = (null_mut(), 0);
        let failed = sys::cuLinkComplete(link, &mut image, &mut bytes);
        assert_eq!(failed, CUresult::CUDA_ERROR_INVALID_PTX);
        says(&log.text(), &["declared in user.ptx, is defined nowhere"]);
        assert_eq!(add(link, ".entry k() { mov.u32 %r1 %r2; }", c"bad.ptx"), CUresult::CUDA_ERROR_INVALID_PTX);
        log.values[1] = 1000 as *mut c_void;
        let kind = sys::CUjitInputType::CU_JIT_INPUT_CUBIN;
        let data = b"\x7fELF" as *const u8 as *mut c_void;
        let failed = sys::cuLinkAddData_v2(link, kind, data, 4, c"a.cubin".as_ptr(), 0, null_mut(), null_mut());
        says(&status(failed).1, &["a.cubin is a cubin; softcuda links PTX"]);
        sys::cuLinkDestroy(link).result().unwrap();
    }
}

#[test]
fn bad_ptx_is_described_in_the_log() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let text = text(".visible .entry k() {\n.reg .b32 %r<2>;\nfrobnicate.u32 %r1, %r1;\nret; }");
    let mut log = Log::new(1000);
    let mut module = null_mut();
    let load = |log: &mut Log, module: &mut sys::CUmodule| unsafe {
        let (keys, values) = (log.keys.as_mut_ptr(), log.values.as_mut_ptr());
        sys::cuModuleLoadDataEx(module, text.as_ptr().cast(), 2, keys, values)
    };
    assert_eq!(load(&mut log, &mut module), CUresult::CUDA_ERROR_INVALID_PTX);
    says(&log.text(), &["line 6", "frobnicate"]);
    // A short buffer holds the beginning.
    let mut short = Log::new(8);
    assert_eq!(load(&mut short, &mut module), CUresult::CUDA_ERROR_INVALID_PTX);
    assert_eq!(short.text(), log.text()[..7]);
    let mut library = null_mut();
    let mut log = Log::new(1000);
    let failed = unsafe {
        let (keys, values) = (log.keys.as_mut_ptr(), log.values.as_mut_ptr());
        sys::cuLibraryLoadData(&mut library, text.as_ptr().cast(), keys, values, 2, null_mut(), null_mut(), 0)
    };
    assert_eq!(failed, CUresult::CUDA_ERROR_INVALID_PTX);
    says(&log.text(), &["frobnicate"]);
}

#[test]
fn libraries_load_without_a_context_and_serve_all() {
    let (_, context, _turn) = device();
    unsafe { sys::cuCtxSetCurrent(null_mut()) }.result().unwrap();
    let body = format!("{MAKER}{}", USER.replace(".extern .func (.param .b32 r) twice(.param .b32 x);", ""));
    let body = body.replace(".extern .global .u32 table[4];", "").replacen(".global .u32 own = 100;", "", 1);
    let text = text(&body);
    let mut library = null_mut();
    let (mut kernel, mut missing) = (null_mut(), null_mut());
    unsafe {
        let image = text.as_ptr().cast();
        let none = null_mut();
        sys::cuLibraryLoadData(&mut library, image, null_mut(), none, 0, null_mut(), none, 0).result().unwrap();
        sys::cuLibraryGetKernel(&mut kernel, library, c"user".as_ptr()).result().unwrap();
        let missed = sys::cuLibraryGetKernel(&mut missing, library, c"loser".as_ptr());
        assert_eq!(missed, CUresult::CUDA_ERROR_NOT_FOUND);
        let mut count = 0;
        sys::cuLibraryGetKernelCount(&mut count, library).result().unwrap();
        assert_eq!(count, 1);
        let mut name = null();
        sys::cuKernelGetName(&mut name, kernel).result().unwrap();
        assert_eq!(CStr::from_ptr(name), c"user");
    }
    // Each context has variables of its own; a kernel is launched as a function is.
    let other = cudarc::driver::CudaContext::new_non_primary(0, 0).unwrap();
    let mut places = Vec::new();
    for context in [&context, &other] {
        context.bind_to_thread().unwrap();
        let (mut addr, mut bytes) = (0, 0);
        unsafe { sys::cuLibraryGetGlobal(&mut addr, &mut bytes, library, c"own".as_ptr()) }.result().unwrap();
        assert_eq!(bytes, 4);
        let value = 7 + places.len() as u32;
        unsafe { result::memcpy_htod_sync(addr, &[value]) }.unwrap();
        places.push(addr);
        assert_eq!(run(kernel.cast()), 40 + 2 * value);
        let mut function = null_mut();
        unsafe { sys::cuKernelGetFunction(&mut function, kernel) }.result().unwrap();
        assert_eq!(run(function), 40 + 2 * value);
    }
    assert_ne!(places[0], places[1]);
    unsafe {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        sys::cuKernelSetAttribute(attribute, 100_000, kernel, 0).result().unwrap();
        let mut value = 0;
        sys::cuKernelGetAttribute(&mut value, attribute, kernel, 0).result().unwrap();
        assert_eq!(value, 100_000);
        sys::cuLibraryUnload(library).result().unwrap();
        assert_ne!(sys::cuLibraryUnload(library), CUresult::CUDA_SUCCESS);
        let mut function = null_mut();
        assert_ne!(sys::cuKernelGetFunction(&mut function, kernel), CUresult::CUDA_SUCCESS);
    }
    context.bind_to_thread().unwrap();
}

/// A kernel that holds 64 loaded values at once.
fn hungry() -> String {
    let loads: String = (0..64).map(|i| format!("ld.global.u32 %r{i}, [%d1+{}];", 4 * i)).collect();
    let sums: String = (0..63).rev().map(|i| format!("mad.lo.u32 %r63, %r63, %r{i}, %r{i};")).collect();
    format!(
        ".const .align 4 .b8 small[6]; .const .u64 wide[3];
        .visible .entry hungry(.param .u64 at) {{ .reg .b32 %r<64>; .reg .b64 %d<2>; ld.param.u64 %d1, [at];
        {loads} {sums} st.global.u32 [%d1], %r63; ret; }}"
    )
}

fn attribute(module: sys::CUmodule, name: &CStr, which: sys::CUfunction_attribute) -> i32 {
    let (mut function, mut value) = (null_mut(), 0);
    unsafe {
        sys::cuModuleGetFunction(&mut function, module, name.as_ptr()).result().unwrap();
        sys::cuFuncGetAttribute(&mut value, which, function).result().unwrap();
    }
    value
}

#[test]
fn a_limit_of_registers_is_kept() {
    use sys::CUfunction_attribute::*;
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let registers = |module| attribute(module, c"hungry", CU_FUNC_ATTRIBUTE_NUM_REGS);
    let free = unsafe { result::module::load_data(text(&hungry()).as_ptr().cast()) }.unwrap();
    assert!(registers(free) > 60, "{}", registers(free));
    // Six bytes, two to align, and twenty-four.
    assert_eq!(attribute(free, c"hungry", CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES), 32);
    let mut keys = [CUjit_option::CU_JIT_MAX_REGISTERS];
    let mut values = [32 as *mut c_void];
    let (mut held, mut link, mut image, mut bytes) = (null_mut(), null_mut(), null_mut(), 0);
    unsafe {
        let image = text(&hungry());
        let loaded =
            sys::cuModuleLoadDataEx(&mut held, image.as_ptr().cast(), 1, keys.as_mut_ptr(), values.as_mut_ptr());
        loaded.result().unwrap();
    }
    assert_eq!(registers(held), 32);
    unsafe {
        sys::cuLinkCreate_v2(1, keys.as_mut_ptr(), values.as_mut_ptr(), &mut link).result().unwrap();
        add(link, &hungry(), c"hungry.ptx").result().unwrap();
        sys::cuLinkComplete(link, &mut image, &mut bytes).result().unwrap();
        sys::cuModuleLoadData(&mut held, image).result().unwrap();
        sys::cuLinkDestroy(link).result().unwrap();
    }
    assert_eq!(registers(held), 32);
    // A kernel's own directive goes before.
    let own = hungry().replace("at) {", "at) .maxnreg 40 {");
    unsafe {
        let image = text(&own);
        let loaded =
            sys::cuModuleLoadDataEx(&mut held, image.as_ptr().cast(), 1, keys.as_mut_ptr(), values.as_mut_ptr());
        loaded.result().unwrap();
    }
    assert_eq!(registers(held), 40);
}

/// Links a caller and a callee, and runs kernel `user`.
fn linked(caller: &str, callee: &str) -> u32 {
    let (mut link, mut image, mut bytes, mut module, mut function) =
        (null_mut(), null_mut(), 0, null_mut(), null_mut());
    unsafe {
        sys::cuLinkCreate_v2(0, null_mut(), null_mut(), &mut link).result().unwrap();
        add(link, caller, c"caller.ptx").result().unwrap();
        add(link, callee, c"callee.ptx").result().unwrap();
        let status = sys::cuLinkComplete(link, &mut image, &mut bytes);
        status.result().unwrap_or_else(|error| panic!("{error:?}"));
        let loaded = sys::cuModuleLoadData(&mut module, image).result();
        loaded.unwrap_or_else(|error| panic!("{error:?}\n{}", CStr::from_ptr(image.cast()).to_string_lossy()));
        sys::cuLinkDestroy(link).result().unwrap();
        sys::cuModuleGetFunction(&mut function, module, c"user".as_ptr()).result().unwrap();
    }
    run(function)
}

#[test]
fn declared_and_defined_returns_need_not_agree() {
    let (_, context, _turn) = device();
    context.bind_to_thread().unwrap();
    let caller = |returns: &str, read: &str| {
        let returned = if returns.is_empty() { String::new() } else { format!("({returns} r)") };
        let (place, result) = if returns.is_empty() { (String::new(), "") } else { (format!("{returns} y;"), "(y), ") };
        let (returned, place) = (returned.replace("[] r", " r[8]"), place.replace("[] y", " y[8]"));
        format!(
            ".extern .func {returned} f(.param .b32 x);
            .visible .entry user(.param .u64 out) {{ .reg .b32 %r<4>; .reg .b64 %d<3>;
            ld.param.u64 %d1, [out]; mov.u32 %r1, 20;
            {{ .param .b32 x; {place} st.param.b32 [x], %r1; call {result} f, (x); {read} }}
            st.global.u32 [%d1], %r1; ret; }}"
        )
    };
    let narrow = ".visible .func (.param .b32 r) f(.param .b32 x) { .reg .b32 %r1; ld.param.b32 %r1, [x];
                  add.u32 %r1, %r1, 1; st.param.b32 [r], %r1; ret; }";
    let wide = ".visible .func (.param .b64 r) f(.param .b32 x) { .reg .b32 %r1; .reg .b64 %d1; ld.param.b32 %r1, [x];
                add.u32 %r1, %r1, 1; cvt.u64.u32 %d1, %r1; st.param.b64 [r], %d1; ret; }";
    for callee in [narrow, wide] {
        assert_eq!(linked(&caller(".param .b32", "ld.param.b32 %r1, [y];"), callee), 21);
        assert_eq!(linked(&caller(".param .b64", "ld.param.b32 %r1, [y];"), callee), 21);
        assert_eq!(linked(&caller(".param .align 8 .b8[]", "ld.param.b32 %r1, [y];"), callee), 21);
        // Who wants no result gets none.
        assert_eq!(linked(&caller("", ""), callee), 20);
    }
    // Arguments of any size get there, and what nobody returned is anything.
    let caller = ".extern .func (.param .b32 r) f(.param .align 4 .b8 x[6], .param .b64 to);
        .visible .entry user(.param .u64 out) { .reg .b32 %r<4>; .reg .b16 %h; .reg .b64 %d<3>;
        ld.param.u64 %d1, [out]; mov.u32 %r1, 20; mov.u16 %h, 3;
        { .param .align 4 .b8 x[6]; .param .b64 to; .param .b32 y; st.param.b32 [x], %r1; st.param.b16 [x+4], %h;
        st.param.b64 [to], %d1; call (y), f, (x, to); } ret; }";
    let nothing =
        ".visible .func f(.param .align 4 .b8 x[6], .param .b64 to) { .reg .b32 %r<3>; .reg .b16 %h; .reg .b64 %d1;
        ld.param.b32 %r1, [x]; ld.param.b16 %h, [x+4]; cvt.u32.u16 %r2, %h; add.u32 %r1, %r1, %r2;
        ld.param.b64 %d1, [to]; st.global.u32 [%d1], %r1; ret; }";
    assert_eq!(linked(caller, nothing), 23);
}
