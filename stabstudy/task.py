"""The settings of what a trial learns, frozen: its objective, its starting weights, and the data that they are shown.

The standard library only, as `config.py`, which holds them to the rules between settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from stabstudy.settings import group, setting

ROWS = ("examples", "hub_examples")  # sources whose rows become examples
EXAMPLES = (*ROWS, "arithmetic", "arithmetic_graded")  # prompts with their completions; the others give text
LABELLED = ("arithmetic_graded",)  # sources whose every completion has a label; of ROWS data.labels says so
HUB = ("hf", "hub_examples")  # sources whose path may be a name on the Hugging Face hub
SOURCES = ("pysrc", "synthetic", "text", "jsonl", "parquet", "lingua", "hf", *EXAMPLES)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised. `conf/objective/*.yaml` are presets of it."""

    # lm: the next token of text; sft: the same of completions alone, their prompts are read and never a target; kto:
    # wanted completions become likelier than at the start, others less likely (arXiv 2402.01306)
    kind: str = setting("lm", choices=("lm", "sft", "kto"))
    beta: float = setting(0.1, gt=0, le=1000, only="kind=kto")  # a reward is beta times a log-probability ratio
    desirable: float = setting(1.0, gt=0, le=1000, only="kind=kto")  # weights of both classes, 1:1 to 4:3 in sum
    undesirable: float = setting(1.0, gt=0, le=1000, only="kind=kto")
    # starting weights: results/STUDY/TRIAL, a sweep of one trial, a Hugging Face folder or hub name; null: random ones
    init_from: str | None = setting(None)
    init_id: str | None = setting(None)  # whose they are: a trial's id, or sha256:... of foreign weights; null: filled


@dataclass(frozen=True)
class SyntheticConfig:
    """The synthetic source: mechanisms, one knob each; integers, so that the text is bit-exact everywhere."""

    bytes: int = setting(2_000_000, ge=1000, le=10**11)
    vocabulary: int = setting(20_000, ge=2, le=65_536)  # distinct words
    zipf_milli: int = setting(900, ge=0, le=4000)  # exponent of the word frequencies, in thousandths
    order: int = setting(1, ge=0, le=3)  # words of context that choose the next word
    branching: int = setting(256, ge=1, le=65_536, only="order=1,2,3")  # successors of each context
    copy_permille: int = setting(10, ge=0, le=1000)  # words that start a copy from earlier in their document
    nesting: int = setting(3, ge=0, le=16)  # deepest bracket nesting
    flip_ppm: int = setting(0, ge=0, le=1_000_000)  # bytes replaced by a random byte
    burst_permille: int = setting(0, ge=0, le=1000)  # documents that are noise from start to end
    duplicate_permille: int = setting(0, ge=0, le=1000)  # documents that repeat an earlier one
    alphabet_permille: int = setting(0, ge=0, le=1000)  # documents written in an alphabet of their own
    tail_milli: int = setting(1000, ge=0, le=10_000)  # spread of the document lengths, in thousandths


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from. `conf/data/*.yaml` are presets of it."""

    source: str = setting("pysrc", choices=SOURCES)
    # file, folder, or hub name (hf, hub_examples)
    path: str | None = setting(None, only="source=text,jsonl,parquet,lingua,hf,examples,hub_examples")
    # a glob below the folder, e.g. **/*.rst; null: the usual names of the source
    files: str | None = setting(None, only="source=text,jsonl,parquet,examples")
    text_column: str = setting("text", only="source=jsonl,parquet,hf")
    # the dataset's configuration, e.g. sample-10BT
    hub_config: str | None = setting(None, only="source=hf,hub_examples")
    hub_split: str = setting("train", only="source=hf,hub_examples")
    hub_revision: str | None = setting(None, only="source=hf,hub_examples")  # commit; null pins nothing, with a warning
    max_bytes: int | None = setting(None, ge=1, le=10**15)  # read at most so much text (UTF-8), whole documents
    # share skipped
    bad_rows: float = setting(0.0, ge=0, le=0.001, only="source=jsonl,parquet,lingua,hf,examples,hub_examples")
    tokenizer: str = setting("bytes")  # bytes | a folder | a tokenizer.json | VOCAB,MERGES | a hub name
    seq_len: int = setting(128, ge=1, le=1_048_576)  # tokens per sequence
    # packed: sequences cut through examples that stand one behind the other; padded: one example each, cut at seq_len
    layout: str = setting("packed", choices=("packed", "padded"), only="source=" + ",".join(EXAMPLES))
    # true: each row has a label, true for a completion that is wanted; false: labels are passed over
    labels: bool = setting(False, only="source=examples,hub_examples")
    validation_share: float = setting(0.05, gt=0, lt=1)  # share of the windows held out for the fixed validation part
    synthetic: SyntheticConfig = group(SyntheticConfig, only="source=synthetic")

    @property
    def labelled(self) -> bool:
        """Whether every example has a label: its completion is a wanted one, or one to avoid."""
        return self.labels or self.source in LABELLED

    @property
    def objective(self) -> str:
        """The one objective that reads such data."""
        return "kto" if self.labelled else "sft" if self.source in EXAMPLES else "lm"
