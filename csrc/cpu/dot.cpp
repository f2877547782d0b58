#include "cpu/dot.h"

#include "common.h"

namespace recon3d {
namespace {
constexpr int64_t kLanes = 16;  // independent partial sums, so that the loop vectorises without reordering between ISAs

template <class T>
inline double sum_products(const T* RECON3D_RESTRICT x, const T* RECON3D_RESTRICT y, int64_t n) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lane[k] += static_cast<double>(x[i + k]) * static_cast<double>(y[i + k]);
  for (int64_t k = 0; i < n; ++i, ++k) lane[k] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  double total = 0;
  for (double v : lane) total += v;
  return total;
}
RECON3D_CLONES double sum_float(const float* x, const float* y, int64_t n) { return sum_products(x, y, n); }
RECON3D_CLONES double sum_double(const double* x, const double* y, int64_t n) { return sum_products(x, y, n); }
double sum(const float* x, const float* y, int64_t n) { return sum_float(x, y, n); }
double sum(const double* x, const double* y, int64_t n) { return sum_double(x, y, n); }
}  // namespace

template <class T>
void dot_cpu(const T* x, const T* y, double* sums, int64_t n, int64_t s0, int64_t s1) {
  for (int64_t s = s0; s < s1; ++s) sums[s] = sum(x + s * n, y + s * n, n);
}
template void dot_cpu<float>(const float*, const float*, double*, int64_t, int64_t, int64_t);
template void dot_cpu<double>(const double*, const double*, double*, int64_t, int64_t, int64_t);
}  // namespace recon3d
