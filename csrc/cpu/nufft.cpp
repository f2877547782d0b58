#include "cpu/nufft.h"

#include <cmath>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "common.h"

namespace recon3d {

namespace {
template <class T>
void run_with(const NufftKernelSet& set, NufftTransform transform, const NufftJob<T>& job,
              const NufftThreads& threads) {
  const NufftKernels<T>* kernels;
  if constexpr (sizeof(T) == 4)
    kernels = &set.singles;
  else
    kernels = &set.doubles;
  switch (transform) {
    case NufftTransform::kForward:
      return kernels->forward(job, threads);
    case NufftTransform::kAdjoint:
      return kernels->adjoint(job, threads);
    case NufftTransform::kNormal:
      return kernels->normal(job, threads);
  }
}
}  // namespace

template <class T>
void nufft_run(NufftTransform transform, const NufftJob<T>& job, const NufftThreads& threads) {
  const int level = lane_level();
  if (level >= 3 && kNufftAvx512) {
    const int64_t lanes = 32 / static_cast<int64_t>(sizeof(T)), rest = job.lanes ? 0 : job.images % lanes;
    if (!kNufftAvx2 || rest == 0 || rest > lanes / 2) return run_with(*kNufftAvx512, transform, job, threads);
    const NufftPoints<T>& p = *job.points;
    NufftJob<T> part = job;
    part.images = job.images - rest;
    if (part.images) run_with(*kNufftAvx512, transform, part, threads);
    part.in += 2 * part.images * (transform == NufftTransform::kAdjoint ? p.count : p.pixels());
    part.out += 2 * part.images * (transform == NufftTransform::kForward ? p.count : p.pixels());
    part.images = rest;
    return run_with(*kNufftAvx2, transform, part, threads);
  }
  run_with(level >= 2 && kNufftAvx2 ? *kNufftAvx2 : kNufftPortable, transform, job, threads);
}
template void nufft_run<float>(NufftTransform, const NufftJob<float>&, const NufftThreads&);
template void nufft_run<double>(NufftTransform, const NufftJob<double>&, const NufftThreads&);

// ---- scratch memory -------------------------------------------------------------------------------------------------

namespace {
constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kKeep = size_t{512} << 20;  // a 3D grid of a register takes 262 MB at 128^3, and its pages 50 ms
struct Pool {
  struct Block {
    void* memory;
    size_t bytes;
  };
  std::mutex lock;
  std::vector<Block> blocks;
  size_t kept = 0;
};
Pool& pool() {
  static Pool* one = new Pool;  // never destroyed: threads may outlive static objects
  return *one;
}
}  // namespace

NufftScratch::NufftScratch(size_t bytes) : memory_(nullptr), bytes_((bytes + kPage - 1) / kPage * kPage) {
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    auto best = p.blocks.end();
    for (auto b = p.blocks.begin(); b != p.blocks.end(); ++b)
      if (b->bytes >= bytes_ && b->bytes / 2 <= bytes_ && (best == p.blocks.end() || b->bytes < best->bytes)) best = b;
    if (best != p.blocks.end()) {
      memory_ = best->memory;
      bytes_ = best->bytes;
      p.kept -= bytes_;
      p.blocks.erase(best);
      return;
    }
  }
  memory_ = std::aligned_alloc(kPage, bytes_ ? bytes_ : kPage);
  if (!memory_) throw std::bad_alloc();
  wish_large_pages(memory_, bytes_);  // columns of the grid touch a page per row, too
}

NufftScratch::~NufftScratch() {
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> guard(p.lock);
    while (!p.blocks.empty() && p.kept + bytes_ > kKeep && bytes_ <= kKeep) {  // oldest first
      p.kept -= p.blocks.front().bytes;
      std::free(p.blocks.front().memory);
      p.blocks.erase(p.blocks.begin());
    }
    if (p.kept + bytes_ <= kKeep) {
      p.blocks.push_back({memory_, bytes_});
      p.kept += bytes_;
      return;
    }
  }
  std::free(memory_);
}

// ---- planning -------------------------------------------------------------------------------------------------------

void nufft_sort_cpu(const double* points, int64_t count, int axes, const int64_t* grid, int width, int tile,
                    int32_t* order, int32_t* first, double* fraction, int32_t* tiles) {
  const double pi = 3.14159265358979323846;
  std::vector<int32_t> at(static_cast<size_t>(count) * axes), key(count);
  std::vector<double> z(static_cast<size_t>(count) * axes);
  int64_t cells = 1;
  for (int a = 0; a < axes; ++a) cells *= (grid[a] + tile - 1) / tile;
  for (int64_t q = 0; q < count; ++q) {
    int64_t k = 0;
    for (int a = 0; a < axes; ++a) {
      const int64_t g = grid[a];
      int64_t tap = 0;
      double beyond = 0;
      if (g > 1) {
        // as the reference writes it, so that both plans agree to the last bit
        const double left = points[q * axes + a] * (static_cast<double>(g) / (2 * pi)) +
                            std::floor(static_cast<double>(g) / 2) - 0.5 * width;
        const double whole = std::ceil(left);
        beyond = (whole - left) * 2 - 1;
        tap = static_cast<int64_t>(whole) % g;
        if (tap < 0) tap += g;
      }
      at[q * axes + a] = static_cast<int32_t>(tap);
      z[q * axes + a] = beyond;
      k = k * ((g + tile - 1) / tile) + tap / tile;
    }
    key[q] = static_cast<int32_t>(k);
  }
  // counting sort, stable
  for (int64_t c = 0; c <= cells; ++c) tiles[c] = 0;
  for (int64_t q = 0; q < count; ++q) ++tiles[key[q] + 1];
  for (int64_t c = 0; c < cells; ++c) tiles[c + 1] += tiles[c];
  std::vector<int32_t> next(tiles, tiles + cells);
  for (int64_t q = 0; q < count; ++q) {
    const int64_t place = next[key[q]]++;
    order[place] = static_cast<int32_t>(q);
    for (int a = 0; a < axes; ++a) {
      first[place * axes + a] = at[q * axes + a];
      fraction[place * axes + a] = z[q * axes + a];
    }
  }
}

namespace {
constexpr int kPoints = 8;  // evaluated together

// value[a, t, k] of tap t at the k-th of eight points; coefficients [axes, width, terms].
RECON3D_CLONES void horner(const double* fraction, const double* coefficients, int axes, int width, int terms,
                           double* value) {
  double z[kPoints];
  for (int a = 0; a < axes; ++a) {
    for (int k = 0; k < kPoints; ++k) z[k] = fraction[k * axes + a];
    for (int t = 0; t < width; ++t) {
      const double* c = coefficients + (a * width + t) * terms;
      double sum[kPoints] = {};
      for (int i = 0; i < terms; ++i)
        for (int k = 0; k < kPoints; ++k) sum[k] = sum[k] * z[k] + c[i];
      for (int k = 0; k < kPoints; ++k) value[(a * width + t) * kPoints + k] = sum[k];
    }
  }
}
}  // namespace

template <class T>
void nufft_weights_cpu(const double* fraction, const double* coefficients, int64_t begin, int64_t end, int axes,
                       int width, int terms, T* weights) {
  std::vector<double> value(static_cast<size_t>(axes) * width * kPoints), padded(static_cast<size_t>(axes) * kPoints);
  const int row = axes * width;
  for (int64_t q = begin; q < end; q += kPoints) {
    const int filled = static_cast<int>(end - q < kPoints ? end - q : kPoints);
    const double* z = fraction + q * axes;
    if (filled < kPoints) {
      for (int i = 0; i < filled * axes; ++i) padded[i] = z[i];
      z = padded.data();
    }
    horner(z, coefficients, axes, width, terms, value.data());
    for (int k = 0; k < filled; ++k)
      for (int i = 0; i < row; ++i) weights[(q + k) * row + i] = static_cast<T>(value[i * kPoints + k]);
  }
}
template void nufft_weights_cpu<float>(const double*, const double*, int64_t, int64_t, int, int, int, float*);
template void nufft_weights_cpu<double>(const double*, const double*, int64_t, int64_t, int, int, int, double*);

}  // namespace recon3d
