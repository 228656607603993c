//! Checks of `by_sequence*`.

use moe_kernels::capacity::Ids;
use moe_kernels::reference::by_sequence::by_sequence as reference;
use moe_kernels::routers::by_sequence::{self, BySequenceArgs, BySequenceDesc};
use moe_kernels::rules::IdFormat;

use crate::support::buffer::Guarded;
use crate::support::device;
use crate::timing::time;

pub fn check(ids_bytes: u32, rng: &mut fastrand::Rng) {
    for (tokens, length, experts) in [(1, 1, 1), (300, 7, 6), (256, 256, 4096), (513, 100, 3), (12, 1000, 8)] {
        let desc = BySequenceDesc::new(tokens, length, experts);
        if ids_bytes == 8 {
            let index = indices(rng, &desc, [i64::MIN, i64::MAX, 1 << 32, -1]);
            case(&desc.index(IdFormat::I64), &index, &index);
        } else {
            let index = indices(rng, &desc, [i32::MIN.into(), i32::MAX.into(), -1, -1]);
            let narrow: Vec<i32> = index.iter().map(|&index| index as i32).collect();
            case(&desc, &index, &narrow);
        }
    }
    case::<i32>(&BySequenceDesc::new(0, 1, 1), &[], &[]);
}

/// Most are experts; the rest is past them, or one of `odd`.
fn indices(rng: &mut fastrand::Rng, desc: &BySequenceDesc, odd: [i64; 4]) -> Vec<i64> {
    let sequences = desc.tokens.div_ceil(desc.tokens_per_sequence);
    let mut index = |_| match rng.u32(..8) {
        0 => odd[rng.usize(..4)],
        1 => desc.experts as i64,
        2 => desc.experts as i64 - 1,
        _ => rng.i64(0..desc.experts as i64),
    };
    (0..sequences).map(&mut index).collect()
}

fn case<I>(desc: &BySequenceDesc, index: &[i64], stored: &[I])
where
    I: cudarc::driver::DeviceRepr + bytemuck::Pod + PartialEq,
    for<'a> Ids<'a>: From<&'a cudarc::driver::CudaView<'a, I>>,
{
    let (kernels, stream) = (device::kernels(), device::stream());
    let (want, shares) = reference(index, desc.tokens, desc.tokens_per_sequence, desc.experts).unwrap();
    let input = Guarded::input(&stream, "index", stored);
    let mut ids = Guarded::<i32>::output(&stream, "ids", desc.tokens);
    let mut weights = Guarded::<f32>::output(&stream, "weights", desc.tokens);
    let mut launch = || {
        ids.reset(&stream);
        weights.reset(&stream);
        let (index, mut to, mut shares) = (input.view(), ids.view_mut(), weights.view_mut());
        let args = BySequenceArgs::new(Ids::from(&index), &mut to, &mut shares);
        by_sequence::forward(kernels, &stream, desc, args).unwrap();
        (ids.read(&stream), weights.read(&stream))
    };
    assert_eq!(launch(), (want, shares), "{desc:?}");
    input.assert_unchanged(&stream);
    time(&stream, &format!("{desc:?}"), || drop(launch()));
}
