#include <optional>
#include <vector>

#include "bind.h"
#include "cuda/joseph3d.h"
#include "cuda/stream.h"

namespace recon3d {
namespace {
// The tables of a scan on the device of the data, kept alive beside what points into them.
struct Lines {
  Tensor points, pairs;
  std::optional<Tensor> bins;
  cuda::LineScan scan;
};

Tensor beside(const Tensor& table, const Tensor& data) {
  return torch::stable::contiguous(table.is_cuda() ? table : torch::stable::to(table, data.device()));
}

Lines lines_of(const char* name, const Tensor& data, const Tensor& points, const Tensor& pairs,
               const std::optional<Tensor>& line_bins, int64_t nz, int64_t ny, int64_t nx, double dz, double dy,
               double dx, int64_t bins, double bin_mm, double sigma_mm, double truncation) {
  STD_TORCH_CHECK(points.dim() == 2 && points.size(1) == 3 && points.scalar_type() == ScalarType::Double, name,
                  ": points must be float64 [K, 3]");
  STD_TORCH_CHECK(pairs.dim() == 2 && pairs.size(1) == 2 && pairs.scalar_type() == ScalarType::Int, name,
                  ": pairs must be int32 [n, 2]");
  STD_TORCH_CHECK(dz > 0 && dy > 0 && dx > 0, name, ": spacings must be positive");
  constexpr int64_t kMost = 1 << 30;
  STD_TORCH_CHECK(nz > 0 && ny > 0 && nx > 0 && nz < kMost && ny < kMost && nx < kMost, name,
                  ": a volume has at least one voxel along every axis");
  STD_TORCH_CHECK(pairs.size(0) < (int64_t{1} << 38), name, ": too many lines for one launch");
  STD_TORCH_CHECK(bins >= 0 && bins <= 4096 && (bins == 0 || (bin_mm > 0 && sigma_mm > 0 && truncation > 0)), name,
                  ": 1 to 4096 time-of-flight bins of positive width and resolution, or none");
  Lines lines = {beside(points, data), beside(pairs, data), std::nullopt, {}};
  if (bins && line_bins) {
    STD_TORCH_CHECK(
        line_bins->dim() == 1 && line_bins->size(0) == pairs.size(0) && line_bins->scalar_type() == ScalarType::Int,
        name, ": line_bins must be int32 [n], one per line");
    lines.bins = beside(*line_bins, data);
  }
  lines.scan = {pairs.size(0),
                points.size(0),
                nz,
                ny,
                nx,
                dz,
                dy,
                dx,
                bins,
                bin_mm,
                sigma_mm,
                truncation,
                in<double>(lines.points),
                in<int32_t>(lines.pairs),
                lines.bins ? in<int32_t>(*lines.bins) : nullptr};
  return lines;
}

// The first `lead` axes of t, then `rest`; and the product of the former.
std::vector<int64_t> shape_like(const Tensor& t, int64_t lead, std::vector<int64_t> rest, int64_t& images) {
  std::vector<int64_t> shape;
  images = 1;
  for (int64_t d = 0; d < lead; ++d) {
    shape.push_back(t.size(d));
    images *= t.size(d);
  }
  shape.insert(shape.end(), rest.begin(), rest.end());
  return shape;
}

Tensor joseph3d(const Tensor& x, const Tensor& points, const Tensor& pairs, std::optional<Tensor> line_bins, double dz,
                double dy, double dx, int64_t tof_bins, double tof_bin_mm, double tof_sigma_mm, double tof_truncation) {
  STD_TORCH_CHECK(x.dim() >= 3, "joseph3d: x must be [..., z, y, x]");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t lead = x.dim() - 3;
  const Lines lines = lines_of("joseph3d", x, points, pairs, line_bins, x.size(lead), x.size(lead + 1),
                               x.size(lead + 2), dz, dy, dx, tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation);
  std::vector<int64_t> tail{lines.scan.lines};
  if (tof_bins && !lines.bins) tail.push_back(tof_bins);
  int64_t images;
  const std::vector<int64_t> shape = shape_like(x, lead, tail, images);
  const Tensor xc = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, shape);
  if (images && lines.scan.lines) {
    RECON3D_REAL(x, "joseph3d", {
      const char* error =
          cuda::joseph3d(in<scalar_t>(xc), out<scalar_t>(y), images, lines.scan, cuda_stream(x.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "joseph3d: ", error);
    })
  }
  return y;
}

Tensor joseph3d_adjoint(const Tensor& y, const Tensor& points, const Tensor& pairs, std::optional<Tensor> line_bins,
                        int64_t nz, int64_t ny, int64_t nx, double dz, double dy, double dx, int64_t tof_bins,
                        double tof_bin_mm, double tof_sigma_mm, double tof_truncation) {
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  const Lines lines = lines_of("joseph3d_adjoint", y, points, pairs, line_bins, nz, ny, nx, dz, dy, dx, tof_bins,
                               tof_bin_mm, tof_sigma_mm, tof_truncation);
  const int64_t tail = tof_bins && !lines.bins ? 2 : 1;
  STD_TORCH_CHECK(
      y.dim() >= tail && y.size(y.dim() - tail) == lines.scan.lines && (tail == 1 || y.size(y.dim() - 1) == tof_bins),
      "joseph3d_adjoint: y must be [..., n], or [..., n, T] for all time-of-flight bins");
  int64_t images;
  const std::vector<int64_t> shape = shape_like(y, y.dim() - tail, {nz, ny, nx}, images);
  const Tensor yc = torch::stable::contiguous(y);
  if (!lines.scan.lines) return torch::stable::new_zeros(y, shape);
  Tensor x = torch::stable::new_empty(y, shape);
  if (images) {
    Tensor work = torch::stable::new_empty(y, {cuda::joseph3d_adjoint_workspace(lines.scan)}, ScalarType::Byte);
    RECON3D_REAL(y, "joseph3d_adjoint", {
      const char* error = cuda::joseph3d_adjoint(in<scalar_t>(yc), out<scalar_t>(x), images, lines.scan,
                                                 work.mutable_data_ptr(), cuda_stream(y.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "joseph3d_adjoint: ", error);
    })
  }
  return x;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CUDA, m) {
  m.impl("joseph3d", TORCH_BOX(&recon3d::joseph3d));
  m.impl("joseph3d_adjoint", TORCH_BOX(&recon3d::joseph3d_adjoint));
}
