// Runs CUDA kernels on the host, slowly and exactly, so that tests without a GPU see their indices, their order and
// their barriers: the threads of a block are fibres that take turns at every __syncthreads. Stands in for the toolkit's
// header of this name. Memory is the host's: a store out of bounds meets the guard bands of the test.
#pragma once
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define RECON3D_EMULATED
#define __global__
#define __device__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  dim3 thread;
  size_t barriers = 0;
  bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Fibre> fibres;
inline size_t current = 0;
inline std::vector<int> votes;                         // of every barrier of the block
inline std::vector<std::array<unsigned, 32>> ballots;  // the same of every warp
inline std::function<void()> body;

inline void enter() {
  body();
  fibres[current].done = true;
  swapcontext(&fibres[current].context, &scheduler);
}
inline int barrier(int vote) {
  Fibre& self = fibres[current];
  const size_t mine = self.barriers++;
  if (votes.size() <= mine) votes.resize(mine + 1, 0);
  votes[mine] |= vote;
  swapcontext(&self.context, &scheduler);
  return votes[mine];
}
// Stricter than a device, where only the warp must meet.
inline unsigned ballot(bool vote) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const size_t mine = fibres[current].barriers;
  if (ballots.size() <= mine) ballots.resize(mine + 1, {});
  ballots[mine][thread / 32] |= unsigned(vote) << thread % 32;
  barrier(0);
  return ballots[mine][thread / 32];
}
// Every thread of the block up to its next barrier, until all are done; false where they disagree about barriers.
inline bool run_block() {
  const size_t n = size_t(blockDim.x) * blockDim.y * blockDim.z;
  if (fibres.size() < n) fibres.resize(n);
  votes.clear();
  ballots.clear();
  for (size_t i = 0; i < n; ++i) {
    Fibre& f = fibres[i];
    f.stack.resize(1 << 16);
    f.barriers = 0;
    f.done = false;
    f.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = f.stack.size();
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    size_t done = 0;
    for (current = 0; current < n; ++current) {
      threadIdx = fibres[current].thread;
      swapcontext(&scheduler, &fibres[current].context);
      done += fibres[current].done;
    }
    if (done == n) return true;
    if (done != 0) return false;  // some left while others wait: a hang on a GPU
  }
}
}  // namespace emulation

inline void __syncthreads() { emulation::barrier(0); }
inline int __syncthreads_or(int vote) { return emulation::barrier(vote); }
inline unsigned __ballot_sync(unsigned, bool vote) { return emulation::ballot(vote); }
inline int __popc(unsigned word) { return __builtin_popcount(word); }
using std::ceil;
using std::fabs;
using std::floor;
using std::fma;
using std::fmax;
using std::fmin;
using std::hypot;

namespace recon3d {
template <class... P, class... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, void*, A... arguments) {
  if (grid.y > 65535 || grid.z > 65535 || block.x * block.y * block.z > 1024) return "grid or block too large";
  gridDim = grid;
  blockDim = block;
  emulation::body = [=] { kernel(P(arguments)...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        if (!emulation::run_block()) return "threads of a block disagree about barriers";
      }
  return nullptr;
}
inline const char* fill_zero(void* to, size_t bytes, void*) {
  std::memset(to, 0, bytes);
  return nullptr;
}
}  // namespace recon3d
