// The sinogram kernels for x86-64 with AVX2 and FMA.
#include <cstring>

#include "common.h"
#include "cpu/joseph3d_sinogram_plan.h"

#ifdef RECON3D_X86_LEVELS
#include <immintrin.h>

// every vector argument belongs to an inlined function, so no call depends on how vectors are passed
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC target("avx2,fma")
#define RECON3D_LEVEL 2

namespace recon3d {
namespace {
// each needs the one before it
// clang-format off
#include "cpu/joseph3d_sinogram_simd.h"
#include "cpu/joseph3d_sinogram_kernels.h"
// clang-format on
constexpr SinogramKernelSet kKernels{
    {sinogram_forward<float>, sinogram_adjoint<float>, kMostRows * Lanes<float>::W, kMostRowsTof * Lanes<float>::W},
    {sinogram_forward<double>, sinogram_adjoint<double>, kMostRows * Lanes<double>::W,
     kMostRowsTof * Lanes<double>::W}};
}  // namespace
extern const SinogramKernelSet* const kSinogramAvx2 = &kKernels;
}  // namespace recon3d
#else
namespace recon3d {
extern const SinogramKernelSet* const kSinogramAvx2 = nullptr;
}
#endif
