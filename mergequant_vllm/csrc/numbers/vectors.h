// Vectors of the compilers' own, and the element types of outputs: float32 to bfloat16 and float16.
//
// Rounded once, half to even, subnormal results and infinities included; NaN stays NaN. All by
// integers and by sums of float32, equal on every processor.

#pragma once

#include <stdint.h>
#include <string.h>

#include "numbers/floats.h"
#include "mergequant.h"

#if defined(__clang__)
#define MQ_UNROLL _Pragma("unroll")
#define MQ_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MQ_UNROLL _Pragma("GCC unroll 32")
#define MQ_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Vectors<4>::Integers{__VA_ARGS__})
#endif
#define MQ_INLINE inline __attribute__((always_inline))

namespace {

// `Count` numbers of 32 bits.
template <int Count> struct Vectors;

#define MQ_VECTORS(count)                                                                          \
    template <> struct Vectors<count> {                                                            \
        static constexpr int width = count;                                                        \
        typedef float Floats __attribute__((vector_size(4 * count)));                              \
        typedef int32_t Integers __attribute__((vector_size(4 * count)));                          \
        typedef uint32_t Words __attribute__((vector_size(4 * count)));                            \
        typedef uint16_t Halves __attribute__((vector_size(2 * count)));                           \
    };
MQ_VECTORS(4)
MQ_VECTORS(8)
MQ_VECTORS(16)
#undef MQ_VECTORS

template <class Vector> inline Vector load_vector(const void *from)
{
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

template <class Vector> inline void store_vector(const Vector &vector, void *to)
{
    memcpy(to, &vector, sizeof vector);
}

template <class To, class From> inline To reinterpret_vector(const From &from)
{
    static_assert(sizeof(To) == sizeof(From), "vectors of one size");
    return load_vector<To>(&from);
}

// The transpose of 4 rows by 4 of any 32 bits, rows `stride` bytes apart, into rows `step` bytes apart.
MQ_INLINE void transpose(const void *rows, int64_t stride, int64_t step, void *turned)
{
    using Floats = Vectors<4>::Floats;
    const char *const from = static_cast<const char *>(rows);
    char *const to = static_cast<char *>(turned);
    const Floats a = load_vector<Floats>(from), b = load_vector<Floats>(from + stride);
    const Floats c = load_vector<Floats>(from + 2 * stride);
    const Floats d = load_vector<Floats>(from + 3 * stride);
    const Floats ab01 = MQ_SHUFFLE(a, b, 0, 4, 1, 5), ab23 = MQ_SHUFFLE(a, b, 2, 6, 3, 7);
    const Floats cd01 = MQ_SHUFFLE(c, d, 0, 4, 1, 5), cd23 = MQ_SHUFFLE(c, d, 2, 6, 3, 7);
    store_vector<Floats>(MQ_SHUFFLE(ab01, cd01, 0, 1, 4, 5), to);
    store_vector<Floats>(MQ_SHUFFLE(ab01, cd01, 2, 3, 6, 7), to + step);
    store_vector<Floats>(MQ_SHUFFLE(ab23, cd23, 0, 1, 4, 5), to + 2 * step);
    store_vector<Floats>(MQ_SHUFFLE(ab23, cd23, 2, 3, 6, 7), to + 3 * step);
}

template <class Set> MQ_INLINE typename Set::Halves to_bfloat16(const typename Set::Floats &x)
{
    using Words = typename Set::Words;
    const Words bits = reinterpret_vector<Words>(x);
    const Words upper = bits >> 16;
    const Words rounded = (bits + 0x7fff + (upper & 1)) >> 16;
    const Words result = x != x ? upper | 0x40 : rounded;
    return __builtin_convertvector(result, typename Set::Halves);
}

inline uint16_t to_float16(float x)
{
    const uint32_t sign = uint32_t(rows::bits_of(x)) >> 16 & 0x8000;
    const uint32_t bits = uint32_t(rows::bits_of(x)) & 0x7fffffff;
    // Normal results: the exponent's bias changes from 127 to 15. Carries into the exponent are
    // right, up to infinity.
    const uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    // Subnormal results, below 2^-14: 1/2 has a unit in the last place of 2^-24, theirs; the sum
    // rounds to it, and its bits count them.
    const float sum = rows::float_of(int32_t(bits)) + 0.5f;
    const uint32_t subnormal = uint32_t(rows::bits_of(sum) - rows::bits_of(0.5f));
    const uint32_t infinite = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t finite = bits < 113u << 23 ? subnormal : normal;
    return uint16_t(sign | (bits >= 143u << 23 ? infinite : finite));
}

constexpr int bytes_of(int type) { return type == MQ_FLOAT32 ? 4 : 2; }

}  // namespace
