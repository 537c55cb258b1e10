"""U-ViT: against a slow float64 reading of its architecture, shapes, inputs that do not fit, saving, checkpointing, attention dispatch."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models import attention_dispatch
from factories import CLASSES, NULL_CLASS, uvit
from torch import Tensor, nn

from ee_diffusion.diffusion.models import uvit as uvit_module
from ee_diffusion.diffusion.models.uvit import UViTTransformer2DModel, timestep_embedding, unpatchify

B = 3
KINDS = ("class", "unconditional", "text")


def inputs(kind: str, count: int = B, dtype=torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = {"hidden_states": torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float32).to(dtype)}
    values["timestep"] = torch.arange(count) * 300 + 7
    if kind == "class":
        values["class_labels"] = torch.tensor([0, 3, NULL_CLASS])[:count]
    if kind == "text":
        values["encoder_hidden_states"] = torch.randn(count, 3, 6, generator=generator).to(dtype)
    return values


def reference(model: UViTTransformer2DModel, kind: str) -> list[Tensor]:
    """Tokens after 0..L blocks and the sample, image by image, in float64, by explicit loops where order matters."""
    p = {name: value.double() for name, value in model.state_dict().items()}
    given, dim, heads = inputs(kind, dtype=torch.float64), model.inner_dim, model.config.num_attention_heads
    states, samples = [], []

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def attention(x: Tensor, name: str) -> Tensor:
        qkv, d = linear(x, f"{name}.to_qkv"), dim // heads
        parts = []
        for head in range(heads):
            q, k, v = (qkv[:, part * dim + head * d : part * dim + (head + 1) * d] for part in range(3))
            parts.append(((q @ k.T) / math.sqrt(d)).softmax(-1) @ v)
        return linear(torch.cat(parts, -1), f"{name}.to_out")

    for image in range(B):
        half = dim // 2
        angles = [float(given["timestep"][image]) * 10000 ** (-k / half) for k in range(half)]
        time = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
        tokens = [time[None]]
        if kind == "class":
            tokens.insert(0, p["class_embed.weight"][given["class_labels"][image]][None])
        if kind == "text":
            tokens.append(linear(given["encoder_hidden_states"][image], "text_embed"))
        pixels = given["hidden_states"][image]
        for row in range(4):
            for column in range(4):
                patch = pixels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                tokens.append((p["patch_embed.weight"] * patch).sum((1, 2, 3))[None] + p["patch_embed.bias"])
        x = torch.cat(tokens) + p["pos_embed"][0]
        seen, kept, layers = [x], [], model.config.num_layers
        for layer in range(layers):
            name = f"transformer_blocks.{layer}"
            if layer > layers // 2:
                x = linear(torch.cat([x, kept.pop()], -1), f"{name}.skip_linear")
            x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn")
            hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.0")
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + linear(hidden, f"{name}.mlp.2")
            if layer < layers // 2:
                kept.append(x)
            seen.append(x)
        assert not kept
        patches = linear(norm(x, "norm_out")[-16:], "proj_out")
        sample = torch.zeros(3, 8, 8, dtype=torch.float64)
        for index, values in enumerate(patches):
            for place, value in enumerate(values):
                row, column, channel = place // 6, place // 3 % 2, place % 3
                sample[channel, 2 * (index // 4) + row, 2 * (index % 4) + column] = value
        sample = nn.functional.conv2d(sample[None], p["conv_out.weight"], p["conv_out.bias"], padding=1)[0]
        states.append(torch.stack(seen))
        samples.append(sample)
    return [*torch.stack(states, 1), torch.stack(samples)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_model_is_its_slow_reading(kind: str):
    model = uvit(kind)
    expected = reference(model, kind)
    output = model(**inputs(kind), output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_layers + 1
    for found, wanted in zip([*output.hidden_states, output.sample], expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_timestep_embedding():
    found = timestep_embedding(torch.tensor([0, 500]), 8)
    assert found.dtype == torch.float32
    assert found[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    for k in range(4):
        angle = 500 * 10000 ** (-k / 4)
        assert float(found[1, k]) == pytest.approx(math.cos(angle), abs=1e-4)
        assert float(found[1, 4 + k]) == pytest.approx(math.sin(angle), abs=1e-4)


def test_unpatchify_takes_an_empty_batch():
    image = unpatchify(torch.zeros(0, 16, 12), channels=3, patch_size=2, height=8, width=8)
    assert image.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shapes_numbers_of_timesteps_and_tuples(kind: str):
    model, given = uvit(kind), inputs(kind)
    sample = model(**given).sample
    assert sample.shape == (B, 3, 8, 8)
    assert model(**given).hidden_states is None
    assert torch.equal(model(**given).sample, sample), "deterministic"
    (alone,) = model(**given, return_dict=False)
    assert torch.equal(alone, sample)
    both = model(**given, return_dict=False, output_hidden_states=True)
    assert len(both) == 2
    assert both[1][0].shape == (B, model.num_prefix_tokens + 16, 16)
    same = model(**(given | {"timestep": torch.full((B,), 40)})).sample
    for timestep in (40, 40.0, torch.tensor(40), torch.tensor([40])):
        assert torch.equal(model(**(given | {"timestep": timestep})).sample, same)
    assert model.num_prefix_tokens == {"class": 2, "unconditional": 1, "text": 4}[kind]


def test_options_of_the_official_layout():
    model = uvit(time_mlp=True, final_conv=False, qkv_bias=True, num_layers=3)
    assert isinstance(model.conv_out, nn.Identity)
    assert len(model.time_embed) == 3
    assert model.transformer_blocks[0].attn.to_qkv.bias is not None
    assert [block.skip_linear is not None for block in model.transformer_blocks] == [False, False, True]
    assert model(**inputs("class")).sample.shape == (B, 3, 8, 8)
    assert uvit(num_layers=1)(**inputs("class")).sample.shape == (B, 3, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_save_and_load(kind: str, tmp_path):
    model = uvit(kind)
    model.save_pretrained(tmp_path)
    loaded = UViTTransformer2DModel.from_pretrained(tmp_path)
    given = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert given.items() <= loaded.config.items()
    assert not loaded.training
    assert torch.equal(loaded(**inputs(kind)).sample, model(**inputs(kind)).sample)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients, blocks = [], []
    for checkpointing in (False, True):
        model = uvit().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls = []
        model.transformer_blocks[0].register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        output = model(**inputs("class"), output_hidden_states=True)
        (output.sample.square().mean() + sum(state.square().mean() for state in output.hidden_states)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        blocks.append(len(calls))
    assert blocks == [1, 2], "checkpointing computes a block again"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_the_attention_backend_is_really_used(monkeypatch):
    model, seen = uvit(), []
    before = model(**inputs("class")).sample
    original = attention_dispatch.dispatch_attention_fn

    def counting(*args, backend=None, **kwargs):
        seen.append(backend)
        return original(*args, backend=backend, **kwargs)

    monkeypatch.setattr(uvit_module, "dispatch_attention_fn", counting)
    model(**inputs("class"))
    assert seen == [None] * 7
    seen.clear()
    model.set_attention_backend("native")
    after = model(**inputs("class")).sample
    assert [str(getattr(backend, "value", backend)) for backend in seen] == ["native"] * 7
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype):
    model = uvit().to(dtype)
    output = model(**inputs("class", dtype=dtype), output_hidden_states=True)
    assert {state.dtype for state in output.hidden_states} == {output.sample.dtype} == {dtype}
    assert model(**inputs("class")).sample.dtype == dtype, "float32 images go through a half-precision model"


@pytest.mark.parametrize(
    "kind,change",
    [
        ("class", {"hidden_states": torch.zeros(B, 3, 8, 4)}),
        ("class", {"hidden_states": torch.zeros(B, 1, 8, 8)}),
        ("class", {"hidden_states": torch.zeros(3, 8, 8)}),
        ("class", {"timestep": torch.zeros(B + 1)}),
        ("class", {"timestep": torch.zeros(B, 1)}),
        ("class", {"class_labels": None}),
        ("class", {"class_labels": torch.zeros(B + 1, dtype=torch.int64)}),
        ("class", {"class_labels": torch.zeros(B)}),
        ("class", {"encoder_hidden_states": torch.zeros(B, 3, 6)}),
        ("unconditional", {"class_labels": torch.zeros(B, dtype=torch.int64)}),
        ("text", {"encoder_hidden_states": None}),
        ("text", {"encoder_hidden_states": torch.zeros(B, 2, 6)}),
        ("text", {"encoder_hidden_states": torch.zeros(B, 3, 5)}),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_work(kind: str, change):
    model, ran = uvit(kind), []
    for module in (model.patch_embed, *model.transformer_blocks):
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
    with pytest.raises(ValueError, match=r"expected|needs|takes no"):
        model(**(inputs(kind) | change))
    assert not ran


@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": 9},
        {"num_layers": 4},
        {"num_layers": 0},
        {"num_layers": -1},
        {"null_class": CLASSES + 1},
        {"null_class": -1},
        {"num_classes": None},
        {"text_dim": 4},
        {"num_text_tokens": 2},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_together_are_refused(config):
    with pytest.raises(ValueError, match=r"expected|multiple|both or neither"):
        uvit(**config)
