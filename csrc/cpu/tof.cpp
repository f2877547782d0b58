#include "cpu/tof.h"

#include <cmath>

namespace recon3d {
namespace {
constexpr double kPi = 3.14159265358979323846;
constexpr int kNodes = 128;

// (F(u) - 1/2) / u by its definition; near 0 by its series, whose next term is below 1e-17.
double slope(double u, double truncation) {
  const double norm = std::erf(truncation / std::sqrt(2.0));
  if (u < 1e-4) return (1 - u * u / 6) / (std::sqrt(2 * kPi) * norm);
  return 0.5 * std::erf(u / std::sqrt(2.0)) / (norm * u);
}

template <class T>
TofCurve<T> fit(double truncation, double tolerance) {
  if (truncation > 8) truncation = 8;
  double chebyshev[kTofTerms] = {};
  for (int n = 0; n < kNodes; ++n) {
    const double angle = kPi * (n + 0.5) / kNodes;
    const double value = slope(truncation * std::sqrt(0.5 * (std::cos(angle) + 1)), truncation);
    for (int m = 0; m < kTofTerms; ++m) chebyshev[m] += (m ? 2.0 : 1.0) / kNodes * value * std::cos(m * angle);
  }
  int terms = kTofTerms;
  double dropped = 0;
  while (terms > 1 && (dropped += truncation * std::abs(chebyshev[terms - 1])) < tolerance) --terms;
  // powers instead of Chebyshev polynomials: T_m = 2 s T_{m-1} - T_{m-2}
  double power[kTofTerms] = {}, last[kTofTerms] = {}, now[kTofTerms] = {};
  now[0] = 1;
  for (int m = 0; m < terms; ++m) {
    for (int i = 0; i < terms; ++i) power[i] += chebyshev[m] * now[i];
    double next[kTofTerms];
    for (int i = 0; i < kTofTerms; ++i) next[i] = (m ? 2.0 : 1.0) * (i ? now[i - 1] : 0.0) - last[i];
    for (int i = 0; i < kTofTerms; ++i) {
      last[i] = now[i];
      now[i] = next[i];
    }
  }
  TofCurve<T> curve{static_cast<T>(truncation), static_cast<T>(2 / (truncation * truncation)), terms, {}};
  for (int i = 0; i < terms; ++i) curve.c[i] = static_cast<T>(power[i]);
  return curve;
}
}  // namespace

template <>
TofCurve<float> tof_curve<float>(double truncation) {
  return fit<float>(truncation, 1e-8);
}
template <>
TofCurve<double> tof_curve<double>(double truncation) {
  return fit<double>(truncation, 2e-14);
}

}  // namespace recon3d
