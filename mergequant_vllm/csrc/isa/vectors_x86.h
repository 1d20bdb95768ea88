// What x86's sets have in common for the INT4 linear: the broadcast of a token's four channels and
// the conversion to float16 (F16C, which every processor with AVX2 has).

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "numbers/vectors.h"

namespace {

// `Width` float32 to a register.
template <int Width> struct X86 : Vectors<Width> {
    static constexpr int place(int output, int channel) { return 4 * output + channel; }

    static int32_t four_channels(const int8_t *activations)
    {
        int32_t four;
        memcpy(&four, activations, 4);
        return four;
    }

    template <int Count> static void store_float16(const float *from, uint16_t *to)
    {
        for (int i = 0; i < Count; i += 8) {
            const __m128i half =
                _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), half);
        }
    }
};

}  // namespace
