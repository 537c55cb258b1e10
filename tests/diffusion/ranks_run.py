"""One of two ranks that run tiny models together or beside each other; writes what it saw. usage: ranks_run.py SCENARIO FOLDER RANK"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import tensor_parallel
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig, TensorParallelConfig
from stock import dit_pipeline
from tiny_families import exits_for, forward, inputs_of, model_named
from tiny_pipelines import call_of, images_of, pipeline_named
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel

from ee_diffusion.core.criteria import DepthTable, Threshold
from ee_diffusion.core.distributed import JointDecision, gather_traces
from ee_diffusion.core.policy import Policy
from ee_diffusion.core.schedules import FixedDepth
from ee_diffusion.core.session import begin
from ee_diffusion.core.trace import Trace
from ee_diffusion.diffusion.exits.adapter import AdapterExits
from ee_diffusion.diffusion.exits.deediff import DenoisingExits
from ee_diffusion.diffusion.hooks.attach import attach_exits

RANKS, ROWS, PATIENCE = 2, [0, 1, 2, 3], timedelta(seconds=300)
MEASURE = Policy(Threshold(0.5), record_all=True)
WEIGHTS = getattr(ColwiseParallel, "src_data_rank", None) is not None  # what diffusers wants of torch (2.7)
MODEL_SPECS = ("FluxTransformer2DModel", "WanTransformer3DModel", "Flux2Transformer2DModel")


def inputs(name: str) -> dict[str, Any]:
    """Inputs whose tokens two ranks can share evenly: 6 text tokens, ids per row where the class's plan says so."""
    given = inputs_of(name, ROWS)
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, [0, 1, 2, 3, 4, 0]]
    if "txt_ids" in given:
        given["txt_ids"] = given["txt_ids"][[0, 1, 2, 3, 4, 0]]
    if name.startswith("Flux2"):
        given |= {key: given[key].expand(len(ROWS), *given[key].shape) for key in ("txt_ids", "img_ids")}
    return given


def share_tokens(model: nn.Module) -> nn.Module:
    """Context parallelism as `enable_parallelism` applies it; that asks for an accelerator, the parts it calls do not."""
    config = ContextParallelConfig(ulysses_degree=RANKS)
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    model._parallel_config = ParallelConfig(context_parallel_config=config)
    model._parallel_config.setup(dist.get_rank(), RANKS, torch.device("cpu"), mesh=mesh)
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(processor, "_parallel_config"):
            processor._parallel_config = model._parallel_config
    apply_context_parallel(model, config, model._cp_plan)
    return model


def share_weights(model: nn.Module) -> nn.Module:
    """Tensor parallelism, in the same way."""
    config = TensorParallelConfig(tp_degree=RANKS)
    model._parallel_config = ParallelConfig(tensor_parallel_config=config)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    model._parallel_config.setup(dist.get_rank(), RANKS, torch.device("cpu"), mesh=mesh)
    tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
    tensor_parallel.apply_tensor_parallel(model, config, model._tp_plan)
    return model


def exits_of(model: nn.Module) -> AdapterExits:
    """Exits from depth 1 on (some classes deal tokens out within their first block)."""
    made = exits_for(model)
    depths = made.depths[1:]
    fewer = AdapterExits.for_transformer(model, depths, rank=2)
    fewer.heads, fewer.uncertainty_modules = made.heads[1:], made.uncertainty_modules[1:]
    return fewer.eval()


def run(
    model: nn.Module, exits: AdapterExits, policy: Policy, given: dict[str, Any], *, joint_decision: bool = True
) -> dict:
    """One step -> its output and trace."""
    with attach_exits(model, exits) as attachment:
        if not joint_decision:
            attachment.joint_decision = None
        session = attachment.start(policy, rows=torch.arange(len(ROWS)), num_steps=1)
        with attachment.use(session.step(0, 700.0)):
            output = forward(model, given)
        return {"output": output} | facts(session.trace())


def facts(trace: Trace | None) -> dict[str, Any]:
    if trace is None:
        return {}
    return {name: getattr(trace, name) for name in ("samples", "rows", "depths", "scores", "ran")}


def together(name: str, share: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """One model on two ranks: what each rank's tokens say alone, then voted, then by a plan of the same depths."""
    given, whole, shared = inputs(name), model_named(name), share(model_named(name))
    exits = exits_of(whole)
    found: dict[str, Any] = {"plain": forward(whole, given), "off": run(shared, exits, Policy(), given)}
    found["apart"] = run(shared, exits, MEASURE, given, joint_decision=False)
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, found["apart"]["scores"])
    policy = found["policy"] = splitting(torch.stack(everyone)[:, 0])
    found["everyone"] = torch.stack(everyone)[:, 0]  # (ranks, K, E)
    found["voted"] = run(shared, exits, policy, given)
    plan = Policy(DepthTable((tuple(found["voted"]["depths"][0].tolist()),)))
    found["planned"], found["alone"] = run(shared, exits, plan, given), run(whole, exits, plan, given)
    return found


def splitting(scores: torch.Tensor) -> Policy:
    """The threshold under which most images stop elsewhere on one rank (scores (ranks, K, E)) than on another; where the ranks say the
    same, the one in the middle."""
    if torch.allclose(scores[0], scores[1], atol=1e-5):
        return Policy(Threshold(float(scores[0].quantile(0.6))))
    values = scores.flatten().sort().values
    values = (values[1:] + values[:-1]) / 2
    depths = [(scores > value).float().argmax(1) + ~(scores > value).any(1) * 99 for value in values]
    split = [int((one[0] != one[1]).sum()) for one in depths]
    return Policy(Threshold(float(values[max(range(len(split)), key=split.__getitem__)])))


def in_a_pipeline() -> dict[str, Any]:
    """A stock Flux pipeline, its transformer's tokens on two ranks, guided by a second call."""
    pipe = pipeline_named("flux")
    share_tokens(pipe.transformer)
    arguments = call_of("flux", [0, 1])
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        arguments[name] = arguments[name][:, [0, 1, 2, 3, 4, 0]]
    with attach_exits(pipe, exits_of(pipe.transformer), MEASURE) as attachment:
        images_of(pipe, arguments)
        scores = attachment.trace.scores
    with attach_exits(pipe, exits_of(pipe.transformer), Policy(Threshold(float(scores.quantile(0.8))))) as attachment:
        images = images_of(pipe, arguments)
        return {"output": images} | facts(attachment.trace)


def refused() -> dict[str, str]:
    """What ends in words, on every rank."""
    rank, model = dist.get_rank(), share_tokens(model_named("WanTransformer3DModel"))
    exits, other = exits_of(model), exits_for(model)
    dit = dit_pipeline().transformer
    dit._parallel_config = model._parallel_config
    after = DenoisingExits.for_transformer(dit, (1,))
    nan = torch.full((2,), torch.nan if rank else 0.3)
    calls: dict[str, Callable[[], Any]] = {
        "depth 0": lambda: attach_exits(model, other),
        "compiled": lambda: attach_exits(model, exits, compile_options={}),
        "after the tail": lambda: attach_exits(dit, after),
        "another policy": lambda: run(model, exits, Policy(schedule=FixedDepth(1 + rank)), inputs(MODEL_SPECS[1])),
        "another batch": lambda: begin(
            Policy(), 3, (1,), rows=torch.arange(2 + rank), num_steps=1, joint_decision=JointDecision()
        ),
        "other ids": lambda: begin(
            Policy(),
            3,
            (1,),
            rows=torch.arange(2),
            num_steps=1,
            samples=torch.arange(2) + rank,
            joint_decision=JointDecision(),
        ),
        "ids twice": lambda: gather_traces(trace_of(2)),
        "nobody": lambda: repr(gather_traces(None)),
        "one": lambda: repr(len(gather_traces(trace_of(2) if rank else None).samples)),
        "NaN of one rank": lambda: repr(JointDecision().least(nan).tolist()),
    }
    said = {}
    for name, call in calls.items():
        try:
            said[name] = str(call())
        except ValueError as error:
            said[name] = f"ValueError: {error}"
    return said


def trace_of(images: int) -> Trace:
    session = begin(Policy(), 3, (1,), rows=torch.arange(images), num_steps=1)
    session.step(0, 1.0).close()
    return session.trace()


def beside_each_other() -> dict[str, Any]:
    """Five images on two ranks (3 and 2) and, on the first, all on one: each rank's trace, the gathered one, the single process's."""
    rank, found = dist.get_rank(), {}
    for which, images in (("mine", [0, 1, 2] if rank == 0 else [3, 4]), ("single", [0, 1, 2, 3, 4])):
        pipe = pipeline_named("dit")
        with attach_exits(pipe, exits_for(pipe.transformer), Policy(Threshold(0.45))) as attachment:
            made = images_of(pipe, call_of("dit", images))
            found[which] = {"output": made} | facts(attachment.trace)
            if which == "mine":
                whole = gather_traces(attachment.trace, renumber=True)
                found["gathered"] = facts(whole)
                found["summary"] = whole.report().summary()
            else:
                found["single summary"] = attachment.trace.report().summary()
    return found


def good() -> dict[str, Any]:
    found: dict[str, Any] = {name: together(name, share_tokens) for name in MODEL_SPECS}
    if WEIGHTS:
        found["weights"] = together(MODEL_SPECS[0], share_weights)
    return found | {"pipeline": in_a_pipeline(), "refused": refused(), "beside": beside_each_other()}


def alone() -> dict[str, Any]:
    """The control: the same threshold, every rank deciding for itself."""
    name = MODEL_SPECS[0]
    given, shared = inputs(name), share_tokens(model_named(name))
    exits = exits_of(shared)
    scores = run(shared, exits, MEASURE, given, joint_decision=False)["scores"]
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, scores)
    return run(shared, exits, splitting(torch.stack(everyone)[:, 0]), given, joint_decision=False)


def main() -> None:
    scenario, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    patience = PATIENCE if scenario == "good" else timedelta(seconds=4)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / scenario}", rank=rank, world_size=RANKS, timeout=patience
    )
    try:
        found: Any = {"good": good, "alone": alone}[scenario]()
    except Exception:
        found = traceback.format_exc()
    torch.save(found, folder / f"{scenario}-{rank}.pt")


if __name__ == "__main__":
    main()
