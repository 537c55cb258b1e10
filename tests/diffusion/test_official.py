"""The official U-ViT layout, against a slow float64 reading of the architecture written from the paper and its appendix."""

import math

import numpy as np
import pytest
import torch

from ee_diffusion.diffusion.uvit_official import load_official

DIM, HEADS, HALF, PATCH, CHANNELS, SIZE = 8, 2, 2, 2, 3, 4


def official_state(
    classes: int | None = None, text_dim: int | None = None, time_mlp: bool = False, seed: int = 0
) -> dict:
    """Random weights under the official names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    tokens = 1 + (classes is not None) + (77 if text_dim else 0) + (SIZE // PATCH) ** 2
    state = {"pos_embed": random(1, tokens, DIM), "patch_embed.proj.weight": random(DIM, CHANNELS, PATCH, PATCH)}
    state["patch_embed.proj.bias"] = random(DIM)
    names = [f"in_blocks.{i}" for i in range(HALF)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(HALF)]
    for name in names:
        for norm in ("norm1", "norm2"):
            state[f"{name}.{norm}.weight"], state[f"{name}.{norm}.bias"] = 1 + random(DIM), random(DIM)
        state[f"{name}.attn.qkv.weight"] = random(3 * DIM, DIM)
        linears = {"attn.proj": (DIM, DIM), "mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM)}
        if name.startswith("out"):
            linears["skip_linear"] = (DIM, 2 * DIM)
        for linear, shape in linears.items():
            state[f"{name}.{linear}.weight"], state[f"{name}.{linear}.bias"] = random(*shape), random(shape[0])
    state["norm.weight"], state["norm.bias"] = 1 + random(DIM), random(DIM)
    state["decoder_pred.weight"], state["decoder_pred.bias"] = (
        random(PATCH**2 * CHANNELS, DIM),
        random(PATCH**2 * CHANNELS),
    )
    state["final_layer.weight"], state["final_layer.bias"] = random(CHANNELS, CHANNELS, 3, 3), random(CHANNELS)
    if classes:
        state["label_emb.weight"] = random(classes, DIM)
    if text_dim:
        state["context_embed.weight"], state["context_embed.bias"] = random(DIM, text_dim), random(DIM)
    if time_mlp:
        state["time_embed.0.weight"], state["time_embed.0.bias"] = random(4 * DIM, DIM), random(4 * DIM)
        state["time_embed.2.weight"], state["time_embed.2.bias"] = random(DIM, 4 * DIM), random(DIM)
    return state


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def layer_norm(w, name, x):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w, name, x):
    qkv, d = linear(w, f"{name}.qkv", x), DIM // HEADS
    out = np.zeros_like(x)
    for h in range(HEADS):
        q, k, v = (qkv[:, j * DIM + h * d : j * DIM + (h + 1) * d] for j in range(3))
        logits = q @ k.T / math.sqrt(d)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, h * d : (h + 1) * d] = weights / weights.sum(-1, keepdims=True) @ v
    return linear(w, f"{name}.proj", out)


def block(w, name, x, skip=None):
    if skip is not None:
        x = linear(w, f"{name}.skip_linear", np.concatenate([x, skip], -1))
    x = x + attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", x))
    hidden = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x))
    gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + linear(w, f"{name}.mlp.fc2", gelu)


def slow_forward(state, image, t, label=None, text=None):
    """One image (C, H, W), token by token and pixel by pixel."""
    w = {name: value.numpy() for name, value in state.items()}
    angles = [t * math.exp(-math.log(10000) * k / (DIM // 2)) for k in range(DIM // 2)]
    time = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    if "time_embed.0.weight" in w:
        hidden = linear(w, "time_embed.0", time)
        time = linear(w, "time_embed.2", hidden / (1 + np.exp(-hidden)))
    tokens = [] if label is None else [w["label_emb.weight"][label]]
    tokens.append(time)
    tokens += [] if text is None else list(linear(w, "context_embed", text))
    n = SIZE // PATCH
    for i in range(n):
        for j in range(n):
            pixels = image[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
            tokens.append((w["patch_embed.proj.weight"] * pixels).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
    prefix = len(tokens) - n * n
    x, skips = np.stack(tokens) + w["pos_embed"][0], []
    for i in range(HALF):
        x = block(w, f"in_blocks.{i}", x)
        skips.append(x)
    x = block(w, "mid_block", x)
    for i in range(HALF):
        x = block(w, f"out_blocks.{i}", x, skips.pop())
    patches = linear(w, "decoder_pred", layer_norm(w, "norm", x))[prefix:]
    out = np.zeros((CHANNELS, SIZE, SIZE))
    for index, patch in enumerate(patches):
        for k, value in enumerate(patch):  # (row, column, channel)
            row, column, channel = k // (PATCH * CHANNELS), k // CHANNELS % PATCH, k % CHANNELS
            out[channel, index // n * PATCH + row, index % n * PATCH + column] = value
    padded = np.pad(out, ((0, 0), (1, 1), (1, 1)))
    final = np.zeros_like(out)
    for o in range(CHANNELS):
        for i in range(SIZE):
            for j in range(SIZE):
                final[o, i, j] = (w["final_layer.weight"][o] * padded[:, i : i + 3, j : j + 3]).sum() + w[
                    "final_layer.bias"
                ][o]
    return final


@pytest.mark.parametrize("case", [{}, {"classes": 5}, {"text_dim": 6}, {"classes": 5, "time_mlp": True}])
def test_official_checkpoint_computes_what_the_architecture_says(case, tmp_path):
    state = official_state(**case)
    torch.save(state, tmp_path / "nnet_ema.pth")
    model = load_official(tmp_path / "nnet_ema.pth", num_attention_heads=HEADS).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    times, labels = torch.tensor([3, 40]), torch.tensor([4, 1]) if "classes" in case else None
    text = torch.randn(2, 77, 6, generator=generator, dtype=torch.float64) if "text_dim" in case else None
    with torch.no_grad():
        got = model(images, times, labels, text).sample
    for i in range(2):
        label = None if labels is None else int(labels[i])
        expected = slow_forward(
            state, images[i].numpy(), float(times[i]), label, None if text is None else text[i].numpy()
        )
        np.testing.assert_allclose(
            got[i].numpy(), expected, rtol=1e-5, atol=1e-5
        )  # the embedding's angles are float32: t * 6e-8 off


def test_a_truncated_file_is_refused(tmp_path):
    torch.save(official_state(), tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_official(tmp_path / "cut.pth", num_attention_heads=HEADS)


def test_foreign_keys_are_refused():
    with pytest.raises(ValueError, match="missing"):
        load_official({"conv.weight": torch.zeros(1)}, num_attention_heads=HEADS)
    state = official_state()
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"foreign \['extra.weight'\]"):
        load_official(state, num_attention_heads=HEADS)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        load_official(official_state(), num_attention_heads=3)
