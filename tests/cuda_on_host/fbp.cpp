// The kernel of csrc/cuda/fbp.cu behind a plain C function.
#include "cuda/fbp.cu"

extern "C" const char* run_fbp(const float* q, float* image, int64_t slices, const int64_t* size, const double* length,
                               const double* cosine, const double* sine) {
  const recon3d::cuda::BackProjection g{size[0],   size[1],   size[2],   size[3],   length[0],
                                        length[1], length[2], length[3], length[4], length[5]};
  return recon3d::cuda::fbp_back_project(q, image, slices, g, cosine, sine, nullptr);
}
