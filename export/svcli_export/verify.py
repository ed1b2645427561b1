"""The check that ends an export: the graphs in ONNX Runtime against the PyTorch model, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnxruntime import InferenceSession

from skipvision.config import ModelConfig
from skipvision.decoder import KVCache
from skipvision.layout import BatchLayout, Ints, TokenLayout, read_ids
from skipvision.model import BatchTensors, SkipVisionModel
from svcli_export.agreement import (
    MOST_ROUNDED,
    NUM_TOKENS,
    TOLERANCES,
    Difference,
    RowAgreement,
    agreeing_rows,
    agreement_of_all,
    difference,
    excess,
    match_runs,
    worst,
)
from svcli_export.contract import CACHE_PARTS, Contract, GraphName, Precision, past_name, present_name
from svcli_export.feeds import no_visual, prompt_feeds
from svcli_export.manifest import ExportCheck, RowCheck, StageCheck
from svcli_export.reference import computing_in_fp32, own_weights
from svcli_export.restore import EMBEDDING, HEAD, StoredWeights
from svcli_export.runtime import open_session, run_vision
from svcli_export.samples import Sample
from svcli_export.weights import WEIGHTS_FILE

Floats = npt.NDArray[Any]

LARGE = 2**31
"""Weights from which on one picture and LARGE_TOKENS tokens are compared: each token reads all of them twice."""
LARGE_TOKENS = 4
HELD = 2**30
"""Weights up to which PyTorch's fp32 copy of them is kept for all tokens: 4 GiB."""
_NUM_BEFORE = 4
"""Ids that a prompt is appended to."""
_PAST = "past_key_values."


@dataclass
class _Stage:
    name: str
    max_error: float = 0.0
    cosine: float = 1.0
    norm_ratio: float = 1.0
    agreeing: list[RowAgreement] = field(default_factory=list)
    """Of visual rows, by picture."""

    def compare(self, got: Floats, reference: Floats) -> None:
        so_far = Difference(self.max_error, self.cosine, self.norm_ratio)
        found = worst((so_far, difference(got, reference)))
        self.max_error, self.cosine, self.norm_ratio = found.max_error, found.cosine, found.norm_ratio

    def outcome(self) -> StageCheck:
        return StageCheck(
            name=self.name,
            max_error=self.max_error,
            cosine=self.cosine,
            norm_ratio=self.norm_ratio,
            rows=_rows(self.agreeing),
        )


def _rows(agreeing: Sequence[RowAgreement]) -> RowCheck | None:
    if not agreeing:
        return None
    overall = agreement_of_all(agreeing)
    return RowCheck(num_rows=overall.num_rows, agreement=overall.share)


@dataclass(frozen=True)
class _Expected:
    """What PyTorch made of one picture."""

    visual: Floats
    """[1, V, D]."""
    retained: Ints | None
    """[1, R]; None where nothing is selected."""
    caches: dict[str, Floats]
    """Rows that were kept of each buffer, [1, G, num_kept, d]."""
    logits: tuple[Floats, ...]
    """[1, vocab] after prefill and after each decode step."""
    later_caches: dict[str, Floats]
    """Of the same prompt with its `_before` in front, in one."""
    later_logits: Floats

    @property
    def tokens(self) -> list[int]:
        """The likeliest of each."""
        return [int(each.argmax()) for each in self.logits]


def verify(model: SkipVisionModel, contract: Contract, folder: Path, samples: Sequence[Sample]) -> ExportCheck:
    """Compares the graphs in `folder` with `model` on `samples`.

    Prefill and decode get PyTorch's visual rows and PyTorch's greedy tokens, so that each stage answers for itself.
    PyTorch computes in fp32. With int4 it takes the weights of the bundle, and those are held against the model's.
    One thing is in memory at a time: PyTorch's, then each graph's weights. A large model is asked less.
    """
    is_large = _size(model) >= LARGE
    samples, num_tokens = (samples[:1], LARGE_TOKENS) if is_large else (samples, NUM_TOKENS)
    rounded = contract.precision == "int4"
    weight_error = _weight_error(model, StoredWeights(folder / WEIGHTS_FILE)) if rounded else None
    with _reference(model, folder, rounded=rounded):
        expected = [_expected(model, contract, sample, num_tokens) for sample in samples]
    graphs = _Graphs(folder, contract, lean=is_large and contract.compute_dtype == "float16")
    vision = _check_vision(graphs, model.config, samples, expected)
    prefill, first, caches = _check_prefill(graphs, samples, expected)
    decode, later = _check_decode(graphs, samples, expected, caches)
    wanted = [token for each in expected for token in each.tokens]
    same = sum(got == token for got, token in zip([*first, *later], _by_step(expected), strict=True))
    return ExportCheck(
        stages=tuple(stage.outcome() for stage in (vision, prefill, decode)),
        num_pictures=len(samples),
        num_tokens=len(wanted),
        agreement=same / len(wanted),
        weight_error=weight_error,
    )


def _by_step(expected: Sequence[_Expected]) -> list[int]:
    """The first token of every picture, then the others picture by picture: the order of the stages."""
    return [each.tokens[0] for each in expected] + [token for each in expected for token in each.tokens[1:]]


def _reference(model: SkipVisionModel, folder: Path, *, rounded: bool) -> AbstractContextManager[None]:
    """`model` computes in fp32 inside; by the weights that the bundle has, where those are `rounded`."""
    own, stored = own_weights(model), StoredWeights(folder / WEIGHTS_FILE)
    if not rounded and all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return nullcontext()

    def weights(name: str) -> torch.Tensor:
        if name == HEAD and model.config.text.tie_embeddings:
            name = EMBEDDING
        return stored.tensor(name) if rounded and name in stored.names else own(name)

    # Turning them to fp32 anew for each token takes longer than computing with them.
    return computing_in_fp32(model, weights if _size(model) >= HELD else cache(weights))


def _size(model: SkipVisionModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _weight_error(model: SkipVisionModel, stored: StoredWeights) -> float:
    """Of the matrix that rounding to 4 bits changed most: norm of the difference, relative to that of the matrix."""
    found = [0.0]
    for name in stored.names_in_blocks:
        wanted = model.get_parameter(name).detach().float()
        error, size = (stored.tensor(name) - wanted).norm(), wanted.norm()
        found.append(float(error / size) if size != 0 else float(error))
    return float(np.max(found))  # which is not a number where one of them is none


@torch.no_grad()
def _expected(model: SkipVisionModel, contract: Contract, sample: Sample, num_tokens: int) -> _Expected:
    layout, before = sample.layout, _before(sample)
    tokens, paid = model.picture_tokens(torch.from_numpy(sample.pixels), sample.cut)
    chosen = model.select(paid)
    visual = model.arrange(tokens, chosen)
    cache = _fp32(model.new_cache(1, layout.num_kept + max(len(before), num_tokens)))

    def filled(ids: Sequence[int], layout: TokenLayout) -> tuple[torch.Tensor, dict[str, Floats]]:
        batch = BatchTensors.of(BatchLayout.of([layout], len(ids)), torch.device("cpu"))
        logits = model.fill(torch.tensor([read_ids(ids, model.config.text.vocab_size)]), visual, batch, cache)
        pairs = zip(CACHE_PARTS, (cache.keys, cache.values), strict=True)
        rows = {
            past_name(layer, part): buffers[layer][:, :, : layout.num_kept].numpy().copy()
            for part, buffers in pairs
            for layer in range(contract.num_layers)
        }
        return logits, rows

    whole = TokenLayout((len(before), *layout.segments), layout.visibility)
    later_logits, later_kept = filled([*before, *sample.prompt], whole)
    first, kept = filled(sample.prompt, layout)
    logits = [first]
    for _ in range(num_tokens - 1):
        logits.append(model.decode(logits[-1].argmax(-1)[:, None], cache)[:, -1])
    retained = None if chosen is None else chosen[0].numpy()
    steps = tuple(each.numpy() for each in logits)
    return _Expected(visual.numpy(), retained, kept, steps, later_kept, later_logits.numpy())


def _before(sample: Sample) -> list[int]:
    """Ids that stand in the cache when the prompt is appended: a few of its own, without pictures.

    There is room for them, since there is for an answer.
    """
    text, place = list[int](), 0
    for segment in sample.layout.segments:
        if isinstance(segment, int):
            text += sample.prompt[place : place + segment]
        place += segment if isinstance(segment, int) else 1
    return text[-_NUM_BEFORE:]


def _fp32(cache: KVCache) -> KVCache:
    return replace(cache, keys=[each.float() for each in cache.keys], values=[each.float() for each in cache.values])


@dataclass(frozen=True)
class _Graphs:
    """Each is open as long as somebody holds on to it. `lean`: without whole copies of fp16 weights in fp32."""

    folder: Path
    contract: Contract
    lean: bool

    def open(self, name: GraphName) -> InferenceSession:
        return open_session(self.folder / self.contract.graph(name).file, lean=self.lean)

    def run(self, session: InferenceSession, feeds: dict[str, Any]) -> tuple[Floats, dict[str, Floats]]:
        """Logits [1, vocab], and the buffers by the names that the next step reads them under."""
        parts = [(layer, part) for layer in range(self.contract.num_layers) for part in CACHE_PARTS]
        logits, *buffers = session.run(["logits", *(present_name(*part) for part in parts)], feeds)
        return np.asarray(logits), {past_name(*part): each for part, each in zip(parts, buffers, strict=True)}

    def prefill(
        self,
        session: InferenceSession,
        ids: Sequence[int],
        visual: Floats | None,
        layout: TokenLayout,
        before: Mapping[str, Floats],
        num_before: int = 0,
    ) -> tuple[Floats, dict[str, Floats]]:
        """Logits [1, vocab], and the rows of each buffer by then, of which `num_before` without a gap are `before`."""
        spec = self.contract.graph("prefill")
        vocab = next(tensor for tensor in spec.outputs if tensor.name == "logits").shape[1]
        feeds = {
            "input_ids": np.array([read_ids(ids, int(vocab))], np.int64),
            "visual": no_visual(self.contract) if visual is None else visual.astype(self.contract.compute_dtype),
            **prompt_feeds(layout, num_before, num_before),
        }
        nothing = np.zeros((1, self.contract.num_kv_heads, 0, self.contract.head_dim))
        past = {name: before.get(name, nothing) for name in spec.input_names if name.startswith(_PAST)}
        given = {name: feeds[name] for name in feeds if name in spec.input_names}
        logits, buffers = self.run(session, given | self.buffers(past))
        return logits, {name: each[:, :, : num_before + layout.num_kept].copy() for name, each in buffers.items()}

    def buffers(self, rows: Mapping[str, Floats]) -> dict[str, Floats]:
        """Whole buffers with `rows` [1, G, n, d] at their beginning."""
        made = {}
        for name, values in rows.items():
            made[name] = np.zeros(self.contract.cache_shape, self.contract.compute_dtype)
            made[name][:, :, : values.shape[2]] = values
        return made


def _check_vision(
    graphs: _Graphs, config: ModelConfig, samples: Sequence[Sample], expected: Sequence[_Expected]
) -> _Stage:
    stage = _Stage("vision")
    session = graphs.open("vision")
    for sample, wanted in zip(samples, expected, strict=True):
        got, retained = run_vision(session, graphs.contract, config, sample.pixels, sample.cut)
        matched, rows = match_runs(got, wanted.visual, sample.layout.images)
        stage.compare(matched, rows)
        chosen = None if retained is None or wanted.retained is None else (retained, wanted.retained)
        stage.agreeing.append(agreeing_rows(matched, rows, TOLERANCES[graphs.contract.precision], chosen))
    return stage


def _check_prefill(
    graphs: _Graphs, samples: Sequence[Sample], expected: Sequence[_Expected]
) -> tuple[_Stage, list[int], list[dict[str, Floats]]]:
    """Also the token after each prompt, and the rows that were kept of each buffer.

    Each prompt goes into an empty cache, and again behind ids that are in it, which must be what both are in one.
    """
    stage, tokens, caches = _Stage("prefill"), [], []
    session = graphs.open("prefill")
    for sample, wanted in zip(samples, expected, strict=True):
        before, visual, layout = _before(sample), wanted.visual, sample.layout
        logits, kept = graphs.prefill(session, sample.prompt, visual, layout, {})
        _, behind = graphs.prefill(session, before, None, TokenLayout((len(before),)), {})
        later_logits, later_kept = graphs.prefill(session, sample.prompt, visual, layout, behind, len(before))
        stage.compare(logits, wanted.logits[0])
        stage.compare(later_logits, wanted.later_logits)
        for name, rows in kept.items():
            stage.compare(rows, wanted.caches[name])
            stage.compare(later_kept[name], wanted.later_caches[name])
        tokens.append(int(logits.argmax()))
        caches.append(kept)
    return stage, tokens, caches


def _check_decode(
    graphs: _Graphs,
    samples: Sequence[Sample],
    expected: Sequence[_Expected],
    caches: Sequence[dict[str, Floats]],
) -> tuple[_Stage, list[int]]:
    """Also the tokens behind the first, picture by picture. `caches`: the rows that prefill left."""
    stage, tokens = _Stage("decode"), []
    session = graphs.open("decode")
    for sample, wanted, kept in zip(samples, expected, caches, strict=True):
        layout, buffers = sample.layout, graphs.buffers(kept)
        for step, (token, reference) in enumerate(zip(wanted.tokens, wanted.logits[1:], strict=False)):
            feeds = {
                "input_ids": np.array([[token]]),
                "position_ids": np.array([[layout.length + step]]),
                "write_index": np.array([layout.num_kept + step]),
            }
            logits, buffers = graphs.run(session, feeds | buffers)
            stage.compare(logits, reference)
            tokens.append(int(logits.argmax()))
    return stage, tokens


def violations(check: ExportCheck, precision: Precision) -> list[str]:
    """What is out of tolerance, one clause each."""
    limit = TOLERANCES[precision]
    found = []
    for stage in check.stages:
        figures = Difference(stage.max_error, stage.cosine, stage.norm_ratio)
        rows = None if stage.rows is None else RowAgreement(stage.rows.agreement, stage.rows.num_rows)
        found += [f"{stage.name}: {clause}" for clause in excess(figures, limit, rows)]
    if check.weight_error is not None and not check.weight_error <= MOST_ROUNDED:
        found.append(
            f"a matrix is {check.weight_error:.0%} off, where rounding to 4 bits is {MOST_ROUNDED:.0%} at most"
        )
    if check.agreement < limit.agreement:
        found.append(f"only {check.agreement:.0%} of greedy tokens agree, {limit.agreement:.0%} wanted")
    return found
