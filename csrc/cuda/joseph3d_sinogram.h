// Line integrals of a volume along families of lines (transaxial line x axial plane) and their transpose on a GPU, with
// and without time of flight; recon3d/ops/joseph3d_sinogram.py has the formulas.
//   x : [images, nz, ny, nx], y : [images, lines, planes] or [images, lines, bins, planes], row-major on the device,
//   not
//       aliasing; the result is overwritten
//   lines : [lines, 4] on the device, (y0, x0, y1, x1) in mm;  families : of the scan, on the host
//   work : *_workspace bytes on the device, aligned to 256 bytes; contents arbitrary
// Sums run in a fixed order, the same for any number of images and whatever other lines there are: no atomics.
// Returns null or what went wrong.
#pragma once
#include <cstddef>
#include <cstdint>

namespace recon3d {
namespace cuda {
// Planes of one axial difference: plane p ends at middle + p step -+ difference / 2, in mm.
struct Family {
  double middle, difference, step;
  int64_t count;
};
struct FamilyScan {
  int64_t lines, planes, families;
  int64_t nz, ny, nx;
  double dz, dy, dx;
  int64_t bins;  // 0: none
  double bin_mm, sigma_mm, truncation;
  const Family* family;
};

template <class T>
int64_t joseph3d_sinogram_workspace(const FamilyScan& scan, bool adjoint);

// Null where the kernels serve the scan, else why not.
template <class T>
const char* joseph3d_sinogram_refuses(const FamilyScan& scan);

template <class T>
const char* joseph3d_sinogram(const T* x, T* y, int64_t images, const FamilyScan& scan, const double* lines, void* work,
                              void* stream);
template <class T>
const char* joseph3d_sinogram_adjoint(const T* y, T* x, int64_t images, const FamilyScan& scan, const double* lines,
                                      void* work, void* stream);
}  // namespace cuda
}  // namespace recon3d
