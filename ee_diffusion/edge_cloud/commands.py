"""The work of `ee-diffusion cloud serve`, `edge split` and `edge generate`; their flags are in flags.py.

ee-diffusion edge split --model MODEL --exits 5 10 --output parts
ee-diffusion cloud serve --model parts --port 50051
ee-diffusion edge generate --model parts --tokenizer MODEL --cloud 127.0.0.1:50051 --threshold 0.8 ...
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from contextlib import ExitStack

from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.heads import LearnedExits
from ee_diffusion.edge_cloud.client import CloudClient
from ee_diffusion.edge_cloud.codec import KINDS
from ee_diffusion.edge_cloud.edge import Edge
from ee_diffusion.edge_cloud.grpc_transport import RemoteTransport
from ee_diffusion.edge_cloud.server import CloudServer, serve
from ee_diffusion.edge_cloud.sessions import ContextManager, Limits
from ee_diffusion.edge_cloud.split import load_part, split_model
from ee_diffusion.edge_cloud.tokens import Tokens
from ee_diffusion.edge_cloud.worker import Backend, Metrics, Worker

TOKEN = "EE_DIFFUSION_TOKEN"


def run_split(options: argparse.Namespace) -> None:
    """Write both parts and print what they hold."""
    source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    model = AutoModelForCausalLM.from_pretrained(options.model, **source).eval()
    for side, part in split_model(model, options.output, exits=tuple(options.exits)).items():
        print(f"{options.output}/{side}: layers {part.layers.start}..{part.layers.stop - 1} of {part.num_layers}")


def run_serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, part = load_part(options.model, "cloud", dtype=KINDS[options.dtype], device=options.device)
    manager = ContextManager(model, part, limits=limits_of(options))
    metrics = Metrics()
    serve_backend(Worker(manager, metrics, batch=options.batch, slice=options.slice), options, metrics=metrics)


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that the flags say."""
    return Limits(
        sessions=options.sessions,
        owner_sessions=options.owner_sessions,
        total_bytes=options.megabytes * 10**6,
        owner_bytes=options.owner_megabytes * 10**6,
        positions=options.positions,
        idle_seconds=options.idle_seconds,
    )


def serve_backend(worker: Backend, options: argparse.Namespace, *, metrics: Metrics | None = None) -> None:
    """Put the gRPC server before a worker, until SIGTERM."""
    server = CloudServer(
        worker,
        port=options.port,
        tokens=None if options.tokens is None else Tokens.read(options.tokens),
        metrics=metrics,
        host=options.host,
        certificate=options.certificate,
        key=options.key,
        log_calls=not options.quiet,
    )
    serve(server, metrics_port=options.metrics_port)


def run_generate(options: argparse.Namespace) -> None:
    """Print the answer, and who said its tokens."""
    if options.cloud is not None and ":" not in options.cloud:
        raise ValueError(f"--cloud {options.cloud}, expected host:port")
    if options.always_ask and options.cloud is None:
        raise ValueError("--always_ask without --cloud, expected somebody to ask")
    model, part = load_part(options.model, "edge", dtype=KINDS[options.dtype], device=options.device)
    source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, **source)
    heads = None
    if options.exits is not None:
        heads = LearnedExits.load(options.exits).at(part.exits).bind(model, part_of=part.fingerprint)
    if options.chat:
        asked = [{"role": "user", "content": options.prompt}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        ids = tokenizer(options.prompt, return_tensors="pt")
    ids = ids["input_ids"]
    ends = {*part.end_tokens, tokenizer.eos_token_id} - {None}
    limits = {"max_new_tokens": options.max_new_tokens, "eos_token_id": sorted(ends)}
    with ExitStack() as stack:
        cloud = None
        if options.cloud is not None:
            secret = {"token": os.environ.get(TOKEN), "certificate": options.certificate}
            transport = stack.enter_context(
                RemoteTransport(options.cloud, part, width=model.config.hidden_size, **secret)
            )
            waits = {"deadline": options.deadline, "retry_after": options.retry_after}
            cloud = stack.enter_context(CloudClient(transport, kind=options.encoding, **waits))
        out = Edge(model, part, heads=heads).generate(ids, _policy(options, part.exits), cloud, **limits)
    if out.losses:
        said = f"{len(out.losses)} times without an answer, the edge said its own token: {out.losses[0][1]}"
        print(f"ee-diffusion edge: warning: the cloud was asked {said}", file=sys.stderr)
    print(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True))
    counts = {source: out.sources.count(source) for source in sorted(set(out.sources))}
    print(
        json.dumps({"tokens": counts, "seconds": round(out.total, 3), "bytes": out.payload, "losses": out.losses[:5]})
    )


def _policy(options: argparse.Namespace, exits: tuple[int, int]) -> Policy:
    if options.always_ask:
        return Policy()
    if options.policy is not None:
        return Policy.load(options.policy)
    return Policy(Threshold(options.threshold, "max_probability"), exits=exits)
