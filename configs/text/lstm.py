"""A 2-layer LSTM, 256 wide, with a full softmax."""

import fiddle as fdl

from configs.schema import Run
from workloads.language_models import LSTMLanguageModel


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(LSTMLanguageModel, embedding_dim=256, hidden_dim=256, dropout=0.2)
