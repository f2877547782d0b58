// Philox4x32-10 and Box-Muller for loops that vectorise: no call, no branch, no table. The integers and the formula are
// those of recon3d/ops/philox.py; float32 polynomials have errors below one ulp, float64 ones are series cut below it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace recon3d {

constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kWeylA = 0x9E3779B9u, kWeylB = 0xBB67AE85u;      // key increments

struct PhiloxKey {
  uint32_t k0, k1;         // seed, low and high half
  uint32_t level, stream;  // counter words 2 and 3
};

// c = (block of four pixels, slice index, level, stream) -> four random words
inline __attribute__((always_inline)) void philox4x32(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                                      uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = static_cast<uint64_t>(c0) * kPhiloxA, q = static_cast<uint64_t>(c2) * kPhiloxB;
    c0 = static_cast<uint32_t>(q >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(q);
    c2 = static_cast<uint32_t>(p >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p);
    k0 += kWeylA;
    k1 += kWeylB;
  }
}

// -2 log(u) for u = (w >> 9 + 1/2) 2^-23
inline __attribute__((always_inline)) float minus_two_log(uint32_t w, float) {
  const float u = (static_cast<float>(static_cast<int32_t>(w >> 9)) + 0.5f) * 0x1p-23f;
  int32_t bits;
  std::memcpy(&bits, &u, 4);
  const int32_t e = (bits - 0x3F3504F3) >> 23;  // u = 2^e (1 + t), 1 + t in [sqrt(1/2), sqrt(2))
  bits -= e * (1 << 23);
  float m;
  std::memcpy(&m, &bits, 4);
  const float t = m - 1.0f, t2 = t * t, ef = static_cast<float>(e);
  float q = t * -0.07634429633617401f + 0.12761549651622772f;
  q = q * t - 0.131601944565773f;
  q = q * t + 0.14201761782169342f;
  q = q * t - 0.16623356938362122f;
  q = q * t + 0.20001226663589478f;
  q = q * t - 0.250008225440979f;
  q = q * t + 0.3333333134651184f;
  return -2.0f * (ef * 0.693359375f + (t + (t2 * (q * t - 0.5f) + ef * -2.12194440e-4f)));
}

inline __attribute__((always_inline)) double minus_two_log(uint32_t w, double) {
  const double u = (static_cast<double>(static_cast<int32_t>(w >> 9)) + 0.5) * 0x1p-23;
  int64_t bits;
  std::memcpy(&bits, &u, 8);
  // the exponent from the high half in 32 bits: 64-bit arithmetic shifts and conversions do not vectorise before
  // AVX-512
  const int32_t e = (static_cast<int32_t>(bits >> 32) - 0x3FE6A09E) >> 20;
  bits -= static_cast<int64_t>(e) * (int64_t{1} << 52);
  double m;
  std::memcpy(&m, &bits, 8);
  const double t = m - 1.0, s = t / (t + 2.0), z = s * s;
  double p = 2.0 / 23;
#pragma GCC unroll 11
  for (int d = 21; d > 0; d -= 2) p = p * z + 2.0 / d;
  return -2.0 * (static_cast<double>(e) * 0.6931471805599453 + s * p);
}

// sin and cos of 2 pi f, |f| <= 1/8
inline __attribute__((always_inline)) void sin_cos_turns(float f, float& sin, float& cos) {
  const float f2 = f * f;
  sin = f * (((f2 * -75.39356231689453f + 81.59235382080078f) * f2 - 41.3416633605957f) * f2 + 6.2831854820251465f);
  cos = 1.0f +
        f2 * (((f2 * 59.22924041748047f - 85.4432373046875f) * f2 + 64.93932342529297f) * f2 - 19.739208221435547f);
}

inline __attribute__((always_inline)) void sin_cos_turns(double f, double& sin, double& cos) {
  const double x = f * 6.283185307179586, x2 = x * x;
  constexpr double kSin[8] = {-0.16666666666666666,   0.008333333333333333,   -0.0001984126984126984,
                              2.7557319223985893e-06, -2.505210838544172e-08, 1.6059043836821613e-10,
                              -7.647163731819816e-13, 2.8114572543455206e-15};
  constexpr double kCos[8] = {-0.5,
                              0.041666666666666664,
                              -0.001388888888888889,
                              2.48015873015873e-05,
                              -2.755731922398589e-07,
                              2.08767569878681e-09,
                              -1.1470745597729725e-11,
                              4.779477332387385e-14};
  double p = kSin[7], q = kCos[7];
#pragma GCC unroll 7
  for (int k = 6; k >= 0; --k) {
    p = p * x2 + kSin[k];
    q = q * x2 + kCos[k];
  }
  sin = x + x * x2 * p;
  cos = 1.0 + x2 * q;
}

// Two normals from two words.
template <class T>
inline __attribute__((always_inline)) void box_muller(uint32_t w0, uint32_t w1, T& n0, T& n1) {
  const T radius = std::sqrt(minus_two_log(w0, T()));
  const int32_t k = static_cast<int32_t>(w1 >> 9);
  const int32_t quarter = (k + (1 << 20)) >> 21;
  T sin, cos;
  sin_cos_turns((static_cast<T>(k - quarter * (1 << 21)) + T(0.5)) * T(0x1p-23), sin, cos);
  const T c = quarter & 1 ? sin : cos, s = quarter & 1 ? cos : sin;
  n0 = radius * ((quarter + 1) & 2 ? -c : c);
  n1 = radius * (quarter & 2 ? -s : s);
}

// z[4 i + j] = normal j of block i from its words w[j][i], for i < blocks
template <class T>
inline __attribute__((always_inline)) void normals_of_words(T* __restrict__ z, const uint32_t* __restrict__ w0,
                                                            const uint32_t* __restrict__ w1,
                                                            const uint32_t* __restrict__ w2,
                                                            const uint32_t* __restrict__ w3, int64_t blocks) {
  for (int64_t i = 0; i < blocks; ++i) {
    T n0, n1, n2, n3;
    box_muller(w0[i], w1[i], n0, n1);
    box_muller(w2[i], w3[i], n2, n3);
    z[4 * i] = n0;
    z[4 * i + 1] = n1;
    z[4 * i + 2] = n2;
    z[4 * i + 3] = n3;
  }
}

}  // namespace recon3d
