"""When two runs of one model count as the same: what they look at, how far they are apart, where rounding ends.

The check that ends an export and `svcli verify` share it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipvision.layout import RETAINED, SKIPPED, ImageSpan, Ints

Floats = npt.NDArray[Any]

NUM_TOKENS = 16
"""Greedy tokens compared for each picture."""
CHECK_QUESTION = "What is this?"
_FEW = 2
"""Visual rows of a picture that may always be others: of few rows a share says little."""
_QUIET = 0.01
"""Of the largest row's norm: smaller rows, such as V of the row that attention rests on, are judged by error alone,
since their direction is mostly rounding."""

MOST_ROUNDED = 0.25
"""Of a matrix in int4, relative to its norm, that rounding can change: half a step for each of the weights of a block
that spans 15 steps. Weights that are spread as a normal distribution lose 8 %."""


@dataclass(frozen=True)
class Tolerance:
    """Where a difference is no longer rounding."""

    max_error: float
    cosine: float
    vision_cosine: float
    """Lower: selection and merging are choices, and a patch that falls the other way changes its whole row."""
    norm_ratio: float
    """Largest distance of the ratio from 1."""
    agreement: float
    """Share of greedy tokens that must be the same."""
    same_row: float
    """Cosine from which on two visual rows count as the same."""
    vision_agreement: float
    """Share of visual rows that must be the same.

    A lost attention scale moves a quarter of them or more, an index that is off by one an eighth, and neither moves
    the cosine over all by much. Only an index of tokens that are merged, in int8, cannot be told from rounding.
    Of a sound model fewer than 2 % are others in fp16, and fewer than 4 % in int8.
    """


# fp32: another order of summation. fp16: 11 bits of mantissa through all layers. int8: half a scale per weight
# (0.4 % of the largest in its column) and 8 bit activations in ONNX Runtime's kernel. bf16: 8 bits of mantissa, as
# rough as that. A greedy choice may flip where two tokens are as good as equal, so below fp32 a few may.
TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(1e-3, 0.99999, 0.99999, norm_ratio=1e-3, agreement=1.0, same_row=0.9999, vision_agreement=1.0),
    "fp16": Tolerance(0.02, 0.9995, 0.95, norm_ratio=0.01, agreement=0.9, same_row=0.99, vision_agreement=0.94),
    "bf16": Tolerance(0.25, 0.98, 0.9, norm_ratio=0.05, agreement=0.75, same_row=0.98, vision_agreement=0.9),
    "int8": Tolerance(0.25, 0.98, 0.9, norm_ratio=0.05, agreement=0.75, same_row=0.95, vision_agreement=0.94),
    "int4": Tolerance(0.08, 0.998, 0.9, norm_ratio=0.03, agreement=0.75, same_row=0.95, vision_agreement=0.94),
}
# int4 is held against PyTorch with the rounded weights, so that what is left is ONNX Runtime's 8 bit activations:
# 0.038, 0.9996, 0.013 and 94 % of tokens are the worst of tiny random models, of random ones of 0.5B and 7B, and of the
# trained default, row by row.

ROUNDED: dict[str, Tolerance] = {
    "int4": Tolerance(0.5, 0.9, 0.9, norm_ratio=0.2, agreement=0.5, same_row=0.95, vision_agreement=0.94),
}
"""Against PyTorch with the weights before rounding, where that is more than TOLERANCES. 4 bits move weights by 8 %, and
what comes of that is the model's own: 0.38, 0.92, 0.17 and 54 % of tokens are the worst of tiny random models, row by
row; 0.10, 0.989, 0.06 and 100 % of the trained default."""


def tolerance(precision: str, *, same_weights: bool) -> Tolerance:
    """`same_weights`: the reference computes with the bundle's own weights, and not with those before rounding."""
    return TOLERANCES[precision] if same_weights else ROUNDED.get(precision, TOLERANCES[precision])


def loosest(first: Tolerance, second: Tolerance) -> Tolerance:
    """What both may be off by."""
    return first if first.max_error >= second.max_error else second


@dataclass(frozen=True)
class Difference:
    """How far values are from the reference. Values that are not finite are infinitely far."""

    max_error: float = 0.0
    """Largest difference, relative to the largest value of the reference."""
    cosine: float = 1.0
    norm_ratio: float = 1.0
    """The one furthest from 1."""


def difference(got: Floats, reference: Floats) -> Difference:
    """Of two arrays of one shape, each taken as one vector."""
    return row_difference(got.reshape(1, -1), reference.reshape(1, -1))[0]


def row_difference(got: Floats, reference: Floats) -> tuple[Difference, int]:
    """The worst figures of any row of `got` [n, k], errors relative to the largest of all `reference` [n, k].

    Also the row that points furthest away. One wrong row among hundreds hardly moves a cosine over all of them; row by
    row it shows. Arrays of different shapes are infinitely far apart, from the first row that one of them lacks.
    """
    if got.shape != reference.shape:
        return Difference(inf, -1.0, inf), min(len(got), len(reference))
    finite = (np.isfinite(got) & np.isfinite(reference)).all(1)
    if not finite.all():
        return Difference(inf, -1.0, inf), int(finite.argmin())
    left, right = got.astype(np.float64), reference.astype(np.float64)
    norms, wanted = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    floor = _QUIET * wanted.max()
    quiet = (norms <= floor) & (wanted <= floor)
    directed = (norms > 0) & (wanted > 0)
    cosines = np.where(quiet, 1, (left * right).sum(1) / np.where(directed, norms * wanted, 1))
    ratios = np.where(quiet, 1, np.where(wanted > 0, norms / np.where(wanted > 0, wanted, 1), inf))
    error, largest = np.abs(left - right).max(), np.abs(right).max()
    relative = float(error / largest) if largest else (inf if error else 0.0)
    figures = Difference(relative, float(cosines.min()), float(ratios[np.abs(ratios - 1).argmax()]))
    return figures, int(cosines.argmin())


def worst(differences: Iterable[Difference]) -> Difference:
    """The worst of each figure."""
    each = list(differences)
    return Difference(
        max(difference.max_error for difference in each),
        min(difference.cosine for difference in each),
        max((difference.norm_ratio for difference in each), key=lambda ratio: abs(ratio - 1)),
    )


@dataclass(frozen=True)
class RowAgreement:
    """Visual rows that are the reference's, as a share, and how many a picture has."""

    share: float
    num_rows: int


def agreeing_rows(
    got: Floats, reference: Floats, limit: Tolerance, retained: tuple[Ints, Ints] | None = None
) -> RowAgreement:
    """How many of the matched rows `got` [n, k] count as those of `reference` [n, k].

    Or, where that is less, of the tokens that either side says it `retained` [I, R]: the choice is another where two
    are paid as good as the same, and then their rows are others too.
    """
    left, right = got.astype(np.float64), reference.astype(np.float64)
    left[~np.isfinite(left).all(1)] = 0
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    same = (left * right).sum(1) >= limit.same_row * lengths
    shares = [float((same & (lengths > 0)).mean())] + ([same_choice(*retained)] if retained is not None else [])
    return RowAgreement(min(shares), len(left))


def same_choice(got: Ints, reference: Ints) -> float:
    """Share of the retained tokens `reference` [I, R] that are in `got` [I, R] too; 0 where that is not in order."""
    if got.shape != reference.shape or (np.diff(got, axis=1) <= 0).any():
        return 0.0
    return float(np.mean([np.isin(wanted, found) for found, wanted in zip(got, reference, strict=True)]))


def agreement_of_all(pictures: Sequence[RowAgreement]) -> RowAgreement:
    """Of all pictures' rows together; `num_rows` of the picture with the fewest."""
    rows = sum(each.num_rows for each in pictures)
    return RowAgreement(sum(each.share * each.num_rows for each in pictures) / rows, min(p.num_rows for p in pictures))


def excess(difference: Difference, limit: Tolerance, rows: RowAgreement | None = None) -> list[str]:
    """What is out of tolerance, one clause each; `rows` where these are visual rows.

    Below fp32 the error of visual rows is not judged, as the largest value of a row that was chosen otherwise says
    nothing; their cosine is.
    """
    cosine = limit.cosine if rows is None else limit.vision_cosine
    judged = rows is None or limit == TOLERANCES["fp32"] or not isfinite(difference.max_error)
    found = []
    if judged and not difference.max_error <= limit.max_error:
        found.append(f"error {difference.max_error:.2g} above {limit.max_error:g}")
    if not difference.cosine >= cosine:
        found.append(f"cosine {difference.cosine:.6f} below {cosine:g}")
    if not abs(difference.norm_ratio - 1) <= limit.norm_ratio:
        found.append(f"norm ratio {difference.norm_ratio:.3f} further than {limit.norm_ratio:g} from 1")
    if rows is not None:
        wanted = min(limit.vision_agreement, 1 - _FEW / rows.num_rows) if limit.vision_agreement < 1 else 1.0
        if not rows.share >= wanted:
            found.append(f"only {rows.share:.1%} of rows agree, {wanted:.0%} wanted")
    return found


def match_rows(got: Floats, reference: Floats, span: ImageSpan) -> Floats:
    """Rows of `got` [V, D] in the order of `reference`: by the nearest row, within retained and within skipped.

    Both groups come out of a sort; where two keys are as good as equal, rounding decides their order.
    """
    matched: Floats = got.copy()
    kinds = np.array(span.kinds)
    for kind in (RETAINED, SKIPPED):
        group = np.flatnonzero(kinds == kind)
        if len(group):
            wanted, found = reference[group].astype(np.float64), got[group].astype(np.float64)
            # |a - b|^2 but for |a|^2: all differences at once would be [n, n, D].
            distances = (found**2).sum(1) - 2 * wanted @ found.T
            matched[group] = got[group[distances.argmin(axis=1)]]
    return matched


def match_runs(got: Floats, reference: Floats, spans: Sequence[ImageSpan]) -> tuple[Floats, Floats]:
    """Both [I, V, D] as [n, D], the rows of each of the runs `spans` of `got` in the reference's order."""
    left, right = (rows.reshape(-1, rows.shape[-1]) for rows in (got, reference))
    if left.shape != right.shape:
        return left, right
    starts = np.cumsum([0, *(span.length for span in spans)])
    runs = [slice(start, start + span.length) for start, span in zip(starts, spans, strict=False)]
    matched = [match_rows(left[run], right[run], span) for run, span in zip(runs, spans, strict=True)]
    return np.concatenate(matched), right


def drawn_cards() -> list[Image.Image]:
    """Pictures for where there are none: coloured stripes, a disc, noise."""
    y, x = np.mgrid[0:96, 0:128] / 96
    disc = (x - 0.6) ** 2 + (y - 0.5) ** 2 < 0.1
    noise = np.random.default_rng(0).random((96, 128, 3))
    cards: list[Floats] = [
        np.stack([x * 12 % 1, y, 1 - x / 2], axis=-1),
        np.where(disc[..., None], [0.9, 0.1, 0.1], [0.2, 0.4, 0.8]),
        noise * np.stack([x / 2, y, disc], axis=-1),
    ]
    return [Image.fromarray((255 * card.clip(0, 1)).astype(np.uint8)) for card in cards]
