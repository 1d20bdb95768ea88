"""How the linears of a space will read their input: static or dynamic."""
