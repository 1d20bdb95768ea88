// The INT4 linear's vectors in the compilers' own types, for processors without a set of their own:
// 16 outputs by 4 channels.
//
// A vector is 4 channels of 16 bytes, read as 8 lanes of 16 bits; the low byte of lane i is output
// i's and the high byte output (8 + i)'s. A mask and a shift widen them, and products and sums stay
// in 16 bits for as long as they fit.

#pragma once

#include <stdint.h>

#include "numbers/vectors.h"

namespace {

struct Portable : Vectors<4> {
    static constexpr int outputs = 16, panels = 2, rows = 2, registers = 16;
    static constexpr bool whole_bytes = false;

    typedef uint16_t Lanes __attribute__((vector_size(16)));
    typedef int16_t FourNarrow __attribute__((vector_size(8)));

    struct Weights {
        Lanes of[4];  // channel by channel
    };
    struct Sums {
        Lanes first, second;  // eight outputs each, modulo 2^16
    };

    static constexpr int place(int output, int channel)
    {
        return 16 * channel + 2 * (output % 8) + output / 8;
    }

    // Pairs of steps whose sums fit 16 bits: a step adds at most 4 * 15 * 8 = 480 in magnitude with
    // 4-bit activations and 4 * 15 * 128 = 7680 with 8-bit ones; 32768 / 480 = 68.3,
    // 32768 / 7680 = 4.3.
    static int64_t run(int activation_bits) { return activation_bits == 8 ? 2 : 34; }

    static Weights load(const uint8_t *from) { return load_vector<Weights>(from); }

    static void store(const Weights &weights, uint8_t *to) { store_vector(weights, to); }

    static Weights low(const Weights &both)
    {
        return {
            {both.of[0] & 0x0f0f, both.of[1] & 0x0f0f, both.of[2] & 0x0f0f, both.of[3] & 0x0f0f}};
    }

    static Weights high(const Weights &both)
    {
        return low({{both.of[0] >> 4, both.of[1] >> 4, both.of[2] >> 4, both.of[3] >> 4}});
    }

    static Sums zero() { return Sums(); }

    template <int Rows>
    static Sums step(Sums sums, const Weights &weights, const int8_t *activations, int row)
    {
        MQ_UNROLL
        for (int c = 0; c < 4; ++c) {
            const uint16_t activation = uint16_t(activations[4 * row + c]);
            sums.first += (weights.of[c] & 0xff) * activation;
            sums.second += (weights.of[c] >> 8) * activation;
        }
        return sums;
    }

    template <bool Replace> static void widen(const Sums &sums, int32_t *to)
    {
        for (int i = 0; i < 4; ++i) {
            const Lanes &lanes = i < 2 ? sums.first : sums.second;
            const uint8_t *const four = reinterpret_cast<const uint8_t *>(&lanes) + i % 2 * 8;
            Integers wide = __builtin_convertvector(load_vector<FourNarrow>(four), Integers);
            if (!Replace)
                wide += load_vector<Integers>(to + 4 * i);
            store_vector(wide, to + 4 * i);
        }
    }

    template <int Count> static void store_float16(const float *from, uint16_t *to)
    {
        for (int i = 0; i < Count; ++i)
            to[i] = to_float16(from[i]);
    }
};

}  // namespace
