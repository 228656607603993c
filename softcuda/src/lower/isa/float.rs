//! Floating-point rows (PTX ISA 9.7.3 to 9.7.5, 9.7.7) and the conversions frequent enough to be vectorised; other roundings
//! and conversions are lowered to `Extra::Arith` and `Extra::Cvt`.

/// See [`super`] for the row format.
macro_rules! float_ops {
    ($next:ident! ( $($rows:tt)* )) => { $next! { $($rows)*
        fast Float "add.f32 add.rn.f32" AddF32(a: f32, b: f32) -> f32 { float::canon(a + b) }
        fast Float "add.ftz.f32 add.rn.ftz.f32" AddFtzF32(a: f32, b: f32) -> f32 { float::canon(float::ftz(float::ftz(a) + float::ftz(b))) }
        fast Float "sub.f32 sub.rn.f32" SubF32(a: f32, b: f32) -> f32 { float::canon(a - b) }
        fast Float "sub.ftz.f32 sub.rn.ftz.f32" SubFtzF32(a: f32, b: f32) -> f32 { float::canon(float::ftz(float::ftz(a) - float::ftz(b))) }
        fast Float "mul.f32 mul.rn.f32" MulF32(a: f32, b: f32) -> f32 { float::canon(a * b) }
        fast Float "mul.ftz.f32 mul.rn.ftz.f32" MulFtzF32(a: f32, b: f32) -> f32 { float::canon(float::ftz(float::ftz(a) * float::ftz(b))) }
        fast Float "fma.rn.f32 mad.rn.f32" FmaF32(a: f32, b: f32, c: f32) -> f32 { float::canon(a.mul_add(b, c)) }
        fast Float "fma.rn.ftz.f32 mad.rn.ftz.f32" FmaFtzF32(a: f32, b: f32, c: f32) -> f32 {
            float::canon(float::ftz(float::ftz(a).mul_add(float::ftz(b), float::ftz(c))))
        }
        fast Special "div.full.f32" DivFullF32(a: f32, b: f32) -> f32 { float::canon(a / b) }
        fast Special "div.full.ftz.f32" DivFullFtzF32(a: f32, b: f32) -> f32 { float::canon(float::ftz(float::ftz(a) / float::ftz(b))) }
        fast Special "div.rn.f32" DivRnF32(a: f32, b: f32) -> f32 { float::canon(a / b) }
        fast Special "div.rn.ftz.f32" DivRnFtzF32(a: f32, b: f32) -> f32 { float::canon(float::ftz(float::ftz(a) / float::ftz(b))) }
        slow Special "div.approx.f32" DivApproxF32(a: f32, b: f32) -> f32 { float::div_approx(a, b) }
        slow Special "div.approx.ftz.f32" DivApproxFtzF32(a: f32, b: f32) -> f32 { float::ftz(float::div_approx(float::ftz(a), float::ftz(b))) }
        fast Float "min.f32" MinF32(a: f32, b: f32) -> f32 { float::min(a, b) }
        fast Float "max.f32" MaxF32(a: f32, b: f32) -> f32 { float::max(a, b) }
        fast Float "min.ftz.f32" MinFtzF32(a: f32, b: f32) -> f32 { float::min(float::ftz(a), float::ftz(b)) }
        fast Float "max.ftz.f32" MaxFtzF32(a: f32, b: f32) -> f32 { float::max(float::ftz(a), float::ftz(b)) }
        fast Float "min.NaN.f32" MinNanF32(a: f32, b: f32) -> f32 { float::nan_if(a, b, float::min(a, b)) }
        fast Float "max.NaN.f32" MaxNanF32(a: f32, b: f32) -> f32 { float::nan_if(a, b, float::max(a, b)) }
        fast Float "min.ftz.NaN.f32" MinFtzNanF32(a: f32, b: f32) -> f32 { float::nan_if(a, b, float::min(float::ftz(a), float::ftz(b))) }
        fast Float "max.ftz.NaN.f32" MaxFtzNanF32(a: f32, b: f32) -> f32 { float::nan_if(a, b, float::max(float::ftz(a), float::ftz(b))) }
        slow Float "min.xorsign.abs.f32" MinXorF32(a: f32, b: f32) -> f32 { float::xorsign(a, b, float::min(a.abs(), b.abs())) }
        slow Float "max.xorsign.abs.f32" MaxXorF32(a: f32, b: f32) -> f32 { float::xorsign(a, b, float::max(a.abs(), b.abs())) }
        slow Float "min.ftz.xorsign.abs.f32" MinFtzXorF32(a: f32, b: f32) -> f32 {
            float::xorsign(a, b, float::min(float::ftz(a).abs(), float::ftz(b).abs()))
        }
        slow Float "max.ftz.xorsign.abs.f32" MaxFtzXorF32(a: f32, b: f32) -> f32 {
            float::xorsign(a, b, float::max(float::ftz(a).abs(), float::ftz(b).abs()))
        }
        slow Float "min.NaN.xorsign.abs.f32" MinNanXorF32(a: f32, b: f32) -> f32 {
            float::nan_if(a, b, float::xorsign(a, b, float::min(a.abs(), b.abs())))
        }
        slow Float "max.NaN.xorsign.abs.f32" MaxNanXorF32(a: f32, b: f32) -> f32 {
            float::nan_if(a, b, float::xorsign(a, b, float::max(a.abs(), b.abs())))
        }
        fast Float "abs.f32" AbsF32(a: f32) -> f32 { a.abs() }
        fast Float "abs.ftz.f32" AbsFtzF32(a: f32) -> f32 { float::ftz(a).abs() }
        fast Float "neg.f32" NegF32(a: f32) -> f32 { -a }
        fast Float "neg.ftz.f32" NegFtzF32(a: f32) -> f32 { -float::ftz(a) }
        fast Float "copysign.f32" CopysignF32(a: f32, b: f32) -> f32 { b.copysign(a) }
        slow Special "rcp.approx.f32" RcpApproxF32(a: f32) -> f32 { float::rcp(a) }
        slow Special "rcp.approx.ftz.f32" RcpApproxFtzF32(a: f32) -> f32 { float::ftz(float::rcp(float::ftz(a))) }
        slow Special "sqrt.approx.f32" SqrtApproxF32(a: f32) -> f32 { float::canon(a.sqrt()) }
        slow Special "sqrt.approx.ftz.f32" SqrtApproxFtzF32(a: f32) -> f32 { float::canon(float::ftz(a).sqrt()) }
        slow Special "rsqrt.approx.f32" RsqrtApproxF32(a: f32) -> f32 { float::rsqrt(a) }
        slow Special "rsqrt.approx.ftz.f32" RsqrtApproxFtzF32(a: f32) -> f32 { float::rsqrt(float::ftz(a)) }
        slow Special "sin.approx.f32" SinF32(a: f32) -> f32 { float::sin(a) }
        slow Special "sin.approx.ftz.f32" SinFtzF32(a: f32) -> f32 { float::ftz(float::sin(float::ftz(a))) }
        slow Special "cos.approx.f32" CosF32(a: f32) -> f32 { float::cos(a) }
        slow Special "cos.approx.ftz.f32" CosFtzF32(a: f32) -> f32 { float::ftz(float::cos(float::ftz(a))) }
        slow Special "lg2.approx.f32" Lg2F32(a: f32) -> f32 { float::lg2(a) }
        slow Special "lg2.approx.ftz.f32" Lg2FtzF32(a: f32) -> f32 { float::ftz(float::lg2(float::ftz(a))) }
        slow Special "ex2.approx.f32" Ex2F32(a: f32) -> f32 { float::ex2(a) }
        slow Special "ex2.approx.ftz.f32" Ex2FtzF32(a: f32) -> f32 { float::ftz(float::ex2(float::ftz(a))) }
        slow Special "tanh.approx.f32" TanhF32(a: f32) -> f32 { float::tanh(a) }

        fast Double "add.f64 add.rn.f64" AddF64(a: f64, b: f64) -> f64 { a + b }
        fast Double "sub.f64 sub.rn.f64" SubF64(a: f64, b: f64) -> f64 { a - b }
        fast Double "mul.f64 mul.rn.f64" MulF64(a: f64, b: f64) -> f64 { a * b }
        fast Double "fma.rn.f64 mad.rn.f64" FmaF64(a: f64, b: f64, c: f64) -> f64 { a.mul_add(b, c) }
        fast Double "div.rn.f64" DivF64(a: f64, b: f64) -> f64 { a / b }
        fast Double "rcp.rn.f64" RcpF64(a: f64) -> f64 { 1.0 / a }
        fast Double "sqrt.rn.f64" SqrtF64(a: f64) -> f64 { a.sqrt() }
        slow Double "rcp.approx.ftz.f64" RcpApproxF64(a: f64) -> f64 { float::rcp_approx_f64(a) }
        slow Double "rsqrt.approx.f64" RsqrtF64(a: f64) -> f64 { 1.0 / a.sqrt() }
        slow Double "rsqrt.approx.ftz.f64" RsqrtApproxF64(a: f64) -> f64 { float::rsqrt_approx_f64(a) }
        slow Double "min.f64" MinF64(a: f64, b: f64) -> f64 { float::min_f64(a, b) }
        slow Double "max.f64" MaxF64(a: f64, b: f64) -> f64 { float::max_f64(a, b) }
        fast Double "abs.f64" AbsF64(a: f64) -> f64 { a.abs() }
        fast Double "neg.f64" NegF64(a: f64) -> f64 { -a }
        fast Double "copysign.f64" CopysignF64(a: f64, b: f64) -> f64 { b.copysign(a) }

        slow Special "ex2.approx.f16" Ex2F16(a: F16) -> F16 { F16::from_f32(float::ex2(a.to_f32())) }
        slow Special "ex2.approx.f16x2" Ex2F16x2(a: F16x2) -> F16x2 { a.map(|x| float::ex2(x.to_f32())) }
        slow Special "ex2.approx.ftz.bf16" Ex2BF16(a: BF16) -> BF16 { BF16::from_f32(float::ftz(float::ex2(float::ftz(a.to_f32())))) }
        slow Special "ex2.approx.ftz.bf16x2" Ex2BF16x2(a: BF16x2) -> BF16x2 { a.map(|x| float::ftz(float::ex2(float::ftz(x.to_f32())))) }
        slow Special "tanh.approx.f16" TanhF16(a: F16) -> F16 { F16::from_f32(float::tanh(a.to_f32())) }
        slow Special "tanh.approx.f16x2" TanhF16x2(a: F16x2) -> F16x2 { a.map(|x| float::tanh(x.to_f32())) }
        slow Special "tanh.approx.bf16" TanhBF16(a: BF16) -> BF16 { BF16::from_f32(float::tanh(a.to_f32())) }
        slow Special "tanh.approx.bf16x2" TanhBF16x2(a: BF16x2) -> BF16x2 { a.map(|x| float::tanh(x.to_f32())) }
        fast Half "abs.f16 abs.bf16" AbsHalf(a: b16) -> b16 { a & 0x7fff }
        fast Half "abs.f16x2 abs.bf16x2" AbsHalf2(a: b32) -> b32 { a & 0x7fff_7fff }
        fast Half "neg.f16 neg.bf16" NegHalf(a: b16) -> b16 { a ^ 0x8000 }
        fast Half "neg.f16x2 neg.bf16x2" NegHalf2(a: b32) -> b32 { a ^ 0x8000_8000 }

        slow Float "testp.finite.f32" TestpFinite32(a: f32) -> bool { a.is_finite() }
        slow Float "testp.infinite.f32" TestpInfinite32(a: f32) -> bool { a.is_infinite() }
        slow Float "testp.number.f32" TestpNumber32(a: f32) -> bool { !a.is_nan() }
        slow Float "testp.notanumber.f32" TestpNan32(a: f32) -> bool { a.is_nan() }
        slow Float "testp.normal.f32" TestpNormal32(a: f32) -> bool { a.is_normal() || a == 0.0 }
        slow Float "testp.subnormal.f32" TestpSubnormal32(a: f32) -> bool { a.is_subnormal() }
        slow Double "testp.finite.f64" TestpFinite64(a: f64) -> bool { a.is_finite() }
        slow Double "testp.infinite.f64" TestpInfinite64(a: f64) -> bool { a.is_infinite() }
        slow Double "testp.number.f64" TestpNumber64(a: f64) -> bool { !a.is_nan() }
        slow Double "testp.notanumber.f64" TestpNan64(a: f64) -> bool { a.is_nan() }
        slow Double "testp.normal.f64" TestpNormal64(a: f64) -> bool { a.is_normal() || a == 0.0 }
        slow Double "testp.subnormal.f64" TestpSubnormal64(a: f64) -> bool { a.is_subnormal() }

        fast Float "" EqF32(a: f32, b: f32) -> bool { a == b }
        fast Float "" LtF32(a: f32, b: f32) -> bool { a < b }
        fast Float "" LeF32(a: f32, b: f32) -> bool { a <= b }
        fast Float "" NumF32(a: f32, b: f32) -> bool { !a.is_nan() & !b.is_nan() }
        fast Double "" EqF64(a: f64, b: f64) -> bool { a == b }
        fast Double "" LtF64(a: f64, b: f64) -> bool { a < b }
        fast Double "" LeF64(a: f64, b: f64) -> bool { a <= b }
        fast Double "" NumF64(a: f64, b: f64) -> bool { !a.is_nan() & !b.is_nan() }
        fast Float "" Ftz(a: f32) -> f32 { float::ftz(a) }
        fast Half "" FtzF16(a: F16) -> F16 { a.ftz() }

        fast Convert "cvt.u16.u32 cvt.u16.s32 cvt.s16.u32 cvt.s16.s32" Trunc16(a: b32) -> b16 { a as u16 }
        fast Convert "cvt.u32.u16 cvt.s32.u16" Zext16(a: u16) -> u32 { u32::from(a) }
        fast Convert "cvt.u32.s16 cvt.s32.s16" Sext16(a: i16) -> i32 { i32::from(a) }
        fast Convert "cvt.u64.u32 cvt.s64.u32" Zext32(a: u32) -> u64 { u64::from(a) }
        fast Convert "cvt.u64.s32 cvt.s64.s32" Sext32(a: i32) -> i64 { i64::from(a) }
        fast Convert "cvt.u64.u16 cvt.s64.u16" Zext16To64(a: u16) -> u64 { u64::from(a) }
        fast Convert "cvt.u64.s16 cvt.s64.s16" Sext16To64(a: i16) -> i64 { i64::from(a) }
        fast Convert "cvt.u32.u64 cvt.u32.s64 cvt.s32.u64 cvt.s32.s64" Trunc32(a: u64) -> u32 { a as u32 }
        fast Convert "cvt.u16.u64 cvt.u16.s64 cvt.s16.u64 cvt.s16.s64" Trunc64To16(a: u64) -> u16 { a as u16 }
        fast Convert "cvt.u32.u32 cvt.u32.s32 cvt.s32.u32 cvt.s32.s32" Cvt32(a: u32) -> u32 { a }
        fast Convert "cvt.u64.u64 cvt.u64.s64 cvt.s64.u64 cvt.s64.s64" Cvt64(a: u64) -> u64 { a }
        fast Convert "cvt.rn.f32.s32" CvtF32S32(a: i32) -> f32 { a as f32 }
        fast Convert "cvt.rn.f32.u32" CvtF32U32(a: u32) -> f32 { a as f32 }
        fast Convert "cvt.rzi.s32.f32" CvtRziS32F32(a: f32) -> i32 { float::to_s32(a) }
        fast Convert "cvt.f32.bf16" CvtF32Bf16(a: BF16) -> f32 { a.to_f32() }
        fast Convert "cvt.f32.f16" CvtF32F16(a: F16) -> f32 { float::canon(a.to_f32()) }
        fast Convert "cvt.rn.bf16.f32" CvtBf16F32(a: f32) -> BF16 { BF16::from_f32(a) }
        fast Convert "cvt.rn.f16.f32" CvtF16F32(a: f32) -> F16 { F16::from_f32(a) }
        fast Convert "cvt.rn.bf16x2.f32" CvtBf16x2F32(a: f32, b: f32) -> BF16x2 { BF16x2::new(BF16::from_f32(b), BF16::from_f32(a)) }
        fast Convert "cvt.rn.f16x2.f32" CvtF16x2F32(a: f32, b: f32) -> F16x2 { F16x2::new(F16::from_f32(b), F16::from_f32(a)) }
        fast Convert "cvt.rna.tf32.f32" CvtTf32F32(a: f32) -> b32 { float::to_tf32_rna(a) }
    } };
}
pub(crate) use float_ops;
