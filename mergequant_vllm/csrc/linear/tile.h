// The INT4 linear's inner loop: exact integer sums of a tile, `Rows` tokens by a block of outputs.
//
//   activations [channels / 4][Rows][4]                  int8, read 4 channels of a token at a time
//   weights     [channels / 8][panels][vector] nibbles   as stored, or
//               [channels / 4][panels][vector] bytes     as stored, or as an earlier tile unpacked
//   sums        [Rows][panels * outputs] int32           replaced, or added to
//
// An instruction set's own sums may be narrow (16 bits where the products of bytes are); they are
// widened after `run` pairs of steps, before they can overflow.

#pragma once

#include <stdint.h>

#include "linear/layout.h"
#include "numbers/vectors.h"

namespace {

template <class Set, int Rows> using TileSums = typename Set::Sums[Rows][Set::panels];
template <class Set> using StepWeights = typename Set::Weights[Set::panels];

// Where a tile has its weights from: few tokens read nibbles as they are stored; of many, the first
// tile unpacks them for the others as it goes, which costs it only stores. Stored bytes are
// prefetched by the first tile, and near for the others.
enum class From { NIBBLES, UNPACKING, FAR_BYTES, NEAR_BYTES };

constexpr bool are_nibbles(From source)
{
    return source == From::NIBBLES || source == From::UNPACKING;
}

// Asks for a cache line of packed weights a page before its turn: processors follow successive
// addresses only some lines ahead, and not into a page that they have not seen. An address past the
// weights is not an error.
MQ_INLINE void prefetch_ahead(const uint8_t *weights)
{
    constexpr int PAGE = 4096;
    __builtin_prefetch(weights + PAGE);
}

template <class Set, int Rows> MQ_INLINE void clear(TileSums<Set, Rows> &sums)
{
    MQ_UNROLL
    for (int row = 0; row < Rows; ++row) {
        MQ_UNROLL
        for (int panel = 0; panel < Set::panels; ++panel)
            sums[row][panel] = Set::zero();
    }
}

// One step: 4 channels of every token and output of the tile.
template <class Set, int Rows>
MQ_INLINE void step(TileSums<Set, Rows> &sums, const StepWeights<Set> &weights,
                    const int8_t *activations)
{
    MQ_UNROLL
    for (int row = 0; row < Rows; ++row) {
        MQ_UNROLL
        for (int panel = 0; panel < Set::panels; ++panel) {
            sums[row][panel] =
                Set::template step<Rows>(sums[row][panel], weights[panel], activations, row);
        }
    }
}

// Two steps: 8 channels, which share bytes where nibbles are stored. `unpacked` is written to by
// From::UNPACKING alone.
template <class Set, int Rows, From Source>
MQ_INLINE void pair(TileSums<Set, Rows> &even, TileSums<Set, Rows> &odd, const int8_t *activations,
                    const uint8_t *weights, uint8_t *unpacked)
{
    constexpr bool nibbles = are_nibbles(Source);
    constexpr int vector = 4 * Set::outputs, step_bytes = Set::panels * vector;
    constexpr int second = nibbles ? 0 : step_bytes;
    StepWeights<Set> vectors;
    MQ_UNROLL
    for (int panel = 0; panel < Set::panels; ++panel) {
        vectors[panel] = Set::load(weights + panel * vector);
        if (nibbles)
            vectors[panel] = Set::low(vectors[panel]);
        if (Source == From::UNPACKING)
            Set::store(vectors[panel], unpacked + panel * vector);
    }
    if (Source != From::NEAR_BYTES) {
        constexpr int line_count = nibbles ? step_bytes : 2 * step_bytes;
        MQ_UNROLL
        for (int line = 0; line < line_count; line += 64)
            prefetch_ahead(weights + line);
    }
    step<Set, Rows>(even, vectors, activations);
    MQ_UNROLL
    for (int panel = 0; panel < Set::panels; ++panel) {
        vectors[panel] = Set::load(weights + second + panel * vector);
        if (nibbles)
            vectors[panel] = Set::high(vectors[panel]);
        if (Source == From::UNPACKING)
            Set::store(vectors[panel], unpacked + step_bytes + panel * vector);
    }
    step<Set, Rows>(odd, vectors, activations + 4 * Rows);
}

template <class Set, int Rows, bool Replace>
MQ_INLINE void widen(const TileSums<Set, Rows> &narrow, int32_t *sums)
{
    MQ_UNROLL
    for (int row = 0; row < Rows; ++row) {
        MQ_UNROLL
        for (int panel = 0; panel < Set::panels; ++panel) {
            Set::template widen<Replace>(narrow[row][panel], sums);
            sums += Set::outputs;
        }
    }
}

template <class Set, int Rows, From Source>
void tile(const int8_t *activations, const uint8_t *weights, uint8_t *unpacked, int64_t pairs,
          int64_t run, bool replace, int32_t *sums)
{
    constexpr int bytes = 8 * Set::panels * Set::outputs;  // of a pair, unpacked
    // Tiles of few tokens have registers for two chains of additions, and need them to hide the
    // additions' latency.
    constexpr bool two_chains = 2 * Rows * Set::panels <= Set::registers / 2;
    for (int64_t done = 0; done < pairs; done += run) {
        const int64_t count = smaller(pairs - done, run);
        TileSums<Set, Rows> even, odd;
        clear<Set, Rows>(even);
        if (two_chains)
            clear<Set, Rows>(odd);
        for (int64_t i = 0; i < count; ++i) {
            pair<Set, Rows, Source>(even, two_chains ? odd : even, activations, weights, unpacked);
            activations += 8 * Rows;
            weights += are_nibbles(Source) ? bytes / 2 : bytes;
            if (Source == From::UNPACKING)
                unpacked += bytes;
        }
        if (replace && done == 0)
            widen<Set, Rows, true>(even, sums);
        else
            widen<Set, Rows, false>(even, sums);
        if (two_chains)
            widen<Set, Rows, false>(odd, sums);
    }
}

using Tile = void (*)(const int8_t *, const uint8_t *, uint8_t *, int64_t, int64_t, bool, int32_t *);

// The kernel for `rows` tokens, at most Set::rows.
template <class Set, From Source, int Rows = Set::rows> Tile tile_of(int64_t rows)
{
    if constexpr (Rows > 1) {
        if (rows < Rows)
            return tile_of<Set, Source, Rows - 1>(rows);
    }
    return tile<Set, Rows, Source>;
}

template <class Set> Tile tile_of(From source, int64_t rows)
{
    if constexpr (Set::whole_bytes) {
        if (source == From::FAR_BYTES)
            return tile_of<Set, From::FAR_BYTES>(rows);
    }
    return source == From::NIBBLES     ? tile_of<Set, From::NIBBLES>(rows)
           : source == From::UNPACKING ? tile_of<Set, From::UNPACKING>(rows)
                                       : tile_of<Set, From::NEAR_BYTES>(rows);
}

}  // namespace
