"""The method that this project recommends: sends 1/1000 of the gradient, keeps 2 bytes a parameter.

Each worker accumulates its gradients in a bfloat16 residual. Entries that leave it are divided by
the root of the worker's second moment, which is kept as row and column means and now and then
averaged over workers. An entry is sent in 20 bits. lr is the best rate of dense Adam; entries that
are sent sparsely have four times that rate.
"""

import fiddle as fdl

from configs.schema import Run
from dgc import Compression
from optim import FactoredAdam


def configure(run: fdl.Config[Run]) -> None:
    run.train.optimizer = fdl.Partial(
        FactoredAdam, lr=1e-3, betas=(0.0, 0.999), decoupled_weight_decay=True
    )
    if run.dgc is None:
        run.dgc = fdl.Config(Compression, density=0.001)
    run.dgc.residual_dtype = "bfloat16"
    if "value_dtype" not in run.dgc.__arguments__:  # configs/dgc/fp16.py may have come first
        run.dgc.value_dtype = "mxfp8"
    if "index_coding" not in run.dgc.__arguments__:
        run.dgc.index_coding = "elias_fano"
    run.dgc.update_scale = 4.0
    run.dgc.share_statistics = 0.5
    run.dgc.clip_scope = "tensor"
