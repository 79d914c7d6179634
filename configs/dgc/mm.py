"""Short for mask_velocity.py."""

from configs.dgc.mask_velocity import configure

__all__ = ["configure"]
