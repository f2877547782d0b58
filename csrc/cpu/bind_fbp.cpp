#include <algorithm>

#include "bind.h"
#include "cpu/fbp.h"

namespace recon3d {
namespace {
constexpr int64_t kRows = 8;  // rows that share one pass over the views' lines

Tensor fbp_back_project(const Tensor& q, const Tensor& angles, int64_t ny, int64_t nx, double pitch, double offset,
                        double source_to_axis, double source_to_detector, double dy, double dx) {
  STD_TORCH_CHECK(q.dim() == 3 && angles.dim() == 1 && angles.size(0) == q.size(1), "fbp: q must be [slice, view, u]");
  STD_TORCH_CHECK(angles.scalar_type() == ScalarType::Double && ny > 0 && nx > 0, "fbp: float64 angles, sizes > 0");
  const int64_t slices = q.size(0);
  const BackProjection g{q.size(1), q.size(2), ny, nx, pitch, offset, source_to_axis, source_to_detector, dy, dx};
  Tensor qc = torch::stable::contiguous(q), ac = torch::stable::contiguous(angles);
  Tensor lines = torch::stable::new_empty(q, {slices, g.views, g.n + 4});
  Tensor image = torch::stable::new_empty(q, {slices, ny, nx});
  RECON3D_REAL(q, "fbp", {
    const scalar_t* from = in<scalar_t>(qc);
    scalar_t *line = out<scalar_t>(lines), *to = out<scalar_t>(image);
    torch::stable::parallel_for(0, slices * g.views, 64, [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0; i < i1; ++i) {
        scalar_t* d = line + i * (g.n + 4);
        d[0] = d[1] = d[g.n + 2] = d[g.n + 3] = 0;
        std::copy(from + i * g.n, from + (i + 1) * g.n, d + 2);
      }
    });
    torch::stable::parallel_for(0, (ny + kRows - 1) / kRows, 1, [&](int64_t b0, int64_t b1) {
      for (int64_t b = b0; b < b1; ++b)
        fbp_back_project_cpu(line, doubles(ac), to, g, slices, b * kRows, std::min(ny, (b + 1) * kRows));
    });
  })
  return image;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) { m.impl("fbp_back_project", TORCH_BOX(&recon3d::fbp_back_project)); }
