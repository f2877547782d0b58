// The line kernels for every processor.
#include <algorithm>

#include "common.h"
#include "cpu/joseph3d_plan.h"

#define RECON3D_INLINE static inline __attribute__((always_inline))

namespace recon3d {
namespace {
#include "cpu/joseph3d_planes.h"
}  // namespace
extern const LineKernelSet kLinesPortable{
    {planes_forward<float>, planes_adjoint<float>}, {planes_forward<double>, planes_adjoint<double>}, line_keys};
}  // namespace recon3d
