// How the INT4 linear's weights are stored, and the packing.
//
// A vector of the instruction set holds 4 input channels of `Set::outputs` output channels; the
// instructions add the 4 products of an output, so that lanes are outputs and no sum runs across
// lanes. A block is `Set::panels` such vectors side by side. Weight codes are stored as unsigned
// nibbles u = code + 8, two steps of 4 channels to a byte:
//
//   packed [blocks][channels / 8][panels][vector]
//     low nibble of the byte of (output i, channel c):  channel 8 s + c
//     high nibble:                                      channel 8 s + 4 + c
//
// A 4-bit block is panels * Set::outputs outputs. 8-bit weights are two nibbles, code + 128 =
// 16 high + low; even panels hold the low ones and odd panels the high ones of the same outputs, so
// that one integer kernel serves every width. 3-bit codes are stored as 4-bit ones.
// Channels are padded to a multiple of 8, where activations are 0; outputs to whole blocks.

#pragma once

#include <stdint.h>

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class Set> struct Shape {
    static constexpr int lanes = Set::panels * Set::outputs;

    int64_t n, k;
    int planes;       // nibbles of a weight
    int64_t outputs;  // of a block
    int64_t blocks;
    int64_t channels;     // k, padded
    const int32_t *ends;  // of the spans, or null
    int64_t spans;

    Shape(int64_t n, int64_t k, int weight_bits, const int32_t *ends = nullptr, int64_t spans = 1)
        : n(n), k(k), ends(ends), spans(spans)
    {
        planes = weight_bits == 8 ? 2 : 1;
        outputs = lanes / planes;
        blocks = ceil_div(n, outputs);
        channels = round_up(k, 8);
    }

    int32_t offset() const { return planes == 2 ? 128 : 8; }
    int64_t block_bytes() const { return channels * lanes / 2; }

    // Channels of a span; the last one's padding is its own where products are summed.
    int64_t begin(int64_t span) const { return span ? ends[span - 1] : 0; }
    int64_t end(int64_t span) const { return span + 1 < spans ? ends[span] : k; }
    int64_t padded_end(int64_t span) const { return span + 1 < spans ? ends[span] : channels; }

    // The span of a channel.
    int64_t span_of(int64_t channel) const
    {
        int64_t low = 0, high = spans - 1;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (channel < ends[middle])
                high = middle;
            else
                low = middle + 1;
        }
        return low;
    }

    // The longest run of channels of which every span but the last one is a multiple.
    int64_t unit() const
    {
        if (spans == 1)
            return channels;
        int64_t unit = ends[0];
        for (int64_t span = 1; span + 1 < spans; ++span) {
            for (int64_t rest = ends[span]; rest;) {
                const int64_t next = unit % rest;
                unit = rest;
                rest = next;
            }
        }
        return unit;
    }
};

template <class Set> int64_t linear_bytes(int64_t n, int64_t k, int weight_bits)
{
    const Shape<Set> shape(n, k, weight_bits);
    return shape.blocks * shape.block_bytes();
}

// The nibble of one weight; beyond the matrix that of code 0 (its products are never used, or 0).
template <class Set>
uint8_t nibble(const int8_t *codes, const Shape<Set> &shape, int64_t output, int64_t channel,
               int plane)
{
    const bool inside = output < shape.n && channel < shape.k;
    const int code = inside ? codes[output * shape.k + channel] : 0;
    if (shape.planes == 1)
        return uint8_t((code + 8) & 15);
    return uint8_t((code + 128) >> (4 * plane) & 15);
}

template <class Set>
void pack_block(const int8_t *codes, const Shape<Set> &shape, int64_t block, uint8_t *packed)
{
    const int panels_of_outputs = Set::panels / shape.planes;
    for (int64_t channel = 0; channel < shape.channels; channel += 8) {
        for (int panel = 0; panel < Set::panels; ++panel) {
            const int plane = panel % shape.planes;
            const int64_t first = (block * panels_of_outputs + panel / shape.planes) * Set::outputs;
            for (int i = 0; i < Set::outputs; ++i) {
                for (int c = 0; c < 4; ++c) {
                    const uint8_t low = nibble(codes, shape, first + i, channel + c, plane);
                    const uint8_t high = nibble(codes, shape, first + i, channel + 4 + c, plane);
                    packed[Set::place(i, c)] = uint8_t(low | high << 4);
                }
            }
            packed += 4 * Set::outputs;
        }
    }
}

template <class Set>
void linear_pack(const int8_t *codes, int64_t n, int64_t k, int weight_bits, uint8_t *packed)
{
    const Shape<Set> shape(n, k, weight_bits);
#pragma omp parallel for schedule(static) if (n * k > 1 << 16)
    for (int64_t block = 0; block < shape.blocks; ++block) {
        pack_block(codes, shape, block, packed + block * shape.block_bytes());
    }
}

}  // namespace
