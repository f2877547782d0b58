// Expectation maximisation of an activity from Poisson counts: the pass over the measurement and the one over the
// volume.
#pragma once
#include <cstdint>

#include "cpu/rdp.h"
namespace recon3d {
// How the tensors of a measurement lie: `rows` of `length` values, the rows of each a stride apart. Within a row y is
// [outer, repeat, inner], and a short tensor [outer, inner].
struct Rows {
  int64_t length, repeat, inner, y, factors, additive;  // the last three: strides
  bool short_factors, short_additive;
};

// out = f y / (f p + b) with f = scale factors on the values [i0, i1) of all rows; 0 where f p + b <= 0.
//   p and out are contiguous; factors and additive may be null, for 1 and 0.
template <class T>
void poisson_ratio_cpu(const T* y, const T* p, const T* factors, const T* additive, T* out, T scale, const Rows& rows,
                       int64_t i0, int64_t i1);

// what stands beside the likelihood: an anchor of weight w, beta times the relative difference prior of v
template <class T>
struct EmTerms {
  Rdp<T> v;
  T anchor_weight, rdp, floor;
  bool surrogate;
};

// out from x, back = A^T (y / expected), sensitivity and anchor (null: none) on the slices [s0, s1); out aliases
// nothing.
template <class T>
void em_update_cpu(const EmTerms<T>& terms, const T* x, const T* back, const T* sensitivity, const T* anchor, T* out,
                   int64_t s0, int64_t s1);
}  // namespace recon3d
