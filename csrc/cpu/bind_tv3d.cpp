#include "bind.h"
#include "cpu/tv3d.h"

namespace recon3d {
namespace {
void check(const Tensor& x, const Tensor& other, int64_t times) {
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && other.is_contiguous() && other.numel() == times * x.numel() &&
                      other.scalar_type() == x.scalar_type(),
                  "tv3d: contiguous volumes [z, y, x] and a field [3, z, y, x] of one dtype are needed");
}

void tv3d_dual_(Tensor p, const Tensor& xbar, double sigma, double limit, double fz, double fy, double fx) {
  check(xbar, p, 3);
  RECON3D_REAL(xbar, "tv3d_dual_", {
    const Tv3d<scalar_t> v{xbar.size(0),
                           xbar.size(1),
                           xbar.size(2),
                           static_cast<scalar_t>(fz),
                           static_cast<scalar_t>(fy),
                           static_cast<scalar_t>(fx)};
    scalar_t* ps = out<scalar_t>(p);
    const scalar_t* xs = in<scalar_t>(xbar);
    torch::stable::parallel_for(0, v.slices, 1, [&](int64_t s0, int64_t s1) {
      tv3d_dual_cpu(v, ps, xs, static_cast<scalar_t>(sigma), static_cast<scalar_t>(limit), s0, s1);
    });
  })
}

void tv3d_primal_(Tensor x, Tensor xbar, const Tensor& p, const Tensor& g, double tau, double fz, double fy, double fx,
                  bool nonnegative) {
  check(x, p, 3);
  check(x, xbar, 1);
  check(x, g, 1);
  RECON3D_REAL(x, "tv3d_primal_", {
    const Tv3d<scalar_t> v{x.size(0),
                           x.size(1),
                           x.size(2),
                           static_cast<scalar_t>(fz),
                           static_cast<scalar_t>(fy),
                           static_cast<scalar_t>(fx)};
    scalar_t *xs = out<scalar_t>(x), *bs = out<scalar_t>(xbar);
    const scalar_t *ps = in<scalar_t>(p), *gs = in<scalar_t>(g);
    torch::stable::parallel_for(0, v.slices, 1, [&](int64_t s0, int64_t s1) {
      tv3d_primal_cpu(v, xs, bs, ps, gs, static_cast<scalar_t>(tau), nonnegative, s0, s1);
    });
  })
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("tv3d_dual_", TORCH_BOX(&recon3d::tv3d_dual_));
  m.impl("tv3d_primal_", TORCH_BOX(&recon3d::tv3d_primal_));
}
