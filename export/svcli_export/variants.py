"""Which skip settings a bundle gets graphs for: its own, and those of its variants, all on the same weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from skipvision.config import ModelConfig, SkipConfig
from skipvision.model import SkipVisionModel
from svcli_export.contract import Contract, ContractError
from svcli_export.manifest import DENSE, VARIANT_NAME
from svcli_export.samples import Skip, setting_of
from svcli_export.source import Source

Contracts = Callable[[ModelConfig], Contract]
"""The contract of a model within the limits of a bundle. Raises ContractError."""


class ExportError(ValueError):
    """An export that was refused; nothing was written."""


@dataclass(frozen=True)
class BundleSetting:
    """The model with one of the skip settings of a bundle, and the contract of its graphs."""

    model: SkipVisionModel
    contract: Contract

    @property
    def skip(self) -> SkipConfig | None:
        return self.model.config.skip


def own_setting(origin: Source, skip: Skip | None, contracts: Contracts) -> BundleSetting:
    """Of the bundle itself: what is asked, or what the source has.

    Raises ExportError, or ConfigError, SourceError or ContractError.
    """
    return _setting(origin, origin.model.config.skip or "off" if skip is None else skip, contracts)


def variant_settings(
    origin: Source,
    own: BundleSetting,
    asked: Mapping[str, Skip],
    contracts: Contracts,
    *,
    defaults: bool,
    note: Callable[[str], None],
) -> Iterator[BundleSetting]:
    """Of the variants that are `asked` for by name; with `defaults` also `dense`, where the bundle skips, and those of
    the bundle that is exported from, within the new limits.

    One that is asked for and cannot be raises what `own_setting` does; one that is not is left out with a `note`.
    """
    taken = {own.skip: "the bundle itself has"}
    for name, skip in ((_defaults(origin, own) if defaults else {}) | dict(asked)).items():
        if not re.fullmatch(VARIANT_NAME, name):
            raise ExportError(f"variant {name!r}: a name is of small letters, digits and -")
        try:
            found = _setting(origin, skip, contracts)
            if found.skip in taken:
                raise ExportError(f"its skip setting is the one that {taken[found.skip]}")
        except (ContractError, ExportError) as error:
            if name in asked:
                raise type(error)(f"variant {name}: {error}") from None
            note(f"variant {name} is left out: {error}")
            continue
        taken[found.skip] = f"variant {name} has"
        yield BundleSetting(found.model, found.contract.of_variant(name))


def _defaults(origin: Source, own: BundleSetting) -> dict[str, Skip]:
    found: dict[str, Skip] = {} if own.skip is None else {DENSE: "off"}
    if origin.manifest is not None:
        configs = {name: origin.manifest.variant(name).config for name in origin.manifest.variants}
        found |= {name: config.skip or "off" for name, config in configs.items()}
    return found


def _setting(origin: Source, skip: Skip, contracts: Contracts) -> BundleSetting:
    """The same weights, but for the summary layer that the plain model lacks."""
    base = origin.skipping or origin.model
    asked = setting_of(base.config, skip)
    override = None if asked == "off" else asked
    if override is not None and override.selector == "random":
        raise ExportError("skip.selector random draws anew at each call; export with another selector")
    model = base if override == base.config.skip else base.with_skip(override)
    origin.check(model.config)
    return BundleSetting(model, contracts(model.config))
