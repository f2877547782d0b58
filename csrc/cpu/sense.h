// The compiled half of recon3d/ops/sense.py: kernels whose vector lanes are coils or transforms.
#pragma once
#include <cstdint>

#include "cpu/lane_plan.h"

namespace recon3d {

// Runs body(context, begin, end) over pieces of [0, n) on all threads.
using PieceBody = void (*)(void* context, int64_t begin, int64_t end);
using RunPieces = void (*)(int64_t n, PieceBody body, void* context);

template <class F>
inline void run_pieces(RunPieces run, int64_t n, const F& body) {
  run(
      n, [](void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// What one instruction set offers for T.
template <class T>
struct LaneKernels {
  // Unscaled FFT of `rows` lines of plan.n complex numbers; output k goes to place (k + shift) mod n. in != out.
  void (*fft)(const LanePlan<T>& plan, const T* in, T* out, int64_t rows, int shift, RunPieces run);
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
