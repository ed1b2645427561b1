"""Auxiliary tasks of a model that is trained from nothing: what each patch shows, and where is what words name.

Thrown away after training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from skipvision.data.names import COLOURS, GLYPHS, LABEL_IDS, LABELS, PLURALS


class PatchHead(nn.Module):
    """The auxiliary task: each projected patch says what it shows, and in which colour, in the decoder's own words.

    A patch is scored against the token embeddings of names, letters and colours. So projected patches come to lie
    where words lie, and what the decoder learns about copying a word holds for copying what it sees. Thrown away after
    training.
    """

    def __init__(self, width: int, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.nothing = nn.Parameter(torch.zeros(2, width))
        self.scale = 4 * width**-0.5
        glyphs = len(LABELS) - len(GLYPHS)
        names = [f" {label}" for label in LABELS[1:glyphs]] + list(LABELS[glyphs:])
        self.register_buffer("label_ids", _first_tokens(tokenizer, names), persistent=False)
        colours = [f" {colour}" for colour in COLOURS]
        self.register_buffer("colour_ids", _first_tokens(tokenizer, colours), persistent=False)
        weights = torch.ones(len(LABELS))
        weights[0] = 0.1  # most patches are background
        self.register_buffer("label_weights", weights, persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor, colours: Tensor, embedding: Tensor) -> Tensor:
        """Cross entropy over [I, P] truths, `embedding` [vocab, D]; patches of unknown truth (-1) do not count."""
        known = labels >= 0
        hidden = self.norm(tokens[known]) * self.scale
        if hidden.shape[0] == 0:
            return tokens.sum() * 0
        words = [embedding[self.get_buffer(name)] for name in ("label_ids", "colour_ids")]
        label_words, colour_words = (torch.cat([self.nothing[i : i + 1], each]) for i, each in enumerate(words))
        weights = self.get_buffer("label_weights")
        loss = F.cross_entropy(F.linear(hidden, label_words).float(), labels[known].long(), weight=weights)
        return loss + F.cross_entropy(F.linear(hidden, colour_words).float(), colours[known].long())


class PlaceHead(nn.Module):
    """The auxiliary task: each name in a question or answer says, halfway up the decoder, in which rows and columns of
    patches the thing is, or that it is not there; and so does each letter that is spelled.

    So words learn early to look for what they stand for. Presence, places and counts are made of that, and reading on
    from a letter. Thrown away after training.
    """

    def __init__(self, width: int, grid: int, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.grid = grid
        self.rows = nn.Linear(width, 1 + grid)
        self.columns = nn.Linear(width, 1 + grid)
        self.register_buffer("label_of", _label_of_token(tokenizer), persistent=False)

    def forward(self, hidden: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of `hidden` [B, T, D] of the text rows `input_ids` [B, T], against what the patches show,
        `labels` [B, P]. Pictures of unknown truth (-1) do not count."""
        wanted = self.get_buffer("label_of")[input_ids]
        picture, row = ((wanted > 0) & (labels[:, :1] >= 0)).nonzero(as_tuple=True)
        if picture.numel() == 0:
            return hidden.sum() * 0
        shown = (labels[picture] == wanted[picture, row, None]).float().view(-1, self.grid, self.grid)
        missing = (shown.sum((1, 2)) == 0).float()[:, None]
        rows, columns = (torch.cat([missing, shown.sum(axis)], 1) for axis in (2, 1))
        names = hidden[picture, row]
        scored = ((self.rows(names).float(), rows), (self.columns(names).float(), columns))
        losses = [F.cross_entropy(scores, truth / truth.sum(1, keepdim=True)) for scores, truth in scored]
        return (losses[0] + losses[1]) / 2


def _label_of_token(tokenizer: Tokenizer) -> Tensor:
    """[vocab]: for each token that ends the name of one thing only, singular or plural, or spells one letter or digit,
    its label; else 0."""
    spellings = {name: (f" {name}", f" {plural}") for name, plural in PLURALS.items()} | {g: (g,) for g in GLYPHS}
    found: dict[int, set[int]] = {}
    for name, words in spellings.items():
        for word in words:
            found.setdefault(tokenizer.encode(word).ids[-1], set()).add(LABEL_IDS[name])
    labels = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.long)
    for token, candidates in found.items():
        labels[token] = candidates.pop() if len(candidates) == 1 else 0
    return labels


def _first_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> Tensor:
    return torch.tensor([tokenizer.encode(word).ids[0] for word in words])
