// F^H diag(w) F along one line of vector lanes, in place in a buffer that stays in L1: decimation in frequency forward,
// its exact transpose back, the two innermost stages and w fused in registers. Included after cpu/lane_fft.h.
//
// A source is called with the number of an element (0..n) and returns it; a sink is called with the number and the
// result. Both may touch the same memory, since a stage reads all that it overwrites before it writes.
//   normal_forward(plan, source, work, sink)        sink gets frequency plan.order[i] as element i
//   normal_backward(plan, source, work, sink)       its transpose: source(i) is frequency plan.order[i]
//   normal_pair(plan, source, work, weight, sink)   both, times weight[i] (real) at place i in between
// work has plan.work elements. Unscaled.

// the scratch line itself: neighbours follow one another
template <class T>
struct FromWork {
  const T* p;
  RECON3D_MEMBER typename Lanes<T>::Vec operator()(ptrdiff_t i) const { return load(p + i * Lanes<T>::kReals); }
};
template <class T>
struct ToWork {
  T* p;
  RECON3D_MEMBER void operator()(ptrdiff_t i, typename Lanes<T>::Vec v) const { store(p + i * Lanes<T>::kReals, v); }
};
template <class T>
struct FromLine {
  const T* p;
  ptrdiff_t stride;  // reals from one element to the next
  RECON3D_MEMBER typename Lanes<T>::Vec operator()(ptrdiff_t i) const { return load(p + i * stride); }
};
template <class T>
struct ToLine {
  T* p;
  ptrdiff_t stride;
  RECON3D_MEMBER void operator()(ptrdiff_t i, typename Lanes<T>::Vec v) const { store(p + i * stride, v); }
};

// v (re - i im)
RECON3D_INLINE VecF times_conj(VecF v, VecF re, VecF im) { return msubadd(v, re, turn(v) * im); }
RECON3D_INLINE VecD times_conj(VecD v, VecD re, VecD im) { return msubadd(v, re, turn(v) * im); }

template <class T, int R, class Source, class Sink>
static void forward_stage(const NormalStage& stage, const T* table, ptrdiff_t n, Source source, Sink sink) {
  using Vec = typename Lanes<T>::Vec;
  const ptrdiff_t step = stage.step, block = step * R;
  const T* w = table + stage.twiddle;
  for (ptrdiff_t p = 0; p < step; ++p, w += 2 * (R - 1))
    for (ptrdiff_t i = p; i < n; i += block) {
      Vec v[R];
      for (ptrdiff_t j = 0; j < R; ++j) v[j] = source(i + j * step);
      Butterfly<T, R, -1>::run(v);
      sink(i, v[0]);
      for (ptrdiff_t k = 1; k < R; ++k) sink(i + k * step, times(v[k], splat(w[2 * k - 2]), splat(w[2 * k - 1])));
    }
}
template <class T, int R, class Source, class Sink>
static void backward_stage(const NormalStage& stage, const T* table, ptrdiff_t n, Source source, Sink sink) {
  using Vec = typename Lanes<T>::Vec;
  const ptrdiff_t step = stage.step, block = step * R;
  const T* w = table + stage.twiddle;
  for (ptrdiff_t p = 0; p < step; ++p, w += 2 * (R - 1))
    for (ptrdiff_t i = p; i < n; i += block) {
      Vec v[R];
      v[0] = source(i);
      for (ptrdiff_t k = 1; k < R; ++k)
        v[k] = times_conj(source(i + k * step), splat(w[2 * k - 2]), splat(w[2 * k - 1]));
      Butterfly<T, R, 1>::run(v);
      for (ptrdiff_t j = 0; j < R; ++j) sink(i + j * step, v[j]);
    }
}
// Neighbours of step 1: no twiddles.
template <class T, int R, class Source, class Sink>
static void forward_last(ptrdiff_t n, Source source, Sink sink) {
  typename Lanes<T>::Vec v[R];
  for (ptrdiff_t i = 0; i < n; i += R) {
    for (ptrdiff_t j = 0; j < R; ++j) v[j] = source(i + j);
    Butterfly<T, R, -1>::run(v);
    for (ptrdiff_t j = 0; j < R; ++j) sink(i + j, v[j]);
  }
}
template <class T, int R, class Source, class Sink>
static void backward_first(ptrdiff_t n, Source source, Sink sink) {
  typename Lanes<T>::Vec v[R];
  for (ptrdiff_t i = 0; i < n; i += R) {
    for (ptrdiff_t j = 0; j < R; ++j) v[j] = source(i + j);
    Butterfly<T, R, 1>::run(v);
    for (ptrdiff_t j = 0; j < R; ++j) sink(i + j, v[j]);
  }
}
template <class T, int R, class Source, class Sink>
static void weighted_middle(ptrdiff_t n, Source source, const T* weight, Sink sink) {
  typename Lanes<T>::Vec v[R];
  for (ptrdiff_t i = 0; i < n; i += R) {
    for (ptrdiff_t j = 0; j < R; ++j) v[j] = source(i + j);
    Butterfly<T, R, -1>::run(v);
    for (ptrdiff_t j = 0; j < R; ++j) v[j] *= splat(weight[i + j]);
    Butterfly<T, R, 1>::run(v);
    for (ptrdiff_t j = 0; j < R; ++j) sink(i + j, v[j]);
  }
}

// A radix without a butterfly, of either sign: sums over its elements, which `scratch` holds meanwhile.
template <class T, int S, class Source, class Sink>
static void any_stage(const NormalStage& stage, const T* table, ptrdiff_t n, Source source, Sink sink, T* scratch) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t r = stage.radix, step = stage.step, half = r / 2;
  const T* root = table + stage.roots;
  T *sum = scratch, *difference = scratch + half * E;
  for (ptrdiff_t p = 0; p < step; ++p) {
    const T* w = table + stage.twiddle + 2 * (r - 1) * p;
    auto get = [&](ptrdiff_t i, ptrdiff_t k) {
      const Vec v = source(i + k * step);
      return S > 0 ? times_conj(v, splat(w[2 * k - 2]), splat(w[2 * k - 1])) : v;
    };
    auto put = [&](ptrdiff_t i, ptrdiff_t k, Vec v) {
      sink(i + k * step, S > 0 ? v : times(v, splat(w[2 * k - 2]), splat(w[2 * k - 1])));
    };
    for (ptrdiff_t i = p; i < n; i += r * step) {
      const Vec first = source(i);
      Vec all = first;
      for (ptrdiff_t j = 1; j <= half; ++j) {
        const Vec a = get(i, j), b = get(i, r - j);
        store(sum + (j - 1) * E, a + b);
        store(difference + (j - 1) * E, a - b);
        all += a + b;
      }
      sink(i, all);
      for (ptrdiff_t k = 1; k <= half; ++k) {
        Vec even = first, odd = splat(T(0));
        for (ptrdiff_t j = 1, jk = k; j <= half; ++j, jk = jk + k < r ? jk + k : jk + k - r) {
          even = madd(load(sum + (j - 1) * E), splat(root[2 * jk]), even);
          odd = madd(load(difference + (j - 1) * E), splat(root[2 * jk + 1]), odd);
        }
        put(i, k, plus_i<-S>(even, odd));  // the roots are those of the forward sign
        put(i, r - k, plus_i<S>(even, odd));
      }
    }
  }
}

#define RECON3D_RADICES(CALL, ...) \
  case 1:                          \
    return CALL(1, __VA_ARGS__);   \
  case 2:                          \
    return CALL(2, __VA_ARGS__);   \
  case 3:                          \
    return CALL(3, __VA_ARGS__);   \
  case 4:                          \
    return CALL(4, __VA_ARGS__);   \
  case 5:                          \
    return CALL(5, __VA_ARGS__);   \
  case 6:                          \
    return CALL(6, __VA_ARGS__);   \
  case 7:                          \
    return CALL(7, __VA_ARGS__);   \
  case 8:                          \
    return CALL(8, __VA_ARGS__);   \
  case 10:                         \
    return CALL(10, __VA_ARGS__)

template <class T, class Source, class Sink>
static void forward_any(const NormalPlan<T>& plan, size_t s, Source source, Sink sink, T* scratch) {
  const NormalStage& stage = plan.stages[s];
  const T* table = plan.table.data();
  const ptrdiff_t n = plan.n;
#define RECON3D_CALL(R, ...) \
  (stage.step == 1 ? forward_last<T, R>(n, source, sink) : forward_stage<T, R>(stage, table, n, source, sink))
  switch (stage.radix) {
    RECON3D_RADICES(RECON3D_CALL, 0);
    default:
      return any_stage<T, -1>(stage, table, n, source, sink, scratch);
  }
#undef RECON3D_CALL
}
template <class T, class Source, class Sink>
static void backward_any(const NormalPlan<T>& plan, size_t s, Source source, Sink sink, T* scratch) {
  const NormalStage& stage = plan.stages[s];
  const T* table = plan.table.data();
  const ptrdiff_t n = plan.n;
#define RECON3D_CALL(R, ...) \
  (stage.step == 1 ? backward_first<T, R>(n, source, sink) : backward_stage<T, R>(stage, table, n, source, sink))
  switch (stage.radix) {
    RECON3D_RADICES(RECON3D_CALL, 0);
    default:
      return any_stage<T, 1>(stage, table, n, source, sink, scratch);
  }
#undef RECON3D_CALL
}
template <class T, class Source, class Sink>
static void middle_any(const NormalPlan<T>& plan, Source source, const T* weight, Sink sink, T* work, T* scratch) {
  const NormalStage& stage = plan.stages.back();
  const T* table = plan.table.data();
  const ptrdiff_t n = plan.n;
#define RECON3D_CALL(R, ...) (weighted_middle<T, R>(n, source, weight, sink))
  switch (stage.radix) {
    RECON3D_RADICES(RECON3D_CALL, 0);
    default: {
      const ToWork<T> to{work};
      const FromWork<T> from{work};
      any_stage<T, -1>(stage, table, n, source, to, scratch);
      for (ptrdiff_t i = 0; i < n; ++i) to(i, from(i) * splat(weight[i]));
      any_stage<T, 1>(stage, table, n, from, sink, scratch);
    }
  }
#undef RECON3D_CALL
}

template <class T, class Source, class Sink>
static void normal_forward(const NormalPlan<T>& plan, Source source, T* work, Sink sink) {
  T* scratch = work + plan.n * Lanes<T>::kReals;
  const FromWork<T> from{work};
  const ToWork<T> to{work};
  const size_t last = plan.stages.size() - 1;
  if (last == 0) return forward_any<T>(plan, 0, source, sink, scratch);
  forward_any<T>(plan, 0, source, to, scratch);
  for (size_t s = 1; s < last; ++s) forward_any<T>(plan, s, from, to, scratch);
  forward_any<T>(plan, last, from, sink, scratch);
}
template <class T, class Source, class Sink>
static void normal_backward(const NormalPlan<T>& plan, Source source, T* work, Sink sink) {
  T* scratch = work + plan.n * Lanes<T>::kReals;
  const FromWork<T> from{work};
  const ToWork<T> to{work};
  const size_t last = plan.stages.size() - 1;
  if (last == 0) return backward_any<T>(plan, 0, source, sink, scratch);
  backward_any<T>(plan, last, source, to, scratch);
  for (size_t s = last - 1; s > 0; --s) backward_any<T>(plan, s, from, to, scratch);
  backward_any<T>(plan, 0, from, sink, scratch);
}
template <class T, class Source, class Sink>
static void normal_pair(const NormalPlan<T>& plan, Source source, T* work, const T* weight, Sink sink) {
  T* scratch = work + plan.n * Lanes<T>::kReals;
  const FromWork<T> from{work};
  const ToWork<T> to{work};
  const size_t last = plan.stages.size() - 1;
  if (last == 0) return middle_any<T>(plan, source, weight, sink, work, scratch);
  forward_any<T>(plan, 0, source, to, scratch);
  for (size_t s = 1; s < last; ++s) forward_any<T>(plan, s, from, to, scratch);
  middle_any<T>(plan, from, weight, to, work, scratch);
  for (size_t s = last - 1; s > 0; --s) backward_any<T>(plan, s, from, to, scratch);
  backward_any<T>(plan, 0, from, sink, scratch);
}
