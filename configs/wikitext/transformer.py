"""WikiText-103: a causal Transformer and an adaptive softmax over 267,735 words.

Texts of 256 words, 16 a rank; the 20,000 most frequent words are in the head.
"""

import fiddle as fdl

from configs.schema import Run
from workloads.language_models import TransformerLanguageModel


def configure(run: fdl.Config[Run]) -> None:
    run.dataset.root = "data/wikitext-103"
    run.dataset.name = "wikitext-103"
    run.dataset.bptt = 256
    run.model = fdl.Partial(
        TransformerLanguageModel,
        width=512,
        num_heads=8,
        num_layers=6,
        feedforward=2048,
        max_positions=256,
        softmax="adaptive",
        cutoffs=(20_000, 60_000),
    )
    run.train.num_epochs = 20
    run.train.batch_size_per_rank = 16
    run.train.optimizer.lr = 2.5e-4
    run.train.clip_norm = 0.25
