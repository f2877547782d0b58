#include <vector>

#include "bind.h"
#include "cpu/radon.h"

namespace recon3d {
namespace {
RunRanges ranges() {
  return {[](int64_t n, RangeBody body, void* context) {
            if (n > 0)
              torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

RadonScan scan_of(const Tensor& angles, int64_t cells, double pitch, double offset, double sod, double sdd, double dy,
                  double dx, int64_t ny, int64_t nx, int64_t method) {
  STD_TORCH_CHECK(angles.dim() == 1 && angles.scalar_type() == ScalarType::Double && angles.is_cpu(),
                  "radon: angles must be a float64 vector on the host");
  STD_TORCH_CHECK(cells > 0 && ny > 0 && nx > 0 && cells < (1 << 24) && ny < (1 << 24) && nx < (1 << 24),
                  "radon: sizes must lie between 1 and 2^24");
  STD_TORCH_CHECK(method == kJoseph || (method == kShear && !(sod > 0)), "radon: no such method for this geometry");
  STD_TORCH_CHECK(pitch > 0 && dy > 0 && dx > 0 && (!(sod > 0) || sdd > 0), "radon: lengths must be positive");
  return {in<double>(angles), angles.numel(), cells, ny, nx, pitch, offset, sod, sdd, dy, dx};
}

// The leading axes of t and two more; and their product.
std::vector<int64_t> shape_like(const Tensor& t, int64_t rows, int64_t columns, int64_t* slices) {
  std::vector<int64_t> shape;
  *slices = 1;
  for (int64_t d = 0; d + 2 < t.dim(); ++d) {
    shape.push_back(t.size(d));
    *slices *= t.size(d);
  }
  shape.push_back(rows);
  shape.push_back(columns);
  return shape;
}

Tensor radon(const Tensor& x, const Tensor& angles, int64_t n_detector, double pitch, double offset,
             double source_to_axis, double source_to_detector, double dy, double dx, int64_t method) {
  STD_TORCH_CHECK(x.dim() >= 2, "radon: x must be [..., y, x]");
  const Tensor host = torch::stable::contiguous(angles), xc = torch::stable::contiguous(x);
  const RadonScan scan = scan_of(host, n_detector, pitch, offset, source_to_axis, source_to_detector, dy, dx,
                                 x.size(x.dim() - 2), x.size(x.dim() - 1), method);
  int64_t slices;
  const std::vector<int64_t> shape = shape_like(x, scan.views, scan.cells, &slices);
  Tensor y = torch::stable::new_empty(x, shape);
  if (slices && scan.views) {
    RECON3D_REAL(x, "radon",
                 { radon_cpu(in<scalar_t>(xc), out<scalar_t>(y), slices, scan, static_cast<int>(method), ranges()); })
  }
  return y;
}

Tensor radon_adjoint(const Tensor& y, const Tensor& angles, int64_t ny, int64_t nx, double pitch, double offset,
                     double source_to_axis, double source_to_detector, double dy, double dx, int64_t method) {
  STD_TORCH_CHECK(y.dim() >= 2 && y.size(y.dim() - 2) == angles.numel(), "radon_adjoint: y must be [..., view, u]");
  const Tensor host = torch::stable::contiguous(angles), yc = torch::stable::contiguous(y);
  const RadonScan scan =
      scan_of(host, y.size(y.dim() - 1), pitch, offset, source_to_axis, source_to_detector, dy, dx, ny, nx, method);
  int64_t slices;
  const std::vector<int64_t> shape = shape_like(y, ny, nx, &slices);
  Tensor x = torch::stable::new_empty(y, shape);
  if (slices) {
    RECON3D_REAL(y, "radon_adjoint", {
      radon_adjoint_cpu(in<scalar_t>(yc), out<scalar_t>(x), slices, scan, static_cast<int>(method), ranges());
    })
  }
  return x;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("radon", TORCH_BOX(&recon3d::radon));
  m.impl("radon_adjoint", TORCH_BOX(&recon3d::radon_adjoint));
}
