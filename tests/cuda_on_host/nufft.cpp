// The kernels of csrc/cuda/nufft.cu behind plain C functions; size: axes, points, width, tile, grid[3], shape[3].
#include "cuda/nufft.cu"

static recon3d::cuda::NufftGrid grid_of(const int64_t* s) {
  return {int(s[0]), {s[4], s[5], s[6]}, {s[7], s[8], s[9]}, s[1], int(s[2]), int(s[3])};
}

template <class T>
static const char* run(int step, const T* from, T* to, int64_t batch, const int64_t* size, const int32_t* order,
                       const int32_t* first, const T* weights, const int32_t* tiles, void* work) {
  using namespace recon3d::cuda;
  const NufftGrid g = grid_of(size);
  if (step == 0) return nufft_pad(from, to, batch, g, weights, nullptr);
  if (step == 1) return nufft_interpolate(from, to, batch, g, order, first, weights, work, nullptr);
  if (step == 2) return nufft_spread(from, to, batch, g, order, first, weights, tiles, work, nullptr);
  return nufft_crop(from, to, batch, g, weights, nullptr);
}

extern "C" {
const char* run_float(int step, const float* from, float* to, int64_t batch, const int64_t* size, const int32_t* order,
                      const int32_t* first, const float* weights, const int32_t* tiles, void* work) {
  return run(step, from, to, batch, size, order, first, weights, tiles, work);
}
const char* run_double(int step, const double* from, double* to, int64_t batch, const int64_t* size,
                       const int32_t* order, const int32_t* first, const double* weights, const int32_t* tiles,
                       void* work) {
  return run(step, from, to, batch, size, order, first, weights, tiles, work);
}
int64_t workspace(int is_double, int64_t batch, const int64_t* size, int spread) {
  const recon3d::cuda::NufftGrid g = grid_of(size);
  return int64_t(is_double ? recon3d::cuda::nufft_workspace<double>(batch, g, spread != 0)
                           : recon3d::cuda::nufft_workspace<float>(batch, g, spread != 0));
}
int64_t segment(const int64_t* size) {
  const recon3d::cuda::NufftGrid g = grid_of(size);
  return recon3d::cuda::segment_of(recon3d::cuda::axes_of(g), g);
}
}
