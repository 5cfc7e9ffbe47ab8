"""Two meanings of weight decay, and the parameters that it acts on.

    coupled      w <- w - lr_t * wd * w            torch's AdamW, Lingua, HF: decay shrinks when lr does
    independent  w <- w - (lr_t / lr) * wd * w     arXiv 2309.14322: decay follows the schedule but not the peak lr

Here lr is the peak that the schedule multiplies, `TrialConfig.peak_lr` (`optim.lr` after `optim.lr_rule`).

`matrices` decays every parameter with two or more dimensions (embeddings included) and no norm weight;
`matrices_no_embed` leaves out the embedding too, as OLMo 2 does (arXiv 2501.00656), and with it a tied output matrix;
`all` decays everything, as Lingua's single parameter group does. (Decay pulls a norm's weight to 0, which is the
identity for Gemma's norms, that multiply by 1 + weight.)
"""

from __future__ import annotations

from stabstudy.config import OptimConfig, TrialConfig
from stabstudy.training.layers import layer_of


def decay_rate(config: OptimConfig, peak_lr: float) -> float:
    """What an update multiplies by lr_t and the weight; divided by the peak lr it follows lr_t / lr instead."""
    return config.weight_decay / peak_lr if config.decay_mode == "independent" else config.weight_decay


def decays(config: OptimConfig, name: str, ndim: int) -> bool:
    """Whether a parameter of so many dimensions (of one member) is in the group that decays."""
    if config.decay_params == "all":
        return True
    return ndim >= 2 and not (config.decay_params == "matrices_no_embed" and layer_of(name) == "embed")


def decay_of(config: TrialConfig, name: str, ndim: int) -> float:
    """`decay_rate` of a parameter that AdamW's learning rate moves; 0 where its group does not decay."""
    return decay_rate(config.optim, config.peak_lr) if decays(config.optim, name, ndim) else 0.0
