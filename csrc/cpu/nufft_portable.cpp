// The NUFFT kernels for every processor.
#include <cstdlib>
#include <cstring>
#include <new>

#include "common.h"
#include "cpu/nufft.h"

// every vector argument belongs to an inlined function, so no call depends on how vectors are passed
#pragma GCC diagnostic ignored "-Wpsabi"
#define RECON3D_LEVEL 0

namespace recon3d {
namespace {
// each needs the one before it
// clang-format off
#include "cpu/lane_fft.h"
#include "cpu/nufft_kernels.h"
// clang-format on
}  // namespace
extern const NufftKernelSet kNufftPortable{{nufft_forward<float>, nufft_adjoint<float>, nufft_normal<float>},
                                           {nufft_forward<double>, nufft_adjoint<double>, nufft_normal<double>}};
}  // namespace recon3d
