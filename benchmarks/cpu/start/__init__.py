"""Part `start`: how long `vllm serve` takes to its first token, and what it then holds."""
