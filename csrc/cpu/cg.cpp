#include "cpu/cg.h"

#include <algorithm>

#include "common.h"

namespace recon3d {
namespace {
constexpr int64_t kLanes = 16;  // independent partial sums, so that the loop vectorises without reordering between ISAs

inline __attribute__((always_inline)) double total(const double* lane) {
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += lane[k];
  return sum;
}

template <class T>
inline __attribute__((always_inline)) double curvature_row(const T* RECON3D_RESTRICT p, const T* RECON3D_RESTRICT q,
                                                           int64_t n) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lane[k] += static_cast<double>(p[i + k]) * static_cast<double>(q[i + k]);
  for (int64_t k = 0; i < n; ++i, ++k) lane[k] += static_cast<double>(p[i]) * static_cast<double>(q[i]);
  return total(lane);
}

template <class T>
inline __attribute__((always_inline)) double residual_row(T* RECON3D_RESTRICT r, const T* RECON3D_RESTRICT q, T alpha,
                                                          int64_t n) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) {
      const T value = r[i + k] - alpha * q[i + k];
      r[i + k] = value;
      lane[k] += static_cast<double>(value) * static_cast<double>(value);
    }
  for (int64_t k = 0; i < n; ++i, ++k) {
    const T value = r[i] - alpha * q[i];
    r[i] = value;
    lane[k] += static_cast<double>(value) * static_cast<double>(value);
  }
  return total(lane);
}

template <class T>
inline __attribute__((always_inline)) void direction_row(T* RECON3D_RESTRICT x, T* RECON3D_RESTRICT p,
                                                         const T* RECON3D_RESTRICT r, T alpha, T beta, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] += alpha * p[i];
    p[i] = r[i] + beta * p[i];
  }
}

RECON3D_CLONES double curvature(const float* p, const float* q, int64_t n) { return curvature_row(p, q, n); }
RECON3D_CLONES double curvature(const double* p, const double* q, int64_t n) { return curvature_row(p, q, n); }
RECON3D_CLONES double residual(float* r, const float* q, float alpha, int64_t n) {
  return residual_row(r, q, alpha, n);
}
RECON3D_CLONES double residual(double* r, const double* q, double alpha, int64_t n) {
  return residual_row(r, q, alpha, n);
}
RECON3D_CLONES void direction(float* x, float* p, const float* r, float alpha, float beta, int64_t n) {
  direction_row(x, p, r, alpha, beta, n);
}
RECON3D_CLONES void direction(double* x, double* p, const double* r, double alpha, double beta, int64_t n) {
  direction_row(x, p, r, alpha, beta, n);
}

struct Unit {
  int64_t slice, at, size;
};
inline Unit unit(int64_t u, int64_t n) {
  const int64_t chunks = cg_chunks(n), slice = u / chunks, start = u % chunks * kCgChunk;
  return {slice, slice * n + start, std::min(kCgChunk, n - start)};
}
}  // namespace

template <class T>
void cg_curvature_cpu(const T* p, const T* q, double* sums, int64_t n, int64_t u0, int64_t u1) {
  for (int64_t u = u0; u < u1; ++u) {
    const Unit c = unit(u, n);
    sums[u] = curvature(p + c.at, q + c.at, c.size);
  }
}

template <class T>
void cg_residual_cpu(T* r, const T* q, const double* alpha, int64_t stride, double* sums, int64_t n, int64_t u0,
                     int64_t u1) {
  for (int64_t u = u0; u < u1; ++u) {
    const Unit c = unit(u, n);
    sums[u] = residual(r + c.at, q + c.at, static_cast<T>(alpha[c.slice * stride]), c.size);
  }
}

template <class T>
void cg_direction_cpu(T* x, T* p, const T* r, const double* alpha, const double* beta, int64_t stride, int64_t n,
                      int64_t u0, int64_t u1) {
  for (int64_t u = u0; u < u1; ++u) {
    const Unit c = unit(u, n);
    direction(x + c.at, p + c.at, r + c.at, static_cast<T>(alpha[c.slice * stride]),
              static_cast<T>(beta[c.slice * stride]), c.size);
  }
}

template void cg_curvature_cpu<float>(const float*, const float*, double*, int64_t, int64_t, int64_t);
template void cg_curvature_cpu<double>(const double*, const double*, double*, int64_t, int64_t, int64_t);
template void cg_residual_cpu<float>(float*, const float*, const double*, int64_t, double*, int64_t, int64_t, int64_t);
template void cg_residual_cpu<double>(double*, const double*, const double*, int64_t, double*, int64_t, int64_t,
                                      int64_t);
template void cg_direction_cpu<float>(float*, float*, const float*, const double*, const double*, int64_t, int64_t,
                                      int64_t, int64_t);
template void cg_direction_cpu<double>(double*, double*, const double*, const double*, const double*, int64_t, int64_t,
                                       int64_t, int64_t);
}  // namespace recon3d
