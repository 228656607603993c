//! Arithmetic on sizes that cannot wrap.

use crate::Error;

/// Largest size that a kernel takes: it computes rows and tiles in 32 bits, and offsets in 64.
pub(crate) const MAX: usize = i32::MAX as usize;

/// The product of `factors`, as a number of elements.
pub(crate) fn product(operation: &'static str, argument: &'static str, factors: &[usize]) -> Result<usize, Error> {
    let wide = factors.iter().try_fold(1_usize, |product, &factor| product.checked_mul(factor));
    // The widest element has 16 bytes, and no object may exceed isize::MAX bytes.
    wide.filter(|&elements| elements <= isize::MAX as usize / 16).ok_or_else(|| Error::Overflow {
        operation,
        argument,
        value: factors.iter().map(usize::to_string).collect::<Vec<_>>().join(" * "),
        limit: isize::MAX as u64 / 16,
    })
}

/// Elements from the first to behind the last of a tensor with dimensions `(size, stride)`; none if a size is 0.
pub(crate) fn reach(dimensions: &[(usize, usize)]) -> usize {
    if dimensions.iter().any(|&(size, _)| size == 0) {
        return 0;
    }
    1 + dimensions.iter().map(|&(size, stride)| (size - 1) * stride).sum::<usize>()
}

/// Boundary in bytes that a packed matrix with rows of `width` elements begins on: 16 where each row then does, else an element.
pub(crate) fn row_alignment(dtype: crate::Dtype, width: usize) -> u64 {
    if width.is_multiple_of(8) { super::launch::VECTOR } else { dtype.bytes().into() }
}

/// A product that the kernel holds in an `i32`.
pub(crate) fn product_i32(operation: &'static str, argument: &'static str, factors: &[usize]) -> Result<usize, Error> {
    let overflow = || Error::Overflow {
        operation,
        argument,
        value: factors.iter().map(usize::to_string).collect::<Vec<_>>().join(" * "),
        limit: MAX as u64,
    };
    let value = product(operation, argument, factors).map_err(|_| overflow())?;
    if value > MAX { Err(overflow()) } else { Ok(value) }
}

/// A size as the kernel's parameter.
pub(crate) fn size(operation: &'static str, argument: &'static str, value: usize) -> Result<u32, Error> {
    if value > MAX {
        return Err(Error::Overflow { operation, argument, value: value.to_string(), limit: MAX as u64 });
    }
    Ok(value as u32)
}

/// A size that is at least 1.
pub(crate) fn positive(operation: &'static str, argument: &'static str, value: usize) -> Result<u32, Error> {
    if value == 0 {
        return Err(Error::invalid(operation, argument, "at least 1", value));
    }
    size(operation, argument, value)
}

/// Number of experts.
pub(crate) fn experts(operation: &'static str, value: usize) -> Result<u32, Error> {
    if value > crate::MAX_EXPERTS {
        return Err(Error::unsupported(operation, "experts", format!("at most {}", crate::MAX_EXPERTS), value));
    }
    positive(operation, "experts", value)
}

/// Experts per token, of `experts` experts.
pub(crate) fn top_k(operation: &'static str, value: usize, experts: usize) -> Result<u32, Error> {
    if value > experts {
        return Err(Error::invalid(operation, "top_k", format!("at most the number of experts, {experts}"), value));
    }
    if value > crate::MAX_TOP_K {
        return Err(Error::unsupported(operation, "top_k", format!("at most {}", crate::MAX_TOP_K), value));
    }
    positive(operation, "top_k", value)
}

/// Blocks along the first dimension of a grid.
pub(crate) fn grid_x(operation: &'static str, argument: &'static str, blocks: u64) -> Result<u32, Error> {
    if blocks > MAX as u64 {
        return Err(Error::Overflow { operation, argument, value: format!("{blocks} blocks"), limit: MAX as u64 });
    }
    Ok(blocks as u32)
}

/// Blocks along the second dimension of a grid.
pub(crate) fn grid_y(operation: &'static str, argument: &'static str, blocks: u32) -> Result<(), Error> {
    const LIMIT: u32 = 65535;
    if blocks > LIMIT {
        return Err(Error::Overflow { operation, argument, value: format!("{blocks} blocks"), limit: LIMIT.into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn tensors_reach_as_far_as_their_last_element() {
        assert_eq!(reach(&[(3, 10), (4, 1)]), 24);
        assert_eq!(reach(&[(3, 0), (1, 7)]), 1);
        assert_eq!(reach(&[(3, 10), (0, 1)]), 0);
        assert_eq!(
            [row_alignment(Dtype::Bf16, 16), row_alignment(Dtype::Bf16, 12), row_alignment(Dtype::F32, 4)],
            [16, 2, 4]
        );
    }

    #[test]
    fn products_do_not_wrap() {
        assert_eq!(product("op", "x", &[3, 4]).unwrap(), 12);
        assert_eq!(product("op", "x", &[usize::MAX, 0]).unwrap(), 0);
        let error = product("op", "x", &[usize::MAX, 2]).unwrap_err();
        assert!(error.to_string().contains("`x` overflows"), "{error}");
        assert!(product("op", "x", &[1 << 62, 2]).is_err());
        assert_eq!(product_i32("op", "x", &[MAX, 1]).unwrap(), MAX);
        assert!(matches!(
            product_i32("op", "x", &[1 << 16, 1 << 15]),
            Err(Error::Overflow { argument: "x", limit: 0x7fff_ffff, .. })
        ));
    }

    #[test]
    fn limits_name_the_argument() {
        assert_eq!(experts("op", 0).unwrap_err().argument(), Some("experts"));
        assert!(matches!(experts("op", 4097), Err(Error::Unsupported { argument: "experts", .. })));
        assert!(matches!(top_k("op", 9, 8), Err(Error::Invalid { argument: "top_k", .. })));
        assert!(matches!(top_k("op", 33, 64), Err(Error::Unsupported { argument: "top_k", .. })));
        assert!(matches!(positive("op", "hidden", 0), Err(Error::Invalid { argument: "hidden", .. })));
        assert!(grid_x("op", "n", 1 << 31).is_err());
    }
}
