// SENSE normal operators on CUDA: sum over coils of conj(S) F^H diag(w) F S x (recon3d/ops/sense.py has the formulas).
// Launchers return null or why they failed, never synchronise and never allocate; results have a fixed order of sums.
#pragma once
#include <cstddef>
#include <cstdint>

namespace recon3d {
namespace cuda {

// x, out : [slices, ny, nx] complex, not aliasing; out is overwritten
// maps   : [slices, chunks, line, element, 8] complex; (line, element) = (y, x), or (x, y) for lines along y
// weights: real, in FFT order, [weight_slices, n] for lines, [weight_slices, ny, nx] or twice that size for planes
template <class T>
struct SenseJob {
  const T *x, *maps, *weights;
  T* out;
  int64_t slices, coils, ny, nx, weight_slices;
  bool along_y, doubled;
};

// Whether lines of n elements have a kernel: factors 2, 3, 5 and 7 only, and one coil of a line fits shared memory.
bool sense_serves(int64_t n, bool is_double);

// Elements of T that the launchers need as scratch.
template <class T>
int64_t sense_lines_workspace(const SenseJob<T>& job);
template <class T>
int64_t sense_planes_workspace(const SenseJob<T>& job);

template <class T>
const char* sense_lines(const SenseJob<T>& job, T* work, void* stream);
template <class T>
const char* sense_planes(const SenseJob<T>& job, T* work, void* stream);

}  // namespace cuda
}  // namespace recon3d
