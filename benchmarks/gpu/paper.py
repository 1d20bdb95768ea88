"""The paper's own figures, to stand beside ours: MergeQuant (arXiv 2503.07654), RTX 3090."""

# Table 2: prefill speedup of Llama-2-7B over FP16 at 2048 tokens, by batch: QuaRot, RTN and
# MergeQuant.
PREFILL_SPEEDUP = {
    1: (2.014, 2.228, 2.305),
    8: (2.123, 2.402, 2.578),
    16: (2.157, 2.444, 2.620),
    32: (2.170, 2.470, 2.649),
    64: (2.209, 2.515, 2.715),
}

# Figure 3 and section 5.2: Llama-2-7B, 2048 tokens prefilled, 256 decoded; the largest.
DECODE_SPEEDUP = 1.765
END_TO_END_SPEEDUP = 2.064

# Table 3: decoding one token at batch 1 and sequence 2048, GB; and how many times below FP16.
MEMORY_GB = {"QuaRot": 4.16, "RTN": 3.90, "MergeQuant": 3.87}
MEMORY_SAVING = {"QuaRot": 3.366, "RTN": 3.587, "MergeQuant": 3.583}

# Table 6, hidden size 4096: tokens to (batch, sequence, dynamic quantization ms, dimension
# reconstruction ms). Both in PyTorch, without the norm; launching is part of the time.
QUANTIZE_MS = {
    1: (1, 1, 0.070, 0.024),
    16: (16, 1, 0.071, 0.024),
    32: (32, 1, 0.071, 0.024),
    128: (1, 128, 0.070, 0.029),
    256: (1, 256, 0.083, 0.043),
    2048: (16, 128, 0.472, 0.285),
    4096: (16, 256, 0.919, 0.559),
    8192: (32, 256, 1.785, 1.109),
}
