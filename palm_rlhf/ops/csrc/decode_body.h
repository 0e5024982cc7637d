// The functions of decode.c for weights of type T and activations of type A.

static inline A OF(dot)(const T *w, const A *x, long n) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long k = 0; k < n; k++) sum += OF(load)(w[k]) * x[k];
    return sum;
}

// out[0..3] = four rows of w times x.
static inline void OF(dots)(const T *restrict w, const A *restrict x, long n, A *restrict out) {
    const T *w1 = w + n, *w2 = w1 + n, *w3 = w2 + n;
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (long k = 0; k < n; k++) {
        s0 += OF(load)(w[k]) * x[k];
        s1 += OF(load)(w1[k]) * x[k];
        s2 += OF(load)(w2[k]) * x[k];
        s3 += OF(load)(w3[k]) * x[k];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

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

// A query or key: normalised where there is a weight, then turned by its angles (the tables' sines carry the sign).
static void OF(turned)(const A *x, const T *norm, const A *cosines, const A *sines, long n, A eps,
                       A *buffer, A *out) {
    if (norm) OF(layer_norm)(x, norm, n, eps, buffer);
    else memcpy(buffer, x, n * sizeof(A));
    for (long k = 0; k < n; k++) out[k] = buffer[k] * cosines[k] + buffer[k < n / 2 ? k + n / 2 : k - n / 2] * sines[k];
}

// One query head of one row over the cached keys from `first` on and its own; it leaves its own in the cache if asked.
static void OF(attend)(const Shape *s, const Layer *layer, long row, long head, long first, long length, const A *qkv,
                       const A *cosines, const A *sines, A *scratch, A *out) {
    long d = s->dim_head, kv = head / (s->heads / s->kv_heads);
    long table = s->table_heads == 1 ? 0 : d;
    cosines += (s->table_rows == 1 ? 0 : row) * s->table_heads * d;
    sines += (s->table_rows == 1 ? 0 : row) * s->table_heads * d;
    A *q = scratch, *k = q + d, *buffer = k + d, *scores = buffer + d;
    const T *q_norm = layer->q_norm, *k_norm = layer->k_norm;
    OF(turned)(qkv + head * d, q_norm ? q_norm + head * d : 0, cosines + head * table, sines + head * table, d, s->eps,
               buffer, q);
    OF(turned)(qkv + (s->heads + kv) * d, k_norm ? k_norm + kv * d : 0, cosines + (s->heads + kv) * table,
               sines + (s->heads + kv) * table, d, s->eps, buffer, k);
    const A *v = qkv + (s->heads + s->kv_heads + kv) * d;
    T *keys = (T *)layer->keys + (row * s->kv_heads + kv) * s->capacity * d;
    T *values = (T *)layer->values + (row * s->kv_heads + kv) * s->capacity * d;

    A scale = 1 / (A)sqrt(d), most, sum = 0, own = 0;
    if (first > length) first = length; // a pad, whose numbers nobody wants, but which must be numbers
    for (long c = 0; c < d; c++) own += q[c] * OF(load)(OF(store)(k[c]));
    long j = first;
    for (; j + QUAD <= length; j += QUAD) OF(dots)(keys + j * d, q, d, scores + j);
    for (; j < length; j++) scores[j] = OF(dot)(keys + j * d, q, d);
    scores[length] = most = own;
    for (j = first; j < length; j++) most = scores[j] > most ? scores[j] : most;
#pragma omp simd reduction(+ : sum)
    for (long j = first; j <= length; j++) sum += scores[j] = EXP((scores[j] - most) * scale);
    for (long c = 0; c < d; c++) out[c] = scores[length] * OF(load)(OF(store)(v[c]));
    for (long j = first; j < length; j++)
        for (long c = 0; c < d; c++) out[c] += scores[j] * OF(load)(values[j * d + c]);
    for (long c = 0; c < d; c++) out[c] /= sum;

    if (head % (s->heads / s->kv_heads) == 0) // nobody reads this place of the cache before the next token
        for (long c = 0; c < d; c++) {
            keys[length * d + c] = OF(store)(k[c]);
            values[length * d + c] = OF(store)(v[c]);
        }
}

// The share of one thread of the input projection: `b dim -> b (h + 2 hk) d`, and the hidden units, `b inner`; `tile`
// has room for `2 b TILE`.
static void OF(project)(const Shape *s, const T *in_proj, const A *normed, int thread, int threads, A (*tile)[TILE],
                        A *qkv, A *hidden) {
    long dim = s->dim, width = (s->heads + 2 * s->kv_heads) * s->dim_head, b = s->batch, start, stop;
    A(*gate)[TILE] = tile, (*value)[TILE] = tile + padded(b);
    share(width, TILE, thread, threads, &start, &stop);
    for (long i = start; i < stop; i += TILE) {
        long rows = stop - i < TILE ? stop - i : TILE;
        OF(product)(in_proj + i * dim, normed, dim, rows, b, tile);
        for (long r = 0; r < b; r++) memcpy(qkv + r * width + i, tile[r], rows * sizeof(A));
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

// The share of one thread of x + attended @ attn_out.T + hidden @ ff_out.T: `b dim`.
static void OF(sum_up)(const Shape *s, const Layer *layer, const A *x, const A *attended, const A *hidden, int thread,
                       int threads, A (*tile)[TILE], A *out) {
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
}

// x: `b dim`, in and out; lengths: `b`, the tokens of each row in its cache, which sees those from `first` on; scratch:
// as many numbers as `decode_scratch` says.
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
        A *mine = tile[2 * padded(b)], *from = x, *to = next;
        long start, stop;
        for (const Layer *layer = layers; layer < layers + s->depth; layer++) {
            for (long r = 0; r < b; r++)
                OF(layer_norm)(from + r * s->dim, layer->norm, s->dim, s->eps, normed + r * s->dim);
            OF(project)(s, layer->in_proj, normed, thread, threads, tile, qkv, hidden);
#pragma omp barrier
            share(b * s->heads, 1, thread, threads, &start, &stop);
            for (long i = start; i < stop; i++)
                OF(attend)(s, layer, i / s->heads, i % s->heads, first[i / s->heads], lengths[i / s->heads],
                           qkv + i / s->heads * width, cosines, sines, mine, attended + i * s->dim_head);
#pragma omp barrier
            OF(sum_up)(s, layer, from, attended, hidden, thread, threads, tile, to);
            A *swapped = from;
            from = to, to = swapped;
#pragma omp barrier
        }
        if (thread == 0 && from != x) memcpy(x, from, b * s->dim * sizeof(A));
    }
}
