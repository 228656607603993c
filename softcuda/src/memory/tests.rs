use super::*;

fn memory() -> Memory {
    Memory::new(80 << 30).unwrap()
}

fn bytes(addr: u64, len: usize) -> &'static mut [u8] {
    // SAFETY: each test passes a live allocation of at least `len` bytes and drops the slice before freeing it.
    unsafe { std::slice::from_raw_parts_mut(addr as *mut u8, len) }
}

fn is_poison(bytes: &[u8]) -> bool {
    bytes.chunks(2).all(|pair| pair == &POISON.to_ne_bytes()[..pair.len()])
}

#[test]
fn poison_is_conspicuous_in_every_type() {
    let word = u32::from(POISON) << 16 | u32::from(POISON);
    assert!(f32::from_bits(word).is_nan());
    assert!(half::f16::from_bits(POISON).is_nan() && half::bf16::from_bits(POISON).is_nan());
    assert!(word as i32 > 1 << 30);
}

#[test]
fn allocations_are_poisoned_aligned_and_apart() {
    let memory = memory();
    let mut last_end = 0;
    for size in [1, 255, 256, 4096, 70_001, 1 << 20, 5 << 20, 40 << 20] {
        let addr = memory.alloc(size).unwrap();
        assert_eq!(addr % ALIGNMENT, 0);
        assert_ne!(addr % 512, 0, "no better aligned than promised");
        assert!(addr >= last_end + RED_ZONE);
        let body = bytes(addr, size as usize);
        assert!(is_poison(body));
        body.fill(1);
        last_end = addr + size;
        assert_eq!(memory.find(last_end), None);
        assert_eq!(memory.find(addr - 1), None);
        assert_eq!(memory.find(addr + size - 1).unwrap().start, addr);
    }
}

#[test]
fn freed_memory_is_poison_again_and_not_reused() {
    let memory = memory();
    let keep = memory.alloc(64).unwrap();
    let first = memory.alloc(64).unwrap();
    bytes(first, 64).fill(7);
    bytes(keep, 64).fill(9);
    let before = memory.generation();
    memory.free(first).unwrap();
    assert_ne!(memory.generation(), before);
    assert!(is_poison(bytes(first, 64)), "released, still mapped beside its neighbour");
    assert!(bytes(keep, 64).iter().all(|&b| b == 9));
    for _ in 0..2000 {
        let again = memory.alloc(64).unwrap();
        assert_ne!(again, first);
        memory.free(again).unwrap();
    }
    let text = memory.describe(first + 3);
    assert!(text.contains("is 3 bytes into allocation #2 (64 bytes") && text.ends_with("freed"), "{text}");
}

#[test]
fn large_memory_is_committed_lazily() {
    let resident = || {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let memory = memory();
    let before = resident();
    let addr = memory.alloc(40 << 30).unwrap();
    for at in (0..40u64 << 30).step_by(1 << 30) {
        assert!(is_poison(bytes(addr + at + 12, 6)));
        bytes(addr + at, 4).copy_from_slice(&[1, 2, 3, 4]);
    }
    assert!(resident() - before < 256 << 20);
    memory.free(addr).unwrap();
}

#[test]
fn churn_does_not_run_out_of_mappings() {
    let memory = memory();
    // 1.25 TiB in all: more chunks than the kernel allows mappings.
    for _ in 0..160 {
        let addr = memory.alloc(8 << 30).unwrap();
        bytes(addr, 4).fill(1);
        memory.free(addr).unwrap();
    }
    let mut live: Vec<u64> = (0..20_000).map(|_| memory.alloc(100).unwrap()).collect();
    for addr in live.drain(..) {
        memory.free(addr).unwrap();
    }
    assert_eq!(memory.available(), memory.total());
}

#[test]
fn totals_are_honest() {
    let memory = Memory::new(1 << 20).unwrap();
    let half = memory.alloc(1 << 19).unwrap();
    assert_eq!(memory.available(), 1 << 19);
    let error = memory.alloc((1 << 19) + 1).unwrap_err();
    assert!(matches!(error, MemoryError::OutOfMemory { free: 524_288, total: 1_048_576, .. }), "{error}");
    memory.alloc_kind(1 << 22, Kind::Host).unwrap();
    memory.alloc(1 << 19).unwrap();
    assert_eq!(memory.available(), 0);
    memory.free(half).unwrap();
    assert_eq!(memory.available(), 1 << 19);
    assert!(matches!(memory.alloc(0), Err(MemoryError::Empty)));
    for absurd in [u64::MAX, u64::MAX - 600, 1 << 63] {
        assert!(matches!(memory.alloc(absurd), Err(MemoryError::OutOfMemory { .. })));
        assert!(matches!(memory.alloc_kind(absurd, Kind::Host), Err(MemoryError::Host(_))));
    }
}

#[test]
fn errors_describe_the_address() {
    let memory = memory();
    let addr = memory.alloc(100).unwrap();
    assert!(memory.describe(0).contains("null pointer"));
    assert!(memory.describe(addr + 108).contains("8 bytes past the end of allocation #1 (100 bytes at"));
    assert!(memory.describe(addr - 4).contains("4 bytes before the start of allocation #1"));
    assert!(memory.describe(0x1234_5678).contains("not near any allocation"));
    assert!(memory.check(addr + 50, 50).is_ok());
    let error = memory.check(addr + 50, 51).unwrap_err().to_string();
    assert!(error.contains("ends 1 bytes past the end of allocation #1"), "{error}");
    assert!(matches!(memory.free(addr + 1), Err(MemoryError::NotAllocated(_))));
    memory.free(addr).unwrap();
    let error = memory.free(addr).unwrap_err().to_string();
    assert!(error.contains("freed"), "{error}");
    assert!(memory.check(addr, 1).unwrap_err().to_string().contains("which has been freed"));
}
