// The INT4 linear: y[t, j] of mergequant.h, from packed weights.
//
//   linear/layout.h       weights as they are stored
//   linear/activations.h  activations as tiles read them
//   linear/tile.h         integer sums of a tile
//   linear/epilogue.h     sums to outputs
//   linear/plan.h         how the work is divided
//   linear/task.h         one part of it
//
// All of it is a template over an instruction set's vectors (isa/vectors_*.h). Sums are exact and each
// output is one thread's, so that results do not depend on the division.

#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "linear/task.h"

namespace {

// Activations of one tile and their sums; `gathered` is null where codes are read in place.
template <class Set> void prepare_tile(const Plan<Set> &plan, int64_t tile, int8_t *gathered)
{
    const LinearArguments &a = plan.a;
    const int64_t row = plan.tiles.begin(tile), rows = plan.tiles.size(tile);
    const int64_t channels = plan.shape.channels, spans = plan.shape.spans;
    const int8_t *const codes = a.codes + (plan.first_row + row) * a.stride;
    if (gathered)
        gather_of<Set>(rows)(codes, a.stride, a.k, channels, gathered + row * channels);
    for (int64_t r = 0; r < rows; ++r)
        sum_token(codes + r * a.stride, plan.shape, plan.token_sums + (row + r) * spans);
}

// Memory that a calling thread keeps from one call to the next: pages that are new each time cost
// more than what is computed in them is worth.
class KeptMemory {
  public:
    ~KeptMemory() { free(memory); }

    // At least so many bytes, at a cache line; null if there are none.
    uint8_t *take(int64_t bytes)
    {
        if (bytes > held) {
            free(memory);
            held = round_up(bytes, 1 << 16);
            memory = static_cast<uint8_t *>(aligned_alloc(64, size_t(held)));
            if (!memory)
                held = 0;
        }
        return memory;
    }

  private:
    uint8_t *memory = nullptr;
    int64_t held = 0;
};

// One allocation for all threads: gathered activations, their sums, each thread's scratch.
template <class Set, Form Stored> int linear_rows(Plan<Set> &plan)
{
    Arena shared = {nullptr, 0}, own = {nullptr, 0};
    const int64_t gathered_bytes = plan.gathers() ? plan.tiles.rows * plan.shape.channels : 0;
    shared.take<int8_t>(gathered_bytes);
    shared.take<int32_t>(plan.tiles.rows * plan.shape.spans);
    Scratch<Set>(own, plan);
    const int64_t bytes = shared.used + plan.threads * own.used;
    static thread_local KeptMemory kept;
    uint8_t *const memory = kept.take(bytes);
    if (!memory)
        return MQ_ERROR_MEMORY;
    Arena arena = {memory, 0};
    int8_t *const taken = arena.take<int8_t>(gathered_bytes);
    int8_t *const gathered = plan.gathers() ? taken : nullptr;
    plan.activations = gathered ? gathered : plan.a.codes + plan.first_row * plan.a.stride;
    plan.token_sums = arena.take<int32_t>(plan.tiles.rows * plan.shape.spans);
#pragma omp parallel num_threads(int(plan.threads)) if (plan.threads > 1)
    {
        Arena part = {memory + shared.used + thread_index() * own.used, 0};
        const Scratch<Set> scratch(part, plan);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < plan.tiles.count; ++tile)
            prepare_tile(plan, tile, gathered);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < plan.tasks(); ++task)
            Task<Set, Stored>(plan, scratch, task).run();
    }
    return MQ_OK;
}

template <class Set> int linear(const LinearArguments &a)
{
    for (int64_t first = 0; first < a.m; first += MOST_ROWS) {
        Plan<Set> plan(a, first, smaller(MOST_ROWS, a.m - first));
        const int status = a.weight_bits == 8 ? linear_rows<Set, form_of<Set>(8)>(plan)
                                              : linear_rows<Set, Form::NIBBLES>(plan);
        if (status != MQ_OK)
            return status;
    }
    return MQ_OK;
}

}  // namespace
