"""Bad input by the thousand: ``python -m tests.reliability.fuzz --cases 20000``.

Every case either works, and then its result is checked, or raises an exception of
``mal_kernels.errors``; anything else is a finding. A case is a target and a seed, so that a finding
can be played again: ``python -m tests.reliability.fuzz --target wav --first 123 --cases 1``.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import hashlib
import io
import json
import math
import random
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor

from examples.serve_vllm import parse, read_audio
from mal_kernels import MALAdapter, MALConfig, MALError, MemoryState, ops
from mal_kernels.demo.audio import load_turn
from mal_kernels.dialogues.files import UNSIGNED
from mal_kernels.dialogues.snapshot import pack_dialogues
from mal_kernels.store import MemoryStore
from mal_kernels.testing import Inputs, make_inputs
from tests.reliability.echo import echo_adapter, turn_tokens
from tests.reliability.soak import play

LIMIT = 10.0  # seconds; a case takes milliseconds
NUMBERS = (0, -0.0, 1, -1, 2**31, -(2**63), 1e-45, 1e38, math.inf, -math.inf, math.nan, 0.5)
JSON_JUNK: tuple[Any, ...] = (None, True, "", "x", "\ud800", [], {}, [[]], {"a": 1}, *NUMBERS)
JUNK = (*JSON_JUNK, b"x", (), object())


class Finding(AssertionError):
    """A case that neither works nor is refused as it should be."""


def require(ok: bool, what: str) -> None:
    """Raises a finding."""
    if not ok:
        raise Finding(what)


# --- arguments of the ops -------------------------------------------------------------------------


def a_number(draw: random.Random, like: Tensor) -> Tensor:
    """The tensor with one entry that is extreme, or none."""
    x = like.clone()
    if x.numel():
        with contextlib.suppress(RuntimeError, OverflowError):  # not of an integer dtype
            x.view(-1)[draw.randrange(x.numel())] = draw.choice(NUMBERS)
    return x


def a_shape(draw: random.Random, like: Tensor) -> Tensor:
    """The tensor in another shape."""
    dim = draw.randrange(max(1, like.ndim))
    changes: list[Callable[[], Tensor]] = [
        lambda: like.unsqueeze(dim),
        lambda: like.sum(dim) if like.ndim else like,
        lambda: like.narrow(dim, 0, draw.randrange(like.shape[dim] + 1)) if like.ndim else like,
        lambda: torch.cat([like, like], dim) if like.ndim else like,
        lambda: like.transpose(0, dim) if like.ndim else like,
        lambda: like.flatten(),
        lambda: like.to("meta"),
    ]
    return draw.choice(changes)()


def a_dtype(draw: random.Random, like: Tensor) -> Tensor:
    """The tensor in another dtype."""
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32)
    return like.to(draw.choice((*kinds, torch.bool, torch.complex64, torch.uint8)))


def changed(draw: random.Random, value: Any) -> Any:
    """Another value in place of an argument."""
    if isinstance(value, MemoryState):
        field = draw.choice(MemoryState._fields)
        return value._replace(**{field: changed(draw, getattr(value, field))})
    if isinstance(value, (tuple, list)) and value and draw.random() < 0.8:
        i = draw.randrange(len(value))
        rest = [*value[:i], changed(draw, value[i]), *value[i + 1 :]]
        if isinstance(value, ops.ReadParams):
            return ops.ReadParams(*rest)
        return type(value)(rest) if draw.random() < 0.8 else value[:i]
    if isinstance(value, Tensor) and draw.random() < 0.85:
        return draw.choice((a_number, a_shape, a_dtype))(draw, value)
    return draw.choice(JUNK)


def random_inputs(draw: random.Random) -> Inputs:
    """Valid arguments of ``neural_memory``, small, with options of every kind."""
    step = draw.choice(("token", "chunk"))
    chunk = draw.choice((None, 1, 4))
    lengths = [draw.randrange(5) for _ in range(2)] if draw.random() < 0.3 else None
    return make_inputs(
        tokens=draw.randrange(7),
        heads=draw.randrange(1, 3),
        head_dim=4,
        hidden=6,
        depth=draw.randrange(1, 4),
        chunk_size=chunk,
        step=step,
        residual_norm=draw.random() < 0.3,
        activation=draw.choice(("gelu", "gelu_tanh", "silu", "relu")),
        max_grad_norm=draw.choice((None, 1.0)),
        init=draw.random() < 0.5,
        lengths=lengths,
        position=step == "token" and chunk is not None and draw.random() < 0.3,
        gates=draw.random() < 0.8,
        edges=draw.random() < 0.3,
        dtype=draw.choice((torch.float32, torch.float64, torch.bfloat16)),
        seed=draw.randrange(100),
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from tensors_in(x)


def op_case(draw: random.Random) -> None:
    """One op with one argument changed, or none."""
    q, k, v, lr, momentum, decay, state, options = random_inputs(draw)
    read = {key: options[key] for key in ("activation", "residual_norm")}
    ragged = {"cu_seqlens": options["cu_seqlens"]} if "cu_seqlens" in options else {}
    writes = [k, v, lr, momentum, decay, state]
    index = torch.arange(k.shape[1])
    width = k.shape[2] * k.shape[3]
    hidden = torch.randn(1, max(k.shape[1], 1), 5, dtype=k.dtype)
    w_q, w_gate = torch.randn(2, width, 5)
    params = ops.ReadParams(torch.ones(5), w_q, w_gate, torch.randn(5, width))
    scan = [v, lr, lr.clamp(max=1)]
    calls: list[tuple[Callable[..., Any], list[Any], dict[str, Any]]] = [
        (ops.neural_memory, [q, *writes], options),
        (ops.memory_update, writes, options),
        (ops.memory_read, [q, state.end_chunk()], {**read, **ragged}),
        (ops.momentum_scan, scan, ragged),
        (
            ops.aligned_residual_read,
            [hidden, index, index * 0, state.end_chunk(), params],
            read,
        ),
    ]
    op, args, named = draw.choice(calls)
    named = {**named, "backend": "reference"}
    valid = draw.random() < 0.1
    if not valid:
        which: Any = draw.choice([*range(len(args)), *named])
        target: Any = args if isinstance(which, int) else named
        if isinstance(target, dict):
            named = {**named, which: changed(draw, named[which])}
        else:
            args = [*args[:which], changed(draw, args[which]), *args[which + 1 :]]
    inputs = list(tensors_in([args, named]))
    finite = all(bool(x.isfinite().all()) for x in inputs if x.device.type == "cpu")
    before = [x.clone() for x in inputs]
    try:
        result = op(*args, **named)
    except MALError as error:
        require(not valid, f"valid arguments were refused: {error}")
        raise
    finally:
        for x, y in zip(inputs, before, strict=True):
            require(same_bits(x, y), "an argument was changed in place")
    if valid and finite:
        for x in tensors_in(result):
            require(bool(x.isfinite().all()), "finite arguments gave a result that is not finite")


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal, NaN too."""
    if x.device.type == "meta":
        return True
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


# --- configurations -------------------------------------------------------------------------------


def config_case(draw: random.Random) -> None:
    """A configuration with fields of any kind; what is accepted must come back from its JSON."""
    values: Any = MALConfig(hidden_size=8).to_dict()
    for _ in range(draw.randrange(1, 4)):
        name = draw.choice((*values, "unknown"))
        good = (1, 2, 4096, [0.1] * 4, "relu", "embeds", 0.25, None, True)
        values[name] = draw.choice(good if draw.random() < 0.6 else (*JUNK, 4097, 10**30))
    if draw.random() < 0.1:
        values = draw.choice(JUNK)
    config = MALConfig.from_dict(values)
    again = MALConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    require(again == config, "a configuration changed in JSON")


# --- files ----------------------------------------------------------------------------------------


def damaged(draw: random.Random, blob: bytes) -> bytes:
    """The bytes with a few of them changed, cut, repeated or put elsewhere."""
    data = bytearray(blob)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 4, 64, 10**9)))
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1 and data:
            data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind == 2:
            del data[a:b]
        elif kind == 3:
            data[a:a] = data[a:b]
        elif kind == 4:
            data[a:b] = draw.randbytes(b - a)
        elif kind == 5:
            number = draw.choice((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
            data[a : a + 8] = struct.pack("<Q", number)[: draw.choice((2, 4, 8))]
        else:
            data = data[: draw.randrange(len(data) + 1)]
    return bytes(data)


def rewritten(draw: random.Random, blob: bytes) -> bytes:
    """A safetensors file with something else in its header, and a checksum that is right."""
    size = int.from_bytes(blob[:8], "little")
    table = json.loads(blob[8 : 8 + size])
    about = json.loads(table["__metadata__"]["mal_kernels"])
    place: Any = draw.choice((table, about, *table.values()))
    for _ in range(draw.randrange(5)):
        key = draw.choice(list(place) if isinstance(place, dict) else [*range(len(place))] or [0])
        inner = place[key] if place else None
        if isinstance(inner, (dict, list)) and inner and draw.random() < 0.7:
            place = inner
            continue
        value = draw.choice([*JSON_JUNK, 10**30, 2**62, [2**31, 2**31], [-1], "F8_E4M3", "I64", {}])
        if draw.random() < 0.2 and isinstance(place, dict):
            place[draw.choice(("x", "id", "weights.9"))] = value
        elif place:
            place[key] = value
        break
    about["checksum"] = UNSIGNED
    metadata = table.get("__metadata__")
    if isinstance(metadata, dict):
        metadata["mal_kernels"] = json.dumps(about)
    head = json.dumps(table).encode()
    unsigned = len(head).to_bytes(8, "little") + head + blob[8 + size :]
    checksum = hashlib.sha256(unsigned).hexdigest()
    return unsigned.replace(UNSIGNED.encode(), checksum.encode(), 1)


def other_bytes(draw: random.Random, blob: bytes) -> tuple[str, bytes]:
    """Damaged, rewritten, or something else altogether, and which of them."""
    kind = draw.random()
    if kind < 0.55:
        return "damaged", damaged(draw, blob)
    if kind < 0.95:
        return "rewritten", rewritten(draw, blob)
    nested = b'{"a":' * 100_000
    deep = len(nested).to_bytes(8, "little") + nested
    others = (b"", b"\x80\x04K*.", blob * 2, draw.randbytes(200), deep, b"\xff" * 8)
    return "other", draw.choice(others)


@cache
def played() -> MALAdapter:
    """An adapter with two dialogues."""
    host, mal = echo_adapter()
    for dialogue in range(2):
        for turn in range(2):
            play(host, mal, dialogue, turn)
    return mal


@cache
def stored(name: str) -> bytes:
    """A dialogue of :func:`played`, as a backing store has it."""
    return pack_dialogues(played().config, {name: played().dialogues.latest(name)})


def store_case(draw: random.Random) -> None:
    """A backing store with other bytes; only what was put there may come back."""
    mal, blob = played(), stored("call-0")
    backing = MemoryStore()
    kind, other = other_bytes(draw, blob)
    backing.put("call-0", other)
    backing.put("call-1", stored("call-1"))
    dialogues = echo_store(backing)
    try:
        found, true = dialogues.latest("call-0"), mal.dialogues.latest("call-0")
    finally:
        bystander = dialogues.latest("call-1")
        require(bystander.clips == mal.dialogues.latest("call-1").clips, "another one changed")
    if kind != "rewritten":
        both = [(a.clips, [bits(x) for x in a.states.values()]) for a in (found, true)]
        require(both[0] == both[1], "other bytes gave another state")
    for state in found.states.values():
        require(bool(state.is_finite().all()), "a state that is not finite was loaded")
        shapes = [x.shape for x in state.tensors()]
        like = dialogues.initial_state(1).tensors()
        require(shapes == [x.shape for x in like], "a state of another shape was loaded")


def bits(state: MemoryState) -> list[bytes]:
    """All of a state."""
    return [x.detach().numpy().tobytes() for x in state.tensors()]


@cache
def fresh_adapter() -> MALAdapter:
    """An adapter to make stores for."""
    return echo_adapter()[1]


def echo_store(backing: MemoryStore) -> Any:
    """An empty store of dialogues over ``backing``."""
    mal = fresh_adapter()
    kind = type(mal.dialogues)
    return kind(mal.config, mal.dialogues.initial_state, backing=backing)


@cache
def saved_adapter() -> tuple[bytes, str]:
    """Weights and configuration of a saved adapter."""
    with tempfile.TemporaryDirectory() as folder:
        fresh_adapter().save_pretrained(folder)
        weights = (Path(folder) / "adapter_model.safetensors").read_bytes()
        return weights, (Path(folder) / "adapter_config.json").read_text()


@cache
def scratch() -> Path:
    """A folder that is there until this process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


def adapter_case(draw: random.Random) -> None:
    """A saved adapter with other weights or another configuration."""
    weights, config = saved_adapter()
    if draw.random() < 0.6:
        weights = other_bytes(draw, weights)[1]
        text = config.encode()
    else:
        values = json.loads(config)
        values[draw.choice(list(values))] = draw.choice((0, 1, 3, 64, 4096, 10**9, None, "x", []))
        text = json.dumps(values).encode()
        text = damaged(draw, text) if draw.random() < 0.3 else text
    (scratch() / "adapter_model.safetensors").write_bytes(weights)
    (scratch() / "adapter_config.json").write_bytes(text)
    mal = MALAdapter.from_pretrained(scratch())
    for parameter in mal.parameters():
        require(bool(parameter.isfinite().all()), "a weight that is not finite was loaded")


# --- audio ----------------------------------------------------------------------------------------


@cache
def recording(kind: str, rate: int, channels: int) -> bytes:
    """A tenth of a second of noise as a file."""
    import soundfile

    noise = np.random.default_rng(0).normal(0, 0.1, (rate // 10, channels))
    data = io.BytesIO()
    soundfile.write(data, noise, rate, format=kind)
    return data.getvalue()


def damaged_recording(draw: random.Random) -> bytes:
    """Of any kind that libsndfile reads."""
    blob = recording(
        draw.choice(("WAV", "WAV", "FLAC", "W64", "OGG")),
        draw.choice((8000, 16000, 44100)),
        draw.choice((1, 2)),
    )
    return damaged(draw, blob) if draw.random() < 0.95 else draw.randbytes(draw.randrange(300))


def wav_case(draw: random.Random) -> None:
    """A recording with bytes changed, as a file for the demo."""
    (scratch() / "turn.wav").write_bytes(damaged_recording(draw))
    clip = load_turn(scratch() / "turn.wav")
    require(bool(np.isfinite(clip).all()) and len(clip) > 0, "a clip that is not finite")


def upload_case(draw: random.Random) -> None:
    """The same, in a request to the sidecar."""
    audio: Any = {"data": base64.b64encode(damaged_recording(draw)).decode(), "format": "wav"}
    if draw.random() < 0.1:
        audio = draw.choice((*JUNK, {"data": draw.choice(JUNK)}))
    wave = read_audio(audio, 16000)
    require(bool(np.isfinite(wave).all()) and len(wave) > 0, "samples that are not finite")


def request_case(draw: random.Random) -> None:
    """A chat request with anything in place of some of it."""
    part = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    request: Any = {
        "dialogue": "a",
        "speaker": None,
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}],
    }
    place: Any = request
    while draw.random() < 0.8:
        key = draw.choice(list(place) if isinstance(place, dict) else list(range(len(place))))
        if not (isinstance(place[key], (dict, list)) and place[key]) or draw.random() < 0.3:
            place[key] = draw.choice(JUNK)
            break
        place = place[key]
    dialogue, _, _, fill = parse(request if draw.random() < 0.95 else draw.choice(JUNK))
    sent = fill({"type": "audio_embeds"})
    require(isinstance(dialogue, str), "a dialogue without an id")
    require("dialogue" not in sent and "input_audio" not in str(sent), "the audio was sent on")


# --- what a host passes on ------------------------------------------------------------------------


def host_case(draw: random.Random) -> None:
    """Hidden states of any kind in a batch of two: the other row's dialogue must not notice."""
    host, mal = echo_host()
    mal.dialogues.forget()
    clean = turn_tokens(1, draw.randrange(20))
    tokens = clean.shape[1]
    bad = clean.clone()
    for _ in range(draw.randrange(1, 6)):
        bad[0, draw.randrange(tokens)] *= draw.choice((0, 1e-30, 1e10, 1e19, 1e38, math.nan))
        bad = a_number(draw, bad)
    both = torch.cat([clean, bad])
    if draw.random() < 0.3:
        both = both.to(draw.choice((torch.float16, torch.bfloat16, torch.float64)))
    if draw.random() < 0.2:
        other = changed(draw, both)
        both = both if isinstance(other, Tensor) and other.is_meta else other  # it has no values
    with torch.no_grad():
        with mal.dialogue("alone"):
            host(inputs_embeds=clean)
        try:
            with mal.dialogue(["good", "bad"]):
                host(inputs_embeds=both)
        except MALError:
            for name in ("good", "bad"):
                require(not mal.dialogues.latest(name).states, "a refused turn was written")
            raise
    for name in ("good", "bad"):
        state = mal.dialogues.latest(name).states.get(None)
        require(state is None or bool(state.is_finite().all()), f"{name} is not finite")
    if isinstance(both, Tensor) and both.dtype == torch.float32 and torch.equal(both[:1], clean):
        good, alone = (mal.dialogues.latest(name).states[None] for name in ("good", "alone"))
        for x, y in zip(good.tensors(), alone.tensors(), strict=True):
            require(torch.allclose(x, y, rtol=1e-5, atol=1e-6), "a row saw its neighbour")


@cache
def echo_host() -> Any:
    """A host and its adapter."""
    return echo_adapter()


TARGETS: dict[str, Callable[[random.Random], None]] = {
    "op": op_case,
    "config": config_case,
    "store": store_case,
    "adapter": adapter_case,
    "wav": wav_case,
    "upload": upload_case,
    "request": request_case,
    "host": host_case,
}
# of 20 cases; the ops and the host take milliseconds, the others a fraction of one
SHARES = dict(config=4, request=3, store=4, wav=2, upload=2, adapter=2, op=2, host=1)
ROUND = [name for name, share in SHARES.items() for _ in range(share)]


# --- running them ---------------------------------------------------------------------------------


def run_case(target: str, seed: int) -> str | Exception:
    """``"worked"``, ``"refused"``, or a finding."""

    def hang(*_: object) -> None:
        raise Finding(f"no end after {LIMIT} s")

    previous = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        TARGETS[target](random.Random(f"{target} {seed}"))
        return "worked"
    except MALError:
        return "refused"
    except Exception as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def fuzz(
    cases: int,
    *,
    target: str | None = None,
    first: int = 0,
    on_case: Callable[[str, int], object] = lambda target, seed: None,
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Cases by target and outcome, and the findings."""
    names = [target] if target else ROUND
    tried = {name: Counter({"worked": 0, "refused": 0}) for name in names}
    findings = []
    for i in range(cases):
        name = names[i % len(names)]
        seed = first + (i // len(names)) * names.count(name) + names[: i % len(names)].count(name)
        on_case(name, seed)
        outcome = run_case(name, seed)
        if isinstance(outcome, str):
            tried[name][outcome] += 1
        else:
            findings.append(f"{name} {seed}: {type(outcome).__name__}: {outcome}"[:300])
    return {name: dict(counts) for name, counts in tried.items()}, findings


def main(
    cases: int = 7000,
    target: Annotated[str | None, typer.Option(help=f"One of {', '.join(TARGETS)}.")] = None,
    first: Annotated[int, typer.Option(help="Seed of the first case.")] = 0,
) -> None:
    """Prints findings, and fails if there are any."""
    torch.set_num_threads(1)
    steps = iter(track(range(cases), "Fuzzing"))
    tried, findings = fuzz(cases, target=target, first=first, on_case=lambda *_: next(steps))
    for finding in findings[:50]:
        print(finding)
    print(json.dumps({"tried": tried, "findings": len(findings)}))
    raise typer.Exit(bool(findings))


if __name__ == "__main__":
    typer.run(main)
