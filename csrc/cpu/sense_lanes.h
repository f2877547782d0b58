// SENSE normal operators with the coils in the vector lanes. Included after cpu/lane_normal.h, in the same namespace.
// Coils are taken in parts of one register, always in the same order, and a line's arithmetic knows nothing of the
// others: results do not depend on threads or on neighbouring slices.

// S x: a line of the image, complex numbers one after the other, times the coils' maps.
template <class T>
struct FromImage {
  const T *line, *maps;
  ptrdiff_t ahead;
  RECON3D_MEMBER typename Lanes<T>::Vec operator()(ptrdiff_t i) const {
    __builtin_prefetch(maps + i * (2 * kChunk) + ahead, 0, 2);
    return times(load(maps + i * (2 * kChunk)), splat(line[2 * i]), splat(line[2 * i + 1]));
  }
};
// conj of conj(S) z, which two multiply-adds make: the sum over lanes takes it back.
template <class T>
struct ToCoilProduct {
  T* p;
  const T* maps;
  RECON3D_MEMBER void operator()(ptrdiff_t i, typename Lanes<T>::Vec z) const {
    const typename Lanes<T>::Vec s = load(maps + i * (2 * kChunk));
    store(p + i * Lanes<T>::kReals, msubadd(turn(z), imaginary_part(s), z * real_part(s)));
  }
};
// Lines of a plane or of maps that ask for the next one while they are read or written: the processor's own prefetch
// stops at every page.
template <class T>
struct FromPlane {
  const T *p, *maps;
  ptrdiff_t ahead, maps_ahead;
  RECON3D_MEMBER typename Lanes<T>::Vec operator()(ptrdiff_t i) const {
    __builtin_prefetch(p + i * Lanes<T>::kReals + ahead, 0, 2);
    __builtin_prefetch(maps + i * (2 * kChunk) + maps_ahead, 0, 2);
    return load(p + i * Lanes<T>::kReals);
  }
};
template <class T>
struct ToPlane {
  T* p;
  ptrdiff_t ahead;
  RECON3D_MEMBER void operator()(ptrdiff_t i, typename Lanes<T>::Vec v) const {
    __builtin_prefetch(p + i * Lanes<T>::kReals + ahead, 1, 2);
    store(p + i * Lanes<T>::kReals, v);
  }
};
// A strided line that asks for the line `ahead` reals further on, whose pages the processor would not guess.
template <class T>
struct FromColumn {
  const T* p;
  ptrdiff_t stride, ahead;
  RECON3D_MEMBER typename Lanes<T>::Vec operator()(ptrdiff_t i) const {
    __builtin_prefetch(p + i * stride + ahead);
    return load(p + i * stride);
  }
};
// Elements times exp(-i pi i / n), and added to another line times its conjugate: the odd frequencies of twice the
// length are the frequencies of a line so turned.
template <class T>
struct FromTurned {
  const T *p, *turns;
  RECON3D_MEMBER typename Lanes<T>::Vec operator()(ptrdiff_t i) const {
    return times(load(p + i * Lanes<T>::kReals), splat(turns[2 * i]), splat(turns[2 * i + 1]));
  }
};
template <class T>
struct AddTurned {
  T* to;
  ptrdiff_t stride;
  const T *p, *turns;
  RECON3D_MEMBER void operator()(ptrdiff_t i, typename Lanes<T>::Vec v) const {
    store(to + i * stride,
          load(p + i * Lanes<T>::kReals) + times_conj(v, splat(turns[2 * i]), splat(turns[2 * i + 1])));
  }
};

template <class T>
static std::vector<T> half_turns(ptrdiff_t n) {
  std::vector<T> turns;
  for (ptrdiff_t i = 0; i < n; ++i) {
    const double angle = 3.14159265358979323846 * static_cast<double>(i) / static_cast<double>(n);
    turns.push_back(static_cast<T>(std::cos(angle)));
    turns.push_back(static_cast<T>(-std::sin(angle)));
  }
  return turns;
}

// The parts of one register that hold coils.
template <class T>
static ptrdiff_t coil_parts(int64_t coils) {
  return (coils + Lanes<T>::W - 1) / Lanes<T>::W;
}
// Where part `part` of the maps of one slice starts; `size` elements make a chunk.
template <class T>
static ptrdiff_t part_offset(ptrdiff_t part, ptrdiff_t size) {
  const ptrdiff_t lane = part * Lanes<T>::W;
  return 2 * (lane / kChunk * kChunk * size + lane % kChunk);
}

template <class T>
static void pack_coils(const T* maps, T* packed, int64_t slices, int64_t coils, int64_t ny, int64_t nx, bool along_y,
                       RunPieces run) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t W = Lanes<T>::W;
  const ptrdiff_t size = ny * nx, chunks = (coils + kChunk - 1) / kChunk, whole = nx / W * W;
  const ptrdiff_t step = 2 * kChunk * (along_y ? ny : 1);
  run_pieces(run, slices * chunks * ny, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const ptrdiff_t y = item % ny, chunk = item / ny % chunks, slice = item / ny / chunks;
      T* line = packed + 2 * kChunk * ((slice * chunks + chunk) * size + (along_y ? y : y * nx));
      for (ptrdiff_t lane = 0; lane < kChunk; lane += W) {
        const ptrdiff_t coil = chunk * kChunk + lane;
        const int filled = static_cast<int>(coils - coil < W ? (coils > coil ? coils - coil : 0) : W);
        const T* from = maps + 2 * ((slice * coils + (filled ? coil : 0)) * size + y * nx);
        T* to = line + 2 * lane;
        Vec v[W];
        for (ptrdiff_t x = 0; x < whole; x += W) {
          load_lanes<T>(from + 2 * x, 2 * size, filled, v);
          for (ptrdiff_t i = 0; i < W; ++i) store(to + (x + i) * step, v[i]);
        }
        for (ptrdiff_t x = whole; x < nx; ++x)
          for (ptrdiff_t i = 0; i < 2 * W; ++i)
            to[x * step + i] = i / 2 < filled ? from[2 * (i / 2 * size + x) + i % 2] : T(0);
      }
    }
  });
}

// sum (+)= the lanes of every element of work; both have room for whole registers of elements.
template <class T>
static void add_lanes(const T* work, ptrdiff_t n, T* sum, bool first) {
  using Vec = typename Lanes<T>::Vec;
  constexpr ptrdiff_t E = Lanes<T>::kReals, W = Lanes<T>::W;
  for (ptrdiff_t i = 0; i < n; i += W) {
    Vec v[W];
    for (ptrdiff_t k = 0; k < W; ++k) v[k] = load(work + (i + k) * E);
    const Vec total = sum_lanes<T>(v);
    store(sum + 2 * i, first ? total : load(sum + 2 * i) + total);
  }
}

template <class T>
static void sense_lines(const SenseJob<T>& job) {
  constexpr ptrdiff_t W = Lanes<T>::W;
  const ptrdiff_t lines = job.along_y ? job.nx : job.ny, n = job.along_y ? job.ny : job.nx;
  const ptrdiff_t line_step = job.along_y ? 2 : 2 * n, step = job.along_y ? 2 * lines : 2;
  const ptrdiff_t size = job.ny * job.nx, chunks = (job.coils + kChunk - 1) / kChunk, parts = coil_parts<T>(job.coils);
  const NormalPlan<T>& plan = normal_plan<T>(static_cast<int>(n));
  std::vector<T> weights(job.weight_slices * n);
  for (ptrdiff_t k = 0; k < job.weight_slices; ++k)
    for (ptrdiff_t i = 0; i < n; ++i) weights[k * n + i] = job.weights[k * n + plan.order[i]] / static_cast<T>(n);
  run_pieces(job.run, job.slices * lines, [&](int64_t begin, int64_t end) {
    LaneBuffer<T> work(plan.work + W), rows((2 * n + 4 * W) / W);
    T *line = rows.get(), *sum = line + 2 * (n + W);
    std::memset(work.get(), 0, sizeof(T) * (plan.work + W) * Lanes<T>::kReals);
    for (int64_t item = begin; item < end; ++item) {
      const ptrdiff_t slice = item / lines, l = item % lines;
      const T* x = job.x + 2 * slice * size + l * line_step;
      for (ptrdiff_t i = 0; i < n; ++i) {
        line[2 * i] = x[i * step];
        line[2 * i + 1] = x[i * step + 1];
      }
      const T* w = weights.data() + (job.weight_slices > 1 ? slice * n : 0);
      for (ptrdiff_t part = 0; part < parts; ++part) {
        const T* maps = job.maps + 2 * kChunk * (slice * chunks * size + l * n) + part_offset<T>(part, size);
        normal_pair(plan, FromImage<T>{line, maps, 2 * kChunk * n}, work.get(), w, ToCoilProduct<T>{work.get(), maps});
        add_lanes(work.get(), n, sum, part == 0);
      }
      T* out = job.out + 2 * slice * size + l * line_step;
      for (ptrdiff_t i = 0; i < n; ++i) {
        out[i * step] = sum[2 * i];
        out[i * step + 1] = -sum[2 * i + 1];
      }
    }
  });
}

// The passes of one slice and one part of its coils: rows to frequencies along x, in a plane of their own; columns
// there and back; rows back, times the conjugate maps, added up. A plane holds the frequencies 2 k + odd of the doubled
// transform, so only lines of the image's own size are ever transformed.
template <class T>
struct SensePlane {
  using Vec = typename Lanes<T>::Vec;
  static constexpr ptrdiff_t E = Lanes<T>::kReals, W = Lanes<T>::W;
  const SenseJob<T>& job;
  const NormalPlan<T>&along_x, &along_y;
  const T *x_turns, *y_turns;  // of doubled transforms
  ptrdiff_t row_stride;        // reals; an odd number of registers, so that columns spread over the cache
  ptrdiff_t slice, part;
  bool odd, first;
  T* plane;
  const T* weights;  // of the slice, [odd x][place x][odd y][place y]

  const T* maps(ptrdiff_t y) const {
    const ptrdiff_t size = job.ny * job.nx, chunks = (job.coils + kChunk - 1) / kChunk;
    return job.maps + 2 * kChunk * (slice * chunks * size + y * job.nx) + part_offset<T>(part, size);
  }

  void rows_in(int64_t begin, int64_t end) const {
    LaneBuffer<T> work(along_x.work), row((job.nx + W - 1) / W);
    for (ptrdiff_t y = begin; y < end; ++y) {
      const T* line = job.x + 2 * (slice * job.ny + y) * job.nx;
      if (odd) {
        turn_line(line, row.get());
        line = row.get();
      }
      normal_forward(along_x, FromImage<T>{line, maps(y), 2 * kChunk * job.nx}, work.get(),
                     ToPlane<T>{plane + y * row_stride, row_stride});
    }
  }

  void columns(int64_t begin, int64_t end) const {
    LaneBuffer<T> work(along_y.work), other(along_y.work);
    for (ptrdiff_t x = begin; x < end; ++x) {
      T* column = plane + x * E;
      const FromColumn<T> from{column, row_stride, x + 1 < end ? E : 0};
      const T* w = weights + (odd * job.nx + x) * job.ny * (job.doubled ? 2 : 1);
      if (!job.doubled) {
        normal_pair(along_y, from, work.get(), w, ToLine<T>{column, row_stride});
        continue;
      }
      for (ptrdiff_t y = 0; y < job.ny; ++y) store(other.get() + y * E, from(y));
      normal_pair(along_y, FromWork<T>{other.get()}, work.get(), w, ToWork<T>{work.get()});
      normal_pair(along_y, FromTurned<T>{other.get(), y_turns}, other.get(), w + job.ny,
                  AddTurned<T>{column, row_stride, work.get(), y_turns});
    }
  }

  void rows_out(int64_t begin, int64_t end) const {
    LaneBuffer<T> work(along_x.work + W), row((job.nx + 2 * W) / W);
    std::memset(work.get(), 0, sizeof(T) * (along_x.work + W) * E);
    T* sum = row.get();
    for (ptrdiff_t y = begin; y < end; ++y) {
      normal_backward(along_x, FromPlane<T>{plane + y * row_stride, maps(y), row_stride, 2 * kChunk * job.nx},
                      work.get(), ToCoilProduct<T>{work.get(), maps(y)});
      add_lanes(work.get(), job.nx, sum, true);
      if (odd) turn_line(sum, sum);  // the sum is still a conjugate
      T* out = job.out + 2 * (slice * job.ny + y) * job.nx;
      for (ptrdiff_t i = 0; i < job.nx; ++i) {
        out[2 * i] = first ? sum[2 * i] : out[2 * i] + sum[2 * i];
        out[2 * i + 1] = first ? -sum[2 * i + 1] : out[2 * i + 1] - sum[2 * i + 1];
      }
    }
  }

  void turn_line(const T* from, T* to) const {
    for (ptrdiff_t i = 0; i < job.nx; ++i) {
      const T re = from[2 * i], im = from[2 * i + 1], c = x_turns[2 * i], s = x_turns[2 * i + 1];
      to[2 * i] = re * c - im * s;
      to[2 * i + 1] = re * s + im * c;
    }
  }
};

// Weights of one slice in the order of the passes, divided by the size of the transform.
template <class T>
static void order_weights(const SenseJob<T>& job, const NormalPlan<T>& along_x, const NormalPlan<T>& along_y,
                          const T* from, T* to) {
  const ptrdiff_t d = job.doubled ? 2 : 1, height = d * job.ny, width = d * job.nx;
  const T scale = 1 / (static_cast<T>(height) * static_cast<T>(width));
  for (ptrdiff_t odd_x = 0; odd_x < d; ++odd_x)
    for (ptrdiff_t odd_y = 0; odd_y < d; ++odd_y)
      for (ptrdiff_t y = 0; y < job.ny; ++y) {
        const T* row = from + (d * along_y.order[y] + odd_y) * width + odd_x;
        T* column = to + odd_x * job.nx * height + odd_y * job.ny + y;
        for (ptrdiff_t x = 0; x < job.nx; ++x) column[x * height] = row[d * along_x.order[x]] * scale;
      }
}

template <class T>
static void sense_planes(const SenseJob<T>& job) {
  constexpr ptrdiff_t E = Lanes<T>::kReals;
  const ptrdiff_t parts = coil_parts<T>(job.coils), d = job.doubled ? 2 : 1, grid = d * d * job.ny * job.nx;
  const NormalPlan<T>&along_x = normal_plan<T>(static_cast<int>(job.nx)),
        &along_y = normal_plan<T>(static_cast<int>(job.ny));
  const std::vector<T> x_turns = half_turns<T>(job.nx), y_turns = half_turns<T>(job.ny);
  const ptrdiff_t row_stride = (job.nx | 1) * E;
  const size_t plane_bytes = sizeof(T) * row_stride * job.ny;
  std::vector<T> shared;
  if (job.weight_slices == 1) {
    shared.resize(grid);
    order_weights(job, along_x, along_y, job.weights, shared.data());
  }
  // One slice; `run` spreads the lines of a pass, or runs them all where slices are spread.
  auto slice_of = [&](ptrdiff_t slice, T* plane, const auto& run) {
    std::vector<T> own;
    if (job.weight_slices > 1) {
      own.resize(grid);
      order_weights(job, along_x, along_y, job.weights + slice * grid, own.data());
    }
    for (int odd = 0; odd < d; ++odd)
      for (ptrdiff_t part = 0; part < parts; ++part) {
        const SensePlane<T> pass{
            job,   along_x, along_y, x_turns.data(),  y_turns.data(), row_stride,
            slice, part,    odd > 0, odd + part == 0, plane,          (job.weight_slices > 1 ? own : shared).data()};
        run(job.ny, [&](int64_t b, int64_t e) { pass.rows_in(b, e); });
        run(job.nx, [&](int64_t b, int64_t e) { pass.columns(b, e); });
        run(job.ny, [&](int64_t b, int64_t e) { pass.rows_out(b, e); });
      }
  };
  const int64_t whole = job.slices / job.threads * job.threads;
  run_pieces(job.run, whole, [&](int64_t begin, int64_t end) {
    const PlaneMemory plane(plane_bytes);
    for (int64_t slice = begin; slice < end; ++slice)
      slice_of(slice, static_cast<T*>(plane.get()), [](int64_t n, const auto& body) { body(0, n); });
  });
  if (whole == job.slices) return;
  const PlaneMemory plane(plane_bytes);
  for (int64_t slice = whole; slice < job.slices; ++slice)
    slice_of(slice, static_cast<T*>(plane.get()), [&](int64_t n, const auto& body) { run_pieces(job.run, n, body); });
}
