#include <cuda_runtime.h>

#include "cuda/joseph3d_sinogram.h"
#include "cuda/launch.h"
#include "cuda/tof.h"

// All planes of a transaxial line cross a row (or column) of the volume at the same place, so the in-plane
// interpolation is done once per row, for all z, and shared by every plane of every axial difference. A plane's index
// along z is an integer stride times its number plus a start that depends on the row and the difference alone: those
// starts and the weights of the time-of-flight bins stand in shared memory, computed in float64 by the block.
//
// Lines along z are kept in `parts` interleaved pieces (every second slice where planes are two slices apart), so that
// neighbouring threads, which are neighbouring planes, read neighbouring cells. Zero cells at both ends of a piece
// spare the inner loop its bounds.
//
// Forward: a block is one transaxial line and up to 1024 planes, a thread four of them (512 and two with time of
// flight). Transpose: a block owns a square of 8 x 8 columns of the volume, finds the lines that reach it, and gathers:
// a thread owns its z in every row, so nothing is added twice at once and the order is that of the lines.
namespace recon3d {
namespace cuda {
namespace {
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kEdge = 2;             // zero cells at either end of a piece: one clamped index serves both taps
constexpr int kSteps = 8;            // rows of the volume between two barriers, forward
constexpr int kRoom = 2048;          // cells of them in shared memory
constexpr int kBins = 8;             // time-of-flight bins at a time
constexpr int kSide = 8;             // of the square of columns, transpose
constexpr int kPerLaunch = 32;       // families or tiles that travel as kernel arguments
constexpr double kTie = 1.0 - 1e-9;  // a line at 45 degrees steps over rows; the same slack as everywhere
constexpr double kSlack = 1e-9;      // a row through an end of the line belongs to it; in voxels

// Limits of a tile: planes and families that a block takes together.
template <class T, bool kTof, bool kAdjoint>
struct Limits {
  static constexpr int kStage = 4096 / static_cast<int>(sizeof(T));
  static constexpr int kEach = kTof ? 2 : 4;
  static constexpr int kPlanes = kAdjoint ? (kTof ? kStage / kBins : kStage) : kEach * kThreads;
  static constexpr int kRows = kTof ? (kAdjoint ? 16 : 32) : (kAdjoint ? 32 : 64);
};

// Crosses row i (axis 0) or column i (axis 1) at cell a + b i and parameter t0 + dt i, for i in [first, last].
struct alignas(16) Line {
  double a, b, t0, dt;
  double length, unit;  // in the plane, mm; of a step, per mm of the line
  int32_t axis, first, last, unused;
};
// The same, as much as the search for lines needs; axis -1: crosses nothing.
struct alignas(16) Reach {
  float a, b;
  int32_t span, axis;  // span: first + 65536 last
};
// Plane p of a family lies at slice base + slope (t - 1/2) + p stride parts.
struct alignas(8) Row {
  double base, slope, difference;
  int32_t stride, first, count, unused;
};
struct alignas(8) Tile {
  double nearest, farthest;  // axial differences, absolute
  int32_t plane, planes, row, rows;
};
template <class S>
struct Batch {
  S item[kPerLaunch];
};
// Where plane 0 of a family meets a row: cell q of piece `residue`, between its two cells with weights low and high.
template <class T>
struct alignas(16) Tap {
  T low, high;
  int32_t q, residue;
};
template <class T>
struct Cross {
  int32_t cell;  // left of the crossing
  int32_t active;
  T fraction;
};
struct Sizes {
  int64_t planes;
  int lines, tiles;
  int nz, ny, nx;
  int parts, deep, width, cells;  // pieces of a line along z; slices of one; with its zero cells; of all pieces
};

__device__ int least(int a, int b) { return a < b ? a : b; }
__device__ int most(int a, int b) { return a > b ? a : b; }

template <class S>
__global__ void store(Batch<S> batch, S* to, int count) {
  if (static_cast<int>(threadIdx.x) < count) to[threadIdx.x] = batch.item[threadIdx.x];
}

__global__ void lines_kernel(const double* __restrict__ ends, Line* __restrict__ lines, Reach* __restrict__ reaches,
                             int64_t count, int ny, int nx, double dy, double dx) {
  const int64_t l = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (l >= count) return;
  const double y0 = ends[4 * l], x0 = ends[4 * l + 1], along_y = ends[4 * l + 2] - y0, along_x = ends[4 * l + 3] - x0;
  const bool columns = fabs(along_y) < fabs(along_x) * kTie;
  const int n = columns ? nx : ny, across = columns ? ny : nx;
  const double main = columns ? along_x / dx : along_y / dy, cross = columns ? along_y / dy : along_x / dx;
  const double start = (columns ? x0 / dx : y0 / dy) + 0.5 * (n - 1);
  const double side = (columns ? y0 / dy : x0 / dx) + 0.5 * (across - 1);
  Line line = {0, 0, 0, 0, 0, 0, columns ? 1 : 0, 0, -1, 0};
  if (main != 0) {
    line.b = cross / main;
    line.a = side - start * line.b;
    line.dt = 1 / main;
    line.t0 = -start / main;
    line.length = hypot(along_y, along_x);
    line.unit = (columns ? dx : dy) / fabs(columns ? along_x : along_y);
    double first = ceil(fmin(start, start + main) - kSlack), last = floor(fmax(start, start + main) + kSlack);
    if (line.b != 0) {  // rows that it crosses within the volume, and one more on either side
      const double enter = (-1 - line.a) / line.b, leave = (across - line.a) / line.b;
      first = fmax(first, floor(fmin(enter, leave)));
      last = fmin(last, ceil(fmax(enter, leave)));
    } else if (!(line.a > -1 && line.a < across)) {
      last = -1;
    }
    line.first = static_cast<int>(fmin(fmax(first, 0.0), static_cast<double>(n)));
    line.last = static_cast<int>(fmax(fmin(last, n - 1.0), -1.0));
  }
  const bool empty = line.first > line.last;
  lines[l] = line;
  reaches[l] = {static_cast<float>(line.a), static_cast<float>(line.b), empty ? 0 : line.first + 65536 * line.last,
                empty ? -1 : line.axis};
}

// x [nz, ny, nx] into packed [ny, nx, cells]; the zero cells were written before.
template <class T>
__global__ void pack(const T* __restrict__ x, T* __restrict__ packed, Sizes g) {
  __shared__ T tile[32][33];
  const int j0 = blockIdx.x * 32, k0 = blockIdx.z * 32, i = blockIdx.y;
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int z = k0 + k, j = j0 + threadIdx.x;
    if (z < g.nz && j < g.nx) tile[k][threadIdx.x] = x[(static_cast<int64_t>(z) * g.ny + i) * g.nx + j];
  }
  __syncthreads();
  for (int k = threadIdx.y; k < 32; k += 8) {
    const int z = k0 + threadIdx.x, j = j0 + k;
    if (z < g.nz && j < g.nx)
      packed[(static_cast<int64_t>(i) * g.nx + j) * g.cells + z % g.parts * g.width + z / g.parts + kEdge] =
          tile[threadIdx.x][k];
  }
}

__device__ double distance_of(const Line& line, const Row& row, int step) {
  return (line.t0 + line.dt * step - 0.5) * hypot(line.length, row.difference);
}

// Length of a step times the two weights along z, or the bare weights.
template <class T>
__device__ Tap<T> tap_of(const Line& line, const Row& row, int step, int parts, bool with_length) {
  double c = row.base + row.slope * (line.t0 + line.dt * step - 0.5);
  c = fmin(fmax(c, -1e9), 1e9);
  const double k = floor(c), length = with_length ? line.unit * hypot(line.length, row.difference) : 1.0;
  const double q = floor(k / parts);
  const double high = c - k;
  return {static_cast<T>((1 - high) * length), static_cast<T>(high * length), static_cast<int32_t>(q),
          static_cast<int32_t>(k - q * parts)};
}

template <class T>
__device__ Cross<T> cross_of(const Line& line, int step, int across) {
  const double u = line.a + line.b * step, k = floor(u);
  const bool active = step >= line.first && step <= line.last && u > -1 && u < across;
  return {active ? static_cast<int32_t>(k) : -1, active, static_cast<T>(active ? u - k : 0)};
}

template <class T, bool kTof>
__global__ void __launch_bounds__(kThreads, 2)
    forward_lines(const T* __restrict__ packed, T* __restrict__ y, const Line* __restrict__ lines,
                  const Row* __restrict__ rows, const Tile* __restrict__ tiles, Sizes g, Tof tof) {
  using L = Limits<T, kTof, false>;
  __shared__ T cells[kRoom];
  __shared__ Tap<T> taps[kSteps][L::kRows];
  __shared__ T shares[kTof ? kSteps : 1][L::kRows][kTof ? kBins : 1];
  __shared__ Cross<T> crosses[kSteps];
  __shared__ BinSpan spans[L::kRows];
  const Line line = lines[blockIdx.x];
  const Tile tile = tiles[blockIdx.y];
  const int thread = threadIdx.x;
  int mine[L::kEach], at[L::kEach];  // family within the tile, and cells from its plane 0
  T sum[L::kEach] = {};
#pragma unroll
  for (int e = 0; e < L::kEach; ++e) {
    const int plane = tile.plane + thread + e * kThreads;
    int low = 0;
    for (int high = tile.rows; high - low > 1;) {
      const int middle = (low + high) / 2;
      if (rows[tile.row + middle].first <= plane)
        low = middle;
      else
        high = middle;
    }
    const Row row = rows[tile.row + low];
    mine[e] = low;
    at[e] = (plane - row.first) * row.stride;
  }
  const int together = least(kSteps, kRoom / g.cells), across = line.axis ? g.ny : g.nx;
  const int64_t along = static_cast<int64_t>(line.axis ? 1 : g.nx) * g.cells;
  const int64_t aside = static_cast<int64_t>(line.axis ? g.nx : 1) * g.cells;
  const T norm = kTof ? share_norm<T>(tof) : T(1);
  for (int begin = line.first; begin <= line.last; begin += together) {
    const int steps = least(together, line.last + 1 - begin);
    __syncthreads();
    if (thread < steps) crosses[thread] = cross_of<T>(line, begin + thread, across);
    for (int i = thread; i < steps * tile.rows; i += kThreads)
      taps[i / tile.rows][i % tile.rows] =
          tap_of<T>(line, rows[tile.row + i % tile.rows], begin + i / tile.rows, g.parts, false);
    __syncthreads();
    for (int i = thread; i < steps * g.cells; i += kThreads) {
      const int step = i / g.cells, cell = i - step * g.cells;
      const Cross<T> cross = crosses[step];
      T a = 0, b = 0;
      if (cross.active) {
        const T* from = packed + (begin + step) * along + cross.cell * aside + cell;
        if (cross.cell >= 0) a = *from;
        if (cross.cell + 1 < across) b = from[aside];
      }
      cells[i] = fma(cross.fraction, b - a, a);
    }
    if (kTof && thread < tile.rows) {
      const Row row = rows[tile.row + thread];
      const double a = distance_of(line, row, begin), b = distance_of(line, row, begin + steps - 1);
      spans[thread] = bins_near(tof, fmin(a, b), fmax(a, b));
    }
    __syncthreads();
    if constexpr (!kTof) {
#pragma unroll
      for (int e = 0; e < L::kEach; ++e)
        for (int step = 0; step < steps; ++step) {
          const Tap<T> tap = taps[step][mine[e]];
          const int q = most(-kEdge, least(g.deep, tap.q + at[e]));
          const T* from = cells + step * g.cells + tap.residue * g.width + kEdge + q;
          const T* next = from + (tap.residue + 1 < g.parts ? g.width : 1 - tap.residue * g.width);
          sum[e] = fma(tap.low, *from, fma(tap.high, *next, sum[e]));
        }
    } else {
      for (int pass = 0;; ++pass) {
        const bool more = thread < tile.rows && spans[thread].first + pass * kBins <= spans[thread].last;
        if (!__syncthreads_or(more)) break;
        for (int i = thread; i < steps * tile.rows; i += kThreads) {
          const int r = i % tile.rows, step = i / tile.rows, bin = spans[r].first + pass * kBins;
          const double distance = distance_of(line, rows[tile.row + r], begin + step);
          T below = share_below(tof, bin, distance, norm);
          for (int b = 0; b < (kTof ? kBins : 1); ++b) {
            const T above = share_below(tof, bin + b + 1, distance, norm);
            shares[kTof ? step : 0][r][b] = T(0.5) * (above - below);
            below = above;
          }
        }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < L::kEach; ++e) {
          T part[kBins] = {};
          for (int step = 0; step < steps; ++step) {
            const Tap<T> tap = taps[step][mine[e]];
            const int q = most(-kEdge, least(g.deep, tap.q + at[e]));
            const T* from = cells + step * g.cells + tap.residue * g.width + kEdge + q;
            const T* next = from + (tap.residue + 1 < g.parts ? g.width : 1 - tap.residue * g.width);
            const T value = fma(tap.low, *from, tap.high * *next);
#pragma unroll
            for (int b = 0; b < (kTof ? kBins : 1); ++b)
              part[b] = fma(shares[kTof ? step : 0][mine[e]][b], value, part[b]);
          }
          const int plane = thread + e * kThreads, bin = spans[mine[e]].first + pass * kBins;
          const T length = static_cast<T>(line.unit * hypot(line.length, rows[tile.row + mine[e]].difference));
          T* to = y + (static_cast<int64_t>(blockIdx.x) * tof.bins + bin) * g.planes + tile.plane + plane;
          if (plane < tile.planes)
#pragma unroll
            for (int b = 0; b < kBins; ++b)
              if (bin + b <= spans[mine[e]].last) to[b * g.planes] += length * part[b];
        }
      }
    }
  }
  if constexpr (!kTof)
#pragma unroll
    for (int e = 0; e < L::kEach; ++e) {
      const int plane = thread + e * kThreads;
      const double length = line.unit * hypot(line.length, rows[tile.row + mine[e]].difference);
      if (plane < tile.planes) y[blockIdx.x * g.planes + tile.plane + plane] = sum[e] * static_cast<T>(length);
    }
}

// May the line touch the square of columns at (row0, column0)? With a margin for rounding.
__device__ bool touches(const Reach& reach, int row0, int column0) {
  if (reach.axis < 0) return false;
  const int step0 = reach.axis ? column0 : row0, cell0 = reach.axis ? row0 : column0;
  const int first = most(step0, reach.span & 65535), last = least(step0 + kSide - 1, reach.span >> 16);
  if (first > last) return false;
  const float u = reach.a + reach.b * static_cast<float>(first), v = reach.a + reach.b * static_cast<float>(last);
  return fmax(u, v) > static_cast<float>(cell0) - 1.01f && fmin(u, v) < static_cast<float>(cell0 + kSide) + 0.01f;
}

template <class T, bool kTof>
__global__ void __launch_bounds__(kThreads, 2)
    adjoint_columns(const T* __restrict__ y, T* __restrict__ x, const Line* __restrict__ lines,
                    const Reach* __restrict__ reaches, const Row* __restrict__ rows, const Tile* __restrict__ tiles,
                    Sizes g, Tof tof, int squares_x) {
  using L = Limits<T, kTof, true>;
  constexpr int kDepth = sizeof(T) == 4 ? 128 : 32;  // slices of a block
  constexpr int kGroups = kThreads / kDepth, kMine = kSide / kGroups;
  __shared__ T sums[kSide][kSide][kDepth];
  __shared__ T stage[L::kStage];
  __shared__ Tap<T> taps[kSide][L::kRows];
  __shared__ T shares[kTof ? kSide : 1][L::kRows][kTof ? kBins : 1];
  __shared__ Cross<T> crosses[kSide];
  __shared__ int found[kThreads], hits[kWarps];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  const int depth = thread % kDepth, group = thread / kDepth;
  const int row0 = blockIdx.x / squares_x * kSide, column0 = blockIdx.x % squares_x * kSide;
  const int flat = blockIdx.y * kDepth + depth, residue = flat / g.deep, q = flat - residue * g.deep;
  const T norm = kTof ? share_norm<T>(tof) : T(1);
  for (int i = thread; i < kSide * kSide * kDepth; i += kThreads) (&sums[0][0][0])[i] = T(0);
  for (int base = 0; base < g.lines; base += kThreads) {
    const bool hit = base + thread < g.lines && touches(reaches[base + thread], row0, column0);
    const unsigned votes = __ballot_sync(0xffffffffu, hit);
    if (lane == 0) hits[warp] = __popc(votes);
    __syncthreads();
    int place = __popc(votes & ((1u << lane) - 1u)), count = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += hits[w];
      count += hits[w];
    }
    if (hit) found[place] = base + thread;
    __syncthreads();
    for (int n = 0; n < count; ++n) {
      const int64_t index = found[n];
      const Line line = lines[index];
      const int step0 = line.axis ? column0 : row0, cell0 = line.axis ? row0 : column0;
      const int first = most(step0, line.first), last = least(step0 + kSide - 1, line.last);
      if (thread < kSide) {
        Cross<T> cross = cross_of<T>(line, step0 + thread, line.axis ? g.ny : g.nx);
        cross.cell -= cell0;
        cross.active = cross.active && cross.cell >= -1 && cross.cell < kSide;
        crosses[thread] = cross;
      }
      T sum[kMine] = {};
      for (int t = 0; t < g.tiles; ++t) {
        const Tile tile = tiles[t];
        BinSpan span = {0, 0};
        if (kTof) {
          const double a = line.t0 + line.dt * first - 0.5, b = line.t0 + line.dt * last - 0.5;
          const double near = hypot(line.length, tile.nearest), far = hypot(line.length, tile.farthest);
          const double low = fmin(a, b), high = fmax(a, b);
          span = bins_near(tof, low * (low < 0 ? far : near), high * (high < 0 ? near : far));
        }
        for (int bin = span.first; bin <= span.last; bin += kBins) {
          const T* from = y + (index * (kTof ? tof.bins : 1) + bin) * g.planes + tile.plane;
          if (kTof) {
            for (int i = thread; i < kBins * tile.planes; i += kThreads) {
              const int b = i / tile.planes, plane = i - b * tile.planes;
              stage[b * L::kPlanes + plane] = bin + b <= span.last ? from[b * g.planes + plane] : T(0);
            }
          } else {
            for (int i = thread; i < tile.planes; i += kThreads) stage[i] = from[i];
          }
          for (int i = thread; i < kSide * tile.rows; i += kThreads) {
            const int r = i % tile.rows, s = i / tile.rows, step = step0 + s;
            const Row row = rows[tile.row + r];
            if (bin == span.first) taps[s][r] = tap_of<T>(line, row, step, g.parts, true);
            if (kTof) {
              const double distance = distance_of(line, row, step);
              T below = share_below(tof, bin, distance, norm);
              for (int b = 0; b < (kTof ? kBins : 1); ++b) {
                const T above = share_below(tof, bin + b + 1, distance, norm);
                shares[kTof ? s : 0][r][b] = T(0.5) * (above - below);
                below = above;
              }
            }
          }
          __syncthreads();
          for (int r = 0; r < tile.rows; ++r) {
            const Row row = rows[tile.row + r];
            // planes of this family that are staged
            const int begin = most(row.first, tile.plane), end = least(row.first + row.count, tile.plane + tile.planes);
            const int staged = end - begin, offset = begin - tile.plane, skipped = begin - row.first;
#pragma unroll
            for (int k = 0; k < kMine; ++k) {
              const int s = group + k * kGroups;
              if (!crosses[s].active) continue;
              const Tap<T> tap = taps[s][r];
              const int wrapped = tap.residue + 1 == g.parts;
#pragma unroll
              for (int upper = 0; upper < 2; ++upper) {
                const int want = upper ? (wrapped ? 0 : tap.residue + 1) : tap.residue;
                if (want != residue) continue;
                int plane = q - tap.q - (upper ? wrapped : 0);
                if (row.stride != 1) plane = plane >= 0 && plane % row.stride == 0 ? plane / row.stride : -1;
                plane -= skipped;
                if (plane < 0 || plane >= staged) continue;
                T value = stage[offset + plane];
                if (kTof) {
                  value = T(0);
                  for (int b = 0; b < (kTof ? kBins : 1); ++b)
                    value = fma(shares[kTof ? s : 0][r][b], stage[b * L::kPlanes + offset + plane], value);
                }
                sum[k] = fma(upper ? tap.high : tap.low, value, sum[k]);
              }
            }
          }
          __syncthreads();
        }
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kMine; ++k) {
        const int s = group + k * kGroups;
        const Cross<T> cross = crosses[s];
        if (!cross.active) continue;
        const int c = cross.cell;
        if (c >= 0) (line.axis ? sums[c][s] : sums[s][c])[depth] += (T(1) - cross.fraction) * sum[k];
        if (c + 1 < kSide) (line.axis ? sums[c + 1][s] : sums[s][c + 1])[depth] += cross.fraction * sum[k];
      }
      __syncthreads();
    }
  }
  __syncthreads();
  for (int i = thread; i < kSide * kSide * kDepth; i += kThreads) {
    const int column = column0 + i % kSide, row = row0 + i / kSide % kSide, d = i / (kSide * kSide);
    const int place = blockIdx.y * kDepth + d, z = place % g.deep * g.parts + place / g.deep;
    if (place < g.parts * g.deep && z < g.nz && row < g.ny && column < g.nx)
      x[(static_cast<int64_t>(z) * g.ny + row) * g.nx + column] = sums[i / kSide % kSide][i % kSide][d];
  }
}

// --- hosts ----------------------------------------------------------------------------------------------------------

unsigned blocks(int64_t n, int64_t size) { return static_cast<unsigned>((n + size - 1) / size); }
int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// Slices between neighbouring planes of a family; 0 where it has one plane at most, so that any will do.
int64_t stride_of(const FamilyScan& scan, const Family& family) {
  return family.count > 1 ? static_cast<int64_t>(floor(family.step / scan.dz + 0.5)) : 0;
}

Sizes sizes_of(const FamilyScan& scan) {
  int64_t parts = 0;
  for (int64_t f = 0; f < scan.families; ++f) {
    const int64_t stride = stride_of(scan, scan.family[f]);
    if (parts == 0) parts = stride;
    if (stride != 0 && stride != parts) parts = 1;  // no common stride: one piece, and strided reads
  }
  if (parts < 1) parts = 1;
  const int64_t deep = (scan.nz + parts - 1) / parts, width = deep + 2 * kEdge;
  return {scan.planes,
          static_cast<int>(scan.lines),
          0,
          static_cast<int>(scan.nz),
          static_cast<int>(scan.ny),
          static_cast<int>(scan.nx),
          static_cast<int>(parts),
          static_cast<int>(deep),
          static_cast<int>(width),
          static_cast<int>(parts * width)};
}

// Cuts the planes into tiles, in order: next() fills one, or says that there is none left.
class Cutter {
 public:
  Cutter(const FamilyScan& scan, int most_planes, int most_rows)
      : scan_(scan), most_planes_(most_planes), most_rows_(most_rows) {}
  bool next(Tile& tile) {
    while (family_ < scan_.families && used_ == scan_.family[family_].count) {
      ++family_;
      used_ = 0;
    }
    if (family_ == scan_.families) return false;
    tile = {1e300, 0, static_cast<int32_t>(plane_), 0, static_cast<int32_t>(family_), 0};
    for (;;) {
      const Family& family = scan_.family[family_];
      const int64_t left = family.count - used_, room = most_planes_ - tile.planes, take = left < room ? left : room;
      const double difference = fabs(family.difference);
      tile.nearest = difference < tile.nearest ? difference : tile.nearest;
      tile.farthest = difference > tile.farthest ? difference : tile.farthest;
      tile.planes += static_cast<int32_t>(take);
      tile.rows = static_cast<int32_t>(family_ - tile.row + 1);
      plane_ += take;
      used_ += take;
      if (used_ < family.count || family_ + 1 == scan_.families || tile.planes == most_planes_ ||
          tile.rows == most_rows_)
        return true;
      ++family_;
      used_ = 0;
    }
  }

 private:
  const FamilyScan& scan_;
  const int most_planes_, most_rows_;
  int64_t family_ = 0, used_ = 0, plane_ = 0;
};

template <class T, bool kTof, bool kAdjoint>
Cutter cutter_of(const FamilyScan& scan) {
  using L = Limits<T, kTof, kAdjoint>;
  return Cutter(scan, L::kPlanes, L::kRows);
}

template <class T>
int64_t tiles_of(const FamilyScan& scan, bool adjoint) {
  Cutter cutter = scan.bins ? (adjoint ? cutter_of<T, true, true>(scan) : cutter_of<T, true, false>(scan))
                            : (adjoint ? cutter_of<T, false, true>(scan) : cutter_of<T, false, false>(scan));
  int64_t count = 0;
  for (Tile tile; cutter.next(tile);) ++count;
  return count;
}

// Where everything stands in the workspace.
template <class T>
struct Plan {
  Line* lines;
  Reach* reaches;
  Row* rows;
  Tile* tiles;
  T* packed;
  int64_t bytes;
};
template <class T>
Plan<T> plan_of(const FamilyScan& scan, const Sizes& g, int64_t tiles, bool adjoint, void* work) {
  char* base = static_cast<char*>(work);
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at;
    at += aligned(bytes);
    return base ? base + here : nullptr;
  };
  Plan<T> plan = {};
  plan.lines = reinterpret_cast<Line*>(take(scan.lines * static_cast<int64_t>(sizeof(Line))));
  plan.reaches = reinterpret_cast<Reach*>(take(scan.lines * static_cast<int64_t>(sizeof(Reach))));
  plan.rows = reinterpret_cast<Row*>(take(scan.families * static_cast<int64_t>(sizeof(Row))));
  plan.tiles = reinterpret_cast<Tile*>(take(tiles * static_cast<int64_t>(sizeof(Tile))));
  if (!adjoint) plan.packed = reinterpret_cast<T*>(take(scan.ny * scan.nx * g.cells * static_cast<int64_t>(sizeof(T))));
  plan.bytes = at;
  return plan;
}

template <class T>
const char* make_tables(const FamilyScan& scan, const Sizes& g, const double* lines, const Plan<T>& plan, bool adjoint,
                        void* stream) {
  int64_t first = 0;
  for (int64_t f = 0; f < scan.families; f += kPerLaunch) {
    Batch<Row> batch = {};
    int count = 0;
    for (; count < kPerLaunch && f + count < scan.families; ++count) {
      const Family& family = scan.family[f + count];
      batch.item[count] = {family.middle / scan.dz + 0.5 * static_cast<double>(scan.nz - 1),
                           family.difference / scan.dz,
                           family.difference,
                           static_cast<int32_t>(family.count > 1 ? stride_of(scan, family) / g.parts : 1),
                           static_cast<int32_t>(first),
                           static_cast<int32_t>(family.count),
                           0};
      first += family.count;
    }
    if (const char* error = launch(store<Row>, dim3(1), dim3(kPerLaunch), stream, batch, plan.rows + f, count))
      return error;
  }
  Cutter cutter = scan.bins ? (adjoint ? cutter_of<T, true, true>(scan) : cutter_of<T, true, false>(scan))
                            : (adjoint ? cutter_of<T, false, true>(scan) : cutter_of<T, false, false>(scan));
  for (int64_t t = 0; t < g.tiles; t += kPerLaunch) {
    Batch<Tile> batch = {};
    int count = 0;
    while (count < kPerLaunch && cutter.next(batch.item[count])) ++count;
    if (const char* error = launch(store<Tile>, dim3(1), dim3(kPerLaunch), stream, batch, plan.tiles + t, count))
      return error;
  }
  return launch(lines_kernel, dim3(blocks(scan.lines, 128)), dim3(128), stream, lines, plan.lines, plan.reaches,
                scan.lines, g.ny, g.nx, scan.dy, scan.dx);
}

Tof tof_of(const FamilyScan& scan) {
  return {static_cast<int>(scan.bins), scan.bin_mm, scan.sigma_mm, scan.truncation};
}
}  // namespace

template <class T>
const char* joseph3d_sinogram_refuses(const FamilyScan& scan) {
  constexpr int64_t kMost = 32767;
  if (scan.lines >= int64_t{1} << 31 || scan.planes >= int64_t{1} << 30) return "too many lines or planes";
  if (scan.nz > kMost || scan.ny > kMost || scan.nx > kMost) return "a volume of more than 32767 voxels along an axis";
  if (scan.bins > 4096) return "more than 4096 time-of-flight bins";
  for (int64_t f = 0; f < scan.families; ++f) {
    const int64_t stride = stride_of(scan, scan.family[f]);
    if (scan.family[f].count > 1 && (stride < 1 || stride > 256)) return "planes must lie 1 to 256 slices apart";
    if (scan.family[f].count < 0 || scan.family[f].count > scan.planes) return "counts of planes that do not fit";
  }
  if (sizes_of(scan).cells > kRoom) return "more slices than the CUDA kernels take (about 2000)";
  return nullptr;
}

template <class T>
int64_t joseph3d_sinogram_workspace(const FamilyScan& scan, bool adjoint) {
  return plan_of<T>(scan, sizes_of(scan), tiles_of<T>(scan, adjoint), adjoint, nullptr).bytes;
}

template <class T>
const char* joseph3d_sinogram(const T* x, T* y, int64_t images, const FamilyScan& scan, const double* lines, void* work,
                              void* stream) {
  Sizes g = sizes_of(scan);
  g.tiles = static_cast<int>(tiles_of<T>(scan, false));
  const Plan<T> plan = plan_of<T>(scan, g, g.tiles, false, work);
  if (const char* error = make_tables(scan, g, lines, plan, false, stream)) return error;
  const int64_t cells = scan.ny * scan.nx * g.cells, data = scan.lines * scan.planes * (scan.bins ? scan.bins : 1);
  // once: the kernels never write the zero cells
  if (const char* error = fill_zero(plan.packed, static_cast<size_t>(cells) * sizeof(T), stream)) return error;
  if (scan.bins)
    if (const char* error = fill_zero(y, static_cast<size_t>(images * data) * sizeof(T), stream)) return error;
  const dim3 transpose(blocks(g.nx, 32), static_cast<unsigned>(g.ny), blocks(g.nz, 32));
  const dim3 grid(static_cast<unsigned>(scan.lines), static_cast<unsigned>(g.tiles));
  for (int64_t i = 0; i < images; ++i) {
    const T* from = x + i * scan.nz * scan.ny * scan.nx;
    if (const char* error = launch(pack<T>, transpose, dim3(32, 8), stream, from, plan.packed, g)) return error;
    const auto kernel = scan.bins ? forward_lines<T, true> : forward_lines<T, false>;
    if (const char* error = launch(kernel, grid, dim3(kThreads), stream, plan.packed, y + i * data, plan.lines,
                                   plan.rows, plan.tiles, g, tof_of(scan)))
      return error;
  }
  return nullptr;
}

template <class T>
const char* joseph3d_sinogram_adjoint(const T* y, T* x, int64_t images, const FamilyScan& scan, const double* lines,
                                      void* work, void* stream) {
  constexpr int kDepth = sizeof(T) == 4 ? 128 : 32;
  Sizes g = sizes_of(scan);
  g.tiles = static_cast<int>(tiles_of<T>(scan, true));
  const Plan<T> plan = plan_of<T>(scan, g, g.tiles, true, work);
  if (const char* error = make_tables(scan, g, lines, plan, true, stream)) return error;
  const unsigned squares_x = blocks(g.nx, kSide);
  const dim3 grid(squares_x * blocks(g.ny, kSide), blocks(static_cast<int64_t>(g.parts) * g.deep, kDepth));
  const int64_t data = scan.lines * scan.planes * (scan.bins ? scan.bins : 1);
  for (int64_t i = 0; i < images; ++i) {
    const auto kernel = scan.bins ? adjoint_columns<T, true> : adjoint_columns<T, false>;
    if (const char* error =
            launch(kernel, grid, dim3(kThreads), stream, y + i * data, x + i * scan.nz * scan.ny * scan.nx, plan.lines,
                   plan.reaches, plan.rows, plan.tiles, g, tof_of(scan), static_cast<int>(squares_x)))
      return error;
  }
  return nullptr;
}

template int64_t joseph3d_sinogram_workspace<float>(const FamilyScan&, bool);
template int64_t joseph3d_sinogram_workspace<double>(const FamilyScan&, bool);
template const char* joseph3d_sinogram_refuses<float>(const FamilyScan&);
template const char* joseph3d_sinogram_refuses<double>(const FamilyScan&);
template const char* joseph3d_sinogram<float>(const float*, float*, int64_t, const FamilyScan&, const double*, void*,
                                              void*);
template const char* joseph3d_sinogram<double>(const double*, double*, int64_t, const FamilyScan&, const double*, void*,
                                               void*);
template const char* joseph3d_sinogram_adjoint<float>(const float*, float*, int64_t, const FamilyScan&, const double*,
                                                      void*, void*);
template const char* joseph3d_sinogram_adjoint<double>(const double*, double*, int64_t, const FamilyScan&,
                                                       const double*, void*, void*);
}  // namespace cuda
}  // namespace recon3d
