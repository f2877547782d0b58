// Lines in the usual layout through the lane FFT. Included after cpu/lane_fft.h, in the same namespace.

template <class T>
static void fft_rows(const LanePlan<T>& plan, const T* in, T* out, int64_t rows, int shift, RunPieces run) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t E = Lanes<T>::kReals, W = Lanes<T>::W;
  const ptrdiff_t n = plan.n, whole = n / W * W;
  run_pieces(run, (rows + W - 1) / W, [&](int64_t begin, int64_t end) {
    LaneBuffer<T> work(plan.work), line(n);
    for (int64_t g = begin; g < end; ++g) {
      const T* from = in + 2 * g * W * n;
      T* to = out + 2 * g * W * n;
      const int filled = static_cast<int>(rows - g * W < W ? rows - g * W : W);
      Vec v[W];
      for (ptrdiff_t i = 0; i < whole; i += W) {
        load_lanes<T>(from + 2 * i, 2 * n, filled, v);
        for (ptrdiff_t k = 0; k < W; ++k) store(work.get() + (i + k) * E, v[k]);
      }
      for (ptrdiff_t i = 2 * whole; i < 2 * n; ++i)
        for (int r = 0; r < W; ++r) work.get()[i / 2 * E + 2 * r + i % 2] = r < filled ? from[r * 2 * n + i] : T(0);
      lane_fft(plan, work.get(), line.get(), E, shift);
      for (ptrdiff_t i = 0; i < whole; i += W) {
        for (ptrdiff_t k = 0; k < W; ++k) v[k] = load(line.get() + (i + k) * E);
        store_lanes<T>(v, to + 2 * i, 2 * n, filled);
      }
      for (ptrdiff_t i = 2 * whole; i < 2 * n; ++i)
        for (int r = 0; r < filled; ++r) to[r * 2 * n + i] = line.get()[i / 2 * E + 2 * r + i % 2];
    }
  });
}
