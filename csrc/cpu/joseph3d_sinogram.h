// PET sinogram projector and its transpose, lines times axial segments (recon3d/ops/joseph3d_sinogram.py has the
// definition).
//   x : [volumes, nz, ny, nx], y : [volumes, lines, planes], with time of flight [volumes, lines, bins, planes], both
//   row-major and not aliasing; the result is overwritten.
// Every output element is summed in an order that neither threads nor other lines or volumes change.
#pragma once
#include <cstdint>

#include "cpu/joseph3d_ray.h"
#include "cpu/radon.h"  // RunRanges
#include "cpu/tof.h"

namespace recon3d {

struct Sinogram {
  const double* lines;  // [line_count, 4]: y0, x0, y1, x1 in mm
  int64_t line_count;
  const double* segments;  // [segment_count, 4]: middle of the first plane, z1 - z0, plane distance in mm; planes
  int64_t segment_count, planes;
  RayGrid grid;
  Tof tof;
};

void joseph3d_sinogram_cpu(const float* x, float* y, int64_t volumes, const Sinogram& s, const RunRanges& run);
void joseph3d_sinogram_cpu(const double* x, double* y, int64_t volumes, const Sinogram& s, const RunRanges& run);
void joseph3d_sinogram_adjoint_cpu(const float* y, float* x, int64_t volumes, const Sinogram& s, const RunRanges& run);
void joseph3d_sinogram_adjoint_cpu(const double* y, double* x, int64_t volumes, const Sinogram& s,
                                   const RunRanges& run);

}  // namespace recon3d
