// From the INT4 linear's integer sums to its outputs, in the order of operations of
// kernels/linear/reference.py: integer sums to float32 once, products and sums in float32,
// rounded once to the type of the output.
//
//   without groups   y = sum * token_step * step + bias
//   with groups      y = (sum_0 * step_0 + sum_1 * step_1 + ...) * token_step + bias
//
// A missing token step or bias is replaced by what changes no bit: 1 and -0.

#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "linear/layout.h"
#include "numbers/vectors.h"

namespace {

// Per output of one block, `lanes` apart from group to group.
struct OutputValues {
    float *step;    // [groups][lanes]
    int32_t *zero;  // [groups][lanes], the weights' offset included; null without zero points
    float *bias;    // [lanes]
    int64_t first;  // output
    int64_t count;  // outputs, fewer in the last block
};

// [count, groups] to [groups, Lanes], with 0 where there are no outputs.
template <int Lanes> void turn_steps(const float *from, int64_t count, int64_t groups, float *to)
{
    const int64_t fours = count == Lanes ? groups / 4 * 4 : 0;
    for (int64_t i = 0; i < Lanes; i += 4) {
        for (int64_t group = 0; group < fours; group += 4)
            transpose(from + i * groups + group, groups, Lanes, to + group * Lanes + i);
    }
    for (int64_t group = fours; group < groups; ++group) {
        for (int64_t i = 0; i < Lanes; ++i)
            to[group * Lanes + i] = i < count ? from[i * groups + group] : 0.0f;
    }
}

// Likewise, with the weights' offset added.
template <int Lanes>
void turn_zeros(const int8_t *from, int64_t count, int64_t groups, int32_t offset, int32_t *to)
{
    for (int64_t i = 0; i < Lanes; ++i) {
        for (int64_t group = 0; group < groups; ++group)
            to[group * Lanes + i] = i < count ? offset + *from++ : 0;
    }
}

template <class Set>
void load_outputs(const LinearArguments &a, const Shape<Set> &shape, int64_t block,
                  OutputValues &values)
{
    constexpr int lanes = Shape<Set>::lanes;
    values.first = block * shape.outputs;
    values.count = smaller(shape.outputs, shape.n - values.first);
    const int64_t at = values.first * shape.groups;
    turn_steps<lanes>(a.weight_step + at, values.count, shape.groups, values.step);
    if (a.zero_points) {
        turn_zeros<lanes>(a.zero_points + at, values.count, shape.groups, shape.offset(),
                          values.zero);
    } else {
        values.zero = nullptr;
    }
    for (int64_t i = 0; i < lanes; ++i) {
        const bool biased = a.bias && i < values.count;
        values.bias[i] = biased ? load_element(a.bias, values.first + i, a.type) : -0.0f;
    }
}

// One register of float32(sum of (weight code - zero point) * activation code), from output `at` of
// a block on. Its integers are unsigned, because what is subtracted may pass 2^31 where the
// difference does not; so may the two nibbles' sum.
template <class Set, int Planes, bool Zeros>
MQ_INLINE typename Set::Floats centred(const int32_t *sums, const int32_t *zero, int32_t token_sum,
                                       int at)
{
    using Words = typename Set::Words;
    const int32_t *const low = sums + at / Set::outputs * Planes * Set::outputs + at % Set::outputs;
    Words both = load_vector<Words>(low);
    if (Planes == 2)
        both += 16 * load_vector<Words>(low + Set::outputs);
    if (Zeros)
        both -= load_vector<Words>(zero + at) * uint32_t(token_sum);
    else
        both -= uint32_t(token_sum) * (Planes == 2 ? 128 : 8);
    return __builtin_convertvector(reinterpret_vector<typename Set::Integers>(both),
                                   typename Set::Floats);
}

// A finished group: the sums of one token times the group's steps are the first, or are added.
template <class Set, int Planes, bool Zeros>
MQ_INLINE void add_group(const int32_t *sums, const OutputValues &values, int64_t group,
                         int32_t token_sum, float *floats)
{
    using Floats = typename Set::Floats;
    constexpr int lanes = Shape<Set>::lanes;
    const float *const step = values.step + group * lanes;
    const int32_t *const zero = Zeros ? values.zero + group * lanes : nullptr;
    for (int i = 0; i < lanes / Planes; i += Set::width) {
        Floats sum =
            centred<Set, Planes, Zeros>(sums, zero, token_sum, i) * load_vector<Floats>(step + i);
        if (group > 0)
            sum = load_vector<Floats>(floats + i) + sum;
        store_vector(sum, floats + i);
    }
}

template <class Set, int Planes, bool Zeros>
MQ_INLINE void scale_sums(const int32_t *sums, const OutputValues &values, int32_t token_sum,
                          float token_step, float *y)
{
    using Floats = typename Set::Floats;
    for (int i = 0; i < Shape<Set>::lanes / Planes; i += Set::width) {
        const Floats scaled = centred<Set, Planes, Zeros>(sums, values.zero, token_sum, i) *
                              token_step * load_vector<Floats>(values.step + i);
        store_vector<Floats>(scaled + load_vector<Floats>(values.bias + i), y + i);
    }
}

template <class Set, int Planes>
MQ_INLINE void scale_floats(const float *floats, const OutputValues &values, float token_step,
                            float *y)
{
    using Floats = typename Set::Floats;
    for (int i = 0; i < Shape<Set>::lanes / Planes; i += Set::width) {
        const Floats scaled = load_vector<Floats>(floats + i) * token_step;
        store_vector<Floats>(scaled + load_vector<Floats>(values.bias + i), y + i);
    }
}

// The outputs of a block that exist; all but the last block's are a copy of known size.
template <int Outputs, class Element>
MQ_INLINE void copy_outputs(const Element *from, const OutputValues &values, uint8_t *row)
{
    uint8_t *const to = row + values.first * int64_t(sizeof(Element));
    if (values.count == Outputs)
        memcpy(to, from, Outputs * sizeof(Element));
    else
        memcpy(to, from, size_t(values.count) * sizeof(Element));
}

// Rounds a block's outputs of one token and writes them.
template <class Set, int Planes>
MQ_INLINE void store_outputs(const float *y, const OutputValues &values, int type, uint8_t *row)
{
    constexpr int outputs = Shape<Set>::lanes / Planes;
    if (type == MQ_FLOAT32) {
        copy_outputs<outputs>(y, values, row);
        return;
    }
    uint16_t half[outputs];
    if (type == MQ_BFLOAT16)
        store_bfloat16<Set, outputs>(y, half);
    else
        Set::template store_float16<outputs>(y, half);
    copy_outputs<outputs>(half, values, row);
}

}  // namespace
