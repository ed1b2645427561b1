"""What a shell offers where an option takes a name; paths are the shell's own affair."""

from __future__ import annotations


def settings() -> list[str]:
    """Of the papers, for `--preset`."""
    from skipvision.presets import PRESETS

    return list(PRESETS)


def variants() -> list[str]:
    """For `svcli export --variant`."""
    return ["dense", *settings()]


def models() -> list[str]:
    """Whose sizes are known, for `svcli cost`."""
    from skipvision.known_models import KNOWN_MODELS

    return list(KNOWN_MODELS)


def gpus() -> list[str]:
    """For `svcli cost --gpu`."""
    from skipvision.roofline import GPUS

    return list(GPUS)


def peers() -> list[str]:
    """For `svcli bench --peer`."""
    from svcli.bench.peers import PEERS

    return list(PEERS)


def recipes() -> list[str]:
    """Presets of `svcli train`."""
    from skipvision.training.recipes import PRESETS

    return list(PRESETS)
