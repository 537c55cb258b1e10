"""Exits beside what users do to a model: quantise, cast, offload, add adapters, switch attention, run two pipelines at once.

Under each of these a model with exits is held to the same laws: off is the model itself, an exit after k blocks is the model truncated
to k blocks under the same treatment, and detached is as before; all bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from diffusers.utils import is_peft_available, is_xformers_available
from stock import dit_pipeline
from tiny_families import TINY, exits_for, model_named
from tiny_pipelines import call_of, images_of, pipeline_named
from torch import Tensor

from ee_diffusion.core.criteria import DepthTable
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.hooks import attention
from ee_diffusion.diffusion.hooks.attach import attach_exits
from ee_diffusion.diffusion.hooks.attention import set_attention
from ee_diffusion.diffusion.hooks.truncate import truncate
from ee_diffusion.diffusion.model_specs import model_spec_of
from ee_diffusion.training.lora import add_lora

if is_peft_available():
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

needs_peft = pytest.mark.skipif(not is_peft_available(), reason="needs peft (ee-diffusion[lora])")
IMAGES, STEPS, CUT = 3, 2, 2
PLAN = Policy(DepthTable(((1, 4, 2),) * STEPS))


def draw(pipe: DiffusionPipeline, policy: Policy | None = None) -> tuple[Tensor, Trace | None]:
    """Three guided images of the tiny DiT, with exits that answer as the truncated model, or plain."""
    drawn = [torch.Generator().manual_seed(seed) for seed in range(IMAGES)]
    call = {"class_labels": [0, 1, 2], "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    if policy is None:
        return torch.from_numpy(pipe(generator=drawn, **call).images), None
    exits = exits_for(dit_pipeline().transformer, rank=0).to(pipe.transformer.dtype)
    with attach_exits(pipe, exits, policy) as attachment:
        return torch.from_numpy(pipe(generator=drawn, **call).images), attachment.trace


def grouped(kind: str) -> Callable[[DiffusionPipeline], object]:
    """Group offload; old versions of diffusers and torch together ask for an accelerator even to offload from the CPU to the CPU."""
    place = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "offload_type": kind}
    size = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def treat(pipe: DiffusionPipeline) -> None:
        try:
            apply_group_offloading(pipe.transformer, **place, **size)
        except RuntimeError as error:
            if "accelerator" not in str(error):
                raise
            pytest.skip(f"group offload needs an accelerator here: {error}")

    return treat


def quantised(pipe: DiffusionPipeline) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torchao.quantize_(pipe.transformer.transformer_blocks, torchao.Int8WeightOnlyConfig())


TREATMENTS: dict[str, Callable[[DiffusionPipeline], object]] = {
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
    "int8 weights": quantised,
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "group offload, blocks": grouped("block_level"),
    "group offload, leaves": grouped("leaf_level"),
    "sequential offload": lambda pipe: accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu")),
    "adapters": lambda pipe: adapted(pipe.transformer),
}


def adapted(transformer: torch.nn.Module) -> None:
    if not is_peft_available():
        pytest.skip("needs peft (ee-diffusion[lora])")
    torch.manual_seed(5)
    for name, parameter in add_lora(transformer, model_spec_of(transformer).lists, rank=2).named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


QUICK = ("int8 weights", "adapters", "group offload, blocks")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TREATMENTS])
def test_the_laws_hold_under_each_treatment(name: str):
    pipe, treat = dit_pipeline(), TREATMENTS[name]
    untreated, _ = draw(pipe)
    treat(pipe)
    plain, _ = draw(pipe)
    if name in ("bfloat16", "int8 weights", "layerwise casting", "adapters"):
        assert not torch.equal(plain, untreated), "the treatment does something"
    assert torch.equal(draw(pipe, Policy())[0], plain)
    cut, trace = draw(pipe, Policy(schedule=FixedDepth(CUT)))
    assert int(trace.ran.sum()) == STEPS * CUT * 2 * IMAGES
    shallow = dit_pipeline()
    if name == "adapters":  # the same random adapters in the first blocks: take them along, then cut
        treat(shallow)
        del shallow.transformer.transformer_blocks[CUT:]
    else:
        shallow.register_modules(transformer=truncate(shallow.transformer, CUT))
        treat(shallow)
    assert torch.equal(cut, draw(shallow)[0])
    mixed, trace = draw(pipe, PLAN)
    assert trace.ran.sum((0, 2)).tolist() == [STEPS * 2 * depth for depth in (1, 4, 2)]
    close = {"rtol": 0.05, "atol": 0.05} if name == "bfloat16" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(mixed[1], plain[1], **close)
    torch.testing.assert_close(mixed[2], cut[2], **close)
    assert torch.equal(draw(pipe)[0], plain)


@pytest.mark.parametrize(
    "name",
    ["group offload, blocks", pytest.param("sequential offload", marks=pytest.mark.slow), "int8 weights", "adapters"],
)
def test_a_treatment_after_attaching_is_one_before(name: str):
    first, then = dit_pipeline(), dit_pipeline()
    TREATMENTS[name](first)
    expected, _ = draw(first, PLAN)
    drawn = [torch.Generator().manual_seed(seed) for seed in range(IMAGES)]
    attachment = attach_exits(then, exits_for(then.transformer, rank=0), PLAN)
    TREATMENTS[name](then)
    call = {"class_labels": [0, 1, 2], "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    found = torch.from_numpy(then(generator=drawn, **call).images)
    assert torch.equal(found, expected)
    assert attachment.trace.depths.tolist() == [[1, 4, 2]] * STEPS


@needs_peft
def test_lora_weights_of_a_pipeline_loaded_before_and_after(tmp_path):
    made = pipeline_named("flux")
    made.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    made.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(made.transformer))
    policy, arguments = Policy(DepthTable(((1, 6, 3),) * 3)), {}
    images = {}
    for order in ("without", "before", "after"):
        pipe = pipeline_named("flux")
        exits = exits_for(model_named("FluxTransformer2DModel"), rank=0)
        if order == "before":
            pipe.load_lora_weights(tmp_path)
        with attach_exits(pipe, exits, policy) as attachment:
            if order == "after":
                pipe.load_lora_weights(tmp_path)
            images[order] = images_of(pipe, call_of("flux", [0, 1, 2], **arguments))
            assert attachment.trace.depths.tolist() == [[1, 6, 3]] * 3
            if order == "after":
                pipe.unload_lora_weights()
                torch.testing.assert_close(images_of(pipe, call_of("flux", [0, 1, 2])), images["without"])
    assert torch.equal(images["before"], images["after"])
    assert not torch.allclose(images["before"], images["without"], atol=1e-3)


def test_two_threads_with_two_pipelines_do_not_meet():
    plans = [Policy(DepthTable(((1, 4, 2),) * STEPS)), Policy(DepthTable(((3, 0, 4),) * STEPS))]
    pipes = [dit_pipeline(), dit_pipeline()]
    alone = [draw(pipe, plan) for pipe, plan in zip(pipes, plans, strict=True)]
    start, found = threading.Barrier(2), {}

    def run(which: int) -> None:
        start.wait()
        found[which] = [draw(pipes[which], plans[which]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        for images, trace in found[which]:
            assert torch.equal(images, alone[which][0])
            assert torch.equal(trace.ran, alone[which][1].ran)


# --- attention


DISPATCHED = (
    "UViTTransformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "QwenImageTransformer2DModel",
)
CLASSIC = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "SanaTransformer2DModel")


def active() -> object:
    """diffusers' choice for the whole process."""
    return _AttentionBackendRegistry.get_active_backend()[0]


@pytest.mark.parametrize("name", DISPATCHED)
def test_a_backend_that_reaches_the_modules(name: str):
    model, before = model_named(name), active()
    switch = set_attention(model, "_native_math")
    assert switch.switched == sum(getattr(m, "processor", None) is not None for m in model.modules()) > 0
    assert (switch.backend, switch.kept, active()) == ("_native_math", {}, before)
    assert set_attention(model, None).switched == switch.switched


@pytest.mark.parametrize("name", CLASSIC)
def test_a_backend_that_reaches_nothing_is_refused_and_nothing_changes(name: str):
    model, before = model_named(name), active()
    with pytest.raises(ValueError, match="reaches none of the"):
        set_attention(model, "_native_math")
    assert active() == before
    assert set_attention(model, "native").switched > 0, "they are native already"


def test_a_part_that_stays_is_named():
    assert set_attention(model_named("HunyuanVideoTransformer3DModel"), "_native_math").kept == {"AttnProcessor2_0": 1}


@pytest.mark.parametrize("name", [*DISPATCHED, *CLASSIC])
def test_backends_that_are_none_or_do_not_run_here(name: str, monkeypatch):
    model = model_named(name)
    with pytest.raises(ValueError, match=r"'nonsense', expected one of"):
        set_attention(model, "nonsense")
    if not is_xformers_available():
        with pytest.raises(ValueError, match=r"pip install 'ee-diffusion\[xformers\]'"):
            set_attention(model, "xformers")
    monkeypatch.setattr(attention, "is_xformers_available", lambda: True)
    with pytest.raises(ValueError, match=r"'xformers' does not run on cpu in torch\.float32"):
        set_attention(model, "xformers")
    assert not [m for m in model.modules() if getattr(getattr(m, "processor", None), "_attention_backend", None)]


def test_the_contract_with_xformers(monkeypatch):
    """What happens where it runs: the classic processors are exchanged one by one, and given back."""

    def exchange(module: Attention, wanted: bool) -> None:
        module.processor = XFormersAttnProcessor() if wanted else before[module]

    monkeypatch.setattr(attention, "_require_usable", lambda *_: None)
    monkeypatch.setattr("diffusers.models.attention_dispatch._check_attention_backend_requirements", lambda _: None)
    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", exchange)
    model, process = model_named("DiTTransformer2DModel"), active()
    before = {module: module.processor for module in model.modules() if isinstance(module, Attention)}
    assert (
        set_attention(model, "xformers").switched == len(before) == TINY["DiTTransformer2DModel"].config["num_layers"]
    )
    assert {type(module.processor).__name__ for module in before} == {"XFormersAttnProcessor"}
    assert active() == process
    assert set_attention(model, None).switched == len(before)
    assert all(module.processor is processor for module, processor in before.items())


def test_what_has_no_transformer_is_refused():
    with pytest.raises(ValueError, match="str has no transformer"):
        set_attention("dit", "native")
    with attention_backend("_native_math"):
        assert set_attention(model_named("FluxTransformer2DModel"), "native").switched == 6


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and is_xformers_available()), reason="needs a GPU and xformers")
def test_xformers_says_the_same():
    for made in (dit_pipeline(), pipeline_named("flux")):
        name = "flux" if "Flux" in type(made).__name__ else None
        pipe = made.to("cuda")

        def images(pipe=pipe, name=name) -> Tensor:
            return draw(pipe)[0] if name is None else images_of(pipe, call_of(name, [0, 1, 2]))

        expected = images()
        assert set_attention(pipe, "xformers").switched > 0
        torch.testing.assert_close(images(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_model_offload_on_a_gpu():
    pipe = dit_pipeline()
    pipe.enable_model_cpu_offload()
    exits = exits_for(dit_pipeline().transformer, rank=0).to("cuda")
    call = {"class_labels": [0, 1, 2], "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    with attach_exits(pipe, exits, PLAN) as attachment:
        for _ in range(2):
            pipe(**call)
            assert attachment.trace.depths.tolist() == [[1, 4, 2]] * STEPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_on_a_gpu(kind: str, stream: bool):
    """With a stream diffusers fetches the group that ran next the first time; blocks that are left out then were not asked for."""
    pipe, exits = dit_pipeline().to("cuda"), exits_for(dit_pipeline().transformer, rank=0).to("cuda")
    call = {"class_labels": [0, 1, 2], "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    drawn = [[torch.Generator().manual_seed(seed) for seed in range(IMAGES)] for _ in range(4)]
    plans = (Policy(schedule=FixedDepth(CUT)), PLAN, Policy(schedule=FixedDepth(CUT)), Policy())
    with torch.no_grad():
        expected = [
            draw_on(pipe, exits, plan, {"generator": one} | call) for plan, one in zip(plans, drawn, strict=True)
        ]
    size = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(
        pipe.transformer, onload_device=torch.device("cuda"), offload_type=kind, use_stream=stream, **size
    )
    for plan, images in zip(plans, expected, strict=True):
        again = [torch.Generator().manual_seed(seed) for seed in range(IMAGES)]
        torch.testing.assert_close(
            draw_on(pipe, exits, plan, {"generator": again} | call), images, rtol=1e-4, atol=1e-4
        )


def draw_on(pipe: DiffusionPipeline, exits: AdapterExits, policy: Policy, call: dict) -> Tensor:
    with attach_exits(pipe, exits, policy):
        return torch.from_numpy(pipe(**call).images)
