// What the checks share: random numbers, 16-bit floats read and rounded the obvious way, failures.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "mergequant.h"

// Numbers that are the same on every machine (xorshift64).
class Random {
public:
    explicit Random(uint64_t seed) : state(seed * 2654435761u + 88172645463325252u) {}

    // From `low` to `high`, both included.
    int64_t between(int64_t low, int64_t high)
    {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return low + int64_t(state % uint64_t(high - low + 1));
    }

    template <class T> T one_of(const std::vector<T> &values)
    {
        return values[size_t(between(0, int64_t(values.size()) - 1))];
    }

    bool coin() { return between(0, 1) == 1; }

    // Between -`size` and `size`.
    float real(float size) { return float(between(-1000000, 1000000)) * 1e-6f * size; }

private:
    uint64_t state;
};

inline int lowest(int bits) { return -(1 << (bits - 1)); }
inline int highest(int bits) { return (1 << (bits - 1)) - 1; }
inline size_t bytes_of(int type) { return type == MQ_FLOAT32 ? 4 : 2; }

// `x` as the nearest value of `type`, half to even; a type is its digits, exponents and top.
inline float rounded(double x, int type)
{
    if (type == MQ_FLOAT32)
        return float(x);
    const int digits = type == MQ_BFLOAT16 ? 8 : 11, smallest = type == MQ_BFLOAT16 ? -126 : -14;
    if (x == 0 || !isfinite(x))
        return float(x);
    const int exponent = ilogb(x) < smallest ? smallest : ilogb(x);
    const double unit = ldexp(1.0, exponent - digits + 1);
    const double nearest = nearbyint(x / unit) * unit;
    const double top = type == MQ_BFLOAT16 ? ldexp(1.0, 128) : 65536.0;
    return float(fabs(nearest) >= top ? copysign(INFINITY, x) : nearest);
}

// Element `at` of an array of `type`.
inline float read(const uint8_t *array, int64_t at, int type)
{
    if (type == MQ_FLOAT32) {
        float found;
        memcpy(&found, array + 4 * at, 4);
        return found;
    }
    uint16_t bits;
    memcpy(&bits, array + 2 * at, 2);
    const int shift = type == MQ_BFLOAT16 ? 7 : 10, bias = type == MQ_BFLOAT16 ? 127 : 15;
    const int exponent = (bits & 0x7fff) >> shift, fraction = bits & ((1 << shift) - 1);
    double size = ldexp(fraction + (exponent ? 1 << shift : 0), (exponent ? exponent : 1) - bias - shift);
    if (exponent == 2 * bias + 1)
        size = fraction ? NAN : INFINITY;
    return float(bits & 0x8000 ? -size : size);
}

// An array of `type` of `count` values, each at most `size`; no byte longer than it must be.
inline std::vector<uint8_t> reals(Random &random, int64_t count, int type, float size)
{
    std::vector<uint8_t> found(size_t(count) * bytes_of(type));
    for (int64_t i = 0; i < count; ++i) {
        if (type == MQ_FLOAT32) {
            const float value = random.real(size);
            memcpy(found.data() + 4 * i, &value, 4);
            continue;
        }
        // The upper half of a float32 is a bfloat16; a random pattern below infinity a float16.
        const float value = random.real(size);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        const uint16_t half = type == MQ_BFLOAT16
                                  ? uint16_t(bits >> 16)
                                  : uint16_t((bits >> 31) << 15 | random.between(0, 0x4fff));
        memcpy(found.data() + 2 * i, &half, 2);
    }
    return found;
}

inline std::vector<int8_t> codes_between(Random &random, int64_t count, int low, int high)
{
    std::vector<int8_t> found(static_cast<size_t>(count));
    for (int8_t &code : found)
        code = int8_t(random.between(low, high));
    return found;
}

// To the last bit, except that every NaN is like another.
inline bool same(float a, float b) { return memcmp(&a, &b, 4) == 0 || (isnan(a) && isnan(b)); }

// Cases so far, and those that failed.
struct Tally {
    long cases = 0;
    long failed = 0;

    template <class... Values> void note(bool good, const char *form, Values... values)
    {
        ++cases;
        if (good)
            return;
        ++failed;
        printf("FAILED ");
        printf(form, values...);
        printf("\n");
    }
};
