// The operations between the products of a block, each in one pass over memory. They compute in float32.

#include "native.h"

typedef struct {
    long batch, length, heads, dim;
    long x_strides[3], out_strides[3];          // of batch, position and head, in elements; the last axis is dense
    long table_batch_stride, table_head_stride; // 0 if all batch elements, or all heads, share a row of the tables
    long table_position_stride;
    float sign; // of the sines; -1 rotates back
} Rotation;

enum { ROWS = 32 }; // of RMSNorm that one thread takes at a time, so that no sum depends on the number of threads

#define T float
#define OF(name) name##_f32
#include "elementwise_body.h"
#undef T
#undef OF

#define T bfloat16
#define OF(name) name##_bf16
#include "elementwise_body.h"
