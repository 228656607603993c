//! Tensor maps (PTX ISA 5.5.8): the 128-byte objects that describe a tensor in global memory and how tiles of it are accessed.
//!
//! The bytes are opaque to programs. This device's layout: the address; from byte 8 on rank less one, element type, swizzle
//! mode, fill mode, interleave layout, L2 promotion; at 16 five extents of 32 bits (0 stands for 2³²); at 36 four strides of
//! 64 bits; at 68 five box extents of 16 bits; at 78 five element strides of 8 bits; at 120 a checksum, zero for 120 zero
//! bytes. A zeroed object is one whose fields `tensormap.replace` may set one after another; bytes that anything else has
//! written do not fit the checksum.

use crate::ptx::ast::Type;

/// Bytes of a tensor map.
pub const BYTES: usize = 128;
/// Dimensions, at most.
pub const MAX_RANK: usize = 5;
const CHECKED: usize = 120;

/// Types of elements, numbered as `tensormap.replace` does (PTX ISA table 33).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Element {
    U8,
    U16,
    U32,
    S32,
    U64,
    S64,
    F16,
    F32,
    F32Flush,
    F64,
    BF16,
    TF32,
    TF32Flush,
}

impl Element {
    pub const ALL: [Element; 13] = [
        Element::U8,
        Element::U16,
        Element::U32,
        Element::S32,
        Element::U64,
        Element::S64,
        Element::F16,
        Element::F32,
        Element::F32Flush,
        Element::F64,
        Element::BF16,
        Element::TF32,
        Element::TF32Flush,
    ];

    pub fn bytes(self) -> u32 {
        self.ty().bytes()
    }

    /// The type as arithmetic has it.
    pub fn ty(self) -> Type {
        match self {
            Self::U8 => Type::U8,
            Self::U16 => Type::U16,
            Self::U32 => Type::U32,
            Self::S32 => Type::S32,
            Self::U64 => Type::U64,
            Self::S64 => Type::S64,
            Self::F16 => Type::F16,
            Self::F32 | Self::F32Flush | Self::TF32 | Self::TF32Flush => Type::F32,
            Self::F64 => Type::F64,
            Self::BF16 => Type::BF16,
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self.ty(), Type::F16 | Type::BF16 | Type::F32 | Type::F64)
    }
}

/// Permutation of a tile's 16-byte chunks in shared memory (PTX ISA 5.5.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Swizzle {
    None,
    B32,
    B64,
    B128,
}

impl Swizzle {
    pub const ALL: [Swizzle; 4] = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];

    /// Bytes within which chunks are permuted.
    pub fn span(self) -> u32 {
        match self {
            Self::None => 16,
            Self::B32 => 32,
            Self::B64 => 64,
            Self::B128 => 128,
        }
    }

    /// Where a byte of shared memory goes: the number of the 128-byte line is added, without carry, to that of the chunk.
    pub fn apply(self, offset: u64) -> u64 {
        offset ^ offset >> 3 & u64::from(self.span() - 16)
    }
}

/// What a tensor map says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap {
    pub address: u64,
    pub element: Element,
    /// 1 to 5.
    pub rank: usize,
    /// Extents in elements, the innermost first.
    pub dims: [u64; MAX_RANK],
    /// Distances in bytes between neighbours along each dimension but the innermost.
    pub strides: [u64; MAX_RANK - 1],
    /// Extents of the box in elements of the tensor.
    pub tile: [u32; MAX_RANK],
    /// Every how many elements one is taken.
    pub steps: [u32; MAX_RANK],
    pub swizzle: Swizzle,
    /// Elements outside the tensor read as NaN instead of zero.
    pub fill_nan: bool,
    /// 0: none. Others are kept, for `tensormap.replace`, and refused at use.
    pub interleave: u8,
    /// `CUtensorMapL2promotion`, which changes no result.
    pub promotion: u8,
}

/// Why bytes are no usable tensor map.
pub type Flaw = String;

impl TensorMap {
    /// The object's bytes.
    pub fn encode(&self) -> [u8; BYTES] {
        let mut b = [0; BYTES];
        b[..8].copy_from_slice(&self.address.to_le_bytes());
        b[8] = self.rank as u8 - 1;
        b[9] = self.element as u8;
        b[10] = self.swizzle as u8;
        b[11] = self.fill_nan.into();
        b[12] = self.interleave;
        b[13] = self.promotion;
        for i in 0..MAX_RANK {
            b[16 + 4 * i..][..4].copy_from_slice(&(self.dims[i] as u32).to_le_bytes());
            b[68 + 2 * i..][..2].copy_from_slice(&(self.tile[i] as u16).to_le_bytes());
            b[78 + i] = self.steps[i] as u8;
        }
        for (i, stride) in self.strides.iter().enumerate() {
            b[36 + 8 * i..][..8].copy_from_slice(&stride.to_le_bytes());
        }
        seal(&mut b);
        b
    }

    /// What the bytes say.
    ///
    /// # Errors
    /// They are not a tensor map, or one that no tensor has.
    pub fn decode(b: &[u8; BYTES]) -> Result<TensorMap, Flaw> {
        if !is_sealed(b) {
            return Err("its bytes are not those of a tensor map".into());
        }
        let four = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let eight = |i: usize| u64::from(four(i)) | u64::from(four(i + 4)) << 32;
        let rank = usize::from(b[8]) + 1;
        let field = |what: &str, value: u8| format!("its {what} is {value}");
        if rank > MAX_RANK {
            return Err(format!("its rank is {rank}"));
        }
        let map = TensorMap {
            address: eight(0),
            element: *Element::ALL.get(usize::from(b[9])).ok_or_else(|| field("element type", b[9]))?,
            rank,
            dims: std::array::from_fn(|i| match four(16 + 4 * i) {
                0 => 1 << 32,
                n => n.into(),
            }),
            strides: std::array::from_fn(|i| eight(36 + 8 * i)),
            tile: std::array::from_fn(|i| u16::from_le_bytes([b[68 + 2 * i], b[69 + 2 * i]]).into()),
            steps: std::array::from_fn(|i| b[78 + i].into()),
            swizzle: *Swizzle::ALL.get(usize::from(b[10])).ok_or_else(|| field("swizzle mode", b[10]))?,
            fill_nan: b[11] == 1,
            interleave: b[12],
            promotion: b[13],
        };
        map.check()?;
        Ok(map)
    }

    /// The requirements of the driver API's reference for `cuTensorMapEncodeTiled`.
    ///
    /// # Errors
    /// The first that does not hold, with the argument's name there.
    pub fn check(&self) -> Result<(), Flaw> {
        let size = u64::from(self.element.bytes());
        let bad = |text: String| Err(text);
        if self.interleave != 0 {
            return bad(format!("interleave {}: interleaved layouts are not implemented", self.interleave));
        }
        if !(1..=MAX_RANK).contains(&self.rank) {
            return bad(format!("tensorRank is {}; 1 to {MAX_RANK} are possible", self.rank));
        }
        if !self.address.is_multiple_of(16) {
            return bad(format!("globalAddress {:#x} is not a multiple of 16", self.address));
        }
        for i in 0..self.rank {
            if !(1..=1 << 32).contains(&self.dims[i]) {
                return bad(format!("globalDim[{i}] is {}; 1 to 2^32 are possible", self.dims[i]));
            }
            if !(1..=256).contains(&self.tile[i]) {
                return bad(format!("boxDim[{i}] is {}; 1 to 256 are possible", self.tile[i]));
            }
            // That of the innermost dimension is ignored.
            if i > 0 && !(1..=8).contains(&self.steps[i]) {
                return bad(format!("elementStrides[{i}] is {}; 1 to 8 are possible", self.steps[i]));
            }
        }
        for (i, &stride) in self.strides[..self.rank - 1].iter().enumerate() {
            if !stride.is_multiple_of(16) || stride >= 1 << 40 {
                return bad(format!("globalStrides[{i}] is {stride}; a multiple of 16 below 2^40 is expected"));
            }
        }
        let inner = u64::from(self.tile[0]) * size;
        if !inner.is_multiple_of(16) {
            return bad(format!("boxDim[0] of {} elements is {inner} bytes, no multiple of 16", self.tile[0]));
        }
        if self.swizzle != Swizzle::None && inner > self.swizzle.span().into() {
            return bad(format!(
                "boxDim[0] of {} elements is {inner} bytes, more than the {} of the swizzle",
                self.tile[0],
                self.swizzle.span()
            ));
        }
        if self.fill_nan && !self.element.is_float() {
            return bad(format!("oobFill asks for NaN, which elements of {:?} do not have", self.element));
        }
        Ok(())
    }

    /// Elements that a tile has along a dimension.
    pub fn extent(&self, dim: usize) -> u32 {
        if dim == 0 { self.tile[0] } else { self.tile[dim].div_ceil(self.steps[dim]) }
    }

    /// Bytes of a tile in shared memory.
    pub fn tile_bytes(&self) -> u64 {
        (0..self.rank).map(|i| u64::from(self.extent(i))).product::<u64>() * u64::from(self.element.bytes())
    }
}

fn checksum(b: &[u8; BYTES]) -> u64 {
    // FNV-1a, less its value for zeros.
    let hash = |bytes: &mut dyn Iterator<Item = u8>| {
        bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, x| (h ^ u64::from(x)).wrapping_mul(0x0100_0000_01b3))
    };
    hash(&mut b[..CHECKED].iter().copied()) ^ hash(&mut std::iter::repeat_n(0, CHECKED))
}

/// Sets the checksum.
pub fn seal(b: &mut [u8; BYTES]) {
    let sum = checksum(b);
    b[CHECKED..].copy_from_slice(&sum.to_le_bytes());
}

/// Whether the bytes are those of a tensor map, or zero.
pub fn is_sealed(b: &[u8; BYTES]) -> bool {
    b[CHECKED..] == checksum(b).to_le_bytes()
}

/// A field that `tensormap.replace` sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Address,
    Rank,
    BoxDim(usize),
    Dim(usize),
    Stride(usize),
    Step(usize),
    Element,
    Interleave,
    Swizzle,
    Fill,
}

impl Field {
    /// Replaces the field in an object's bytes.
    ///
    /// # Errors
    /// The bytes are neither a tensor map nor zero, or the value is none that the field can have.
    pub fn replace(self, b: &mut [u8; BYTES], value: u64) -> Result<(), Flaw> {
        if !is_sealed(b) {
            return Err("its bytes are not those of a tensor map, nor zero".into());
        }
        let within = |what: &str, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(format!("a new {what} of {value}; {low} to {high} are possible"))
            }
        };
        match self {
            Self::Address => b[..8].copy_from_slice(&value.to_le_bytes()),
            Self::Rank => {
                within("rank less one", 0, 4)?;
                b[8] = value as u8;
            }
            Self::BoxDim(i) => {
                within("box_dim", 1, 256)?;
                b[68 + 2 * i..][..2].copy_from_slice(&(value as u16).to_le_bytes());
            }
            Self::Dim(i) => b[16 + 4 * i..][..4].copy_from_slice(&(value as u32).to_le_bytes()),
            // An innermost stride is accepted by the assembler; there are four.
            Self::Stride(i) if i < MAX_RANK - 1 => b[36 + 8 * i..][..8].copy_from_slice(&value.to_le_bytes()),
            Self::Stride(i) => return Err(format!("global_stride {i}; there are {}", MAX_RANK - 1)),
            Self::Step(i) => {
                within("element_stride", 1, 8)?;
                b[78 + i] = value as u8;
            }
            Self::Element => b[9] = value as u8,
            Self::Swizzle => b[10] = value as u8,
            Self::Fill => b[11] = value as u8,
            Self::Interleave => b[12] = value as u8,
        }
        seal(b);
        Ok(())
    }
}
