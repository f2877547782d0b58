// One line at a time, sixteen planes at a time; included once per instruction set inside its namespace. The weights of
// a block of planes are plain loops that the compiler turns into vectors, the voxels are fetched in pairs.

constexpr int kBlock = 16;

// Planes [j, j + count) of a line, count <= kBlock: where the pair of row k starts, and the four weights of each plane
// as (inner, inner + 1) pairs of row k and of row k + 1, without the step.
template <class T>
struct Planes {
  int64_t at[kBlock];
  T low[2 * kBlock], high[2 * kBlock];
  T distance[kBlock];  // from the line's middle, mm
};

template <class T>
RECON3D_INLINE void set_planes(const Ray& r, const Bordered<T>& v, int64_t j, int count, Planes<T>& p) {
  const T a = static_cast<T>(r.a), b = static_cast<T>(r.b), c = static_cast<T>(r.c), e = static_cast<T>(r.e);
  const T rows = static_cast<T>(v.rows), inner = static_cast<T>(v.inner), j0 = static_cast<T>(j);
  T u[kBlock], w[kBlock];
  int32_t k[kBlock], l[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const T at = j0 + static_cast<T>(i);
    T x = a + b * at, y = c + e * at;
    x = x < T(-1) ? T(-1) : x;
    x = x > rows ? rows : x;
    y = y < T(-1) ? T(-1) : y;
    y = y > inner ? inner : y;
    // positions are at least -1: truncation of x + 1 is the floor; the last cell takes its far end as well
    int32_t m = static_cast<int32_t>(x + T(1)) - 1, n = static_cast<int32_t>(y + T(1)) - 1;
    m = m < static_cast<int32_t>(v.rows) ? m : static_cast<int32_t>(v.rows) - 1;
    n = n < static_cast<int32_t>(v.inner) ? n : static_cast<int32_t>(v.inner) - 1;
    k[i] = m;
    l[i] = n;
    u[i] = x - static_cast<T>(m);
    w[i] = y - static_cast<T>(n);
  }
  for (int i = 0; i < kBlock; ++i) {
    const T far = u[i], near = T(1) - far, right = w[i], left = T(1) - right;
    p.low[2 * i] = near * left;
    p.low[2 * i + 1] = near * right;
    p.high[2 * i] = far * left;
    p.high[2 * i + 1] = far * right;
  }
  for (int i = 0; i < count; ++i)
    p.at[i] = (j + i) * v.plane + static_cast<int64_t>(k[i]) * v.row + static_cast<int64_t>(l[i]);
}

template <class T>
RECON3D_INLINE void set_distance(const Ray& r, int64_t j, Planes<T>& p) {
  const T d = static_cast<T>((r.t0 - 0.5) * r.length), dd = static_cast<T>(r.dt * r.length);
  for (int i = 0; i < kBlock; ++i) p.distance[i] = d + dd * static_cast<T>(j + i);
}

// Weight of the bin centred at `centre` for every plane of the block.
template <class T>
RECON3D_INLINE void bin_weights(const LineJob<T>& job, const Planes<T>& p, double centre, T* out) {
  const Tof& tof = job.lines.tof;
  typedef T Vec __attribute__((vector_size(kBlock * sizeof(T)), aligned(alignof(T)), may_alias));
  const T inverse = static_cast<T>(1 / tof.sigma_mm), low = static_cast<T>(centre - 0.5 * tof.bin_mm),
          high = static_cast<T>(centre + 0.5 * tof.bin_mm);
  const Vec distance = *reinterpret_cast<const Vec*>(p.distance);
  *reinterpret_cast<Vec*>(out) = tof_half_cdf<T, Vec>(job.curve, (high - distance) * inverse) -
                                 tof_half_cdf<T, Vec>(job.curve, (low - distance) * inverse);
}

// Bins that a distance between from and to (in any order) can reach.
RECON3D_INLINE void bins_near(const Tof& tof, double reach, double from, double to, int64_t* first, int64_t* last) {
  const double middle = 0.5 * (static_cast<double>(tof.bins) - 1), most = static_cast<double>(tof.bins) - 1;
  const double low = (std::min(from, to) - reach) / tof.bin_mm + middle - 1e-6;
  const double high = (std::max(from, to) + reach) / tof.bin_mm + middle + 1e-6;
  *first = static_cast<int64_t>(std::ceil(std::min(std::max(low, 0.0), most + 1)));
  *last = static_cast<int64_t>(std::floor(std::max(std::min(high, most), -1.0)));
}

template <class T>
static void planes_forward(const LineJob<T>& job, int axis, int64_t begin, int64_t end, T* y) {
  const Lines& lines = job.lines;
  const Bordered<T>& v = job.volume[axis];
  const bool every = lines.every_bin();
  const int64_t values = lines.values();
  Planes<T> p;
  T weight[kBlock], value[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    int64_t line;
    double centre = 0;
    const Ray r = ray_at(job, i, &line, &centre);
    T* to = y + line * values;
    T sum = 0;
    if (every)
      for (int64_t b = 0; b < values; ++b) to[b] = 0;
    for (int64_t j = r.first; j <= r.last; j += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, r.last - j + 1));
      set_planes(r, v, j, count, p);
      for (int m = 0; m < count; ++m) {
        const T *q = v.origin + p.at[m], *s = q + v.row;
        value[m] = p.low[2 * m] * q[0] + p.low[2 * m + 1] * q[1] + (p.high[2 * m] * s[0] + p.high[2 * m + 1] * s[1]);
      }
      if (!lines.tof.bins) {
        for (int m = 0; m < count; ++m) sum += value[m];
        continue;
      }
      set_distance(r, j, p);
      if (!every) {
        bin_weights(job, p, centre, weight);
        for (int m = 0; m < count; ++m) sum += value[m] * weight[m];
        continue;
      }
      int64_t first, last;
      bins_near(lines.tof, job.reach, p.distance[0], p.distance[count - 1], &first, &last);
      for (int64_t b = first; b <= last; ++b) {
        bin_weights(job, p, bin_centre(lines.tof, b), weight);
        T part = 0;
        for (int m = 0; m < count; ++m) part += value[m] * weight[m];
        to[b] += part;
      }
    }
    const T step = static_cast<T>(r.step);
    if (every)
      for (int64_t b = 0; b < values; ++b) to[b] *= step;
    else
      *to = sum * step;
  }
}

template <class T>
static void planes_adjoint(const LineJob<T>& job, int axis, int64_t begin, int64_t end, int low, int high, const T* y) {
  const Lines& lines = job.lines;
  const Bordered<T>& v = job.volume[axis];
  const bool every = lines.every_bin();
  const int64_t values = lines.values();
  Planes<T> p;
  T weight[kBlock], value[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    int64_t line;
    double centre = 0;
    const Ray r = ray_at(job, i, &line, &centre);
    const T* from = y + line * values;
    const T step = static_cast<T>(r.step);
    // blocks start where they start without the cut, so that no cut changes a bit
    const int64_t skip = r.first < low ? (low - r.first) / kBlock * kBlock : 0;
    for (int64_t j = r.first + skip; j <= r.last && j < high; j += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, r.last - j + 1));
      set_planes(r, v, j, count, p);
      if (!lines.tof.bins) {
        for (int m = 0; m < kBlock; ++m) value[m] = *from * step;
      } else {
        set_distance(r, j, p);
        if (!every) {
          bin_weights(job, p, centre, weight);
          for (int m = 0; m < kBlock; ++m) value[m] = *from * step * weight[m];
        } else {
          for (int m = 0; m < kBlock; ++m) value[m] = 0;
          int64_t first, last;
          bins_near(lines.tof, job.reach, p.distance[0], p.distance[count - 1], &first, &last);
          for (int64_t b = first; b <= last; ++b) {
            bin_weights(job, p, bin_centre(lines.tof, b), weight);
            for (int m = 0; m < kBlock; ++m) value[m] += from[b] * weight[m];
          }
          for (int m = 0; m < kBlock; ++m) value[m] *= step;
        }
      }
      const int from_plane = static_cast<int>(std::max<int64_t>(0, low - j)),
                to_plane = static_cast<int>(std::min<int64_t>(count, high - j));
      for (int m = from_plane; m < to_plane; ++m) {
        T *q = v.origin + p.at[m], *s = q + v.row;
        const T here = value[m];
        q[0] += here * p.low[2 * m];
        q[1] += here * p.low[2 * m + 1];
        s[0] += here * p.high[2 * m];
        s[1] += here * p.high[2 * m + 1];
      }
    }
  }
}
