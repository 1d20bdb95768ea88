// The dynamic per-token quantization (kernels/token_quant/reference.py):
//
//     z = x, or x rotated (rows/hadamard.h)
//     step[t]     = max(max_i |z[t, i]| * clip * float32(1 / Q_b), 2^-100)
//     codes[t, i] = round(z[t, i] * (1 / step[t]))         i < k
//     codes[t, i] = 0                                       k <= i < columns
//
// and with zero points, low and high being the smallest and the largest of 0 and the row's values:
//
//     step[t]     = max((high - low) * clip * float32(1 / (2^b - 1)), 2^-100)
//     zero[t]     = round(-2^(b-1) - low * clip * (1 / step[t]))
//     codes[t, i] = round(z[t, i] * (1 / step[t]) + zero[t])
//
// A row is read twice, the second time from the cache. The largest magnitude is taken over the
// stored bits without their sign: they order as the magnitudes do, in integers of the stored width,
// and NaN is above all, so that a row with NaN shows it in its step. The smallest and the largest
// value likewise, with the bits below the sign turned where it is set: NaN is at either end.

#pragma once

#include <stdlib.h>

#include "kernels.h"
#include "mergequant.h"
#include "rows/codes.h"
#include "rows/hadamard.h"

namespace {
namespace rows {

constexpr float SMALLEST_STEP = 0x1p-100f;

template <class Type>
inline float largest_magnitude(const typename Type::Stored *x, int64_t count)
{
    using Bits = typename Type::Bits;
    constexpr Bits MAGNITUDE = static_cast<Bits>(sizeof(Bits) == 4 ? 0x7fffffff : 0x7fff);
    Bits largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Bits magnitude = static_cast<Bits>(Type::bits(x[i]) & MAGNITUDE);
        largest = magnitude > largest ? magnitude : largest;
    }
    return Type::value(largest);
}

struct Extremes {
    float low, high;
};

// Of 0 and the values.
template <class Type>
inline Extremes extremes(const typename Type::Stored *x, int64_t count)
{
    using Bits = typename Type::Bits;
    constexpr Bits MAGNITUDE = static_cast<Bits>(sizeof(Bits) == 4 ? 0x7fffffff : 0x7fff);
    Bits low = 0, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Bits bits = Type::bits(x[i]);
        const Bits ordered = static_cast<Bits>(bits < 0 ? bits ^ MAGNITUDE : bits);
        low = ordered < low ? ordered : low;
        high = ordered > high ? ordered : high;
    }
    return {Type::value(static_cast<Bits>(low < 0 ? low ^ MAGNITUDE : low)), Type::value(high)};
}

// What a token's codes are made with; `zero` is an integer.
struct TokenScale {
    float step, reciprocal, zero;
};

struct TokenRounding {
    bool zero_points;
    float clip, reciprocal_of_codes;
    CodeRange range;

    explicit TokenRounding(const TokenArguments &a)
        : zero_points(a.zero), clip(a.clip), range(a.bits)
    {
        const int codes = zero_points ? (1 << a.bits) - 1 : (1 << (a.bits - 1)) - 1;
        reciprocal_of_codes = static_cast<float>(1.0 / codes);
    }

    float step(float size) const
    {
        const float step = size * clip * reciprocal_of_codes;
        return step < SMALLEST_STEP ? SMALLEST_STEP : step;  // a NaN stays
    }

    template <class Type> TokenScale scale(const typename Type::Stored *x, int64_t k) const
    {
        if (!zero_points) {
            const float step = this->step(largest_magnitude<Type>(x, k));
            return {step, 1.0f / step, 0.0f};
        }
        const Extremes row = extremes<Type>(x, k);
        const float step = this->step(row.high - row.low), reciprocal = 1.0f / step;
        const float zero = range.smallest - row.low * clip * reciprocal;
        return {step, reciprocal, static_cast<float>(round_to_code(zero, range))};
    }

    void round(const float *values, const TokenScale &scale, int64_t count, int8_t *codes) const
    {
        if (zero_points)
            round_products_and_sums(values, scale.reciprocal, scale.zero, range, count, codes);
        else
            round_products(values, scale.reciprocal, range, count, codes);
    }
};

template <class Type>
inline TokenScale token_row(const typename Type::Stored *x, int64_t k,
                            const TokenRounding &rounding, int8_t *codes)
{
    const TokenScale scale = rounding.scale<Type>(x, k);
    float wide[CHUNK];
    for (int64_t start = 0; start < k; start += CHUNK) {
        const int64_t count = k - start < CHUNK ? k - start : CHUNK;
        rounding.round(Type::widen(x + start, count, wide), scale, count, codes + start);
    }
    return scale;
}

template <class Type>
inline TokenScale rotated_token_row(const typename Type::Stored *x, const TokenArguments &a,
                                    const TokenRounding &rounding, float *z, int8_t *codes)
{
    const float *values = Type::widen(x, a.k, z);
    if (values != z)
        memcpy(z, values, static_cast<size_t>(a.k) * sizeof *z);
    rotate_row(z, a.k, a.block);
    return token_row<Float32>(z, a.k, rounding, codes);
}

template <class Type> inline int token_rows(const TokenArguments &a)
{
    const auto *x = static_cast<const typename Type::Stored *>(a.x);
    const TokenRounding rounding(a);
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (a.m > 1 && a.m * a.columns >= THREADED_ELEMENTS)
    {
        float *z = nullptr;
        if (a.block) {
            z = static_cast<float *>(malloc(static_cast<size_t>(a.k) * sizeof *z));
            failed = !z;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a.m; ++t) {
            const typename Type::Stored *row = x + t * a.stride;
            int8_t *codes = a.codes + t * a.columns;
            if (a.block && !z)
                continue;
            const TokenScale scale = a.block ? rotated_token_row<Type>(row, a, rounding, z, codes)
                                             : token_row<Type>(row, a.k, rounding, codes);
            a.step[t] = scale.step;
            if (a.zero)
                a.zero[t] = static_cast<int32_t>(scale.zero);
            memset(codes + a.k, 0, static_cast<size_t>(a.columns - a.k));
        }
        free(z);
    }
    return failed ? MQ_ERROR_MEMORY : MQ_OK;
}

}  // namespace rows

inline int rows_token_quant(const TokenArguments &a)
{
    switch (a.type) {
    case MQ_FLOAT32:
        return rows::token_rows<rows::Float32>(a);
    case MQ_BFLOAT16:
        return rows::token_rows<rows::BFloat16>(a);
    case MQ_FLOAT16:
        return rows::token_rows<rows::Float16>(a);
    default:
        return MQ_ERROR_ARGUMENT;
    }
}

}  // namespace
