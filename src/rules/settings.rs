//! How rules and descriptors grow: constructors take what is always needed, and each further field has a setter of its name.

/// Setters of a descriptor's fields: `desc.name(value)` is the same descriptor with another value.
macro_rules! settings {
    ($of:ty { $($field:ident: $type:ty),* $(,)? }) => {
        impl $of {
            $(
                #[doc = concat!("With [`", stringify!($field), "`](Self#structfield.", stringify!($field), ").")]
                #[must_use]
                pub const fn $field(mut self, value: $type) -> Self {
                    self.$field = value;
                    self
                }
            )*
        }
    };
}

pub(crate) use settings;
