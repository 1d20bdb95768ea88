// Rounding to activation codes, as mergequant_vllm/rounding.py defines it: half to even, within
// [-2^(b-1), 2^(b-1) - 1]. Plain loops, in a form that compilers vectorise.

#pragma once

#include "numbers/floats.h"

namespace {
namespace rows {

// Row operations on fewer elements than this are done by one thread: waking others takes longer.
constexpr int64_t THREADED_ELEMENTS = 20000;

struct CodeRange {
    float smallest, largest;

    explicit CodeRange(int bits)
        : smallest(static_cast<float>(-(1 << (bits - 1)))),
          largest(static_cast<float>((1 << (bits - 1)) - 1))
    {
    }
};

// Added to a small x, 1.5 * 2^23 leaves no bit for a fraction: the sum is rounded half to even to
// 1.5 * 2^23 + code, and its lowest byte is the code. The range's ends are integers, so clamping
// before rounding changes nothing. NaN has no code; it becomes 0 instead of what the conversion to
// an integer would happen to give.
inline int8_t round_to_code(float x, CodeRange range)
{
    x = x == x ? x : 0.0f;
    x = x > range.smallest ? x : range.smallest;
    x = x < range.largest ? x : range.largest;
    return static_cast<int8_t>(bits_of(x + 0x1.8p23f));
}

inline void round_products(const float *__restrict x, float factor, CodeRange range, int64_t count,
                           int8_t *__restrict codes)
{
    for (int64_t i = 0; i < count; ++i)
        codes[i] = round_to_code(x[i] * factor, range);
}

inline void round_products_and_sums(const float *__restrict x, float factor, float added,
                                    CodeRange range, int64_t count, int8_t *__restrict codes)
{
    for (int64_t i = 0; i < count; ++i)
        codes[i] = round_to_code(x[i] * factor + added, range);
}

inline void round_sums(const float *__restrict x, const float *__restrict offset, CodeRange range,
                       int64_t count, int8_t *__restrict codes)
{
    for (int64_t i = 0; i < count; ++i)
        codes[i] = round_to_code(x[i] + offset[i], range);
}

inline void round_values(const float *__restrict x, CodeRange range, int64_t count,
                         int8_t *__restrict codes)
{
    for (int64_t i = 0; i < count; ++i)
        codes[i] = round_to_code(x[i], range);
}

}  // namespace rows
}  // namespace
