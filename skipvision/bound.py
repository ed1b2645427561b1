"""How far apart two runs of one layer can be: an error bound of our own, not the paper's, which was not to be had.

Two runs of the same rows differ before a layer by dX. Its attention A and its FFN F are no Lipschitz functions over
all of space, but between the two points that the runs visited every step has a constant that can be written down:

    |A(X) - A(X~)| <= a |X - X~|        |F(y) - F(y~)| <= f |y - y~|

- RMSNorm: 1 / min(rms(x), rms(x~)). Rows scaled to one length are projections onto a ball, which move nothing apart.
- A matrix: its spectral norm; the scale of the norm in front of it is folded in.
- softmax: 1/2, since no row of its Jacobian sums to more than 2 p (1 - p). It ignores what all scores of a row share,
  so keys may be centred; its differences sum to 0, so values may be.
- P V - P~ V~ = (P - P~) V + P~ (V - V~), and |P~| <= sqrt(its largest column sum), since its rows sum to 1.
- Q K' - Q~ K~' = (Q - Q~) K' + Q~ (K - K~)'; rotations move no lengths.
- silu(a) c - silu(b) d = (silu(a) - silu(b)) c + silu(b) (c - d), and |silu'| <= 1.1.

Norms of matrices of rows are Frobenius norms where nothing else is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipvision.decoder import DecoderLayer

_SILU_SLOPE = 1.1
"""The steepest is 1.0998, near 2.4."""
_SOFTMAX = 0.5


@dataclass(frozen=True)
class WeightNorms:
    """Spectral norms of one layer's matrices, the scale of the RMSNorm in front folded in."""

    query: Tensor
    """[H] of each head."""
    key: Tensor
    """[H] of the KV head that each head reads."""
    value: Tensor
    output: float
    gate: float
    up: float
    down: float

    @staticmethod
    def of(layer: DecoderLayer) -> WeightNorms:
        attention, ffn = layer.attention, layer.ffn
        repeats = attention.num_heads // attention.num_kv_heads

        def by_head(linear: nn.Linear) -> Tensor:
            scaled = linear.weight.double() * layer.norm1.weight.double()
            return spectral_norm(scaled.view(-1, attention.head_dim, scaled.shape[-1]))

        scale = layer.norm2.weight.double()
        return WeightNorms(
            by_head(attention.q),
            by_head(attention.k).repeat_interleave(repeats),
            by_head(attention.v).repeat_interleave(repeats),
            *(
                float(spectral_norm(each))
                for each in (attention.o.weight, ffn.gate.weight * scale, ffn.up.weight * scale, ffn.down.weight)
            ),
        )


def spectral_norm(matrix: Tensor) -> Tensor:
    """[...] in fp64 of [..., M, N], from the smaller of its two Gram matrices."""
    wide = matrix.double()
    tall = wide if wide.shape[-2] >= wide.shape[-1] else wide.mT
    squares: Tensor = torch.linalg.eigvalsh(tall.mT @ tall)[..., -1]
    return squares.clamp(min=0).sqrt()


def attention_constant(
    norms: WeightNorms, query: Tensor, key: Tensor, value: Tensor, column_sums: Tensor, least_rms: float
) -> float:
    """a. `query` [H, L, d] and the largest column sum [H] of P~ of one run, `key` and `value` [G, L, d] of the other.

    `least_rms` is the smallest of any row in front of the layer, in either run.
    """
    num_heads, _, size = query.shape
    repeats = num_heads // key.shape[0]
    keys, values, queries = (spectral_norm(each) for each in (_centred(key), _centred(value), query))
    keys, values = (each.repeat_interleave(repeats) for each in (keys, values))
    scores = (norms.query * keys + queries * norms.key) / math.sqrt(size)
    heads = column_sums.double().sqrt() * norms.value + _SOFTMAX * scores * values
    return norms.output * float(heads.norm()) / least_rms


def ffn_constant(norms: WeightNorms, layer: DecoderLayer, hidden: Tensor, other: Tensor) -> float:
    """f, of the rows [N, D] in front of the FFN, in one run and in the other."""
    if len(hidden) == 0:
        return 0.0
    up = layer.ffn.up(layer.norm2(hidden)).double().abs().amax(-1)
    gate = F.silu(layer.ffn.gate(layer.norm2(other)).double()).abs().amax(-1)
    rms = torch.minimum(row_rms(hidden, layer.norm2), row_rms(other, layer.norm2))
    return float(norms.down * ((_SILU_SLOPE * up * norms.gate + gate * norms.up) / rms).amax())


def row_rms(hidden: Tensor, norm: nn.RMSNorm) -> Tensor:
    """[...] in fp64: what `norm` divides the rows [..., D] by."""
    assert norm.eps is not None
    return (hidden.double().square().mean(-1) + norm.eps).sqrt()


def next_bound(bound: float, attention: float, ffn: float, injected: float) -> float:
    """Behind a layer, from the bound before it: (1 + a) (1 + f) bound + what the skipped rows' FFN would have added.

    Exactly what was added where the runs were the same before, whatever the constants.
    """
    return injected if bound == 0 else (1 + attention) * (1 + ffn) * bound + injected


def _centred(rows: Tensor) -> Tensor:
    return rows.double() - rows.double().mean(-2, keepdim=True)
