"""States: samples are what was recorded, parts join, files keep them, and only inputs known to be per row are taken."""

from __future__ import annotations

import pytest
import torch

from ee_diffusion.diffusion.distillation.dataset import States, row_inputs

T, J, G = 3, 2, 2


def calls(seed: int = 0, *, same_text: bool = True) -> list[dict[str, torch.Tensor]]:
    """J calls on G * T rows, branch by branch; every number says where it stands."""
    made = []
    for call in range(J):
        rows = torch.arange(G * T) + 100 * call + 1000 * seed
        text = torch.arange(G * T) + (0 if same_text else call) + 50
        made.append({"hidden_states": rows[:, None].float(), "timestep": rows * 0 + 900 - call, "class_labels": text})
    return made


def test_a_sample_is_one_trajectory_at_one_call_with_all_its_rows():
    states = States.of_calls(calls(), T)
    assert states.shape == (T, J, G)
    assert len(states) == T * J
    assert set(states.constant) == {"class_labels"}
    picked = states[torch.tensor([0, 1, 5])]  # trajectory 0 at calls 0 and 1, trajectory 2 at call 1
    assert picked["hidden_states"][..., 0].tolist() == [[0, 3], [100, 103], [102, 105]]
    assert picked["timestep"].tolist() == [[900, 900], [899, 899], [899, 899]]
    assert picked["class_labels"].tolist() == [[50, 53], [50, 53], [52, 55]]


def test_all_rows_of_a_trajectory():
    whole = States.of_calls(calls(), T).by_trajectory()
    assert whole["hidden_states"][1, :, 0].tolist() == [1, 4, 101, 104]
    assert whole["class_labels"][1].tolist() == [51, 54, 51, 54]


def test_states_and_time_never_count_as_constant():
    states = States.of_calls(calls()[:1], T)
    assert set(states.varying) == {"hidden_states", "timestep"}


def test_tensors_and_back():
    states = States.of_calls(calls(), T)
    again = States.from_tensors(states.to_tensors())
    for name, value in states.to_tensors().items():
        assert torch.equal(again.to_tensors()[name], value)
    assert again.nbytes == states.nbytes == sum(value.nbytes for value in states.to_tensors().values())
    with pytest.raises(ValueError, match=r"expected those of States\.to_tensors"):
        States.from_tensors({"weights": torch.zeros(1)})


def test_joining():
    first, second = States.of_calls(calls(), T), States.of_calls(calls(1, same_text=False), T)
    joined = States.concatenate([first, second])
    assert joined.shape == (2 * T, J, G)
    assert not joined.constant, "what varies in one part varies in all"
    for index in range(T * J):
        one = torch.tensor([index])
        for name, value in first[one].items():
            assert torch.equal(joined[one][name], value)
            assert torch.equal(joined[one + T * J][name], second[one][name])
    with pytest.raises(ValueError, match="no states"):
        States.concatenate([])
    with pytest.raises(ValueError, match="different kinds"):
        States.concatenate([first, States.of_calls(calls()[:1], T)])


def test_a_time_for_all_becomes_one_a_row():
    inputs = row_inputs({"hidden_states": torch.zeros(4, 1), "timestep": torch.tensor(7), "return_dict": False})
    assert inputs["timestep"].tolist() == [7] * 4
    assert set(inputs) == {"hidden_states", "timestep"}
    row_inputs({"hidden_states": torch.zeros(4, 1), "timestep": 7, "added_cond_kwargs": {"resolution": None}})


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"img_ids": torch.zeros(3, 3)}, "cannot keep .'img_ids'."),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "cannot keep .'joint_attention_kwargs'."),
        ({"timestep": torch.zeros(3)}, "have not the 4 rows"),
        ({"class_labels": torch.zeros(3)}, "have not the 4 rows"),
    ],
)
def test_arguments_that_are_not_known_to_be_per_row(changes, told):
    with pytest.raises(ValueError, match=told):
        row_inputs({"hidden_states": torch.zeros(4, 1), "timestep": torch.tensor(1)} | changes)


def test_a_call_without_states():
    with pytest.raises(ValueError, match="cannot keep"):
        row_inputs({"timestep": torch.tensor(1)})
