"""U-ViT (Bao et al., "All are Worth Words", CVPR 2023, arXiv 2209.12152) as a diffusers model.

Here: the backbone alone. Not here: exits (deediff.py), when to stop (core), the official checkpoint layout (convert_uvit.py).
B images, C channels, H x W pixels, p patch size, P = (H/p)(W/p) patches, X prefix tokens (time, class, text), N = X + P, D width, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ee_diffusion.diffusion.exits.loading import load_strictly


def embedding_frequencies(dim: int, *, device: torch.device) -> Tensor:
    """`w_k = 10000^(-k / (dim//2))` (dim//2,) in float32."""
    half = dim // 2
    return torch.exp(-math.log(10000.0) * torch.arange(half, device=device, dtype=torch.float32) / half)


def timestep_embedding(timestep: Tensor, dim: int | Tensor) -> Tensor:
    """Sinusoidal embedding `[cos(t w_k), sin(t w_k)]`, and a zero where `dim` is odd (as the official U-ViT orders it).

    timestep (B,) in scheduler units, float or integer; `dim`: its size, or the frequencies w_k at hand; returns (B, dim) in float32.
    """
    known = isinstance(dim, Tensor)
    angles = timestep.float()[:, None] * (dim if known else embedding_frequencies(dim, device=timestep.device))
    embedded = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim), or dim - 1 of them
    return embedded if known or dim % 2 == 0 else nn.functional.pad(embedded, (0, 1))


def unpatchify(patches: Tensor, *, channels: int, patch_size: int, height: int, width: int) -> Tensor:
    """(B, P, p*p*C) -> (B, C, H, W); inside a patch the order is (row, column, channel). H and W in pixels."""
    rows, columns, p = height // patch_size, width // patch_size, patch_size
    grid = patches.reshape(-1, rows, columns, p, p, channels)  # (B, h, w, p, p, C)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)  # (B, C, H, W)


@dataclass
class UViTOutput(BaseOutput):
    """`sample` (B, C, H, W): the prediction. `hidden_states[d]` (B, N, D), d = 0..L, if asked for: the tokens after d blocks."""

    sample: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class UViTAttnProcessor:
    """Self-attention through diffusers' attention dispatch, so that `set_attention_backend` reaches it."""

    def __init__(self):
        self._attention_backend = None
        self._parallel_config = None

    def __call__(self, attn: UViTAttention, hidden_states: Tensor) -> Tensor:
        query, key, value = attn.to_qkv(hidden_states).unflatten(-1, (3, attn.heads, -1)).unbind(2)  # (B, N, heads, d)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(hidden_states.flatten(2))  # (B, N, D)


class UViTAttention(nn.Module, AttentionModuleMixin):
    _default_processor_cls = UViTAttnProcessor
    _available_processors = [UViTAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, dim: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.to_out = nn.Linear(dim, dim)
        self.set_processor(UViTAttnProcessor())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.processor(self, hidden_states)


class UViTBlock(nn.Module):
    """`x = Linear(cat[x, skip])` if it takes a long skip; `x += attn(norm1(x))`; `x += mlp(norm2(x))`."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, takes_skip: bool):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.skip_linear = nn.Linear(2 * dim, dim) if takes_skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = UViTAttention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            hidden_states = self.skip_linear(torch.cat([hidden_states, skip], dim=-1))  # (B, N, 2D) -> (B, N, D)
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class UViTTransformer2DModel(ModelMixin, AttentionMixin, ConfigMixin):
    """U-ViT: time, class and text are tokens before the patch tokens; each of the last L//2 layers takes a long skip (if there are any).

    Args:
        sample_size: H = W in pixels (or latent pixels); a multiple of `patch_size`.
        num_layers: L, odd: L//2 in-blocks, one mid block, L//2 out-blocks.
        num_classes: rows of the class embedding, the null class (if trained with one) included; None: no class token.
        null_class: the row that stands for "no class" (classifier-free guidance); None: there is none.
        text_dim, num_text_tokens: width and number of text tokens; None and 0: no text.
        time_mlp: an MLP on the time embedding (the official code's `mlp_time_embed`).
        final_conv: a 3x3 convolution after unpatchify.
        long_skips: False: the paper's ablation without them (the official code's `skip`).

    Raises:
        ValueError: for sizes that do not fit together (said which).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UViTBlock"]
    _repeated_blocks = ["UViTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "pos_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        num_layers: int = 13,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        null_class: int | None = None,
        text_dim: int | None = None,
        num_text_tokens: int = 0,
        qkv_bias: bool = False,
        time_mlp: bool = False,
        final_conv: bool = True,
        long_skips: bool = True,
    ):
        super().__init__()
        _check_sizes(sample_size, patch_size, num_layers, num_classes, null_class, text_dim, num_text_tokens)
        dim = num_attention_heads * attention_head_dim
        self.inner_dim, self.out_channels = dim, in_channels
        self.num_prefix_tokens = 1 + (num_classes is not None) + num_text_tokens
        self.num_patches = (sample_size // patch_size) ** 2
        self.gradient_checkpointing = False

        self.patch_embed = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.time_embed = (
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim)) if time_mlp else nn.Identity()
        )
        self.class_embed = nn.Embedding(num_classes, dim) if num_classes is not None else None
        self.text_embed = nn.Linear(text_dim, dim) if text_dim is not None else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + self.num_patches, dim))
        self.transformer_blocks = nn.ModuleList(
            UViTBlock(dim, num_attention_heads, mlp_ratio, qkv_bias, takes_skip=long_skips and layer > num_layers // 2)
            for layer in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)
        self.conv_out = nn.Conv2d(in_channels, in_channels, 3, padding=1) if final_conv else nn.Identity()
        self._initialise()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' `from_pretrained`, but a file of another model is a ValueError, not a warning."""
        return load_strictly(super().from_pretrained, cls.__name__, pretrained_model_name_or_path, **kwargs)

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W), (B,), (B,), (B, T, text_dim) -> tokens (B, N, D) in the order class, time, text, patches."""
        dtype = self.pos_embed.dtype
        self._check_inputs(hidden_states, timestep, class_labels, encoder_hidden_states)
        time = self.time_embed(timestep_embedding(timestep, self.inner_dim).to(dtype))  # (B, D)
        tokens = [time[:, None]]
        if self.class_embed is not None:
            tokens.insert(0, self.class_embed(class_labels)[:, None])
        if self.text_embed is not None:
            tokens.append(self.text_embed(encoder_hidden_states.to(dtype)))
        tokens.append(self.patch_embed(hidden_states.to(dtype)).flatten(2).transpose(1, 2))  # (B, P, D)
        return torch.cat(tokens, dim=1) + self.pos_embed  # (B, N, D)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> UViTOutput | tuple:
        """Predict the noise (or whatever the scheduler's `prediction_type` says) for a noisy batch.

        Args:
            hidden_states: (B, C, H, W) noisy images. timestep: (B,), (1,) or a number, in scheduler units.
            class_labels: (B,) integers in [0, num_classes). encoder_hidden_states: (B, num_text_tokens, text_dim).
            output_hidden_states: also return the tokens at every depth 0..L (training of exits).

        Raises:
            ValueError: for a missing, surplus or wrongly shaped input.
        """
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        timestep = timestep.reshape(-1).expand(len(hidden_states)) if timestep.numel() == 1 else timestep  # (B,)
        tokens = self.embed(hidden_states, timestep, class_labels, encoder_hidden_states)  # (B, N, D)

        skips, states = [], [tokens]
        half = len(self.transformer_blocks) // 2
        for layer, block in enumerate(self.transformer_blocks):
            inputs = (tokens, skips.pop()) if block.skip_linear is not None else (tokens,)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, *inputs)
            else:
                tokens = block(*inputs)
            if layer < half:
                skips.append(tokens)
            if output_hidden_states:
                states.append(tokens)

        sample = self.tail(tokens)
        states = tuple(states) if output_hidden_states else None
        return (
            UViTOutput(sample=sample, hidden_states=states)
            if return_dict
            else (sample, states)[: 1 + output_hidden_states]
        )

    def tail(self, tokens: Tensor) -> Tensor:
        """The model's own output head: tokens (B, N, D) -> (B, C, H, W)."""
        tokens, size = self.norm_out(tokens), self.config.sample_size
        if len(tokens) == 0:  # all rows have answered elsewhere
            return tokens.new_empty(0, self.config.in_channels, size, size)
        patches = self.proj_out(tokens[:, self.num_prefix_tokens :])  # (B, P, p*p*C)
        image = unpatchify(
            patches, channels=self.config.in_channels, patch_size=self.config.patch_size, height=size, width=size
        )
        return self.conv_out(image)

    def _check_inputs(self, images: Tensor, timestep: Tensor, labels: Tensor | None, text: Tensor | None) -> None:
        size, channels = self.config.sample_size, self.config.in_channels
        if images.ndim != 4 or images.shape[1:] != (channels, size, size):
            raise ValueError(f"hidden_states is {tuple(images.shape)}, expected (B, {channels}, {size}, {size})")
        if timestep.shape != images.shape[:1]:
            raise ValueError(f"timestep is {tuple(timestep.shape)}, expected a number or ({len(images)},)")
        if (self.class_embed is None) != (labels is None):
            wants = "takes no" if self.class_embed is None else "needs"
            raise ValueError(f"this U-ViT {wants} class_labels (num_classes={self.config.num_classes})")
        if labels is not None and (labels.shape != images.shape[:1] or labels.is_floating_point()):
            raise ValueError(f"class_labels is {labels.dtype} {tuple(labels.shape)}, expected int ({len(images)},)")
        expected = (len(images), self.config.num_text_tokens, self.config.text_dim)
        if (self.text_embed is None) != (text is None) or (text is not None and text.shape != expected):
            came = None if text is None else tuple(text.shape)
            raise ValueError(
                f"encoder_hidden_states is {came}, expected {expected if self.text_embed is not None else None}"
            )


def _check_sizes(sample_size, patch_size, num_layers, num_classes, null_class, text_dim, num_text_tokens) -> None:
    if sample_size % patch_size:
        raise ValueError(f"sample_size={sample_size} is not a multiple of patch_size={patch_size}")
    if num_layers < 1 or num_layers % 2 == 0:
        raise ValueError(f"num_layers={num_layers}, expected an odd number (L//2 in, one mid, L//2 out)")
    if null_class is not None and not (num_classes is not None and 0 <= null_class < num_classes):
        raise ValueError(f"null_class={null_class}, expected a row of the class embedding (num_classes={num_classes})")
    if (text_dim is None) != (num_text_tokens == 0):
        raise ValueError(f"text_dim={text_dim} and num_text_tokens={num_text_tokens}: give both or neither")
