// From the INT4 linear's integer sums to its outputs, in the order of operations of
// kernels/int4_linear/reference.py: integer sums to float32 once, products and sums in float32,
// rounded once to the type of the output.
//
// What is missing (token steps, bias) is replaced by what changes no bit: 1 and -0. Vectors are the
// compilers' own (vector_size), of the width of the instruction set's registers.

#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "linear_layout.h"
#include "linear_types.h"

namespace {

// Per output of one block, `lanes` apart from group to group; unused lanes are 0.
struct OutputValues {
    float *step;    // [groups][lanes]
    int32_t *zero;  // [groups][lanes], the weights' offset included
    float *bias;    // [lanes]
    int64_t first;  // output
    int64_t count;  // outputs, fewer in the last block
};

template <class Set>
void load_outputs(const LinearArguments &a, const Shape<Set> &shape, int64_t block,
                  OutputValues &values)
{
    constexpr int lanes = Shape<Set>::lanes;
    const int32_t offset = shape.planes == 2 ? 128 : 8;
    values.first = block * shape.outputs;
    values.count = smaller(shape.outputs, shape.n - values.first);
    for (int64_t i = 0; i < lanes; ++i) {
        const bool inside = i < values.count;
        const int64_t row = (values.first + i) * shape.groups;
        for (int64_t group = 0; group < shape.groups; ++group) {
            const int32_t zero = inside && a.zero_points ? a.zero_points[row + group] : 0;
            values.step[group * lanes + i] = inside ? a.weight_step[row + group] : 0.0f;
            values.zero[group * lanes + i] = offset + zero;
        }
        const bool biased = inside && a.bias;
        values.bias[i] = biased ? load_element(a.bias, values.first + i, a.type) : -0.0f;
    }
}

// One register of sums of (weight code - zero point) * activation code, from output `at` of a block
// on: both nibbles of a weight together, without their offset. Unsigned, because what is subtracted
// may pass 2^31 where the difference does not.
template <class Set, int Planes>
inline typename Set::Floats centred(const int32_t *sums, const int32_t *zero, int32_t token_sum,
                                    int at)
{
    using Words = typename Set::Words;
    const int32_t *const low = sums + at / Set::outputs * Planes * Set::outputs + at % Set::outputs;
    Words both = load_vector<Words>(low);
    if (Planes == 2)
        both += 16 * load_vector<Words>(low + Set::outputs);
    both -= load_vector<Words>(zero + at) * uint32_t(token_sum);
    return __builtin_convertvector(reinterpret_vector<typename Set::Integers>(both),
                                   typename Set::Floats);
}

// A finished group of input channels: its sums times its steps are added to `floats`.
template <class Set, int Planes>
void add_group(const int32_t *sums, const int32_t *zero, const float *step, int32_t token_sum,
               float *floats)
{
    using Floats = typename Set::Floats;
    for (int i = 0; i < Shape<Set>::lanes / Planes; i += Set::width) {
        const Floats product =
            centred<Set, Planes>(sums, zero, token_sum, i) * load_vector<Floats>(step + i);
        store_vector<Floats>(load_vector<Floats>(floats + i) + product, floats + i);
    }
}

// Without groups: the token's step first.
template <class Set, int Planes>
void scale_sums(const int32_t *sums, const OutputValues &values, int32_t token_sum,
                float token_step, float *y)
{
    using Floats = typename Set::Floats;
    for (int i = 0; i < Shape<Set>::lanes / Planes; i += Set::width) {
        const Floats scaled = centred<Set, Planes>(sums, values.zero, token_sum, i) * token_step *
                              load_vector<Floats>(values.step + i);
        store_vector<Floats>(scaled + load_vector<Floats>(values.bias + i), y + i);
    }
}

// With groups: the token's step last.
template <class Set, int Planes>
void scale_floats(const float *floats, const OutputValues &values, float token_step, float *y)
{
    using Floats = typename Set::Floats;
    for (int i = 0; i < Shape<Set>::lanes / Planes; i += Set::width) {
        const Floats scaled = load_vector<Floats>(floats + i) * token_step;
        store_vector<Floats>(scaled + load_vector<Floats>(values.bias + i), y + i);
    }
}

// Rounds a block's outputs of one token and writes the `count` of them that exist.
template <class Set, int Planes>
void store_outputs(const float *y, const OutputValues &values, int type, void *row)
{
    constexpr int outputs = Shape<Set>::lanes / Planes;
    uint16_t half[outputs];
    const void *from = half;
    if (type == MQ_FLOAT32)
        from = y;
    else if (type == MQ_BFLOAT16)
        store_bfloat16<Set, outputs>(y, half);
    else
        Set::template store_float16<outputs>(y, half);
    const int64_t bytes = element_bytes(type);
    memcpy(static_cast<uint8_t *>(row) + values.first * bytes, from, size_t(values.count * bytes));
}

}  // namespace
