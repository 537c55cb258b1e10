"""The official U-ViT layout, and the exits of DeeDiff's authors in it, against a slow float64 reading of the architecture."""

import math

import numpy as np
import pytest
import torch

from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.methods import deediff_released
from ee_diffusion.diffusion.models.convert_uvit import load_official, load_official_exits

DIM, HEADS, HALF, PATCH, CHANNELS, SIZE = 8, 2, 2, 2, 3, 4


def official_state(
    classes: int | None = None,
    text_dim: int | None = None,
    time_mlp: bool = False,
    seed: int = 0,
    *,
    text_tokens: int = 77,
    size: int = SIZE,
    dim: int = DIM,
    hidden: int = 4 * DIM,
    skip: bool = True,
    exits: bool = False,
) -> dict:
    """Random weights under the official names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    tokens = 1 + (classes is not None) + (text_tokens if text_dim else 0) + (size // PATCH) ** 2
    state = {"pos_embed": random(1, tokens, dim), "patch_embed.proj.weight": random(dim, CHANNELS, PATCH, PATCH)}
    state["patch_embed.proj.bias"] = random(dim)
    names = [f"in_blocks.{i}" for i in range(HALF)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(HALF)]
    for name in names:
        for norm in ("norm1", "norm2"):
            state[f"{name}.{norm}.weight"], state[f"{name}.{norm}.bias"] = 1 + random(dim), random(dim)
        state[f"{name}.attn.qkv.weight"] = random(3 * dim, dim)
        linears = {"attn.proj": (dim, dim), "mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        if name.startswith("out") and skip:
            linears["skip_linear"] = (dim, 2 * dim)
        for linear, shape in linears.items():
            state[f"{name}.{linear}.weight"], state[f"{name}.{linear}.bias"] = random(*shape), random(shape[0])
    values = PATCH**2 * CHANNELS
    state["norm.weight"], state["norm.bias"] = 1 + random(dim), random(dim)
    state["decoder_pred.weight"], state["decoder_pred.bias"] = random(values, dim), random(values)
    state["final_layer.weight"], state["final_layer.bias"] = random(CHANNELS, CHANNELS, 3, 3), random(CHANNELS)
    if classes:
        state["label_emb.weight"] = random(classes, dim)
    if text_dim:
        state["context_embed.weight"], state["context_embed.bias"] = random(dim, text_dim), random(dim)
    if time_mlp:
        state["time_embed.0.weight"], state["time_embed.0.bias"] = random(4 * dim, dim), random(4 * dim)
        state["time_embed.2.weight"], state["time_embed.2.bias"] = random(dim, 4 * dim), random(dim)
    for layer in range(2 * HALF + 1 if exits else 0):
        state[f"lte_classifer.{layer}.lte.weight"] = random(values, dim)
        state[f"lte_classifer.{layer}.lte.bias"] = random(values)
    return state


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def layer_norm(w, name, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w, name, x, heads):
    dim = x.shape[-1]
    qkv, d = linear(w, f"{name}.qkv", x), dim // heads
    out = np.zeros_like(x)
    for h in range(heads):
        q, k, v = (qkv[:, j * dim + h * d : j * dim + (h + 1) * d] for j in range(3))
        logits = q @ k.T / math.sqrt(d)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, h * d : (h + 1) * d] = weights / weights.sum(-1, keepdims=True) @ v
    return linear(w, f"{name}.proj", out)


def block(w, name, x, heads, skip=None):
    if f"{name}.skip_linear.weight" in w:
        x = linear(w, f"{name}.skip_linear", np.concatenate([x, skip], -1))
    x = x + attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", x), heads)
    hidden = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x))
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + linear(w, f"{name}.mlp.fc2", gelu)


def slow_states(state, image, t, label=None, text=None, heads=HEADS):
    """One image (C, H, W) token by token: the patch tokens after each of the 1..L blocks."""
    w = {name: value.numpy() for name, value in state.items()}
    dim, n = state["pos_embed"].shape[-1], image.shape[-1] // PATCH
    angles = [t * math.exp(-math.log(10000) * k / (dim // 2)) for k in range(dim // 2)]
    time = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2))
    if "time_embed.0.weight" in w:
        hidden = linear(w, "time_embed.0", time)
        time = linear(w, "time_embed.2", hidden / (1 + np.exp(-hidden)))
    tokens = [] if label is None else [w["label_emb.weight"][label]]
    tokens.append(time)
    tokens += [] if text is None else list(linear(w, "context_embed", text))
    for i in range(n):
        for j in range(n):
            pixels = image[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
            tokens.append((w["patch_embed.proj.weight"] * pixels).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
    x, states, skips = np.stack(tokens) + w["pos_embed"][0], [], []
    for i in range(HALF):
        x = block(w, f"in_blocks.{i}", x, heads)
        skips.append(x)
        states.append(x)
    x = block(w, "mid_block", x, heads)
    states.append(x)
    for i in range(HALF):
        x = block(w, f"out_blocks.{i}", x, heads, skips.pop())
        states.append(x)
    return [one[-n * n :] for one in states]


def slow_tail(state, x, size):
    """Patch tokens (P, D) -> the image (C, H, W), pixel by pixel."""
    w, n = {name: value.numpy() for name, value in state.items()}, size // PATCH
    patches = linear(w, "decoder_pred", layer_norm(w, "norm", x))
    out = np.zeros((CHANNELS, size, size))
    for index, patch in enumerate(patches):
        for k, value in enumerate(patch):  # (row, column, channel)
            row, column, channel = k // (PATCH * CHANNELS), k // CHANNELS % PATCH, k % CHANNELS
            out[channel, index // n * PATCH + row, index % n * PATCH + column] = value
    padded = np.pad(out, ((0, 0), (1, 1), (1, 1)))
    final = np.zeros_like(out)
    for o in range(CHANNELS):
        for i in range(size):
            for j in range(size):
                final[o, i, j] = (w["final_layer.weight"][o] * padded[:, i : i + 3, j : j + 3]).sum() + w[
                    "final_layer.bias"
                ][o]
    return final


CASES = [
    {},
    {"classes": 5},
    {"text_dim": 6},
    {"text_dim": 6, "text_tokens": 13, "size": 20},  # as many tokens as 77 of text beside 12 x 12 pixels
    {"classes": 5, "time_mlp": True},
    {"classes": 5, "skip": False},
    {"dim": 9, "hidden": 22},  # an odd width, and a ratio that is no whole number
    {"dim": 49, "hidden": 54, "time_mlp": True},  # 49 * (54 / 49) is below 54 in float64
    {"classes": 5, "exits": True},
]


def loaded(case: dict, state: dict | str):
    heads = {9: 3, 49: 7}.get(case.get("dim", DIM), HEADS)
    text = case.get("text_tokens", 77) if "text_dim" in case else 0
    return load_official(state, num_attention_heads=heads, num_text_tokens=text).double(), heads, text


@pytest.mark.parametrize("case", CASES, ids=str)
def test_official_checkpoint_computes_what_the_architecture_says(case, tmp_path):
    state, size = official_state(**case), case.get("size", SIZE)
    torch.save(state, tmp_path / "nnet_ema.pth")
    model, heads, text_tokens = loaded(case, tmp_path / "nnet_ema.pth")
    assert (model.config.sample_size, model.config.num_text_tokens) == (size, text_tokens)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, CHANNELS, size, size, generator=generator, dtype=torch.float64)
    times, labels = torch.tensor([3, 40]), torch.tensor([4, 1]) if "classes" in case else None
    text = torch.randn(2, text_tokens, 6, generator=generator, dtype=torch.float64) if text_tokens else None
    with torch.no_grad():
        got = model(images, times, labels, text).sample
    for i in range(2):
        label, words = None if labels is None else int(labels[i]), None if text is None else text[i].numpy()
        states = slow_states(state, images[i].numpy(), float(times[i]), label, words, heads)
        expected = slow_tail(state, states[-1], size)
        # the embedding's angles are float32: t * 6e-8 off
        np.testing.assert_allclose(got[i].numpy(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_exits_in_the_authors_checkpoint_say_what_their_architecture_says(tmp_path):
    state, layers = official_state(classes=5, exits=True), 2 * HALF + 1
    torch.save(state, tmp_path / "nnet_ema.pth")
    model = load_official(tmp_path / "nnet_ema.pth", num_attention_heads=HEADS)
    exits = load_official_exits(tmp_path / "nnet_ema.pth", model)
    assert (exits.depths, exits.config.variant, exits.config.last_layer) == ((1, 2, 3, 4), "released", True)
    exits.save_pretrained(tmp_path)
    exits = DenoisingExits.from_pretrained(tmp_path).double()
    model = model.double()
    image = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = {"hidden_states": image, "timestep": torch.tensor([40]), "class_labels": torch.tensor([4])}
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    slow = slow_states(state, image[0].numpy(), 40.0, 4)
    for layer in range(layers):  # the last block's, too, which only the losses look at
        w = {
            "lte.weight": state[f"lte_classifer.{layer}.lte.weight"],
            "lte.bias": state[f"lte_classifer.{layer}.lte.bias"],
        }
        expected = 1 / (1 + np.exp(-linear({k: v.numpy() for k, v in w.items()}, "lte", slow[layer])))
        found = exits.confidence(layer, hidden[layer + 1], {"timestep": torch.tensor([40])})
        np.testing.assert_allclose(float(found), expected.mean(), rtol=1e-5)
    for depth in exits.depths:
        with attach_exits(model, exits, Policy(schedule=FixedDepth(depth)), rows_per_sample=1, num_steps=1):
            answer = model(**inputs).sample[0]
        np.testing.assert_allclose(answer.numpy(), slow_tail(state, slow[depth - 1], SIZE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patience", [True, False])
@torch.no_grad()
def test_the_authors_rule_on_their_exits(patience: bool):
    """Block by block: answer at a crossing, among the in-blocks (with patience) at the second; the last block answers anyhow."""
    state = official_state(classes=5, exits=True)
    model = load_official(state, num_attention_heads=HEADS)
    exits = load_official_exits(state, model)
    image = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    slow = slow_states(state, image[0].double().numpy(), 40.0, 4)
    confidence = []
    for layer, tokens in enumerate(slow):
        weight, bias = (state[f"lte_classifer.{layer}.lte.{part}"].numpy() for part in ("weight", "bias"))
        confidence.append(float((1 / (1 + np.exp(-(tokens @ weight.T + bias)))).mean()))
    found = []
    for threshold in [0.0, *(value - 1e-4 for value in confidence), 1.0]:
        expected = len(slow)
        for layer, value in reversed(list(enumerate(confidence))):
            before = sum(one > threshold for one in confidence[:layer])
            if value > threshold and not (patience and layer < HALF and before == 0):
                expected = layer + 1
        policy = deediff_released(threshold, depths=exits.depths, num_layers=len(slow), patience=patience)
        with attach_exits(model, exits, policy, rows_per_sample=1, num_steps=1) as attachment:
            model(image, torch.tensor([40]), torch.tensor([4]))
        found.append(int(attachment.trace.depths[0, 0]))
        assert found[-1] == expected, (threshold, confidence)
    assert (found[0], found[-1]) == (2 if patience else 1, len(slow))


def test_exits_that_do_not_fit_are_refused():
    state = official_state(exits=True)
    model = load_official(state, num_attention_heads=HEADS)
    with pytest.raises(ValueError, match=r"no lte_classifer\.\* among the keys"):
        load_official_exits(official_state(), model)
    del state["lte_classifer.4.lte.bias"]
    with pytest.raises(ValueError, match=r"exits after 5 blocks: missing \['uncertainty_modules\.4\.bias'\]"):
        load_official_exits(state, model)
    wider = official_state(exits=True, dim=10, hidden=40)
    with pytest.raises(ValueError, match=r"of another shape \['uncertainty_modules\.0\.weight'"):
        load_official_exits(wider, model)


def test_text_tokens_are_not_guessed():
    with pytest.raises(ValueError, match="num_text_tokens=0, but this checkpoint takes text"):
        load_official(official_state(text_dim=6), num_attention_heads=HEADS)
    with pytest.raises(ValueError, match="num_text_tokens=77, but this checkpoint takes no text"):
        load_official(official_state(), num_attention_heads=HEADS, num_text_tokens=77)
    for wrong in (78, 81, 500, -3):
        with pytest.raises(ValueError, match="form no square"):
            load_official(official_state(text_dim=6), num_attention_heads=HEADS, num_text_tokens=wrong)


def test_a_truncated_file_is_refused(tmp_path):
    torch.save(official_state(), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_official(tmp_path / "cut.pth", num_attention_heads=HEADS)


def test_foreign_keys_are_refused():
    with pytest.raises(ValueError, match="missing"):
        load_official({"conv.weight": torch.zeros(1)}, num_attention_heads=HEADS)
    with pytest.raises(ValueError, match="num_attention_heads=0 does not divide"):
        load_official(official_state(), num_attention_heads=0)
    state = official_state()
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"foreign \['extra.weight'\]"):
        load_official(state, num_attention_heads=HEADS)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        load_official(official_state(), num_attention_heads=3)
