// The lane kernels for x86-64 with AVX-512.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "common.h"
#include "cpu/sense.h"

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
#include "cpu/lane_fft.h"
#include "cpu/lane_normal.h"
#include "cpu/lane_batch.h"
#include "cpu/sense_lanes.h"
// clang-format on
constexpr LaneKernelSet kKernels{{fft_rows<float>, pack_coils<float>, sense_lines<float>, sense_planes<float>},
                                 {fft_rows<double>, pack_coils<double>, sense_lines<double>, sense_planes<double>}};
}  // namespace
extern const LaneKernelSet* const kLaneAvx512 = &kKernels;
}  // namespace recon3d
#else
namespace recon3d {
extern const LaneKernelSet* const kLaneAvx512 = nullptr;
}
#endif
