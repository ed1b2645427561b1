"""Where lmms-eval finds `svcli`: its registry calls this, and loads the model when one is asked for."""

from __future__ import annotations

from typing import Any


def models() -> Any:
    """The manifest of one model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="svcli", simple_class_path="svcli.evaluation.lmms.Svcli")
