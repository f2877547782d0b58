// What the line kernels of every instruction set share: bordered volumes, the sorted lines, the table of kernels.
#pragma once
#include <cmath>
#include <cstdint>

#include "cpu/joseph3d.h"

// x86-64 with GCC: kernels for AVX2 and AVX-512 are compiled beside the portable ones and chosen at run time.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define RECON3D_X86_LEVELS 1
#endif

namespace recon3d {

// A volume with a border of one zero voxel, as a main axis sees it: voxel (plane, row, inner) lies at
// origin[plane * plane_stride + row * row_stride + inner], rows and inner from -1 to n inclusive. kReach more elements
// can be read behind the last one.
template <class T>
struct Bordered {
  T* origin;
  int64_t plane, row;       // strides
  int planes, rows, inner;  // sizes without border
};
constexpr int kReach = 64;

template <class T>
struct LineJob {
  Lines lines;
  Bordered<T> volume[3];  // by main axis
  TofCurve<T> curve;
  double reach;           // half the support of a time bin, mm
  const uint32_t* order;  // lines in the order of the work, counted from base
  int64_t base;
};

// Neighbours in the order meet the same cache lines, and the vector kernels want the lanes of a register within a few
// voxels. The key of a line: main axis; where it crosses two planes, the near and the far one: cells of the inner axis;
// a strip of the row axis in the near plane; the place along the row axis in the far plane, there and back from strip
// to strip.
struct KeyPlan {  // of one main axis
  double near, far;
  double inner_scale, strip_scale, place_scale;  // per voxel
  double most_inner, most_strip, most_place;
};
struct KeyPlans {
  KeyPlan axis[3];
  int inner_bits, strip_bits, place_bits;                                // of both crossings alike
  int bits() const { return 2 * inner_bits + strip_bits + place_bits; }  // below those of the axis
};
constexpr uint32_t kNoAxis = 3;  // in place of the axis of a line that meets no plane

template <class T>
struct LineKernels {
  // Values of the lines at places [begin, end) of the order, which share a main axis.
  void (*forward)(const LineJob<T>& job, int axis, int64_t begin, int64_t end, T* y);
  // Adds them to planes [first, last) of the volume.
  void (*adjoint)(const LineJob<T>& job, int axis, int64_t begin, int64_t end, int first, int last, const T* y);
};
struct LineKernelSet {
  LineKernels<float> singles;
  LineKernels<double> doubles;
  // Keys of lines [begin, end).
  void (*keys)(const Lines& lines, const KeyPlans& plans, int64_t begin, int64_t end, uint32_t* keys);
};
void line_keys(const Lines& lines, const KeyPlans& plans, int64_t begin, int64_t end, uint32_t* keys);
extern const LineKernelSet kLinesPortable;
extern const LineKernelSet* const kLinesAvx2;  // null where the compiler cannot make it
extern const LineKernelSet* const kLinesAvx512;

// Middle of a time bin from the line's middle, mm.
inline double bin_centre(const Tof& tof, int64_t bin) {
  return (static_cast<double>(bin) - 0.5 * (static_cast<double>(tof.bins) - 1)) * tof.bin_mm;
}

// The line at place i of the order and its row; planes outside its time bin are left out.
template <class T>
inline Ray ray_at(const LineJob<T>& job, int64_t i, int64_t* line, double* centre) {
  const Lines& l = job.lines;
  *line = job.base + job.order[i];
  const int32_t* pair = l.pairs + 2 * *line;
  Ray r = make_ray(l.points + 3 * static_cast<int64_t>(pair[0]), l.points + 3 * static_cast<int64_t>(pair[1]), l.grid);
  if (l.bins && r.first <= r.last) {
    *centre = bin_centre(l.tof, l.bins[*line]);
    clip_to_bin(r, *centre, job.reach);
  }
  return r;
}

}  // namespace recon3d
