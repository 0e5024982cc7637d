// The next token of each row through all blocks of a PaLM, in one call: the weights are streamed once, and nothing else
// leaves the caches. The threads meet three times a block. All sums are float32 at least, whatever the weights are. What
// is multiplied with weights of bfloat16 is rounded to it where the processor multiplies pairs of them.

#include "native.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef struct {
    long depth, dim, heads, kv_heads, dim_head, inner; // of the model
    long batch, capacity;                              // of the cache: rows, and room for tokens
    long table_rows, table_heads;                      // of the rotary tables: `b|1 (h + hk)|1 d`
    long rank;                                         // of the adapters; 0 where there are none
    double eps, adapter_scale;
} Shape;

typedef struct {
    const void *norm, *in_proj, *attn_out, *ff_out;
    const void *q_norm, *k_norm; // `h d` and `hk d`, or null
    void *keys, *values;         // `b hk capacity d`
    const void *down[4], *up[4]; // of queries, keys, values and the attention's output: `i rank` and `rank o`
} Layer;

enum { OUTPUT = 3 }; // the place of the last

enum {
    QUAD = 4,  // rows of a matrix, and tokens, that are multiplied together
    TILE = 16, // rows of a matrix that a thread takes at a time
    LINE = 64, // bytes of the caches
};

static long padded(long batch) { return (batch + QUAD - 1) / QUAD * QUAD; }

// How many query heads attend together: as many of one key head as keep all threads busy.
static long heads_together(const Shape *s, int threads) {
    long most = s->batch * s->heads / threads, together = QUAD;
    while (together > 1 && (together > most || s->heads / s->kv_heads % together)) together--;
    return together;
}

static long numbers_of_thread(const Shape *s) {
    return s->batch * s->dim + 2 * padded(s->batch) * TILE + (QUAD + 3) * s->dim_head +
           QUAD * s->capacity + s->batch * s->rank;
}

// Numbers of scratch for so many threads.
long decode_scratch(const Shape *s, int threads) {
    long qkv = (s->heads + 2 * s->kv_heads) * s->dim_head, attended = s->heads * s->dim_head;
    return s->batch * (s->dim + qkv + s->inner + attended) + threads * numbers_of_thread(s);
}

#ifdef __AVX512F__
#define VECTOR 64 // bytes of a register

static inline __m512d halves(__m512 a, __m512 b, int high) {
    __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y);
}

// Entry 4 t + i is the sum of the lanes of register i of token t.
static inline __m512 totals_of_16(const __m512 (*sums)[QUAD]) {
    __m512 tokens[QUAD], pairs[2];
    for (int t = 0; t < QUAD; t++) { // four lanes of four totals each
        __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(sums[t][0], sums[t][1]), _mm512_unpackhi_ps(sums[t][0], sums[t][1]));
        __m512 last = _mm512_add_ps(_mm512_unpacklo_ps(sums[t][2], sums[t][3]), _mm512_unpackhi_ps(sums[t][2], sums[t][3]));
        tokens[t] = _mm512_add_ps(_mm512_castpd_ps(halves(first, last, 0)), _mm512_castpd_ps(halves(first, last, 1)));
    }
    for (int p = 0; p < 2; p++) {
        __m512 even = tokens[2 * p], odd = tokens[2 * p + 1];
        pairs[p] = _mm512_add_ps(_mm512_shuffle_f32x4(even, odd, 0x44), _mm512_shuffle_f32x4(even, odd, 0xee));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(pairs[0], pairs[1], 0x88), _mm512_shuffle_f32x4(pairs[0], pairs[1], 0xdd));
}
#elif defined __AVX__
#define VECTOR 32
#else
#define VECTOR 16
#endif

#define T float
#define A float
#define EXP exp_
#define OF(name) name##_f32
#include "products_body.h"
#include "decode_body.h"
#undef T
#undef OF

#ifdef __AVX512BF16__
#define PAIRS
#endif
#define T bfloat16
#define OF(name) name##_bf16
#include "products_body.h"
#include "decode_body.h"
#undef T
#undef A
#undef EXP
#undef OF
#undef PAIRS

#define T double
#define A double
#define EXP exp
#define OF(name) name##_f64
#include "products_body.h"
#include "decode_body.h"
