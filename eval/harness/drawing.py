"""How a candidate draws on a U-ViT pipeline: with its exits, or with one of diffusers' caches. Not here: which candidates there are."""

from __future__ import annotations

from dataclasses import replace

from ee_diffusion.diffusion.exits.oracle import OracleExits
from ee_diffusion.diffusion.guidance import cfg_labels
from ee_diffusion.diffusion.pipelines.sampling import Generated, generate
from ee_diffusion.diffusion.pipelines.uvit import EarlyExitPipeline
from eval.harness.baselines import BASELINES, CachedPipeline
from eval.harness.interleave import Candidate, Draw, Labels
from eval.harness.options import SamplingOptions
from eval.harness.step_caches import NamedExits


def drawer(pipeline: EarlyExitPipeline, sampling: SamplingOptions, exits: NamedExits) -> Draw:
    """Draws a candidate's images with the exits that it names. An oracle's time is without what its shadow of the full model took."""
    baselines = dict[str, CachedPipeline]()

    def draw(candidate: Candidate, chosen: list[int], labels: Labels, first: int) -> Generated:
        call = {"num_inference_steps": candidate.steps, "guidance_scale": sampling.guidance_scale}
        call |= {"batch_size": sampling.batch_size, "first_id": first}
        if candidate.kind in BASELINES:
            if candidate.name not in baselines:
                baselines[candidate.name] = BASELINES[candidate.kind](
                    pipeline, candidate.value, num_steps=candidate.steps, guidance_scale=sampling.guidance_scale
                )
            return baselines[candidate.name].generate(chosen, labels, **call)
        pipeline.exits = own = exits[candidate.exits]
        if not isinstance(own, OracleExits):
            return generate(pipeline, chosen, labels, exit_policy=candidate.policy, **call)
        rows = {"guidance_scale": sampling.guidance_scale, "device": pipeline.transformer.device}
        own.labels, own.seconds = cfg_labels(labels, pipeline.transformer.config.null_class, **rows), 0.0
        drawn = generate(pipeline, chosen, labels, exit_policy=candidate.policy, **call)
        return replace(drawn, seconds=(sum(drawn.seconds) - own.seconds,))

    return draw
