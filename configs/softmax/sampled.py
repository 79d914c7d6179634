"""A sampled softmax: embedding and softmax have row-sparse gradients, and a step touches few rows.

List it after a model's file, and with an optimizer that takes row-sparse gradients.
"""

import fiddle as fdl

from configs.schema import Run


def configure(run: fdl.Config[Run]) -> None:
    run.model.softmax = "sampled"
    run.model.num_samples = 1024
    run.model.sparse_embedding = True
