// Non-uniform FFT of stacks of images and its conjugate transpose (recon3d/ops/nufft.py has the formulas).
//
// Lanes of a vector register hold different images, so one weight serves a register of them and nothing is gathered.
// An axis of one pixel has one grid point and one tap of weight 1; images of fewer axes have such axes in front.
#pragma once
#include <cstdint>

#include "cpu/lane_plan.h"

namespace recon3d {

// Runs body(context, begin, end) over pieces of [0, n), on up to `threads` threads.
struct NufftThreads {
  void (*run)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context);
  int threads;
};

// The points and the grid, z first. Points are in the order of their tiles.
template <class T>
struct NufftPoints {
  int64_t count;
  int axes;   // columns of first and of weights: 1 to 3, the last ones of n, g and taps
  int width;  // row of weights per axis
  int tile;   // edge of a tile
  int n[3], g[3], taps[3];
  const int32_t* order;  // [count] place of each point in the caller's data
  const int32_t* first;  // [count, axes] first tap, in [0, g)
  const int32_t* tiles;  // [tiles + 1] where the points of each tile start
  const T* weights;      // [count, axes, width]
  const T* scale[3];     // [n] each

  int64_t pixels() const { return static_cast<int64_t>(n[0]) * n[1] * n[2]; }
};

// One call: images in [images, z, y, x], samples in the caller's order [images, count], or both in lanes:
// [chunk, z, y, x, kChunk] and, in the order of the tiles, [chunk, count, kChunk].
template <class T>
struct NufftJob {
  const NufftPoints<T>* points;
  int64_t images;  // in lanes: chunks times kChunk
  bool lanes;
  const T* in;
  T* out;
  const T* density;  // normal only: [count] in the caller's order, or null
};

// What one instruction set offers for T; images' results never depend on each other or on threads.
template <class T>
struct NufftKernels {
  void (*forward)(const NufftJob<T>& job, const NufftThreads& threads);
  void (*adjoint)(const NufftJob<T>& job, const NufftThreads& threads);
  void (*normal)(const NufftJob<T>& job, const NufftThreads& threads);
};
struct NufftKernelSet {
  NufftKernels<float> singles;
  NufftKernels<double> doubles;
};
extern const NufftKernelSet kNufftPortable;
extern const NufftKernelSet* const kNufftAvx2;  // null where the compiler cannot make it
extern const NufftKernelSet* const kNufftAvx512;

enum class NufftTransform { kForward, kAdjoint, kNormal };
// Runs a job with the kernels for this processor (lane_level). What is left beside full AVX-512 registers and fills
// half a register goes through AVX2, whose products and sums are the same and whose grid is half as large.
template <class T>
void nufft_run(NufftTransform transform, const NufftJob<T>& job, const NufftThreads& threads);

// 64-byte aligned memory on large pages, from a pool that keeps a bounded amount between calls; contents arbitrary.
class NufftScratch {
 public:
  explicit NufftScratch(size_t bytes);
  ~NufftScratch();
  NufftScratch(const NufftScratch&) = delete;
  NufftScratch& operator=(const NufftScratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
  size_t bytes_;
};

// ---- planning
// ---------------------------------------------------------------------------------------------------------

// points [count, axes] radians -> order, first, fraction and tiles of NufftPlan (recon3d/ops/nufft_plan.py).
void nufft_sort_cpu(const double* points, int64_t count, int axes, const int64_t* grid, int width, int tile,
                    int32_t* order, int32_t* first, double* fraction, int32_t* tiles);

// weights [count, axes, width]: polynomials [axes, width, terms], highest power first, at fraction [count, axes].
template <class T>
void nufft_weights_cpu(const double* fraction, const double* coefficients, int64_t begin, int64_t end, int axes,
                       int width, int terms, T* weights);

}  // namespace recon3d
