// FFT of one line whose elements are vector registers of independent transforms. Included once per instruction set
// inside that file's anonymous namespace (RECON3D_LEVEL 0 portable, 2 AVX2 + FMA, 3 AVX-512), after "cpu/lane_plan.h",
// <immintrin.h> and the target pragma; see sense_avx512.cpp for the frame. T is float or double throughout.
//
//   Lanes<T>::Vec, W, kReals       a register of W complex numbers, each re then im: kReals = 2 W reals
//                                  (AVX-512: 8 complex64 or 4 complex128; AVX2: 4 or 2; portable: 2 or 1)
//   load(p) store(p, v) splat(a)   no alignment needed (64 bytes is fastest); splat repeats one real number
//   madd(a, b, c)                  a b + c per real, rounded once where the processor can
//   turn(v)                        (re, im) -> (im, re)
//   times(v, re, im)               v (re + i im), one factor for all lanes, given as splats
//   times(v, w), conj_times(v, w)  v w and conj(v) w, lane by lane
//   plus_i<S>(a, b)                a + S i b
//   load_lanes(p, stride, rows, v) W rows of W neighbouring complex numbers -> v[i] = element i of all rows;
//                                  rows beyond `rows` count as zeros and are not read. stride in reals.
//   store_lanes(v, p, stride, rows) the way back
//   sum_lanes(v)                   W registers -> one: number i is the sum of the lanes of v[i]
//
//   LaneBuffer<T>(elements).get()  aligned scratch
//
//   lane_fft(plan, work, dst, stride, shift)
//     Transforms the plan.n elements at the front of work (element j at work + 2 W j; all of work, plan.work elements,
//     is destroyed) and stores output k at dst + ((k + shift) mod n) stride. stride is in reals, at least 2 W;
//     0 <= shift < n. dst must not overlap work. Unscaled; sign -1 is exp(-i). fftshift of the output is
//     shift = n / 2 (integer division); ifftshift of the input is the caller's when it fills work. Padding too.

#define RECON3D_INLINE static inline __attribute__((always_inline))
#define RECON3D_MEMBER inline __attribute__((always_inline))
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
typedef int32_t IndexF __attribute__((vector_size(kBytes)));
typedef int64_t IndexD __attribute__((vector_size(kBytes)));

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using Vec = VecF;
  using Index = IndexF;
  static constexpr int kReals = kBytes / 4, W = kReals / 2;
};
template <>
struct Lanes<double> {
  using Vec = VecD;
  using Index = IndexD;
  static constexpr int kReals = kBytes / 8, W = kReals / 2;
};

RECON3D_INLINE VecF load(const float* p) { return *reinterpret_cast<const LooseF*>(p); }
RECON3D_INLINE VecD load(const double* p) { return *reinterpret_cast<const LooseD*>(p); }
RECON3D_INLINE void store(float* p, VecF v) { *reinterpret_cast<LooseF*>(p) = v; }
RECON3D_INLINE void store(double* p, VecD v) { *reinterpret_cast<LooseD*>(p) = v; }
RECON3D_INLINE VecF splat(float a) { return a - VecF{}; }
RECON3D_INLINE VecD splat(double a) { return a - VecD{}; }

// Aligned scratch of `elements` registers, contents arbitrary.
template <class T>
struct LaneBuffer {
  explicit LaneBuffer(ptrdiff_t elements)
      : memory_(static_cast<T*>(std::aligned_alloc(64, (elements * kBytes + 127) / 64 * 64))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~LaneBuffer() { std::free(memory_); }
  LaneBuffer(const LaneBuffer&) = delete;
  LaneBuffer& operator=(const LaneBuffer&) = delete;
  T* get() const { return memory_; }

 private:
  T* memory_;
};

// ---- shuffles of one or two registers, by number of element ---------------------------------------------------------

template <int... I>
struct Sequence {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using type = Sequence<I...>;
};

#if defined(__clang__)
#define RECON3D_SHUFFLE(T, A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
#define RECON3D_SHUFFLE(T, A, B, ...) __builtin_shuffle(A, B, typename Lanes<T>::Index{__VA_ARGS__})
#endif

template <class T, int... I>
RECON3D_INLINE typename Lanes<T>::Vec turn_of(typename Lanes<T>::Vec v, Sequence<I...>) {
  return RECON3D_SHUFFLE(T, v, v, (I ^ 1)...);
}
RECON3D_INLINE VecF turn(VecF v) { return turn_of<float>(v, CountTo<Lanes<float>::kReals>::type()); }
RECON3D_INLINE VecD turn(VecD v) { return turn_of<double>(v, CountTo<Lanes<double>::kReals>::type()); }

// Numbers whose index lacks the bit STEP (of complex numbers) from a and b: a's stay, b's move up by STEP; and the
// rest.
template <class T, int STEP, int... I>
RECON3D_INLINE typename Lanes<T>::Vec mix_low(typename Lanes<T>::Vec a, typename Lanes<T>::Vec b, Sequence<I...>) {
  return RECON3D_SHUFFLE(T, a, b, ((I / 2) & STEP ? I - 2 * STEP + Lanes<T>::kReals : I)...);
}
template <class T, int STEP, int... I>
RECON3D_INLINE typename Lanes<T>::Vec mix_high(typename Lanes<T>::Vec a, typename Lanes<T>::Vec b, Sequence<I...>) {
  return RECON3D_SHUFFLE(T, a, b, ((I / 2) & STEP ? I + Lanes<T>::kReals : I + 2 * STEP)...);
}

// ---- complex arithmetic ---------------------------------------------------------------------------------------------

#if RECON3D_LEVEL == 3
RECON3D_INLINE VecF madd(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
RECON3D_INLINE VecD madd(VecD a, VecD b, VecD c) { return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
// a b - c in the real parts, a b + c in the imaginary ones; and the other way round
RECON3D_INLINE VecF maddsub(VecF a, VecF b, VecF c) {
  return (VecF)_mm512_fmaddsub_ps((__m512)a, (__m512)b, (__m512)c);
}
RECON3D_INLINE VecD maddsub(VecD a, VecD b, VecD c) {
  return (VecD)_mm512_fmaddsub_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
RECON3D_INLINE VecF msubadd(VecF a, VecF b, VecF c) {
  return (VecF)_mm512_fmsubadd_ps((__m512)a, (__m512)b, (__m512)c);
}
RECON3D_INLINE VecD msubadd(VecD a, VecD b, VecD c) {
  return (VecD)_mm512_fmsubadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
RECON3D_INLINE VecF real_part(VecF v) { return (VecF)_mm512_moveldup_ps((__m512)v); }
RECON3D_INLINE VecF imaginary_part(VecF v) { return (VecF)_mm512_movehdup_ps((__m512)v); }
RECON3D_INLINE VecD real_part(VecD v) { return (VecD)_mm512_movedup_pd((__m512d)v); }
RECON3D_INLINE VecD imaginary_part(VecD v) { return (VecD)_mm512_permute_pd((__m512d)v, 0xff); }
#else
#if RECON3D_LEVEL == 2
RECON3D_INLINE VecF madd(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
RECON3D_INLINE VecD madd(VecD a, VecD b, VecD c) { return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
RECON3D_INLINE VecF maddsub(VecF a, VecF b, VecF c) {
  return (VecF)_mm256_fmaddsub_ps((__m256)a, (__m256)b, (__m256)c);
}
RECON3D_INLINE VecD maddsub(VecD a, VecD b, VecD c) {
  return (VecD)_mm256_fmaddsub_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
RECON3D_INLINE VecF msubadd(VecF a, VecF b, VecF c) {
  return (VecF)_mm256_fmsubadd_ps((__m256)a, (__m256)b, (__m256)c);
}
RECON3D_INLINE VecD msubadd(VecD a, VecD b, VecD c) {
  return (VecD)_mm256_fmsubadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
template <class T, int... I>
RECON3D_INLINE typename Lanes<T>::Vec signs_of(T even, T odd, Sequence<I...>) {
  return typename Lanes<T>::Vec{(I & 1 ? odd : even)...};
}
RECON3D_INLINE VecF signs(float even, float odd) {
  return signs_of<float>(even, odd, CountTo<Lanes<float>::kReals>::type());
}
RECON3D_INLINE VecD signs(double even, double odd) {
  return signs_of<double>(even, odd, CountTo<Lanes<double>::kReals>::type());
}
RECON3D_INLINE VecF madd(VecF a, VecF b, VecF c) { return a * b + c; }
RECON3D_INLINE VecD madd(VecD a, VecD b, VecD c) { return a * b + c; }
RECON3D_INLINE VecF maddsub(VecF a, VecF b, VecF c) { return a * b + signs(-1.f, 1.f) * c; }
RECON3D_INLINE VecD maddsub(VecD a, VecD b, VecD c) { return a * b + signs(-1., 1.) * c; }
RECON3D_INLINE VecF msubadd(VecF a, VecF b, VecF c) { return a * b + signs(1.f, -1.f) * c; }
RECON3D_INLINE VecD msubadd(VecD a, VecD b, VecD c) { return a * b + signs(1., -1.) * c; }
#endif
template <class T, int... I>
RECON3D_INLINE typename Lanes<T>::Vec part_of(typename Lanes<T>::Vec v, Sequence<I...>, Sequence<>) {
  return RECON3D_SHUFFLE(T, v, v, (I & ~1)...);
}
template <class T, int... I>
RECON3D_INLINE typename Lanes<T>::Vec part_of(typename Lanes<T>::Vec v, Sequence<I...>, Sequence<1>) {
  return RECON3D_SHUFFLE(T, v, v, (I | 1)...);
}
RECON3D_INLINE VecF real_part(VecF v) { return part_of<float>(v, CountTo<Lanes<float>::kReals>::type(), Sequence<>()); }
RECON3D_INLINE VecF imaginary_part(VecF v) {
  return part_of<float>(v, CountTo<Lanes<float>::kReals>::type(), Sequence<1>());
}
RECON3D_INLINE VecD real_part(VecD v) {
  return part_of<double>(v, CountTo<Lanes<double>::kReals>::type(), Sequence<>());
}
RECON3D_INLINE VecD imaginary_part(VecD v) {
  return part_of<double>(v, CountTo<Lanes<double>::kReals>::type(), Sequence<1>());
}
#endif

RECON3D_INLINE VecF times(VecF v, VecF re, VecF im) { return maddsub(v, re, turn(v) * im); }
RECON3D_INLINE VecD times(VecD v, VecD re, VecD im) { return maddsub(v, re, turn(v) * im); }
RECON3D_INLINE VecF times(VecF v, VecF w) { return times(v, real_part(w), imaginary_part(w)); }
RECON3D_INLINE VecD times(VecD v, VecD w) { return times(v, real_part(w), imaginary_part(w)); }
RECON3D_INLINE VecF conj_times(VecF v, VecF w) { return msubadd(w, real_part(v), turn(w) * imaginary_part(v)); }
RECON3D_INLINE VecD conj_times(VecD v, VecD w) { return msubadd(w, real_part(v), turn(w) * imaginary_part(v)); }

template <int S>
RECON3D_INLINE VecF plus_i(VecF a, VecF b) {
  const VecF one = splat(1.f);
  return S > 0 ? maddsub(a, one, turn(b)) : msubadd(a, one, turn(b));
}
template <int S>
RECON3D_INLINE VecD plus_i(VecD a, VecD b) {
  const VecD one = splat(1.);
  return S > 0 ? maddsub(a, one, turn(b)) : msubadd(a, one, turn(b));
}

// ---- between the usual layout and lanes -----------------------------------------------------------------------------

template <class T, int STEP>
struct Transpose {
  using Vec = typename Lanes<T>::Vec;
  static inline __attribute__((always_inline)) void run(Vec* v) {
    constexpr auto all = typename CountTo<Lanes<T>::kReals>::type();
    for (int i = 0; i < Lanes<T>::W; ++i) {
      if (i & STEP) continue;
      const Vec a = v[i], b = v[i + STEP];
      v[i] = mix_low<T, STEP>(a, b, all);
      v[i + STEP] = mix_high<T, STEP>(a, b, all);
    }
    Transpose<T, STEP / 2>::run(v);
  }
};
template <class T>
struct Transpose<T, 0> {
  static inline __attribute__((always_inline)) void run(typename Lanes<T>::Vec*) {}
};

// W x W complex numbers in place.
template <class T>
RECON3D_INLINE void transpose(typename Lanes<T>::Vec* v) {
  Transpose<T, Lanes<T>::W / 2>::run(v);
}

template <class T>
RECON3D_INLINE void load_lanes(const T* p, ptrdiff_t stride, int rows, typename Lanes<T>::Vec* v) {
  for (int i = 0; i < Lanes<T>::W; ++i) v[i] = i < rows ? load(p + i * stride) : splat(T(0));
  transpose<T>(v);
}
template <class T>
RECON3D_INLINE void store_lanes(typename Lanes<T>::Vec* v, T* p, ptrdiff_t stride, int rows) {
  transpose<T>(v);
  for (int i = 0; i < Lanes<T>::W; ++i)
    if (i < rows) store(p + i * stride, v[i]);
}

template <class T, int STEP>
struct SumLanes {
  using Vec = typename Lanes<T>::Vec;
  // the registers i, i + STEP merge: half of the sums of each, at places that differ in the bit STEP
  static inline __attribute__((always_inline)) Vec run(Vec* v) {
    constexpr auto all = typename CountTo<Lanes<T>::kReals>::type();
    for (int i = 0; i < STEP; ++i)
      v[i] = mix_low<T, STEP>(v[i], v[i + STEP], all) + mix_high<T, STEP>(v[i], v[i + STEP], all);
    return SumLanes<T, STEP / 2>::run(v);
  }
};
template <class T>
struct SumLanes<T, 0> {
  static inline __attribute__((always_inline)) typename Lanes<T>::Vec run(typename Lanes<T>::Vec* v) { return v[0]; }
};
template <class T>
RECON3D_INLINE typename Lanes<T>::Vec sum_lanes(typename Lanes<T>::Vec* v) {
  return SumLanes<T, Lanes<T>::W / 2>::run(v);
}

// ---- butterflies: x[0..R) replaced by its transform of sign S
// --------------------------------------------------------

// cos and sin of 2 pi j / R
template <int R>
struct Circle;
template <>
struct Circle<3> {
  static constexpr double c[] = {1, -0.5, -0.5}, s[] = {0, 0.86602540378443865, -0.86602540378443865};
};
template <>
struct Circle<5> {
  static constexpr double c[] = {1, 0.30901699437494742, -0.80901699437494742, -0.80901699437494742,
                                 0.30901699437494742},
                          s[] = {0, 0.95105651629515357, 0.58778525229247313, -0.58778525229247313,
                                 -0.95105651629515357};
};
template <>
struct Circle<7> {
  static constexpr double c[] = {1,
                                 0.62348980185873353,
                                 -0.22252093395631440,
                                 -0.90096886790241913,
                                 -0.90096886790241913,
                                 -0.22252093395631440,
                                 0.62348980185873353},
                          s[] = {0,
                                 0.78183148246802981,
                                 0.97492791218182361,
                                 0.43388373911755812,
                                 -0.43388373911755812,
                                 -0.97492791218182361,
                                 -0.78183148246802981};
};

// Odd R from sums and differences of mirrored elements; even ones below.
template <class T, int R, int S>
struct Butterfly {
  using Vec = typename Lanes<T>::Vec;
  static inline __attribute__((always_inline)) void run(Vec* x) {
    if constexpr (R % 2 == 1) {
      constexpr int H = R / 2;
      Vec sum[H], difference[H], all = x[0];
      const Vec first = x[0];
      for (int j = 0; j < H; ++j) {
        sum[j] = x[j + 1] + x[R - 1 - j];
        difference[j] = x[j + 1] - x[R - 1 - j];
        all += sum[j];
      }
      for (int k = 1; k <= H; ++k) {
        Vec even = first, odd = difference[0] * splat(T(Circle<R>::s[k]));
        for (int j = 0; j < H; ++j) even = madd(sum[j], splat(T(Circle<R>::c[(j + 1) * k % R])), even);
        for (int j = 1; j < H; ++j) odd = madd(difference[j], splat(T(Circle<R>::s[(j + 1) * k % R])), odd);
        x[k] = plus_i<S>(even, odd);
        x[R - k] = plus_i<-S>(even, odd);
      }
      x[0] = all;
    } else {
      // R = 2 Q with odd Q: index Q a + 2 b mod R, no twiddles between (Good's mapping)
      constexpr int Q = R / 2;
      static_assert(Q % 2 == 1 && Q > 1, "no such butterfly");
      Vec low[Q], high[Q];
      for (int b = 0; b < Q; ++b) {
        low[b] = x[2 * b % R] + x[(Q + 2 * b) % R];
        high[b] = x[2 * b % R] - x[(Q + 2 * b) % R];
      }
      Butterfly<T, Q, S>::run(low);
      Butterfly<T, Q, S>::run(high);
      for (int k = 0; k < R; ++k) x[k] = k % 2 ? high[k % Q] : low[k % Q];
    }
  }
};
template <class T, int S>
struct Butterfly<T, 1, S> {
  static inline __attribute__((always_inline)) void run(typename Lanes<T>::Vec*) {}
};
template <class T, int S>
struct Butterfly<T, 2, S> {
  using Vec = typename Lanes<T>::Vec;
  static inline __attribute__((always_inline)) void run(Vec* x) {
    const Vec a = x[0];
    x[0] = a + x[1];
    x[1] = a - x[1];
  }
};
template <class T, int S>
struct Butterfly<T, 4, S> {
  using Vec = typename Lanes<T>::Vec;
  static inline __attribute__((always_inline)) void run(Vec* x) {
    const Vec a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = x[1] - x[3];
    x[0] = a + c;
    x[2] = a - c;
    x[1] = plus_i<S>(b, d);
    x[3] = plus_i<-S>(b, d);
  }
};
template <class T, int S>
struct Butterfly<T, 8, S> {
  using Vec = typename Lanes<T>::Vec;
  static inline __attribute__((always_inline)) void run(Vec* x) {
    const Vec half = splat(T(0.70710678118654752));
    Vec e[4] = {x[0], x[2], x[4], x[6]}, o[4] = {x[1], x[3], x[5], x[7]};
    Butterfly<T, 4, S>::run(e);
    Butterfly<T, 4, S>::run(o);
    const Vec p = plus_i<S>(o[1], o[1]),
              m = plus_i<-S>(o[3], o[3]);  // times sqrt 2: o1 exp(S i pi/4), -o3 exp(3 S i pi/4)
    x[0] = e[0] + o[0];
    x[4] = e[0] - o[0];
    x[1] = madd(p, half, e[1]);
    x[5] = madd(p, -half, e[1]);
    x[2] = plus_i<S>(e[2], o[2]);
    x[6] = plus_i<-S>(e[2], o[2]);
    x[3] = madd(m, -half, e[3]);
    x[7] = madd(m, half, e[3]);
  }
};

// ---- stages (Stockham: natural order in and out, from x to y)
// --------------------------------------------------------

template <class T, int R, int S>
static void lane_stage(const LaneStage& stage, const T* table, const T* x, T* y) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t span = stage.span, leap = span * stage.groups * E;
  const T* w = table + stage.twiddle;
  for (ptrdiff_t p = 0; p < stage.groups; ++p, w += 2 * (R - 1)) {
    const T* from = x + span * p * E;
    T* to = y + span * R * p * E;
    for (ptrdiff_t q = 0; q < span; ++q, from += E, to += E) {
      Vec v[R];
      for (int j = 0; j < R; ++j) v[j] = load(from + j * leap);
      Butterfly<T, R, S>::run(v);
      store(to, v[0]);
      for (int k = 1; k < R; ++k) store(to + k * span * E, times(v[k], splat(w[2 * k - 2]), splat(w[2 * k - 1])));
    }
  }
}

template <class T, int R, int S>
static void lane_last_stage(const LaneStage& stage, const T* x, T* y, ptrdiff_t stride, int shift) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t span = stage.span, n = span * R;
  for (ptrdiff_t q = 0; q < span; ++q) {
    Vec v[R];
    for (int j = 0; j < R; ++j) v[j] = load(x + (q + span * j) * E);
    Butterfly<T, R, S>::run(v);
    for (int k = 0; k < R; ++k) {
      ptrdiff_t at = q + span * k + shift;
      if (at >= n) at -= n;
      store(y + at * stride, v[k]);
    }
  }
}

// Any other radix: sums over its elements. scratch holds `radix` elements.
template <class T>
static void lane_any_stage(const LaneStage& stage, const T* table, const T* x, T* y, ptrdiff_t stride, ptrdiff_t shift,
                           T* scratch) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t r = stage.radix, span = stage.span, groups = stage.groups, n = r * span * groups, half = r / 2;
  const T* root = table + stage.roots;
  for (ptrdiff_t p = 0; p < groups; ++p) {
    const T* w = table + stage.twiddle + 2 * (r - 1) * p;
    for (ptrdiff_t q = 0; q < span; ++q) {
      const Vec first = load(x + (q + span * p) * E);
      Vec all = first;
      T *sum = scratch, *difference = scratch + half * E;
      for (ptrdiff_t j = 1; j <= half; ++j) {
        const Vec a = load(x + (q + span * (p + groups * j)) * E),
                  b = load(x + (q + span * (p + groups * (r - j))) * E);
        store(sum + (j - 1) * E, a + b);
        store(difference + (j - 1) * E, a - b);
        all += a + b;
      }
      auto put = [&](ptrdiff_t k, Vec v) {
        ptrdiff_t at = q + span * (r * p + k) + shift;
        if (at >= n) at -= n;
        store(y + at * stride, k ? times(v, splat(w[2 * k - 2]), splat(w[2 * k - 1])) : v);
      };
      put(0, all);
      for (ptrdiff_t k = 1; k <= half; ++k) {
        Vec even = first, odd = splat(T(0));
        for (ptrdiff_t j = 1, jk = k; j <= half; ++j, jk = jk + k < r ? jk + k : jk + k - r) {
          even = madd(load(sum + (j - 1) * E), splat(root[2 * jk]), even);
          odd = madd(load(difference + (j - 1) * E), splat(root[2 * jk + 1]), odd);
        }
        put(k, plus_i<1>(even, odd));
        put(r - k, plus_i<-1>(even, odd));
      }
    }
  }
}

template <class T, int S>
static void lane_fft_signed(const LanePlan<T>& plan, T* work, T* dst, ptrdiff_t stride, int shift) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  T *x = work, *y = work + plan.n * E;
  T* const scratch = y + plan.n * E;
  const T* table = plan.table.data();
  if (plan.stages.empty()) return store(dst, load(x));
  for (size_t i = 0; i + 1 < plan.stages.size(); ++i) {
    const LaneStage& stage = plan.stages[i];
    switch (stage.radix) {
#define RECON3D_STAGE(R)                     \
  case R:                                    \
    lane_stage<T, R, S>(stage, table, x, y); \
    break;
      RECON3D_STAGE(2)
      RECON3D_STAGE(3)
      RECON3D_STAGE(4)
      RECON3D_STAGE(5)
      RECON3D_STAGE(6)
      RECON3D_STAGE(7)
      RECON3D_STAGE(8)
      RECON3D_STAGE(10)
#undef RECON3D_STAGE
      default:
        lane_any_stage(stage, table, x, y, E, 0, scratch);
    }
    T* swap = x;
    x = y;
    y = swap;
  }
  const LaneStage& last = plan.stages.back();
  switch (last.radix) {
#define RECON3D_STAGE(R)                                   \
  case R:                                                  \
    lane_last_stage<T, R, S>(last, x, dst, stride, shift); \
    break;
    RECON3D_STAGE(2)
    RECON3D_STAGE(3)
    RECON3D_STAGE(4)
    RECON3D_STAGE(5)
    RECON3D_STAGE(6)
    RECON3D_STAGE(7)
    RECON3D_STAGE(8)
    RECON3D_STAGE(10)
#undef RECON3D_STAGE
    default:
      lane_any_stage(last, table, x, dst, stride, shift, scratch);
  }
}

template <class T>
static void lane_fft(const LanePlan<T>& plan, T* work, T* dst, ptrdiff_t stride, int shift) {
  (plan.sign > 0 ? lane_fft_signed<T, 1> : lane_fft_signed<T, -1>)(plan, work, dst, stride, shift);
}
