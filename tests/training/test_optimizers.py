"""Muon takes the matrices within repeated blocks and AdamW the rest; together they resume to the very weights of an unbroken run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training.test_resume import weights
from training.tiny_run import TinyObjective, save, tiny_config, tiny_source

from ee_diffusion.training.learner import build_optimizers
from ee_diffusion.training.loop import Trainer, slow_in_bfloat16

needs_muon = pytest.mark.skipif(
    getattr(torch.optim, "Muon", None) is None, reason="torch.optim.Muon came with torch 2.9"
)


class BlocksObjective(TinyObjective):
    """The tiny objective with two blocks, one of them frozen, and a linear layer outside of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48)) for _ in range(2))
        self.blocks[1].requires_grad_(False)
        self.tail = nn.Linear(48, 48)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        said = self.tail(self.blocks[1](self.blocks[0](batch["images"].flatten(1))))  # (B, 48)
        return {"loss": super().forward(batch)["loss"] + (said - batch["noise"].flatten(1)).square().mean()}


def fit(folder: Path, **changes) -> dict[str, Tensor]:
    torch.manual_seed(0)
    Trainer(BlocksObjective(), tiny_source(), tiny_config(folder, optimizer="muon", **changes), save=save).fit()
    return weights(folder)


@needs_muon
def test_muon_takes_the_trained_matrices_of_the_blocks_and_nothing_else(tmp_path: Path):
    objective = BlocksObjective()
    adamw, muon = build_optimizers(objective, tiny_config(tmp_path, optimizer="muon"), fused=False)
    (matrix,) = muon.param_groups[0]["params"]
    assert matrix is objective.blocks[0][0].weight
    others = [p for p in objective.parameters() if p.requires_grad and p is not matrix]
    assert [id(p) for p in adamw.param_groups[0]["params"]] == [id(p) for p in others]


@needs_muon
def test_a_stopped_run_goes_on_to_the_weights_of_an_unbroken_one(tmp_path: Path):
    begun = BlocksObjective().state_dict()
    unbroken = fit(tmp_path / "unbroken")
    fit(tmp_path / "broken", max_train_steps=4)
    resumed = fit(tmp_path / "broken", resume_from_checkpoint="latest")
    assert unbroken.keys() == begun.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert not torch.equal(unbroken["blocks.0.0.weight"], fit(tmp_path / "other", seed=1)["blocks.0.0.weight"])


def test_muon_without_a_matrix_or_without_torch_having_it_is_refused(tmp_path: Path, monkeypatch):
    config = tiny_config(tmp_path, optimizer="muon")
    if getattr(torch.optim, "Muon", None) is not None:
        with pytest.raises(ValueError, match="no linear layer within repeated blocks"):
            build_optimizers(TinyObjective(), config, fused=False)
        monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"expected torch 2\.9 or newer"):
        build_optimizers(BlocksObjective(), config, fused=False)


def test_a_cpu_without_bfloat16_is_named_before_hours_are_lost(tmp_path: Path, monkeypatch):
    cpu = torch.device("cpu")
    for there in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=there: there)
        said = [slow_in_bfloat16(tiny_config(tmp_path, mixed_precision=name), cpu) for name in ("no", "bf16")]
        assert [bool(one) for one in said] == [False, not there]
        muon = slow_in_bfloat16(tiny_config(tmp_path, optimizer="muon"), cpu)
        assert ("--optimizer muon may make" in muon) is not there
    assert slow_in_bfloat16(tiny_config(tmp_path, mixed_precision="bf16"), torch.device("cuda")) == ""
