"""Attach a memory to a frozen audio LLM, train it on dialogues, save it, and use it again.

    python examples/quickstart.py     # a minute on one core; accuracy 0.56 alone, 0.67 with memory

The host is the demo's small Qwen2-Audio; with your own model only the first three lines of ``main``
and the task in ``dialogues`` change.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import track

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.demo import small_host, synth, train


def dialogues(rng: np.random.Generator, count: int) -> tuple[np.ndarray, synth.Script]:
    """Two speakers each: audio ``[count, 16, samples]``, and who says what in which mood."""
    script = synth.sample(rng, count)
    return synth.render_script(rng, script), script


def turns(mal: MALAdapter, waves: np.ndarray, script: synth.Script) -> Iterator[torch.Tensor]:
    """The logits of the three moods, turn by turn; the memory hears each turn once."""
    processor = small_host.build_processor()
    ids = [f"dialogue-{i}" for i in range(len(waves))]
    for t in range(waves.shape[1]):
        inputs = small_host.prompt(processor, waves[:, t])
        dialogue = mal.dialogue(ids, speaker=["AB"[s] for s in script.speaker[:, t]])
        yield dialogue(**inputs).logits[:, -1, small_host.answer_ids()]
    mal.dialogues.forget(ids)


def main(
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 60,
    batch: Annotated[int, typer.Option(help="Dialogues in a step.")] = 16,
    out: Annotated[Path, typer.Option(help="Where the adapter is saved.")] = Path("my-mal"),
) -> None:
    """Train an adapter, save it, load it, and compare it with the host alone."""
    host, _ = train.load()
    mal = MALAdapter(MALConfig(head_dim=16, depth=1, max_lr=1.0)).attach(host)
    mal.print_trainable_parameters()

    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(mal.parameters(), lr=1e-2)
    for _ in track(range(steps), "Training"):
        waves, script = dialogues(rng, batch)
        truth = torch.from_numpy(script.label)
        losses = [
            torch.nn.functional.cross_entropy(logits, truth[:, t])
            for t, logits in enumerate(turns(mal, waves, script))
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()  # through the memory, into the earlier turns
        torch.nn.utils.clip_grad_norm_(mal.parameters(), 1.0)
        optimizer.step()
    mal.save_pretrained(out)
    mal.detach()

    mal = MALAdapter.from_pretrained(out).attach(host)
    waves, script = dialogues(np.random.default_rng(1), 50)
    with torch.no_grad():
        heard = torch.stack(list(turns(mal, waves, script)), 1).argmax(-1)
        with mal.disable_adapter():
            alone = torch.stack(list(turns(mal, waves, script)), 1).argmax(-1)
    for name, answer in (("host alone", alone), ("with memory", heard)):
        print(f"{name}: {float((answer.numpy() == script.label).mean()):.3f}")


if __name__ == "__main__":
    typer.run(main)
