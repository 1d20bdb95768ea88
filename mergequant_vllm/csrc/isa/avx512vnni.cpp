// The kernels for AVX-512 (F, BW, VL, DQ) with VNNI.

#if defined(__x86_64__)

#include "linear/linear.h"
#include "rows/rows.h"
#include "isa/vectors_avx512.h"

extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni = {
    "avx512-vnni",
    linear_bytes<Avx512Vnni>,
    linear_pack<Avx512Vnni>,
    linear<Avx512Vnni>,
    rows_token_quant,
    rows_static_round,
    rows_hadamard,
    rows_mix_heads,
};

#endif
