// The line kernels of AVX-512 in single precision; included by joseph3d_avx512.cpp inside its namespace.
//
// Forward: sixteen neighbours of the order side by side, plane by plane. Their crossings of a plane lie in a small
// window, so rows of it are loaded as they lie and every lane picks its two voxels of a row by a permutation of
// registers; a window that is too wide is gathered voxel by voxel. Both ways do the same arithmetic on the same voxels:
// a line's value does not depend on its company. Adjoint: one line, sixteen planes at a time, voxels in pairs.

typedef __m512 Vec;
typedef __m512i Int;
typedef __m512d Dbl;
constexpr int kLanes = 16;

RECON3D_INLINE Dbl dbl(double v) { return _mm512_set1_pd(v); }
RECON3D_INLINE Vec vec(float v) { return _mm512_set1_ps(v); }
RECON3D_INLINE Vec singles(Dbl a, Dbl b) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(a)), _mm512_cvtpd_ps(b), 1);
}
RECON3D_INLINE Vec iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// make_ray for eight lines. axis < 0: each its own main axis, else that one for all.
struct Rays8 {
  Dbl a, b, c, e, t0, dt, length, step, first, last;
  __mmask8 z, x;  // main axis; neither: y
};
RECON3D_INLINE void clip8(Dbl a, Dbl b, Dbl n, Dbl& low, Dbl& high) {
  const __mmask8 flat = _mm512_cmp_pd_mask(b, _mm512_setzero_pd(), _CMP_EQ_OQ);
  const Dbl inverse = _mm512_div_pd(dbl(1), b);
  const Dbl s = _mm512_mul_pd(_mm512_sub_pd(dbl(-1), a), inverse), t = _mm512_mul_pd(_mm512_sub_pd(n, a), inverse);
  low = _mm512_mask_max_pd(low, _knot_mask8(flat), low, _mm512_min_pd(s, t));
  high = _mm512_mask_min_pd(high, _knot_mask8(flat), high, _mm512_max_pd(s, t));
  const __mmask8 out = flat & static_cast<__mmask8>(
                                  ~(_mm512_cmp_pd_mask(a, dbl(-1), _CMP_GT_OQ) & _mm512_cmp_pd_mask(a, n, _CMP_LT_OQ)));
  high = _mm512_mask_sub_pd(high, out, low, dbl(1));
}
RECON3D_INLINE Rays8 rays8(const Lines& lines, __m256i i0, __m256i i1, int axis) {
  const double *p = lines.points,
               inv[3] = {1 / lines.grid.spacing[0], 1 / lines.grid.spacing[1], 1 / lines.grid.spacing[2]};
  const double half[3] = {0.5 * (static_cast<double>(lines.grid.n[0]) - 1),
                          0.5 * (static_cast<double>(lines.grid.n[1]) - 1),
                          0.5 * (static_cast<double>(lines.grid.n[2]) - 1)};
  const Int three = _mm512_set1_epi64(3);
  const Int at0 = _mm512_mullo_epi64(_mm512_cvtepi32_epi64(i0), three),
            at1 = _mm512_mullo_epi64(_mm512_cvtepi32_epi64(i1), three);
  Dbl o[3], d[3], size[3];
  for (int k = 0; k < 3; ++k) {
    o[k] = _mm512_i64gather_pd(at0, p + k, 8);
    d[k] = _mm512_sub_pd(_mm512_i64gather_pd(at1, p + k, 8), o[k]);
    size[k] = _mm512_abs_pd(d[k]);
  }
  Rays8 r;
  if (axis < 0) {
    r.z = _mm512_cmp_pd_mask(_mm512_max_pd(size[1], size[2]), _mm512_mul_pd(size[0], dbl(kRayTie)), _CMP_LT_OQ);
    r.x = static_cast<__mmask8>(~r.z) & _mm512_cmp_pd_mask(size[1], _mm512_mul_pd(size[2], dbl(kRayTie)), _CMP_LT_OQ);
  } else {
    r.z = axis == 0 ? 255 : 0;
    r.x = axis == 2 ? 255 : 0;
  }
  r.length = _mm512_sqrt_pd(_mm512_fmadd_pd(d[0], d[0], _mm512_fmadd_pd(d[1], d[1], _mm512_mul_pd(d[2], d[2]))));
  // in voxels: main, row and inner axis of (y, x, z), (x, y, z) or (z, y, x)
  Dbl q[3], g[3];
  for (int k = 0; k < 3; ++k) {
    q[k] = _mm512_fmadd_pd(o[k], dbl(inv[k]), dbl(half[k]));
    g[k] = _mm512_mul_pd(d[k], dbl(inv[k]));
  }
  const auto pick = [&](const Dbl* s, int role) {
    const int y_main[3] = {1, 2, 0}, x_main[3] = {2, 1, 0}, z_main[3] = {0, 1, 2};
    return _mm512_mask_mov_pd(_mm512_mask_mov_pd(s[y_main[role]], r.x, s[x_main[role]]), r.z, s[z_main[role]]);
  };
  Dbl n[3], spacing[3];
  for (int k = 0; k < 3; ++k) {
    n[k] = dbl(static_cast<double>(lines.grid.n[k]));
    spacing[k] = dbl(lines.grid.spacing[k]);
  }
  const Dbl start = pick(q, 0), reach = pick(g, 0), planes = pick(n, 0);
  r.dt = _mm512_div_pd(dbl(1), reach);
  r.t0 = _mm512_sub_pd(_mm512_setzero_pd(), _mm512_mul_pd(start, r.dt));
  r.b = _mm512_mul_pd(pick(g, 1), r.dt);
  r.a = _mm512_fnmadd_pd(r.b, start, pick(q, 1));
  r.e = _mm512_mul_pd(pick(g, 2), r.dt);
  r.c = _mm512_fnmadd_pd(r.e, start, pick(q, 2));
  r.step = _mm512_div_pd(_mm512_mul_pd(pick(spacing, 0), r.length), pick(size, 0));
  const Dbl end = _mm512_add_pd(start, reach);
  Dbl low = _mm512_max_pd(_mm512_setzero_pd(), _mm512_sub_pd(_mm512_min_pd(start, end), dbl(kRaySlack)));
  Dbl high = _mm512_min_pd(_mm512_sub_pd(planes, dbl(1)), _mm512_add_pd(_mm512_max_pd(start, end), dbl(kRaySlack)));
  clip8(r.a, r.b, pick(n, 1), low, high);
  clip8(r.c, r.e, pick(n, 2), low, high);
  const __mmask8 met =
      _mm512_cmp_pd_mask(low, high, _CMP_LE_OQ) & _mm512_cmp_pd_mask(pick(size, 0), _mm512_setzero_pd(), _CMP_GT_OQ);
  r.first = _mm512_maskz_roundscale_pd(met, low, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  r.last = _mm512_mask_roundscale_pd(dbl(-1), met, high, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return r;
}

// Rows of points of lines [i, i + 8) of the list.
RECON3D_INLINE void pairs8(const int32_t* pairs, __m256i& i0, __m256i& i1) {
  const Int both = _mm512_loadu_si512(pairs);
  i0 = _mm512_cvtepi64_epi32(both);
  i1 = _mm512_cvtepi64_epi32(_mm512_srli_epi64(both, 32));
}

// ---- keys -----------------------------------------------------------------------------------------------------------

RECON3D_INLINE Int cell8(Dbl at, Dbl scale, Dbl most) {
  Dbl c = _mm512_mul_pd(_mm512_add_pd(at, dbl(1)), scale);
  c = _mm512_min_pd(_mm512_max_pd(c, _mm512_setzero_pd()), most);
  return _mm512_cvttpd_epi64(c);
}
static void lane_keys(const Lines& lines, const KeyPlans& plans, int64_t begin, int64_t end, uint32_t* keys) {
  for (int64_t i = begin; i < end; i += 8) {
    int32_t some[16] = {0};
    const int count = static_cast<int>(std::min<int64_t>(8, end - i));
    const int32_t* pairs = lines.pairs + 2 * i;
    if (count < 8) {
      std::copy(pairs, pairs + 2 * count, some);
      pairs = some;
    }
    __m256i i0, i1;
    pairs8(pairs, i0, i1);
    const Rays8 r = rays8(lines, i0, i1, -1);
    const auto pick = [&](double KeyPlan::* field) {
      return _mm512_mask_mov_pd(_mm512_mask_mov_pd(dbl(plans.axis[1].*field), r.x, dbl(plans.axis[2].*field)), r.z,
                                dbl(plans.axis[0].*field));
    };
    const Dbl near = pick(&KeyPlan::near), far = pick(&KeyPlan::far);
    const auto inner = [&](Dbl at) {
      return cell8(_mm512_fmadd_pd(r.e, at, r.c), pick(&KeyPlan::inner_scale), pick(&KeyPlan::most_inner));
    };
    const Dbl most_place = pick(&KeyPlan::most_place);
    const Int strip = cell8(_mm512_fmadd_pd(r.b, near, r.a), pick(&KeyPlan::strip_scale), pick(&KeyPlan::most_strip));
    Int place = cell8(_mm512_fmadd_pd(r.b, far, r.a), pick(&KeyPlan::place_scale), most_place);
    const __mmask8 back = _mm512_test_epi64_mask(strip, _mm512_set1_epi64(1));
    place = _mm512_mask_sub_epi64(place, back, _mm512_cvttpd_epi64(most_place), place);
    Int key = _mm512_mask_mov_epi64(_mm512_set1_epi64(1), r.x, _mm512_set1_epi64(2));
    key = _mm512_mask_mov_epi64(key, r.z, _mm512_setzero_si512());
    key = _mm512_mask_mov_epi64(key, _mm512_cmp_pd_mask(r.first, r.last, _CMP_GT_OQ), _mm512_set1_epi64(kNoAxis));
    const auto append = [](Int k, int bits, Int more) {
      return _mm512_or_si512(_mm512_sll_epi64(k, _mm_cvtsi32_si128(bits)), more);
    };
    key = append(append(key, plans.inner_bits, inner(near)), plans.inner_bits, inner(far));
    key = append(append(key, plans.strip_bits, strip), plans.place_bits, place);
    _mm256_mask_storeu_epi32(keys + (i - begin), static_cast<__mmask8>((1u << count) - 1), _mm512_cvtepi64_epi32(key));
  }
}

// ---- sixteen lines --------------------------------------------------------------------------------------------------

struct Rays16 {
  alignas(64) float a[kLanes], b[kLanes], c[kLanes], e[kLanes], step[kLanes], first[kLanes], last[kLanes];
  alignas(64) float edge[kLanes], slope[kLanes];  // upper edge of the time bin in sigmas from plane j: edge + slope j
  int64_t line[kLanes];
};

// Lines at [i, i + count) of the order; the lanes behind them meet no plane.
RECON3D_INLINE void rays16(const LineJob<float>& job, int axis, int64_t i, int count, Rays16& out) {
  const Lines& lines = job.lines;
  const bool flight = lines.bins;
  alignas(64) int32_t i0[kLanes], i1[kLanes];
  alignas(64) double centre[kLanes] = {0};
  for (int l = 0; l < kLanes; ++l) {
    const int64_t line = job.base + job.order[i + (l < count ? l : 0)];
    out.line[l] = line;
    i0[l] = lines.pairs[2 * line];
    i1[l] = lines.pairs[2 * line + 1];
    if (flight) centre[l] = bin_centre(lines.tof, lines.bins[line]);
  }
  Rays8 r[2];
  for (int h = 0; h < 2; ++h) {
    Rays8& s = r[h];
    s = rays8(lines, _mm256_load_si256(reinterpret_cast<const __m256i*>(i0 + 8 * h)),
              _mm256_load_si256(reinterpret_cast<const __m256i*>(i1 + 8 * h)), axis);
    if (flight) {  // as clip_to_bin
      const Dbl c = _mm512_load_pd(centre + 8 * h), inverse = _mm512_div_pd(dbl(1), _mm512_mul_pd(s.dt, s.length));
      const Dbl at = _mm512_div_pd(_mm512_sub_pd(_mm512_add_pd(_mm512_div_pd(c, s.length), dbl(0.5)), s.t0), s.dt);
      const Dbl half = _mm512_add_pd(_mm512_abs_pd(_mm512_mul_pd(inverse, dbl(job.reach))), dbl(1e-6));
      s.first = _mm512_max_pd(s.first,
                              _mm512_roundscale_pd(_mm512_sub_pd(at, half), _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
      s.last = _mm512_min_pd(s.last,
                             _mm512_roundscale_pd(_mm512_add_pd(at, half), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    }
  }
  const __mmask16 here = static_cast<__mmask16>((1u << count) - 1);
  _mm512_store_ps(out.a, singles(r[0].a, r[1].a));
  _mm512_store_ps(out.b, singles(r[0].b, r[1].b));
  _mm512_store_ps(out.c, singles(r[0].c, r[1].c));
  _mm512_store_ps(out.e, singles(r[0].e, r[1].e));
  _mm512_store_ps(out.step, singles(r[0].step, r[1].step));
  _mm512_store_ps(out.first, singles(r[0].first, r[1].first));
  _mm512_store_ps(out.last, _mm512_mask_mov_ps(vec(-1), here, singles(r[0].last, r[1].last)));
  if (!flight) return;
  const Dbl inverse = dbl(1 / lines.tof.sigma_mm), width = dbl(0.5 * lines.tof.bin_mm), zero = _mm512_setzero_pd();
  Dbl edge[2], slope[2];
  for (int h = 0; h < 2; ++h) {
    const Dbl d0 = _mm512_mul_pd(_mm512_sub_pd(r[h].t0, dbl(0.5)), r[h].length),
              dd = _mm512_mul_pd(r[h].dt, r[h].length);
    edge[h] = _mm512_mul_pd(_mm512_sub_pd(_mm512_add_pd(_mm512_load_pd(centre + 8 * h), width), d0), inverse);
    slope[h] = _mm512_sub_pd(zero, _mm512_mul_pd(dd, inverse));
  }
  _mm512_store_ps(out.edge, singles(edge[0], edge[1]));
  _mm512_store_ps(out.slope, singles(slope[0], slope[1]));
}

// F(u) - F(u - width): tof_half_cdf twice, side by side.
RECON3D_INLINE Vec bin_weight(const TofCurve<float>& f, Vec u, Vec width) {
  const Vec low = vec(-f.limit), high = vec(f.limit), scale = vec(f.scale), one = vec(1);
  const Vec p = _mm512_min_ps(_mm512_max_ps(u, low), high),
            q = _mm512_min_ps(_mm512_max_ps(_mm512_sub_ps(u, width), low), high);
  const Vec s = _mm512_fmsub_ps(_mm512_mul_ps(p, p), scale, one), t = _mm512_fmsub_ps(_mm512_mul_ps(q, q), scale, one);
  Vec x = vec(f.c[f.terms - 1]), y = x;
  for (int i = f.terms - 2; i >= 0; --i) {
    const Vec c = vec(f.c[i]);
    x = _mm512_fmadd_ps(x, s, c);
    y = _mm512_fmadd_ps(y, t, c);
  }
  return _mm512_fmsub_ps(p, x, _mm512_mul_ps(q, y));
}

// Cell and fraction of positions at, in [-1, n]: the last cell takes its far end as well.
RECON3D_INLINE void cell_of(Vec at, float n, Vec& whole, Vec& fraction) {
  at = _mm512_min_ps(_mm512_max_ps(at, vec(-1)), vec(n));
  whole = _mm512_min_ps(_mm512_roundscale_ps(at, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), vec(n - 1));
  fraction = _mm512_sub_ps(at, whole);
}

// The lines' data lie anywhere in memory: they are asked for two registers of lines ahead.
RECON3D_INLINE void fetch_ahead(const LineJob<float>& job, int64_t i, int64_t end, const float* y) {
  const int64_t from = i + 2 * kLanes, to = std::min(end, from + kLanes);
  for (int64_t n = from; n < to; ++n) {
    const int64_t line = job.base + job.order[n];
    __builtin_prefetch(job.lines.pairs + 2 * line);
    if (job.lines.bins) __builtin_prefetch(job.lines.bins + line);
    __builtin_prefetch(y + line);
  }
}

template <bool kFlight>
static void lanes_forward(const LineJob<float>& job, int axis, int64_t begin, int64_t end, float* y) {
  const Bordered<float>& v = job.volume[axis];
  const float rows = static_cast<float>(v.rows), inner = static_cast<float>(v.inner);
  const Vec lane = iota(), width = vec(static_cast<float>(job.lines.tof.bin_mm / job.lines.tof.sigma_mm));
  constexpr int kMostRows = 12, kWindow = 32;  // a wider window costs more than single voxels
  for (int64_t i = begin; i < end; i += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - i));
    Rays16 r;
    fetch_ahead(job, i, end, y);
    rays16(job, axis, i, count, r);
    const Vec a = _mm512_load_ps(r.a), b = _mm512_load_ps(r.b), c = _mm512_load_ps(r.c), e = _mm512_load_ps(r.e),
              first = _mm512_load_ps(r.first), last = _mm512_load_ps(r.last);
    Vec edge, slope;
    if (kFlight) {
      edge = _mm512_load_ps(r.edge);
      slope = _mm512_load_ps(r.slope);
    }
    Vec sum = _mm512_setzero_ps();
    const __mmask16 some = _mm512_cmp_ps_mask(first, last, _CMP_LE_OQ);
    if (some) {
      const float j0 = _mm512_mask_reduce_min_ps(some, first), j1 = _mm512_mask_reduce_max_ps(some, last);
      // the least of affine functions is concave and the greatest convex: the chord from j0 to j1 bounds them
      float from[4], to[4];  // least and greatest row, least and greatest inner position
      for (int k = 0; k < 2; ++k) {
        const Vec at = vec(k ? j1 : j0), u = _mm512_fmadd_ps(b, at, a), w = _mm512_fmadd_ps(e, at, c);
        float* t = k ? to : from;
        t[0] = _mm512_mask_reduce_min_ps(some, u);
        t[1] = _mm512_mask_reduce_max_ps(some, u);
        t[2] = _mm512_mask_reduce_min_ps(some, w);
        t[3] = _mm512_mask_reduce_max_ps(some, w);
      }
      const float inverse = j1 > j0 ? 1 / (j1 - j0) : 0.0f;
      for (float j = j0; j <= j1; j += kLanes) {
        alignas(64) int32_t row0[kLanes], row1[kLanes], in0[kLanes], in1[kLanes];
        {
          const Vec t = _mm512_mul_ps(_mm512_add_ps(vec(j - j0), lane), vec(inverse));
          const auto bound = [&](int k, float slack, float n) {
            Vec at = _mm512_fmadd_ps(vec(to[k] - from[k]), t, vec(from[k] + slack)), whole, fraction;
            cell_of(at, n, whole, fraction);
            return _mm512_cvtps_epi32(whole);
          };
          // roundings of positions far outside are larger than the slack, but such windows are too wide anyway
          _mm512_store_si512(row0, bound(0, -4e-3f, rows));
          _mm512_store_si512(row1, bound(1, 4e-3f, rows));
          _mm512_store_si512(in0, bound(2, -4e-3f, inner));
          _mm512_store_si512(in1, bound(3, 4e-3f, inner));
        }
        const int planes = static_cast<int>(std::min(static_cast<float>(kLanes), j1 - j + 1));
        for (int m = 0; m < planes; ++m) {
          const Vec at = vec(j + static_cast<float>(m));
          const __mmask16 met = _mm512_cmp_ps_mask(at, first, _CMP_GE_OQ) & _mm512_cmp_ps_mask(at, last, _CMP_LE_OQ);
          Vec k, w, l, f;
          cell_of(_mm512_fmadd_ps(b, at, a), rows, k, w);
          cell_of(_mm512_fmadd_ps(e, at, c), inner, l, f);
          const Int cell = _mm512_cvtps_epi32(k), column = _mm512_cvtps_epi32(l);
          const float* plane = v.origin + static_cast<int64_t>(j + static_cast<float>(m)) * v.plane;
          Vec near = _mm512_setzero_ps(), far = near;
          const int low = row0[m], high = row1[m] + 1, left = in0[m], wide = in1[m] + 2 - left;
          if (high - low < kMostRows && wide <= kWindow) {
            const float* p = plane + low * v.row + left;
            const Int here = _mm512_sub_epi32(column, _mm512_set1_epi32(left)),
                      next = _mm512_add_epi32(here, _mm512_set1_epi32(1));
            __mmask16 before = 0;
            if (wide <= kLanes) {
              for (int q = low; q <= high; ++q, p += v.row) {
                const Vec x = _mm512_loadu_ps(p);
                const Vec s = _mm512_permutexvar_ps(here, x), t = _mm512_permutexvar_ps(next, x);
                const Vec both = _mm512_fmadd_ps(f, _mm512_sub_ps(t, s), s);
                const __mmask16 own = _mm512_cmpeq_epi32_mask(cell, _mm512_set1_epi32(q));
                near = _mm512_mask_mov_ps(near, own, both);
                far = _mm512_mask_mov_ps(far, before, both);
                before = own;
              }
            } else {
              for (int q = low; q <= high; ++q, p += v.row) {
                const Vec x = _mm512_loadu_ps(p), z = _mm512_loadu_ps(p + kLanes);
                const Vec s = _mm512_permutex2var_ps(x, here, z), t = _mm512_permutex2var_ps(x, next, z);
                const Vec both = _mm512_fmadd_ps(f, _mm512_sub_ps(t, s), s);
                const __mmask16 own = _mm512_cmpeq_epi32_mask(cell, _mm512_set1_epi32(q));
                near = _mm512_mask_mov_ps(near, own, both);
                far = _mm512_mask_mov_ps(far, before, both);
                before = own;
              }
            }
          } else {
            alignas(64) int32_t rr[kLanes], cc[kLanes];
            alignas(64) float tap[4][kLanes];
            _mm512_store_si512(rr, cell);
            _mm512_store_si512(cc, column);
            for (int n = 0; n < kLanes; ++n) {
              const float *p = plane + rr[n] * v.row + cc[n], *q = p + v.row;
              tap[0][n] = p[0];
              tap[1][n] = p[1];
              tap[2][n] = q[0];
              tap[3][n] = q[1];
            }
            const Vec s = _mm512_load_ps(tap[0]), t = _mm512_load_ps(tap[2]);
            near = _mm512_fmadd_ps(f, _mm512_sub_ps(_mm512_load_ps(tap[1]), s), s);
            far = _mm512_fmadd_ps(f, _mm512_sub_ps(_mm512_load_ps(tap[3]), t), t);
          }
          const Vec value = _mm512_fmadd_ps(w, _mm512_sub_ps(far, near), near);
          if (kFlight)
            sum =
                _mm512_mask3_fmadd_ps(bin_weight(job.curve, _mm512_fmadd_ps(slope, at, edge), width), value, sum, met);
          else
            sum = _mm512_mask_add_ps(sum, met, sum, value);
        }
      }
    }
    alignas(64) float out[kLanes];
    _mm512_store_ps(out, _mm512_maskz_mul_ps(some, sum, _mm512_load_ps(r.step)));
    for (int l = 0; l < count; ++l) y[r.line[l]] = out[l];
  }
}

RECON3D_INLINE void add_pair(float* p, const float* pair) {
  const __m128 sum = _mm_add_ps(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
                                _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(pair))));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_castps_si128(sum));
}

template <bool kFlight>
static void lanes_adjoint(const LineJob<float>& job, int axis, int64_t begin, int64_t end, int low, int high,
                          const float* y) {
  const Bordered<float>& v = job.volume[axis];
  const float rows = static_cast<float>(v.rows), inner = static_cast<float>(v.inner);
  const Vec lane = iota(), width = vec(static_cast<float>(job.lines.tof.bin_mm / job.lines.tof.sigma_mm));
  const Int even = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            odd = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const Vec one = vec(1);
  float* const origin = v.origin;
  const int64_t plane_stride = v.plane, row_stride = v.row;
  for (int64_t i = begin; i < end; i += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - i));
    Rays16 r;
    fetch_ahead(job, i, end, y);
    rays16(job, axis, i, count, r);
    float values[kLanes];
    for (int n = 0; n < count; ++n) values[n] = y[r.line[n]] * r.step[n];
    for (int n = 0; n < count; ++n) {
      const int first = std::max(low, static_cast<int>(r.first[n])),
                last = std::min(high - 1, static_cast<int>(r.last[n]));
      if (first > last) continue;
      const Vec a = vec(r.a[n]), b = vec(r.b[n]), c = vec(r.c[n]), e = vec(r.e[n]), value = vec(values[n]);
      for (int j = first; j <= last; j += kLanes) {
        const Vec at = _mm512_add_ps(vec(static_cast<float>(j)), lane);
        Vec k, w, l, f, here = value;
        cell_of(_mm512_fmadd_ps(b, at, a), rows, k, w);
        cell_of(_mm512_fmadd_ps(e, at, c), inner, l, f);
        if (kFlight)
          here =
              _mm512_mul_ps(value, bin_weight(job.curve, _mm512_fmadd_ps(vec(r.slope[n]), at, vec(r.edge[n])), width));
        const Vec far = _mm512_mul_ps(here, w), near = _mm512_mul_ps(here, _mm512_sub_ps(one, w));
        const Vec near_right = _mm512_mul_ps(near, f), near_left = _mm512_mul_ps(near, _mm512_sub_ps(one, f)),
                  far_right = _mm512_mul_ps(far, f), far_left = _mm512_mul_ps(far, _mm512_sub_ps(one, f));
        alignas(64) float nears[2 * kLanes], fars[2 * kLanes];
        _mm512_store_ps(nears, _mm512_permutex2var_ps(near_left, even, near_right));
        _mm512_store_ps(nears + kLanes, _mm512_permutex2var_ps(near_left, odd, near_right));
        _mm512_store_ps(fars, _mm512_permutex2var_ps(far_left, even, far_right));
        _mm512_store_ps(fars + kLanes, _mm512_permutex2var_ps(far_left, odd, far_right));
        alignas(64) int64_t offset[kLanes];
        const Int cell = _mm512_cvtps_epi32(k), column = _mm512_cvtps_epi32(l), row = _mm512_set1_epi64(row_stride);
        for (int h = 0; h < 2; ++h) {
          const __m256i q = h ? _mm512_extracti64x4_epi64(cell, 1) : _mm512_castsi512_si256(cell);
          const __m256i s = h ? _mm512_extracti64x4_epi64(column, 1) : _mm512_castsi512_si256(column);
          _mm512_store_si512(offset + 8 * h, _mm512_add_epi64(_mm512_mullo_epi64(_mm512_cvtepi32_epi64(q), row),
                                                              _mm512_cvtepi32_epi64(s)));
        }
        const int planes = std::min(kLanes, last - j + 1);
        float* plane = origin + j * plane_stride;
        for (int m = 0; m < planes; ++m, plane += plane_stride) {
          float* p = plane + offset[m];
          add_pair(p, nears + 2 * m);
          add_pair(p + row_stride, fars + 2 * m);
        }
      }
    }
  }
}

static void lane_forward(const LineJob<float>& job, int axis, int64_t begin, int64_t end, float* y) {
  if (job.lines.every_bin()) return planes_forward<float>(job, axis, begin, end, y);
  (job.lines.tof.bins ? lanes_forward<true> : lanes_forward<false>)(job, axis, begin, end, y);
}
static void lane_adjoint(const LineJob<float>& job, int axis, int64_t begin, int64_t end, int low, int high,
                         const float* y) {
  if (job.lines.every_bin()) return planes_adjoint<float>(job, axis, begin, end, low, high, y);
  (job.lines.tof.bins ? lanes_adjoint<true> : lanes_adjoint<false>)(job, axis, begin, end, low, high, y);
}
