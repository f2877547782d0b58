// Pixel-driven back projection of filtered views on a GPU; the same sums in the same order as csrc/cpu/fbp.h.
//   q : [slices, views, n], image : [slices, ny, nx], on the device; image is overwritten
//   cosine, sine : of every view's angle, on the host; lengths in mm, source_to_axis = 0 means a parallel beam
// Returns null or what went wrong.
#pragma once
#include <cstdint>

namespace recon3d {
namespace cuda {
struct BackProjection {
  int64_t views, n, ny, nx;
  double pitch, offset, source_to_axis, source_to_detector, dy, dx;
};
template <class T>
const char* fbp_back_project(const T* q, T* image, int64_t slices, const BackProjection& g, const double* cosine,
                             const double* sine, void* stream);
}  // namespace cuda
}  // namespace recon3d
