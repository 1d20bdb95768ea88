// One task of the INT4 linear (linear/plan.h), on one thread.
//
// It goes over the input channels in runs that fit the caches, in a run over its blocks of outputs,
// and in a block over tiles of tokens. With few tokens a run is all channels and the tiles read
// weights as they are stored, so that each byte of them passes once, in the order of memory.

#pragma once

#include <stdint.h>

#include "linear/epilogue.h"
#include "linear/plan.h"
#include "linear/tile.h"

namespace {

template <class Set, int Planes> struct Task {
    static constexpr int lanes = Shape<Set>::lanes;

    const Plan<Set> &plan;
    const Scratch<Set> &scratch;
    int64_t first_block, blocks, first_tile, last_tile, first_row, rows;

    Task(const Plan<Set> &plan, const Scratch<Set> &scratch, int64_t task)
        : plan(plan), scratch(scratch)
    {
        const int64_t part = task % plan.row_parts;
        first_block = task / plan.row_parts * plan.task_blocks;
        blocks = smaller(plan.task_blocks, plan.shape.blocks - first_block);
        first_tile = plan.part_begin(part);
        last_tile = plan.part_begin(part + 1);
        first_row = plan.tiles.begin(first_tile);
        rows = plan.tiles.begin(last_tile) - first_row;
    }

    void run() const
    {
        for (int64_t block = 0; block < blocks; ++block)
            load_outputs(plan.a, plan.shape, first_block + block, scratch.values[block]);
        for (int64_t begin = 0; begin < plan.shape.channels; begin += plan.run_channels) {
            const int64_t end = smaller(plan.shape.channels, begin + plan.run_channels);
            for (int64_t block = 0; block < blocks; ++block)
                run_block(block, begin, end);
        }
        for (int64_t row = 0; row < rows; ++row)
            finish(row);
    }

    int32_t *sums(int64_t block, int64_t row) const
    {
        return scratch.sums + (block * rows + row) * lanes;
    }

    float *floats(int64_t block, int64_t row) const
    {
        return scratch.floats + (block * rows + row) * lanes;
    }

    const int32_t *token_sums(int64_t row) const
    {
        return plan.token_sums + (first_row + row) * plan.shape.spans;
    }

    int64_t token_of(int64_t row) const { return plan.first_row + first_row + row; }

    TokenValues token_values(int64_t row, int64_t span) const
    {
        const int32_t *const zeros = plan.a.token_zero;
        return {token_sums(row)[span], zeros ? zeros[token_of(row)] : 0};
    }

    void run_block(int64_t block, int64_t begin, int64_t end) const
    {
        const uint8_t *weights =
            plan.a.packed + (first_block + block) * plan.shape.block_bytes() + begin * lanes / 2;
        if (plan.unpacks) {
            unpack<Set>(weights, (end - begin) / 8, scratch.weights);
            weights = scratch.weights;
        }
        for (int64_t tile = first_tile; tile < last_tile; ++tile)
            run_tile(tile, block, weights, begin, end);
    }

    // One tile of tokens by one block, from channel `begin` to `end`, span by span.
    void run_tile(int64_t tile, int64_t block, const uint8_t *weights, int64_t begin,
                  int64_t end) const
    {
        const Shape<Set> &shape = plan.shape;
        const int64_t size = plan.tiles.size(tile);
        const int64_t row = plan.tiles.begin(tile) - first_row;
        const int8_t *activations = plan.activations + plan.tiles.begin(tile) * shape.channels;
        const Tile kernel = plan.unpacks ? tile_of<Set, false>(size) : tile_of<Set, true>(size);
        const int64_t bytes_of_pair = (plan.unpacks ? 8 : 4) * lanes;
        const int64_t run = Set::run(plan.a.activation_bits);
        int64_t span = shape.span_of(begin);
        for (int64_t channel = begin; channel < end;) {
            const int64_t last = shape.padded_end(span), stop = smaller(end, last);
            kernel(activations + channel * size, weights + (channel - begin) / 8 * bytes_of_pair,
                   (stop - channel) / 8, run, channel == shape.begin(span), sums(block, row));
            if (plan.a.span_ends && stop == last)
                finish_span(block, row, size, span);
            channel = stop;
            ++span;
        }
    }

    void finish_span(int64_t block, int64_t row, int64_t size, int64_t span) const
    {
        const OutputValues &values = scratch.values[block];
        with_terms(terms_of(plan.a), [&](auto terms) {
            for (int64_t r = row; r < row + size; ++r)
                add_span<Set, Planes, terms.value>(sums(block, r), values, span,
                                                   token_values(r, span), floats(block, r));
        });
    }

    // The outputs of all blocks of one token, so that they are written in one piece.
    void finish(int64_t row) const
    {
        const LinearArguments &a = plan.a;
        const int64_t token = token_of(row);
        const float token_step = a.token_step ? a.token_step[token] : 1.0f;
        const int64_t row_bytes = a.n * element_bytes(a.type);
        uint8_t *const outputs = static_cast<uint8_t *>(a.y) + token * row_bytes;
        if (row + ROWS_AHEAD < rows)
            prefetch_outputs(outputs + ROWS_AHEAD * row_bytes);
        for (int64_t block = 0; block < blocks; ++block) {
            const OutputValues &values = scratch.values[block];
            float y[lanes];
            if (a.span_ends)
                scale_floats<Set, Planes>(floats(block, row), values, token_step, y);
            else
                with_terms(terms_of(a), [&](auto terms) {
                    scale_sums<Set, Planes, terms.value>(sums(block, row), values,
                                                         token_values(row, 0), token_step, y);
                });
            store_outputs<Set, Planes>(y, values, a.type, outputs);
        }
    }

    // Each row of outputs is far from the last one in memory; without a hint, writing one waits
    // for the other.
    static constexpr int64_t ROWS_AHEAD = 4;

    void prefetch_outputs(const uint8_t *outputs) const
    {
        const int64_t bytes = element_bytes(plan.a.type);
        const int64_t begin = scratch.values[0].first * bytes;
        const int64_t end = begin + blocks * plan.shape.outputs * bytes;
        for (int64_t line = begin; line < end; line += 64)
            __builtin_prefetch(outputs + line, 1);
    }
};

}  // namespace
