#include "bind.h"
#include "cuda/sense.h"
#include "cuda/stream.h"

namespace recon3d {
namespace {
constexpr int64_t kChunk = 8;
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

#define RECON3D_COMPLEX(TENSOR, NAME, ...)                                                                           \
  if ((TENSOR).scalar_type() == ScalarType::ComplexFloat) {                                                          \
    using scalar_t = float;                                                                                          \
    __VA_ARGS__                                                                                                      \
  } else {                                                                                                           \
    STD_TORCH_CHECK((TENSOR).scalar_type() == ScalarType::ComplexDouble, NAME ": complex64 or complex128 expected"); \
    using scalar_t = double;                                                                                         \
    __VA_ARGS__                                                                                                      \
  }

template <class T>
cuda::SenseJob<T> job_of(const char* name, const Tensor& x, const Tensor& maps, const Tensor& weights, int64_t coils,
                         const Tensor& result, bool along_y, bool doubled) {
  const int64_t ny = x.size(1), nx = x.size(2), lines = along_y ? nx : ny, length = along_y ? ny : nx;
  STD_TORCH_CHECK(ny > 0 && nx > 0 && coils > 0 && coils < (1 << 20) && x.size(0) * (ny > nx ? ny : nx) <= kMostBlocks,
                  name, ": no empty axis and less than 2^31 lines expected");
  STD_TORCH_CHECK(maps.size(0) == x.size(0) && maps.size(1) == (coils + kChunk - 1) / kChunk && maps.size(2) == lines &&
                      maps.size(3) == length && maps.size(4) == kChunk,
                  name, ": maps must be [z, chunk, line, element, 8] like x");
  STD_TORCH_CHECK(maps.scalar_type() == x.scalar_type() &&
                      weights.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double),
                  name, ": x, maps and weights must have one precision");
  STD_TORCH_CHECK(maps.get_device_index() == x.get_device_index() && maps.is_cuda() && weights.is_cuda() &&
                      weights.get_device_index() == x.get_device_index(),
                  name, ": x, maps and weights must be on one device");
  STD_TORCH_CHECK(weights.size(0) == 1 || weights.size(0) == x.size(0), name, ": weights for one or for every slice");
  return {in<T>(x), in<T>(maps), in<T>(weights),  out<T>(result), x.size(0), coils,
          ny,       nx,          weights.size(0), along_y,        doubled};
}

// Scratch of `elements` reals on x's device.
template <class T>
Tensor scratch(const Tensor& x, int64_t elements) {
  return torch::stable::new_empty(x, {(elements + 1) / 2});
}

Tensor sense_lines(const Tensor& x, const Tensor& maps, const Tensor& weights, int64_t coils, bool along_y) {
  STD_TORCH_CHECK(x.dim() == 3 && maps.dim() == 5 && weights.dim() == 2, "sense_lines: x must be [z, y, x]");
  STD_TORCH_CHECK(weights.size(1) == x.size(along_y ? 1 : 2), "sense_lines: one weight per element of a line");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor xc = torch::stable::contiguous(x), mc = torch::stable::contiguous(maps),
               wc = torch::stable::contiguous(weights);
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  if (x.size(0)) {
    RECON3D_COMPLEX(x, "sense_lines", {
      const auto job = job_of<scalar_t>("sense_lines", xc, mc, wc, coils, result, along_y, false);
      Tensor work = scratch<scalar_t>(x, cuda::sense_lines_workspace(job));
      const char* error = cuda::sense_lines(job, out<scalar_t>(work), cuda_stream(x.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "sense_lines: ", error);
    })
  }
  return result;
}

Tensor sense_planes(const Tensor& x, const Tensor& maps, const Tensor& weights, int64_t coils) {
  STD_TORCH_CHECK(x.dim() == 3 && maps.dim() == 5 && weights.dim() == 3, "sense_planes: x must be [z, y, x]");
  const bool doubled = !(weights.size(1) == x.size(1) && weights.size(2) == x.size(2));
  const int64_t factor = doubled ? 2 : 1;
  STD_TORCH_CHECK(weights.size(1) == factor * x.size(1) && weights.size(2) == factor * x.size(2),
                  "sense_planes: weights must have the size of a slice, or twice that");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor xc = torch::stable::contiguous(x), mc = torch::stable::contiguous(maps),
               wc = torch::stable::contiguous(weights);
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  if (x.size(0)) {
    RECON3D_COMPLEX(x, "sense_planes", {
      const auto job = job_of<scalar_t>("sense_planes", xc, mc, wc, coils, result, false, doubled);
      Tensor work = scratch<scalar_t>(x, cuda::sense_planes_workspace(job));
      const char* error = cuda::sense_planes(job, out<scalar_t>(work), cuda_stream(x.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "sense_planes: ", error);
    })
  }
  return result;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CUDA, m) {
  m.impl("sense_lines", TORCH_BOX(&recon3d::sense_lines));
  m.impl("sense_planes", TORCH_BOX(&recon3d::sense_planes));
}
