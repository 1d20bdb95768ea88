"""`mergequant ablate`: the paper's tables and figures of one model, by one command."""

from mergequant.ablation.run import Ablation, ablate

__all__ = ["Ablation", "ablate"]
