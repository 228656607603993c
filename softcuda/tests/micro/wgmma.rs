//! `wgmma` (PTX ISA 9.7.15): every shape, type, swizzle mode and order against the definition in f64.

use half::{bf16, f16};

use crate::warpgroup::{Program64, descriptor, list};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Ty {
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
}

impl Ty {
    fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Tf32 => "tf32",
            Self::E4m3 => "e4m3",
            Self::E5m2 => "e5m2",
            Self::S8 => "s8",
            Self::U8 => "u8",
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::Tf32 => 4,
            _ => 1,
        }
    }

    /// Of a small integer, exact in every type.
    fn encode(self, x: f64) -> u32 {
        // Sign, exponent, mantissa of a number with at most `m` bits after the leading one.
        let small = |m: i32, bias: i32| {
            if x == 0.0 {
                return 0;
            }
            let e = x.abs().log2().floor() as i32;
            let mantissa = (x.abs() / 2f64.powi(e) - 1.0) * 2f64.powi(m);
            u32::from(x < 0.0) << 7 | ((e + bias) << m) as u32 | mantissa as u32
        };
        match self {
            Self::F16 => f16::from_f64(x).to_bits().into(),
            Self::Bf16 => bf16::from_f64(x).to_bits().into(),
            Self::Tf32 => (x as f32).to_bits(),
            Self::E4m3 => small(3, 7),
            Self::E5m2 => small(2, 15),
            Self::S8 | Self::U8 => u32::from(x as i32 as u8),
        }
    }

    /// A number that depends on the place, exact in the type.
    fn value(self, salt: usize, row: usize, k: usize) -> f64 {
        let x = (row * 7 + k * 3 + salt * 5 + row * k % 11) % 9;
        match self {
            Self::U8 => [0, 1, 200, 3, 255, 5, 128, 7, 9][x] as f64,
            Self::S8 => [-128, 1, -100, 3, 127, 5, -6, 7, 0][x] as f64,
            _ => x as f64 - 4.0,
        }
    }
}

/// How a factor is given.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    Registers,
    K,
    Mn,
}

/// A factor in shared memory, with freely chosen strides.
struct Placed {
    descriptor: u64,
    /// Byte address of each element.
    at: Box<dyn Fn(usize, usize) -> usize>,
    end: usize,
}

/// The canonical layouts as CuTe writes them, shape:stride by shape:stride over 16-byte units T, then its Swizzle<B,4,3>:
/// bits 7 and up of the address, B of them, are added without carry to bits 4 and up.
fn place(ty: Ty, order: Order, rows: usize, mode: u64, start: usize, base_offset: usize) -> Placed {
    let bits = [0, 3, 2, 1][mode as usize];
    let t = 16 / ty.bytes();
    let width = 16 << bits;
    let rest = |x: usize, shape: &[(usize, usize)]| {
        let mut x = x;
        let mut sum = 0;
        for &(extent, stride) in shape {
            sum += x % extent * stride;
            x /= extent;
        }
        assert_eq!(x, 0);
        sum
    };
    let k_total = 32 / ty.bytes();
    let many = 64;
    // Strides are larger than they need be by a whole pattern, so that nothing but the right field gives the right place.
    let (leading, stride, offset): (usize, usize, Box<dyn Fn(usize, usize) -> usize>) = match (order, bits) {
        (Order::K, 0) => {
            let (lbo, sbo) = (rows.div_ceil(8) * 256 + 128, 256);
            let f = move |mn, k| rest(mn, &[(8, 16), (many, sbo)]) + rest(k, &[(t, ty.bytes()), (2, lbo)]);
            (lbo, sbo, Box::new(f))
        }
        (Order::K, _) => {
            let sbo = 2 * 8 * width;
            let f = move |mn, k| rest(mn, &[(8, width), (many, sbo)]) + rest(k, &[(t, ty.bytes()), (2, 16)]);
            (0, sbo, Box::new(f))
        }
        (_, 0) => {
            let (sbo, lbo) = (256, rows.div_ceil(8) * 256);
            let f = move |mn, k| rest(mn, &[(t, ty.bytes()), (many, sbo)]) + rest(k, &[(8, 16), (many, lbo)]);
            (lbo, sbo, Box::new(f))
        }
        _ => {
            let (sbo, lbo) = (8 * width, 8 * width * 4);
            let across = width / 16;
            let f = move |mn, k| {
                rest(mn, &[(t, ty.bytes()), (across, 16), (many, lbo)]) + rest(k, &[(8, width), (many, sbo)])
            };
            (lbo, sbo, Box::new(f))
        }
    };
    let pattern = base_offset * 128;
    let at = Box::new(move |mn: usize, k: usize| {
        let address = start + offset(mn, k);
        let relative = address - pattern;
        pattern + (relative ^ (relative >> 3 & ((1 << bits) - 1) << 4))
    });
    let end = (0..rows).flat_map(|mn| (0..k_total).map(move |k| (mn, k))).map(|(mn, k)| at(mn, k)).max().unwrap();
    Placed { descriptor: descriptor(start, leading, stride, base_offset as u64, mode), at, end: end + 16 }
}

struct Case {
    n: usize,
    a: Ty,
    b: Ty,
    d: &'static str,
    a_order: Order,
    b_order: Order,
    mode: u64,
    base_offset: usize,
    scale: bool,
    signs: [i32; 2],
    saturate: bool,
    seed: u64,
}

const PLAIN: Case = Case {
    n: 64,
    a: Ty::Bf16,
    b: Ty::Bf16,
    d: "f32",
    a_order: Order::K,
    b_order: Order::K,
    mode: 1,
    base_offset: 0,
    scale: true,
    signs: [1, 1],
    saturate: false,
    seed: 0,
};

/// D's element in a thread's register: row, column, and the bits' place for halves.
fn element_of(thread: usize, register: usize, half: Option<usize>) -> (usize, usize) {
    let (warp, g, t) = (thread / 32 % 4, thread % 32 / 4, thread % 4);
    match half {
        Some(h) => (16 * warp + g + 8 * (register % 2), register / 2 * 8 + 2 * t + h),
        None => (16 * warp + g + 8 * (register / 2 % 2), register / 4 * 8 + 2 * t + register % 2),
    }
}

impl Case {
    fn k(&self) -> usize {
        32 / self.a.bytes()
    }

    fn start_of_c(&self, row: usize, column: usize) -> f64 {
        if self.saturate {
            return if (row + column) % 2 == 0 { f64::from(i32::MAX - 100) } else { f64::from(i32::MIN + 100) };
        }
        ((row * 5 + column * 3) % 17) as f64 - 8.0
    }

    fn want(&self, row: usize, column: usize) -> f64 {
        let sign = f64::from(self.signs[0] * self.signs[1]);
        let c = if self.scale { self.start_of_c(row, column) } else { 0.0 };
        let sum = (0..self.k()).map(|k| self.a.value(1, row, k) * self.b.value(2, column, k)).sum::<f64>();
        let d = c + sign * sum;
        if self.saturate { d.clamp(i32::MIN.into(), i32::MAX.into()) } else { d }
    }

    fn instruction(&self, registers: usize) -> String {
        let integer = self.d == "s32";
        let sixteen = self.a.bytes() == 2;
        let a = if self.a_order == Order::Registers { list("a", 4) } else { "%da".into() };
        let mut tail = String::new();
        if !integer {
            tail += &format!(", {}, {}", self.signs[0], self.signs[1]);
        }
        if sixteen && self.a_order != Order::Registers {
            tail += if self.a_order == Order::Mn { ", 1" } else { ", 0" };
        }
        if sixteen {
            tail += if self.b_order == Order::Mn { ", 1" } else { ", 0" };
        }
        let saturate = if self.saturate { ".satfinite" } else { "" };
        format!(
            "wgmma.mma_async.sync.aligned.m64n{}k{}.{}.{}.{}{saturate} {}, {a}, %db, %scale{tail};",
            self.n,
            self.k(),
            self.d,
            self.a.name(),
            self.b.name(),
            list("d", registers)
        )
    }

    fn program(&self) -> Program64 {
        let halves = self.d == "f16";
        let registers = if halves { self.n / 4 } else { self.n / 2 };
        let start = 128 * self.base_offset;
        let a_order = if self.a_order == Order::Registers { Order::K } else { self.a_order };
        let a = place(self.a, a_order, 64, self.mode, start, self.base_offset);
        let b_start = a.end.next_multiple_of(1024) + start;
        let b = place(self.b, self.b_order, self.n, self.mode, b_start, self.base_offset);
        let mut image = vec![0x7fu8; b.end];
        let mut put = |at: usize, ty: Ty, x: f64| {
            image[at..at + ty.bytes()].copy_from_slice(&ty.encode(x).to_le_bytes()[..ty.bytes()]);
        };
        for k in 0..self.k() {
            if self.a_order != Order::Registers {
                (0..64).for_each(|row| put((a.at)(row, k), self.a, self.a.value(1, row, k)));
            }
            (0..self.n).for_each(|column| put((b.at)(column, k), self.b, self.b.value(2, column, k)));
        }
        let per_word = 4 / self.a.bytes();
        let mut a_words = Vec::new();
        let mut accumulators = Vec::new();
        for thread in 0..128 {
            let (warp, g, t) = (thread / 32, thread % 32 / 4, thread % 4);
            for r in 0..4 {
                let row = 16 * warp + g + 8 * (r % 2);
                let first = (4 * (r / 2) + t) * per_word;
                let word = (0..per_word)
                    .map(|i| self.a.encode(self.a.value(1, row, first + i)) << (8 * self.a.bytes() * i))
                    .sum::<u32>();
                a_words.push(word);
            }
            for r in 0..registers {
                let value = |half: Option<usize>| {
                    let (row, column) = element_of(thread, r, half);
                    self.start_of_c(row, column)
                };
                accumulators.push(match self.d {
                    "f16" => (0..2).map(|h| Ty::F16.encode(value(Some(h))) << (16 * h)).sum(),
                    "f32" => (value(None) as f32).to_bits(),
                    _ => value(None) as i32 as u32,
                });
            }
        }
        Program64 {
            threads: 128,
            image,
            registers,
            accumulators,
            a_words,
            a: a.descriptor,
            b: b.descriptor,
            scale: self.scale,
            seed: self.seed,
            isa: None,
            body: format!(
                "wgmma.fence.sync.aligned; {} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
                self.instruction(registers)
            ),
        }
    }

    fn check(&self) {
        let program = self.program();
        let got = program.run().unwrap_or_else(|e| panic!("{e}\n{}", self.instruction(program.registers)));
        self.compare(&got, program.registers);
    }

    fn compare(&self, got: &[u32], registers: usize) {
        for (i, &bits) in got.iter().enumerate() {
            let (thread, r) = (i / registers, i % registers);
            let halves: &[Option<usize>] = if self.d == "f16" { &[Some(0), Some(1)] } else { &[None] };
            for &half in halves {
                let (row, column) = element_of(thread, r, half);
                let value = match (self.d, half) {
                    ("f16", Some(h)) => f16::from_bits((bits >> (16 * h)) as u16).to_f64(),
                    ("f32", _) => f32::from_bits(bits).into(),
                    _ => f64::from(bits as i32),
                };
                let want = self.want(row, column);
                assert!(
                    value == want,
                    "{} mode {} base offset {} seed {}: row {row} column {column} is {value}, expected {want}",
                    self.instruction(registers),
                    self.mode,
                    self.base_offset,
                    self.seed
                );
            }
        }
    }
}

/// Swizzle modes by orders by every N.
#[test]
fn layouts_of_16_bits() {
    for mode in 0..4 {
        for a_order in [Order::Registers, Order::K, Order::Mn] {
            for b_order in [Order::K, Order::Mn] {
                for n in (8..=256).step_by(8) {
                    let ty = if n % 16 == 0 { Ty::F16 } else { Ty::Bf16 };
                    Case { n, a: ty, b: ty, a_order, b_order, mode, seed: n as u64 / 8 % 3, ..PLAIN }.check();
                }
            }
        }
    }
}

/// The other types are K-major.
#[test]
fn layouts_of_other_types() {
    let pairs = [
        (Ty::Tf32, Ty::Tf32, "f32"),
        (Ty::E4m3, Ty::E4m3, "f32"),
        (Ty::E4m3, Ty::E5m2, "f32"),
        (Ty::E5m2, Ty::E4m3, "f16"),
        (Ty::E5m2, Ty::E5m2, "f16"),
        (Ty::S8, Ty::S8, "s32"),
        (Ty::S8, Ty::U8, "s32"),
        (Ty::U8, Ty::S8, "s32"),
        (Ty::U8, Ty::U8, "s32"),
    ];
    for (a, b, d) in pairs {
        for a_order in [Order::Registers, Order::K] {
            for n in (8..=256).step_by(8).filter(|n| d != "s32" || *n <= 24 || n % 16 == 0) {
                // Every N in one mode, a few in all.
                for mode in 0..4 {
                    if matches!(n, 8 | 24 | 96 | 256) || n as u64 / 8 % 4 == mode {
                        Case { n, a, b, d, a_order, mode, ..PLAIN }.check();
                    }
                }
            }
        }
    }
}

#[test]
fn accumulators_of_16_bits() {
    for n in [8, 24, 128, 256] {
        for a_order in [Order::Registers, Order::Mn] {
            Case { n, a: Ty::F16, b: Ty::F16, d: "f16", a_order, ..PLAIN }.check();
        }
    }
}

#[test]
fn patterns_that_do_not_start_at_a_multiple_of_their_size() {
    for mode in 1..4u64 {
        for base_offset in 0..8 {
            for (a_order, b_order) in [(Order::K, Order::Mn), (Order::Mn, Order::K)] {
                Case { a_order, b_order, mode, base_offset, ..PLAIN }.check();
            }
        }
    }
}

#[test]
fn scales_and_saturation() {
    for scale in [false, true] {
        for signs in [[1, 1], [-1, 1], [1, -1], [-1, -1]] {
            Case { scale, signs, ..PLAIN }.check();
            Case { scale, signs, a_order: Order::Registers, a: Ty::Tf32, b: Ty::Tf32, ..PLAIN }.check();
        }
        for saturate in [false, true] {
            Case { scale, saturate, a: Ty::S8, b: Ty::U8, d: "s32", ..PLAIN }.check();
        }
    }
}

/// A tile of 64 K in rows of 128 bytes is walked by adding 32 bytes to the start address (as CUTLASS and Triton do).
#[test]
fn steps_along_k_within_a_swizzled_row() {
    let tile = |rows: usize, start: usize| {
        move |row: usize, k: usize| {
            assert!(row < rows);
            let address = start + row * 128 + 2 * k;
            address ^ (address >> 3 & 0x70)
        }
    };
    let (a, b) = (tile(64, 0), tile(32, 8192));
    let mut image = vec![0u8; 8192 + 4096];
    for k in 0..64 {
        for row in 0..64 {
            let at = a(row, k);
            image[at..at + 2].copy_from_slice(&bf16::from_f64(Ty::Bf16.value(1, row, k)).to_le_bytes());
        }
        for column in 0..32 {
            let at = b(column, k);
            image[at..at + 2].copy_from_slice(&bf16::from_f64(Ty::Bf16.value(2, column, k)).to_le_bytes());
        }
    }
    let step = format!(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {}, %da, %db, %scale, 1, 1, 0, 0;
         add.s64 %da, %da, 2; add.s64 %db, %db, 2; setp.eq.u32 %scale, 0, 0;",
        list("d", 16)
    );
    for seed in 0..20 {
        let got = Program64 {
            threads: 128,
            image: image.clone(),
            registers: 16,
            accumulators: vec![],
            a_words: vec![],
            a: descriptor(0, 0, 1024, 0, 1),
            b: descriptor(8192, 0, 1024, 0, 1),
            scale: false,
            seed,
            isa: None,
            body: format!(
                "wgmma.fence.sync.aligned; {step}{step}{step}{step} wgmma.commit_group.sync.aligned;
                 wgmma.wait_group.sync.aligned 0;"
            ),
        }
        .run()
        .unwrap();
        for (i, bits) in got.iter().enumerate() {
            let (row, column) = element_of(i / 16, i % 16, None);
            let want = (0..64).map(|k| Ty::Bf16.value(1, row, k) * Ty::Bf16.value(2, column, k)).sum::<f64>();
            assert_eq!(f64::from(f32::from_bits(*bits)), want, "seed {seed} row {row} column {column}");
        }
    }
}
