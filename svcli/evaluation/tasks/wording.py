"""How questions end in LLaVA-1.5's evaluation scripts (docs/Evaluation.md there), which most papers ask by."""

from __future__ import annotations

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CHINESE = "\n请直接回答选项字母。"
