"""Output layers of language models: they turn hidden states and targets into a mean loss.

All are called with hidden (N, D) and targets (N,), and return the mean loss over the targets other
than -100 as a float32 scalar (0 if there are none). In training that is the loss to learn from,
which SampledSoftmax approximates; in eval mode it is the exact loss over the whole vocabulary, so
that its exponential is the perplexity. Cutoffs and samples assume that words are numbered by
falling frequency.

Shapes: N positions, D width, V words, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from workloads.tasks import NOT_COUNTED

MAX_LOGITS = 2**26
"""The most logits that are made at a time where they are made in chunks: 256 MiB in float32."""

_REMOVED = -1e30  # exp(-1e30) is 0; -inf would give NaN where all samples are removed


class FullSoftmax(nn.Module):
    """A linear layer and the cross entropy over all words.

    Args:
        word_counts: (V,), of the training text: the bias starts at the log frequencies.
            None: at 0. benchmarks/words.py says why that matters with an adaptive optimizer.
        checkpoint_logits: in training, too, make at most MAX_LOGITS logits at a time, and make
            them again in backward instead of keeping N x V of them.
    """

    def __init__(
        self,
        width: int,
        num_words: int,
        word_counts: Tensor | Sequence[int] | None = None,
        checkpoint_logits: bool = False,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_words)
        self.checkpoint_logits = checkpoint_logits
        nn.init.uniform_(self.linear.weight, -0.1, 0.1)
        _start_bias(self.linear.bias, word_counts, num_words)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        in_chunks = self.checkpoint_logits or not self.training
        return full_loss(hidden, self.linear.weight, self.linear.bias, targets, in_chunks)


class AdaptiveSoftmax(nn.Module):
    """Frequent words have full width, rarer ones are in clusters of smaller and smaller width.

    Its loss is exact in training too.
    Source: Grave et al. 2017 (arXiv:1609.04309), as torch.nn.AdaptiveLogSoftmaxWithLoss.
    Differs: the head has a bias, which starts like FullSoftmax's; under autocast, logarithms are
        taken in float32 on any device; targets of -100 are left out.
    Cost: shapes depend on the targets, so that the host waits for the device.
    """

    def __init__(
        self,
        width: int,
        num_words: int,
        cutoffs: Sequence[int],
        div_value: float = 4.0,
        word_counts: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        bounds = [0, *cutoffs, num_words]
        if not cutoffs or any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(
                f"cutoffs are {tuple(cutoffs)} for {num_words} words; allowed: at least one, "
                f"rising, from 1 to {num_words - 1}. Put the first where most of the text is "
                f"covered, such as at a tenth of the words"
            )
        narrowest = int(width // div_value ** len(cutoffs))
        if narrowest < 1:
            raise ValueError(
                f"with {len(cutoffs)} cutoffs the last cluster's width is {width} / {div_value}^"
                f"{len(cutoffs)}, less than 1; give fewer cutoffs, or a smaller div_value"
            )
        self.layer = nn.AdaptiveLogSoftmaxWithLoss(width, num_words, cutoffs, div_value, True)
        for linear in (self.layer.head, *self.layer.tail):
            linear.register_forward_pre_hook(_to_weights)
            linear.register_forward_hook(_to_float32)
        if word_counts is not None:
            logs = _log_frequencies(word_counts, num_words)
            clusters = [part.logsumexp(0) for part in logs.tensor_split([*cutoffs])[1:]]
            self.layer.head.bias.data.copy_(torch.cat([logs[: cutoffs[0]], torch.stack(clusters)]))

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        is_counted = targets != NOT_COUNTED
        hidden, targets = _upcast(hidden[is_counted]), targets[is_counted]
        if self.training or not len(targets):
            total = self.layer(hidden, targets).output.sum()
        else:
            rows = _rows_of(self.layer.n_classes)
            chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
            total = torch.stack([self.layer(*chunk).output.sum() for chunk in chunks]).sum()
        return -total / max(len(targets), 1)


class SampledSoftmax(nn.Module):
    """Trains against a sample of words, the same for all positions; gradients are row-sparse.

    Source: Jean et al. 2015 (arXiv:1412.2007), section 3, with the distribution and the correction
        of Jozefowicz et al. 2016 (arXiv:1602.02410), section 3.1. Word k is drawn with P(k) =
        (log(k+2) - log(k+1)) / log(V+1). From each logit is subtracted the logarithm of how often
        its word is expected among the samples. Where a sample is the position's own target, it is
        removed.
    Differs: num_samples words are drawn independently, and a word that is drawn several times
        counts once. So word k is among the samples with probability Q(k) = 1 - (1 - P(k))^S, and
        the correction is exactly log Q(k). Theirs draws until S words are different, and estimates
        Q from the number of draws. To keep shapes fixed, a repeated word stays in the list, with a
        logit whose exponential is 0. Of 8,192 draws from 793,470 words about 4,600 are different.
    Why targets are corrected too: the sum of exp(logit) / Q over the samples has, on average,
        exactly the value of the sum of exp(logit) over all words; the loss, its logarithm, becomes
        right only as S grows. A rare target weighs exp(logit) / Q instead of exp(logit). That is
        wanted: a rare word is pushed up where it is the target, but is seldom among the samples to
        be pushed down where it is not, and the weight makes up for this. In a toy with 1,000 words
        and one context, the optimum of this loss has a divergence from the truth of 0.003 (S = 30)
        and 0.001 (S = 300). Without the correction of targets the gradient of each single target
        is nearer to that of the full softmax, but the optimum is at 3.2 and 0.58.
    """

    def __init__(
        self,
        width: int,
        num_words: int,
        num_samples: int = 8192,
        word_counts: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(
                f"num_samples is {num_samples}; allowed: 1 or more. A hundredth of the words is "
                f"usual; for all of them, take the full softmax"
            )
        self.num_words, self.num_samples = num_words, num_samples
        self.weight = nn.Embedding(num_words, width, sparse=True)
        self.bias = nn.Embedding(num_words, 1, sparse=True)
        nn.init.uniform_(self.weight.weight, -0.1, 0.1)
        _start_bias(self.bias.weight, word_counts, num_words)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if not self.training:
            return full_loss(hidden, self.weight.weight, self.bias.weight[:, 0], targets, True)
        return self.loss(hidden, targets, self.draw(hidden.device))

    def draw(self, device: torch.device) -> Tensor:
        """Draw (num_samples,) words, ascending, possibly repeated, by the device's generator."""
        # in float32 not every one of a million words could be drawn
        uniform = torch.rand(self.num_samples, dtype=torch.float64, device=device)
        words = (uniform * math.log(self.num_words + 1)).exp().long() - 1
        return words.clamp(0, self.num_words - 1).sort().values

    def log_expected_counts(self, words: Tensor) -> Tensor:
        """Return log Q of words, float64: how probable it is that they are among the samples."""
        probability = (words.double() + 1).reciprocal().log1p() / math.log(self.num_words + 1)
        return (-torch.expm1(self.num_samples * torch.log1p(-probability))).log()

    def loss(self, hidden: Tensor, targets: Tensor, samples: Tensor) -> Tensor:
        """Return the mean loss, given the samples, (num_samples,) words that are ascending."""
        is_counted = targets != NOT_COUNTED
        targets = torch.where(is_counted, targets, 0)
        words = torch.cat([targets, samples])  # looked up at once: one gradient for each table
        weights, biases = self.weight(words), self.bias(words)[:, 0]
        biases = _upcast(biases) - self.log_expected_counts(words).to(_upcast(biases).dtype)
        num = len(targets)
        true_logits = (_upcast(hidden) * weights[:num]).sum(1) + biases[:num]

        is_repeated = functional.pad(samples[1:] == samples[:-1], (1, 0))
        sample_biases = biases[num:].masked_fill(is_repeated, _REMOVED)
        logits = functional.linear(hidden, weights[num:]) + sample_biases
        columns = torch.searchsorted(samples, targets).clamp(max=len(samples) - 1)
        is_hit = samples[columns] == targets  # a position's target is among the samples
        hits = torch.where(is_hit, _REMOVED, 0.0).to(logits.dtype)
        logits.scatter_add_(1, columns.unsqueeze(1), hits.unsqueeze(1))
        # -log(exp(true) / (exp(true) + sum exp(logits)))
        losses = functional.softplus(logits.logsumexp(1) - true_logits)
        return _mean(torch.where(is_counted, losses, 0.0).sum(), is_counted)


def make_softmax(
    kind: str,
    width: int,
    num_words: int,
    *,
    num_samples: int = 8192,
    cutoffs: Sequence[int] = (),
    word_counts: Tensor | Sequence[int] | None = None,
    checkpoint_logits: bool = False,
) -> nn.Module:
    """Return an output layer by name: "full", "adaptive" (takes cutoffs) or "sampled"."""
    if kind == "full":
        return FullSoftmax(width, num_words, word_counts, checkpoint_logits)
    if kind == "adaptive":
        return AdaptiveSoftmax(width, num_words, cutoffs, word_counts=word_counts)
    if kind == "sampled":
        return SampledSoftmax(width, num_words, num_samples, word_counts)
    raise ValueError(f"softmax is {kind!r}; allowed: 'full', 'adaptive', 'sampled'")


def full_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, in_chunks: bool
) -> Tensor:
    """Return the mean cross entropy of hidden @ weight.T + bias, in float32.

    Args: in_chunks: make at most MAX_LOGITS logits at a time, but at least those of one position;
        keep none of them for backward, which makes them again.
    """
    rows = _rows_of(len(weight)) if in_chunks else max(len(hidden), 1)
    total = _loss_sum if not in_chunks else _recomputed(_loss_sum)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    totals = [total(part, weight, bias, wanted) for part, wanted in chunks]
    return _mean(torch.stack(totals).sum(), targets != NOT_COUNTED)


def _loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    logits = _upcast(functional.linear(hidden, weight, bias))
    return functional.cross_entropy(logits, targets, ignore_index=NOT_COUNTED, reduction="sum")


def _recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments)
        # the function draws no random numbers, so checkpoint need not restore generators
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    return call


def _mean(total: Tensor, is_counted: Tensor) -> Tensor:
    return total / is_counted.sum().clamp(min=1)


def _rows_of(num_words: int) -> int:
    return max(1, MAX_LOGITS // num_words)


def _upcast(x: Tensor) -> Tensor:
    """Return x in float32, or float64 if it is that; autocast does not do so for all operations."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _to_weights(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].to(next(module.parameters()).dtype)


def _to_float32(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return _upcast(output)


def _log_frequencies(word_counts: Tensor | Sequence[int], num_words: int) -> Tensor:
    # by plain numbers, so that real counts work in a model of fake tensors
    plain = word_counts.tolist() if isinstance(word_counts, Tensor) else word_counts
    counts = torch.tensor(plain, dtype=torch.float64, device="cpu")
    if counts.shape != (num_words,):
        raise ValueError(
            f"word_counts has shape {tuple(counts.shape)}; allowed: ({num_words},), a count for "
            f"each word, as torch.bincount(text, minlength={num_words}) returns them"
        )
    counts = counts.clamp(min=1)  # a word that the text does not have counts as seen once
    return (counts / counts.sum()).log()


def _start_bias(bias: Tensor, word_counts: Tensor | Sequence[int] | None, num_words: int) -> None:
    with torch.no_grad():
        if word_counts is None:
            bias.zero_()
        else:
            bias.copy_(_log_frequencies(word_counts, num_words).view(bias.shape))
