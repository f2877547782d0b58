// The line kernels for x86-64 with AVX-512.
#include <algorithm>

#include "common.h"
#include "cpu/joseph3d_plan.h"

#ifdef RECON3D_X86_LEVELS
#include <immintrin.h>

// every vector argument belongs to an inlined function, so no call depends on how vectors are passed
#pragma GCC diagnostic ignored "-Wpsabi"
// the compiler's own intrinsics start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define RECON3D_INLINE static inline __attribute__((always_inline))

namespace recon3d {
namespace {
// each needs the one before it
// clang-format off
#include "cpu/joseph3d_planes.h"
#include "cpu/joseph3d_lanes.h"
// clang-format on
constexpr LineKernelSet kKernels{
    {lane_forward, lane_adjoint}, {planes_forward<double>, planes_adjoint<double>}, lane_keys};
}  // namespace
extern const LineKernelSet* const kLinesAvx512 = &kKernels;
}  // namespace recon3d
#else
namespace recon3d {
extern const LineKernelSet* const kLinesAvx512 = nullptr;
}
#endif
