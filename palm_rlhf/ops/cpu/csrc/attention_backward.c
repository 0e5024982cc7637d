// The backward of attention in bfloat16. It computes the scores of a few keys (rows) with a block of query rows
// (columns) at a time. So weights and their gradients stay in the first-level cache, and are written once, packed as
// the next products read them. The keys of a chunk and their gradients stay in the second-level cache for all rows.

#ifdef __AVX512BF16__
#include "attention.h"

enum {
    BLOCK = 2 * PANEL, // query rows that are computed together
    CHUNK = 256,       // keys that are computed together
};

// A block of query rows, as the keys need it. Missing rows at the end are zero, and change nothing.
typedef struct {
    bfloat16 *q_across, *q_down;         // packed with d as the depth of a product, and with the rows as its depth
    bfloat16 *d_out_across, *d_out_down; // packed in the same way
    float lse[BLOCK], delta[BLOCK];
    int32_t first[BLOCK], stop[BLOCK]; // the range of keys that each row sees
} Rows;

// Packs a buffer `BLOCK d` twice: with d as the depth, and with the rows as the depth; see `pack`.
static void pack_rows(const bfloat16 *buffer, long d, bfloat16 *across, bfloat16 *down) {
    uint32_t *pairs = (uint32_t *)across;
    for (long r0 = 0; r0 < BLOCK; r0 += LANES)
        for (long k = 0; k < d; k += 2)
            for (long r = r0; r < r0 + LANES; r++) memcpy(pairs++, buffer + r * d + k, sizeof *pairs);
    pairs = (uint32_t *)down;
    for (long c0 = 0; c0 < d; c0 += LANES)
        for (long r = 0; r < BLOCK; r += 2, pairs += LANES)
#pragma omp simd
            for (long c = 0; c < LANES; c++)
                pairs[c] = buffer[r * d + c0 + c] | (uint32_t)buffer[(r + 1) * d + c0 + c] << 16;
}

static void read_rows(const Attention *s, long batch, long kv, long start, const Heads *q, const Heads *out,
                      const Heads *d_out, const float *lse, bfloat16 *buffer, Rows *rows) {
    long group = s->heads / s->kv_heads, total = s->queries * group, d = s->dim;
    bfloat16 *d_outs = buffer + BLOCK * d;
    memset(buffer, 0, 2 * BLOCK * d * sizeof *buffer);
    for (long r = start; r < start + BLOCK; r++) {
        long i = r - start, head = kv * group + r % group, query = r / group;
        rows->lse[i] = rows->delta[i] = 0;
        rows->first[i] = rows->stop[i] = 0;
        if (r >= total) continue;
        const bfloat16 *o = at(out, batch, head, query), *d_o = at(d_out, batch, head, query);
        memcpy(buffer + i * d, at(q, batch, head, query), d * sizeof *buffer);
        memcpy(d_outs + i * d, d_o, d * sizeof *buffer);
        float delta = 0;
        for (long c = 0; c < d; c++) delta += load_bf16(o[c]) * load_bf16(d_o[c]);
        rows->delta[i] = delta;
        rows->lse[i] = lse[(batch * s->heads + head) * s->queries + query];
        rows->first[i] = s->first[batch * s->queries + query], rows->stop[i] = s->stop[batch * s->queries + query];
    }
    pack_rows(buffer, d, rows->q_across, rows->q_down);
    pack_rows(d_outs, d, rows->d_out_across, rows->d_out_down);
}

// A strip of keys with a block of rows: adds to d_keys and d_values of the strip, `STRIP d`, and writes the gradient of
// its scores to `d_scores`, `CHUNK BLOCK`, packed with the keys as the depth.
static void strip(const Attention *s, const Rows *rows, long first, const bfloat16 *keys, const bfloat16 *values,
                  bfloat16 *d_scores, float *d_keys, float *d_values) {
    long d = s->dim;
    float scores[STRIP][BLOCK], d_weights[STRIP][BLOCK];
    bfloat16 weights[STRIP][BLOCK], gradients[STRIP][BLOCK];
    for (long c = 0; c < BLOCK; c += PANEL) {
        product(keys, d, rows->q_across + c * d, LANES * d, d, 0, scores[0] + c, BLOCK);
        product(values, d, rows->d_out_across + c * d, LANES * d, d, 0, d_weights[0] + c, BLOCK);
    }
    for (int k = 0; k < STRIP; k++) {
        int32_t key = (int32_t)first + k;
#pragma omp simd
        for (int r = 0; r < BLOCK; r++) {
            float weight = exp_(scores[k][r] * s->scale - rows->lse[r]);
            weight = (key >= rows->first[r]) & (key < rows->stop[r]) ? weight : 0.0f;
            weights[k][r] = store_bf16(weight);
            gradients[k][r] = store_bf16(weight * (d_weights[k][r] - rows->delta[r]));
        }
    }
    for (int k = 0; k < STRIP; k += 2)
        for (long c = 0; c < BLOCK; c += LANES) {
            uint32_t *pairs = (uint32_t *)(d_scores + c * CHUNK + (first % CHUNK + k) * LANES);
#pragma omp simd
            for (int r = 0; r < LANES; r++) pairs[r] = gradients[k][c + r] | (uint32_t)gradients[k + 1][c + r] << 16;
        }
    for (long c = 0; c < d; c += PANEL) {
        product(weights[0], BLOCK, rows->d_out_down + c * BLOCK, LANES * BLOCK, BLOCK, 1, d_values + c, d);
        product(gradients[0], BLOCK, rows->q_down + c * BLOCK, LANES * BLOCK, BLOCK, 1, d_keys + c, d);
    }
}

// The blocks of rows `part`, `part + parts`, ... of one batch element and key head; d_rows: `blocks d BLOCK`.
static void backward(const Attention *s, long batch, long kv, long part, long parts, const Heads *q, const Heads *out,
                     const Heads *d_out, const float *lse, const bfloat16 *keys, const bfloat16 *values,
                     const bfloat16 *keys_turned, const Heads *d_q, float *d_keys, float *d_values, float *d_rows,
                     char *scratch) {
    long group = s->heads / s->kv_heads, total = s->queries * group, d = s->dim, width = padded(s->keys);
    Rows *rows = (Rows *)scratch;
    bfloat16 *packed = (bfloat16 *)(rows + 1), *buffer = packed + 4 * BLOCK * d, *d_scores = buffer + 2 * BLOCK * d;
    rows->q_across = packed, rows->q_down = packed + BLOCK * d;
    rows->d_out_across = packed + 2 * BLOCK * d, rows->d_out_down = packed + 3 * BLOCK * d;
    for (long first = 0; first < s->keys; first += CHUNK)
        for (long start = part * BLOCK; start < total; start += parts * BLOCK) {
            long stop = start + BLOCK < total ? start + BLOCK : total, from, to;
            seen_by(s, batch, start, stop, &from, &to);
            long before = first > from / CHUNK * CHUNK; // whether an earlier chunk has written the sums
            if (first + CHUNK <= from || (before && first >= to)) continue;
            from = (from > first ? from : first) / STRIP * STRIP;
            long depth = ((to < first + CHUNK ? to : first + CHUNK) - from + STRIP - 1) / STRIP * STRIP;
            float *sums = d_rows + start * d;
            read_rows(s, batch, kv, start, q, out, d_out, lse, buffer, rows);
            for (long j = from; j < from + depth; j += STRIP)
                strip(s, rows, j, keys + j * d, values + j * d, d_scores, d_keys + j * d, d_values + j * d);
            for (long c = 0; c < BLOCK; c += PANEL)
                for (long i = 0; i < d; i += STRIP)
                    product(keys_turned + i * width + from, width, d_scores + c * CHUNK + (from - first) * LANES,
                            LANES * CHUNK, depth, before, sums + i * BLOCK + c, BLOCK);
            if (to > first + CHUNK) continue;
            for (long r = start; r < stop; r++) {
                bfloat16 *row = at(d_q, batch, kv * group + r % group, r / group);
                for (long c = 0; c < d; c++) row[c] = store_bf16(sums[c * BLOCK + r - start] * s->scale);
            }
        }
}

// The number of sums for the gradient of the query rows of one batch element and key head.
static long rows_of(const Attention *s) {
    long total = s->queries * (s->heads / s->kv_heads);
    return (total + BLOCK - 1) / BLOCK * BLOCK * s->dim;
}

static long parts_of(const Attention *s, int threads) {
    long pairs = s->batch * s->kv_heads;
    return (threads + pairs - 1) / pairs;
}

static long thread_bytes(const Attention *s) {
    return sizeof(Rows) + BLOCK * (s->dim * 6 + CHUNK) * 2;
}

// Returns the bytes of scratch for a number of threads.
long attention_backward_scratch(const Attention *s, int threads) {
    long pairs = s->batch * s->kv_heads, matrix = padded(s->keys) * s->dim;
    return pairs * (matrix * (3 * 2 + parts_of(s, threads) * 2 * 4) + rows_of(s) * 4) + threads * thread_bytes(s);
}

// q, out and their gradients: `b h i d`; k, v and their gradients: `b hk j d`; lse: `b h i`; d is a multiple of PANEL.
void attention_backward(const Attention *s, const Heads *q, const Heads *k, const Heads *v, const Heads *out,
                        const Heads *d_out, const float *lse, const Heads *d_q, const Heads *d_k, const Heads *d_v,
                        char *scratch, int max_threads) {
    long width = padded(s->keys), d = s->dim, matrix = width * d, pairs = s->batch * s->kv_heads;
    long parts = parts_of(s, max_threads);
    bfloat16 *copies = (bfloat16 *)scratch; // of each pair: keys, values, keys turned
    float *sums = (float *)(copies + 3 * pairs * matrix);
    float *d_rows = sums + 2 * parts * pairs * matrix;
    char *of_threads = (char *)(d_rows + pairs * rows_of(s));
#pragma omp parallel num_threads(max_threads)
    {
        char *mine = of_threads + omp_get_thread_num() * thread_bytes(s);
#pragma omp for
        for (long i = 0; i < pairs; i++) {
            bfloat16 *keys = copies + 3 * i * matrix, *values = keys + matrix, *turned = values + matrix;
            memset(keys, 0, 3 * matrix * sizeof *keys);
            for (long j = 0; j < s->keys; j++) {
                const bfloat16 *key = at(k, i / s->kv_heads, i % s->kv_heads, j);
                memcpy(keys + j * d, key, d * sizeof *keys);
                memcpy(values + j * d, at(v, i / s->kv_heads, i % s->kv_heads, j), d * sizeof *keys);
                for (long c = 0; c < d; c++) turned[c * width + j] = key[c];
            }
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < pairs * parts; i++) {
            long pair = i / parts;
            const bfloat16 *keys = copies + 3 * pair * matrix;
            float *d_keys = sums + 2 * i * matrix;
            memset(d_keys, 0, 2 * matrix * sizeof *d_keys);
            backward(s, pair / s->kv_heads, pair % s->kv_heads, i % parts, parts, q, out, d_out, lse, keys,
                     keys + matrix, keys + 2 * matrix, d_q, d_keys, d_keys + matrix, d_rows + pair * rows_of(s), mine);
        }
#pragma omp for
        for (long j = 0; j < pairs * s->keys; j++) {
            long pair = j / s->keys, key = j % s->keys;
            bfloat16 *d_key = at(d_k, pair / s->kv_heads, pair % s->kv_heads, key);
            bfloat16 *d_value = at(d_v, pair / s->kv_heads, pair % s->kv_heads, key);
            for (long c = 0; c < d; c++) {
                const float *sum = sums + 2 * pair * parts * matrix + key * d + c;
                float of_key = 0, of_value = 0;
                for (long part = 0; part < parts; part++, sum += 2 * matrix) of_key += sum[0], of_value += sum[matrix];
                d_key[c] = store_bf16(of_key * s->scale), d_value[c] = store_bf16(of_value);
            }
        }
    }
}
#endif
