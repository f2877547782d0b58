#include "cpu/em.h"

#include <algorithm>

#include "common.h"

namespace recon3d {
namespace {
constexpr double kLeast = 1e-20;  // expected counts are never taken smaller: as in recon3d/ops/em.py

template <bool kFactors, bool kAdditive, class T>
inline __attribute__((always_inline)) void ratio_run(const T* y, const T* p, const T* factors, const T* additive,
                                                     T* RECON3D_RESTRICT out, int64_t n, T scale) {
  constexpr T least = static_cast<T>(kLeast);
  for (int64_t i = 0; i < n; ++i) {
    const T f = kFactors ? scale * factors[i] : scale;
    const T expected = kAdditive ? f * p[i] + additive[i] : f * p[i];
    const T safe = expected < least ? least : expected;  // a NaN stays one
    const T value = f * y[i] / safe;
    out[i] = expected <= 0 ? T(0) : value;
  }
}

template <class T>
inline __attribute__((always_inline)) void ratio_any(const T* y, const T* p, const T* f, const T* b, T* out, int64_t n,
                                                     T scale) {
  if (f && b)
    ratio_run<true, true>(y, p, f, b, out, n, scale);
  else if (f)
    ratio_run<true, false>(y, p, f, b, out, n, scale);
  else if (b)
    ratio_run<false, true>(y, p, f, b, out, n, scale);
  else
    ratio_run<false, false>(y, p, f, b, out, n, scale);
}

RECON3D_CLONES void ratio(const float* y, const float* p, const float* f, const float* b, float* out, int64_t n,
                          float scale) {
  ratio_any(y, p, f, b, out, n, scale);
}
RECON3D_CLONES void ratio(const double* y, const double* p, const double* f, const double* b, double* out, int64_t n,
                          double scale) {
  ratio_any(y, p, f, b, out, n, scale);
}

template <class T>
struct Run {  // a run of voxels in one row
  const T *x, *back, *sensitivity, *anchor;
  T* out;
  Around<T> near;
};

// kPairs: 0 without the prior, 2 along z, 6 in 3D
template <int kPairs, bool kSurrogate, class T>
inline __attribute__((always_inline)) void update_run(const Run<T>& r, T* RECON3D_RESTRICT out, int64_t n, T w, T beta,
                                                      T gamma, T epsilon, T floor) {
  for (int64_t j = 0; j < n; ++j) {
    const T old = r.x[j], x = old < 0 ? T(0) : old, s = r.sensitivity[j], back = r.back[j], a = r.anchor[j];
    T slope = 0, curvature = 0;
    for (int m = 0; m < kPairs; ++m) {
      const T b = r.near.at[m][j];
      rdp_pair(x, b < 0 ? T(0) : b, r.near.weight[m], gamma, epsilon, slope, curvature);
    }
    if (kPairs) slope *= beta;
    T value;
    if (kSurrogate) {
      // q v^2 + p v - c = 0, divided by a size that keeps the three from overflowing
      if (kPairs) curvature *= beta;
      T q = kPairs ? w + curvature : w;
      const T large = std::fabs(a) > x ? std::fabs(a) : x;
      const T size = 1 / (s + q * large);
      const T pull = kPairs ? w * a + curvature * x - slope : w * a;
      const T p = (s - pull) * size;
      const T c = x * back * size;
      q *= size;
      const T root = std::sqrt(p * p + 4 * q * c);
      const bool down = p > 0;  // of the two equal forms the one without cancellation
      value = (down ? 2 * c : root - p) / (down ? p + root : 2 * q);
    } else {
      const T climb = (back - s) + w * (a - x) - slope;
      const T step = x + (x < floor ? floor : x) / s * climb;
      value = step < 0 ? T(0) : step;
    }
    out[j] = s <= 0 ? old : value;
  }
}

template <bool kSurrogate, class T>
inline __attribute__((always_inline)) void update_any(int pairs, const Run<T>& r, int64_t n, T w, T beta, T gamma,
                                                      T epsilon, T floor) {
  if (pairs == 0)
    update_run<0, kSurrogate>(r, r.out, n, w, beta, gamma, epsilon, floor);
  else if (pairs == 2)
    update_run<2, kSurrogate>(r, r.out, n, w, beta, gamma, epsilon, floor);
  else
    update_run<6, kSurrogate>(r, r.out, n, w, beta, gamma, epsilon, floor);
}

RECON3D_CLONES void update(int pairs, const EmTerms<float>& t, const Run<float>& r, int64_t n) {
  if (t.surrogate)
    update_any<true>(pairs, r, n, t.anchor_weight, t.rdp, t.v.gamma, t.v.epsilon, t.floor);
  else
    update_any<false>(pairs, r, n, t.anchor_weight, t.rdp, t.v.gamma, t.v.epsilon, t.floor);
}
RECON3D_CLONES void update(int pairs, const EmTerms<double>& t, const Run<double>& r, int64_t n) {
  if (t.surrogate)
    update_any<true>(pairs, r, n, t.anchor_weight, t.rdp, t.v.gamma, t.v.epsilon, t.floor);
  else
    update_any<false>(pairs, r, n, t.anchor_weight, t.rdp, t.v.gamma, t.v.epsilon, t.floor);
}
}  // namespace

template <class T>
void poisson_ratio_cpu(const T* y, const T* p, const T* factors, const T* additive, T* out, T scale, const Rows& rows,
                       int64_t i0, int64_t i1) {
  const int64_t block = rows.repeat * rows.inner;
  for (int64_t i = i0; i < i1;) {
    const int64_t row = i / rows.length, at = i % rows.length, along = at % rows.inner;
    const int64_t n = std::min(rows.inner - along, i1 - i), brief = at / block * rows.inner + along;
    const auto part = [&](const T* t, int64_t stride, bool is_short) {
      return t ? t + row * stride + (is_short ? brief : at) : nullptr;
    };
    ratio(y + row * rows.y + at, p + i, part(factors, rows.factors, rows.short_factors),
          part(additive, rows.additive, rows.short_additive), out + i, n, scale);
    i += n;
  }
}

template <class T>
void em_update_cpu(const EmTerms<T>& t, const T* x, const T* back, const T* sensitivity, const T* anchor, T* out,
                   int64_t s0, int64_t s1) {
  const Rdp<T>& v = t.v;
  const int pairs = t.rdp == 0 ? 0 : v.wy == 0 && v.wx == 0 ? 2 : 6;
  EmTerms<T> terms = t;
  if (!anchor) terms.anchor_weight = 0;
  for (int64_t k = s0; k < s1; ++k)
    for (int64_t i = 0; i < v.rows; ++i)
      for_runs(pairs == 6 ? v.columns : 1, [&](int64_t j, int64_t n) {
        const int64_t at = (k * v.rows + i) * v.columns + j;
        const Run<T> run{
            x + at, back + at, sensitivity + at, (anchor ? anchor : x) + at, out + at, around(v, x + at, k, i, j, n)};
        update(pairs, terms, run, pairs == 6 ? n : v.columns);
      });
}

template void poisson_ratio_cpu<float>(const float*, const float*, const float*, const float*, float*, float,
                                       const Rows&, int64_t, int64_t);
template void poisson_ratio_cpu<double>(const double*, const double*, const double*, const double*, double*, double,
                                        const Rows&, int64_t, int64_t);
template void em_update_cpu<float>(const EmTerms<float>&, const float*, const float*, const float*, const float*,
                                   float*, int64_t, int64_t);
template void em_update_cpu<double>(const EmTerms<double>&, const double*, const double*, const double*, const double*,
                                    double*, int64_t, int64_t);
}  // namespace recon3d
