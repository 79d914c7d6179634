"""LSTM-2048-512 (Jozefowicz et al. 2016) with a sampled softmax and row-sparse gradients.

Spring et al. 2019 compress the embedding and softmax of an LSTM of 2048 units: test perplexity
39.90 with Adam, 40.55 with both moments in sketches (CS-MV), 39.88 with only the second (CS-V).
Samples are drawn independently: among 8,192 are some 4,600 different words.
"""

import fiddle as fdl

from configs.schema import Run
from workloads.language_models import LSTMLanguageModel


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(
        LSTMLanguageModel,
        embedding_dim=512,
        hidden_dim=2048,
        num_layers=1,
        projection_dim=512,
        dropout=0.1,
        softmax="sampled",
        num_samples=8192,
        sparse_embedding=True,
    )
