// The INT4 linear: y[t, j] of mergequant.h from packed weights (linear_layout.h).
//
// A task is a few blocks of outputs for a part of the tokens. It goes over the input channels in
// runs that fit the caches; in a run, over tiles of tokens (linear_tile.h) and the blocks. Integer
// sums are held for all tokens of the task and become outputs at the end (linear_epilogue.h).
// With few tokens the tiles read weights as they are stored, so that each byte of them passes
// once, in the order of memory; with many, they are first unpacked to bytes for all tiles.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"
#include "linear_activations.h"
#include "linear_epilogue.h"
#include "linear_layout.h"
#include "linear_tile.h"

namespace {

#ifndef UC
#define UC 1088
#endif
#ifndef UL
#define UL 128
#endif
#ifndef MR
#define MR 256
#endif
constexpr int64_t most_rows = MR;
constexpr int64_t unpacked_lanes = UL;    // of a task
constexpr int64_t serial_work = 1 << 17;  // products below which one thread does it all

inline int64_t thread_count() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

inline int64_t thread_index() {
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

    template <class T> T *take(int64_t count) {
        T *const at = base ? reinterpret_cast<T *>(base + used) : nullptr;
        used += round_up(count * int64_t(sizeof(T)), 64);
        return at;
    }
};

// What is known before the tasks.
template <class Set> struct Plan {
    static constexpr int lanes = Shape<Set>::lanes;

    const LinearArguments &a;
    const Shape<Set> shape;
    const int64_t first_row;
    const Tiles<Set> tiles;
    bool unpacks;
    int64_t run_channels;   // input channels at once
    int64_t task_blocks;    // blocks of a task
    int64_t output_parts, row_parts;
    int64_t threads;
    const int8_t *activations;
    int32_t *token_sums;

    Plan(const LinearArguments &arguments, int64_t first_row, int64_t rows)
        : a(arguments), shape(a.n, a.k, a.group, a.weight_bits), first_row(first_row),
          tiles(rows) {
        unpacks = tiles.count > 2;
        run_channels = unpacks ? smaller(UC, shape.channels) : shape.channels;
        const bool serial = rows * a.k * a.n < serial_work;
        threads = serial ? 1 : thread_count();
        const int64_t most = unpacks ? larger(1, unpacked_lanes / lanes) : 1;
        task_blocks = larger(1, smaller(most, shape.blocks / threads));
        output_parts = ceil_div(shape.blocks, task_blocks);
        // Few outputs: tokens in parts too, as far as there are tiles.
        const int64_t wanted = output_parts < 2 * threads ? ceil_div(2 * threads, output_parts) : 1;
        row_parts = threads > 1 ? smaller(wanted, tiles.count) : 1;
    }

    bool gathers() const { return tiles.rows > 1 || shape.channels != a.k; }
    int64_t part_begin(int64_t part) const { return part * tiles.count / row_parts; }
    int64_t part_rows() const { return (ceil_div(tiles.count, row_parts)) * Set::rows; }
};

// One thread's memory.
template <class Set> struct Scratch {
    uint8_t *weights;        // [run_channels][lanes], if unpacked
    int32_t *sums;           // [task_blocks][rows of a part][lanes]
    float *floats;           // likewise, with groups
    OutputValues *values;    // [task_blocks]

    void take(Arena &arena, const Plan<Set> &plan) {
        constexpr int lanes = Shape<Set>::lanes;
        const int64_t outputs = plan.task_blocks * plan.part_rows() * lanes;
        weights = arena.template take<uint8_t>(
            plan.unpacks ? plan.run_channels * lanes : 0);
        sums = arena.template take<int32_t>(outputs);
        floats = arena.template take<float>(plan.a.group ? outputs : 0);
        values = arena.template take<OutputValues>(plan.task_blocks);
        for (int64_t block = 0; block < plan.task_blocks; block++) {
            OutputValues found = {};
            found.step = arena.template take<float>(plan.shape.groups * lanes);
            found.zero = arena.template take<int32_t>(plan.shape.groups * lanes);
            found.bias = arena.template take<float>(lanes);
            if (arena.base) values[block] = found;
        }
    }
};

template <class Set, int Planes> struct Task {
    static constexpr int lanes = Shape<Set>::lanes;

    const Plan<Set> &plan;
    const Scratch<Set> &scratch;
    int64_t first_block, blocks, first_tile, last_tile, first_row, rows;

    Task(const Plan<Set> &plan, const Scratch<Set> &scratch, int64_t task)
        : plan(plan), scratch(scratch) {
        const int64_t part = task % plan.row_parts;
        first_block = task / plan.row_parts * plan.task_blocks;
        blocks = smaller(plan.task_blocks, plan.shape.blocks - first_block);
        first_tile = plan.part_begin(part);
        last_tile = plan.part_begin(part + 1);
        first_row = plan.tiles.begin(first_tile);
        rows = plan.tiles.begin(last_tile) - first_row;
    }

    int32_t *sums(int64_t block) const { return scratch.sums + block * rows * lanes; }
    float *floats(int64_t block) const { return scratch.floats + block * rows * lanes; }

    void start() const {
        const int64_t count = blocks * rows * lanes;
        for (int64_t i = 0; i < count; i++) scratch.sums[i] = 0;
        if (plan.a.group) {
            for (int64_t i = 0; i < count; i++) scratch.floats[i] = -0.0f;
        }
        for (int64_t block = 0; block < blocks; block++) {
            load_outputs(plan.a, plan.shape, first_block + block, scratch.values[block]);
        }
    }

    // Weights of a block as they are stored, from a channel on.
    const uint8_t *packed(int64_t block, int64_t channel) const {
        return plan.a.packed + (first_block + block) * plan.shape.block_bytes() +
               channel * lanes / 2;
    }

    void end_group(int64_t block, int64_t row, int64_t size, int64_t group) const {
        const OutputValues &values = scratch.values[block];
        for (int64_t r = row; r < row + size; r++) {
            int32_t *const of_row = sums(block) + r * lanes;
            const int32_t token_sum =
                plan.token_sums[(first_row + r) * plan.shape.groups + group];
            add_group<Set, Planes>(of_row, values.zero + group * lanes,
                                   values.step + group * lanes, token_sum,
                                   floats(block) + r * lanes);
            for (int i = 0; i < lanes; i++) of_row[i] = 0;
        }
    }

    // One tile, over the channels from `begin` to `end`.
    void run_tile(int64_t tile, int64_t block, int64_t begin, int64_t end) const {
        const Shape<Set> &shape = plan.shape;
        const int64_t size = plan.tiles.size(tile);
        const int64_t row = plan.tiles.begin(tile) - first_row;
        const int8_t *const activations =
            plan.activations + plan.tiles.begin(tile) * shape.channels;
        const Tile kernel =
            plan.unpacks ? tile_of<Set, false>(size) : tile_of<Set, true>(size);
        const uint8_t *const weights = plan.unpacks ? scratch.weights : packed(block, begin);
        const int64_t bytes_of_pair = plan.unpacks ? 8 * lanes : 4 * lanes;
        const int64_t run = Set::run(plan.a.activation_bits);
        for (int64_t channel = begin; channel < end;) {
            const int64_t group = channel / shape.span;
            const int64_t stop = smaller(end, (group + 1) * shape.span);
            kernel(activations + channel * size, weights + (channel - begin) / 8 * bytes_of_pair,
                   (stop - channel) / 8, run, sums(block) + row * lanes);
            const bool whole = stop == shape.channels || stop == (group + 1) * shape.span;
            if (plan.a.group && whole) end_group(block, row, size, group);
            channel = stop;
        }
    }

    // All blocks of one token: what is written of a row of outputs is in one piece.
    void finish(int64_t r) const {
        const LinearArguments &a = plan.a;
        const int64_t token = plan.first_row + first_row + r;
        const float token_step = a.token_step ? a.token_step[token] : 1.0f;
        const int64_t row_bytes = a.n * element_bytes(a.type);
        uint8_t *const row = static_cast<uint8_t *>(a.y) + token * row_bytes;
#ifndef WP
#define WP 4
#endif
#ifdef WP
        if (r + WP < rows) {
            const uint8_t *const ahead = row + WP * row_bytes + first_block * plan.shape.outputs * element_bytes(a.type);
            for (int64_t line = 0; line < blocks * plan.shape.outputs * element_bytes(a.type); line += 64)
                __builtin_prefetch(ahead + line, 1);
        }
#endif
        for (int64_t block = 0; block < blocks; block++) {
            const OutputValues &values = scratch.values[block];
            float y[lanes];
            if (a.group) {
                scale_floats<Set, Planes>(floats(block) + r * lanes, values, token_step, y);
            } else {
                scale_sums<Set, Planes>(sums(block) + r * lanes, values,
                                        plan.token_sums[first_row + r], token_step, y);
            }
            store_outputs<Set, Planes>(y, values, a.type, row);
        }
    }

    void run() const {
        start();
        for (int64_t begin = 0; begin < plan.shape.channels; begin += plan.run_channels) {
            const int64_t end = smaller(plan.shape.channels, begin + plan.run_channels);
            for (int64_t block = 0; block < blocks; block++) {
                if (plan.unpacks) {
                    unpack<Set>(packed(block, begin), (end - begin) / 8, scratch.weights);
                }
                for (int64_t tile = first_tile; tile < last_tile; tile++) {
                    run_tile(tile, block, begin, end);
                }
            }
        }
        for (int64_t r = 0; r < rows; r++) finish(r);
    }
};

template <class Set>
void prepare_tile(const Plan<Set> &plan, int64_t tile, int8_t *activations) {
    const LinearArguments &a = plan.a;
    const int64_t row = plan.tiles.begin(tile), rows = plan.tiles.size(tile);
    const int8_t *const codes = a.codes + (plan.first_row + row) * a.stride;
    if (plan.gathers()) {
        const int64_t channels = plan.shape.channels;
        gather_of<Set>(rows)(codes, a.stride, a.k, channels, activations + row * channels);
    }
    for (int64_t r = 0; r < rows; r++) {
        sum_token(codes + r * a.stride, plan.shape,
                  plan.token_sums + (row + r) * plan.shape.groups);
    }
}

template <class Set, int Planes> int linear_rows(Plan<Set> &plan) {
    Arena arena = {nullptr, 0};
    Scratch<Set> scratch;
    scratch.take(arena, plan);
    const int64_t scratch_bytes = arena.used;
    const int64_t activation_bytes =
        plan.gathers() ? round_up(plan.tiles.rows * plan.shape.channels, 64) : 0;
    const int64_t sum_bytes = round_up(4 * plan.tiles.rows * plan.shape.groups, 64);
    uint8_t *const memory = static_cast<uint8_t *>(aligned_alloc(
        64, size_t(activation_bytes + sum_bytes + plan.threads * scratch_bytes)));
    if (!memory) return MQ_ERROR_MEMORY;
    int8_t *const gathered = reinterpret_cast<int8_t *>(memory);
    plan.activations =
        plan.gathers() ? gathered : plan.a.codes + plan.first_row * plan.a.stride;
    plan.token_sums = reinterpret_cast<int32_t *>(memory + activation_bytes);
    uint8_t *const scratches = memory + activation_bytes + sum_bytes;
    const int64_t tasks = plan.output_parts * plan.row_parts;
#pragma omp parallel num_threads(int(plan.threads)) if (plan.threads > 1)
    {
        Arena own = {scratches + thread_index() * scratch_bytes, 0};
        Scratch<Set> memory_of_thread;
        memory_of_thread.take(own, plan);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < plan.tiles.count; tile++) prepare_tile(plan, tile, gathered);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            Task<Set, Planes>(plan, memory_of_thread, task).run();
        }
    }
    free(memory);
    return MQ_OK;
}

template <class Set> int linear(const LinearArguments &a) {
    for (int64_t first = 0; first < a.m; first += most_rows) {
        Plan<Set> plan(a, first, smaller(most_rows, a.m - first));
        const int status =
            a.weight_bits == 8 ? linear_rows<Set, 2>(plan) : linear_rows<Set, 1>(plan);
        if (status != MQ_OK) return status;
    }
    return MQ_OK;
}

}  // namespace
