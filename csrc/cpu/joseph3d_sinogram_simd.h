// Registers of one instruction set, included once per set inside its namespace (RECON3D_LEVEL 0 portable, 2 AVX2 + FMA,
// 3 AVX-512): load and store of whole and of partly used registers, splat.

#define RECON3D_INLINE static inline __attribute__((always_inline))
#if RECON3D_LEVEL == 3
constexpr int kBytes = 64;
#elif RECON3D_LEVEL == 2
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kBytes), may_alias));
typedef double VecD __attribute__((vector_size(kBytes), may_alias));
typedef float LooseF __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef double LooseD __attribute__((vector_size(kBytes), aligned(8), may_alias));

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using Vec = VecF;
  static constexpr int W = kBytes / 4;
};
template <>
struct Lanes<double> {
  using Vec = VecD;
  static constexpr int W = kBytes / 8;
};

RECON3D_INLINE VecF load(const float* p) { return *reinterpret_cast<const LooseF*>(p); }
RECON3D_INLINE VecD load(const double* p) { return *reinterpret_cast<const LooseD*>(p); }
RECON3D_INLINE void store(float* p, VecF v) { *reinterpret_cast<LooseF*>(p) = v; }
RECON3D_INLINE void store(double* p, VecD v) { *reinterpret_cast<LooseD*>(p) = v; }
RECON3D_INLINE VecF splat(float a) { return a - VecF{}; }
RECON3D_INLINE VecD splat(double a) { return a - VecD{}; }

// The first n >= 1 elements; the rest count as zeros and are not touched.
#if RECON3D_LEVEL == 3
RECON3D_INLINE VecF load_part(const float* p, int n) {
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
RECON3D_INLINE VecD load_part(const double* p, int n) {
  return (VecD)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
RECON3D_INLINE void store_part(float* p, VecF v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
RECON3D_INLINE void store_part(double* p, VecD v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
}
#else
RECON3D_INLINE VecF load_part(const float* p, int n) {
  if (n == kBytes / 4) return load(p);
  VecF v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
RECON3D_INLINE VecD load_part(const double* p, int n) {
  if (n == kBytes / 8) return load(p);
  VecD v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
RECON3D_INLINE void store_part(float* p, VecF v, int n) {
  if (n == kBytes / 4) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
RECON3D_INLINE void store_part(double* p, VecD v, int n) {
  if (n == kBytes / 8) return store(p, v);
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#endif
