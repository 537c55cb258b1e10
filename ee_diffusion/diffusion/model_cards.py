"""Model cards of exits that are saved: a folder with weights, config and card is what the Hub wants. Not here: the exits."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

_CARD = """---
library_name: diffusers
tags: [early-exit, ee-diffusion]
---

# Exits for a {made_for}

Early exits after {depths} blocks ({facts}, {size} parameters), for `ee_diffusion`:

```python
from ee_diffusion import {kind}, attach_exits, exit_summary, methods

exits = {kind}.from_pretrained("PATH")
attach_exits(pipe, exits, methods.deediff(THRESHOLD))  # pipe: a diffusers pipeline with a {made_for}
image = pipe(...)
print(exit_summary(pipe))
```
"""


def card_of(exits: nn.Module, *, made_for: str, facts: str) -> str:
    """The text of a README.md: `made_for` names the transformer, `facts` what the exits are."""
    depths, size = ", ".join(map(str, exits.depths)), sum(parameter.numel() for parameter in exits.parameters())
    return _CARD.format(kind=type(exits).__name__, made_for=made_for, depths=depths, facts=facts, size=size)


def write_card(folder: str | os.PathLike, text: str) -> None:
    """Put the card into a folder that has none yet."""
    card = Path(folder) / "README.md"
    if not card.exists():
        card.write_text(text)
