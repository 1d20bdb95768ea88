// From the INT4 linear's integer sums to its outputs, in the order of operations of
// kernels/linear/reference.py: integer sums to float32 once, products and sums in float32,
// rounded once to the type of the output.
//
//   without spans   y = sum * token_step * step + constant
//   with spans      y = (sum_0 * step_0 + sum_1 * step_1 + ...) * token_step + constant
//
// A missing token step or constant is replaced by what changes no bit: 1 and -0. A sum is of
// (code - token_zero) * (weight - zero); what was summed is code * (weight + offset), and
//
//   sum = what was summed - (offset + zero) * sum of codes - token_zero * weight_sum

#pragma once

#include <stdint.h>
#include <string.h>
#include <type_traits>  // integral_constant, a type without code

#include "kernels.h"
#include "linear/layout.h"
#include "numbers/vectors.h"

namespace {

// What is subtracted from the sums: the offset alone, zero points too, a token's zero point too.
enum class Terms { OFFSET, ZEROS, TOKEN_ZEROS };

inline Terms terms_of(const LinearArguments &a)
{
    return a.token_zero ? Terms::TOKEN_ZEROS : a.zero_points ? Terms::ZEROS : Terms::OFFSET;
}

template <Terms Which> using TermsConstant = std::integral_constant<Terms, Which>;

// Calls `function` with the terms as a type, so that no loop asks for them.
template <class Function> MQ_INLINE void with_terms(Terms terms, const Function &function)
{
    if (terms == Terms::OFFSET)
        function(TermsConstant<Terms::OFFSET>());
    else if (terms == Terms::ZEROS)
        function(TermsConstant<Terms::ZEROS>());
    else
        function(TermsConstant<Terms::TOKEN_ZEROS>());
}

template <int Type> using TypeConstant = std::integral_constant<int, Type>;

// Likewise the outputs' type.
template <class Function> MQ_INLINE void with_type(int type, const Function &function)
{
    if (type == MQ_FLOAT32)
        function(TypeConstant<MQ_FLOAT32>());
    else if (type == MQ_BFLOAT16)
        function(TypeConstant<MQ_BFLOAT16>());
    else
        function(TypeConstant<MQ_FLOAT16>());
}

// Per output of one block, `lanes` apart from span to span.
struct OutputValues {
    float *step;          // [spans][lanes]
    int32_t *zero;        // [spans][lanes], the weights' offset included; not for Terms::OFFSET
    int32_t *weight_sum;  // [spans][lanes]; null without zero points of tokens
    float *constant;      // [lanes]
    int64_t first;        // output
    int64_t count;        // outputs, fewer in the last block
};

// Per token of one span.
struct TokenValues {
    int32_t sum, zero;
};

// [count, spans] to [spans, Lanes], with 0 where there are no outputs.
template <int Lanes> void turn_steps(const float *from, int64_t count, int64_t spans, float *to)
{
    const int64_t fours = count == Lanes ? spans / 4 * 4 : 0;
    for (int64_t i = 0; i < Lanes; i += 4) {
        for (int64_t span = 0; span < fours; span += 4)
            transpose(from + i * spans + span, 4 * spans, 4 * Lanes, to + span * Lanes + i);
    }
    for (int64_t span = fours; span < spans; ++span) {
        for (int64_t i = 0; i < Lanes; ++i)
            to[span * Lanes + i] = i < count ? from[i * spans + span] : 0.0f;
    }
}

// Likewise, each with `offset` added; null: the offset alone.
template <int Lanes, class Integer>
void turn_integers(const Integer *from, int64_t count, int64_t spans, int32_t offset, int32_t *to)
{
    // No question within a loop, and one vector after another: it is a part of decoding a token.
    if (!from || count < Lanes) {
        for (int64_t span = 0; span < spans; ++span) {
            for (int64_t i = 0; i < Lanes; ++i)
                to[span * Lanes + i] = i < count ? offset : 0;
            for (int64_t i = 0; from && i < count; ++i)
                to[span * Lanes + i] += from[i * spans + span];
        }
    } else if (spans == 1) {
        for (int i = 0; i < Lanes; ++i)
            to[i] = offset + from[i];
    } else {
        for (int64_t span = 0; span < spans; ++span) {
            for (int i = 0; i < Lanes; ++i)
                to[span * Lanes + i] = offset + from[i * spans + span];
        }
    }
}

template <class Number>
MQ_INLINE void prefetch_numbers(const Number *from, int64_t at, int64_t count)
{
    constexpr int64_t of_line = 64 / int64_t(sizeof(Number));
    for (int64_t i = 0; i < count; i += of_line)
        __builtin_prefetch(from + at + i);
}

template <class Set>
void load_outputs(const LinearArguments &a, const Shape<Set> &shape, int64_t block,
                  OutputValues &values)
{
    constexpr int lanes = Shape<Set>::lanes;
    values.first = block * shape.outputs;
    values.count = smaller(shape.outputs, shape.n - values.first);
    const int64_t at = values.first * shape.spans;
    turn_steps<lanes>(a.weight_step + at, values.count, shape.spans, values.step);
    if (terms_of(a) != Terms::OFFSET)
        turn_integers<lanes>(a.zero_points ? a.zero_points + at : nullptr, values.count,
                             shape.spans, shape.offset(), values.zero);
    if (a.token_zero)
        turn_integers<lanes>(a.weight_sums + at, values.count, shape.spans, 0, values.weight_sum);
    const int64_t constants = a.constant ? values.count : 0;
    for (int64_t i = 0; i < constants; ++i)
        values.constant[i] = a.constant[values.first + i];
    for (int64_t i = constants; i < lanes; ++i)
        values.constant[i] = -0.0f;
}

// Asks for what `load_outputs` will read of a block, which else waits for memory line by line.
// Longer runs than a few spans' are followed by the processor itself.
template <class Set>
void prefetch_values(const LinearArguments &a, const Shape<Set> &shape, int64_t block)
{
    constexpr int64_t FEW = 4;
    if (block >= shape.blocks || shape.spans > FEW)
        return;
    const int64_t first = block * shape.outputs;
    const int64_t count = smaller(shape.outputs, shape.n - first);
    prefetch_numbers(a.weight_step, first * shape.spans, count * shape.spans);
    if (a.zero_points)
        prefetch_numbers(a.zero_points, first * shape.spans, count * shape.spans);
    if (a.token_zero)
        prefetch_numbers(a.weight_sums, first * shape.spans, count * shape.spans);
    if (a.constant)
        prefetch_numbers(a.constant, first, count);
}

// One register of float32(sum of the header), from output `at` of a block on. Its integers are
// unsigned, because what is subtracted may pass 2^31 where the difference does not; so may the sum of
// bytes, or of the two nibbles.
template <class Set, Form Stored, Terms Which>
MQ_INLINE typename Set::Floats centred(const int32_t *sums, const OutputValues &values,
                                       int64_t span, TokenValues token, int at)
{
    using Words = typename Set::Words;
    constexpr int planes = planes_of(Stored);
    const int32_t *const low = sums + at / Set::outputs * planes * Set::outputs + at % Set::outputs;
    Words both = load_vector<Words>(low);
    if (planes == 2)
        both += 16 * load_vector<Words>(low + Set::outputs);
    const int64_t of_span = span * Shape<Set>::lanes + at;
    if (Which == Terms::OFFSET)
        both -= uint32_t(token.sum) * uint32_t(offset_of<Set>(Stored));
    else
        both -= load_vector<Words>(values.zero + of_span) * uint32_t(token.sum);
    if (Which == Terms::TOKEN_ZEROS)
        both -= load_vector<Words>(values.weight_sum + of_span) * uint32_t(token.zero);
    return __builtin_convertvector(reinterpret_vector<typename Set::Integers>(both),
                                   typename Set::Floats);
}

// One register, from output `at` of a block on: the sums of a finished span times its steps, and on
// top of what the spans before it came to.
template <class Set, Form Stored, Terms Which>
MQ_INLINE typename Set::Floats with_span(const int32_t *sums, const float *floats,
                                         const OutputValues &values, int64_t span,
                                         TokenValues token, int at)
{
    using Floats = typename Set::Floats;
    const float *const step = values.step + span * Shape<Set>::lanes;
    const Floats sum = centred<Set, Stored, Which>(sums, values, span, token, at) *
                       load_vector<Floats>(step + at);
    return span > 0 ? load_vector<Floats>(floats + at) + sum : sum;
}

template <class Set, Form Stored, Terms Which>
MQ_INLINE void add_span(const int32_t *sums, const OutputValues &values, int64_t span,
                        TokenValues token, float *floats)
{
    for (int i = 0; i < Shape<Set>::lanes / planes_of(Stored); i += Set::width)
        store_vector(with_span<Set, Stored, Which>(sums, floats, values, span, token, i),
                     floats + i);
}

// One register of outputs, rounded to their type.
template <class Set, int Type> MQ_INLINE void store_rounded(const typename Set::Floats &y, uint8_t *to)
{
    if (Type == MQ_FLOAT32) {
        store_vector(y, to);
    } else if (Type == MQ_BFLOAT16) {
        store_vector(to_bfloat16<Set>(y), to);
    } else {
        float wide[Set::width];
        uint16_t half[Set::width];
        store_vector(y, wide);
        Set::template store_float16<Set::width>(wide, half);
        memcpy(to, half, sizeof half);
    }
}

// The outputs of a block of one token; `to` has room for all of them.
template <class Set, Form Stored, Terms Which, int Type>
MQ_INLINE void scale_sums(const int32_t *sums, const OutputValues &values, TokenValues token,
                          float token_step, uint8_t *to)
{
    using Floats = typename Set::Floats;
    for (int i = 0; i < Shape<Set>::lanes / planes_of(Stored); i += Set::width) {
        const Floats scaled = centred<Set, Stored, Which>(sums, values, 0, token, i) *
                              token_step * load_vector<Floats>(values.step + i);
        const Floats y = scaled + load_vector<Floats>(values.constant + i);
        store_rounded<Set, Type>(y, to + i * bytes_of(Type));
    }
}

// Likewise the last span's sums; the first ones' are in `floats`.
template <class Set, Form Stored, Terms Which, int Type>
MQ_INLINE void scale_spans(const int32_t *sums, const float *floats, const OutputValues &values,
                           int64_t span, TokenValues token, float token_step, uint8_t *to)
{
    using Floats = typename Set::Floats;
    for (int i = 0; i < Shape<Set>::lanes / planes_of(Stored); i += Set::width) {
        const Floats scaled =
            with_span<Set, Stored, Which>(sums, floats, values, span, token, i) * token_step;
        const Floats y = scaled + load_vector<Floats>(values.constant + i);
        store_rounded<Set, Type>(y, to + i * bytes_of(Type));
    }
}

}  // namespace
