"""A model of masked words in the shape of BERT.

Shapes: B texts, T positions, D width, V words, M positions of a text that are predicted at most.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workloads.language_models import (
    check_heads,
    check_positions,
    initialise_transformer,
    run_layer,
)
from workloads.softmax import full_loss
from workloads.tasks import NOT_COUNTED


class MaskedLanguageModel(nn.Module):
    """Words, positions and types -> post-norm Transformer layers -> a head tied to the embedding.

    Source: Devlin et al. 2019 (arXiv:1810.04805). The defaults are BERT-Large, with 335,174,458
        parameters.
    Differs: there is no second task (which text follows), and so no pooler. Texts fill all T
        positions, so there is no padding to hide from the attention.
    Args:
        max_predictions: in training, the head computes logits only for so many positions of a text
            (in BERT's own code 20 of 128, 80 of 512): the first ones that are to be predicted.
            None, and always in eval mode: for all T.
        checkpoint_activations: keep only the inputs of each layer for backward, and recompute the
            rest, logits included.
    """

    def __init__(
        self,
        num_words: int = 30522,
        width: int = 1024,
        num_heads: int = 16,
        num_layers: int = 24,
        feedforward: int = 4096,
        max_positions: int = 512,
        num_types: int = 2,
        dropout: float = 0.1,
        max_predictions: int | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        check_heads(num_heads, width)
        if max_predictions is not None and max_predictions < 1:
            raise ValueError(
                f"max_predictions is {max_predictions}; allowed: 1 or more, or None for no limit"
            )
        self.max_predictions = max_predictions
        self.checkpoint_activations = checkpoint_activations
        self.embedding = nn.Embedding(num_words, width)
        self.positions = nn.Embedding(max_positions, width)
        self.types = nn.Embedding(num_types, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, feedforward, dropout, activation="gelu", layer_norm_eps=1e-12
            )
            for _ in range(num_layers)
        )
        self.transform = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12)
        )
        self.bias = nn.Parameter(torch.zeros(num_words))
        initialise_transformer(self)

    def forward(self, words: Tensor, targets: Tensor, types: Tensor | None = None) -> Tensor:
        """Return the mean loss over the targets other than -100.

        Args: words, targets: (B, T). types: (B, T), the number of the segment of its text that a
            position belongs to, below num_types; None: all 0.
        """
        check_positions(words.shape[1], self.positions)
        hidden = self.encode(words, types)
        if self.max_predictions is not None and self.training:
            hidden, targets = _to_predict(hidden, targets, self.max_predictions)
        hidden = self.transform(hidden.flatten(0, 1))
        in_chunks = self.checkpoint_activations or not self.training
        return full_loss(hidden, self.embedding.weight, self.bias, targets.flatten(), in_chunks)

    def encode(self, words: Tensor, types: Tensor | None = None) -> Tensor:
        """Return the last layer's outputs (B, T, D)."""
        positions = torch.arange(words.shape[1], device=words.device)
        types = torch.zeros_like(words) if types is None else types
        x = self.embedding(words) + self.positions(positions) + self.types(types)
        x = self.dropout(self.norm(x)).transpose(0, 1)
        recompute = self.checkpoint_activations and self.training
        for layer in self.layers:
            x = run_layer(layer, x, recompute=recompute)
        return x.transpose(0, 1)


def _to_predict(hidden: Tensor, targets: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return hidden (B, M, D) and targets (B, M) of the first M counted positions of each text.

    A text with fewer counted positions gets others, whose targets are -100.
    """
    is_counted = (targets != NOT_COUNTED).byte()
    positions = is_counted.sort(dim=1, descending=True, stable=True).indices[:, :num]
    index = positions.unsqueeze(2).expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index), targets.gather(1, positions)
