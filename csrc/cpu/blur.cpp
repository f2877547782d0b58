#include "cpu/blur.h"

#include <algorithm>
#include <cmath>

#include "common.h"

namespace recon3d {
namespace {
constexpr int64_t kBlock = 2048;  // values that stay in the nearest cache while all weights pass

// out = w[0] here + sum of w[k] (here - k stride, here + k stride) for the first `before` and `after` neighbours
template <class T>
inline __attribute__((always_inline)) void axis_run(const T* here, T* RECON3D_RESTRICT out, int64_t n, const T* w,
                                                    int64_t radius, int64_t stride, int64_t before, int64_t after) {
  for (int64_t i = 0; i < n; ++i) out[i] = w[0] * here[i];
  for (int64_t k = 1; k <= radius; ++k) {
    const T *low = here - k * stride, *high = here + k * stride, f = w[k];
    if (k <= before && k <= after)
      for (int64_t i = 0; i < n; ++i) out[i] += f * (low[i] + high[i]);
    else if (k <= before)
      for (int64_t i = 0; i < n; ++i) out[i] += f * low[i];
    else if (k <= after)
      for (int64_t i = 0; i < n; ++i) out[i] += f * high[i];
    else
      break;
  }
}

RECON3D_CLONES void axis(const float* here, float* out, int64_t n, const float* w, int64_t radius, int64_t stride,
                         int64_t before, int64_t after) {
  axis_run(here, out, n, w, radius, stride, before, after);
}
RECON3D_CLONES void axis(const double* here, double* out, int64_t n, const double* w, int64_t radius, int64_t stride,
                         int64_t before, int64_t after) {
  axis_run(here, out, n, w, radius, stride, before, after);
}
}  // namespace

std::vector<double> blur_weights(double sigma) {
  const int64_t radius = static_cast<int64_t>(4 * sigma + 0.5);
  std::vector<double> w(radius + 1, 1.0);
  double total = 1;
  for (int64_t k = 1; k <= radius; ++k) {
    w[k] = std::exp(-0.5 * (k / sigma) * (k / sigma));
    total += 2 * w[k];
  }
  for (double& value : w) value /= total;
  return w;
}

template <class T>
void blur_cpu(const Blur<T>& v, const T* x, T* out, int64_t s0, int64_t s1) {
  const int64_t slice = v.rows * v.columns;
  const auto radius = [](const std::vector<T>& w) { return static_cast<int64_t>(w.size()) - 1; };
  const int64_t rz = radius(v.wz), ry = radius(v.wy), rx = radius(v.wx);
  std::vector<T> along_z(slice), row(v.columns + 2 * rx);  // the row stands between zeros
  for (int64_t k = s0; k < s1; ++k) {
    for (int64_t p = 0; p < slice; p += kBlock)
      axis(x + k * slice + p, along_z.data() + p, std::min(kBlock, slice - p), v.wz.data(), rz, slice, k,
           v.slices - 1 - k);
    for (int64_t i = 0; i < v.rows; ++i) {
      T* to = out + k * slice + i * v.columns;
      axis(along_z.data() + i * v.columns, row.data() + rx, v.columns, v.wy.data(), ry, v.columns, i, v.rows - 1 - i);
      axis(row.data() + rx, to, v.columns, v.wx.data(), rx, 1, rx, rx);
    }
  }
}

template void blur_cpu<float>(const Blur<float>&, const float*, float*, int64_t, int64_t);
template void blur_cpu<double>(const Blur<double>&, const double*, double*, int64_t, int64_t);
}  // namespace recon3d
