"""The count-sketch paper's network: 2-layer LSTM, 672 wide, full softmax of 33,278 words."""

import fiddle as fdl

from configs.schema import Run
from workloads.language_models import LSTMLanguageModel


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(
        LSTMLanguageModel, embedding_dim=672, hidden_dim=672, num_layers=2, dropout=0.5
    )
