"""Row-sparse gradients of embedding and softmax: a step costs what the rows it touches cost.

List it after a model's file, and with an optimizer that takes row-sparse gradients.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.model.softmax = "sampled"
    run.model.num_samples = 1024
    run.model.sparse_embedding = True
