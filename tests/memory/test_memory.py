"""NeuralMemory: the layer around the ops."""

from __future__ import annotations

import io
import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from mal_kernels import ArgumentError, MALAdapter, MALConfig, MemoryState, NeuralMemory, ops
from mal_kernels.errors import CheckpointError
from mal_kernels.testing import tiny_host, tiny_inputs

KINDS = {
    "titans": dict(chunk_size=8),
    "turns": dict(step="chunk", chunk_size=None),
    "chunk steps": dict(step="chunk", chunk_size=4),
    "linear": dict(depth=1, chunk_size=8),
    "norm": dict(residual_norm=True, depth=3, activation="silu", chunk_size=8),
    "zero start": dict(zero_start=True, chunk_size=8),
}


def layer(**kind):
    torch.manual_seed(0)
    return NeuralMemory(12, heads=2, head_dim=8, **kind)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    memory = layer(**KINDS[kind])
    x = torch.randn(2, 21, 12)
    output, state = memory(x)
    again, _ = memory(x, state.end_chunk())
    again.square().mean().backward()
    assert output.shape == x.shape
    silent = [n for n, p in memory.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("kind", ["titans", "linear", "norm"])
def test_a_stream_may_be_cut_anywhere(kind):
    memory, x = layer(**KINDS[kind]), torch.randn(2, 21, 12)
    whole, end = memory(x)
    state, parts = None, []
    for begin, stop in itertools.pairwise([0, 1, 5, 8, 19, 21]):
        y, state = memory(x[:, begin:stop], state)
        parts.append(y)
    close(torch.cat(parts, 1), whole)
    close(state.weights, end.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_write_is_each_row_alone(kind):
    memory = layer(**KINDS[kind])
    lengths = [5, 0, 9, 1]
    tokens, ends = torch.randn(15, 12), torch.tensor([0, *lengths]).cumsum(0)
    state = memory.initial_state(4)
    together = memory.write(tokens, ends, state)
    for row, (begin, end) in enumerate(itertools.pairwise(ends.tolist())):
        one = memory.write(
            tokens[begin:end], torch.tensor([0, end - begin]), memory.initial_state(1)
        )
        close(one.surprise, together.surprise[:, begin:end])
        close(one.state.weights[0][0], together.state.weights[0][row])
    assert torch.equal(together.state.weights[0][1], state.weights[0][1])  # the empty one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [0.0, torch.nan])
def test_each_row_of_a_padded_batch_is_the_row_alone(kind, padding):
    memory = layer(**KINDS[kind])
    lengths = torch.tensor([5, 0, 19, 8])
    x, more = torch.randn(4, 19, 12), torch.randn(4, 3, 12)
    hidden = x.masked_fill((torch.arange(19) >= lengths[:, None])[..., None], padding)
    hidden.requires_grad_()
    y, state = memory(hidden, lengths=lengths)
    again, end = memory(more, state, lengths=torch.tensor([3, 3, 0, 2]))  # carried on
    flat = torch.cat([x[row, :n] for row, n in enumerate(lengths.tolist())])[None]
    packed, after = memory(flat, cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)))
    for row, n in enumerate(lengths.tolist()):
        alone, one = memory(x[row : row + 1, :n])
        close(y[row, :n], alone[0])
        assert not y[row, n:].any()
        begin = int(lengths[:row].sum())
        close(packed[0, begin : begin + n], alone[0])
        close([w[row] for w in state.weights], [w[0] for w in one.weights])
        close([w[row] for w in after.momentum], [w[0] for w in one.momentum])
        m = [3, 3, 0, 2][row]
        next_alone, last = memory(more[row : row + 1, :m], one)
        close(again[row, :m], next_alone[0])
        close([w[row] for w in end.weights], [w[0] for w in last.weights])
    y.sum().backward()
    assert hidden.grad[3].any()
    assert not hidden.grad[0, 5:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_under_autocast(dtype):
    memory = layer(**KINDS["titans"])
    x, lengths = torch.randn(2, 20, 12), torch.tensor([20, 7])
    with torch.autocast("cpu", dtype):
        y, state = memory(torch.nn.Linear(12, 12)(x), lengths=lengths)
        loss = y.float().square().sum()
    loss.backward()
    assert state.weights[0].dtype == torch.float32
    assert y.shape == x.shape
    assert not y[1, 7:].any()
    assert all(p.grad.isfinite().all() for p in memory.parameters())


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((2, 5, 13), {}, r"hidden: got .*\[2, 5, 13\].* expected floating point \[B, T, 12\]"),
        ((5, 12), {}, r"hidden: got .*expected floating point \[B, T, 12\]"),
        ((2, 5, 12), {"lengths": torch.tensor([5])}, r"lengths: got .*expected .*\[2\]"),
        ((2, 5, 12), {"lengths": torch.tensor([5.0, 1.0])}, "lengths: got torch.float32"),
        ((2, 5, 12), {"lengths": [5, 1]}, "lengths: got list"),
        ((2, 5, 12), {"lengths": torch.tensor([5, 6])}, r"lengths: got \[5, 6\].*from 0 to T = 5"),
        ((2, 5, 12), {"lengths": torch.tensor([5, -1])}, r"lengths: got \[5, -1\]"),
        ((2, 5, 12), {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: got given with B = 2"),
        ((1, 5, 12), {"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens: got .* to T = 5"),
        (
            (1, 5, 12),
            {"cu_seqlens": torch.tensor([0, 5]), "lengths": torch.tensor([5])},
            "lengths: got given with cu_seqlens, expected one of them",
        ),
    ],
)
def test_what_does_not_fit_the_layer_is_named(shape, options, words):
    memory = layer()
    with pytest.raises(ArgumentError, match=words):
        memory(torch.randn(shape), **options)


def test_a_turn_writes_the_mean_of_its_tokens():
    memory = layer(**KINDS["turns"])
    tokens = torch.randn(6, 12)
    once = memory.write(tokens, torch.tensor([0, 6]), memory.initial_state(1))
    twice = memory.write(tokens.repeat(2, 1), torch.tensor([0, 12]), memory.initial_state(1))
    close(once.state.weights, twice.state.weights)


def test_writing_lowers_the_surprise_of_the_same_turn():
    memory = layer(step="chunk", chunk_size=None, lr_init=[0.4, 0.4])
    tokens, ends = torch.randn(30, 12), torch.tensor([0, 30])
    state, surprises = memory.initial_state(1), []
    for _ in range(5):
        state, surprise = memory.write(tokens, ends, state)
        surprises.append(float(surprise.detach().mean()))
    assert surprises == sorted(surprises, reverse=True)


def test_rates_start_where_they_are_told():
    memory = layer(max_lr=0.8, lr_init=[0.2, 0.4], momentum_init=0.1, decay_init=0.03)
    with torch.no_grad():
        memory.to_rates.weight.zero_()
    rates = memory._rates(torch.randn(3, 12), torch.zeros(3, dtype=torch.long), 1)
    expected = ([0.2, 0.4], [0.1, 0.1], [0.03, 0.03])
    for rate, value in zip(rates, expected, strict=True):
        close(rate, torch.tensor([value] * 3))


@pytest.mark.parametrize("bad", [[0.1], [0.1, 0.5], [0.1, 0.0]])
def test_bad_rates_are_named(bad):
    with pytest.raises(ArgumentError, match=r"NeuralMemory.lr_init is \[.*; pass 2 numbers"):
        layer(max_lr=0.5, lr_init=bad)


def test_read_adds_the_gated_read_of_the_op():
    memory, state = layer(), None
    _, state = memory(torch.randn(2, 9, 12))
    hidden = torch.randn(2, 5, 12)
    token, row = torch.tensor([1, 2, 8]), torch.tensor([0, 0, 1])
    out = memory.read(hidden, token, row, state)
    x = hidden.view(-1, 12)[token]
    normed = torch.nn.functional.rms_norm(x, (12,), memory.norm, 1e-6)
    q = torch.nn.functional.normalize(memory.to_q(normed).view(3, 2, 8), dim=-1)
    y = torch.stack([
        ops.memory_read(q[i : i + 1].unsqueeze(0), state.index_select(row[i : i + 1]))[0, 0]
        for i in range(3)
    ]).flatten(1)  # fmt: skip
    gated = y * torch.nn.functional.silu(memory.to_gate(normed))
    close(out.view(-1, 12)[token], x + memory.to_out(gated))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_empty_memory_reads_zero_after_training(depth):
    """With ``zero_start``; else the learned initial memory adds something of its own."""
    hidden = torch.randn(2, 5, 12)
    index = torch.arange(10)
    ends = torch.tensor([0, 5, 10])
    for zero_start in (True, False):
        memory = layer(depth=depth, zero_start=zero_start, step="chunk", chunk_size=None)
        optimizer = torch.optim.AdamW(memory.parameters(), lr=0.05)
        for _ in range(3):  # a turn that is written, and one that reads it
            _, state = memory(torch.randn(2, 5, 12))
            loss = memory.read(hidden, index, index // 5, state).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        empty = memory.initial_state(2)
        out = memory.read(hidden, index, index // 5, empty)
        assert torch.equal(out, hidden) == zero_start
        written = memory.write(hidden.view(10, 12), ends, empty).state
        assert not torch.equal(memory.read(hidden, index, index // 5, written), hidden)


def test_a_read_that_is_never_zero_cannot_start_at_zero():
    with pytest.raises(ArgumentError, match=r"NeuralMemory.zero_start is True; pass False"):
        layer(zero_start=True, residual_norm=True)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_first_turn_of_a_trained_adapter_is_the_hosts(tmp_path, depth):
    host = tiny_host("qwen2_audio")
    first, second = (tiny_inputs(host, [[5]], seed=i) for i in range(2))
    alone = [host(**turn).logits for turn in (first, second)]
    config = MALConfig(heads=2, head_dim=8, depth=depth, zero_start=True)

    def play(mal):
        with mal.dialogue("a") as dialogue:
            dialogue.reset()
            return [host(**turn).logits for turn in (first, second)]

    mal = MALAdapter(config).attach(host)
    optimizer = torch.optim.Adam(mal.parameters(), lr=0.05)
    for _ in range(3):
        play(mal)[1].logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    mal.save_pretrained(tmp_path)
    before = play(mal)
    mal.detach()
    again = MALAdapter.from_pretrained(tmp_path).attach(host)
    assert again.config.zero_start
    for answers in (before, play(again)):
        assert torch.equal(answers[0], alone[0])
        assert not torch.equal(answers[1], alone[1])
        assert torch.equal(answers[1], before[1])
    again.detach()


def test_weights_of_the_other_start_are_refused(tmp_path):
    config = MALConfig(heads=2, head_dim=8, hidden_size=32)
    MALAdapter(config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"zero_start": True}))
    with pytest.raises(CheckpointError, match=r"memory.init.1"):
        MALAdapter.from_pretrained(tmp_path)
    del saved["zero_start"]  # as older versions wrote it
    path.write_text(json.dumps(saved))
    assert not MALAdapter.from_pretrained(tmp_path).config.zero_start
    with pytest.raises(ArgumentError, match=r"MALConfig.zero_start is True; pass False with resid"):
        MALConfig(zero_start=True, residual_norm=True)
    with pytest.raises(ArgumentError, match=r"MALConfig.zero_start is 1; pass True or False"):
        MALConfig(zero_start=1)


def test_zero_output_is_the_identity_bit_for_bit():
    memory = NeuralMemory(12, heads=2, head_dim=8, zero_init_output=True)
    hidden = torch.randn(1, 5, 12).bfloat16()
    index = torch.arange(5)
    out = memory.read(hidden, index, 0 * index, memory.initial_state(1))
    assert torch.equal(out, hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    memory = layer().to(dtype)
    y, state = memory(torch.randn(1, 9, 12, dtype=dtype))
    assert y.dtype == dtype
    high = torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in state.weights} == {high}


def test_state_dict_is_parameters_only_and_none_is_a_scalar():
    memory = layer(residual_norm=True)
    memory(torch.randn(1, 9, 12))
    assert memory.state_dict().keys() == dict(memory.named_parameters()).keys()
    assert all(p.ndim >= 1 for p in memory.parameters())
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = NeuralMemory(12, heads=2, head_dim=8, residual_norm=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(1, 9, 12)
    assert torch.equal(memory(x)[0], other(x)[0])


def test_compiles_whole():
    memory = layer(chunk_size=8)
    compiled = torch.compile(memory, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (8, 11, 16):
        x = torch.randn(2, tokens, 12)
        close(compiled(x)[0], memory(x)[0])


def test_autocast_keeps_the_state_float32():
    memory = layer()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = memory(torch.randn(1, 9, 12))
    assert isinstance(state, MemoryState)
    assert {t.dtype for t in state.weights} == {torch.float32}


def test_rates_are_those_of_the_write():
    memory = layer(**KINDS["turns"], momentum_init=0.2)
    tokens, ends = torch.randn(6, 12), torch.tensor([0, 6])
    lr, momentum, decay = memory.rates(tokens, ends)
    state = memory.initial_state(1)
    x = torch.nn.functional.rms_norm(tokens, (12,), memory.norm, 1e-6)
    k = torch.nn.functional.normalize(memory.to_k(x).view(1, 6, 2, 8), dim=-1)
    expected = ops.memory_update(
        k,
        memory.to_v(x).view(1, 6, 2, 8),
        lr[None],
        momentum[None],
        decay[None],
        state,
        step="chunk",
        init=state.weights,
        max_grad_norm=1.0,
    )
    close(memory.write(tokens, ends, state).state.weights, expected.state.weights)
