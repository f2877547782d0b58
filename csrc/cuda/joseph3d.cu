#include <cuda_runtime.h>

#include "cuda/joseph3d.h"
#include "cuda/launch.h"
#include "cuda/tof.h"

// A thread is a line. Where it crosses a plane is computed in float64: four multiply-adds beside four scattered reads.
// With time of flight only the planes within reach of a bin are visited; all bins are taken eight at a time.
namespace recon3d {
namespace cuda {
namespace {
constexpr int kThreads = 128;
constexpr int kBins = 8;
constexpr double kTie = 1.0 - 1e-9;  // a line at 45 degrees steps over the same axis as everywhere
constexpr double kSlack = 1e-9;      // a plane through an end of the line belongs to it; in voxels
enum class Mode { plain, one_bin, all_bins };

// Plane j of the main axis, for j in [first, last], is met at cells (a + b j, c + e j) of the other two, at distance
// d0 + dd j from the middle.
struct Ray {
  double a, b, c, e, d0, dd, step;
  int64_t along, p, q;  // strides of the main axis and the other two
  int np, nq, first, last;
};
struct Geometry {
  int64_t lines;
  int nz, ny, nx;
  double dz, dy, dx;
  const double* point;
  const int32_t* pair;
  const int32_t* line_bin;
};

__device__ Ray ray_of(const Geometry& g, int64_t line) {
  const double* p0 = g.point + 3 * static_cast<int64_t>(g.pair[2 * line]);
  const double* p1 = g.point + 3 * static_cast<int64_t>(g.pair[2 * line + 1]);
  const double z = p1[0] - p0[0], y = p1[1] - p0[1], x = p1[2] - p0[2];
  const double total = sqrt(z * z + y * y + x * x);
  const int64_t row = g.nx, slice = static_cast<int64_t>(g.ny) * g.nx;
  const bool over_z = fmax(fabs(y), fabs(x)) < fabs(z) * kTie, over_x = !over_z && fabs(y) < fabs(x) * kTie;
  // index of p0 and reach to p1 in voxels, of the main axis and the others in the order z, y, x
  const double z0 = p0[0] / g.dz + 0.5 * (g.nz - 1), y0 = p0[1] / g.dy + 0.5 * (g.ny - 1);
  const double x0 = p0[2] / g.dx + 0.5 * (g.nx - 1);
  const double start = over_z ? z0 : over_x ? x0 : y0;
  const double reach = over_z ? z / g.dz : over_x ? x / g.dx : y / g.dy;
  const int n = over_z ? g.nz : over_x ? g.nx : g.ny;
  Ray ray;
  ray.along = over_z ? slice : over_x ? 1 : row;
  ray.p = over_z ? row : slice;
  ray.q = over_x ? row : 1;
  ray.np = over_z ? g.ny : g.nz;
  ray.nq = over_x ? g.ny : g.nx;
  ray.b = (over_z ? y / g.dy : z / g.dz) / reach;
  ray.e = (over_x ? y / g.dy : x / g.dx) / reach;
  ray.a = (over_z ? y0 : z0) - ray.b * start;
  ray.c = (over_x ? y0 : x0) - ray.e * start;
  ray.dd = total / reach;
  ray.d0 = -start * ray.dd - 0.5 * total;
  ray.step = total > 0 ? total / fabs(reach) : 0;
  ray.first = 0;
  ray.last = -1;
  if (!(total > 0)) return ray;
  const double first = ceil(fmin(start, start + reach) - kSlack), last = floor(fmax(start, start + reach) + kSlack);
  ray.first = static_cast<int>(fmin(fmax(first, 0.0), static_cast<double>(n)));
  ray.last = static_cast<int>(fmax(fmin(last, n - 1.0), -1.0));
  return ray;
}

// Leaves the planes whose distance from the middle lies within [low, high], and one more on either side.
__device__ void narrow(Ray& ray, double low, double high) {
  const double u = (low - ray.d0) / ray.dd, v = (high - ray.d0) / ray.dd;
  const double first = floor(fmin(u, v)), last = ceil(fmax(u, v));
  if (first > ray.first) ray.first = static_cast<int>(fmin(first, ray.last + 1.0));
  if (last < ray.last) ray.last = static_cast<int>(fmax(last, ray.first - 1.0));
}
__device__ void narrow(Ray& ray, const Tof& tof, int first_bin, int last_bin) {
  const double reach = tof.truncation * tof.sigma_mm, half = 0.5 * tof.bins;
  narrow(ray, (first_bin - half) * tof.bin_mm - reach, (last_bin + 1 - half) * tof.bin_mm + reach);
}

template <class T>
struct Taps {
  int64_t at;  // of the first, may lie outside
  bool p0, p1, q0, q1;
  T p, q;  // fractions
};
template <class T>
__device__ Taps<T> taps_of(const Ray& ray, int plane) {
  const double u = ray.a + ray.b * plane, v = ray.c + ray.e * plane, ku = floor(u), kv = floor(v);
  Taps<T> t;
  t.p0 = ku >= 0 && ku < ray.np;
  t.p1 = ku >= -1 && ku < ray.np - 1;
  t.q0 = kv >= 0 && kv < ray.nq;
  t.q1 = kv >= -1 && kv < ray.nq - 1;
  t.p = static_cast<T>(u - ku);
  t.q = static_cast<T>(v - kv);
  const bool any = (t.p0 || t.p1) && (t.q0 || t.q1);
  t.at = any ? plane * ray.along + static_cast<int64_t>(ku) * ray.p + static_cast<int64_t>(kv) * ray.q : 0;
  return t;
}

template <class T>
__device__ T value_at(const T* __restrict__ x, const Ray& ray, int plane) {
  const Taps<T> t = taps_of<T>(ray, plane);
  const T a = t.p0 && t.q0 ? x[t.at] : T(0), b = t.p0 && t.q1 ? x[t.at + ray.q] : T(0);
  const T c = t.p1 && t.q0 ? x[t.at + ray.p] : T(0), d = t.p1 && t.q1 ? x[t.at + ray.p + ray.q] : T(0);
  const T low = fma(t.q, b - a, a), high = fma(t.q, d - c, c);
  return fma(t.p, high - low, low);
}

template <class T>
__device__ T share_of(const Tof& tof, int bin, double distance, T norm) {
  return T(0.5) * (share_below(tof, bin + 1, distance, norm) - share_below(tof, bin, distance, norm));
}

template <class T, Mode kMode>
__global__ void __launch_bounds__(kThreads, 4)
    forward_lines(const T* __restrict__ x, T* __restrict__ y, Geometry g, Tof tof, int64_t voxels) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (line >= g.lines) return;
  const Ray whole = ray_of(g, line);
  x += blockIdx.y * voxels;
  const T step = static_cast<T>(whole.step);
  if constexpr (kMode == Mode::plain) {
    T sum = 0;
    for (int j = whole.first; j <= whole.last; ++j) sum += value_at(x, whole, j);
    y[blockIdx.y * g.lines + line] = sum * step;
  } else if constexpr (kMode == Mode::one_bin) {
    const T norm = share_norm<T>(tof);
    const int bin = g.line_bin[line];
    Ray ray = whole;
    narrow(ray, tof, bin, bin);
    T sum = 0;
    for (int j = ray.first; j <= ray.last; ++j)
      sum = fma(share_of(tof, bin, ray.d0 + ray.dd * j, norm), value_at(x, ray, j), sum);
    y[blockIdx.y * g.lines + line] = sum * step;
  } else {
    const T norm = share_norm<T>(tof);
    T* to = y + (blockIdx.y * g.lines + line) * tof.bins;
    for (int bin = 0; bin < tof.bins; bin += kBins) {
      Ray ray = whole;
      narrow(ray, tof, bin, bin + kBins - 1);
      T sum[kBins] = {};
      for (int j = ray.first; j <= ray.last; ++j) {
        const T value = value_at(x, ray, j);
        const double distance = ray.d0 + ray.dd * j;
        T below = share_below(tof, bin, distance, norm);
#pragma unroll
        for (int b = 0; b < kBins; ++b) {
          const T above = share_below(tof, bin + b + 1, distance, norm);
          sum[b] = fma(T(0.5) * (above - below), value, sum[b]);
          below = above;
        }
      }
#pragma unroll
      for (int b = 0; b < kBins; ++b)
        if (bin + b < tof.bins) to[bin + b] = sum[b] * step;
    }
  }
}

// --- the transpose --------------------------------------------------------------------------------------------------

using Fixed = unsigned long long;  // signed sums modulo 2^64: what atomicAdd takes

template <class T>
__global__ void largest(const T* __restrict__ y, int64_t count, Fixed* to) {
  __shared__ Fixed found[kThreads];
  Fixed best = 0;
  const int64_t all = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += all) {
    const double value = fabs(static_cast<double>(y[i]));
    Fixed bits;  // of a number without sign: in order, with what is not finite above the rest
    memcpy(&bits, &value, sizeof(bits));
    best = bits > best ? bits : best;
  }
  found[threadIdx.x] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) best = found[i] > best ? found[i] : best;
  atomicMax(to, best);
}

// Power of two by which contributions are multiplied; 0 where data are not finite.
__device__ double scale_of(Fixed bits, int64_t lines, double most_step) {
  double top;
  memcpy(&top, &bits, sizeof(top));
  if (!(top <= 1.7976931348623157e308)) return 0;
  if (top == 0) return 1;
  // a line meets a voxel once, with a weight of at most its step
  const double bound = static_cast<double>(lines) * most_step;
  const int exponent = ilogb(top) + ilogb(bound) + 2;
  return ldexp(1.0, exponent > -940 ? 62 - exponent : 1002);
}

template <class T>
__device__ void add_at(Fixed* x, const Ray& ray, int plane, T value, double scale) {
  const Taps<T> t = taps_of<T>(ray, plane);
  const T low = (T(1) - t.p) * value, high = t.p * value;
  const auto add = [&](bool inside, int64_t at, T weight) {
    if (inside && weight != T(0)) atomicAdd(x + at, static_cast<Fixed>(llrint(static_cast<double>(weight) * scale)));
  };
  add(t.p0 && t.q0, t.at, (T(1) - t.q) * low);
  add(t.p0 && t.q1, t.at + ray.q, t.q * low);
  add(t.p1 && t.q0, t.at + ray.p, (T(1) - t.q) * high);
  add(t.p1 && t.q1, t.at + ray.p + ray.q, t.q * high);
}

template <class T, Mode kMode>
__global__ void __launch_bounds__(kThreads, 4)
    adjoint_lines(const T* __restrict__ y, Fixed* x, const Fixed* __restrict__ top, Geometry g, Tof tof,
                  double most_step) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const double scale = scale_of(*top, g.lines, most_step);
  if (line >= g.lines || scale == 0) return;
  const Ray whole = ray_of(g, line);
  const T step = static_cast<T>(whole.step);
  if constexpr (kMode == Mode::plain) {
    const T value = y[line] * step;
    if (value == T(0)) return;
    for (int j = whole.first; j <= whole.last; ++j) add_at(x, whole, j, value, scale);
  } else if constexpr (kMode == Mode::one_bin) {
    const T norm = share_norm<T>(tof), value = y[line] * step;
    if (value == T(0)) return;
    const int bin = g.line_bin[line];
    Ray ray = whole;
    narrow(ray, tof, bin, bin);
    for (int j = ray.first; j <= ray.last; ++j)
      add_at(x, ray, j, value * share_of(tof, bin, ray.d0 + ray.dd * j, norm), scale);
  } else {
    const T norm = share_norm<T>(tof);
    const T* from = y + line * tof.bins;
    for (int bin = 0; bin < tof.bins; bin += kBins) {
      Ray ray = whole;
      narrow(ray, tof, bin, bin + kBins - 1);
      T values[kBins];
#pragma unroll
      for (int b = 0; b < kBins; ++b) values[b] = bin + b < tof.bins ? from[bin + b] : T(0);
      for (int j = ray.first; j <= ray.last; ++j) {
        const double distance = ray.d0 + ray.dd * j;
        T below = share_below(tof, bin, distance, norm), sum = 0;
#pragma unroll
        for (int b = 0; b < kBins; ++b) {
          const T above = share_below(tof, bin + b + 1, distance, norm);
          sum = fma(T(0.5) * (above - below), values[b], sum);
          below = above;
        }
        if (sum != T(0)) add_at(x, ray, j, sum * step, scale);
      }
    }
  }
}

template <class T>
__global__ void finish(const Fixed* __restrict__ sums, const Fixed* __restrict__ top, T* __restrict__ x, int64_t voxels,
                       int64_t lines, double most_step) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= voxels) return;
  const double scale = scale_of(*top, lines, most_step);
  // 0 / 0 where data are not finite
  x[i] = static_cast<T>((scale == 0 ? 0.0 : static_cast<double>(static_cast<long long>(sums[i]))) / scale);
}

// --- hosts ----------------------------------------------------------------------------------------------------------

unsigned blocks(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }

Geometry geometry_of(const LineScan& s) {
  return {s.lines,
          static_cast<int>(s.nz),
          static_cast<int>(s.ny),
          static_cast<int>(s.nx),
          s.dz,
          s.dy,
          s.dx,
          s.point,
          s.pair,
          s.line_bin};
}
Tof tof_of(const LineScan& s) { return {static_cast<int>(s.bins), s.bin_mm, s.sigma_mm, s.truncation}; }

// Values of a line in y.
int64_t values_of(const LineScan& s) { return s.bins && !s.line_bin ? s.bins : 1; }
}  // namespace

int64_t joseph3d_adjoint_workspace(const LineScan& scan) { return (scan.nz * scan.ny * scan.nx + 1) * 8; }

template <class T>
const char* joseph3d(const T* x, T* y, int64_t images, const LineScan& scan, void* stream) {
  const int64_t voxels = scan.nz * scan.ny * scan.nx;
  const auto kernel = !scan.bins      ? forward_lines<T, Mode::plain>
                      : scan.line_bin ? forward_lines<T, Mode::one_bin>
                                      : forward_lines<T, Mode::all_bins>;
  constexpr int64_t kMost = 65535;  // blocks along y
  for (int64_t i = 0; i < images; i += kMost) {
    const int64_t some = images - i < kMost ? images - i : kMost;
    const dim3 grid(blocks(scan.lines, kThreads), static_cast<unsigned>(some));
    if (const char* error = launch(kernel, grid, dim3(kThreads), stream, x + i * voxels,
                                   y + i * scan.lines * values_of(scan), geometry_of(scan), tof_of(scan), voxels))
      return error;
  }
  return nullptr;
}

template <class T>
const char* joseph3d_adjoint(const T* y, T* x, int64_t images, const LineScan& scan, void* work, void* stream) {
  const int64_t voxels = scan.nz * scan.ny * scan.nx, data = scan.lines * values_of(scan);
  const double longest = fmax(scan.dz, fmax(scan.dy, scan.dx));
  const double most_step = 1.7320508075688774 * longest * (1 + 1e-6);  // along the diagonal of a cube
  Fixed *top = static_cast<Fixed*>(work), *sums = top + 1;
  const auto kernel = !scan.bins      ? adjoint_lines<T, Mode::plain>
                      : scan.line_bin ? adjoint_lines<T, Mode::one_bin>
                                      : adjoint_lines<T, Mode::all_bins>;
  const unsigned some = blocks(data, kThreads) < 1024 ? blocks(data, kThreads) : 1024;
  for (int64_t i = 0; i < images; ++i) {
    const T* from = y + i * data;
    if (const char* error = fill_zero(work, static_cast<size_t>(joseph3d_adjoint_workspace(scan)), stream))
      return error;
    if (const char* error = launch(largest<T>, dim3(some), dim3(kThreads), stream, from, data, top)) return error;
    if (const char* error = launch(kernel, dim3(blocks(scan.lines, kThreads)), dim3(kThreads), stream, from, sums, top,
                                   geometry_of(scan), tof_of(scan), most_step))
      return error;
    if (const char* error = launch(finish<T>, dim3(blocks(voxels, 256)), dim3(256), stream, sums, top, x + i * voxels,
                                   voxels, scan.lines, most_step))
      return error;
  }
  return nullptr;
}

template const char* joseph3d<float>(const float*, float*, int64_t, const LineScan&, void*);
template const char* joseph3d<double>(const double*, double*, int64_t, const LineScan&, void*);
template const char* joseph3d_adjoint<float>(const float*, float*, int64_t, const LineScan&, void*, void*);
template const char* joseph3d_adjoint<double>(const double*, double*, int64_t, const LineScan&, void*, void*);
}  // namespace cuda
}  // namespace recon3d
