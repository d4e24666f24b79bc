"""The read of a turn: sorts tokens by state, reads them, puts them back; and its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..call import AlignedCall, ReadCall
from ..network import RMS_NORM_EPS
from .activations import ACTIVATION_BACKWARD
from .memory_read import read_bwd, read_fwd
from .portable import fresh, portable

NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize


class _Projected(NamedTuple):
    """The named tokens ``[N, ...]``, sorted by state, up to the read."""

    token: Tensor  # [N] int64
    x: Tensor  # [N, Dm]
    inverse_rms: Tensor  # [N, 1]
    normed: Tensor  # [N, Dm], with the norm's weight
    z_q: Tensor  # [N, H, D], before it is normalised
    z_gate: Tensor  # [N, H·D]
    read: ReadCall

    @classmethod
    def of(cls, call: AlignedCall) -> _Projected:
        weights = call.weights
        order = call.state_index.argsort(stable=True)
        token = call.token_index[order]
        count = torch.bincount(call.state_index, minlength=len(weights[0]))
        cu_seqlens = F.pad(count.cumsum(0), (1, 0))
        norm, w_q, w_gate, _ = (p.to(weights[0].dtype) for p in call.params)
        x = rearrange(call.hidden, "b s m -> (b s) m")[token].to(norm.dtype)
        inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_NORM_EPS)
        normed = F.rms_norm(x, x.shape[-1:], norm, RMS_NORM_EPS)
        z_q = rearrange(normed @ w_q.mT, "n (h d) -> n h d", h=weights[0].shape[1])
        q = F.normalize(z_q, dim=-1).unsqueeze(0)
        read = ReadCall(q, weights, cu_seqlens, call.activation, call.residual_norm)
        return cls(token, x, inverse_rms, normed, z_q, normed @ w_gate.mT, read)


def aligned_fwd(call: AlignedCall, *, in_place: bool = False) -> Tensor:
    """``hidden`` ``[B, S, Dm]`` with the residual added at ``token_index``.

    A new tensor, the other rows copied; ``in_place`` writes a contiguous ``hidden`` itself.
    """
    hidden = call.hidden
    with portable(hidden.device):
        p = _Projected.of(call)
        y = rearrange(read_fwd(p.read), "1 n h d -> n (h d)")
        residual = (y * F.silu(p.z_gate)) @ call.params[3].to(y.dtype).mT
        rows = (p.x + residual).to(hidden.dtype)
        if in_place:
            hidden.view(-1, hidden.shape[-1]).index_copy_(0, p.token, rows)
            return hidden
        flat = rearrange(hidden, "b s m -> (b s) m")
        return fresh(flat.index_copy(0, p.token, rows).view(hidden.shape))


def aligned_bwd(d_output: Tensor, call: AlignedCall) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of ``hidden``, of every tensor of ``weights`` and of ``params``."""
    with portable(call.hidden.device):
        p = _Projected.of(call)
        norm, w_q, w_gate, w_out = (x.to(p.x.dtype) for x in call.params)
        flat = rearrange(d_output, "b s m -> (b s) m")
        d_row = flat[p.token].to(p.x.dtype)
        y, gate = rearrange(read_fwd(p.read), "1 n h d -> n (h d)"), F.silu(p.z_gate)
        d_gated = d_row @ w_out
        d_y = rearrange(d_gated * gate, "n (h d) -> 1 n h d", h=p.z_q.shape[1])
        d_q, d_weights = read_bwd(d_y, p.read)
        d_z_gate = ACTIVATION_BACKWARD["silu"](d_gated * y, p.z_gate)
        # q = z / ‖z‖, so its gradient has nothing along q
        q, length = p.read.q[0], p.z_q.norm(dim=-1, keepdim=True)
        along = torch.where(length > NORMALIZE_EPS, (d_q[0] * q).sum(-1, keepdim=True), 0.0)
        d_z_q = (d_q[0] - q * along) / length.clamp(min=NORMALIZE_EPS)
        d_z_q = rearrange(d_z_q, "n h d -> n (h d)")
        d_normed = d_z_q @ w_q + d_z_gate @ w_gate
        unit = p.x * p.inverse_rms
        d_unit = d_normed * norm
        d_x = p.inverse_rms * (d_unit - unit * (d_unit * unit).mean(-1, keepdim=True))
        d_params = [
            (d_normed * unit).sum(0),
            d_z_q.mT @ p.normed,
            d_z_gate.mT @ p.normed,
            d_row.mT @ (y * gate),
        ]
        d_hidden = flat.index_copy(0, p.token, (d_row + d_x).to(d_output.dtype))
        d_params = [fresh(d.to(x.dtype)) for d, x in zip(d_params, call.params, strict=True)]
        return fresh(d_hidden.view(d_output.shape)), d_weights, d_params
