// The mixing of heads (kernels/hadamard/reference.py, `mix_heads`): a row of `heads` runs of
// `width` channels, heads = odd * 2^s, times M kron I:
//
//     power of two   at distance width, 2 width, ..., below 2^s width: pairs (a, b) become
//                    (a + b, a - b); then all is multiplied by float32(1 / sqrt(2^s))
//     odd factor     run i of 2^s heads = x_0 H[0, i] + x_1 H[1, i] + ..., from the left, H given
//
// Every value goes through the definition's operations in the definition's order. Plain loops, in a
// form that compilers vectorise.

#pragma once

#include <stdlib.h>

#include "kernels.h"
#include "mergequant.h"
#include "rows/codes.h"

namespace {
namespace rows {

inline void pair_heads(float *__restrict a, float *__restrict b, int64_t count)
{
    for (int64_t i = 0; i < count; ++i) {
        const float sum = a[i] + b[i], difference = a[i] - b[i];
        a[i] = sum;
        b[i] = difference;
    }
}

inline void mix_power_of_two(float *z, int64_t k, int64_t width, int64_t power)
{
    for (int64_t distance = width; distance < width * power; distance *= 2)
        for (int64_t start = 0; start < k; start += 2 * distance)
            pair_heads(z + start, z + start + distance, distance);
    const float factor = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(power)));
    for (int64_t i = 0; i < k; ++i)
        z[i] *= factor;
}

inline void add_run(const float *__restrict z, float factor, bool first, int64_t count,
                    float *__restrict y)
{
    if (first) {
        for (int64_t i = 0; i < count; ++i)
            y[i] = z[i] * factor;
    } else {
        for (int64_t i = 0; i < count; ++i)
            y[i] = y[i] + z[i] * factor;
    }
}

// `z` has room for a row, or is null where there is no odd factor.
template <class Type>
inline void mix_row(const HeadArguments &a, const typename Type::Stored *x, float *z, float *y)
{
    const int64_t power = a.heads & -a.heads, odd = a.heads / power;
    const int64_t k = a.heads * a.width, run = power * a.width;
    float *const mixed = z ? z : y;
    const float *values = Type::widen(x, k, mixed);
    if (values != mixed)
        memcpy(mixed, values, static_cast<size_t>(k) * sizeof *mixed);
    mix_power_of_two(mixed, k, a.width, power);
    if (!z)
        return;
    for (int64_t to = 0; to < odd; ++to)
        for (int64_t from = 0; from < odd; ++from)
            add_run(z + from * run, a.mixing[from * odd + to], from == 0, run, y + to * run);
}

template <class Type> inline int mix_rows(const HeadArguments &a)
{
    const auto *x = static_cast<const typename Type::Stored *>(a.x);
    const int64_t k = a.heads * a.width;
    const bool is_odd = (a.heads & (a.heads - 1)) != 0;
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (a.m > 1 && a.m * k >= THREADED_ELEMENTS)
    {
        float *z = nullptr;
        if (is_odd) {
            z = static_cast<float *>(malloc(static_cast<size_t>(k) * sizeof *z));
            failed = !z;
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a.m; ++t)
            if (z || !is_odd)
                mix_row<Type>(a, x + t * a.stride, z, a.y + t * k);
        free(z);
    }
    return failed ? MQ_ERROR_MEMORY : MQ_OK;
}

}  // namespace rows

inline int rows_mix_heads(const HeadArguments &a)
{
    switch (a.type) {
    case MQ_FLOAT32:
        return rows::mix_rows<rows::Float32>(a);
    case MQ_BFLOAT16:
        return rows::mix_rows<rows::BFloat16>(a);
    case MQ_FLOAT16:
        return rows::mix_rows<rows::Float16>(a);
    default:
        return MQ_ERROR_ARGUMENT;
    }
}

}  // namespace
