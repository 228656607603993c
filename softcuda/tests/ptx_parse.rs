//! The PTX front end: real compiler output, every construct of the grammar, and texts that are not PTX.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use softcuda::ptx::ast::{Function, Init, Instruction, Linkage, Module, Operand, Space, Statement, Type, Variable};
use softcuda::ptx::{ParseError, parse};

fn corpus() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/ptx");
    let mut files: Vec<_> = std::fs::read_dir(&root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .map(|entry| entry.unwrap().path().join("kernel.ptx"))
        .filter(|path| path.exists())
        .map(|path| (path.clone(), std::fs::read_to_string(&path).unwrap()))
        .collect();
    files.sort();
    files
}

fn module(body: &str) -> Result<Module, ParseError> {
    parse(&format!(".version 8.0\n.target sm_90a\n.address_size 64\n{body}"))
}

/// The statements of one kernel around `body`, whose first line is line 5 of the text.
fn statements(body: &str) -> Result<Vec<Statement>, ParseError> {
    let module = module(&format!(".entry k(.param .u64 p) {{\n{body}\n}}"))?;
    Ok(module.functions.into_iter().next().unwrap().body.unwrap())
}

fn instruction(text: &str) -> Instruction {
    match statements(text).unwrap_or_else(|e| panic!("{text}: {e}")).pop() {
        Some(Statement::Instruction(instruction)) => instruction,
        other => panic!("{text}: {other:?}"),
    }
}

fn operand(text: &str) -> Operand {
    instruction(&format!("op {text};")).operands.swap_remove(0)
}

fn variable(text: &str) -> Variable {
    module(text).unwrap_or_else(|e| panic!("{text}: {e}")).variables.swap_remove(0)
}

fn name(text: &str) -> Operand {
    Operand::Name(text.into())
}

/// Calls `visit` with every instruction, scopes included.
fn each<'a>(statements: &'a [Statement], visit: &mut impl FnMut(&'a Instruction)) {
    for statement in statements {
        match statement {
            Statement::Instruction(instruction) => visit(instruction),
            Statement::Block(inner) => each(inner, visit),
            _ => {}
        }
    }
}

#[test]
fn every_compiled_kernel_parses() {
    let files = corpus();
    assert_eq!(files.len(), 33, "the corpus of tests/data/ptx has changed");
    for (path, text) in files {
        let at = path.display();
        let module = parse(&text).unwrap_or_else(|e| panic!("{at}: {e}"));
        let target = path.parent().and_then(|p| p.extension()).unwrap().to_str().unwrap();
        assert_eq!(module.target, target, "{at}");
        assert!(text.contains(&format!("\n.version {}.{}\n", module.version.0, module.version.1)), "{at}");
        let mut found = Vec::new();
        for function in &module.functions {
            each(function.body.as_deref().unwrap_or_default(), &mut |i| {
                let line = &module.lines[i.line as usize - 1];
                let full = [std::slice::from_ref(&i.opcode), i.modifiers.as_slice()].concat().join(".");
                assert!(line.contains(&full), "{at}:{}: {line}", i.line);
                found.push(full);
            });
        }
        // One `;` ends each instruction: none in the text may be missing from the tree.
        let code: String = text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n");
        let (body, _) = code.split_once("\n{").and_then(|(_, body)| body.rsplit_once("\n}")).expect("a body");
        let declarations = [".reg ", ".pragma "];
        let expected =
            body.split_inclusive(';').filter(|s| s.ends_with(';') && !declarations.iter().any(|d| s.contains(d)));
        assert_eq!(found.len(), expected.count(), "{at}");
    }
}

#[test]
fn header_and_directives() {
    let text = "// c\n.version 7.8 /* two\nlines */ .target sm_80, debug\n.address_size 64\n.file 1 \"a b.cu\", 12, 13\n\
        .section .debug_str { .b8 1,2\n {} $L:\n .b64 .debug_abbrev }\n\
        .visible .entry k() .maxntid 64, 2 .minnctapersm 3 .maxnreg 40 .pragma \"nounroll\"; { ret; }\n\
        .entry c .reqntid 32 .reqnctapercluster 2, 1, 1 .explicitcluster { exit; }\n\
        .extern .func (.param .b32 r) f (.param .b64 a, .param .align 16 .b8 s[12]) .noreturn;\n\
        .alias g, f;";
    let module = parse(text).unwrap();
    assert_eq!((module.version, module.target.as_str(), module.address_size), ((7, 8), "sm_80", 64));
    assert_eq!(module.target_options, ["debug"]);
    assert_eq!(module.lines.len(), text.lines().count());
    let directives: [&[(&str, &[u64])]; 3] = [
        &[("maxntid", &[64, 2]), ("minnctapersm", &[3]), ("maxnreg", &[40])],
        &[("reqntid", &[32]), ("reqnctapercluster", &[2, 1, 1]), ("explicitcluster", &[])],
        &[("noreturn", &[])],
    ];
    for (function, wanted) in module.functions.iter().zip(directives) {
        let found: Vec<_> = function.directives.iter().map(|(word, n)| (word.as_str(), n.as_slice())).collect();
        assert_eq!(found, wanted, "{}", function.name);
    }
    let f: &Function = &module.functions[2];
    assert!(!f.is_entry && f.body.is_none() && f.linkage == Linkage::Extern);
    assert_eq!((f.returns.len(), f.params[1].dims.as_slice(), f.params[1].align), (1, &[12][..], Some(16)));
    assert_eq!(module.aliases, [("g".into(), "f".into())]);
}

#[test]
fn variables() {
    let v = variable(".extern .shared .align 16 .b8 smem[];");
    assert_eq!((v.space, v.ty, v.align, v.dims.as_slice()), (Space::Shared, Type::B8, Some(16), &[0][..]));
    assert_eq!((v.bytes(), v.linkage), (Some(0), Linkage::Extern));
    let v = variable(".visible .const .v2 .f32 c[2][3] = {{{0f3F800000, 2.0}, {-1.0, 0.5}}};");
    assert_eq!((v.vector, v.bytes()), (2, Some(48)));
    // Inner lists pad to their size; nothing follows the last listed row.
    let double = |value: f64| Init::F64(value.to_bits());
    let head = [Init::F32(0x3f80_0000), double(2.0), double(-1.0), double(0.5), Init::Int(0), Init::Int(0)];
    assert_eq!(v.init, head);
    let v = variable(".global .u64 t[] = {a, generic(b)+8, c+-4, 0xFFFFFFFFFFFFFFFF};");
    let symbol = |name: &str, offset, generic| Init::Symbol { name: name.into(), offset, generic };
    assert_eq!(v.init[..3], [symbol("a", 0, false), symbol("b", 8, true), symbol("c", -4, false)]);
    assert_eq!((v.init[3].clone(), v.dims.as_slice()), (Init::Int(u64::MAX.into()), &[4][..]));

    let body = statements(".reg .pred %p<3>, q; .reg .v2 .f32 v; .local .align 8 .b8 d[4][2]; .param .b32 x;").unwrap();
    let found: Vec<_> = body
        .iter()
        .map(|statement| match statement {
            Statement::Variable(v) => (v.name.as_str(), v.space, v.ty, v.count, v.bytes()),
            other => panic!("{other:?}"),
        })
        .collect();
    let wanted = [
        ("%p", Space::Reg, Type::Pred, Some(3), Some(1)),
        ("q", Space::Reg, Type::Pred, None, Some(1)),
        ("v", Space::Reg, Type::F32, None, Some(8)),
        ("d", Space::Local, Type::B8, None, Some(8)),
        ("x", Space::Param, Type::B32, None, Some(4)),
    ];
    assert_eq!(found, wanted);

    let k = module(".entry k(.param .u64 .ptr .global .align 1 a, .param .u64 .ptr b, .param .align 64 .b8 m[128]) {}");
    let params = k.unwrap().functions.swap_remove(0).params;
    assert_eq!(params[0].ptr, Some((Some(Space::Global), 1)));
    assert_eq!(params[1].ptr, Some((None, 4)));
    assert_eq!((params[2].bytes(), params[2].alignment()), (Some(128), 64));
}

#[test]
fn instructions() {
    let i = instruction("@!%p1 ld.global.L2::128B.v4.u32 {%r1, _, %r2, %r3}, [%rd1+-16];");
    assert!(i.guard.as_ref().is_some_and(|g| g.negated && g.name == "%p1"));
    assert_eq!((i.opcode.as_str(), i.line), ("ld", 5));
    assert_eq!(i.modifiers, ["global", "L2::128B", "v4", "u32"]);
    assert_eq!(i.operands[0], Operand::Vector(vec![name("%r1"), Operand::Sink, name("%r2"), name("%r3")]));
    assert_eq!(i.operands[1], Operand::Address { base: Some("%rd1".into()), offset: -16 });

    let i = instruction(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint \
         [%r1], [%rd1, {%r2, 0}], [%r3 + 8], %rd2;",
    );
    assert_eq!(i.modifiers[3..6], ["2d", "shared::cluster", "global"]);
    assert_eq!(i.modifiers[6], "mbarrier::complete_tx::bytes");
    let base = Box::new(Operand::Address { base: Some("%rd1".into()), offset: 0 });
    let coordinates = vec![name("%r2"), Operand::Int(0)];
    assert_eq!(i.operands[1], Operand::TensorAddress { base, coordinates, rest: vec![] });

    let i = instruction("call.uni (r1, _), f, (a, 3), proto;");
    assert_eq!(i.operands[0], Operand::List(vec![name("r1"), Operand::Sink]));
    assert_eq!(i.operands[1..3], [name("f"), Operand::List(vec![name("a"), Operand::Int(3)])]);
    assert_eq!(instruction("call f, ();").operands[1], Operand::List(vec![]));
    assert_eq!(instruction("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {a},{b},{c},{d};").operands.len(), 4);
    assert_eq!(instruction("ret;").operands, []);
}

#[test]
fn operands() {
    let address = |base: Option<&str>, offset| Operand::Address { base: base.map(Into::into), offset };
    let symbol = |name: &str, offset| Operand::SymbolOffset { name: name.into(), offset };
    let cases = [
        ("%tid.x", name("%tid.x")),
        ("%cluster_ctaid.z", name("%cluster_ctaid.z")),
        ("%v.w", Operand::Element { name: "%v".into(), index: 3 }),
        ("%v.g", Operand::Element { name: "%v".into(), index: 1 }),
        ("!%p", Operand::NotName("%p".into())),
        ("%r20|%p11", Operand::Pair(Box::new(name("%r20")), Box::new(name("%p11")))),
        ("_|%p", Operand::Pair(Box::new(Operand::Sink), Box::new(name("%p")))),
        ("0x1fU", Operand::Int(31)),
        ("0xFFFFFFFF", Operand::Int(0xffff_ffff)),
        ("017", Operand::Int(15)),
        ("0b101U", Operand::Int(5)),
        ("-9223372036854775807 - 1", Operand::Int(i64::MIN.into())),
        ("0xFFFFFFFFFFFFFFFF", Operand::Int(u64::MAX.into())),
        ("0f3F800000", Operand::F32(0x3f80_0000)),
        ("-0F3f800000", Operand::F32(0xbf80_0000)),
        ("0d3FF0000000000000", Operand::F64(1f64.to_bits())),
        ("1.5e-3", Operand::F64(1.5e-3f64.to_bits())),
        ("-.5", Operand::F64((-0.5f64).to_bits())),
        ("(1 + 2) * 3 - 8 / 3 % 2", Operand::Int(9)),
        ("1 << 4 | 3 & ~1", Operand::Int(18)),
        ("-8 >> 1", Operand::Int(-4)),
        ("-8 >> 1 == -4 ? WARP_SZ : 0", Operand::Int(32)),
        ("(.u64)-1 > 0 && !0", Operand::Int(1)),
        ("-1 < 0U", Operand::Int(0)),
        ("1.0 / 4.0", Operand::F64(0.25f64.to_bits())),
        ("[ %rd2 + 0 ]", address(Some("%rd2"), 0)),
        ("[smem + -4 + 8]", address(Some("smem"), 4)),
        ("[%r1+4*2]", address(Some("%r1"), 8)),
        ("[0x10]", address(None, 16)),
        ("smem+12", symbol("smem", 12)),
        ("{%f1, 0f00000000}", Operand::Vector(vec![name("%f1"), Operand::F32(0)])),
    ];
    for (text, wanted) in cases {
        assert_eq!(operand(text), wanted, "{text}");
    }
    let body = statements(".local .v2 .f32 a[4]; ld.local.f32 %f1, a[3]; ld.local.f32 %f1, [a[2]];").unwrap();
    let mut operands = Vec::new();
    each(&body, &mut |i| operands.push(i.operands[1].clone()));
    assert_eq!(operands, [symbol("a", 24), address(Some("a"), 16)]);
}

#[test]
fn scopes_labels_and_tables() {
    let body = statements(
        "$L1: .loc 1 2 3, function_name $x, inlined_at 1 2 3\n{ .reg .b32 t; mov.b32 t, 0; { ret; } }\n\
         ts: .branchtargets $L1, $L2; \n pt: .callprototype (.param .b32 _) _ (.param .b64 _) .noreturn;\n\
         .pragma \"nounroll\"; $L2: bra.uni $L1;",
    )
    .unwrap();
    assert!(matches!(&body[0], Statement::Label { name, line: 5 } if name == "$L1"));
    assert!(matches!(&body[1], Statement::Block(inner) if matches!(inner[2], Statement::Block(_))));
    assert!(matches!(&body[2], Statement::Targets { name, targets, .. } if name == "ts" && targets.len() == 2));
    assert!(
        matches!(&body[3], Statement::Prototype { returns, params, .. } if returns.len() == 1 && params.len() == 1)
    );
    assert!(matches!(&body[5], Statement::Instruction(i) if i.operands == [name("$L1")]));
}

#[test]
fn errors_say_where_and_what() {
    let cases = [
        ("mov.u32 %r1 %r2;", "line 5, column 13: expected `,` or `;`, found `%r2`"),
        ("\n\nld.u32 %r1, [%r2;", "line 7, column 17: expected `,` or `]`, found `;`"),
        ("mov.u32 %r1, 0xZZ;", "line 5, column 14: `0xZZ` is not a number"),
        ("mov.f32 %f1, 0f3F8;", "line 5, column 14: `0f3F8` is not a number"),
        ("mov.u32 %r1, 1/0;", "line 5, column 17: division by zero in a constant expression"),
        ("mov.u32 %r1, é;", "line 5, column 14: unexpected character 'é'"),
        (".reg .foo %r1;", "line 5, column 11: `.foo` is not expected in a declaration"),
        (".reg .align 3 .b32 %r1;", "line 5, column 13: alignment 3 is not a power of two"),
        ("vadd.u32 %r1.b0, %r2;", "line 5, column 13: `.b0` is not a component of a vector"),
        ("/* open", "line 5, column 1: comment `/*` has no end"),
        (".local .b8 a[281474976710656][65536];", "line 5, column 37: the size of `a` overflows"),
    ];
    for (text, wanted) in cases {
        assert_eq!(statements(text).unwrap_err().to_string(), wanted, "{text}");
    }
    let header = ".version 8.0 .target sm_80";
    let cases = [
        ("", "line 1, column 1: expected `.version`, found the end of the text"),
        (".version 8.0\n.address_size 64", "line 2, column 1: expected `.target`, found `.address_size`"),
    ];
    for (text, wanted) in cases {
        assert_eq!(parse(text).unwrap_err().to_string(), wanted, "{text}");
    }
    let cases = [
        (".address_size 32", "column 15: only `.address_size 64` is supported"),
        (".entry k( { }", "column 11: expected a state space, found `{`"),
        (".global .u32 a[2] = {1, 2, 3};", "column 28: more initial values than elements"),
        (".global .u8 a[1] = {0xFF(b)};", "column 25: masked address initialisers are not supported"),
        (".entry k() .fast { }", "column 12: unknown directive `.fast`"),
        (".entry k() { ret;", "column 18: expected a statement or `}`, found the end of the text"),
        (".tex .u32 t;", "column 1: `.tex` variables at module scope are not supported"),
    ];
    for (text, wanted) in cases {
        let error = parse(&format!("{header}\n{text}")).unwrap_err();
        assert_eq!(error.to_string(), format!("line 2, {wanted}"), "{text}");
    }
}

/// Module-scope texts and whether they are PTX. What `ptxas` 13.5 says of each is checked where there is one.
const AGREED: [(&str, bool); 34] = [
    (".global .f32 a[4] = {0f3F800000, 2.5};", true),
    (".global .f32 a[2] = {1, -3};", false),
    (".const .v2 .f32 c[2][3] = {{{0f3F800000, 2.0}, {1.0, -1.0}}};", true),
    (".global .v2 .u16 v[2] = {{1, 2}, {3}};", false),
    (".global .v2 .u16 v = {1, 2};", true),
    (".global .b8 g[3] = {1, 255, -1};", true),
    (".global .b8 g[3]; .global .u64 p[2] = {g+2, generic(g)+1};", true),
    (".global .b8 g[3]; .global .u64 p = g-1;", false),
    (".global .u8 b[] = {1, 2, 3};", true),
    (".global .u32 x[2] = {1, 2, 3};", false),
    (".global .u32 m[2][2] = {{1}, {3, 4}};", true),
    (".global .u32 m[2][2] = {1, 2, 3, 4};", false),
    (".shared .b8 s[8] = {1};", false),
    (".global .align 3 .u32 x;", false),
    (".weak .global .u32 m; .common .global .u32 n;", true),
    (".entry k() { .reg .b32 r; mov.u32 r, 0x1fU; mov.b32 r, 017; mov.b32 r, 0b101; mov.b32 r, 0X1F; ret; }", true),
    (".entry k() { .reg .b32 r; mov.u32 r, 1u; ret; }", false),
    (".entry k() { .reg .b32 r; mov.u32 r, 09; ret; }", false),
    (".entry k() { .reg .b32 r; mov.b32 r, WARP_SZ + 1; mov.b32 r, (1+2)*3; mov.b32 r, 1 ? 2 : 3; ret; }", true),
    (".entry k() { .reg .f32 f; mov.f32 f, .5; mov.f32 f, 1e3; mov.f32 f, 1.5e-3; mov.f32 f, 1.; ret; }", true),
    (".entry k() { .reg .f32 f; mov.f32 f, 1.0/4.0; ret; }", true),
    (".entry k() { .local .v2 .f32 a[4]; .reg .v2 .f32 v; ld.local.v2.f32 v, a[3]; mov.f32 v.x, v.y; ret; }", true),
    (".entry k() { .reg .b32 r; mov .u32 r, 1; ret; }", true),
    (".entry k() { .reg .b32 r, q; mov.u32 q, 0; ld.shared.u32 r, [q + -4]; ld.shared.u32 r, [q+4*2]; ret; }", true),
    (".entry k() { .reg .b32 r, q; mov.u32 q, 0; ld.shared.u32 r, [q-4]; ret; }", false),
    (".entry k() { .shared .b8 s[8]; .reg .b32 r; mov.u32 r, s+4; ret; }", true),
    (".entry k() { .shared .b8 s[8]; .reg .b32 r; mov.u32 r, s-4; ret; }", false),
    (".entry k .maxntid 32 .pragma \"nounroll\"; { .pragma \"nounroll\"; ret; }", true),
    (".entry k() { ret; };", false),
    (".entry k() { ret;; }", false),
    (".entry k() { foo: bar: ret; }", true),
    (".entry k() { .reg .b32 f; .reg .pred p; setp.eq.u32 p|_, f, 1; @ !p ret; ret; }", true),
    (".entry k() { .reg .b32 a<04>; mov.u32 a3, 1; ret; }", true),
    (".entry k() { .reg .b32 f; mov.b32 f, (.u64)3; ret; }", true),
];

#[test]
fn agrees_with_ptxas() {
    let ptxas = std::env::var_os("PTXAS").filter(|path| !path.is_empty() && path != "none");
    if ptxas.is_none() {
        eprintln!("PTXAS is not set: checked against what ptxas 13.5 said when this was written");
    }
    let folder = std::env::temp_dir().join(format!("softcuda-ptx-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (text, wanted) in AGREED {
        assert_eq!(module(text).is_ok(), wanted, "{text}: {:?}", module(text).err());
        if let Some(ptxas) = &ptxas {
            let file = folder.join("text.ptx");
            std::fs::write(&file, format!(".version 8.0\n.target sm_80\n.address_size 64\n{text}\n")).unwrap();
            let mut command = std::process::Command::new(ptxas);
            let run = command.args(["-arch=sm_80", "-o"]).arg(folder.join("text.cubin")).arg(&file).output().unwrap();
            assert_eq!(run.status.success(), wanted, "{text}: {}", String::from_utf8_lossy(&run.stderr));
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn deep_nesting_is_an_error_rather_than_a_stack_overflow() {
    for (start, repeated) in [("", "{"), ("op ", "("), ("op ", "-"), ("op ", "{"), ("op ", "[a,"), ("op ", "1?")] {
        let text = format!("{start}{}", repeated.repeat(50_000));
        let error = statements(&text).unwrap_err();
        assert!(error.message.contains("nested deeper"), "{repeated}: {error}");
    }
    let nested = format!(".global .u8 a[2][2] = {}1{};", "{".repeat(50_000), "}".repeat(50_000));
    assert!(module(&nested).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Damage to real PTX: cut anywhere, with bytes replaced by stray marks.
    #[test]
    fn damaged_text_never_panics(
        file in 0usize..33,
        start in 0.0..1.0f64,
        edits in prop::collection::vec((0.0..1.0f64, 0usize..6, "[-+{}()\\[\\];:,.@!%<>=\"/*x0-9é\n]{0,3}"), 1..8),
    ) {
        let (path, text) = corpus().swap_remove(file);
        // The header stays, so that the damage reaches the bodies; a window of the text keeps each case quick.
        let header = text.find(".address_size 64").unwrap_or(0) + 16;
        let from = header + ((text.len() - header) as f64 * start) as usize;
        let mut damaged = if edits.len() % 2 == 0 {
            let end = (from + 4000).min(text.len());
            format!("{}\n.entry k() {{ {}", &text[..header], text.get(from..end).unwrap_or(""))
        } else {
            text.get(..from).unwrap_or(&text).to_owned()
        };
        for (place, len, with) in edits {
            let mut at = (damaged.len() as f64 * place) as usize;
            let mut end = (at + len).min(damaged.len());
            while !damaged.is_char_boundary(at) { at -= 1; }
            while !damaged.is_char_boundary(end) { end += 1; }
            damaged.replace_range(at..end, &with);
        }
        if let Err(error) = parse(&damaged) {
            let lines = damaged.lines().count() as u32;
            prop_assert!((1..=lines + 1).contains(&error.line), "{}: {error}", path.display());
            prop_assert!(!error.message.is_empty());
        }
    }

    #[test]
    fn any_text_never_panics(text in "(\\.version 8\\.0 \\.target sm_80 )?[ -~\n]{0,200}") {
        let _ = parse(&text);
    }
}
