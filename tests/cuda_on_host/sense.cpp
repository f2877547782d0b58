// The kernels of csrc/cuda/sense.cu behind plain C functions.
#include <cmath>
#define __host__
inline void sincospi(double x, double* s, double* c) {
  *s = std::sin(3.14159265358979323846 * x);
  *c = std::cos(3.14159265358979323846 * x);
}
#include "cuda/sense.cu"

// size: slices, coils, ny, nx, weight_slices, along_y, doubled
template <class T>
static recon3d::cuda::SenseJob<T> job_of(const T* x, const T* maps, const T* weights, T* out, const int64_t* size) {
  return {x, maps, weights, out, size[0], size[1], size[2], size[3], size[4], size[5] != 0, size[6] != 0};
}
template <class T>
static const char* run(int lines, const T* x, const T* maps, const T* weights, T* out, const int64_t* size, T* work) {
  const auto job = job_of(x, maps, weights, out, size);
  return lines ? recon3d::cuda::sense_lines(job, work, nullptr) : recon3d::cuda::sense_planes(job, work, nullptr);
}
template <class T>
static int64_t room(int lines, const int64_t* size) {
  const T* none = nullptr;
  const auto job = job_of<T>(none, none, none, nullptr, size);
  return lines ? recon3d::cuda::sense_lines_workspace(job) : recon3d::cuda::sense_planes_workspace(job);
}

extern "C" {
const char* run_float(int lines, const float* x, const float* maps, const float* weights, float* out,
                      const int64_t* size, float* work) {
  return run(lines, x, maps, weights, out, size, work);
}
const char* run_double(int lines, const double* x, const double* maps, const double* weights, double* out,
                       const int64_t* size, double* work) {
  return run(lines, x, maps, weights, out, size, work);
}
int64_t workspace(int lines, int is_double, const int64_t* size) {
  return is_double ? room<double>(lines, size) : room<float>(lines, size);
}
int serves(int64_t n, int is_double) { return recon3d::cuda::sense_serves(n, is_double != 0); }
}
