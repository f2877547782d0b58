#include "cpu/tv3d.h"

#include <cmath>

#include "common.h"

namespace recon3d {
namespace {
// How a run of voxels in one row meets one axis. Where a difference does not exist all factors are 0 and the pointers
// point at the run itself, so that they can be read.
template <class T>
struct Along {  // dual sweep: neighbour further along the axis
  const T* next;
  T keep, step;
};
template <class T>
struct Pull {  // primal sweep: component here and one step back, each with its factor
  const T *before, *here;
  T fb, fh;
};

template <class T>
inline __attribute__((always_inline)) void dual_run(T* RECON3D_RESTRICT pz, T* RECON3D_RESTRICT py,
                                                    T* RECON3D_RESTRICT px, const T* here, const T* below,
                                                    const T* next, const T* right, int64_t n, T keep_z, T keep_y,
                                                    T keep_x, T sz, T sy, T sx, T limit) {
  for (int64_t j = 0; j < n; ++j) {
    const T z = keep_z * pz[j] + sz * (below[j] - here[j]);
    const T y = keep_y * py[j] + sy * (next[j] - here[j]);
    const T x = keep_x * px[j] + sx * (right[j] - here[j]);
    const T norm = std::sqrt(z * z + y * y + x * x);
    const T cut = norm > limit ? limit / norm : T(1);
    pz[j] = z * cut;
    py[j] = y * cut;
    px[j] = x * cut;
  }
}

template <class T>
inline __attribute__((always_inline)) void primal_run(T* RECON3D_RESTRICT x, T* RECON3D_RESTRICT xbar,
                                                      const T* RECON3D_RESTRICT g, const T* z0, const T* z1,
                                                      const T* y0, const T* y1, const T* x0, const T* x1, int64_t n,
                                                      T fz0, T fz1, T fy0, T fy1, T fx0, T fx1, T tau, T floor) {
  for (int64_t j = 0; j < n; ++j) {
    const T pull = (fz0 * z0[j] - fz1 * z1[j]) + (fy0 * y0[j] - fy1 * y1[j]) + (fx0 * x0[j] - fx1 * x1[j]);
    const T old = x[j];
    T value = old - tau * (g[j] + pull);
    value = value < floor ? floor : value;
    xbar[j] = value + (value - old);
    x[j] = value;
  }
}

RECON3D_CLONES void dual(float* pz, float* py, float* px, const float* here, const Along<float>& z,
                         const Along<float>& y, const Along<float>& x, int64_t n, float limit) {
  dual_run(pz, py, px, here, z.next, y.next, x.next, n, z.keep, y.keep, x.keep, z.step, y.step, x.step, limit);
}
RECON3D_CLONES void dual(double* pz, double* py, double* px, const double* here, const Along<double>& z,
                         const Along<double>& y, const Along<double>& x, int64_t n, double limit) {
  dual_run(pz, py, px, here, z.next, y.next, x.next, n, z.keep, y.keep, x.keep, z.step, y.step, x.step, limit);
}
RECON3D_CLONES void primal(float* x, float* xbar, const float* g, const Pull<float>& pz, const Pull<float>& py,
                           const Pull<float>& px, int64_t n, float tau, float floor) {
  primal_run(x, xbar, g, pz.before, pz.here, py.before, py.here, px.before, px.here, n, pz.fb, pz.fh, py.fb, py.fh,
             px.fb, px.fh, tau, floor);
}
RECON3D_CLONES void primal(double* x, double* xbar, const double* g, const Pull<double>& pz, const Pull<double>& py,
                           const Pull<double>& px, int64_t n, double tau, double floor) {
  primal_run(x, xbar, g, pz.before, pz.here, py.before, py.here, px.before, px.here, n, pz.fb, pz.fh, py.fb, py.fh,
             px.fb, px.fh, tau, floor);
}
}  // namespace

template <class T>
void tv3d_dual_cpu(const Tv3d<T>& v, T* p, const T* xbar, T sigma, T limit, int64_t s0, int64_t s1) {
  const int64_t slice = v.rows * v.columns, volume = v.slices * slice, inner = v.columns - 1;
  if (slice == 0) return;
  for (int64_t k = s0; k < s1; ++k)
    for (int64_t i = 0; i < v.rows; ++i)
      for (int64_t j = 0; j < v.columns;
           j = j < inner ? inner : v.columns) {  // all columns but the last, then the last
        const int64_t at = k * slice + i * v.columns + j, n = j < inner ? inner : 1;
        const T* here = xbar + at;
        auto along = [&](bool exists, int64_t stride, T f) {
          return exists ? Along<T>{here + stride, T(1), sigma * f} : Along<T>{here, T(0), T(0)};
        };
        dual(p + at, p + volume + at, p + 2 * volume + at, here, along(k + 1 < v.slices, slice, v.fz),
             along(i + 1 < v.rows, v.columns, v.fy), along(j < inner, 1, v.fx), n, limit);
      }
}

template <class T>
void tv3d_primal_cpu(const Tv3d<T>& v, T* x, T* xbar, const T* p, const T* g, T tau, bool nonnegative, int64_t s0,
                     int64_t s1) {
  const int64_t slice = v.rows * v.columns, volume = v.slices * slice, last = v.columns - 1;
  if (slice == 0) return;
  const T floor = nonnegative ? T(0) : static_cast<T>(-HUGE_VAL);
  for (int64_t k = s0; k < s1; ++k)
    for (int64_t i = 0; i < v.rows; ++i)
      for (int64_t j = 0, n; j < v.columns; j += n) {  // the first column, the inner ones, the last one
        n = j > 0 && j < last ? last - j : 1;
        const int64_t at = k * slice + i * v.columns + j;
        auto pull = [&](const T* here, bool first, bool end, int64_t stride, T f) {
          return Pull<T>{first ? here : here - stride, here, first ? T(0) : f, end ? T(0) : f};
        };
        primal(x + at, xbar + at, g + at, pull(p + at, k == 0, k + 1 == v.slices, slice, v.fz),
               pull(p + volume + at, i == 0, i + 1 == v.rows, v.columns, v.fy),
               pull(p + 2 * volume + at, j == 0, j == last, 1, v.fx), n, tau, floor);
      }
}

template void tv3d_dual_cpu<float>(const Tv3d<float>&, float*, const float*, float, float, int64_t, int64_t);
template void tv3d_dual_cpu<double>(const Tv3d<double>&, double*, const double*, double, double, int64_t, int64_t);
template void tv3d_primal_cpu<float>(const Tv3d<float>&, float*, float*, const float*, const float*, float, bool,
                                     int64_t, int64_t);
template void tv3d_primal_cpu<double>(const Tv3d<double>&, double*, double*, const double*, const double*, double, bool,
                                      int64_t, int64_t);
}  // namespace recon3d
