// The NUFFT of volumes, whose grids outgrow every cache. Included after cpu/nufft_kernels.h, in the same namespace.
//
// Lines along z are transformed first, into g[0] slices of n[1] x n[2] registers. Then the grid passes by, plane by
// plane: a plane is made of its slice, serves the points of the slab of tiles it belongs to and the width - 1 planes
// before, and gives way, so that tile + width - 1 planes exist at a time and none of them leaves the cache. A plane has
// width - 1 columns and rows more than the grid, copies of the first ones, so that no tap wraps. The adjoint goes the
// same way back.

constexpr ptrdiff_t kColumns = 32;  // lines along z at a time: 2 KB of neighbours
constexpr int kSegment = 5;         // slabs that the adjoint sums up on their own, see Segments

// [g[0], n[1], n[2]] registers; the padding spreads the elements of a line over the sets of the caches.
template <class T>
struct Slices {
  static constexpr ptrdiff_t E = Lanes<T>::kReals;
  T* cells;
  ptrdiff_t slice;  // in reals
  explicit Slices(const NufftPoints<T>& p)
      : cells(nullptr), slice((((static_cast<ptrdiff_t>(p.n[1]) * p.n[2]) | 1) + kColumns) * E) {}
  size_t bytes(int slices) const { return sizeof(T) * static_cast<size_t>(slice) * static_cast<size_t>(slices); }
};

// The planes at hand, number z at place z mod ring.
template <class T>
struct Planes {
  static constexpr ptrdiff_t E = Lanes<T>::kReals;
  int ring;
  ptrdiff_t row, plane;  // in reals
  NufftScratch memory;
  explicit Planes(const NufftPoints<T>& p)
      : ring(p.tile + p.width - 1),
        row(((p.g[2] + p.width - 1) | 1) * E),
        plane(row * (p.g[1] + p.width - 1)),
        memory(sizeof(T) * static_cast<size_t>(plane) * static_cast<size_t>(ring)) {}
  T* at(int z) const { return memory.template as<T>() + (z % ring) * plane; }
};

// The slabs in runs of at least kSegment. Whatever the number of threads, samples are summed run by run, and what a
// run adds to the first planes of the next one, its tail, is added to that one's slices.
template <class T>
struct Segments {
  int slabs, count;
  explicit Segments(const NufftPoints<T>& p)
      : slabs((p.g[0] + p.tile - 1) / p.tile), count(slabs < 2 * kSegment ? 1 : slabs / kSegment) {}
  int slab(int64_t segment) const { return static_cast<int>(segment * slabs / count); }
};

template <class T>
static bool is_volume(const NufftPoints<T>& p) {
  return p.axes == 3 && p.taps[0] == p.width && p.taps[1] == p.width && p.taps[2] == p.width;
}

// ---- lines, with pixel n / 2 and frequency g / 2 moved to the front
// ------------------------------------------------------

template <class T>
RECON3D_INLINE void pad_line(T* work, const T* from, ptrdiff_t step, ptrdiff_t n, ptrdiff_t g) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t half = n / 2;
  for (ptrdiff_t i = 0; i < half; ++i) store(work + (i + g - half) * E, load(from + i * step));
  for (ptrdiff_t i = half; i < n; ++i) store(work + (i - half) * E, load(from + i * step));
  zero(work + (n - half) * E, g - n);
}
template <class T>
RECON3D_INLINE void turn_line(T* work, const T* from, ptrdiff_t step, ptrdiff_t g) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t half = g / 2;
  for (ptrdiff_t i = 0; i < half; ++i) store(work + (i + g - half) * E, load(from + i * step));
  for (ptrdiff_t i = half; i < g; ++i) store(work + (i - half) * E, load(from + i * step));
}

// ---- image to slices and back ---------------------------------------------------------------------------------------

// The lines along z of image rows y = [begin, end).
template <class T>
static void image_to_slices(const NufftPoints<T>& p, const LanePlan<T>& fft, const Border<const T>& x,
                            const Slices<T>& slices, int64_t begin, int64_t end) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t n0 = p.n[0], n1 = p.n[1], n2 = p.n[2], g = p.g[0];
  LaneBuffer<T> buffer(fft.work + n0 * kColumns);
  T *const work = buffer.get() + n0 * kColumns * E, *const block = buffer.get();
  for (int64_t y = begin; y < end; ++y)
    for (ptrdiff_t left = 0; left < n2; left += kColumns) {
      const ptrdiff_t right = left + kColumns < n2 ? left + kColumns : n2;
      for (ptrdiff_t z = 0; z < n0; ++z) {
        const T scale = p.scale[0][z] * p.scale[1][y];
        const Border<const T> line{x.data + (z * n1 + y) * n2 * x.element, x.lane, x.element, x.filled};
        read_border<T>(line, left, right, [&](ptrdiff_t i, typename Lanes<T>::Vec v) {
          store(block + (z * kColumns + i - left) * E, v * splat(scale * p.scale[2][i]));
        });
      }
      for (ptrdiff_t i = left; i < right; ++i) {
        pad_line(work, block + (i - left) * E, kColumns * E, n0, g);
        lane_fft(fft, work, slices.cells + (y * n2 + i) * E, slices.slice, static_cast<int>(g / 2));
      }
    }
}

// tail[z]: a slice to add to slice z, or null.
template <class T>
static void slices_to_image(const NufftPoints<T>& p, const LanePlan<T>& fft, const Slices<T>& slices,
                            const T* const* tail, const Border<T>& x, int64_t begin, int64_t end) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t n0 = p.n[0], n1 = p.n[1], n2 = p.n[2], g = p.g[0];
  LaneBuffer<T> buffer(fft.work + 2 * g + n0 * kColumns);
  T *const block = buffer.get(), *const sum = block + n0 * kColumns * E, *const line = sum + g * E;
  T* const work = line + g * E;
  for (int64_t y = begin; y < end; ++y)
    for (ptrdiff_t left = 0; left < n2; left += kColumns) {
      const ptrdiff_t right = left + kColumns < n2 ? left + kColumns : n2;
      for (ptrdiff_t i = left; i < right; ++i) {
        const ptrdiff_t at = (y * n2 + i) * E;
        for (ptrdiff_t z = 0; z < g; ++z) {
          typename Lanes<T>::Vec v = load(slices.cells + z * slices.slice + at);
          if (tail[z]) v += load(tail[z] + at);
          store(sum + z * E, v);
        }
        turn_line(work, sum, E, g);
        lane_fft(fft, work, line, E, static_cast<int>(n0 / 2));
        for (ptrdiff_t z = 0; z < n0; ++z) store(block + (z * kColumns + i - left) * E, load(line + z * E));
      }
      for (ptrdiff_t z = 0; z < n0; ++z) {
        const T scale = p.scale[0][z] * p.scale[1][y];
        const Border<T> line_of_x{x.data + (z * n1 + y) * n2 * x.element, x.lane, x.element, x.filled};
        write_border<T>(line_of_x, left, right, [&](ptrdiff_t i) {
          return load(block + (z * kColumns + i - left) * E) * splat(scale * p.scale[2][i]);
        });
      }
    }
}

// ---- slices to planes and back --------------------------------------------------------------------------------------

template <class T>
struct PlaneTransform {
  static constexpr ptrdiff_t E = Lanes<T>::kReals;
  const NufftPoints<T>& p;
  const LanePlan<T>&along_x, &along_y;
  LaneBuffer<T> buffer;
  T *line, *work;
  PlaneTransform(const NufftPoints<T>& points, int sign)
      : p(points),
        along_x(lane_plan<T>(p.g[2], sign)),
        along_y(lane_plan<T>(p.g[1], sign)),
        buffer(longest() + (along_x.work > along_y.work ? along_x.work : along_y.work)),
        line(buffer.get()),
        work(line + longest() * E) {}
  ptrdiff_t longest() const { return p.g[1] > p.g[2] ? p.g[1] : p.g[2]; }

  void forward(const T* slice, T* plane, ptrdiff_t row) {
    const ptrdiff_t n1 = p.n[1], n2 = p.n[2], g1 = p.g[1], g2 = p.g[2], more = p.width - 1;
    for (ptrdiff_t y = 0; y < n1; ++y) {
      pad_line(work, slice + y * n2 * E, E, n2, g2);
      lane_fft(along_x, work, plane + y * row, E, static_cast<int>(g2 / 2));
    }
    for (ptrdiff_t x = 0; x < g2; ++x) {
      pad_line(work, plane + x * E, row, n1, g1);
      lane_fft(along_y, work, plane + x * E, row, static_cast<int>(g1 / 2));
    }
    for (ptrdiff_t y = 0; y < g1; ++y) copy(plane + y * row + g2 * E, plane + y * row, more);
    for (ptrdiff_t y = 0; y < more; ++y) copy(plane + (g1 + y) * row, plane + y * row, g2 + more);
  }
  // plane is used up
  void adjoint(T* plane, T* slice, ptrdiff_t row) {
    const ptrdiff_t n1 = p.n[1], n2 = p.n[2], g1 = p.g[1], g2 = p.g[2], more = p.width - 1;
    for (ptrdiff_t y = 0; y < more; ++y) add(plane + y * row, plane + (g1 + y) * row, g2 + more);
    for (ptrdiff_t y = 0; y < g1; ++y) add(plane + y * row, plane + y * row + g2 * E, more);
    for (ptrdiff_t x = 0; x < g2; ++x) {
      turn_line(work, plane + x * E, row, g1);
      lane_fft(along_y, work, line, E, static_cast<int>(n1 / 2));
      for (ptrdiff_t y = 0; y < n1; ++y) store(plane + y * row + x * E, load(line + y * E));
    }
    for (ptrdiff_t y = 0; y < n1; ++y) {
      turn_line(work, plane + y * row, E, g2);
      lane_fft(along_x, work, line, E, static_cast<int>(n2 / 2));
      copy(slice + y * n2 * E, line, n2);
    }
  }

 private:
  static void copy(T* to, const T* from, ptrdiff_t elements) {
    std::memcpy(to, from, sizeof(T) * static_cast<size_t>(elements * E));
  }
  static void add(T* to, const T* from, ptrdiff_t elements) {
    for (ptrdiff_t i = 0; i < elements * E; i += E) store(to + i, load(to + i) + load(from + i));
  }
};

// ---- planes to samples and back -------------------------------------------------------------------------------------

// A slab's planes from z on, and its points.
template <class T>
struct Slab {
  T* const* plane;
  ptrdiff_t row;
  int z;
  int64_t begin, end;
};

// The data of sorted point q, and a hint that those of a later one are needed: `order` leads all over memory.
constexpr int64_t kAhead = 12;
template <class T>
RECON3D_INLINE T* sample_at(T* y, ptrdiff_t step, const int32_t* order, int64_t q, int64_t end) {
  if (!order) return y + q * step;
  if (q + kAhead < end) __builtin_prefetch(y + order[q + kAhead] * step);
  return y + order[q] * step;
}

// W taps, or p.width of them where W is 0.
template <class T, int W>
static void interpolate_slab(const NufftPoints<T>& p, const Slab<T>& slab, T* y, ptrdiff_t step, const int32_t* order) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const int width = W ? W : p.width;
  for (int64_t q = slab.begin; q < slab.end; ++q) {
    const Taps<T> t = taps_of(p, q, 3, width);
    T* const to = sample_at(y, step, order, q, slab.end);
    Vec sum[W ? W : 16] = {};
    for (int a = 0; a < width; ++a) {
      const T* row = slab.plane[t.at[0] - slab.z + a] + t.at[1] * slab.row + t.at[2] * E;
#pragma GCC unroll 8
      for (int b = 0; b < width; ++b, row += slab.row) {
        const Vec weight = splat(t.weight[0][a] * t.weight[1][b]);
#pragma GCC unroll 8
        for (int c = 0; c < width; ++c) sum[c] = madd(load(row + c * E), weight, sum[c]);
      }
    }
    Vec total = sum[0] * splat(t.weight[2][0]);
#pragma GCC unroll 8
    for (int c = 1; c < width; ++c) total = madd(sum[c], splat(t.weight[2][c]), total);
    store(to, total);
  }
}
template <class T, int W>
static void spread_slab(const NufftPoints<T>& p, const Slab<T>& slab, const T* y, ptrdiff_t step,
                        const int32_t* order) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const int width = W ? W : p.width;
  for (int64_t q = slab.begin; q < slab.end; ++q) {
    const Taps<T> t = taps_of(p, q, 3, width);
    const Vec value = load(sample_at(y, step, order, q, slab.end));
    Vec part[W ? W : 16];
#pragma GCC unroll 8
    for (int c = 0; c < width; ++c) part[c] = value * splat(t.weight[2][c]);
    for (int a = 0; a < width; ++a) {
      T* row = slab.plane[t.at[0] - slab.z + a] + t.at[1] * slab.row + t.at[2] * E;
#pragma GCC unroll 8
      for (int b = 0; b < width; ++b, row += slab.row) {
        const Vec weight = splat(t.weight[0][a] * t.weight[1][b]);
#pragma GCC unroll 8
        for (int c = 0; c < width; ++c) store(row + c * E, madd(part[c], weight, load(row + c * E)));
      }
    }
  }
}

template <class T>
struct SlabKernels {
  void (*interpolate)(const NufftPoints<T>&, const Slab<T>&, T*, ptrdiff_t, const int32_t*);
  void (*spread)(const NufftPoints<T>&, const Slab<T>&, const T*, ptrdiff_t, const int32_t*);
};
template <class T>
static SlabKernels<T> slab_kernels(int width) {
  switch (width) {
#define RECON3D_WIDTH(W) \
  case W:                \
    return {interpolate_slab<T, W>, spread_slab<T, W>};
    RECON3D_WIDTH(3)
    RECON3D_WIDTH(4)
    RECON3D_WIDTH(5)
    RECON3D_WIDTH(6)
    RECON3D_WIDTH(7)
    RECON3D_WIDTH(8)
#undef RECON3D_WIDTH
    default:
      return {interpolate_slab<T, 0>, spread_slab<T, 0>};
  }
}

// ---- whole transforms -----------------------------------------------------------------------------------------------

// body(slab, first plane, plane after the last) for slabs [begin, end), with `planes` of each in a table.
template <class T, class F>
RECON3D_INLINE void each_slab(const NufftPoints<T>& p, const Planes<T>& planes, int begin, int end, const F& body) {
  const int64_t inner = static_cast<int64_t>((p.g[1] + p.tile - 1) / p.tile) * ((p.g[2] + p.tile - 1) / p.tile);
  std::vector<T*> table(static_cast<size_t>(planes.ring));
  for (int s = begin; s < end; ++s) {
    const int low = s * p.tile, high = low + p.tile < p.g[0] ? low + p.tile : p.g[0];
    for (int i = 0; i < planes.ring; ++i) table[static_cast<size_t>(i)] = planes.at(low + i);
    body(Slab<T>{table.data(), planes.row, low, p.tiles[s * inner], p.tiles[(s + 1) * inner]}, low, high);
  }
}

// Samples, in the order of the tiles or in places `order`, `step` reals apart, of a register of volumes.
template <class T>
static void volume_to_samples(const NufftPoints<T>& p, const Border<const T>& x, T* y, ptrdiff_t step,
                              const int32_t* order, const NufftThreads& run) {
  Slices<T> slices(p);
  NufftScratch memory(slices.bytes(p.g[0]));
  slices.cells = memory.template as<T>();
  const LanePlan<T>& along_z = lane_plan<T>(p.g[0], -1);
  run_all(run, p.n[1], [&](int64_t begin, int64_t end) { image_to_slices(p, along_z, x, slices, begin, end); });
  const SlabKernels<T> kernels = slab_kernels<T>(p.width);
  run_all(run, Segments<T>(p).slabs, [&](int64_t begin, int64_t end) {
    const Planes<T> planes(p);
    PlaneTransform<T> transform(p, -1);
    int made = static_cast<int>(begin) * p.tile;
    each_slab(p, planes, static_cast<int>(begin), static_cast<int>(end), [&](const Slab<T>& slab, int, int high) {
      for (; made < high + p.width - 1; ++made)
        transform.forward(slices.cells + made % p.g[0] * slices.slice, planes.at(made), planes.row);
      kernels.interpolate(p, slab, y, step, order);
    });
  });
}

// The conjugate transpose.
template <class T>
static void samples_to_volume(const NufftPoints<T>& p, const T* y, ptrdiff_t step, const int32_t* order,
                              const Border<T>& x, const NufftThreads& run) {
  const Segments<T> segments(p);
  const int more = p.width - 1;
  Slices<T> slices(p);
  NufftScratch memory(slices.bytes(p.g[0] + segments.count * more));
  slices.cells = memory.template as<T>();
  T* const tails = slices.cells + p.g[0] * slices.slice;
  std::vector<const T*> tail(static_cast<size_t>(p.g[0]), nullptr);
  for (int s = 0; s < segments.count; ++s) {
    const int after = s + 1 < segments.count ? segments.slab(s + 1) * p.tile : 0;
    for (int i = 0; i < more; ++i) tail[static_cast<size_t>(after + i)] = tails + (s * more + i) * slices.slice;
  }
  const SlabKernels<T> kernels = slab_kernels<T>(p.width);
  run_all(run, segments.count, [&](int64_t begin, int64_t end) {
    const Planes<T> planes(p);
    PlaneTransform<T> transform(p, 1);
    for (int64_t s = begin; s < end; ++s) {
      const int first = segments.slab(s), last = segments.slab(s + 1);
      int cleared = first * p.tile, done = cleared;
      each_slab(p, planes, first, last, [&](const Slab<T>& slab, int, int high) {
        for (; cleared < high + more; ++cleared) zero(planes.at(cleared), planes.plane / Planes<T>::E);
        kernels.spread(p, slab, y, step, order);
        for (; done < high; ++done) transform.adjoint(planes.at(done), slices.cells + done * slices.slice, planes.row);
      });
      for (int i = 0; i < more; ++i)
        transform.adjoint(planes.at(done + i), tails + (s * more + i) * slices.slice, planes.row);
    }
  });
  const LanePlan<T>& along_z = lane_plan<T>(p.g[0], 1);
  run_all(run, p.n[1],
          [&](int64_t begin, int64_t end) { slices_to_image(p, along_z, slices, tail.data(), x, begin, end); });
}
