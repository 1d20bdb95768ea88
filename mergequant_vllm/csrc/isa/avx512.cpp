// The kernels for AVX-512 (F, BW, VL, DQ) without VNNI.

#if defined(__x86_64__)

#include "linear/linear.h"
#include "rows/rows.h"
#include "isa/vectors_avx512.h"

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = {
    "avx512",
    linear_bytes<Avx512>,
    linear_pack<Avx512>,
    linear<Avx512>,
    rows_token_quant,
    rows_static_round,
    rows_hadamard,
    rows_mix_heads,
};

#endif
