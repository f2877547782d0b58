#include "cpu/tvz.h"

#include <algorithm>

#include "common.h"

namespace recon3d {
namespace {
constexpr int64_t kBlock = 4096;  // pixels: a block's rows stay in the near caches from one slice to the next

template <class T, class F>
inline __attribute__((always_inline)) void write(bool add, T* RECON3D_RESTRICT row, int64_t n, F value) {
  if (add)
    for (int64_t i = 0; i < n; ++i) row[i] += value(i);
  else
    for (int64_t i = 0; i < n; ++i) row[i] = value(i);
}

template <class T>
inline __attribute__((always_inline)) void stencil_row(TvzStencil kind, bool add, const T* before, const T* here,
                                                       const T* after, T* row, int64_t n, T scale) {
  if (kind == TvzStencil::kDiff)
    write(add, row, n, [=](int64_t i) { return scale * (after[i] - here[i]); });
  else if (kind == TvzStencil::kAdjoint)
    write(add, row, n, [=](int64_t i) { return scale * (before[i] - here[i]); });
  else
    write(add, row, n, [=](int64_t i) { return scale * ((here[i] - before[i]) + (here[i] - after[i])); });
}

// last holds z - w of the slice before and takes that of this one; w is the old dual and becomes the new one
template <class T>
inline __attribute__((always_inline)) void update_row(const T* here, const T* after, T* RECON3D_RESTRICT last,
                                                      T* RECON3D_RESTRICT z, T* RECON3D_RESTRICT w,
                                                      T* RECON3D_RESTRICT g, int64_t n, T threshold, T scale) {
  for (int64_t i = 0; i < n; ++i) {
    const T a = scale * (after[i] - here[i]) + w[i];
    const T upper = a > threshold ? threshold : a;
    const T clamped = upper < -threshold ? -threshold : upper;  // a NaN stays one
    const T split = a - clamped, v = split - clamped;
    z[i] = split;
    w[i] = clamped;
    g[i] = scale * (last[i] - v);
    last[i] = v;
  }
}

RECON3D_CLONES void stencil(TvzStencil kind, bool add, const float* before, const float* here, const float* after,
                            float* row, int64_t n, float scale) {
  stencil_row(kind, add, before, here, after, row, n, scale);
}
RECON3D_CLONES void update(const float* here, const float* after, float* last, float* z, float* w, float* g, int64_t n,
                           float threshold, float scale) {
  update_row(here, after, last, z, w, g, n, threshold, scale);
}
RECON3D_CLONES void stencil(TvzStencil kind, bool add, const double* before, const double* here, const double* after,
                            double* row, int64_t n, double scale) {
  stencil_row(kind, add, before, here, after, row, n, scale);
}
RECON3D_CLONES void update(const double* here, const double* after, double* last, double* z, double* w, double* g,
                           int64_t n, double threshold, double scale) {
  update_row(here, after, last, z, w, g, n, threshold, scale);
}
}  // namespace

template <class T>
void tvz_stencil_cpu(TvzStencil kind, const T* x, T* out, int64_t slices, int64_t pixels, T scale, bool periodic,
                     bool add, int64_t p0, int64_t p1) {
  const T zero[kBlock] = {};
  for (int64_t p = p0; p < p1; p += kBlock)
    for (int64_t k = 0; k < slices; ++k) {
      const bool first = k == 0, last = k == slices - 1;
      const T* here = x + k * pixels + p;
      const T* before = !first ? here - pixels : periodic ? x + (slices - 1) * pixels + p : here;
      const T* after = !last ? here + pixels : periodic ? x + p : here;
      if (kind == TvzStencil::kAdjoint && !periodic) {  // the last difference does not exist
        if (first) before = zero;
        if (last) here = zero;
      }
      stencil(kind, add, before, here, after, out + k * pixels + p, std::min(kBlock, p1 - p), scale);
    }
}

template <class T>
void tvz_update_cpu(const T* x, const T* w, T* z, T* w_new, T* g, int64_t slices, int64_t pixels, T threshold, T scale,
                    bool periodic, int64_t p0, int64_t p1) {
  T last[kBlock], before[kBlock], w_end[kBlock], g_end[kBlock], unwanted[kBlock];
  for (int64_t p = p0; p < p1; p += kBlock) {
    const int64_t n = std::min(kBlock, p1 - p), end = (slices - 1) * pixels + p;
    std::fill_n(last, n, T(0));
    if (periodic && slices) {  // slice 0 follows the last one, of which only `last` is wanted now
      std::copy_n(w + end, n, w_end);
      update(x + end, x + p, last, unwanted, w_end, g_end, n, threshold, scale);
    }
    for (int64_t k = 0; k < slices; ++k) {
      const int64_t at = k * pixels + p;
      const bool top = k == slices - 1;
      if (w_new != w) std::copy_n(w + at, n, w_new + at);  // the row is in cache when it is changed
      if (top && !periodic) std::copy_n(last, n, before);
      update(x + at,
             !top       ? x + at + pixels
             : periodic ? x + p
                        : x + at,
             last, z ? z + at : unwanted, w_new + at, g + at, n, threshold, scale);
      if (top && !periodic)  // the last difference does not exist, so D^T has nothing to take from it
        for (int64_t i = 0; i < n; ++i) g[at + i] = scale * before[i];
    }
  }
}

template void tvz_stencil_cpu<float>(TvzStencil, const float*, float*, int64_t, int64_t, float, bool, bool, int64_t,
                                     int64_t);
template void tvz_update_cpu<float>(const float*, const float*, float*, float*, float*, int64_t, int64_t, float, float,
                                    bool, int64_t, int64_t);
template void tvz_stencil_cpu<double>(TvzStencil, const double*, double*, int64_t, int64_t, double, bool, bool, int64_t,
                                      int64_t);
template void tvz_update_cpu<double>(const double*, const double*, double*, double*, double*, int64_t, int64_t, double,
                                     double, bool, int64_t, int64_t);
}  // namespace recon3d
