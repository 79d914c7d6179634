"""Models of the next word: an LSTM and a Transformer, with any output layer of workloads.softmax.

Both are called with words (T, B), targets (T, B), which are the words that follow (-100: none is
to be predicted), and the state in which the batch before ended. They return the mean loss and the
state for the next batch, without gradient.

Shapes: T positions, B texts side by side, D width, V words, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from workloads.softmax import make_softmax

State = tuple[Tensor, Tensor] | None


def run_layer(layer: nn.Module, *inputs: object, recompute: bool) -> object:
    """Call a layer. With `recompute`, keep only its inputs, and call it again in backward.

    The second call draws the same random numbers, so that dropout repeats.
    """
    if not recompute or not torch.is_grad_enabled():
        return layer(*inputs)
    return checkpoint(layer, *inputs, use_reentrant=False)


class LSTMLanguageModel(nn.Module):
    """Words -> embedding -> LSTM -> softmax.

    Source: Spring et al. 2019, section 5; with projection_dim and a sampled softmax, the models of
        Jozefowicz et al. 2016 (arXiv:1602.02410).
    Differs: weights of embedding and softmax start uniform in +-0.1; given word_counts, the
        softmax's bias starts at the log frequencies (benchmarks/words.py says why). Each layer is
        an nn.LSTM of its own, not one nn.LSTM with num_layers: cuDNN draws the dropout between its
        layers from a state that no checkpoint contains and no recomputation repeats.
    Args:
        projection_dim: width of a layer's output; None: hidden_dim.
        word_counts: (V,), of the training text.
        checkpoint_activations: keep only the inputs of each layer for backward, and recompute the
            rest.
    """

    def __init__(
        self,
        num_words: int,
        embedding_dim: int = 672,
        hidden_dim: int = 672,
        num_layers: int = 2,
        projection_dim: int | None = None,
        dropout: float = 0.5,
        softmax: str = "full",
        num_samples: int = 8192,
        cutoffs: Sequence[int] = (),
        sparse_embedding: bool = False,
        checkpoint_activations: bool = False,
        word_counts: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if projection_dim is not None and not 0 < projection_dim < hidden_dim:
            raise ValueError(
                f"projection_dim is {projection_dim}; allowed: 1 to {hidden_dim - 1}, less than "
                f"hidden_dim. Leave it at None to hand on all of it"
            )
        self.checkpoint_activations = checkpoint_activations
        self.embedding = nn.Embedding(num_words, embedding_dim, sparse=sparse_embedding)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.dropout = nn.Dropout(dropout)
        width = projection_dim or hidden_dim
        self.layers = nn.ModuleList(
            nn.LSTM(width if i else embedding_dim, hidden_dim, proj_size=projection_dim or 0)
            for i in range(num_layers)
        )
        self.softmax = make_softmax(
            softmax, width, num_words, num_samples=num_samples, cutoffs=cutoffs,
            word_counts=word_counts, checkpoint_logits=checkpoint_activations,
        )  # fmt: skip

    def forward(
        self, words: Tensor, targets: Tensor, state: State = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the mean loss, and the state (h (L, B, width), c (L, B, hidden_dim))."""
        x, states = self.dropout(self.embedding(words)), []
        for i, layer in enumerate(self.layers):
            before = None if state is None else (state[0][i : i + 1], state[1][i : i + 1])
            with _autocast_where_lstms_can(x):
                x, after = run_layer(layer, x, before, recompute=self._recomputes)
            x = self.dropout(x)
            states.append([tensor.detach() for tensor in after])
        h, c = (torch.cat(tensors) for tensors in zip(*states, strict=True))
        return self.softmax(x.flatten(0, 1), targets.flatten()), (h, c)

    @property
    def _recomputes(self) -> bool:
        return self.checkpoint_activations and self.training


def _autocast_where_lstms_can(x: Tensor) -> AbstractContextManager[None]:
    """Return a context without autocast if oneDNN has no LSTM of autocast's dtype here."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    if _has_lstm(torch.get_autocast_dtype("cpu")):
        return nullcontext()
    return torch.autocast("cpu", enabled=False)


@functools.cache
def _has_lstm(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN can train an LSTM of this dtype on this processor, by trying it.

    It has none for float16, and one for bfloat16 only on processors with AVX-512.
    """
    with _disable_current_modes(), torch.enable_grad(), torch.autocast("cpu", dtype):
        shapes = [*[(1, 1, 8)] * 3, *[(32, 8)] * 2, *[(32,)] * 2]
        zeros = [torch.zeros(shape, device="cpu", requires_grad=True) for shape in shapes]
        x, h, c, *weights = zeros
        try:
            torch.lstm(x, (h, c), weights, True, 1, 0.0, True, False, False)
        except RuntimeError:
            return False
    return True


class TransformerLanguageModel(nn.Module):
    """Words and learned positions -> pre-norm Transformer layers -> norm -> softmax.

    Source: Radford et al. 2019 (GPT-2): a norm before the attention and the feed-forward part of
        each layer and one after the last layer; GELU; weights from a normal distribution of
        deviation 0.02, which is divided by sqrt(2 L) for the last linear layer of each part.
    Differs: the softmax is any of workloads.softmax, and is not tied to the embedding.
    Args: checkpoint_activations: see LSTMLanguageModel.
    """

    def __init__(
        self,
        num_words: int,
        width: int = 512,
        num_heads: int = 8,
        num_layers: int = 6,
        feedforward: int = 2048,
        dropout: float = 0.1,
        max_positions: int = 512,
        softmax: str = "full",
        num_samples: int = 8192,
        cutoffs: Sequence[int] = (),
        sparse_embedding: bool = False,
        checkpoint_activations: bool = False,
        word_counts: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_heads(num_heads, width)
        self.checkpoint_activations = checkpoint_activations
        self.embedding = nn.Embedding(num_words, width, sparse=sparse_embedding)
        self.positions = nn.Embedding(max_positions, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, feedforward, dropout, activation="gelu", norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self._initialise()
        self.softmax = make_softmax(
            softmax, width, num_words, num_samples=num_samples, cutoffs=cutoffs,
            word_counts=word_counts, checkpoint_logits=checkpoint_activations,
        )  # fmt: skip

    def _initialise(self) -> None:
        initialise_transformer(self)
        with torch.no_grad():
            for layer in self.layers:
                for last in (layer.self_attn.out_proj, layer.linear2):
                    last.weight.div_((2 * len(self.layers)) ** 0.5)

    def forward(self, words: Tensor, targets: Tensor, state: None = None) -> tuple[Tensor, None]:
        """Return the mean loss, and None: there is no state for the next batch."""
        num_positions = len(words)
        check_positions(num_positions, self.positions)
        positions = torch.arange(num_positions, device=words.device).unsqueeze(1)
        x = self.dropout(self.embedding(words) + self.positions(positions))
        mask = nn.Transformer.generate_square_subsequent_mask(
            num_positions, device=x.device, dtype=x.dtype
        )
        recompute = self.checkpoint_activations and self.training
        for layer in self.layers:
            x = run_layer(layer, x, mask, None, True, recompute=recompute)
        return self.softmax(self.norm(x).flatten(0, 1), targets.flatten()), None


def check_heads(num_heads: int, width: int) -> None:
    if width % num_heads:
        raise ValueError(
            f"num_heads is {num_heads} for a width of {width}; allowed: divisors of the width"
        )


def check_positions(num_positions: int, table: nn.Embedding) -> None:
    if num_positions > table.num_embeddings:
        raise ValueError(
            f"a text has {num_positions} positions; allowed: at most {table.num_embeddings}. Cut "
            f"texts shorter, or set max_positions"
        )


def initialise_transformer(model: nn.Module) -> None:
    """Draw weights from a normal distribution of deviation 0.02, set biases to 0 and norms to 1."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=0.02)
            nn.init.zeros_(module.in_proj_bias)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
