// The block-diagonal Hadamard rotation (kernels/hadamard/reference.py, `rotate`): in each block of
// 2^s channels, at distance 1, 2, 4, ..., 2^(s-1), pairs (a, b) become (a + b, a - b); then all is
// multiplied by float32(1 / sqrt(2^s)). Every value goes through the definition's operations in the
// definition's order; only which values share a pass over memory is chosen here:
//
//     distance           1 ... LANES/2      within a vector, by a permutation    \ one pass, a tile
//                    LANES ... TILE/2       between the vectors of a tile        / of 8 vectors
//                     TILE ... 2^(s-1)      between tiles, two distances a pass
//
// Vectors are the compilers' own, as wide as the unit's instruction set.

#pragma once

#include <stdlib.h>
#include <utility>  // integer_sequence, a type without code

#include "kernels.h"
#include "mergequant.h"
#include "rows/codes.h"

namespace {
namespace rows {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int TILE_VECTORS = 8;
constexpr int64_t TILE = LANES * TILE_VECTORS;

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t LaneBits __attribute__((vector_size(4 * LANES)));

inline Lanes load(const float *z)
{
    Lanes v;
    memcpy(&v, z, sizeof v);
    return v;
}

inline void store(float *z, Lanes v) { memcpy(z, &v, sizeof v); }

// One distance within a vector. The upper value of a pair is negated and added: a + (-b) is a - b.
template <int DISTANCE, int... LANE>
inline Lanes pair_lanes(Lanes v, std::integer_sequence<int, LANE...>)
{
    const LaneBits sign = {(LANE & DISTANCE ? INT32_MIN : 0)...};
#if defined(__clang__)
    const Lanes partner = __builtin_shufflevector(v, v, (LANE ^ DISTANCE)...);
#else
    const Lanes partner = __builtin_shuffle(v, LaneBits{(LANE ^ DISTANCE)...});
#endif
    return partner + (Lanes)((LaneBits)v ^ sign);
}

template <int DISTANCE> inline void pair_within(Lanes (&v)[TILE_VECTORS], int64_t block)
{
    if constexpr (DISTANCE < LANES) {
        if (DISTANCE >= block)
            return;
        for (int i = 0; i < TILE_VECTORS; ++i)
            v[i] = pair_lanes<DISTANCE>(v[i], std::make_integer_sequence<int, LANES>());
    }
}

template <int VECTORS> inline void pair_between(Lanes (&v)[TILE_VECTORS], int64_t block)
{
    if (VECTORS * LANES >= block)
        return;
    for (int i = 0; i < TILE_VECTORS; ++i) {
        if (i & VECTORS)
            continue;
        const Lanes a = v[i], b = v[i + VECTORS];
        v[i] = a + b;
        v[i + VECTORS] = a - b;
    }
}

// The distances below `block` and TILE.
inline void rotate_tile(float *z, int64_t block)
{
    Lanes v[TILE_VECTORS];
    for (int i = 0; i < TILE_VECTORS; ++i)
        v[i] = load(z + i * LANES);
    pair_within<1>(v, block);
    pair_within<2>(v, block);
    pair_within<4>(v, block);
    pair_within<8>(v, block);
    pair_between<1>(v, block);
    pair_between<2>(v, block);
    pair_between<4>(v, block);
    for (int i = 0; i < TILE_VECTORS; ++i)
        store(z + i * LANES, v[i]);
}

inline void pair_runs(float *z, int64_t distance)
{
    for (int64_t i = 0; i < distance; i += LANES) {
        const Lanes a = load(z + i), b = load(z + distance + i);
        store(z + i, a + b);
        store(z + distance + i, a - b);
    }
}

// `distance` and twice `distance`.
inline void pair_runs_twice(float *z, int64_t distance)
{
    for (int64_t i = 0; i < distance; i += LANES) {
        float *p = z + i;
        const Lanes a = load(p), b = load(p + distance);
        const Lanes c = load(p + 2 * distance), d = load(p + 3 * distance);
        const Lanes ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
        store(p, ab + cd);
        store(p + distance, a_b + c_d);
        store(p + 2 * distance, ab - cd);
        store(p + 3 * distance, a_b - c_d);
    }
}

// The distances from TILE on.
inline void rotate_block(float *z, int64_t block)
{
    int64_t distance = TILE;
    for (; 4 * distance <= block; distance *= 4)
        for (int64_t start = 0; start < block; start += 4 * distance)
            pair_runs_twice(z + start, distance);
    if (distance < block)
        pair_runs(z, distance);
}

inline void rotate_row(float *z, int64_t k, int64_t block)
{
    const int64_t whole = k - k % TILE, rest = k - whole;
    for (int64_t start = 0; start < whole; start += TILE)
        rotate_tile(z + start, block);
    if (rest) {  // whole blocks, for a block is smaller than a tile here
        float padded[TILE] = {};
        memcpy(padded, z + whole, static_cast<size_t>(rest) * sizeof *z);
        rotate_tile(padded, block);
        memcpy(z + whole, padded, static_cast<size_t>(rest) * sizeof *z);
    }
    if (block > TILE)
        for (int64_t start = 0; start < k; start += block)
            rotate_block(z + start, block);
    const float factor = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
    for (int64_t i = 0; i < k; ++i)
        z[i] *= factor;
}

}  // namespace rows

// y may be x.
inline int rows_hadamard(const float *x, float *y, int64_t m, int64_t k, int64_t block)
{
#pragma omp parallel for schedule(static) if (m > 1 && m * k >= rows::THREADED_ELEMENTS)
    for (int64_t t = 0; t < m; ++t) {
        float *row = y + t * k;
        memmove(row, x + t * k, static_cast<size_t>(k) * sizeof *row);
        rows::rotate_row(row, k, block);
    }
    return MQ_OK;
}

}  // namespace
