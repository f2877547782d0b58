#include "cuda/launch.h"
#include "cuda/radon.h"

// Two roads with the same arithmetic, so that a slice's bits do not depend on how many travel with it.
//
// Stacks of 16 slices and more (float): slices innermost, a warp's lanes are 32, 64 or 128 slices. One index and one
// weight serve all of them, every load is one full line, and warps of a block walk the image together, so that L1 holds
// what they share. Any angles, any pitch: neighbouring views make it faster, nothing depends on it.
// Fewer slices and float64: a thread per ray (forward) or per pixel (transpose).
//
// Both read copies of the image with two zero columns on either side, one of them with x and y exchanged for the rays
// that step over columns: no branch in the inner loop.
namespace recon3d {
namespace cuda {
namespace {
constexpr int kPad = 2;              // zero cells on either side of a line of the copies
constexpr int kWarps = 8;            // of a block: views (forward), rows of pixels (transpose)
constexpr int kRays = 16;            // of a warp, forward
constexpr int kSide = 8;             // of the square of pixels that a block gathers
constexpr int kHeld = 8;             // weights kept per pixel and view; more rays than that are weighed again
constexpr int kSteps = 4;            // between two barriers, forward: what they touch stays in L1
constexpr int kTogether = 8;         // views between two barriers, transpose
constexpr int kFewSlices = 16;       // below, or float64: the second road
constexpr int kViewsPerLaunch = 96;  // angles that fit the 4 KB of kernel arguments twice over
// a ray at 45 degrees steps over rows; the same slack as everywhere
constexpr double kTie = 1.0 - 1e-9;

// A ray crosses step i at cell alpha + beta i; axis 0 steps over rows, 1 over columns.
template <class T>
struct alignas(4 * sizeof(T)) Ray {
  T alpha, beta, length, axis;
};
template <class T>
struct alignas(2 * sizeof(T)) View {
  T cosine, sine;
};
struct ViewAngles {
  double cosine[kViewsPerLaunch], sine[kViewsPerLaunch];
};
template <int V>
struct alignas(4 * V) Floats {
  float v[V];
};
struct Span {
  int first, count;
};

// What a pixel needs to find its rays.
template <class T>
struct Pixels {
  T half_x, half_y, dx, dy, per_pitch, origin, sod, sdd;
  int cells, ny, nx;
};

__device__ Ray<double> line_of(const Scan& g, double cosine, double sine, int64_t cell) {
  const double s = (static_cast<double>(cell) - 0.5 * static_cast<double>(g.cells - 1)) * g.pitch + g.offset;
  double p = cosine, r = sine, c = s;
  if (g.sod > 0) {
    const double q = s / g.sdd;
    p = cosine - q * sine;
    r = sine + q * cosine;
    c = q * g.sod;
  }
  const bool columns = fabs(p * g.dx) < fabs(r * g.dy) * kTie;
  const double main = columns ? r * g.dy : p * g.dx, cross = columns ? p * g.dx : r * g.dy;
  const double cy = 0.5 * static_cast<double>(g.ny - 1), cx = 0.5 * static_cast<double>(g.nx - 1);
  const double beta = -cross / main;
  return {c / main + (columns ? cy : cx) - beta * (columns ? cx : cy), beta, g.dx * g.dy * hypot(p, r) / fabs(main),
          columns ? 1.0 : 0.0};
}

template <class T>
__global__ void lines_kernel(Scan g, ViewAngles angles, int64_t first, Ray<T>* rays, View<T>* views) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const double cosine = angles.cosine[blockIdx.y], sine = angles.sine[blockIdx.y];
  const int64_t view = first + blockIdx.y;
  if (cell < g.cells) {
    const Ray<double> l = line_of(g, cosine, sine, cell);
    rays[view * g.cells + cell] = {static_cast<T>(l.alpha), static_cast<T>(l.beta), static_cast<T>(l.length),
                                   static_cast<T>(l.axis)};
  }
  if (cell == 0) views[view] = {static_cast<T>(cosine), static_cast<T>(sine)};
}

// The cell left of the crossing and how far beyond it; the one expression that both directions share.
template <class T>
__device__ T crossing(T alpha, T beta, T step, T cells, T& fraction) {
  T u = fma(beta, step, alpha);
  u = u < T(-kPad) ? T(-kPad) : u;
  u = u > cells ? cells : u;
  const T cell = floor(u);
  fraction = u - cell;
  return cell;
}

// Length of the ray within pixel (row, column), zero where it passes by.
template <class T>
__device__ T weight_of(const Ray<T>& ray, int row, int column, int ny, int nx) {
  const bool columns = ray.axis != T(0);
  const T at = static_cast<T>(columns ? row : column);
  T fraction;
  const T cell = crossing(ray.alpha, ray.beta, static_cast<T>(columns ? column : row),
                          static_cast<T>(columns ? ny : nx), fraction);
  const T share = cell == at ? T(1) - fraction : (cell + T(1) == at ? fraction : T(0));
  return share * ray.length;
}

template <class T>
__device__ T cell_of(const Pixels<T>& g, const View<T>& view, T x, T y, bool& seen) {
  const T depth = g.sod + x * view.sine - y * view.cosine;
  seen = seen && depth > T(0);
  return (x * view.cosine + y * view.sine) * g.sdd / depth * g.per_pitch + g.origin;
}

// First and last ray that may cross within one pixel of (row, column), with a margin for rounding.
template <class T>
__device__ void rays_near(const Pixels<T>& g, const View<T>& view, int row, int column, int& first, int& last) {
  const T x = (static_cast<T>(column) - g.half_x) * g.dx, y = (static_cast<T>(row) - g.half_y) * g.dy;
  T low, high;
  if (g.sod > T(0)) {
    bool seen = true;
    const T a = cell_of(g, view, x - g.dx, y, seen), b = cell_of(g, view, x + g.dx, y, seen);
    const T c = cell_of(g, view, x, y - g.dy, seen), d = cell_of(g, view, x, y + g.dy, seen);
    low = seen ? fmin(fmin(a, b), fmin(c, d)) : T(0);
    high = seen ? fmax(fmax(a, b), fmax(c, d)) : static_cast<T>(g.cells);
  } else {
    const T middle = (x * view.cosine + y * view.sine) * g.per_pitch + g.origin;
    const T reach = fmax(fabs(view.cosine) * g.dx, fabs(view.sine) * g.dy) * g.per_pitch;
    low = middle - reach;
    high = middle + reach;
  }
  const T margin = T(0.05), n = static_cast<T>(g.cells);
  first = static_cast<int>(fmin(fmax(ceil(low - margin), T(0)), n));
  last = static_cast<int>(fmax(fmin(floor(high + margin), n - T(1)), T(-1)));
}

// --- the second road ------------------------------------------------------------------------------------------------

// x [slice, ny, nx] into rows [slice, ny, nx + 4] and columns [slice, nx, ny + 4]; their borders were zeroed.
template <class T>
__global__ void pad_kernel(const T* __restrict__ x, T* __restrict__ rows, T* __restrict__ columns, int ny, int nx) {
  __shared__ T tile[32][33];
  const int64_t slice = blockIdx.z;
  const int j0 = blockIdx.x * 32, i0 = blockIdx.y * 32;
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int i = i0 + k, j = j0 + threadIdx.x;
    if (i < ny && j < nx) {
      const T value = x[(slice * ny + i) * nx + j];
      tile[k][threadIdx.x] = value;
      rows[(slice * ny + i) * (nx + 2 * kPad) + j + kPad] = value;
    }
  }
  __syncthreads();
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int i = i0 + threadIdx.x, j = j0 + k;
    if (i < ny && j < nx) columns[(slice * nx + j) * (ny + 2 * kPad) + i + kPad] = tile[threadIdx.x][k];
  }
}

template <class T>
__global__ void __launch_bounds__(128)
    forward_rays(const T* __restrict__ rows, const T* __restrict__ columns, const Ray<T>* __restrict__ rays,
                 T* __restrict__ y, int cells, int ny, int nx) {
  const int cell = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t slice = blockIdx.z, line = static_cast<int64_t>(blockIdx.y) * cells + cell;
  if (cell >= cells) return;
  const Ray<T> ray = rays[line];
  const bool over_columns = ray.axis != T(0);
  const int steps = over_columns ? nx : ny, across = over_columns ? ny : nx;
  const int64_t width = across + 2 * kPad;
  const T* p = (over_columns ? columns : rows) + slice * steps * width + kPad;
  const T end = static_cast<T>(across);
  T sum = 0;
  for (int step = 0; step < steps; ++step, p += width) {
    T fraction;
    const int k = static_cast<int>(crossing(ray.alpha, ray.beta, static_cast<T>(step), end, fraction));
    const T a = p[k], b = p[k + 1];
    sum += fma(fraction, b - a, a);
  }
  y[slice * gridDim.y * cells + line] = sum * ray.length;
}

template <class T>
__global__ void __launch_bounds__(256)
    adjoint_pixels(const T* __restrict__ y, const Ray<T>* __restrict__ rays, const View<T>* __restrict__ views,
                   T* __restrict__ x, Pixels<T> g, int n_views) {
  const int column = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 8 + threadIdx.y;
  const int64_t slice = blockIdx.z;
  if (column >= g.nx || row >= g.ny) return;
  const T* line = y + slice * n_views * g.cells;
  T sum = 0;
  for (int view = 0; view < n_views; ++view, line += g.cells) {
    int first, last;
    rays_near(g, views[view], row, column, first, last);
    const Ray<T>* ray = rays + static_cast<int64_t>(view) * g.cells;
    for (int r = first; r <= last; ++r) {
      const T weight = weight_of(ray[r], row, column, g.ny, g.nx);
      if (weight != T(0)) sum = fma(weight, line[r], sum);
    }
  }
  x[(slice * g.ny + row) * g.nx + column] = sum;
}

// --- slices innermost -----------------------------------------------------------------------------------------------

// x [slice, ny, nx] into rows [ny, nx + 4, stride] and columns [nx, ny + 4, stride]; slices beyond the last are zero.
__global__ void pack_image(const float* __restrict__ x, float* __restrict__ rows, float* __restrict__ columns,
                           int slices, int ny, int nx, int stride) {
  __shared__ float tile[32][33];
  const int j0 = blockIdx.x * 32, i = blockIdx.y, s0 = blockIdx.z * 32;
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int s = s0 + k, j = j0 + threadIdx.x;
    tile[k][threadIdx.x] = s < slices && j < nx ? x[(static_cast<int64_t>(s) * ny + i) * nx + j] : 0.f;
  }
  __syncthreads();
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int j = j0 + k, s = s0 + threadIdx.x;
    if (j < nx) {
      const float value = tile[threadIdx.x][k];
      rows[(static_cast<int64_t>(i) * (nx + 2 * kPad) + j + kPad) * stride + s] = value;
      columns[(static_cast<int64_t>(j) * (ny + 2 * kPad) + i + kPad) * stride + s] = value;
    }
  }
}

// [slice, n] into [n, stride]; slices beyond the last are zero.
__global__ void pack(const float* __restrict__ from, float* __restrict__ to, int slices, int64_t n, int stride) {
  __shared__ float tile[32][33];
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * 32;
  const int s0 = blockIdx.y * 32;
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int64_t i = i0 + threadIdx.x;
    tile[k][threadIdx.x] = s0 + k < slices && i < n ? from[(s0 + k) * n + i] : 0.f;
  }
  __syncthreads();
  for (int k = threadIdx.y; k < 32; k += 8)
    if (i0 + k < n) to[(i0 + k) * stride + s0 + threadIdx.x] = tile[threadIdx.x][k];
}

// [n, stride] into [slice, n].
__global__ void unpack(const float* __restrict__ from, float* __restrict__ to, int slices, int64_t n, int stride) {
  __shared__ float tile[32][33];
  const int64_t i0 = static_cast<int64_t>(blockIdx.x) * 32;
  const int s0 = blockIdx.y * 32;
  for (int k = threadIdx.y; k < 32; k += 8)
    if (i0 + k < n) tile[k][threadIdx.x] = from[(i0 + k) * stride + s0 + threadIdx.x];
  __syncthreads();
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int64_t i = i0 + threadIdx.x;
    if (s0 + k < slices && i < n) to[(s0 + k) * n + i] = tile[threadIdx.x][k];
  }
}

// A block is 8 neighbouring views (its warps) of the same 16 rays; a lane is V slices.
template <int V>
__global__ void __launch_bounds__(32 * kWarps, 2)
    forward_stack(const float* __restrict__ rows, const float* __restrict__ columns,
                  const Ray<float>* __restrict__ rays, float* __restrict__ y, int n_views, int cells, int ny, int nx) {
  constexpr int S = 32 * V;
  __shared__ View<float> lines[kWarps][kRays];  // alpha and beta
  __shared__ int busy[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int view = blockIdx.y * kWarps + warp, first = blockIdx.x * kRays;
  Floats<V> sum[kRays] = {};
#pragma unroll 1
  for (int axis = 0; axis < 2; ++axis) {
    if (lane == 0) busy[warp] = 0;
    __syncthreads();
    bool mine = false;
    if (lane < kRays) {
      View<float> line = {-static_cast<float>(kPad), 0.f};  // reads nothing but zeros
      if (view < n_views && first + lane < cells) {
        const Ray<float> ray = rays[static_cast<int64_t>(view) * cells + first + lane];
        mine = static_cast<int>(ray.axis) == axis;
        if (mine) line = {ray.alpha, ray.beta};
      }
      lines[warp][lane] = line;
      if (mine) busy[warp] = 1;
    }
    if (!__syncthreads_or(mine)) continue;
    const int steps = axis ? nx : ny, across = axis ? ny : nx;
    const int64_t width = static_cast<int64_t>(across + 2 * kPad) * S;
    const float* row = (axis ? columns : rows) + kPad * S + lane * V;
    const bool work = busy[warp] != 0;
    for (int begin = 0; begin < steps; begin += kSteps) {
      const int end = begin + kSteps < steps ? begin + kSteps : steps;
#pragma unroll
      for (int part = 0; part < kRays; part += 4) {  // 16 rays at once would not leave registers for their loads
        const float* from = row + begin * width;
#pragma unroll 1
        for (int step = begin; work && step < end; ++step, from += width) {
#pragma unroll
          for (int i = part; i < part + 4; ++i) {
            const View<float> line = lines[warp][i];
            float fraction;
            const int k = static_cast<int>(
                crossing(line.cosine, line.sine, static_cast<float>(step), static_cast<float>(across), fraction));
            const Floats<V> a = *reinterpret_cast<const Floats<V>*>(from + k * S);
            const Floats<V> b = *reinterpret_cast<const Floats<V>*>(from + k * S + S);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[i].v[v] += fma(fraction, b.v[v] - a.v[v], a.v[v]);
          }
        }
      }
      __syncthreads();
    }
  }
  if (view >= n_views) return;
#pragma unroll
  for (int i = 0; i < kRays; ++i) {
    if (first + i >= cells) break;
    const int64_t at = static_cast<int64_t>(view) * cells + first + i;
    const float length = rays[at].length;
    Floats<V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.v[v] = sum[i].v[v] * length;
    *reinterpret_cast<Floats<V>*>(y + at * S + lane * V) = out;
  }
}

// A block is a square of 8 x 8 pixels, a warp one row of it, a lane V slices. For 8 views at a time its threads first
// find the rays of every pixel and their weights, then every warp gathers.
template <int V>
__global__ void __launch_bounds__(32 * kWarps, 2)
    adjoint_stack(const float* __restrict__ y, const Ray<float>* __restrict__ rays,
                  const View<float>* __restrict__ views, float* __restrict__ x, Pixels<float> g, int n_views) {
  constexpr int S = 32 * V;
  __shared__ float held[kTogether][kSide * kSide][kHeld];
  __shared__ Span spans[kTogether][kSide * kSide];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row = blockIdx.y * kSide + warp, column = blockIdx.x * kSide;
  Floats<V> sum[kSide] = {};
  for (int begin = 0; begin < n_views; begin += kTogether) {
    for (int e = threadIdx.x; e < kTogether * kSide * kSide; e += 32 * kWarps) {
      const int view = begin + e / (kSide * kSide), p = e % (kSide * kSide);
      const int i = blockIdx.y * kSide + p / kSide, j = column + p % kSide;
      Span span = {0, 0};
      if (view < n_views && i < g.ny && j < g.nx) {
        const Ray<float>* ray = rays + static_cast<int64_t>(view) * g.cells;
        int first, last;
        rays_near(g, views[view], i, j, first, last);
        for (int r = first; r <= last; ++r) {
          const float weight = weight_of(ray[r], i, j, g.ny, g.nx);
          if (weight == 0.f && span.count == 0) continue;
          if (span.count == 0) span.first = r;
          if (r - span.first < kHeld) held[view - begin][p][r - span.first] = weight;
          if (weight != 0.f) span.count = r - span.first + 1;
        }
      }
      spans[e / (kSide * kSide)][p] = span;
    }
    __syncthreads();
    const int together = n_views - begin < kTogether ? n_views - begin : kTogether;
    for (int t = 0; t < together; ++t) {
      const int64_t line = static_cast<int64_t>(begin + t) * g.cells;
#pragma unroll
      for (int q = 0; q < kSide; ++q) {
        const Span span = spans[t][warp * kSide + q];
        const float* from = y + (line + span.first) * S + lane * V;
        for (int c = 0; c < span.count; ++c, from += S) {
          const float weight = c < kHeld ? held[t][warp * kSide + q][c]
                                         : weight_of(rays[line + span.first + c], row, column + q, g.ny, g.nx);
          const Floats<V> value = *reinterpret_cast<const Floats<V>*>(from);
#pragma unroll
          for (int v = 0; v < V; ++v) sum[q].v[v] = fma(weight, value.v[v], sum[q].v[v]);
        }
      }
    }
    __syncthreads();
  }
  if (row >= g.ny) return;
#pragma unroll
  for (int q = 0; q < kSide; ++q)
    if (column + q < g.nx)
      *reinterpret_cast<Floats<V>*>(x + (static_cast<int64_t>(row) * g.nx + column + q) * S + lane * V) = sum[q];
}

// --- hosts ----------------------------------------------------------------------------------------------------------

unsigned blocks(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }
int64_t aligned(int64_t n) { return (n + 31) / 32 * 32; }

// Slices per lane: the widest that wastes at most a quarter of the lanes; 0 = the second road.
int lanes_for(int64_t slices) {
  if (slices < kFewSlices) return 0;
  const int64_t least = aligned(slices);
  for (int v = 4; v > 1; v /= 2)
    if ((slices + 32 * v - 1) / (32 * v) * (32 * v) * 4 <= least * 5) return v;
  return 1;
}
int lanes_for(int64_t slices, float) { return lanes_for(slices); }
int lanes_for(int64_t, double) { return 0; }

// Slices that share the workspace at a time.
template <class T>
int64_t slices_at_once(int64_t slices) {
  const int lanes = lanes_for(slices, T());
  return lanes ? 32 * lanes : (slices < kFewSlices ? slices : kFewSlices);
}

int64_t rows_size(const Scan& g) { return aligned(g.ny * (g.nx + 2 * kPad)); }
int64_t columns_size(const Scan& g) { return aligned(g.nx * (g.ny + 2 * kPad)); }
int64_t rays_size(const Scan& g) { return aligned(4 * g.views * g.cells); }
int64_t views_size(const Scan& g) { return aligned(2 * g.views); }

template <class T>
const char* make_lines(const Scan& g, const double* cosine, const double* sine, Ray<T>* rays, View<T>* views,
                       void* stream) {
  for (int64_t first = 0; first < g.views; first += kViewsPerLaunch) {
    const int64_t count = g.views - first < kViewsPerLaunch ? g.views - first : kViewsPerLaunch;
    ViewAngles angles = {};
    for (int64_t v = 0; v < count; ++v) {
      angles.cosine[v] = cosine[first + v];
      angles.sine[v] = sine[first + v];
    }
    const dim3 grid(blocks(g.cells, 128), static_cast<unsigned>(count));
    if (const char* error = launch(lines_kernel<T>, grid, dim3(128), stream, g, angles, first, rays, views))
      return error;
  }
  return nullptr;
}

template <class T>
Pixels<T> pixels_of(const Scan& g) {
  return {static_cast<T>(0.5 * static_cast<double>(g.nx - 1)),
          static_cast<T>(0.5 * static_cast<double>(g.ny - 1)),
          static_cast<T>(g.dx),
          static_cast<T>(g.dy),
          static_cast<T>(1 / g.pitch),
          static_cast<T>(0.5 * static_cast<double>(g.cells - 1) - g.offset / g.pitch),
          static_cast<T>(g.sod),
          static_cast<T>(g.sdd),
          static_cast<int>(g.cells),
          static_cast<int>(g.ny),
          static_cast<int>(g.nx)};
}

template <int V>
const char* forward_chunk(const float* x, float* y, int slices, const Scan& g, const Ray<float>* rays, float* rows,
                          float* columns, float* packed, void* stream) {
  const int ny = static_cast<int>(g.ny), nx = static_cast<int>(g.nx), stride = 32 * V;
  const int n_views = static_cast<int>(g.views), cells = static_cast<int>(g.cells);
  const int64_t n = g.views * g.cells;
  const dim3 tile(32, 8);
  if (const char* error = launch(pack_image, dim3(blocks(nx, 32), static_cast<unsigned>(ny), V), tile, stream, x, rows,
                                 columns, slices, ny, nx, stride))
    return error;
  if (const char* error = launch(forward_stack<V>, dim3(blocks(cells, kRays), blocks(n_views, kWarps)),
                                 dim3(32 * kWarps), stream, rows, columns, rays, packed, n_views, cells, ny, nx))
    return error;
  return launch(unpack, dim3(blocks(n, 32), V), tile, stream, packed, y, slices, n, stride);
}

template <int V>
const char* adjoint_chunk(const float* y, float* x, int slices, const Scan& g, const Ray<float>* rays,
                          const View<float>* views, float* packed, float* image, void* stream) {
  const int n_views = static_cast<int>(g.views), stride = 32 * V;
  const int64_t n = g.views * g.cells, m = g.ny * g.nx;
  const dim3 tile(32, 8);
  if (const char* error = launch(pack, dim3(blocks(n, 32), V), tile, stream, y, packed, slices, n, stride))
    return error;
  if (const char* error = launch(adjoint_stack<V>, dim3(blocks(g.nx, kSide), blocks(g.ny, kSide)), dim3(32 * kWarps),
                                 stream, packed, rays, views, image, pixels_of<float>(g), n_views))
    return error;
  return launch(unpack, dim3(blocks(m, 32), V), tile, stream, image, x, slices, m, stride);
}

template <class T>
const char* forward_few(const T* x, T* y, int64_t slices, const Scan& g, const Ray<T>* rays, T* rows, T* columns,
                        void* stream) {
  const int ny = static_cast<int>(g.ny), nx = static_cast<int>(g.nx), cells = static_cast<int>(g.cells);
  const unsigned count = static_cast<unsigned>(slices);
  if (const char* error = launch(pad_kernel<T>, dim3(blocks(nx, 32), blocks(ny, 32), count), dim3(32, 8), stream, x,
                                 rows, columns, ny, nx))
    return error;
  return launch(forward_rays<T>, dim3(blocks(cells, 128), static_cast<unsigned>(g.views), count), dim3(128), stream,
                rows, columns, rays, y, cells, ny, nx);
}

const char* forward_part(const float* x, float* y, int64_t slices, int lanes, const Scan& g, const Ray<float>* rays,
                         float* rows, float* columns, float* packed, void* stream) {
  const int count = static_cast<int>(slices);
  if (lanes == 4) return forward_chunk<4>(x, y, count, g, rays, rows, columns, packed, stream);
  if (lanes == 2) return forward_chunk<2>(x, y, count, g, rays, rows, columns, packed, stream);
  if (lanes == 1) return forward_chunk<1>(x, y, count, g, rays, rows, columns, packed, stream);
  return forward_few(x, y, slices, g, rays, rows, columns, stream);
}
const char* forward_part(const double* x, double* y, int64_t slices, int, const Scan& g, const Ray<double>* rays,
                         double* rows, double* columns, double*, void* stream) {
  return forward_few(x, y, slices, g, rays, rows, columns, stream);
}

template <class T>
const char* adjoint_few(const T* y, T* x, int64_t slices, const Scan& g, const Ray<T>* rays, const View<T>* views,
                        void* stream) {
  const dim3 grid(blocks(g.nx, 32), blocks(g.ny, 8), static_cast<unsigned>(slices));
  return launch(adjoint_pixels<T>, grid, dim3(32, 8), stream, y, rays, views, x, pixels_of<T>(g),
                static_cast<int>(g.views));
}

const char* adjoint_part(const float* y, float* x, int64_t slices, int lanes, const Scan& g, const Ray<float>* rays,
                         const View<float>* views, float* packed, float* image, void* stream) {
  const int count = static_cast<int>(slices);
  if (lanes == 4) return adjoint_chunk<4>(y, x, count, g, rays, views, packed, image, stream);
  if (lanes == 2) return adjoint_chunk<2>(y, x, count, g, rays, views, packed, image, stream);
  if (lanes == 1) return adjoint_chunk<1>(y, x, count, g, rays, views, packed, image, stream);
  return adjoint_few(y, x, slices, g, rays, views, stream);
}
const char* adjoint_part(const double* y, double* x, int64_t slices, int, const Scan& g, const Ray<double>* rays,
                         const View<double>* views, double*, double*, void* stream) {
  return adjoint_few(y, x, slices, g, rays, views, stream);
}
}  // namespace

template <class T>
int64_t radon_workspace(int64_t slices, const Scan& g, bool adjoint) {
  const int64_t some = slices_at_once<T>(slices), tables = rays_size(g) + views_size(g);
  const bool stack = lanes_for(slices, T()) != 0;
  const int64_t packed = stack ? aligned(g.views * g.cells * some) : 0;
  if (adjoint) return tables + packed + (stack ? aligned(g.ny * g.nx * some) : 0);
  return tables + packed + (rows_size(g) + columns_size(g)) * some;
}

template <class T>
const char* radon(const T* x, T* y, int64_t slices, const Scan& g, const double* cosine, const double* sine, T* work,
                  void* stream) {
  Ray<T>* rays = reinterpret_cast<Ray<T>*>(work);
  View<T>* views = reinterpret_cast<View<T>*>(work + rays_size(g));
  const int64_t some = slices_at_once<T>(slices);
  T* rows = work + rays_size(g) + views_size(g);
  T* columns = rows + rows_size(g) * some;
  T* packed = columns + columns_size(g) * some;
  if (const char* error = make_lines(g, cosine, sine, rays, views, stream)) return error;
  // once: the kernels below never write the borders
  const size_t bytes = static_cast<size_t>((rows_size(g) + columns_size(g)) * some) * sizeof(T);
  if (const char* error = fill_zero(rows, bytes, stream)) return error;
  for (int64_t s = 0; s < slices; s += some) {
    const int64_t count = slices - s < some ? slices - s : some;
    const char* error = forward_part(x + s * g.ny * g.nx, y + s * g.views * g.cells, count, lanes_for(slices, T()), g,
                                     rays, rows, columns, packed, stream);
    if (error) return error;
  }
  return nullptr;
}

template <class T>
const char* radon_adjoint(const T* y, T* x, int64_t slices, const Scan& g, const double* cosine, const double* sine,
                          T* work, void* stream) {
  Ray<T>* rays = reinterpret_cast<Ray<T>*>(work);
  View<T>* views = reinterpret_cast<View<T>*>(work + rays_size(g));
  const int64_t some = slices_at_once<T>(slices);
  T* packed = work + rays_size(g) + views_size(g);
  T* image = packed + aligned(g.views * g.cells * some);
  if (const char* error = make_lines(g, cosine, sine, rays, views, stream)) return error;
  for (int64_t s = 0; s < slices; s += some) {
    const int64_t count = slices - s < some ? slices - s : some;
    const char* error = adjoint_part(y + s * g.views * g.cells, x + s * g.ny * g.nx, count, lanes_for(slices, T()), g,
                                     rays, views, packed, image, stream);
    if (error) return error;
  }
  return nullptr;
}

template int64_t radon_workspace<float>(int64_t, const Scan&, bool);
template int64_t radon_workspace<double>(int64_t, const Scan&, bool);
template const char* radon<float>(const float*, float*, int64_t, const Scan&, const double*, const double*, float*,
                                  void*);
template const char* radon<double>(const double*, double*, int64_t, const Scan&, const double*, const double*, double*,
                                   void*);
template const char* radon_adjoint<float>(const float*, float*, int64_t, const Scan&, const double*, const double*,
                                          float*, void*);
template const char* radon_adjoint<double>(const double*, double*, int64_t, const Scan&, const double*, const double*,
                                           double*, void*);
}  // namespace cuda
}  // namespace recon3d
