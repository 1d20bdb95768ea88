// What one instruction set implements: the table that each isa_*.cpp fills and dispatch.cpp reads.
// Arguments were checked by dispatch.cpp; their meaning is in mergequant.h.

#pragma once

#include <stdint.h>

struct LinearArguments {
    const int8_t *codes;
    int64_t stride, m;
    const uint8_t *packed;
    const float *weight_step;
    const int8_t *zero_points;
    const int32_t *weight_sums;
    const float *token_step;
    const int32_t *token_zero;
    const float *constant;
    void *y;
    int type;
    int64_t n, k;
    const int32_t *span_ends;
    int64_t spans;
    int weight_bits, activation_bits;
};

struct TokenArguments {
    const void *x;
    int type;
    int64_t stride, m, k;
    float clip;
    int bits;
    int64_t block;
    int8_t *codes;
    int64_t columns;
    float *step;
    int32_t *zero;
};

struct StaticArguments {
    const void *x;
    int type;
    int64_t stride, m, n;
    const int32_t *index;
    const float *offset;
    int bits;
    int8_t *codes;
    int64_t k, columns;
};

struct HeadArguments {
    const void *x;
    int type;
    int64_t stride, m, heads, width;
    const float *mixing;
    float *y;
};

struct Kernels {
    const char *name;
    int64_t (*linear_bytes)(int64_t n, int64_t k, int weight_bits);
    void (*linear_pack)(const int8_t *codes, int64_t n, int64_t k, int weight_bits,
                        uint8_t *packed);
    int (*linear)(const LinearArguments &);
    int (*token_quant)(const TokenArguments &);
    int (*static_round)(const StaticArguments &);
    int (*hadamard)(const float *x, float *y, int64_t m, int64_t k, int64_t block);
    int (*mix_heads)(const HeadArguments &);
};
