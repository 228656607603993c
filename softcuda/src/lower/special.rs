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
    // Performance monitors that nothing configures, registers of other drivers, and no graph: all read as zero.
    "%pm0" 32 Pm0 "%pm0_64" 64 Pm0Wide "%pm1" 32 Pm1 "%pm1_64" 64 Pm1Wide "%pm2" 32 Pm2 "%pm2_64" 64 Pm2Wide "%pm3" 32 Pm3 "%pm3_64" 64 Pm3Wide
    "%pm4" 32 Pm4 "%pm4_64" 64 Pm4Wide "%pm5" 32 Pm5 "%pm5_64" 64 Pm5Wide "%pm6" 32 Pm6 "%pm6_64" 64 Pm6Wide "%pm7" 32 Pm7 "%pm7_64" 64 Pm7Wide
    "%envreg0" 32 Envreg0 "%envreg1" 32 Envreg1 "%envreg2" 32 Envreg2 "%envreg3" 32 Envreg3 "%envreg4" 32 Envreg4 "%envreg5" 32 Envreg5 "%envreg6" 32 Envreg6 "%envreg7" 32 Envreg7
    "%envreg8" 32 Envreg8 "%envreg9" 32 Envreg9 "%envreg10" 32 Envreg10 "%envreg11" 32 Envreg11 "%envreg12" 32 Envreg12 "%envreg13" 32 Envreg13 "%envreg14" 32 Envreg14 "%envreg15" 32 Envreg15
    "%envreg16" 32 Envreg16 "%envreg17" 32 Envreg17 "%envreg18" 32 Envreg18 "%envreg19" 32 Envreg19 "%envreg20" 32 Envreg20 "%envreg21" 32 Envreg21 "%envreg22" 32 Envreg22 "%envreg23" 32 Envreg23
    "%envreg24" 32 Envreg24 "%envreg25" 32 Envreg25 "%envreg26" 32 Envreg26 "%envreg27" 32 Envreg27 "%envreg28" 32 Envreg28 "%envreg29" 32 Envreg29 "%envreg30" 32 Envreg30 "%envreg31" 32 Envreg31
    "%current_graph_exec" 64 CurrentGraphExec
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
