"""Text logs: the lines that trainers print, in samples written by hand after their sources; prose and code are none."""

# ruff: noqa: E501 (lines as trainers print them)
from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabstudy import ingest
from stabstudy.ingesting import text

Row = dict[str, str]

SAMPLES: dict[str, tuple[str, list[Row]]] = {
    "nanoGPT": (
        "number of parameters: 10.65M\n"
        "step 0: train loss 4.2874, val loss 4.2823\n"
        "iter 0: loss 4.2664, time 12345.67ms, mfu -100.00%\n"
        "iter 10: loss nan, time 12.00ms, mfu 3.00%\n"
        "step 250: train loss 2.1, val loss 2.2\n",
        [{"iter": "0", "loss": "4.2664"}, {"iter": "10", "loss": "nan"}],
    ),
    "build-nanogpt": (
        "0 val 10.9\n0 hella 0.2463\n0 train 10.955029\nstep     1 | loss: 9.5 | lr 6.0000e-04 | norm: 1.2 | dt: 3.0ms\n",
        [{"step": "0", "train loss": "10.955029"}, {"step": "1", "loss": "9.5", "lr": "6.0000e-04", "norm": "1.2"}],
    ),
    "nanochat": (
        "Step 00250 | Validation bpb: 1.2\n"
        "step 00010/01000 (1.00%) | loss: 6.12 | lrm: 1.00 | dt: 100.00ms | tok/sec: 1,000 | mfu: 30.00 | epoch: 1\n",
        [{"step": "00010", "max_steps": "01000", "loss": "6.12", "lrm": "1.00", "tok/sec": "1000"}],
    ),
    "modded-nanogpt": (
        "step:0/100 val_loss:10.1 train_time:1ms step_avg:nanms\nstep:10/100 train_loss:7.12 train_time:1ms step_avg:nanms\n",
        [{"step": "10", "max_steps": "100", "train_loss": "7.12"}],
    ),
    "llm.c main.log": (
        "s:0 tel:11.0\ns:0 trl:11.0091 lr:0.000001 norm:15.37\ns:1 trl:-nan(ind) lr:0.000002 norm:-nan\ns:250 eval:0.3\n",
        [
            {"s": "0", "trl": "11.0091", "lr": "0.000001", "norm": "15.37"},
            {"s": "1", "trl": "nan", "lr": "0.000002", "norm": "nan"},
        ],
    ),
    "llm.c on the screen": (
        "val loss 10.1\n"
        "step    1/18865 | loss 11.009 (+nanz)| norm 15.3 (+nanz)| lr 1.00e-06 | 3500.00 ms | 40.0% bf16 MFU | 15 tok/s\n"
        "step    2/18865 | loss 10.9 (-1.20z)| norm 9.3 (+0.3z)| lr 2.00e-06 | 3500.00 ms | 40.0% bf16 MFU | 15 tok/s\n",
        [
            {"step": "1", "max_steps": "18865", "loss": "11.009", "norm": "15.3", "lr": "1.00e-06"},
            {"step": "2", "max_steps": "18865", "loss": "10.9", "norm": "9.3", "lr": "2.00e-06"},
        ],
    ),
    "Megatron-LM": (
        " [2024-10-11 12:00:00.123456] iteration       10/     500 | consumed samples:         5120 | elapsed time per "
        "iteration (ms): 1212.2 | learning rate: 1.500000E-05 | global batch size:   512 | lm loss: 1.032E+01 | loss "
        "scale: 1.0 | grad norm: 1.234 | params norm: 90.1 | number of skipped iterations:   0 | number of nan "
        "iterations:   0 |\n"
        "(min, max) time across ranks (ms):\n    forward-backward ...............: (10.0, 11.0)\n"
        " validation loss at iteration 10 | lm loss value: 2.3E+00 | lm loss PPL: 1.0E+01 |\n",
        [
            {"iteration": "10", "max_steps": "500", "learning rate": "1.500000e-05", "lm loss": "1.032e+01"}
            | {"grad norm": "1.234", "loss scale": "1.0", "params norm": "90.1"}
        ],
    ),
    "GPT-NeoX": (
        " samples/sec: 10.0 | iteration       10/  100 | elapsed time per iteration (ms): 12.0 | learning rate: 1.0E-04 "
        "| approx flops per GPU: 10TFLOPS | lm_loss: 1.05E+01 | number of skipped iterations:   0 |\n",
        [{"iteration": "10", "max_steps": "100", "learning rate": "1.0e-04", "lm_loss": "1.05e+01"}],
    ),
    "torchtitan, every rank": (
        "[rank0]:[titan] 2024-10-11 12:00:00,000 - root - INFO - \x1b[31mstep:  1  \x1b[32mloss:  7.98  "
        "\x1b[38;2;180;60;0mgrad_norm:  1.0063  \x1b[36mmemory:  5.10GiB(6.4%)  \x1b[34mtps: 1,000\x1b[39m\n"
        "[rank3]:[titan] 2024-10-11 - root - INFO - \x1b[31mstep:  1  loss:  inf  grad_norm:  2\x1b[0m\n"
        "[rank0]:[titan] - root - INFO - \x1b[33mvalidate step:  1  \x1b[32mloss:  7.1\n",
        [
            {"step": "1", "loss": "7.98", "grad_norm": "1.0063", "tps": "1000", "rank": "0"},
            {"step": "1", "loss": "inf", "grad_norm": "2", "rank": "3"},
        ],
    ),
    "nanotron": (
        "[default0]:10/11/2024 12:00:00 [INFO|DP=0|PP=0|TP=0|node]: iteration: 10 / 100 | consumed_tokens: 1.05M | "
        "tokens_per_sec: 131K | lm_loss: 10.4 | lr: 0.0003 | grad_norm: 1.05K | eta: 0:10:00\n",
        [
            {"iteration": "10", "max_steps": "100", "consumed_tokens": "1050000.0", "lm_loss": "10.4", "lr": "0.0003"}
            | {"grad_norm": "1050.0", "rank": "0"}
        ],
    ),
    "Lingua": (
        "0: INFO    24-10-11 12:00:00.123456 - 0:00:05 - step: 10  acc: 0  loss: 10.5  grad: 1.20e+00  flops: 1.00e+14"
        "  wps: 1.00e+05  iter:  0.351  data:  0.01  lr: 1.00e-04  mem: 30%  pow: 100.0 W\n",
        [{"step": "10", "loss": "10.5", "grad": "1.20e+00", "lr": "1.00e-04", "rank": "0"}],
    ),
    "OLMo": (
        "2024-10-11 12:00:00.000\thost:0\tolmo.train:966\tINFO\t[step=10/1000,epoch=0]\n"
        "    optim/total_grad_norm=1.234\n    train/CrossEntropyLoss=10.50\n    throughput/total_tokens=41,943,040\n"
        "2024-10-11 12:00:00.000\thost:0\tolmo.train:966\tINFO\teval/c4\n    eval/c4/CrossEntropyLoss=9.5\n",
        [
            {"step": "10", "max_steps": "1000", "optim/total_grad_norm": "1.234", "train/CrossEntropyLoss": "10.50"}
            | {"throughput/total_tokens": "41943040"}
        ],
    ),
    "OLMo-core": (
        "[2024-10-11 12:00:00] INFO  [olmo_core:1, rank=0] [step=1/1000,epoch=1]\n    train/CE loss=10.40\n"
        "    optim/total grad norm=1.3\n    optim/LR (group 0)=0.0003\n[step=2/1000,epoch=1,eta=1h]\n    train/CE loss=10.3\n",
        [
            {"step": "1", "train/CE loss": "10.40", "optim/total grad norm": "1.3", "optim/LR (group 0)": "0.0003"},
            {"step": "2", "max_steps": "1000", "train/CE loss": "10.3"},
        ],
    ),
    "Composer": (
        "[epoch=1][batch=10/100]:\n\t Train time/batch: 9\n\t Train loss/train/total: 2.3000\n"
        "\t Train l2_norm/grad/global: 1.2\n[Eval batch=1/10] Eval on eval data\n\t Eval metrics/eval/loss: 2\n",
        [{"batch": "10", "Train loss/train/total": "2.3000", "Train l2_norm/grad/global": "1.2"}],
    ),
    "NeMo": (
        "Training epoch 0, iteration 120/149 | lr: 3e-05 | consumed_samples: 121 | global_step: 120 | "
        "reduced_train_loss: 1.233 | train_step_timing in s: 0.03146 | val_loss: 4.106\n",
        [{"iteration": "120", "global_step": "120", "lr": "3e-05", "reduced_train_loss": "1.233", "val_loss": "4.106"}],
    ),
    "NeMo's bar": (
        "Epoch 0:   1%|          | 795/77225 [9:07:58<878:01:48, 41.36s/it, loss=3.1, v_num=, reduced_train_loss=3.090, "
        "global_step=794.0, consumed_samples=1.63e+6]\r",
        [{"global_step": "794.0", "reduced_train_loss": "3.090", "loss": "3.1"}],
    ),
    "litgpt": (
        "Epoch 1 | iter 10 step 2 | loss train: 4.321, val: n/a | iter time: 300.00 ms (step) remaining time: 0:10:00\n",
        [{"iter": "10", "step": "2", "loss train": "4.321"}],
    ),
    "TinyLlama": (
        "iter 10 step 5: loss 2.3456, iter time: 12.00ms (optimizer.step) remaining time: 1.00 hours.\n"
        "step 10: val loss 2.2, val time: 1ms\n",
        [{"iter": "10", "step": "5", "loss": "2.3456"}],
    ),
    "MaxText": (
        "completed step: 3, seconds: 1.234, TFLOP/s/device: 100.0, Tokens/s/device: 1000, total_weights: 8192, loss: 10.1\n"
        "Completed eval after train step 3, loss=2.3\n",
        [{"completed step": "3", "loss": "10.1"}],
    ),
    "verl": (
        "\x1b[36m(TaskRunner pid=12)\x1b[0m step:1 - train/loss:2.345 - train/lr(1e-3):0.01 - train/grad_norm:1.2\n",
        [{"step": "1", "train/loss": "2.345", "train/grad_norm": "1.2"}],
    ),
    "metaseq": (
        '2022-01-01 00:00:00 | INFO | train_inner | {"epoch": 1, "update": 0.01, "loss": "10.2", "num_updates": "10", '
        '"lr": "1e-4", "gnorm": "1.2"}\n',
        [{"num_updates": "10", "loss": "10.2", "lr": "1e-4", "gnorm": "1.2"}],
    ),
    "fairseq": (
        "2022-01-01 | INFO | train_inner | epoch 001:     10 / 100 loss=5.3, ppl=39.4, num_updates=10, lr=1e-04, gnorm=1.2\n",
        [{"num_updates": "10", "loss": "5.3", "lr": "1e-04", "gnorm": "1.2"}],
    ),
    "torchtune": (
        "Step 10 | loss:1.234 lr:2e-05 tokens_per_second_per_gpu:1000 grad_norm:1.2 \n",
        [{"Step": "10", "loss": "1.234", "lr": "2e-05", "grad_norm": "1.2"}],
    ),
    "ms-swift": (
        "{'loss': 2.3, 'grad_norm': 1.1, 'learning_rate': 1e-05, 'global_step/max_steps': '5/100', 'percentage': '5.00%'}\n",
        [
            {"global_step/max_steps": "5", "max_steps": "100"}
            | {"loss": "2.3", "grad_norm": "1.1", "learning_rate": "1e-05"}
        ],
    ),
    "NeMo-RL": (
        "========================= Step 1/10 =========================\n\u25b6 Preparing batch...\n\nTraining Results:\n"
        "  \u2022 Loss: 0.1234\n  \u2022 Total step time: 3.0s\n",
        [{"Step": "1", "max_steps": "10", "Loss": "0.1234"}],
    ),
    "tensors": (
        "Epoch 1, Step 5, Loss: tensor(2.5, device='cuda:0'), Grad norm = np.float32(1.5)\n",
        [{"Step": "5", "Loss": "2.5", "Grad norm": "1.5"}],
    ),
    "a logger's prefix": (
        "INFO:__main__:step 10 - training loss: 2.3\n2024-10-11 12:00:00 INFO root step: 11 loss: 2.\n",
        [{"step": "10", "training loss": "2.3"}, {"step": "11", "loss": "2."}],
    ),
    "mmengine": (
        "2024-09-16 04:07:17,720 - mmdet - INFO - Iter [17000/87900]\tlr: 1.821e-04, eta: 18:25:17, time: 0.900, loss_cls: "
        "1.2132, loss: 49.5268, grad_norm: 961.8456\n"
        "09/16 04:07:17 - mmengine - INFO - Iter(train) [  50/1000]  lr: 1.0e-03  loss: 2.3  grad_norm: nan\n"
        "09/16 04:07:17 - mmengine - INFO - Iter(val) [  50/1000]  loss: 2.2\n",
        [
            {"Iter": "17000", "max_steps": "87900", "lr": "1.821e-04", "loss": "49.5268", "grad_norm": "961.8456"},
            {"Iter": "50", "max_steps": "1000", "lr": "1.0e-03", "loss": "2.3", "grad_norm": "nan"},
        ],
    ),
    "brackets": (
        "2023 | INFO | [R0] | E5 iter[ 14/ 15] | [Loss] 515.44 | [time] 0.4m\nStep[7/10] Loss[2.5] Acc[0.1]\n",
        [{"iter": "14", "Loss": "515.44"}, {"Step": "7", "max_steps": "10", "Loss": "2.5"}],
    ),
    "Primus": (
        "[\x1b[32m20251202 06:56:28\x1b[0m][\x1b[36mrank-7/8\x1b[0m][\x1b[1mINFO \x1b[0m] [trainer.py:2560] : iteration "
        "4408/ 5000 | elapsed time per iteration (ms): 13100.0/13240.9 | learning rate: 3.4E-07 | lm loss: 4.1E-03 | "
        "grad norm: 0.003 |\n",
        [{"iteration": "4408", "max_steps": "5000", "rank": "7", "lm loss": "4.1e-03", "grad norm": "0.003"}],
    ),
    "value and mean": (
        "step: 3  lr: 0.1  loss: 0.6975 (0.6919)  grad_norm: 1.5/1.7\n",
        [{"loss": "0.6975", "grad_norm": "1.5"}],
    ),
    "Lightning's bar": (
        "Epoch 0:   6%|#  | 1/18 [00:08<02:29,  8.77s/it]\rEpoch 0:   6%|#  | 1/18 [00:08<02:29,  8.77s/it, loss=10.4]\r"
        "Epoch 0:  11%|## | 2/18 [00:11<01:33,  5.82s/it, loss=10.4]\rEpoch 0:  11%|## | 2/18 [00:11<01:33, loss=10.2]\n"
        "Validation DataLoader 0: 50%|# | 1/2 [00:01<00:01, loss=9.0]\n",
        [{"progress": "1", "loss": "10.4"}, {"progress": "2", "max_steps": "18", "loss": "10.2"}],
    ),
    "kohya's and diffusers' bars": (
        "steps:   1%|#  | 41/3280 [00:50<1:06:54,  1.24s/it, avr_loss=nan]\n"
        "Steps:  10%|#  | 42/3280 [00:50<1:06:54,  1.24s/it, lr=0.0001, step_loss=0.12]\n",
        [{"progress": "41", "avr_loss": "nan"}, {"progress": "42", "step_loss": "0.12", "lr": "0.0001"}],
    ),
    "a count of something": ("12: loss 2.3\n", [{"loss": "2.3", "step": None, "rank": None}]),  # type: ignore[dict-item]
    "a label of srun": ("12: step 10 loss 2.3\n", [{"step": "10", "loss": "2.3", "rank": "12"}]),
}


def rows(tmp_path: Path, content: str | bytes) -> list[Row]:
    path = tmp_path / "train.log"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(text.rows(path))


@pytest.mark.parametrize("trainer", SAMPLES)
def test_the_lines_of_a_trainer_are_rows(trainer: str, tmp_path: Path) -> None:
    content, expected = SAMPLES[trainer]
    read = rows(tmp_path, content)
    assert [{k: row.get(k) for k in want} for row, want in zip(read, expected, strict=True)] == expected
    for row in read:
        assert all(math.isfinite(float(v)) or v in ("nan", "inf", "-inf") for v in row.values())


def test_lines_of_transformers_have_no_step_but_that_of_the_bar_after_them(tmp_path: Path) -> None:
    line = "{'loss': 2.3, 'grad_norm': 1.1, 'learning_rate': 1e-4, 'epoch': 0.1}\n"
    values = {"loss": "2.3", "grad_norm": "1.1", "learning_rate": "1e-4", "epoch": "0.1"}
    evaluation = "{'eval_loss': 2.1, 'eval_runtime': 1.2, 'epoch': 0.1}\n"
    summary = "{'train_runtime': 12.3, 'train_samples_per_second': 1.2, 'train_loss': 2.0, 'epoch': 1.0}\n"
    assert rows(tmp_path, line * 3 + evaluation + summary) == [values] * 3
    bars = [f"\r {n}%|#   | {n}/1000 [00:10<16:30,  1.00s/it]" for n in (9, 10, 11)]
    read = rows(tmp_path, bars[0] + "\r      \r" + line + bars[1] + line + bars[2] + "\n" + evaluation + summary)
    assert read == [values | {"progress": n, "max_steps": "1000"} for n in ("10", "11")]
    # an output that was buffered prints its lines in a clump: only the last stands beside a bar
    assert ["progress" in row for row in rows(tmp_path, line * 3 + bars[2])] == [False, False, True]


def test_a_loss_that_megatron_left_out_was_not_finite(tmp_path: Path) -> None:
    line = "iteration 20/ 500 | grad norm: nan | number of skipped iterations: {} | number of nan iterations: {} |\n"
    (lost,) = rows(tmp_path, line.format(0, 0))
    assert lost["lm loss"] == "nan"
    (lost,) = rows(tmp_path, line.format(1, 1))
    assert lost["lm loss"] == "nan"
    (skipped,) = rows(tmp_path, line.format(1, 0))  # the scale of fp16 was too large: no loss is known
    assert "lm loss" not in skipped


@pytest.mark.parametrize(
    ("written", "read"),
    [("NaN", "nan"), ("-nan(ind)", "nan"), ("-1.#IND", "nan"), ("1.#QNAN00", "nan"), ("-inf", "-inf"), ("Infinity", "inf")]
    + [("1.#INF", "inf"), ("1,234.5", "1234.5"), ("2.1E-4", "2.1e-4"), (".5", ".5"), ("-0.25", "-0.25"), ("3.", "3.")]
    + [("[0.5, 0.25]", "0.5"), ("'7'", "7")],
)  # fmt: skip
def test_numbers_are_read_in_every_spelling(written: str, read: str, tmp_path: Path) -> None:
    assert rows(tmp_path, f"step: 1 loss: {written}, lr: 1\n") == [{"step": "1", "loss": read, "lr": "1"}]


@pytest.mark.parametrize(
    "line",
    [
        *("eval step: 10 loss: 2.2", "Validation | step 10 | loss 2.2", "[eval] step=3 loss=2", "step 3 test loss: 2"),
        *("step: 3 z loss: 2", "step: 3 max loss: 2", "step 3 loss scale: 65536", "step: 3 params norm: 9.1"),
        *("saving checkpoint at step 10", "step 3 took 2.5 s", "number of steps: 100", "it has 3 losses: 2", ""),
    ],
)
def test_what_is_no_training_row_is_none(line: str, tmp_path: Path) -> None:
    assert rows(tmp_path, line + "\n") == []


def test_gzip_utf16_and_a_torn_end_are_read(tmp_path: Path) -> None:
    content = "".join(f"step: {i} loss: {9 - i}\n" for i in range(9))
    expected = [{"step": str(i), "loss": str(9 - i)} for i in range(9)]
    assert rows(tmp_path, gzip.compress(content.encode())) == expected
    assert rows(tmp_path, content.encode("utf-16")) == expected
    assert rows(tmp_path, content.replace("\n", "\r\n").encode("utf-8-sig")) == expected
    packed = gzip.compress("".join(f"step: {i} loss: {i % 7}\n" for i in range(9999)).encode())
    torn = rows(tmp_path, packed[: len(packed) // 2])
    assert 100 < len(torn) < 9999 and torn == [{"step": str(i), "loss": str(i % 7)} for i in range(len(torn))]


NO_LOGS = {
    "code": "import torch\n\nlr = 1e-3\nsteps = 100\nfor step in range(steps):\n    loss = model(x)\n"
    '    print(f"step {step} loss {loss:.4f}")\n    grad_norm = 1.0\n' * 20,
    "YAML": "model:\n  dim: 64\noptim:\n  lr: 1e-3\n  max_grad_norm: 1.0\ntrain:\n  steps: 100\n  loss_scale: 1\n" * 5,
    "README": "# Training\nRun `python train.py`. You should see\n```\nstep 1 | loss 10.9 | norm 1.2\nstep 2 | loss 10.8 | "
    "norm 1.1\nstep 3 | loss 10.7 | norm 1.0\n```\n" + "A line about the 3 stages and the loss of each.\n" * 100,
    "traceback": "Traceback (most recent call last):\n"
    + '  File "train.py", line 10, in <module>\n    loss.backward()\n' * 20,
    "prose": "In step 3 we lower the learning rate by 2.\nThe loss of 5 sheep was not the norm.\n" * 50,
    "nothing": "",
}


@pytest.mark.parametrize("kind", NO_LOGS)
def test_prose_code_and_settings_are_no_logs(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(NO_LOGS[kind])
    assert not text.is_log(tmp_path / "x.txt")


@pytest.mark.parametrize("trainer", ["llm.c main.log", "torchtitan, every rank", "OLMo", "Megatron-LM", "ms-swift"])
def test_logs_are_logs(trainer: str, tmp_path: Path) -> None:
    line, (row, *_) = SAMPLES[trainer]
    step = next(iter(row.values()))
    lines = [
        line.replace(f"{step}/", f"{n}/").replace("s:0 ", f"s:{n} ").replace("step:  1 ", f"step: {n} ")
        for n in range(5)
    ]
    (tmp_path / "x.log").write_text("launching 8 processes\n" * 20 + "".join(lines))
    assert text.is_log(tmp_path / "x.log")
    (tmp_path / "x.log").write_text(lines[0])
    assert not text.is_log(tmp_path / "x.log")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000) | st.text(max_size=2000).map(str.encode))
def test_no_bytes_break_it(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.log"
    path.write_bytes(content)
    for row in text.rows(path):
        assert all(isinstance(float(value), float) for value in row.values())
    text.is_log(path)


_words = st.sampled_from(
    ["step", "loss", "norm", ":", "=", " ", "|", "1", "1e", "nan", ",", "/", "[", "\n", "\r", "K", "\x1b[31m"]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(_words, max_size=200).map("".join))
def test_no_pieces_of_lines_break_it(tmp_path_factory: pytest.TempPathFactory, content: str) -> None:
    test_no_bytes_break_it.hypothesis.inner_test(tmp_path_factory, content.encode())  # type: ignore[attr-defined]


def test_a_folder_of_text_logs_becomes_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "main.log").write_text("".join(f"s:{i} trl:{11 - i / 100:.4f} lr:0.000100 norm:1.01\n" for i in range(60)))
    (logs / "slurm-1.out").write_text("".join(f"step: {i}/100 loss: {9 - i / 100} lr: 1e-4\n" for i in range(1, 61)))
    (logs / "notes.txt").write_text(NO_LOGS["prose"])
    os.mkfifo(logs / "pipe.log")
    os.mkfifo(logs / "pipe.csv")
    monkeypatch.chdir(tmp_path)
    assert ingest.main(["logs", "--study", "texts"]) == 0
    assert len(list((tmp_path / "results" / "texts" / "trials").iterdir())) == 2
    (logs / "run").mkdir()
    (logs / "run/metrics.csv").write_text("step,loss\n" + "".join(f"{i},{9 - i / 100}\n" for i in range(60)))
    (logs / "run/train.log").write_text("".join(f"step: {i} loss: {9 - i / 100}\n" for i in range(60)))
    assert ingest.main(["logs", "--study", "more"]) == 0
    assert len(list((tmp_path / "results" / "more" / "trials").iterdir())) == 3  # a run's table and what it printed
