// The INT4 linear's inner loop: exact integer sums of a tile, `Rows` tokens by a block of outputs.
//
//   activations [channels / 4][Rows][4]                  int8, read 4 channels of a token at a time
//   weights     [channels / 8][panels][vector] nibbles   as stored (few tokens), or
//               [channels / 4][panels][vector] bytes     unpacked (many tokens)
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

// Asks for a cache line of packed weights before its turn. Processors follow successive addresses
// only some lines ahead and not across pages, less than what hides the latency of memory; so the
// lines of the next four pages are asked for from each page in turn: four sequences to follow. An
// address past the weights is not an error.
MQ_INLINE void prefetch_ahead(const uint8_t *weights)
{
    constexpr uintptr_t PAGES = 4, PAGE = 4096, LINE = 64;
    const uintptr_t address = reinterpret_cast<uintptr_t>(weights);
    const uintptr_t index = address % (PAGES * PAGE) / LINE;
    const uintptr_t next = address / (PAGES * PAGE) * (PAGES * PAGE) + PAGES * PAGE;
    const uintptr_t ahead = next + index % PAGES * PAGE + index / PAGES * LINE;
    __builtin_prefetch(reinterpret_cast<const void *>(ahead));
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

// Two steps: the 8 channels that share bytes where they are stored.
template <class Set, int Rows, bool Nibbles>
MQ_INLINE void pair(TileSums<Set, Rows> &even, TileSums<Set, Rows> &odd, const int8_t *activations,
                    const uint8_t *weights)
{
    constexpr int vector = 4 * Set::outputs;
    constexpr int second = Nibbles ? 0 : Set::panels * vector;
    StepWeights<Set> vectors;
    MQ_UNROLL
    for (int panel = 0; panel < Set::panels; ++panel) {
        vectors[panel] = Set::load(weights + panel * vector);
        if (Nibbles)
            vectors[panel] = Set::low(vectors[panel]);
    }
    if (Nibbles) {
        MQ_UNROLL
        for (int line = 0; line < Set::panels * vector; line += 64)
            prefetch_ahead(weights + line);
    }
    step<Set, Rows>(even, vectors, activations);
    MQ_UNROLL
    for (int panel = 0; panel < Set::panels; ++panel) {
        vectors[panel] = Set::load(weights + second + panel * vector);
        if (Nibbles)
            vectors[panel] = Set::high(vectors[panel]);
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

template <class Set, int Rows, bool Nibbles>
void tile(const int8_t *activations, const uint8_t *weights, int64_t pairs, int64_t run,
          bool replace, int32_t *sums)
{
    constexpr int bytes = (Nibbles ? 4 : 8) * Set::panels * Set::outputs;
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
            pair<Set, Rows, Nibbles>(even, two_chains ? odd : even, activations, weights);
            activations += 8 * Rows;
            weights += bytes;
        }
        if (replace && done == 0)
            widen<Set, Rows, true>(even, sums);
        else
            widen<Set, Rows, false>(even, sums);
        if (two_chains)
            widen<Set, Rows, false>(odd, sums);
    }
}

using Tile = void (*)(const int8_t *, const uint8_t *, int64_t, int64_t, bool, int32_t *);

// The kernel for `rows` tokens, at most Set::rows.
template <class Set, bool Nibbles, int Rows = Set::rows> Tile tile_of(int64_t rows)
{
    if constexpr (Rows > 1) {
        if (rows < Rows)
            return tile_of<Set, Nibbles, Rows - 1>(rows);
    }
    return tile<Set, Rows, Nibbles>;
}

// Nibbles of `pairs` pairs of steps of a block to bytes.
template <class Set> void unpack(const uint8_t *packed, int64_t pairs, uint8_t *weights)
{
    constexpr int vector = 4 * Set::outputs;
    for (int64_t i = 0; i < pairs; ++i) {
        for (int line = 0; line < Set::panels * vector; line += 64)
            prefetch_ahead(packed + line);
        for (int panel = 0; panel < Set::panels; ++panel) {
            const typename Set::Weights both = Set::load(packed + panel * vector);
            Set::store(Set::low(both), weights + panel * vector);
            Set::store(Set::high(both), weights + (Set::panels + panel) * vector);
        }
        packed += Set::panels * vector;
        weights += 2 * Set::panels * vector;
    }
}

}  // namespace
