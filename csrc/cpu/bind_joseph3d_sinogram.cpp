#include <vector>

#include "bind.h"
#include "cpu/joseph3d_sinogram.h"
#include "cpu/lane_plan.h"  // wish_large_pages

namespace recon3d {
namespace {
RunRanges ranges() {
  return {[](int64_t n, RangeBody body, void* context) {
            if (n > 0)
              torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

// lines and segments must outlive the result.
Sinogram sinogram_of(const Tensor& lines, const Tensor& segments, int64_t planes, const RayGrid& grid, const Tof& tof) {
  for (const Tensor* t : {&lines, &segments})
    STD_TORCH_CHECK(t->dim() == 2 && t->size(1) == 4 && t->scalar_type() == ScalarType::Double && t->is_cpu(),
                    "joseph3d_sinogram: lines and segments must be [n, 4] float64 on the host");
  STD_TORCH_CHECK(tof.bins >= 0 && (!tof.bins || (tof.bin_mm > 0 && tof.sigma_mm > 0 && tof.truncation > 0)),
                  "joseph3d_sinogram: time bins need positive lengths");
  for (int axis = 0; axis < 3; ++axis)
    STD_TORCH_CHECK(grid.n[axis] > 0 && grid.n[axis] < (1 << 24) && grid.spacing[axis] > 0,
                    "joseph3d_sinogram: sizes must lie between 1 and 2^24, and lengths be positive");
  const double* rows = in<double>(segments);
  int64_t total = 0;
  for (int64_t g = 0; g < segments.size(0); ++g) {
    const double* row = rows + 4 * g;
    const double count = row[3], step = row[2] / grid.spacing[0];
    STD_TORCH_CHECK(count >= 0 && count < 2147483648.0 && count == static_cast<double>(static_cast<int64_t>(count)),
                    "joseph3d_sinogram: a segment needs a whole number of planes");
    STD_TORCH_CHECK(count <= 1 || (step > 0.5 && step < 65536.0),
                    "joseph3d_sinogram: the distance of planes must be a whole number of voxels");
    total += static_cast<int64_t>(count);
  }
  STD_TORCH_CHECK(total == planes, "joseph3d_sinogram: the segments have another number of planes");
  return {in<double>(lines), lines.size(0), rows, segments.size(0), planes, grid, tof};
}

// The leading axes of t without its last `tail`; and their product.
std::vector<int64_t> leading(const Tensor& t, int64_t tail, int64_t* volumes) {
  std::vector<int64_t> shape;
  *volumes = 1;
  for (int64_t d = 0; d + tail < t.dim(); ++d) {
    shape.push_back(t.size(d));
    *volumes *= t.size(d);
  }
  return shape;
}

// The sinogram of x into y, or into a new tensor where y is null.
Tensor project(const Tensor& x, const Tensor& lines, const Tensor& segments, int64_t planes, double dz, double dy,
               double dx, const Tof& tof, const Tensor* given) {
  STD_TORCH_CHECK(x.dim() >= 3, "joseph3d_sinogram: x must be [..., z, y, x]");
  const Tensor xc = torch::stable::contiguous(x), lc = torch::stable::contiguous(lines),
               sc = torch::stable::contiguous(segments);
  const int64_t d = x.dim();
  const Sinogram s = sinogram_of(lc, sc, planes, {{x.size(d - 3), x.size(d - 2), x.size(d - 1)}, {dz, dy, dx}}, tof);
  int64_t volumes;
  std::vector<int64_t> shape = leading(x, 3, &volumes);
  shape.push_back(s.line_count);
  if (tof.bins) shape.push_back(tof.bins);
  shape.push_back(planes);
  Tensor y = given ? *given : torch::stable::new_empty(x, shape);
  if (y.numel()) {
    RECON3D_REAL(x, "joseph3d_sinogram", {
      if (!given) wish_large_pages(out<scalar_t>(y), y.numel() * sizeof(scalar_t));
      joseph3d_sinogram_cpu(in<scalar_t>(xc), out<scalar_t>(y), volumes, s, ranges());
    })
  }
  return y;
}

Tensor joseph3d_sinogram(const Tensor& x, const Tensor& lines, const Tensor& segments, int64_t planes, double dz,
                         double dy, double dx, int64_t tof_bins, double tof_bin_mm, double tof_sigma_mm,
                         double tof_truncation) {
  const Tof tof{tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation};
  return project(x, lines, segments, planes, dz, dy, dx, tof, nullptr);
}

void joseph3d_sinogram_into_(Tensor y, const Tensor& x, const Tensor& lines, const Tensor& segments, int64_t planes,
                             double dz, double dy, double dx, int64_t tof_bins, double tof_bin_mm, double tof_sigma_mm,
                             double tof_truncation) {
  int64_t size = lines.size(0) * planes * (tof_bins ? tof_bins : 1);
  for (int64_t k = 0; k + 3 < x.dim(); ++k) size *= x.size(k);
  STD_TORCH_CHECK(y.numel() == size && y.scalar_type() == x.scalar_type() && y.is_contiguous() && y.is_cpu(),
                  "joseph3d_sinogram: the result does not fit its place");
  const Tof tof{tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation};
  project(x, lines, segments, planes, dz, dy, dx, tof, &y);
}

Tensor joseph3d_sinogram_adjoint(const Tensor& y, const Tensor& lines, const Tensor& segments, int64_t nz, int64_t ny,
                                 int64_t nx, double dz, double dy, double dx, int64_t tof_bins, double tof_bin_mm,
                                 double tof_sigma_mm, double tof_truncation) {
  const int64_t tail = tof_bins ? 3 : 2, d = y.dim();
  STD_TORCH_CHECK(d >= tail && y.size(d - tail) == lines.size(0) && (!tof_bins || y.size(d - 2) == tof_bins),
                  "joseph3d_sinogram_adjoint: y must be [..., line, plane] or [..., line, tof, plane]");
  const Tensor yc = torch::stable::contiguous(y), lc = torch::stable::contiguous(lines),
               sc = torch::stable::contiguous(segments);
  const Sinogram s = sinogram_of(lc, sc, y.size(d - 1), {{nz, ny, nx}, {dz, dy, dx}},
                                 {tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation});
  int64_t volumes;
  std::vector<int64_t> shape = leading(y, tail, &volumes);
  shape.push_back(nz);
  shape.push_back(ny);
  shape.push_back(nx);
  Tensor x = torch::stable::new_empty(y, shape);
  if (volumes) {
    RECON3D_REAL(y, "joseph3d_sinogram_adjoint",
                 { joseph3d_sinogram_adjoint_cpu(in<scalar_t>(yc), out<scalar_t>(x), volumes, s, ranges()); })
  }
  return x;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("joseph3d_sinogram", TORCH_BOX(&recon3d::joseph3d_sinogram));
  m.impl("joseph3d_sinogram_into_", TORCH_BOX(&recon3d::joseph3d_sinogram_into_));
  m.impl("joseph3d_sinogram_adjoint", TORCH_BOX(&recon3d::joseph3d_sinogram_adjoint));
}
