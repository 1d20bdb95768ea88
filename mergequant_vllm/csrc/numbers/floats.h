// Activations as they are stored (float32, bfloat16, float16) read as float32, exactly.
//
//     bfloat16   s eeeeeeee fffffff        the upper half of a float32
//     float16    s eeeee ffffffffff        exponent bias 15 (float32: 127), denormals below 2^-14
//
// Each format is a type: its stored element, a signed integer of the same width for the bits, and
// `widen`, which returns `count` values as float32, either where they are or in `wide`.

#pragma once

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Products and sums must round to float32 at once, as the definitions do.
static_assert(FLT_EVAL_METHOD == 0 || FLT_EVAL_METHOD == 16, "float32 is evaluated wider");

namespace {
namespace rows {

// Values that are widened, gathered or rounded at a time; the buffers stay in the first cache.
constexpr int64_t CHUNK = 512;

inline int32_t bits_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

struct Float32 {
    using Stored = float;
    using Bits = int32_t;

    static Bits bits(Stored x) { return bits_of(x); }

    static float value(Bits bits) { return float_of(bits); }

    static const float *widen(const Stored *x, int64_t, float *) { return x; }
};

struct BFloat16 {
    using Stored = uint16_t;
    using Bits = int16_t;

    static Bits bits(Stored x) { return static_cast<Bits>(x); }

    static float value(Bits bits)
    {
        return float_of(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16));
    }

    static const float *widen(const Stored *__restrict x, int64_t count, float *__restrict wide)
    {
        for (int64_t i = 0; i < count; ++i)
            wide[i] = value(bits(x[i]));
        return wide;
    }
};

struct Float16 {
    using Stored = uint16_t;
    using Bits = int16_t;

    static Bits bits(Stored x) { return static_cast<Bits>(x); }

    // In integers, for machines without a conversion: no denormal float32 is ever an operand, so
    // that a thread that flushes them reads the same values.
    static float value(Bits bits)
    {
        constexpr int32_t LARGER_BIAS = (127 - 15) << 23;
        const int32_t magnitude = bits & 0x7fff;
        const int32_t normal = (magnitude << 13) + LARGER_BIAS;
        const int32_t special = normal + LARGER_BIAS;  // infinities, NaN: the exponent 255
        const int32_t denormal = bits_of(static_cast<float>(magnitude) * 0x1p-24f);
        int32_t wide = magnitude < 0x0400 ? denormal : normal;
        wide = magnitude < 0x7c00 ? wide : special;
        return float_of(bits < 0 ? wide | INT32_MIN : wide);
    }

    static const float *widen(const Stored *__restrict x, int64_t count, float *__restrict wide)
    {
        int64_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= count; i += 8) {
            __m128i halves;
            memcpy(&halves, x + i, sizeof halves);
            _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(halves));
        }
#endif
        for (; i < count; ++i)
            wide[i] = value(bits(x[i]));
        return wide;
    }
};

}  // namespace rows
}  // namespace
