// The functions of elementwise.c for elements of type T.

// out = silu(gate) * value, each with n elements.
void OF(swiglu)(const T *gate, const T *value, T *out, long n, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < n; i++) {
        float g = OF(load)(gate[i]);
        out[i] = OF(store)(g / (1.0f + exp_(-g)) * OF(load)(value[i]));
    }
}

// The gradients of gate and value, and the hidden units, computed again; d_value may be the memory of d_hidden.
void OF(swiglu_backward)(const T *d_hidden, const T *gate, const T *value, T *d_gate, T *d_value, T *hidden, long n,
                         int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < n; i++) {
        float d = OF(load)(d_hidden[i]), g = OF(load)(gate[i]), v = OF(load)(value[i]);
        float sigmoid = 1.0f / (1.0f + exp_(-g)), silu = g * sigmoid;
        d_gate[i] = OF(store)(d * v * sigmoid * (1.0f + g - silu));
        d_value[i] = OF(store)(d * silu);
        hidden[i] = OF(store)(silu * v);
    }
}

static float OF(inverse_rms)(const T *x, long n, double eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long k = 0; k < n; k++) sum += OF(load)(x[k]) * OF(load)(x[k]);
    return 1 / sqrtf(sum / n + (float)eps);
}

// out = x / sqrt(mean(x^2) + eps) * weight, for rows of n elements.
void OF(rms_norm)(const T *x, const float *weight, T *out, double eps, long rows, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, ROWS) if (rows > ROWS)
    for (long row = 0; row < rows; row++) {
        const T *from = x + row * n;
        T *to = out + row * n;
        float scale = OF(inverse_rms)(from, n, eps);
#pragma omp simd
        for (long k = 0; k < n; k++) to[k] = OF(store)(OF(load)(from[k]) * scale * weight[k]);
    }
}

// The gradients of x, and of the weight for every ROWS rows, `rows/ROWS n`, unless `d_weight` is null.
void OF(rms_norm_backward)(const T *d_out, const T *x, const float *weight, T *d_x, float *d_weight, double eps,
                           long rows, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > ROWS)
    for (long first = 0; first < rows; first += ROWS) {
        float *sums = d_weight ? d_weight + first / ROWS * n : 0;
        if (sums) memset(sums, 0, n * sizeof(float));
        for (long row = first; row < rows && row < first + ROWS; row++) {
            const T *d = d_out + row * n, *from = x + row * n;
            T *to = d_x + row * n;
            float scale = OF(inverse_rms)(from, n, eps), dot = 0;
#pragma omp simd reduction(+ : dot)
            for (long k = 0; k < n; k++) dot += OF(load)(d[k]) * weight[k] * OF(load)(from[k]);
            float pull = dot * scale * scale / n;
#pragma omp simd
            for (long k = 0; k < n; k++)
                to[k] = OF(store)(scale * (OF(load)(d[k]) * weight[k] - OF(load)(from[k]) * pull));
            if (!sums) continue;
#pragma omp simd
            for (long k = 0; k < n; k++) sums[k] += OF(load)(d[k]) * OF(load)(from[k]) * scale;
        }
    }
}

// Rotates every head of every position, `b n h d`, by the tables, `b|1 n h|1 d`. An entry and the one half a head away
// are a pair; the sines of the first half are negative.
void OF(rotate)(const Rotation *s, const T *x, const float *cosines, const float *sines, T *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long token = 0; token < s->batch * s->length; token++) {
        long batch = token / s->length, position = token % s->length, half = s->dim / 2;
        for (long head = 0; head < s->heads; head++) {
            const T *from = x + batch * s->x_strides[0] + position * s->x_strides[1] + head * s->x_strides[2];
            T *to = out + batch * s->out_strides[0] + position * s->out_strides[1] + head * s->out_strides[2];
            long table = batch * s->table_batch_stride + position * s->table_position_stride;
            table += head * s->table_head_stride;
            const float *c = cosines + table, *sine = sines + table;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float first = OF(load)(from[i]), second = OF(load)(from[i + half]);
                to[i] = OF(store)(first * c[i] + second * sine[i] * s->sign);
                to[i + half] = OF(store)(second * c[i + half] + first * sine[i + half] * s->sign);
            }
        }
    }
}
