"""Training with the Trainer: windows, resume, precision, and two processes equal to one."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from mal_kernels.errors import ArgumentError, CheckpointError
from mal_kernels.ser import benchmark, runs
from mal_kernels.ser.model import collate
from mal_kernels.ser.stream import RankSampler, WindowLoader, plan
from mal_kernels.ser.train import Settings

ROOT = Path(__file__).parents[2]
TWO = Path(__file__).with_name("ser_two_processes.py")
SMALL = dict(steps=6, batch=4, warmup=0, dialogues=8, head_dim=4, evaluate_every=3, lr=3e-3)


@pytest.fixture(scope="module")
def bench():
    settings = Settings(dialogues=8)
    runs.VALIDATION, before = 2, runs.VALIDATION
    try:
        return runs.open_bench(settings, test=2)
    finally:
        runs.VALIDATION = before


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def train(bench, folder, resume=False, callbacks=(), **changes):
    settings = Settings(**{**SMALL, **changes})
    options = dict(logging_steps=1, load_best_model_at_end=False)
    return runs.train_run(settings, bench, folder, resume=resume, callbacks=callbacks, **options)


# --- the stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_turn_comes_once_and_rows_go_on(rows):
    lengths = [5, 1, 16, 9, 4, 7]
    steps = plan(lengths, rows, window=4, seed=3)
    heard = [(p.dialogue, t) for step in steps for p in step for t in range(p.start, p.stop)]
    assert sorted(heard) == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    for row in zip(*steps, strict=True):
        for before, after in itertools.pairwise(row):
            assert after.start in (0, before.stop)
            assert after.start == 0 or after.dialogue == before.dialogue


def test_ranks_share_the_rows_of_one_process():
    lengths = [5, 1, 16, 9, 4, 7]
    alone = list(RankSampler(lengths, 4, 3, rank=0, world=1, seed=1))
    first, second = (list(RankSampler(lengths, 2, 3, rank=r, world=2, seed=1)) for r in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone
    sampler = RankSampler(lengths, 4, 3, rank=0, world=1, seed=1)
    sampler.set_epoch(1)
    assert list(sampler) != alone


def test_a_row_with_nothing_left_changes_nothing(bench):
    dialogues = bench.encoded["train"]
    model = runs.build(Settings(**SMALL), bench)
    torch.nn.init.normal_(model.memory.memory.to_out.weight, std=0.3)
    alone = model(**collate([(dialogues[0], 0, 4)], 4).as_dict())["loss"]
    padded = model(**collate([(dialogues[0], 0, 4), (None, 0, 0)], 4).as_dict())["loss"]
    torch.testing.assert_close(padded, alone)
    sampler = RankSampler([16, 4], 1, 4, rank=1, world=2, seed=0)
    *_, empty = WindowLoader(dialogues[:2], sampler)
    if (empty["labels"] == -100).all():  # this rank is done before the other
        loss = model(**empty)["loss"]
        loss.backward()
        assert loss == 0


# --- the Trainer ----------------------------------------------------------------------------------


def test_a_run_is_saved_and_loaded(bench, tmp_path):
    model = train(bench, tmp_path)
    assert len(losses(tmp_path)) == SMALL["steps"]
    again = runs.load_run(tmp_path, bench)
    window = collate([(d, 0, 16) for d in bench.encoded["test"]], 16).as_dict()
    with torch.no_grad():
        torch.testing.assert_close(again(**window), model.eval()(**window))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not list(tmp_path.rglob("*host*"))
    with pytest.raises(CheckpointError, match="does not exist"):
        runs.load_run(tmp_path / "elsewhere", bench)
    with pytest.raises(ArgumentError, match="arm is 'none'"):
        runs.build(Settings(arm="none"), bench)


class Crash(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="whole"),
        pytest.param(dict(window=5, accumulation=2), id="windows", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_losses(bench, tmp_path, changes):
    train(bench, tmp_path / "whole", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(bench, tmp_path / "cut", callbacks=[Crash()], **changes)
    train(bench, tmp_path / "cut", resume=True, **changes)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_what_is_carried_matters_to_the_windows(bench, tmp_path):
    """Without it the test above could not fail for windows."""
    train(bench, tmp_path / "whole", window=5)
    assert list((tmp_path / "whole" / "checkpoint-3").glob("carried-0.safetensors"))
    model = runs.load_run(tmp_path / "whole", bench)
    torch.nn.init.normal_(model.memory.memory.to_out.weight, std=0.3)
    model.keeps_state = True
    dialogue = bench.encoded["train"][0]
    first, second = (collate([(dialogue, a, a + 5)], 5).as_dict() for a in (0, 5))
    with torch.no_grad():
        model(**first)
        going_on = model(**second)["loss"]
        model.carried = None
        anew = model(**second)["loss"]
    assert abs(going_on - anew) > 1e-5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft
@pytest.mark.parametrize("changes", [dict(bf16=True), dict(checkpointing=True), dict(lora=2)])
def test_options_of_training(bench, tmp_path, changes):
    exact = runs.build(Settings(**SMALL), bench)
    model = train(bench, tmp_path, **changes)
    frozen = dict(exact.host.named_parameters())
    for name, parameter in model.host.named_parameters():
        if "lora_" not in name:
            plain = name.replace("base_model.model.", "").replace(".base_layer", "")
            assert torch.equal(parameter, frozen[plain])  # the host is as it was
    assert all(x == x and x < 2 for x in losses(tmp_path))
    assert bool(model.lora) == any("lora_" in name for name in model.state_dict())


@pytest.mark.slow
def test_the_table_collects_finished_jobs(bench, tmp_path):
    jobs = tmp_path / "jobs"
    for arm, seed in (("gated-speaker", 0), ("gated-speaker", 1), ("never-written", 0)):
        settings = Settings(**{**SMALL, "steps": 1}, arm=arm, seed=seed)
        found = benchmark.measure(settings, bench, jobs / f"baseline-{arm}-{seed}")
        (jobs / f"baseline-{arm}-{seed}.json").write_text(json.dumps(found))
    values = benchmark.write(tmp_path / "table.json", tmp_path / "table.png", jobs)
    assert json.loads((tmp_path / "table.json").read_text()) == values
    assert (tmp_path / "table.png").stat().st_size > 10_000
    assert values["jobs_finished"] == 3
    assert values["jobs_planned"] == len(set(benchmark.jobs()))
    assert len(values["jobs_not_run"]) == values["jobs_planned"] - 3
    memory = values["jobs"]["baseline/gated-speaker"]
    assert memory["seeds"] == [0, 1]
    assert len(memory["answers"]["memory"]["WA"]) == 2
    assert memory["read off is the host"] == [True, True]
    assert memory["state_bytes"] == 2 * 4 * 4 * 4 * 4  # W and S, 4 heads of 4 x 4
    never = values["jobs"]["baseline/never-written"]["answers"]
    assert never["memory"]["WA"] == never["wrong dialogue"]["WA"]  # it hears nothing


def test_checkpointed_gradients_are_the_same(bench):
    window = collate([(d, 0, 16) for d in bench.encoded["train"][:2]], 16).as_dict()
    gradients = []
    for checkpointing in (False, True):
        model = runs.build(Settings(**SMALL), bench)
        torch.nn.init.constant_(model.memory.memory.to_out.weight, 0.01)
        if checkpointing:
            model.checkpoint_activations()
        model.train()(**window)["loss"].backward()
        gradients.append([p.grad for p in model.memory.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_two_processes_equal_one(bench, tmp_path):
    """DDP through the Trainer, and FSDP2 on the model: losses and gradients of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TWO), str(tmp_path / "two")],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        output = [rank.communicate(timeout=280)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], output[0] + output[1]

    from tests.ser.ser_two_processes import SETTINGS, gradients_of_one, open_small

    small = open_small()
    runs.train_run(
        Settings(**{**SETTINGS, "batch": 4}),
        small,
        tmp_path / "one",
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == SETTINGS["steps"]
    # the log rounds; the ranks add in another order
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=2e-4, rtol=0)
    loss, gradients = gradients_of_one(small)
    sharded = torch.load(tmp_path / "two" / "fsdp2.pt", weights_only=True)
    torch.testing.assert_close(sharded["loss"], loss)
    assert sharded["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(sharded["gradients"][name], gradient, atol=1e-6, rtol=1e-4)
