"""A bundle as a model of lmms-eval: `lmms-eval --model svcli --model_args bundle=FOLDER,asker=skipped`.

lmms-eval finds it by an entry point (group `lmms_eval.models`). Its tasks decide what is asked and how answers are
judged; baselines are other askers of the same bundle.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image

from svcli.engines import EngineName
from svcli.evaluation.askers import BundleAsker, own_name
from svcli.settings import bundled_model
from svcli_engines.base import EngineError, MachineError
from svcli_engines.processor import PromptError
from svcli_engines.sampling import Sampling
from svcli_export.manifest import load_manifest

_PLACEHOLDER = re.compile(r"<image(?: \d+)?>\s*")
_MAX_NEW_TOKENS = 1024
"""Where a task names no length, as in other models of lmms-eval."""
_log = logging.getLogger("svcli.lmms")


class Svcli(lmms):  # type: ignore[misc]
    """Greedy, or drawn as a task asks; one question at a time, so that a batch size has no effect."""

    is_simple = True

    def __init__(
        self,
        bundle: str = "",
        asker: str = "",
        engine: str = EngineName.ONNXRUNTIME.value,
        threads: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """`bundle`: a folder, or else the bundled model. `asker`: as of `svcli eval`, or else the bundle as it is.

        Raises ValueError for what is not there, as `svcli eval` does. What lmms-eval gives every model, the batch sizes
        and the device, is taken and has no effect.
        """
        super().__init__()
        del batch_size, max_batch_size, device
        folder = Path(bundle) if bundle else bundled_model()
        manifest = load_manifest(folder)
        self.asker = BundleAsker(asker or own_name(manifest), folder, manifest, EngineName(engine), threads)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each; an empty one, and a warning, where a question cannot be asked.

        Raises MachineError: what the machine lacks, no question is to blame for.
        """
        return [self._generate(*each.args) for each in requests]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises NotImplementedError: what lmms-eval 0.7.3 gets from here it makes text of, and cannot judge then."""
        raise NotImplementedError("svcli answers tasks that generate text; this task wants likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises NotImplementedError: tasks of several rounds are not run."""
        raise NotImplementedError("svcli answers tasks of one round; this task has several")

    def _generate(
        self,
        context: str,
        settings: dict[str, Any],
        pictures_of: Callable[[Any], Any],
        number: int,
        task: str,
        split: str,
    ) -> str:
        images = _images(pictures_of(self.task_dict[task][split][number]))
        try:
            answer = self.asker.ask(_PLACEHOLDER.sub("", context), images, sampling_of(settings)).text
        except MachineError:
            raise
        except (PromptError, EngineError) as error:
            _log.warning("%s, %s %s: not asked: %s", task, split, number, error)
            return ""
        self.cache_hook.add_partial("generate_until", (context, settings), answer)
        return answer


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """What a task's `generation_kwargs` ask for. Raises ValueError for several beams, which are not there."""
    if int(settings.get("num_beams") or 1) != 1:
        raise ValueError(f"svcli has no beam search, and the task wants {settings['num_beams']} beams")
    until = settings.get("until") or ()
    drawn = bool(settings.get("do_sample")) and float(settings.get("temperature") or 0) > 0
    return Sampling(
        temperature=float(settings["temperature"]) if drawn else 0.0,
        top_p=float(settings.get("top_p") or 1.0) if drawn else 1.0,
        seed=0,
        max_new_tokens=int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
        stop=(until,) if isinstance(until, str) else tuple(until),
    )


def _images(shown: Any) -> list[Image.Image]:
    """RGB pictures, as tasks give them. Raises ValueError for anything else, such as a video."""
    images = [] if shown is None else list(shown)
    for each in images:
        if not isinstance(each, Image.Image):
            raise ValueError(f"svcli is shown pictures, and the task has a {type(each).__name__}")
    return [each.convert("RGB") for each in images]
