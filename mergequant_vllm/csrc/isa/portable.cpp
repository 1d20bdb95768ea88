// The kernels for any processor of the platform.

#include "linear/linear.h"
#include "rows/rows.h"
#include "isa/vectors_portable.h"

extern const Kernels kernels_portable;
const Kernels kernels_portable = {
    "portable",
    linear_bytes<Portable>,
    linear_pack<Portable>,
    linear<Portable>,
    rows_token_quant,
    rows_static_round,
    rows_hadamard,
    rows_mix_heads,
};
