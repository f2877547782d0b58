#include "cpu/nufft_grid.h"

#include <algorithm>

#include "common.h"

namespace recon3d {
namespace {
// Axes as z, y, x; one that is not there has one cell and one tap of weight 1.
struct Axis {
  int64_t size;
  int taps, column;
};
struct Axes {
  Axis z, y, x;
  int64_t cells;
};
Axes axes_of(const GridPoints& g) {
  const auto axis = [&](int from_last) {
    const int a = g.axes - 1 - from_last;
    if (a < 0) return Axis{1, 1, -1};
    return Axis{g.grid[a], g.grid[a] > 1 ? g.width : 1, a};
  };
  const Axes found{axis(2), axis(1), axis(0), 0};
  return {found.z, found.y, found.x, found.z.size * found.y.size * found.x.size};
}

// Place of the first tap in FFT order.
int64_t start_of(const Axis& a, const int32_t* first) {
  if (a.column < 0) return 0;
  const int64_t at = first[a.column] - a.size / 2;
  return at < 0 ? at + a.size : at;
}

// Calls run(offset of a row's run in cells, its weight in z and y, taps, their weights in x): one or two runs per row.
template <class T, class Run>
inline void rows_of(const Axes& a, const GridPoints& g, const T* weights, int64_t p, const Run& run) {
  const int32_t* first = g.first + p * g.axes;
  const T* w = weights + p * g.axes * g.width;
  const T one = 1;
  const T* by_z = a.z.column < 0 ? &one : w + a.z.column * g.width;
  const T* by_y = a.y.column < 0 ? &one : w + a.y.column * g.width;
  const T* by_x = w + a.x.column * g.width;
  const int64_t x0 = start_of(a.x, first), y0 = start_of(a.y, first), z0 = start_of(a.z, first);
  const int here = static_cast<int>(std::min<int64_t>(a.x.taps, a.x.size - x0));
  for (int tz = 0; tz < a.z.taps; ++tz) {
    const int64_t iz = z0 + tz < a.z.size ? z0 + tz : z0 + tz - a.z.size;
    for (int ty = 0; ty < a.y.taps; ++ty) {
      const int64_t iy = y0 + ty < a.y.size ? y0 + ty : y0 + ty - a.y.size;
      const int64_t row = (iz * a.y.size + iy) * a.x.size;
      const T weight = by_z[tz] * by_y[ty];
      run(row + x0, weight, here, by_x);
      if (here < a.x.taps) run(row, weight, a.x.taps - here, by_x + here);
    }
  }
}

template <class T>
inline void interpolate(const T* cells, T* y, const GridPoints& g, const T* weights, int64_t b0, int64_t b1, int64_t p0,
                        int64_t p1) {
  const Axes a = axes_of(g);
  for (int64_t b = b0; b < b1; ++b) {
    const T* image = cells + 2 * b * a.cells;
    T* out = y + 2 * b * g.points;
    for (int64_t p = p0; p < p1; ++p) {
      T re = 0, im = 0;
      rows_of(a, g, weights, p, [&](int64_t at, T weight, int taps, const T* by_x) {
        const T* cell = image + 2 * at;
        T row_re = 0, row_im = 0;
        for (int t = 0; t < taps; ++t) {
          row_re += by_x[t] * cell[2 * t];
          row_im += by_x[t] * cell[2 * t + 1];
        }
        re += weight * row_re;
        im += weight * row_im;
      });
      out[2 * g.order[p]] = re;
      out[2 * g.order[p] + 1] = im;
    }
  }
}

template <class T>
inline void spread(const T* y, T* cells, const GridPoints& g, const T* weights, int64_t b0, int64_t b1) {
  const Axes a = axes_of(g);
  for (int64_t b = b0; b < b1; ++b) {
    T* image = cells + 2 * b * a.cells;
    const T* in = y + 2 * b * g.points;
    std::fill(image, image + 2 * a.cells, T(0));
    for (int64_t p = 0; p < g.points; ++p) {
      const T re = in[2 * g.order[p]], im = in[2 * g.order[p] + 1];
      rows_of(a, g, weights, p, [&](int64_t at, T weight, int taps, const T* by_x) {
        T* RECON3D_RESTRICT cell = image + 2 * at;
        const T row_re = weight * re, row_im = weight * im;
        for (int t = 0; t < taps; ++t) {
          cell[2 * t] += by_x[t] * row_re;
          cell[2 * t + 1] += by_x[t] * row_im;
        }
      });
    }
  }
}
}  // namespace

template <class T>
void interpolate_cpu(const T* cells, T* y, const GridPoints& g, const T* weights, int64_t b0, int64_t b1, int64_t p0,
                     int64_t p1) {
  interpolate(cells, y, g, weights, b0, b1, p0, p1);
}
template <class T>
void spread_cpu(const T* y, T* cells, const GridPoints& g, const T* weights, int64_t b0, int64_t b1) {
  spread(y, cells, g, weights, b0, b1);
}

template void interpolate_cpu(const float*, float*, const GridPoints&, const float*, int64_t, int64_t, int64_t,
                              int64_t);
template void interpolate_cpu(const double*, double*, const GridPoints&, const double*, int64_t, int64_t, int64_t,
                              int64_t);
template void spread_cpu(const float*, float*, const GridPoints&, const float*, int64_t, int64_t);
template void spread_cpu(const double*, double*, const GridPoints&, const double*, int64_t, int64_t);
}  // namespace recon3d
