import torch, optim, statistics
from torch.profiler import profile, ProfilerActivity
from collections import defaultdict
from parsimony_kernels.buffers import ops as b
from parsimony_kernels.buffers.operands import *
dev = torch.device('cuda')
def times(f, n=12):
    for _ in range(4): f()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(n): f()
        torch.cuda.synchronize()
    d = defaultdict(list)
    for e in p.events():
        if e.device_type.name == 'CUDA' or str(e.device_type).endswith('CUDA'): d[e.name].append(e.device_time if hasattr(e,'device_time') else e.cuda_time)
    return {k[:50]: round(min(v)/1e3, 4) for k, v in d.items() if 'Memcpy HtoD' not in k}
N = 8192
a, c = torch.randn(N*N, device=dev), torch.empty(N*N, device=dev)
print('copy', times(lambda: c.copy_(a)))
del a, c
for name, make in {'SM3': lambda p: optim.SM3(p, lr=0.1, momentum=0.0), 'SM3 momentum': lambda p: optim.SM3(p, lr=0.1, momentum=0.9), 'Factored': lambda p: optim.FactoredAdam(p, betas=(0.0, 0.999)), 'Factored m': lambda p: optim.FactoredAdam(p), 'full': lambda p: optim.Adam(p), 'fused': lambda p: torch.optim.Adam(p, fused=True), 'SM3 bf16': lambda p: optim.SM3(p, lr=0.1, momentum=0.0), 'Factored bf16': lambda p: optim.FactoredAdam(p, betas=(0.0, 0.999))}.items():
    p = torch.nn.Parameter(torch.randn(N, N, device=dev, dtype=torch.bfloat16 if 'bf16' in name else torch.float32)); p.grad = torch.randn_like(p)
    o = make([p]); print(name, times(o.step)); del p, o
n = N*N
for dt in ('float32', 'bfloat16', 'int8'):
    for vel in (False, True):
        g = 1e-3*torch.randn(n, device=dev); r = b.empty(n, dt, dev); u = b.empty(n, dt, dev) if vel else None
        b.accumulate(torch.randn(n, device=dev).clamp_(-3.2, 3.2), Correction(), residual=r, old_residual=None)
        if vel: b.accumulate(g, Correction(), residual=u, old_residual=None)
        sel = Selection(3.29, n//100, sample_every=64)
        print('accumulate', dt, 'velocity' if vel else '', times(lambda: b.accumulate(g, Correction(0.9,1,1,0) if vel else Correction(), residual=r, old_residual=r, velocity=u, old_velocity=u, selection=sel)))
g, r, u, w = (1e-3*torch.randn(n, device=dev) for _ in range(4))
print('lagging', times(lambda: b.accumulate_lagging(g, 0.9, Selection(3.29, n//100, sample_every=64), residual=r, velocity=w, old_velocity=u, is_lagging=True)))
