//! Tensor copies in tile mode and tensor maps (PTX ISA 5.5, 9.7.9.27.1, 9.7.9.28, 9.7.13.16), against a plain model of them.

use softcuda::exec::FaultKind;
use softcuda::tensormap::{Element, Swizzle, TensorMap};

use crate::device::Buffer;
use crate::hopper::{Hopper, refused};

/// Bytes of shared memory for a tile.
const TILE: u32 = 16384;

/// A map of a dense tensor with rows padded to 16 bytes, in a buffer that holds it and no more.
struct Tensor {
    map: TensorMap,
    data: Buffer,
}

fn tensor(element: Element, dims: &[u64], tile: &[u32], steps: &[u32], swizzle: Swizzle, seed: u8) -> Tensor {
    let size = u64::from(element.bytes());
    let mut strides = [0; 4];
    let mut pitch = (dims[0] * size).next_multiple_of(16);
    for i in 1..dims.len() {
        strides[i - 1] = pitch;
        pitch *= dims[i];
    }
    let bytes: Vec<u8> = (0..pitch).map(|i| ((i * 7 + i / 256 * 31) as u8).wrapping_add(seed) & 0x3f).collect();
    let data = Buffer::new(&bytes);
    let map = TensorMap {
        address: data.address,
        element,
        rank: dims.len(),
        dims: std::array::from_fn(|i| dims.get(i).copied().unwrap_or(0)),
        strides,
        tile: std::array::from_fn(|i| tile.get(i).copied().unwrap_or(0)),
        steps: std::array::from_fn(|i| if i < dims.len() { steps[i] } else { 0 }),
        swizzle,
        fill_nan: false,
        interleave: 0,
        promotion: 0,
    };
    map.check().unwrap();
    Tensor { map, data }
}

impl Tensor {
    /// Calls `f` for every element of the tile at `corner`: its byte offset in the tile, and in the tensor if it is inside.
    fn visit(&self, corner: &[i32], mut f: impl FnMut(usize, Option<usize>)) {
        let m = &self.map;
        let size = m.element.bytes() as usize;
        let extents: Vec<u32> =
            (0..m.rank).map(|i| if i == 0 { m.tile[0] } else { m.tile[i].div_ceil(m.steps[i]) }).collect();
        for n in 0..extents.iter().product::<u32>() {
            let (mut rest, mut inside, mut at) = (n, true, 0i64);
            for i in 0..m.rank {
                let step = if i == 0 { 1 } else { m.steps[i] };
                let c = i64::from(corner[i]) + i64::from(rest % extents[i] * step);
                rest /= extents[i];
                inside &= c >= 0 && c < m.dims[i] as i64;
                at += c * if i == 0 { size as i64 } else { m.strides[i - 1] as i64 };
            }
            let linear = n as usize * size;
            f(swizzled(m.swizzle, linear), inside.then_some(at as usize));
        }
    }

    /// What the tile holds in shared memory, which had `before`.
    fn tile(&self, corner: &[i32], before: &[u8], fill: &[u8]) -> Vec<u8> {
        let data: Vec<u8> = self.data.read();
        let mut tile = before.to_vec();
        let size = self.map.element.bytes() as usize;
        self.visit(corner, |to, from| {
            let value = from.map_or(fill, |from| &data[from..from + size]);
            tile[to..to + size].copy_from_slice(value);
        });
        tile
    }

    fn bytes(&self) -> u64 {
        self.map.tile_bytes()
    }

    fn param(&self) -> (String, Vec<u8>) {
        (".param .align 64 .b8 map[128]".into(), self.map.encode().to_vec())
    }
}

/// The manual's tables: 16-byte chunk `c` of the 128-byte line `l` goes to chunk `c ^ l` within spans of 2, 4 or 8 chunks.
fn swizzled(swizzle: Swizzle, linear: usize) -> usize {
    let (line, chunk, within) = (linear / 128, linear / 16 % 8, linear % 16);
    let chunks = match swizzle {
        Swizzle::None => 1,
        Swizzle::B32 => 2,
        Swizzle::B64 => 4,
        Swizzle::B128 => 8,
    };
    line * 128 + (chunk ^ line % chunks) * 16 + within
}

fn coordinates(n: usize) -> (String, String) {
    let loads: String = (0..n).map(|i| format!("ld.global.s32 %r{}, [%rd11+{}]; ", 10 + i, 4 * i)).collect();
    let names: Vec<_> = (0..n).map(|i| format!("%r{}", 10 + i)).collect();
    (loads, names.join(", "))
}

/// The tile `s`, filled with 0x2a, an object `b`, the map's generic address in `%rd9`, the first further parameter (the tile's
/// image in global memory) in `%rd10`, the coordinates' address in `%rd11`.
fn setup() -> String {
    format!(
        ".shared .align 1024 .b8 s[{TILE}]; .shared .align 8 .b64 b; mov.u32 %r20, b; mov.u32 %r21, s; ld.param.u64 %rd10, [p1];
         ld.param.u64 %rd11, [p2]; mov.b64 %rd9, map; cvta.param.u64 %rd9, %rd9; setp.eq.u32 %p7, %thread, 0;
         mov.u32 %r3, %thread; INIT: mad.lo.u32 %r4, %r3, 4, %r21; st.shared.u32 [%r4], 0x2a2a2a2a; add.u32 %r3, %r3, 64;
         setp.lt.u32 %p, %r3, {}; @%p bra INIT; @%p7 mbarrier.init.shared::cta.b64 [b], 1; fence.proxy.async; bar.sync 0;
         barrier.cluster.arrive; barrier.cluster.wait;\n",
        TILE / 4
    )
}

/// Copies the tile out.
const IMAGE: &str = "mov.u32 %r3, %thread; COPY: mad.lo.u32 %r4, %r3, 4, %r21; ld.shared.u32 %r5, [%r4]; mad.wide.u32 %rd3, %r3, 4, %rd10;
    st.global.u32 [%rd3], %r5; add.u32 %r3, %r3, 64; setp.lt.u32 %p, %r3, 4096; @%p bra COPY;\n";
const WAIT: &str = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p, [b], 0; @!%p bra WAIT;\n";

/// Loads the tile at `corner` under some seeds; the whole of shared memory afterwards.
fn load(t: &Tensor, corner: &[i32], seeds: std::ops::Range<u64>, fill: &[u8]) {
    let (loads, names) = coordinates(corner.len());
    let body = format!(
        "{} @!%p7 bra GO; {loads} mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], {};
         cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%rd9, {{{names}}}], [b]; GO: {WAIT} {IMAGE}",
        setup(),
        t.bytes(),
        corner.len()
    );
    let run = Hopper { extra: vec![t.param()], ..Hopper::row(1, 64, 1) };
    let want = t.tile(corner, &vec![0x2a; TILE as usize], fill);
    for seed in seeds {
        let (image, at) = (Buffer::new(&vec![0u8; TILE as usize]), Buffer::new(corner));
        run.seed(seed).per_thread(&body, &[image.address, at.address]).unwrap_or_else(|f| panic!("{f}"));
        let got: Vec<u8> = image.read();
        if let Some(i) = (0..got.len()).find(|&i| got[i] != want[i]) {
            panic!("{:?} at {corner:?}, seed {seed}: byte {i} is {:#x}, expected {:#x}", t.map, got[i], want[i]);
        }
    }
}

#[test]
fn loads_of_every_rank_and_swizzle() {
    // Corners inside, across every border, outside, and negative.
    let corners: [[i32; 5]; 5] = [[0; 5], [3, 2, 1, 1, 0], [-5, -1, 0, -2, 1], [30, 6, 3, 2, 1], [90, 0, 0, 0, 0]];
    for (element, inner) in [(Element::U8, 32), (Element::BF16, 16), (Element::F32, 8), (Element::U64, 4)] {
        for rank in 1..=5 {
            let dims: Vec<u64> = [37, 7, 4, 3, 2][..rank].to_vec();
            let tile: Vec<u32> = [inner, 5, 3, 2, 2][..rank].to_vec();
            for swizzle in Swizzle::ALL {
                let t = tensor(element, &dims, &tile, &[1; 5], swizzle, 0);
                for corner in &corners {
                    load(&t, &corner[..rank], 0..1, &[0; 8][..element.bytes() as usize]);
                }
            }
        }
    }
}

#[test]
fn whole_swizzle_spans_under_many_seeds() {
    for (swizzle, inner) in [(Swizzle::B32, 16), (Swizzle::B64, 32), (Swizzle::B128, 64), (Swizzle::None, 64)] {
        let t = tensor(Element::F16, &[100, 40], &[inner, 32], &[1, 1], swizzle, 3);
        load(&t, &[20, 25], 0..20, &[0; 2]);
    }
}

#[test]
fn steps_take_every_so_many_elements() {
    // The innermost step is ignored.
    let t = tensor(Element::U32, &[40, 30, 9], &[8, 12, 5], &[3, 4, 2], Swizzle::None, 9);
    assert_eq!(t.bytes(), 8 * 3 * 3 * 4);
    load(&t, &[4, 1, 0], 0..4, &[0; 4]);
    load(&t, &[36, 20, 5], 0..4, &[0; 4]);
}

#[test]
fn elements_outside_read_as_nan_where_the_map_says_so() {
    for (element, nan) in [
        (Element::F16, vec![0xff, 0x7f]),
        (Element::BF16, vec![0xff, 0x7f]),
        (Element::F32, vec![0xff, 0xff, 0xff, 0x7f]),
        (Element::F64, vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]),
    ] {
        let mut t = tensor(element, &[20, 4], &[16, 4], &[1, 1], Swizzle::None, 0);
        t.map.fill_nan = true;
        load(&t, &[12, 2], 0..2, &nan);
    }
}

#[test]
fn element_types_that_convert() {
    let values = [
        1.0f32,
        f32::from_bits(1),
        -f32::from_bits(0x7f_ffff),
        1.0 + 1.0 / 2048.0,
        1.0 + 3.0 / 2048.0,
        f32::INFINITY,
        -0.0,
        3.3e38,
    ];
    let flush = |x: f32| if x.is_subnormal() { 0.0f32.copysign(x) } else { x };
    // To 10 bits of fraction, halves away from zero.
    let round = |x: f32| if x.is_finite() { f32::from_bits(x.to_bits().wrapping_add(0x1000) & !0x1fff) } else { x };
    for element in [Element::F32, Element::F32Flush, Element::TF32, Element::TF32Flush] {
        let mut t = tensor(element, &[8], &[8], &[1], Swizzle::None, 0);
        let data = Buffer::new(&values);
        t.map.address = data.address;
        let (loads, names) = coordinates(1);
        let body = format!(
            "{} @!%p7 bra GO; {loads} mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 32;
             cp.async.bulk.tensor.1d.shared::cta.global.tile.mbarrier::complete_tx::bytes [s], [%rd9, {{{names}}}], [b]; GO: {WAIT} {IMAGE}",
            setup()
        );
        let (image, at) = (Buffer::new(&vec![0f32; TILE as usize / 4]), Buffer::new(&[0i32]));
        Hopper { extra: vec![t.param()], ..Hopper::row(1, 64, 1) }
            .per_thread(&body, &[image.address, at.address])
            .unwrap();
        let want: Vec<u32> = values
            .iter()
            .map(|&x| match element {
                Element::F32 => x,
                Element::F32Flush => flush(x),
                Element::TF32 => round(x),
                _ => flush(round(flush(x))),
            })
            .map(f32::to_bits)
            .collect();
        let got: Vec<u32> = image.read::<f32>()[..8].iter().map(|x| x.to_bits()).collect();
        assert_eq!(got, want, "{element:?}");
    }
}

/// Stores or reduces the tile, filled by `value(byte offset)`, at `corner`; the tensor afterwards.
fn store(t: &Tensor, corner: &[i32], op: &str, seed: u64) -> Result<Vec<u8>, softcuda::exec::Fault> {
    let (loads, names) = coordinates(corner.len());
    // Byte i of the tile is i mod 61.
    let body = format!(
        "{} mov.u32 %r3, %thread; FILL: rem.u32 %r4, %r3, 61; add.u32 %r5, %r21, %r3; st.shared.u8 [%r5], %r4; add.u32 %r3, %r3, 64;
         setp.lt.u32 %p, %r3, {TILE}; @%p bra FILL; fence.proxy.async.shared::cta; bar.sync 0; @!%p7 bra END; {loads}
         cp{} [%rd9, {{{names}}}], [s]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; END:",
        setup(),
        if op.is_empty() {
            format!(".async.bulk.tensor.{}d.global.shared::cta.bulk_group", corner.len())
        } else {
            format!(".reduce.async.bulk.tensor.{}d.global.shared::cta.{op}.tile.bulk_group", corner.len())
        }
    );
    let at = Buffer::new(corner);
    Hopper { extra: vec![t.param()], ..Hopper::row(1, 64, 1) }.seed(seed).per_thread(&body, &[0, at.address])?;
    Ok(t.data.read())
}

#[test]
fn stores_of_every_rank_and_swizzle() {
    for (element, inner) in [(Element::U8, 32), (Element::BF16, 16), (Element::F32, 8)] {
        for rank in 1..=5 {
            for swizzle in Swizzle::ALL {
                for corner in [[0; 5], [3, 2, 1, 1, 0], [30, 6, 3, 2, 1], [90, 0, 0, 0, 0]] {
                    let dims: Vec<u64> = [37, 7, 4, 3, 2][..rank].to_vec();
                    let tile: Vec<u32> = [inner, 5, 3, 2, 2][..rank].to_vec();
                    let t = tensor(element, &dims, &tile, &[1, 1, 2, 1, 1], swizzle, 7);
                    let mut want: Vec<u8> = t.data.read();
                    let size = element.bytes() as usize;
                    t.visit(&corner[..rank], |from, to| {
                        if let Some(to) = to {
                            (0..size).for_each(|i| want[to + i] = ((from + i) % 61) as u8);
                        }
                    });
                    let got = store(&t, &corner[..rank], "", u64::from(rank == 2)).unwrap();
                    assert_eq!(got, want, "{:?} at {corner:?}", t.map);
                }
            }
        }
    }
}

#[test]
fn reductions_of_tiles() {
    for (op, element, f) in [
        ("add", Element::U32, (|a, b| a.wrapping_add(b)) as fn(u32, u32) -> u32),
        ("min", Element::U32, |a, b| a.min(b)),
        ("max", Element::S32, |a, b| (a as i32).max(b as i32) as u32),
        ("inc", Element::U32, |a, b| if a >= b { 0 } else { a + 1 }),
        ("and", Element::U32, |a, b| a & b),
        ("or", Element::S32, |a, b| a | b),
        ("xor", Element::U32, |a, b| a ^ b),
    ] {
        for seed in 0..3 {
            let t = tensor(element, &[21, 9], &[16, 8], &[1, 1], Swizzle::B64, 7);
            let mut want: Vec<u8> = t.data.read();
            t.visit(&[8, 3], |from, to| {
                if let Some(to) = to {
                    let old = u32::from_le_bytes(want[to..to + 4].try_into().unwrap());
                    let new = u32::from_le_bytes(std::array::from_fn(|i| ((from + i) % 61) as u8));
                    want[to..to + 4].copy_from_slice(&f(old, new).to_le_bytes());
                }
            });
            assert_eq!(store(&t, &[8, 3], op, seed).unwrap(), want, "{op}");
        }
    }
}

#[test]
fn multicast_of_a_tile() {
    let t = tensor(Element::BF16, &[70, 9], &[64, 8], &[1, 1], Swizzle::B128, 1);
    let body = format!(
        "{} mul.wide.u32 %rd4, %rank, {TILE}; add.s64 %rd10, %rd10, %rd4; @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 1024;
         barrier.cluster.arrive; barrier.cluster.wait; setp.eq.u32 %p1, %rank, 2; and.pred %p1, %p1, %p7; mov.u16 %h1, 7; mov.b64 %rd5, 0;
         @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [s], [%rd9, {{8, 2}}], [b], %h1, %rd5;
         {WAIT} {IMAGE} barrier.cluster.arrive; barrier.cluster.wait;",
        setup()
    );
    let run = Hopper { extra: vec![t.param()], ..Hopper::row(3, 64, 3) };
    let want = t.tile(&[8, 2], &vec![0x2a; TILE as usize], &[0; 2]).repeat(3);
    for seed in 0..20 {
        let image = Buffer::new(&vec![0u8; 3 * TILE as usize]);
        run.seed(seed).per_thread(&body, &[image.address, 0]).unwrap_or_else(|f| panic!("{f}"));
        assert!(image.read::<u8>() == want, "seed {seed}");
    }
}

#[test]
fn maps_made_on_the_device() {
    // A zeroed object gets every field, is copied to global memory and used from there, as compilers do it.
    let t = tensor(Element::BF16, &[70, 9], &[64, 8], &[1, 1], Swizzle::B128, 1);
    let (image, map) = (Buffer::new(&vec![0u8; TILE as usize]), Buffer::new(&[0u64; 16]));
    let body = format!(
        "{} .shared .align 128 .b8 m[128]; ld.param.u64 %rd12, [p3]; ld.param.u64 %rd13, [p4]; mov.u32 %r22, m; mad.lo.u32 %r3, %thread, 4, %r22;
         setp.lt.u32 %p1, %thread, 32; @!%p1 bra GO; st.shared.u32 [%r3], 0; bar.warp.sync 0xffffffff; @!%p7 bra FILLED;
         tensormap.replace.tile.global_address.shared::cta.b1024.b64 [m], %rd12; tensormap.replace.tile.rank.shared::cta.b1024.b32 [m], 1;
         tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [m], 0, 64; mov.u32 %r4, 8; tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r22], 1, %r4;
         tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [m], 0, 70; tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [m], 1, 9;
         mov.b64 %rd14, 144; tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [m], 0, %rd14;
         tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [m], 0, 1; tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [m], 1, 1;
         tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [m], 10; tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [m], 0;
         tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [m], 3; tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [m], 0;
         FILLED: bar.warp.sync 0xffffffff;
         tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd13], [m], 128;
         @!%p7 bra GO; fence.proxy.tensormap::generic.acquire.gpu [%rd13], 128; prefetch.tensormap [%rd13];
         cp.async.bulk.prefetch.tensor.2d.L2.global [%rd13, {{8, 2}}];
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 1024;
         cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [s], [%rd13, {{8, 2}}], [b]; GO: {WAIT} {IMAGE}",
        setup()
    );
    let run = Hopper { extra: vec![t.param()], ..Hopper::row(1, 64, 1) };
    let params = [image.address, 0, t.data.address, map.address];
    run.per_thread(&body, &params).unwrap_or_else(|f| panic!("{f}"));
    assert!(image.read::<u8>() == t.tile(&[8, 2], &vec![0x2a; TILE as usize], &[0; 2]));
    // Made on the host, with the same fields, it has the same bytes.
    assert_eq!(map.read::<u8>(), t.map.encode());
}

#[test]
fn one_field_of_a_map_in_global_memory() {
    let t = tensor(Element::U8, &[64, 4], &[32, 2], &[1, 1], Swizzle::None, 1);
    let other = tensor(Element::U8, &[64, 4], &[32, 2], &[1, 1], Swizzle::None, 200);
    let (image, map) = (Buffer::new(&vec![0u8; TILE as usize]), Buffer::new(&t.map.encode()));
    let body = format!(
        "{} @!%p7 bra GO; ld.param.u64 %rd12, [p3]; ld.param.u64 %rd13, [p4]; tensormap.replace.tile.global_address.global.b1024.b64 [%rd13], %rd12;
         tensormap.replace.tile.global_dim.b1024.b32 [%rd13], 1, 2; fence.proxy.tensormap::generic.release.gpu;
         fence.proxy.tensormap::generic.acquire.gpu [%rd13], 128; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 64;
         cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [s], [%rd13, {{16, 1}}], [b]; GO: {WAIT} {IMAGE}",
        setup()
    );
    let params = [image.address, 0, other.data.address, map.address];
    Hopper { extra: vec![t.param()], ..Hopper::row(1, 64, 1) }.per_thread(&body, &params).unwrap();
    let got: Vec<u8> = image.read();
    let data: Vec<u8> = other.data.read();
    assert_eq!((&got[..32], &got[32..64]), (&data[80..112], &[0u8; 32][..]));
}

#[track_caller]
fn misuse(change: impl Fn(&mut [u8; 128]), body: &str, kind: FaultKind, part: &str) {
    let t = tensor(Element::BF16, &[70, 9], &[64, 8], &[1, 1], Swizzle::B128, 1);
    let mut bytes = t.map.encode();
    change(&mut bytes);
    let run = Hopper { extra: vec![(".param .align 64 .b8 map[128]".into(), bytes.to_vec())], ..Hopper::row(1, 64, 1) };
    let f = run.fault(&format!("{} @!%p7 bra END; {body} END:", setup()), &[0, 0]);
    assert_eq!(f.kind, kind, "{f}");
    assert!(f.message.contains(part), "{part:?} is not in {f}");
}

#[test]
fn misuse_is_a_fault() {
    use FaultKind::*;
    let load = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes";
    let same = |_: &mut [u8; 128]| {};
    misuse(
        |b| b[20] ^= 1,
        &format!("{load} [s], [%rd9, {{0, 0}}], [b];"),
        IllegalInstruction,
        "its bytes are not those of a tensor map",
    );
    misuse(|b| *b = [0; 128], &format!("{load} [s], [%rd9, {{0, 0}}], [b];"), IllegalInstruction, "is not usable");
    misuse(
        same,
        "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes [s], [%rd9, {0}], [b];",
        IllegalInstruction,
        "1 coordinates for a tensor of 2",
    );
    misuse(same, &format!("{load} [s+64], [%rd9, {{0, 0}}], [b];"), MisalignedAddress, "not a multiple of 128");
    misuse(same, &format!("{load} [s+16256], [%rd9, {{0, 0}}], [b];"), IllegalAddress, "shared memory is");
    misuse(
        same,
        &format!("cvta.shared.u64 %rd9, 0; {load} [s], [%rd9, {{0, 0}}], [b];"),
        InvalidAddressSpace,
        "param, const or global",
    );
    misuse(
        same,
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd9, {0, -1}], [s];",
        IllegalInstruction,
        "coordinate 1 of a tensor store is -1",
    );
    misuse(
        same,
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.and.bulk_group [%rd9, {0, 0}], [s];",
        IllegalInstruction,
        "reduction And",
    );
    misuse(
        same,
        "st.shared.u32 [s], 5; tensormap.replace.tile.rank.shared::cta.b1024.b32 [s], 1;",
        IllegalInstruction,
        "its bytes are not those of a tensor map, nor zero",
    );
    // A tensor that is larger than the memory behind it.
    let larger = |b: &mut [u8; 128]| {
        let mut map = TensorMap::decode(b).unwrap();
        map.dims[1] = 12;
        *b = map.encode();
    };
    misuse(larger, &format!("{load} [s], [%rd9, {{0, 4}}], [b];"), IllegalAddress, "allocation");
}

#[test]
fn spellings() {
    let load = "cp.async.bulk.tensor.3d.shared::cluster.global";
    for (text, part) in [
        (
            format!("{load}.im2col.mbarrier::complete_tx::bytes [%r1], [%rd1, {{%r1, %r1, %r1}}], [%r2], {{%h1}};"),
            "im2col",
        ),
        (
            format!("{load}.tile::gather4.mbarrier::complete_tx::bytes [%r1], [%rd1, {{%r1, %r1, %r1}}], [%r2];"),
            "tile::gather4",
        ),
        (format!("{load}.mbarrier::complete_tx::bytes [%r1], [%rd1, {{%r1, %r1}}], [%r2];"), "3 coordinates"),
        (
            format!("{load}.mbarrier::complete_tx::bytes.cta_group::1 [%r1], [%rd1, {{%r1, %r1, %r1}}], [%r2];"),
            "cta_group::1",
        ),
        (
            "cp.async.bulk.tensor.6d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r1}], [%r2];"
                .into(),
            "6d",
        ),
        (
            "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [p0, {%r1}], [%r2];".into(),
            "generic address",
        ),
        ("tensormap.replace.tile.swizzle_atomicity.shared::cta.b1024.b32 [%r1], 1;".into(), "swizzle_atomicity"),
        ("tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%r1], 4;".into(), "0 to 3"),
        ("tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%r1], %r2;".into(), "0 to 12"),
        ("tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r1], 5, 1;".into(), "0 to 4"),
        ("tensormap.replace.tile.rank.shared::cta.b1024.b64 [%r1], %rd1;".into(), "tensormap.replace"),
        (
            "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd1], [%r1], 64;"
                .into(),
            "size 128",
        ),
    ] {
        let error = refused(&text);
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}
