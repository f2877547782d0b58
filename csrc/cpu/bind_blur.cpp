#include "bind.h"
#include "cpu/blur.h"

namespace recon3d {
namespace {
template <class T>
std::vector<T> narrowed(double sigma) {
  const std::vector<double> wide = blur_weights(sigma);
  return std::vector<T>(wide.begin(), wide.end());
}

Tensor gaussian_blur(const Tensor& x, double sz, double sy, double sx) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "gaussian_blur: contiguous volumes [n, z, y, x] are needed");
  STD_TORCH_CHECK(sz >= 0 && sy >= 0 && sx >= 0 && sz + sy + sx < 1e6, "gaussian_blur: sigma must not be negative");
  Tensor result = torch::stable::empty_like(x);
  if (x.numel() == 0) return result;
  RECON3D_REAL(x, "gaussian_blur", {
    const Blur<scalar_t> v{
        x.size(1), x.size(2), x.size(3), narrowed<scalar_t>(sz), narrowed<scalar_t>(sy), narrowed<scalar_t>(sx)};
    const int64_t slices = v.slices, volume = slices * v.rows * v.columns;
    const scalar_t* xs = in<scalar_t>(x);
    scalar_t* os = out<scalar_t>(result);
    torch::stable::parallel_for(0, x.size(0) * slices, 1, [&](int64_t s0, int64_t s1) {
      while (s0 < s1) {  // volume after volume
        const int64_t n = s0 / slices, end = s1 < (n + 1) * slices ? s1 : (n + 1) * slices;
        blur_cpu(v, xs + n * volume, os + n * volume, s0 - n * slices, end - n * slices);
        s0 = end;
      }
    });
  })
  return result;
}
}  // namespace
}  // namespace recon3d

STABLE_TORCH_LIBRARY_IMPL(recon3d, CPU, m) { m.impl("gaussian_blur", TORCH_BOX(&recon3d::gaussian_blur)); }
