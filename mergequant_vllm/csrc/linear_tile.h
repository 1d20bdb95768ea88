// The INT4 linear's inner loop: exact integer sums of a tile, `Rows` tokens by one block of outputs.
//
//   activations [channels / 4][Rows][4]                  int8, read 4 channels of a token at a time
//   weights     [channels / 8][panels][vector] nibbles   as stored (few tokens), or
//               [channels / 4][panels][vector] bytes     unpacked (many tokens)
//   sums        [Rows][panels * outputs] int32           added to
//
// An instruction set's own sums may be narrow (16 bits where the products of bytes are); they are
// widened after `run` pairs of steps, before they can overflow.

#pragma once

#include <stdint.h>

#include "linear_layout.h"

#if defined(__clang__)
#define MQ_UNROLL _Pragma("unroll")
#else
#define MQ_UNROLL _Pragma("GCC unroll 32")
#endif

namespace {

// Asks for a cache line of packed weights before its turn. Processors follow a sequence of addresses
// only some lines ahead and not across pages, less than what hides the latency of memory; so the
// lines of the next four pages are asked for page by page in turn: four sequences to follow. An
// address past the weights is not an error.
inline __attribute__((always_inline)) void prefetch_ahead(const uint8_t *weights) {
    constexpr uintptr_t pages = 4, page = 4096, line = 64;
    const uintptr_t address = reinterpret_cast<uintptr_t>(weights);
    const uintptr_t index = address % (pages * page) / line;
    const uintptr_t next = address / (pages * page) * (pages * page) + pages * page;
    const uintptr_t ahead = next + index % pages * page + index / pages * line;
    __builtin_prefetch(reinterpret_cast<const void *>(ahead));
}

// One step: 4 channels of every token and output of the tile.
template <class Set, int Rows>
inline __attribute__((always_inline)) void
tile_step(typename Set::Sums (&sums)[Rows][Set::panels],
          const typename Set::Weights (&weights)[Set::panels], const int8_t *activations) {
    MQ_UNROLL
    for (int row = 0; row < Rows; row++) {
        MQ_UNROLL
        for (int panel = 0; panel < Set::panels; panel++) {
            sums[row][panel] =
                Set::template step<Rows>(sums[row][panel], weights[panel], activations, row);
        }
    }
}

// Two steps: the 8 channels that share bytes where they are stored.
template <class Set, int Rows, bool Nibbles>
inline __attribute__((always_inline)) void
tile_pair(typename Set::Sums (&even)[Rows][Set::panels],
          typename Set::Sums (&odd)[Rows][Set::panels], const int8_t *activations,
          const uint8_t *weights) {
    constexpr int bytes = 4 * Set::outputs;
    constexpr int second = Nibbles ? 0 : Set::panels * bytes;
    typename Set::Weights vectors[Set::panels];
    MQ_UNROLL
    for (int panel = 0; panel < Set::panels; panel++) {
        vectors[panel] = Set::load(weights + panel * bytes);
        if (Nibbles) vectors[panel] = Set::low(vectors[panel]);
    }
    if (Nibbles) {
        MQ_UNROLL
        for (int line = 0; line < Set::panels * bytes; line += 64) prefetch_ahead(weights + line);
    }
    tile_step<Set, Rows>(even, vectors, activations);
    MQ_UNROLL
    for (int panel = 0; panel < Set::panels; panel++) {
        vectors[panel] = Set::load(weights + second + panel * bytes);
        if (Nibbles) vectors[panel] = Set::high(vectors[panel]);
    }
    tile_step<Set, Rows>(odd, vectors, activations + 4 * Rows);
}

template <class Set, int Rows>
inline __attribute__((always_inline)) void
add_sums(const typename Set::Sums (&narrow)[Rows][Set::panels], int32_t *sums) {
    MQ_UNROLL
    for (int row = 0; row < Rows; row++) {
        MQ_UNROLL
        for (int panel = 0; panel < Set::panels; panel++) {
            Set::add(narrow[row][panel], sums + (row * Set::panels + panel) * Set::outputs);
        }
    }
}

template <class Set, int Rows>
inline __attribute__((always_inline)) void
clear_sums(typename Set::Sums (&sums)[Rows][Set::panels]) {
    MQ_UNROLL
    for (int row = 0; row < Rows; row++) {
        MQ_UNROLL
        for (int panel = 0; panel < Set::panels; panel++) sums[row][panel] = Set::zero();
    }
}

template <class Set, int Rows, bool Nibbles>
void tile(const int8_t *activations, const uint8_t *weights, int64_t pairs, int64_t run,
          int32_t *sums) {
    constexpr int bytes = (Nibbles ? 4 : 8) * Set::panels * Set::outputs;
    // Tiles of few tokens have registers for two chains of additions, and need them to hide the
    // additions' latency.
    constexpr bool two_chains = 2 * Rows * Set::panels <= Set::registers / 2;
    while (pairs > 0) {
        const int64_t count = smaller(pairs, run);
        typename Set::Sums even[Rows][Set::panels];
        typename Set::Sums odd[Rows][Set::panels];
        clear_sums<Set, Rows>(even);
        if (two_chains) clear_sums<Set, Rows>(odd);
        for (int64_t pair = 0; pair < count; pair++) {
            tile_pair<Set, Rows, Nibbles>(even, two_chains ? odd : even, activations, weights);
            activations += 8 * Rows;
            weights += bytes;
        }
        add_sums<Set, Rows>(even, sums);
        if (two_chains) add_sums<Set, Rows>(odd, sums);
        pairs -= count;
    }
}

using Tile = void (*)(const int8_t *, const uint8_t *, int64_t, int64_t, int32_t *);

// The kernel for `rows` tokens, at most Set::rows.
template <class Set, bool Nibbles, int Rows = Set::rows> Tile tile_of(int64_t rows) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return tile_of<Set, Nibbles, Rows - 1>(rows);
    }
    return tile<Set, Rows, Nibbles>;
}

// Nibbles of `pairs` steps of a block to bytes.
template <class Set> void unpack(const uint8_t *packed, int64_t pairs, uint8_t *weights) {
    constexpr int bytes = 4 * Set::outputs;
    for (int64_t pair = 0; pair < pairs; pair++) {
        for (int panel = 0; panel < Set::panels; panel++) {
            const typename Set::Weights both = Set::load(packed);
            Set::store(Set::low(both), weights + panel * bytes);
            Set::store(Set::high(both), weights + (Set::panels + panel) * bytes);
            packed += bytes;
        }
        weights += 2 * Set::panels * bytes;
    }
}

}  // namespace
