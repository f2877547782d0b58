// Line integrals of stacks of slices and their transpose, parallel and flat-detector fan beam (recon3d/ops/radon.py
// has the formulas).
//   x : [slices, ny, nx], y : [slices, views, cells], both row-major and not aliasing; the result is overwritten.
// Every output element is summed in an order that neither threads nor the other slices change.
#pragma once
#include <cstdint>

namespace recon3d {

// Lengths in mm, angles in radians; sod = 0 means a parallel beam.
struct RadonScan {
  const double* angles;
  int64_t views, cells, ny, nx;
  double pitch, offset, sod, sdd, dy, dx;
};

// Runs body(context, begin, end) over pieces of [0, n), on up to `threads` threads.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end);
struct RunRanges {
  void (*run)(int64_t n, RangeBody body, void* context);
  int threads;
};

enum RadonMethod { kJoseph = 0, kShear = 1 };

void radon_cpu(const float* x, float* y, int64_t slices, const RadonScan& scan, int method, const RunRanges& run);
void radon_cpu(const double* x, double* y, int64_t slices, const RadonScan& scan, int method, const RunRanges& run);
void radon_adjoint_cpu(const float* y, float* x, int64_t slices, const RadonScan& scan, int method,
                       const RunRanges& run);
void radon_adjoint_cpu(const double* y, double* x, int64_t slices, const RadonScan& scan, int method,
                       const RunRanges& run);

}  // namespace recon3d
