// Line integrals of volumes along arbitrary lines and their transpose, with time of flight or without
// (recon3d/ops/joseph3d.py has the formulas).
//   x : [volumes, nz, ny, nx], y : [volumes, n] or [volumes, n, bins], row-major and not aliasing; the result is
//       overwritten.
// A line's value depends on that line alone; voxels are summed in an order that threads do not change.
#pragma once
#include <cstdint>

#include "cpu/joseph3d_ray.h"
#include "cpu/radon.h"
#include "cpu/tof.h"

namespace recon3d {

struct Lines {
  const double* points;  // [., 3] mm (z, y, x), finite
  const int32_t* pairs;  // [n, 2] rows of points, in range
  const int32_t* bins;   // [n] time bin of every line, in range; null: all bins, or none
  int64_t n;
  RayGrid grid;  // fewer than 2^24 voxels along an axis
  Tof tof;       // bins = 0: none

  bool every_bin() const { return tof.bins > 0 && !bins; }
  int64_t values() const { return every_bin() ? tof.bins : 1; }  // of every line
};

void joseph3d_cpu(const float* x, float* y, int64_t volumes, const Lines& lines, const RunRanges& run);
void joseph3d_cpu(const double* x, double* y, int64_t volumes, const Lines& lines, const RunRanges& run);
void joseph3d_adjoint_cpu(const float* y, float* x, int64_t volumes, const Lines& lines, const RunRanges& run);
void joseph3d_adjoint_cpu(const double* y, double* x, int64_t volumes, const Lines& lines, const RunRanges& run);

}  // namespace recon3d
