"""What a worker has not sent yet: velocity and residual, one pair a tensor, never shared.

Owns: momentum correction, momentum factor masking, the bookkeeping of what was sent. The state is
per rank and stays out of `optimizer.state`, which Horovod would overwrite with rank 0's.
Source: Lin et al. 2018 (arXiv:1712.01887), momentum correction and momentum factor masking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Compensation:
    """The worker's velocities and residuals, flat float32, by tensor name.

    With momentum m:  u <- m u + g,  v <- v + u;  Nesterov:  u <- m (u + g),  v <- v + u + g.
    Without (m = 0) there is no velocity:  v <- v + g.
    A tensor that is always sent whole needs no residual, and has none.
    """

    momentum: float = 0.0
    nesterov: bool = False
    mask_velocity: bool = True
    velocity: dict[str, Tensor] = field(default_factory=dict)
    residual: dict[str, Tensor] = field(default_factory=dict)

    def accumulate(self, name: str, grad_N: Tensor) -> Tensor:
        """Add a step's gradient and return the residual (N,), from which entries are chosen."""
        delta_N = self._correct(name, grad_N)
        residual_N = self.residual.get(name)
        if residual_N is None:
            residual_N = self.residual[name] = torch.zeros_like(grad_N, dtype=torch.float32)
        return residual_N.add_(delta_N)

    def drain(self, name: str, grad_N: Tensor) -> Tensor:
        """Add a step's gradient and return all there is to send, leaving no residual.

        The velocity goes on unmasked: averaged over ranks, this is momentum SGD to the letter.
        The result may be the velocity itself: read it, do not write it.
        """
        delta_N = self._correct(name, grad_N)
        residual_N = self.residual.pop(name, None)
        return delta_N if residual_N is None else residual_N.add_(delta_N)

    def remove_sent(self, name: str, indices_K: Tensor, sent_K: Tensor) -> None:
        """Take what the receivers will decode out of the residual; what coding lost stays in."""
        self.residual[name][indices_K] -= sent_K
        if self.mask_velocity and name in self.velocity:
            self.velocity[name][indices_K] = 0

    def _correct(self, name: str, grad_N: Tensor) -> Tensor:
        """Return what this step adds to the residual: u, u + g (Nesterov), or g."""
        if self.momentum == 0:
            return grad_N
        velocity_N = self.velocity.get(name)
        if velocity_N is None:
            velocity_N = self.velocity[name] = torch.zeros_like(grad_N, dtype=torch.float32)
        if self.nesterov:
            velocity_N.add_(grad_N).mul_(self.momentum)
            return velocity_N + grad_N
        return velocity_N.mul_(self.momentum).add_(grad_N)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors only; this rank's, not the replica's."""
        return {"velocity": dict(self.velocity), "residual": dict(self.residual)}

    def load_state_dict(
        self, state: dict[str, dict[str, Tensor]], devices: Mapping[str, torch.device]
    ) -> None:
        """Take copies of what was saved, each on the device of its tensor."""
        for kind, mine in (("velocity", self.velocity), ("residual", self.residual)):
            mine.clear()
            for name, tensor in state[kind].items():
                mine[name] = tensor.to(devices[name], copy=True)
