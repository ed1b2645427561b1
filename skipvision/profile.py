"""What Skip-FFN rests on, measured: how little the FFN changes visual rows, who looks at them, what skipping costs.

Every prompt is run twice through the decoder, layer by layer, with the same rows, positions and mask: once with all
rows passing the FFN (*full*), once as the model does it, skipped rows bypassing it (*skipping*). The relative update
and the bound are definitions of ours; the paper's were not to be had.

Shapes: L rows, D width, H heads, G KV heads, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from skipvision.bound import WeightNorms, attention_constant, ffn_constant, next_bound, row_rms
from skipvision.decoder import Attention, DecoderLayer
from skipvision.layout import RETAINED, SKIPPED, SUMMARY, TEXT, BatchLayout, TokenLayout
from skipvision.model import BatchTensors, SkipVisionModel, attention_mask

Floats = npt.NDArray[np.float64]

GROUPS = ("text", "retained", "summary", "skipped")
"""In the order of the kinds of `layout`."""
ASKERS = ("text", "summary")
"""Whose attention is measured: text behind the last picture, and each picture's last summary row."""
STATISTICS = ("mean", "median", "p90")
"""Over the rows of a group."""


class ProfileError(ValueError):
    """A prompt that cannot be measured."""


@dataclass(frozen=True)
class Sample:
    """One prompt: `input_ids` [T], and the visual rows [I, V, D] of its pictures."""

    input_ids: Sequence[int]
    visual: Tensor
    layout: TokenLayout


@dataclass(frozen=True)
class Profile:
    """One prompt. Layers lead, then groups; NaN where a group has no rows, or a ratio no denominator."""

    rows: Floats
    """[groups] how many there are."""
    ffn_update: Floats
    """[layers, groups, statistics] of |FFN(norm2(y))| / |y|, y the row behind attention; full run."""
    attention_update: Floats
    """The same of |attention(norm1(x))| / |x|, x the row before the layer."""
    attention: Floats
    """[layers, askers, groups] share of the softmax mass, mean over heads and asking rows; skipping run."""
    size: Floats
    """[layers] Frobenius norm of all rows behind each layer, full run."""
    size_kept: Floats
    error: Floats
    """[layers] Frobenius norm of what the two runs differ by, over all rows."""
    error_kept: Floats
    injected: Floats
    """[layers] norm of what the FFN would have added to skipped rows: where the error comes from."""
    attention_gain: Floats
    """[layers] how much of the difference before it attention adds: no Lipschitz constant can be smaller."""
    ffn_gain: Floats
    attention_constant: Floats
    """[layers] Lipschitz constant between the two runs, proven from spectral norms (`bound.py`)."""
    ffn_constant: Floats
    bound_gains: Floats
    """[layers] bound on `error` by the gains: the lowest that a bound of this form can be."""
    bound: Floats
    """[layers] bound on `error` by the proven constants."""
    relative_error: Floats
    """[layers] `error` and both bounds by `size`, `error_kept` by `size_kept`."""
    relative_error_kept: Floats
    relative_bound_gains: Floats
    relative_bound: Floats
    kl: float
    """Of the next token, from the full run to the skipping one, in nats."""
    same_token: float
    """1 where the likeliest next token is the same, else 0."""


@dataclass(frozen=True)
class Spread:
    """Several prompts: each figure's mean, and the lowest and highest of any prompt."""

    mean: Profile
    lowest: Profile
    highest: Profile

    @staticmethod
    def of(profiles: Sequence[Profile]) -> Spread:
        """Of one prompt or more."""
        columns = {field.name: np.stack([getattr(each, field.name) for each in profiles]) for field in fields(Profile)}
        return Spread(
            *(
                Profile(**{name: reduce(column, 0) for name, column in columns.items()})
                for reduce in (np.mean, np.min, np.max)
            )
        )


@torch.no_grad()
def measure(model: SkipVisionModel, samples: Iterable[Sample]) -> Iterator[Profile]:
    """A profile of each prompt as it is done, in the dtype and on the device of the weights.

    The attention of one head is held at a time. Raises ProfileError for a prompt without text behind its last picture,
    or without a picture.
    """
    layers = [cast("DecoderLayer", layer) for layer in model.decoder.layers]
    norms = [WeightNorms.of(layer) for layer in layers]
    for sample in samples:
        yield _Runs(model, sample).through(layers, norms)


class _Runs:
    """The two runs of one prompt, [1, L, D] each, and what they are looked at with."""

    def __init__(self, model: SkipVisionModel, sample: Sample) -> None:
        layout, decoder = sample.layout, model.decoder
        if not layout.images or not isinstance(layout.segments[-1], int):
            raise ProfileError("a prompt needs a picture, and text behind the last one")
        ids = torch.tensor([list(sample.input_ids)], device=decoder.embed.weight.device)
        batch = BatchTensors.of(BatchLayout.of([layout], ids.shape[1]), ids.device)
        self.decoder = decoder
        self.num_kept = layout.num_kept
        self.full = self.skipping = model.embed(ids, sample.visual, batch.source)
        self.mask = attention_mask(batch.positions, batch.visible_until)
        self.rope = decoder.rope(batch.positions)
        self.kinds = layout.kinds[layout.positions]
        # The last summary of a picture stands behind its skipped rows, the first in front of them.
        following = np.append(layout.kinds[1:], TEXT)
        last = (layout.kinds == SUMMARY) & (following != SKIPPED)
        seen = np.isin(layout.kinds, (RETAINED, SUMMARY, SKIPPED))
        behind = np.arange(layout.length) > np.flatnonzero(seen)[-1]
        self.askers = [torch.from_numpy(np.flatnonzero(rows[layout.positions])) for rows in (behind, last)]

    def through(self, layers: Sequence[DecoderLayer], norms: Sequence[WeightNorms]) -> Profile:
        by_layer = [self._layer(layer, each) for layer, each in zip(layers, norms, strict=True)]
        found = {name: np.array([figures[name] for figures in by_layer]) for name in by_layer[0]}
        found["bound_gains"] = _bounds(found["attention_gain"], found["ffn_gain"], found["injected"])
        found["bound"] = _bounds(found["attention_constant"], found["ffn_constant"], found["injected"])
        for name in ("error", "bound_gains", "bound"):
            found[f"relative_{name}"] = found[name] / found["size"]
        found["relative_error_kept"] = found["error_kept"] / found["size_kept"]
        last = self.num_kept - 1
        full, skipping = (
            self.decoder.logits(run[0, last]).double().log_softmax(-1) for run in (self.full, self.skipping)
        )
        return Profile(
            rows=np.bincount(self.kinds, minlength=len(GROUPS)).astype(np.float64),
            **found,
            kl=max(0.0, float(F.kl_div(skipping, full, log_target=True, reduction="sum"))),
            same_token=float(full.argmax() == skipping.argmax()),
        )

    def _layer(self, layer: DecoderLayer, norms: WeightNorms) -> dict[str, float | Floats]:
        """Takes both runs through one layer; its figures, by the names that they have in Profile."""
        kept, before, other_before = slice(self.num_kept), self.full, self.skipping
        _, key, value = projected = layer.attention.project(layer.norm1(before), self.rope)
        query, other_key, other_value = layer.attention.project(layer.norm1(other_before), self.rope)
        attended = layer.attention.attend(*projected, self.mask)
        other_attended = layer.attention.attend(query, other_key, other_value, self.mask)
        shares, column_sums = self._attention(layer.attention, query[0], other_key[0])
        behind, other_behind = before + attended, other_before + other_attended
        added = layer.ffn(layer.norm2(behind))
        other_added = layer.ffn(layer.norm2(other_behind[:, kept]))
        self.full = behind + added
        self.skipping = torch.cat([other_behind[:, kept] + other_added, other_behind[:, self.num_kept :]], 1)
        least_rms = min(float(row_rms(rows, layer.norm1).min()) for rows in (before, other_before))
        changed, moved = _norm(before - other_before), _norm(behind - other_behind)
        return {
            "ffn_update": self._by_group(added, behind),
            "attention_update": self._by_group(attended, before),
            "attention": shares,
            "size": _norm(self.full),
            "size_kept": _norm(self.full[:, kept]),
            "error": _norm(self.full - self.skipping),
            "error_kept": _norm((self.full - self.skipping)[:, kept]),
            "injected": _norm(added[:, self.num_kept :]),
            "attention_gain": _ratio(_norm(attended - other_attended), changed),
            "ffn_gain": _ratio(_norm(added[:, kept] - other_added), moved),
            "attention_constant": attention_constant(norms, query[0], key[0], value[0], column_sums, least_rms),
            "ffn_constant": ffn_constant(norms, layer, behind[0, kept], other_behind[0, kept]),
        }

    def _attention(self, attention: Attention, query: Tensor, key: Tensor) -> tuple[Floats, Tensor]:
        """Shares [askers, groups], and [H] the largest column sum of each head's softmax."""
        repeats = attention.num_heads // attention.num_kv_heads
        shares = np.zeros((len(ASKERS), len(GROUPS)))
        column_sums = []
        for head in range(attention.num_heads):
            scores = query[head] @ key[head // repeats].T / attention.head_dim**0.5
            softmax = scores.masked_fill(~self.mask[0, 0], -torch.inf).softmax(-1)
            column_sums.append(softmax.sum(0).amax())
            for number, rows in enumerate(self.askers):
                mean = softmax[rows].double().mean(0).cpu().numpy()
                shares[number] += np.bincount(self.kinds, mean, len(GROUPS)) / attention.num_heads
        shares[:, np.bincount(self.kinds, minlength=len(GROUPS)) == 0] = np.nan
        return shares, torch.stack(column_sums)

    def _by_group(self, update: Tensor, rows: Tensor) -> Floats:
        """[groups, statistics] of |update| / |row|."""
        ratios = (update[0].double().norm(dim=-1) / rows[0].double().norm(dim=-1)).cpu().numpy()
        groups = [ratios[self.kinds == kind] for kind in range(len(GROUPS))]
        return np.array(
            [
                [group.mean(), *np.percentile(group, (50, 90))] if len(group) else [np.nan] * len(STATISTICS)
                for group in groups
            ]
        )


def _bounds(attention: Floats, ffn: Floats, injected: Floats) -> Floats:
    """[layers] of `next_bound`. A gain is NaN where nothing differed, so that there is nothing to be multiplied."""
    bounds = [0.0]
    for constants in zip(attention.tolist(), ffn.tolist(), injected.tolist(), strict=True):
        bounds.append(next_bound(bounds[-1], *(0.0 if math.isnan(each) else each for each in constants)))
    return np.array(bounds[1:])


def _norm(rows: Tensor) -> float:
    return float(rows.double().norm())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")
