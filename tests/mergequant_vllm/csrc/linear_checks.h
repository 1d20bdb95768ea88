// The INT4 linear against its definition (kernels/linear/reference.py) in 64-bit sums.

#pragma once

#include "numbers.h"

// All codes random, or all of each operand at one end of its range.
enum class Codes { RANDOM, LOW_LOW, LOW_HIGH, HIGH_LOW, HIGH_HIGH };

struct LinearCase {
    int64_t m, n, k;
    std::vector<int32_t> ends;  // of the spans; empty: one step per output channel
    int weight_bits, activation_bits;
    bool zero_points, token_step, token_zero, constant;
    int type;
    int64_t gap;  // between rows of activations
    Codes codes;
    float step;  // size of the weight's steps
};

// Ends of groups of `group` channels; 0: none.
inline std::vector<int32_t> groups_of(int64_t k, int64_t group)
{
    std::vector<int32_t> ends;
    for (int64_t end = group; group && end - group < k; end += group)
        ends.push_back(int32_t(end < k ? end : k));
    return ends;
}

// Ends of segments of random lengths.
inline std::vector<int32_t> segments_of(int64_t k, Random &random)
{
    std::vector<int32_t> ends;
    int64_t end = 0;
    while (random.between(0, 4) && (end += 32 * random.between(1, 1 + k / 64)) < k)
        ends.push_back(int32_t(end));
    ends.push_back(int32_t(k));
    return ends;
}

inline std::vector<int32_t> some_spans(int64_t k, Random &random)
{
    if (random.coin())
        return segments_of(k, random);
    return groups_of(k, random.one_of<int64_t>({0, 0, 32, 64, 96, 128}));
}

inline std::vector<int8_t> make_codes(Random &random, int64_t count, int bits, Codes kind, bool low)
{
    if (kind == Codes::RANDOM)
        return codes_between(random, count, lowest(bits), highest(bits));
    return std::vector<int8_t>(size_t(count), int8_t(low ? lowest(bits) : highest(bits)));
}

class LinearCheck {
public:
    LinearCheck(const LinearCase &form, Random &random) : c(form)
    {
        const bool weights_low = c.codes == Codes::LOW_LOW || c.codes == Codes::LOW_HIGH;
        const bool activations_low = c.codes == Codes::LOW_LOW || c.codes == Codes::HIGH_LOW;
        spans = c.ends.empty() ? 1 : int64_t(c.ends.size());
        stride = c.k + c.gap;
        weight = make_codes(random, c.n * c.k, c.weight_bits, c.codes, weights_low);
        x = make_codes(random, (c.m - 1) * stride + c.k, c.activation_bits, c.codes, activations_low);
        zeros = make_codes(random, c.n * spans, c.weight_bits, Codes::RANDOM, false);
        for (int64_t i = 0; i < c.n * spans; ++i) {
            steps.push_back(random.real(c.step));
            sums.push_back(int32_t(weight_sum(i / spans, i % spans)));
        }
        for (int64_t i = 0; i < c.m; ++i) {
            token_steps.push_back(random.real(1.0f));
            token_zeros.push_back(
                int32_t(random.between(lowest(c.activation_bits), highest(c.activation_bits))));
        }
        for (int64_t i = 0; i < c.n; ++i)
            constants.push_back(random.real(1.0f));
        y.assign(size_t(c.m * c.n) * bytes_of(c.type), 0xab);
    }

    bool passes(int isa)
    {
        const int64_t bytes = mq_linear_bytes(isa, c.n, c.k, c.weight_bits);
        std::vector<uint8_t> packed(size_t(bytes), 0);
        if (mq_linear_pack(isa, weight.data(), c.n, c.k, c.weight_bits, packed.data()) ||
            mq_linear(isa, x.data(), stride, c.m, packed.data(), steps.data(),
                      c.zero_points ? zeros.data() : nullptr,
                      c.token_zero ? sums.data() : nullptr,
                      c.token_step ? token_steps.data() : nullptr,
                      c.token_zero ? token_zeros.data() : nullptr,
                      c.constant ? constants.data() : nullptr, y.data(), c.type, c.n, c.k,
                      c.ends.empty() ? nullptr : c.ends.data(), spans, c.weight_bits,
                      c.activation_bits))
            return false;
        for (int64_t token = 0; token < c.m; ++token) {
            for (int64_t output = 0; output < c.n; ++output) {
                const float wanted = rounded(expected(token, output), c.type);
                if (!same(read(y.data(), token * c.n + output, c.type), wanted))
                    return false;
            }
        }
        return true;
    }

private:
    int64_t begin(int64_t span) const { return span ? c.ends[size_t(span - 1)] : 0; }
    int64_t end(int64_t span) const { return c.ends.empty() ? c.k : c.ends[size_t(span)]; }

    int64_t centred(int64_t output, int64_t span, int64_t channel) const
    {
        const int64_t zero = c.zero_points ? zeros[size_t(output * spans + span)] : 0;
        return weight[size_t(output * c.k + channel)] - zero;
    }

    int64_t weight_sum(int64_t output, int64_t span) const
    {
        int64_t total = 0;
        for (int64_t channel = begin(span); channel < end(span); ++channel)
            total += centred(output, span, channel);
        return total;
    }

    int64_t sum(int64_t token, int64_t output, int64_t span) const
    {
        const int64_t zero = c.token_zero ? token_zeros[size_t(token)] : 0;
        int64_t total = 0;
        for (int64_t channel = begin(span); channel < end(span); ++channel)
            total += centred(output, span, channel) * (x[size_t(token * stride + channel)] - zero);
        return total;
    }

    // Every operation rounds to float32, in the definition's order.
    float expected(int64_t token, int64_t output) const
    {
        const float token_step = c.token_step ? token_steps[size_t(token)] : 1.0f;
        float value = float(sum(token, output, 0));
        if (c.ends.empty() && c.token_step)
            value *= token_step;
        value *= steps[size_t(output * spans)];
        for (int64_t span = 1; span < spans; ++span) {
            const float part = float(sum(token, output, span)) * steps[size_t(output * spans + span)];
            value += part;
        }
        if (!c.ends.empty() && c.token_step)
            value *= token_step;
        return c.constant ? value + constants[size_t(output)] : value;
    }

    const LinearCase c;
    int64_t spans, stride;
    std::vector<int8_t> weight, x, zeros;
    std::vector<int32_t> sums, token_zeros;
    std::vector<float> steps, token_steps, constants;
    std::vector<uint8_t> y;
};

inline void check_linear(const LinearCase &c, int isa, Random &random, Tally &tally)
{
    tally.note(LinearCheck(c, random).passes(isa),
               "%s: linear m %d n %d k %d spans %d, W%d A%d, zero points %d, token step %d, token zero "
               "%d, constant %d, type %d, gap %d, codes %d, step %g",
               mq_isa_name(isa), int(c.m), int(c.n), int(c.k), int(c.ends.size()), c.weight_bits,
               c.activation_bits, c.zero_points, c.token_step, c.token_zero, c.constant, c.type,
               int(c.gap), int(c.codes), double(c.step));
}

inline void check_linears(int isa, Tally &tally)
{
    Random random(1);
    const std::vector<int64_t> tokens{1, 2, 3, 5, 7, 8, 9, 13, 17, 25, 64};
    const std::vector<std::vector<int64_t>> sizes{{1, 1},    {1, 33},  {7, 13},   {17, 97},
                                                  {33, 127}, {64, 256}, {35, 509}, {3, 4099}};
    const std::vector<std::vector<int>> widths{{4, 4}, {4, 8}, {3, 4}, {8, 8}, {8, 4}};
    for (const int64_t m : tokens)
        for (const auto &size : sizes)
            for (const auto &width : widths)
                check_linear({m, size[0], size[1], some_spans(size[1], random), width[0], width[1],
                              random.coin(), random.coin(), random.coin(), random.coin(),
                              int(random.between(MQ_FLOAT32, MQ_FLOAT16)),
                              random.coin() * random.between(1, 40), Codes::RANDOM,
                              random.one_of<float>({1e-42f, 1e-20f, 1.0f, 1e30f})},
                             isa, random, tally);
    // Where 16-bit sums of products must be widened, and the longest rows.
    for (const Codes codes : {Codes::LOW_LOW, Codes::LOW_HIGH, Codes::HIGH_LOW, Codes::HIGH_HIGH})
        for (const int64_t k : {255, 257, 545, 4352, 4357, 32768, 33025})
            for (const auto &width : widths)
                check_linear({random.one_of<int64_t>({1, 9}), 5, k, some_spans(k, random), width[0],
                              width[1], random.coin(), false, random.coin(), false, MQ_FLOAT32, 0,
                              codes, 1.0f},
                             isa, random, tally);
    // More tokens than are worked on at once, on all threads.
    check_linear({300, 40, 300, {}, 4, 4, false, true, false, true, MQ_FLOAT32, 0, Codes::RANDOM, 1.0f},
                 isa, random, tally);
    check_linear({129, 270, 1100, groups_of(1100, 64), 4, 8, true, true, false, true, MQ_FLOAT16, 3,
                  Codes::RANDOM, 1.0f},
                 isa, random, tally);
    check_linear({520, 33, 70, {}, 8, 8, true, true, false, true, MQ_FLOAT32, 0, Codes::RANDOM, 1.0f},
                 isa, random, tally);
    // More channels than one run has, and segments that end within a run and beyond it.
    for (const auto &width : widths)
        check_linear({33, 17, 33025, {32, 8192, 17000 / 32 * 32, 33025}, width[0], width[1],
                      random.coin(), true, false, true, MQ_FLOAT32, 0, Codes::RANDOM, 1.0f},
                     isa, random, tally);
    for (const bool zeros : {false, true})
        check_linear({70, 33, 3501, {32, 1120, 1184, 3500 / 32 * 32, 3501}, 4, 4, zeros, true, true,
                      true, MQ_BFLOAT16, 0, Codes::RANDOM, 1.0f},
                     isa, random, tally);
}
