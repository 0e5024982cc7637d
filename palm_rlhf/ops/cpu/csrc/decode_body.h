// The functions of decode.c for weights of type T and activations of type A.

// An RMSNorm is a layer norm that takes the mean for 0.
static void OF(normalise)(const Shape *s, const A *x, const T *weight, long n, A *out) {
    A mean = 0, variance = 0, eps = s->eps;
    if (!s->rms) {
#pragma omp simd reduction(+ : mean)
        for (long k = 0; k < n; k++) mean += x[k];
        mean /= n;
    }
#pragma omp simd reduction(+ : variance)
    for (long k = 0; k < n; k++) variance += (x[k] - mean) * (x[k] - mean);
    A scale = 1 / (A)sqrt(variance / n + eps);
    for (long k = 0; k < n; k++) out[k] = (x[k] - mean) * scale * OF(load)(weight[k]);
}

// Normalises a query or key if there is a weight, then rotates it; the sines of the first half are negative.
static void OF(turned)(const Shape *s, const A *x, const T *norm, const A *cosines, const A *sines, A *buffer,
                       A *out) {
    long n = s->dim_head;
    if (norm) OF(normalise)(s, x, norm, n, buffer);
    else memcpy(buffer, x, n * sizeof(A));
    for (long k = 0; k < n; k++) out[k] = buffer[k] * cosines[k] + buffer[k < n / 2 ? k + n / 2 : k - n / 2] * sines[k];
}

// The average of the values from `first` to `length`, the last of which is `own`, weighted by the softmax of their
// scores. It overwrites the scores.
static void OF(average)(const Shape *s, const T *values, const A *own, long first, long length, A *scores, A *out) {
    long d = s->dim_head, j = first;
    A scale = 1 / (A)sqrt(d), most = scores[length], sum = 0;
    for (; j < length; j++) most = scores[j] > most ? scores[j] : most;
#pragma omp simd reduction(+ : sum)
    for (j = first; j <= length; j++) sum += scores[j] = EXP((scores[j] - most) * scale);
    for (long c = 0; c < d; c++) out[c] = scores[length] * own[c];
    for (j = first; j + QUAD <= length; j += QUAD) {
        const T *v = values + j * d;
        A w0 = scores[j], w1 = scores[j + 1], w2 = scores[j + 2], w3 = scores[j + 3];
        for (long c = 0; c < d; c++)
            out[c] += w0 * OF(load)(v[c]) + w1 * OF(load)(v[d + c]) + w2 * OF(load)(v[2 * d + c]) +
                      w3 * OF(load)(v[3 * d + c]);
    }
    for (; j < length; j++)
        for (long c = 0; c < d; c++) out[c] += scores[j] * OF(load)(values[j * d + c]);
    for (long c = 0; c < d; c++) out[c] /= sum;
}

// Attention of `heads` query heads of one row, at most QUAD of one key head, to the cached keys from `first` on and to
// the key of the token itself. The first heads of a key head write this key and its value to the cache.
static void OF(attend)(const Shape *s, const Layer *layer, long row, long head, long heads, long first, long length,
                       const A *qkv, const A *cosines, const A *sines, A *scratch, A (*tile)[TILE], A *out) {
    long d = s->dim_head, kv = head / (s->heads / s->kv_heads), scale = s->rms ? 0 : d;
    long table = s->table_heads == 1 ? 0 : d;
    cosines += (s->table_rows == 1 ? 0 : row) * s->table_heads * d;
    sines += (s->table_rows == 1 ? 0 : row) * s->table_heads * d;
    A *q = scratch, *k = q + QUAD * d, *v = k + d, *buffer = v + d, *scores = buffer + d;
    T *own = (T *)buffer;
    const T *q_norm = layer->q_norm, *k_norm = layer->k_norm;
    for (long h = head; h < head + heads; h++)
        OF(turned)(s, qkv + h * d, q_norm ? q_norm + h * scale : 0, cosines + h * table, sines + h * table, buffer,
                   q + (h - head) * d);
    OF(turned)(s, qkv + (s->heads + kv) * d, k_norm ? k_norm + kv * scale : 0, cosines + (s->heads + kv) * table,
               sines + (s->heads + kv) * table, buffer, k);
    for (long c = 0; c < d; c++) {
        own[c] = OF(store)(k[c]);
        v[c] = OF(load)(OF(store)(qkv[(s->heads + s->kv_heads + kv) * d + c]));
    }
    T *keys = (T *)layer->keys + (row * s->kv_heads + kv) * s->capacity * d;
    T *values = (T *)layer->values + (row * s->kv_heads + kv) * s->capacity * d;

    if (first > length) first = length; // padding: its numbers are not used, but must not be NaN
    OF(product)(own, q, d, 1, heads, tile);
    for (long h = 0; h < heads; h++) scores[h * s->capacity + length] = tile[h][0];
    for (long j = first; j < length; j += TILE) {
        long rows = length - j < TILE ? length - j : TILE;
        OF(product)(keys + j * d, q, d, rows, heads, tile);
        for (long h = 0; h < heads; h++) memcpy(scores + h * s->capacity + j, tile[h], rows * sizeof(A));
    }
    for (long h = 0; h < heads; h++)
        OF(average)(s, values, v, first, length, scores + h * s->capacity, out + h * d);

    if (head % (s->heads / s->kv_heads) == 0) // no thread reads this place of the cache before the next token
        for (long c = 0; c < d; c++) {
            keys[length * d + c] = own[c];
            values[length * d + c] = OF(store)(v[c]);
        }
}

// low = x @ down, times the factors of the row if it has some: `b n`, `n rank` -> `b rank`.
static void OF(lower)(const Shape *s, const T *down, const A *x, long n, A *low) {
    long rank = s->rank;
    for (long t = 0; t < s->batch; t++, low += rank) {
        memset(low, 0, rank * sizeof(A));
        for (long k = 0; k < n; k++)
            for (long r = 0; r < rank; r++) low[r] += x[t * n + k] * OF(load)(down[k * rank + r]);
        if (s->rank_factors)
            for (long r = 0; r < rank; r++) low[r] *= ((const A *)s->rank_factors)[t * rank + r];
    }
}

// Adds entries `first` to `stop` of low @ up, times the scale of adapters, to out[b * stride + entry - first].
// up: `rank width`.
static void OF(raise)(const Shape *s, const T *up, const A *low, long width, long first, long stop, A *out,
                      long stride) {
    for (long t = 0; t < s->batch; t++)
        for (long r = 0; r < s->rank; r++)
            for (long i = first; i < stop; i++)
                out[t * stride + i - first] += (A)s->adapter_scale * low[t * s->rank + r] * OF(load)(up[r * width + i]);
}

// The part of one thread in the projection to queries, keys and values: `b dim -> b (h + 2 hk) d`. `tile` has room for
// `b TILE`, `low` for `b rank`.
static void OF(project)(const Shape *s, const Layer *layer, const A *normed, int thread, int threads, A (*tile)[TILE],
                        A *low, A *qkv) {
    const T *in_proj = layer->in_proj, *bias = layer->qkv_bias;
    long dim = s->dim, width = (s->heads + 2 * s->kv_heads) * s->dim_head, b = s->batch, start, stop;
    share(width, TILE, thread, threads, &start, &stop);
    for (long i = start; i < stop; i += TILE) {
        long rows = stop - i < TILE ? stop - i : TILE;
        OF(product)(in_proj + i * dim, normed, dim, rows, b, tile);
        for (long r = 0; r < b; r++)
            for (long k = 0; k < rows; k++)
                qkv[r * width + i + k] = bias ? tile[r][k] + OF(load)(bias[i + k]) : tile[r][k];
    }
    for (long part = QUERIES, begin = 0, end; part <= VALUES; part++, begin = end) {
        end = begin + (part == QUERIES ? s->heads : s->kv_heads) * s->dim_head;
        long first = start > begin ? start : begin, last = stop < end ? stop : end;
        if (!layer->down[part] || first >= last) continue;
        OF(lower)(s, layer->down[part], normed, dim, low);
        OF(raise)(s, layer->up[part], low, end - begin, first - begin, last - begin, qkv + first, width);
    }
}

// The part of one thread in the hidden units: `b dim -> b inner`. The rows of `weights` are those of the gate, then
// those of the value; `tile` has room for `2 b TILE`, `low` for `2 b rank`.
static void OF(gate)(const Shape *s, const Layer *layer, const T *weights, const A *normed, int thread, int threads,
                     A (*tile)[TILE], A *low, A *hidden) {
    long dim = s->dim, inner = s->inner, b = s->batch, start, stop;
    A(*tiles[2])[TILE] = {tile, tile + padded(b)};
    share(inner, TILE, thread, threads, &start, &stop);
    for (long part = 0; part < 2 && start < stop; part++)
        if (layer->down[GATE + part]) OF(lower)(s, layer->down[GATE + part], normed, dim, low + part * b * s->rank);
    for (long i = start; i < stop; i += TILE) {
        long rows = stop - i < TILE ? stop - i : TILE;
        for (long part = 0; part < 2; part++) {
            OF(product)(weights + (part * inner + i) * dim, normed, dim, rows, b, tiles[part]);
            if (layer->up[GATE + part])
                OF(raise)(s, layer->up[GATE + part], low + part * b * s->rank, inner, i, i + rows, tiles[part][0], TILE);
        }
        for (long r = 0; r < b; r++)
            for (long k = 0; k < rows; k++) {
                A gate = tiles[0][r][k];
                hidden[r * inner + i + k] = gate / (1 + EXP(-gate)) * tiles[1][r][k];
            }
    }
}

// The part of one thread in x += in @ weights.T: `b n -> b dim`.
static void OF(add_output)(const Shape *s, const T *weights, const A *in, long n, int thread, int threads,
                           A (*tile)[TILE], A *x) {
    long dim = s->dim, b = s->batch, start, stop;
    share(dim, TILE, thread, threads, &start, &stop);
    for (long i = start; i < stop; i += TILE) {
        long rows = stop - i < TILE ? stop - i : TILE;
        OF(product)(weights + i * n, in, n, rows, b, tile);
        for (long r = 0; r < b; r++)
            for (long k = 0; k < rows; k++) x[r * dim + i + k] += tile[r][k];
    }
}

// The same for the adapter of an output, if there is one; `low` has room for `b rank`.
static void OF(add_adapter)(const Shape *s, const Layer *layer, enum Target target, const A *in, long n, int thread,
                            int threads, A *low, A *x) {
    long start, stop;
    share(s->dim, TILE, thread, threads, &start, &stop);
    if (!layer->down[target] || start >= stop) return;
    OF(lower)(s, layer->down[target], in, n, low);
    OF(raise)(s, layer->up[target], low, s->dim, start, stop, x + start, s->dim);
}

// The decoding step. x: `b dim`, input and output; lengths: `b`, the tokens of each row in the cache, of which it sees
// those from `first` on; scratch: `decode_scratch` numbers.
void OF(decode)(const Shape *s, const Layer *layers, const A *cosines, const A *sines, const long *first,
                const long *lengths, A *x, A *scratch, int max_threads) {
    long b = s->batch, dim = s->dim, width = (s->heads + 2 * s->kv_heads) * s->dim_head, q_dim = s->heads * s->dim_head;
    A *qkv = scratch, *hidden = qkv + b * width, *attended = hidden + b * s->inner, *of_threads = attended + b * q_dim;
#pragma omp parallel num_threads(max_threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        A *normed = of_threads + thread * numbers_of_thread(s);
        A(*tile)[TILE] = (A(*)[TILE])(normed + b * dim);
        A *low = tile[2 * padded(b)], *mine = low + 2 * b * s->rank;
        long start, stop, together = heads_together(s, threads);
        for (const Layer *layer = layers; layer < layers + s->depth; layer++) {
            const T *ff_proj = layer->ff_proj;
            for (long r = 0; r < b; r++) OF(normalise)(s, x + r * dim, layer->norm, dim, normed + r * dim);
            OF(project)(s, layer, normed, thread, threads, tile, low, qkv);
            if (!ff_proj) // a parallel block
                OF(gate)(s, layer, (const T *)layer->in_proj + width * dim, normed, thread, threads, tile, low, hidden);
#pragma omp barrier
            share(b * s->heads, together, thread, threads, &start, &stop);
            for (long i = start; i < stop; i += together)
                OF(attend)(s, layer, i / s->heads, i % s->heads, together, first[i / s->heads], lengths[i / s->heads],
                           qkv + i / s->heads * width, cosines, sines, mine, tile, attended + i * s->dim_head);
#pragma omp barrier
            OF(add_output)(s, layer->attn_out, attended, q_dim, thread, threads, tile, x);
            if (!ff_proj) OF(add_output)(s, layer->ff_out, hidden, s->inner, thread, threads, tile, x);
            OF(add_adapter)(s, layer, OUTPUT, attended, q_dim, thread, threads, low, x);
            if (ff_proj) {
#pragma omp barrier
                for (long r = 0; r < b; r++) OF(normalise)(s, x + r * dim, layer->ff_norm, dim, normed + r * dim);
                OF(gate)(s, layer, ff_proj, normed, thread, threads, tile, low, hidden);
#pragma omp barrier
                OF(add_output)(s, layer->ff_out, hidden, s->inner, thread, threads, tile, x);
            }
            OF(add_adapter)(s, layer, FF_OUT, hidden, s->inner, thread, threads, low, x);
#pragma omp barrier
        }
    }
}
