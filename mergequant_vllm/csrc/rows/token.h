// The dynamic per-token quantization (kernels/token_quant/reference.py):
//
//     z = x, or x rotated (rows/hadamard.h)
//     step[t]     = max(max_i |z[t, i]| * clip * float32(1 / Q_b), 2^-100)
//     codes[t, i] = round(z[t, i] * (1 / step[t]))         i < k
//     codes[t, i] = 0                                       k <= i < columns
//
// A row is read twice, the second time from the cache. The maximum is taken over the stored bits
// without their sign: they order as the magnitudes do, in integers of the stored width, and NaN is
// above all, so that a row with NaN shows it in its step.

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

struct TokenRounding {
    float clip, reciprocal_of_largest_code;
    CodeRange range;

    explicit TokenRounding(const TokenArguments &a)
        : clip(a.clip),
          reciprocal_of_largest_code(static_cast<float>(1.0 / ((1 << (a.bits - 1)) - 1))),
          range(a.bits)
    {
    }

    float step(float largest) const
    {
        const float step = largest * clip * reciprocal_of_largest_code;
        return step < SMALLEST_STEP ? SMALLEST_STEP : step;  // a NaN stays
    }
};

// Returns the step.
template <class Type>
inline float token_row(const typename Type::Stored *x, int64_t k, const TokenRounding &rounding,
                       int8_t *codes)
{
    const float step = rounding.step(largest_magnitude<Type>(x, k));
    const float reciprocal = 1.0f / step;
    float wide[CHUNK];
    for (int64_t start = 0; start < k; start += CHUNK) {
        const int64_t count = k - start < CHUNK ? k - start : CHUNK;
        const float *values = Type::widen(x + start, count, wide);
        round_products(values, reciprocal, rounding.range, count, codes + start);
    }
    return step;
}

template <class Type>
inline float rotated_token_row(const typename Type::Stored *x, const TokenArguments &a,
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
            if (!a.block)
                a.step[t] = token_row<Type>(row, a.k, rounding, codes);
            else if (z)
                a.step[t] = rotated_token_row<Type>(row, a, rounding, z, codes);
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
