// The C interface: finds the instruction set, checks the arguments, calls the set's kernel.
//
// Contents of arrays are checked where a wrong value would read beyond an array (the gather's
// index) or where it costs nothing (weights, when they are packed); activation codes are not.

#include "kernels.h"

#pragma GCC visibility push(default)
#include "mergequant.h"
#pragma GCC visibility pop

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

namespace {

#if defined(__x86_64__)

// The compiler's tests of the vector sets include the system's saving of their registers. That of
// F16C, whose registers are AVX's, is not known to every compiler.
bool has_avx2()
{
    unsigned a, b, c, d;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512()
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

#elif defined(__aarch64__)

bool has_dotprod()
{
#if defined(__linux__)
    constexpr unsigned long ASIMDDP = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & ASIMDDP) != 0;
#elif defined(__APPLE__)
    return true;  // every 64-bit processor of theirs that runs a desktop system
#else
    return false;
#endif
}

#endif

struct Isa {
    const Kernels *kernels;
    bool runs;
};

// Slowest first. The CPU is asked once, as the library is loaded: in a virtual machine each question
// costs microseconds.
const Isa ISAS[] = {
    {&kernels_portable, true},
#if defined(__x86_64__)
    {&kernels_avx2, has_avx2()},
    {&kernels_avx512, has_avx512()},
    {&kernels_avx512vnni, has_avx512vnni()},
#elif defined(__aarch64__)
    {&kernels_neon, has_dotprod()},
#endif
};

constexpr int ISA_COUNT = sizeof(ISAS) / sizeof(ISAS[0]);

constexpr int64_t MOST_CHANNELS = INT32_MAX;
constexpr int64_t MOST_OUTPUTS = int64_t(1) << 31;

// The kernels of a set that this machine runs, or null.
const Kernels *find(int isa) { return mq_isa_runs(isa) ? ISAS[isa].kernels : nullptr; }

bool is_type(int type) { return type == MQ_FLOAT32 || type == MQ_BFLOAT16 || type == MQ_FLOAT16; }

bool is_block(int64_t block, int64_t k)
{
    return block > 0 && (block & (block - 1)) == 0 && k % block == 0;
}

bool is_weight(int64_t n, int64_t k, int weight_bits)
{
    const bool sized = n > 0 && n <= MOST_OUTPUTS && k > 0 && k <= MOST_CHANNELS;
    return sized && (weight_bits == 3 || weight_bits == 4 || weight_bits == 8);
}

// Channels of the longest span, or 0 where they are no spans.
int64_t longest_span(const int32_t *ends, int64_t spans, int64_t k)
{
    if (!ends)
        return k;
    int64_t begin = 0, longest = 0;
    for (int64_t span = 0; span < spans; ++span) {
        const int64_t end = ends[span];
        if (end <= begin || (span + 1 < spans ? end % 32 != 0 : end != k))
            return 0;
        longest = longest > end - begin ? longest : end - begin;
        begin = end;
    }
    return longest;
}

// rounding.py, `largest_magnitude`.
int64_t largest_magnitude(int bits, bool zero_point)
{
    return zero_point ? (1 << bits) - 1 : 1 << (bits - 1);
}

// Whether `channels` products add up in 32 bits, also with a nibble in the weight's place. Bytes
// without a sign may add up to more: their sums are modulo 2^32 until the offset is taken out.
bool fit_32_bits(int64_t channels, int weight_bits, bool zero_points, int activation_bits,
                 bool token_zero)
{
    constexpr int64_t NIBBLE = 15;
    const int64_t weight = largest_magnitude(weight_bits, zero_points);
    const int64_t product = (weight > NIBBLE ? weight : NIBBLE) *
                            largest_magnitude(activation_bits, token_zero);
    return channels <= INT32_MAX / product;
}

bool are_codes(const int8_t *codes, int64_t count, int bits)
{
    const int largest = (1 << (bits - 1)) - 1;
    bool inside = true;
    for (int64_t i = 0; i < count; ++i)
        inside &= codes[i] >= -largest - 1 && codes[i] <= largest;
    return inside;
}

bool is_index(const int32_t *index, int64_t count, int64_t n)
{
    bool inside = true;
    for (int64_t i = 0; i < count; ++i)
        inside &= index[i] >= 0 && index[i] < n;
    return inside;
}

}  // namespace

int mq_isa_count(void) { return ISA_COUNT; }

const char *mq_isa_name(int isa)
{
    return isa >= 0 && isa < ISA_COUNT ? ISAS[isa].kernels->name : nullptr;
}

int mq_isa_runs(int isa) { return isa >= 0 && isa < ISA_COUNT && ISAS[isa].runs; }

// 0 if the arguments are wrong.
int64_t mq_linear_bytes(int isa, int64_t n, int64_t k, int weight_bits)
{
    const Kernels *const kernels = find(isa);
    if (!kernels || !is_weight(n, k, weight_bits))
        return 0;
    return kernels->linear_bytes(n, k, weight_bits);
}

int mq_linear_pack(int isa, const int8_t *codes, int64_t n, int64_t k, int weight_bits,
                   uint8_t *packed)
{
    const Kernels *const kernels = find(isa);
    if (!kernels)
        return MQ_ERROR_ISA;
    if (!codes || !packed || !is_weight(n, k, weight_bits))
        return MQ_ERROR_ARGUMENT;
    if (!are_codes(codes, n * k, weight_bits))
        return MQ_ERROR_ARGUMENT;
    kernels->linear_pack(codes, n, k, weight_bits, packed);
    return MQ_OK;
}

int mq_linear(int isa, const int8_t *codes, int64_t stride, int64_t m, const uint8_t *packed,
              const float *weight_step, const int8_t *zero_points, const int32_t *weight_sums,
              const float *token_step, const int32_t *token_zero, const float *constant, void *y,
              int type, int64_t n, int64_t k, const int32_t *span_ends, int64_t spans,
              int weight_bits, int activation_bits)
{
    const Kernels *const kernels = find(isa);
    if (!kernels)
        return MQ_ERROR_ISA;
    if (m < 0 || !is_weight(n, k, weight_bits) || !is_type(type))
        return MQ_ERROR_ARGUMENT;
    if (activation_bits != 4 && activation_bits != 8)
        return MQ_ERROR_ARGUMENT;
    const int64_t longest = longest_span(span_ends, spans, k);
    if (!longest || !fit_32_bits(longest, weight_bits, zero_points, activation_bits, token_zero))
        return MQ_ERROR_ARGUMENT;
    if (m == 0)
        return MQ_OK;
    if (!codes || !packed || !weight_step || !y || (token_zero && !weight_sums))
        return MQ_ERROR_ARGUMENT;
    if (m > 1 && stride < k)
        return MQ_ERROR_ARGUMENT;
    return kernels->linear({codes, stride, m, packed, weight_step, zero_points, weight_sums,
                            token_step, token_zero, constant, y, type, n, k, span_ends,
                            span_ends ? spans : 1, weight_bits, activation_bits});
}

int mq_token_quant(int isa, const void *x, int type, int64_t stride, int64_t m, int64_t k,
                   const float *clip, int bits, int64_t block, int8_t *codes, int64_t columns,
                   float *step, int32_t *zero)
{
    const Kernels *const kernels = find(isa);
    if (!kernels)
        return MQ_ERROR_ISA;
    if (m < 0 || k <= 0 || columns < k || !is_type(type) || !clip)
        return MQ_ERROR_ARGUMENT;
    if (bits < 2 || bits > 8 || (block != 0 && !is_block(block, k)))
        return MQ_ERROR_ARGUMENT;
    if (m == 0)
        return MQ_OK;
    if (!x || !codes || !step || (m > 1 && stride < k))
        return MQ_ERROR_ARGUMENT;
    return kernels->token_quant(
        {x, type, stride, m, k, *clip, bits, block, codes, columns, step, zero});
}

int mq_static_round(int isa, const void *x, int type, int64_t stride, int64_t m, int64_t n,
                    const int32_t *index, const float *offset, int bits, int8_t *codes, int64_t k,
                    int64_t columns)
{
    const Kernels *const kernels = find(isa);
    if (!kernels)
        return MQ_ERROR_ISA;
    if (m < 0 || n <= 0 || k <= 0 || columns < k || !is_type(type))
        return MQ_ERROR_ARGUMENT;
    if (bits < 2 || bits > 8)
        return MQ_ERROR_ARGUMENT;
    if (index ? !is_index(index, k, n) : k != n)
        return MQ_ERROR_ARGUMENT;
    if (m == 0)
        return MQ_OK;
    if (!x || !codes || (m > 1 && stride < n))
        return MQ_ERROR_ARGUMENT;
    return kernels->static_round({x, type, stride, m, n, index, offset, bits, codes, k, columns});
}

int mq_hadamard(int isa, const float *x, float *y, int64_t m, int64_t k, int64_t block)
{
    const Kernels *const kernels = find(isa);
    if (!kernels)
        return MQ_ERROR_ISA;
    if (m < 0 || k <= 0 || !is_block(block, k))
        return MQ_ERROR_ARGUMENT;
    if (m == 0)
        return MQ_OK;
    if (!x || !y)
        return MQ_ERROR_ARGUMENT;
    return kernels->hadamard(x, y, m, k, block);
}

int mq_mix_heads(int isa, const void *x, int type, int64_t stride, int64_t m, int64_t heads,
                 int64_t width, const float *mixing, float *y)
{
    const Kernels *const kernels = find(isa);
    if (!kernels)
        return MQ_ERROR_ISA;
    if (m < 0 || heads <= 0 || width <= 0 || heads > INT32_MAX || width > INT32_MAX)
        return MQ_ERROR_ARGUMENT;
    if (!is_type(type) || ((heads & (heads - 1)) && !mixing))
        return MQ_ERROR_ARGUMENT;
    if (m == 0)
        return MQ_OK;
    if (!x || !y || (m > 1 && stride < heads * width))
        return MQ_ERROR_ARGUMENT;
    return kernels->mix_heads({x, type, stride, m, heads, width, mixing, y});
}
