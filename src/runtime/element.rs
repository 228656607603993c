//! Element types of activations and weights.

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DeviceRepr, ValidAsZeroBits};

use super::buffer::{In, Out};
use crate::rules::Dtype;

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for f32 {}
}

/// A storage type that the kernels know: [`half::bf16`], [`half::f16`] or `f32`.
///
/// Sums are kept in f32 whatever the storage type; a result is rounded to it once, to nearest even.
pub trait Element: sealed::Sealed + DeviceRepr + ValidAsZeroBits + Copy + Default + Send + Sync + 'static {
    /// The type's name in the registry of kernels.
    const DTYPE: Dtype;

    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;

    /// Exact.
    fn to_f32(self) -> f32;

    /// The buffer with its type as a value.
    #[doc(hidden)]
    fn tensor(buffer: In<'_, Self>) -> Tensor<'_>;

    /// The buffer, if it is of this type.
    #[doc(hidden)]
    fn of_tensor(tensor: Tensor<'_>) -> Option<In<'_, Self>>;

    /// The same of a buffer to write.
    #[doc(hidden)]
    fn out_tensor(buffer: Out<'_, Self>) -> OutTensor<'_>;
}

impl Element for half::bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    fn from_f32(value: f32) -> Self {
        half::bf16::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    fn tensor(buffer: In<'_, Self>) -> Tensor<'_> {
        Tensor::Bf16(buffer)
    }

    fn of_tensor(tensor: Tensor<'_>) -> Option<In<'_, Self>> {
        match tensor {
            Tensor::Bf16(buffer) => Some(buffer),
            _ => None,
        }
    }

    fn out_tensor(buffer: Out<'_, Self>) -> OutTensor<'_> {
        OutTensor::Bf16(buffer)
    }
}

impl Element for half::f16 {
    const DTYPE: Dtype = Dtype::F16;

    fn from_f32(value: f32) -> Self {
        half::f16::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    fn tensor(buffer: In<'_, Self>) -> Tensor<'_> {
        Tensor::F16(buffer)
    }

    fn of_tensor(tensor: Tensor<'_>) -> Option<In<'_, Self>> {
        match tensor {
            Tensor::F16(buffer) => Some(buffer),
            _ => None,
        }
    }

    fn out_tensor(buffer: Out<'_, Self>) -> OutTensor<'_> {
        OutTensor::F16(buffer)
    }
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;

    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }

    fn tensor(buffer: In<'_, Self>) -> Tensor<'_> {
        Tensor::F32(buffer)
    }

    fn of_tensor(tensor: Tensor<'_>) -> Option<In<'_, Self>> {
        match tensor {
            Tensor::F32(buffer) => Some(buffer),
            _ => None,
        }
    }

    fn out_tensor(buffer: Out<'_, Self>) -> OutTensor<'_> {
        OutTensor::F32(buffer)
    }
}

/// A buffer of weights or logits, whose type is a value: made with `From` of what [`In`] is made of.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum Tensor<'a> {
    /// bfloat16.
    Bf16(In<'a, half::bf16>),
    /// IEEE half precision.
    F16(In<'a, half::f16>),
    /// IEEE single precision.
    F32(In<'a, f32>),
}

impl Tensor<'_> {
    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        match self {
            Tensor::Bf16(_) => Dtype::Bf16,
            Tensor::F16(_) => Dtype::F16,
            Tensor::F32(_) => Dtype::F32,
        }
    }
}

impl<'a, T: Element> From<In<'a, T>> for Tensor<'a> {
    fn from(buffer: In<'a, T>) -> Self {
        T::tensor(buffer)
    }
}

impl<'a, T: Element> From<&'a CudaSlice<T>> for Tensor<'a> {
    fn from(buffer: &'a CudaSlice<T>) -> Self {
        T::tensor(buffer.into())
    }
}

impl<'a, T: Element> From<&'a CudaView<'_, T>> for Tensor<'a> {
    fn from(buffer: &'a CudaView<'_, T>) -> Self {
        T::tensor(buffer.into())
    }
}

impl<'a, T: Element> From<&'a CudaViewMut<'_, T>> for Tensor<'a> {
    fn from(buffer: &'a CudaViewMut<'_, T>) -> Self {
        T::tensor(buffer.into())
    }
}

/// A buffer of logits to write, whose type is a value: made with `From` of what [`Out`] is made of.
#[non_exhaustive]
pub enum OutTensor<'a> {
    /// bfloat16.
    Bf16(Out<'a, half::bf16>),
    /// IEEE half precision.
    F16(Out<'a, half::f16>),
    /// IEEE single precision.
    F32(Out<'a, f32>),
}

impl OutTensor<'_> {
    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        match self {
            OutTensor::Bf16(_) => Dtype::Bf16,
            OutTensor::F16(_) => Dtype::F16,
            OutTensor::F32(_) => Dtype::F32,
        }
    }

    /// The same buffer for a shorter time.
    pub fn reborrow(&mut self) -> OutTensor<'_> {
        match self {
            OutTensor::Bf16(buffer) => OutTensor::Bf16(buffer.reborrow()),
            OutTensor::F16(buffer) => OutTensor::F16(buffer.reborrow()),
            OutTensor::F32(buffer) => OutTensor::F32(buffer.reborrow()),
        }
    }
}

impl<'a, T: Element> From<Out<'a, T>> for OutTensor<'a> {
    fn from(buffer: Out<'a, T>) -> Self {
        T::out_tensor(buffer)
    }
}

impl<'a, T: Element> From<&'a mut CudaSlice<T>> for OutTensor<'a> {
    fn from(buffer: &'a mut CudaSlice<T>) -> Self {
        T::out_tensor(buffer.into())
    }
}

impl<'a, T: Element> From<&'a mut CudaViewMut<'_, T>> for OutTensor<'a> {
    fn from(buffer: &'a mut CudaViewMut<'_, T>) -> Self {
        T::out_tensor(buffer.into())
    }
}
