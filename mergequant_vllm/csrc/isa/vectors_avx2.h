// AVX2's integer vectors for the INT4 linear: 8 outputs by 4 channels.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds pairs into 16 bits; sums stay there for
// as long as they fit, because that saves widening each product.

#pragma once

#include "isa/vectors_x86.h"

namespace {

struct Avx2 : X86<8> {
    static constexpr int outputs = 8, panels = 2, rows = 6, registers = 16;
    static constexpr bool whole_bytes = false;  // pairs of such products exceed 16 bits

    using Weights = __m256i;
    using Sums = __m256i;

    // Pairs of steps whose sums fit 16 bits: a step adds at most 2 * 15 * 8 = 240 in magnitude with
    // 4-bit activations and 2 * 15 * 128 = 3840 with 8-bit ones, and 32768 / 240 = 136.5,
    // 32768 / 3840 = 8.5.
    static int64_t run(int activation_bits) { return activation_bits == 8 ? 4 : 68; }

    static Weights load(const uint8_t *from)
    {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    }

    static void store(Weights weights, uint8_t *to)
    {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), weights);
    }

    static Weights low(Weights both) { return _mm256_and_si256(both, _mm256_set1_epi8(15)); }

    static Weights high(Weights both) { return low(_mm256_srli_epi16(both, 4)); }

    static Sums zero() { return _mm256_setzero_si256(); }

    // Compilers would add the products of several steps to each other before the sums, and run out
    // of registers for them; the next step shall find these sums finished.
    static void keep_order(Sums &sums) { __asm__("" : "+x"(sums)); }

    template <int Rows>
    static Sums step(Sums sums, Weights weights, const int8_t *activations, int row)
    {
        const __m256i four = _mm256_set1_epi32(four_channels(activations + 4 * row));
        sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, four));
        keep_order(sums);
        return sums;
    }

    template <bool Replace> static void widen(Sums sums, int32_t *to)
    {
        __m256i *const at = reinterpret_cast<__m256i *>(to);
        __m256i wide = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
        if (!Replace)
            wide = _mm256_add_epi32(_mm256_loadu_si256(at), wide);
        _mm256_storeu_si256(at, wide);
    }
};

}  // namespace
