"""What a forward pass makes, and what of it is still there when it has returned."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """Note the tensors that operations return; where kept, the graph holds them for backward."""

    def __init__(self):
        super().__init__()
        self._storages = {}
        self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                self._storages[StorageWeakRef(storage)] = storage.nbytes()
        return results

    def kept_bytes(self, *without):
        """Return the bytes that are still there, but for those of some tensors."""
        excluded = {StorageWeakRef(tensor.untyped_storage()) for tensor in without}
        there = [(s, n) for s, n in self._storages.items() if not s.expired()]
        return sum(num_bytes for storage, num_bytes in there if storage not in excluded)
