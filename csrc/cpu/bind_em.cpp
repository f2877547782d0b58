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

// stride of the rows of t, each of which is contiguous
int64_t row_stride(const Tensor& y, const Tensor& t, int64_t length) {
  const int64_t rows = y.size(0);
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d > 0; --d) {
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == expected, "poisson_ratio: rows must be contiguous");
    expected *= t.size(d);
  }
  STD_TORCH_CHECK(t.dim() > 0 && t.size(0) == rows && expected == length && t.scalar_type() == y.scalar_type(),
                  "poisson_ratio: tensors of fitting rows and one dtype are needed");
  return t.stride(0);
}

Tensor poisson_ratio(const Tensor& y, const Tensor& projection, std::optional<Tensor> factors,
                     std::optional<Tensor> additive, double scale, int64_t repeat, int64_t inner, bool short_factors,
                     bool short_additive) {
  const int64_t n = y.numel();
  STD_TORCH_CHECK(y.dim() > 0, "poisson_ratio: a measurement of at least one axis is needed");
  alike(projection, projection, n, "poisson_ratio");
  Tensor result = torch::stable::empty_like(projection);
  if (n == 0) return result;
  const int64_t length = n / y.size(0);
  STD_TORCH_CHECK(repeat > 0 && inner > 0 && length % (repeat * inner) == 0,
                  "poisson_ratio: rows must hold whole blocks of repeat times inner values");
  STD_TORCH_CHECK(projection.size(0) == y.size(0) && projection.scalar_type() == y.scalar_type(),
                  "poisson_ratio: y and projection need one shape and dtype");
  const int64_t f_length = short_factors ? length / repeat : length;
  const int64_t b_length = short_additive ? length / repeat : length;
  Rows rows{length,
            repeat,
            inner,
            row_stride(y, y, length),
            factors ? row_stride(y, *factors, f_length) : f_length,
            additive ? row_stride(y, *additive, b_length) : b_length,
            short_factors,
            short_additive};
  if (rows.y == length && rows.factors == f_length && rows.additive == b_length) {  // all rows are one
    rows.length = n;
    if (repeat == 1) rows.inner = n;
  }
  RECON3D_REAL(y, "poisson_ratio", {
    const scalar_t *ys = in<scalar_t>(y), *ps = in<scalar_t>(projection);
    const scalar_t *fs = factors ? in<scalar_t>(*factors) : nullptr, *bs = additive ? in<scalar_t>(*additive) : nullptr;
    scalar_t* os = out<scalar_t>(result);
    torch::stable::parallel_for(0, n, kGrain, [&](int64_t i0, int64_t i1) {
      poisson_ratio_cpu(ys, ps, fs, bs, os, static_cast<scalar_t>(scale), rows, i0, i1);
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
