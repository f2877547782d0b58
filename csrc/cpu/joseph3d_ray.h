// The ray core of the 3D projectors: a segment through a centred grid of voxels as a run of planes across its main
// axis.
//
// Axes are 0 = z, 1 = y, 2 = x; points and lengths in mm; the grid's middle is the origin of the points. The main axis
// is the one along which the segment runs longest in mm; ties go to y, then x, then z (as in recon3d/ops/joseph3d.py).
// Plane j of that axis is met at position u = a + b j of the row axis and v = c + e j of the inner axis (in voxels;
// kRowAxis and kInnerAxis say which), at the fraction t = t0 + dt j of the way from p0 to p1.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

namespace recon3d {

struct RayGrid {
  int64_t n[3];       // nz, ny, nx
  double spacing[3];  // dz, dy, dx
};

// Layout [y][x][z] serves main axes y and x, layout [z][y][x] serves z: the inner axis is contiguous in both.
constexpr int kRowAxis[3] = {1, 2, 1};
constexpr int kInnerAxis[3] = {2, 0, 0};

struct Ray {
  int axis;
  int64_t first, last;  // planes met, both included; first > last: none
  double a, b, c, e;    // u = a + b j, v = c + e j
  double t0, dt;        // t = t0 + dt j
  double length, step;  // |p1 - p0| and the length between neighbouring planes, mm
};

// As in the reference: slack of the comparison of axes, and of end points that lie on a plane (in voxels).
constexpr double kRayTie = 1.0 - 1e-9;
constexpr double kRaySlack = 1e-9;

// Narrows [low, high] to where a + b j lies in (-1, n): elsewhere interpolation meets no voxel.
inline void clip_ray(double a, double b, double n, double& low, double& high) {
  if (b == 0) {
    if (!(a > -1 && a < n)) high = low - 1;
    return;
  }
  const double inverse = 1 / b, s = (-1 - a) * inverse, t = (n - a) * inverse;
  low = std::max(low, std::min(s, t));
  high = std::min(high, std::max(s, t));
}

// The segment from p0 to p1. main < 0 chooses the main axis; 0, 1 or 2 impose it (its component must not be 0).
inline Ray make_ray(const double* p0, const double* p1, const RayGrid& g, int main = -1) {
  const double d[3] = {p1[0] - p0[0], p1[1] - p0[1], p1[2] - p0[2]};
  const double z = std::abs(d[0]), y = std::abs(d[1]), x = std::abs(d[2]);
  Ray r;
  r.axis = main >= 0 ? main : std::max(y, x) < z * kRayTie ? 0 : y < x * kRayTie ? 2 : 1;
  r.first = 0;
  r.last = -1;
  r.length = std::sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2]);
  r.a = r.b = r.c = r.e = r.t0 = r.dt = r.step = 0;
  if (!(std::abs(d[r.axis]) > 0)) return r;
  const int m = r.axis, u = kRowAxis[m], v = kInnerAxis[m];
  const double start = p0[m] / g.spacing[m] + 0.5 * (static_cast<double>(g.n[m]) - 1), reach = d[m] / g.spacing[m];
  r.dt = 1 / reach;
  r.t0 = -start * r.dt;
  r.b = d[u] / g.spacing[u] * r.dt;
  r.a = p0[u] / g.spacing[u] + 0.5 * (static_cast<double>(g.n[u]) - 1) - r.b * start;
  r.e = d[v] / g.spacing[v] * r.dt;
  r.c = p0[v] / g.spacing[v] + 0.5 * (static_cast<double>(g.n[v]) - 1) - r.e * start;
  r.step = g.spacing[m] * r.length / std::abs(d[m]);
  double low = std::max(0.0, std::min(start, start + reach) - kRaySlack);
  double high = std::min(static_cast<double>(g.n[m]) - 1, std::max(start, start + reach) + kRaySlack);
  clip_ray(r.a, r.b, static_cast<double>(g.n[u]), low, high);
  clip_ray(r.c, r.e, static_cast<double>(g.n[v]), low, high);
  if (low <= high) {
    r.first = static_cast<int64_t>(std::ceil(low));
    r.last = static_cast<int64_t>(std::floor(high));
  }
  return r;
}

// Keeps the planes whose distance from the segment's middle, towards p1, lies within `reach` mm of `centre`: the
// support of a time-of-flight bin. One plane too many is fine, its weight is 0.
inline void clip_to_bin(Ray& r, double centre, double reach) {
  const double inverse = 1 / (r.dt * r.length), at = (centre / r.length + 0.5 - r.t0) / r.dt,
               half = std::abs(reach * inverse);
  const double low = std::max(at - half - 1e-6, static_cast<double>(r.first)),
               high = std::min(at + half + 1e-6, static_cast<double>(r.last));
  if (low <= high) {
    r.first = static_cast<int64_t>(std::ceil(low));
    r.last = static_cast<int64_t>(std::floor(high));
  } else {
    r.last = r.first - 1;
  }
}

}  // namespace recon3d
