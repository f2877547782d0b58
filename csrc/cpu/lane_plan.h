// Plans of the lane FFT (cpu/lane_fft.h): how a length is cut into stages, and the twiddles. Plain data, the same for
// every instruction set, made once per (length, sign) and shared by all threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

// x86-64 with GCC: kernels for AVX2 and AVX-512 are compiled beside the portable ones and chosen at run time.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define RECON3D_X86_LEVELS 1
#endif

namespace recon3d {

// Transforms stored side by side in "lane layout": [chunk][element][kChunk] complex, so that a chunk of complex64 is
// one AVX-512 register. Narrower registers take a chunk in parts. Unused lanes of the last chunk hold zeros.
constexpr int kChunk = 8;

// One stage: `groups` butterflies of `radix` elements, each at `span` neighbouring places (radix * groups * span = n).
struct LaneStage {
  int radix, groups, span;
  size_t twiddle;  // where its twiddles start: [group][k = 1..radix - 1] complex, exp(sign 2 pi i group k / (radix
                   // groups))
  size_t roots;    // of a radix without a butterfly of its own: [radix] complex, exp(sign 2 pi i j / radix)
};

template <class T>
struct LanePlan {
  int n, sign;
  std::vector<LaneStage> stages;
  std::vector<T> table;
  int work;  // elements of scratch that lane_fft needs, the n inputs at its front included
};

// The plan of length n >= 1 and sign -1 (forward) or +1 (inverse). Safe from any thread; lives as long as the process.
template <class T>
const LanePlan<T>& lane_plan(int n, int sign);
extern template const LanePlan<float>& lane_plan<float>(int, int);
extern template const LanePlan<double>& lane_plan<double>(int, int);

// The pair F^H diag(w) F in place (cpu/lane_normal.h): the forward half leaves frequencies in the order in which its
// stages make them, so w is brought into that order and nothing is ever sorted. Stage by stage, blocks of radix * step
// elements become `radix` blocks of `step`; the last stage has step 1.
struct NormalStage {
  int radix, step;
  size_t twiddle;  // [p < step][k = 1..radix - 1] complex, exp(-2 pi i p k / (radix step))
  size_t roots;    // of a radix without a butterfly: [radix] complex, exp(-2 pi i j / radix)
};

template <class T>
struct NormalPlan {
  int n;
  std::vector<NormalStage> stages;  // never empty
  std::vector<T> table;
  std::vector<int> order;  // the frequency at every place after the forward half
  int work;                // elements of scratch: the line and what a radix without a butterfly needs
};

template <class T>
const NormalPlan<T>& normal_plan(int n);
extern template const NormalPlan<float>& normal_plan<float>(int);
extern template const NormalPlan<double>& normal_plan<double>(int);

// The radices that lane_fft has butterflies for, and whether r is one of them.
constexpr int kRadices[] = {2, 3, 4, 5, 6, 7, 8, 10};
bool has_butterfly(int r);

// Stage radices of length n, cheapest first by a count of instructions.
std::vector<int> lane_radices(int n);

// The smallest even 2^a 3^b 5^c that is at least n.
int next_fast_length(int n);

// The widest registers to use: 3 AVX-512, 2 AVX2 + FMA, 0 portable. RECON3D_ISA = portable | avx2 | avx512 asks for
// less.
int lane_level();

// Asks for large pages behind [memory, memory + bytes), which was not touched yet: a first touch costs a page fault,
// and 4 KB at a time those of a large output take as long as the transform. Only a wish; small ranges are left alone.
void wish_large_pages(void* memory, size_t bytes);
}  // namespace recon3d
