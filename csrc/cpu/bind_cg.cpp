#include <vector>

#include "bind.h"
#include "cpu/cg.h"

namespace recon3d {
namespace {
double ordered_sum(const double* sums, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += sums[i];
  return total;
}

Tensor cg_step_(Tensor x, Tensor r, Tensor p, const Tensor& q, const Tensor& rz) {
  for (const Tensor* t :
       {static_cast<const Tensor*>(&x), static_cast<const Tensor*>(&r), static_cast<const Tensor*>(&p), &q})
    STD_TORCH_CHECK(
        t->dim() > 0 && t->numel() == x.numel() && t->is_contiguous() && t->scalar_type() == x.scalar_type(),
        "cg_step_: four contiguous vectors of one shape and dtype are needed");
  STD_TORCH_CHECK(rz.scalar_type() == ScalarType::Double && (rz.dim() == 0 || rz.numel() == x.size(0)),
                  "cg_step_: rz must be float64, a scalar or one value per slice");
  const int64_t slices = x.size(0), n = slices ? x.numel() / slices : 0, chunks = cg_chunks(n), units = slices * chunks;
  const bool per_slice = rz.dim() == 1;
  const int64_t scalars = rz.numel(), stride = per_slice ? 1 : 0, share = per_slice ? chunks : units;
  Tensor rz_new = torch::stable::empty_like(rz);
  std::vector<double> sums(units), alpha(scalars), beta(scalars);
  const double* old = in<double>(rz);
  double* next = out<double>(rz_new);
  RECON3D_REAL(x, "cg_step_", {
    scalar_t *xs = out<scalar_t>(x), *rs = out<scalar_t>(r), *ps = out<scalar_t>(p);
    const scalar_t* qs = in<scalar_t>(q);
    // the scalars [s0, s1) from the units that belong to them, then the sweep that uses them
    auto after_curvature = [&](int64_t s0, int64_t s1) {
      for (int64_t s = s0; s < s1; ++s) {
        const double curvature = ordered_sum(sums.data() + s * share, share);
        const bool frozen = old[s] == 0 || curvature <= 0;  // false for a NaN, which must stay visible
        alpha[s] = frozen ? 0 : old[s] / curvature;
        next[s] = frozen ? 0 : old[s];
      }
    };
    auto after_residual = [&](int64_t s0, int64_t s1) {
      for (int64_t s = s0; s < s1; ++s) {
        if (next[s] == 0) continue;
        next[s] = ordered_sum(sums.data() + s * share, share);
        beta[s] = next[s] / old[s];
      }
    };
    auto curvature = [&](int64_t u0, int64_t u1) { cg_curvature_cpu(ps, qs, sums.data(), n, u0, u1); };
    auto residual = [&](int64_t u0, int64_t u1) {
      cg_residual_cpu(rs, qs, alpha.data(), stride, sums.data(), n, u0, u1);
    };
    auto direction = [&](int64_t u0, int64_t u1) {
      cg_direction_cpu(xs, ps, rs, alpha.data(), beta.data(), stride, n, u0, u1);
    };
    if (per_slice && slices > 1) {  // a slice's four vectors stay in cache through all three sweeps
      torch::stable::parallel_for(0, slices, 1, [&](int64_t s0, int64_t s1) {
        for (int64_t s = s0; s < s1; ++s) {
          const int64_t u0 = s * chunks, u1 = u0 + chunks;
          curvature(u0, u1);
          after_curvature(s, s + 1);
          residual(u0, u1);
          after_residual(s, s + 1);
          direction(u0, u1);
        }
      });
    } else {  // the same sums in the same order, whichever thread makes them
      torch::stable::parallel_for(0, units, 4, curvature);
      after_curvature(0, scalars);
      torch::stable::parallel_for(0, units, 4, residual);
      after_residual(0, scalars);
      torch::stable::parallel_for(0, units, 4, direction);
    }
  })
  return rz_new;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) { m.impl("cg_step_", TORCH_BOX(&recon3d::cg_step_)); }
