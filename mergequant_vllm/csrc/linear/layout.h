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
// A 4-bit block is panels * Set::outputs outputs. 3-bit codes are stored as 4-bit ones. 8-bit weights
// are bytes where the instructions multiply and add whole ones (`Set::whole_bytes`):
//
//   packed [blocks][channels / 4][panels][vector]    code + Set::byte_offset
//
// Elsewhere they are two nibbles, code + 128 = 16 high + low; even panels hold the low ones and odd
// panels the high ones of the same outputs, so that the kernel of 4 bits serves them.
// Channels are padded to a multiple of 8, where activations are 0; outputs to whole blocks.

#pragma once

#include <stdint.h>

namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What a weight is stored as.
enum class Form { NIBBLES, TWO_NIBBLES, BYTES };

template <class Set> constexpr Form form_of(int weight_bits)
{
    if (weight_bits != 8)
        return Form::NIBBLES;
    return Set::whole_bytes ? Form::BYTES : Form::TWO_NIBBLES;
}

// Vectors of a few outputs' weights: one, or that of the low and that of the high nibbles.
constexpr int planes_of(Form form) { return form == Form::TWO_NIBBLES ? 2 : 1; }

// What is added to a code before it is stored.
template <class Set> constexpr int32_t offset_of(Form form)
{
    if constexpr (Set::whole_bytes) {
        if (form == Form::BYTES)
            return Set::byte_offset;
    }
    return form == Form::NIBBLES ? 8 : 128;
}

template <class Set> struct Shape {
    static constexpr int lanes = Set::panels * Set::outputs;

    int64_t n, k;
    Form form;
    int64_t outputs;  // of a block
    int64_t blocks;
    int64_t channels;     // k, padded
    const int32_t *ends;  // of the spans, or null
    int64_t spans;

    Shape(int64_t n, int64_t k, int weight_bits, const int32_t *ends = nullptr, int64_t spans = 1)
        : n(n), k(k), form(form_of<Set>(weight_bits)), ends(ends), spans(spans)
    {
        outputs = lanes / planes_of(form);
        blocks = ceil_div(n, outputs);
        channels = round_up(k, 8);
    }

    int32_t offset() const { return offset_of<Set>(form); }
    // Bytes of the first `count` channels of a block.
    int64_t bytes(int64_t count) const { return count * lanes / (form == Form::BYTES ? 1 : 2); }
    int64_t block_bytes() const { return bytes(channels); }

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

// One weight and its offset; beyond the matrix that of code 0 (its products are never used, or 0).
template <class Set>
int with_offset(const int8_t *codes, const Shape<Set> &shape, int64_t output, int64_t channel)
{
    const bool inside = output < shape.n && channel < shape.k;
    return shape.offset() + (inside ? codes[output * shape.k + channel] : 0);
}

template <class Set>
void pack_bytes(const int8_t *codes, const Shape<Set> &shape, int64_t block, uint8_t *packed)
{
    for (int64_t channel = 0; channel < shape.channels; channel += 4) {
        for (int panel = 0; panel < Set::panels; ++panel) {
            const int64_t first = (block * Set::panels + panel) * Set::outputs;
            for (int i = 0; i < Set::outputs; ++i) {
                for (int c = 0; c < 4; ++c)
                    packed[Set::place(i, c)] =
                        uint8_t(with_offset(codes, shape, first + i, channel + c));
            }
            packed += 4 * Set::outputs;
        }
    }
}

// One of the two nibbles of a weight, or its only one.
template <class Set>
uint8_t nibble(const int8_t *codes, const Shape<Set> &shape, int64_t output, int64_t channel,
               int plane)
{
    return uint8_t(with_offset(codes, shape, output, channel) >> (4 * plane) & 15);
}

template <class Set>
void pack_nibbles(const int8_t *codes, const Shape<Set> &shape, int64_t block, uint8_t *packed)
{
    const int planes = planes_of(shape.form), panels_of_outputs = Set::panels / planes;
    for (int64_t channel = 0; channel < shape.channels; channel += 8) {
        for (int panel = 0; panel < Set::panels; ++panel) {
            const int plane = panel % planes;
            const int64_t first = (block * panels_of_outputs + panel / planes) * Set::outputs;
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
        uint8_t *const to = packed + block * shape.block_bytes();
        if (shape.form == Form::BYTES)
            pack_bytes(codes, shape, block, to);
        else
            pack_nibbles(codes, shape, block, to);
    }
}

}  // namespace
