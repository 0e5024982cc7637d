// Products of weights of type T with tokens of type A. The order of additions is always the same, so that the result of
// a token does not depend on the tokens that are computed beside it.
//
// One step reads `span` entries of a row and of a token into registers, multiplies them, and adds the products to a
// register of `lanes` sums.

typedef A OF(sums) __attribute__((vector_size(VECTOR)));
enum { OF(lanes) = VECTOR / sizeof(A) };

#ifdef PAIRS // products of bfloat16 pairs, to which the tokens are rounded
enum { OF(span) = 2 * OF(lanes) };
typedef __m512bh OF(weights), OF(token);

static inline __m512bh OF(read_weights)(const T *w) { return (__m512bh)_mm512_loadu_si512(w); }

static inline __m512bh OF(read_token)(const A *x) {
    return _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + OF(lanes)), _mm512_loadu_ps(x));
}

static inline OF(sums) OF(add_product)(OF(sums) sums, __m512bh w, __m512bh x) { return _mm512_dpbf16_ps(sums, w, x); }
#else
enum { OF(span) = OF(lanes) };
typedef OF(sums) OF(weights), OF(token);

static inline OF(sums) OF(read_token)(const A *x) {
    OF(sums) read;
    memcpy(&read, x, sizeof read);
    return read;
}

static inline OF(sums) OF(read_weights)(const T *w) {
    A wide[OF(lanes)];
    for (int i = 0; i < OF(lanes); i++) wide[i] = OF(load)(w[i]);
    return OF(read_token)(wide);
}

static inline OF(sums) OF(add_product)(OF(sums) sums, OF(sums) w, OF(sums) x) { return sums + w * x; }
#endif

static inline A OF(total)(OF(sums) sums) {
    A lanes[OF(lanes)];
    memcpy(lanes, &sums, sizeof lanes);
    for (int half = OF(lanes) / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// One step with QUAD rows and `tokens` tokens; every caller passes a constant, so that the loops are unrolled.
static inline __attribute__((always_inline)) void OF(step)(const T *const *w, const A *const *x, long k, int tokens,
                                                           OF(sums) (*sums)[QUAD]) {
    OF(weights) rows[QUAD];
#pragma GCC unroll 4
    for (int i = 0; i < QUAD; i++) rows[i] = OF(read_weights)(w[i] + k);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        OF(token) token = OF(read_token)(x[t] + k);
#pragma GCC unroll 4
        for (int i = 0; i < QUAD; i++) sums[t][i] = OF(add_product)(sums[t][i], rows[i], token);
    }
}

// out[t][i] = the product of row i of w and token t, both with `n` entries.
static inline __attribute__((always_inline)) void OF(quad)(const T *const *w, const A *const *x, long n, int tokens,
                                                           A (*out)[TILE]) {
    OF(sums) sums[QUAD][QUAD] = {};
    long k = 0;
    for (; k + OF(span) <= n; k += OF(span)) OF(step)(w, x, k, tokens, sums);
    if (k < n) { // the last entries, padded with zeros
        T w_end[QUAD][OF(span)] = {};
        A x_end[QUAD][OF(span)] = {};
        for (int i = 0; i < QUAD; i++) memcpy(w_end[i], w[i] + k, (n - k) * sizeof(T));
        for (int t = 0; t < tokens; t++) memcpy(x_end[t], x[t] + k, (n - k) * sizeof(A));
        const T *w_ends[QUAD] = {w_end[0], w_end[1], w_end[2], w_end[3]};
        const A *x_ends[QUAD] = {x_end[0], x_end[1], x_end[2], x_end[3]};
        OF(step)(w_ends, x_ends, 0, tokens, sums);
    }
#ifdef __AVX512F__
    if (sizeof(A) == sizeof(float)) {
        __m512 totals = totals_of_16((const __m512(*)[QUAD])sums);
        A by_token[QUAD][QUAD];
        memcpy(by_token, &totals, sizeof totals);
        for (int t = 0; t < tokens; t++) memcpy(out[t], by_token[t], sizeof by_token[t]);
        return;
    }
#endif
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < QUAD; i++) out[t][i] = OF(total)(sums[t][i]);
}

// out = x @ w.T for up to TILE rows of w, `rows n`, and x, `batch n`: `batch TILE`. Meanwhile it prefetches the memory
// after w in equal parts, since the processor does not predict the reads after the end of a row. It prefetches to the
// second-level cache: this is a third faster than to the first level, where few prefetches can be under way.
static inline void OF(product)(const T *w, const A *x, long n, long rows, long batch, A (*out)[TILE]) {
    long part = 0, parts = (batch + QUAD - 1) / QUAD * ((rows + QUAD - 1) / QUAD);
    long lines = rows * n * (long)sizeof(T) / LINE;
    const char *ahead = (const char *)(w + rows * n);
    for (long b = 0; b < batch; b += QUAD)
        for (long i = 0; i < rows; i += QUAD, part++) {
            const T *of_quad[QUAD];
            const A *tokens[QUAD];
            for (int q = 0; q < QUAD; q++) {
                of_quad[q] = w + (i + q < rows ? i + q : rows - 1) * n;
                tokens[q] = x + (b + q < batch ? b + q : batch - 1) * n;
            }
            for (long line = lines * part / parts; line < lines * (part + 1) / parts; line++)
                __builtin_prefetch(ahead + line * LINE, 0, 2);
            A(*to)[TILE] = (A(*)[TILE])(out[b] + i);
            switch (batch - b) {
            case 1: OF(quad)(of_quad, tokens, n, 1, to); break;
            case 2: OF(quad)(of_quad, tokens, n, 2, to); break;
            case 3: OF(quad)(of_quad, tokens, n, 3, to); break;
            default: OF(quad)(of_quad, tokens, n, 4, to);
            }
        }
}
