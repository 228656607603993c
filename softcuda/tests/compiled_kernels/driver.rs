//! The same cases on a real driver, where there is one.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{self, CUfunction_attribute_enum as Attribute};
use cudarc::driver::{CudaContext, CudaSlice, DevicePtr, result};
use safetensors::SafeTensors;
use serde_json::Value;
use softcuda::tensormap::{Swizzle, TensorMap};

use super::{tensor_map, three};

/// One parameter's bytes, on a boundary that a tensor map needs.
#[repr(align(128))]
struct Param([u8; 128]);

impl Param {
    fn new(bytes: &[u8]) -> Param {
        let mut param = Param([0; 128]);
        param.0[..bytes.len()].copy_from_slice(bytes);
        param
    }
}

/// Runs a case: what every buffer holds afterwards, by its tensor's name; or what the driver would not do.
pub fn run(
    context: &Arc<CudaContext>,
    case: &Value,
    tensors: &SafeTensors,
    text: &str,
) -> Result<HashMap<String, Vec<u8>>, String> {
    let stream = context.default_stream();
    let upload = |bytes: &[u8]| stream.clone_htod(bytes).expect("device memory");
    let address = |buffer: &CudaSlice<u8>| buffer.device_ptr(&stream).0;
    let listed = case["params"].as_array().unwrap();
    let mut buffers: HashMap<&str, CudaSlice<u8>> = HashMap::new();
    for p in listed {
        for tensor in [&p["tensor"], &p["tensormap"]["tensor"]].into_iter().filter_map(Value::as_str) {
            buffers.entry(tensor).or_insert_with(|| upload(tensors.tensor(tensor).unwrap().data()));
        }
    }
    let mut scratch = Vec::new();
    let mut params = Vec::new();
    for p in listed {
        params.push(if let Some(tensor) = p["tensor"].as_str() {
            Param::new(&address(&buffers[tensor]).to_le_bytes())
        } else if let Some(x) = p["i32"].as_i64() {
            Param::new(&(x as i32).to_le_bytes())
        } else if let Some(x) = p["i64"].as_i64() {
            Param::new(&x.to_le_bytes())
        } else if let Some(x) = p["f32"].as_f64() {
            Param::new(&(x as f32).to_le_bytes())
        } else if p["tensormap"].is_object() {
            let map = &p["tensormap"];
            encode(&tensor_map(map, address(&buffers[map["tensor"].as_str().unwrap()])))?
        } else if let Some(bytes) = p["scratch_bytes"].as_u64() {
            scratch.extend((bytes > 0).then(|| upload(&vec![0; bytes as usize])));
            let at = if bytes > 0 { address(scratch.last().unwrap()) } else { 0 };
            Param::new(&at.to_le_bytes())
        } else {
            panic!("parameter {p}")
        });
    }

    let failed = |what: &'static str| move |error: cudarc::driver::DriverError| format!("{what}: {error}");
    let image = CString::new(text).expect("PTX is text");
    let entry = CString::new(case["entry"].as_str().unwrap()).unwrap();
    let [grid, block] = [three(&case["grid"]), three(&case["block"])];
    let shared = case["dynamic_shared_bytes"].as_u64().unwrap() as u32;
    let mut pointers: Vec<*mut c_void> = params.iter().map(|p| p.0.as_ptr().cast_mut().cast()).collect();
    // SAFETY: the executor, which checks every access, has run the same program on buffers of the same sizes; image and parameters live until
    // the launch has been made, and the module until its work has ended.
    unsafe {
        let module =
            result::module::load_data(image.as_ptr().cast()).map_err(failed("the driver refuses the program"))?;
        let function = result::module::get_function(module, entry).map_err(failed("no such entry"))?;
        let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        result::function::set_function_attribute(function, most, shared as i32).map_err(failed("shared memory"))?;
        let launched =
            result::launch_kernel(function, grid.into(), block.into(), shared, stream.cu_stream(), &mut pointers);
        launched.map_err(failed("the driver does not launch"))?;
        stream.synchronize().map_err(failed("a fault on the device"))?;
        result::module::unload(module).map_err(failed("the module does not unload"))?;
    }
    let read = |(name, buffer): (&str, CudaSlice<u8>)| (name.to_owned(), stream.clone_dtoh(&buffer).expect("a copy"));
    Ok(buffers.into_iter().map(read).collect())
}

/// The driver's form of a tensor map.
fn encode(map: &TensorMap) -> Result<Param, String> {
    use softcuda::tensormap::Element;
    let element = match map.element {
        Element::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        Element::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        Element::F32 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        other => panic!("element {other:?}"),
    };
    let swizzle = match map.swizzle {
        Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::B32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let mut param = Param([0; 128]);
    // SAFETY: the object has 128 bytes on their boundary, and each list `rank` entries (strides one less).
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            param.0.as_mut_ptr().cast(),
            element,
            map.rank as u32,
            map.address as *mut c_void,
            map.dims.as_ptr(),
            map.strides.as_ptr(),
            map.tile.as_ptr(),
            map.steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    status.result().map_err(|error| format!("the driver refuses a tensor map: {error}"))?;
    Ok(param)
}
