#include <cmath>
#include <vector>

#include "bind.h"
#include "cuda/radon.h"
#include "cuda/stream.h"

namespace recon3d {
namespace {
struct Angles {
  std::vector<double> cosine, sine;
};

cuda::Scan scan_of(const Tensor& angles, Angles& table, int64_t cells, double pitch, double offset, double sod,
                   double sdd, double dy, double dx, int64_t ny, int64_t nx, int64_t method) {
  STD_TORCH_CHECK(angles.dim() == 1 && angles.scalar_type() == ScalarType::Double && angles.is_cpu(),
                  "radon: angles must be a float64 vector on the host");
  STD_TORCH_CHECK(method == 0, "radon: on CUDA only method 'joseph' has a kernel; recon3d.ops.radon serves the others");
  constexpr int64_t kMost = 65535;  // blocks along y and z
  STD_TORCH_CHECK(
      cells > 0 && ny > 0 && nx > 0 && cells < (1 << 24) && ny <= kMost && nx <= kMost && angles.numel() <= kMost,
      "radon: sizes must lie between 1 and 65535, cells between 1 and 2^24");
  STD_TORCH_CHECK(pitch > 0 && dy > 0 && dx > 0 && (!(sod > 0) || sdd > 0), "radon: lengths must be positive");
  const Tensor host = torch::stable::contiguous(angles);
  for (int64_t v = 0; v < angles.numel(); ++v) {
    table.cosine.push_back(std::cos(doubles(host)[v]));
    table.sine.push_back(std::sin(doubles(host)[v]));
  }
  return {angles.numel(), cells, ny, nx, pitch, offset, sod > 0 ? sod : 0, sdd, dy, dx};
}

// The leading axes of t and two more; and their product.
std::vector<int64_t> shape_like(const Tensor& t, int64_t rows, int64_t columns, int64_t& slices) {
  std::vector<int64_t> shape;
  slices = 1;
  for (int64_t d = 0; d + 2 < t.dim(); ++d) {
    shape.push_back(t.size(d));
    slices *= t.size(d);
  }
  shape.push_back(rows);
  shape.push_back(columns);
  return shape;
}

Tensor radon(const Tensor& x, const Tensor& angles, int64_t n_detector, double pitch, double offset,
             double source_to_axis, double source_to_detector, double dy, double dx, int64_t method) {
  STD_TORCH_CHECK(x.dim() >= 2, "radon: x must be [..., y, x]");
  Angles table;
  const cuda::Scan scan = scan_of(angles, table, n_detector, pitch, offset, source_to_axis, source_to_detector, dy, dx,
                                  x.size(x.dim() - 2), x.size(x.dim() - 1), method);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor xc = torch::stable::contiguous(x);
  int64_t slices;
  const std::vector<int64_t> shape = shape_like(x, scan.views, scan.cells, slices);
  Tensor y = torch::stable::new_empty(x, shape);
  if (slices && scan.views) {
    RECON3D_REAL(x, "radon", {
      Tensor work = torch::stable::new_empty(x, {cuda::radon_workspace<scalar_t>(slices, scan, false)});
      const char* error = cuda::radon(in<scalar_t>(xc), out<scalar_t>(y), slices, scan, table.cosine.data(),
                                      table.sine.data(), out<scalar_t>(work), cuda_stream(x.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "radon: ", error);
    })
  }
  return y;
}

Tensor radon_adjoint(const Tensor& y, const Tensor& angles, int64_t ny, int64_t nx, double pitch, double offset,
                     double source_to_axis, double source_to_detector, double dy, double dx, int64_t method) {
  STD_TORCH_CHECK(y.dim() >= 2 && y.size(y.dim() - 2) == angles.numel(), "radon_adjoint: y must be [..., view, u]");
  Angles table;
  const cuda::Scan scan = scan_of(angles, table, y.size(y.dim() - 1), pitch, offset, source_to_axis, source_to_detector,
                                  dy, dx, ny, nx, method);
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const Tensor yc = torch::stable::contiguous(y);
  int64_t slices;
  const std::vector<int64_t> shape = shape_like(y, ny, nx, slices);
  Tensor x = torch::stable::new_empty(y, shape);
  if (slices) {
    RECON3D_REAL(y, "radon_adjoint", {
      Tensor work = torch::stable::new_empty(y, {cuda::radon_workspace<scalar_t>(slices, scan, true)});
      const char* error =
          cuda::radon_adjoint(in<scalar_t>(yc), out<scalar_t>(x), slices, scan, table.cosine.data(), table.sine.data(),
                              out<scalar_t>(work), cuda_stream(y.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "radon_adjoint: ", error);
    })
  }
  return x;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CUDA, m) {
  m.impl("radon", TORCH_BOX(&recon3d::radon));
  m.impl("radon_adjoint", TORCH_BOX(&recon3d::radon_adjoint));
}
