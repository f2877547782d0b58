// Separable blur of volumes [slices, rows, columns] with symmetric weights and zeros outside.
#pragma once
#include <cstdint>
#include <vector>
namespace recon3d {
// exp(-k^2 / (2 sigma^2)) for k = 0..int(4 sigma + 1/2), divided by the sum over both sides
std::vector<double> blur_weights(double sigma);

template <class T>
struct Blur {
  int64_t slices, rows, columns;
  std::vector<T> wz, wy, wx;  // weights 0..radius of each axis
};

// out = blur of x on the slices [s0, s1) of one volume; out must not alias x.
template <class T>
void blur_cpu(const Blur<T>& v, const T* x, T* out, int64_t s0, int64_t s1);
}  // namespace recon3d
