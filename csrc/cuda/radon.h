// Line integrals of stacks of slices (Joseph) and their transpose on a GPU, parallel and flat-detector fan beam;
// recon3d/ops/radon.py has the formulas.
//   x : [slices, ny, nx], y : [slices, views, cells], row-major on the device, not aliasing; the result is overwritten
//   cosine, sine : of every view's angle, on the host; lengths in mm, sod = 0 means a parallel beam
//   work : radon_workspace elements on the device, aligned to 128 bytes; contents arbitrary
// Sums run over steps (forward) or views and rays (transpose) in order, the same for any number of slices: no atomics.
// Nothing is copied from the host: the angles travel as kernel arguments. Returns null or what went wrong.
#pragma once
#include <cstddef>
#include <cstdint>

namespace recon3d {
namespace cuda {
struct Scan {
  int64_t views, cells, ny, nx;
  double pitch, offset, sod, sdd, dy, dx;
};

template <class T>
int64_t radon_workspace(int64_t slices, const Scan& scan, bool adjoint);

template <class T>
const char* radon(const T* x, T* y, int64_t slices, const Scan& scan, const double* cosine, const double* sine, T* work,
                  void* stream);
template <class T>
const char* radon_adjoint(const T* y, T* x, int64_t slices, const Scan& scan, const double* cosine, const double* sine,
                          T* work, void* stream);
}  // namespace cuda
}  // namespace recon3d
