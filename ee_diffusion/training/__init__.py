"""The one training loop: atomic checkpoints, exact resume, EMA, data in a pure order, draws keyed by sample.

Imports core, accelerate, datasets, PIL and, of diffusers, only `EMAModel` and `get_scheduler` (a maintained library instead of our own
code). Knows no model of ours: it trains one `nn.Module`, the objective.
"""
