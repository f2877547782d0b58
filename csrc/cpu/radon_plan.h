// What the float kernels of every instruction set share: the scan cut into segments, scratch memory, ranges.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/radon.h"

// x86-64 with GCC: kernels for AVX2 and AVX-512 are compiled beside the portable ones and chosen at run time.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define RECON3D_X86_LEVELS 1
#endif

namespace recon3d {

// Consecutive rays [first, last) of one view that step over the same axis: rows (axis 0) or columns (axis 1). At step i
// ray r crosses the cells of that step at alpha_r + beta_r i; parallel: alpha_r = alpha + r d, beta_r = beta.
struct Segment {
  int64_t view;
  int first, last;
  double alpha, d, beta, length;
};

struct RadonPlan {
  RadonScan scan;
  bool fan;
  const Segment* segments[2];
  int64_t count[2];
  const double *cosine, *sine;  // of every view
  int steps(int axis) const { return static_cast<int>(axis ? scan.nx : scan.ny); }
  int across(int axis) const { return static_cast<int>(axis ? scan.ny : scan.nx); }
};

// 64-byte aligned memory from a small pool that keeps at most kKeep bytes between calls; contents are arbitrary.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const { return static_cast<float*>(block_); }
  void* get() const { return block_; }

 private:
  void* block_;
  size_t bytes_;
};

// The float kernels compiled for one instruction set.
struct RadonKernels {
  void (*forward)(const RadonPlan& plan, const float* x, float* y, int64_t slices, const RunRanges& run);
  void (*adjoint)(const RadonPlan& plan, const float* y, float* x, int64_t slices, const RunRanges& run);
  void (*shear_forward)(const RadonPlan& plan, const float* x, float* y, int64_t slices, const RunRanges& run);
  void (*shear_adjoint)(const RadonPlan& plan, const float* y, float* x, int64_t slices, const RunRanges& run);
};
extern const RadonKernels kRadonPortable;
extern const RadonKernels* const kRadonAvx2;  // null where the compiler cannot make it
extern const RadonKernels* const kRadonAvx512;

template <class F>
inline void run_ranges(const RunRanges& run, int64_t n, const F& body) {
  run.run(
      n, [](void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How many consecutive items make a group: at most `most`, and as many groups as keep all threads busy to the end.
// Results never depend on it.
inline int64_t group_size(int64_t n, int64_t most, int threads) {
  const int64_t per_thread = (n + most * threads - 1) / (most * threads), groups = per_thread * threads;
  return (n + groups - 1) / groups;
}

}  // namespace recon3d
