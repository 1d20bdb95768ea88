"""Parts that models with LayerNorm and a plain MLP (fc1 -> act -> fc2) share."""

from mergequant.model.architecture import Space

PLAIN_SPACES = (
    Space("tokens", "vocabulary"),
    Space("residual", "hidden"),
    Space("attn_in", "hidden"),
    Space("query", "queries"),
    Space("key", "keys"),
    Space("value", "keys"),
    Space("attn_mix", "queries"),  # each head's mixture of its group's `value`
    Space("mlp_in", "hidden"),
    Space("mlp_pre", "intermediate"),
    Space("mlp_mid", "intermediate"),  # act(mlp_pre)
    Space("final_in", "hidden"),
)
QKV = ("query", "key", "value")
