//! Triton's side: slots padded to whole tiles on the host, then four launches.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, result, sys};
use half::bf16;

use crate::Result;
use crate::cases::Case;
use crate::inputs::{Batch, Weights};
use crate::tiles::Tile;
use crate::toolchain::{BLOCK, Binary, Kernel};

/// Kernels loaded onto a device.
pub struct Kernels {
    functions: HashMap<Kernel, (sys::CUfunction, Binary)>,
}

/// A parameter of a launch.
enum Param {
    Pointer(u64),
    Number(i32),
}

impl Kernels {
    pub fn load(stream: &Arc<CudaStream>, binaries: HashMap<Kernel, Binary>) -> Result<Kernels> {
        stream.context().bind_to_thread()?;
        let load = |(kernel, binary): (Kernel, Binary)| {
            let (text, name) = (CString::new(binary.ptx.as_str())?, CString::new(binary.name.as_str())?);
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: both texts end in NUL, the module is never unloaded, and the attribute is the function's.
            let function = unsafe {
                let module = result::module::load_data(text.as_ptr().cast())?;
                let function = result::module::get_function(module, name)?;
                result::function::set_function_attribute(function, attribute, binary.shared_bytes as i32)?;
                function
            };
            Ok((kernel, (function, binary)))
        };
        Ok(Kernels { functions: binaries.into_iter().map(load).collect::<Result<_>>()? })
    }

    pub fn binaries(&self) -> impl Iterator<Item = &Binary> {
        self.functions.values().map(|(_, binary)| binary)
    }

    /// # Safety
    /// `params` are what the kernel takes, and it stays within them on this grid.
    unsafe fn launch(&self, stream: &CudaStream, kernel: Kernel, grid: [usize; 2], params: &[Param]) -> Result<()> {
        let (function, binary) = &self.functions[&kernel];
        let mut scratch = vec![0u64; binary.scratch_params];
        let address = |param: &Param| match param {
            Param::Pointer(value) => std::ptr::from_ref(value).cast_mut().cast::<c_void>(),
            Param::Number(value) => std::ptr::from_ref(value).cast_mut().cast(),
        };
        let mut values: Vec<*mut c_void> = params.iter().map(address).collect();
        values.extend(scratch.iter_mut().map(|value| std::ptr::from_mut(value).cast::<c_void>()));
        let (grid, block) = ((grid[0] as u32, grid[1] as u32, 1), (binary.threads, 1, 1));
        // SAFETY: the caller's promise; the values live until the call returns.
        unsafe {
            Ok(result::launch_kernel(*function, grid, block, binary.shared_bytes, stream.cu_stream(), &mut values)?)
        }
    }
}

/// The kernels that a case needs, in the order of their launches.
pub fn kernels(case: &Case, tile: Tile) -> [Kernel; 4] {
    let top_k = case.shape.top_k;
    [
        Kernel::Product { tile, slots_a_row: top_k, weighted: false },
        Kernel::Silu,
        Kernel::Product { tile, slots_a_row: 1, weighted: true },
        Kernel::Sum { top_k },
    ]
}

/// A batch's slots by expert, each expert's padded to whole tiles.
struct Layout {
    /// Slot of each row; the number of slots for padding.
    slot_of_row: Vec<i32>,
    expert_of_tile: Vec<i32>,
    /// Rows in use; a grid is for as many as there can be.
    used: i32,
}

impl Layout {
    fn new(ids: &[i32], experts: usize, tile: usize) -> Layout {
        let mut slots_of = vec![Vec::new(); experts];
        for (slot, &id) in ids.iter().enumerate() {
            slots_of[id as usize].push(slot as i32);
        }
        let most = (ids.len() + ids.len().min(experts) * (tile - 1)) / tile * tile;
        let (mut slot_of_row, mut expert_of_tile) = (Vec::with_capacity(most), Vec::new());
        for (expert, slots) in slots_of.iter().enumerate() {
            slot_of_row.extend(slots);
            slot_of_row.resize(slot_of_row.len().next_multiple_of(tile), ids.len() as i32);
            expert_of_tile.resize(slot_of_row.len() / tile, expert as i32);
        }
        let used = slot_of_row.len() as i32;
        slot_of_row.resize(most, ids.len() as i32);
        expert_of_tile.resize(most / tile, 0);
        Layout { slot_of_row, expert_of_tile, used }
    }
}

/// A batch on the device as Triton's kernels take it.
pub struct Prepared<'a> {
    case: &'a Case,
    tile: Tile,
    slot_of_row: CudaSlice<i32>,
    expert_of_tile: CudaSlice<i32>,
    used: CudaSlice<i32>,
    both: CudaSlice<bf16>,
    h: CudaSlice<bf16>,
    rows: CudaSlice<bf16>,
    y: CudaSlice<bf16>,
}

impl<'a> Prepared<'a> {
    pub fn new(stream: &Arc<CudaStream>, case: &'a Case, batch: &Batch, tile: Tile) -> Result<Prepared<'a>> {
        let layout = Layout::new(&batch.ids, case.shape.experts, tile.rows as usize);
        let (slots, width, hidden) = (case.slots(), case.shape.intermediate, case.shape.hidden);
        Ok(Prepared {
            case,
            tile,
            slot_of_row: stream.clone_htod(&layout.slot_of_row)?,
            expert_of_tile: stream.clone_htod(&layout.expert_of_tile)?,
            used: stream.clone_htod(&[layout.used])?,
            both: stream.alloc_zeros(slots * 2 * width)?,
            h: stream.alloc_zeros(slots * width)?,
            rows: stream.alloc_zeros(slots * hidden)?,
            y: stream.alloc_zeros(case.tokens * hidden)?,
        })
    }

    /// Both products, the activation between them and the sum.
    pub fn run(&self, stream: &Arc<CudaStream>, loaded: &Kernels, weights: &Weights, batch: &Batch) -> Result<()> {
        let [first, silu, second, sum] = kernels(self.case, self.tile);
        let (slots, width, hidden) = (self.case.slots(), self.case.shape.intermediate, self.case.shape.hidden);
        let bf16s = |buffer: &CudaSlice<bf16>| Param::Pointer(buffer.device_ptr(stream).0);
        let i32s = |buffer: &CudaSlice<i32>| Param::Pointer(buffer.device_ptr(stream).0);
        let number = |value: usize| Param::Number(value as i32);
        let product = |kernel, a, b, out, n: usize, depth: usize| {
            let (tiles, group) = (self.expert_of_tile.len(), self.tile.group as usize);
            let grid = tiles.div_ceil(group) * group * n.div_ceil(self.tile.columns as usize);
            let scale = Param::Pointer(batch.device_weights.device_ptr(stream).0);
            let lists = [i32s(&self.slot_of_row), i32s(&self.expert_of_tile), i32s(&self.used)];
            let mut params = vec![a, b, out, scale];
            params.extend(lists);
            params.extend([number(n), number(depth), number(slots)]);
            // SAFETY: the lists name rows of `a` and `out` below `slots`, experts of `b`, and rows in use of the grid's tiles.
            unsafe { loaded.launch(stream, kernel, [grid, 1], &params) }
        };
        product(first, bf16s(&batch.x), bf16s(&weights.gate_up), bf16s(&self.both), 2 * width, hidden)?;
        let params = [bf16s(&self.both), bf16s(&self.h), number(width)];
        // SAFETY: a program for each row and each 1024 columns, masked.
        unsafe { loaded.launch(stream, silu, [slots, width.div_ceil(BLOCK)], &params)? };
        product(second, bf16s(&self.h), bf16s(&weights.down), bf16s(&self.rows), hidden, width)?;
        let params = [bf16s(&self.rows), bf16s(&self.y), number(hidden)];
        // SAFETY: a program for each token and each 1024 columns, masked.
        unsafe { loaded.launch(stream, sum, [self.case.tokens, hidden.div_ceil(BLOCK)], &params)? };
        Ok(())
    }

    /// `[T, H]`.
    pub fn y(&self, stream: &Arc<CudaStream>) -> Result<Vec<bf16>> {
        Ok(stream.clone_dtoh(&self.y)?)
    }
}
