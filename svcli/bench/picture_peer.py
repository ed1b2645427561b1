"""OpenVINO GenAI on the same question about the picture, in turns with ours: dense against our dense side, and pruned
by CDPruner to as many visual rows against our side that skips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from skipvision.config import ModelConfig
from svcli.bench.contestants import Contestant, Graphs
from svcli.bench.figures import compared
from svcli.bench.openvino_pictures import IMAGE
from svcli.bench.report import DENSE, FailedPeer, Peer
from svcli.bench.rounds import Rounds
from svcli.bench.text_engines import Worker
from svcli.bench.theirs import PeerError, theirs
from svcli_export.pixels import to_square

OURS = "ours"
_MORE_ROWS = 64
"""Than our dense prompt has: what their tokenizer and their template add fits in."""
_STAGES = ("first_token", "decode")
_MODULE = "svcli.bench.openvino_pictures"


def misfit(config: ModelConfig, num_pictures: int) -> str | None:
    """Why a question cannot be asked of the model as a Qwen2-VL, the type that is pruned."""
    if num_pictures != 1:
        return "of pictures, it is asked about one"
    if config.tiles is not None:
        return "pictures of this model are cut, which those of a Qwen2-VL are not"
    if config.resampler is not None:
        return "this model's projector is a resampler, and a Qwen2-VL has a row for each square of patches"
    return None


def pruning_ratio(num_tokens: int, num_kept: int) -> int:
    """Percent of `num_tokens` to be pruned, so that about `num_kept` are left, as near as whole percents come."""
    return min(99, round(100 * (1 - num_kept / num_tokens)))


def asked_of(side: Contestant) -> Literal["a picture, dense", "a picture, CDPruner"]:
    """What theirs is asked where this side of ours is."""
    return "a picture, dense" if side.name == DENSE else "a picture, CDPruner"


def measure_pictures(
    graphs: Graphs,
    sides: Mapping[str, Contestant],
    decoder: Path,
    *,
    identity: tuple[str, str],
    weights: str,
    threads: int,
    tokens: int,
    rounds: int,
    warm_up: int,
    progress: Callable[[str, int, int], None],
) -> Iterator[Peer | FailedPeer]:
    """Of each side. `graphs` are the first one's, `decoder` is written as transformers reads it, `identity` is name and
    version, `weights` what theirs are in.

    First token: from the picture in S x S, uint8, to the first token: normalising, the prompt's ids, encoder,
    projector, pruning or skipping, prefill. Raises what ours does.
    """
    from svcli.bench.text_models import build_openvino_pictures

    name, version = identity
    first = sides[graphs.name]
    precision = first.manifest.contract.precision
    output = decoder.with_name("openvino-genai-pictures") / precision
    progress(f"{name} on a picture", 0, warm_up + rounds)
    square = to_square(first.images()[0], first.manifest.image)
    try:
        with theirs():
            build_openvino_pictures(graphs.bundle, graphs.variant, decoder, output, precision)
            picture = decoder.with_name("picture.npy")
            np.save(picture, np.asarray(square, np.uint8))
            prompt = _prompt(graphs.bundle, first)
    except PeerError as error:
        yield from (FailedPeer(name=name, what=asked_of(side), why=str(error)) for side in sides.values())
        return
    context = first.prompt.layout.length + tokens + _MORE_ROWS
    for side in sides.values():
        (span,) = side.prompt.layout.images
        pruned = pruning_ratio(span.num_tokens, span.num_kept)
        question = {"picture": str(picture), "prompt": prompt, "pruned": pruned, "new": tokens}
        try:
            with ExitStack() as stack:
                with theirs():
                    worker = stack.enter_context(Worker("openvino_genai", output, threads, context, module=_MODULE))
                turns = {name: theirs()(partial(_theirs, worker, question)), OURS: partial(_ours, side, square, tokens)}
                taken = Rounds(turns, warm_up=warm_up)
                taken.run(rounds, progress=partial(progress, f"{name} on a picture, {side.name}"))
        except PeerError as error:
            yield FailedPeer(name=name, what=asked_of(side), why=str(error))
            continue
        yield Peer(
            name=name,
            version=version,
            what=asked_of(side),
            weights=_unlike(weights, precision, is_pruned=side.name != DENSE),
            rows=taken.taken[name][0]["rows"],
            own_rows=side.prompt.layout.num_kept,
            stages={
                stage: compared({key: [each[stage] for each in found] for key, found in taken.taken.items()})
                for stage in _STAGES
            },
        )


def _prompt(bundle: Path, side: Contestant) -> str:
    """Ours as text, their mark in the place of our picture."""
    from tokenizers import Tokenizer

    tokenizer, ids = Tokenizer.from_file(str(bundle / "tokenizer.json")), side.prompt.ids
    place = ids.index(side.processor.image_id)
    before, behind = (tokenizer.decode(each, skip_special_tokens=False) for each in (ids[:place], ids[place + 1 :]))
    return f"{before}{IMAGE}{behind}"


def _unlike(theirs: str, ours: str, *, is_pruned: bool) -> str:
    method = "; CDPruner drops tokens in front of the decoder, ours skips" if is_pruned else ""
    return (
        f"the same weights, in {theirs}; ours in {ours}; as a Qwen2-VL, whose positions are others: times alone,"
        f" its answers mean nothing{method}"
    )


def _theirs(worker: Worker, question: Mapping[str, Any]) -> dict[str, Any]:
    answer: Any = worker.answer(question)
    return {
        "first_token": answer["first_token"],
        "decode": sum(answer["decode"]) / len(answer["decode"]),
        "rows": answer["rows"],
    }


def _ours(side: Contestant, square: Image.Image, tokens: int) -> dict[str, Any]:
    found = side.answer(tokens, images=[square])
    return {"first_token": found["end_to_end"] - (tokens - 1) * found["decode"], "decode": found["decode"]}
