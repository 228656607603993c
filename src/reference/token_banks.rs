//! Banks of experts by token type: ERNIE 4.5 VL (transformers' `Ernie4_5_VLMoeMoeBlock`), where text and vision have routers and experts of
//! their own.

use super::{ReferenceError, require};

/// Masks `[B, T]`: 1 where the token's type, at most `banks - 1`, is the bank's number. A negative type is one past the last.
///
/// # Errors
/// No banks.
pub fn token_banks(types: &[i64], banks: usize) -> Result<Vec<u8>, ReferenceError> {
    require("banks", banks > 0, || "at least 1".into(), banks)?;
    let bank = |kind: i64| usize::try_from(kind).unwrap_or(usize::MAX).min(banks - 1);
    Ok((0..banks).flat_map(|b| types.iter().map(move |&kind| u8::from(bank(kind) == b))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        assert_eq!(token_banks(&[0, 2, 1, -1], 2).unwrap(), [1, 0, 0, 0, 0, 1, 1, 1]);
        assert_eq!(token_banks(&[0, 2, 1, -1], 1).unwrap(), [1; 4]);
        assert_eq!(token_banks(&[0], 0).unwrap_err().argument, "banks");
    }
}
