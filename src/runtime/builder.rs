//! How descriptors and arguments grow without breaking anybody: constructors take what is always needed, and each further field has a
//! setter of its name.

/// Setters of optional buffers: `args.name(buffer)` takes what `In` or `Out` can be made of.
macro_rules! buffers {
    ($args:ident<$life:lifetime $(, $generic:ident)*> { $($field:ident: $direction:ident<$element:ty>),* $(,)? }) => {
        impl<$life $(, $generic)*> $args<$life $(, $generic)*> {
            $(
                #[doc = concat!("With [`", stringify!($field), "`](Self#structfield.", stringify!($field), ").")]
                #[must_use]
                pub fn $field(mut self, buffer: impl Into<$direction<$life, $element>>) -> Self {
                    self.$field = Some(buffer.into());
                    self
                }
            )*
        }
    };
}

pub(crate) use crate::rules::settings::settings;
pub(crate) use buffers;
