// Token quantization, static rounding and the Hadamard rotation against their definitions
// (reference.py in kernels/token_quant, norm_round and hadamard).

#pragma once

#include "numbers.h"

inline int8_t code_of(float x, int bits)
{
    return int8_t(fmin(fmax(nearbyintf(x), float(lowest(bits))), float(highest(bits))));
}

inline void rotate(std::vector<float> &row, int64_t block)
{
    const int64_t k = int64_t(row.size());
    for (int64_t distance = 1; distance < block; distance *= 2) {
        for (int64_t i = 0; i < k; ++i) {
            if (i / distance % 2)
                continue;
            const float a = row[size_t(i)], b = row[size_t(i + distance)];
            row[size_t(i)] = a + b;
            row[size_t(i + distance)] = a - b;
        }
    }
    for (float &value : row)
        value *= float(1 / sqrt(double(block)));
}

struct RowCase {
    int64_t m, k;
    int type, bits;
    int64_t gap, padding;
    float size;
};

// Step and, if asked, zero point of a row.
struct TokenScale {
    float step, zero;
};

inline TokenScale scale_of(const std::vector<float> &row, float clip, int bits, bool zero_points)
{
    float low = 0, high = 0;
    for (const float value : row) {
        low = fminf(low, value);
        high = fmaxf(high, value);
    }
    const float smallest_step = ldexpf(1, -100);
    if (!zero_points) {
        float step = fmaxf(-low, high) * clip;
        step *= float(1.0 / highest(bits));
        return {fmaxf(step, smallest_step), 0};
    }
    float step = high - low;
    step *= clip;
    step *= float(1.0 / ((1 << bits) - 1));
    step = fmaxf(step, smallest_step);
    const float inverse = 1.0f / step;
    float below = low * clip;
    below *= inverse;
    return {step, float(code_of(float(lowest(bits)) - below, bits))};
}

inline bool token_quant_passes(const RowCase &c, int64_t block, float clip, bool zero_points, int isa,
                               Random &random)
{
    const int64_t stride = c.k + c.gap, columns = c.k + c.padding;
    const auto x = reals(random, (c.m - 1) * stride + c.k, c.type, c.size);
    std::vector<int8_t> codes(size_t(c.m * columns), 99);
    std::vector<float> steps(size_t(c.m), NAN);
    std::vector<int32_t> zeros(size_t(c.m), 99);
    if (mq_token_quant(isa, x.data(), c.type, stride, c.m, c.k, &clip, c.bits, block, codes.data(),
                       columns, steps.data(), zero_points ? zeros.data() : nullptr))
        return false;
    for (int64_t token = 0; token < c.m; ++token) {
        std::vector<float> row;
        for (int64_t i = 0; i < c.k; ++i)
            row.push_back(read(x.data(), token * stride + i, c.type));
        if (block)
            rotate(row, block);
        const TokenScale scale = scale_of(row, clip, c.bits, zero_points);
        if (!same(steps[size_t(token)], scale.step))
            return false;
        if (zeros[size_t(token)] != (zero_points ? int32_t(scale.zero) : 99))
            return false;
        const float inverse = 1.0f / scale.step;
        for (int64_t i = 0; i < columns; ++i) {
            int8_t wanted = 0;
            if (i < c.k) {
                const float product = row[size_t(i)] * inverse;
                wanted = code_of(product + scale.zero, c.bits);
            }
            if (codes[size_t(token * columns + i)] != wanted)
                return false;
        }
    }
    return true;
}

inline bool static_round_passes(const RowCase &c, bool gathers, bool shifts, int isa, Random &random)
{
    const int64_t n = gathers ? random.between(1, 2 * c.k) : c.k;
    const int64_t stride = n + c.gap, columns = c.k + c.padding;
    const auto x = reals(random, (c.m - 1) * stride + n, c.type, c.size);
    std::vector<int32_t> index;
    std::vector<float> offset;
    for (int64_t i = 0; i < c.k; ++i) {
        index.push_back(int32_t(gathers ? random.between(0, n - 1) : i));
        offset.push_back(random.real(0.5f));
    }
    std::vector<int8_t> codes(size_t(c.m * columns), 99);
    if (mq_static_round(isa, x.data(), c.type, stride, c.m, n, gathers ? index.data() : nullptr,
                        shifts ? offset.data() : nullptr, c.bits, codes.data(), c.k, columns))
        return false;
    for (int64_t token = 0; token < c.m; ++token) {
        for (int64_t i = 0; i < columns; ++i) {
            int8_t wanted = 0;
            if (i < c.k) {
                const float value = read(x.data(), token * stride + index[size_t(i)], c.type);
                wanted = code_of(shifts ? value + offset[size_t(i)] : value, c.bits);
            }
            if (codes[size_t(token * columns + i)] != wanted)
                return false;
        }
    }
    return true;
}

inline bool hadamard_passes(int64_t m, int64_t k, int64_t block, int isa, Random &random)
{
    std::vector<float> x, y(size_t(m * k), NAN);
    for (int64_t i = 0; i < m * k; ++i)
        x.push_back(random.real(3.0f));
    if (mq_hadamard(isa, x.data(), y.data(), m, k, block))
        return false;
    for (int64_t token = 0; token < m; ++token) {
        std::vector<float> row(x.begin() + token * k, x.begin() + (token + 1) * k);
        rotate(row, block);
        for (int64_t i = 0; i < k; ++i)
            if (!same(y[size_t(token * k + i)], row[size_t(i)]))
                return false;
    }
    return true;
}

inline bool mix_heads_passes(const RowCase &c, int64_t heads, int64_t width, int isa, Random &random)
{
    const int64_t k = heads * width, stride = k + c.gap, power = heads & -heads, odd = heads / power;
    const auto x = reals(random, (c.m - 1) * stride + k, c.type, 3.0f);
    std::vector<float> y(size_t(c.m * k), NAN), mixing;
    for (int64_t i = 0; i < odd * odd; ++i)
        mixing.push_back(random.real(1.0f));
    if (mq_mix_heads(isa, x.data(), c.type, stride, c.m, heads, width,
                     odd > 1 ? mixing.data() : nullptr, y.data()))
        return false;
    for (int64_t token = 0; token < c.m; ++token) {
        for (int64_t channel = 0; channel < width; ++channel) {
            // Channel by channel the power of two is the rotation in blocks of so many heads.
            std::vector<float> column;
            for (int64_t head = 0; head < heads; ++head)
                column.push_back(read(x.data(), token * stride + head * width + channel, c.type));
            rotate(column, power);
            for (int64_t head = 0; head < heads; ++head) {
                float wanted = column[size_t(head)];
                for (int64_t from = 0; from < odd && odd > 1; ++from) {
                    const float part = column[size_t(from * power + head % power)] *
                                       mixing[size_t(from * odd + head / power)];
                    wanted = from ? wanted + part : part;
                }
                if (!same(y[size_t(token * k + head * width + channel)], wanted))
                    return false;
            }
        }
    }
    return true;
}

inline void check_rows(int isa, Tally &tally)
{
    Random random(2);
    const char *const name = mq_isa_name(isa);
    for (int number = 0; number < 1200; ++number) {
        const int64_t block = random.one_of<int64_t>({0, 0, 1, 2, 8, 32, 128, 512});
        const int64_t k = block ? block * random.between(1, 1 + 600 / block) : random.between(1, 600);
        const RowCase c{random.between(1, 5),
                        k,
                        int(random.between(MQ_FLOAT32, MQ_FLOAT16)),
                        random.coin() ? 4 : 8,
                        random.coin() * random.between(1, 40),
                        random.coin() * random.between(1, 70),
                        random.one_of<float>({0.0f, 1e-42f, 1e-3f, 1.0f, 300.0f, 1e30f})};
        const float clip = random.coin() ? 1.0f : 0.5f + 0.4f * fabsf(random.real(1.0f));
        const bool zero_points = random.coin();
        tally.note(token_quant_passes(c, block, clip, zero_points, isa, random),
                   "%s: token quantization m %d k %d type %d bits %d block %d size %g zero points %d",
                   name, int(c.m), int(c.k), c.type, c.bits, int(block), double(c.size), zero_points);
        const bool gathers = random.coin(), shifts = random.coin();
        tally.note(static_round_passes(c, gathers, shifts, isa, random),
                   "%s: static rounding m %d k %d type %d bits %d index %d offset %d size %g", name,
                   int(c.m), int(c.k), c.type, c.bits, gathers, shifts, double(c.size));
        const int64_t heads = random.between(1, 40), width = random.between(1, 33);
        if (number % 4 == 0)
            tally.note(mix_heads_passes(c, heads, width, isa, random),
                       "%s: mixing m %d, %d heads of %d, type %d", name, int(c.m), int(heads),
                       int(width), c.type);
        if (block)
            tally.note(hadamard_passes(c.m, k, block, isa, random), "%s: hadamard m %d k %d block %d",
                       name, int(c.m), int(k), int(block));
    }
}
