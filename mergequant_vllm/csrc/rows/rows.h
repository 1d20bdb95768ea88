// The row operations of one instruction set, each included by its isa_*.cpp:
//
//     rows_token_quant(const TokenArguments &)         rows/token.h
//     rows_static_round(const StaticArguments &)       rows/static.h
//     rows_hadamard(x, y, m, k, block)                 rows/hadamard.h
//     rows_mix_heads(const HeadArguments &)            rows/heads.h
//
// All is in unnamed namespaces: each unit compiles its own copy under its own flags, and the linker
// cannot fold one set's code into another's. Tokens are divided among OpenMP's threads; a token is
// worked on by one thread alone, so that results do not depend on their number.

#pragma once

#include "rows/hadamard.h"
#include "rows/heads.h"
#include "rows/static.h"
#include "rows/token.h"
