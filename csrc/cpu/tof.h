// Time-of-flight weights of PET: how much of a point on a line of response a time bin sees.
//
// Bin b of n is centred (b - (n-1)/2) w from the middle of the line, towards p1, so its edges are e and e + 1 with edge
// e at (e - n/2) w. A point at distance d from the middle weighs F((edge_hi - d)/sigma) - F((edge_lo - d)/sigma), with
// F the distribution function of a Gaussian cut off at +-truncation sigma and scaled to run from 0 to 1. The weights of
// bins that cover the support add up to 1.
//
// F - 1/2 is odd: u Q(2 u^2 / truncation^2 - 1) with a polynomial Q, fitted when the curve is made, that needs neither
// exponential nor division: 11 terms give single precision at truncation 3, 16 double precision.
#pragma once
#include <cstdint>

namespace recon3d {

// bins = 0: no time of flight. Lengths in mm, truncation in sigmas, all positive.
struct Tof {
  int64_t bins;
  double bin_mm, sigma_mm, truncation;
};

constexpr int kTofTerms = 48;

template <class T>
struct TofCurve {
  T limit;    // truncation: F - 1/2 stays at -+1/2 beyond -+limit
  T scale;    // 2 / limit^2
  int terms;  // at most kTofTerms
  T c[kTofTerms];
};

// The curve of a truncation, to the precision of T; beyond 8 sigma a Gaussian has nothing left to cut off.
template <class T>
TofCurve<T> tof_curve(double truncation);
template <>
TofCurve<float> tof_curve<float>(double truncation);
template <>
TofCurve<double> tof_curve<double>(double truncation);

// always inlined, so no call depends on how vectors are passed
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
// F(u) - 1/2 of one number (V = T) or of a vector of them. Of its own in every source that includes it, so that each
// compiles it for its own instruction set.
template <class T, class V>
static inline __attribute__((always_inline)) V tof_half_cdf(const TofCurve<T>& f, V u) {
  const V low = V{} - f.limit, high = V{} + f.limit;
  u = u < low ? low : u;
  u = u > high ? high : u;
  const V s = u * u * f.scale - T(1);
  V q = V{} + f.c[f.terms - 1];
  for (int i = f.terms - 2; i >= 0; --i) q = q * s + f.c[i];
  return u * q;
}
#pragma GCC diagnostic pop

}  // namespace recon3d
