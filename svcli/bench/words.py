"""What the figures say in plain words: nothing that their intervals leave open."""

from __future__ import annotations

from svcli.bench.report import DENSE, SKIPPED, TITLES, Report, Stage
from svcli.bench.statistics import FEWEST, drift

_BUSY = 0.5
"""Load on each core from which on the machine was doing something else."""
_WIDE, _DRIFT, _SHARED = 1.3, 0.1, 0.1
_BESIDE = {
    "text": "Our decoder on text, against {}",
    "a picture, dense": "Our dense side on a picture, against {}",
    "a picture, CDPruner": "Our skipped side on a picture, against {} with CDPruner",
}
_PARTS = ("picture", "vision", "prefill", "decode")
"""Stages that are no sums of others, in which noise shows."""


def conclusions(report: Report) -> list[str]:
    """What skipping did and did not speed up, and how peers compare, a sentence each; of one side alone, the latter."""
    is_alone = not {DENSE, SKIPPED} <= report.sides.keys()
    if is_alone and not report.peers:
        return []
    if report.machine.is_crowded:
        taken = f"{report.machine.others} of {report.machine.cores} cores"
        return [f"Others took {taken} meanwhile: nothing is concluded; measure again when the machine is quiet."]
    if report.num_rounds < FEWEST:
        return [f"{report.num_rounds} rounds are too few to say what is faster; {FEWEST} at least are needed."]
    if is_alone:
        return _about_peers(report)
    named = {TITLES[name]: stage for name, stage in report.stages.items()}
    named |= {f"a step of {point.at} sequences": point.stages["decode"] for point in report.batch if point.at > 1}
    said = []
    for verdict, verb in (("lower", "Skipping shortened"), ("higher", "Skipping lengthened")):
        if found := [f"{name} to {_interval(stage)}" for name, stage in named.items() if stage.verdict == verdict]:
            said.append(f"{verb} {', '.join(found)} of the dense time.")
    if opened := [f"{name} ({_interval(stage)})" for name, stage in named.items() if stage.verdict == "open"]:
        said.append(f"No difference is shown by these rounds in {', '.join(opened)}.")
    return [*said, *_about_peers(report), _about_decoding(report)]


def noise(report: Report) -> list[str]:
    """What made the figures less sure than they look."""
    found = []
    machine = report.machine
    if machine.load_before > _BUSY * machine.cores:
        found.append(
            f"the machine was busy before: load average {machine.load_before:.1f} on {machine.cores} cores; times of"
            " another run may differ by more than the intervals say"
        )
    if machine.others is not None and machine.others > _SHARED * machine.cores:
        found.append(f"others took {machine.others} of {machine.cores} cores while the stages were measured")
    wide, moved = [], []
    for name in _PARTS:
        for side, figure in report.stages[name].sides.items():
            if figure.spread.p95 > _WIDE * figure.spread.p50:
                wide.append(f"{TITLES[name]} {side} ({figure.spread.p95 / figure.spread.p50:.1f} x)")
            if (by := drift(figure.values)) > _DRIFT:
                moved.append(f"{TITLES[name]} {side} ({by:.0%})")
    if wide:
        found.append(f"times vary: p95 is far above p50 in {', '.join(wide)}")
    if moved:
        found.append(f"times drifted between the earlier and the later half of the rounds: {', '.join(moved)}")
    return found


def _about_peers(report: Report) -> list[str]:
    words = {"lower": "faster", "higher": "slower", "open": "not shown to differ"}
    said = []
    for peer in report.peers:
        found = [f"{TITLES[name]} {words[stage.verdict]}, {_interval(stage)}" for name, stage in peer.stages.items()]
        said.append(f"{_BESIDE[peer.what].format(peer.name)}: {'; '.join(found)} of its time.")
    return said


def _about_decoding(report: Report) -> str:
    """How much there was to be saved."""
    dense, skipped = (report.stages["decode"].sides[side] for side in (DENSE, SKIPPED))
    if not dense.num_bytes or not skipped.num_bytes:
        return "What a decoded token reads was not counted."
    share = 1 - skipped.num_bytes / dense.num_bytes
    return (
        "A decoded token reads all weights of the decoder, whatever was skipped: of the bytes that it moves at batch 1,"
        f" {share:.1%} are saved here."
    )


def _interval(stage: Stage) -> str:
    if stage.ratio is None:
        return "not known"
    low, high = (f"{100 * each:.1f}" for each in (stage.ratio.low, stage.ratio.high))
    return f"{stage.ratio.ratio:.1%} ({low} to {high})"
