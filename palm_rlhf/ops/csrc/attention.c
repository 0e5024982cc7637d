// The forward of attention in bfloat16, on processors with AVX-512's products of bfloat16 pairs. A block of query rows
// meets all the keys that it may see at once, so its scores stay in the second cache and need no online softmax.

#include "native.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

enum {
    LANES = 16,         // floats of a register
    PANEL = 2 * LANES,  // columns of a product
    STRIP = 8,          // rows of a product: STRIP x 2 registers hold its sums
    BLOCK = 4 * STRIP,  // query rows that are worked on together
};

typedef struct {
    long batch, heads, kv_heads, queries, keys, dim;
    long q_strides[3], k_strides[3], v_strides[3], out_strides[3]; // of batch, head and position, in elements
    long causal;                                                   // the last query stands at the last key
    float scale;
} Attention;

static long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Columns j of b, in pairs of rows: `LANES-columns depth/2 LANES 2`, which one product reads from front to back.
// `b[k * row + j * column]` is b's element; what is beyond its `depth` or `width` is zero.
static void pack(const bfloat16 *b, long row, long column, long depth, long width, long padded_depth, long padded_width,
                 bfloat16 *packed) {
    for (long j0 = 0; j0 < padded_width; j0 += LANES)
        for (long k = 0; k < padded_depth; k += 2)
            for (long j = j0; j < j0 + LANES; j++)
                for (long i = k; i < k + 2; i++)
                    *packed++ = i < depth && j < width ? b[i * row + j * column] : 0;
}

// c `STRIP PANEL` = a `STRIP depth` times a packed b `depth PANEL`, whose two halves are `half` elements apart.
static inline void product(const bfloat16 *a, long a_row, const bfloat16 *b, long half, long depth, float *c, long c_row) {
    __m512 sums[STRIP][2];
    for (int r = 0; r < STRIP; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
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
    for (int r = 0; r < STRIP; r++) {
        _mm512_storeu_ps(c + r * c_row, sums[r][0]);
        _mm512_storeu_ps(c + r * c_row + LANES, sums[r][1]);
    }
}

// exp(scale * (scores - their maximum)) of the first `visible` scores, zeros up to `width`: the logarithm of the sum of
// exp(scale * scores), and in `sum` that of the weights.
static float softmax(const float *scores, long visible, long width, float scale, bfloat16 *weights, float *sum) {
    float most = scores[0], total = 0;
#pragma omp simd reduction(max : most)
    for (long j = 0; j < visible; j++) most = scores[j] > most ? scores[j] : most;
#pragma omp simd reduction(+ : total)
    for (long j = 0; j < visible; j++) {
        float weight = exp_((scores[j] - most) * scale);
        total += weight;
        weights[j] = store_bf16(weight);
    }
    memset(weights + visible, 0, (width - visible) * sizeof *weights);
    *sum = total;
    return most * scale + logf(total);
}

// Query rows [start, start + BLOCK) of one batch element and key head; row = query * group + head of the group.
static void attend(const Attention *s, long batch, long kv, long start, const bfloat16 *q, const bfloat16 *keys,
                   const bfloat16 *values, char *scratch, bfloat16 *out, float *lse) {
    long group = s->heads / s->kv_heads, rows = s->queries * group, d = s->dim, width = padded(s->keys);
    long stop = start + BLOCK < rows ? start + BLOCK : rows, ahead = s->keys - s->queries;
    long seen = s->causal ? (stop - 1) / group + ahead + 1 : s->keys, block_width = padded(seen);
    float *scores = (float *)scratch, *sums = scores + BLOCK * width, *result = sums + BLOCK;
    bfloat16 *weights = (bfloat16 *)(result + BLOCK * d), *block = weights + BLOCK * width;
    memset(block, 0, BLOCK * d * sizeof *block);
    for (long r = start; r < stop; r++)
        memcpy(block + (r - start) * d,
               q + batch * s->q_strides[0] + (kv * group + r % group) * s->q_strides[1] + r / group * s->q_strides[2],
               d * sizeof *block);
    for (long j = 0; j < block_width; j += PANEL) // the panel stays near while all rows meet it
        for (long r = 0; r < BLOCK; r += STRIP)
            product(block + r * d, d, keys + j * d, LANES * d, d, scores + r * width + j, width);
    memset(weights, 0, BLOCK * width * sizeof *weights);
    for (long r = start; r < stop; r++) {
        long at = r - start, query = r / group;
        lse[(batch * s->heads + kv * group + r % group) * s->queries + query] =
            softmax(scores + at * width, s->causal ? query + ahead + 1 : s->keys, block_width, s->scale,
                    weights + at * width, sums + at);
    }
    for (long c = 0; c < d; c += PANEL)
        for (long r = 0; r < BLOCK; r += STRIP)
            product(weights + r * width, width, values + c * width, LANES * width, block_width, result + r * d + c, d);
    for (long r = start; r < stop; r++) {
        bfloat16 *row = out + batch * s->out_strides[0] + (kv * group + r % group) * s->out_strides[1] +
                        r / group * s->out_strides[2];
        for (long c = 0; c < d; c++) row[c] = store_bf16(result[(r - start) * d + c] / sums[r - start]);
    }
}

// Bytes of scratch for so many threads.
long attention_scratch(const Attention *s, int threads) {
    long width = padded(s->keys), of_thread = BLOCK * (width * (4 + 2) + 4 + s->dim * (4 + 2));
    return 2 * s->batch * s->kv_heads * width * s->dim * 2 + threads * of_thread;
}

// q, out: `b h i d`, k, v: `b hk j d`, any strides but of d; lse: `b h i`; d is a multiple of PANEL.
void attention_forward(const Attention *s, const bfloat16 *q, const bfloat16 *k, const bfloat16 *v, char *scratch,
                       bfloat16 *out, float *lse, int max_threads) {
    long width = padded(s->keys), d = s->dim, pairs = s->batch * s->kv_heads;
    long blocks = (s->queries * (s->heads / s->kv_heads) + BLOCK - 1) / BLOCK;
    bfloat16 *keys = (bfloat16 *)scratch, *values = keys + pairs * width * d;
    char *of_threads = (char *)(values + pairs * width * d);
    long of_thread = attention_scratch(s, 1) - (of_threads - scratch);
#pragma omp parallel num_threads(max_threads)
    {
        char *mine = of_threads + omp_get_thread_num() * of_thread;
#pragma omp for
        for (long i = 0; i < 2 * pairs; i++) {
            long batch = i / 2 / s->kv_heads, kv = i / 2 % s->kv_heads;
            if (i % 2)
                pack(k + batch * s->k_strides[0] + kv * s->k_strides[1], 1, s->k_strides[2], d, s->keys, d, width,
                     keys + i / 2 * width * d);
            else
                pack(v + batch * s->v_strides[0] + kv * s->v_strides[1], s->v_strides[2], 1, s->keys, d, width, d,
                     values + i / 2 * width * d);
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
