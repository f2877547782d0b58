// The sinogram kernels for every processor.
#include <cstring>

#include "common.h"
#include "cpu/joseph3d_sinogram_plan.h"

// every vector argument belongs to an inlined function, so no call depends on how vectors are passed
#pragma GCC diagnostic ignored "-Wpsabi"
#define RECON3D_LEVEL 0

namespace recon3d {
namespace {
// each needs the one before it
// clang-format off
#include "cpu/joseph3d_sinogram_simd.h"
#include "cpu/joseph3d_sinogram_kernels.h"
// clang-format on
}  // namespace
extern const SinogramKernelSet kSinogramPortable{
    {sinogram_forward<float>, sinogram_adjoint<float>, kMostRows * Lanes<float>::W, kMostRowsTof * Lanes<float>::W},
    {sinogram_forward<double>, sinogram_adjoint<double>, kMostRows * Lanes<double>::W,
     kMostRowsTof * Lanes<double>::W}};
}  // namespace recon3d
