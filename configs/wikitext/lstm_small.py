"""The same network for two cores: 128 wide, the 8,000 most frequent words, minutes an epoch."""

import fiddle as fdl

from configs.schema import Run
from workloads.language_models import LSTMLanguageModel


def configure(run: fdl.Config[Run]) -> None:
    run.dataset.max_words = 8000
    run.model = fdl.Partial(
        LSTMLanguageModel, embedding_dim=128, hidden_dim=128, num_layers=2, dropout=0.2
    )
    run.train.num_epochs = 6
    run.train.optimizer.lr = 5e-3
