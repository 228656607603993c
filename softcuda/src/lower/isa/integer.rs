//! Integer, logic and move rows (PTX ISA 9.7.1, 9.7.2, 9.7.8, 9.7.9).

/// See [`super`] for the row format.
macro_rules! integer_ops {
    ($next:ident! ( $($rows:tt)* )) => { $next! { $($rows)*
        fast Integer "add.u16 add.s16" Add16(a: u16, b: u16) -> u16 { a.wrapping_add(b) }
        fast Integer "add.u32 add.s32" Add32(a: u32, b: u32) -> u32 { a.wrapping_add(b) }
        fast Integer "add.u64 add.s64" Add64(a: u64, b: u64) -> u64 { a.wrapping_add(b) }
        fast Integer "add.sat.s32" AddSatS32(a: i32, b: i32) -> i32 { a.saturating_add(b) }
        fast Integer "add.u16x2 add.s16x2" Add16x2(a: u32, b: u32) -> u32 {
            (a.wrapping_add(b) & 0xffff) | ((a & 0xffff_0000).wrapping_add(b & 0xffff_0000))
        }
        fast Integer "sub.u16 sub.s16" Sub16(a: u16, b: u16) -> u16 { a.wrapping_sub(b) }
        fast Integer "sub.u32 sub.s32" Sub32(a: u32, b: u32) -> u32 { a.wrapping_sub(b) }
        fast Integer "sub.u64 sub.s64" Sub64(a: u64, b: u64) -> u64 { a.wrapping_sub(b) }
        fast Integer "sub.sat.s32" SubSatS32(a: i32, b: i32) -> i32 { a.saturating_sub(b) }

        fast Integer "mul.lo.u16 mul.lo.s16" MulLo16(a: u16, b: u16) -> u16 { a.wrapping_mul(b) }
        fast Integer "mul.lo.u32 mul.lo.s32" MulLo32(a: u32, b: u32) -> u32 { a.wrapping_mul(b) }
        fast Integer "mul.lo.u64 mul.lo.s64" MulLo64(a: u64, b: u64) -> u64 { a.wrapping_mul(b) }
        fast Integer "mul.hi.u16" MulHiU16(a: u16, b: u16) -> u16 { ((u32::from(a) * u32::from(b)) >> 16) as u16 }
        fast Integer "mul.hi.s16" MulHiS16(a: i16, b: i16) -> i16 { ((i32::from(a) * i32::from(b)) >> 16) as i16 }
        fast Integer "mul.hi.u32" MulHiU32(a: u32, b: u32) -> u32 { ((u64::from(a) * u64::from(b)) >> 32) as u32 }
        fast Integer "mul.hi.s32" MulHiS32(a: i32, b: i32) -> i32 { ((i64::from(a) * i64::from(b)) >> 32) as i32 }
        slow Integer "mul.hi.u64" MulHiU64(a: u64, b: u64) -> u64 { ((u128::from(a) * u128::from(b)) >> 64) as u64 }
        slow Integer "mul.hi.s64" MulHiS64(a: i64, b: i64) -> i64 { ((i128::from(a) * i128::from(b)) >> 64) as i64 }
        fast Integer "mul.wide.u16" MulWideU16(a: u16, b: u16) -> u32 { u32::from(a) * u32::from(b) }
        fast Integer "mul.wide.s16" MulWideS16(a: i16, b: i16) -> i32 { i32::from(a) * i32::from(b) }
        fast Integer "mul.wide.u32" MulWideU32(a: u32, b: u32) -> u64 { u64::from(a) * u64::from(b) }
        fast Integer "mul.wide.s32" MulWideS32(a: i32, b: i32) -> i64 { i64::from(a) * i64::from(b) }

        fast Integer "mad.lo.u16 mad.lo.s16" MadLo16(a: u16, b: u16, c: u16) -> u16 { a.wrapping_mul(b).wrapping_add(c) }
        fast Integer "mad.lo.u32 mad.lo.s32" MadLo32(a: u32, b: u32, c: u32) -> u32 { a.wrapping_mul(b).wrapping_add(c) }
        fast Integer "mad.lo.u64 mad.lo.s64" MadLo64(a: u64, b: u64, c: u64) -> u64 { a.wrapping_mul(b).wrapping_add(c) }
        fast Integer "mad.hi.u16" MadHiU16(a: u16, b: u16, c: u16) -> u16 {
            (((u32::from(a) * u32::from(b)) >> 16) as u16).wrapping_add(c)
        }
        fast Integer "mad.hi.s16" MadHiS16(a: i16, b: i16, c: i16) -> i16 {
            (((i32::from(a) * i32::from(b)) >> 16) as i16).wrapping_add(c)
        }
        fast Integer "mad.hi.u32" MadHiU32(a: u32, b: u32, c: u32) -> u32 {
            (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c)
        }
        fast Integer "mad.hi.s32" MadHiS32(a: i32, b: i32, c: i32) -> i32 {
            (((i64::from(a) * i64::from(b)) >> 32) as i32).wrapping_add(c)
        }
        slow Integer "mad.hi.sat.s32" MadHiSatS32(a: i32, b: i32, c: i32) -> i32 {
            (((i64::from(a) * i64::from(b)) >> 32) as i32).saturating_add(c)
        }
        slow Integer "mad.hi.u64" MadHiU64(a: u64, b: u64, c: u64) -> u64 {
            (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c)
        }
        slow Integer "mad.hi.s64" MadHiS64(a: i64, b: i64, c: i64) -> i64 {
            (((i128::from(a) * i128::from(b)) >> 64) as i64).wrapping_add(c)
        }
        fast Integer "mad.wide.u16" MadWideU16(a: u16, b: u16, c: u32) -> u32 { (u32::from(a) * u32::from(b)).wrapping_add(c) }
        fast Integer "mad.wide.s16" MadWideS16(a: i16, b: i16, c: i32) -> i32 { (i32::from(a) * i32::from(b)).wrapping_add(c) }
        fast Integer "mad.wide.u32" MadWideU32(a: u32, b: u32, c: u64) -> u64 { (u64::from(a) * u64::from(b)).wrapping_add(c) }
        fast Integer "mad.wide.s32" MadWideS32(a: i32, b: i32, c: i64) -> i64 { (i64::from(a) * i64::from(b)).wrapping_add(c) }
        slow Integer "mul24.lo.u32" Mul24LoU32(a: u32, b: u32) -> u32 { int::mul24_u(a, b) as u32 }
        slow Integer "mul24.lo.s32" Mul24LoS32(a: i32, b: i32) -> i32 { int::mul24_s(a, b) as i32 }
        slow Integer "mul24.hi.u32" Mul24HiU32(a: u32, b: u32) -> u32 { (int::mul24_u(a, b) >> 16) as u32 }
        slow Integer "mul24.hi.s32" Mul24HiS32(a: i32, b: i32) -> i32 { (int::mul24_s(a, b) >> 16) as i32 }
        slow Integer "mad24.lo.u32" Mad24LoU32(a: u32, b: u32, c: u32) -> u32 { (int::mul24_u(a, b) as u32).wrapping_add(c) }
        slow Integer "mad24.lo.s32" Mad24LoS32(a: i32, b: i32, c: i32) -> i32 { (int::mul24_s(a, b) as i32).wrapping_add(c) }
        slow Integer "mad24.hi.u32" Mad24HiU32(a: u32, b: u32, c: u32) -> u32 { ((int::mul24_u(a, b) >> 16) as u32).wrapping_add(c) }
        slow Integer "mad24.hi.s32" Mad24HiS32(a: i32, b: i32, c: i32) -> i32 { ((int::mul24_s(a, b) >> 16) as i32).wrapping_add(c) }
        slow Integer "mad24.hi.sat.s32" Mad24HiSatS32(a: i32, b: i32, c: i32) -> i32 {
            ((int::mul24_s(a, b) >> 16) as i32).saturating_add(c)
        }

        fast Integer "" AddCarry32(a: u32, b: u32, c: bool) -> u32 { a.wrapping_add(b).wrapping_add(u32::from(c)) }
        fast Integer "" CarryOut32(a: u32, b: u32, c: bool) -> bool { (u64::from(a) + u64::from(b) + u64::from(c)) >> 32 != 0 }
        fast Integer "" AddCarry64(a: u64, b: u64, c: bool) -> u64 { a.wrapping_add(b).wrapping_add(u64::from(c)) }
        slow Integer "" CarryOut64(a: u64, b: u64, c: bool) -> bool { (u128::from(a) + u128::from(b) + u128::from(c)) >> 64 != 0 }
        // A difference is a sum with the complement: the carry is set where nothing is borrowed.
        fast Integer "" SubCarry32(a: u32, b: u32, c: bool) -> u32 { a.wrapping_add(!b).wrapping_add(u32::from(c)) }
        fast Integer "" SubCarryOut32(a: u32, b: u32, c: bool) -> bool { (u64::from(a) + u64::from(!b) + u64::from(c)) >> 32 != 0 }
        fast Integer "" SubCarry64(a: u64, b: u64, c: bool) -> u64 { a.wrapping_add(!b).wrapping_add(u64::from(c)) }
        slow Integer "" SubCarryOut64(a: u64, b: u64, c: bool) -> bool { (u128::from(a) + u128::from(!b) + u128::from(c)) >> 64 != 0 }

        fast Integer "sad.u16" SadU16(a: u16, b: u16, c: u16) -> u16 { c.wrapping_add(a.abs_diff(b)) }
        fast Integer "sad.s16" SadS16(a: i16, b: i16, c: u16) -> u16 { c.wrapping_add(a.abs_diff(b)) }
        fast Integer "sad.u32" SadU32(a: u32, b: u32, c: u32) -> u32 { c.wrapping_add(a.abs_diff(b)) }
        fast Integer "sad.s32" SadS32(a: i32, b: i32, c: u32) -> u32 { c.wrapping_add(a.abs_diff(b)) }
        fast Integer "sad.u64" SadU64(a: u64, b: u64, c: u64) -> u64 { c.wrapping_add(a.abs_diff(b)) }
        fast Integer "sad.s64" SadS64(a: i64, b: i64, c: u64) -> u64 { c.wrapping_add(a.abs_diff(b)) }
        slow Integer "div.u16" DivU16(a: u16, b: u16) -> u16 { a.checked_div(b).unwrap_or(u16::MAX) }
        slow Integer "div.s16" DivS16(a: i16, b: i16) -> i16 { if b == 0 { -1 } else { a.wrapping_div(b) } }
        slow Integer "div.u32" DivU32(a: u32, b: u32) -> u32 { a.checked_div(b).unwrap_or(u32::MAX) }
        slow Integer "div.s32" DivS32(a: i32, b: i32) -> i32 { if b == 0 { -1 } else { a.wrapping_div(b) } }
        slow Integer "div.u64" DivU64(a: u64, b: u64) -> u64 { a.checked_div(b).unwrap_or(u64::MAX) }
        slow Integer "div.s64" DivS64(a: i64, b: i64) -> i64 { if b == 0 { -1 } else { a.wrapping_div(b) } }
        slow Integer "rem.u16" RemU16(a: u16, b: u16) -> u16 { if b == 0 { a } else { a % b } }
        slow Integer "rem.s16" RemS16(a: i16, b: i16) -> i16 { if b == 0 { a } else { a.wrapping_rem(b) } }
        slow Integer "rem.u32" RemU32(a: u32, b: u32) -> u32 { if b == 0 { a } else { a % b } }
        slow Integer "rem.s32" RemS32(a: i32, b: i32) -> i32 { if b == 0 { a } else { a.wrapping_rem(b) } }
        slow Integer "rem.u64" RemU64(a: u64, b: u64) -> u64 { if b == 0 { a } else { a % b } }
        slow Integer "rem.s64" RemS64(a: i64, b: i64) -> i64 { if b == 0 { a } else { a.wrapping_rem(b) } }
        fast Integer "abs.s16" AbsS16(a: i16) -> i16 { a.wrapping_abs() }
        fast Integer "abs.s32" AbsS32(a: i32) -> i32 { a.wrapping_abs() }
        fast Integer "abs.s64" AbsS64(a: i64) -> i64 { a.wrapping_abs() }
        fast Integer "neg.s16" NegS16(a: i16) -> i16 { a.wrapping_neg() }
        fast Integer "neg.s32" NegS32(a: i32) -> i32 { a.wrapping_neg() }
        fast Integer "neg.s64" NegS64(a: i64) -> i64 { a.wrapping_neg() }
        fast Integer "min.u16" MinU16(a: u16, b: u16) -> u16 { a.min(b) }
        fast Integer "min.s16" MinS16(a: i16, b: i16) -> i16 { a.min(b) }
        fast Integer "min.u32" MinU32(a: u32, b: u32) -> u32 { a.min(b) }
        fast Integer "min.s32" MinS32(a: i32, b: i32) -> i32 { a.min(b) }
        fast Integer "min.relu.s32" MinReluS32(a: i32, b: i32) -> i32 { a.min(b).max(0) }
        slow Integer "min.relu.s16x2" MinReluS16x2(a: u32, b: u32) -> u32 { int::pairs(a, b, |x, y| (x as i16).min(y as i16).max(0) as u16) }
        slow Integer "max.relu.s16x2" MaxReluS16x2(a: u32, b: u32) -> u32 { int::pairs(a, b, |x, y| (x as i16).max(y as i16).max(0) as u16) }
        fast Integer "min.u64" MinU64(a: u64, b: u64) -> u64 { a.min(b) }
        fast Integer "min.s64" MinS64(a: i64, b: i64) -> i64 { a.min(b) }
        fast Integer "max.u16" MaxU16(a: u16, b: u16) -> u16 { a.max(b) }
        fast Integer "max.s16" MaxS16(a: i16, b: i16) -> i16 { a.max(b) }
        fast Integer "max.u32" MaxU32(a: u32, b: u32) -> u32 { a.max(b) }
        fast Integer "max.s32" MaxS32(a: i32, b: i32) -> i32 { a.max(b) }
        fast Integer "max.relu.s32" MaxReluS32(a: i32, b: i32) -> i32 { a.max(b).max(0) }
        fast Integer "max.u64" MaxU64(a: u64, b: u64) -> u64 { a.max(b) }
        fast Integer "max.s64" MaxS64(a: i64, b: i64) -> i64 { a.max(b) }
        slow Integer "min.u16x2" MinU16x2(a: u32, b: u32) -> u32 { int::pairs(a, b, |x, y| x.min(y)) }
        slow Integer "max.u16x2" MaxU16x2(a: u32, b: u32) -> u32 { int::pairs(a, b, |x, y| x.max(y)) }
        slow Integer "min.s16x2" MinS16x2(a: u32, b: u32) -> u32 { int::pairs(a, b, |x, y| (x as i16).min(y as i16) as u16) }
        slow Integer "max.s16x2" MaxS16x2(a: u32, b: u32) -> u32 { int::pairs(a, b, |x, y| (x as i16).max(y as i16) as u16) }

        fast Integer "popc.b32" Popc32(a: b32) -> u32 { a.count_ones() }
        fast Integer "popc.b64" Popc64(a: b64) -> u32 { a.count_ones() }
        fast Integer "clz.b32" Clz32(a: b32) -> u32 { a.leading_zeros() }
        fast Integer "clz.b64" Clz64(a: b64) -> u32 { a.leading_zeros() }
        fast Integer "bfind.u32" BfindU32(a: u32) -> u32 { 31u32.wrapping_sub(a.leading_zeros()) }
        fast Integer "bfind.s32" BfindS32(a: i32) -> u32 { 31u32.wrapping_sub((a ^ (a >> 31)).leading_zeros()) }
        fast Integer "bfind.u64" BfindU64(a: u64) -> u32 { 63u32.wrapping_sub(a.leading_zeros()) }
        fast Integer "bfind.s64" BfindS64(a: i64) -> u32 { 63u32.wrapping_sub((a ^ (a >> 63)).leading_zeros()) }
        fast Integer "bfind.shiftamt.u32" BfindShiftU32(a: u32) -> u32 { if a == 0 { u32::MAX } else { a.leading_zeros() } }
        fast Integer "bfind.shiftamt.s32" BfindShiftS32(a: i32) -> u32 {
            let m = a ^ (a >> 31);
            if m == 0 { u32::MAX } else { m.leading_zeros() }
        }
        fast Integer "bfind.shiftamt.u64" BfindShiftU64(a: u64) -> u32 { if a == 0 { u32::MAX } else { a.leading_zeros() } }
        fast Integer "bfind.shiftamt.s64" BfindShiftS64(a: i64) -> u32 {
            let m = a ^ (a >> 63);
            if m == 0 { u32::MAX } else { m.leading_zeros() }
        }
        slow Integer "fns.b32" Fns32(a: b32, b: u32, c: i32) -> b32 { int::fns(a, b, c) }
        fast Integer "brev.b32" Brev32(a: b32) -> b32 { a.reverse_bits() }
        fast Integer "brev.b64" Brev64(a: b64) -> b64 { a.reverse_bits() }
        fast Integer "bfe.u32" BfeU32(a: u32, b: u32, c: u32) -> u32 { int::bfe_u32(a, b, c) }
        fast Integer "bfe.s32" BfeS32(a: i32, b: u32, c: u32) -> i32 { int::bfe_s32(a, b, c) }
        fast Integer "bfe.u64" BfeU64(a: u64, b: u32, c: u32) -> u64 { int::bfe_u64(a, b, c) }
        fast Integer "bfe.s64" BfeS64(a: i64, b: u32, c: u32) -> i64 { int::bfe_s64(a, b, c) }
        fast Integer "" BfiMask32(c: u32, d: u32) -> u32 { int::bfi_mask(c, d, 32) as u32 }
        fast Integer "" BfiMask64(c: u32, d: u32) -> u64 { int::bfi_mask(c, d, 64) }
        fast Integer "" Merge32(a: b32, b: b32, c: b32) -> b32 { (a & c) | (b & !c) }
        fast Integer "" Merge64(a: b64, b: b64, c: b64) -> b64 { (a & c) | (b & !c) }
        slow Integer "szext.clamp.u32" SzextClampU32(a: u32, b: u32) -> u32 { if b >= 32 { a } else { a & !(!0 << b) } }
        slow Integer "szext.wrap.u32" SzextWrapU32(a: u32, b: u32) -> u32 { a & !(!0 << (b & 31)) }
        slow Integer "szext.clamp.s32" SzextClampS32(a: i32, b: u32) -> i32 { int::sign_extend(a, b.min(32)) }
        slow Integer "szext.wrap.s32" SzextWrapS32(a: i32, b: u32) -> i32 { int::sign_extend(a, b & 31) }
        slow Integer "bmsk.clamp.b32" BmskClamp(a: u32, b: u32) -> b32 { int::bmsk(a.min(32), b.min(32)) }
        slow Integer "bmsk.wrap.b32" BmskWrap(a: u32, b: u32) -> b32 { int::bmsk(a & 31, b & 31) }

        slow Integer "dp4a.u32.u32" Dp4aUU(a: u32, b: u32, c: u32) -> u32 { int::dp4a::<false, false>(a, b, c) }
        slow Integer "dp4a.u32.s32" Dp4aUS(a: u32, b: u32, c: u32) -> u32 { int::dp4a::<false, true>(a, b, c) }
        slow Integer "dp4a.s32.u32" Dp4aSU(a: u32, b: u32, c: u32) -> u32 { int::dp4a::<true, false>(a, b, c) }
        slow Integer "dp4a.s32.s32" Dp4aSS(a: u32, b: u32, c: u32) -> u32 { int::dp4a::<true, true>(a, b, c) }
        slow Integer "dp2a.lo.u32.u32" Dp2aLoUU(a: u32, b: u32, c: u32) -> u32 { int::dp2a::<false, false>(a, b, c) }
        slow Integer "dp2a.lo.u32.s32" Dp2aLoUS(a: u32, b: u32, c: u32) -> u32 { int::dp2a::<false, true>(a, b, c) }
        slow Integer "dp2a.lo.s32.u32" Dp2aLoSU(a: u32, b: u32, c: u32) -> u32 { int::dp2a::<true, false>(a, b, c) }
        slow Integer "dp2a.lo.s32.s32" Dp2aLoSS(a: u32, b: u32, c: u32) -> u32 { int::dp2a::<true, true>(a, b, c) }
        slow Integer "dp2a.hi.u32.u32" Dp2aHiUU(a: u32, b: u32, c: u32) -> u32 { int::dp2a::<false, false>(a, b >> 16, c) }
        slow Integer "dp2a.hi.u32.s32" Dp2aHiUS(a: u32, b: u32, c: u32) -> u32 { int::dp2a::<false, true>(a, b >> 16, c) }
        slow Integer "dp2a.hi.s32.u32" Dp2aHiSU(a: u32, b: u32, c: u32) -> u32 { int::dp2a::<true, false>(a, b >> 16, c) }
        slow Integer "dp2a.hi.s32.s32" Dp2aHiSS(a: u32, b: u32, c: u32) -> u32 { int::dp2a::<true, true>(a, b >> 16, c) }

        fast Integer "and.b16" And16(a: b16, b: b16) -> b16 { a & b }
        fast Integer "and.b32" And32(a: b32, b: b32) -> b32 { a & b }
        fast Integer "and.b64" And64(a: b64, b: b64) -> b64 { a & b }
        fast Integer "or.b16" Or16(a: b16, b: b16) -> b16 { a | b }
        fast Integer "or.b32" Or32(a: b32, b: b32) -> b32 { a | b }
        fast Integer "or.b64" Or64(a: b64, b: b64) -> b64 { a | b }
        fast Integer "xor.b16" Xor16(a: b16, b: b16) -> b16 { a ^ b }
        fast Integer "xor.b32" Xor32(a: b32, b: b32) -> b32 { a ^ b }
        fast Integer "xor.b64" Xor64(a: b64, b: b64) -> b64 { a ^ b }
        fast Integer "not.b16" Not16(a: b16) -> b16 { !a }
        fast Integer "not.b32" Not32(a: b32) -> b32 { !a }
        fast Integer "not.b64" Not64(a: b64) -> b64 { !a }
        fast Integer "cnot.b16" Cnot16(a: b16) -> b16 { u16::from(a == 0) }
        fast Integer "cnot.b32" Cnot32(a: b32) -> b32 { u32::from(a == 0) }
        fast Integer "cnot.b64" Cnot64(a: b64) -> b64 { u64::from(a == 0) }
        fast Integer "shl.b16" Shl16(a: b16, b: u32) -> b16 { if b > 15 { 0 } else { a << (b & 15) } }
        fast Integer "shl.b32" Shl32(a: b32, b: u32) -> b32 { if b > 31 { 0 } else { a << (b & 31) } }
        fast Integer "shl.b64" Shl64(a: b64, b: u32) -> b64 { if b > 63 { 0 } else { a << (b & 63) } }
        fast Integer "shr.u16 shr.b16" ShrU16(a: b16, b: u32) -> b16 { if b > 15 { 0 } else { a >> (b & 15) } }
        fast Integer "shr.u32 shr.b32" ShrU32(a: b32, b: u32) -> b32 { if b > 31 { 0 } else { a >> (b & 31) } }
        fast Integer "shr.u64 shr.b64" ShrU64(a: b64, b: u32) -> b64 { if b > 63 { 0 } else { a >> (b & 63) } }
        fast Integer "shr.s16" ShrS16(a: i16, b: u32) -> i16 { a >> b.min(15) }
        fast Integer "shr.s32" ShrS32(a: i32, b: u32) -> i32 { a >> b.min(31) }
        fast Integer "shr.s64" ShrS64(a: i64, b: u32) -> i64 { a >> b.min(63) }
        fast Integer "shf.l.clamp.b32" ShfLClamp(a: b32, b: b32, c: u32) -> b32 {
            ((((u64::from(b) << 32) | u64::from(a)) << c.min(32)) >> 32) as u32
        }
        fast Integer "shf.r.clamp.b32" ShfRClamp(a: b32, b: b32, c: u32) -> b32 {
            (((u64::from(b) << 32) | u64::from(a)) >> c.min(32)) as u32
        }
        fast Integer "shf.l.wrap.b32" ShfLWrap(a: b32, b: b32, c: u32) -> b32 {
            ((((u64::from(b) << 32) | u64::from(a)) << (c & 31)) >> 32) as u32
        }
        fast Integer "shf.r.wrap.b32" ShfRWrap(a: b32, b: b32, c: u32) -> b32 {
            (((u64::from(b) << 32) | u64::from(a)) >> (c & 31)) as u32
        }
        fast Integer "prmt.b32" Prmt(a: b32, b: b32, c: b32) -> b32 { int::prmt(a, b, c) }
        slow Integer "prmt.b32.f4e" PrmtF4e(a: b32, b: b32, c: b32) -> b32 { int::prmt_f4e(a, b, c) }
        slow Integer "prmt.b32.b4e" PrmtB4e(a: b32, b: b32, c: b32) -> b32 { int::prmt_b4e(a, b, c) }
        slow Integer "prmt.b32.rc8" PrmtRc8(a: b32, _b: b32, c: b32) -> b32 { int::prmt_rc8(a, c) }
        slow Integer "prmt.b32.ecl" PrmtEcl(a: b32, _b: b32, c: b32) -> b32 { int::prmt_ecl(a, c) }
        slow Integer "prmt.b32.ecr" PrmtEcr(a: b32, _b: b32, c: b32) -> b32 { int::prmt_ecr(a, c) }
        slow Integer "prmt.b32.rc16" PrmtRc16(a: b32, _b: b32, c: b32) -> b32 { int::prmt_rc16(a, c) }

        fast Move "mov.b16 mov.u16 mov.s16" Mov16(a: b16) -> b16 { a }
        fast Move "mov.b32 mov.u32 mov.s32 mov.f32" Mov32(a: b32) -> b32 { a }
        fast Move "mov.b64 mov.u64 mov.s64 mov.f64" Mov64(a: b64) -> b64 { a }
        fast Move "" Pack32(a: b16, b: b16) -> b32 { u32::from(a) | u32::from(b) << 16 }
        fast Move "" Pack64(a: b32, b: b32) -> b64 { u64::from(a) | u64::from(b) << 32 }
        fast Move "" Low16(a: b32) -> b16 { a as u16 }
        fast Move "" High16(a: b32) -> b16 { (a >> 16) as u16 }
        fast Move "" Low32(a: b64) -> b32 { a as u32 }
        fast Move "" High32(a: b64) -> b32 { (a >> 32) as u32 }
        fast Integer "selp.b16 selp.u16 selp.s16" Selp16(a: b16, b: b16, c: bool) -> b16 { if c { a } else { b } }
        fast Integer "selp.b32 selp.u32 selp.s32 selp.f32" Selp32(a: b32, b: b32, c: bool) -> b32 { if c { a } else { b } }
        fast Integer "selp.b64 selp.u64 selp.s64 selp.f64" Selp64(a: b64, b: b64, c: bool) -> b64 { if c { a } else { b } }
        fast Integer "slct.b16.s32 slct.u16.s32 slct.s16.s32" Slct16(a: b16, b: b16, c: i32) -> b16 { if c >= 0 { a } else { b } }
        fast Integer "slct.b32.s32 slct.u32.s32 slct.s32.s32 slct.f32.s32" Slct32(a: b32, b: b32, c: i32) -> b32 { if c >= 0 { a } else { b } }
        fast Integer "slct.b64.s32 slct.u64.s32 slct.s64.s32 slct.f64.s32" Slct64(a: b64, b: b64, c: i32) -> b64 { if c >= 0 { a } else { b } }
        fast Integer "slct.b16.f32 slct.u16.f32 slct.s16.f32" SlctF16(a: b16, b: b16, c: f32) -> b16 { if c >= 0.0 { a } else { b } }
        fast Integer "slct.b32.f32 slct.u32.f32 slct.s32.f32 slct.f32.f32" SlctF32(a: b32, b: b32, c: f32) -> b32 { if c >= 0.0 { a } else { b } }
        fast Integer "slct.b64.f32 slct.u64.f32 slct.s64.f32 slct.f64.f32" SlctF64(a: b64, b: b64, c: f32) -> b64 { if c >= 0.0 { a } else { b } }
        fast Integer "slct.ftz.b32.f32 slct.ftz.u32.f32 slct.ftz.s32.f32 slct.ftz.f32.f32" SlctFtzF32(a: b32, b: b32, c: f32) -> b32 {
            if float::ftz(c) >= 0.0 { a } else { b }
        }
        fast Integer "slct.ftz.b16.f32 slct.ftz.u16.f32 slct.ftz.s16.f32" SlctFtz16(a: b16, b: b16, c: f32) -> b16 {
            if float::ftz(c) >= 0.0 { a } else { b }
        }
        fast Integer "slct.ftz.b64.f32 slct.ftz.u64.f32 slct.ftz.s64.f32 slct.ftz.f64.f32" SlctFtz64(a: b64, b: b64, c: f32) -> b64 {
            if float::ftz(c) >= 0.0 { a } else { b }
        }

        fast Integer "" Eq16(a: b16, b: b16) -> bool { a == b }
        fast Integer "" LtU16(a: u16, b: u16) -> bool { a < b }
        fast Integer "" LeU16(a: u16, b: u16) -> bool { a <= b }
        fast Integer "" LtS16(a: i16, b: i16) -> bool { a < b }
        fast Integer "" LeS16(a: i16, b: i16) -> bool { a <= b }
        fast Integer "" Eq32(a: b32, b: b32) -> bool { a == b }
        fast Integer "" LtU32(a: u32, b: u32) -> bool { a < b }
        fast Integer "" LeU32(a: u32, b: u32) -> bool { a <= b }
        fast Integer "" LtS32(a: i32, b: i32) -> bool { a < b }
        fast Integer "" LeS32(a: i32, b: i32) -> bool { a <= b }
        fast Integer "" Eq64(a: b64, b: b64) -> bool { a == b }
        fast Integer "" LtU64(a: u64, b: u64) -> bool { a < b }
        fast Integer "" LeU64(a: u64, b: u64) -> bool { a <= b }
        fast Integer "" LtS64(a: i64, b: i64) -> bool { a < b }
        fast Integer "" LeS64(a: i64, b: i64) -> bool { a <= b }
    } };
}
pub(crate) use integer_ops;
