// Included by bind_*.cpp only: the stable-ABI headers of torch and the checks that a direct caller of torch.ops could
// break.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace recon3d {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
inline const double* doubles(const Tensor& t) { return static_cast<const double*>(t.data_ptr()); }
inline const int64_t* longs(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }
template <class T>
inline const T* in(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
inline T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
}  // namespace recon3d

// Calls body with scalar_t = float or double; everything else is refused.
#define RECON3D_REAL(TENSOR, NAME, ...)                                                                             \
  if ((TENSOR).scalar_type() == ::recon3d::ScalarType::Float) {                                                     \
    using scalar_t = float;                                                                                         \
    __VA_ARGS__                                                                                                     \
  } else {                                                                                                          \
    STD_TORCH_CHECK((TENSOR).scalar_type() == ::recon3d::ScalarType::Double, NAME ": float32 or float64 expected"); \
    using scalar_t = double;                                                                                        \
    __VA_ARGS__                                                                                                     \
  }
