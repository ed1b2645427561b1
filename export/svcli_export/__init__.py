"""A trained model becomes a bundle: three ONNX graphs, one weight file and a manifest."""

from __future__ import annotations

import os

# From 1.29 on, ONNX Runtime tells its makers which models are run, where this does not stand before it is imported.
# Its disable_telemetry_events() comes behind the first event and the machine's number, and stops neither.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
