//! The kernels that the build rendered, as text and as machine code.

/// One kernel variant: the PTX that the driver can compile for any later GPU, and machine code where the build had `ptxas`.
#[derive(Clone, Copy, Debug)]
pub struct Embedded {
    /// Name of the variant, of its PTX entry and of its tests ([`crate::registry::Kernel::name`]).
    pub name: &'static str,
    /// The module's PTX text.
    pub ptx: &'static str,
    /// Machine code by architecture; empty where the build found no `ptxas`.
    pub images: &'static [Image],
}

/// A kernel as `ptxas` assembled it for one architecture.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// Architecture, such as `sm_80`.
    pub arch: &'static str,
    /// ELF image.
    pub cubin: &'static [u8],
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory in bytes.
    pub shared_bytes: u32,
}

impl Image {
    /// Compute capability of [`Image::arch`]; none for a name that is not `sm_` and digits (`sm_90a` runs on nothing else).
    pub(crate) fn compute_capability(&self) -> Option<(u32, u32)> {
        let number: u32 = self.arch.strip_prefix("sm_")?.parse().ok()?;
        Some((number / 10, number % 10))
    }
}

static TABLE: &[Embedded] = include!(concat!(env!("OUT_DIR"), "/embedded_table.rs"));

/// All embedded kernels, in the order of [`crate::registry::all`].
pub fn embedded() -> &'static [Embedded] {
    TABLE
}

/// Whether the entry takes parameters of these types, in this order.
#[cfg(test)]
pub(crate) fn assert_takes(kernel: crate::registry::Kernel, params: &[crate::runtime::launch::Param]) {
    use crate::runtime::launch::Param;
    let name = kernel.name();
    let entry = TABLE.iter().find(|entry| entry.name == name).expect("every kernel is embedded");
    let head = entry.ptx.split(".entry").nth(1).and_then(|text| text.split('{').next()).expect("one entry");
    let declared: Vec<&str> = head.split(".param").skip(1).filter_map(|text| text.split_whitespace().next()).collect();
    let packed: Vec<&str> = params
        .iter()
        .map(|param| match param {
            Param::Address(_) => ".u64",
            Param::U32(_) => ".u32",
            Param::F32(_) => ".f32",
        })
        .collect();
    assert_eq!(declared, packed, "{name}");
}
