//! What is ordered across streams and what is not, and the way to do it right: the crate's documentation, as tests.
//!
//! A gate holds a stream's work back, so that each order that is not kept shows as a wrong result, at every run.

mod async_support;

use std::thread;
use std::time::Duration;

use async_support::{E, Gate, K, Problem, T, context};
use cudarc::driver::CudaContext;
use moe_kernels::routers::gating::{self, GatingArgs};
use moe_kernels::{Error, Kernels};

/// Long enough that a copy which does not wait has been done.
const A_WHILE: Duration = Duration::from_millis(200);

#[test]
fn a_reader_waits_for_the_writer_and_a_writer_for_the_reader() {
    let p = Problem::new(&context());
    let (writer, other) = (p.context.new_stream().unwrap(), p.context.new_stream().unwrap());
    let (mut logits, mut ids, mut weights) = p.buffers();
    let gate = Gate::close(&writer);
    gating::forward(&p.kernels, &writer, &p.desc, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
    // The other stream's write must come after the first one's read.
    other.memset_zeros(&mut logits).unwrap();
    let got = thread::scope(|scope| {
        let copy = scope.spawn(|| other.clone_dtoh(&ids).unwrap());
        thread::sleep(A_WHILE);
        assert!(!copy.is_finished(), "read before it was written");
        gate.open();
        copy.join().unwrap()
    });
    assert_eq!(got, p.expected());
}

/// cudarc stops to order when the last stream that it made is dropped, though its work may be under way. [`Kernels`] keeps one.
#[test]
fn work_of_a_dropped_stream_is_waited_for() {
    let p = Problem::new(&context());
    let (logits, mut ids, mut weights) = p.buffers();
    let stream = p.context.new_stream().unwrap();
    let gate = Gate::close(&stream);
    gating::forward(&p.kernels, &stream, &p.desc, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
    drop(stream);
    let reader = p.context.default_stream();
    let got = thread::scope(|scope| {
        let copy = scope.spawn(|| reader.clone_dtoh(&ids).unwrap());
        thread::sleep(A_WHILE);
        assert!(!copy.is_finished(), "read before it was written");
        gate.open();
        copy.join().unwrap()
    });
    assert_eq!(got, p.expected());
    let Problem { context, kernels, .. } = p;
    assert!(context.is_in_multi_stream_mode());
    drop(kernels);
    assert!(!context.is_in_multi_stream_mode(), "the kernels' stream goes with them");
}

/// A buffer has one read event: of two streams that read it, a writer waits for the one that asked last. The others it must join.
#[test]
fn a_writer_joins_all_readers() {
    let p = Problem::new(&context());
    let [first, second, writer] = [(); 3].map(|()| p.context.new_stream().unwrap());
    let (mut logits, mut ids, mut weights) = p.buffers();
    let (_, mut other_ids, mut other_weights) = p.buffers();
    let gate = Gate::close(&first);
    gating::forward(&p.kernels, &first, &p.desc, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
    let args = GatingArgs::new(&logits, &mut other_ids, &mut other_weights);
    gating::forward(&p.kernels, &second, &p.desc, args).unwrap();
    writer.join(&first).unwrap();
    writer.join(&second).unwrap();
    writer.memset_zeros(&mut logits).unwrap();
    second.synchronize().unwrap();
    thread::sleep(A_WHILE);
    gate.open();
    assert_eq!(first.clone_dtoh(&ids).unwrap(), p.expected());
    assert_eq!(second.clone_dtoh(&other_ids).unwrap(), p.expected());
}

/// cudarc counts no stream where each thread uses its own: the first operation on one makes it order streams.
#[test]
fn streams_of_threads_wait_for_each_other() {
    let p = Problem::new(&context());
    let (logits, mut ids, mut weights) = p.buffers();
    assert!(!p.context.is_in_multi_stream_mode());
    let (started, start) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let written = scope.spawn(|| {
            let own = p.context.per_thread_stream();
            // The first operation waits once for all work: before the gate.
            gating::forward(&p.kernels, &own, &p.desc, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
            own.memset_zeros(&mut ids).unwrap();
            own.synchronize().unwrap();
            let gate = Gate::close(&own);
            gating::forward(&p.kernels, &own, &p.desc, GatingArgs::new(&logits, &mut ids, &mut weights)).unwrap();
            started.send((gate, ids)).unwrap();
            // A thread's stream ends with it: not before its work.
            own.synchronize().unwrap();
        });
        let (gate, ids) = start.recv().unwrap();
        let context = &p.context;
        let copy = scope.spawn(move || context.per_thread_stream().clone_dtoh(&ids).unwrap());
        thread::sleep(A_WHILE);
        assert!(!copy.is_finished(), "read before it was written");
        gate.open();
        assert_eq!(copy.join().unwrap(), p.expected());
        written.join().unwrap();
    });
}

/// Two values of one device's context order only their own streams: what belongs to the second is refused.
#[test]
fn a_second_value_of_the_context_is_refused() {
    let p = Problem::new(&context());
    let second = CudaContext::new(0).unwrap();
    assert_eq!(second.cu_ctx(), p.context.cu_ctx(), "the same context of the driver");
    let stream = p.context.default_stream();
    let foreign_stream = second.default_stream();
    let foreign = foreign_stream.alloc_zeros::<f32>(T * E).unwrap();
    let (logits, mut ids, mut weights) = p.buffers();
    let refused = |argument| Err(Error::DifferentContext { operation: "gating", argument });
    let args = GatingArgs::new(&foreign, &mut ids, &mut weights);
    assert_eq!(gating::forward(&p.kernels, &stream, &p.desc, args), refused("logits"));
    let args = GatingArgs::new(&logits, &mut ids, &mut weights);
    assert_eq!(gating::forward(&p.kernels, &foreign_stream, &p.desc, args), refused("stream"));
    let mut foreign_ids = foreign_stream.alloc_zeros::<i32>(T * K).unwrap();
    let args = GatingArgs::new(&logits, &mut foreign_ids, &mut weights);
    assert_eq!(gating::forward(&p.kernels, &stream, &p.desc, args), refused("ids"));
    let args = GatingArgs::new(&logits, &mut ids, &mut weights);
    let foreign_kernels = Kernels::new(&second).unwrap();
    assert_eq!(gating::forward(&foreign_kernels, &stream, &p.desc, args), refused("stream"));
}
