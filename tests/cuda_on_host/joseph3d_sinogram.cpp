// The kernels of csrc/cuda/joseph3d_sinogram.cu behind plain C functions.
#include <cmath>
#include <vector>
using std::erf;
#include "cuda/joseph3d_sinogram.cu"

// size: lines, families, nz, ny, nx, bins; length: dz, dy, dx, bin, sigma, truncation; families: [families, 4]
struct Scan {
  std::vector<recon3d::cuda::Family> families;
  recon3d::cuda::FamilyScan scan;
  Scan(const int64_t* size, const double* length, const double* family) {
    int64_t planes = 0;
    for (int64_t f = 0; f < size[1]; ++f, family += 4) {
      families.push_back({family[0], family[1], family[2], static_cast<int64_t>(family[3])});
      planes += families.back().count;
    }
    scan = {size[0],   planes,    size[1], size[2],   size[3],   size[4],   length[0],
            length[1], length[2], size[5], length[3], length[4], length[5], families.data()};
  }
};
template <class T>
static const char* both(int adjoint, const T* from, T* to, int64_t images, const int64_t* size, const double* length,
                        const double* lines, const double* family, void* work) {
  const Scan made(size, length, family);
  if (const char* refusal = recon3d::cuda::joseph3d_sinogram_refuses<T>(made.scan)) return refusal;
  return adjoint ? recon3d::cuda::joseph3d_sinogram_adjoint(from, to, images, made.scan, lines, work, nullptr)
                 : recon3d::cuda::joseph3d_sinogram(from, to, images, made.scan, lines, work, nullptr);
}

extern "C" {
const char* run_float(int adjoint, const float* from, float* to, int64_t images, const int64_t* size,
                      const double* length, const double* lines, const double* family, void* work) {
  return both(adjoint, from, to, images, size, length, lines, family, work);
}
const char* run_double(int adjoint, const double* from, double* to, int64_t images, const int64_t* size,
                       const double* length, const double* lines, const double* family, void* work) {
  return both(adjoint, from, to, images, size, length, lines, family, work);
}
int64_t workspace(int adjoint, int is_double, const int64_t* size, const double* length, const double* family) {
  const Scan made(size, length, family);
  return is_double ? recon3d::cuda::joseph3d_sinogram_workspace<double>(made.scan, adjoint != 0)
                   : recon3d::cuda::joseph3d_sinogram_workspace<float>(made.scan, adjoint != 0);
}
}
