// The INT4 linear's vectors as plain arrays, for processors without a set of their own: 16 outputs
// by 4 channels, channel by channel, in loops that compilers vectorise.

#pragma once

#include <stdint.h>

#include "linear_types.h"

namespace {

struct Portable : Vectors<4> {
    static constexpr int outputs = 16, panels = 2, rows = 2, registers = 16;

    struct Weights {
        uint8_t of[4 * outputs];
    };
    struct Sums {
        int16_t of[outputs];
    };

    static constexpr int place(int output, int channel) { return channel * outputs + output; }

    // Pairs of steps whose sums fit 16 bits: a step adds at most 4 * 15 * 8 = 480 in magnitude with
    // 4-bit activations and 4 * 15 * 128 = 7680 with 8-bit ones; 32768 / 480 = 68.3,
    // 32768 / 7680 = 4.3.
    static int64_t run(int activation_bits) { return activation_bits == 8 ? 2 : 34; }

    static Weights load(const uint8_t *from) {
        Weights weights;
        for (int i = 0; i < 4 * outputs; i++) weights.of[i] = from[i];
        return weights;
    }

    static void store(const Weights &weights, uint8_t *to) {
        for (int i = 0; i < 4 * outputs; i++) to[i] = weights.of[i];
    }

    static Weights low(const Weights &both) {
        Weights weights;
        for (int i = 0; i < 4 * outputs; i++) weights.of[i] = both.of[i] & 15;
        return weights;
    }

    static Weights high(const Weights &both) {
        Weights weights;
        for (int i = 0; i < 4 * outputs; i++) weights.of[i] = uint8_t(both.of[i] >> 4);
        return weights;
    }

    static Sums zero() { return Sums(); }

    template <int Rows>
    static Sums step(Sums sums, const Weights &weights, const int8_t *activations, int row) {
        for (int c = 0; c < 4; c++) {
            const int16_t activation = activations[4 * row + c];
            for (int i = 0; i < outputs; i++) {
                sums.of[i] = int16_t(sums.of[i] + weights.of[c * outputs + i] * activation);
            }
        }
        return sums;
    }

    static void add(const Sums &sums, int32_t *to) {
        for (int i = 0; i < outputs; i++) to[i] += sums.of[i];
    }

    template <int Count> static void store_float16(const float *from, uint16_t *to) {
        for (int i = 0; i < Count; i++) to[i] = to_float16(from[i]);
    }
};

}  // namespace
