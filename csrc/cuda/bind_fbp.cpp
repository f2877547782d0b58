#include <cmath>
#include <vector>

#include "bind.h"
#include "cuda/fbp.h"
#include "cuda/stream.h"

namespace recon3d {
namespace {
Tensor fbp_back_project(const Tensor& q, const Tensor& angles, int64_t ny, int64_t nx, double pitch, double offset,
                        double source_to_axis, double source_to_detector, double dy, double dx) {
  STD_TORCH_CHECK(q.dim() == 3 && angles.dim() == 1 && angles.size(0) == q.size(1), "fbp: q must be [slice, view, u]");
  STD_TORCH_CHECK(angles.scalar_type() == ScalarType::Double && angles.is_cpu() && ny > 0 && nx > 0 && ny <= 8 * 65535,
                  "fbp: float64 angles on the host and sizes above 0 expected");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Tensor qc = torch::stable::contiguous(q), host = torch::stable::contiguous(angles);
  const int64_t slices = q.size(0);
  const cuda::BackProjection g{q.size(1), q.size(2), ny, nx, pitch, offset, source_to_axis, source_to_detector, dy, dx};
  std::vector<double> cosine, sine;
  for (int64_t v = 0; v < g.views; ++v) {
    cosine.push_back(std::cos(doubles(host)[v]));
    sine.push_back(std::sin(doubles(host)[v]));
  }
  Tensor image = torch::stable::new_empty(q, {slices, ny, nx});
  if (slices) {
    RECON3D_REAL(q, "fbp", {
      const char* error = cuda::fbp_back_project(in<scalar_t>(qc), out<scalar_t>(image), slices, g, cosine.data(),
                                                 sine.data(), cuda_stream(q.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "fbp: ", error);
    })
  }
  return image;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CUDA, m) { m.impl("fbp_back_project", TORCH_BOX(&recon3d::fbp_back_project)); }
