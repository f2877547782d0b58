// The NUFFT kernels of one instruction set. Included after cpu/lane_fft.h, in the same namespace.
//
// The grid of a register of images is [z, y, x padded to an odd length] registers. A forward transform fills its first
// n[0] x n[1] rows, transforms them along x, then columns along y and along z in place; what the later passes extend is
// never touched before. The adjoint runs the passes backwards and stops every line at n.

template <class F>
RECON3D_INLINE void run_all(const NufftThreads& threads, int64_t n, const F& body) {
  threads.run(
      n, [](void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// A result that nobody here reads again: past the caches, which then need not fetch the line first.
template <class T>
RECON3D_INLINE void store_through(T* p, typename Lanes<T>::Vec v) {
#if RECON3D_LEVEL == 3
  if (!(reinterpret_cast<uintptr_t>(p) & 63)) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif RECON3D_LEVEL == 2
  if (!(reinterpret_cast<uintptr_t>(p) & 31)) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
  store(p, v);
}
// Before another thread may read what store_through wrote.
RECON3D_INLINE void finish_stores() {
#if RECON3D_LEVEL >= 2
  _mm_sfence();
#endif
}

// The grid of one register of images.
template <class T>
struct Grid {
  static constexpr ptrdiff_t E = Lanes<T>::kReals;
  T* cells;
  ptrdiff_t row, plane;  // in reals
  explicit Grid(const NufftPoints<T>& p) : cells(nullptr), row((p.g[2] | 1) * E), plane(row * p.g[1]) {}
  static size_t bytes(const NufftPoints<T>& p) {
    return sizeof(T) * static_cast<size_t>(Grid(p).plane) * static_cast<size_t>(p.g[0]);
  }
};

// Where the lanes of a register lie outside: lane r of element i at data + r * lane + i * element.
template <class T>
struct Border {
  T* data;
  ptrdiff_t lane, element;  // in reals
  int filled;               // lanes in use
  bool packed() const { return element > 2; }
};

template <class T>
RECON3D_INLINE typename Lanes<T>::Vec load_element(const Border<const T>& b, ptrdiff_t i) {
  if (b.packed()) return load(b.data + i * b.element);
  constexpr int W = Lanes<T>::W;
  T one[2 * W] = {};
  for (int r = 0; r < b.filled; ++r)
    for (int part = 0; part < 2; ++part) one[2 * r + part] = b.data[r * b.lane + i * b.element + part];
  return load(one);
}
template <class T>
RECON3D_INLINE void store_element(const Border<T>& b, ptrdiff_t i, typename Lanes<T>::Vec v) {
  if (b.packed()) return store(b.data + i * b.element, v);
  constexpr int W = Lanes<T>::W;
  T one[2 * W];
  store(one, v);
  for (int r = 0; r < b.filled; ++r)
    for (int part = 0; part < 2; ++part) b.data[r * b.lane + i * b.element + part] = one[2 * r + part];
}

// body(i, register) for elements [begin, end) of the border.
template <class T, class F>
RECON3D_INLINE void read_border(const Border<const T>& b, ptrdiff_t begin, ptrdiff_t end, const F& body) {
  constexpr ptrdiff_t W = Lanes<T>::W;
  ptrdiff_t i = begin;
  if (!b.packed())
    for (; i + W <= end; i += W) {
      typename Lanes<T>::Vec v[W];
      load_lanes<T>(b.data + i * b.element, b.lane, b.filled, v);
      for (ptrdiff_t k = 0; k < W; ++k) body(i + k, v[k]);
    }
  for (; i < end; ++i) body(i, load_element<T>(b, i));
}
// The border's element i becomes body(i).
template <class T, class F>
RECON3D_INLINE void write_border(const Border<T>& b, ptrdiff_t begin, ptrdiff_t end, const F& body) {
  constexpr ptrdiff_t W = Lanes<T>::W;
  ptrdiff_t i = begin;
  if (!b.packed())
    for (; i + W <= end; i += W) {
      typename Lanes<T>::Vec v[W];
      for (ptrdiff_t k = 0; k < W; ++k) v[k] = body(i + k);
      transpose<T>(v);
      for (ptrdiff_t r = 0; r < b.filled; ++r) store_through<T>(b.data + i * b.element + r * b.lane, v[r]);
    }
  for (; i < end; ++i) store_element<T>(b, i, body(i));
  finish_stores();
}

// ---- images to the grid and back ------------------------------------------------------------------------------------

template <class T>
static void zero(T* p, ptrdiff_t elements) {
  std::memset(p, 0, sizeof(T) * static_cast<size_t>(elements * Lanes<T>::kReals));
}

// Rows [begin, end) of the image: scaled, padded, transformed along x.
template <class T>
static void rows_to_grid(const NufftPoints<T>& p, const LanePlan<T>& fft, const Border<const T>& x, const Grid<T>& grid,
                         int64_t begin, int64_t end) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t n = p.n[2], g = p.g[2], half = n / 2;
  LaneBuffer<T> buffer(fft.work);
  T* const work = buffer.get();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t z = row / p.n[1], y = row % p.n[1];
    const T scale = p.scale[0][z] * p.scale[1][y];
    const Border<const T> line{x.data + row * n * x.element, x.lane, x.element, x.filled};
    // pixel i stands for i - half
    read_border<T>(line, 0, half, [&](ptrdiff_t i, typename Lanes<T>::Vec v) {
      store(work + (i + g - half) * E, v * splat(scale * p.scale[2][i]));
    });
    read_border<T>(line, half, n, [&](ptrdiff_t i, typename Lanes<T>::Vec v) {
      store(work + (i - half) * E, v * splat(scale * p.scale[2][i]));
    });
    zero(work + (n - half) * E, g - n);
    lane_fft(fft, work, grid.cells + z * grid.plane + y * grid.row, E, static_cast<int>(g / 2));
  }
}

template <class T>
static void grid_to_rows(const NufftPoints<T>& p, const LanePlan<T>& fft, const Grid<T>& grid, const Border<T>& x,
                         int64_t begin, int64_t end) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t n = p.n[2], g = p.g[2], half = g / 2;
  LaneBuffer<T> buffer(fft.work + g);
  T *const work = buffer.get() + g * E, *const line = buffer.get();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t z = row / p.n[1], y = row % p.n[1];
    const T scale = p.scale[0][z] * p.scale[1][y];
    const T* from = grid.cells + z * grid.plane + y * grid.row;
    std::memcpy(work, from + half * E, sizeof(T) * static_cast<size_t>((g - half) * E));
    std::memcpy(work + (g - half) * E, from, sizeof(T) * static_cast<size_t>(half * E));
    lane_fft(fft, work, line, E, static_cast<int>(n / 2));
    const Border<T> to{x.data + row * n * x.element, x.lane, x.element, x.filled};
    write_border<T>(to, 0, n, [&](ptrdiff_t i) { return load(line + i * E) * splat(scale * p.scale[2][i]); });
  }
}

// One column of n registers, `step` reals apart, becomes the g of its transform.
template <class T>
RECON3D_INLINE void column_to_grid(const LanePlan<T>& fft, T* work, T* column, ptrdiff_t step, ptrdiff_t n) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t g = fft.n, half = n / 2;
  for (ptrdiff_t i = 0; i < half; ++i) store(work + (i + g - half) * E, load(column + i * step));
  for (ptrdiff_t i = half; i < n; ++i) store(work + (i - half) * E, load(column + i * step));
  zero(work + (n - half) * E, g - n);
  lane_fft(fft, work, column, step, static_cast<int>(g / 2));
}
template <class T>
RECON3D_INLINE void column_from_grid(const LanePlan<T>& fft, T* work, T* line, T* column, ptrdiff_t step, ptrdiff_t n) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t g = fft.n, half = g / 2;
  for (ptrdiff_t i = 0; i < half; ++i) store(work + (i + g - half) * E, load(column + i * step));
  for (ptrdiff_t i = half; i < g; ++i) store(work + (i - half) * E, load(column + i * step));
  lane_fft(fft, work, line, E, static_cast<int>(n / 2));
  for (ptrdiff_t i = 0; i < n; ++i) store(column + i * step, load(line + i * E));
}

// Columns [begin, end) along axis 0 (z) or 1 (y), numbered with x fastest.
template <class T>
static void columns_to_grid(const NufftPoints<T>& p, const LanePlan<T>& fft, const Grid<T>& grid, int axis,
                            int64_t begin, int64_t end) {
  LaneBuffer<T> work(fft.work);
  for (int64_t c = begin; c < end; ++c)
    column_to_grid(fft, work.get(), grid.cells + c / p.g[2] * (axis ? grid.plane : grid.row) + c % p.g[2] * Grid<T>::E,
                   axis ? grid.row : grid.plane, p.n[axis]);
}
template <class T>
static void grid_to_columns(const NufftPoints<T>& p, const LanePlan<T>& fft, const Grid<T>& grid, int axis,
                            int64_t begin, int64_t end) {
  LaneBuffer<T> buffer(fft.work + fft.n);
  T* const line = buffer.get();
  T* const work = line + fft.n * Grid<T>::E;
  for (int64_t c = begin; c < end; ++c)
    column_from_grid(fft, work, line,
                     grid.cells + c / p.g[2] * (axis ? grid.plane : grid.row) + c % p.g[2] * Grid<T>::E,
                     axis ? grid.row : grid.plane, p.n[axis]);
}

template <class T>
static void to_grid(const NufftPoints<T>& p, const Border<const T>& x, const Grid<T>& grid, const NufftThreads& run) {
  const LanePlan<T>& along_x = lane_plan<T>(p.g[2], -1);
  run_all(run, static_cast<int64_t>(p.n[0]) * p.n[1],
          [&](int64_t begin, int64_t end) { rows_to_grid(p, along_x, x, grid, begin, end); });
  for (int axis = 1; axis >= 0; --axis) {
    if (p.g[axis] == 1) continue;
    const LanePlan<T>& fft = lane_plan<T>(p.g[axis], -1);
    run_all(run, static_cast<int64_t>(axis ? p.n[0] : p.g[1]) * p.g[2],
            [&](int64_t begin, int64_t end) { columns_to_grid(p, fft, grid, axis, begin, end); });
  }
}
template <class T>
static void from_grid(const NufftPoints<T>& p, const Grid<T>& grid, const Border<T>& x, const NufftThreads& run) {
  for (int axis = 0; axis < 2; ++axis) {
    if (p.g[axis] == 1) continue;
    const LanePlan<T>& fft = lane_plan<T>(p.g[axis], 1);
    run_all(run, static_cast<int64_t>(axis ? p.n[0] : p.g[1]) * p.g[2],
            [&](int64_t begin, int64_t end) { grid_to_columns(p, fft, grid, axis, begin, end); });
  }
  const LanePlan<T>& along_x = lane_plan<T>(p.g[2], 1);
  run_all(run, static_cast<int64_t>(p.n[0]) * p.n[1],
          [&](int64_t begin, int64_t end) { grid_to_rows(p, along_x, grid, x, begin, end); });
}

// ---- the grid to samples and back -----------------------------------------------------------------------------------

template <class T>
struct Taps {
  int at[3];           // first
  const T* weight[3];  // of every tap
};
template <class T>
RECON3D_INLINE Taps<T> taps_of(const NufftPoints<T>& p, int64_t q, int axes, int width) {
  static const T one = 1;
  const int32_t* first = p.first + q * axes;
  const T* weights = p.weights + q * axes * width;
  Taps<T> t;
  for (int a = 0; a < 3; ++a) {
    const int column = a - 3 + axes;
    t.at[a] = column < 0 ? 0 : first[column];
    t.weight[a] = column < 0 ? &one : weights + column * width;
  }
  return t;
}
template <class T, int D, int W>
RECON3D_INLINE bool wraps(const NufftPoints<T>& p, const Taps<T>& t) {
  return (D == 3 && t.at[0] + W > p.g[0]) || t.at[1] + W > p.g[1] || t.at[2] + W > p.g[2];
}

// Any width, taps that wrap, rows outside [low, high) of the outer axis left alone: the same sums in the same order.
template <class T>
static typename Lanes<T>::Vec interpolate_any(const NufftPoints<T>& p, const Grid<T>& grid, const Taps<T>& t) {
  using Vec = typename Lanes<T>::Vec;
  Vec sum[16] = {};
  for (int a = 0; a < p.taps[0]; ++a) {
    const int z = t.at[0] + a < p.g[0] ? t.at[0] + a : t.at[0] + a - p.g[0];
    for (int b = 0; b < p.taps[1]; ++b) {
      const int y = t.at[1] + b < p.g[1] ? t.at[1] + b : t.at[1] + b - p.g[1];
      const T* row = grid.cells + z * grid.plane + y * grid.row;
      const Vec weight = splat(t.weight[0][a] * t.weight[1][b]);
      for (int c = 0; c < p.taps[2]; ++c) {
        const int x = t.at[2] + c < p.g[2] ? t.at[2] + c : t.at[2] + c - p.g[2];
        sum[c] = madd(load(row + x * Grid<T>::E), weight, sum[c]);
      }
    }
  }
  Vec total = sum[0] * splat(t.weight[2][0]);
  for (int c = 1; c < p.taps[2]; ++c) total = madd(sum[c], splat(t.weight[2][c]), total);
  return total;
}
template <class T>
static void spread_any(const NufftPoints<T>& p, const Grid<T>& grid, const Taps<T>& t, typename Lanes<T>::Vec value,
                       int outer, int low, int high) {
  for (int a = 0; a < p.taps[0]; ++a) {
    const int z = t.at[0] + a < p.g[0] ? t.at[0] + a : t.at[0] + a - p.g[0];
    for (int b = 0; b < p.taps[1]; ++b) {
      const int y = t.at[1] + b < p.g[1] ? t.at[1] + b : t.at[1] + b - p.g[1];
      const int band = outer == 0 ? z : outer == 1 ? y : low;
      if (band < low || band >= high) continue;
      T* row = grid.cells + z * grid.plane + y * grid.row;
      const typename Lanes<T>::Vec part = value * splat(t.weight[0][a] * t.weight[1][b]);
      for (int c = 0; c < p.taps[2]; ++c) {
        const int x = t.at[2] + c < p.g[2] ? t.at[2] + c : t.at[2] + c - p.g[2];
        if (outer == 2 && (x < low || x >= high)) continue;
        T* cell = row + x * Grid<T>::E;
        store(cell, madd(part, splat(t.weight[2][c]), load(cell)));
      }
    }
  }
}

// W taps on the last D axes, none of which wraps.
template <class T, int D, int W>
RECON3D_INLINE typename Lanes<T>::Vec interpolate_inside(const Grid<T>& grid, const Taps<T>& t) {
  using Vec = typename Lanes<T>::Vec;
  const T* corner = grid.cells + t.at[0] * grid.plane + t.at[1] * grid.row + t.at[2] * Grid<T>::E;
  Vec sum[W] = {};
  for (int a = 0; a < (D == 3 ? W : 1); ++a, corner += grid.plane) {
    const T* row = corner;
#pragma GCC unroll 8
    for (int b = 0; b < W; ++b, row += grid.row) {
      const Vec weight = splat(D == 3 ? t.weight[0][a] * t.weight[1][b] : t.weight[1][b]);
#pragma GCC unroll 8
      for (int c = 0; c < W; ++c) sum[c] = madd(load(row + c * Grid<T>::E), weight, sum[c]);
    }
  }
  Vec total = sum[0] * splat(t.weight[2][0]);
#pragma GCC unroll 8
  for (int c = 1; c < W; ++c) total = madd(sum[c], splat(t.weight[2][c]), total);
  return total;
}
template <class T, int D, int W>
RECON3D_INLINE void spread_inside(const Grid<T>& grid, const Taps<T>& t, typename Lanes<T>::Vec value) {
  using Vec = typename Lanes<T>::Vec;
  T* corner = grid.cells + t.at[0] * grid.plane + t.at[1] * grid.row + t.at[2] * Grid<T>::E;
  Vec weight[W];
#pragma GCC unroll 8
  for (int c = 0; c < W; ++c) weight[c] = splat(t.weight[2][c]);
  for (int a = 0; a < (D == 3 ? W : 1); ++a, corner += grid.plane) {
    T* row = corner;
#pragma GCC unroll 8
    for (int b = 0; b < W; ++b, row += grid.row) {
      const Vec part = value * splat(D == 3 ? t.weight[0][a] * t.weight[1][b] : t.weight[1][b]);
#pragma GCC unroll 8
      for (int c = 0; c < W; ++c) store(row + c * Grid<T>::E, madd(part, weight[c], load(row + c * Grid<T>::E)));
    }
  }
}

// Samples of sorted points [begin, end): point q's goes to place order[q] of y, or q without an order.
template <class T, int D, int W>
static void interpolate(const NufftPoints<T>& p, const Grid<T>& grid, T* y, ptrdiff_t step, const int32_t* order,
                        int64_t begin, int64_t end) {
  for (int64_t q = begin; q < end; ++q) {
    const Taps<T> t = taps_of(p, q, W ? D : p.axes, W ? W : p.width);
    const bool inside = W && !wraps<T, D, W>(p, t);
    const typename Lanes<T>::Vec value =
        inside ? interpolate_inside<T, D, W ? W : 1>(grid, t) : interpolate_any(p, grid, t);
    store(y + (order ? order[q] : q) * step, value);
  }
}

// Rows [low, high) of the outer axis become the sum of the samples, in the order of the points. Rows are cleared when
// the first tile that reaches them comes, so that they are still in the cache.
template <class T, int D, int W>
static void spread(const NufftPoints<T>& p, const Grid<T>& grid, const T* y, ptrdiff_t step, const int32_t* order,
                   int low, int high) {
  const int outer = 3 - p.axes, g = p.g[outer], taps = p.taps[outer];
  const ptrdiff_t outer_step = outer == 0 ? grid.plane : outer == 1 ? grid.row : Grid<T>::E;
  int inner = 1, cleared = low;
  auto clear_to = [&](int end) {
    if (end > high) end = high;
    if (end > cleared) zero(grid.cells + cleared * outer_step, (end - cleared) * (outer_step / Grid<T>::E));
    if (end > cleared) cleared = end;
  };
  for (int a = outer + 1; a < 3; ++a) inner *= (p.g[a] + p.tile - 1) / p.tile;
  for (int row = 0, first = 0; first < g; ++row, first += p.tile) {
    const int last = (first + p.tile < g ? first + p.tile : g) - 1 + taps - 1;  // highest row a tap may reach
    if (!((first < high && last >= low) || (last >= g && last - g >= low))) continue;
    clear_to(last >= g ? high : last + 1);
    const bool whole = first >= low && last < high;
    const int64_t end = p.tiles[static_cast<int64_t>(row + 1) * inner];
    for (int64_t q = p.tiles[static_cast<int64_t>(row) * inner]; q < end; ++q) {
      if (order && q + 16 < end) __builtin_prefetch(y + order[q + 16] * step);
      const Taps<T> t = taps_of(p, q, W ? D : p.axes, W ? W : p.width);
      const bool fits = whole || (t.at[outer] >= low && t.at[outer] + taps <= high);
      if (!fits && t.at[outer] + taps <= g && (t.at[outer] >= high || t.at[outer] + taps <= low)) continue;
      const typename Lanes<T>::Vec value = load(y + (order ? order[q] : q) * step);
      if (W && fits && !wraps<T, D, W>(p, t))
        spread_inside<T, D, W ? W : 1>(grid, t, value);
      else
        spread_any(p, grid, t, value, outer, low, high);
    }
  }
  clear_to(high);
}

template <class T>
struct PointKernels {
  void (*interpolate)(const NufftPoints<T>&, const Grid<T>&, T*, ptrdiff_t, const int32_t*, int64_t, int64_t);
  void (*spread)(const NufftPoints<T>&, const Grid<T>&, const T*, ptrdiff_t, const int32_t*, int, int);
};
template <class T, int D>
static PointKernels<T> point_kernels(int width) {
  switch (width) {
#define RECON3D_WIDTH(W) \
  case W:                \
    return {interpolate<T, D, W>, spread<T, D, W>};
    RECON3D_WIDTH(3)
    RECON3D_WIDTH(4)
    RECON3D_WIDTH(5)
    RECON3D_WIDTH(6)
    RECON3D_WIDTH(7)
    RECON3D_WIDTH(8)
#undef RECON3D_WIDTH
    default:
      return {interpolate<T, D, 0>, spread<T, D, 0>};
  }
}
template <class T>
static PointKernels<T> point_kernels(const NufftPoints<T>& p) {
  const bool plain = p.axes == 2 && p.taps[1] == p.width && p.taps[2] == p.width;
  if (plain) return point_kernels<T, 2>(p.width);
  return {interpolate<T, 2, 0>, spread<T, 2, 0>};
}

// three axes, by Border, Taps and the passes above
#include "cpu/nufft_volume.h"

// ---- whole transforms -----------------------------------------------------------------------------------------------

// Registers of images are independent: enough of them for every thread, or threads inside each.
template <class T, class F>
static void each_register(const NufftJob<T>& job, const NufftThreads& threads, const F& body) {
  const int64_t registers = (job.images + Lanes<T>::W - 1) / Lanes<T>::W;
  const NufftThreads alone{
      [](int64_t n, void (*piece)(void*, int64_t, int64_t), void* context) { piece(context, 0, n); }, 1};
  if (registers < threads.threads) {
    for (int64_t r = 0; r < registers; ++r) body(r, threads);
  } else {
    run_all(threads, registers, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) body(r, alone);
    });
  }
}

// Register r of data with `size` elements per image.
template <class T, class Q>
static Border<Q> border(const NufftJob<T>& job, Q* data, int64_t size, int64_t r) {
  constexpr int64_t W = Lanes<T>::W;
  const int64_t image = r * W;
  if (job.lanes)
    return {data + 2 * (image / kChunk * size * kChunk + image % kChunk), 2, 2 * kChunk, static_cast<int>(W)};
  return {data + 2 * image * size, 2 * size, 2, static_cast<int>(job.images - image < W ? job.images - image : W)};
}

template <class T>
static void spread_all(const NufftPoints<T>& p, const Grid<T>& grid, const T* y, ptrdiff_t step, const int32_t* order,
                       const NufftThreads& run) {
  const PointKernels<T> kernels = point_kernels(p);
  const int outer = 3 - p.axes, g = p.g[outer], bands = run.threads > 1 ? (g + p.tile - 1) / p.tile : 1;
  run_all(run, bands, [&](int64_t begin, int64_t end) {
    const int low = bands > 1 ? static_cast<int>(begin) * p.tile : 0;
    const int high = bands > 1 && end < bands ? static_cast<int>(end) * p.tile : g;
    kernels.spread(p, grid, y, step, order, low, high);
  });
}

// Samples, in the order of the tiles or in places `order`, `step` reals apart, of a register of images.
template <class T>
static void to_samples(const NufftPoints<T>& p, const Border<const T>& x, T* y, ptrdiff_t step, const int32_t* order,
                       const NufftThreads& run) {
  if (is_volume(p)) return volume_to_samples(p, x, y, step, order, run);
  NufftScratch memory(Grid<T>::bytes(p));
  Grid<T> grid(p);
  grid.cells = memory.template as<T>();
  to_grid(p, x, grid, run);
  const PointKernels<T> kernels = point_kernels(p);
  run_all(run, p.count, [&](int64_t begin, int64_t end) { kernels.interpolate(p, grid, y, step, order, begin, end); });
}
template <class T>
static void from_samples(const NufftPoints<T>& p, const T* y, ptrdiff_t step, const int32_t* order, const Border<T>& x,
                         const NufftThreads& run) {
  if (is_volume(p)) return samples_to_volume(p, y, step, order, x, run);
  NufftScratch memory(Grid<T>::bytes(p));
  Grid<T> grid(p);
  grid.cells = memory.template as<T>();
  spread_all(p, grid, y, step, order, run);
  from_grid(p, grid, x, run);
}

template <class T>
static void nufft_forward(const NufftJob<T>& job, const NufftThreads& threads) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const NufftPoints<T>& p = *job.points;
  each_register(job, threads, [&](int64_t r, const NufftThreads& run) {
    NufftScratch samples(job.lanes ? 1 : sizeof(T) * E * static_cast<size_t>(p.count));
    const Border<T> y = border<T>(job, job.out, p.count, r);
    const Border<const T> x = border<T>(job, job.in, p.pixels(), r);
    if (job.lanes) return to_samples(p, x, y.data, y.element, nullptr, run);
    T* const buffer = samples.template as<T>();
    to_samples(p, x, buffer, E, p.order, run);
    run_all(run, p.count, [&](int64_t begin, int64_t end) {
      write_border<T>(y, begin, end, [&](ptrdiff_t i) { return load(buffer + i * E); });
    });
  });
}

template <class T>
static void nufft_adjoint(const NufftJob<T>& job, const NufftThreads& threads) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const NufftPoints<T>& p = *job.points;
  each_register(job, threads, [&](int64_t r, const NufftThreads& run) {
    NufftScratch samples(job.lanes ? 1 : sizeof(T) * E * static_cast<size_t>(p.count));
    const Border<const T> y = border<T>(job, job.in, p.count, r);
    const Border<T> x = border<T>(job, job.out, p.pixels(), r);
    if (job.lanes) return from_samples(p, y.data, y.element, nullptr, x, run);
    T* const buffer = samples.template as<T>();
    run_all(run, p.count, [&](int64_t begin, int64_t end) {
      read_border<T>(y, begin, end, [&](ptrdiff_t i, typename Lanes<T>::Vec v) { store(buffer + i * E, v); });
    });
    from_samples<T>(p, buffer, E, p.order, x, run);
  });
}

template <class T>
static void nufft_normal(const NufftJob<T>& job, const NufftThreads& threads) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const NufftPoints<T>& p = *job.points;
  each_register(job, threads, [&](int64_t r, const NufftThreads& run) {
    NufftScratch samples(sizeof(T) * E * static_cast<size_t>(p.count));
    T* const buffer = samples.template as<T>();
    to_samples(p, border<T>(job, job.in, p.pixels(), r), buffer, E, nullptr, run);
    if (job.density)
      run_all(run, p.count, [&](int64_t begin, int64_t end) {
        for (int64_t q = begin; q < end; ++q)
          store(buffer + q * E, load(buffer + q * E) * splat(job.density[p.order[q]]));
      });
    from_samples<T>(p, buffer, E, nullptr, border<T>(job, job.out, p.pixels(), r), run);
  });
}
