"""Output layers of language models: hidden states and the words that follow, in; a mean loss, out.

All are called with hidden (N, D) and targets (N,), and return the mean loss over the targets that
count (those other than -100) as a float32 scalar; 0 where none does. In training it is what the
layer learns from, in eval mode the exact loss over the whole vocabulary, so that its exponential is
the perplexity. Words are numbered by falling frequency: cutoffs and samples rest on that.

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
"""How many logits are made at a time where they come in chunks: 256 MiB in float32."""

_REMOVED = -1e30  # exp of it is 0; unlike -inf, it leaves no NaN where nothing else is there


class FullSoftmax(nn.Module):
    """A linear layer and the cross entropy over all words.

    Args: word_counts: (V,) of the training text; the bias starts at the log frequencies, else at 0
        (benchmarks/words.py tells why that matters with an adaptive optimizer). checkpoint_logits:
        also in training, make at most MAX_LOGITS logits at a time, and again in the backward pass,
        instead of keeping N x V of them.
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
    """Frequent words at full width, rarer ones in clusters of falling width; exact in training too.

    Source: Grave et al. 2017 (arXiv:1609.04309), as torch.nn.AdaptiveLogSoftmaxWithLoss has it.
    Differs: the head has a bias, which starts like FullSoftmax's; logarithms are taken in float32
        under autocast on any device; targets that do not count are left out.
    Cost: shapes depend on the targets, so the host waits for the device.
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
    """Train against a sample of words that all positions share; gradients are row-sparse.

    Source: Jean et al. 2015 (arXiv:1412.2007), section 3, with the words and the correction of
        Jozefowicz et al. 2016 (arXiv:1602.02410), section 3.1: word k is drawn with P(k) =
        (log(k+2) - log(k+1)) / log(V+1); from every logit goes the logarithm of how often its word
        is expected among the samples; samples that are a position's target are removed there.
    Differs: num_samples words are drawn independently, and each stands once however often it was
        drawn. So word k is there with probability Q(k) = 1 - (1 - P(k))^S, which is the correction,
        exactly; theirs draws until S are different, and takes Q from how often that was needed.
        Shapes are fixed: a repetition keeps its place, with a logit that counts as nothing. Of
        8,192 draws from 793,470 words some 4,600 are different.
    The sum of exp(logit) / Q over the samples has exactly the mean that it has over all words.
    The loss, a logarithm of it, is only right as S grows, and a target that is rare weighs
    exp(logit) / Q instead of exp(logit). That is meant: a rare word that is pushed up where it is
    the target is seldom there to be pushed down where it is not, and the weight makes up for it.
    In a toy of 1,000 words and one context, this one's optimum is at a divergence of 0.003 (S = 30)
    and 0.001 (300) from the truth; with targets uncorrected, whose gradient is nearer to the full
    softmax's for each target, at 3.2 and 0.58.
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
        """Return (num_samples,) words, ascending, with repetitions, from the device's generator."""
        # float32 has too few digits to reach every word of a million
        uniform = torch.rand(self.num_samples, dtype=torch.float64, device=device)
        words = (uniform * math.log(self.num_words + 1)).exp().long() - 1
        return words.clamp(0, self.num_words - 1).sort().values

    def log_expected_counts(self, words: Tensor) -> Tensor:
        """Return the logarithms of the probabilities that words are among the samples, float64."""
        probability = (words.double() + 1).reciprocal().log1p() / math.log(self.num_words + 1)
        return (-torch.expm1(self.num_samples * torch.log1p(-probability))).log()

    def loss(self, hidden: Tensor, targets: Tensor, samples: Tensor) -> Tensor:
        """Return the mean loss, given (num_samples,) words that are ascending."""
        is_counted = targets != NOT_COUNTED
        targets = torch.where(is_counted, targets, 0)
        words = torch.cat([targets, samples])  # one lookup of each table, one row-sparse gradient
        weights, biases = self.weight(words), self.bias(words)[:, 0]
        biases = _upcast(biases) - self.log_expected_counts(words).to(_upcast(biases).dtype)
        num = len(targets)
        true_logits = (_upcast(hidden) * weights[:num]).sum(1) + biases[:num]

        is_repeated = functional.pad(samples[1:] == samples[:-1], (1, 0))
        sample_biases = biases[num:].masked_fill(is_repeated, _REMOVED)
        logits = functional.linear(hidden, weights[num:]) + sample_biases
        places = torch.searchsorted(samples, targets).clamp(max=len(samples) - 1)
        is_hit = samples[places] == targets
        hits = torch.where(is_hit, _REMOVED, 0.0).to(logits.dtype)
        logits.scatter_add_(1, places.unsqueeze(1), hits.unsqueeze(1))
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

    Args: in_chunks: make at most MAX_LOGITS logits at a time (but those of one position), and none
        are kept for the backward pass, which makes them again.
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
        # nothing is drawn in it, so no generator has to be put back
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    return call


def _mean(total: Tensor, is_counted: Tensor) -> Tensor:
    return total / is_counted.sum().clamp(min=1)


def _rows_of(num_words: int) -> int:
    return max(1, MAX_LOGITS // num_words)


def _upcast(x: Tensor) -> Tensor:
    """Return float32, which autocast does not see to everywhere; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _to_weights(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].to(next(module.parameters()).dtype)


def _to_float32(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return _upcast(output)


def _log_frequencies(word_counts: Tensor | Sequence[int], num_words: int) -> Tensor:
    # as plain numbers, so that they may be real where a model is built of fake tensors
    plain = word_counts.tolist() if isinstance(word_counts, Tensor) else word_counts
    counts = torch.tensor(plain, dtype=torch.float64, device="cpu")
    if counts.shape != (num_words,):
        raise ValueError(
            f"word_counts has shape {tuple(counts.shape)}; allowed: ({num_words},), a count for "
            f"each word, as torch.bincount(text, minlength={num_words}) returns them"
        )
    counts = counts.clamp(min=1)  # a word that the text lacks is as rare as one seen once
    return (counts / counts.sum()).log()


def _start_bias(bias: Tensor, word_counts: Tensor | Sequence[int] | None, num_words: int) -> None:
    with torch.no_grad():
        if word_counts is None:
            bias.zero_()
        else:
            bias.copy_(_log_frequencies(word_counts, num_words).view(bias.shape))
