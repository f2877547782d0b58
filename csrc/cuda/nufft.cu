#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/nufft.h"

// Batch innermost: a warp's lanes are the images of a stack, up to 64 at a time, so one index and one weight serve all
// of them and every load is a full line. Smaller stacks give the lanes left over to other samples (interpolation) or
// other cells (spreading). The sums do not change with that.
//
// Spreading is a gather: a block owns 8 x 8 cells of one plane, a warp 4 x 4 of them in registers. Samples are sorted
// by tile of their first tap, so those that touch the block lie in a few tiles; the block goes through them in order,
// keeps the ones that touch it with their weights in shared memory, and adds. Where tiles are crowded, as at the centre
// of radial scans, the list is cut into segments of fixed length that other blocks take, and their sums are added in
// order.
namespace recon3d {
namespace cuda {
namespace {
constexpr int kWarps = 4;                // of a block
constexpr int kThreads = 32 * kWarps;    // of a block
constexpr int kEach = 4;                 // samples of a lane, one after another, interpolation
constexpr int kSide = 8;                 // of the square of cells that a block gathers
constexpr int kCells = kSide * kSide;    // of that square
constexpr int kHeld = 2 * kThreads;      // samples in shared memory
constexpr int kMostTiles = 128;          // of a square: 4 x 5 x 5 for width 16 on tiles of 8, the last one cut
constexpr int64_t kLeastSegment = 2048;  // samples; shorter ones cost more than they balance
constexpr int64_t kMostPartials = 4096;  // sums of segments that wait to be added, bounds the workspace
constexpr int kMostBatch = 64;           // images at a time
constexpr int kScanThreads = 256;

// One axis as the kernels see it; axes that are not there have one point and one tap.
struct Axis {
  int size, taps, column, half;  // column: of first and weights, -1 = none; half: centred cell that is k = 0
};
struct Axes {
  Axis z, y, x;
  int columns, width;  // strides of first and weights
};
struct Tiling {
  int edge, z, y, x;  // edge along present axes; tiles along each
};
template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};
template <class T, int N>
struct alignas(N * sizeof(T)) Values {
  T v[N];
};

// --- images and oversampled grids -----------------------------------------------------------------------------------

struct Box {
  int nz, ny, nx, gz, gy, gx;
};
template <class T>
struct Scales {
  const T *z, *y, *x;  // null where the axis is not there
};

// Pixel at place p of FFT order, or -1: place p holds n = p or p - g, and pixel i lies at n = i - N / 2.
__device__ int pixel_at(int p, int n, int g) {
  const int i = p + n / 2 < n ? p + n / 2 : p - g + n / 2;
  return i >= 0 ? i : -1;
}
__device__ int place_of(int i, int n, int g) { return i < n / 2 ? i - n / 2 + g : i - n / 2; }

template <class T>
__device__ T scale_of(const Scales<T>& s, int z, int y, int x) {
  T value = s.x[x];
  if (s.y) value = s.y[y] * value;
  if (s.z) value = s.z[z] * value;
  return value;
}

template <class T>
__global__ void pad_kernel(const Complex<T>* __restrict__ x, Complex<T>* __restrict__ cells, Box b, Scales<T> s) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = static_cast<int64_t>(b.gz) * b.gy * b.gx;
  if (cell >= count) return;
  const int kx = static_cast<int>(cell % b.gx), rest = static_cast<int>(cell / b.gx);
  const int k = pixel_at(kx, b.nx, b.gx), j = pixel_at(rest % b.gy, b.ny, b.gy), i = pixel_at(rest / b.gy, b.nz, b.gz);
  Complex<T> value = {T(0), T(0)};
  if (i >= 0 && j >= 0 && k >= 0) {
    value = x[((static_cast<int64_t>(blockIdx.y) * b.nz + i) * b.ny + j) * b.nx + k];
    const T scale = scale_of(s, i, j, k);
    value = {scale * value.re, scale * value.im};
  }
  cells[blockIdx.y * count + cell] = value;
}

template <class T>
__global__ void crop_kernel(const Complex<T>* __restrict__ cells, Complex<T>* __restrict__ x, Box b, Scales<T> s) {
  const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = static_cast<int64_t>(b.nz) * b.ny * b.nx;
  if (pixel >= count) return;
  const int k = static_cast<int>(pixel % b.nx), rest = static_cast<int>(pixel / b.nx);
  const int j = rest % b.ny, i = rest / b.ny;
  const int64_t plane = static_cast<int64_t>(blockIdx.y) * b.gz + place_of(i, b.nz, b.gz);
  const Complex<T> value = cells[(plane * b.gy + place_of(j, b.ny, b.gy)) * b.gx + place_of(k, b.nx, b.gx)];
  const T scale = scale_of(s, i, j, k);
  x[blockIdx.y * count + pixel] = {scale * value.re, scale * value.im};
}

// [batch, n] at order[i] (or i) into [n, stride]; lanes beyond the batch are zero.
template <class T>
__global__ void pack(const Complex<T>* __restrict__ from, Complex<T>* __restrict__ to,
                     const int32_t* __restrict__ order, int batch, int64_t n, int stride) {
  __shared__ Complex<T> tile[32][33];
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * 32;
  const int64_t i = i0 + threadIdx.x;
  const int s0 = blockIdx.y * 32;
  const int64_t at = i < n && order ? order[i] : i;
  for (int k = threadIdx.y; k < 32; k += 8)
    tile[k][threadIdx.x] = s0 + k < batch && i < n ? from[(s0 + k) * n + at] : Complex<T>{T(0), T(0)};
  __syncthreads();
  const int lane = s0 + threadIdx.x;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (i0 + k < n && lane < stride) to[(i0 + k) * stride + lane] = tile[threadIdx.x][k];
}

// [n, stride] into [batch, n] at order[i] (or i).
template <class T>
__global__ void unpack(const Complex<T>* __restrict__ from, Complex<T>* __restrict__ to,
                       const int32_t* __restrict__ order, int batch, int64_t n, int stride) {
  __shared__ Complex<T> tile[32][33];
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * 32;
  const int s0 = blockIdx.y * 32, lane = s0 + threadIdx.x;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (i0 + k < n && lane < stride) tile[k][threadIdx.x] = from[(i0 + k) * stride + lane];
  __syncthreads();
  const int64_t i = i0 + threadIdx.x;
  if (i >= n) return;
  const int64_t at = order ? order[i] : i;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (s0 + k < batch) to[(s0 + k) * n + at] = tile[threadIdx.x][k];
}

// --- interpolation --------------------------------------------------------------------------------------------------

__device__ int start_of(const Axis& a, const int32_t* first) {
  if (a.column < 0) return 0;
  const int at = first[a.column] - a.half;
  return at < 0 ? at + a.size : at;
}
template <class T>
__device__ T tap_of(const Axis& a, int width, const T* weights, int tap) {
  return a.column < 0 ? T(1) : weights[a.column * width + tap];
}

// L lanes of V images each make a sample; the other lanes of the warp take other samples. W: taps, 0 = any number.
template <class T, int L, int V, int W>
__global__ void __launch_bounds__(kThreads, 6)
    interpolate_points(const T* __restrict__ cells, T* __restrict__ y, const int32_t* __restrict__ first,
                       const T* __restrict__ weights, Axes g, int64_t points) {
  constexpr int kTogether = 32 / L, kStride = 2 * L * V;
  const int lane = threadIdx.x & 31, part = lane % L;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  for (int e = 0; e < kEach; ++e) {
    const int64_t q = (warp * kEach + e) * kTogether + lane / L;
    if (q >= points) return;
    const int32_t* f = first + q * g.columns;
    const T* w = weights + q * g.columns * g.width;
    const int x0 = start_of(g.x, f), y0 = start_of(g.y, f), z0 = start_of(g.z, f);
    const int taps = W ? W : g.x.taps;
    T by_x[W ? W : 1];
#pragma unroll
    for (int t = 0; t < W; ++t) by_x[t] = tap_of(g.x, g.width, w, t);
    Values<T, 2 * V> sum = {};
    for (int tz = 0; tz < g.z.taps; ++tz) {
      const int iz = z0 + tz < g.z.size ? z0 + tz : z0 + tz - g.z.size;
      const T by_z = tap_of(g.z, g.width, w, tz);
      for (int ty = 0; ty < g.y.taps; ++ty) {
        const int iy = y0 + ty < g.y.size ? y0 + ty : y0 + ty - g.y.size;
        const T by_y = by_z * tap_of(g.y, g.width, w, ty);
        const T* row = cells + (static_cast<int64_t>(iz) * g.y.size + iy) * g.x.size * kStride + part * 2 * V;
#pragma unroll(W ? W : 1)
        for (int t = 0; t < taps; ++t) {
          const int ix = x0 + t < g.x.size ? x0 + t : x0 + t - g.x.size;
          const T weight = by_y * (W ? by_x[W ? t : 0] : tap_of(g.x, g.width, w, t));
          const Values<T, 2 * V> cell =
              *reinterpret_cast<const Values<T, 2 * V>*>(row + static_cast<int64_t>(ix) * kStride);
#pragma unroll
          for (int v = 0; v < 2 * V; ++v) sum.v[v] = fma(weight, cell.v[v], sum.v[v]);
        }
      }
    }
    *reinterpret_cast<Values<T, 2 * V>*>(y + q * kStride + part * 2 * V) = sum;
  }
}

// --- spreading ------------------------------------------------------------------------------------------------------

// Squares of cells: planes, rows of squares, squares of a row.
struct Squares {
  int z, y, x;
};
struct Square {
  int z, y, x;  // first cell, centred order
};
__device__ Square square_of(const Squares& s, int index) {
  return {index / (s.x * s.y), index / s.x % s.y * kSide, index % s.x * kSide};
}

// Tiles along an axis that hold first taps of samples which reach cells [low, low + count): the first, and how many
// from there around the circle.
struct Arc {
  int first, count;
};
__device__ Arc tiles_along(const Axis& a, int edge, int tiles, int low, int count) {
  const int high = (low + count < a.size ? low + count : a.size) - 1, least = low - (a.taps - 1);
  if (high - least + 1 >= a.size) return {0, tiles};
  const int first = (least < 0 ? least + a.size : least) / edge, last = high / edge;
  if (least >= 0) return {first, last - first + 1};
  return {first, first == last ? tiles : tiles - first + last + 1};
}

// The tiles of a square in order, as ranges of samples: where each starts, and how many samples lie before it. Returns
// the number of ranges; with null tables, the number of samples.
__device__ int ranges_of(const Axes& g, const Tiling& t, const Square& s, const int32_t* tiles, int32_t* start,
                         int32_t* before) {
  const Arc z = tiles_along(g.z, t.edge, t.z, s.z, 1), y = tiles_along(g.y, t.edge, t.y, s.y, kSide);
  const Arc x = tiles_along(g.x, t.edge, t.x, s.x, kSide);
  int n = 0;
  int32_t total = 0;
  for (int i = z.first; n < z.count * y.count * x.count; i = i + 1 < t.z ? i + 1 : 0)
    for (int j = 0; j < y.count; ++j)
      for (int k = 0; k < x.count; ++k, ++n) {
        const int row = y.first + j < t.y ? y.first + j : y.first + j - t.y;
        const int tile = (i * t.y + row) * t.x + (x.first + k < t.x ? x.first + k : x.first + k - t.x);
        if (start) {
          start[n] = tiles[tile];
          before[n] = total;
        }
        total += tiles[tile + 1] - tiles[tile];
      }
  if (start) before[n] = total;
  return start ? n : total;
}

// Segments of every square.
__global__ void segments_kernel(Axes g, Tiling t, Squares squares, const int32_t* __restrict__ tiles,
                                int32_t* __restrict__ segments, int count, int32_t segment) {
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const int32_t samples = ranges_of(g, t, square_of(squares, index), tiles, nullptr, nullptr);
  segments[index] = samples > segment ? (samples - 1) / segment + 1 : 1;
}

// tasks[i] = segments before square i; partials[i] = segments before it of squares that have several. One block.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const int32_t* __restrict__ segments, int32_t* __restrict__ tasks, int32_t* __restrict__ partials,
                int count) {
  __shared__ int32_t sums[2][kScanThreads];
  const int each = (count + kScanThreads - 1) / kScanThreads;
  const int begin = threadIdx.x * each, end = begin + each < count ? begin + each : count;
  int32_t all = 0, several = 0;
  for (int i = begin; i < end; ++i) {
    all += segments[i];
    several += segments[i] > 1 ? segments[i] : 0;
  }
  sums[0][threadIdx.x] = all;
  sums[1][threadIdx.x] = several;
  __syncthreads();
  for (unsigned step = 1; step < kScanThreads; step *= 2) {
    const bool add = threadIdx.x >= step;
    const int32_t a = add ? sums[0][threadIdx.x - step] : 0, b = add ? sums[1][threadIdx.x - step] : 0;
    __syncthreads();
    sums[0][threadIdx.x] += a;
    sums[1][threadIdx.x] += b;
    __syncthreads();
  }
  all = sums[0][threadIdx.x] - all;
  several = sums[1][threadIdx.x] - several;
  for (int i = begin; i < end; ++i) {
    tasks[i] = all;
    partials[i] = several;
    all += segments[i];
    several += segments[i] > 1 ? segments[i] : 0;
  }
  if (threadIdx.x == kScanThreads - 1) {
    tasks[count] = sums[0][threadIdx.x];
    partials[count] = sums[1][threadIdx.x];
  }
}

// Do the cells [low, low + count) and the taps from `first` on share a cell of the circle?
__device__ bool meet(const Axis& a, int first, int low, int count) {
  const int there = low - first < 0 ? low - first + a.size : low - first;
  const int back = first - low < 0 ? first - low + a.size : first - low;
  return there < a.taps || back < (low + count < a.size ? count : a.size - low);
}
// Weight of cell `at` for taps from `first` on, zero where they do not reach it.
template <class T>
__device__ T weight_at(const Axis& a, int width, const T* weights, int first, int at, bool& inside) {
  const int tap = at - first < 0 ? at - first + a.size : at - first;
  inside = at < a.size && tap < a.taps;
  return inside ? tap_of(a, width, weights, tap) : T(0);
}
__device__ int first_of(const Axis& a, const int32_t* first) { return a.column < 0 ? 0 : first[a.column]; }

template <class T>
struct Touch {
  T row[kSide], column[kSide];  // row: times the weight of the plane
  int32_t sample;
  int32_t quarters;  // bit w: touches the cells of warp w
};

// L lanes of V images make a cell; R x C cells of a warp's 4 x 4 belong to a lane.
template <class T, int L, int V>
__global__ void __launch_bounds__(kThreads, 3)
    gather_cells(const T* __restrict__ y, T* __restrict__ cells, T* __restrict__ sums,
                 const int32_t* __restrict__ first, const T* __restrict__ weights, const int32_t* __restrict__ tiles,
                 const int32_t* __restrict__ tasks, const int32_t* __restrict__ partials, Axes g, Tiling tiling,
                 Squares squares, int count, int32_t segment) {
  constexpr int kParts = 32 / L, kStride = 2 * L * V;
  constexpr int R = kParts < 4 ? 4 / kParts : 1, C = 16 / kParts / R;
  __shared__ Touch<T> held[kHeld];
  __shared__ int32_t start[kMostTiles], before[kMostTiles + 1], hits[kWarps];
  __shared__ int ranges;
  const int task = blockIdx.x;
  if (task >= tasks[count]) return;
  int index = 0;
  for (int high = count; high - index > 1;) {  // last square whose tasks begin at or before this one
    const int middle = (index + high) / 2;
    if (tasks[middle] <= task)
      index = middle;
    else
      high = middle;
  }
  const Square square = square_of(squares, index);
  if (threadIdx.x == 0) ranges = ranges_of(g, tiling, square, tiles, start, before);
  __syncthreads();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, image = lane % L, part = lane / L;
  const int row0 = warp / 2 * 4 + part * R * C / 4, column0 = warp % 2 * 4 + part * R * C % 4;
  const int32_t begin = (task - tasks[index]) * segment;
  const int32_t end = before[ranges] - begin < segment ? before[ranges] : begin + segment;
  Values<T, 2 * V> sum[R][C] = {};
  int kept = 0;
  for (int32_t base = begin; base < end; base += kThreads) {
    const int32_t candidate = base + static_cast<int32_t>(threadIdx.x);
    int32_t q = 0;
    bool hit = false;
    if (candidate < end) {
      int r = 0;
      while (candidate >= before[r + 1]) ++r;
      q = start[r] + candidate - before[r];
      const int32_t* f = first + static_cast<int64_t>(q) * g.columns;
      hit = meet(g.x, first_of(g.x, f), square.x, kSide) && meet(g.y, first_of(g.y, f), square.y, kSide) &&
            meet(g.z, first_of(g.z, f), square.z, 1);
    }
    const unsigned votes = __ballot_sync(0xffffffffu, hit);
    if (lane == 0) hits[warp] = __popc(votes);
    __syncthreads();
    int at = kept + __popc(votes & ((1u << lane) - 1u));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += hits[w];
      kept += hits[w];
    }
    if (hit) {
      const int32_t* f = first + static_cast<int64_t>(q) * g.columns;
      const T* w = weights + static_cast<int64_t>(q) * g.columns * g.width;
      Touch<T>& touch = held[at];
      bool inside;
      const T plane = weight_at(g.z, g.width, w, first_of(g.z, f), square.z, inside);
      int rows = 0, columns = 0;
      for (int i = 0; i < kSide; ++i) {
        touch.row[i] = plane * weight_at(g.y, g.width, w, first_of(g.y, f), square.y + i, inside);
        rows |= inside ? 1 << i / 4 : 0;
        touch.column[i] = weight_at(g.x, g.width, w, first_of(g.x, f), square.x + i, inside);
        columns |= inside ? 1 << i / 4 : 0;
      }
      touch.sample = q;
      touch.quarters = (rows & 1 ? columns : 0) | (rows & 2 ? columns << 2 : 0);
    }
    __syncthreads();
    if (kept > kHeld - kThreads || base + kThreads >= end) {
      for (int k = 0; k < kept; ++k) {
        const Touch<T>& touch = held[k];
        if (!(touch.quarters >> warp & 1)) continue;
        const Values<T, 2 * V> value = *reinterpret_cast<const Values<T, 2 * V>*>(
            y + static_cast<int64_t>(touch.sample) * kStride + image * 2 * V);
#pragma unroll
        for (int i = 0; i < R; ++i) {
          Values<T, 2 * V> scaled;
          const T by_row = touch.row[row0 + i];
#pragma unroll
          for (int v = 0; v < 2 * V; ++v) scaled.v[v] = by_row * value.v[v];
#pragma unroll
          for (int j = 0; j < C; ++j) {
            const T by_column = touch.column[column0 + j];
#pragma unroll
            for (int v = 0; v < 2 * V; ++v) sum[i][j].v[v] = fma(by_column, scaled.v[v], sum[i][j].v[v]);
          }
        }
      }
      kept = 0;
      __syncthreads();
    }
  }
  const bool whole = tasks[index + 1] - tasks[index] == 1;
  const int64_t part_of = whole ? 0 : static_cast<int64_t>(partials[index]) + task - tasks[index];
#pragma unroll
  for (int i = 0; i < R; ++i)
#pragma unroll
    for (int j = 0; j < C; ++j) {
      const int iy = square.y + row0 + i, ix = square.x + column0 + j;
      if (iy >= g.y.size || ix >= g.x.size) continue;
      // FFT order
      const int sz = square.z < g.z.half ? square.z - g.z.half + g.z.size : square.z - g.z.half;
      const int sy = iy < g.y.half ? iy - g.y.half + g.y.size : iy - g.y.half;
      const int sx = ix < g.x.half ? ix - g.x.half + g.x.size : ix - g.x.half;
      const int64_t cell = (static_cast<int64_t>(sz) * g.y.size + sy) * g.x.size + sx;
      T* to = whole ? cells + cell * kStride : sums + (part_of * kCells + (row0 + i) * kSide + column0 + j) * kStride;
      *reinterpret_cast<Values<T, 2 * V>*>(to + image * 2 * V) = sum[i][j];
    }
}

// Adds the segments of every square that has several, in order.
template <class T>
__global__ void add_segments(const T* __restrict__ sums, T* __restrict__ cells, const int32_t* __restrict__ tasks,
                             const int32_t* __restrict__ partials, Axes g, Squares squares, int stride) {
  const int index = blockIdx.x;
  const int several = partials[index + 1] - partials[index];
  if (several == 0) return;
  const Square square = square_of(squares, index);
  const T* from = sums + static_cast<int64_t>(partials[index]) * kCells * stride;
  for (int e = threadIdx.x; e < kCells * stride; e += blockDim.x) {
    const int iy = square.y + e / stride / kSide, ix = square.x + e / stride % kSide;
    if (iy >= g.y.size || ix >= g.x.size) continue;
    T total = from[e];
    for (int s = 1; s < several; ++s) total += from[static_cast<int64_t>(s) * kCells * stride + e];
    const int sz = square.z < g.z.half ? square.z - g.z.half + g.z.size : square.z - g.z.half;
    const int sy = iy < g.y.half ? iy - g.y.half + g.y.size : iy - g.y.half;
    const int sx = ix < g.x.half ? ix - g.x.half + g.x.size : ix - g.x.half;
    cells[((static_cast<int64_t>(sz) * g.y.size + sy) * g.x.size + sx) * stride + e % stride] = total;
  }
}

// --- hosts ----------------------------------------------------------------------------------------------------------

unsigned blocks(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }
size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

Axes axes_of(const NufftGrid& g) {
  const auto axis = [&](int from_last) {
    const int a = g.axes - 1 - from_last;
    if (a < 0) return Axis{1, 1, -1, 0};
    const int size = static_cast<int>(g.grid[a]);
    return Axis{size, size > 1 ? g.width : 1, a, size / 2};
  };
  return {axis(2), axis(1), axis(0), g.axes, g.width};
}
Tiling tiling_of(const Axes& a, int edge) {
  const auto along = [&](const Axis& x) { return (x.size + edge - 1) / edge; };
  return {edge, along(a.z), along(a.y), along(a.x)};
}
Squares squares_of(const Axes& a) {
  return {a.z.size, static_cast<int>(blocks(a.y.size, kSide)), static_cast<int>(blocks(a.x.size, kSide))};
}
int64_t count_of(const Squares& s) { return static_cast<int64_t>(s.z) * s.y * s.x; }
int64_t cells_of(const Axes& a) { return static_cast<int64_t>(a.z.size) * a.y.size * a.x.size; }

// How many squares may list a tile, at most; segment: samples of a list between cuts. Neither depends on the batch.
int64_t listings_of(const Axes& a, int edge) {
  const auto along = [&](const Axis& x, int side) -> int64_t {
    if (x.size == 1) return 1;
    const int64_t all = (x.size + side - 1) / side;
    const int64_t near = (edge + x.taps - 2 + side) / side + 2;  // the tile, its taps, a cut last square
    return near < all ? near : all;
  };
  return along(a.z, 1) * along(a.y, kSide) * along(a.x, kSide);
}
int64_t segment_of(const Axes& a, const NufftGrid& g) {
  const int64_t samples = 2 * listings_of(a, g.tile) * g.points;
  const int64_t least = (samples + kMostPartials - 1) / kMostPartials;
  return least > kLeastSegment ? least : kLeastSegment;
}
// A list of n > segment samples has at most 2 n / segment segments.
int64_t most_partials(const Axes& a, const NufftGrid& g) {
  return 2 * listings_of(a, g.tile) * g.points / segment_of(a, g);
}

// Images in the lanes and per lane: the least that hold the batch.
struct Lanes {
  int lanes, each;
};
template <class T>
Lanes lanes_for(int64_t batch) {
  if (batch > 32 && sizeof(T) == 4) return {32, 2};
  int lanes = 2;
  while (lanes < batch && lanes < 32) lanes *= 2;
  return {lanes, 1};
}
template <class T>
int64_t together(int64_t batch) {
  const int64_t most = sizeof(T) == 4 ? kMostBatch : kMostBatch / 2;
  return batch < most ? batch : most;
}

template <class T, int L, int V, int W>
const char* interpolate_with(const T* cells, T* y, const NufftGrid& g, const Axes& axes, const int32_t* first,
                             const T* weights, void* stream) {
  return launch(interpolate_points<T, L, V, W>, dim3(blocks(g.points, kWarps * kEach * (32 / L))), dim3(kThreads),
                stream, cells, y, first, weights, axes, g.points);
}
template <class T, int L, int V>
const char* interpolate_any(const T* cells, T* y, const NufftGrid& g, const Axes& axes, const int32_t* first,
                            const T* weights, void* stream) {
  if constexpr (V == 2) {  // the widths of single precision at default errors, with their taps in registers
    if (axes.x.taps == 4) return interpolate_with<T, L, V, 4>(cells, y, g, axes, first, weights, stream);
    if (axes.x.taps == 5) return interpolate_with<T, L, V, 5>(cells, y, g, axes, first, weights, stream);
    if (axes.x.taps == 6) return interpolate_with<T, L, V, 6>(cells, y, g, axes, first, weights, stream);
    if (axes.x.taps == 7) return interpolate_with<T, L, V, 7>(cells, y, g, axes, first, weights, stream);
  }
  return interpolate_with<T, L, V, 0>(cells, y, g, axes, first, weights, stream);
}

struct Tables {
  int32_t *segments, *tasks, *partials;
};
template <class T, int L, int V>
const char* gather_with(const T* y, T* cells, T* sums, const NufftGrid& g, const Axes& axes, const int32_t* first,
                        const T* weights, const int32_t* tiles, const Tables& tables, void* stream) {
  const Squares squares = squares_of(axes);
  const int64_t count = count_of(squares), tasks = count + most_partials(axes, g);
  const char* error =
      launch(gather_cells<T, L, V>, dim3(static_cast<unsigned>(tasks)), dim3(kThreads), stream, y, cells, sums, first,
             weights, tiles, tables.tasks, tables.partials, axes, tiling_of(axes, g.tile), squares,
             static_cast<int>(count), static_cast<int32_t>(segment_of(axes, g)));
  if (error) return error;
  return launch(add_segments<T>, dim3(static_cast<unsigned>(count)), dim3(kThreads), stream, sums, cells, tables.tasks,
                tables.partials, axes, squares, 2 * L * V);
}

// Calls f.run<L, V>() for the lanes of the batch.
template <class T, class F>
struct OfLanes {
  static const char* call(const Lanes& l, const F& f) {
    if (l.lanes == 2) return f.template run<2, 1>();
    if (l.lanes == 4) return f.template run<4, 1>();
    if (l.lanes == 8) return f.template run<8, 1>();
    if (l.lanes == 16) return f.template run<16, 1>();
    return f.template run<32, 1>();
  }
};
template <class F>
struct OfLanes<float, F> {
  static const char* call(const Lanes& l, const F& f) {
    return l.each == 2 ? f.template run<32, 2>() : OfLanes<double, F>::call(l, f);
  }
};
template <class T>
struct Interpolate {
  const T* cells;
  T* y;
  const NufftGrid& g;
  const Axes& axes;
  const int32_t* first;
  const T* weights;
  void* stream;
  template <int L, int V>
  const char* run() const {
    return interpolate_any<T, L, V>(cells, y, g, axes, first, weights, stream);
  }
};
template <class T>
struct Gather {
  const T* y;
  T *cells, *sums;
  const NufftGrid& g;
  const Axes& axes;
  const int32_t* first;
  const T* weights;
  const int32_t* tiles;
  const Tables& tables;
  void* stream;
  template <int L, int V>
  const char* run() const {
    return gather_with<T, L, V>(y, cells, sums, g, axes, first, weights, tiles, tables, stream);
  }
};

template <class T>
Box box_of(const NufftGrid& g, const T* scale, Scales<T>& scales) {
  int n[3] = {1, 1, 1}, m[3] = {1, 1, 1};
  const T* s[3] = {nullptr, nullptr, nullptr};
  for (int a = 0; a < g.axes; ++a) {
    const int to = 3 - g.axes + a;
    n[to] = static_cast<int>(g.shape[a]);
    m[to] = static_cast<int>(g.grid[a]);
    s[to] = scale;
    scale += g.shape[a];
  }
  scales = {s[0], s[1], s[2]};
  return {n[0], n[1], n[2], m[0], m[1], m[2]};
}

constexpr int64_t kMostInY = 65535;
}  // namespace

template <class T>
const char* nufft_pad(const T* x, T* cells, int64_t batch, const NufftGrid& g, const T* scale, void* stream) {
  Scales<T> scales;
  const Box box = box_of(g, scale, scales);
  const int64_t from = static_cast<int64_t>(box.nz) * box.ny * box.nx;
  const int64_t to = static_cast<int64_t>(box.gz) * box.gy * box.gx;
  for (int64_t b = 0; b < batch; b += kMostInY) {
    const int64_t count = batch - b < kMostInY ? batch - b : kMostInY;
    if (const char* error = launch(pad_kernel<T>, dim3(blocks(to, 256), static_cast<unsigned>(count)), dim3(256),
                                   stream, reinterpret_cast<const Complex<T>*>(x) + b * from,
                                   reinterpret_cast<Complex<T>*>(cells) + b * to, box, scales))
      return error;
  }
  return nullptr;
}

template <class T>
const char* nufft_crop(const T* cells, T* x, int64_t batch, const NufftGrid& g, const T* scale, void* stream) {
  Scales<T> scales;
  const Box box = box_of(g, scale, scales);
  const int64_t to = static_cast<int64_t>(box.nz) * box.ny * box.nx;
  const int64_t from = static_cast<int64_t>(box.gz) * box.gy * box.gx;
  for (int64_t b = 0; b < batch; b += kMostInY) {
    const int64_t count = batch - b < kMostInY ? batch - b : kMostInY;
    if (const char* error = launch(crop_kernel<T>, dim3(blocks(to, 256), static_cast<unsigned>(count)), dim3(256),
                                   stream, reinterpret_cast<const Complex<T>*>(cells) + b * from,
                                   reinterpret_cast<Complex<T>*>(x) + b * to, box, scales))
      return error;
  }
  return nullptr;
}

template <class T>
size_t nufft_workspace(int64_t batch, const NufftGrid& g, bool spread) {
  const Axes axes = axes_of(g);
  const Lanes lanes = lanes_for<T>(together<T>(batch));
  const size_t stride = 2 * sizeof(T) * static_cast<size_t>(lanes.lanes * lanes.each);
  size_t bytes =
      aligned(static_cast<size_t>(cells_of(axes)) * stride) + aligned(static_cast<size_t>(g.points) * stride);
  if (spread)
    bytes += 3 * aligned((static_cast<size_t>(count_of(squares_of(axes))) + 1) * sizeof(int32_t)) +
             aligned(static_cast<size_t>(most_partials(axes, g)) * kCells * stride);
  return bytes;
}

template <class T>
const char* nufft_interpolate(const T* cells, T* y, int64_t batch, const NufftGrid& g, const int32_t* order,
                              const int32_t* first, const T* weights, void* work, void* stream) {
  const Axes axes = axes_of(g);
  const int64_t n = cells_of(axes), some = together<T>(batch);
  for (int64_t b = 0; b < batch; b += some) {
    const int count = static_cast<int>(batch - b < some ? batch - b : some);
    const Lanes lanes = lanes_for<T>(count);
    const int stride = lanes.lanes * lanes.each;
    char* const bytes = static_cast<char*>(work);
    Complex<T>* grid = reinterpret_cast<Complex<T>*>(bytes);
    Complex<T>* samples =
        reinterpret_cast<Complex<T>*>(bytes + aligned(static_cast<size_t>(n * stride) * 2 * sizeof(T)));
    const Complex<T>* from = reinterpret_cast<const Complex<T>*>(cells) + b * n;
    Complex<T>* to = reinterpret_cast<Complex<T>*>(y) + b * g.points;
    const unsigned across = blocks(stride, 32);
    if (const char* error = launch(pack<T>, dim3(blocks(n, 32), across), dim3(32, 8), stream, from, grid,
                                   static_cast<const int32_t*>(nullptr), count, n, stride))
      return error;
    const Interpolate<T> step{
        reinterpret_cast<const T*>(grid), reinterpret_cast<T*>(samples), g, axes, first, weights, stream};
    if (const char* error = OfLanes<T, Interpolate<T>>::call(lanes, step)) return error;
    if (const char* error = launch(unpack<T>, dim3(blocks(g.points, 32), across), dim3(32, 8), stream, samples, to,
                                   order, count, g.points, stride))
      return error;
  }
  return nullptr;
}

template <class T>
const char* nufft_spread(const T* y, T* cells, int64_t batch, const NufftGrid& g, const int32_t* order,
                         const int32_t* first, const T* weights, const int32_t* tiles, void* work, void* stream) {
  const Axes axes = axes_of(g);
  const Squares squares = squares_of(axes);
  const int64_t n = cells_of(axes), some = together<T>(batch), count_squares = count_of(squares);
  char* at = static_cast<char*>(work);
  const size_t table = aligned((static_cast<size_t>(count_squares) + 1) * sizeof(int32_t));
  const Tables tables{reinterpret_cast<int32_t*>(at), reinterpret_cast<int32_t*>(at + table),
                      reinterpret_cast<int32_t*>(at + 2 * table)};
  at += 3 * table;
  const int squares_count = static_cast<int>(count_squares);
  if (const char* error =
          launch(segments_kernel, dim3(blocks(count_squares, 128)), dim3(128), stream, axes, tiling_of(axes, g.tile),
                 squares, tiles, tables.segments, squares_count, static_cast<int32_t>(segment_of(axes, g))))
    return error;
  if (const char* error = launch(scan_kernel, dim3(1), dim3(kScanThreads), stream, tables.segments, tables.tasks,
                                 tables.partials, squares_count))
    return error;
  for (int64_t b = 0; b < batch; b += some) {
    const int count = static_cast<int>(batch - b < some ? batch - b : some);
    const Lanes lanes = lanes_for<T>(count);
    const int stride = lanes.lanes * lanes.each;
    const size_t sample_bytes = aligned(static_cast<size_t>(g.points * stride) * 2 * sizeof(T));
    Complex<T>* samples = reinterpret_cast<Complex<T>*>(at);
    Complex<T>* grid = reinterpret_cast<Complex<T>*>(at + sample_bytes);
    T* sums = reinterpret_cast<T*>(at + sample_bytes + aligned(static_cast<size_t>(n * stride) * 2 * sizeof(T)));
    const unsigned across = blocks(stride, 32);
    if (const char* error =
            launch(pack<T>, dim3(blocks(g.points, 32), across), dim3(32, 8), stream,
                   reinterpret_cast<const Complex<T>*>(y) + b * g.points, samples, order, count, g.points, stride))
      return error;
    const Gather<T> step{reinterpret_cast<const T*>(samples),
                         reinterpret_cast<T*>(grid),
                         sums,
                         g,
                         axes,
                         first,
                         weights,
                         tiles,
                         tables,
                         stream};
    if (const char* error = OfLanes<T, Gather<T>>::call(lanes, step)) return error;
    if (const char* error = launch(unpack<T>, dim3(blocks(n, 32), across), dim3(32, 8), stream, grid,
                                   reinterpret_cast<Complex<T>*>(cells) + b * n, static_cast<const int32_t*>(nullptr),
                                   count, n, stride))
      return error;
  }
  return nullptr;
}

#define RECON3D_NUFFT(T)                                                                                             \
  template const char* nufft_pad<T>(const T*, T*, int64_t, const NufftGrid&, const T*, void*);                       \
  template const char* nufft_crop<T>(const T*, T*, int64_t, const NufftGrid&, const T*, void*);                      \
  template size_t nufft_workspace<T>(int64_t, const NufftGrid&, bool);                                               \
  template const char* nufft_interpolate<T>(const T*, T*, int64_t, const NufftGrid&, const int32_t*, const int32_t*, \
                                            const T*, void*, void*);                                                 \
  template const char* nufft_spread<T>(const T*, T*, int64_t, const NufftGrid&, const int32_t*, const int32_t*,      \
                                       const T*, const int32_t*, void*, void*);
RECON3D_NUFFT(float)
RECON3D_NUFFT(double)
}  // namespace cuda
}  // namespace recon3d
