"""How a model of a repository is run: config.pbtxt keeps it as Triton does parameters, as texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import skipvision
from svcli.engines import EngineName

WRITER = "svcli"
"""The parameter with the version that wrote the model."""


class SettingError(ValueError):
    """Parameters of a config.pbtxt that this version does not read; the message names the first."""


@dataclass(frozen=True)
class Settings:
    """What `svcli triton` was told."""

    engine: str = EngineName.ONNXRUNTIME.value
    variant: str | None = None
    """None: the bundle's own skip setting."""
    threads: int | None = None
    """One per core where none are named."""
    parallel: int | None = None
    """Answers at a time; None: as `svcli serve` has it."""
    queue: int = 64
    """Questions that may wait beside them."""
    timeout: float = 120.0
    """Seconds for one answer, waiting included."""
    drain: float = 30.0
    """Seconds for ending what was taken, where the model is unloaded."""
    max_tokens: int = 1024
    """Of one answer, whatever is asked for."""
    max_pixels: float = 50.0
    """Megapixels of one picture, before it is decoded."""

    @property
    def on_gpu(self) -> bool:
        return EngineName(self.engine) not in (EngineName.ONNXRUNTIME, EngineName.TORCH)

    def parameters(self) -> dict[str, str]:
        """As config.pbtxt has them; what is None is left out."""
        found = {name: str(value) for name, value in asdict(self).items() if value is not None}
        return {WRITER: skipvision.__version__} | found

    @staticmethod
    def of(parameters: Mapping[str, str]) -> Settings:
        """Raises SettingError for a name that is not known, or a value that cannot be read."""
        kinds = {each.name: str(each.type).removesuffix(" | None") for each in fields(Settings)}
        readers = {"str": str, "int": int, "float": float}
        found = {}
        for name, text in parameters.items():
            if name == WRITER or name.isupper():  # such as EXECUTION_ENV_PATH, which is Triton's own
                continue
            if name not in kinds:
                raise SettingError(
                    f"config.pbtxt: the parameter {name!r} is not known to svcli {skipvision.__version__}"
                )
            try:
                found[name] = readers[kinds[name]](text)
            except ValueError:
                raise SettingError(f"config.pbtxt: the parameter {name} is no {kinds[name]}: {text!r}") from None
        if found.get("engine", Settings.engine) not in [each.value for each in EngineName]:
            raise SettingError(f"config.pbtxt: there is no engine {found['engine']!r}")
        return Settings(**found)
