// The float Radon kernels for x86-64 with AVX-512.
#include "common.h"
#include "cpu/radon_plan.h"

#ifdef RECON3D_X86_LEVELS
#include <immintrin.h>

// every vector argument belongs to an inlined function, so no call depends on how vectors are passed
#pragma GCC diagnostic ignored "-Wpsabi"
// the compiler's own intrinsics start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define RECON3D_LEVEL 3

namespace recon3d {
namespace {
// each needs the one before it
// clang-format off
#include "cpu/radon_simd.h"
#include "cpu/radon_joseph.h"
#include "cpu/radon_joseph_adjoint.h"
#include "cpu/radon_shear.h"
// clang-format on
constexpr RadonKernels kKernels{joseph_forward, joseph_adjoint, shear_forward, shear_adjoint};
}  // namespace
extern const RadonKernels* const kRadonAvx512 = &kKernels;
}  // namespace recon3d
#else
namespace recon3d {
extern const RadonKernels* const kRadonAvx512 = nullptr;
}
#endif
