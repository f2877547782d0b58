// The kernels of csrc/cuda/joseph3d.cu behind plain C functions.
#include <cmath>
#include <cstring>
using std::erf;
using std::ilogb;
using std::ldexp;
using std::llrint;
using std::memcpy;
inline void atomicAdd(unsigned long long* to, unsigned long long value) { *to += value; }
inline void atomicMax(unsigned long long* to, unsigned long long value) { *to = *to < value ? value : *to; }
#include "cuda/joseph3d.cu"

// size: lines, points, nz, ny, nx, bins; length: dz, dy, dx, bin, sigma, truncation
static recon3d::cuda::LineScan scan_of(const int64_t* size, const double* length, const double* points,
                                       const int32_t* pairs, const int32_t* line_bins) {
  return {size[0], size[1],   size[2],   size[3],   size[4], length[0], length[1], length[2],
          size[5], length[3], length[4], length[5], points,  pairs,     line_bins};
}
template <class T>
static const char* both(int adjoint, const T* from, T* to, int64_t images, const int64_t* size, const double* length,
                        const double* points, const int32_t* pairs, const int32_t* line_bins, void* work) {
  const recon3d::cuda::LineScan scan = scan_of(size, length, points, pairs, line_bins);
  return adjoint ? recon3d::cuda::joseph3d_adjoint(from, to, images, scan, work, nullptr)
                 : recon3d::cuda::joseph3d(from, to, images, scan, nullptr);
}

extern "C" {
const char* run_float(int adjoint, const float* from, float* to, int64_t images, const int64_t* size,
                      const double* length, const double* points, const int32_t* pairs, const int32_t* line_bins,
                      void* work) {
  return both(adjoint, from, to, images, size, length, points, pairs, line_bins, work);
}
const char* run_double(int adjoint, const double* from, double* to, int64_t images, const int64_t* size,
                       const double* length, const double* points, const int32_t* pairs, const int32_t* line_bins,
                       void* work) {
  return both(adjoint, from, to, images, size, length, points, pairs, line_bins, work);
}
int64_t workspace(const int64_t* size, const double* length) {
  return recon3d::cuda::joseph3d_adjoint_workspace(scan_of(size, length, nullptr, nullptr, nullptr));
}
}
