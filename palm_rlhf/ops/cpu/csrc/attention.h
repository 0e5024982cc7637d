// Products of bfloat16 in pairs, for attention: the layout of the operands, and one product in registers.

#pragma once
#include "native.h"
#include <immintrin.h>

enum {
    LANES = 16,        // floats in a register
    PANEL = 2 * LANES, // columns of a product
    STRIP = 8,         // rows of a product, whose sums take STRIP x 2 registers
};

typedef struct {
    long batch, heads, kv_heads, queries, keys, dim;
    const int32_t *first, *stop; // `b i`: a query sees the keys from `first` up to, but not including, `stop`
    float scale;
} Attention;

typedef struct {
    bfloat16 *data;
    long strides[3]; // of batch, head and position, in elements; the entries of a head are dense
} Heads;

static inline long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

static inline bfloat16 *at(const Heads *t, long batch, long head, long position) {
    return t->data + batch * t->strides[0] + head * t->strides[1] + position * t->strides[2];
}

// The range of keys that the query rows [start, stop) see together, row = query * group + head of the group; 0 and 0 if
// they see none.
static inline void seen_by(const Attention *s, long batch, long start, long stop, long *from, long *to) {
    long group = s->heads / s->kv_heads;
    *from = s->keys, *to = 0;
    for (long i = batch * s->queries + start / group; i <= batch * s->queries + (stop - 1) / group; i++)
        if (s->first[i] < s->stop[i]) {
            *from = s->first[i] < *from ? s->first[i] : *from;
            *to = s->stop[i] > *to ? s->stop[i] : *to;
        }
    if (*to == 0) *from = 0;
}

// Packs b, `depth width`, whose elements are `b[k * row + j * column]`, by columns and pairs of rows, `width/LANES
// depth/2 LANES 2`, so that a product reads it from front to back. It is padded with zeros.
static inline void pack(const bfloat16 *b, long row, long column, long depth, long width, long padded_depth,
                        long padded_width, bfloat16 *packed) {
    for (long j0 = 0; j0 < padded_width; j0 += LANES)
        for (long k = 0; k < padded_depth; k += 2)
            for (long j = j0; j < j0 + LANES; j++)
                for (long i = k; i < k + 2; i++)
                    *packed++ = i < depth && j < width ? b[i * row + j * column] : 0;
}

// c = a @ b, or with `add` c += a @ b; a: `STRIP depth`, b: `depth PANEL`, packed, its halves `half` elements apart, c:
// `STRIP PANEL`.
static inline void product(const bfloat16 *a, long a_row, const bfloat16 *b, long half, long depth, int add, float *c,
                           long c_row) {
    __m512 sums[STRIP][2];
#pragma GCC unroll 8
    for (int r = 0; r < STRIP; r++) {
        sums[r][0] = add ? _mm512_loadu_ps(c + r * c_row) : _mm512_setzero_ps();
        sums[r][1] = add ? _mm512_loadu_ps(c + r * c_row + LANES) : _mm512_setzero_ps();
    }
    for (long k = 0; k < depth; k += 2) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * LANES);
        __m512bh right = (__m512bh)_mm512_loadu_si512(b + half + k * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) {
            int32_t pair;
            memcpy(&pair, a + r * a_row + k, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < STRIP; r++) {
        _mm512_storeu_ps(c + r * c_row, sums[r][0]);
        _mm512_storeu_ps(c + r * c_row + LANES, sums[r][1]);
    }
}
