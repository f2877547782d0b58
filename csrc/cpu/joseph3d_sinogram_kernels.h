// The sinogram projector of one instruction set, included after cpu/joseph3d_sinogram_simd.h.
//
// The volume is copied to [y][x][phase][z / step]: voxels that neighbouring planes of a segment meet stand side by
// side, for span 1 those of even and those of odd z. At every plane of voxels that a line crosses, two such columns are
// blended into one, once for all segments; a piece of a segment is then two runs of that column, shifted by whole
// elements and weighted by numbers that all its planes share. Up to kBlock crossings wait side by side (in L1) until
// every piece takes its sums over them, in registers. The transpose does the same backwards: threads own planes of
// voxels, so that nothing is added by two of them, and first build the columns of a line in the scratch.

constexpr int kBlock = 16;    // crossings taken together
constexpr int kMostRows = 4;  // registers along z of a piece
constexpr int kMostRowsTof = RECON3D_LEVEL == 3 ? 4 : 2;
// time bins taken together: what leaves a few registers beside the sums
constexpr int most_bins(int rows) { return RECON3D_LEVEL == 3 ? (rows == 4 ? 6 : 8) : (rows == 2 ? 5 : 8); }
constexpr int kStoredBins = 32;  // whose weights are kept for the next pieces

// Sizes of columns in the copied volume and in the scratch, in elements.
template <class T>
struct Columns {
  static constexpr ptrdiff_t kWidest = kMostRows * Lanes<T>::W;
  ptrdiff_t step, nz, run;            // of one phase in the volume, whole registers
  ptrdiff_t pixel, row;               // of the volume
  ptrdiff_t phase, left, line, rows;  // of the scratch: a phase with zeros on both sides, and a whole column
  int32_t lowest, highest;            // z beyond which a piece meets zeros only

  Columns(int step_, const RayGrid& g)
      : step(step_), nz(g.n[0]), run(((nz + step - 1) / step + Lanes<T>::W - 1) / Lanes<T>::W * Lanes<T>::W) {
    pixel = step * run;
    row = g.n[2] * pixel + 9 * 64 / static_cast<ptrdiff_t>(sizeof(T));  // rows must not share their cache sets
    left = kWidest + Lanes<T>::W;
    phase = left + run + kWidest + Lanes<T>::W;
    rows = step > 1 ? step : 2;
    line = rows * phase;
    lowest = static_cast<int32_t>(-step * (kWidest + 1));
    highest = static_cast<int32_t>(step * run);
  }
};

// Where and with what weights a piece takes from kBlock columns.
template <class T>
struct alignas(64) Taps {
  T t[kBlock];  // of the way, from the middle
  T low_weight[kBlock], high_weight[kBlock];
  int32_t low[kBlock], high[kBlock];
  T bins[kStoredBins][kBlock];  // weights of time bins
};

// `split` keeps what belongs to the upper voxel in a row of its own where it would overlap the lower one (step 1).
template <class T, int STEP>
RECON3D_INLINE void set_taps(const Columns<T>& c, const SinogramPiece& piece, T mm, bool split, Taps<T>& s) {
  const T part = static_cast<T>(piece.part), tilt = static_cast<T>(piece.tilt);
  const T inverse = T(1) / static_cast<T>(c.step);
  const int32_t low = piece.low, lowest = c.lowest, highest = c.highest, step = static_cast<int32_t>(c.step),
                phase = static_cast<int32_t>(c.phase), left = static_cast<int32_t>(c.left),
                line = static_cast<int32_t>(c.line), up = split ? phase + 1 : 1;
  for (int j = 0; j < kBlock; ++j) {
    const T at = s.t[j] * tilt + part;
    int32_t whole = static_cast<int32_t>(at);
    whole -= at < static_cast<T>(whole);
    const T high = (at - static_cast<T>(whole)) * mm;
    s.high_weight[j] = high;
    s.low_weight[j] = mm - high;
    int32_t z = whole + low;
    z = z < lowest ? lowest : z;
    z = z > highest ? highest : z;
    const int32_t from = j * line + left;
    if (STEP == 1) {
      s.low[j] = from + z;
      s.high[j] = from + z + up;
    } else if (STEP == 2) {
      const int32_t odd = z & 1, q = z >> 1;
      s.low[j] = from + q + (odd ? phase : 0);
      s.high[j] = from + q + (odd ? 1 : phase);
    } else {
      const T ratio = (static_cast<T>(z) + T(0.5)) * inverse;
      int32_t q = static_cast<int32_t>(ratio);
      q -= ratio < static_cast<T>(q);
      const int32_t rest = z - q * step;
      s.low[j] = from + q + rest * phase;
      s.high[j] = from + q + (rest + 1 == step ? 1 : (rest + 1) * phase);
    }
  }
}
template <class T>
static void set_taps(const Columns<T>& c, const SinogramPiece& piece, T mm, bool split, Taps<T>& s) {
  if (c.step == 1)
    set_taps<T, 1>(c, piece, mm, split, s);
  else if (c.step == 2)
    set_taps<T, 2>(c, piece, mm, split, s);
  else
    set_taps<T, 0>(c, piece, mm, split, s);
}

// ---- a piece over the crossings of a block --------------------------------------------------------------------------

template <class T, int ROWS>
static void take(const T* columns, const Taps<T>& s, int used, T* y, int count) {
  constexpr int W = Lanes<T>::W;
  typename Lanes<T>::Vec low[ROWS] = {}, high[ROWS] = {};
  for (int j = 0; j < used; ++j) {
    const T *p = columns + s.low[j], *q = columns + s.high[j];
    const typename Lanes<T>::Vec a = splat(s.low_weight[j]), b = splat(s.high_weight[j]);
    for (int v = 0; v < ROWS; ++v) {
      low[v] = a * load(p + v * W) + low[v];
      high[v] = b * load(q + v * W) + high[v];
    }
  }
  for (int v = 0; v < ROWS - 1; ++v) store(y + v * W, load(y + v * W) + (low[v] + high[v]));
  T* last = y + (ROWS - 1) * W;
  const int rest = count - (ROWS - 1) * W;
  store_part(last, load_part(last, rest) + (low[ROWS - 1] + high[ROWS - 1]), rest);
}

template <class T, int ROWS>
static void give(const T* y, int count, const Taps<T>& s, int used, T* columns) {
  constexpr int W = Lanes<T>::W;
  typename Lanes<T>::Vec value[ROWS];
  for (int v = 0; v < ROWS - 1; ++v) value[v] = load(y + v * W);
  value[ROWS - 1] = load_part(y + (ROWS - 1) * W, count - (ROWS - 1) * W);
  for (int j = 0; j < used; ++j) {
    T *p = columns + s.low[j], *q = columns + s.high[j];
    const typename Lanes<T>::Vec a = splat(s.low_weight[j]), b = splat(s.high_weight[j]);
    for (int v = 0; v < ROWS; ++v) {
      store(p + v * W, a * value[v] + load(p + v * W));
      store(q + v * W, b * value[v] + load(q + v * W));
    }
  }
}

template <class T, int ROWS, int BINS>
static void take_bins(const T* columns, const Taps<T>& s, int bin, int used, T* y, int64_t planes, int count) {
  constexpr int W = Lanes<T>::W;
  using Vec = typename Lanes<T>::Vec;
  Vec sum[BINS][ROWS] = {};
  for (int j = 0; j < used; ++j) {
    const T *p = columns + s.low[j], *q = columns + s.high[j];
    const Vec a = splat(s.low_weight[j]), b = splat(s.high_weight[j]);
    Vec value[ROWS];
    for (int v = 0; v < ROWS; ++v) value[v] = a * load(p + v * W) + b * load(q + v * W);
    for (int t = 0; t < BINS; ++t) {
      const Vec g = splat(s.bins[bin + t][j]);
      for (int v = 0; v < ROWS; ++v) sum[t][v] = g * value[v] + sum[t][v];
    }
  }
  const int rest = count - (ROWS - 1) * W;
  for (int t = 0; t < BINS; ++t, y += planes) {
    for (int v = 0; v < ROWS; ++v) __builtin_prefetch(y + v * W + 96, 1);
    for (int v = 0; v < ROWS - 1; ++v) store(y + v * W, load(y + v * W) + sum[t][v]);
    T* last = y + (ROWS - 1) * W;
    store_part(last, load_part(last, rest) + sum[t][ROWS - 1], rest);
  }
}

template <class T, int ROWS, int BINS>
static void give_bins(const T* y, int64_t planes, int count, const Taps<T>& s, int bin, int used, T* columns) {
  constexpr int W = Lanes<T>::W;
  using Vec = typename Lanes<T>::Vec;
  Vec value[BINS][ROWS];
  for (int t = 0; t < BINS; ++t, y += planes) {
    for (int v = 0; v < ROWS; ++v) __builtin_prefetch(y + v * W + 96);
    for (int v = 0; v < ROWS - 1; ++v) value[t][v] = load(y + v * W);
    value[t][ROWS - 1] = load_part(y + (ROWS - 1) * W, count - (ROWS - 1) * W);
  }
  for (int j = 0; j < used; ++j) {
    T *p = columns + s.low[j], *q = columns + s.high[j];
    const Vec a = splat(s.low_weight[j]), b = splat(s.high_weight[j]);
    Vec sum[ROWS];
    for (int t = 0; t < BINS; ++t) {
      const Vec g = splat(s.bins[bin + t][j]);
      for (int v = 0; v < ROWS; ++v) sum[v] = t ? g * value[t][v] + sum[v] : g * value[t][v];
    }
    for (int v = 0; v < ROWS; ++v) {
      store(p + v * W, a * sum[v] + load(p + v * W));
      store(q + v * W, b * sum[v] + load(q + v * W));
    }
  }
}

template <class T, int ROWS>
RECON3D_INLINE void take_some_bins(int bins, const T* columns, const Taps<T>& s, int bin, int used, T* y,
                                   int64_t planes, int count) {
  constexpr int most = most_bins(ROWS);
  switch (bins) {
    case 1:
      return take_bins<T, ROWS, 1>(columns, s, bin, used, y, planes, count);
    case 2:
      return take_bins<T, ROWS, 2>(columns, s, bin, used, y, planes, count);
    case 3:
      return take_bins<T, ROWS, 3>(columns, s, bin, used, y, planes, count);
    case 4:
      return take_bins<T, ROWS, 4>(columns, s, bin, used, y, planes, count);
    case 5:
      return take_bins<T, ROWS, 5>(columns, s, bin, used, y, planes, count);
    case 6:
      return take_bins<T, ROWS, (most < 6 ? 1 : 6)>(columns, s, bin, used, y, planes, count);
    case 7:
      return take_bins<T, ROWS, (most < 7 ? 1 : 7)>(columns, s, bin, used, y, planes, count);
    default:
      return take_bins<T, ROWS, (most < 8 ? 1 : 8)>(columns, s, bin, used, y, planes, count);
  }
}
template <class T, int ROWS>
RECON3D_INLINE void give_some_bins(int bins, const T* y, int64_t planes, int count, const Taps<T>& s, int bin, int used,
                                   T* columns) {
  constexpr int most = most_bins(ROWS);
  switch (bins) {
    case 1:
      return give_bins<T, ROWS, 1>(y, planes, count, s, bin, used, columns);
    case 2:
      return give_bins<T, ROWS, 2>(y, planes, count, s, bin, used, columns);
    case 3:
      return give_bins<T, ROWS, 3>(y, planes, count, s, bin, used, columns);
    case 4:
      return give_bins<T, ROWS, 4>(y, planes, count, s, bin, used, columns);
    case 5:
      return give_bins<T, ROWS, 5>(y, planes, count, s, bin, used, columns);
    case 6:
      return give_bins<T, ROWS, (most < 6 ? 1 : 6)>(y, planes, count, s, bin, used, columns);
    case 7:
      return give_bins<T, ROWS, (most < 7 ? 1 : 7)>(y, planes, count, s, bin, used, columns);
    default:
      return give_bins<T, ROWS, (most < 8 ? 1 : 8)>(y, planes, count, s, bin, used, columns);
  }
}

// ---- a line over a block --------------------------------------------------------------------------------------------

// The time bins that a block of crossings meets: from first to last, `size` of them at a time.
struct BinRuns {
  int64_t first, last, size;
};
template <class T>
RECON3D_INLINE BinRuns bins_met(const SinogramPlan<T>& plan, T from, T to, T length, int most) {
  const double one = static_cast<double>(from * length), two = static_cast<double>(to * length);
  const double reach = static_cast<double>(plan.curve.limit) * plan.tof.sigma_mm;
  const double bins = static_cast<double>(plan.tof.bins), per_mm = 1 / plan.tof.bin_mm;
  // a hundredth of a bin for the rounding of single precision
  const double begin = ((one < two ? one : two) - reach) * per_mm + 0.5 * bins - 0.01,
               end = ((one < two ? two : one) + reach) * per_mm + 0.5 * bins + 0.01;
  if (!(begin < bins && end >= 0)) return {0, -1, 1};
  const int64_t first = begin > 0 ? static_cast<int64_t>(begin) : 0,
                last = end < bins ? static_cast<int64_t>(end) : plan.tof.bins - 1;
  const int64_t runs = (last - first + most) / most;
  return {first, last, (last - first + runs) / runs};
}
// The weights of bins [first, first + n), n <= kStoredBins, into s.bins.
template <class T>
static void set_bins(const SinogramPlan<T>& plan, int64_t first, int n, T length, Taps<T>& s) {
  using Vec = typename Lanes<T>::Vec;
  const T inverse = static_cast<T>(1 / plan.tof.sigma_mm);
  for (int i = 0; i < kBlock; i += Lanes<T>::W) {
    const Vec at = load(s.t + i) * length;
    Vec before{};
    for (int k = 0; k <= n; ++k) {
      const double edge = (static_cast<double>(first + k) - 0.5 * static_cast<double>(plan.tof.bins)) * plan.tof.bin_mm;
      const Vec after = tof_half_cdf<T, Vec>(plan.curve, (static_cast<T>(edge) - at) * inverse);
      if (k) store(s.bins[k - 1] + i, after - before);
      before = after;
    }
  }
}

// The length between neighbouring planes of voxels, for every piece of a group.
template <class T>
static void set_lengths(const SinogramGroup& group, const SinogramLine& line, T* mm) {
  const double inverse = 1 / (line.length * line.length);
  for (int64_t g = 0; g < group.count; ++g)
    mm[g] = static_cast<T>(line.step * __builtin_sqrt(1 + group.pieces[g].delta2 * inverse));
}

// All pieces of a group over a block of `used` crossings, columns to sinogram (GIVE = false) or back (true). The time
// bins of crossings at `from` to `to` of the way are summed in runs, so these must not depend on threads.
template <class T, bool GIVE, class Y>
static void all_pieces(const SinogramPlan<T>& plan, const SinogramGroup& group, const Columns<T>& c, const T* mm,
                       T per_step, T from, T to, int used, Taps<T>& s, T* columns, Y* y) {
  constexpr int W = Lanes<T>::W;
  for (int j = used; j < kBlock; ++j) s.t[j] = s.t[used - 1];
  const bool split = GIVE && c.step == 1;
  T known = T(-1);
  bool ready = false;
  BinRuns met{0, -1, 1};
  for (int64_t g = 0; g < group.count; ++g) {
    const SinogramPiece& piece = group.pieces[g];
    const int rows = (piece.count + W - 1) / W;
    Y* part = y + piece.plane;
    if (!plan.tof.bins) {
      set_taps(c, piece, mm[g], split, s);
      if constexpr (GIVE) {
        switch (rows) {
          case 1:
            give<T, 1>(part, piece.count, s, used, columns);
            break;
          case 2:
            give<T, 2>(part, piece.count, s, used, columns);
            break;
          case 3:
            give<T, 3>(part, piece.count, s, used, columns);
            break;
          default:
            give<T, 4>(part, piece.count, s, used, columns);
        }
      } else {
        switch (rows) {
          case 1:
            take<T, 1>(columns, s, used, part, piece.count);
            break;
          case 2:
            take<T, 2>(columns, s, used, part, piece.count);
            break;
          case 3:
            take<T, 3>(columns, s, used, part, piece.count);
            break;
          default:
            take<T, 4>(columns, s, used, part, piece.count);
        }
      }
      continue;
    }
    const T length = mm[g] * per_step;
    if (length != known) {  // opposite ring differences share their bins
      met = bins_met(plan, from, to, length, kMostRowsTof < 4 ? most_bins(2) : most_bins(4));
      known = length;
      ready = met.last - met.first < kStoredBins;
      if (ready && met.first <= met.last)
        set_bins(plan, met.first, static_cast<int>(met.last + 1 - met.first), length, s);
    }
    if (met.first > met.last) continue;
    set_taps(c, piece, mm[g], split, s);
    for (int64_t b = met.first; b <= met.last; b += met.size) {
      const int n = static_cast<int>(met.last + 1 - b < met.size ? met.last + 1 - b : met.size);
      if (!ready) set_bins(plan, b, n, length, s);
      const int bin = ready ? static_cast<int>(b - met.first) : 0;
      Y* some = part + b * plan.planes;
      if constexpr (GIVE) {
        switch (rows) {
          case 1:
            give_some_bins<T, 1>(n, some, plan.planes, piece.count, s, bin, used, columns);
            break;
          case 2:
            give_some_bins<T, 2>(n, some, plan.planes, piece.count, s, bin, used, columns);
            break;
          case 3:
            give_some_bins<T, (kMostRowsTof < 3 ? 1 : 3)>(n, some, plan.planes, piece.count, s, bin, used, columns);
            break;
          default:
            give_some_bins<T, (kMostRowsTof < 4 ? 1 : 4)>(n, some, plan.planes, piece.count, s, bin, used, columns);
        }
      } else {
        switch (rows) {
          case 1:
            take_some_bins<T, 1>(n, columns, s, bin, used, some, plan.planes, piece.count);
            break;
          case 2:
            take_some_bins<T, 2>(n, columns, s, bin, used, some, plan.planes, piece.count);
            break;
          case 3:
            take_some_bins<T, (kMostRowsTof < 3 ? 1 : 3)>(n, columns, s, bin, used, some, plan.planes, piece.count);
            break;
          default:
            take_some_bins<T, (kMostRowsTof < 4 ? 1 : 4)>(n, columns, s, bin, used, some, plan.planes, piece.count);
        }
      }
    }
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Copies rows [begin, end) of the volume into columns; filled[y nx + x] tells whether a column has other than zeros.
template <class T>
static void pack_rows(const Columns<T>& c, const RayGrid& g, const T* x, T* columns, uint8_t* filled, int64_t begin,
                      int64_t end) {
  const ptrdiff_t nz = g.n[0], ny = g.n[1], nx = g.n[2];
  constexpr ptrdiff_t kTile = 16;
  for (ptrdiff_t y = begin; y < end; ++y)
    for (ptrdiff_t x0 = 0; x0 < nx; x0 += kTile) {
      const ptrdiff_t n = nx - x0 < kTile ? nx - x0 : kTile;
      T* to = columns + y * c.row + x0 * c.pixel;
      uint8_t any[kTile] = {};
      for (ptrdiff_t phase = 0; phase < c.step; ++phase) {
        for (ptrdiff_t q = 0; q < c.run; ++q) {
          const ptrdiff_t z = q * c.step + phase;
          T* place = to + phase * c.run + q;
          if (z >= nz) {
            for (ptrdiff_t i = 0; i < n; ++i) place[i * c.pixel] = 0;
            continue;
          }
          const T* from = x + (z * ny + y) * nx + x0;
          for (ptrdiff_t i = 0; i < n; ++i) {
            place[i * c.pixel] = from[i];
            any[i] |= from[i] != 0;
          }
        }
      }
      for (ptrdiff_t i = 0; i < n; ++i) filled[y * nx + x0 + i] = any[i];
    }
}

// One column of the scratch: (1 - w) a + w b, phase by phase.
template <class T>
RECON3D_INLINE void blend(const Columns<T>& c, const T* a, const T* b, T w, T* to) {
  constexpr int W = Lanes<T>::W;
  const typename Lanes<T>::Vec weight = splat(w);
  for (ptrdiff_t phase = 0; phase < c.step; ++phase, to += c.phase, a += c.run, b += c.run)
    for (ptrdiff_t q = 0; q < c.run; q += W) {
      const typename Lanes<T>::Vec first = load(a + q);
      store(to + q, weight * (load(b + q) - first) + first);
    }
}

template <class T>
static void forward_lines(const SinogramPlan<T>& plan, const SinogramGroup& group, const Columns<T>& c, const T* volume,
                          const uint8_t* filled, bool first_group, T* y, int64_t begin, int64_t end, T* work) {
  const RayGrid& g = plan.grid;
  T *mm = work, *columns = work + (group.count + 15) / 16 * 16, *zeros = columns + kBlock * c.line;
  Taps<T> s;
  for (int64_t l = begin; l < end; ++l) {
    const SinogramLine& line = plan.lines[l];
    T* out = y + l * plan.row();
    if (first_group) std::memset(out, 0, sizeof(T) * plan.row());
    if (line.first > line.last) continue;
    set_lengths(group, line, mm);
    const T per_step = static_cast<T>(line.length / line.step);
    const ptrdiff_t n = g.n[3 - line.axis], across = line.axis == 1 ? c.pixel : c.row,
                    along = line.axis == 1 ? c.row : c.pixel;
    const ptrdiff_t pixel = line.axis == 1 ? 1 : g.n[2], pixel_along = line.axis == 1 ? g.n[2] : 1;
    int used = 0;
    for (int64_t j = line.first; j <= line.last; ++j) {
      const double u = line.a + line.b * static_cast<double>(j);
      const ptrdiff_t k = static_cast<ptrdiff_t>(u + 1) - 1;  // floor, as u > -1 but for rounding
      const bool low = k >= 0 && k < n && filled[j * pixel_along + k * pixel],
                 high = k + 1 >= 0 && k + 1 < n && filled[j * pixel_along + (k + 1) * pixel];
      if (low || high) {
        const T* column = volume + j * along + k * across;
        blend(c, low ? column : zeros, high ? column + across : zeros, static_cast<T>(u - static_cast<double>(k)),
              columns + used * c.line + c.left);
        s.t[used++] = static_cast<T>(line.t + line.dt * static_cast<double>(j));
      }
      if (used == kBlock || (used && j == line.last)) {
        all_pieces<T, false>(plan, group, c, mm, per_step, s.t[0], s.t[used - 1], used, s, columns, out);
        used = 0;
      }
    }
  }
}

template <class T>
static void sinogram_forward(const SinogramPlan<T>& plan, const T* x, T* y, const RunRanges& run) {
  const RayGrid& g = plan.grid;
  for (int64_t n = 0; n < plan.group_count; ++n) {
    const SinogramGroup& group = plan.groups[n];
    const Columns<T> c(group.step, g);
    const Scratch volume(sizeof(T) * c.row * g.n[1]), flags(g.n[1] * g.n[2]);
    T* columns = static_cast<T*>(volume.get());
    uint8_t* filled = static_cast<uint8_t*>(flags.get());
    wish_large_pages(columns, sizeof(T) * c.row * g.n[1]);
    run_ranges(run, g.n[1], [&](int64_t b, int64_t e) { pack_rows(c, g, x, columns, filled, b, e); });
    const int64_t size = group_size(plan.line_count, 16, 4 * run.threads);
    WorkQueue queue((plan.line_count + size - 1) / size);
    run_ranges(run, run.threads, [&](int64_t, int64_t) {
      const size_t elements = (group.count + 15) / 16 * 16 + kBlock * c.line + c.pixel;
      const Scratch scratch(sizeof(T) * elements);
      T* work = static_cast<T*>(scratch.get());
      std::memset(work, 0, sizeof(T) * elements);
      for (int64_t i = queue.take(); i >= 0; i = queue.take())
        forward_lines(plan, group, c, columns, filled, n == 0, y, i * size,
                      (i + 1) * size < plan.line_count ? (i + 1) * size : plan.line_count, work);
    });
  }
}

// ---- adjoint --------------------------------------------------------------------------------------------------------

// Adds (1 - w) and w times a column of the scratch to two columns of the volume; null where there is none.
template <class T>
RECON3D_INLINE void unblend(const Columns<T>& c, const T* from, T w, T* a, T* b) {
  constexpr int W = Lanes<T>::W;
  using Vec = typename Lanes<T>::Vec;
  const Vec high = splat(w), low = splat(T(1) - w);
  const bool split = c.step == 1;
  for (ptrdiff_t phase = 0; phase < c.step; ++phase, from += c.phase) {
    for (ptrdiff_t q = 0; q < c.run; q += W) {
      Vec v = load(from + q);
      if (split) v += load(from + c.phase + q);
      const ptrdiff_t at = phase * c.run + q;
      if (a) store(a + at, low * v + load(a + at));
      if (b) store(b + at, high * v + load(b + at));
    }
  }
}

// The planes of some pieces in memory, zeros around them, and what a block of crossings gives of them to the columns:
// two runs, which stand alone in rows 0 and 1 of the scratch (step 2: even and odd z; step 1: lower and upper voxel).
constexpr int kTogether = 16;
template <class T>
struct alignas(64) Shelf {
  static constexpr int kTile = kMostRows * Lanes<T>::W;  // elements of a column that are summed in registers
  static constexpr int kFront = kTile + Lanes<T>::W, kLength = kFront + 2 * kTile + Lanes<T>::W;
  struct alignas(64) Runs {
    T weight[2][kBlock];
    int32_t start[2][kBlock];
    int32_t count;
  };
  T planes[kTogether][kLength];
  Runs runs[kTogether];
};

template <class T, bool TWO>
static void shelve(const Columns<T>& c, const SinogramPiece& piece, T mm, const T* y, const Taps<T>& s, T* planes,
                   typename Shelf<T>::Runs& runs) {
  constexpr int W = Lanes<T>::W, tile = Shelf<T>::kTile;
  for (int v = 0; v < tile; v += W) {
    const int rest = piece.count - v;
    if (rest > 0) __builtin_prefetch(y + v + 2048);  // a block later; another line's at the end of a line
    store(planes + Shelf<T>::kFront + v, rest <= 0 ? splat(T(0)) : load_part(y + v, rest < W ? rest : W));
  }
  runs.count = piece.count;
  const T part = static_cast<T>(piece.part), tilt = static_cast<T>(piece.tilt);
  const int32_t low = piece.low, lowest = c.lowest, highest = c.highest;
  for (int j = 0; j < kBlock; ++j) {  // as in set_taps
    const T at = s.t[j] * tilt + part;
    int32_t whole = static_cast<int32_t>(at);
    whole -= at < static_cast<T>(whole);
    const T high = (at - static_cast<T>(whole)) * mm, rest = mm - high;
    int32_t z = whole + low;
    z = z < lowest ? lowest : z;
    z = z > highest ? highest : z;
    const int32_t odd = TWO ? z & 1 : 0, q = TWO ? z >> 1 : z;
    runs.start[0][j] = q + odd;
    runs.start[1][j] = TWO ? q : q + 1;
    runs.weight[0][j] = odd ? high : rest;
    runs.weight[1][j] = odd ? rest : high;
  }
}

// Adds `pieces` of the shelf to elements [first, first + REGISTERS W) of the columns.
template <class T, int REGISTERS>
static void sum_shelf(const Columns<T>& c, const Shelf<T>& shelf, int pieces, int first, bool all, int used,
                      T* columns) {
  constexpr int W = Lanes<T>::W, tile = Shelf<T>::kTile;
  for (int j = 0; j < used; ++j) {
    T *p = columns + j * c.line + c.left + first, *q = p + c.phase;
    typename Lanes<T>::Vec one[REGISTERS], two[REGISTERS];
    for (int v = 0; v < REGISTERS; ++v) {
      one[v] = load(p + v * W);
      two[v] = load(q + v * W);
    }
    for (int k = 0; k < pieces; ++k) {
      const typename Shelf<T>::Runs& r = shelf.runs[k];
      const int a = first - r.start[0][j], b = first - r.start[1][j];
      if (!all && (a < -tile || a > r.count)) continue;  // b is one off at most
      const T *from = shelf.planes[k] + shelf.kFront + a, *other = shelf.planes[k] + shelf.kFront + b;
      const typename Lanes<T>::Vec wa = splat(r.weight[0][j]), wb = splat(r.weight[1][j]);
      for (int v = 0; v < REGISTERS; ++v) {
        one[v] = wa * load(from + v * W) + one[v];
        two[v] = wb * load(other + v * W) + two[v];
      }
    }
    for (int v = 0; v < REGISTERS; ++v) {
      store(p + v * W, one[v]);
      store(q + v * W, two[v]);
    }
  }
}

// The transpose of all pieces over a block without time of flight, for steps 1 and 2: scattering them one by one would
// read what was just written at another shift, which the processor has to wait for.
template <class T>
static void gather_pieces(const SinogramGroup& group, const Columns<T>& c, const T* mm, int used, Taps<T>& s,
                          Shelf<T>& shelf, T* columns, const T* y) {
  constexpr int W = Lanes<T>::W, tile = Shelf<T>::kTile;
  for (int j = used; j < kBlock; ++j) s.t[j] = s.t[used - 1];
  for (int64_t g = 0; g < group.count; g += kTogether) {
    const int n = static_cast<int>(group.count - g < kTogether ? group.count - g : kTogether);
    for (int k = 0; k < n; ++k)
      (c.step == 2 ? shelve<T, true> : shelve<T, false>)(c, group.pieces[g + k], mm[g + k],
                                                         y + group.pieces[g + k].plane, s, shelf.planes[k],
                                                         shelf.runs[k]);
    for (int first = 0; first < c.run; first += tile) {
      const bool all = c.run <= tile;
      switch ((c.run - first + W - 1) / W) {
        case 1:
          sum_shelf<T, 1>(c, shelf, n, first, all, used, columns);
          break;
        case 2:
          sum_shelf<T, 2>(c, shelf, n, first, all, used, columns);
          break;
        case 3:
          sum_shelf<T, 3>(c, shelf, n, first, all, used, columns);
          break;
        default:
          sum_shelf<T, 4>(c, shelf, n, first, all, used, columns);
      }
    }
  }
}

// Lines of one axis into planes of voxels [begin, end) of that axis.
template <class T>
static void adjoint_planes(const SinogramPlan<T>& plan, const SinogramGroup& group, const Columns<T>& c, int axis,
                           const uint8_t* filled, const T* y, T* volume, int64_t begin, int64_t end, T* work,
                           Shelf<T>* shelf) {
  const RayGrid& g = plan.grid;
  T *mm = work, *columns = work + (group.count + 15) / 16 * 16;
  const ptrdiff_t n = g.n[3 - axis], across = axis == 1 ? c.pixel : c.row, along = axis == 1 ? c.row : c.pixel;
  Taps<T> s;
  T weight[kBlock];
  ptrdiff_t cell[kBlock];
  int64_t plane[kBlock];
  for (int64_t l = 0; l < plan.line_count; ++l) {
    const SinogramLine& line = plan.lines[l];
    const int64_t first = line.first > begin ? line.first : begin, last = line.last < end - 1 ? line.last : end - 1;
    if (line.axis != axis || first > last || !filled[l]) continue;
    int used = 0;
    for (int64_t j = first; j <= last; ++j, ++used) {
      const double u = line.a + line.b * static_cast<double>(j);
      const ptrdiff_t k = static_cast<ptrdiff_t>(u + 1) - 1;
      cell[used] = k;
      plane[used] = j;
      weight[used] = static_cast<T>(u - static_cast<double>(k));
      s.t[used] = static_cast<T>(line.t + line.dt * static_cast<double>(j));
      T* column = columns + used * c.line + c.left - Lanes<T>::W;
      for (ptrdiff_t phase = 0; phase < c.rows; ++phase, column += c.phase)
        std::memset(column, 0, sizeof(T) * (c.run + Lanes<T>::W));
    }
    set_lengths(group, line, mm);
    const int64_t whole = begin / kBlock * kBlock, low = line.first > whole ? line.first : whole,
                  high = line.last < whole + kBlock - 1 ? line.last : whole + kBlock - 1;
    if (shelf)
      gather_pieces(group, c, mm, used, s, *shelf, columns, y + l * plan.row());
    else
      all_pieces<T, true>(plan, group, c, mm, static_cast<T>(line.length / line.step),
                          static_cast<T>(line.t + line.dt * static_cast<double>(low)),
                          static_cast<T>(line.t + line.dt * static_cast<double>(high)), used, s, columns,
                          y + l * plan.row());
    for (int i = 0; i < used; ++i) {
      T* column = volume + plane[i] * along + cell[i] * across;
      unblend(c, columns + i * c.line + c.left, weight[i], cell[i] >= 0 && cell[i] < n ? column : nullptr,
              cell[i] + 1 >= 0 && cell[i] + 1 < n ? column + across : nullptr);
    }
  }
}

template <class T>
static void unpack_rows(const Columns<T>& c, const RayGrid& g, const T* columns, bool add, T* x, int64_t begin,
                        int64_t end) {
  const ptrdiff_t nz = g.n[0], ny = g.n[1], nx = g.n[2];
  constexpr ptrdiff_t kTile = 16;
  for (ptrdiff_t y = begin; y < end; ++y)
    for (ptrdiff_t x0 = 0; x0 < nx; x0 += kTile) {
      const ptrdiff_t n = nx - x0 < kTile ? nx - x0 : kTile;
      const T* from = columns + y * c.row + x0 * c.pixel;
      for (ptrdiff_t phase = 0; phase < c.step; ++phase)
        for (ptrdiff_t z = phase, q = phase * c.run; z < nz; z += c.step, ++q) {
          T* to = x + (z * ny + y) * nx + x0;
          if (add)
            for (ptrdiff_t i = 0; i < n; ++i) to[i] += from[i * c.pixel + q];
          else
            for (ptrdiff_t i = 0; i < n; ++i) to[i] = from[i * c.pixel + q];
        }
    }
}

template <class T>
static void sinogram_adjoint(const SinogramPlan<T>& plan, const T* y, T* x, const RunRanges& run) {
  const RayGrid& g = plan.grid;
  if (!plan.group_count || !plan.line_count) {
    std::memset(x, 0, sizeof(T) * g.n[0] * g.n[1] * g.n[2]);
    return;
  }
  const Scratch flags(plan.line_count);
  uint8_t* filled = static_cast<uint8_t*>(flags.get());
  run_ranges(run, plan.line_count, [&](int64_t b, int64_t e) {
    for (int64_t l = b; l < e; ++l) {
      const T *p = y + l * plan.row(), *end = p + plan.row();
      while (p < end && *p == 0) ++p;
      filled[l] = p < end;
    }
  });
  for (int64_t n = 0; n < plan.group_count; ++n) {
    const SinogramGroup& group = plan.groups[n];
    const Columns<T> c(group.step, g);
    const Scratch volume(sizeof(T) * c.row * g.n[1]);
    T* columns = static_cast<T*>(volume.get());
    wish_large_pages(columns, sizeof(T) * c.row * g.n[1]);
    run_ranges(run, g.n[1],
               [&](int64_t b, int64_t e) { std::memset(columns + b * c.row, 0, sizeof(T) * c.row * (e - b)); });
    for (int axis = 1; axis <= 2; ++axis) {
      const int64_t fair = (g.n[axis] + 2 * run.threads - 1) / (2 * run.threads);
      const int64_t size = fair > kBlock / 2 ? kBlock : fair > kBlock / 4 ? kBlock / 2 : kBlock / 4;
      WorkQueue queue((g.n[axis] + size - 1) / size);
      run_ranges(run, run.threads, [&](int64_t, int64_t) {
        const size_t bytes = sizeof(T) * ((group.count + 15) / 16 * 16 + kBlock * c.line);
        const Scratch scratch(bytes + sizeof(Shelf<T>));
        std::memset(scratch.get(), 0, bytes + sizeof(Shelf<T>));
        T* work = static_cast<T*>(scratch.get());
        Shelf<T>* shelf = !plan.tof.bins && c.step <= 2
                              ? reinterpret_cast<Shelf<T>*>(static_cast<char*>(scratch.get()) + bytes)
                              : nullptr;
        for (int64_t i = queue.take(); i >= 0; i = queue.take())
          adjoint_planes(plan, group, c, axis, filled, y, columns, i * size,
                         (i + 1) * size < g.n[axis] ? (i + 1) * size : g.n[axis], work, shelf);
      });
    }
    run_ranges(run, g.n[1], [&](int64_t b, int64_t e) { unpack_rows(c, g, columns, n > 0, x, b, e); });
  }
}
