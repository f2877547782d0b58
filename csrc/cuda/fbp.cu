#include "cuda/fbp.h"
#include "cuda/launch.h"

namespace recon3d {
namespace cuda {
namespace {
constexpr int kSlices = 4;           // of a thread: they share the pixel's place on the detector
constexpr int kViewsPerLaunch = 96;  // angles that fit the 4 KB of kernel arguments twice over

struct ViewAngles {
  double cosine[kViewsPerLaunch], sine[kViewsPerLaunch];
};

// Adds views [first, first + count) to the image; places are float64, which a data-centre GPU does at half rate.
template <class T>
__global__ void __launch_bounds__(256) back_project(const T* __restrict__ q, T* __restrict__ image, int64_t slices,
                                                    BackProjection g, ViewAngles angles, int64_t first, int count) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x,
                i = static_cast<int64_t>(blockIdx.y) * 8 + threadIdx.y;
  if (j >= g.nx || i >= g.ny) return;
  const double x = (static_cast<double>(j) - 0.5 * static_cast<double>(g.nx - 1)) * g.dx;
  const double y = (static_cast<double>(i) - 0.5 * static_cast<double>(g.ny - 1)) * g.dy;
  const double middle = 0.5 * static_cast<double>(g.n - 1);
  for (int64_t s0 = static_cast<int64_t>(blockIdx.z) * kSlices; s0 < slices;
       s0 += static_cast<int64_t>(gridDim.z) * kSlices) {
    T sum[kSlices] = {};
    for (int v = 0; v < count; ++v) {
      const double cosine = angles.cosine[v], sine = angles.sine[v];
      double u = x * cosine + y * sine;
      T scale = 1;
      bool seen = true;
      if (g.source_to_axis > 0) {
        const double depth = g.source_to_axis + x * sine - y * cosine, shrink = g.source_to_axis / depth;
        u = u * g.source_to_detector / depth;
        scale = static_cast<T>(shrink * shrink);
        seen = depth > 0;
      }
      const double at = (u - g.offset) / g.pitch + middle, low = floor(at);
      if (!(seen && low >= -1 && low < static_cast<double>(g.n))) continue;  // beyond the detector everything is zero
      const int64_t cell = static_cast<int64_t>(low);
      const T weight = static_cast<T>(at - low);
#pragma unroll
      for (int k = 0; k < kSlices; ++k) {
        if (s0 + k >= slices) break;
        const T* line = q + ((s0 + k) * g.views + first + v) * g.n;
        const T a = cell >= 0 ? line[cell] : T(0), b = cell + 1 < g.n ? line[cell + 1] : T(0);
        sum[k] += scale * fma(weight, b - a, a);
      }
    }
#pragma unroll
    for (int k = 0; k < kSlices; ++k)
      if (s0 + k < slices) image[((s0 + k) * g.ny + i) * g.nx + j] += sum[k];
  }
}
}  // namespace

template <class T>
const char* fbp_back_project(const T* q, T* image, int64_t slices, const BackProjection& g, const double* cosine,
                             const double* sine, void* stream) {
  if (const char* error = fill_zero(image, static_cast<size_t>(slices * g.ny * g.nx) * sizeof(T), stream)) return error;
  const int64_t layers = (slices + kSlices - 1) / kSlices;
  const dim3 grid(static_cast<unsigned>((g.nx + 31) / 32), static_cast<unsigned>((g.ny + 7) / 8),
                  static_cast<unsigned>(layers < 65535 ? layers : 65535));
  for (int64_t first = 0; first < g.views; first += kViewsPerLaunch) {
    const int count = static_cast<int>(g.views - first < kViewsPerLaunch ? g.views - first : kViewsPerLaunch);
    ViewAngles angles = {};
    for (int v = 0; v < count; ++v) {
      angles.cosine[v] = cosine[first + v];
      angles.sine[v] = sine[first + v];
    }
    if (const char* error =
            launch(back_project<T>, grid, dim3(32, 8), stream, q, image, slices, g, angles, first, count))
      return error;
  }
  return nullptr;
}
template const char* fbp_back_project<float>(const float*, float*, int64_t, const BackProjection&, const double*,
                                             const double*, void*);
template const char* fbp_back_project<double>(const double*, double*, int64_t, const BackProjection&, const double*,
                                              const double*, void*);
}  // namespace cuda
}  // namespace recon3d
