// Line integrals of a volume along arbitrary lines and their transpose on a GPU, with and without time of flight;
// recon3d/ops/joseph3d.py has the formulas.
//   x : [images, nz, ny, nx], y : [images, lines] or, for all bins, [images, lines, bins], row-major on the device, not
//       aliasing; the result is overwritten
//   points : [points, 3] (z, y, x) in mm, pairs : [lines, 2] rows of points, line_bins : [lines] or null, on the device
//   work : joseph3d_adjoint_workspace bytes on the device, aligned to 256 bytes; contents arbitrary
// The transpose adds 64-bit integers, in units of 2^-62 of the largest sum that the data allow: the order in which
// threads arrive does not show, so results are the same bits from run to run, and finer than sums in float32. Data that
// are not finite make the whole volume NaN. Returns null or what went wrong.
#pragma once
#include <cstddef>
#include <cstdint>

namespace recon3d {
namespace cuda {
struct LineScan {
  int64_t lines, points;
  int64_t nz, ny, nx;
  double dz, dy, dx;
  int64_t bins;  // 0: no time of flight
  double bin_mm, sigma_mm, truncation;
  const double* point;
  const int32_t* pair;
  const int32_t* line_bin;  // null: all bins, or no time of flight
};

int64_t joseph3d_adjoint_workspace(const LineScan& scan);

template <class T>
const char* joseph3d(const T* x, T* y, int64_t images, const LineScan& scan, void* stream);
template <class T>
const char* joseph3d_adjoint(const T* y, T* x, int64_t images, const LineScan& scan, void* work, void* stream);
}  // namespace cuda
}  // namespace recon3d
