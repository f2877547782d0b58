#include <atomic>
#include <optional>
#include <vector>

#include "bind.h"
#include "cpu/joseph3d.h"

namespace recon3d {
namespace {
RunRanges ranges() {
  return {[](int64_t n, RangeBody body, void* context) {
            if (n > 0)
              torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

// Whether all of [p, p + n) lie in [0, limit).
bool in_range(const int32_t* p, int64_t n, int64_t limit) {
  std::atomic<bool> good{true};
  constexpr int64_t kPiece = 1 << 16;
  const auto body = [&](int64_t b, int64_t e) {
    uint32_t most = 0;  // negative ones are large as well
    for (int64_t i = b * kPiece; i < n && i < e * kPiece; ++i) {
      const uint32_t v = static_cast<uint32_t>(p[i]);
      most = v > most ? v : most;
    }
    if (static_cast<int64_t>(most) >= limit) good = false;
  };
  if (n > 0) torch::stable::parallel_for(0, (n + kPiece - 1) / kPiece, 1, [&](int64_t b, int64_t e) { body(b, e); });
  return good;
}

struct Given {
  Tensor points, pairs;
  std::optional<Tensor> bins;
};

Given host(const Tensor& points, const Tensor& pairs, const std::optional<Tensor>& line_bins) {
  Given g{torch::stable::contiguous(points), torch::stable::contiguous(pairs), std::nullopt};
  if (line_bins) g.bins = torch::stable::contiguous(*line_bins);
  return g;
}

Lines lines_of(const Given& g, int64_t nz, int64_t ny, int64_t nx, double dz, double dy, double dx, int64_t tof_bins,
               double bin_mm, double sigma_mm, double truncation) {
  STD_TORCH_CHECK(
      g.points.dim() == 2 && g.points.size(1) == 3 && g.points.scalar_type() == ScalarType::Double && g.points.is_cpu(),
      "joseph3d: points must be float64 [K, 3] on the host");
  STD_TORCH_CHECK(
      g.pairs.dim() == 2 && g.pairs.size(1) == 2 && g.pairs.scalar_type() == ScalarType::Int && g.pairs.is_cpu(),
      "joseph3d: pairs must be int32 [n, 2] on the host");
  const int64_t most = int64_t{1} << 24;
  STD_TORCH_CHECK(nz > 0 && ny > 0 && nx > 0 && nz < most && ny < most && nx < most,
                  "joseph3d: sizes must lie between 1 and 2^24");
  STD_TORCH_CHECK(dz > 0 && dy > 0 && dx > 0, "joseph3d: spacings must be positive");
  STD_TORCH_CHECK(tof_bins >= 0 && (!tof_bins || (bin_mm > 0 && sigma_mm > 0 && truncation > 0 && tof_bins < most)),
                  "joseph3d: no such time-of-flight bins");
  const int64_t n = g.pairs.size(0);
  STD_TORCH_CHECK(in_range(in<int32_t>(g.pairs), 2 * n, g.points.size(0)), "joseph3d: pairs must be rows of points");
  const int32_t* bins = nullptr;
  if (g.bins) {
    STD_TORCH_CHECK(g.bins->dim() == 1 && g.bins->size(0) == n && g.bins->scalar_type() == ScalarType::Int &&
                        g.bins->is_cpu() && tof_bins > 0,
                    "joseph3d: line_bins must be int32 [n] on the host");
    bins = in<int32_t>(*g.bins);
    STD_TORCH_CHECK(in_range(bins, n, tof_bins), "joseph3d: line_bins must lie below tof_bins");
  }
  return {in<double>(g.points),
          in<int32_t>(g.pairs),
          bins,
          n,
          {{nz, ny, nx}, {dz, dy, dx}},
          {tof_bins, bin_mm, sigma_mm, truncation}};
}

// The first `lead` axes of t; and their product.
std::vector<int64_t> leading(const Tensor& t, int64_t lead, int64_t* volumes) {
  std::vector<int64_t> shape;
  *volumes = 1;
  for (int64_t d = 0; d < lead; ++d) {
    shape.push_back(t.size(d));
    *volumes *= t.size(d);
  }
  return shape;
}

Tensor joseph3d(const Tensor& x, const Tensor& points, const Tensor& pairs, const std::optional<Tensor>& line_bins,
                double dz, double dy, double dx, int64_t tof_bins, double tof_bin_mm, double tof_sigma_mm,
                double tof_truncation) {
  const int64_t d = x.dim();
  STD_TORCH_CHECK(d >= 3, "joseph3d: x must be [..., z, y, x]");
  const Given given = host(points, pairs, line_bins);
  const Tensor xc = torch::stable::contiguous(x);
  const Lines lines = lines_of(given, x.size(d - 3), x.size(d - 2), x.size(d - 1), dz, dy, dx, tof_bins, tof_bin_mm,
                               tof_sigma_mm, tof_truncation);
  int64_t volumes;
  std::vector<int64_t> shape = leading(x, d - 3, &volumes);
  shape.push_back(lines.n);
  if (lines.every_bin()) shape.push_back(tof_bins);
  Tensor y = torch::stable::new_empty(x, shape);
  if (volumes && lines.n) {
    RECON3D_REAL(x, "joseph3d", { joseph3d_cpu(in<scalar_t>(xc), out<scalar_t>(y), volumes, lines, ranges()); })
  }
  return y;
}

Tensor joseph3d_adjoint(const Tensor& y, const Tensor& points, const Tensor& pairs,
                        const std::optional<Tensor>& line_bins, int64_t nz, int64_t ny, int64_t nx, double dz,
                        double dy, double dx, int64_t tof_bins, double tof_bin_mm, double tof_sigma_mm,
                        double tof_truncation) {
  const Given given = host(points, pairs, line_bins);
  const Tensor yc = torch::stable::contiguous(y);
  const Lines lines = lines_of(given, nz, ny, nx, dz, dy, dx, tof_bins, tof_bin_mm, tof_sigma_mm, tof_truncation);
  const int64_t tail = lines.every_bin() ? 2 : 1, d = y.dim();
  STD_TORCH_CHECK(d >= tail && y.size(d - tail) == lines.n && (tail == 1 || y.size(d - 1) == tof_bins),
                  "joseph3d_adjoint: y must have one value per line and bin");
  int64_t volumes;
  std::vector<int64_t> shape = leading(y, d - tail, &volumes);
  for (const int64_t n : {nz, ny, nx}) shape.push_back(n);
  Tensor x = torch::stable::new_empty(y, shape);
  if (volumes) {
    RECON3D_REAL(y, "joseph3d_adjoint",
                 { joseph3d_adjoint_cpu(in<scalar_t>(yc), out<scalar_t>(x), volumes, lines, ranges()); })
  }
  return x;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) {
  m.impl("joseph3d", TORCH_BOX(&recon3d::joseph3d));
  m.impl("joseph3d_adjoint", TORCH_BOX(&recon3d::joseph3d_adjoint));
}
