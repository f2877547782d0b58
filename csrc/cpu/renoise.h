// Keyed noise and the fused step between noise levels; recon3d/ops/philox.py and renoise.py hold the formulas.
#pragma once
#include <cstdint>

#include "philox.h"

namespace recon3d {

// Noise of a stack: slice s gets c[s][0] f(anchor[s][0]) + c[s][1] f(anchor[s][1]); a zero coefficient is not drawn.
struct StackNoise {
  const int64_t* anchors;     // [slices, 2]
  const float* coefficients;  // [slices, 2]
  PhiloxKey key;
};

enum class DataKind { given, identity, mask, block_mean };

// All arrays are row-major stacks [slices, rows, columns] unless said otherwise; out may be u itself.
template <class T>
struct RenoiseStep {
  DataKind kind;
  const T *u, *x0;
  const T* x0c;         // kind given, else null
  const T* y;           // other kinds; block_mean: [slices, rows / factor, columns / factor]
  const uint8_t* mask;  // kind mask: 0 or 1
  int64_t mask_stride;  // pixels from one slice's mask to the next, 0 if all share one
  T* out;               // overwritten
  int64_t slices, rows, columns, factor;
  StackNoise noise;
  double k_null, z_null, k_measured, z_measured, lam;
  bool corrected;  // eps from x0c instead of x0
};

// Work is cut into tasks of fixed pixels, so the result depends on nothing but the arguments.
int64_t philox_tasks(int64_t slices, int64_t pixels);
template <class T>
void philox_normal_cpu(const StackNoise& noise, T* z, int64_t slices, int64_t pixels, int64_t task0, int64_t task1);
void philox_bits_cpu(const int64_t* slices, int64_t* bits, int64_t n_slices, int64_t pixels, PhiloxKey key,
                     int64_t task0, int64_t task1);

template <class T>
int64_t renoise_tasks(const RenoiseStep<T>& step);
template <class T>
void renoise_cpu(const RenoiseStep<T>& step, int64_t task0, int64_t task1);

}  // namespace recon3d
