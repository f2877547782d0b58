// The random words of consecutive blocks of a slice: w[j * blocks + i] = word j of block block0 + i.
//   blocks : a multiple of 16, so that every block takes the same path
// 32 x 32 -> 64-bit products live in the even lanes of a vector; compilers shuffle them into order after every round
// (3x slower with AVX-512, 2.4x with AVX2), so the rounds are written out for both. Other machines get the plain loop.
#pragma once
#include <cstdint>

#include "common.h"
#include "philox.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#endif

namespace recon3d {

inline void philox_words_plain(uint32_t* w, uint32_t block0, int64_t blocks, uint32_t slice, PhiloxKey key) {
  for (int64_t i = 0; i < blocks; ++i) {
    uint32_t c0 = block0 + static_cast<uint32_t>(i), c1 = slice, c2 = key.level, c3 = key.stream;
    philox4x32(c0, c1, c2, c3, key.k0, key.k1);
    w[i] = c0;
    w[blocks + i] = c1;
    w[2 * blocks + i] = c2;
    w[3 * blocks + i] = c3;
  }
}

#if defined(__GNUC__) && defined(__x86_64__)

// e and o hold the even and the odd blocks in the low halves of 64-bit lanes; high halves are whatever is left there.
__attribute__((target("avx512f"))) inline void philox_words_512(uint32_t* w, uint32_t block0, int64_t blocks,
                                                                uint32_t slice, PhiloxKey key) {
  const __m512i a = _mm512_set1_epi32(static_cast<int>(kPhiloxA)), b = _mm512_set1_epi32(static_cast<int>(kPhiloxB));
  __m512i block = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(block0)),
                                   _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int64_t i = 0; i < blocks; i += 16) {
    __m512i e0 = block, o0 = _mm512_srli_epi64(block, 32);
    __m512i e1 = _mm512_set1_epi32(static_cast<int>(slice)), o1 = e1;
    __m512i e2 = _mm512_set1_epi32(static_cast<int>(key.level)), o2 = e2;
    __m512i e3 = _mm512_set1_epi32(static_cast<int>(key.stream)), o3 = e3;
    uint32_t k0 = key.k0, k1 = key.k1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(k0)), y = _mm512_set1_epi32(static_cast<int>(k1));
      const __m512i ep = _mm512_mul_epu32(e0, a), eq = _mm512_mul_epu32(e2, b);
      const __m512i op = _mm512_mul_epu32(o0, a), oq = _mm512_mul_epu32(o2, b);
      e0 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(eq, 32), e1, x, 0x96);  // 0x96: three-way xor
      o0 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(oq, 32), o1, x, 0x96);
      e2 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(ep, 32), e3, y, 0x96);
      o2 = _mm512_ternarylogic_epi32(_mm512_srli_epi64(op, 32), o3, y, 0x96);
      e1 = eq;
      o1 = oq;
      e3 = ep;
      o3 = op;
      k0 += kWeylA;
      k1 += kWeylB;
    }
    _mm512_storeu_si512(w + i, _mm512_mask_blend_epi32(0xAAAA, e0, _mm512_slli_epi64(o0, 32)));
    _mm512_storeu_si512(w + blocks + i, _mm512_mask_blend_epi32(0xAAAA, e1, _mm512_slli_epi64(o1, 32)));
    _mm512_storeu_si512(w + 2 * blocks + i, _mm512_mask_blend_epi32(0xAAAA, e2, _mm512_slli_epi64(o2, 32)));
    _mm512_storeu_si512(w + 3 * blocks + i, _mm512_mask_blend_epi32(0xAAAA, e3, _mm512_slli_epi64(o3, 32)));
    block = _mm512_add_epi32(block, _mm512_set1_epi32(16));
  }
}

__attribute__((target("avx2"))) inline void philox_words_256(uint32_t* w, uint32_t block0, int64_t blocks,
                                                             uint32_t slice, PhiloxKey key) {
  const __m256i a = _mm256_set1_epi32(static_cast<int>(kPhiloxA)), b = _mm256_set1_epi32(static_cast<int>(kPhiloxB));
  __m256i block =
      _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(block0)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  for (int64_t i = 0; i < blocks; i += 8) {
    __m256i e0 = block, o0 = _mm256_srli_epi64(block, 32);
    __m256i e1 = _mm256_set1_epi32(static_cast<int>(slice)), o1 = e1;
    __m256i e2 = _mm256_set1_epi32(static_cast<int>(key.level)), o2 = e2;
    __m256i e3 = _mm256_set1_epi32(static_cast<int>(key.stream)), o3 = e3;
    uint32_t k0 = key.k0, k1 = key.k1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const __m256i x = _mm256_set1_epi32(static_cast<int>(k0)), y = _mm256_set1_epi32(static_cast<int>(k1));
      const __m256i ep = _mm256_mul_epu32(e0, a), eq = _mm256_mul_epu32(e2, b);
      const __m256i op = _mm256_mul_epu32(o0, a), oq = _mm256_mul_epu32(o2, b);
      e0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(eq, 32), e1), x);
      o0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(oq, 32), o1), x);
      e2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(ep, 32), e3), y);
      o2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(op, 32), o3), y);
      e1 = eq;
      o1 = oq;
      e3 = ep;
      o3 = op;
      k0 += kWeylA;
      k1 += kWeylB;
    }
    __m256i* to = reinterpret_cast<__m256i*>(w + i);
    const int64_t row = blocks / 8;
    _mm256_storeu_si256(to, _mm256_blend_epi32(e0, _mm256_slli_epi64(o0, 32), 0xAA));
    _mm256_storeu_si256(to + row, _mm256_blend_epi32(e1, _mm256_slli_epi64(o1, 32), 0xAA));
    _mm256_storeu_si256(to + 2 * row, _mm256_blend_epi32(e2, _mm256_slli_epi64(o2, 32), 0xAA));
    _mm256_storeu_si256(to + 3 * row, _mm256_blend_epi32(e3, _mm256_slli_epi64(o3, 32), 0xAA));
    block = _mm256_add_epi32(block, _mm256_set1_epi32(8));
  }
}

inline void philox_words(uint32_t* w, uint32_t block0, int64_t blocks, uint32_t slice, PhiloxKey key) {
  static const bool has_512 = __builtin_cpu_supports("avx512f"), has_256 = __builtin_cpu_supports("avx2");
  if (has_512) return philox_words_512(w, block0, blocks, slice, key);
  if (has_256) return philox_words_256(w, block0, blocks, slice, key);
  philox_words_plain(w, block0, blocks, slice, key);
}

#else

inline void philox_words(uint32_t* w, uint32_t block0, int64_t blocks, uint32_t slice, PhiloxKey key) {
  philox_words_plain(w, block0, blocks, slice, key);
}

#endif

}  // namespace recon3d
