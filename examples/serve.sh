#!/bin/sh
# Serve a quantized folder through vLLM's OpenAI-compatible server:
#   examples/serve.sh DIR [any flag of `vllm serve`; a later one wins]
#
# --quantization mergequant    optional, since config.json names the method: here it turns a wrong folder into an error
# --max-model-len auto         the longest context that the memory left for the KV cache can hold
# --gpu-memory-utilization     the share of the GPU that vLLM may fill; what the weights save goes to the KV cache
# VLLM_CPU_KVCACHE_SPACE       without a GPU: GiB for the KV cache
set -eu
model=${1:?usage: examples/serve.sh DIR [vllm serve flags]}
shift
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-4}"
exec vllm serve "$model" \
    --quantization mergequant \
    --max-model-len auto \
    --gpu-memory-utilization 0.9 \
    "$@"
