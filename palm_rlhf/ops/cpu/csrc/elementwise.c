// What stands between a block's products, each in one pass over memory. Arithmetic is float32.

#include "native.h"

typedef struct {
    long batch, length, heads, dim;
    long x_strides[3], out_strides[3];          // of batch, position and head, in elements; d is dense
    long table_batch_stride, table_head_stride; // 0 where one row serves all; of a position: what its heads take
    long table_position_stride;
    float sign; // of the sines: -1 turns back
} Rotation;

#define T float
#define OF(name) name##_f32
#include "elementwise_body.h"
#undef T
#undef OF

#define T bfloat16
#define OF(name) name##_bf16
#include "elementwise_body.h"
