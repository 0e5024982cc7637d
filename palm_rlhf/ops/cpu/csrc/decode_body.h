// The functions of decode.c for weights of type T and activations of type A.

static void OF(layer_norm)(const A *x, const T *weight, long n, A eps, A *out) {
    A mean = 0, variance = 0;
#pragma omp simd reduction(+ : mean)
    for (long k = 0; k < n; k++) mean += x[k];
    mean /= n;
#pragma omp simd reduction(+ : variance)
    for (long k = 0; k < n; k++) variance += (x[k] - mean) * (x[k] - mean);
    A scale = 1 / (A)sqrt(variance / n + eps);
    for (long k = 0; k < n; k++) out[k] = (x[k] - mean) * scale * OF(load)(weight[k]);
}

// Normalises a query or key if there is a weight, then rotates it; the sines of the first half are negative.
static void OF(turned)(const A *x, const T *norm, const A *cosines, const A *sines, long n, A eps,
                       A *buffer, A *out) {
    if (norm) OF(layer_norm)(x, norm, n, eps, buffer);
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
    long d = s->dim_head, kv = head / (s->heads / s->kv_heads);
    long table = s->table_heads == 1 ? 0 : d;
    cosines += (s->table_rows == 1 ? 0 : row) * s->table_heads * d;
    sines += (s->table_rows == 1 ? 0 : row) * s->table_heads * d;
    A *q = scratch, *k = q + QUAD * d, *v = k + d, *buffer = v + d, *scores = buffer + d;
    T *own = (T *)buffer;
    const T *q_norm = layer->q_norm, *k_norm = layer->k_norm;
    for (long h = head; h < head + heads; h++)
        OF(turned)(qkv + h * d, q_norm ? q_norm + h * d : 0, cosines + h * table, sines + h * table, d, s->eps, buffer,
                   q + (h - head) * d);
    OF(turned)(qkv + (s->heads + kv) * d, k_norm ? k_norm + kv * d : 0, cosines + (s->heads + kv) * table,
               sines + (s->heads + kv) * table, d, s->eps, buffer, k);
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

// Adds the output of an adapter, x @ down @ up times its scale, entries `first` to `stop`, to `out[b * stride +
// entry]`. down: `n rank`, up: `rank width`; `low` has room for `b rank`.
static void OF(adapt)(const Shape *s, const T *down, const T *up, const A *x, long n, long width, long first, long stop,
                      A *low, A *out, long stride) {
    long b = s->batch, rank = s->rank;
    for (long t = 0; t < b; t++, low += rank) {
        memset(low, 0, rank * sizeof(A));
        for (long k = 0; k < n; k++)
            for (long r = 0; r < rank; r++) low[r] += x[t * n + k] * OF(load)(down[k * rank + r]);
        for (long r = 0; r < rank; r++)
            for (long i = first; i < stop; i++)
                out[t * stride + i] += (A)s->adapter_scale * low[r] * OF(load)(up[r * width + i]);
    }
}

// The part of one thread in the input projection, `b dim -> b (h + 2 hk) d`, and in the hidden units, `b inner`. `tile`
// has room for `2 b TILE`, `low` for `b rank`.
static void OF(project)(const Shape *s, const Layer *layer, const A *normed, int thread, int threads, A (*tile)[TILE],
                        A *low, A *qkv, A *hidden) {
    const T *in_proj = layer->in_proj;
    long dim = s->dim, width = (s->heads + 2 * s->kv_heads) * s->dim_head, b = s->batch, start, stop;
    A(*gate)[TILE] = tile, (*value)[TILE] = tile + padded(b);
    share(width, TILE, thread, threads, &start, &stop);
    for (long i = start; i < stop; i += TILE) {
        long rows = stop - i < TILE ? stop - i : TILE;
        OF(product)(in_proj + i * dim, normed, dim, rows, b, tile);
        for (long r = 0; r < b; r++) memcpy(qkv + r * width + i, tile[r], rows * sizeof(A));
    }
    for (long part = 0, begin = 0, end; s->rank && part < OUTPUT; part++, begin = end) {
        end = begin + (part ? s->kv_heads : s->heads) * s->dim_head;
        long first = start > begin ? start : begin, last = stop < end ? stop : end;
        if (first < last)
            OF(adapt)(s, layer->down[part], layer->up[part], normed, dim, end - begin, first - begin, last - begin, low,
                      qkv + begin, width);
    }
    const T *gates = in_proj + width * dim, *values = gates + s->inner * dim;
    share(s->inner, TILE, thread, threads, &start, &stop);
    for (long i = start; i < stop; i += TILE) {
        long rows = stop - i < TILE ? stop - i : TILE;
        OF(product)(gates + i * dim, normed, dim, rows, b, gate);
        OF(product)(values + i * dim, normed, dim, rows, b, value);
        for (long r = 0; r < b; r++)
            for (long k = 0; k < rows; k++)
                hidden[r * s->inner + i + k] = gate[r][k] / (1 + EXP(-gate[r][k])) * value[r][k];
    }
}

// The part of one thread in x + attended @ attn_out.T + hidden @ ff_out.T: `b dim`.
static void OF(sum_up)(const Shape *s, const Layer *layer, const A *x, const A *attended, const A *hidden, int thread,
                       int threads, A (*tile)[TILE], A *low, A *out) {
    long dim = s->dim, inner = s->inner, q_dim = s->heads * s->dim_head, b = s->batch, start, stop;
    A(*more)[TILE] = tile + padded(b);
    share(dim, TILE, thread, threads, &start, &stop);
    for (long i = start; i < stop; i += TILE) {
        long rows = stop - i < TILE ? stop - i : TILE;
        OF(product)((const T *)layer->attn_out + i * q_dim, attended, q_dim, rows, b, tile);
        OF(product)((const T *)layer->ff_out + i * inner, hidden, inner, rows, b, more);
        for (long r = 0; r < b; r++)
            for (long k = 0; k < rows; k++) out[r * dim + i + k] = x[r * dim + i + k] + tile[r][k] + more[r][k];
    }
    if (s->rank && start < stop)
        OF(adapt)(s, layer->down[OUTPUT], layer->up[OUTPUT], attended, q_dim, dim, start, stop, low, out, dim);
}

// The decoding step. x: `b dim`, input and output; lengths: `b`, the tokens of each row in the cache, of which it sees
// those from `first` on; scratch: `decode_scratch` numbers.
void OF(decode)(const Shape *s, const Layer *layers, const A *cosines, const A *sines, const long *first,
                const long *lengths, A *x, A *scratch, int max_threads) {
    long b = s->batch, width = (s->heads + 2 * s->kv_heads) * s->dim_head, q_dim = s->heads * s->dim_head;
    A *next = scratch, *qkv = next + b * s->dim, *hidden = qkv + b * width, *attended = hidden + b * s->inner;
    A *of_threads = attended + b * q_dim;
#pragma omp parallel num_threads(max_threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        A *normed = of_threads + thread * numbers_of_thread(s);
        A(*tile)[TILE] = (A(*)[TILE])(normed + b * s->dim);
        A *low = tile[2 * padded(b)], *mine = low + b * s->rank, *from = x, *to = next;
        long start, stop, together = heads_together(s, threads);
        for (const Layer *layer = layers; layer < layers + s->depth; layer++) {
            for (long r = 0; r < b; r++)
                OF(layer_norm)(from + r * s->dim, layer->norm, s->dim, s->eps, normed + r * s->dim);
            OF(project)(s, layer, normed, thread, threads, tile, low, qkv, hidden);
#pragma omp barrier
            share(b * s->heads, together, thread, threads, &start, &stop);
            for (long i = start; i < stop; i += together)
                OF(attend)(s, layer, i / s->heads, i % s->heads, together, first[i / s->heads], lengths[i / s->heads],
                           qkv + i / s->heads * width, cosines, sines, mine, tile, attended + i * s->dim_head);
#pragma omp barrier
            OF(sum_up)(s, layer, from, attended, hidden, thread, threads, tile, low, to);
            A *swapped = from;
            from = to, to = swapped;
#pragma omp barrier
        }
        if (thread == 0 && from != x) memcpy(x, from, b * s->dim * sizeof(A));
    }
}
