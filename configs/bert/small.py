"""The same network small enough for two cores: 2 layers of 128, WikiText-2, 8,000 words."""

import fiddle as fdl

from configs.schema import Run
from workloads.masked_language_model import MaskedLanguageModel


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(
        MaskedLanguageModel, width=128, num_heads=2, num_layers=2, feedforward=512
    )
    run.dataset.root = "data/wikitext-2"
    run.dataset.name = "wikitext-2"
    run.dataset.max_words = 8000
    run.train.num_epochs = 4
    run.train.optimizer.lr = 1e-3
