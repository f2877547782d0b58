// Joseph's forward projection and its transpose for one instruction set; included inside its namespace after
// radon_simd.h.
//
// A ray's crossing with step i is kept as a fixed-point number with 25 fractional bits, rounded once per block of kRows
// steps, so that one integer addition moves to the next step and the lane's weight is its low bits. Rounding stays
// within 2.5e-7 pixels whatever the size of the image, and is the same in every kernel. Seven bits of whole cells are
// enough: all that is asked is where a ray lies within a window or a block of 32 cells.
//
// Two shapes of kernel give the same bits: "slices" holds 16 slices in the lanes of a vector, "rays" holds 16 rays (or,
// in the transpose, 16 pixels) and up to four slices beside each other. Sums run over steps in blocks of kRows, and in
// the transpose over the views that step over rows, then those that step over columns.

constexpr int kRows = 32;  // steps per block, and side of the transpose's pixel blocks
constexpr int kPad = 32;   // zeros around a padded row; a 32-wide window clamped to [-32, n] reads only those
constexpr int kShift = 25;
constexpr double kOne = 1 << kShift;               // 1 in fixed point
constexpr int kGroup = 16;                         // most views that share a visit of a piece of the image
constexpr int kMany = RECON3D_LEVEL == 3 ? 7 : 1;  // more slices than this fill the lanes better than rays do
#if RECON3D_LEVEL == 3
constexpr int kAccumulators = 16;  // of 16 floats, that fit the register file beside their operands
#elif RECON3D_LEVEL == 2
constexpr int kAccumulators = 4;
#else
constexpr int kAccumulators = 2;
#endif

RECON3D_INLINE int round_up(int n, int m) { return (n + m - 1) / m * m; }

RECON3D_INLINE int floor_int(double v) {
  v = v < -1e9 ? -1e9 : (v > 1e9 ? 1e9 : v);
  const int whole = static_cast<int>(v);
  return whole - (v < whole);
}
RECON3D_INLINE int fixed(double v, double one = kOne) { return floor_int(v * one + 0.5); }
RECON3D_INLINE Vec fraction(Int q) {
  return to_float(q & splat((1 << kShift) - 1)) * splat(static_cast<float>(1 / kOne));
}

// ---- rays -----------------------------------------------------------------------------------------------------------

// alpha, beta and step length of every ray of a fan, [view][cells]; a parallel beam needs none.
struct FanTables {
  double *alpha, *beta;
  float* length;
};

static size_t fan_table_bytes(const RadonPlan& plan) {
  return plan.fan ? static_cast<size_t>(plan.scan.views * plan.scan.cells) * (2 * sizeof(double) + sizeof(float)) + 256
                  : 64;
}
static FanTables fan_tables(const RadonPlan& plan, const Scratch& memory) {
  const size_t n = static_cast<size_t>(plan.scan.views * plan.scan.cells);
  double* alpha = static_cast<double*>(memory.get());
  return {alpha, alpha + n, reinterpret_cast<float*>(alpha + 2 * n)};
}

static void fill_fan_tables(const RadonPlan& plan, FanTables t, int axis, int64_t begin, int64_t end) {
  const RadonScan& scan = plan.scan;
  const double middle = 0.5 * (static_cast<double>(scan.cells) - 1);
  for (int64_t g = begin; g < end; ++g) {
    const Segment& s = plan.segments[axis][g];
    const double cosine = plan.cosine[s.view], sine = plan.sine[s.view];
    double *RECON3D_RESTRICT alpha = t.alpha + s.view * scan.cells,
                             *RECON3D_RESTRICT beta = t.beta + s.view * scan.cells;
    float* RECON3D_RESTRICT length = t.length + s.view * scan.cells;
    const double centre_across = 0.5 * (plan.across(axis) - 1), centre_steps = 0.5 * (plan.steps(axis) - 1);
    const double area = scan.dx * scan.dy, inverse_sdd = 1 / scan.sdd;
    for (int r = s.first; r < s.last; ++r) {
      const double q = ((r - middle) * scan.pitch + scan.offset) * inverse_sdd;
      const double p = (cosine - q * sine) * scan.dx, w = (sine + q * cosine) * scan.dy;
      const double inverse = 1 / (axis ? w : p), b = -(axis ? p : w) * inverse;
      alpha[r] = q * scan.sod * inverse + centre_across - b * centre_steps;
      beta[r] = b;
      length[r] = static_cast<float>(area * __builtin_sqrt(1 + q * q) * (inverse < 0 ? -inverse : inverse));
    }
  }
}

static void fill_fan_tables(const RadonPlan& plan, FanTables t, const RunRanges& run) {
  if (!plan.fan) return;
  for (int axis = 0; axis < 2; ++axis)
    run_ranges(run, plan.count[axis], [&](int64_t b, int64_t e) { fill_fan_tables(plan, t, axis, b, e); });
}

// Sixteen consecutive rays at the start of a block: coordinate = whole + (start + j slope) / 2^25 at the block's step
// j.
struct Tile {
  Int whole, start, slope;
  Vec length;
};

RECON3D_INLINE Dbl ray_numbers(int ray) { return splat(static_cast<double>(ray)) + Dbl{0, 1, 2, 3, 4, 5, 6, 7}; }

RECON3D_INLINE Tile make_tile(const RadonPlan& plan, const FanTables& t, const Segment& s, int ray, int count,
                              int step0, int rows) {
  const int half = rows / 2;  // coordinates are rounded in the middle of the block
  const double middle = step0 + half;
  Tile tile;
  Dbl a, b;
  if (!plan.fan) {
    const Dbl at = splat(s.alpha + s.beta * middle), d = splat(s.d);
    a = ray_numbers(ray) * d + at;
    b = ray_numbers(ray + 8) * d + at;
    tile.slope = splat(fixed(s.beta));
    tile.length = splat(static_cast<float>(s.length));
  } else {
    const int64_t at = s.view * plan.scan.cells + ray;
    const double *alpha = t.alpha + at, *beta = t.beta + at;
    const float* length = t.length + at;
    double ends[2][kLanes];
    float lengths[kLanes];
    if (count < kLanes) {  // lanes past the segment repeat its last ray
      for (int l = 0; l < kLanes; ++l) {
        const int k = l < count ? l : count - 1;
        ends[0][l] = alpha[k];
        ends[1][l] = beta[k];
        lengths[l] = length[k];
      }
      alpha = ends[0], beta = ends[1], length = lengths;
    }
    const Dbl b0 = load(beta), b1 = load(beta + 8), m = splat(middle);
    a = b0 * m + load(alpha);
    b = b1 * m + load(alpha + 8);
    tile.slope = to_int(vfloor(b0 * splat(kOne) + splat(0.5)), vfloor(b1 * splat(kOne) + splat(0.5)));
    tile.length = load(length);
  }
  const Dbl whole_a = vfloor(a), whole_b = vfloor(b);
  tile.whole = to_int(whole_a, whole_b);
  tile.start = to_int((a - whole_a) * splat(kOne) + splat(0.5), (b - whole_b) * splat(kOne) + splat(0.5)) -
               splat(half) * tile.slope;
  return tile;
}

// Whether rays [ray, ray + count) come near cells [0, n) in steps [step0, step0 + rows); and how wide they lie.
RECON3D_INLINE bool touches(const RadonPlan& plan, const FanTables& t, const Segment& s, int ray, int count, int step0,
                            int rows, int n, double* width) {
  double a0, a1, b0, b1;
  if (plan.fan) {
    const int64_t at = s.view * plan.scan.cells + ray;
    a0 = t.alpha[at], a1 = t.alpha[at + count - 1], b0 = t.beta[at], b1 = t.beta[at + count - 1];
  } else {
    a0 = s.alpha + ray * s.d, a1 = a0 + (count - 1) * s.d, b0 = b1 = s.beta;
  }
  const double u0 = a0 + b0 * step0, u1 = a1 + b1 * step0, v0 = u0 + b0 * (rows - 1), v1 = u1 + b1 * (rows - 1);
  const double low0 = u0 < u1 ? u0 : u1, high0 = u0 < u1 ? u1 : u0, low1 = v0 < v1 ? v0 : v1, high1 = v0 < v1 ? v1 : v0;
  *width = high0 - low0 > high1 - low1 ? high0 - low0 : high1 - low1;
  // one cell of slack for the rounding of coordinates
  return (high0 > high1 ? high0 : high1) > -2 && (low0 < low1 ? low0 : low1) < n + 1;
}

// ---- layouts --------------------------------------------------------------------------------------------------------

// Rows [begin, end) of the slices of x as padded rows [slice][step][width], cell 0 at pad; axis 1 exchanges rows and
// columns.
static void pad_rows(const RadonPlan& plan, const float* x, float* padded, int axis, int pad, int width, int64_t begin,
                     int64_t end) {
  const int64_t ny = plan.scan.ny, nx = plan.scan.nx, steps = plan.steps(axis), across = plan.across(axis);
  const int64_t blocks = (steps + kLanes - 1) / kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t slice = item / blocks, i0 = item % blocks * kLanes, i1 = i0 + kLanes < steps ? i0 + kLanes : steps;
    const float* in = x + slice * ny * nx;
    float* out = padded + slice * steps * width;
    for (int64_t i = i0; i < i1; ++i) {
      float* row = out + i * width;
      __builtin_memset(row, 0, pad * sizeof(float));
      __builtin_memset(row + pad + across, 0, (width - pad - across) * sizeof(float));
      if (!axis) __builtin_memcpy(row + pad, in + i * nx, nx * sizeof(float));
    }
    if (!axis) continue;
    for (int64_t k0 = 0; k0 < across; k0 += kLanes) {
      if (k0 + kLanes <= across && i0 + kLanes <= steps) {
        Vec v[kLanes];
        for (int l = 0; l < kLanes; ++l) v[l] = load(in + (k0 + l) * nx + i0);
        transpose(v);
        for (int l = 0; l < kLanes; ++l) store(out + (i0 + l) * width + pad + k0, v[l]);
      } else {
        for (int64_t k = k0; k < across && k < k0 + kLanes; ++k)
          for (int64_t i = i0; i < i1; ++i) out[i * width + pad + k] = in[k * nx + i];
      }
    }
  }
}

// Rows [begin, end) of n data arrays (n <= 16, distance apart) as [row][width][16], datum 0 of a row at `pad`, each
// multiplied by scale; missing arrays are zero. Row i of array s starts at in + s * apart + i * stride.
RECON3D_INLINE void gather16(const float* in, int64_t apart, int n, int count, int64_t ahead, Vec* v) {
  if (count == kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      v[l] = l < n ? load(in + l * apart) : splat(0.0f);
      __builtin_prefetch(in + l * apart + ahead);
    }
  } else {
    alignas(64) float line[kLanes][kLanes] = {};
    for (int l = 0; l < n; ++l)
      for (int c = 0; c < count; ++c) line[l][c] = in[l * apart + c];
    for (int l = 0; l < kLanes; ++l) v[l] = load(line[l]);
  }
  transpose(v);
}
RECON3D_INLINE void scatter16(Vec* v, float* out, int64_t apart, int n, int count) {
  transpose(v);
  if (count == kLanes) {
    for (int l = 0; l < n; ++l) store_through(out + l * apart, v[l]);
  } else {
    for (int l = 0; l < n; ++l) {
      alignas(64) float line[kLanes];
      store(line, v[l]);
      __builtin_memcpy(out + l * apart, line, count * sizeof(float));
    }
  }
}

// Rows [begin, end) of one group of n slices as [step][across + 4][16], cell 0 at 2.
static void pack_slices(const RadonPlan& plan, const float* x, int n, float* packed, int axis, int64_t begin,
                        int64_t end) {
  const int ny = static_cast<int>(plan.scan.ny), nx = static_cast<int>(plan.scan.nx);
  const int64_t apart = static_cast<int64_t>(ny) * nx, width = static_cast<int64_t>(plan.across(axis)) + 4;
  const int64_t zeros = sizeof(float) * kLanes;
  if (!axis) {
    for (int64_t i = begin; i < end; ++i) {
      float* row = packed + i * width * kLanes;
      __builtin_memset(row, 0, 2 * zeros);
      __builtin_memset(row + (nx + 2) * kLanes, 0, 2 * zeros);
      for (int k = 0; k < nx; k += kLanes) {
        Vec v[kLanes];
        const int count = least(kLanes, nx - k);
        gather16(x + i * nx + k, apart, n, count, 4 * kLanes, v);
        for (int l = 0; l < count; ++l) store(row + (k + 2 + l) * kLanes, v[l]);
      }
    }
    return;
  }
  for (int64_t i = begin; i < end; i += kLanes) {
    const int count = least(kLanes, static_cast<int>(end - i));
    for (int l = 0; l < count; ++l) {
      float* row = packed + (i + l) * width * kLanes;
      __builtin_memset(row, 0, 2 * zeros);
      __builtin_memset(row + (ny + 2) * kLanes, 0, 2 * zeros);
    }
    for (int k = 0; k < ny; ++k) {
      Vec v[kLanes];
      gather16(x + static_cast<int64_t>(k) * nx + i, apart, n, count, 4 * nx, v);
      for (int l = 0; l < count; ++l) store(packed + ((i + l) * width + k + 2) * kLanes, v[l]);
    }
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Adds rays [ray, ray + 16) over one block of steps for SB slices; row 0 of the block of slice s is image + s * plane.
template <int SB, bool WINDOW>
RECON3D_INLINE void add_rays(const Tile& tile, int count, const float* image, int64_t plane, int width, int rows, int n,
                             Vec* sum) {
  for (int s = 0; s < SB; ++s) sum[s] = splat(0.0f);
  Int q = tile.start;
  if constexpr (WINDOW) {
    // window of 32 cells around the tile at every step: its first cell relative to the tile, and where to read it
    alignas(64) int32_t first[kRows], from[kRows], edge[4][kLanes];
    store(edge[0], tile.whole);
    const int base = least(edge[0][0], edge[0][count - 1]);
    q += (tile.whole - splat(base)) << kShift;
    store(edge[1], q);
    store(edge[2], tile.slope);
    for (int j = 0; j < kRows; j += kLanes) {
      const Int step = iota() + splat(j);
      const Int a = step * splat(edge[2][0]) + splat(edge[1][0]);
      const Int b = step * splat(edge[2][count - 1]) + splat(edge[1][count - 1]);
      const Int c = (vmin(a, b) - splat(64)) >> kShift;  // 64: rays between the outer two may round below them
      store(first + j, c);
      store(from + j, clamp(c + splat(base), -kPad, n));
    }
#if RECON3D_LEVEL == 3
    for (int j = 0; j < rows; ++j) {
      const __m512i left = (__m512i)((q >> kShift) - splat(first[j])),
                    right = _mm512_add_epi32(left, _mm512_set1_epi32(1));
      const Vec w = fraction(q);
      const float* p = image + static_cast<int64_t>(j) * width + from[j];
      for (int s = 0; s < SB; ++s) {
        const __m512 low = (__m512)load(p + s * plane), high = (__m512)load(p + s * plane + kLanes);
        const Vec a = (Vec)_mm512_permutex2var_ps(low, left, high), b = (Vec)_mm512_permutex2var_ps(low, right, high);
        sum[s] = madd(w, b - a, sum[s] + a);
      }
      q += tile.slope;
    }
#endif
  } else {
    for (int j = 0; j < rows; ++j) {
      const Int k = clamp(tile.whole + (q >> kShift), -2, n);
      const Vec w = fraction(q);
      const float* p = image + static_cast<int64_t>(j) * width;
      for (int s = 0; s < SB; ++s) {
        const float* row = p + s * plane;
        Vec a, b;
#if RECON3D_LEVEL == 3
        a = (Vec)_mm512_i32gather_ps((__m512i)k, row, 4);
        b = (Vec)_mm512_i32gather_ps((__m512i)k, row + 1, 4);
#else
        for (int l = 0; l < kLanes; ++l) {
          a[l] = row[k[l]];
          b[l] = row[k[l] + 1];
        }
#endif
        sum[s] = madd(w, b - a, sum[s] + a);
      }
      q += tile.slope;
    }
  }
}

// Segments [g0, g1) of one axis for SB slices; image points at cell 0 of step 0 of the first slice.
template <int SB>
static void forward_rays(const RadonPlan& plan, const FanTables& tables, int axis, int64_t g0, int64_t g1,
                         const float* image, int64_t plane, int width, float* y, float* total) {
  const int cells = static_cast<int>(plan.scan.cells), steps = plan.steps(axis), n = plan.across(axis);
  const int stride = round_up(cells, kLanes);
  const Segment* segments = plan.segments[axis];
  const int64_t sinogram = plan.scan.views * plan.scan.cells;
  __builtin_memset(total, 0, static_cast<size_t>(g1 - g0) * SB * stride * sizeof(float));
  int longest = 0;
  for (int64_t g = g0; g < g1; ++g) longest = most(longest, segments[g].last - segments[g].first);
  constexpr int kChunk = SB == 1 ? 64 : 32;  // rays whose part of the image stays in the first cache over the views
  for (int i0 = 0; i0 < steps; i0 += kRows) {
    const int rows = least(kRows, steps - i0);
    const float* block = image + static_cast<int64_t>(i0) * width;
    for (int c0 = 0; c0 < longest; c0 += kChunk) {
      for (int64_t g = g0; g < g1; ++g) {
        const Segment& s = segments[g];
        for (int r = s.first + c0; r < least(s.last, s.first + c0 + kChunk); r += kLanes) {
          const int count = least(kLanes, s.last - r);
          double across;
          if (!touches(plan, tables, s, r, count, i0, rows, n, &across)) continue;
          const Tile tile = make_tile(plan, tables, s, r, count, i0, rows);
          Vec sum[SB];
          // lanes past the segment of a parallel beam lie as far apart as the others
          if (!plan.fan) across = (kLanes - 1) * (s.d < 0 ? -s.d : s.d);
          if (RECON3D_LEVEL == 3 && across <= 28)
            add_rays<SB, RECON3D_LEVEL == 3>(tile, plan.fan ? count : kLanes, block, plane, width, rows, n, sum);
          else
            add_rays<SB, false>(tile, count, block, plane, width, rows, n, sum);
          for (int k = 0; k < SB; ++k) {
            float* to = total + ((g - g0) * SB + k) * stride + (r - s.first);
            store(to, madd(tile.length, sum[k], load(to)));
          }
        }
      }
    }
  }
  for (int64_t g = g0; g < g1; ++g)
    for (int k = 0; k < SB; ++k)
      __builtin_memcpy(y + k * sinogram + segments[g].view * cells + segments[g].first,
                       total + ((g - g0) * SB + k) * stride, (segments[g].last - segments[g].first) * sizeof(float));
}

static void forward_few(const RadonPlan& plan, const FanTables& tables, const float* x, float* y, int64_t slices,
                        const RunRanges& run) {
  const int64_t image = plan.scan.ny * plan.scan.nx, sinogram = plan.scan.views * plan.scan.cells;
  for (int axis = 0; axis < 2; ++axis) {
    if (!plan.count[axis]) continue;
    const int steps = plan.steps(axis), width = round_up(plan.across(axis) + 2 * kPad, kLanes);
    const int64_t plane = static_cast<int64_t>(steps) * width, size = group_size(plan.count[axis], kGroup, run.threads);
    const int64_t groups = (plan.count[axis] + size - 1) / size;
    // four slices at a time bound the memory and share the weights
    for (int64_t s0 = 0; s0 < slices; s0 += 4) {
      const int some = static_cast<int>(slices - s0 < 4 ? slices - s0 : 4);
      Scratch memory((static_cast<size_t>(plane) * some + 2 * kPad) * sizeof(float));
      run_ranges(run, some * ((steps + kLanes - 1) / kLanes), [&](int64_t b, int64_t e) {
        pad_rows(plan, x + s0 * image, memory.floats(), axis, kPad, width, b, e);
      });
      run_ranges(run, groups, [&](int64_t b, int64_t e) {
        Scratch total(static_cast<size_t>(kGroup) * 4 * round_up(static_cast<int>(plan.scan.cells), kLanes) *
                      sizeof(float));
        for (int64_t g = b; g < e; ++g) {
          const int64_t g0 = g * size, g1 = g0 + size < plan.count[axis] ? g0 + size : plan.count[axis];
          const float* in = memory.floats() + kPad;
          float* out = y + s0 * sinogram;
          int k = 0;
          if (some == 4) forward_rays<4>(plan, tables, axis, g0, g1, in, plane, width, out, total.floats()), k = 4;
          if (some - k >= 2) {
            forward_rays<2>(plan, tables, axis, g0, g1, in, plane, width, out, total.floats());
            k += 2;
          }
          if (some - k == 1)
            forward_rays<1>(plan, tables, axis, g0, g1, in + k * plane, plane, width, out + k * sinogram,
                            total.floats());
        }
      });
    }
  }
}

// Segments [g0, g1) of one axis for up to 16 slices held in the lanes; image is [step][n + 4][16].
static void forward_slices(const RadonPlan& plan, const FanTables& tables, int axis, int64_t g0, int64_t g1,
                           const float* image, int slices, float* y, float* total) {
  const int cells = static_cast<int>(plan.scan.cells), steps = plan.steps(axis), n = plan.across(axis);
  const int64_t stride = round_up(cells, kLanes), width = static_cast<int64_t>(n) + 4;
  const Segment* segments = plan.segments[axis];
  __builtin_memset(total, 0, static_cast<size_t>(g1 - g0) * stride * kLanes * sizeof(float));
  alignas(64) float weight[kRows][kLanes];
  alignas(64) int32_t offset[kRows][kLanes];
  int longest = 0;
  for (int64_t g = g0; g < g1; ++g) longest = most(longest, segments[g].last - segments[g].first);
  for (int i0 = 0; i0 < steps; i0 += kRows) {
    const int rows = least(kRows, steps - i0);
    for (int c0 = 0; c0 < longest; c0 += kLanes) {
      for (int64_t g = g0; g < g1; ++g) {
        const Segment& s = segments[g];
        const int r = s.first + c0, count = least(kLanes, s.last - r);
        double across;
        if (count <= 0 || !touches(plan, tables, s, r, count, i0, rows, n, &across)) continue;
        const Tile tile = make_tile(plan, tables, s, r, count, i0, rows);
        Int q = tile.start;
        for (int j = 0; j < rows; ++j) {
          const Int k = clamp(tile.whole + (q >> kShift), -2, n);
          store(weight[j], fraction(q));
          store(offset[j], (k + splat(2)) << 4);
          q += tile.slope;
        }
        alignas(64) float length[kLanes];
        store(length, tile.length);
        float* to = total + ((g - g0) * stride + c0) * kLanes;
        for (int h = 0; h < count; h += kAccumulators) {
          Vec sum[kAccumulators];
          for (int i = 0; i < kAccumulators; ++i) sum[i] = splat(0.0f);
          for (int j = 0; j < rows; ++j) {
            const float* row = image + (i0 + j) * width * kLanes;
#pragma GCC unroll 16
            for (int i = 0; i < kAccumulators; ++i) {
              const float* p = row + offset[j][h + i];
              const Vec a = load(p), b = load(p + kLanes);
              sum[i] = madd(splat(weight[j][h + i]), b - a, sum[i] + a);
            }
          }
          for (int i = 0; i < kAccumulators; ++i) {
            float* one = to + (h + i) * kLanes;
            store(one, madd(splat(length[h + i]), sum[i], load(one)));
          }
        }
      }
    }
  }
  const int64_t sinogram = plan.scan.views * plan.scan.cells;
  for (int64_t g = g0; g < g1; ++g) {
    const Segment& s = segments[g];
    for (int r = s.first; r < s.last; r += kLanes) {
      Vec v[kLanes];
      const float* from = total + ((g - g0) * stride + r - s.first) * kLanes;
      for (int l = 0; l < kLanes; ++l) v[l] = load(from + l * kLanes);
      scatter16(v, y + s.view * cells + r, sinogram, slices, least(kLanes, s.last - r));
    }
  }
  finish_stores();
}

static void forward_many(const RadonPlan& plan, const FanTables& tables, const float* x, float* y, int slices,
                         const RunRanges& run) {
  for (int axis = 0; axis < 2; ++axis) {
    if (!plan.count[axis]) continue;
    const int64_t steps = plan.steps(axis), size = group_size(plan.count[axis], kGroup, run.threads);
    const int64_t groups = (plan.count[axis] + size - 1) / size;
    Scratch packed(static_cast<size_t>(steps) * (plan.across(axis) + 4) * kLanes * sizeof(float));
    run_ranges(run, (steps + kLanes - 1) / kLanes, [&](int64_t b, int64_t e) {
      pack_slices(plan, x, slices, packed.floats(), axis, b * kLanes, e * kLanes < steps ? e * kLanes : steps);
    });
    run_ranges(run, groups, [&](int64_t b, int64_t e) {
      Scratch total(static_cast<size_t>(kGroup) * round_up(static_cast<int>(plan.scan.cells), kLanes) * kLanes *
                    sizeof(float));
      for (int64_t g = b; g < e; ++g)
        forward_slices(plan, tables, axis, g * size,
                       (g + 1) * size < plan.count[axis] ? (g + 1) * size : plan.count[axis], packed.floats(), slices,
                       y, total.floats());
    });
  }
}

static void joseph_forward(const RadonPlan& plan, const float* x, float* y, int64_t slices, const RunRanges& run) {
  Scratch memory(fan_table_bytes(plan));
  const FanTables tables = fan_tables(plan, memory);
  fill_fan_tables(plan, tables, run);
  const int64_t image = plan.scan.ny * plan.scan.nx, sinogram = plan.scan.views * plan.scan.cells;
  int64_t s = 0;
  // the lanes pay from about half full
  for (; slices - s > kMany; s += kLanes)
    forward_many(plan, tables, x + s * image, y + s * sinogram,
                 static_cast<int>(slices - s < kLanes ? slices - s : kLanes), run);
  if (s < slices) forward_few(plan, tables, x + s * image, y + s * sinogram, slices - s, run);
}
