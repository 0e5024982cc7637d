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
    double eps;
} Shape;

typedef struct {
    const void *norm, *in_proj, *attn_out, *ff_out;
    const void *q_norm, *k_norm; // `h d` and `hk d`, or null
    void *keys, *values;         // `b hk capacity d`
} Layer;

enum {
    QUAD = 4,  // rows of a matrix, and tokens, that are multiplied together
    TILE = 16, // rows of a matrix that a thread takes at a time
    LINE = 64, // bytes of the caches
};

static long padded(long batch) { return (batch + QUAD - 1) / QUAD * QUAD; }

static long numbers_of_thread(const Shape *s) {
    return s->batch * s->dim + 2 * padded(s->batch) * TILE + 3 * s->dim_head + s->capacity;
}

// Numbers of scratch for so many threads.
long decode_scratch(const Shape *s, int threads) {
    long qkv = (s->heads + 2 * s->kv_heads) * s->dim_head, attended = s->heads * s->dim_head;
    return s->batch * (s->dim + qkv + s->inner + attended) + threads * numbers_of_thread(s);
}

#ifdef __AVX512F__
#define VECTOR 64 // bytes of a register
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
