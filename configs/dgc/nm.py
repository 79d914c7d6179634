"""Short for no_masking.py."""

from configs.dgc.no_masking import configure

__all__ = ["configure"]
