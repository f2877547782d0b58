#include "cpu/fbp.h"

#include <cmath>
#include <vector>

#include "common.h"

namespace recon3d {
namespace {
// Where the pixels of one row read one view: first of two cells in the padded line, weight of the second, 1 / U^2.
template <class T>
inline void place(const BackProjection& g, double cosine, double sine, double y, int32_t* RECON3D_RESTRICT cell,
                  T* RECON3D_RESTRICT weight, T* RECON3D_RESTRICT scale) {
  const double half = 0.5 * static_cast<double>(g.nx - 1), middle = 0.5 * static_cast<double>(g.n - 1);
  const double top = static_cast<double>(g.n) + 0.5, row = y * sine;
  const bool fan = g.source_to_axis > 0;
  for (int64_t j = 0; j < g.nx; ++j) {
    const double x = (static_cast<double>(static_cast<int32_t>(j)) - half) * g.dx;
    double u = x * cosine + row;
    if (fan) {
      const double depth = g.source_to_axis + x * sine - y * cosine, shrink = g.source_to_axis / depth;
      u = u * g.source_to_detector / depth;
      u = depth > 0 ? u : 1e30;  // behind the source: the zero cells
      scale[j] = static_cast<T>(shrink * shrink);
    }
    double at = (u - g.offset) / g.pitch + middle;
    at = at < -1.5 ? -1.5 : at;
    at = at > top ? top : at;
    const double low = std::floor(at);
    cell[j] = static_cast<int32_t>(low) + 2;
    weight[j] = static_cast<T>(at - low);
  }
}

template <class T>
inline void add(const T* RECON3D_RESTRICT line, const int32_t* RECON3D_RESTRICT cell, const T* RECON3D_RESTRICT weight,
                const T* RECON3D_RESTRICT scale, T* RECON3D_RESTRICT out, int64_t nx, bool fan) {
  if (fan) {
    for (int64_t j = 0; j < nx; ++j) {
      const T a = line[cell[j]], b = line[cell[j] + 1];
      out[j] += scale[j] * (a + weight[j] * (b - a));
    }
  } else {
    for (int64_t j = 0; j < nx; ++j) {
      const T a = line[cell[j]], b = line[cell[j] + 1];
      out[j] += a + weight[j] * (b - a);
    }
  }
}

RECON3D_CLONES void place_row(const BackProjection& g, double c, double s, double y, int32_t* cell, float* w,
                              float* u) {
  place(g, c, s, y, cell, w, u);
}
RECON3D_CLONES void place_row(const BackProjection& g, double c, double s, double y, int32_t* cell, double* w,
                              double* u) {
  place(g, c, s, y, cell, w, u);
}
RECON3D_CLONES void add_row(const float* line, const int32_t* cell, const float* w, const float* u, float* out,
                            int64_t nx, bool fan) {
  add(line, cell, w, u, out, nx, fan);
}
RECON3D_CLONES void add_row(const double* line, const int32_t* cell, const double* w, const double* u, double* out,
                            int64_t nx, bool fan) {
  add(line, cell, w, u, out, nx, fan);
}
}  // namespace

template <class T>
void fbp_back_project_cpu(const T* lines, const double* angles, T* image, const BackProjection& g, int64_t slices,
                          int64_t r0, int64_t r1) {
  std::vector<int32_t> cell(static_cast<size_t>(g.nx));
  std::vector<T> weight(static_cast<size_t>(g.nx)), scale(static_cast<size_t>(g.nx));
  const int64_t width = g.n + 4;
  for (int64_t s = 0; s < slices; ++s)
    for (int64_t i = (s * g.ny + r0) * g.nx; i < (s * g.ny + r1) * g.nx; ++i) image[i] = 0;
  for (int64_t v = 0; v < g.views; ++v) {
    const double cosine = std::cos(angles[v]), sine = std::sin(angles[v]);
    for (int64_t r = r0; r < r1; ++r) {
      const double y = (static_cast<double>(r) - 0.5 * static_cast<double>(g.ny - 1)) * g.dy;
      place_row(g, cosine, sine, y, cell.data(), weight.data(), scale.data());
      for (int64_t s = 0; s < slices; ++s)
        add_row(lines + (s * g.views + v) * width, cell.data(), weight.data(), scale.data(),
                image + (s * g.ny + r) * g.nx, g.nx, g.source_to_axis > 0);
    }
  }
}
template void fbp_back_project_cpu<float>(const float*, const double*, float*, const BackProjection&, int64_t, int64_t,
                                          int64_t);
template void fbp_back_project_cpu<double>(const double*, const double*, double*, const BackProjection&, int64_t,
                                           int64_t, int64_t);
}  // namespace recon3d
