// The kernels of csrc/cuda/radon.cu behind plain C functions.
#include "cuda/radon.cu"

template <class T>
static const char* both(int adjoint, const T* from, T* to, int64_t slices, const int64_t* size, const double* length,
                        const double* cosine, const double* sine, T* work) {
  const recon3d::cuda::Scan scan{size[0],   size[1],   size[2],   size[3],   length[0],
                                 length[1], length[2], length[3], length[4], length[5]};
  return adjoint ? recon3d::cuda::radon_adjoint(from, to, slices, scan, cosine, sine, work, nullptr)
                 : recon3d::cuda::radon(from, to, slices, scan, cosine, sine, work, nullptr);
}

extern "C" {
const char* run_float(int adjoint, const float* from, float* to, int64_t slices, const int64_t* size,
                      const double* length, const double* cosine, const double* sine, float* work) {
  return both(adjoint, from, to, slices, size, length, cosine, sine, work);
}
const char* run_double(int adjoint, const double* from, double* to, int64_t slices, const int64_t* size,
                       const double* length, const double* cosine, const double* sine, double* work) {
  return both(adjoint, from, to, slices, size, length, cosine, sine, work);
}
int64_t workspace(int adjoint, int is_double, int64_t slices, const int64_t* size) {
  const recon3d::cuda::Scan scan{size[0], size[1], size[2], size[3], 0, 0, 0, 0, 0, 0};
  return is_double ? recon3d::cuda::radon_workspace<double>(slices, scan, adjoint != 0)
                   : recon3d::cuda::radon_workspace<float>(slices, scan, adjoint != 0);
}
}
