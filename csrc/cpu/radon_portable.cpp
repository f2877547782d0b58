// The float Radon kernels for every processor.
#include "common.h"
#include "cpu/radon_plan.h"

// every vector argument belongs to an inlined function, so no call depends on how vectors are passed
#pragma GCC diagnostic ignored "-Wpsabi"
#define RECON3D_LEVEL 0

namespace recon3d {
namespace {
// each needs the one before it
// clang-format off
#include "cpu/radon_simd.h"
#include "cpu/radon_joseph.h"
#include "cpu/radon_joseph_adjoint.h"
#include "cpu/radon_shear.h"
// clang-format on
}  // namespace
extern const RadonKernels kRadonPortable{joseph_forward, joseph_adjoint, shear_forward, shear_adjoint};
}  // namespace recon3d
