// Per-slice inner products in float64; the order of summation depends on the slice length alone.
//   x, y : [slices, n] row-major; sums : [slices], overwritten for slices [s0, s1)
#pragma once
#include <cstdint>
namespace recon3d {
template <class T>
void dot_cpu(const T* x, const T* y, double* sums, int64_t n, int64_t s0, int64_t s1);
}
