// The static path's gather and rounding (kernels/norm_round/reference.py):
//
//     codes[t, i] = round(x[t, index[i]] + offset[i])     i < k
//     codes[t, i] = 0                                      k <= i < columns

#pragma once

#include "kernels.h"
#include "mergequant.h"
#include "rows/codes.h"

namespace {
namespace rows {

// Values are gathered as they are stored, one load each, then widened and rounded in vectors: gather
// instructions do not know 16 bits.
template <class Stored>
inline void gather(const Stored *__restrict x, const int32_t *__restrict index, int64_t count,
                   Stored *__restrict gathered)
{
    for (int64_t i = 0; i < count; ++i)
        gathered[i] = x[index[i]];
}

template <class Type>
inline void static_row(const StaticArguments &a, const typename Type::Stored *x, CodeRange range,
                       int8_t *codes)
{
    typename Type::Stored gathered[CHUNK];
    float wide[CHUNK];
    for (int64_t start = 0; start < a.k; start += CHUNK) {
        const int64_t count = a.k - start < CHUNK ? a.k - start : CHUNK;
        const typename Type::Stored *stored = x + start;
        if (a.index) {
            gather(x, a.index + start, count, gathered);
            stored = gathered;
        }
        const float *values = Type::widen(stored, count, wide);
        if (a.offset)
            round_sums(values, a.offset + start, range, count, codes + start);
        else
            round_values(values, range, count, codes + start);
    }
    memset(codes + a.k, 0, static_cast<size_t>(a.columns - a.k));
}

template <class Type> inline int static_rows(const StaticArguments &a)
{
    const auto *x = static_cast<const typename Type::Stored *>(a.x);
    const CodeRange range(a.bits);
#pragma omp parallel for schedule(static) if (a.m > 1 && a.m * a.columns >= THREADED_ELEMENTS)
    for (int64_t t = 0; t < a.m; ++t)
        static_row<Type>(a, x + t * a.stride, range, a.codes + t * a.columns);
    return MQ_OK;
}

}  // namespace rows

inline int rows_static_round(const StaticArguments &a)
{
    switch (a.type) {
    case MQ_FLOAT32:
        return rows::static_rows<rows::Float32>(a);
    case MQ_BFLOAT16:
        return rows::static_rows<rows::BFloat16>(a);
    case MQ_FLOAT16:
        return rows::static_rows<rows::Float16>(a);
    default:
        return MQ_ERROR_ARGUMENT;
    }
}

}  // namespace
