"""The decoders by family (`model.family`): what the trainer asks of a model, and one with its initial weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from stabstudy.config import ModelConfig
from stabstudy.training.hf import HfDecoder, initialise_hf
from stabstudy.training.model import Decoder, initialise


class Model(Protocol):
    """A decoder, which is an nn.Module: token ids [B,T] to logits [B,T,V]. Its parameters are named by layer.

    `embed`, `layers.N`, `norm` and `head` are the groups of `layer_grad_norm`.
    """

    layers: nn.ModuleList

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """The logits, before `logit_softcap`."""

    def walk(self, tokens_BT: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Layer by layer (q [B,H,T,K], k [B,G,T,K], residual after the layer [B,T,D]): what the probes look at."""

    def readout(self, x_BTD: Tensor) -> Tensor:
        """The logits of the stream behind the last layer."""

    def named_parameters(self, prefix: str = ..., recurse: bool = ..., remove_duplicate: bool = ...) -> Iterator[Any]:
        """As that of nn.Module."""


def build(config: ModelConfig, vocab: int, seq_len: int, seed: int) -> Model:
    """The decoder of the settings' family, on the CPU, with its initial weights."""
    if config.family == "lingua":
        ours = Decoder(config, vocab, seq_len)
        initialise(ours, config, seed)
        return ours
    theirs = HfDecoder(config, vocab, seq_len)
    initialise_hf(theirs, config, seed)
    return theirs
