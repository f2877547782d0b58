#include <vector>

#include "bind.h"
#include "cpu/sense.h"

namespace recon3d {
namespace {
void run_all(int64_t n, PieceBody body, void* context) {
  if (n > 0) torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

// Calls body with scalar_t = float or double for complex64 or complex128.
#define RECON3D_COMPLEX(TENSOR, NAME, ...)                                                                           \
  if ((TENSOR).scalar_type() == ScalarType::ComplexFloat) {                                                          \
    using scalar_t = float;                                                                                          \
    __VA_ARGS__                                                                                                      \
  } else {                                                                                                           \
    STD_TORCH_CHECK((TENSOR).scalar_type() == ScalarType::ComplexDouble, NAME ": complex64 or complex128 expected"); \
    using scalar_t = double;                                                                                         \
    __VA_ARGS__                                                                                                      \
  }

Tensor lane_fft(const Tensor& x, int64_t sign, int64_t shift) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.size(1) < (1 << 24), "lane_fft: x must be [row, n], n > 0");
  STD_TORCH_CHECK((sign == 1 || sign == -1) && shift >= 0 && shift < x.size(1), "lane_fft: sign must be 1 or -1");
  const Tensor xc = torch::stable::contiguous(x);
  Tensor out_ = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  RECON3D_COMPLEX(x, "lane_fft", {
    lane_kernels<scalar_t>().fft(lane_plan<scalar_t>(static_cast<int>(x.size(1)), static_cast<int>(sign)),
                                 in<scalar_t>(xc), out<scalar_t>(out_), x.size(0), static_cast<int>(shift), run_all);
  })
  return out_;
}
Tensor sense_pack(const Tensor& maps, bool along_y) {
  STD_TORCH_CHECK(maps.dim() == 4 && maps.size(1) > 0, "sense_pack: maps must be [z, coil, y, x]");
  const int64_t z = maps.size(0), coils = maps.size(1), ny = maps.size(2), nx = maps.size(3);
  const Tensor mc = torch::stable::contiguous(maps);
  Tensor packed = torch::stable::new_empty(
      maps, {z, (coils + kChunk - 1) / kChunk, along_y ? nx : ny, along_y ? ny : nx, int64_t{kChunk}});
  RECON3D_COMPLEX(maps, "sense_pack", {
    wish_large_pages(out<scalar_t>(packed), packed.numel() * 2 * sizeof(scalar_t));
    lane_kernels<scalar_t>().pack(in<scalar_t>(mc), out<scalar_t>(packed), z, coils, ny, nx, along_y, run_all);
  })
  return packed;
}

// What all of x, maps and weights share; `lines` of `length` elements make a slice.
template <class T>
SenseJob<T> job_of(const char* name, const Tensor& x, const Tensor& maps, const Tensor& weights, int64_t coils,
                   const Tensor& result, bool along_y) {
  const int64_t ny = x.size(1), nx = x.size(2), lines = along_y ? nx : ny, length = along_y ? ny : nx;
  STD_TORCH_CHECK(ny > 0 && nx > 0 && ny < (1 << 24) && nx < (1 << 24) && coils > 0, name, ": no empty axis");
  STD_TORCH_CHECK(maps.size(0) == x.size(0) && maps.size(1) == (coils + kChunk - 1) / kChunk && maps.size(2) == lines &&
                      maps.size(3) == length && maps.size(4) == kChunk,
                  name, ": maps must be [z, chunk, line, element, 8] like x");
  STD_TORCH_CHECK(maps.scalar_type() == x.scalar_type() &&
                      weights.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double),
                  name, ": x, maps and weights must have one precision");
  STD_TORCH_CHECK(weights.size(0) == 1 || weights.size(0) == x.size(0), name, ": weights for one or for every slice");
  return {in<T>(x),
          in<T>(maps),
          in<T>(weights),
          out<T>(result),
          x.size(0),
          coils,
          ny,
          nx,
          weights.size(0),
          along_y,
          false,
          run_all,
          static_cast<int>(torch::stable::get_num_threads())};
}

Tensor sense_lines(const Tensor& x, const Tensor& maps, const Tensor& weights, int64_t coils, bool along_y) {
  STD_TORCH_CHECK(x.dim() == 3 && maps.dim() == 5 && weights.dim() == 2, "sense_lines: x must be [z, y, x]");
  STD_TORCH_CHECK(weights.size(1) == x.size(along_y ? 1 : 2), "sense_lines: one weight per element of a line");
  const Tensor xc = torch::stable::contiguous(x), mc = torch::stable::contiguous(maps),
               wc = torch::stable::contiguous(weights);
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  if (x.size(0)) {
    RECON3D_COMPLEX(x, "sense_lines", {
      lane_kernels<scalar_t>().lines(job_of<scalar_t>("sense_lines", xc, mc, wc, coils, result, along_y));
    })
  }
  return result;
}

Tensor sense_planes(const Tensor& x, const Tensor& maps, const Tensor& weights, int64_t coils) {
  STD_TORCH_CHECK(x.dim() == 3 && maps.dim() == 5 && weights.dim() == 3, "sense_planes: x must be [z, y, x]");
  const int64_t factor = weights.size(1) == x.size(1) && weights.size(2) == x.size(2) ? 1 : 2;
  STD_TORCH_CHECK(weights.size(1) == factor * x.size(1) && weights.size(2) == factor * x.size(2),
                  "sense_planes: weights must have the size of a slice, or twice that");
  const Tensor xc = torch::stable::contiguous(x), mc = torch::stable::contiguous(maps),
               wc = torch::stable::contiguous(weights);
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  if (x.size(0)) {
    RECON3D_COMPLEX(x, "sense_planes", {
      SenseJob<scalar_t> job = job_of<scalar_t>("sense_planes", xc, mc, wc, coils, result, false);
      job.doubled = factor == 2;
      lane_kernels<scalar_t>().planes(job);
    })
  }
  return result;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("lane_fft", TORCH_BOX(&recon3d::lane_fft));
  m.impl("sense_pack", TORCH_BOX(&recon3d::sense_pack));
  m.impl("sense_lines", TORCH_BOX(&recon3d::sense_lines));
  m.impl("sense_planes", TORCH_BOX(&recon3d::sense_planes));
}
