//! Kernels for Mixture-of-Experts layers.
