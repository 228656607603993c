//! Checks of `token_banks*`.

use moe_kernels::capacity::Ids;
use moe_kernels::reference::token_banks::token_banks as reference;
use moe_kernels::routers::token_banks::{self, TokenBanksArgs, TokenBanksDesc};
use moe_kernels::rules::IdFormat;

use crate::support::buffer::Guarded;
use crate::support::device;
use crate::timing::time;

pub fn check(ids_bytes: u32, rng: &mut fastrand::Rng) {
    for (tokens, banks) in [(1, 1), (1, 2), (300, 2), (257, 3), (513, 7)] {
        let desc = TokenBanksDesc::new(tokens, banks);
        let mut kind = |odd: [i64; 3]| match rng.u32(..6) {
            0 => odd[rng.usize(..3)],
            _ => rng.i64(0..=banks as i64),
        };
        if ids_bytes == 8 {
            let types: Vec<i64> = (0..tokens).map(|_| kind([-1, 1 << 32, i64::MIN])).collect();
            case(&desc.types(IdFormat::I64), &types, &types);
        } else {
            let types: Vec<i64> = (0..tokens).map(|_| kind([-1, i32::MAX.into(), i32::MIN.into()])).collect();
            let narrow: Vec<i32> = types.iter().map(|&kind| kind as i32).collect();
            case(&desc, &types, &narrow);
        }
    }
    case::<i32>(&TokenBanksDesc::new(0, 2), &[], &[]);
}

fn case<I>(desc: &TokenBanksDesc, types: &[i64], stored: &[I])
where
    I: cudarc::driver::DeviceRepr + bytemuck::Pod + PartialEq,
    for<'a> Ids<'a>: From<&'a cudarc::driver::CudaView<'a, I>>,
{
    let (kernels, stream) = (device::kernels(), device::stream());
    let want = reference(types, desc.banks).unwrap();
    let input = Guarded::input(&stream, "types", stored);
    let mut masks = Guarded::<u8>::output(&stream, "masks", desc.banks * desc.tokens);
    let mut launch = || {
        masks.reset(&stream);
        let (types, mut to) = (input.view(), masks.view_mut());
        let args = TokenBanksArgs::new(Ids::from(&types), &mut to);
        token_banks::forward(kernels, &stream, desc, args).unwrap();
        masks.read(&stream)
    };
    assert_eq!(launch(), want, "{desc:?}");
    input.assert_unchanged(&stream);
    time(&stream, &format!("{desc:?}"), || drop(launch()));
}
