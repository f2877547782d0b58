// The three sweeps of a conjugate gradient step on vectors cut into slices of n and chunks of kCgChunk.
//   A unit u is chunk u % chunks of slice u / chunks; every function works on the units [u0, u1).
//   x, r, p, q : [slices, n] row-major, no aliasing
//   sums       : [slices * chunks], one float64 per unit, overwritten
//   alpha, beta: float64, one per slice (stride 1) or one for all (stride 0)
#pragma once
#include <cstdint>
namespace recon3d {
constexpr int64_t kCgChunk = 8192;

inline int64_t cg_chunks(int64_t n) { return (n + kCgChunk - 1) / kCgChunk; }

// sums = <p, q>
template <class T>
void cg_curvature_cpu(const T* p, const T* q, double* sums, int64_t n, int64_t u0, int64_t u1);

// r -= alpha q;  sums = <r, r>
template <class T>
void cg_residual_cpu(T* r, const T* q, const double* alpha, int64_t stride, double* sums, int64_t n, int64_t u0,
                     int64_t u1);

// x += alpha p;  p = r + beta p
template <class T>
void cg_direction_cpu(T* x, T* p, const T* r, const double* alpha, const double* beta, int64_t stride, int64_t n,
                      int64_t u0, int64_t u1);
}  // namespace recon3d
