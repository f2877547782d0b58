#include "cpu/joseph3d.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "common.h"
#include "cpu/joseph3d_plan.h"
#include "cpu/lane_plan.h"
#include "cpu/nufft.h"
#include "cpu/radon_plan.h"

namespace recon3d {
namespace {

const LineKernelSet& kernel_set() {
  const int level = lane_level();
  if (level >= 3 && kLinesAvx512) return *kLinesAvx512;
  if (level >= 2 && kLinesAvx2) return *kLinesAvx2;
  return kLinesPortable;
}
template <class T>
const LineKernels<T>& kernels();
template <>
const LineKernels<float>& kernels<float>() {
  return kernel_set().singles;
}
template <>
const LineKernels<double>& kernels<double>() {
  return kernel_set().doubles;
}

// Runs body(item) for every item; a free thread takes the next one. Nothing may depend on who takes what.
template <class F>
void take_turns(const RunRanges& run, int64_t items, const F& body) {
  std::atomic<int64_t> next{0};
  run_ranges(run, std::min<int64_t>(items, run.threads), [&](int64_t, int64_t) {
    for (int64_t i = next++; i < items; i = next++) body(i);
  });
}

// ---- lines that pass near each other, next to each other ------------------------------------------------------------

constexpr int64_t kMostLines = int64_t{1} << 24;  // sorted at a time

int bits_for(double cells, int most) {
  int bits = 0;
  while (bits < most && (int64_t{1} << bits) < cells) ++bits;
  return bits;
}
KeyPlans key_plans(const RayGrid& g, int64_t lines) {
  KeyPlans p{};
  for (int axis = 0; axis < 3; ++axis) {
    KeyPlan& k = p.axis[axis];
    const double planes = static_cast<double>(g.n[axis]), rows = static_cast<double>(g.n[kRowAxis[axis]]) + 2,
                 inner = static_cast<double>(g.n[kInnerAxis[axis]]) + 2;
    k.near = 0.1 * planes;
    k.far = 0.9 * planes;
    // windows of 32 inner positions are one step for the kernels, so cells of 22 waste little
    const double cells = std::min(32.0, std::max(1.0, std::ceil(inner / 22)));
    // sixteen lines in a square of strip by strip, if they fill half of all places, mostly with little slope in z
    const double density = static_cast<double>(lines) / (2 * cells * std::min(cells, 3.0) * 0.5 * rows * rows);
    const double width = std::min(16.0, std::max(0.25, 4 / std::sqrt(density)));
    const double strips = std::min(512.0, std::max(1.0, std::ceil(rows / width)));
    const double places = std::min(1024.0, 8 * strips);
    k.inner_scale = cells / inner;
    k.strip_scale = strips / rows;
    k.place_scale = places / rows;
    k.most_inner = cells - 1;
    k.most_strip = strips - 1;
    k.most_place = places - 1;
    p.inner_bits = std::max(p.inner_bits, bits_for(cells, 5));
    p.strip_bits = std::max(p.strip_bits, bits_for(strips, 9));
    p.place_bits = std::max(p.place_bits, bits_for(places, 10));
  }
  return p;
}
uint32_t cell(double at, double scale, double most) {
  const double c = (at + 1) * scale;
  return static_cast<uint32_t>(c > 0 ? (c < most ? c : most) : 0);
}

struct Order {
  std::vector<uint32_t> line;
  int64_t base = -1, begin[5] = {0, 0, 0, 0, 0};  // of the three axes and of the lines that meet nothing; and the end
};

// Stable, by the lowest `bits` of the upper half of each entry.
void radix_sort(uint64_t*& from, uint64_t*& to, int64_t n, int bits, const RunRanges& run) {
  const int passes = (bits + 10) / 11, digit = passes ? (bits + passes - 1) / passes : 0;
  const int64_t buckets = int64_t{1} << digit, pieces = std::max(1, run.threads);
  std::vector<int64_t> count(static_cast<size_t>(pieces * buckets));
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 + pass * digit;
    const uint64_t mask = static_cast<uint64_t>(buckets - 1);
    run_ranges(run, pieces, [&](int64_t b, int64_t e) {
      for (int64_t p = b; p < e; ++p) {
        int64_t* c = count.data() + p * buckets;
        std::fill(c, c + buckets, 0);
        for (int64_t i = n * p / pieces; i < n * (p + 1) / pieces; ++i) ++c[(from[i] >> shift) & mask];
      }
    });
    int64_t sum = 0;
    for (int64_t d = 0; d < buckets; ++d)
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t here = count[p * buckets + d];
        count[p * buckets + d] = sum;
        sum += here;
      }
    run_ranges(run, pieces, [&](int64_t b, int64_t e) {
      for (int64_t p = b; p < e; ++p) {
        int64_t* c = count.data() + p * buckets;
        for (int64_t i = n * p / pieces; i < n * (p + 1) / pieces; ++i) to[c[(from[i] >> shift) & mask]++] = from[i];
      }
    });
    std::swap(from, to);
  }
}

void make_order(const Lines& lines, int64_t base, int64_t n, const RunRanges& run, Order& out) {
  if (out.base == base) return;
  const KeyPlans plans = key_plans(lines.grid, n);
  const int bits = plans.bits();
  const auto keys = kernel_set().keys;
  const NufftScratch first(static_cast<size_t>(n) * 8), second(static_cast<size_t>(n) * 8);
  uint64_t *from = first.as<uint64_t>(), *to = second.as<uint64_t>();
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  run_ranges(run, pieces, [&](int64_t b, int64_t e) {
    uint32_t some[kPiece];
    for (int64_t i = b * kPiece; i < std::min(n, e * kPiece); i += kPiece) {
      const int64_t count = std::min(kPiece, n - i);
      keys(lines, plans, base + i, base + i + count, some);
      for (int64_t k = 0; k < count; ++k)
        from[i + k] = (static_cast<uint64_t>(some[k]) << 32) | static_cast<uint64_t>(i + k);
    }
  });
  radix_sort(from, to, n, bits + 2, run);
  out.base = base;
  out.line.resize(static_cast<size_t>(n));
  run_ranges(run, pieces, [&](int64_t b, int64_t e) {
    for (int64_t i = b * kPiece; i < std::min(n, e * kPiece); ++i) out.line[i] = static_cast<uint32_t>(from[i]);
  });
  for (int axis = 0; axis <= 4; ++axis)
    out.begin[axis] = std::lower_bound(from, from + n, static_cast<uint64_t>(axis) << (32 + bits)) - from;
}

// ---- bordered volumes -----------------------------------------------------------------------------------------------

// The volume with a border in the two layouts: [y][x][z] for main axes y and x, [z][y][x] for z. Each is made when a
// line needs it.
template <class T>
class Layouts {
 public:
  explicit Layouts(const RayGrid& g) : g_(g) {}
  ~Layouts() {
    delete memory_[0];
    delete memory_[1];
  }
  Layouts(const Layouts&) = delete;
  Layouts& operator=(const Layouts&) = delete;

  bool has(int axis) const { return memory_[axis == 0]; }
  // New ones are zero.
  void make(int axis, const RunRanges& run) {
    if (has(axis)) return;
    const int which = axis == 0;
    memory_[which] = new NufftScratch(static_cast<size_t>(elements(which)) * sizeof(T));
    clear(which, run);
  }
  void clear(int which, const RunRanges& run) {
    constexpr int64_t kPiece = int64_t{1} << 18;
    T* p = memory_[which]->template as<T>();
    const int64_t n = elements(which);
    run_ranges(run, (n + kPiece - 1) / kPiece, [&](int64_t b, int64_t e) {
      std::memset(p + b * kPiece, 0, sizeof(T) * static_cast<size_t>(std::min(n, e * kPiece) - b * kPiece));
    });
  }
  Bordered<T> view(int axis) const {
    Bordered<T> v;
    const int64_t line = stride(axis == 0), sheet = line * (g_.n[2] + 2);
    v.planes = static_cast<int>(g_.n[axis]);
    v.rows = static_cast<int>(g_.n[kRowAxis[axis]]);
    v.inner = static_cast<int>(g_.n[kInnerAxis[axis]]);
    if (axis == 0) {  // [z][y + 2][x + 2]
      v.plane = line * (g_.n[1] + 2);
      v.row = line;
      v.origin = memory_[1]->template as<T>() + line + 1;
    } else {  // [y + 2][x + 2][z + 2]
      v.plane = axis == 1 ? sheet : line;
      v.row = axis == 1 ? line : sheet;
      v.origin = memory_[0]->template as<T>() + sheet + line + 1;
    }
    return v;
  }
  // Copies the volume in; the border stays.
  void fill(int axis, const T* x, const RunRanges& run) {
    const Bordered<T> v = view(axis);
    const int64_t nz = g_.n[0], ny = g_.n[1], nx = g_.n[2];
    if (axis == 0) {
      run_ranges(run, nz, [&](int64_t b, int64_t e) {
        for (int64_t k = b; k < e; ++k)
          for (int64_t j = 0; j < ny; ++j)
            std::memcpy(v.origin + k * v.plane + j * v.row, x + (k * ny + j) * nx, sizeof(T) * static_cast<size_t>(nx));
      });
      return;
    }
    const Bordered<T> w = view(1);
    turn(run,
         [&](int64_t j, int64_t i, int64_t k) { w.origin[j * w.plane + i * w.row + k] = x[(k * ny + j) * nx + i]; });
  }
  // x = the sum of the layouts that exist.
  void gather(T* x, const RunRanges& run) {
    const int64_t nz = g_.n[0], ny = g_.n[1], nx = g_.n[2];
    if (has(1)) {
      const Bordered<T> w = view(1);
      turn(run,
           [&](int64_t j, int64_t i, int64_t k) { x[(k * ny + j) * nx + i] = w.origin[j * w.plane + i * w.row + k]; });
    } else {
      std::memset(x, 0, sizeof(T) * static_cast<size_t>(nz * ny * nx));
    }
    if (!has(0)) return;
    const Bordered<T> v = view(0);
    run_ranges(run, nz, [&](int64_t b, int64_t e) {
      for (int64_t k = b; k < e; ++k)
        for (int64_t j = 0; j < ny; ++j)
          for (int64_t i = 0; i < nx; ++i) x[(k * ny + j) * nx + i] += v.origin[k * v.plane + j * v.row + i];
    });
  }

 private:
  // lines of 16 elements land on one set of a cache again and again: an odd number of them does not
  int64_t stride(int which) const {
    const int64_t n = g_.n[which ? 2 : 0] + 2;
    return n % 16 ? n : n + 1;
  }
  int64_t elements(int which) const {
    const int64_t line = stride(which);
    return (which ? g_.n[0] * (g_.n[1] + 2) : (g_.n[1] + 2) * (g_.n[2] + 2)) * line + line + 2 + kReach;
  }
  // f(y, x, z) for all voxels, in tiles that suit both orders.
  template <class F>
  void turn(const RunRanges& run, const F& f) {
    constexpr int64_t kTile = 16;
    const int64_t nz = g_.n[0], ny = g_.n[1], nx = g_.n[2];
    run_ranges(run, ny, [&](int64_t b, int64_t e) {
      for (int64_t j = b; j < e; ++j)
        for (int64_t i0 = 0; i0 < nx; i0 += kTile)
          for (int64_t k0 = 0; k0 < nz; k0 += kTile)
            for (int64_t i = i0; i < std::min(nx, i0 + kTile); ++i)
              for (int64_t k = k0; k < std::min(nz, k0 + kTile); ++k) f(j, i, k);
    });
  }

  RayGrid g_;
  NufftScratch* memory_[2] = {nullptr, nullptr};
};

template <class T>
LineJob<T> make_job(const Lines& lines) {
  LineJob<T> job{};
  job.lines = lines;
  if (lines.tof.bins) {
    job.curve = tof_curve<T>(lines.tof.truncation);
    job.reach = 0.5 * lines.tof.bin_mm + lines.tof.truncation * lines.tof.sigma_mm;
  }
  return job;
}

template <class T>
void forward(const T* x, T* y, int64_t volumes, const Lines& lines, const RunRanges& run) {
  const LineKernels<T>& k = kernels<T>();
  const int64_t voxels = lines.grid.n[0] * lines.grid.n[1] * lines.grid.n[2], values = lines.values();
  wish_large_pages(y, sizeof(T) * static_cast<size_t>(volumes * lines.n * values));  // written here and there
  LineJob<T> job = make_job<T>(lines);
  Order order;
  Layouts<T> layouts(lines.grid);
  for (int64_t volume = 0; volume < volumes; ++volume) {
    bool filled[2] = {false, false};
    T* out = y + volume * lines.n * values;
    for (int64_t base = 0; base < lines.n; base += kMostLines) {
      make_order(lines, base, std::min(kMostLines, lines.n - base), run, order);
      job.order = order.line.data();
      job.base = base;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t begin = order.begin[axis], end = order.begin[axis + 1];
        if (begin == end) continue;
        layouts.make(axis, run);
        if (!filled[axis == 0]) layouts.fill(axis, x + volume * voxels, run);
        filled[axis == 0] = true;
        job.volume[axis] = layouts.view(axis);
        constexpr int64_t kPiece = 4096;
        take_turns(run, (end - begin + kPiece - 1) / kPiece, [&](int64_t piece) {
          k.forward(job, axis, begin + piece * kPiece, std::min(end, begin + (piece + 1) * kPiece), out);
        });
      }
      for (int64_t i = order.begin[kNoAxis]; i < order.begin[kNoAxis + 1]; ++i)
        std::memset(out + (base + order.line[i]) * values, 0, sizeof(T) * static_cast<size_t>(values));
    }
  }
}

// Boundaries of `slabs` runs of planes that hold about equally many crossings, from a sample of the lines.
template <class T>
std::vector<int> balance(const LineJob<T>& job, int axis, int64_t begin, int64_t end, int slabs) {
  const int planes = job.volume[axis].planes;
  std::vector<int64_t> crossings(static_cast<size_t>(planes) + 1);
  for (int64_t i = begin; i < end; i += 61) {
    int64_t line;
    double centre;
    const Ray r = ray_at(job, i, &line, &centre);
    if (r.first > r.last) continue;
    crossings[r.first] += 1;
    crossings[r.last + 1] -= 1;
  }
  int64_t here = 0, total = 0;
  for (int j = 0; j < planes; ++j) {
    here += crossings[j];
    total += crossings[j] = here + 1;
  }
  std::vector<int> bounds{0};
  int64_t sum = 0;
  for (int j = 0; j < planes && static_cast<int>(bounds.size()) < slabs; ++j) {
    sum += crossings[j];
    if (sum * slabs >= total * static_cast<int64_t>(bounds.size()) && j + 1 < planes) bounds.push_back(j + 1);
  }
  bounds.push_back(planes);
  return bounds;
}

template <class T>
void adjoint(const T* y, T* x, int64_t volumes, const Lines& lines, const RunRanges& run) {
  const LineKernels<T>& k = kernels<T>();
  const int64_t voxels = lines.grid.n[0] * lines.grid.n[1] * lines.grid.n[2], values = lines.values();
  LineJob<T> job = make_job<T>(lines);
  Order order;
  Layouts<T> layouts(lines.grid);
  for (int64_t volume = 0; volume < volumes; ++volume) {
    for (int which = 0; which < 2; ++which)
      if (layouts.has(which ? 0 : 1)) layouts.clear(which, run);
    for (int64_t base = 0; base < lines.n; base += kMostLines) {
      make_order(lines, base, std::min(kMostLines, lines.n - base), run, order);
      job.order = order.line.data();
      job.base = base;
      for (int axis = 0; axis < 3; ++axis) {
        const int64_t begin = order.begin[axis], end = order.begin[axis + 1];
        if (begin == end) continue;
        layouts.make(axis, run);
        job.volume[axis] = layouts.view(axis);
        // a slab belongs to one thread, which adds the lines in their order: every plane gets the same sums however
        // many slabs there are
        const std::vector<int> bounds = balance(job, axis, begin, end, run.threads);
        take_turns(run, static_cast<int64_t>(bounds.size()) - 1, [&](int64_t s) {
          k.adjoint(job, axis, begin, end, bounds[s], bounds[s + 1], y + volume * lines.n * values);
        });
      }
    }
    layouts.gather(x + volume * voxels, run);
  }
}
}  // namespace

void line_keys(const Lines& lines, const KeyPlans& plans, int64_t begin, int64_t end, uint32_t* keys) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t* pair = lines.pairs + 2 * i;
    const Ray r = make_ray(lines.points + 3 * static_cast<int64_t>(pair[0]),
                           lines.points + 3 * static_cast<int64_t>(pair[1]), lines.grid);
    const KeyPlan& k = plans.axis[r.axis];
    const uint32_t strip = cell(r.a + r.b * k.near, k.strip_scale, k.most_strip),
                   place = cell(r.a + r.b * k.far, k.place_scale, k.most_place);
    uint32_t key = r.first > r.last ? kNoAxis : static_cast<uint32_t>(r.axis);
    key = (key << plans.inner_bits) | cell(r.c + r.e * k.near, k.inner_scale, k.most_inner);
    key = (key << plans.inner_bits) | cell(r.c + r.e * k.far, k.inner_scale, k.most_inner);
    key = (key << plans.strip_bits) | strip;
    keys[i - begin] = (key << plans.place_bits) | (strip & 1 ? static_cast<uint32_t>(k.most_place) - place : place);
  }
}

void joseph3d_cpu(const float* x, float* y, int64_t volumes, const Lines& lines, const RunRanges& run) {
  forward(x, y, volumes, lines, run);
}
void joseph3d_cpu(const double* x, double* y, int64_t volumes, const Lines& lines, const RunRanges& run) {
  forward(x, y, volumes, lines, run);
}
void joseph3d_adjoint_cpu(const float* y, float* x, int64_t volumes, const Lines& lines, const RunRanges& run) {
  adjoint(y, x, volumes, lines, run);
}
void joseph3d_adjoint_cpu(const double* y, double* x, int64_t volumes, const Lines& lines, const RunRanges& run) {
  adjoint(y, x, volumes, lines, run);
}

}  // namespace recon3d
