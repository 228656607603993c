//! Where the elements of a matrix lie that a 64-bit descriptor names (PTX ISA 9.7.15.5.1.2, "Shared Memory Matrix Layout",
//! "Strides" and "Matrix Descriptor Format").
//!
//! Shared memory is taken 16 bytes at a time: a chunk is 16 bytes of consecutive K (K-major) or of consecutive M or N
//! (MN-major). With W the bytes of the swizzle mode (16 for none), r a row of K-major order, k of MN-major order, and c a
//! chunk along the major dimension, a chunk starts at
//!
//! ```text
//! K-major:   start + r/8 * stride + r%8 * W + (W = 16: c * leading;  else c * 16)
//! MN-major:  W = 16:  start + c * stride + k/8 * leading + k%8 * 16
//!            else     start + c/(W/16) * leading + c%(W/16) * 16 + k/8 * stride + k%8 * W
//! ```
//!
//! and the swizzle then exchanges the chunks of each 128-byte line: with W = 32, 64 or 128 the lowest 1, 2 or 3 bits of the
//! chunk's number within the line are flipped where those of the line's number are set, lines being counted from where the
//! pattern starts, which is an address that is a multiple of 8 W unless the base offset says otherwise.

/// Bytes that always lie together.
pub const CHUNK: u32 = 16;

/// A descriptor, taken apart; bytes throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    pub start: u32,
    /// Leading dimension byte offset.
    pub leading: u32,
    /// Stride dimension byte offset.
    pub stride: u32,
    /// Lines of 128 bytes by which the start of the swizzle pattern is off a multiple of its size.
    pub base_offset: u32,
    /// 16 (none), 32, 64 or 128.
    pub swizzle: u32,
}

/// Bits that the manual gives no meaning.
const UNDEFINED: u64 = 0x3ff1_c000_c000_c000;

/// Chunks as [`Descriptor::chunks`] gives them, in the order of core matrices (PTX ISA 9.7.15.5.1.2, "Core matrices"): 8 rows of
/// 16 bytes, a row being one of M or N if K-major, a step of K if MN-major.
pub fn by_core_matrix(chunks: &[u32], mn_major: bool) -> impl Iterator<Item = u32> {
    let across = if mn_major { chunks.len() / 16 } else { 2 };
    let rows = chunks.len() / across.max(1);
    let matrices = (0..rows / 8).flat_map(move |r| (0..across).map(move |c| (8 * r, c)));
    matrices.flat_map(move |(r, c)| (r..r + 8).map(move |r| chunks[r * across + c]))
}

impl Descriptor {
    /// # Errors
    /// What is wrong with the number.
    pub fn new(bits: u64) -> Result<Self, String> {
        if bits & UNDEFINED != 0 {
            return Err(format!("matrix descriptor {bits:#018x}: bits {:#x} have no meaning", bits & UNDEFINED));
        }
        let field = |from: u32| (bits >> from) as u32 & 0x3fff;
        let swizzle = [16, 128, 64, 32][(bits >> 62) as usize];
        let base_offset = (bits >> 49) as u32 & 7;
        if swizzle == CHUNK && base_offset != 0 {
            return Err(format!("matrix descriptor {bits:#018x}: a base offset of {base_offset} without swizzle"));
        }
        Ok(Self { start: field(0) << 4, leading: field(16) << 4, stride: field(32) << 4, base_offset, swizzle })
    }

    /// Row `row` (of M or N), chunk `chunk` along K.
    #[inline(always)]
    pub fn k_major(&self, row: u32, chunk: u32) -> u32 {
        let step = if self.swizzle == CHUNK { self.leading } else { CHUNK };
        self.swizzled(self.start + row / 8 * self.stride + row % 8 * self.swizzle + chunk * step)
    }

    /// Step `k` of K, chunk `chunk` along M or N.
    #[inline(always)]
    pub fn mn_major(&self, k: u32, chunk: u32) -> u32 {
        let wide = self.swizzle / CHUNK;
        let (along_chunks, along_k) = if wide == 1 { (self.stride, self.leading) } else { (self.leading, self.stride) };
        let chunks = chunk / wide * along_chunks + chunk % wide * CHUNK;
        self.swizzled(self.start + chunks + k / 8 * along_k + k % 8 * self.swizzle)
    }

    #[inline(always)]
    fn swizzled(&self, address: u32) -> u32 {
        let line = (address >> 7).wrapping_sub(self.base_offset);
        address ^ (line & (self.swizzle / CHUNK - 1)) << 4
    }

    /// Addresses of all chunks of `rows` (of M or N) by K, 32 bytes deep in K: by row and then along K if K-major, by step
    /// of K and then along M or N if MN-major, where elements have 16 bits.
    pub fn chunks(&self, rows: u32, mn_major: bool, to: &mut Vec<u32>) {
        to.clear();
        if mn_major {
            to.extend((0..16).flat_map(|k| (0..rows / 8).map(move |c| self.mn_major(k, c))));
        } else {
            to.extend((0..rows).flat_map(|r| [self.k_major(r, 0), self.k_major(r, 1)]));
        }
    }
}
