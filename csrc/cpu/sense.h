// The compiled half of recon3d/ops/sense.py: kernels whose vector lanes are coils or transforms.
#pragma once
#include <cstdint>

#include "cpu/lane_plan.h"

namespace recon3d {
class Scratch;

// Runs body(context, begin, end) over pieces of [0, n) on all threads.
using PieceBody = void (*)(void* context, int64_t begin, int64_t end);
using RunPieces = void (*)(int64_t n, PieceBody body, void* context);

template <class F>
inline void run_pieces(RunPieces run, int64_t n, const F& body) {
  run(
      n, [](void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// sum over coils of conj(S) F^H diag(w) F S x, slice by slice (F^H F = identity: the kernels divide by the length).
//   x, out  : [slices, ny, nx] complex, not aliasing; out is overwritten
//   maps    : [slices, chunks, line, element, kChunk] complex, coils in the lanes; (line, element) = (y, x), or (x, y)
//             for lines along y
//   weights : real, in FFT order, [weight_slices, ...] with weight_slices 1 or slices
//     lines : [n], n the length of a line; the other axis stays as it is
//     planes: [ny, nx], or [2 ny, 2 nx]: the transform of the slice padded with zeros to twice its size, cropped after
template <class T>
struct SenseJob {
  const T *x, *maps, *weights;
  T* out;
  int64_t slices, coils, ny, nx, weight_slices;
  bool along_y, doubled;
  RunPieces run;
  int threads;
};

// Large scratch from a pool, on large pages where the system has them.
class PlaneMemory {
 public:
  explicit PlaneMemory(size_t bytes);
  ~PlaneMemory();
  PlaneMemory(const PlaneMemory&) = delete;
  PlaneMemory& operator=(const PlaneMemory&) = delete;
  void* get() const { return memory_; }

 private:
  Scratch* scratch_;
  void* memory_;
};

// What one instruction set offers for T.
template <class T>
struct LaneKernels {
  // Unscaled FFT of `rows` lines of plan.n complex numbers; output k goes to place (k + shift) mod n. in != out.
  void (*fft)(const LanePlan<T>& plan, const T* in, T* out, int64_t rows, int shift, RunPieces run);
  // maps [slices, coils, ny, nx] -> packed [slices, chunks, ny, nx, kChunk], or [slices, chunks, nx, ny, kChunk]
  // along y; unused lanes become zero.
  void (*pack)(const T* maps, T* packed, int64_t slices, int64_t coils, int64_t ny, int64_t nx, bool along_y,
               RunPieces run);
  void (*lines)(const SenseJob<T>& job);
  void (*planes)(const SenseJob<T>& job);
};
struct LaneKernelSet {
  LaneKernels<float> singles;
  LaneKernels<double> doubles;
};
extern const LaneKernelSet kLanePortable;
extern const LaneKernelSet* const kLaneAvx2;  // null where the compiler cannot make it
extern const LaneKernelSet* const kLaneAvx512;

// The kernels for this processor (lane_level).
template <class T>
const LaneKernels<T>& lane_kernels();
template <>
const LaneKernels<float>& lane_kernels();
template <>
const LaneKernels<double>& lane_kernels();

}  // namespace recon3d
