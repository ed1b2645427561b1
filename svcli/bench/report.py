"""What a bench has found, as one JSON file holds it. Every figure stands beside the rounds that it was made of."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from svcli.bench.statistics import Ratio, Spread, Verdict, halves_agree, rounds_agree
from svcli.errors import UsageError

FORMAT: Literal[1] = 1
DENSE, SKIPPED = "dense", "skipped"
STAGES = ("picture", "vision", "prefill", "first_token", "decode", "end_to_end")
TITLES = {
    "picture": "picture",
    "vision": "vision",
    "prefill": "prefill",
    "first_token": "first token",
    "decode": "decode per token",
    "end_to_end": "end to end",
}
"""Of the stages, where people read."""
_CROWDED = 0.25
"""Of the cores."""
COLUMNS = (
    "part", "at", "stage", "side", "rounds", "p50", "p95", "ratio", "low", "high", "flops", "bytes", "roof_seconds",
    "roof_share", "failed",
)  # fmt: skip
"""Of the CSV; times in seconds, energy in joules; `failed` says why a peer was not measured."""


class BenchError(UsageError):
    """A results file that cannot be used."""


class UnlikeError(UsageError):
    """Two results that were not measured alike."""


class Strict(BaseModel):
    """What results files are made of: an unknown or a missing key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Machine(Strict):
    """Where it was measured."""

    cpu: str
    cores: int
    """That the process may use."""
    memory_bytes: int | None
    gpu: str | None
    """Of the engine that was measured; None where that was the CPU."""
    load_before: float
    """Load average over the minute before."""
    others: float | None = None
    """Cores' worth of time that others took while the stages were measured; None where nothing told."""

    @property
    def is_crowded(self) -> bool:
        """Whether others took so much that nothing should be concluded: what a thread shares its core with lasts for
        many rounds, and meets one side alone."""
        return self.others is not None and self.others > _CROWDED * self.cores


class Roof(Strict):
    """How fast this machine could be at best."""

    source: str
    """How that was found out."""
    flops_per_second: float
    bytes_per_second: float

    def seconds(self, flops: int, num_bytes: int) -> float:
        """The longer of both; everything is read once."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


class Model(Strict):
    """What was run."""

    name: str
    weights: str
    """SHA-256 of the weights."""
    precision: str
    skip: dict[str, Any] | None
    """Setting of the skipping side."""


class Settings(Strict):
    """How it was run."""

    engine: str
    """As the engine calls itself."""
    threads: int | None
    tokens: int
    """Of each answer, whatever they say."""
    warm_up: int
    question: str
    pictures: tuple[str, ...]
    """SHA-256 of each."""


class Figure(Strict):
    """One measure of one side. Seconds, but for energy, which is in joules."""

    values: Annotated[tuple[float, ...], Field(min_length=1)]
    """One of each round, in order."""
    spread: Spread
    flops: int | None = None
    num_bytes: int | None = None
    """That are moved at least: weights once, and the KV cache."""
    roof_seconds: float | None = None
    """None where nothing is counted, or no roof is known."""

    @property
    def roof_share(self) -> float | None:
        """Of the roofline that was reached; 1 is all of it."""
        return None if self.roof_seconds is None else self.roof_seconds / self.spread.p50


class Stage(Strict):
    """One measure of all sides."""

    sides: Annotated[dict[str, Figure], Field(min_length=1)]
    ratio: Ratio | None = None
    """The second side over the first, such as skipped over dense, paired by round; None of one side."""

    @property
    def num_rounds(self) -> int:
        return min(len(figure.values) for figure in self.sides.values())

    @property
    def verdict(self) -> Verdict:
        """Whether the second side is below the first: by the interval, in both halves, and in more rounds than chance
        puts there."""
        if self.ratio is None:
            return "open"
        first, second = (figure.values for figure in self.sides.values())
        if not (halves_agree(second, first) and rounds_agree(second, first)):
            return "open"
        return self.ratio.verdict(self.num_rounds)


class Point(Strict):
    """One place of a sweep."""

    at: int
    """Sequences decoded side by side, or rows of the prompt as the plain model counts them."""
    rows: dict[str, int]
    """In the KV cache of each sequence, by side."""
    stages: dict[str, Stage]


class Side(Strict):
    """What one side holds."""

    prompt_rows: int
    """That attend in prefill."""
    kv_rows: int
    """After prefill."""
    kv_bytes: int
    """Of those rows."""
    kv_bytes_end: int
    """Behind the last token."""
    kv_bytes_reserved: int
    """Of the whole cache, as it is baked in."""
    peak_bytes: int | None
    """Resident memory of a process that opens this side alone and answers once; None where nothing told."""
    gpu_bytes: int | None
    """What the GPU's memory in use grew by meanwhile."""


class Task(Strict):
    """What another run time was asked."""

    name: str
    what: Literal["text", "a picture, dense", "a picture, CDPruner"] = "text"
    """What both were asked: the decoder alone as much text, or a question about a picture. Ours is dense where theirs
    is, and skips where theirs prunes."""

    @property
    def place(self) -> str:
        """Among other run times and other questions."""
        return self.name if self.what == "text" else f"{self.name} on {self.what}"


class FailedPeer(Task):
    """Another run time that could not be measured."""

    why: str
    """A sentence."""


class Peer(Task):
    """Another run time, beside ours."""

    version: str
    weights: str
    """Which weights it had, in what it computed, and what else is not as in ours."""
    rows: int
    """Of its prompt."""
    own_rows: int | None = None
    """In our KV cache behind the prompt, about a picture; of text, as many as it has."""
    stages: dict[str, Stage]
    """Sides are the peer's and `ours`."""

    @property
    def title(self) -> str:
        """What was run, in a line."""
        if self.own_rows is None:
            return f"{self.name} {self.version} on {self.rows} rows of {self.what}"
        return f"{self.name} {self.version} on {self.what}: {self.rows} rows in its KV cache, {self.own_rows} in ours"


class Report(Strict):
    """All of it."""

    format: Literal[1] = FORMAT
    date: str
    machine: Machine
    versions: dict[str, str]
    model: Model
    settings: Settings
    roof: Roof | None
    sides: dict[str, Side]
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    batch: tuple[Point, ...] = ()
    context: tuple[Point, ...] = ()
    energy: dict[str, Stage] = Field(default_factory=dict)
    """Joules of an answer, by what tells them; empty where nothing does."""
    peers: tuple[Peer, ...] = ()
    failed_peers: tuple[FailedPeer, ...] = ()
    remarks: tuple[str, ...] = ()
    """What whoever reads the figures must know, such as that the machine was busy."""

    @model_validator(mode="after")
    def _is_of_times(self) -> Report:
        for part, _, name, stage in self.parts():
            if name not in TITLES:
                raise ValueError(f"{name!r} is no stage")
            if part != "energy" and min(value for figure in stage.sides.values() for value in figure.values) <= 0:
                raise ValueError(f"a time of {name} is not above 0")
        return self

    @property
    def num_rounds(self) -> int:
        return min(stage.num_rounds for stage in self.stages.values())

    def parts(self) -> Iterator[tuple[str, str, str, Stage]]:
        """Every measure with the part of the report that it is in, its place there, and its name."""
        for name, stage in self.stages.items():
            yield "stages", "", name, stage
        for part, points in (("batch", self.batch), ("context", self.context)):
            for point in points:
                for name, stage in point.stages.items():
                    yield part, str(point.at), name, stage
        for source, stage in self.energy.items():
            yield "energy", source, "end_to_end", stage
        for peer in self.peers:
            for name, stage in peer.stages.items():
                yield "peer", peer.place, name, stage


def as_json(report: Report) -> str:
    """Times are cut to what was really measured."""
    return json.dumps(_rounded(report.model_dump(mode="json")), indent=1) + "\n"


def as_csv(report: Report) -> str:
    """One row for each side of each measure, and one for each peer that failed; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for part, at, name, stage in report.parts():
        interval = ("", "", "") if stage.ratio is None else (stage.ratio.ratio, stage.ratio.low, stage.ratio.high)
        for side, figure in stage.sides.items():
            work = figure.flops, figure.num_bytes, figure.roof_seconds, figure.roof_share
            row = (part, at, name, side, len(figure.values), figure.spread.p50, figure.spread.p95, *interval, *work, "")
            writer.writerow("" if value is None else _rounded(value) for value in row)
    for peer in report.failed_peers:
        cells = dict.fromkeys(COLUMNS, "") | {"part": "peer", "at": peer.place, "rounds": 0, "failed": peer.why}
        writer.writerow(cells.values())
    return text.getvalue()


def read_report(path: Path) -> Report:
    """Raises BenchError for what is no results file of `svcli bench`, or one of another version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise BenchError(f"{path}: no JSON, so not what `svcli bench --json` writes") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise BenchError(f"{path}: not what `svcli bench --json` of this version writes; measure again")
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"at {'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise BenchError(f"{path}: {where}{first['msg'].removeprefix('Value error, ')}; measure again") from None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, BaseModel):
        return _rounded(value.model_dump(mode="json"))
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
