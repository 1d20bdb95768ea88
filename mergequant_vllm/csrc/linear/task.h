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

template <class Set, Form Stored> struct Task {
    static constexpr int lanes = Shape<Set>::lanes;

    const Plan<Set> &plan;
    const Scratch<Set> &scratch;
    int64_t first_block, blocks, first_tile, last_tile, first_row, rows;

    Task(const Plan<Set> &plan, const Scratch<Set> &scratch, int64_t task)
        : plan(plan), scratch(scratch)
    {
        const int64_t part = task % plan.row_parts;
        first_block = plan.block_begin(task / plan.row_parts);
        blocks = plan.block_begin(task / plan.row_parts + 1) - first_block;
        first_tile = plan.part_begin(part);
        last_tile = plan.part_begin(part + 1);
        first_row = plan.tiles.begin(first_tile);
        rows = plan.tiles.begin(last_tile) - first_row;
    }

    void run() const
    {
        for (int64_t block = 0; block < blocks; ++block)
            load_outputs(plan.a, plan.shape, first_block + block, scratch.values[block]);
        for (int64_t block = 0; block < blocks; ++block)
            prefetch_values(plan.a, plan.shape, first_block + blocks + block);
        for (int64_t begin = 0; begin < plan.shape.channels; begin += plan.run_channels) {
            const int64_t end = smaller(plan.shape.channels, begin + plan.run_channels);
            for (int64_t block = 0; block < blocks; ++block)
                run_block(block, begin, end);
        }
    }

    // Where the sums of a tile begin, whose first token is `row`.
    int64_t kept(int64_t block, int64_t row) const
    {
        return plan.whole() ? 0 : (block * rows + row) * lanes;
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
        const uint8_t *const stored =
            plan.a.packed + (first_block + block) * plan.shape.block_bytes() +
            plan.shape.bytes(begin);
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
            const From source = source_of(tile);
            const bool unpacked = plan.unpacks && source == From::NEAR_BYTES;
            run_tile(source, tile, block, unpacked ? scratch.weights : stored, begin, end);
        }
    }

    From source_of(int64_t tile) const
    {
        if (Stored != Form::BYTES && !plan.unpacks)
            return From::NIBBLES;
        if (tile != first_tile)
            return From::NEAR_BYTES;
        return Stored == Form::BYTES ? From::FAR_BYTES : From::UNPACKING;
    }

    // One tile of tokens by one block, from channel `begin` to `end`, span by span.
    void run_tile(From source, int64_t tile, int64_t block, const uint8_t *weights, int64_t begin,
                  int64_t end) const
    {
        const Shape<Set> &shape = plan.shape;
        const int64_t size = plan.tiles.size(tile);
        const int64_t row = plan.tiles.begin(tile) - first_row;
        int32_t *const sums = scratch.sums + kept(block, row);
        float *const floats = scratch.floats + kept(block, row);
        const int8_t *activations = plan.activations + plan.tiles.begin(tile) * shape.channels;
        const Tile kernel = tile_of<Set>(source, size);
        const int64_t bytes_of_pair = (are_nibbles(source) ? 4 : 8) * lanes;
        const int64_t run = Set::run(plan.a.activation_bits);
        if (end == shape.channels)
            prefetch_outputs(block, row, size);
        int64_t span = shape.span_of(begin);
        for (int64_t channel = begin; channel < end;) {
            const int64_t last = shape.padded_end(span), stop = smaller(end, last);
            const int64_t pairs = (channel - begin) / 8;
            kernel(activations + channel * size, weights + pairs * bytes_of_pair,
                   scratch.weights + pairs * 8 * lanes, (stop - channel) / 8, run,
                   channel == shape.begin(span), sums);
            if (plan.a.span_ends && stop == last && stop < shape.channels)
                finish_span(block, row, size, span, sums, floats);
            channel = stop;
            ++span;
        }
        if (end == shape.channels)
            with_terms(terms_of(plan.a), [&](auto terms) {
                with_type(plan.a.type, [&](auto type) {
                    for (int64_t r = 0; r < size; ++r) {
                        if (r + ROWS_AHEAD < size)
                            prefetch_outputs(block, row + r + ROWS_AHEAD, 1);
                        finish<terms.value, type.value>(block, row + r, sums + r * lanes,
                                                        floats + r * lanes);
                    }
                });
            });
    }

    void finish_span(int64_t block, int64_t row, int64_t size, int64_t span, const int32_t *sums,
                     float *floats) const
    {
        const OutputValues &values = scratch.values[block];
        with_terms(terms_of(plan.a), [&](auto terms) {
            for (int64_t r = 0; r < size; ++r)
                add_span<Set, Stored, terms.value>(sums + r * lanes, values, span,
                                                   token_values(row + r, span), floats + r * lanes);
        });
    }

    // The outputs of a block of one token.
    template <Terms Which, int Type>
    MQ_INLINE void finish(int64_t block, int64_t row, const int32_t *sums, const float *floats) const
    {
        const LinearArguments &a = plan.a;
        const int64_t token = token_of(row);
        const float token_step = a.token_step ? a.token_step[token] : 1.0f;
        const OutputValues &values = scratch.values[block];
        uint8_t *const to = outputs(token) + values.first * bytes_of(Type);
        const bool all = values.count == plan.shape.outputs;
        uint8_t some[lanes * bytes_of(Type)];
        uint8_t *const y = all ? to : some;
        const int64_t last = plan.shape.spans - 1;
        if (a.span_ends)
            scale_spans<Set, Stored, Which, Type>(sums, floats, values, last,
                                                  token_values(row, last), token_step, y);
        else
            scale_sums<Set, Stored, Which, Type>(sums, values, token_values(row, 0), token_step, y);
        if (!all)
            memcpy(to, some, size_t(values.count) * bytes_of(Type));
    }

    uint8_t *outputs(int64_t token) const
    {
        return static_cast<uint8_t *>(plan.a.y) + token * plan.a.n * bytes_of(plan.a.type);
    }

    // Rows of outputs are far apart in memory. Their cache lines are asked for before the tile, which
    // brings them near, and again some rows ahead: as many rows may share one set of the first cache.
    static constexpr int64_t ROWS_AHEAD = 4;

    void prefetch_outputs(int64_t block, int64_t row, int64_t size) const
    {
        const OutputValues &values = scratch.values[block];
        const int64_t bytes = bytes_of(plan.a.type);
        for (int64_t r = row; r < row + size; ++r) {
            const uint8_t *const to = outputs(token_of(r)) + values.first * bytes;
            for (int64_t byte = 0; byte < plan.shape.outputs * bytes; byte += 64)
                __builtin_prefetch(to + byte, 1);
        }
    }
};

}  // namespace
