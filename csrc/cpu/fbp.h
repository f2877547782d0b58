// Pixel-driven back projection of filtered views: every pixel reads each view at its own detector coordinate.
//   lines  : [slices, views, n + 4], two zero cells on either side of the n cells
//   angles : [views] radians;  geometry in mm, source_to_axis = 0 for a parallel beam
//   image  : [slices, ny, nx], rows [r0, r1) of every slice overwritten
// Views are added in order, so no result depends on the number of threads or slices.
#pragma once
#include <cstdint>
namespace recon3d {
struct BackProjection {
  int64_t views, n, ny, nx;
  double pitch, offset, source_to_axis, source_to_detector, dy, dx;
};
template <class T>
void fbp_back_project_cpu(const T* lines, const double* angles, T* image, const BackProjection& g, int64_t slices,
                          int64_t r0, int64_t r1);
}  // namespace recon3d
