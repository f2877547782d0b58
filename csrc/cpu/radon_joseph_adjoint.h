// Transpose of radon_joseph.h, by pixels: each owner of a 32 x 32 block of pixels gathers from every view the rays that
// crossed it, so nothing is written twice and no atomics are needed.
//
// Pixel (step o, cell k) takes from ray r the weight max(0, 1 - |u_r(o) - k|). Where a parallel beam's rays are not
// much closer than pixels, r and u_r - k follow from one fixed-point number per pixel, its position in rays ("even"
// spans). Otherwise u_r(o) comes from the very numbers of the forward kernel, tabulated per step ("table" spans).

// A segment's part in one block of pixels.
struct Span {
  int64_t view;
  int candidates;    // rays that can reach one pixel: consecutive, starting at the pixel's own first
  int whole, start;  // even: position of the block's first pixel at its first step, whole + start / 2^bits rays
  int per_step, per_cell, bits;
  float distance, unit;  // even: of neighbouring rays, in cells; and of one unit in the last place
  int first_ray, size;   // table: entry m belongs to ray first_ray + m
  float top, top_cell, top_step, bottom, bottom_cell, bottom_step;  // table: entry of a pixel = top / bottom
  int64_t table;                                                    // table: where its start and slope entries begin
};

// Table coordinates count cells from the middle of the block and wrap at +-64; rays further than this from it are not
// near any of its pixels in any of its steps, nor are they after wrapping.
constexpr int kFar = 60, kMiddle = kRows / 2;

struct BlockSpans {
  Span* spans;
  int count;
  int32_t *start, *slope;  // tables of all spans
  int32_t* now;            // one span's coordinates at one step
};

static int64_t table_room(const RadonPlan& plan, int64_t pad) { return plan.scan.cells + 2 * pad + 4 * kLanes; }

// Upper bound of the rays that can reach one pixel, over the whole scan: the zeros needed around a row of data.
static int widest_candidates(const RadonPlan& plan) {
  const RadonScan& s = plan.scan;
  const double pixel = s.dx > s.dy ? s.dx : s.dy;
  double spacing = s.pitch;
  if (plan.fan) {
    const double corner = 0.5 * __builtin_sqrt(s.dx * s.dx * s.nx * s.nx + s.dy * s.dy * s.ny * s.ny) + 2 * pixel;
    const double near = s.sod - corner;
    // rays of a flat detector are nearest each other close to the source and at the ends of the detector
    const double end = ((s.offset < 0 ? -s.offset : s.offset) + 0.5 * s.cells * s.pitch) / s.sdd;
    if (near <= 1e-3 * s.sod) return static_cast<int>(s.cells) + 4;
    spacing = s.pitch * near / s.sdd / (1 + end * end);
  }
  const double rays = 2 * pixel / spacing + 4;
  return rays < s.cells + 4 ? static_cast<int>(rays) : static_cast<int>(s.cells) + 4;
}

// Fills in what segment g of an axis does to the block at (o0, k0); false when none of its rays reach the block.
static bool make_span(const RadonPlan& plan, const FanTables& t, const Segment& s, int axis, int o0, int on, int k0,
                      int kn, int pad, int64_t* used, BlockSpans& block, Span& span) {
  span.view = s.view;
  if (!plan.fan) {
    const double inverse = 1 / s.d, rays = inverse < 0 ? -inverse : inverse;
    const double corner = (k0 - s.alpha - s.beta * o0) * inverse;
    const double dk = (kn - 1) * inverse, dj = -s.beta * (on - 1) * inverse;
    const double low = corner + (dk < 0 ? dk : 0) + (dj < 0 ? dj : 0),
                 high = corner + (dk > 0 ? dk : 0) + (dj > 0 ? dj : 0);
    if (high + rays <= s.first - 0.5 || low - rays >= s.last - 0.5) return false;
    span.candidates = rays <= 1 ? 2 : static_cast<int>(__builtin_ceil(2 * rays));
    if (span.candidates <= 4) {
      const int half_o = on / 2, half_k = kn / 2;
      const double at = (k0 + half_k - s.alpha - s.beta * (o0 + half_o)) * inverse - (0.5 * span.candidates - 1);
      span.bits = 24;  // a block spans fewer rays the further apart they are, which leaves bits to the fraction
      for (double r = rays; r <= 1 && span.bits < 28; r *= 2) ++span.bits;
      const double one = 1 << span.bits;
      span.whole = floor_int(at);
      span.per_step = fixed(-s.beta * inverse, one);
      span.per_cell = fixed(inverse, one);
      span.start = static_cast<int>((at - span.whole) * one + 0.5) - half_o * span.per_step - half_k * span.per_cell;
      span.distance = static_cast<float>(s.d < 0 ? -s.d : s.d);
      span.unit = static_cast<float>((s.d < 0 ? -s.d : s.d) / one);
      span.size = 0;
      return true;
    }
    span.first_ray = most(s.first, floor_int(low - rays) - 1);
    const int last = least(s.last, floor_int(high + rays) + 3);
    span.size = last - span.first_ray;
    if (span.size <= 0) return false;
    span.top_cell = static_cast<float>(inverse);
    span.top_step = static_cast<float>(-s.beta * inverse);
    span.top = static_cast<float>(corner - span.first_ray + pad);
    span.bottom = 1;
    span.bottom_cell = span.bottom_step = 0;
  } else {
    // ray of a point: c = middle + (SDD t / l - offset) / pitch, with t and l linear in the point
    const RadonScan& g = plan.scan;
    const double cosine = plan.cosine[s.view], sine = plan.sine[s.view];
    const double x = (axis ? o0 : k0) - 0.5 * (g.nx - 1), y = (axis ? k0 : o0) - 0.5 * (g.ny - 1);
    const double l0 = g.sod + x * g.dx * sine - y * g.dy * cosine, t0 = x * g.dx * cosine + y * g.dy * sine;
    const double lk = axis ? -g.dy * cosine : g.dx * sine, tk = axis ? g.dy * sine : g.dx * cosine;
    const double lo = axis ? g.dx * sine : -g.dy * cosine, to = axis ? g.dx * cosine : g.dy * sine;
    const double scale = g.sdd / g.pitch, shift = 0.5 * (g.cells - 1) - g.offset / g.pitch;
    double low = 1e30, high = -1e30, nearest = 1e30, turn = 0;
    bool at_source = false;
    for (int corner = 0; corner < 4; ++corner) {
      const double k = corner & 1 ? kn + 1 : -2, o = corner & 2 ? on - 1 : 0;
      double l = l0 + lk * k + lo * o;
      if (l < 1e-3 * g.sod) {  // all rays meet within a pixel of the block
        at_source = true;
        l = 1e-3 * g.sod;
        low = -1e9;
        high = 1e9;
      }
      const double c = scale * (t0 + tk * k + to * o) / l + shift;
      low = c < low ? c : low;
      high = c > high ? c : high;
      nearest = l < nearest ? l : nearest;
      const double rate = scale * (tk * (l0 + lo * o) - lk * (t0 + to * o));
      turn = rate > turn ? rate : (-rate > turn ? -rate : turn);
    }
    const double rays = turn / (nearest * nearest);  // most rays per cell
    const int c0 = floor_int(low) - 1, c1 = floor_int(high) + 2;
    span.first_ray = most(s.first, c0);
    span.size = least(s.last, c1) - span.first_ray;
    if (span.size <= 0) return false;
    // pad bounds the candidates of every pixel of the image; a corner outside may ask for more
    span.candidates =
        at_source || 2 * rays + 1 > pad ? pad - 1 : most(2, static_cast<int>(__builtin_ceil(2 * rays + 2e-3)));
    const double base = shift - span.first_ray + pad;
    span.top = static_cast<float>(scale * t0 + base * l0);
    span.top_cell = static_cast<float>(scale * tk + base * lk);
    span.top_step = static_cast<float>(scale * to + base * lo);
    span.bottom = static_cast<float>(l0);
    span.bottom_cell = static_cast<float>(lk);
    span.bottom_step = static_cast<float>(lo);
  }
  if (span.candidates >= span.size) {  // every pixel meets every ray
    span.candidates = span.size;
    span.top = pad + 0.5f * (span.candidates - 1);
    span.bottom = 1;
    span.top_cell = span.top_step = span.bottom_cell = span.bottom_step = 0;
  }
  // entries of rays first_ray - pad ... ; those outside the segment are far from every pixel
  span.table = *used;
  int32_t *start = block.start + span.table, *slope = block.slope + span.table;
  const int room = round_up(span.size + 2 * pad + 2 * kLanes, kLanes);
  *used += room;
  for (int m = 0; m < room; m += kLanes) {
    store(start + m, splat(kFar << kShift));
    store(slope + m, splat(0));
  }
  for (int m = 0; m < span.size; m += kLanes) {
    const int count = least(kLanes, span.size - m);
    const Tile tile = make_tile(plan, t, s, span.first_ray + m, count, o0, on);
    // rays that could wrap around to the block's cells are out of its reach
    const Int cell = tile.whole - splat(k0 + kMiddle), at = clamp(cell, -kFar, kFar);
    const Int near = (Int)(cell == at);
    const Int a = (((at << kShift) + tile.start) & near) | (splat(kFar << kShift) & ~near), b = tile.slope & near;
    if (count == kLanes) {
      store(start + pad + m, a);
      store(slope + pad + m, b);
    } else {
      alignas(64) int32_t one[kLanes], two[kLanes];
      store(one, a);
      store(two, b);
      for (int l = 0; l < count; ++l) {
        start[pad + m + l] = one[l];
        slope[pad + m + l] = two[l];
      }
    }
  }
  return true;
}

// Coordinates, in cells from the block's middle, of a table span's rays at step j of the block.
RECON3D_INLINE void table_at(const BlockSpans& block, const Span& span, int j, int pad, int32_t* now) {
  const int room = round_up(span.size + 2 * pad + 2 * kLanes, kLanes);
  const int32_t *start = block.start + span.table, *slope = block.slope + span.table;
  for (int m = 0; m < room; m += kLanes) store(now + m, load(slope + m) * splat(j) + load(start + m));
}

// First table entry of the pixels of cells [k, k + 16) at step j.
RECON3D_INLINE Int table_first(const Span& span, int j, int k, int kn, int pad) {
  // lanes past the block repeat its last pixel: beyond the image the source may lie between them
  const Vec cell = to_float(vmin(iota() + splat(k), splat(kn - 1))), step = splat(static_cast<float>(j));
  const Vec top = madd(splat(span.top_cell), cell, madd(splat(span.top_step), step, splat(span.top)));
  Vec at = top;
  if (span.bottom_cell != 0 || span.bottom_step != 0 || span.bottom != 1)
    at = top / madd(splat(span.bottom_cell), cell, madd(splat(span.bottom_step), step, splat(span.bottom)));
  // entries are positive within the table, so truncation is the floor there
  const Int first = to_int(at - splat(0.5f * span.candidates - 1));
  return clamp(first, 0, span.size + pad);
}

RECON3D_INLINE Vec table_weight(Int ray, int k) {
  const Vec away = vabs(to_float(ray - ((iota() + splat(k - kMiddle)) << kShift)));
  return vmax(splat(0.0f), madd(away, splat(static_cast<float>(-1 / kOne)), splat(1.0f)));
}

// Weight of candidate e of even spans at position q.
RECON3D_INLINE Vec even_weight(int candidates, int e, const Span& span, Vec fraction) {
  const Vec u = splat(span.unit);
  if (candidates == 2)
    return vmax(splat(0.0f), e ? madd(u, fraction, splat(1 - span.distance)) : madd(-u, fraction, splat(1.0f)));
  const Vec away = vabs(madd(u, fraction, splat(span.distance * (0.5f * candidates - 1 - e))));
  return vmax(splat(0.0f), splat(1.0f) - away);
}
RECON3D_INLINE Vec even_fraction(Int q, const Span& span) { return to_float(q & splat((1 << span.bits) - 1)); }

#if RECON3D_LEVEL == 3
// Whether sixteen runs of consecutive entries lie within 32 entries from base on.
RECON3D_INLINE bool in_window(Int first, int candidates, int* base) {
  const int a = _mm_cvtsi128_si32(_mm512_castsi512_si128((__m512i)first));
  const int b = _mm_extract_epi32(_mm512_extracti32x4_epi32((__m512i)first, 3), 3);
  // one entry of slack on both sides: rounded quotients need not be monotone
  *base = most(0, least(a, b) - 1);
  return most(a, b) + 1 - *base + candidates <= 31;
}
#endif

// Weights of all candidates of sixteen pixels; now holds the rays' coordinates.
RECON3D_INLINE void table_weights(const Span& span, const int32_t* now, Int first, int k, float* weight) {
#if RECON3D_LEVEL == 3
  int base;
  if (in_window(first, span.candidates, &base)) {
    __m512i at = (__m512i)(first - splat(base));
    const __m512i low = (__m512i)load(now + base), high = (__m512i)load(now + base + kLanes);
    for (int e = 0; e < span.candidates; ++e) {
      store(weight + e * kLanes, table_weight((Int)_mm512_permutex2var_epi32(low, at, high), k));
      at = _mm512_add_epi32(at, _mm512_set1_epi32(1));
    }
    return;
  }
#endif
  for (int e = 0; e < span.candidates; ++e) {
    Int ray;
    for (int l = 0; l < kLanes; ++l) ray[l] = now[first[l] + e];
    store(weight + e * kLanes, table_weight(ray, k));
  }
}

// ---- pixels in lanes, SB slices -------------------------------------------------------------------------------------

// y[r] for sixteen r = base + left (window) or any r: data points at ray 0
RECON3D_INLINE Vec take(const float* row, Int ray) {
#if RECON3D_LEVEL == 3
  return (Vec)_mm512_i32gather_ps((__m512i)ray, row, 4);
#else
  Vec v;
  for (int l = 0; l < kLanes; ++l) v[l] = row[ray[l]];
  return v;
#endif
}

template <int SB, int NC>
RECON3D_INLINE void even_rows(const Span& span, const float* data, int64_t plane, int cells, int j0, int rows, int k,
                              Vec (*sum)[SB]) {
  const float* row = data;
  Int q = iota() * splat(span.per_cell) + splat(span.start + k * span.per_cell + j0 * span.per_step);
  const Int step = splat(span.per_step);
#if RECON3D_LEVEL == 3
  const int reach = 15 * span.per_cell, low = reach < 0 ? reach : 0;
  if (least(reach, -reach) >= -(static_cast<int64_t>(30 - NC) << span.bits)) {
    alignas(64) int32_t first[kLanes], from[kLanes];
    const Int c = ((iota() + splat(j0)) * step + splat(span.start + k * span.per_cell + low)) >> span.bits;
    store(first, c);
    store(from, clamp(c + splat(span.whole), -kPad, cells));
#pragma GCC unroll 16
    for (int j = 0; j < rows; ++j) {
      __m512i at = (__m512i)((q >> span.bits) - splat(first[j]));
      const Vec f1 = even_fraction(q, span);
      Vec w[NC];
      for (int e = 0; e < NC; ++e) w[e] = even_weight(NC, e, span, f1);
      const float* p = row + from[j];
      for (int e = 0; e < NC; ++e) {
        for (int s = 0; s < SB; ++s)
          sum[j][s] = madd(
              w[e], (Vec)_mm512_permutex2var_ps((__m512)load(p + s * plane), at, (__m512)load(p + s * plane + kLanes)),
              sum[j][s]);
        at = _mm512_add_epi32(at, _mm512_set1_epi32(1));
      }
      q += step;
    }
    return;
  }
#endif
  for (int j = 0; j < rows; ++j) {
    const Int at = clamp((q >> span.bits) + splat(span.whole), -NC, cells);
    const Vec f1 = even_fraction(q, span);
    for (int e = 0; e < NC; ++e) {
      const Vec w = even_weight(NC, e, span, f1);
      for (int s = 0; s < SB; ++s) sum[j][s] = madd(w, take(row + s * plane, at + splat(e)), sum[j][s]);
    }
    q += step;
  }
}

template <int SB>
RECON3D_INLINE void table_row(const BlockSpans& block, const Span& span, const float* data, int64_t plane, int j, int k,
                              int kn, int pad, Vec* sum) {
  const Int first = table_first(span, j, k, kn, pad);
  const float* row = data + span.first_ray - pad;
#if RECON3D_LEVEL == 3
  int base;
  if (in_window(first, span.candidates, &base)) {
    __m512i at = (__m512i)(first - splat(base));
    const __m512i low = (__m512i)load(block.now + base), high = (__m512i)load(block.now + base + kLanes);
    for (int e = 0; e < span.candidates; ++e) {
      const Vec w = table_weight((Int)_mm512_permutex2var_epi32(low, at, high), k);
      for (int s = 0; s < SB; ++s) {
        const float* p = row + s * plane + base;
        sum[s] = madd(w, (Vec)_mm512_permutex2var_ps((__m512)load(p), at, (__m512)load(p + kLanes)), sum[s]);
      }
      at = _mm512_add_epi32(at, _mm512_set1_epi32(1));
    }
    return;
  }
#endif
  for (int e = 0; e < span.candidates; ++e) {
    Int ray;
    for (int l = 0; l < kLanes; ++l) ray[l] = block.now[first[l] + e];
    const Vec w = table_weight(ray, k);
    for (int s = 0; s < SB; ++s) sum[s] = madd(w, take(row + s * plane, first + splat(e)), sum[s]);
  }
}

// Adds all spans of one axis to the block's pixels, buffer [SB][32 steps][32 cells].
template <int SB>
static void adjoint_pixels(const RadonPlan& plan, BlockSpans& block, const float* data, int64_t plane, int stride,
                           int pad, int on, int kn, float* buffer) {
  const int cells = static_cast<int>(plan.scan.cells);
  constexpr int kSteps = SB == 1 ? kLanes : kLanes / SB;
  constexpr int kSquare = kRows * kRows;
  const auto even = [&](int k, int j0, int g0, int g1) __attribute__((always_inline)) {
    Vec sum[kSteps][SB];
    for (int j = 0; j < kSteps; ++j)
      for (int s = 0; s < SB; ++s) sum[j][s] = load(buffer + s * kSquare + (j0 + j) * kRows + k);
    for (int g = g0; g < g1; ++g) {
      const Span& span = block.spans[g];
      const float* row = data + span.view * stride;
      if (span.candidates == 2)
        even_rows<SB, 2>(span, row, plane, cells, j0, kSteps, k, sum);
      else if (span.candidates == 3)
        even_rows<SB, 3>(span, row, plane, cells, j0, kSteps, k, sum);
      else
        even_rows<SB, 4>(span, row, plane, cells, j0, kSteps, k, sum);
    }
    for (int j = 0; j < kSteps; ++j)
      for (int s = 0; s < SB; ++s) store(buffer + s * kSquare + (j0 + j) * kRows + k, sum[j][s]);
  };
  // runs of even spans keep their sums in registers
  for (int g = 0; g < block.count;) {
    int end = g;
    while (end < block.count && !block.spans[end].size) ++end;
    if (end > g) {
      for (int k = 0; k < kn; k += kLanes)
        for (int j0 = 0; j0 < on; j0 += kSteps) even(k, j0, g, end);
      g = end;
      continue;
    }
    const Span& span = block.spans[g++];
    for (int j = 0; j < on; ++j) {
      table_at(block, span, j, pad, block.now);
      for (int k = 0; k < kn; k += kLanes) {
        Vec sum[SB];
        for (int s = 0; s < SB; ++s) sum[s] = load(buffer + s * kSquare + j * kRows + k);
        table_row<SB>(block, span, data + span.view * stride, plane, j, k, kn, pad, sum);
        for (int s = 0; s < SB; ++s) store(buffer + s * kSquare + j * kRows + k, sum[s]);
      }
    }
  }
}

// ---- slices in lanes ------------------------------------------------------------------------------------------------

constexpr int kWide = kRows + 1;  // pixels per buffer row: keeps columns out of each other's cache sets

// One run of candidates of up to kPixelViews views for sixteen pixels: where the rays' data lie, and their weights.
constexpr int kPixelViews = 16;
struct PixelRays {
  const float* data[kPixelViews];
  int candidates[kPixelViews];
  float* weight[kPixelViews];  // [candidates][16]
  alignas(64) int32_t offset[kPixelViews][kLanes];
};

// Adds all spans of one axis for 16 slices; buffer [step][kWide][16] seen with the given strides of step and cell.
static void adjoint_slices(const RadonPlan& plan, BlockSpans& block, const float* data, int64_t stride, int pad, int on,
                           int kn, float* buffer, int64_t step_stride, int64_t cell_stride, float* weights) {
  const int cells = static_cast<int>(plan.scan.cells);
  const int64_t room = table_room(plan, pad);
  PixelRays rays;
  for (int g0 = 0; g0 < block.count; g0 += kPixelViews) {
    const int some = least(kPixelViews, block.count - g0);
    float* weight = weights;
    for (int g = 0; g < some; ++g) {
      const Span& span = block.spans[g0 + g];
      rays.data[g] = data + span.view * stride;
      rays.candidates[g] = span.candidates;
      rays.weight[g] = weight;
      weight += span.candidates * kLanes;
    }
    for (int j = 0; j < on; ++j) {
      for (int g = 0; g < some; ++g)
        if (block.spans[g0 + g].size) table_at(block, block.spans[g0 + g], j, pad, block.now + g * room);
      for (int k = 0; k < kn; k += kLanes) {
        for (int g = 0; g < some; ++g) {
          const Span& span = block.spans[g0 + g];
          if (span.size) {
            const Int first = table_first(span, j, k, kn, pad);
            table_weights(span, block.now + g * room, first, k, rays.weight[g]);
            store(rays.offset[g], (first + splat(span.first_ray - pad)) << 4);
          } else {
            const Int q = iota() * splat(span.per_cell) + splat(span.start + k * span.per_cell + j * span.per_step);
            const Vec f1 = even_fraction(q, span);
            if (span.candidates == 2) {
              store(rays.weight[g], even_weight(2, 0, span, f1));
              store(rays.weight[g] + kLanes, even_weight(2, 1, span, f1));
            } else {
              for (int e = 0; e < span.candidates; ++e)
                store(rays.weight[g] + e * kLanes, even_weight(span.candidates, e, span, f1));
            }
            store(rays.offset[g], clamp((q >> span.bits) + splat(span.whole), -pad, cells) << 4);
          }
        }
        for (int h = 0; h < kLanes && k + h < kn; h += kAccumulators) {
          float* to = buffer + j * step_stride + (k + h) * cell_stride;
          Vec sum[kAccumulators];
          for (int i = 0; i < kAccumulators; ++i) sum[i] = load(to + i * cell_stride);
          for (int g = 0; g < some; ++g) {
            const float *row = rays.data[g], *w = rays.weight[g] + h;
            const int32_t* offset = rays.offset[g] + h;
            if (rays.candidates[g] == 2) {
#pragma GCC unroll 16
              for (int i = 0; i < kAccumulators; ++i) {
                const float* p = row + offset[i];
                sum[i] = madd(splat(w[i]), load(p), sum[i]);
                sum[i] = madd(splat(w[kLanes + i]), load(p + kLanes), sum[i]);
              }
            } else if (rays.candidates[g] == 3) {
#pragma GCC unroll 16
              for (int i = 0; i < kAccumulators; ++i) {
                const float* p = row + offset[i];
                sum[i] = madd(splat(w[i]), load(p), sum[i]);
                sum[i] = madd(splat(w[kLanes + i]), load(p + kLanes), sum[i]);
                sum[i] = madd(splat(w[2 * kLanes + i]), load(p + 2 * kLanes), sum[i]);
              }
            } else {
              for (int e = 0; e < rays.candidates[g]; ++e) {
#pragma GCC unroll 16
                for (int i = 0; i < kAccumulators; ++i)
                  sum[i] = madd(splat(w[e * kLanes + i]), load(row + offset[i] + e * kLanes), sum[i]);
              }
            }
          }
          for (int i = 0; i < kAccumulators; ++i) store(to + i * cell_stride, sum[i]);
        }
      }
    }
  }
}

// ---- driver ---------------------------------------------------------------------------------------------------------

// Sinograms times step length, padded by zeros: [slice][view][stride] with ray 0 at left, or [view][stride][16].
static void pad_data(const RadonPlan& plan, const FanTables& t, const float* y, float* padded, int stride, int left,
                     int64_t begin, int64_t end, const float* lengths) {
  const int cells = static_cast<int>(plan.scan.cells);
  for (int64_t i = begin; i < end; ++i) {
    float* row = padded + i * stride;
    const int64_t view = i % plan.scan.views;
    const float* in = y + i * cells;
    __builtin_memset(row, 0, left * sizeof(float));
    __builtin_memset(row + left + cells, 0, (stride - left - cells) * sizeof(float));
    float* RECON3D_RESTRICT out = row + left;
    if (plan.fan) {
      const float* RECON3D_RESTRICT length = t.length + view * cells;
      for (int r = 0; r < cells; ++r) out[r] = in[r] * length[r];
    } else {
      const float length = lengths[view];
      for (int r = 0; r < cells; ++r) out[r] = in[r] * length;
    }
  }
}

static void pack_data(const RadonPlan& plan, const FanTables& t, const float* y, int n, float* packed, int stride,
                      int left, int64_t begin, int64_t end, const float* lengths) {
  const int cells = static_cast<int>(plan.scan.cells);
  const int64_t apart = plan.scan.views * plan.scan.cells;
  for (int64_t view = begin; view < end; ++view) {
    float* row = packed + view * stride * kLanes;
    __builtin_memset(row, 0, left * kLanes * sizeof(float));
    __builtin_memset(row + (left + cells) * kLanes, 0, (stride - left - cells) * kLanes * sizeof(float));
    for (int r = 0; r < cells; r += kLanes) {
      Vec v[kLanes];
      const int count = least(kLanes, cells - r);
      gather16(y + view * cells + r, apart, n, count, 4 * kLanes, v);
      for (int l = 0; l < count; ++l)
        store(row + (left + r + l) * kLanes, v[l] * splat(plan.fan ? t.length[view * cells + r + l] : lengths[view]));
    }
  }
}

// What one thread needs to describe blocks.
struct SpanMemory {
  Scratch memory;
  BlockSpans block;
  SpanMemory(const RadonPlan& plan, int pad) : memory(bytes(plan, pad)) {
    char* p = static_cast<char*>(memory.get());
    block.start = reinterpret_cast<int32_t*>(p);
    block.slope = block.start + tables(plan, pad);
    block.now = block.slope + tables(plan, pad);
    block.spans = reinterpret_cast<Span*>(block.now + kPixelViews * table_room(plan, pad));
    block.count = 0;
  }
  static int64_t most_spans(const RadonPlan& plan) {
    return plan.count[0] > plan.count[1] ? plan.count[0] : plan.count[1];
  }
  static int64_t tables(const RadonPlan& plan, int pad) {
    const int64_t one = table_room(plan, pad);
    // parallel spans are even where at most four rays reach a pixel
    const double pixel = plan.scan.dx > plan.scan.dy ? plan.scan.dx : plan.scan.dy;
    return plan.fan || 2 * pixel > 3.99 * plan.scan.pitch ? most_spans(plan) * one : one;
  }
  static size_t bytes(const RadonPlan& plan, int pad) {
    return static_cast<size_t>(2 * tables(plan, pad) + kPixelViews * table_room(plan, pad)) * sizeof(int32_t) +
           static_cast<size_t>(most_spans(plan)) * sizeof(Span) + 256;
  }
};

static void make_spans(const RadonPlan& plan, const FanTables& t, int axis, int o0, int on, int k0, int kn, int pad,
                       BlockSpans& block) {
  block.count = 0;
  int64_t used = 0;
  for (int64_t g = 0; g < plan.count[axis]; ++g)
    if (make_span(plan, t, plan.segments[axis][g], axis, o0, on, k0, kn, pad, &used, block, block.spans[block.count]))
      ++block.count;
}

RECON3D_INLINE void flip(float* square) {
  for (int i = 0; i < kRows; ++i)
    for (int k = 0; k < i; ++k) {
      const float a = square[i * kRows + k];
      square[i * kRows + k] = square[k * kRows + i];
      square[k * kRows + i] = a;
    }
}

template <int SB>
static void adjoint_few(const RadonPlan& plan, const FanTables& tables, const float* y, float* x, int pad,
                        const RunRanges& run, const float* lengths) {
  const int ny = static_cast<int>(plan.scan.ny), nx = static_cast<int>(plan.scan.nx),
            cells = static_cast<int>(plan.scan.cells);
  const int left = kPad + pad, stride = round_up(cells + left + pad + 3 * kLanes, kLanes);
  const int64_t plane = plan.scan.views * stride;
  Scratch memory((static_cast<size_t>(plane) * SB + 4 * kLanes) * sizeof(float));
  run_ranges(run, plan.scan.views * SB,
             [&](int64_t b, int64_t e) { pad_data(plan, tables, y, memory.floats(), stride, left, b, e, lengths); });
  const int across = (nx + kRows - 1) / kRows, down = (ny + kRows - 1) / kRows;
  const float* data = memory.floats() + left;
  run_ranges(run, static_cast<int64_t>(across) * down, [&](int64_t b, int64_t e) {
    SpanMemory spans(plan, pad);
    alignas(64) float buffer[SB * kRows * kRows];
    for (int64_t item = b; item < e; ++item) {
      const int i0 = static_cast<int>(item / across) * kRows, j0 = static_cast<int>(item % across) * kRows;
      const int hn = least(kRows, ny - i0), wn = least(kRows, nx - j0);
      __builtin_memset(buffer, 0, sizeof(buffer));
      make_spans(plan, tables, 0, i0, hn, j0, wn, pad, spans.block);
      adjoint_pixels<SB>(plan, spans.block, data, plane, stride, pad, hn, wn, buffer);
      for (int s = 0; s < SB; ++s) flip(buffer + s * kRows * kRows);
      make_spans(plan, tables, 1, j0, wn, i0, hn, pad, spans.block);
      adjoint_pixels<SB>(plan, spans.block, data, plane, stride, pad, wn, hn, buffer);
      for (int s = 0; s < SB; ++s) {
        float* square = buffer + s * kRows * kRows;
        flip(square);
        for (int i = 0; i < hn; ++i)
          __builtin_memcpy(x + (static_cast<int64_t>(s) * ny + i0 + i) * nx + j0, square + i * kRows,
                           wn * sizeof(float));
      }
    }
  });
}

static void adjoint_many(const RadonPlan& plan, const FanTables& tables, const float* y, float* x, int slices, int pad,
                         const RunRanges& run, const float* lengths) {
  const int ny = static_cast<int>(plan.scan.ny), nx = static_cast<int>(plan.scan.nx),
            cells = static_cast<int>(plan.scan.cells);
  const int stride = cells + 2 * pad + 1;
  Scratch memory(static_cast<size_t>(plan.scan.views) * stride * kLanes * sizeof(float));
  run_ranges(run, plan.scan.views, [&](int64_t b, int64_t e) {
    pack_data(plan, tables, y, slices, memory.floats(), stride, pad, b, e, lengths);
  });
  const int across = (nx + kRows - 1) / kRows, down = (ny + kRows - 1) / kRows;
  const float* data = memory.floats() + pad * kLanes;
  const int64_t row = static_cast<int64_t>(stride) * kLanes;
  run_ranges(run, static_cast<int64_t>(across) * down, [&](int64_t b, int64_t e) {
    SpanMemory spans(plan, pad);
    Scratch pixels(static_cast<size_t>(kRows) * kWide * kLanes * sizeof(float));
    Scratch weight(static_cast<size_t>(kPixelViews) * pad * kLanes * sizeof(float));
    float* buffer = pixels.floats();
    for (int64_t item = b; item < e; ++item) {
      const int i0 = static_cast<int>(item / across) * kRows, j0 = static_cast<int>(item % across) * kRows;
      const int hn = least(kRows, ny - i0), wn = least(kRows, nx - j0);
      __builtin_memset(buffer, 0, static_cast<size_t>(kRows) * kWide * kLanes * sizeof(float));
      make_spans(plan, tables, 0, i0, hn, j0, wn, pad, spans.block);
      adjoint_slices(plan, spans.block, data, row, pad, hn, wn, buffer, kWide * kLanes, kLanes, weight.floats());
      make_spans(plan, tables, 1, j0, wn, i0, hn, pad, spans.block);
      adjoint_slices(plan, spans.block, data, row, pad, wn, hn, buffer, kLanes, kWide * kLanes, weight.floats());
      for (int i = 0; i < hn; ++i) {
        for (int k = 0; k < wn; k += kLanes) {
          Vec v[kLanes];
          for (int l = 0; l < kLanes; ++l) v[l] = load(buffer + (i * kWide + least(k + l, kRows - 1)) * kLanes);
          scatter16(v, x + static_cast<int64_t>(i0 + i) * nx + j0 + k, static_cast<int64_t>(ny) * nx, slices,
                    least(kLanes, wn - k));
        }
      }
    }
    finish_stores();
  });
}

static void joseph_adjoint(const RadonPlan& plan, const float* y, float* x, int64_t slices, const RunRanges& run) {
  Scratch memory(fan_table_bytes(plan));
  const FanTables tables = fan_tables(plan, memory);
  fill_fan_tables(plan, tables, run);
  Scratch step(static_cast<size_t>(plan.scan.views) * sizeof(float) + 64);
  float* lengths = step.floats();
  if (!plan.fan)
    for (int axis = 0; axis < 2; ++axis)
      for (int64_t g = 0; g < plan.count[axis]; ++g)
        lengths[plan.segments[axis][g].view] = static_cast<float>(plan.segments[axis][g].length);
  const int pad = widest_candidates(plan) + 1;
  const int64_t image = plan.scan.ny * plan.scan.nx, sinogram = plan.scan.views * plan.scan.cells;
  int64_t s = 0;
  for (; slices - s > kMany; s += kLanes)
    adjoint_many(plan, tables, y + s * sinogram, x + s * image,
                 static_cast<int>(slices - s < kLanes ? slices - s : kLanes), pad, run, lengths);
  while (s < slices) {
    const float* from = y + s * sinogram;
    float* to = x + s * image;
    if (slices - s >= 4)
      adjoint_few<4>(plan, tables, from, to, pad, run, lengths), s += 4;
    else if (slices - s >= 2)
      adjoint_few<2>(plan, tables, from, to, pad, run, lengths), s += 2;
    else
      adjoint_few<1>(plan, tables, from, to, pad, run, lengths), s += 1;
  }
}
