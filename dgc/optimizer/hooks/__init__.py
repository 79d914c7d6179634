"""How gradients come from autograd to the exchange, and what stands in `p.grad` afterwards."""
