#include "cpu/radon.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "common.h"
#include "cpu/radon_plan.h"

namespace recon3d {

// ---- scratch memory -------------------------------------------------------------------------------------------------

namespace {
constexpr size_t kKeep = size_t{64} << 20;  // fresh pages cost more than the smaller transforms themselves
struct Pool {
  struct Block {
    void* memory;
    size_t bytes;
  };
  std::mutex lock;
  std::vector<Block> blocks;
  size_t kept = 0;
};
Pool& pool() {
  static Pool* one = new Pool;  // never destroyed: threads may outlive static objects
  return *one;
}
}  // namespace

Scratch::Scratch(size_t bytes) : block_(nullptr), bytes_((bytes + 4095) / 4096 * 4096) {
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    auto best = p.blocks.end();
    for (auto b = p.blocks.begin(); b != p.blocks.end(); ++b)
      if (b->bytes >= bytes_ && b->bytes / 2 <= bytes_ && (best == p.blocks.end() || b->bytes < best->bytes)) best = b;
    if (best != p.blocks.end()) {
      block_ = best->memory;
      bytes_ = best->bytes;
      p.kept -= bytes_;
      p.blocks.erase(best);
      return;
    }
  }
  block_ = std::aligned_alloc(4096, bytes_ ? bytes_ : 4096);
  if (!block_) throw std::bad_alloc();
}

Scratch::~Scratch() {
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    while (!p.blocks.empty() && p.kept + bytes_ > kKeep && bytes_ <= kKeep) {  // oldest first
      p.kept -= p.blocks.front().bytes;
      std::free(p.blocks.front().memory);
      p.blocks.erase(p.blocks.begin());
    }
    if (p.kept + bytes_ <= kKeep) {
      p.blocks.push_back({block_, bytes_});
      p.kept += bytes_;
      return;
    }
  }
  std::free(block_);
}

// ---- the scan as segments -------------------------------------------------------------------------------------------

namespace {
// as in the reference: a ray at 45 degrees steps over rows, whatever the last bit of the cosine
constexpr double kTie = 1.0 - 1e-9;

struct Scan {
  std::vector<double> cosine, sine;
  std::vector<Segment> segments[2];
  RadonPlan plan;
};

// Whether ray r of a view steps over columns.
bool over_columns(const RadonScan& s, double cosine, double sine, int64_t r) {
  double p = cosine, w = sine;
  if (s.sod > 0) {
    const double q = ((static_cast<double>(r) - 0.5 * (static_cast<double>(s.cells) - 1)) * s.pitch + s.offset) / s.sdd;
    p = cosine - q * sine;
    w = sine + q * cosine;
  }
  return std::abs(p * s.dx) < std::abs(w * s.dy) * kTie;
}

void add_view(Scan& out, int64_t view) {
  const RadonScan& s = out.plan.scan;
  const double cosine = out.cosine[view], sine = out.sine[view];
  const int cells = static_cast<int>(s.cells);
  if (!(s.sod > 0)) {
    const bool columns = over_columns(s, cosine, sine, 0);
    const double main = columns ? sine * s.dy : cosine * s.dx, cross = columns ? cosine * s.dx : sine * s.dy;
    const double centre = 0.5 * (out.plan.across(columns) - 1), middle = 0.5 * (out.plan.steps(columns) - 1);
    const double d = s.pitch / main, beta = -cross / main;
    const double alpha = (s.offset - 0.5 * (cells - 1) * s.pitch) / main + centre - beta * middle;
    out.segments[columns].push_back({view, 0, cells, alpha, d, beta, s.dx * s.dy / std::abs(main)});
    return;
  }
  // the axis changes where a ray is equally steep both ways: at two positions of an endless detector
  std::vector<int64_t> cuts{0, s.cells};
  for (const double sign : {1.0, -1.0}) {
    const double q = (cosine * s.dx + sign * sine * s.dy) / (sine * s.dx - sign * cosine * s.dy);
    const double at = (q * s.sdd - s.offset) / s.pitch + 0.5 * (static_cast<double>(s.cells) - 1);
    if (!(at > -3 && at < static_cast<double>(s.cells) + 3)) continue;
    const int64_t near = static_cast<int64_t>(std::floor(at));
    for (int64_t r = std::max<int64_t>(1, near - 1); r <= std::min(s.cells - 1, near + 2); ++r)
      if (over_columns(s, cosine, sine, r) != over_columns(s, cosine, sine, r - 1)) cuts.push_back(r);
  }
  std::sort(cuts.begin(), cuts.end());
  for (size_t i = 0; i + 1 < cuts.size(); ++i)
    if (cuts[i] < cuts[i + 1])
      out.segments[over_columns(s, cosine, sine, cuts[i])].push_back(
          {view, static_cast<int>(cuts[i]), static_cast<int>(cuts[i + 1]), 0, 0, 0, 0});
}

void make_plan(const RadonScan& scan, Scan& out) {
  out.plan.scan = scan;
  out.plan.fan = scan.sod > 0;
  out.cosine.resize(scan.views);
  out.sine.resize(scan.views);
  for (int64_t v = 0; v < scan.views; ++v) {
    out.cosine[v] = std::cos(scan.angles[v]);
    out.sine[v] = std::sin(scan.angles[v]);
    add_view(out, v);
  }
  for (int axis = 0; axis < 2; ++axis) {
    out.plan.segments[axis] = out.segments[axis].data();
    out.plan.count[axis] = static_cast<int64_t>(out.segments[axis].size());
  }
  out.plan.cosine = out.cosine.data();
  out.plan.sine = out.sine.data();
}

// The kernels for this processor. RECON3D_ISA = portable | avx2 | avx512 asks for less; what is missing falls back.
const RadonKernels& kernels() {
  const char* asked = std::getenv("RECON3D_ISA");
  const int most = !asked || !std::strcmp(asked, "avx512") ? 3 : (!std::strcmp(asked, "avx2") ? 2 : 0);
#ifdef RECON3D_X86_LEVELS
  if (most >= 3 && kRadonAvx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return *kRadonAvx512;
  if (most >= 2 && kRadonAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return *kRadonAvx2;
#else
  (void)most;
#endif
  return kRadonPortable;
}

// ---- float64: plain loops, exact in order ---------------------------------------------------------------------------

struct Line {
  double alpha, beta, length;
};
Line line(const RadonPlan& plan, const Segment& s, int axis, int r) {
  if (!plan.fan) return {s.alpha + s.d * r, s.beta, s.length};
  const RadonScan& g = plan.scan;
  const double q = ((r - 0.5 * (static_cast<double>(g.cells) - 1)) * g.pitch + g.offset) / g.sdd;
  const double p = (plan.cosine[s.view] - q * plan.sine[s.view]) * g.dx,
               w = (plan.sine[s.view] + q * plan.cosine[s.view]) * g.dy;
  const double main = axis ? w : p, beta = -(axis ? p : w) / main;
  return {q * g.sod / main + 0.5 * (plan.across(axis) - 1) - beta * 0.5 * (plan.steps(axis) - 1), beta,
          g.dx * g.dy * std::sqrt(1 + q * q) / std::abs(main)};
}

template <class Add>
void walk(const Line& l, int first, int last, int n, const Add& add) {
  for (int i = first; i < last; ++i) {
    const double u = std::min(std::max(l.alpha + l.beta * i, -1.0), static_cast<double>(n));
    const double whole = std::floor(u);
    add(i, static_cast<int>(whole), u - whole);
  }
}

void joseph_forward(const RadonPlan& plan, const double* x, double* y, int64_t slices, const RunRanges& run) {
  const RadonScan& g = plan.scan;
  for (int axis = 0; axis < 2; ++axis) {
    const int steps = plan.steps(axis), n = plan.across(axis);
    const int64_t along = axis ? 1 : g.nx, across = axis ? g.nx : 1;
    run_ranges(run, slices * plan.count[axis], [&](int64_t b, int64_t e) {
      for (int64_t item = b; item < e; ++item) {
        const Segment& s = plan.segments[axis][item % plan.count[axis]];
        const double* image = x + item / plan.count[axis] * g.ny * g.nx;
        double* out = y + (item / plan.count[axis] * g.views + s.view) * g.cells;
        for (int r = s.first; r < s.last; ++r) {
          const Line l = line(plan, s, axis, r);
          double sum = 0;
          walk(l, 0, steps, n, [&](int i, int k, double w) {
            const double* p = image + i * along;
            if (k >= 0 && k < n) sum += (1 - w) * p[k * across];
            if (k + 1 >= 0 && k + 1 < n) sum += w * p[(k + 1) * across];
          });
          out[r] = sum * l.length;
        }
      }
    });
  }
}

void joseph_adjoint(const RadonPlan& plan, const double* y, double* x, int64_t slices, const RunRanges& run) {
  const RadonScan& g = plan.scan;
  std::memset(x, 0, sizeof(double) * static_cast<size_t>(slices * g.ny * g.nx));
  constexpr int kBand = 16;  // steps that one range owns, and alone adds to
  for (int axis = 0; axis < 2; ++axis) {
    const int steps = plan.steps(axis), n = plan.across(axis), bands = (steps + kBand - 1) / kBand;
    const int64_t along = axis ? 1 : g.nx, across = axis ? g.nx : 1;
    run_ranges(run, slices * bands, [&](int64_t b, int64_t e) {
      for (int64_t item = b; item < e; ++item) {
        double* image = x + item / bands * g.ny * g.nx;
        const double* data = y + item / bands * g.views * g.cells;
        const int first = static_cast<int>(item % bands) * kBand, last = std::min(steps, first + kBand);
        for (int64_t c = 0; c < plan.count[axis]; ++c) {
          const Segment& s = plan.segments[axis][c];
          for (int r = s.first; r < s.last; ++r) {
            const Line l = line(plan, s, axis, r);
            const double value = data[s.view * g.cells + r] * l.length;
            walk(l, first, last, n, [&](int i, int k, double w) {
              double* p = image + i * along;
              if (k >= 0 && k < n) p[k * across] += (1 - w) * value;
              if (k + 1 >= 0 && k + 1 < n) p[(k + 1) * across] += w * value;
            });
          }
        }
      }
    });
  }
}

// A view as shifts of its steps onto the unit-slope grid and a cubic resampling of their sum.
struct Shear {
  int64_t left, size;      // grid cell m lies at cell m + left of the middle step
  std::vector<int> whole;  // shift of every step: whole + fraction
  std::vector<double> fraction;
  std::vector<int64_t> node;   // of every ray: first of four grid cells
  std::vector<double> weight;  // and their weights, step length included
};
Shear make_shear(const RadonPlan& plan, int axis, const Segment& s) {
  const int steps = plan.steps(axis), n = plan.across(axis);
  Shear v;
  v.whole.resize(steps);
  v.fraction.resize(steps);
  for (int i = 0; i < steps; ++i) {
    const double shift = (i - 0.5 * (steps - 1)) * s.beta, whole = std::floor(shift);
    v.whole[i] = static_cast<int>(whole);
    v.fraction[i] = shift - whole;
  }
  v.left = -std::max(v.whole.front(), v.whole.back()) - 1;
  v.size = n - std::min(v.whole.front(), v.whole.back()) - v.left;
  v.node.resize(plan.scan.cells);
  v.weight.resize(4 * plan.scan.cells);
  const double middle = s.alpha + s.beta * 0.5 * (steps - 1) - static_cast<double>(v.left);
  for (int64_t r = 0; r < plan.scan.cells; ++r) {
    const double at = std::min(std::max(middle + s.d * static_cast<double>(r), -4.0), static_cast<double>(v.size) + 4);
    const double first = std::floor(at), t = at - first, t2 = t * t, t3 = t2 * t, h = 0.5 * s.length;
    v.node[r] = static_cast<int64_t>(first) - 1;
    v.weight[4 * r] = h * (-t + 2 * t2 - t3);
    v.weight[4 * r + 1] = h * (2 - 5 * t2 + 3 * t3);
    v.weight[4 * r + 2] = h * (t + 4 * t2 - 3 * t3);
    v.weight[4 * r + 3] = h * (-t2 + t3);
  }
  return v;
}

void shear_forward(const RadonPlan& plan, const double* x, double* y, int64_t slices, const RunRanges& run) {
  const RadonScan& g = plan.scan;
  for (int axis = 0; axis < 2; ++axis) {
    const int steps = plan.steps(axis), n = plan.across(axis);
    const int64_t along = axis ? 1 : g.nx, across = axis ? g.nx : 1;
    run_ranges(run, plan.count[axis], [&](int64_t b, int64_t e) {
      for (int64_t c = b; c < e; ++c) {
        const Segment& s = plan.segments[axis][c];
        const Shear v = make_shear(plan, axis, s);
        std::vector<double> sum(v.size);
        for (int64_t k = 0; k < slices; ++k) {
          std::fill(sum.begin(), sum.end(), 0.0);
          for (int i = 0; i < steps; ++i) {
            const double* row = x + k * g.ny * g.nx + i * along;
            const double w = v.fraction[i];
            double* to = sum.data() - v.left - v.whole[i];
            for (int j = 0; j < n; ++j) {
              to[j - 1] += w * row[j * across];
              to[j] += (1 - w) * row[j * across];
            }
          }
          for (int64_t r = 0; r < g.cells; ++r) {
            double total = 0;
            for (int64_t t = 0; t < 4; ++t)
              if (v.node[r] + t >= 0 && v.node[r] + t < v.size) total += v.weight[4 * r + t] * sum[v.node[r] + t];
            y[(k * g.views + s.view) * g.cells + r] = total;
          }
        }
      }
    });
  }
}

void shear_adjoint(const RadonPlan& plan, const double* y, double* x, int64_t slices, const RunRanges& run) {
  const RadonScan& g = plan.scan;
  std::memset(x, 0, sizeof(double) * static_cast<size_t>(slices * g.ny * g.nx));
  for (int axis = 0; axis < 2; ++axis) {
    const int steps = plan.steps(axis), n = plan.across(axis);
    const int64_t along = axis ? 1 : g.nx, across = axis ? g.nx : 1;
    run_ranges(run, slices, [&](int64_t b, int64_t e) {
      for (int64_t k = b; k < e; ++k)
        for (int64_t c = 0; c < plan.count[axis]; ++c) {
          const Segment& s = plan.segments[axis][c];
          const Shear v = make_shear(plan, axis, s);
          std::vector<double> sum(v.size);
          for (int64_t r = 0; r < g.cells; ++r)
            for (int64_t t = 0; t < 4; ++t)
              if (v.node[r] + t >= 0 && v.node[r] + t < v.size)
                sum[v.node[r] + t] += v.weight[4 * r + t] * y[(k * g.views + s.view) * g.cells + r];
          for (int i = 0; i < steps; ++i) {
            double* row = x + k * g.ny * g.nx + i * along;
            const double w = v.fraction[i];
            const double* from = sum.data() - v.left - v.whole[i];
            for (int j = 0; j < n; ++j) row[j * across] += w * from[j - 1] + (1 - w) * from[j];
          }
        }
    });
  }
}
}  // namespace

void radon_cpu(const float* x, float* y, int64_t slices, const RadonScan& scan, int method, const RunRanges& run) {
  Scan s;
  make_plan(scan, s);
  const RadonKernels& k = kernels();
  (method == kShear ? k.shear_forward : k.forward)(s.plan, x, y, slices, run);
}
void radon_adjoint_cpu(const float* y, float* x, int64_t slices, const RadonScan& scan, int method,
                       const RunRanges& run) {
  Scan s;
  make_plan(scan, s);
  const RadonKernels& k = kernels();
  (method == kShear ? k.shear_adjoint : k.adjoint)(s.plan, y, x, slices, run);
}
void radon_cpu(const double* x, double* y, int64_t slices, const RadonScan& scan, int method, const RunRanges& run) {
  Scan s;
  make_plan(scan, s);
  (method == kShear ? shear_forward : joseph_forward)(s.plan, x, y, slices, run);
}
void radon_adjoint_cpu(const double* y, double* x, int64_t slices, const RadonScan& scan, int method,
                       const RunRanges& run) {
  Scan s;
  make_plan(scan, s);
  (method == kShear ? shear_adjoint : joseph_adjoint)(s.plan, y, x, slices, run);
}

}  // namespace recon3d
