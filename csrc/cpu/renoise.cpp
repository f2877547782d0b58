#include "cpu/renoise.h"

#include <algorithm>
#include <vector>

#include "common.h"
#include "cpu/philox_words.h"

namespace recon3d {
namespace {

constexpr int64_t kTile = 8192;  // pixels; 2048 restarts the prefetcher too often (7 % slower), three buffers fit in L2
constexpr int64_t kStack = 16;   // slices of one task: neighbours in correlated noise share anchors, drawn once a task
constexpr int64_t kVector = 16;  // draws are rounded up to it, so that every block takes the same vector path

constexpr int64_t kWords = 256;  // blocks whose words are in flight: 4 KB

RECON3D_CLONES void box_muller_blocks(float* z, const uint32_t* w, int64_t n) {
  normals_of_words(z, w, w + n, w + 2 * n, w + 3 * n, n);
}
RECON3D_CLONES void box_muller_blocks(double* z, const uint32_t* w, int64_t n) {
  normals_of_words(z, w, w + n, w + 2 * n, w + 3 * n, n);
}

// words first, then normals: one loop with both runs out of registers and takes twice as long
template <class T>
void draw(T* z, int64_t block0, int64_t blocks, uint32_t slice, PhiloxKey key) {
  alignas(64) uint32_t w[4 * kWords];
  for (int64_t i = 0; i < blocks; i += kWords) {
    const int64_t n = std::min(kWords, blocks - i);
    philox_words(w, static_cast<uint32_t>(block0 + i), n, slice, key);
    box_muller_blocks(z + 4 * i, w, n);
  }
}

template <class T>
inline __attribute__((always_inline)) void mix_loop(T* RECON3D_RESTRICT z, const T* RECON3D_RESTRICT f0, T c0,
                                                    const T* RECON3D_RESTRICT f1, T c1, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = c0 * f0[i] + c1 * f1[i];
}
RECON3D_CLONES void mix(float* z, const float* f0, float c0, const float* f1, float c1, int64_t n) {
  mix_loop(z, f0, c0, f1, c1, n);
}
RECON3D_CLONES void mix(double* z, const double* f0, double c0, const double* f1, double c1, int64_t n) {
  mix_loop(z, f0, c0, f1, c1, n);
}

// The noise of one pixel range, slice after slice; the last two anchor fields are kept.
template <class T>
class RangeNoise {
 public:
  RangeNoise(const StackNoise& noise, int64_t most_pixels)
      : noise_(noise), room_(most_pixels + 4 * kVector + 8), buffer_(3 * room_) {}

  void range(int64_t pixel0, int64_t pixels) {
    block0_ = pixel0 / 4;
    skip_ = pixel0 % 4;
    pixels_ = pixels;
    held_[0] = held_[1] = -1;
  }

  // z of this range of a slice, valid until the next call
  const T* of(int64_t slice) {
    const int64_t* a = noise_.anchors + 2 * slice;
    const T c0 = noise_.coefficients[2 * slice], c1 = noise_.coefficients[2 * slice + 1];
    const T* f0 = c0 != 0 ? field(a[0], c1 != 0 ? a[1] : -1) : nullptr;
    const T* f1 = c1 != 0 ? field(a[1], c0 != 0 ? a[0] : -1) : nullptr;
    if (f0 && !f1 && c0 == 1) return f0;
    if (f1 && !f0 && c1 == 1) return f1;
    T* z = &buffer_[2 * room_];
    if (f0 || f1)
      mix(z, f0 ? f0 : f1, c0, f1 ? f1 : f0, c1, pixels_);
    else
      std::fill_n(z, pixels_, T(0));
    return z;
  }

 private:
  const T* field(int64_t anchor, int64_t keep) {
    for (int s = 0; s < 2; ++s)
      if (held_[s] == anchor) return &buffer_[s * room_] + skip_;
    const int s = held_[0] == keep && keep >= 0 ? 1 : 0;
    const int64_t blocks = (skip_ + pixels_ + 3) / 4;
    draw(&buffer_[s * room_], block0_, (blocks + kVector - 1) / kVector * kVector, static_cast<uint32_t>(anchor),
         noise_.key);
    held_[s] = anchor;
    return &buffer_[s * room_] + skip_;
  }

  StackNoise noise_;
  int64_t room_, block0_ = 0, skip_ = 0, pixels_ = 0;
  int64_t held_[2] = {-1, -1};
  std::vector<T> buffer_;  // two fields and their mixture
};

// out = x0c + k (u - base) + w z over n pixels of one slice; null and measured weights differ for a mask only.
template <class T>
struct Pixels {
  const T *u, *x0, *x0c, *y;
  const uint8_t* mask;
  const T* z;
  T* out;
  T k, w, k_measured, w_measured, lam;
};

template <class T, DataKind kKind, bool kCorrected, bool kEps, bool kNoise>
inline __attribute__((always_inline)) void pixel_loop(const Pixels<T>& p, int64_t n) {
  const T *u = p.u, *x0 = p.x0, *x0c = p.x0c, *y = p.y, *z = p.z;
  const uint8_t* m = p.mask;
  T* out = p.out;
  const T k = p.k, w = p.w, k_measured = p.k_measured, w_measured = p.w_measured, lam = p.lam, rest = T(1) - lam;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T c;
    if (kKind == DataKind::given) c = x0c[i];
    if (kKind == DataKind::identity) c = rest * x0[i] + lam * y[i];
    if (kKind == DataKind::mask) c = m[i] ? rest * x0[i] + lam * y[i] : x0[i];
    T value = c;
    if (kEps) value += (kKind == DataKind::mask && m[i] ? k_measured : k) * (u[i] - (kCorrected ? c : x0[i]));
    if (kNoise) value += (kKind == DataKind::mask && m[i] ? w_measured : w) * z[i];
    out[i] = value;
  }
}

template <class T, DataKind kKind>
inline __attribute__((always_inline)) void pixels_of_kind(const Pixels<T>& p, int64_t n, bool corrected) {
  const bool eps = p.k != 0 || p.k_measured != 0;
  if (eps && p.z)
    corrected ? pixel_loop<T, kKind, true, true, true>(p, n) : pixel_loop<T, kKind, false, true, true>(p, n);
  else if (eps)
    corrected ? pixel_loop<T, kKind, true, true, false>(p, n) : pixel_loop<T, kKind, false, true, false>(p, n);
  else if (p.z)
    pixel_loop<T, kKind, false, false, true>(p, n);
  else
    pixel_loop<T, kKind, false, false, false>(p, n);
}

template <class T>
inline __attribute__((always_inline)) void pixels_of_any(const Pixels<T>& p, int64_t n, DataKind kind, bool corrected) {
  if (kind == DataKind::given) pixels_of_kind<T, DataKind::given>(p, n, corrected);
  if (kind == DataKind::identity) pixels_of_kind<T, DataKind::identity>(p, n, corrected);
  if (kind == DataKind::mask) pixels_of_kind<T, DataKind::mask>(p, n, corrected);
}
RECON3D_CLONES void pixels(const Pixels<float>& p, int64_t n, DataKind kind, bool corrected) {
  pixels_of_any(p, n, kind, corrected);
}
RECON3D_CLONES void pixels(const Pixels<double>& p, int64_t n, DataKind kind, bool corrected) {
  pixels_of_any(p, n, kind, corrected);
}

// One row of blocks of one slice. With (k', w') the weights on means and m the mean over a block,
//   out = x0 + k (u - base) + w z + term,  term = c lam (y - m(x0)) + (k' - k) m(u - x0) + (w' - w) m(z)
// where c = 1, or 1 - k' if base is x0c. All means are one: of what they weigh, summed over rows, then over columns.
template <class T>
struct BlockRow {
  const T *u, *x0, *y, *z;
  T *out, *sum;  // sum: [columns] scratch
  int64_t columns, factor;
  T k, w, k_measured, w_measured, lam;
  bool corrected;
};

template <class T, bool kEps, bool kNoise>
inline __attribute__((always_inline)) void sum_rows(const BlockRow<T>& b, T wx, T wu, T wz) {
  const int64_t columns = b.columns;
  T* RECON3D_RESTRICT sum = b.sum;
  for (int64_t j = 0; j < columns; ++j) sum[j] = 0;
  for (int64_t i = 0; i < b.factor; ++i) {
    const T *u = b.u + i * columns, *x0 = b.x0 + i * columns, *z = b.z + i * columns;
    for (int64_t j = 0; j < columns; ++j) {
      T value = wx * x0[j];
      if (kEps) value += wu * (u[j] - x0[j]);
      if (kNoise) value += wz * z[j];
      sum[j] += value;
    }
  }
}

// sum[j] becomes the term of its block; kFactor 0 stands for any
template <class T, int kFactor>
inline __attribute__((always_inline)) void sum_columns(T* RECON3D_RESTRICT sum, const T* RECON3D_RESTRICT y, int64_t n,
                                                       int64_t factor, T wy) {
  const int64_t f = kFactor ? kFactor : factor;
  for (int64_t c = 0; c < n; ++c) {
    T total = wy * y[c];
    for (int64_t j = 0; j < f; ++j) total += sum[c * f + j];
    for (int64_t j = 0; j < f; ++j) sum[c * f + j] = total;
  }
}

template <class T, bool kEps, bool kNoise>
inline __attribute__((always_inline)) void block_row_loop(const BlockRow<T>& b) {
  const int64_t columns = b.columns, f = b.factor;
  const T k = b.k, w = b.w, mean = T(1) / static_cast<T>(f * f);
  const T wy = b.lam * (b.corrected ? T(1) - b.k_measured : T(1));
  sum_rows<T, kEps, kNoise>(b, -wy * mean, (b.k_measured - k) * mean, (b.w_measured - w) * mean);
  if (f == 2)
    sum_columns<T, 2>(b.sum, b.y, columns / 2, 2, wy);
  else if (f == 4)
    sum_columns<T, 4>(b.sum, b.y, columns / 4, 4, wy);
  else
    sum_columns<T, 0>(b.sum, b.y, columns / f, f, wy);
  const T* sum = b.sum;
  for (int64_t i = 0; i < f; ++i) {
    const T *u = b.u + i * columns, *x0 = b.x0 + i * columns, *z = b.z + i * columns;
    T* out = b.out + i * columns;
#pragma GCC ivdep
    for (int64_t j = 0; j < columns; ++j) {
      T value = x0[j] + sum[j];
      if (kEps) value += k * (u[j] - x0[j]);
      if (kNoise) value += w * z[j];
      out[j] = value;
    }
  }
}

template <class T>
inline __attribute__((always_inline)) void block_row_any(const BlockRow<T>& b) {
  const bool eps = b.k != 0 || b.k_measured != 0;
  if (eps)
    b.z ? block_row_loop<T, true, true>(b) : block_row_loop<T, true, false>(b);
  else
    b.z ? block_row_loop<T, false, true>(b) : block_row_loop<T, false, false>(b);
}
RECON3D_CLONES void block_row(const BlockRow<float>& b) { block_row_any(b); }
RECON3D_CLONES void block_row(const BlockRow<double>& b) { block_row_any(b); }

inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Calls body(range, slice) for tasks [task0, task1) of ranges x stacks of slices; range(r) before each stack of range
// r.
template <class Range, class Body>
void for_tasks(int64_t ranges, int64_t slices, int64_t task0, int64_t task1, Range range, Body body) {
  for (int64_t task = task0; task < task1; ++task) {
    const int64_t r = task % ranges, first = task / ranges * kStack;
    range(r);
    for (int64_t s = first; s < std::min(first + kStack, slices); ++s) body(r, s);
  }
}

void bits_of_range(int64_t* bits, int64_t block0, int64_t pixels, uint32_t slice, PhiloxKey key) {
  alignas(64) uint32_t w[4 * kWords];
  for (int64_t i = 0; 4 * i < pixels; i += kWords) {
    const int64_t n = std::min(kWords, ((pixels + 3) / 4 - i + kVector - 1) / kVector * kVector);
    philox_words(w, static_cast<uint32_t>(block0 + i), n, slice, key);
    for (int64_t p = 0; p < std::min(4 * n, pixels - 4 * i); ++p) bits[4 * i + p] = w[p % 4 * n + p / 4];
  }
}

}  // namespace

int64_t philox_tasks(int64_t slices, int64_t pixels) { return pieces(pixels, kTile) * pieces(slices, kStack); }

template <class T>
void philox_normal_cpu(const StackNoise& noise, T* z, int64_t slices, int64_t n, int64_t task0, int64_t task1) {
  RangeNoise<T> source(noise, kTile);
  const auto size = [&](int64_t r) { return std::min(kTile, n - r * kTile); };
  for_tasks(
      pieces(n, kTile), slices, task0, task1, [&](int64_t r) { source.range(r * kTile, size(r)); },
      [&](int64_t r, int64_t s) { std::copy_n(source.of(s), size(r), z + s * n + r * kTile); });
}

void philox_bits_cpu(const int64_t* slices, int64_t* bits, int64_t n_slices, int64_t n, PhiloxKey key, int64_t task0,
                     int64_t task1) {
  for_tasks(
      pieces(n, kTile), n_slices, task0, task1, [](int64_t) {},
      [&](int64_t r, int64_t s) {
        bits_of_range(bits + s * n + r * kTile, r * (kTile / 4), std::min(kTile, n - r * kTile),
                      static_cast<uint32_t>(slices[s]), key);
      });
}

template <class T>
int64_t renoise_tasks(const RenoiseStep<T>& step) {
  const int64_t ranges =
      step.kind == DataKind::block_mean ? step.rows / step.factor : pieces(step.rows * step.columns, kTile);
  return ranges * pieces(step.slices, kStack);
}

template <class T>
void renoise_cpu(const RenoiseStep<T>& step, int64_t task0, int64_t task1) {
  const int64_t n = step.rows * step.columns;
  const bool noisy = step.z_null != 0 || (step.kind != DataKind::given && step.z_measured != 0);
  const T k = static_cast<T>(step.k_null), w = static_cast<T>(step.z_null), lam = static_cast<T>(step.lam);
  const T k_measured = static_cast<T>(step.k_measured), w_measured = static_cast<T>(step.z_measured);
  if (step.kind == DataKind::block_mean) {
    const int64_t band = step.factor * step.columns, small = step.columns / step.factor,
                  bands = step.rows / step.factor;
    RangeNoise<T> source(step.noise, band);
    std::vector<T> sum(step.columns);
    for_tasks(
        bands, step.slices, task0, task1, [&](int64_t r) { source.range(r * band, band); },
        [&](int64_t r, int64_t s) {
          const int64_t at = s * n + r * band;
          block_row(BlockRow<T>{step.u + at, step.x0 + at, step.y + (s * bands + r) * small,
                                noisy ? source.of(s) : nullptr, step.out + at, sum.data(), step.columns, step.factor, k,
                                w, k_measured, w_measured, lam, step.corrected});
        });
    return;
  }
  // without a mask every pixel has the same weights
  const bool measured = step.kind == DataKind::identity, masked = step.kind == DataKind::mask;
  RangeNoise<T> source(step.noise, kTile);
  for_tasks(
      pieces(n, kTile), step.slices, task0, task1,
      [&](int64_t r) { source.range(r * kTile, std::min(kTile, n - r * kTile)); },
      [&](int64_t r, int64_t s) {
        const int64_t at = s * n + r * kTile;
        const auto from = [&](const T* p) { return p ? p + at : nullptr; };
        pixels(Pixels<T>{step.u + at, step.x0 + at, from(step.x0c), from(step.y),
                         step.mask ? step.mask + s * step.mask_stride + r * kTile : nullptr,
                         noisy ? source.of(s) : nullptr, step.out + at, measured ? k_measured : k,
                         measured ? w_measured : w, masked ? k_measured : T(0), masked ? w_measured : T(0), lam},
               std::min(kTile, n - r * kTile), step.kind, step.corrected);
      });
}

template void philox_normal_cpu<float>(const StackNoise&, float*, int64_t, int64_t, int64_t, int64_t);
template void philox_normal_cpu<double>(const StackNoise&, double*, int64_t, int64_t, int64_t, int64_t);
template int64_t renoise_tasks<float>(const RenoiseStep<float>&);
template int64_t renoise_tasks<double>(const RenoiseStep<double>&);
template void renoise_cpu<float>(const RenoiseStep<float>&, int64_t, int64_t);
template void renoise_cpu<double>(const RenoiseStep<double>&, int64_t, int64_t);

}  // namespace recon3d
