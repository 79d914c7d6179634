"""Which tensors the exchange lays out in buckets, in which order, and at which density."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from dgc.compression import Compression
from dgc.exchange.exchange import Exchange
from dgc.optimizer.setup.checks import check_row_sparse
from dgc.worker.elements import TensorSpec, element_dtype, num_elements


class Layout:
    """The parameters of one exchange as all ranks know them.

    order: names, as gradients come; empty until that is known, and then taken to be the reverse of
    the parameters'. row_sparse: names of the tensors that travel as rows.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        row_sparse: Collection[str],
        exchange: Exchange,
        bucket_bytes: int | None,
        density: float,
    ) -> None:
        self._named, self._exchange, self._bucket_bytes = named, exchange, bucket_bytes
        self.row_sparse = check_row_sparse(row_sparse, named)
        self.order: list[str] = []
        self.set_density(density)

    @property
    def rows(self) -> list[Tensor]:
        return [self._named[name] for name in sorted(self.row_sparse)]

    def set_density(self, density: float) -> None:
        """Lay out buckets for a density. Between steps only."""
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}; allowed: above 0 and at most 1")
        self._exchange.lay_out(self._specs(), density, self._bucket_bytes)
        self.density, self._is_old = density, False

    def learn(self, order: Sequence[str]) -> None:
        """Know the order of gradients, within a step, for the steps that follow."""
        self.order, self._is_old = list(order), True

    def refresh(self) -> None:
        """Lay out buckets as it has been learnt. Between steps only."""
        if self._is_old:
            self.set_density(self.density)

    def take_as_rows(self, names: Collection[str]) -> None:
        """Let more tensors travel as rows from this step on; see Exchange.take_as_rows."""
        self.row_sparse |= check_row_sparse(names, self._named)
        self._exchange.take_as_rows([spec for spec in self._specs() if spec.name in names])

    def _specs(self) -> list[TensorSpec]:
        compression, route = self._exchange.kept.compression, self._exchange.route
        return make_specs(self._named, compression, self.row_sparse, route.slice_numel, self.order)


def row_sparse_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradients will be sparse tensors."""
    found: dict[int, bool] = {}
    for module in model.modules():
        is_sparse = getattr(module, "sparse", False) is True
        # A weight that is tied to a dense layer has a dense gradient.
        for parameter in module.parameters(recurse=False):
            found[id(parameter)] = found.get(id(parameter), True) and is_sparse
    return [n for n, p in model.named_parameters() if found.get(id(p)) and p.requires_grad]


def make_specs(
    named: Mapping[str, Tensor],
    compression: Compression,
    row_sparse: Collection[str],
    slice_numel: Callable[[int], int],
    order: Iterable[str] = (),
) -> list[TensorSpec]:
    """Describe the tensors in the order in which backward finishes them.

    order: names, as far as that is known. Of others it is taken to be that of `named`, reversed.
    """
    known = {name: None for name in order if name in named}
    names = [*known, *(name for name in reversed(named) if name not in known)]
    return [
        TensorSpec(
            name,
            slice_numel(num_elements(p)),
            p.device,
            compression.is_compressible(p) and name not in row_sparse,
            num_elements(p),
            num_elements(p[0]) if name in row_sparse else 0,
            element_dtype(p),
        )
        for name, p in ((name, named[name]) for name in names)
    ]
