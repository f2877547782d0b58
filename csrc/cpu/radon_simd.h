// Sixteen-lane vectors, included once per instruction set inside its namespace (RECON3D_LEVEL 0 portable, 2 AVX2 + FMA,
// 3 AVX-512). GCC vector extensions throughout; intrinsics only where AVX-512 has an instruction that they cannot name.
// Products that are added go through madd alone, so every kernel of one instruction set rounds alike.

typedef float Vec __attribute__((vector_size(64), may_alias));
typedef float VecU __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(64), may_alias));
typedef int32_t IntU __attribute__((vector_size(64), aligned(4), may_alias));
typedef double Dbl __attribute__((vector_size(64), may_alias));  // half of the lanes
typedef double DblU __attribute__((vector_size(64), aligned(8), may_alias));
typedef int32_t Half __attribute__((vector_size(32), may_alias));
constexpr int kLanes = 16;

#define RECON3D_INLINE static inline __attribute__((always_inline))

RECON3D_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
RECON3D_INLINE Int load(const int32_t* p) { return *reinterpret_cast<const IntU*>(p); }
RECON3D_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }
RECON3D_INLINE void store(int32_t* p, Int v) { *reinterpret_cast<IntU*>(p) = v; }
RECON3D_INLINE Vec splat(float v) { return Vec{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
RECON3D_INLINE Int splat(int32_t v) { return Int{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
RECON3D_INLINE Dbl load(const double* p) { return *reinterpret_cast<const DblU*>(p); }
RECON3D_INLINE Dbl splat(double v) { return Dbl{v, v, v, v, v, v, v, v}; }
RECON3D_INLINE Int iota() { return Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
RECON3D_INLINE int least(int a, int b) { return a < b ? a : b; }
RECON3D_INLINE int most(int a, int b) { return a > b ? a : b; }

#if RECON3D_LEVEL == 3
// A result that nobody here reads again: past the caches, where slices a power of two apart crowd each other out.
RECON3D_INLINE void store_through(float* p, Vec v) {
  if (reinterpret_cast<uintptr_t>(p) & 63)
    store(p, v);
  else
    _mm512_stream_ps(p, (__m512)v);
}
// Before another thread may read what store_through wrote.
RECON3D_INLINE void finish_stores() { _mm_sfence(); }
RECON3D_INLINE Vec madd(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
RECON3D_INLINE Vec vmax(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
RECON3D_INLINE Vec vabs(Vec a) { return (Vec)_mm512_abs_ps((__m512)a); }
RECON3D_INLINE Int vmax(Int a, Int b) { return (Int)_mm512_max_epi32((__m512i)a, (__m512i)b); }
RECON3D_INLINE Int vmin(Int a, Int b) { return (Int)_mm512_min_epi32((__m512i)a, (__m512i)b); }
RECON3D_INLINE Vec to_float(Int a) { return (Vec)_mm512_cvtepi32_ps((__m512i)a); }
RECON3D_INLINE Int to_int(Vec a) { return (Int)_mm512_cvttps_epi32((__m512)a); }
RECON3D_INLINE Dbl vfloor(Dbl v) {
  return (Dbl)_mm512_roundscale_pd((__m512d)v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
RECON3D_INLINE Int join(Half a, Half b) {
  return (Int)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1);
}
RECON3D_INLINE Int to_int(Dbl a, Dbl b) {
  return join((Half)_mm512_cvttpd_epi32((__m512d)a), (Half)_mm512_cvttpd_epi32((__m512d)b));
}
RECON3D_INLINE Vec to_float(Dbl a, Dbl b) {
  const __m256d low = _mm256_castps_pd(_mm512_cvtpd_ps((__m512d)a)),
                high = _mm256_castps_pd(_mm512_cvtpd_ps((__m512d)b));
  return (Vec)_mm512_insertf64x4(_mm512_castpd256_pd512(low), high, 1);
}
#else
RECON3D_INLINE void store_through(float* p, Vec v) { store(p, v); }
RECON3D_INLINE void finish_stores() {}
RECON3D_INLINE Dbl vfloor(Dbl v) {
  const Dbl whole = __builtin_convertvector(__builtin_convertvector(v, Half), Dbl);
  return whole > v ? whole - splat(1.0) : whole;
}
RECON3D_INLINE Int to_int(Dbl a, Dbl b) {
  Int v;
  for (int l = 0; l < 8; ++l) {
    v[l] = static_cast<int32_t>(a[l]);
    v[l + 8] = static_cast<int32_t>(b[l]);
  }
  return v;
}
RECON3D_INLINE Vec to_float(Dbl a, Dbl b) {
  Vec v;
  for (int l = 0; l < 8; ++l) {
    v[l] = static_cast<float>(a[l]);
    v[l + 8] = static_cast<float>(b[l]);
  }
  return v;
}
RECON3D_INLINE Vec madd(Vec a, Vec b, Vec c) { return a * b + c; }
RECON3D_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
RECON3D_INLINE Vec vabs(Vec a) { return (Vec)((Int)a & splat(0x7fffffff)); }
RECON3D_INLINE Int vmax(Int a, Int b) { return a > b ? a : b; }
RECON3D_INLINE Int vmin(Int a, Int b) { return a < b ? a : b; }
RECON3D_INLINE Vec to_float(Int a) { return __builtin_convertvector(a, Vec); }
RECON3D_INLINE Int to_int(Vec a) { return __builtin_convertvector(a, Int); }
#endif
RECON3D_INLINE Int clamp(Int a, int low, int high) { return vmin(vmax(a, splat(low)), splat(high)); }

#if defined(__clang__)
#define RECON3D_SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define RECON3D_SHUFFLE(A, B, ...) __builtin_shuffle(A, B, Int{__VA_ARGS__})
#endif

// Transposes 16 x 16 floats in place.
RECON3D_INLINE void transpose(Vec* v) {
  for (int step = 8; step; step /= 2) {
    for (int i = 0; i < 16; ++i) {
      if (i & step) continue;
      Vec a = v[i], b = v[i + step];
      // lanes whose index lacks the bit stay, the others change places
      if (step == 8) {
        v[i] = RECON3D_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        v[i + step] = RECON3D_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
      } else if (step == 4) {
        v[i] = RECON3D_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        v[i + step] = RECON3D_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
      } else if (step == 2) {
        v[i] = RECON3D_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        v[i + step] = RECON3D_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
      } else {
        v[i] = RECON3D_SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        v[i + step] = RECON3D_SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
      }
    }
  }
}
