#include "cpu/sense.h"

namespace recon3d {
namespace {
const LaneKernelSet& kernel_set() {
  const int level = lane_level();
  if (level >= 3 && kLaneAvx512) return *kLaneAvx512;
  if (level >= 2 && kLaneAvx2) return *kLaneAvx2;
  return kLanePortable;
}
}  // namespace

template <>
const LaneKernels<float>& lane_kernels<float>() {
  return kernel_set().singles;
}
template <>
const LaneKernels<double>& lane_kernels<double>() {
  return kernel_set().doubles;
}
}  // namespace recon3d
