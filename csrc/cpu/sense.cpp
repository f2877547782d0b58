#include "cpu/sense.h"

#include "cpu/radon_plan.h"  // Scratch

namespace recon3d {
namespace {
const LaneKernelSet& kernel_set() {
  const int level = lane_level();
  if (level >= 3 && kLaneAvx512) return *kLaneAvx512;
  if (level >= 2 && kLaneAvx2) return *kLaneAvx2;
  return kLanePortable;
}
}  // namespace

namespace {
constexpr size_t kLargePage = size_t{2} << 20;
}

PlaneMemory::PlaneMemory(size_t bytes) : scratch_(new Scratch(bytes + kLargePage)) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(scratch_->get());
  memory_ = reinterpret_cast<void*>((start + kLargePage - 1) / kLargePage * kLargePage);
  wish_large_pages(memory_, bytes);
}
PlaneMemory::~PlaneMemory() { delete scratch_; }

template <>
const LaneKernels<float>& lane_kernels<float>() {
  return kernel_set().singles;
}
template <>
const LaneKernels<double>& lane_kernels<double>() {
  return kernel_set().doubles;
}
}  // namespace recon3d
