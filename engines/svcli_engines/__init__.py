"""A bundle runs: pictures and messages in, text out."""

from __future__ import annotations

import svcli_export as svcli_export  # what it says to ONNX Runtime stands before that is imported here
