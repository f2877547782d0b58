// Time of flight on the device, included by .cu files only; recon3d/ops/joseph3d.py has the formulas.
#pragma once

namespace recon3d {
namespace cuda {
// Bins of the distance from the middle of a line towards its second end; none when bins is 0.
struct Tof {
  int bins;
  double bin_mm, sigma_mm, truncation;
};

// First and last bin within reach of a stretch of the line, distances in mm; first > last where there is none.
struct BinSpan {
  int first, last;
};
__device__ inline BinSpan bins_near(const Tof& tof, double low, double high) {
  const double reach = tof.truncation * tof.sigma_mm, half = 0.5 * tof.bins, most = tof.bins;
  const double first = floor((low - reach) / tof.bin_mm + half), last = floor((high + reach) / tof.bin_mm + half);
  return {static_cast<int>(fmin(fmax(first, 0.0), most)), static_cast<int>(fmin(fmax(last, -1.0), most - 1))};
}

// Twice the cumulated share up to a bin's lower edge, minus one: the Gaussian cut off at the truncation.
template <class T>
__device__ T share_below(const Tof& tof, int bin, double distance, T norm) {
  const double edge = (bin - 0.5 * tof.bins) * tof.bin_mm;
  const T value = erf(static_cast<T>((edge - distance) / (tof.sigma_mm * 1.4142135623730951))) * norm;
  return value < T(-1) ? T(-1) : value > T(1) ? T(1) : value;
}
template <class T>
__device__ T share_norm(const Tof& tof) {
  return T(1) / erf(static_cast<T>(tof.truncation / 1.4142135623730951));
}
}  // namespace cuda
}  // namespace recon3d
