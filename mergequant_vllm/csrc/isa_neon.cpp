// The kernels for NEON with dot products: compiled with -march=armv8.2-a+dotprod.

#if defined(__aarch64__)

#include "linear.h"
#include "rows.h"
#include "vectors_neon.h"

extern const Kernels kernels_neon;
const Kernels kernels_neon = {
    "neon-dotprod",         linear_bytes<NeonDotprod>, linear_pack<NeonDotprod>, linear<NeonDotprod>,
    rows_token_quant, rows_static_round,     rows_hadamard,
};

#endif
