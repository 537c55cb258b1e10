"""What follows the rows of a batch, told by lengths at two numbers of rows."""

from __future__ import annotations

import math

import torch

from ee_diffusion.core.rows import FEWER, ROWS, alike, apart, following, lengths_of


def test_lengths_are_found_inside_of_tuples_lists_and_dicts():
    given = {
        "time": torch.zeros(6, 2),
        "rotary": (torch.zeros(4), [torch.zeros(6)], None),
        "more": {"mask": torch.zeros(3)},
    }
    found = dict(lengths_of(given | {"scale": 2.0, "empty": torch.tensor(1.0)}))
    assert found == {"time": 6, "rotary.len": 3, "rotary.0": 4, "rotary.1.len": 1, "rotary.1.0": 6, "more.mask": 3}


def test_what_follows_is_the_same_multiple_of_the_rows():
    many, few = len(ROWS), len(FEWER)
    lengths = {"row": (many, few), "branches": (2 * many, 2 * few), "tokens": (many, many), "others": (2 * many, few)}
    lengths |= {"one more": (many + 1, few + 1), "a rest": (many + 1, few), "nothing": (0, 0)}
    seen = {name: pair[0] for name, pair in lengths.items()} | {"absent": many}
    assert following(seen, {name: pair[1] for name, pair in lengths.items()}) == ["row", "branches"]


def test_tensors_of_other_shapes_are_infinitely_apart():
    one = torch.ones(2, 3)
    assert apart(one, one[:1]) == math.inf
    assert alike(one, one + 5e-5)
    assert not alike(one, one + 5e-4)
