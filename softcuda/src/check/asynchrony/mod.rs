//! Asynchronous copies and products: data used before the wait that makes it visible, buffers touched while an operation in
//! flight still reads or writes them, operations that nobody waits for, and the fences that the asynchronous proxy needs.
//!
//! Everything is about shared memory. From its issue on, an operation holds the words that it writes and those that it reads:
//! - `cp.async` until its thread waits for its group, or `cp.async.mbarrier.arrive` has counted it;
//! - `cp.async.bulk` until the engine has written, and read, them;
//! - `wgmma` until a warp of the warpgroup has waited for it.
//!
//! The registers of A and the accumulators of a `wgmma` are its own from its issue to the wait of the warp that they belong to, and
//! between a warp's touching one and a `wgmma` that uses it there must be a `wgmma.fence` (see `lower::in_flight`).
//!
//! Any access to a word that is being written, and any write to one that is being read, is a finding. Generic writes, those of
//! `cp.async` included, to what `wgmma` or a bulk copy reads need a `fence.proxy.async` in between, by the thread that wrote or
//! by a warp of those that issue the operation (PTX ISA 8.4.3, "Async proxy").
//!
//! Not seen:
//! - whether threads other than the one that waited are ordered after the wait: that is the race checker's.
//! - A bulk copy that has landed although the access does not wait for it: the race checker sees it; another seed lands later.
//! - Asynchronous writes and generic accesses in global memory, and proxy fences for it, and those of tensor maps.
//! - `wgmma` of another shape on accumulators in flight, which would need a `wgmma.fence`.
//! - Of two operations that read the same word, only the one issued last holds it.

mod flight;
mod observer;

use std::sync::Arc;

use super::Findings;
use crate::exec::Launch;
use crate::exec::observe::{Observer, Watch};

/// The checker.
#[derive(Debug)]
pub struct Async {
    findings: Arc<Findings>,
}

impl Async {
    pub fn new(findings: Arc<Findings>) -> Async {
        Async { findings }
    }
}

impl Watch for Async {
    fn observer<'a>(&'a self, launch: &'a Launch<'a>, _grid: u64) -> Option<Box<dyn Observer + 'a>> {
        let uses = |what: &str| launch.kernel.lines.iter().any(|line| line.contains(what));
        let proxied = uses("wgmma") || uses("cp.async.bulk") || uses("cp.reduce.async.bulk");
        let any = proxied || uses("cp.async");
        any.then(|| Box::new(observer::AsyncObserver::new(&self.findings, launch.kernel, proxied)) as Box<dyn Observer>)
    }
}
