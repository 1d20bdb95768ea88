// C interface of the native CPU kernels; mergequant_vllm/kernels/native_library.py calls it through ctypes.
//
// Every function returns 0, or one of the MQ_ERROR values if its arguments are wrong. A thread that
// calls mq_linear, or one of PyTorch's operators below, keeps the working memory of its largest call;
// nothing else outlives a call. `isa` is an index below mq_isa_count().
//
// Activation codes: int8, one row a token, `stride` bytes from row to row.
// Weight codes: int8 [n, k] row-major before they are packed, in the range of `weight_bits`
// (3, 4 or 8 bits, two's complement); packed, the layout is the instruction set's own (linear.h).
// Spans: runs of input channels that share a weight step. `span_ends` int32 [spans] has the channel
// behind each of them: ascending, multiples of 32 but for the last one, which is k; null: one step
// for each output channel, and `spans` does not matter.

#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MQ_OK = 0, MQ_ERROR_ISA = 1, MQ_ERROR_ARGUMENT = 2, MQ_ERROR_MEMORY = 3 };

// Element types of activations in floating point and of outputs.
enum { MQ_FLOAT32 = 0, MQ_BFLOAT16 = 1, MQ_FLOAT16 = 2 };

// Instruction sets that were compiled in, slowest first, and whether this machine has them.
int mq_isa_count(void);
const char *mq_isa_name(int isa);
int mq_isa_runs(int isa);

// Packed weights: their size, and the packing.
int64_t mq_linear_bytes(int isa, int64_t n, int64_t k, int weight_bits);
int mq_linear_pack(int isa, const int8_t *codes, int64_t n, int64_t k, int weight_bits,
                   uint8_t *packed);

// y[t, j] as defined in kernels/linear/reference.py, bit for bit.
//   codes       [m, k], of `activation_bits` (4 or 8)
//   weight_step float32 [n, spans]
//   zero_points int8 [n, spans], or null
//   weight_sums int32 [n, spans], each span's sum of codes less zero points; needed with token_zero
//   token_step  float32 [m], or null
//   token_zero  int32 [m], in the range of the activation codes, or null
//   constant    float32 [n], or null
//   y           [m, n] of type `type`, contiguous
// The products of the longest span must add up in 32 bits, whatever the codes.
int mq_linear(int isa, const int8_t *codes, int64_t stride, int64_t m, const uint8_t *packed,
              const float *weight_step, const int8_t *zero_points, const int32_t *weight_sums,
              const float *token_step, const int32_t *token_zero, const float *constant, void *y,
              int type, int64_t n, int64_t k, const int32_t *span_ends, int64_t spans,
              int weight_bits, int activation_bits);

// Codes and steps of each token, as defined in kernels/token_quant/reference.py, bit for bit.
//   x     [m, k] of type `type`, `stride` elements from row to row
//   clip  float32 [1]
//   block of the Hadamard rotation, or 0
//   codes [m, columns], contiguous; those beyond k are 0
//   step  float32 [m]
//   zero  int32 [m], or null: codes without zero points
int mq_token_quant(int isa, const void *x, int type, int64_t stride, int64_t m, int64_t k,
                   const float *clip, int bits, int64_t block, int8_t *codes, int64_t columns,
                   float *step, int32_t *zero);

// Codes of a migrated norm's output, as in kernels/norm_round/reference.py, bit for bit.
//   x      [m, n] of type `type`, `stride` elements from row to row
//   index  int32 [k] below n, or null: the identity, k = n
//   offset float32 [k], or null
int mq_static_round(int isa, const void *x, int type, int64_t stride, int64_t m, int64_t n,
                    const int32_t *index, const float *offset, int bits, int8_t *codes, int64_t k,
                    int64_t columns);

// Block-diagonal rotation, as kernels/hadamard/reference.py's `rotate`, bit for bit: float32 [m, k].
int mq_hadamard(int isa, const float *x, float *y, int64_t m, int64_t k, int64_t block);

// Mixing of heads, as kernels/hadamard/reference.py's `mix_heads`, bit for bit.
//   x      [m, heads * width] of type `type`, `stride` elements from row to row
//   mixing float32 [odd, odd], odd being the odd factor of heads; null where it is 1
//   y      float32 [m, heads * width], contiguous, not x
int mq_mix_heads(int isa, const void *x, int type, int64_t stride, int64_t m, int64_t heads,
                 int64_t width, const float *mixing, float *y);

// Operators of PyTorch (torch_operators.cpp). They run the instruction set of the last mq_use_isa.
// mq_register_operators takes the addresses of PyTorch's functions of these names, in this order.
int mq_use_isa(int isa);
int mq_torch_function_count(void);
const char *mq_torch_function_name(int number);
int mq_register_operators(void *const *functions);

#ifdef __cplusplus
}
#endif
