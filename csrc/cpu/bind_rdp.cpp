#include "bind.h"
#include "cpu/rdp.h"

namespace recon3d {
namespace {
Tensor rdp_gradient(const Tensor& x, double gamma, double epsilon, double wz, double wy, double wx) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "rdp_gradient: a contiguous volume [z, y, x] is needed");
  Tensor result = torch::stable::empty_like(x);
  if (x.numel() == 0) return result;
  RECON3D_REAL(x, "rdp_gradient", {
    const Rdp<scalar_t> v{x.size(0),
                          x.size(1),
                          x.size(2),
                          static_cast<scalar_t>(gamma),
                          static_cast<scalar_t>(epsilon),
                          static_cast<scalar_t>(wz),
                          static_cast<scalar_t>(wy),
                          static_cast<scalar_t>(wx)};
    const scalar_t* xs = in<scalar_t>(x);
    scalar_t* os = out<scalar_t>(result);
    torch::stable::parallel_for(0, v.slices, 1, [&](int64_t s0, int64_t s1) { rdp_gradient_cpu(v, xs, os, s0, s1); });
  })
  return result;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) { m.impl("rdp_gradient", TORCH_BOX(&recon3d::rdp_gradient)); }
