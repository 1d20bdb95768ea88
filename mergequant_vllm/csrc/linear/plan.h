// How one call of the INT4 linear is cut into tasks, and the memory it needs.
//
// A task is a few blocks of outputs for all tokens or, where there are fewer such tasks than
// threads could share, for a part of the tokens. Per task and thread:
//
//   weights  [run_channels][lanes]               one block's nibbles, unpacked; only with many tokens
//   sums     [tokens of a tile][lanes] int32     or, where a block's channels are too many for one
//                                                run, [task_blocks][tokens][lanes]
//   floats   likewise, float32                   only with spans
//   values   [task_blocks], with their arrays    steps, zero points, constants of the outputs

#pragma once

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"
#include "linear/activations.h"
#include "linear/epilogue.h"
#include "linear/layout.h"

namespace {

// Tokens at once: bounds the scratch memory; weights are unpacked once for all of them.
constexpr int64_t MOST_ROWS = 512;
// Weights of a block as bytes that many tokens read in turn: they fit the second cache.
constexpr int64_t RUN_BYTES = 256 << 10;
// Outputs of a task with many tokens.
constexpr int64_t MANY_LANES = 256;
// Tiles of tokens that are few: they read nibbles as they are stored, rather than unpacked.
constexpr int64_t FEW_TILES = 2;
// Products below which one thread does it all.
constexpr int64_t SERIAL_WORK = 1 << 17;

inline int64_t thread_count()
{
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

inline int64_t thread_index()
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Hands out parts of one allocation, each at a whole cache line; without a base it only counts.
struct Arena {
    uint8_t *base;
    int64_t used;

    template <class T> T *take(int64_t count)
    {
        T *const at = base ? reinterpret_cast<T *>(base + used) : nullptr;
        used += round_up(count * int64_t(sizeof(T)), 64);
        return at;
    }
};

template <class Set> struct Plan {
    const LinearArguments &a;
    const Shape<Set> shape;
    const int64_t first_row;
    const Tiles<Set> tiles;
    int64_t threads;
    bool unpacks;
    int64_t run_channels;
    int64_t task_blocks;  // at most
    int64_t output_parts, row_parts;  // tasks: each of one by each of the other
    const int8_t *activations;        // linear/activations.h
    int32_t *token_sums;

    Plan(const LinearArguments &arguments, int64_t first_row, int64_t rows)
        : a(arguments), shape(a.n, a.k, a.weight_bits, a.span_ends, a.spans),
          first_row(first_row), tiles(rows)
    {
        threads = rows * a.k * a.n < SERIAL_WORK ? 1 : thread_count();
        const bool many = tiles.count > FEW_TILES;
        unpacks = many && shape.form != Form::BYTES;
        run_channels = many ? near_channels() : shape.channels;
        const int64_t most = many ? larger(1, MANY_LANES / Shape<Set>::lanes) : 1;
        const int64_t wished = larger(1, smaller(most, shape.blocks / threads));
        output_parts = ceil_div(shape.blocks, wished);
        task_blocks = ceil_div(shape.blocks, output_parts);
        const int64_t wanted = ceil_div(2 * threads, output_parts);
        row_parts = threads > 1 ? smaller(wanted, tiles.count) : 1;
    }

    // Whole spans, where they are small enough: their sums need not be kept.
    int64_t near_channels() const
    {
        const int64_t most = smaller(RUN_BYTES / Shape<Set>::lanes, shape.channels);
        const int64_t unit = shape.unit();
        return unit <= most ? most / unit * unit : most;
    }

    // One token's codes are their own tile, unless they are to be padded.
    bool gathers() const { return tiles.rows > 1 || shape.channels != a.k; }

    int64_t tasks() const { return output_parts * row_parts; }
    int64_t part_begin(int64_t part) const { return part * tiles.count / row_parts; }
    // As evenly as they go: threads wait for the longest task.
    int64_t block_begin(int64_t part) const { return part * shape.blocks / output_parts; }
    // Whether sums need not be kept from one run of channels to the next.
    bool whole() const { return run_channels == shape.channels; }
    int64_t most_part_rows() const { return ceil_div(tiles.count, row_parts) * Set::rows; }
};

template <class Set> struct Scratch {
    uint8_t *weights;
    int32_t *sums;
    float *floats;
    OutputValues *values;

    Scratch(Arena &arena, const Plan<Set> &plan)
    {
        constexpr int lanes = Shape<Set>::lanes;
        const int64_t kept = plan.whole() ? Set::rows : plan.task_blocks * plan.most_part_rows();
        const int64_t outputs = kept * lanes;
        const int64_t of_spans = plan.shape.spans * lanes;
        weights = arena.take<uint8_t>(plan.unpacks ? plan.run_channels * lanes : 0);
        sums = arena.take<int32_t>(outputs);
        floats = arena.take<float>(plan.a.span_ends ? outputs : 0);
        values = arena.take<OutputValues>(plan.task_blocks);
        float *const steps = arena.take<float>(plan.task_blocks * of_spans);
        int32_t *const zeros = arena.take<int32_t>(plan.task_blocks * of_spans);
        int32_t *const weight_sums =
            arena.take<int32_t>(plan.a.token_zero ? plan.task_blocks * of_spans : 0);
        float *const constants = arena.take<float>(plan.task_blocks * lanes);
        if (!arena.base)
            return;
        for (int64_t block = 0; block < plan.task_blocks; ++block) {
            values[block] = {steps + block * of_spans, zeros + block * of_spans,
                             plan.a.token_zero ? weight_sums + block * of_spans : nullptr,
                             constants + block * lanes, 0, 0};
        }
    }
};

}  // namespace
