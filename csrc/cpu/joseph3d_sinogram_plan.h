// What the sinogram kernels of every instruction set share: lines clipped to the grid, segments cut into pieces.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cpu/joseph3d_sinogram.h"
#include "cpu/lane_plan.h"   // RECON3D_X86_LEVELS
#include "cpu/radon_plan.h"  // Scratch, run_ranges

namespace recon3d {

// A line in the plane: plane j of its axis (1 y, 2 x) is met at a + b j of the other one and at t + dt j of the way,
// counted from its middle in units of its length.
struct SinogramLine {
  int axis;
  int64_t first, last;  // planes met; first > last: none
  double a, b, t, dt;
  double length, step;  // in the plane: of the line and between neighbouring planes, mm
};

// Up to kernels.plain or kernels.tof neighbouring planes of a segment. A line of it meets plane j at
// low + part + (t + dt j) tilt in z, in voxels; the next planes lie `step` voxels further each.
struct SinogramPiece {
  int64_t plane;  // its first one in the sinogram
  int count;
  int32_t low;
  double part, tilt;
  double delta2;  // (z1 - z0)^2, mm^2
};

// All pieces with one distance of planes, in voxels.
struct SinogramGroup {
  int step;
  const SinogramPiece* pieces;
  int64_t count;
};

template <class T>
struct SinogramPlan {
  RayGrid grid;
  const SinogramLine* lines;
  int64_t line_count;
  const SinogramGroup* groups;
  int64_t group_count, planes;
  Tof tof;
  TofCurve<T> curve;
  int64_t row() const { return planes * (tof.bins ? tof.bins : 1); }  // elements of one line
};

// Pieces of work that threads take one after the other.
class WorkQueue {
 public:
  explicit WorkQueue(int64_t n) : n_(n), next_(0) {}
  // The next of 0 .. n - 1, or -1.
  int64_t take();

 private:
  int64_t n_;
  std::atomic<int64_t> next_;
};

template <class T>
struct SinogramKernels {
  void (*forward)(const SinogramPlan<T>& plan, const T* x, T* y, const RunRanges& run);  // one volume
  void (*adjoint)(const SinogramPlan<T>& plan, const T* y, T* x, const RunRanges& run);
  int plain, tof;  // most planes of a piece
};
struct SinogramKernelSet {
  SinogramKernels<float> singles;
  SinogramKernels<double> doubles;
};
extern const SinogramKernelSet kSinogramPortable;
extern const SinogramKernelSet* const kSinogramAvx2;  // null where the compiler cannot make it
extern const SinogramKernelSet* const kSinogramAvx512;

}  // namespace recon3d
