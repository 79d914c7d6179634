"""The method that this project recommends: sends 1/1000 of the gradient, keeps 2 bytes a parameter.

Entries leave a residual in bfloat16, divided by factored second moments of this worker's gradients,
which are averaged over workers now and then. An entry travels in 20 bits. lr is what is best for
dense Adam; what is sent sparsely has four times that.
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
