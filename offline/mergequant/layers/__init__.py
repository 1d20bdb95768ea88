"""Linears of a block as the server will compute them, and as training does."""
