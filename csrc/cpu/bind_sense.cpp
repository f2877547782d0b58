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
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) { m.impl("lane_fft", TORCH_BOX(&recon3d::lane_fft)); }
