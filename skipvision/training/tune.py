"""Trains a model that there is on conversations about pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from skipvision.model import SkipVisionModel, attention_mask
from skipvision.training.collate import Batch
from skipvision.training.speaker import IGNORE
from skipvision.training.task import MicroBatch, Objective


class TuneModule(nn.Module):
    """A model with its loss."""

    def __init__(self, model: SkipVisionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Objective:
        """Cross entropy of a `Batch`, summed over all rows that have something to say; no others reach the head."""
        assert isinstance(batch, Batch)
        model, device = self.model, self.model.decoder.embed.weight.device
        # Dropout and the random selector: as in any other process and after any break.
        torch.manual_seed(batch.seed)
        visual = model.encode_pictures(batch.pixels.to(device), batch.cuts)
        hidden = model.embed(batch.input_ids.to(device), visual, batch.source.to(device))
        mask = attention_mask(batch.order.to(device), batch.visible_until.to(device))
        hidden = model.decoder(hidden, batch.positions.to(device), mask, batch.num_kept)
        labels = batch.labels.to(device)
        answers = labels != IGNORE
        logits = model.decoder.logits(hidden[answers]).float()
        total = F.cross_entropy(logits, labels[answers], reduction="sum")
        return Objective(total, float(batch.counts.answer_tokens), total.detach())
