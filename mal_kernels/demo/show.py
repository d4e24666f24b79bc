"""The command ``mal-kernels demo``: what it does, and how it looks on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mal_kernels.demo import audio, figure, play, small_host, synth, train
from mal_kernels.demo.play import Evaluation, Player, Turn
from mal_kernels.errors import ArgumentError

FIGURE = "demo.png"
TIMINGS = 5  # of each turn that is shown
TASK = """\
Each turn is 0.64 s of a voice that is [b]low[/b], [b]neutral[/b] or [b]high[/b] for its speaker.
Speakers differ more than these three do: a turn alone cannot tell, the earlier turns can."""
OWN = """\
[dim]It hears the loudest 0.64 s of each recording and has only ever heard synthetic vowels:
what it answers on real voices shows the mechanism, not a mood.[/dim]"""


@contextmanager
def one_thread() -> Iterator[None]:
    """The models are so small that several threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def run(
    console: Console,
    recordings: Sequence[Path] = (),
    *,
    speakers: str | None = None,
    weights: Path | None = None,
    recipe: train.Recipe | None = None,
    dialogues: int = 250,
    seed: int = 0,
    out: Path = Path("mal-demo"),
    workers: int = 2,
) -> Evaluation | None:
    """The whole demo.

    Args:
        console: where to show it.
        recordings: audio files to play as the turns of one dialogue, in place of synthetic ones.
        speakers: a letter for the speaker of each recording; one and the same if ``None``.
        weights: folder with other weights than those that ship with the package.
        recipe: train the weights first and write them to ``out``.
        dialogues: how many synthetic dialogues to evaluate.
        seed: of the synthetic dialogues.
        out: folder for the figure, and for trained weights.
        workers: processes that render audio for training.

    Returns:
        The figures; ``None`` for recordings, which come without the truth.

    Raises:
        AudioFileError: a recording cannot be used.
        ArgumentError: ``speakers`` does not fit, or ``dialogues`` is not positive.
        CheckpointError: no weights in ``weights``.
    """
    who = "A" * len(recordings) if speakers is None else speakers
    if len(who) != len(recordings):
        raise ArgumentError(
            f"speakers is {speakers!r} for {len(recordings)} recordings; pass one letter for each, "
            "such as ABAB."
        )
    if dialogues < 1:
        raise ArgumentError(f"dialogues is {dialogues}; pass a positive number.")
    waves = [audio.load_turn(path) for path in recordings]  # a bad file is refused before any work
    if recipe is not None:
        with _bars(console) as bars:
            train.save(*train.train(recipe, workers=workers, bar=bars), out)
        console.print(f"Trained from nothing; weights written to [b]{escape(str(out))}[/b].")
        weights = out
    host, mal = train.load(weights)
    player = Player(host, mal.attach(host), small_host.build_processor())
    console.print(_about(player), highlight=False)
    if recordings:
        console.print(OWN)
        watch(console, player, np.stack(waves), who, labels=[path.name for path in recordings])
        return None
    console.print(TASK, highlight=False)
    return _synthetic(console, player, dialogues, seed, out)


def _about(player: Player) -> str:
    sizes = [sum(p.numel() for p in m.parameters()) for m in (player.host, player.mal)]
    state = player.mal.memory.initial_state(1).nbytes
    return (
        f"[b]Host[/b] {type(player.host).__name__}, {sizes[0]:,} parameters, frozen    "
        f"[b]MAL[/b] {sizes[1]:,} parameters, {state / 1024:.0f} KiB a speaker"
    )


def _synthetic(
    console: Console, player: Player, dialogues: int, seed: int, out: Path
) -> Evaluation:
    rng = play.unseen(seed)
    script = synth.sample(rng, 1)
    waves = synth.render_script(rng, script)
    watch(console, player, waves[0], play.names(script)[0], truth=script.label[0])
    batches = -(-dialogues // play.BATCH)
    with _bars(console) as bars:
        turns = bars.add_task(f"Playing {dialogues} more dialogues", total=16 * batches)
        result = play.evaluate(player, dialogues, seed + 1, on_turn=lambda: bars.advance(turns))
    console.print(score_table(result))
    console.print(play.verdict(result), highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    try:
        console.print(f"Figure: [b]{escape(str(figure.draw(out / FIGURE, result)))}[/b]")
    except ImportError:
        console.print("[dim]No figure without matplotlib: pip install 'mal-kernels[demo]'[/dim]")
    return result


def watch(
    console: Console,
    player: Player,
    waves: np.ndarray,
    speakers: Sequence[str],
    *,
    truth: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
) -> list[Turn]:
    """Play one dialogue ``[T, CLIP_SAMPLES]`` with a table that grows turn by turn."""
    list(player.turns(waves[None, :1], [["A"]]))  # the first call of a process is slow
    table = Table(title="One dialogue", title_justify="left")
    for column in ("turn", "speaker", "without memory", "with memory"):
        table.add_column(column, justify="right" if column == "turn" else "left")
    if truth is not None:
        table.add_column("truth")
    for column in ("surprise", "host ms", "MAL ms"):
        table.add_column(column, justify="right")
    turns: list[Turn] = []
    with Live(table, console=console, refresh_per_second=12):
        for t, turn in enumerate(player.turns(waves[None], [speakers], TIMINGS)):
            turns.append(turn)
            right = None if truth is None else int(truth[t])
            answers = [_answer(int(a[0]), right) for a in (turn.without, turn.with_memory)]
            name = f"{speakers[t]}  [dim]{escape(labels[t])}[/dim]" if labels else speakers[t]
            table.add_row(
                str(t + 1),
                name,
                *answers,
                *([] if right is None else [synth.LABELS[right]]),
                f"{turn.surprise[0]:.1f}",
                f"{turn.host_ms:.1f}",
                f"{turn.memory_ms:+.1f}",
            )
    host_ms, mal_ms = (
        median(ms) for ms in zip(*((t.host_ms, t.memory_ms) for t in turns), strict=True)
    )
    console.print(
        f"\n[dim]Best of {TIMINGS} timings; median turn: host {host_ms:.1f} ms, "
        f"MAL {mal_ms:+.1f} ms[/dim]",
        highlight=False,
    )
    return turns


def _answer(answer: int, right: int | None) -> str:
    word = synth.LABELS[answer] if answer >= 0 else "?"
    if right is None:
        return word
    return f"[green]{word}[/green]" if answer == right else f"[red]{word}[/red]"


def score_table(result: Evaluation) -> Table:
    """Accuracy of every way of answering, by length of the speaker's history."""
    table = Table(title="Accuracy by earlier turns of the same speaker", title_justify="left")
    table.add_column("")
    table.add_column("all turns", justify="right")
    for first, last in play.HISTORY:
        several = f"{first}-{last}" if last < 99 else f"{first}+"
        table.add_column(str(first) if first == last else several, justify="right")
    for way, score in result.scores.items():
        table.add_row(
            way,
            f"{score.accuracy:.3f} ± {score.error:.3f}",
            *(f"{value:.2f}" for value in score.by_history),
            style="bold" if way == "memory" else "dim" if "cap" in way else None,
        )
    return table


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)
