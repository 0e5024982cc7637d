// Shared by the products of all types in `products_body.h`.

#pragma once
#include "native.h"

enum {
    QUAD = 4,  // rows of a matrix, and tokens, that are multiplied together
    TILE = 16, // rows of a matrix that a thread takes at a time
    LINE = 64, // bytes of a cache line
};

#ifdef __AVX512F__
#include <immintrin.h>
#define VECTOR 64 // bytes in a register

static inline __m512 add_ends(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

static inline __m512 add_pairs(__m512 a, __m512 b) {
    __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

// Entry 4 t + i of the result is the sum of the lanes of register i of token t: 16 sums in the time of four.
static inline __m512 totals_of_16(const __m512 (*sums)[QUAD]) {
    __m512 tokens[QUAD], two[2];
    for (int t = 0; t < QUAD; t++) // in each quarter of a register, one part of the token's four sums
        tokens[t] = add_pairs(add_ends(sums[t][0], sums[t][1]), add_ends(sums[t][2], sums[t][3]));
    for (int p = 0; p < 2; p++) {
        __m512 a = tokens[2 * p], b = tokens[2 * p + 1];
        two[p] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
}
#elif defined __AVX__
#define VECTOR 32
#else
#define VECTOR 16
#endif
