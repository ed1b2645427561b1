"""The public tasks, read from local copies of their files."""

from __future__ import annotations

from svcli.evaluation.task import Task
from svcli.evaluation.tasks.gqa import Gqa
from svcli.evaluation.tasks.mmbench import MMBench
from svcli.evaluation.tasks.mme import Mme
from svcli.evaluation.tasks.mmmu import Mmmu
from svcli.evaluation.tasks.mmstar import MMStar
from svcli.evaluation.tasks.mmvet import MMVet
from svcli.evaluation.tasks.ocrbench import OcrBench
from svcli.evaluation.tasks.pope import Pope
from svcli.evaluation.tasks.scienceqa import ScienceQA
from svcli.evaluation.tasks.textvqa import TextVqa

PUBLIC: tuple[Task, ...] = (
    Pope(),
    Mme(),
    Gqa(),
    TextVqa(),
    MMBench(),
    MMStar(),
    MMVet(),
    Mmmu(),
    OcrBench(),
    ScienceQA(),
)
