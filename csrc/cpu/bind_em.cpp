#include <optional>

#include "bind.h"
#include "cpu/em.h"

namespace recon3d {
namespace {
constexpr int64_t kGrain = 16384;

void alike(const Tensor& x, const Tensor& other, int64_t numel, const char* name) {
  STD_TORCH_CHECK(
      x.is_contiguous() && other.is_contiguous() && other.numel() == numel && other.scalar_type() == x.scalar_type(),
      name, ": contiguous tensors of fitting sizes and one dtype are needed");
}

Tensor poisson_ratio(const Tensor& y, const Tensor& projection, std::optional<Tensor> factors,
                     std::optional<Tensor> additive, double scale, int64_t repeat, int64_t inner, bool short_factors,
                     bool short_additive) {
  const int64_t n = y.numel();
  STD_TORCH_CHECK(repeat > 0 && inner > 0 && n % (repeat * inner) == 0,
                  "poisson_ratio: y must hold whole blocks of repeat times inner values");
  alike(y, projection, n, "poisson_ratio");
  if (factors) alike(y, *factors, short_factors ? n / repeat : n, "poisson_ratio");
  if (additive) alike(y, *additive, short_additive ? n / repeat : n, "poisson_ratio");
  Tensor result = torch::stable::empty_like(y);
  RECON3D_REAL(y, "poisson_ratio", {
    const scalar_t *ys = in<scalar_t>(y), *ps = in<scalar_t>(projection);
    const scalar_t *fs = factors ? in<scalar_t>(*factors) : nullptr, *bs = additive ? in<scalar_t>(*additive) : nullptr;
    scalar_t* os = out<scalar_t>(result);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t i0, int64_t i1) {
      poisson_ratio_cpu(ys, ps, fs, bs, os, static_cast<scalar_t>(scale), Repeat{repeat, inner}, short_factors,
                        short_additive, i0, i1);
    });
  })
  return result;
}

Tensor em_update(const Tensor& x, const Tensor& back, const Tensor& sensitivity, std::optional<Tensor> anchor,
                 double anchor_weight, double rdp, double gamma, double epsilon, double wz, double wy, double wx,
                 bool surrogate, double floor) {
  STD_TORCH_CHECK(x.dim() == 3, "em_update: a volume [z, y, x] is needed");
  alike(x, back, x.numel(), "em_update");
  alike(x, sensitivity, x.numel(), "em_update");
  if (anchor) alike(x, *anchor, x.numel(), "em_update");
  Tensor result = torch::stable::empty_like(x);
  if (x.numel() == 0) return result;
  RECON3D_REAL(x, "em_update", {
    const Rdp<scalar_t> v{x.size(0),
                          x.size(1),
                          x.size(2),
                          static_cast<scalar_t>(gamma),
                          static_cast<scalar_t>(epsilon),
                          static_cast<scalar_t>(wz),
                          static_cast<scalar_t>(wy),
                          static_cast<scalar_t>(wx)};
    const EmTerms<scalar_t> terms{v, static_cast<scalar_t>(anchor_weight), static_cast<scalar_t>(rdp),
                                  static_cast<scalar_t>(floor), surrogate};
    const scalar_t *xs = in<scalar_t>(x), *bs = in<scalar_t>(back), *ss = in<scalar_t>(sensitivity);
    const scalar_t* as = anchor ? in<scalar_t>(*anchor) : nullptr;
    scalar_t* os = out<scalar_t>(result);
    torch::stable::parallel_for(0, v.slices, 1,
                                [&](int64_t s0, int64_t s1) { em_update_cpu(terms, xs, bs, ss, as, os, s0, s1); });
  })
  return result;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("poisson_ratio", TORCH_BOX(&recon3d::poisson_ratio));
  m.impl("em_update", TORCH_BOX(&recon3d::em_update));
}
