// The NUFFT kernels for x86-64 with AVX2 and FMA.
#include <cstdlib>
#include <cstring>
#include <new>

#include "common.h"
#include "cpu/nufft.h"

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
#include "cpu/lane_fft.h"
#include "cpu/nufft_kernels.h"
// clang-format on
constexpr NufftKernelSet kKernels{{nufft_forward<float>, nufft_adjoint<float>, nufft_normal<float>},
                                  {nufft_forward<double>, nufft_adjoint<double>, nufft_normal<double>}};
}  // namespace
extern const NufftKernelSet* const kNufftAvx2 = &kKernels;
}  // namespace recon3d
#else
namespace recon3d {
extern const NufftKernelSet* const kNufftAvx2 = nullptr;
}
#endif
