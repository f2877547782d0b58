// Relative difference prior of neighbours that share a face: gradient and, for EM, the curvature of a parabola above
// it.
//   volumes are [slices, rows, columns] row-major; pairs along z, y, x weigh wz, wy, wx (0: not tied)
//   a pair (a, b) adds w (a - b) r (1 + c r) to the gradient at a, c = 2 b + epsilon, r = 1 / (a + b + gamma |a - b| +
//   epsilon), and 2 w q (1 + c q) to the curvature, q = 1 / (c + (gamma - 1) |a - b|)
#pragma once
#include <cmath>
#include <cstdint>

#include "common.h"
namespace recon3d {
template <class T>
struct Rdp {
  int64_t slices, rows, columns;
  T gamma, epsilon, wz, wy, wx;
};

// neighbours of a run of voxels in one row: z-, z+, y-, y+, x-, x+; where there is none, the run itself with weight 0
template <class T>
struct Around {
  const T* at[6];
  T weight[6];
};

template <class T>
inline Around<T> around(const Rdp<T>& v, const T* here, int64_t k, int64_t i, int64_t j, int64_t n) {
  const int64_t row = v.columns, slice = v.rows * v.columns;
  const bool has[6] = {k > 0, k + 1 < v.slices, i > 0, i + 1 < v.rows, j > 0, j + n < v.columns};
  const int64_t step[6] = {-slice, slice, -row, row, -1, 1};
  const T weight[6] = {v.wz, v.wz, v.wy, v.wy, v.wx, v.wx};
  Around<T> a;
  for (int m = 0; m < 6; ++m) {
    a.at[m] = has[m] ? here + step[m] : here;
    a.weight[m] = has[m] ? weight[m] : T(0);
  }
  return a;
}

template <class T>
inline __attribute__((always_inline)) void rdp_pair(T a, T b, T w, T gamma, T epsilon, T& slope, T& curvature) {
  const T d = a - b, size = std::fabs(d), c = 2 * b + epsilon;
  const T r = 1 / (a + b + gamma * size + epsilon), q = 1 / (c + (gamma - 1) * size);
  slope += w * (d * r * (1 + c * r));
  curvature += 2 * w * (q * (1 + c * q));
}

// The runs of a row on which every voxel has the same neighbours along x: the first column, the inner ones, the last.
template <class F>
inline void for_runs(int64_t columns, F run) {
  for (int64_t j = 0, n; j < columns; j += n) {
    n = j > 0 && j < columns - 1 ? columns - 1 - j : 1;
    run(j, n);
  }
}

// out = dR/dx on the slices [s0, s1); out must not alias x.
template <class T>
void rdp_gradient_cpu(const Rdp<T>& v, const T* x, T* out, int64_t s0, int64_t s1);
}  // namespace recon3d
