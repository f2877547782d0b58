// Shift-and-add projection of parallel beams and its exact transpose for one instruction set; included inside its
// namespace after radon_joseph.h. Slices are handled one by one, so a slice never depends on the stack.
//
// Step i of a view is shifted by whole_i + t_i cells onto the view's unit-slope grid. Interpolation is split so that
// every datum is loaded once and costs an addition and a multiply-add, which run on different pipes: S0 = sum of x_i
// and S1 = sum of t_i x_i at the same cells, and the grid's sum is S0[m] - S1[m] + S1[m + 1]; likewise in the
// transpose. Keys' cubic takes the grid to the detector.

#if RECON3D_LEVEL == 3
constexpr int kShearVectors = 8;  // of 16 cells, with two accumulators each
#elif RECON3D_LEVEL == 2
constexpr int kShearVectors = 2;
#else
constexpr int kShearVectors = 1;
#endif
constexpr int kShearTile = kShearVectors * kLanes;
constexpr int kMargin = kRows / 2 + 1;  // cells a step of a block may lie beside the block's middle step
constexpr int kShearPad = 2 * kRows;    // zeros left of a row; right of it a tile more
constexpr int kShearGroup = 16;         // views that share a visit of a piece of the image

// Shifts of the steps of one block, and their interpolation weights.
struct Shifts {
  int32_t whole[kRows];
  float part[kRows];  // t
};

RECON3D_INLINE void make_shifts(const Segment& s, int steps, int step0, Shifts& to) {
  const Dbl beta = splat(s.beta);
  for (int j = 0; j < kRows; j += kLanes) {
    const Dbl first = ray_numbers(step0 + j) - splat(0.5 * (steps - 1));
    const Dbl a = first * beta, b = (first + splat(8.0)) * beta, whole_a = vfloor(a), whole_b = vfloor(b);
    store(to.whole + j, to_int(whole_a, whole_b));
    store(to.part + j, to_float(a - whole_a, b - whole_b));
  }
}

// The unit-slope grid of a view: cell m lies at cell m + left of the middle step.
struct Grid {
  int left, size;
  double first, spacing;  // grid coordinate of ray 0, distance of rays
  float half_length;
};

static Grid make_grid(const RadonPlan& plan, int axis, const Segment& s) {
  const int steps = plan.steps(axis), n = plan.across(axis);
  const double reach = 0.5 * (steps - 1) * s.beta;
  const int a = floor_int(-reach), b = floor_int(reach);
  Grid g;
  g.left = -most(a, b) - 1;
  g.size = n - least(a, b) - g.left;
  g.first = s.alpha + s.beta * 0.5 * (steps - 1) - g.left;
  g.spacing = s.d;
  g.half_length = static_cast<float>(0.5 * s.length);
  return g;
}

// First of the four grid cells of rays [ray, ray + 16), and the cells' weights with the step length.
RECON3D_INLINE Int cubic_taps(const Grid& g, int ray, Vec* weight) {
  const Dbl first = splat(g.first), d = splat(g.spacing);
  const Dbl a = ray_numbers(ray) * d + first, b = ray_numbers(ray + 8) * d + first;
  const Dbl whole_a = vfloor(a), whole_b = vfloor(b);
  const Vec t = to_float(a - whole_a, b - whole_b), h = splat(g.half_length), ht = h * t;
  weight[0] = ht * madd(t, splat(2.0f) - t, splat(-1.0f));
  weight[1] = h * madd(t * t, madd(t, splat(3.0f), splat(-5.0f)), splat(2.0f));
  weight[2] = ht * madd(t, madd(t, splat(-3.0f), splat(4.0f)), splat(1.0f));
  weight[3] = ht * t * (t - splat(1.0f));
  // beyond the grid all four taps are zeros
  return clamp(to_int(whole_a, whole_b), -4, g.size + 3) - splat(1);
}

constexpr int kGridPad = 8;  // zeros left of cell 0 of a grid's sum
RECON3D_INLINE int grid_room(const RadonPlan& plan) {
  return round_up(static_cast<int>(plan.scan.ny + plan.scan.nx) + 8, kLanes) + 2 * kGridPad + 2 * kShearTile +
         2 * kRows + 64;
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Adds `rows` shifted rows to NV vectors of both sums.
template <int NV>
RECON3D_INLINE void add_shifted(const float* image, int64_t width, int rows, const Shifts& shifts, int middle,
                                float* s0, float* s1) {
  Vec a[NV], b[NV];
#pragma GCC unroll 8
  for (int i = 0; i < NV; ++i) a[i] = b[i] = splat(0.0f);
  for (int j = 0; j < rows; ++j) {
    const float* p = image + j * width + (shifts.whole[j] - middle);
    const Vec part = splat(shifts.part[j]);
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) {
      const Vec x = load(p + i * kLanes);
      a[i] += x;
      b[i] = madd(part, x, b[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NV; ++i) {
    store(s0 + i * kLanes, load(s0 + i * kLanes) + a[i]);
    store(s1 + i * kLanes, load(s1 + i * kLanes) + b[i]);
  }
}

// Views [g0, g1) of one slice; image points at cell 0 of step 0; sums is scratch of 2 kShearGroup grid_room floats.
static void shear_views(const RadonPlan& plan, int axis, int64_t g0, int64_t g1, const float* image, int64_t width,
                        float* y, float* sums) {
  const int steps = plan.steps(axis), n = plan.across(axis), room = grid_room(plan);
  const int cells = static_cast<int>(plan.scan.cells), count = static_cast<int>(g1 - g0);
  const Segment* segments = plan.segments[axis] + g0;
  __builtin_memset(sums, 0, static_cast<size_t>(2 * count) * room * sizeof(float));
  Grid grid[kShearGroup];
  Shifts shifts[kShearGroup];
  for (int v = 0; v < count; ++v) grid[v] = make_grid(plan, axis, segments[v]);
  const int vectors = (n + 2 * kMargin + kLanes - 1) / kLanes;
  for (int i0 = 0; i0 < steps; i0 += kRows) {
    const int rows = least(kRows, steps - i0);
    for (int v = 0; v < count; ++v) make_shifts(segments[v], steps, i0, shifts[v]);
    for (int t = 0; t < vectors;) {
      // the same cells of the image for all views of the group
      const int cell = t * kLanes - kMargin, nv = least(kShearVectors, vectors - t);
      const float* from = image + i0 * width + cell;
      for (int v = 0; v < count; ++v) {
        const int middle = shifts[v].whole[rows / 2];
        float* s0 = sums + 2 * v * room + kShearPad + (cell - grid[v].left - middle);
        float* s1 = s0 + room;
        if (nv == kShearVectors)
          add_shifted<kShearVectors>(from, width, rows, shifts[v], middle, s0, s1);
        else
          for (int k = 0; k < nv; ++k)
            add_shifted<1>(from + k * kLanes, width, rows, shifts[v], middle, s0 + k * kLanes, s1 + k * kLanes);
      }
      t += nv;
    }
  }
  for (int v = 0; v < count; ++v) {
    float* sum = sums + 2 * v * room + kShearPad;
    const float* other = sum + room;
    for (int m = -kLanes; m < grid[v].size + 2 * kLanes; m += kLanes)
      store(sum + m, load(sum + m) + (load(other + m + 1) - load(other + m)));
    for (int r = 0; r < cells; r += kLanes) {
      Vec w[4];
      const Int node = cubic_taps(grid[v], r, w);
      Vec total;
#if RECON3D_LEVEL == 3
      int base;
      if (in_window(node + splat(kShearPad), 4, &base)) {
        base -= kShearPad;
        __m512i at = (__m512i)(node - splat(base));
        const __m512 low = (__m512)load(sum + base), high = (__m512)load(sum + base + kLanes);
        total = w[0] * (Vec)_mm512_permutex2var_ps(low, at, high);
        for (int e = 1; e < 4; ++e) {
          at = _mm512_add_epi32(at, _mm512_set1_epi32(1));
          total = madd(w[e], (Vec)_mm512_permutex2var_ps(low, at, high), total);
        }
      } else
#endif
      {
        total = w[0] * take(sum, node);
        for (int e = 1; e < 4; ++e) total = madd(w[e], take(sum, node + splat(e)), total);
      }
      float* to = y + segments[v].view * cells + r;
      if (cells - r >= kLanes) {
        store(to, total);
      } else {
        alignas(64) float last[kLanes];
        store(last, total);
        __builtin_memcpy(to, last, (cells - r) * sizeof(float));
      }
    }
  }
}

static void shear_forward(const RadonPlan& plan, const float* x, float* y, int64_t slices, const RunRanges& run) {
  const int64_t image = plan.scan.ny * plan.scan.nx, sinogram = plan.scan.views * plan.scan.cells;
  for (int axis = 0; axis < 2; ++axis) {
    if (!plan.count[axis]) continue;
    const int64_t steps = plan.steps(axis), size = group_size(plan.count[axis], kShearGroup, run.threads);
    const int64_t groups = (plan.count[axis] + size - 1) / size;
    const int width = round_up(plan.across(axis) + kShearPad + kShearTile + 2 * kRows, kLanes);
    const int64_t plane = steps * width, blocks = (steps + kLanes - 1) / kLanes;
    // as many slices at a time as keep the padded copies small
    int64_t some = (int64_t{16} << 20) / (plane * static_cast<int64_t>(sizeof(float)));
    some = some < 1 ? 1 : (some > slices ? slices : some);
    for (int64_t s0 = 0; s0 < slices; s0 += some) {
      const int64_t now = slices - s0 < some ? slices - s0 : some;
      Scratch memory(static_cast<size_t>(now * plane + 4 * kShearTile) * sizeof(float));
      run_ranges(run, now * blocks, [&](int64_t b, int64_t e) {
        pad_rows(plan, x + s0 * image, memory.floats(), axis, kShearPad, width, b, e);
      });
      run_ranges(run, now * groups, [&](int64_t b, int64_t e) {
        Scratch sums(static_cast<size_t>(2 * kShearGroup) * grid_room(plan) * sizeof(float));
        for (int64_t item = b; item < e; ++item) {
          const int64_t s = item / groups, g0 = item % groups * size, g1 = g0 + size;
          shear_views(plan, axis, g0, g1 < plan.count[axis] ? g1 : plan.count[axis],
                      memory.floats() + s * plane + kShearPad, width, y + (s0 + s) * sinogram, sums.floats());
        }
      });
    }
  }
}

// ---- transpose ------------------------------------------------------------------------------------------------------

// Views [begin, end) of (slice, segment) pairs: cubic resampling's transpose onto padded grids [slice][segment][room].
static void spread_views(const RadonPlan& plan, int axis, const float* y, float* grids, int room, int64_t begin,
                         int64_t end) {
  const int cells = static_cast<int>(plan.scan.cells);
  for (int64_t item = begin; item < end; ++item) {
    const Segment& s = plan.segments[axis][item % plan.count[axis]];
    const Grid grid = make_grid(plan, axis, s);
    const float* in = y + (item / plan.count[axis] * plan.scan.views + s.view) * cells;
    float* row = grids + item * room;
    __builtin_memset(row, 0, room * sizeof(float));
    float* to = row + kGridPad;
    alignas(64) int32_t node[kLanes];
    alignas(64) float weight[4][kLanes];
    for (int r = 0; r < cells; r += kLanes) {
      Vec w[4];
      store(node, cubic_taps(grid, r, w));
      for (int e = 0; e < 4; ++e) store(weight[e], w[e]);
      for (int l = 0; l < kLanes && r + l < cells; ++l) {
        float* p = to + node[l];
        for (int e = 0; e < 4; ++e) p[e] += weight[e][l] * in[r + l];
      }
    }
    // taps beyond the grid never met the image
    __builtin_memset(row, 0, kGridPad * sizeof(float));
    __builtin_memset(to + grid.size, 0, (room - kGridPad - grid.size) * sizeof(float));
  }
}

// Adds `count` views to step j of NV vectors of both sums, or starts the sums.
template <int NV>
RECON3D_INLINE void gather_shifted(const float* const* grids, const Shifts* shifts, int count, int j, int64_t cell,
                                   bool start, float* s0, float* s1) {
  Vec a[NV], b[NV];
#pragma GCC unroll 8
  for (int i = 0; i < NV; ++i) {
    a[i] = start ? splat(0.0f) : load(s0 + i * kLanes);
    b[i] = start ? splat(0.0f) : load(s1 + i * kLanes);
  }
  for (int v = 0; v < count; ++v) {
    const float* p = grids[v] + (cell - shifts[v].whole[j]);
    const Vec part = splat(shifts[v].part[j]);
#pragma GCC unroll 8
    for (int i = 0; i < NV; ++i) {
      const Vec x = load(p + i * kLanes);
      a[i] += x;
      b[i] = madd(part, x, b[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < NV; ++i) {
    store(s0 + i * kLanes, a[i]);
    store(s1 + i * kLanes, b[i]);
  }
}

// Steps [i0, i0 + rows) of one slice; block [2][kRows][room] holds both sums from cell -1 on, and then their sum.
static void shear_block(const RadonPlan& plan, int axis, const float* grids, int room, int i0, int rows,
                        int across_room, float* block) {
  const int steps = plan.steps(axis), n = plan.across(axis), vectors = (n + 1 + kLanes - 1) / kLanes;
  float *s0 = block, *s1 = block + kRows * across_room;
  Shifts shifts[kShearGroup];
  const float* from[kShearGroup];
  for (int64_t g0 = 0; g0 < plan.count[axis]; g0 += kShearGroup) {
    const int count = static_cast<int>(plan.count[axis] - g0 < kShearGroup ? plan.count[axis] - g0 : kShearGroup);
    for (int v = 0; v < count; ++v) {
      const Segment& s = plan.segments[axis][g0 + v];
      make_shifts(s, steps, i0, shifts[v]);
      from[v] = grids + (g0 + v) * room + kGridPad - make_grid(plan, axis, s).left;
    }
    for (int t = 0; t < vectors;) {
      const int nv = least(kShearVectors, vectors - t);
      const int64_t cell = t * kLanes - 1;
      for (int j = 0; j < rows; ++j) {
        const int64_t at = static_cast<int64_t>(j) * across_room + t * kLanes;
        if (nv == kShearVectors)
          gather_shifted<kShearVectors>(from, shifts, count, j, cell, !g0, s0 + at, s1 + at);
        else
          for (int k = 0; k < nv; ++k)
            gather_shifted<1>(from, shifts, count, j, cell + k * kLanes, !g0, s0 + at + k * kLanes,
                              s1 + at + k * kLanes);
      }
      t += nv;
    }
  }
  for (int j = 0; j < rows; ++j) {
    float *a = s0 + static_cast<int64_t>(j) * across_room, *b = s1 + static_cast<int64_t>(j) * across_room;
    for (int k = 0; k < n; k += kLanes)
      store(a + k, load(a + 1 + k) + (load(b + k) - load(b + 1 + k)));  // a + 1: read before it is written
  }
}

static void shear_adjoint(const RadonPlan& plan, const float* y, float* x, int64_t slices, const RunRanges& run) {
  const int64_t ny = plan.scan.ny, nx = plan.scan.nx, image = ny * nx, sinogram = plan.scan.views * plan.scan.cells;
  const int room = grid_room(plan);
  // a few slices at a time: the second axis adds to images that the first has left in the cache
  const int64_t most_views = plan.count[0] > plan.count[1] ? plan.count[0] : plan.count[1];
  const int64_t per_slice = (image + 1) * 8, grids = (most_views * room + 1) * static_cast<int64_t>(sizeof(float));
  int64_t some = (int64_t{2} << 20) * run.threads / per_slice, room_for = (int64_t{32} << 20) / grids;
  some = some < run.threads ? run.threads : some;
  some = some > room_for ? (room_for < 1 ? 1 : room_for) : some;
  if (!plan.count[0] && !plan.count[1]) __builtin_memset(x, 0, static_cast<size_t>(slices * image) * sizeof(float));
  for (int64_t first = 0; first < slices; first += some) {
    const int64_t now = slices - first < some ? slices - first : some;
    bool written = false;
    for (int axis = 0; axis < 2; ++axis) {
      if (!plan.count[axis]) continue;
      const int steps = plan.steps(axis), n = plan.across(axis), blocks = (steps + kRows - 1) / kRows;
      const int across_room = round_up(n + 1, kLanes) + kLanes;
      const int64_t plane = plan.count[axis] * room;
      Scratch memory(static_cast<size_t>(now * plane + 4 * kShearTile) * sizeof(float));
      run_ranges(run, now * plan.count[axis], [&](int64_t b, int64_t e) {
        spread_views(plan, axis, y + first * sinogram, memory.floats(), room, b, e);
      });
      run_ranges(run, now * blocks, [&](int64_t b, int64_t e) {
        Scratch scratch(static_cast<size_t>(2 * kRows) * across_room * sizeof(float) + 256);
        float* block = scratch.floats();
        for (int64_t item = b; item < e; ++item) {
          const int i0 = static_cast<int>(item % blocks) * kRows, rows = least(kRows, steps - i0);
          shear_block(plan, axis, memory.floats() + item / blocks * plane, room, i0, rows, across_room, block);
          float* out = x + (first + item / blocks) * image;
          if (!axis) {
            for (int j = 0; j < rows; ++j)
              __builtin_memcpy(out + (i0 + j) * nx, block + static_cast<int64_t>(j) * across_room, n * sizeof(float));
            continue;
          }
          for (int k = 0; k < n; k += kLanes)
            for (int j = 0; j < rows; j += kLanes) {
              Vec v[kLanes];
              for (int l = 0; l < kLanes; ++l) v[l] = load(block + static_cast<int64_t>(j + l) * across_room + k);
              transpose(v);
              const int count = least(kLanes, rows - j);
              for (int l = 0; l < kLanes && k + l < n; ++l) {
                float* to = out + (k + l) * nx + i0 + j;
                if (count == kLanes) {
                  store(to, written ? load(to) + v[l] : v[l]);
                } else {
                  alignas(64) float line[kLanes];
                  store(line, v[l]);
                  for (int c = 0; c < count; ++c) to[c] = written ? to[c] + line[c] : line[c];
                }
              }
            }
        }
      });
      written = true;
    }
  }
}
