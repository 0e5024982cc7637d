// The forward of attention in bfloat16, on processors with the AVX-512 products of bfloat16 pairs. A block of query
// rows meets all its keys at once, so that its scores stay in the second-level cache and need no online softmax.

#ifdef __AVX512BF16__
#include "attention.h"

enum { BLOCK = 4 * STRIP }; // query rows that are computed together

// Writes the weights, exp(scale * (score - maximum)), of the scores in [first, stop), and zeros to the rest of [from,
// to). Returns the logarithm of the sum of exp(scale * score), and in `sum` the sum of the weights.
static float softmax(const float *scores, long first, long stop, long from, long to, float scale, bfloat16 *weights,
                     float *sum) {
    if (first >= stop) { // the row sees no key
        memset(weights + from, 0, (to - from) * sizeof *weights);
        *sum = 1;
        return -INFINITY;
    }
    float most = scores[first], total = 0;
#pragma omp simd reduction(max : most)
    for (long j = first; j < stop; j++) most = scores[j] > most ? scores[j] : most;
#pragma omp simd reduction(+ : total)
    for (long j = first; j < stop; j++) {
        float weight = exp_((scores[j] - most) * scale);
        total += weight;
        weights[j] = store_bf16(weight);
    }
    memset(weights + from, 0, (first - from) * sizeof *weights);
    memset(weights + stop, 0, (to - stop) * sizeof *weights);
    *sum = total;
    return most * scale + logf(total);
}

// Query rows [start, start + BLOCK) of one batch element and key head; row = query * group + head of the group.
static void attend(const Attention *s, long batch, long kv, long start, const Heads *q, const bfloat16 *keys,
                   const bfloat16 *values, char *scratch, const Heads *out, float *lse) {
    long group = s->heads / s->kv_heads, rows = s->queries * group, d = s->dim, width = padded(s->keys);
    long stop = start + BLOCK < rows ? start + BLOCK : rows, from, to;
    seen_by(s, batch, start, stop, &from, &to);
    from = from / PANEL * PANEL, to = padded(to);
    float *scores = (float *)scratch, *sums = scores + BLOCK * width, *result = sums + BLOCK;
    bfloat16 *weights = (bfloat16 *)(result + BLOCK * d), *block = weights + BLOCK * width;
    memset(block, 0, BLOCK * d * sizeof *block);
    for (long r = start; r < stop; r++)
        memcpy(block + (r - start) * d, at(q, batch, kv * group + r % group, r / group), d * sizeof *block);
    for (long j = from; j < to; j += PANEL) // a panel of keys stays in the cache for all rows
        for (long r = 0; r < BLOCK; r += STRIP)
            product(block + r * d, d, keys + j * d, LANES * d, d, 0, scores + r * width + j, width);
    memset(weights + (stop - start) * width, 0, (BLOCK - (stop - start)) * width * sizeof *weights);
    for (long r = start; r < stop; r++) {
        long i = r - start, query = r / group, place = batch * s->queries + query;
        lse[(batch * s->heads + kv * group + r % group) * s->queries + query] = softmax(
            scores + i * width, s->first[place], s->stop[place], from, to, s->scale, weights + i * width, sums + i);
    }
    for (long c = 0; c < d; c += PANEL)
        for (long r = 0; r < BLOCK; r += STRIP)
            product(weights + r * width + from, width, values + c * width + from * LANES, LANES * width, to - from, 0,
                    result + r * d + c, d);
    for (long r = start; r < stop; r++) {
        bfloat16 *row = at(out, batch, kv * group + r % group, r / group);
        for (long c = 0; c < d; c++) row[c] = store_bf16(result[(r - start) * d + c] / sums[r - start]);
    }
}

// Returns the bytes of scratch for a number of threads.
long attention_forward_scratch(const Attention *s, int threads) {
    long width = padded(s->keys), of_thread = BLOCK * (width * (4 + 2) + 4 + s->dim * (4 + 2));
    return 2 * s->batch * s->kv_heads * width * s->dim * 2 + threads * of_thread;
}

// q and out: `b h i d`; k and v: `b hk j d`, with a dense last axis; lse: `b h i`; d is a multiple of PANEL.
void attention_forward(const Attention *s, const Heads *q, const Heads *k, const Heads *v, const Heads *out, float *lse,
                       char *scratch, int max_threads) {
    long width = padded(s->keys), d = s->dim, pairs = s->batch * s->kv_heads;
    long blocks = (s->queries * (s->heads / s->kv_heads) + BLOCK - 1) / BLOCK;
    bfloat16 *keys = (bfloat16 *)scratch, *values = keys + pairs * width * d;
    char *of_threads = (char *)(values + pairs * width * d);
    long of_thread = attention_forward_scratch(s, 1) - (of_threads - scratch);
#pragma omp parallel num_threads(max_threads)
    {
        char *mine = of_threads + omp_get_thread_num() * of_thread;
#pragma omp for
        for (long i = 0; i < 2 * pairs; i++) {
            long batch = i / 2 / s->kv_heads, kv = i / 2 % s->kv_heads;
            if (i % 2)
                pack(at(k, batch, kv, 0), 1, k->strides[2], d, s->keys, d, width, keys + i / 2 * width * d);
            else
                pack(at(v, batch, kv, 0), v->strides[2], 1, s->keys, d, width, d, values + i / 2 * width * d);
        }
#pragma omp for schedule(dynamic)
        for (long i = pairs * blocks - 1; i >= 0; i--) { // the longest first
            long pair = i % pairs, start = i / pairs * BLOCK;
            attend(s, pair / s->kv_heads, pair % s->kv_heads, start, q, keys + pair * width * d,
                   values + pair * width * d, mine, out, lse);
        }
    }
}
#endif
