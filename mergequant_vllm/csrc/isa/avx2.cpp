// The kernels for AVX2 and F16C.

#if defined(__x86_64__)

#include "linear/linear.h"
#include "rows/rows.h"
#include "isa/vectors_avx2.h"

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = {
    "avx2",
    linear_bytes<Avx2>,
    linear_pack<Avx2>,
    linear<Avx2>,
    rows_token_quant,
    rows_static_round,
    rows_hadamard,
    rows_mix_heads,
};

#endif
