"""BERT-Large's shape: 24 layers of 1024, 335,174,458 parameters."""

import fiddle as fdl

from configs.schema import Run
from workloads.masked_language_model import MaskedLanguageModel


def configure(run: fdl.Config[Run]) -> None:
    run.model = fdl.Partial(
        MaskedLanguageModel, width=1024, num_heads=16, num_layers=24, feedforward=4096
    )
