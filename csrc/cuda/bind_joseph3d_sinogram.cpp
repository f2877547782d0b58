#include <vector>

#include "bind.h"
#include "cuda/joseph3d_sinogram.h"
#include "cuda/stream.h"

namespace recon3d {
namespace {
// A scan and the tables that it points into.
struct Scan {
  Tensor lines;
  std::vector<cuda::Family> families;
  cuda::FamilyScan scan;
};

void fill(Scan& to, const char* name, const Tensor& data, const Tensor& lines, const Tensor& segments, int64_t nz,
          int64_t ny, int64_t nx, double dz, double dy, double dx, int64_t bins, double bin_mm, double sigma_mm,
          double truncation) {
  STD_TORCH_CHECK(lines.dim() == 2 && lines.size(1) == 4 && lines.scalar_type() == ScalarType::Double, name,
                  ": lines must be float64 [L, 4]");
  STD_TORCH_CHECK(
      segments.dim() == 2 && segments.size(1) == 4 && segments.scalar_type() == ScalarType::Double && segments.is_cpu(),
      name, ": segments must be float64 [G, 4] on the host");
  STD_TORCH_CHECK(dz > 0 && dy > 0 && dx > 0 && nz > 0 && ny > 0 && nx > 0, name,
                  ": sizes and spacings must be positive");
  STD_TORCH_CHECK(bins >= 0 && (bins == 0 || (bin_mm > 0 && sigma_mm > 0 && truncation > 0)), name,
                  ": time-of-flight bins must have a positive width and resolution");
  const Tensor host = torch::stable::contiguous(segments);
  const double* row = doubles(host);
  int64_t planes = 0;
  for (int64_t g = 0; g < segments.size(0); ++g, row += 4) {
    STD_TORCH_CHECK(row[3] >= 0 && row[3] < (1 << 30), name, ": a segment's number of planes does not fit");
    to.families.push_back({row[0], row[1], row[2], static_cast<int64_t>(row[3])});
    planes += to.families.back().count;
  }
  to.lines = torch::stable::contiguous(lines.is_cuda() ? lines : torch::stable::to(lines, data.device()));
  to.scan = {lines.size(0), planes,     segments.size(0),  nz, ny, nx, dz, dy, dx, bins, bin_mm,
             sigma_mm,      truncation, to.families.data()};
  const char* refusal = cuda::joseph3d_sinogram_refuses<float>(to.scan);
  STD_TORCH_CHECK(refusal == nullptr, name, ": ", refusal, "; move the data to the CPU");
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

Tensor joseph3d_sinogram(const Tensor& x, const Tensor& lines, const Tensor& segments, int64_t planes, double dz,
                         double dy, double dx, int64_t tof_bins, double tof_bin_mm, double tof_sigma_mm,
                         double tof_truncation) {
  const char* name = "joseph3d_sinogram";
  STD_TORCH_CHECK(x.dim() >= 3, "joseph3d_sinogram: x must be [..., z, y, x]");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t lead = x.dim() - 3;
  Scan scan;
  fill(scan, name, x, lines, segments, x.size(lead), x.size(lead + 1), x.size(lead + 2), dz, dy, dx, tof_bins,
       tof_bin_mm, tof_sigma_mm, tof_truncation);
  STD_TORCH_CHECK(scan.scan.planes == planes, "joseph3d_sinogram: planes must be the sum over the segments");
  std::vector<int64_t> tail{scan.scan.lines};
  if (tof_bins) tail.push_back(tof_bins);
  tail.push_back(planes);
  int64_t images;
  const std::vector<int64_t> shape = shape_like(x, lead, tail, images);
  const Tensor xc = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, shape);
  if (images && scan.scan.lines && planes) {
    RECON3D_REAL(x, "joseph3d_sinogram", {
      const int64_t bytes = cuda::joseph3d_sinogram_workspace<scalar_t>(scan.scan, false);
      Tensor work = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
      const char* error =
          cuda::joseph3d_sinogram(in<scalar_t>(xc), out<scalar_t>(y), images, scan.scan, doubles(scan.lines),
                                  work.mutable_data_ptr(), cuda_stream(x.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "joseph3d_sinogram: ", error);
    })
  }
  return y;
}

Tensor joseph3d_sinogram_adjoint(const Tensor& y, const Tensor& lines, const Tensor& segments, int64_t nz, int64_t ny,
                                 int64_t nx, double dz, double dy, double dx, int64_t tof_bins, double tof_bin_mm,
                                 double tof_sigma_mm, double tof_truncation) {
  const char* name = "joseph3d_sinogram_adjoint";
  const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
  Scan scan;
  fill(scan, name, y, lines, segments, nz, ny, nx, dz, dy, dx, tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation);
  const int64_t tail = tof_bins ? 3 : 2;
  STD_TORCH_CHECK(y.dim() >= tail && y.size(y.dim() - tail) == scan.scan.lines &&
                      y.size(y.dim() - 1) == scan.scan.planes && (!tof_bins || y.size(y.dim() - 2) == tof_bins),
                  "joseph3d_sinogram_adjoint: y must be [..., line, plane] or [..., line, tof, plane]");
  int64_t images;
  const std::vector<int64_t> shape = shape_like(y, y.dim() - tail, {nz, ny, nx}, images);
  const Tensor yc = torch::stable::contiguous(y);
  if (!scan.scan.lines || !scan.scan.planes) return torch::stable::new_zeros(y, shape);
  Tensor x = torch::stable::new_empty(y, shape);
  if (images) {
    RECON3D_REAL(y, "joseph3d_sinogram_adjoint", {
      const int64_t bytes = cuda::joseph3d_sinogram_workspace<scalar_t>(scan.scan, true);
      Tensor work = torch::stable::new_empty(y, {bytes}, ScalarType::Byte);
      const char* error =
          cuda::joseph3d_sinogram_adjoint(in<scalar_t>(yc), out<scalar_t>(x), images, scan.scan, doubles(scan.lines),
                                          work.mutable_data_ptr(), cuda_stream(y.get_device_index()));
      STD_TORCH_CHECK(error == nullptr, "joseph3d_sinogram_adjoint: ", error);
    })
  }
  return x;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CUDA, m) {
  m.impl("joseph3d_sinogram", TORCH_BOX(&recon3d::joseph3d_sinogram));
  m.impl("joseph3d_sinogram_adjoint", TORCH_BOX(&recon3d::joseph3d_sinogram_adjoint));
}
