#include <optional>
#include <tuple>

#include "bind.h"
#include "cpu/tvz.h"

namespace recon3d {
namespace {
// Below this many pixels per thread the work is not worth waking one.
constexpr int64_t kGrain = 2048;

int64_t pixels_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(), name, ": a contiguous volume is needed");
  return x.size(0) ? x.numel() / x.size(0) : 0;
}

void alike(const Tensor& x, const Tensor& y, const char* name) {
  STD_TORCH_CHECK(y.numel() == x.numel() && y.is_contiguous() && y.scalar_type() == x.scalar_type(), name,
                  ": the volumes need one shape and dtype, contiguous");
}

void stencil_into(TvzStencil kind, const Tensor& x, Tensor& result, double scale, bool periodic, bool add,
                  const char* name) {
  const int64_t slices = x.size(0), pixels = pixels_of(x, name);
  alike(x, result, name);
  RECON3D_REAL(x, "tvz", {
    const scalar_t* a = in<scalar_t>(x);
    scalar_t* b = out<scalar_t>(result);
    torch::stable::parallel_for(0, pixels, kGrain, [&](int64_t p0, int64_t p1) {
      tvz_stencil_cpu(kind, a, b, slices, pixels, static_cast<scalar_t>(scale), periodic, add, p0, p1);
    });
  })
}

Tensor stencil_new(TvzStencil kind, const Tensor& x, double scale, bool periodic, const char* name) {
  Tensor result = torch::stable::empty_like(x);
  stencil_into(kind, x, result, scale, periodic, false, name);
  return result;
}

Tensor tvz_diff(const Tensor& x, double scale, bool periodic) {
  return stencil_new(TvzStencil::kDiff, x, scale, periodic, "tvz_diff");
}
Tensor tvz_adjoint(const Tensor& v, double scale, bool periodic) {
  return stencil_new(TvzStencil::kAdjoint, v, scale, periodic, "tvz_adjoint");
}
Tensor tvz_normal(const Tensor& x, double weight, bool periodic) {
  return stencil_new(TvzStencil::kNormal, x, weight, periodic, "tvz_normal");
}
void tvz_add_normal_(Tensor q, const Tensor& x, double weight, bool periodic) {
  stencil_into(TvzStencil::kNormal, x, q, weight, periodic, true, "tvz_add_normal_");
}

void update_into(const Tensor& x, const Tensor& w, Tensor* z, Tensor& w_new, Tensor& g, double threshold, double scale,
                 bool periodic) {
  const int64_t slices = x.size(0), pixels = pixels_of(x, "tvz_update");
  for (const Tensor* t : {&w, static_cast<const Tensor*>(&w_new), static_cast<const Tensor*>(&g)})
    alike(x, *t, "tvz_update");
  if (z) alike(x, *z, "tvz_update");
  RECON3D_REAL(x, "tvz_update", {
    const scalar_t *xs = in<scalar_t>(x), *ws = in<scalar_t>(w);
    scalar_t *zo = z ? out<scalar_t>(*z) : nullptr, *wo = out<scalar_t>(w_new), *go = out<scalar_t>(g);
    torch::stable::parallel_for(0, pixels, kGrain, [&](int64_t p0, int64_t p1) {
      tvz_update_cpu(xs, ws, zo, wo, go, slices, pixels, static_cast<scalar_t>(threshold), static_cast<scalar_t>(scale),
                     periodic, p0, p1);
    });
  })
}

std::tuple<Tensor, Tensor, Tensor> tvz_update(const Tensor& x, const Tensor& w, double threshold, double scale,
                                              bool periodic) {
  Tensor z = torch::stable::empty_like(x), w_new = torch::stable::empty_like(x), g = torch::stable::empty_like(x);
  update_into(x, w, &z, w_new, g, threshold, scale, periodic);
  return {z, w_new, g};
}
void tvz_update_(const Tensor& x, std::optional<Tensor> z, Tensor w, Tensor g, double threshold, double scale,
                 bool periodic) {
  update_into(x, w, z ? &*z : nullptr, w, g, threshold, scale, periodic);
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("tvz_diff", TORCH_BOX(&recon3d::tvz_diff));
  m.impl("tvz_adjoint", TORCH_BOX(&recon3d::tvz_adjoint));
  m.impl("tvz_normal", TORCH_BOX(&recon3d::tvz_normal));
  m.impl("tvz_add_normal_", TORCH_BOX(&recon3d::tvz_add_normal_));
  m.impl("tvz_update", TORCH_BOX(&recon3d::tvz_update));
  m.impl("tvz_update_", TORCH_BOX(&recon3d::tvz_update_));
}
