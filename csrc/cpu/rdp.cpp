#include "cpu/rdp.h"

namespace recon3d {
namespace {
template <int kFirst, int kPairs, class T>
inline __attribute__((always_inline)) void run(const T* here, const Around<T>& a, T* RECON3D_RESTRICT out, int64_t n,
                                               T gamma, T epsilon) {
  for (int64_t j = 0; j < n; ++j) {
    T slope = 0, unused = 0;
    for (int m = kFirst; m < kFirst + kPairs; ++m)
      rdp_pair(here[j], a.at[m][j], a.weight[m], gamma, epsilon, slope, unused);
    out[j] = slope;
  }
}

RECON3D_CLONES void gradient(bool z_only, const float* here, const Around<float>& a, float* out, int64_t n, float gamma,
                             float epsilon) {
  z_only ? run<0, 2>(here, a, out, n, gamma, epsilon) : run<0, 6>(here, a, out, n, gamma, epsilon);
}
RECON3D_CLONES void gradient(bool z_only, const double* here, const Around<double>& a, double* out, int64_t n,
                             double gamma, double epsilon) {
  z_only ? run<0, 2>(here, a, out, n, gamma, epsilon) : run<0, 6>(here, a, out, n, gamma, epsilon);
}
}  // namespace

template <class T>
void rdp_gradient_cpu(const Rdp<T>& v, const T* x, T* out, int64_t s0, int64_t s1) {
  const bool z_only = v.wy == 0 && v.wx == 0;
  for (int64_t k = s0; k < s1; ++k)
    for (int64_t i = 0; i < v.rows; ++i)
      for_runs(z_only ? 1 : v.columns, [&](int64_t j, int64_t n) {
        const int64_t at = (k * v.rows + i) * v.columns + j;
        gradient(z_only, x + at, around(v, x + at, k, i, j, n), out + at, z_only ? v.columns : n, v.gamma, v.epsilon);
      });
}

template void rdp_gradient_cpu<float>(const Rdp<float>&, const float*, float*, int64_t, int64_t);
template void rdp_gradient_cpu<double>(const Rdp<double>&, const double*, double*, int64_t, int64_t);
}  // namespace recon3d
