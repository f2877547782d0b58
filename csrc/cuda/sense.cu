#include "cuda/launch.h"
#include "cuda/sense.h"

namespace recon3d {
namespace cuda {
namespace {
constexpr int kChunk = 8;      // coils that lie side by side in memory
constexpr int kThreads = 256;  // of a block, which transforms one line of up to kChunk coils in shared memory
constexpr int kLine = 3072;    // complex numbers of shared memory for a line: 24 KB in float, 48 KB in double
constexpr int64_t kPlaneBytes = int64_t{48}
                                << 20;  // of slices in transit between passes: about what the L2 cache holds

// Blocks that a multiprocessor should hold: 64 registers for a thread in float, 128 in double.
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 4 : 2;

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T re, im;
};
template <class T>
__device__ inline Pair<T> operator+(Pair<T> a, Pair<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
__device__ inline Pair<T> operator-(Pair<T> a, Pair<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
__device__ inline Pair<T> operator*(Pair<T> a, Pair<T> b) {
  return {fma(a.re, b.re, -a.im * b.im), fma(a.re, b.im, a.im * b.re)};
}
template <class T>
__device__ inline Pair<T> operator*(T a, Pair<T> b) {
  return {a * b.re, a * b.im};
}
template <class T>
__device__ inline Pair<T> conj(Pair<T> a) {
  return {a.re, -a.im};
}
// a + S i b
template <int S, class T>
__device__ inline Pair<T> plus_i(Pair<T> a, Pair<T> b) {
  return S > 0 ? Pair<T>{a.re - b.im, a.im + b.re} : Pair<T>{a.re + b.im, a.im - b.re};
}

// ---- butterflies: v[0..R) replaced by its transform of sign S
// --------------------------------------------------------

template <int R, int S>
struct Butterfly {  // R = 3, 5, 7
  template <class T>
  static __device__ inline void run(Pair<T>* v) {
    // cos and sin of 2 pi j / R, j = 1 .. R / 2
    constexpr double c[3][3] = {{-0.5, 0, 0},
                                {0.30901699437494742, -0.80901699437494742, 0},
                                {0.62348980185873353, -0.22252093395631440, -0.90096886790241913}};
    constexpr double s[3][3] = {{0.86602540378443865, 0, 0},
                                {0.95105651629515357, 0.58778525229247313, 0},
                                {0.78183148246802981, 0.97492791218182361, 0.43388373911755812}};
    constexpr int H = R / 2;
    Pair<T> sum[H], difference[H], all = v[0];
    const Pair<T> first = v[0];
#pragma unroll
    for (int j = 0; j < H; ++j) {
      sum[j] = v[j + 1] + v[R - 1 - j];
      difference[j] = v[j + 1] - v[R - 1 - j];
      all = all + sum[j];
    }
#pragma unroll
    for (int k = 1; k <= H; ++k) {
      Pair<T> even = first, odd = {0, 0};
#pragma unroll
      for (int j = 1; j <= H; ++j) {
        const int jk = j * k % R, fold = jk > H ? R - jk : jk;
        even = even + T(c[H - 1][fold - 1]) * sum[j - 1];
        odd = odd + T(jk > H ? -s[H - 1][fold - 1] : s[H - 1][fold - 1]) * difference[j - 1];
      }
      v[k] = plus_i<S>(even, odd);
      v[R - k] = plus_i<-S>(even, odd);
    }
    v[0] = all;
  }
};
template <int S>
struct Butterfly<1, S> {
  template <class T>
  static __device__ inline void run(Pair<T>*) {}
};
template <int S>
struct Butterfly<2, S> {
  template <class T>
  static __device__ inline void run(Pair<T>* v) {
    const Pair<T> a = v[0];
    v[0] = a + v[1];
    v[1] = a - v[1];
  }
};
template <int S>
struct Butterfly<4, S> {
  template <class T>
  static __device__ inline void run(Pair<T>* v) {
    const Pair<T> a = v[0] + v[2], b = v[0] - v[2], c = v[1] + v[3], d = v[1] - v[3];
    v[0] = a + c;
    v[2] = a - c;
    v[1] = plus_i<S>(b, d);
    v[3] = plus_i<-S>(b, d);
  }
};
template <int S>
struct Butterfly<8, S> {
  template <class T>
  static __device__ inline void run(Pair<T>* v) {
    const T half = T(0.70710678118654752);
    Pair<T> e[4] = {v[0], v[2], v[4], v[6]}, o[4] = {v[1], v[3], v[5], v[7]};
    Butterfly<4, S>::run(e);
    Butterfly<4, S>::run(o);
    const Pair<T> p = half * plus_i<S>(o[1], o[1]), m = half * plus_i<-S>(o[3], o[3]);
    v[0] = e[0] + o[0];
    v[4] = e[0] - o[0];
    v[1] = e[1] + p;
    v[5] = e[1] - p;
    v[2] = plus_i<S>(e[2], o[2]);
    v[6] = plus_i<-S>(e[2], o[2]);
    v[3] = e[3] - m;
    v[7] = e[3] + m;
  }
};

// ---- a line in shared memory: [element][lane], transformed in place
// --------------------------------------------------

// Stages as on the CPU (cpu/lane_plan.h): forward leaves frequency `order` at a place, backward starts from there.
// Radices lie in four bits each, the first stage's lowest: arrays of a kernel argument would be copied to the stack.
struct LinePlan {
  int n, count;
  uint64_t radices;
};
__host__ __device__ inline int radix(const LinePlan& plan, int s) {
  return static_cast<int>(plan.radices >> (4 * s) & 15);
}

// The largest power of two among the radices: eight complex doubles are too many registers.
template <class T>
constexpr int kMostRadix = sizeof(T) == 4 ? 8 : 4;

template <class T>
bool make_plan(int64_t n, LinePlan& plan) {
  if (n < 1 || n > kLine) return false;
  plan = {static_cast<int>(n), 0, 0};
  int rest = plan.n, twos = 0;
  while (!(rest >> twos & 1)) ++twos;
  auto push = [&](int r) {
    rest /= r;
    plan.radices |= static_cast<uint64_t>(r) << (4 * plan.count++);
  };
  // first what the powers of the largest radix leave over
  const int group = kMostRadix<T> == 8 ? 3 : 2;
  if (twos % group) push(1 << twos % group);
  for (const int r : {kMostRadix<T>, 7, 5, 3})
    while (rest % r == 0) push(r);
  if (plan.count == 0) push(1);
  return rest == 1;
}

__device__ inline int order(const LinePlan& plan, int place) {
  int frequency = 0, weight = 1, step = plan.n;
  for (int s = 0; s < plan.count; ++s) {
    step /= radix(plan, s);
    frequency += place / step * weight;
    place %= step;
    weight *= radix(plan, s);
  }
  return frequency;
}

// Block-wide; roots[2 j] = exp(-2 pi i j / n), lanes = 1 << bits.
template <class T, int R>
__device__ void forward_stage(Pair<T>* line, int n, int step, int bits, const Pair<T>* __restrict__ roots) {
  const int items = n / R << bits, leap = n / (step * R);
  for (int item = threadIdx.x; item < items; item += kThreads) {
    const int b = item >> bits, p = b % step;
    Pair<T>* at = line + (((b - p) * R + p) << bits) + (item & ((1 << bits) - 1));
    Pair<T> v[R];
#pragma unroll
    for (int j = 0; j < R; ++j) v[j] = at[(j * step) << bits];
    Butterfly<R, -1>::run(v);
    at[0] = v[0];
#pragma unroll
    for (int k = 1; k < R; ++k) at[(k * step) << bits] = v[k] * roots[2 * p * k * leap];
  }
}
template <class T, int R>
__device__ void backward_stage(Pair<T>* line, int n, int step, int bits, const Pair<T>* __restrict__ roots) {
  const int items = n / R << bits, leap = n / (step * R);
  for (int item = threadIdx.x; item < items; item += kThreads) {
    const int b = item >> bits, p = b % step;
    Pair<T>* at = line + (((b - p) * R + p) << bits) + (item & ((1 << bits) - 1));
    Pair<T> v[R];
    v[0] = at[0];
#pragma unroll
    for (int k = 1; k < R; ++k) v[k] = at[(k * step) << bits] * conj(roots[2 * p * k * leap]);
    Butterfly<R, 1>::run(v);
#pragma unroll
    for (int j = 0; j < R; ++j) at[(j * step) << bits] = v[j];
  }
}
// The last stage forward, weights, the first stage back.
template <class T, int R>
__device__ void weighted_middle(Pair<T>* line, int n, int bits, const T* __restrict__ weights) {
  const int items = n / R << bits;
  for (int item = threadIdx.x; item < items; item += kThreads) {
    const int b = (item >> bits) * R;
    Pair<T>* at = line + (b << bits) + (item & ((1 << bits) - 1));
    Pair<T> v[R];
#pragma unroll
    for (int j = 0; j < R; ++j) v[j] = at[j << bits];
    Butterfly<R, -1>::run(v);
#pragma unroll
    for (int j = 0; j < R; ++j) v[j] = weights[b + j] * v[j];
    Butterfly<R, 1>::run(v);
#pragma unroll
    for (int j = 0; j < R; ++j) at[j << bits] = v[j];
  }
}

#define RECON3D_RADICES(CALL)                  \
  case 2:                                      \
    CALL(2);                                   \
    break;                                     \
  case 3:                                      \
    CALL(3);                                   \
    break;                                     \
  case 4:                                      \
    CALL(4);                                   \
    break;                                     \
  case 5:                                      \
    CALL(5);                                   \
    break;                                     \
  case 7:                                      \
    CALL(7);                                   \
    break;                                     \
  case 8:                                      \
    if constexpr (kMostRadix<T> == 8) CALL(8); \
    break;

// Stages [first, last) forward; each ends with a barrier, as do the two below.
template <class T>
__device__ void forward(Pair<T>* line, const LinePlan& plan, int last, int bits, const Pair<T>* roots) {
#define RECON3D_CALL(R) forward_stage<T, R>(line, plan.n, step, bits, roots)
  for (int s = 0, step = plan.n; s < last; ++s) {
    step /= radix(plan, s);
    switch (radix(plan, s)) { RECON3D_RADICES(RECON3D_CALL) }
    __syncthreads();
  }
#undef RECON3D_CALL
}
template <class T>
__device__ void backward(Pair<T>* line, const LinePlan& plan, int last, int bits, const Pair<T>* roots) {
#define RECON3D_CALL(R) backward_stage<T, R>(line, plan.n, step, bits, roots)
  int step = 1;
  for (int s = plan.count - 1; s >= last; --s) step *= radix(plan, s);
  for (int s = last - 1; s >= 0; --s) {
    switch (radix(plan, s)) { RECON3D_RADICES(RECON3D_CALL) }
    step *= radix(plan, s);
    __syncthreads();
  }
#undef RECON3D_CALL
}
template <class T>
__device__ void pair(Pair<T>* line, const LinePlan& plan, int bits, const Pair<T>* roots, const T* weights) {
  forward(line, plan, plan.count - 1, bits, roots);
#define RECON3D_CALL(R) weighted_middle<T, R>(line, plan.n, bits, weights)
  switch (radix(plan, plan.count - 1)) {
    case 1:
      RECON3D_CALL(1);
      break;
      RECON3D_RADICES(RECON3D_CALL)
  }
#undef RECON3D_CALL
  __syncthreads();
  backward(line, plan, plan.count - 1, bits, roots);
}

// line = S x, coil by coil; x times turns where turns are given.
template <class T>
__device__ void times_maps(Pair<T>* line, const Pair<T>* __restrict__ x, int64_t step, const Pair<T>* turns,
                           const Pair<T>* __restrict__ maps, int n, int bits) {
  for (int item = threadIdx.x; item < n << bits; item += kThreads) {
    const int i = item >> bits, lane = item & ((1 << bits) - 1);
    const Pair<T> v = turns ? x[i * step] * turns[i] : x[i * step];
    line[item] = maps[i * kChunk + lane] * v;
  }
  __syncthreads();
}
// out (+)= the sum over lanes of conj(S) line, times conj(turns) where they are given. Starts with all of line written.
template <class T>
__device__ void add_coils(Pair<T>* line, const Pair<T>* __restrict__ maps, Pair<T>* out, int64_t step,
                          const Pair<T>* turns, int n, int bits, bool first) {
  const int lanes = 1 << bits;
  for (int item = threadIdx.x; item < n << bits; item += kThreads)
    line[item] = conj(maps[(item >> bits) * kChunk + (item & (lanes - 1))]) * line[item];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    Pair<T> sum = {0, 0};
    for (int l = 0; l < lanes; ++l) sum = sum + line[(i << bits) + ((l + i) & (lanes - 1))];  // spread over the banks
    if (turns) sum = sum * conj(turns[i]);
    out[i * step] = first ? sum : out[i * step] + sum;
  }
  __syncthreads();
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// roots[j] = exp(-pi i j / n), 2 n of them: every second one is a root of the line, the first n turn it.
template <class T>
__global__ void __launch_bounds__(kThreads) sense_roots(Pair<T>* roots, int n) {
  const int j = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= 2 * n) return;
  double s, c;
  sincospi(static_cast<double>(j) / n, &s, &c);
  roots[j] = {static_cast<T>(c), static_cast<T>(-s)};
}

// Weights in the order of places and divided by the size of the transform: [slice][odd x][place x][odd y][place y].
// Lines are planes of ny = 1.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sense_order(const T* __restrict__ from, T* __restrict__ to, LinePlan x, LinePlan y, int factor, int64_t total) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= total) return;
  const int height = y.n * (y.n == 1 && factor == 1 ? 1 : factor), width = x.n * factor;
  int64_t rest = at;
  const int place_y = static_cast<int>(rest % y.n);
  rest /= y.n;
  const int odd_y = static_cast<int>(rest % factor);
  rest /= factor;
  const int place_x = static_cast<int>(rest % x.n);
  rest /= x.n;
  const int odd_x = static_cast<int>(rest % factor);
  rest /= factor;
  const int ky = factor * order(y, place_y) + odd_y, kx = factor * order(x, place_x) + odd_x;
  to[at] = from[(rest * height + ky) * width + kx] / (static_cast<T>(height) * static_cast<T>(width));
}

// One block: one line of one slice, all coils.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    sense_lines_kernel(const Pair<T>* __restrict__ x, const Pair<T>* __restrict__ maps, const T* __restrict__ weights,
                       const Pair<T>* __restrict__ roots, Pair<T>* __restrict__ out, LinePlan plan, int64_t lines,
                       int64_t step, int64_t line_step, int coils, int bits, int64_t weight_step) {
  __shared__ Pair<T> line[kLine];
  const int64_t slice = blockIdx.x / lines, l = blockIdx.x % lines, size = lines * plan.n;
  const int64_t chunks = (coils + kChunk - 1) / kChunk, at = slice * size + l * line_step;
  const Pair<T>* none = nullptr;
  for (int coil = 0; coil < coils; coil += 1 << bits) {
    const Pair<T>* s = maps + ((slice * chunks + coil / kChunk) * size + l * plan.n) * kChunk + coil % kChunk;
    times_maps(line, x + at, step, none, s, plan.n, bits);
    pair(line, plan, bits, roots, weights + slice * weight_step);
    add_coils(line, s, out + at, step, none, plan.n, bits, coil == 0);
  }
}

struct Pass {
  LinePlan x, y;
  int64_t slice0, chunks;
  int coil, bits, odd, factor;
};

// Row y of a slice to frequencies along x; plane: [slice - slice0][y][place x][lane].
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    sense_rows_in(const Pair<T>* __restrict__ x, const Pair<T>* __restrict__ maps, const Pair<T>* __restrict__ roots,
                  Pair<T>* __restrict__ plane, Pass pass) {
  __shared__ Pair<T> line[kLine];
  const int nx = pass.x.n, ny = pass.y.n, width = nx << pass.bits;
  const int64_t slice = pass.slice0 + blockIdx.x / ny, y = blockIdx.x % ny;
  const Pair<T>* s = maps + (((slice * pass.chunks + pass.coil / kChunk) * ny + y) * nx) * kChunk + pass.coil % kChunk;
  times_maps(line, x + (slice * ny + y) * nx, int64_t{1}, pass.odd ? roots : nullptr, s, nx, pass.bits);
  forward(line, pass.x, pass.x.count, pass.bits, roots);
  for (int item = threadIdx.x; item < width; item += kThreads) plane[blockIdx.x * int64_t{width} + item] = line[item];
}

// Column `place x` of a plane: forward, weights, back; for doubled transforms the even and the odd frequencies.
template <class T, int HELD>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    sense_columns(const T* __restrict__ weights, const Pair<T>* __restrict__ roots, Pair<T>* plane, Pass pass,
                  int64_t weight_step) {
  __shared__ Pair<T> line[HELD], even[HELD];
  const int nx = pass.x.n, ny = pass.y.n, bits = pass.bits, lanes = 1 << bits;
  const int64_t local = blockIdx.x / nx, px = blockIdx.x % nx, step = int64_t{nx} << bits;
  Pair<T>* column = plane + local * ny * step + (px << bits);
  const T* w = weights + (pass.slice0 + local) * weight_step + (pass.odd * nx + px) * pass.factor * ny;
  for (int item = threadIdx.x; item < ny << bits; item += kThreads)
    line[item] = column[(item >> bits) * step + (item & (lanes - 1))];
  __syncthreads();
  pair(line, pass.y, bits, roots, w);
  if (pass.factor == 2) {
    for (int item = threadIdx.x; item < ny << bits; item += kThreads) {  // each thread meets only its own elements
      const int i = item >> bits;
      even[item] = line[item];
      line[item] = column[i * step + (item & (lanes - 1))] * roots[i];
    }
    __syncthreads();
    pair(line, pass.y, bits, roots, w + ny);
  }
  for (int item = threadIdx.x; item < ny << bits; item += kThreads) {
    const int i = item >> bits;
    column[i * step + (item & (lanes - 1))] = pass.factor == 2 ? even[item] + line[item] * conj(roots[i]) : line[item];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    sense_rows_out(const Pair<T>* __restrict__ plane, const Pair<T>* __restrict__ maps,
                   const Pair<T>* __restrict__ roots, Pair<T>* __restrict__ out, Pass pass, bool first) {
  __shared__ Pair<T> line[kLine];
  const int nx = pass.x.n, ny = pass.y.n, width = nx << pass.bits;
  const int64_t slice = pass.slice0 + blockIdx.x / ny, y = blockIdx.x % ny;
  const Pair<T>* s = maps + (((slice * pass.chunks + pass.coil / kChunk) * ny + y) * nx) * kChunk + pass.coil % kChunk;
  for (int item = threadIdx.x; item < width; item += kThreads) line[item] = plane[blockIdx.x * int64_t{width} + item];
  __syncthreads();
  backward(line, pass.x, pass.x.count, pass.bits, roots);
  add_coils(line, s, out + (slice * ny + y) * nx, int64_t{1}, pass.odd ? roots : nullptr, nx, pass.bits, first);
}

// log2 of the lanes of a line of n elements that `held` complex numbers of shared memory take.
int lane_bits(int64_t n, int64_t held) {
  int bits = 3;
  while (bits > 0 && n << bits > held) --bits;
  return bits;
}
// Columns keep two lines; static shared memory ends at 48 KB.
template <class T>
constexpr int column_held() {
  return sizeof(T) == 4 ? kLine : kLine / 2;
}
template <class T>
int plane_bits(const SenseJob<T>& job) {
  const int rows = lane_bits(job.nx, kLine), columns = lane_bits(job.ny, column_held<T>());
  return rows < columns ? rows : columns;
}
template <class T>
int64_t slices_in_transit(const SenseJob<T>& job, int bits) {
  const int64_t each = (job.ny * job.nx << bits) * 2 * static_cast<int64_t>(sizeof(T)), most = kPlaneBytes / each;
  return most < 1 ? 1 : (most > job.slices ? job.slices : most);
}
unsigned blocks(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }
template <class T>
Pair<T>* pairs(T* p) {
  return reinterpret_cast<Pair<T>*>(p);
}
template <class T>
const Pair<T>* pairs(const T* p) {
  return reinterpret_cast<const Pair<T>*>(p);
}
}  // namespace

bool sense_serves(int64_t n, bool is_double) {
  LinePlan plan;
  return is_double ? make_plan<double>(n, plan) && n <= column_held<double>() : make_plan<float>(n, plan);
}

template <class T>
int64_t sense_lines_workspace(const SenseJob<T>& job) {
  const int64_t n = job.along_y ? job.ny : job.nx;
  return 4 * n + job.weight_slices * n;
}
template <class T>
int64_t sense_planes_workspace(const SenseJob<T>& job) {
  const int64_t size = job.ny * job.nx;
  const int bits = plane_bits(job);
  return 4 * (job.nx + job.ny) + (slices_in_transit(job, bits) * size * 2 << bits) +
         job.weight_slices * size * (job.doubled ? 4 : 1);
}

// Work starts with what is read in pairs, so that every part of it is aligned.
template <class T>
const char* sense_lines(const SenseJob<T>& job, T* work, void* stream) {
  const int64_t lines = job.along_y ? job.nx : job.ny, n = job.along_y ? job.ny : job.nx;
  LinePlan plan, one;
  if (!make_plan<T>(n, plan) || !make_plan<T>(1, one)) return "lines of this length have no kernel";
  Pair<T>* roots = pairs(work);
  T* weights = work + 4 * n;
  const int64_t total = job.weight_slices * n;
  if (const char* error = launch(sense_roots<T>, dim3(blocks(2 * n)), dim3(kThreads), stream, roots, plan.n))
    return error;
  if (const char* error = launch(sense_order<T>, dim3(blocks(total)), dim3(kThreads), stream, job.weights, weights,
                                 plan, one, 1, total))
    return error;
  const int64_t step = job.along_y ? lines : 1, line_step = job.along_y ? 1 : n;
  return launch(sense_lines_kernel<T>, dim3(static_cast<unsigned>(job.slices * lines)), dim3(kThreads), stream,
                pairs(job.x), pairs(job.maps), weights, roots, pairs(job.out), plan, lines, step, line_step, job.coils,
                lane_bits(n, kLine), job.weight_slices > 1 ? n : int64_t{0});
}

template <class T>
const char* sense_planes(const SenseJob<T>& job, T* work, void* stream) {
  Pass pass = {};
  if (!make_plan<T>(job.nx, pass.x) || !make_plan<T>(job.ny, pass.y) || job.ny > column_held<T>())
    return "slices of this size have no kernel";
  pass.bits = plane_bits(job);
  pass.factor = job.doubled ? 2 : 1;
  pass.chunks = (job.coils + kChunk - 1) / kChunk;
  const int64_t size = job.ny * job.nx, group = slices_in_transit(job, pass.bits);
  const int64_t grid = size * pass.factor * pass.factor, total = job.weight_slices * grid;
  Pair<T>*x_roots = pairs(work), *y_roots = x_roots + 2 * job.nx, *plane = y_roots + 2 * job.ny;
  T* weights = work + 4 * (job.nx + job.ny) + (group * size * 2 << pass.bits);
  if (const char* error = launch(sense_roots<T>, dim3(blocks(2 * job.nx)), dim3(kThreads), stream, x_roots, pass.x.n))
    return error;
  if (const char* error = launch(sense_roots<T>, dim3(blocks(2 * job.ny)), dim3(kThreads), stream, y_roots, pass.y.n))
    return error;
  if (const char* error = launch(sense_order<T>, dim3(blocks(total)), dim3(kThreads), stream, job.weights, weights,
                                 pass.x, pass.y, pass.factor, total))
    return error;
  for (pass.slice0 = 0; pass.slice0 < job.slices; pass.slice0 += group) {
    const int64_t left = job.slices - pass.slice0, count = left < group ? left : group;
    const dim3 rows(static_cast<unsigned>(count * job.ny)), columns(static_cast<unsigned>(count * job.nx));
    for (pass.odd = 0; pass.odd < pass.factor; ++pass.odd)
      for (pass.coil = 0; pass.coil < job.coils; pass.coil += 1 << pass.bits) {
        if (const char* error = launch(sense_rows_in<T>, rows, dim3(kThreads), stream, pairs(job.x), pairs(job.maps),
                                       x_roots, plane, pass))
          return error;
        if (const char* error = launch(sense_columns<T, column_held<T>()>, columns, dim3(kThreads), stream, weights,
                                       y_roots, plane, pass, job.weight_slices > 1 ? grid : int64_t{0}))
          return error;
        if (const char* error = launch(sense_rows_out<T>, rows, dim3(kThreads), stream, plane, pairs(job.maps), x_roots,
                                       pairs(job.out), pass, pass.odd == 0 && pass.coil == 0))
          return error;
      }
  }
  return nullptr;
}

template int64_t sense_lines_workspace<float>(const SenseJob<float>&);
template int64_t sense_lines_workspace<double>(const SenseJob<double>&);
template int64_t sense_planes_workspace<float>(const SenseJob<float>&);
template int64_t sense_planes_workspace<double>(const SenseJob<double>&);
template const char* sense_lines<float>(const SenseJob<float>&, float*, void*);
template const char* sense_lines<double>(const SenseJob<double>&, double*, void*);
template const char* sense_planes<float>(const SenseJob<float>&, float*, void*);
template const char* sense_planes<double>(const SenseJob<double>&, double*, void*);
}  // namespace cuda
}  // namespace recon3d
