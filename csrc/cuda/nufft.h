// The steps of a NUFFT beside the FFT, on a GPU; recon3d/ops/nufft_grid.py has their definitions.
//   x     : [batch, shape] images; cells: [batch, cells] oversampled transforms in FFT order (k = 0 first);
//   y     : [batch, points] samples in the caller's order. All complex, interleaved, on the device, not aliasing.
//   order, first [points, axes], weights [points, axes, width], tiles : of NufftPlan, points sorted by tile
//   scale : per axis, one after another
//   work  : workspace bytes on the device, aligned to 256 bytes; contents arbitrary
// Every result is overwritten. A sample or cell sums its taps or samples in one fixed order, the same for any batch:
// no atomics, nothing is copied from or to the host. Returns null or what went wrong.
#pragma once
#include <cstddef>
#include <cstdint>

namespace recon3d {
namespace cuda {
struct NufftGrid {
  int axes;          // 1 to 3
  int64_t grid[3];   // [z,] y, x; 1 where the image has one pixel, and such an axis has one tap
  int64_t shape[3];  // of the image (pad and crop only)
  int64_t points;
  int width, tile;
};

template <class T>
const char* nufft_pad(const T* x, T* cells, int64_t batch, const NufftGrid& g, const T* scale, void* stream);
template <class T>
const char* nufft_crop(const T* cells, T* x, int64_t batch, const NufftGrid& g, const T* scale, void* stream);

template <class T>
size_t nufft_workspace(int64_t batch, const NufftGrid& g, bool spread);

template <class T>
const char* nufft_interpolate(const T* cells, T* y, int64_t batch, const NufftGrid& g, const int32_t* order,
                              const int32_t* first, const T* weights, void* work, void* stream);
template <class T>
const char* nufft_spread(const T* y, T* cells, int64_t batch, const NufftGrid& g, const int32_t* order,
                         const int32_t* first, const T* weights, const int32_t* tiles, void* work, void* stream);
}  // namespace cuda
}  // namespace recon3d
