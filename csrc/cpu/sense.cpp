#include "cpu/sense.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

void advise_large_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

PlaneMemory::PlaneMemory(size_t bytes) : scratch_(new Scratch(bytes + kLargePage)) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(scratch_->get());
  memory_ = reinterpret_cast<void*>((start + kLargePage - 1) / kLargePage * kLargePage);
  advise_large_pages(memory_, bytes);
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
