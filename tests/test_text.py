"""The text of a step: exactly the tokens that the trainer gets, and never those of other data."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import planted
import pytest
from test_tokens import TEXTS, small_bpe

from stabstudy import config as cfg
from stabstudy.analysis.study import Study
from stabstudy.data import sources, tokenizer
from stabstudy.data import step_texts as text
from stabstudy.data.batches import open_batches
from stabstudy.settings import DataError

DOCUMENTS = [f"Document {i}: " + " ".join(str(j * i) for j in range(40)) for i in range(60)]


@pytest.fixture
def config(tmp_path: Path) -> cfg.TrialConfig:
    """On files of one document each, in bytes."""
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i:02}.txt").write_text(document)
    data = {"source": "text", "path": str(tmp_path / "texts"), "seq_len": 50, "validation_share": 0.5}
    return planted.settings(seed=3, batch_size=4, data=data)


def test_it_is_what_the_trainer_gets(config: cfg.TrialConfig, tmp_path: Path) -> None:
    fingerprint = sources.fingerprint(config.data)
    spelled = [part for document in DOCUMENTS for part in ("<bos>", *document, "<eos>")]
    batches = open_batches(config, tmp_path / "cache")
    for step in (0, 7, 119):
        found = text.text_of_step(config, step, fingerprint, tmp_path / "cache")
        assert [s.text for s in found] == ["".join(spelled[s.start : s.start + 51]) for s in found]
        assert [s.start for s in found] == [w.start for w in batches.windows(step)] and len(found) == 4
        for s in found:
            whole = "".join(spelled[s.start : s.start + 51])
            named = [i for i in range(60) if f"Document {i}: " in whole]
            assert set(named) <= set(s.documents) and len(s.documents) <= 2


def test_other_data_are_refused(config: cfg.TrialConfig, tmp_path: Path) -> None:
    fingerprint = sources.fingerprint(config.data)
    (tmp_path / "texts" / "00.txt").write_text("changed since")
    with pytest.raises(DataError, match="data: must still be what the study began with"):
        text.text_of_step(config, 0, fingerprint, tmp_path / "cache")


@pytest.mark.parametrize("step", [-1, 120])
def test_a_step_that_the_trial_has_not_is_refused(config: cfg.TrialConfig, tmp_path: Path, step: int) -> None:
    with pytest.raises(ValueError, match=f"steps 0 to 119, got {step}"):
        text.text_of_step(config, step, sources.fingerprint(config.data), tmp_path / "cache")


def test_a_study_answers_for_its_trials(config: cfg.TrialConfig, tmp_path: Path) -> None:
    fingerprint = sources.fingerprint(config.data)
    for name in ("a", "b"):
        planted.plant_frame(tmp_path / name)
        trial = planted.plant_trial(tmp_path / name, config, fingerprint=fingerprint).trial_id
    study = Study.load(tmp_path / "a")
    found = study.batch(trial, 7, tmp_path / "cache")
    expected = text.text_of_step(config, 7, fingerprint, tmp_path / "cache")
    assert list(found["text"]) == [s.text for s in expected] and list(found["document"]) == [
        s.documents[0] for s in expected
    ]
    whole = Study.concat([study, Study.load(tmp_path / "b")])
    assert whole.batch(f"b/{trial}", 7, tmp_path / "cache").equals(found)
    with pytest.raises(KeyError, match="no trial"):
        study.batch("0123456789", 7)


@pytest.mark.parametrize("decoder", [True, False])
def test_a_bpe_reads_back(tmp_path: Path, decoder: bool) -> None:
    """With the decoder that published files have, and without."""
    import tokenizers

    file = small_bpe(tmp_path / "bpe") / "tokenizer.json"
    if decoder:
        core = tokenizers.Tokenizer.from_file(str(file))
        core.decoder = tokenizers.decoders.ByteLevel()
        core.save(str(file))
    loaded = tokenizer.load(str(file))
    texts = [*TEXTS, "héllo  wörld\n\t漢字"]
    for whole, ids in zip(texts, loaded.encode(texts), strict=True):
        assert loaded.decode(ids.tolist()) == whole
    assert loaded.decode([0, *loaded.encode(["ab"])[0].tolist(), 1]).startswith("<s>")


def test_any_tokenizer_through_transformers_reads_back(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "byt5")
    (tmp_path / "byt5/tokenizer.json").unlink(missing_ok=True)
    loaded = tokenizer.load(str(tmp_path / "byt5"))
    assert loaded.decode([*loaded.encode(["a b ."])[0].tolist(), 1]) == "a b .</s>"


def test_bytes_cut_within_a_character_are_marked() -> None:
    loaded = tokenizer.load("bytes")
    ids = loaded.encode(["é!"])[0].tolist()
    assert loaded.decode([256, *ids, 257]) == "<bos>é!<eos>" and loaded.decode(ids[1:]) == "\ufffd!"


@pytest.mark.shareddata
def test_gpt2_reads_back(shared_data: Path) -> None:
    loaded = tokenizer.load(str(shared_data))
    whole = "Hello  world, naïve 漢字\n\n<|endoftext|>"
    assert loaded.decode(loaded.encode([whole])[0].tolist()) == whole


def test_the_page_of_a_trial_with_a_spike_says_how(tmp_path: Path) -> None:
    from stabstudy.analysis.elements import Code
    from stabstudy.analysis.report import trial_page

    folder = planted.plant_study(tmp_path / "s", steps=200)
    study = Study.load(folder)
    spiky = str(study.spikes.loc[study.spikes["peak_ratio"].idxmax(), "trial_id"])
    step = study.spikes.loc[study.spikes["peak_ratio"].idxmax(), "peak_step"]
    codes = [b for s in trial_page.page(study, spiky, set(), True).sections for b in s.blocks if isinstance(b, Code)]
    assert any(code.text.endswith(f'Study.load("results/s").batch("{spiky}", {step})') for code in codes)
    calm = str(study.trials.index[~study.trials.index.isin(study.spikes["trial_id"])][0])
    codes = [b for s in trial_page.page(study, calm, set(), True).sections for b in s.blocks if isinstance(b, Code)]
    assert not any(".batch(" in code.text for code in codes)


def test_settings_that_do_not_order_the_data_read_the_same(config: cfg.TrialConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.1))
    fingerprint = sources.fingerprint(config.data)
    assert text.text_of_step(config, 5, fingerprint, tmp_path) == text.text_of_step(other, 5, fingerprint, tmp_path)
    reseeded = dataclasses.replace(config, seed=4)
    assert text.text_of_step(config, 5, fingerprint, tmp_path) != text.text_of_step(reseeded, 5, fingerprint, tmp_path)


def test_the_cache_alone_gives_the_same_text_and_nothing_is_built(
    config: cfg.TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("STABSTUDY_CACHE", str(cache))
    fingerprint = sources.fingerprint(config.data)
    with pytest.raises(DataError, match="not in the token cache"):
        text.kept_text_of_step(config, 7, fingerprint)
    assert not cache.exists()
    expected = text.text_of_step(config, 7, fingerprint, cache)
    shutil.rmtree(tmp_path / "texts")  # the cache holds them still
    assert text.kept_text_of_step(config, 7, fingerprint) == expected
    with pytest.raises(ValueError, match="steps 0 to 119"):
        text.kept_text_of_step(config, 120, fingerprint)


def test_another_tokenizer_than_that_of_the_cache_reads_nothing(
    config: cfg.TrialConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path / "cache"))
    fingerprint = sources.fingerprint(config.data)
    text.text_of_step(config, 7, fingerprint, tmp_path / "cache")
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(small_bpe(tmp_path))))
    with pytest.raises(DataError, match="is not the one"):
        text.kept_text_of_step(other, 7, fingerprint)
