// The two sweeps of a primal-dual step for isotropic total variation in 3D, on the slices [s0, s1).
//   x, xbar, g : [slices, rows, columns] row-major;  p : [3, slices, rows, columns], components along z, y, x
//   Differences are forward, times fz, fy, fx, and do not exist at the last slice, row and column.
#pragma once
#include <cstdint>
namespace recon3d {
template <class T>
struct Tv3d {
  int64_t slices, rows, columns;
  T fz, fy, fx;
};

// p <- (p + sigma D xbar) cut to length limit; nonexistent components become zero. p must not alias xbar.
template <class T>
void tv3d_dual_cpu(const Tv3d<T>& v, T* p, const T* xbar, T sigma, T limit, int64_t s0, int64_t s1);

// x' = x - tau (g + D^T p), at least zero if nonnegative;  xbar <- 2 x' - x;  x <- x'. No aliasing.
template <class T>
void tv3d_primal_cpu(const Tv3d<T>& v, T* x, T* xbar, const T* p, const T* g, T tau, bool nonnegative, int64_t s0,
                     int64_t s1);
}  // namespace recon3d
