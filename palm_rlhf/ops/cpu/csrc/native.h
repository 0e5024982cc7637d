// Shared by the kernels: element types, exp, and how work is split among threads.

#pragma once
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16; // the upper half of a float

static inline float load_f32(float x) { return x; }

static inline float load_bf16(bfloat16 x) {
    union {
        uint32_t bits;
        float value;
    } wide = {(uint32_t)x << 16};
    return wide.value;
}

static inline double load_f64(double x) { return x; }

static inline float store_f32(float x) { return x; }

static inline double store_f64(double x) { return x; }

// Rounds to nearest, ties to even; NaN stays NaN.
static inline bfloat16 store_bf16(float x) {
    union {
        float value;
        uint32_t bits;
    } wide = {x};
    uint32_t rounded = (wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16;
    return (bfloat16)(x == x ? rounded : 0x7fc0);
}

// e^x for x clamped to [-87, 88], to 2 units in the last place, in operations that vectorise (expf of Cephes).
static inline float exp_(float x) {
    float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union {
        int32_t bits;
        float value;
    } power = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * power.value;
}

// The range [*start, *stop) of `total` items for thread `thread` of `threads`, cut at multiples of `unit`.
static inline void share(long total, long unit, int thread, int threads, long *start, long *stop) {
    long units = (total + unit - 1) / unit;
    *start = units * thread / threads * unit;
    *stop = units * (thread + 1) / threads * unit;
    if (*start > total) *start = total;
    if (*stop > total) *stop = total;
}
