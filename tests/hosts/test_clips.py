"""By what a clip is known again: the frames that its mask shows, whatever stands beside them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mal_kernels import MALAdapter, MALConfig
from mal_kernels.errors import HostError
from mal_kernels.hosts import Host, fingerprint
from mal_kernels.hosts.clips import EDGE, LONG, Clip, Frames, windows_of
from mal_kernels.testing import tiny_host, tiny_inputs

WINDOWS = {  # tokens and frames of a window
    "voxtral": (5, 40),
    "audioflamingo3": (10, 40),
    "musicflamingo": (10, 40),
    "glmasr": (10, 80),
}


def shown(lengths, width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def attached(model) -> MALAdapter:
    mal = MALAdapter(MALConfig(heads=2, head_dim=8)).attach(model)
    torch.nn.init.normal_(mal.memory.to_out.weight, std=0.5)
    return mal


# --- the hash -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("time", [1, 2])
def test_padding_width_and_companions_have_no_part(dtype, time):
    x = (torch.randn(3, 8, 30) * 20).to(dtype)
    mask = shown([30, 12, 7], 30)
    place = (lambda t: t.mT) if time == 1 else (lambda t: t)
    marks = fingerprint(place(x), mask, time=time)
    assert len(set(marks)) == 3
    for padding in (0.0, -0.0, 7.0):
        y = F.pad(x.where(mask[:, None], torch.tensor(padding).to(dtype)), (0, 9), value=padding)
        wider = F.pad(mask, (0, 9))
        assert fingerprint(place(y), wider, time=time) == marks
        assert fingerprint(place(y[1:2, :, :12]), wider[1:2, :12], time=time) == marks[1:2]
    left = x[1:2].roll(5, -1)
    assert fingerprint(place(left), mask[1:2].roll(5, -1), time=time) == marks[1:2]
    y = x.clone()
    y[1, 3, 11] += 1  # in the last frame that is shown
    assert fingerprint(place(y), mask, time=time)[1] != marks[1]


@pytest.mark.parametrize("shape", [(2, 1000), (2, 1, 1000)])
def test_waves_are_known_by_the_samples_that_are_shown(shape):
    x = torch.randn(shape)
    marks = fingerprint(x, shown([1000, 300], 1000))
    wider = F.pad(x, (0, 77), value=0.5)
    assert fingerprint(wider, shown([1000, 300], 1077)) == marks
    assert fingerprint(x[1:, ..., :300]) == marks[1:]
    assert fingerprint(x[1:, ..., :301]) != marks[1:]
    assert len({*marks, *fingerprint(x)}) == 3


def test_frames_that_saw_the_padding_have_no_part_in_a_clip_that_is_not_short():
    x, mask = torch.randn(1, 8, LONG), shown([LONG], LONG)
    y = x.clone()
    y[..., -EDGE:] = 0
    assert fingerprint(y, mask) == fingerprint(x, mask)
    assert fingerprint(y) != fingerprint(x)  # without a mask there is no padding to see
    assert fingerprint(y[..., :-1], mask[:, :-1]) != fingerprint(x, mask)  # another length
    y[..., -EDGE - 1] = 0
    assert fingerprint(y, mask) != fingerprint(x, mask)


def test_silence_behind_a_clip_makes_it_another():
    x = torch.randn(1, 8, 20)
    assert fingerprint(F.pad(x, (0, 4))) != fingerprint(x)
    assert fingerprint(F.pad(x[:, 0], (0, 4))) != fingerprint(x[:, 0])


def test_the_key_decides_and_the_hash_is_not_linear():
    x = torch.randint(-9, 9, (1, 8, 20), dtype=torch.int32)
    assert fingerprint(x, key=b"a") == fingerprint(x, key=b"a")
    assert fingerprint(x, key=b"a") != fingerprint(x, key=b"b")
    step = torch.zeros_like(x)
    step[0, 3, 4] = 1
    a, b, c, d = (fingerprint(x + i * step)[0] for i in range(4))
    assert len({(b - a) % 2**64, (c - b) % 2**64, (d - c) % 2**64}) == 3


def test_two_clips_without_a_fingerprint_are_not_the_same():
    assert Clip(0, 2, 5).same(Clip(0, 2, 5))
    assert not Clip(0, 2, 5).same(Clip(0, 2, 6))
    assert not Clip(0, 2, None).same(Clip(0, 2, None))


# --- which windows are whose ----------------------------------------------------------------------


def entries(*frames: int, width: int = 3000) -> list[Frames]:
    return [Frames("float32", torch.zeros(n).long().numpy(), n, n == width) for n in frames]


@pytest.mark.parametrize(
    ("frames", "tokens", "parts"),
    [
        ([3000, 3000, 3000], [750, 1500], [1, 2]),
        ([3000, 3000, 1000, 999, 3000, 1], [1750, 250, 751], [3, 1, 2]),
        ([17, 18, 19], [4, 4, 5], [1, 1, 1]),
        ([3000] * 20, [750 * 9, 750 * 11], [9, 11]),
    ],
)
def test_a_clip_has_the_windows_of_its_tokens(frames, tokens, parts):
    found = windows_of(entries(*frames), tokens)
    assert [len(part) for part in found] == parts


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [([3000], [750, 750]), ([1000, 3000, 3000], [1750, 750]), ([1000, 3000], [1000])],
)
def test_windows_that_fit_no_clip_are_nobodys(frames, tokens):
    assert windows_of(entries(*frames), tokens) is None


# --- hosts ----------------------------------------------------------------------------------------


def side_by_side(first, second, both, *, padding: float):
    """The audio of both prompts in one call, padded to the longer with ``padding``."""
    joined = dict(both)
    for name in both.keys() - {"input_ids", "attention_mask"}:
        parts = [first[name], second[name]]
        shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in parts), strict=True)]
        value = padding if parts[0].is_floating_point() else 0
        joined[name] = torch.cat([grown(x, shape, value) for x in parts])
    return joined


def grown(x, shape, value):
    out = x.new_full((len(x), *shape), value)
    out[tuple(slice(0, n) for n in x.shape)] = x
    return out


@pytest.mark.parametrize(
    "name", ["qwen2_audio", "qwen3_omni_moe_thinker", "gemma4", "granite_speech", "muse_spark"]
)
@pytest.mark.parametrize("padding", [-0.0, 0.5])
def test_a_clip_sent_again_beside_a_longer_one_is_known(name, padding):
    model = tiny_host(name).requires_grad_(False)
    mal = attached(model)
    first, second = (tiny_inputs(model, [[n]], seed=n) for n in (3, 9))
    both = side_by_side(first, second, tiny_inputs(model, [[3, 9]]), padding=padding)
    with mal.dialogue("call") as call:
        model(**first)
        model(**both)
    assert call.turns == [2]


def long_prompt(model, rows, seed: int = 0):
    """A prompt whose clips may be longer than a window, with a short last one."""
    name = model.config.model_type
    tokens, width = WINDOWS[name]
    draw = torch.Generator().manual_seed(seed)
    ids, lengths = [], []
    for row in rows:
        ids.append([1])
        for clip in row:
            ids[-1] += [7, *[model.config.audio_token_id] * clip, 8]
            full, rest = divmod(clip, tokens)
            lengths += [width] * full + [width // tokens * rest] * (rest > 0)
    longest = max(map(len, ids))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = shown(lengths, width).long()
    features = torch.randn(len(lengths), 8, width, generator=draw) * mask[:, None]
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), "input_features": features}
    return inputs if name == "voxtral" else {**inputs, "input_features_mask": mask}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_clip_longer_than_a_window_is_known_again(name):
    model = tiny_host(name).requires_grad_(False)
    mal = attached(model)
    tokens, _ = WINDOWS[name]
    short = tokens if name == "voxtral" else 3
    one = long_prompt(model, [[2 * tokens + short]])
    with mal.dialogue("call") as call:
        model(**one)
        once = model(**one).logits
        assert call.turns == [1]
        model(**long_prompt(model, [[2 * tokens + short]], seed=1))
        assert call.turns == [2]
    assert once.isfinite().all()
    # of several clips each has its own windows
    rows = [[tokens, 2 * tokens + short], [3 * tokens]]
    marks = [
        [c.fingerprint for row in Host.of(model).clips(x, fingerprints=True) for c in row]
        for x in (long_prompt(model, rows), long_prompt(model, rows[:1]))
    ]
    assert None not in marks[0]
    assert len(set(marks[0])) == 3
    assert marks[0][:2] == marks[1]


@pytest.mark.parametrize("name", ["voxtral", "audioflamingo3"])
def test_beams_that_part_the_windows_of_a_clip_are_refused(name):
    model = tiny_host(name).requires_grad_(False)
    mal = attached(model)
    tokens, _ = WINDOWS[name]
    with mal.dialogue("call") as call:
        with pytest.raises(HostError, match="not the same audio in each copy of a row"):
            model.generate(**long_prompt(model, [[2 * tokens]]), num_beams=2, max_new_tokens=2)
        assert call.turns == [0]
        model.generate(**long_prompt(model, [[tokens]]), num_beams=2, max_new_tokens=2)
        assert call.turns == [1]


def test_an_encoder_knows_a_clip_by_what_it_was_given():
    model = tiny_host("whisper").requires_grad_(False)
    mal = attached(model)
    first, second = (tiny_inputs(model, [[5], [4]], seed=seed) for seed in range(2))
    mask = shown([30, 40], 40).long()
    heard = {"decoder_input_ids": first["decoder_input_ids"], "attention_mask": mask}
    with mal.dialogue(["a", "b"]) as call:
        model(input_features=first["input_features"], **heard)
        # as another machine would compute its output
        handle = model.get_encoder().layer_norm.register_forward_hook(lambda m, a, y: y * 1.0001)
        model(input_features=first["input_features"], **heard)
        model.generate(first["input_features"], attention_mask=mask, max_new_tokens=2, num_beams=2)
        handle.remove()
        assert call.turns == [1, 1]
        padded = first["input_features"].masked_fill(mask[:, None] == 0, -1.5)
        model(input_features=padded, **heard)
        assert call.turns == [1, 1]
        model(input_features=second["input_features"], **heard)
        assert call.turns == [2, 2]


def test_the_key_is_that_of_the_weights():
    def key(seed: int) -> bytes:
        torch.manual_seed(seed)
        return MALAdapter(MALConfig(heads=2, head_dim=8, hidden_size=32)).memory.clip_key

    assert key(0) == key(0)
    assert key(0) != key(1)
    assert len(key(0)) == 32
