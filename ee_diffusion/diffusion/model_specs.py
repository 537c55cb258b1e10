"""The family table: what attaching must know of each transformer class. Written down per class, never guessed from a shape.

Here: facts, and the public way to add one's own. Not here: what is done with them (attach.py, run_tracker.py).
R rows, N tokens, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ee_diffusion.core.registry import add_row, family_row

Returns = Literal["image", "text, image", "image, text"]


@dataclass(frozen=True)
class ModelSpec:
    """One transformer class.

    class_name: the class. blocks: its ModuleList of blocks. single_blocks: a second list that runs after the first, on one depth axis.
    block_classes: the classes that those blocks have; empty: not checked.
    returns: what a block returns: the image tokens (R, N, D), or them and the text's, in which order. Where text is returned, the block
        takes it as `encoder_hidden_states`. A block takes the image tokens (R, N, D) first, as `hidden_states`.
    concatenated: lists (names as above) whose blocks take and return one sequence, text first and then image.
    row_arguments: names of block arguments with one entry per row of the whole batch (or one for all, or several stacks of all rows);
        in tuples, lists and dicts every tensor counts.
    earlier: names of arguments that an earlier block returned (long skips): name -> (layer, L) -> that block's index, or None.
    residuals: arguments of the model's forward that make it add to all rows between blocks (ControlNet samples).
    plain_if: arguments of the model's forward that, when given, ask for something else: such a forward runs without exits.
    tail: the first module after the last block. tail_takes_all: the tail combines the hidden states with something of the whole batch (a
        timestep embedding).
    guidance: how the two rows of an image come: in one `batch`, or in two `calls`. guided: reads it from the forward's arguments.
    time: (scale, offset) that turn the class's `timestep` into the scheduler's, which falls during sampling: `scale * timestep + offset`.
    width: config entries whose product is D. prefix_tokens: attribute with the number of tokens before the image tokens.
    image_tokens: (transformer, arguments of its forward) -> (R, N) bool, for classes whose tokens before the tail are text and image and
        lie elsewhere in every row; None: all are image tokens (but for the prefix).
    inner: the first module inside a block that sees the hidden states; work is counted there.
    keeps_exited_rows: empty: rows that stopped are dropped. Else the reason why they are carried along, unused and counted as executed.
    turned: its pipeline hands the solver minus the output, and times turned around.
    counts: config entries that say how many blocks each list has, in the order of the lists.
    outputs: how many channels the model puts out, where its attribute or config entry `out_channels` does not say so.

    Raises:
        ValueError: a field of another kind, or lists that contradict each other.
    """

    class_name: str
    blocks: str
    single_blocks: str | None = None
    block_classes: tuple[str, ...] = ()
    returns: Returns = "image"
    concatenated: tuple[str, ...] = ()
    row_arguments: tuple[str, ...] = ()
    earlier: dict[str, Callable[[int, int], int | None]] = field(default_factory=dict)
    residuals: tuple[str, ...] = ()
    plain_if: tuple[str, ...] = ()
    tail: str = "norm_out"
    tail_takes_all: bool = True
    guidance: Literal["batch", "calls"] = "batch"
    guided: Callable[[Mapping[str, Any]], bool] | None = None
    time: tuple[float, float] = (1.0, 0.0)
    width: tuple[str, ...] = ("num_attention_heads", "attention_head_dim")
    prefix_tokens: str | None = None
    image_tokens: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
    inner: str = "attn1"
    keeps_exited_rows: str = ""
    turned: bool = False
    counts: tuple[str, ...] = ("num_layers", "num_single_layers")
    outputs: Callable[[nn.Module], int] | None = None

    def __post_init__(self) -> None:
        names = ("block_classes", "concatenated", "row_arguments", "residuals", "plain_if", "width", "counts")
        wrong = [f"{name}={getattr(self, name)!r}" for name in names if not isinstance(getattr(self, name), tuple)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}, expected tuples of names, such as ('temb',)")
        if not self.class_name or not self.blocks:
            raise ValueError(f"class_name={self.class_name!r}, blocks={self.blocks!r}, expected names")
        if self.returns not in get_args(Returns):
            raise ValueError(f"returns={self.returns!r}, expected one of {get_args(Returns)}")
        if self.guidance not in ("batch", "calls"):
            raise ValueError(f"guidance={self.guidance!r}, expected 'batch' or 'calls'")
        if not set(self.concatenated) <= set(self.lists):
            raise ValueError(f"concatenated={self.concatenated}, expected names among the lists {self.lists}")
        if len(self.time) != 2 or not self.time[0]:
            raise ValueError(f"time={self.time}, expected (scale, offset) with a scale that is not 0")

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the block lists, in the order in which they run."""
        return (self.blocks,) if self.single_blocks is None else (self.blocks, self.single_blocks)


def _uvit_skip(layer: int, num_layers: int) -> int | None:
    """Out-block `layer` takes what in-block `L - 1 - layer` returned."""
    return num_layers - 1 - layer if layer > num_layers // 2 else None


def _hunyuan_skip(layer: int, num_layers: int) -> int | None:
    """Blocks 0..L/2-2 push what they return, blocks L/2+1..L-1 pop it."""
    return 2 * (num_layers // 2) - 1 - layer if layer > num_layers // 2 else None


def _qwen_outputs(model: nn.Module) -> int:
    """The config has the channels of an unpacked pixel."""
    return model.config.patch_size**2 * model.config.out_channels


def _dit_guided(arguments: Mapping[str, Any]) -> bool:
    """DiTPipeline under guidance gives the same samples twice, and 1000, the null class, to the second half alone. An image of the null
    class beside others has a sample of its own."""
    labels, samples = arguments["class_labels"], arguments["hidden_states"]
    half, odd = divmod(len(labels), 2)
    return not odd and bool((labels[half:] == 1000).all()) and torch.equal(samples[:half], samples[half:])


def _lumina_image_tokens(transformer: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Each row is its own text, its image, and padding up to the longest row."""
    lengths = arguments["encoder_attention_mask"].sum(1)[:, None]  # (R, 1)
    height, width = arguments["hidden_states"].shape[-2:]
    num_image = (height // transformer.config.patch_size) * (width // transformer.config.patch_size)
    places = torch.arange(int(lengths.max()) + num_image, device=lengths.device)[None]  # (1, N)
    return (places >= lengths) & (places < lengths + num_image)


_BASIC = ("BasicTransformerBlock",)
_CROSS = ("timestep", "encoder_hidden_states", "encoder_attention_mask", "attention_mask")
_SINGLE = "single_transformer_blocks"

MODEL_SPECS: dict[str, ModelSpec] = {
    family.class_name: family
    for family in (
        ModelSpec(
            "UViTTransformer2DModel",
            "transformer_blocks",
            block_classes=("UViTBlock",),
            earlier={"skip": _uvit_skip},
            tail_takes_all=False,
            prefix_tokens="num_prefix_tokens",
            inner="attn",
        ),
        ModelSpec(
            "DiTTransformer2DModel",
            "transformer_blocks",
            block_classes=_BASIC,
            row_arguments=("timestep", "class_labels"),
            guided=_dit_guided,
        ),
        ModelSpec("PixArtTransformer2DModel", "transformer_blocks", block_classes=_BASIC, row_arguments=_CROSS),
        ModelSpec(
            "SD3Transformer2DModel",
            "transformer_blocks",
            block_classes=("JointTransformerBlock", "SD3SingleTransformerBlock"),
            returns="text, image",  # the last block returns None for the text
            row_arguments=("temb", "joint_attention_kwargs"),
            residuals=("block_controlnet_hidden_states",),
            plain_if=("skip_layers",),  # skip-layer guidance: a third prediction, of the conditional rows alone
            inner="attn",
        ),
        ModelSpec(
            "FluxTransformer2DModel",
            "transformer_blocks",
            single_blocks=_SINGLE,
            block_classes=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
            returns="text, image",
            row_arguments=("temb", "joint_attention_kwargs"),
            residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
            guidance="calls",
            time=(1000.0, 0.0),
            inner="attn",
        ),
        ModelSpec(
            "SanaTransformer2DModel",
            "transformer_blocks",
            block_classes=("SanaTransformerBlock",),
            row_arguments=_CROSS,
            residuals=("controlnet_block_samples",),
        ),
        ModelSpec(
            "HunyuanDiT2DModel",
            "blocks",
            block_classes=("HunyuanDiTBlock",),
            row_arguments=("temb", "encoder_hidden_states"),
            earlier={"skip": _hunyuan_skip},
            residuals=("controlnet_block_samples",),  # added to the long skips
        ),
        ModelSpec(
            "WanTransformer3DModel",
            "blocks",
            block_classes=("WanTransformerBlock",),
            row_arguments=("encoder_hidden_states", "temb"),
            guidance="calls",
        ),
        ModelSpec(
            "QwenImageTransformer2DModel",
            "transformer_blocks",
            block_classes=("QwenImageTransformerBlock",),
            returns="text, image",
            row_arguments=("temb", "encoder_hidden_states_mask", "modulate_index", "joint_attention_kwargs"),
            residuals=("controlnet_block_samples",),
            guidance="calls",
            time=(1000.0, 0.0),
            inner="attn",
            outputs=_qwen_outputs,
        ),
        ModelSpec(
            "Flux2Transformer2DModel",
            "transformer_blocks",
            single_blocks=_SINGLE,
            block_classes=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
            returns="text, image",
            concatenated=(_SINGLE,),
            row_arguments=("temb_mod_img", "temb_mod_txt", "temb_mod", "joint_attention_kwargs"),
            plain_if=("kv_cache_mode",),  # reference images: the parent cuts their tokens off before the tail
            guidance="calls",
            time=(1000.0, 0.0),
            inner="attn",
        ),
        ModelSpec(
            "CogVideoXTransformer3DModel",
            "transformer_blocks",
            block_classes=("CogVideoXBlock",),
            returns="image, text",
            row_arguments=("temb", "attention_kwargs"),
            tail="norm_final",
        ),
        ModelSpec(
            "LTXVideoTransformer3DModel",
            "transformer_blocks",
            block_classes=("LTXVideoTransformerBlock",),
            row_arguments=("encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask"),
        ),
        ModelSpec(
            "Lumina2Transformer2DModel",
            "layers",
            block_classes=("Lumina2TransformerBlock",),
            row_arguments=("attention_mask", "image_rotary_emb", "temb"),
            guidance="calls",
            time=(-1000.0, 1000.0),
            width=("hidden_size",),
            image_tokens=_lumina_image_tokens,
            inner="attn",
            turned=True,
        ),
        ModelSpec(
            "HunyuanVideoTransformer3DModel",
            "transformer_blocks",
            single_blocks=_SINGLE,
            block_classes=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
            returns="image, text",
            row_arguments=("temb", "attention_mask"),
            guidance="calls",
            inner="attn",
        ),
    )
}


# The classes that the package's own tests hold against diffusers; those that users register come on top.
TESTED = frozenset(MODEL_SPECS)


def register_model(family: ModelSpec) -> None:
    """Make a transformer class known to `attach_exits`. What is written down is believed: hold it against a transformer of that class with
    `family_check.check_model`, for a forgotten row argument may be hidden by broadcasting.

    Raises:
        ValueError: the class is known already, or something else than a Family.
    """
    if not isinstance(family, ModelSpec):
        raise ValueError(f"{family!r}, expected Family(...)")
    add_row(MODEL_SPECS, family.class_name, family, called="the family table")


def model_spec_of(transformer: nn.Module) -> ModelSpec:
    """The table's row for a transformer.

    Raises:
        ValueError: its class is unknown.
    """
    return family_row(MODEL_SPECS, transformer, module=__name__)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer of the table, in the order in which they run; depth d is the first d of them."""
    return [block for name in model_spec_of(transformer).lists for block in getattr(transformer, name)]


def width_of(transformer: nn.Module) -> int:
    """D, the width of a transformer's image tokens."""
    return math.prod(transformer.config[name] for name in model_spec_of(transformer).width)
