//! Integer instructions that need more than one expression (PTX ISA 9.7.1, 9.7.8, 9.7.9).

/// 48-bit product of the low 24 bits.
pub fn mul24_u(a: u32, b: u32) -> u64 {
    u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff)
}

/// 48-bit product of the low 24 bits taken as signed.
pub fn mul24_s(a: i32, b: i32) -> i64 {
    i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8)
}

/// Applies `f` to the two 16-bit halves.
pub fn pairs(a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
    u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
}

/// Position of the n-th set bit from `base`, upwards for n > 0, downwards for n < 0; all ones where there is none.
pub fn fns(mask: u32, base: u32, offset: i32) -> u32 {
    let base = base & 31;
    let mut left = offset.unsigned_abs();
    if left == 0 {
        return if mask >> base & 1 == 1 { base } else { u32::MAX };
    }
    let mut position = base as i32;
    while (0..32).contains(&position) {
        if mask >> position & 1 == 1 {
            left -= 1;
            if left == 0 {
                return position as u32;
            }
        }
        position += offset.signum();
    }
    u32::MAX
}

#[inline(always)]
pub fn bfe_u32(a: u32, pos: u32, len: u32) -> u32 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let field = if pos > 31 { 0 } else { a >> (pos & 31) };
    if len > 31 { field } else { field & ((1 << (len & 31)) - 1) }
}

/// As [`bfe_s64`].
#[inline(always)]
pub fn bfe_s32(a: i32, pos: u32, len: u32) -> i32 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let field = a >> pos.min(31);
    let drop = (32 - len.min(32)) & 31;
    if len == 0 { 0 } else { field << drop >> drop }
}

#[inline(always)]
pub fn bfe_u64(a: u64, pos: u32, len: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    let field = if pos > 63 { 0 } else { a >> (pos & 63) };
    if len > 63 { field } else { field & ((1 << (len & 63)) - 1) }
}

/// The field's top bit fills the rest; a field that reaches past the source takes the source's sign.
#[inline(always)]
pub fn bfe_s64(a: i64, pos: u32, len: u32) -> i64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    if len == 0 {
        return 0;
    }
    let field = a >> pos.min(63);
    let drop = 64 - len.min(64);
    field << drop >> drop
}

/// Bits `pos .. pos + len` of a register of `width` bits.
#[inline(always)]
pub fn bfi_mask(pos: u32, len: u32, width: u32) -> u64 {
    let (pos, len) = (pos & 0xff, len & 0xff);
    if pos >= width {
        return 0;
    }
    let ones = if len >= 64 { u64::MAX } else { (1 << len) - 1 };
    ones << pos
}

/// Sign-extends the low `bits` of `a`.
pub fn sign_extend(a: i32, bits: u32) -> i32 {
    if bits == 0 { 0 } else { a << (32 - bits) >> (32 - bits) }
}

/// `len` ones from bit `pos`.
pub fn bmsk(pos: u32, len: u32) -> u32 {
    ((((1u64 << len) - 1) << pos) & 0xffff_ffff) as u32
}

fn byte<const SIGNED: bool>(a: u32, i: u32) -> i32 {
    let b = (a >> (8 * i)) as u8;
    if SIGNED { i32::from(b as i8) } else { i32::from(b) }
}

/// Four-way dot product of bytes, added to `c` modulo 2^32.
pub fn dp4a<const SA: bool, const SB: bool>(a: u32, b: u32, c: u32) -> u32 {
    (0..4).fold(c, |sum, i| sum.wrapping_add((byte::<SA>(a, i) * byte::<SB>(b, i)) as u32))
}

/// Two-way dot product of 16-bit halves of `a` with the low two bytes of `b`.
pub fn dp2a<const SA: bool, const SB: bool>(a: u32, b: u32, c: u32) -> u32 {
    let half = |i: u32| {
        let h = (a >> (16 * i)) as u16;
        if SA { i32::from(h as i16) } else { i32::from(h) }
    };
    (0..2).fold(c, |sum, i| sum.wrapping_add(half(i).wrapping_mul(byte::<SB>(b, i)) as u32))
}

/// Default mode: each selector nibble picks a byte of `{b, a}`; its top bit replicates that byte's sign.
#[inline(always)]
pub fn prmt(a: u32, b: u32, selector: u32) -> u32 {
    let pool = u64::from(a) | u64::from(b) << 32;
    let mut out = 0;
    for i in 0..4 {
        let s = selector >> (4 * i);
        let byte = (pool >> (8 * (s & 7))) as u32 & 0xff;
        let sign = (byte >> 7) * 0xff;
        out |= (if s & 8 != 0 { sign } else { byte }) << (8 * i);
    }
    out
}

pub fn prmt_f4e(a: u32, b: u32, c: u32) -> u32 {
    ((u64::from(a) | u64::from(b) << 32) >> (8 * (c & 3))) as u32
}

pub fn prmt_b4e(a: u32, b: u32, c: u32) -> u32 {
    let n = c & 3;
    let pool = u64::from(a) | u64::from(b) << 32;
    (0..4).fold(0, |out, i| out | (((pool >> (8 * ((n + 8 - i) & 7))) as u32 & 0xff) << (8 * i)))
}

pub fn prmt_rc8(a: u32, c: u32) -> u32 {
    ((a >> (8 * (c & 3))) & 0xff) * 0x0101_0101
}

/// Edge clamp left: bytes below position `c` are byte `c`.
pub fn prmt_ecl(a: u32, c: u32) -> u32 {
    let n = c & 3;
    (0..4).fold(0, |out, i| out | ((a >> (8 * i.max(n)) & 0xff) << (8 * i)))
}

/// Edge clamp right: bytes above position `c` are byte `c`.
pub fn prmt_ecr(a: u32, c: u32) -> u32 {
    let n = c & 3;
    (0..4).fold(0, |out, i| out | ((a >> (8 * i.min(n)) & 0xff) << (8 * i)))
}

pub fn prmt_rc16(a: u32, c: u32) -> u32 {
    ((a >> (16 * (c & 1))) & 0xffff) * 0x0001_0001
}
