// The kernels for NEON with ARMv8.2's dot products.

#if defined(__aarch64__)

#include "linear/linear.h"
#include "rows/rows.h"
#include "isa/vectors_neon.h"

extern const Kernels kernels_neon;
const Kernels kernels_neon = {
    "neon-dotprod",
    linear_bytes<NeonDotprod>,
    linear_pack<NeonDotprod>,
    linear<NeonDotprod>,
    rows_token_quant,
    rows_static_round,
    rows_hadamard,
    rows_mix_heads,
};

#endif
