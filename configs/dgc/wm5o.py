"""Short for warmup_5_epochs_dense.py."""

from configs.dgc.warmup_5_epochs_dense import configure

__all__ = ["configure"]
