//! Every grouped GEMM on the software device's executor, without driver or launch layer: ragged shapes against a plain f64
//! product, bytes outside the result untouched, and no bank conflict in the main loop.

use half::{bf16, f16};
use moe_kernels::kernels::embedded;
use moe_kernels::registry::{self, Fold, Gemm, Kernel};
use moe_kernels::rules::{Dtype, Layout};
use softcuda::exec::{Config, Counters, GlobalMemory, Launch};
use softcuda::lower::{Environment, lower_module};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }
}

/// Values of a storage type, and what they are exactly.
struct Tensor {
    bytes: Buffer,
    values: Vec<f64>,
}

impl Tensor {
    fn random(dtype: Dtype, count: usize, scale: f64, random: &mut Random) -> Tensor {
        let mut bytes = Buffer::new(count * dtype.bytes() as usize);
        let values = (0..count)
            .map(|i| {
                let value = (random.unit() * scale) as f32;
                match dtype {
                    Dtype::Bf16 => bytes.put(i, bf16::from_f32(value).to_le_bytes()),
                    Dtype::F16 => bytes.put(i, f16::from_f32(value).to_le_bytes()),
                    Dtype::F32 => bytes.put(i, value.to_le_bytes()),
                    other => unreachable!("no product has {other}"),
                }
                decode(dtype, &bytes, i)
            })
            .collect();
        Tensor { bytes, values }
    }
}

fn decode(dtype: Dtype, bytes: &Buffer, i: usize) -> f64 {
    match dtype {
        Dtype::Bf16 => bf16::from_le_bytes(bytes.get(i)).to_f64(),
        Dtype::F16 => f16::from_le_bytes(bytes.get(i)).to_f64(),
        Dtype::F32 => f32::from_le_bytes(bytes.get(i)).into(),
        other => unreachable!("no product has {other}"),
    }
}

/// Device memory of one tensor: exactly its bytes, 16-byte aligned.
#[derive(Clone)]
struct Buffer {
    words: Vec<u128>,
    length: usize,
}

impl Buffer {
    fn new(length: usize) -> Buffer {
        Buffer { words: vec![0x5A5A_5A5A_5A5A_5A5A_5A5A_5A5A_5A5A_5A5A; length.div_ceil(16).max(1)], length }
    }

    fn of<const N: usize>(items: impl ExactSizeIterator<Item = [u8; N]>) -> Buffer {
        let mut buffer = Buffer::new(items.len() * N);
        items.enumerate().for_each(|(i, item)| buffer.put(i, item));
        buffer
    }

    fn put<const N: usize>(&mut self, i: usize, item: [u8; N]) {
        bytemuck::cast_slice_mut(&mut self.words)[i * N..(i + 1) * N].copy_from_slice(&item);
    }

    fn get<const N: usize>(&self, i: usize) -> [u8; N] {
        bytemuck::cast_slice::<u128, u8>(&self.words)[i * N..(i + 1) * N].try_into().unwrap()
    }

    fn address(&self) -> u64 {
        self.words.as_ptr() as u64
    }
}

/// The buffers of a launch, and nothing else.
struct Memory(Vec<(u64, u64)>);

impl GlobalMemory for Memory {
    fn find(&self, addr: u64) -> Option<(u64, u64)> {
        self.0.iter().copied().find(|(start, end)| (*start..*end).contains(&addr))
    }

    fn describe(&self, _: u64) -> String {
        "outside the tensors".into()
    }
}

/// One launch.
#[derive(Debug)]
struct Case {
    n: usize,
    k: usize,
    /// Rows of each expert.
    rows: &'static [usize],
    /// With a tile list, and rows of A by slot.
    grouped: bool,
    scaled: bool,
    biased: bool,
    activation: u32,
}

const ALPHA: f32 = 1.702;
const LIMIT: f32 = 0.5;
const FACTOR: f32 = 0.5;
const OFFSET: f32 = -2.0;

/// SwiGLU in full, its gate clamped after the SiLU, and both softly capped.
const SWIGLU: u32 = 7;
const SWIGLU_AFTER: u32 = 7 | 1 << 8;
const SWIGLU_CAPPED: u32 = 7 | 3 << 9;

fn activate(code: u32, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match code {
        0 => x,
        1 => x.max(0.0),
        2 => 0.5 * x * erfc(-x / 2_f64.sqrt()),
        3 => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
        4 => x * sigmoid(x),
        6 => x.max(0.0) * x.max(0.0),
        _ => unreachable!("no such activation: {code}"),
    }
}

/// By its series below 3, by its continued fraction above.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let root = std::f64::consts::PI.sqrt();
    if x < 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - 2.0 / root * sum;
    }
    let fraction = (1..=60).rev().fold(x, |rest, n| x + f64::from(n) / 2.0 / rest);
    (-x * x).exp() / root / fraction
}

fn folded(fold: Fold, code: u32, v: &[f64], n: usize, c: usize) -> f64 {
    let (gate, up) = match fold {
        Fold::Plain => return activate(code, v[c]),
        Fold::Glu => (v[c], v[n + c]),
        Fold::Iglu => (v[2 * c], v[2 * c + 1]),
    };
    let (alpha, limit) = (f64::from(ALPHA), f64::from(LIMIT));
    let silu = |linear: f64, g: f64| linear / (1.0 + (-alpha * g).exp());
    let (g, u) = (gate.min(limit), up.clamp(-limit, limit));
    let linear = |u: f64| f64::from(FACTOR) * u + f64::from(OFFSET);
    match code {
        5 => silu(g, g) * (u + 1.0),
        SWIGLU => silu(g, g) * linear(u),
        SWIGLU_AFTER => silu(gate, gate).min(limit) * linear(u),
        SWIGLU_CAPPED => silu(limit * (gate / limit).tanh(), gate) * linear(limit * (up / limit).tanh()),
        code => activate(code, gate) * up,
    }
}

fn check(gemm: Gemm, case: &Case, seed: u64) -> Result<Counters, String> {
    let Gemm { dtype, tile, fold, layout } = gemm;
    let name = Kernel::Gemm(gemm).name();
    let mut random = Random(seed);
    let (n, k, experts) = (case.n, case.k, case.rows.len());
    let nb = if fold == Fold::Plain { n } else { 2 * n };

    // A row between experts, and one behind the last, belongs to no tile.
    let gap = usize::from(case.grouped);
    let total: usize = case.rows.iter().map(|rows| rows + gap).sum();
    let a_rows = if case.grouped { 11 } else { total };
    let a = Tensor::random(dtype, a_rows * k, 1.0, &mut random);
    let b = Tensor::random(dtype, experts * nb * k, 3.0 / (k as f64).sqrt(), &mut random);
    let bias = Tensor::random(dtype, experts * nb, 1.0, &mut random);
    let scale = Tensor::random(Dtype::F32, total, 2.0, &mut random);
    let slots: Vec<i32> = (0..total).map(|_| (random.next() % a_rows as u64) as i32).collect();
    let mut tiles: Vec<[i32; 4]> = Vec::new();
    let mut want: Vec<Option<Vec<f64>>> = vec![None; total];
    let mut start = 0;
    for (e, &rows) in case.rows.iter().enumerate() {
        for at in (start..start + rows).step_by(tile.bm as usize) {
            let end = (at + tile.bm as usize).min(start + rows);
            tiles.push([e as i32, at as i32, end as i32, 0]);
        }
        for r in start..start + rows {
            let from = if case.grouped { slots[r] as usize } else { r };
            let v: Vec<f64> = (0..nb)
                .map(|c| {
                    let product: f64 = (0..k)
                        .map(|i| {
                            let place = match layout {
                                Layout::Nk => (e * nb + c) * k + i,
                                Layout::Kn => (e * k + i) * nb + c,
                                other => unreachable!("no product has {other:?}"),
                            };
                            a.values[from * k + i] * b.values[place]
                        })
                        .sum();
                    let scale = if case.scaled { scale.values[r] } else { 1.0 };
                    scale * product + if case.biased { bias.values[e * nb + c] } else { 0.0 }
                })
                .collect();
            want[r] = Some((0..n).map(|c| folded(fold, case.activation, &v, n, c)).collect());
        }
        start += rows + gap;
    }

    let count = tiles.len();
    // What lies behind the last tile must not be taken for one.
    tiles.extend([[i32::MAX; 4]; 2]);
    let tiles_buffer = Buffer::of(tiles.iter().map(|tile| bytemuck::cast::<[i32; 4], [u8; 16]>(*tile)));
    let slots_buffer = Buffer::of(slots.iter().map(|slot| slot.to_le_bytes()));
    let count_buffer = Buffer::of([(count as i32).to_le_bytes()].into_iter());
    let out = Buffer::new(total * n * dtype.bytes() as usize);
    let inputs = [&a.bytes, &b.bytes, &bias.bytes, &scale.bytes, &tiles_buffer, &slots_buffer, &count_buffer];
    let before: Vec<Buffer> = inputs.iter().map(|&buffer| buffer.clone()).collect();
    let memory = Memory(
        inputs
            .iter()
            .chain([&&out])
            .map(|buffer| (buffer.address(), buffer.address() + buffer.length as u64))
            .collect(),
    );

    let optional = |wanted: bool, buffer: &Buffer| if wanted { buffer.address() } else { 0 };
    // Where up begins behind gate in one tensor.
    let up = match layout {
        Layout::Nk => n * k,
        _ => n,
    };
    let behind = |wanted: bool, buffer: &Buffer, elements: usize| {
        if wanted && fold == Fold::Glu { buffer.address() + (elements * dtype.bytes() as usize) as u64 } else { 0 }
    };
    let pointers = [
        a.bytes.address(),
        b.bytes.address(),
        behind(true, &b.bytes, up),
        optional(case.biased, &bias.bytes),
        behind(case.biased, &bias.bytes, n),
        out.address(),
        0,
        optional(case.grouped, &slots_buffer),
        // No token's sum.
        0,
        optional(case.scaled, &scale.bytes),
        0,
        optional(case.grouped, &tiles_buffer),
        optional(case.grouped, &count_buffer),
    ]
    .into_iter()
    // No shared expert: seven addresses, and its number of rows, depth and two strides.
    .chain([0; 7]);
    // No dropout: the last six are not looked at beyond the first.
    let dropout = [0, 1f32.to_bits(), 0, 0, 0, 0];
    let (output, depth) = if layout == Layout::Nk { (k, 1) } else { (1, nb) };
    let expert = (nb * k) as u32;
    let strides = [tile.bm, k as u32, 1, expert, 0, output as u32, depth as u32, 1, n as u32, 1];
    let rounded = 0;
    let scalars = ([0, 0, 0, 0, total as u32, n as u32, k as u32, nb as u32].into_iter())
        .chain(strides)
        .chain([rounded, case.activation, ALPHA.to_bits(), LIMIT.to_bits()])
        .chain(dropout);
    let noise_state = 0_u64;
    // The up value's bound, its factor and what is added; no shared expert: six numbers of its activation. Then a word between.
    let swiglu = [LIMIT.to_bits(), FACTOR.to_bits(), OFFSET.to_bits(), 0, 0, 0, 0, 0, 0, 0];
    let by_expert = [0_u64; 4];
    let params: Vec<u8> = (pointers.flat_map(|p: u64| p.to_le_bytes()))
        .chain(scalars.flat_map(|s: u32| s.to_le_bytes()))
        .chain(noise_state.to_le_bytes())
        .chain(swiglu.into_iter().flat_map(u32::to_le_bytes))
        .chain(by_expert.into_iter().flat_map(u64::to_le_bytes))
        .collect();
    let max_tiles = if case.grouped { count + 2 } else { total.div_ceil(tile.bm as usize) };
    let grid = max_tiles.next_multiple_of(8) * n.div_ceil(gemm.out_columns() as usize);

    let ptx = embedded().iter().find(|entry| entry.name == name).expect("every variant is embedded").ptx();
    let module = softcuda::ptx::parse(&ptx).map_err(|error| error.to_string())?;
    let environment = Environment { compute_capability: (8, 0), ..Environment::default() };
    let program = lower_module(&module, &environment).map_err(|error| error.to_string())?;
    let config = Config { seed, count: true, ..Config::default() };
    let counters = softcuda::exec::launch(&Launch {
        kernel: program.kernel(&name).expect("the entry has the variant's name"),
        grid: [grid as u32, 1, 1],
        block: [tile.threads(), 1, 1],
        cluster: [1, 1, 1],
        dynamic_shared_bytes: gemm.shared_bytes(),
        params: &params,
        cooperative: false,
        memory: &memory,
        config: &config,
    })
    .map_err(|fault| fault.to_string())?;

    for (buffer, before) in inputs.iter().zip(&before) {
        if buffer.words != before.words {
            return Err("an input changed".into());
        }
    }
    compare(dtype, &out, &want, n)?;
    conflicts(&ptx, &counters)?;
    Ok(counters)
}

/// Each output within one rounding of its type, and 1e-5 of the rows' root mean square for the f32 sums behind it (1e-6 over
/// the whole norm for f32); rows of no tile as they were.
fn compare(dtype: Dtype, out: &Buffer, want: &[Option<Vec<f64>>], n: usize) -> Result<(), String> {
    let live: Vec<f64> = want.iter().flatten().flatten().copied().collect();
    let norm = live.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mean = norm / (live.len().max(1) as f64).sqrt();
    let rounding = match dtype {
        Dtype::Bf16 => 2_f64.powi(-8),
        Dtype::F16 => 2_f64.powi(-11),
        Dtype::F32 => 2_f64.powi(-24),
        other => unreachable!("no product has {other}"),
    };
    let mut squares = 0.0;
    for (r, row) in want.iter().enumerate() {
        for c in 0..n {
            let i = r * n + c;
            let Some(row) = row else {
                let untouched = match dtype.bytes() {
                    2 => out.get::<2>(i) == [0x5A; 2],
                    _ => out.get::<4>(i) == [0x5A; 4],
                };
                if !untouched {
                    return Err(format!("row {r} belongs to no tile, yet column {c} was written"));
                }
                continue;
            };
            let got = decode(dtype, out, i);
            let error = (got - row[c]).abs();
            if error.is_nan() || error > rounding * 1.001 * row[c].abs() + 1e-5 * mean {
                return Err(format!("row {r} column {c}: got {got}, want {}", row[c]));
            }
            squares += error * error;
        }
    }
    let error = squares.sqrt() / norm.max(f64::MIN_POSITIVE);
    if error > rounding + 1e-6 { Err(format!("relative error {error:e} of the whole")) } else { Ok(()) }
}

/// Every shared memory access of the main loops, of which a block takes one, takes as few wavefronts as its bytes need.
fn conflicts(ptx: &str, counters: &Counters) -> Result<(), String> {
    let lines: Vec<&str> = ptx.lines().map(str::trim).collect();
    let mut requests = 0;
    for (start, label) in lines.iter().enumerate().filter(|(_, line)| line.starts_with("MAIN") && line.ends_with(':')) {
        let branch = format!("@%more bra {};", label.trim_end_matches(':'));
        let length = lines[start..].iter().position(|line| *line == branch).expect("the loop's branch");
        for (number, text) in lines.iter().enumerate().skip(start).take(length) {
            let shared = counters.lines[number].shared;
            if shared.wavefronts != shared.ideal_wavefronts {
                return Err(format!("line {}: `{text}`: bank conflicts, {shared:?}", number + 1));
            }
            requests += shared.requests;
        }
    }
    if requests == 0 { Err("the main loop's shared accesses were not counted".into()) } else { Ok(()) }
}

/// Shapes with every kind of edge: less than a stage, a remainder, more stages than slots; part of a column tile, several;
/// no row, one, less than a tile, several tiles.
fn run(dtype: Dtype, height: u32) {
    let variants = registry::all().into_iter().filter_map(|kernel| match kernel {
        Kernel::Gemm(gemm) if gemm.dtype == dtype && gemm.tile.bm == height => Some(gemm),
        _ => None,
    });
    let mut failures = Vec::new();
    for (index, gemm) in variants.enumerate() {
        let activations: &[u32] = match gemm.fold {
            Fold::Plain => &[0, 1, 2, 3, 4, 6],
            _ => &[1, 2, 3, 4, 5, 6, SWIGLU, SWIGLU_AFTER, SWIGLU_CAPPED],
        };
        let shapes: [(usize, usize, &'static [usize], bool); 5] = [
            (8, 8, &[1], false),
            (24, 40, &[0, 17, 3], true),
            (136, 72, &[15, 0, 20], true),
            (24, 136, &[0, 1, 15, 17, 128, 200], true),
            (136, 1000, &[33], false),
        ];
        for (i, (n, k, rows, grouped)) in shapes.into_iter().enumerate() {
            let activation = activations[(i + 5 * index) % activations.len()];
            let case = Case { n, k, rows, grouped, scaled: (i + index) % 2 == 0, biased: i % 4 < 2, activation };
            let seed = 1000 * index as u64 + i as u64;
            if let Err(message) = check(gemm, &case, seed) {
                failures.push(format!("{} seed {seed} {case:?}: {message}", Kernel::Gemm(gemm).name()));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn bf16_128_rows() {
    run(Dtype::Bf16, 128);
}

#[test]
fn bf16_64_rows() {
    run(Dtype::Bf16, 64);
}

#[test]
fn bf16_16_rows() {
    run(Dtype::Bf16, 16);
}

#[test]
fn f16_128_rows() {
    run(Dtype::F16, 128);
}

#[test]
fn f16_64_rows() {
    run(Dtype::F16, 64);
}

#[test]
fn f16_16_rows() {
    run(Dtype::F16, 16);
}

#[test]
fn f32_64_rows() {
    run(Dtype::F32, 64);
}

#[test]
fn f32_16_rows() {
    run(Dtype::F32, 16);
}
