// The line kernels for x86-64 with AVX2 and FMA.
#include <algorithm>

#include "common.h"
#include "cpu/joseph3d_plan.h"

#ifdef RECON3D_X86_LEVELS
#include <immintrin.h>

// every vector argument belongs to an inlined function, so no call depends on how vectors are passed
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx2,fma")
#define RECON3D_INLINE static inline __attribute__((always_inline))

namespace recon3d {
namespace {
#include "cpu/joseph3d_planes.h"
constexpr LineKernelSet kKernels{
    {planes_forward<float>, planes_adjoint<float>}, {planes_forward<double>, planes_adjoint<double>}, line_keys};
}  // namespace
extern const LineKernelSet* const kLinesAvx2 = &kKernels;
}  // namespace recon3d
#else
namespace recon3d {
extern const LineKernelSet* const kLinesAvx2 = nullptr;
}
#endif
