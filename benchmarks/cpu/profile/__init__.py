"""Where a served token's time goes on a CPU."""
