// Activations as the INT4 linear's tiles read them, and their sums.
//
//   stored      int8 [m, k], rows `stride` apart
//   activations int8 [tiles][channels / 4][tokens of the tile][4], 0 beyond k
//   sums        int32 [tokens][spans]
//
// The sums take the weights' offset and zero points out of the products:
// sum (w - z) x = sum u x - (offset + z) * sum x, with u = w + offset.

#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"
#include "linear/layout.h"
#include "numbers/vectors.h"

namespace {

// How `rows` tokens are split into tiles, as evenly as they go.
template <class Set> struct Tiles {
    int64_t rows, count;

    explicit Tiles(int64_t rows) : rows(rows), count(ceil_div(rows, Set::rows)) {}

    int64_t begin(int64_t tile) const { return tile * rows / count; }
    int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
};

// Four channels of each of `Rows` tokens after another; `k` of them exist.
template <int Rows>
void gather_tile(const int8_t *codes, int64_t stride, int64_t k, int64_t channels, int8_t *to)
{
    constexpr int fours = Rows / 4 * 4;
    const int64_t sixteens = k / 16 * 16, whole = k / 4 * 4;
    for (int64_t channel = 0; channel < sixteens; channel += 16) {
        for (int row = 0; row < fours; row += 4)
            transpose(codes + row * stride + channel, stride, 4 * Rows, to + 4 * row);
        for (int row = fours; row < Rows; ++row) {
            for (int four = 0; four < 4; ++four)
                memcpy(to + 4 * (four * Rows + row), codes + row * stride + channel + 4 * four, 4);
        }
        to += 16 * Rows;
    }
    for (int64_t channel = sixteens; channel < whole; channel += 4) {
        for (int row = 0; row < Rows; ++row)
            memcpy(to + 4 * row, codes + row * stride + channel, 4);
        to += 4 * Rows;
    }
    for (int64_t channel = whole; channel < channels; channel += 4) {
        for (int row = 0; row < Rows; ++row) {
            for (int64_t c = channel; c < channel + 4; ++c)
                *to++ = c < k ? codes[row * stride + c] : int8_t(0);
        }
    }
}

using Gather = void (*)(const int8_t *, int64_t, int64_t, int64_t, int8_t *);

template <class Set, int Rows = Set::rows> Gather gather_of(int64_t rows)
{
    if constexpr (Rows > 1) {
        if (rows < Rows)
            return gather_of<Set, Rows - 1>(rows);
    }
    return gather_tile<Rows>;
}

template <class Set> void sum_token(const int8_t *codes, const Shape<Set> &shape, int32_t *sums)
{
    for (int64_t span = 0; span < shape.spans; ++span) {
        const int64_t end = shape.end(span);
        int32_t sum = 0;
        for (int64_t channel = shape.begin(span); channel < end; ++channel)
            sum += codes[channel];
        sums[span] = sum;
    }
}

}  // namespace
