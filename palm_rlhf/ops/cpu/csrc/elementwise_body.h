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
