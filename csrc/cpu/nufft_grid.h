// Interpolation from the oversampled grid of a NUFFT and its transpose; recon3d/ops/nufft_grid.py has the definitions.
//   cells : [batch, cells] in FFT order, y : [batch, points] in the caller's order; complex, interleaved, not aliasing
//   order, first [points, axes], weights [points, axes, width] : of NufftPlan
// Points are taken in their sorted order, images one after another: bits depend neither on the batch nor on threads.
#pragma once
#include <cstdint>

namespace recon3d {
struct GridPoints {
  int axes;         // 1 to 3
  int64_t grid[3];  // [z,] y, x; an axis of one cell has one tap
  int64_t points;
  int width;
  const int32_t *order, *first;
};

// y of images [b0, b1) at sorted points [p0, p1); other entries of y stay untouched.
template <class T>
void interpolate_cpu(const T* cells, T* y, const GridPoints& g, const T* weights, int64_t b0, int64_t b1, int64_t p0,
                     int64_t p1);
// cells of images [b0, b1), overwritten.
template <class T>
void spread_cpu(const T* y, T* cells, const GridPoints& g, const T* weights, int64_t b0, int64_t b1);
}  // namespace recon3d
