//! Special registers (PTX ISA 10), numbered for the executor.

use super::isa::Width;

macro_rules! specials {
    ($($name:literal $width:literal $variant:ident)*) => {
        /// What a special register holds.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Special { $($variant),* }

        /// Name, number, bits.
        const NAMES: &[(&str, u32, u32)] = &[$(($name, Special::$variant as u32, $width)),*];

        impl Special {
            pub const ALL: &[Special] = &[$(Special::$variant),*];
        }
    };
}

specials! {
    "%tid.x" 32 TidX "%tid.y" 32 TidY "%tid.z" 32 TidZ "%tid.w" 32 TidW
    "%ntid.x" 32 NtidX "%ntid.y" 32 NtidY "%ntid.z" 32 NtidZ "%ntid.w" 32 NtidW
    "%ctaid.x" 32 CtaidX "%ctaid.y" 32 CtaidY "%ctaid.z" 32 CtaidZ "%ctaid.w" 32 CtaidW
    "%nctaid.x" 32 NctaidX "%nctaid.y" 32 NctaidY "%nctaid.z" 32 NctaidZ "%nctaid.w" 32 NctaidW
    "%laneid" 32 LaneId "%warpid" 32 WarpId "%nwarpid" 32 NwarpId "%smid" 32 SmId "%nsmid" 32 NsmId
    "%gridid" 64 GridId
    "%lanemask_eq" 32 LanemaskEq "%lanemask_le" 32 LanemaskLe "%lanemask_lt" 32 LanemaskLt
    "%lanemask_ge" 32 LanemaskGe "%lanemask_gt" 32 LanemaskGt
    "%clock" 32 Clock "%clock_hi" 32 ClockHi "%clock64" 64 Clock64
    "%globaltimer" 64 GlobalTimer "%globaltimer_lo" 32 GlobalTimerLo "%globaltimer_hi" 32 GlobalTimerHi
    "%total_smem_size" 32 TotalSmem "%dynamic_smem_size" 32 DynamicSmem "%aggr_smem_size" 32 AggrSmem
    "%clusterid.x" 32 ClusterIdX "%clusterid.y" 32 ClusterIdY "%clusterid.z" 32 ClusterIdZ "%clusterid.w" 32 ClusterIdW
    "%nclusterid.x" 32 NclusterIdX "%nclusterid.y" 32 NclusterIdY "%nclusterid.z" 32 NclusterIdZ
    "%nclusterid.w" 32 NclusterIdW
    "%cluster_ctaid.x" 32 ClusterCtaidX "%cluster_ctaid.y" 32 ClusterCtaidY "%cluster_ctaid.z" 32 ClusterCtaidZ
    "%cluster_ctaid.w" 32 ClusterCtaidW
    "%cluster_nctaid.x" 32 ClusterNctaidX "%cluster_nctaid.y" 32 ClusterNctaidY "%cluster_nctaid.z" 32 ClusterNctaidZ
    "%cluster_nctaid.w" 32 ClusterNctaidW
    "%is_explicit_cluster" 1 IsExplicitCluster
    "%cluster_ctarank" 32 ClusterCtarank "%cluster_nctarank" 32 ClusterNctarank
}

/// Number of the special register and its width. `WARP_SZ` is not among them.
pub fn find(name: &str) -> Option<(u32, Width)> {
    let width = |bits: u32| match bits {
        1 => Width::Pred,
        64 => Width::W64,
        _ => Width::W32,
    };
    NAMES.iter().find(|(n, ..)| *n == name).map(|(_, number, bits)| (*number, width(*bits)))
}
