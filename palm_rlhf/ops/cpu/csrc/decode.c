// One decoding step: the next token of each row goes through all blocks of a PaLM in one call, parallel or serial ones.
// The weights are read once from memory, and everything else stays in the caches. The threads synchronise three times a
// parallel block, and five times a serial one. Sums are float32 or wider for weights of any type. If the processor
// multiplies pairs of bfloat16, the activations that are multiplied with weights or keys of bfloat16 are rounded to
// bfloat16.

#include "products.h"

typedef struct {
    long depth, dim, heads, kv_heads, dim_head, inner; // of the model
    long batch, capacity;                              // of the cache: its rows, and the tokens that it has room for
    long table_rows, table_heads;                      // of the rotary tables: `b|1 (h + hk)|1 d`
    long rank;                                         // of the adapters; 0 where there are none
    long rms;                                          // 1 if norms are RMSNorms, 0 if they are layer norms
    double eps, adapter_scale;
    const void *rank_factors;                          // `batch rank`, float32 or wider: of each row; or null
} Shape;

// What can have an adapter: queries, keys, values and output of the attention; gate, value and output of the
// feed-forward.
enum Target { QUERIES, KEYS, VALUES, OUTPUT, GATE, VALUE, FF_OUT, TARGETS };

typedef struct {
    const void *norm, *in_proj, *attn_out, *ff_out;
    const void *q_norm, *k_norm; // `h d` and `hk d`, of RMSNorms `d`; or null
    void *keys, *values;         // `b hk capacity d`
    const void *qkv_bias;        // or null
    const void *ff_norm, *ff_proj; // of a serial block, or null: in a parallel one, the feed-forward is in `in_proj`
    const void *down[TARGETS], *up[TARGETS]; // adapters, `i rank` and `rank o`, or null
} Layer;

static long padded(long batch) { return (batch + QUAD - 1) / QUAD * QUAD; }

// Returns how many query heads of one key head are computed together: as many as leave work for every thread.
static long heads_together(const Shape *s, int threads) {
    long most = s->batch * s->heads / threads, together = QUAD;
    while (together > 1 && (together > most || s->heads / s->kv_heads % together)) together--;
    return together;
}

static long numbers_of_thread(const Shape *s) {
    long of_product = s->batch * s->dim + 2 * padded(s->batch) * TILE, of_adapters = 2 * s->batch * s->rank;
    return of_product + of_adapters + (QUAD + 3) * s->dim_head + QUAD * s->capacity;
}

// Returns the numbers of scratch (floats, or doubles) for a number of threads.
long decode_scratch(const Shape *s, int threads) {
    long qkv = (s->heads + 2 * s->kv_heads) * s->dim_head, attended = s->heads * s->dim_head;
    return s->batch * (qkv + s->inner + attended) + threads * numbers_of_thread(s);
}

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
