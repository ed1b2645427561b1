"""Who is measured: a bundle's graphs with and without skipping, each an engine that answers the same question."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from skipvision.layout import TokenLayout
from skipvision.pictures import ImageError, decode_picture
from skipvision.tiles import Cut
from svcli.bench.report import DENSE, SKIPPED
from svcli.engines import EngineName, open_engine
from svcli.errors import UsageError
from svcli_engines.base import Engine, Visual, together
from svcli_engines.processor import Processor, Prompt
from svcli_export.chat import Message
from svcli_export.manifest import Manifest, load_manifest

ON_GPU = frozenset({EngineName.ONNXRUNTIME_CUDA, EngineName.TORCH_CUDA, EngineName.TENSORRT, EngineName.TENSORRT_RTX})


@dataclass(frozen=True)
class Asked:
    """What every side is asked."""

    question: str
    pictures: tuple[bytes, ...]
    """As they lie on the disk."""
    names: tuple[str, ...]
    """What messages call them."""

    @property
    def hashes(self) -> tuple[str, ...]:
        return tuple(hashlib.sha256(each).hexdigest() for each in self.pictures)


@dataclass(frozen=True)
class Graphs:
    """Where one side's graphs lie. Cheap, and another process can be given it."""

    name: str
    bundle: Path
    variant: str
    """Empty for the bundle's own."""
    engine: EngineName
    threads: int | None

    def manifest(self) -> Manifest:
        """Raises BundleError."""
        manifest = load_manifest(self.bundle, quick=True)
        return manifest.variant(self.variant) if self.variant else manifest

    def open(self, asked: Asked) -> Contestant:
        """Raises what the engine, the processor or the picture does."""
        manifest = self.manifest()
        processor = Processor(self.bundle, manifest)
        contestant = Contestant(
            self.name, manifest, processor, open_engine(self.engine, self.bundle, manifest, threads=self.threads), asked
        )
        try:
            contestant.prepare()
        except BaseException:
            contestant.close()
            raise
        return contestant


@dataclass
class Contestant:
    """One side, open."""

    name: str
    manifest: Manifest
    processor: Processor
    engine: Engine
    asked: Asked
    prompt: Prompt = field(init=False)
    visual: Visual = field(init=False)
    """Of the pictures; sweeps look at them once."""

    def prepare(self) -> None:
        """Looks at the pictures. Raises ImageError, PromptError, EngineError."""
        images = self.images()
        self.prompt = self._prompt(self.processor.cuts(images))
        cuts, is_alone = self.prompt.cuts, len(images) == 1
        views = [self.processor.views(image, is_alone) for image in images]
        seen = together([self.engine.encode(each, cut) for each, cut in zip(views, cuts, strict=True)])
        assert seen is not None
        self.visual = seen

    def answer(
        self,
        num_tokens: int,
        clock: Callable[[], float] = perf_counter,
        images: Sequence[Image.Image] | None = None,
    ) -> dict[str, float]:
        """Seconds of each stage of a whole answer of so many tokens, from the pictures' files on, nothing known; or
        from `images`, which are decoded.

        Raises UsageError for more tokens than the KV cache has room for.
        """
        # The last token is not put into the cache.
        if num_tokens > (room := self.engine.capacity - self.prompt.layout.num_kept + 1):
            raise UsageError(f"--tokens {num_tokens}: the KV cache of the {self.name} graphs has room for {room}")
        start = clock()
        if images is None:
            images = self.images()
        cuts, is_alone = self.processor.cuts(images), len(images) == 1
        views = [self.processor.views(image, is_alone) for image in images]
        read = clock()
        prompt = self._prompt(cuts)
        ready = clock()
        visual = together([self.engine.encode(each, cut) for each, cut in zip(views, cuts, strict=True)])
        seen = clock()
        logits = self.engine.prefill(prompt.ids, visual, prompt.layout)
        first = clock()
        for _ in range(num_tokens - 1):
            logits = self.engine.extend([int(logits.argmax())])
        end = clock()
        return {
            "picture": read - start,
            "vision": seen - ready,
            "prefill": first - seen,
            "first_token": first - ready,
            "decode": (end - first) / (num_tokens - 1),
            "end_to_end": end - start,
        }

    def longer(self, num_rows: int) -> tuple[list[int], TokenLayout]:
        """The prompt with text in front of its end, so that the plain model would have `num_rows` rows of it.

        Raises UsageError for fewer than the prompt has.
        """
        ids, layout = self.prompt.ids, self.prompt.layout
        missing = num_rows - full_rows(layout)
        if missing < 0:
            raise UsageError(f"--context {num_rows}: the prompt alone has {full_rows(layout)} rows")
        words = [token for token in ids if token != self.processor.image_id]
        filling = (words * (missing // len(words) + 1))[:missing]
        longer = [*ids[:-1], *filling, ids[-1]]
        return longer, self.processor.layout(longer, layout.images)

    def close(self) -> None:
        self.engine.close()

    def images(self) -> list[Image.Image]:
        """The pictures, decoded."""
        files = zip(self.asked.names, self.asked.pictures, strict=True)
        return [decode_picture(name, data, self.manifest.image.transparency).image for name, data in files]

    def _prompt(self, cuts: Sequence[Cut]) -> Prompt:
        messages = [Message("user", self.asked.question, images=len(self.asked.pictures))]
        return self.processor.prompt(messages, cuts)


def full_rows(layout: TokenLayout) -> int:
    """KV rows of the prompt as the plain model would have them."""
    return layout.num_kept + sum(image.num_tokens - image.num_kept for image in layout.images)


def sides(
    bundle: Path,
    engine: EngineName,
    *,
    variant: str | None = None,
    dense: Path | None = None,
    alone: bool = False,
    threads: int | None = None,
) -> tuple[Graphs, ...]:
    """Dense and skipped, or with `alone` the one that is named.

    `variant`: of the bundle, where its own graphs are not meant. `dense`: a bundle of the same weights that skips
    nothing, for engines that run no variants. Raises BundleError, NoVariantError, UsageError.
    """
    manifest = load_manifest(bundle, quick=True)
    named = "" if variant is None else manifest.variant(variant).contract.variant
    ours = manifest.variant(named) if named else manifest
    skips = ours.config.skip is not None
    own = Graphs(SKIPPED if skips else DENSE, bundle, named, engine, threads)
    if alone:
        if dense is not None:
            raise UsageError("--alone and --dense: name one of them")
        return (own,)
    if not skips:
        offered = ", ".join(name for name in manifest.variants if manifest.variant(name).config.skip is not None)
        remedy = f"name one that skips by --variant: {offered}" if offered else "measure it by itself with --alone"
        raise UsageError(f"these graphs skip nothing, so there is nothing to compare; {remedy}")
    if dense is None:
        if engine in (EngineName.TENSORRT, EngineName.TENSORRT_RTX):
            raise UsageError(
                "TensorRT's plans are of a bundle's own graphs: name a bundle that `svcli export --skip off` wrote by"
                " --dense, or measure this one with --alone"
            )
        plain = "" if manifest.config.skip is None else manifest.variant(DENSE).contract.variant
        return Graphs(DENSE, bundle, plain, engine, threads), own
    theirs = load_manifest(dense, quick=True)
    _check_twin(dense, ours, theirs)
    return Graphs(DENSE, dense, "", engine, threads), own


def _check_twin(bundle: Path, ours: Manifest, theirs: Manifest) -> None:
    """Raises UsageError for a bundle that is not the same model without skipping."""
    if theirs.config.skip is not None:
        raise UsageError(f"--dense {bundle}: skips; name a bundle that `svcli export --skip off` wrote")
    leave_out = {"skip", "skip_trained"}
    mine, other = ({k: v for k, v in each.model.items() if k not in leave_out} for each in (ours, theirs))
    if mine != other or ours.contract.precision != theirs.contract.precision:
        raise UsageError(f"--dense {bundle}: not the same model in the same precision")


def ask(question: str, paths: Sequence[Path]) -> Asked:
    """About the pictures of these files, or one that is drawn. Raises ImageError."""
    if not paths:
        return Asked(question, (drawn_picture(),), ("a drawn picture",))
    try:
        return Asked(question, tuple(path.read_bytes() for path in paths), tuple(map(str, paths)))
    except OSError as error:
        raise ImageError(f"{error.filename}: {error.strerror}") from None


def drawn_picture() -> bytes:
    """A photo's worth of JPEG, 640 x 480, always the same: for times alone, not for answers."""
    source = np.random.default_rng(0)
    small = source.integers(0, 256, (15, 20, 3), np.uint8)
    picture = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
    grain = np.asarray(picture, np.int16) + source.integers(-12, 13, (480, 640, 1), np.int16)
    file = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
