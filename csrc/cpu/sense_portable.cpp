// The lane kernels for every processor.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "common.h"
#include "cpu/sense.h"

// every vector argument belongs to an inlined function, so no call depends on how vectors are passed
#pragma GCC diagnostic ignored "-Wpsabi"
#define RECON3D_LEVEL 0

namespace recon3d {
namespace {
// each needs the one before it
// clang-format off
#include "cpu/lane_fft.h"
#include "cpu/lane_normal.h"
#include "cpu/lane_batch.h"
#include "cpu/sense_lanes.h"
// clang-format on
}  // namespace
extern const LaneKernelSet kLanePortable{
    {fft_rows<float>, pack_coils<float>, sense_lines<float>, sense_planes<float>},
    {fft_rows<double>, pack_coils<double>, sense_lines<double>, sense_planes<double>}};
}  // namespace recon3d
