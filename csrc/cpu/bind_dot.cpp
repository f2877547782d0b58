#include "bind.h"
#include "cpu/dot.h"

namespace recon3d {
namespace {
Tensor dot(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.numel() == y.numel() && x.dim() > 0, "dot: shapes differ");
  const int64_t slices = x.size(0), n = slices ? x.numel() / slices : 0;
  Tensor sums = torch::stable::new_empty(x, {slices}, ScalarType::Double);
  Tensor xc = torch::stable::contiguous(x), yc = torch::stable::contiguous(y);
  RECON3D_REAL(x, "dot", {
    const scalar_t *a = in<scalar_t>(xc), *b = in<scalar_t>(yc);
    double* s = out<double>(sums);
    torch::stable::parallel_for(0, slices, 1, [&](int64_t s0, int64_t s1) { dot_cpu(a, b, s, n, s0, s1); });
  })
  return sums;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) { m.impl("dot", TORCH_BOX(&recon3d::dot)); }
