// The row operations of one instruction set, each included by its isa_*.cpp:
//
//     rows_token_quant(const TokenArguments &)         rows_token.h
//     rows_static_round(const StaticArguments &)       rows_static.h
//     rows_hadamard(x, y, m, k, block)                 rows_hadamard.h
//
// All is in unnamed namespaces: each unit compiles its own copy under its own flags, and the linker
// cannot fold one set's code into another's. Tokens are divided among OpenMP's threads; a token is
// worked on by one thread alone, so that results do not depend on their number.

#pragma once

#include "rows_hadamard.h"
#include "rows_static.h"
#include "rows_token.h"
