#include "cpu/joseph3d_sinogram.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common.h"
#include "cpu/joseph3d_sinogram_plan.h"

namespace recon3d {

int64_t WorkQueue::take() {
  const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
  return i < n_ ? i : -1;
}

namespace {
const SinogramKernelSet& kernel_set() {
  const int level = lane_level();
  if (level >= 3 && kSinogramAvx512) return *kSinogramAvx512;
  if (level >= 2 && kSinogramAvx2) return *kSinogramAvx2;
  return kSinogramPortable;
}
template <class T>
const SinogramKernels<T>& kernels();
template <>
const SinogramKernels<float>& kernels<float>() {
  return kernel_set().singles;
}
template <>
const SinogramKernels<double>& kernels<double>() {
  return kernel_set().doubles;
}

constexpr double kFar = 1 << 28;  // voxels; nothing so far from the volume meets it

std::vector<SinogramLine> clip_lines(const Sinogram& s) {
  std::vector<SinogramLine> lines;
  lines.reserve(s.line_count);
  for (int64_t l = 0; l < s.line_count; ++l) {
    const double* e = s.lines + 4 * l;
    const double p0[3] = {0, e[0], e[1]}, p1[3] = {0, e[2], e[3]};
    const Ray r = make_ray(p0, p1, s.grid);
    lines.push_back({r.axis, r.first, r.last, r.a, r.b, r.t0 - 0.5, r.dt, r.length, r.step});
  }
  return lines;
}

struct Pieces {
  std::vector<std::vector<SinogramPiece>> pieces;
  std::vector<SinogramGroup> groups;
};
Pieces cut_segments(const Sinogram& s, int most) {
  Pieces p;
  int64_t plane = 0;
  for (int64_t g = 0; g < s.segment_count; ++g) {
    const double* row = s.segments + 4 * g;
    const int64_t count = static_cast<int64_t>(row[3]);
    const int step = count > 1 ? static_cast<int>(std::lround(row[2] / s.grid.spacing[0])) : 1;
    const double middle = row[0] / s.grid.spacing[0] + 0.5 * (static_cast<double>(s.grid.n[0]) - 1);
    const double low = std::floor(middle);
    size_t at = 0;
    while (at < p.groups.size() && p.groups[at].step != step && count > 1) ++at;
    if (count && at == p.groups.size()) {
      p.groups.push_back({step, nullptr, 0});
      p.pieces.emplace_back();
    }
    for (int64_t first = 0; first < count; first += most) {
      const double start = std::min(std::max(low + static_cast<double>(first) * step, -kFar), kFar);
      p.pieces[at].push_back({plane + first, static_cast<int>(std::min<int64_t>(most, count - first)),
                              static_cast<int32_t>(start), middle - low, row[1] / s.grid.spacing[0], row[1] * row[1]});
    }
    plane += count;
  }
  for (size_t at = 0; at < p.groups.size(); ++at) {
    p.groups[at].pieces = p.pieces[at].data();
    p.groups[at].count = static_cast<int64_t>(p.pieces[at].size());
  }
  return p;
}

template <class T>
void project(const T* from, T* to, int64_t volumes, const Sinogram& s, bool adjoint, const RunRanges& run) {
  const SinogramKernels<T>& k = kernels<T>();
  const std::vector<SinogramLine> lines = clip_lines(s);
  const Pieces p = cut_segments(s, s.tof.bins ? k.tof : k.plain);
  SinogramPlan<T> plan{s.grid,
                       lines.data(),
                       s.line_count,
                       p.groups.data(),
                       static_cast<int64_t>(p.groups.size()),
                       s.planes,
                       s.tof,
                       s.tof.bins ? tof_curve<T>(s.tof.truncation) : TofCurve<T>()};
  const int64_t volume = s.grid.n[0] * s.grid.n[1] * s.grid.n[2], sinogram = s.line_count * plan.row();
  for (int64_t v = 0; v < volumes; ++v)
    if (adjoint)
      k.adjoint(plan, from + v * sinogram, to + v * volume, run);
    else
      k.forward(plan, from + v * volume, to + v * sinogram, run);
}
}  // namespace

void joseph3d_sinogram_cpu(const float* x, float* y, int64_t volumes, const Sinogram& s, const RunRanges& run) {
  project(x, y, volumes, s, false, run);
}
void joseph3d_sinogram_cpu(const double* x, double* y, int64_t volumes, const Sinogram& s, const RunRanges& run) {
  project(x, y, volumes, s, false, run);
}
void joseph3d_sinogram_adjoint_cpu(const float* y, float* x, int64_t volumes, const Sinogram& s, const RunRanges& run) {
  project(y, x, volumes, s, true, run);
}
void joseph3d_sinogram_adjoint_cpu(const double* y, double* x, int64_t volumes, const Sinogram& s,
                                   const RunRanges& run) {
  project(y, x, volumes, s, true, run);
}

}  // namespace recon3d
