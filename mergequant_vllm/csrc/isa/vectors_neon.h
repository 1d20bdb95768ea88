// NEON's integer vectors for the INT4 linear, with the dot product of ARMv8.2: 4 outputs by 4
// channels.
//
// sdot adds four products of signed bytes into 32 bits; nibbles are signed bytes too. The
// activations of four tokens are one vector, of which sdot reads a lane.

#pragma once

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include "numbers/vectors.h"

namespace {

struct NeonDotprod : Vectors<4> {
    static constexpr int outputs = 4, panels = 2, rows = 8, registers = 32;
    // sdot takes weights with a sign.
    static constexpr bool whole_bytes = true;
    static constexpr int32_t byte_offset = 0;

    using Weights = uint8x16_t;
    using Sums = int32x4_t;

    static constexpr int place(int output, int channel) { return 4 * output + channel; }

    static int64_t run(int) { return INT64_MAX; }

    static Weights load(const uint8_t *from) { return vld1q_u8(from); }

    static void store(Weights weights, uint8_t *to) { vst1q_u8(to, weights); }

    static Weights low(Weights both) { return vandq_u8(both, vdupq_n_u8(15)); }

    static Weights high(Weights both) { return vshrq_n_u8(both, 4); }

    static Sums zero() { return vdupq_n_s32(0); }

    // `Rows` tokens a step: whole fours by their lane, the rest one by one, so that nothing is read
    // beyond the last token's four bytes.
    template <int Rows>
    static Sums step(Sums sums, Weights weights, const int8_t *activations, int row)
    {
        const int8x16_t bytes = vreinterpretq_s8_u8(weights);
        if (row < Rows / 4 * 4) {
            const int8x16_t four = vld1q_s8(activations + row / 4 * 16);
            switch (row % 4) {
            case 0:
                return vdotq_laneq_s32(sums, bytes, four, 0);
            case 1:
                return vdotq_laneq_s32(sums, bytes, four, 1);
            case 2:
                return vdotq_laneq_s32(sums, bytes, four, 2);
            default:
                return vdotq_laneq_s32(sums, bytes, four, 3);
            }
        }
        int32_t one;
        memcpy(&one, activations + 4 * row, 4);
        return vdotq_s32(sums, bytes, vreinterpretq_s8_s32(vdupq_n_s32(one)));
    }

    template <bool Replace> static void widen(Sums sums, int32_t *to)
    {
        vst1q_s32(to, Replace ? sums : vaddq_s32(vld1q_s32(to), sums));
    }

    template <int Count> static void store_float16(const float *from, uint16_t *to)
    {
        for (int i = 0; i < Count; ++i)
            to[i] = to_float16(from[i]);
    }
};

}  // namespace
