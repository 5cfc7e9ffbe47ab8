"""Kahneman-Tversky Optimization (KTO): its loss, its mismatched pairs, and what a step records of it.

Source: Ethayarajh et al., arXiv 2402.01306, equations 7 and 8. Of a sequence i with prompt x and completion y

    logp_i = sum over the tokens of y of log p(token | what stands before it)        nat
    r_i    = logp_i of the policy - logp_i of the reference
    z0     = max(0, mean over i of r of the pair (x_i, y_(i-1)))                      no gradient
    chosen   loss_i = desirable   * (1 - sigmoid(beta (r_i - z0)))
    rejected loss_i = undesirable * (1 - sigmoid(beta (z0 - r_i)))

and the loss of a step is the sum of loss_i over its sequences by their number. Everything here is a sum over one
micro-batch, beside what it is to be divided by (`COUNTED_BY`): whoever adds up the micro-batches of a step hands the
totals to `means`. So no value grows with the batch, the length, the vocabulary or the steps between two log lines.

**Not invariant to accumulation**: z0 is that of a micro-batch, as published, and the completion that a prompt is paired
with is another where the micro-batches are cut otherwise. With z0 given (`sums` takes it) the split changes nothing.

Cases at the edges, of which none makes a NaN:

- one class only: the other's sums and counts are 0, its means NaN (not measured); the loss is that of the one;
- no completion, or a prompt that fills the context: its log-probability is 0 whatever the weights, so it is left out of
  the loss, the pairs and every mean, and counted in `empty`;
- a completion cut at the context counts with what is left of it, and in `clipped`;
- a sequence alone in its micro-batch has no mismatched completion, and pairs without a target are none: without any
  pair z0 is 0.

Rows are padded on the right, where no earlier position of a causal model sees it. No shape depends on a value.

Shapes: B sequences of a micro-batch, T positions, N = B T, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stabstudy.config import TrialConfig
from stabstudy.data.layouts import FLAGS
from stabstudy.training.families import Model
from stabstudy.training.model import soft_cap
from stabstudy.training.objective import IGNORE, MINIMISED, inputs_of, targets_of
from stabstudy.training.stack import frozen

CHOSEN, REJECTED = 1, 0
"""Labels. Any other is no sequence: a row that fills up a batch."""

CLASSES = ("chosen", "rejected")

COUNTED_BY = {
    "loss": "sequences",
    "kl": "sequences",
    "kl_raw": "pairs",
    "clipped": "rows",
    "empty": "rows",
    **{f"{name}_{c}": f"sequences_{c}" for name in ("reward", "logp") for c in CLASSES},
    **{f"{name}_{c}": f"targets_{c}" for name in ("logz_mean", "logit_sd") for c in CLASSES},
}
"""Sum -> the count that makes it a mean over a step.

loss      of a sequence.
kl        z0, as the sequences of the step met it. kl_raw: before the clamp, over pairs; it may be below 0. nat.
clipped   share of the rows whose sequence was cut at the context. empty: without a completion token.
reward    beta r of a sequence, as trl and LLaMA-Factory log it. logp: of the policy, over the whole completion, nat.
logz_mean logsumexp of the (capped) logits at a completion token. logit_sd: of the logits over the vocabulary there,
          about their mean. Together they see what a mean logit cannot: that is blind to a shift of all of them.
"""

COUNTS = ("sequences", "pairs", "rows", *(f"{name}_{c}" for name in ("sequences", "targets") for c in CLASSES))
"""`rows` have a label, `sequences` of them a completion token, which are `targets`; `pairs` are mismatched ones."""

LARGEST = tuple(f"logit_absmax_{c}" for c in CLASSES)
"""The largest |logit| at a completion token, before a soft cap; 0 where there is none. No sums."""

SCALARS = (*COUNTED_BY, *COUNTS, *LARGEST)
"""What `sums` returns beside MINIMISED."""


MEASURED_BY = {
    **{name: (count,) for name, count in COUNTED_BY.items()},
    **{f"logit_absmax_{c}": (f"targets_{c}",) for c in CLASSES},
    "margin": tuple(f"sequences_{c}" for c in CLASSES),
}
"""What a step records -> the counts of which none may be 0, or it was not measured."""


class Weighting(NamedTuple):
    """beta, and the weights of the two classes; a tensor where the members of a pack differ."""

    beta: Tensor | float = 0.1
    desirable: Tensor | float = 1.0
    undesirable: Tensor | float = 1.0


class Rows(NamedTuple):
    """The sequences of a micro-batch.

    inputs_BT, targets_BT: int64; a target is the next token of the completion, or IGNORE at every other position.
    labels_B: CHOSEN, REJECTED, or another number for no sequence, which then has no target either.
    clipped_B: bool, whether the sequence was cut at the context.
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    labels_B: Tensor
    clipped_B: Tensor


class Kl(NamedTuple):
    """The estimate of one micro-batch, without a gradient: z0, the sum before the clamp, and the pairs in it."""

    z0: Tensor
    raw: Tensor
    pairs: Tensor


class Kto:
    """The objective of a pack's members, which share one frozen reference: their initial weights."""

    scalars: tuple[str, ...] = SCALARS
    largest: tuple[str, ...] = LARGEST
    divided: tuple[str, ...] = ()
    columns: tuple[str, ...] = (*COUNTED_BY, "margin", *LARGEST, *COUNTS, "logz_mean", "logit_absmax")
    flags = FLAGS

    def __init__(self, configs: Sequence[TrialConfig], initial: Model, device: torch.device):
        """`initial`: the weights that every member begins with, whatever checkpoint it then goes on from."""
        self.cap = configs[0].model.logit_softcap
        self.reference = frozen(initial, configs[0].train.precision, device)
        weightings = [(c.objective.beta, c.objective.desirable, c.objective.undesirable) for c in configs]
        self.settings: tuple[Tensor, ...] = tuple(torch.tensor(weightings, device=device).T.contiguous())

    def divisor(self, windows_KBT: Tensor) -> Tensor:
        """Sequences with a completion token."""
        return ((windows_KBT[..., 1:-FLAGS] >= 0).any(2) & (windows_KBT[..., -1] >= 0)).sum(1)

    def inputs(self, windows_KBT: Tensor) -> tuple[Tensor, ...]:
        """The fields of `Rows`; a row's flag is its label + 2 where it was cut."""
        tokens_KBT, flag_KB = windows_KBT[..., :-FLAGS], windows_KBT[..., -1]
        label_KB = torch.where(flag_KB >= 0, flag_KB % 2, IGNORE)
        return inputs_of(tokens_KBT), targets_of(tokens_KBT), label_KB, flag_KB >= 2

    def __call__(self, model: Model, *inputs: Tensor, masked: bool = False) -> dict[str, Tensor]:
        inputs_BT, targets_BT, labels_B, clipped_B, *weighting = inputs
        rows = Rows(inputs_BT, targets_BT, labels_B, clipped_B)
        return terms(model, self.reference, rows, Weighting(*weighting), self.cap)

    def record(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`means`, and both classes together in the columns that every objective has."""
        logz, targets = (totals[f"{name}_chosen"] + totals[f"{name}_rejected"] for name in ("logz_mean", "targets"))
        absmax = torch.stack([totals[name] for name in LARGEST]).amax(0)
        together = {"logz_mean": _mean(logz, targets), "logit_absmax": torch.where(targets > 0, absmax, torch.nan)}
        return means(totals) | together


def terms(
    policy: Model,
    reference: Model,
    rows: Rows,
    weighting: Weighting,
    cap: float | None = None,
    reference_B: Tensor | None = None,
) -> dict[str, Tensor]:
    """MINIMISED and SCALARS of one micro-batch: four forward passes, of which one has a gradient.

    Args:
        policy: What is trained. In a pack `Stack.run` calls this for each member with its weights.
        reference: The frozen starting weights, one for the whole pack.
        rows: The micro-batch. A pair is made within it.
        weighting: beta and the weights.
        cap: `logit_softcap` of both models.
        reference_B: The reference's log-probabilities of the rows where they are known, which saves one pass.
    """
    # the pass with the gradient first: autocast keeps the casts of the weights that it makes, without a gradient where
    # it makes them in no_grad
    logits_BTV = policy(rows.inputs_BT)
    with torch.no_grad():
        inputs_BT, targets_BT = rotated(rows.inputs_BT, rows.targets_BT)
        pair_B = log_probabilities(policy(inputs_BT), targets_BT, cap)
        kl = kl_estimate(pair_B, log_probabilities(reference(inputs_BT), targets_BT, cap), targets_BT)
        if reference_B is None:
            reference_B = log_probabilities(reference(rows.inputs_BT), rows.targets_BT, cap)
    return sums(logits_BTV, rows, reference_B, kl, weighting, cap)


def log_probabilities(logits_BTV: Tensor, targets_BT: Tensor, cap: float | None = None) -> Tensor:
    """Of each sequence's completion, the sum over its targets, [B] float32, nat. 0 where there is no target."""
    logits_NV = _capped(logits_BTV, cap).flatten(0, 1)
    ce_N = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none", ignore_index=IGNORE)
    return -ce_N.view(targets_BT.shape).sum(1)


def rotated(inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mismatched pairs, as rows like those given: each prompt with the completion of the sequence before it.

    The first is given the last's; rows without a target are passed over. A row's prompt is all that stands up to its
    first target's own position, its completion what follows, up to the last target. A pair starts where its row starts;
    what is longer than T is cut at T, what is shorter is padded on the right, with IGNORE as targets. A completion that
    was cut in its own row stays cut, also behind a shorter prompt. A row that is in no pair has no target.
    """
    T = targets_BT.shape[1]
    valid_BT = targets_BT != IGNORE
    present_B = valid_BT.any(1)
    start_B = valid_BT.int().argmax(1)  # the position whose target is the first of the completion
    source_B = _present_before(present_B)
    paired_B = present_B & (source_B != torch.arange(len(source_B), device=source_B.device))
    position_T = torch.arange(T, device=targets_BT.device)
    # the position in the source's row that position t of the pair continues like
    there_BT = position_T + (start_B[source_B] - start_B)[:, None]
    index_BT = there_BT.clamp(0, T - 1)
    inside_BT = paired_B[:, None] & (there_BT >= 0) & (there_BT < T)
    targets = torch.where(inside_BT, targets_BT[source_B].gather(1, index_BT), IGNORE)
    own_BT = position_T <= start_B[:, None]
    inputs = torch.where(own_BT, inputs_BT, inputs_BT[source_B].gather(1, index_BT))
    return inputs, targets


def kl_estimate(policy_B: Tensor, reference_B: Tensor, pair_targets_BT: Tensor) -> Kl:
    """z0 from both log-probabilities of the pairs; those without a target are none."""
    pair_B = (pair_targets_BT != IGNORE).any(1)
    pairs = pair_B.sum().float()
    raw = torch.where(pair_B, policy_B - reference_B, 0.0).sum().detach()
    return Kl((raw / pairs.clamp(min=1)).clamp(min=0), raw, pairs)


def losses(rewards_B: Tensor, z0: Tensor, chosen_B: Tensor, weighting: Weighting) -> Tensor:
    """The loss of each sequence, [B]. `rewards_B` is r, without beta; 1 - sigmoid(x) is sigmoid(-x), to more digits."""
    beta, desirable, undesirable = weighting
    gain_B = torch.where(chosen_B, rewards_B - z0, z0 - rewards_B)
    return torch.where(chosen_B, desirable, undesirable) * torch.sigmoid(-beta * gain_B)


def sums(
    logits_BTV: Tensor, rows: Rows, reference_B: Tensor, kl: Kl, weighting: Weighting, cap: float | None = None
) -> dict[str, Tensor]:
    """MINIMISED and SCALARS of one micro-batch, 0-dim.

    Args:
        logits_BTV: Of the policy on the rows, before a soft cap.
        rows: The matched sequences.
        reference_B: Their log-probabilities by the reference. They may be computed once and kept.
        kl: That of this micro-batch, or what it is pinned to.
        weighting: beta and the weights.
        cap: `logit_softcap` of the model, which the reference's log-probabilities must have too.
    """
    valid_BT = rows.targets_BT != IGNORE
    label_B = {"chosen": rows.labels_B == CHOSEN, "rejected": rows.labels_B == REJECTED}
    row_B = label_B["chosen"] | label_B["rejected"]
    sequence_B = row_B & valid_BT.any(1)
    logp_B = log_probabilities(logits_BTV, rows.targets_BT, cap)
    reward_B = logp_B - reference_B
    loss_B = losses(reward_B, kl.z0, label_B["chosen"], weighting)
    minimised = _total(loss_B, sequence_B)
    sequences = sequence_B.sum().float()
    scalars = {
        MINIMISED: minimised,
        "loss": minimised.detach().clone(),
        "kl": kl.z0 * sequences,
        "kl_raw": kl.raw,
        "pairs": kl.pairs,
        "sequences": sequences,
        "rows": row_B.sum().float(),
        "clipped": (row_B & rows.clipped_B).sum().float(),
        "empty": (row_B & ~sequence_B).sum().float(),
    }
    logit_BT = _logit_statistics(logits_BTV.detach(), cap)
    for name in CLASSES:
        class_B = sequence_B & label_B[name]
        class_BT = valid_BT & class_B[:, None]
        scalars |= {
            f"reward_{name}": _total(weighting.beta * reward_B.detach(), class_B),
            f"logp_{name}": _total(logp_B.detach(), class_B),
            f"sequences_{name}": class_B.sum().float(),
            f"targets_{name}": class_BT.sum().float(),
            f"logz_mean_{name}": _total(logit_BT.logz, class_BT),
            f"logit_sd_{name}": _total(logit_BT.sd, class_BT),
            f"logit_absmax_{name}": torch.where(class_BT, logit_BT.absmax, 0.0).amax(),
        }
    return scalars


def means(totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a step records, of the totals of its micro-batches (the largest of them for LARGEST), any shape.

    Means by COUNTED_BY; a mean over nothing is NaN. `margin` is the mean reward of the chosen less that of the
    rejected, NaN without one of them.
    """
    record = {name: _mean(totals[name], totals[count]) for name, count in COUNTED_BY.items()}
    record["margin"] = record["reward_chosen"] - record["reward_rejected"]
    of_class = {name: totals[f"targets_{name.rpartition('_')[2]}"] for name in LARGEST}
    record |= {name: torch.where(n > 0, totals[name], torch.nan) for name, n in of_class.items()}
    return record | {name: totals[name] for name in COUNTS}


class _LogitStatistics(NamedTuple):
    """At each position, [B, T] float32."""

    logz: Tensor
    sd: Tensor
    absmax: Tensor


def _logit_statistics(logits_BTV: Tensor, cap: float | None) -> _LogitStatistics:
    raw_BTV = logits_BTV.float()
    absmax_BT = torch.maximum(raw_BTV.amax(-1), -raw_BTV.amin(-1))
    return _LogitStatistics(_capped(raw_BTV, cap).logsumexp(-1), raw_BTV.std(-1, correction=0), absmax_BT)


def _capped(logits_BTV: Tensor, cap: float | None) -> Tensor:
    return logits_BTV.float() if cap is None else soft_cap(logits_BTV, cap)


def _present_before(present_B: Tensor) -> Tensor:
    """For each row that is present the one before it that is, around the end; itself where it is the only one."""
    rank_B = present_B.cumsum(0) - 1
    before_B = (rank_B - 1) % present_B.sum().clamp(min=1)
    return (present_B & (rank_B == before_B[:, None])).int().argmax(1)


def _total(values: Tensor, valid: Tensor) -> Tensor:
    """Chosen, not multiplied: what does not count may be NaN."""
    return torch.where(valid, values, 0.0).sum()


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)
