// Differences along z, their normal operator, and the one-pass ADMM update of total variation along z.
// All volumes are [slices, pixels] row-major; every function works on the pixel columns [p0, p1) of all slices.
#pragma once
#include <cstdint>
namespace recon3d {
enum class TvzStencil { kDiff, kAdjoint, kNormal };

// out = D x (kDiff), D^T x (kAdjoint) or D^T D x (kNormal), times scale; overwritten, or added to when add is set.
//   out must not alias x. Without periodic the last difference is zero.
template <class T>
void tvz_stencil_cpu(TvzStencil kind, const T* x, T* out, int64_t slices, int64_t pixels, T scale, bool periodic,
                     bool add, int64_t p0, int64_t p1);

// a = scale (x_{k+1} - x_k) + w;  w_new = clamp(a, -threshold, threshold);  z = a - w_new;  g = scale D1^T (z - w_new).
//   w_new may be w itself; z, w_new and g are overwritten and must not alias anything else. z may be null: not wanted.
template <class T>
void tvz_update_cpu(const T* x, const T* w, T* z, T* w_new, T* g, int64_t slices, int64_t pixels, T threshold, T scale,
                    bool periodic, int64_t p0, int64_t p1);
}  // namespace recon3d
