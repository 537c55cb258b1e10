"""The commands `cloud serve`, `edge split` and `edge generate`.

python -m ee_diffusion.decoding.cloud.commands edge split --model MODEL --exits 5 10 --output parts
python -m ee_diffusion.decoding.cloud.commands cloud serve --model parts --port 50051
python -m ee_diffusion.decoding.cloud.commands edge generate --model parts --tokenizer MODEL --cloud 127.0.0.1:50051 --threshold 0.8 ...

Tokens of clients are read from files or the environment, never from the command line. Here: flags only.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from contextlib import ExitStack

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_diffusion.core.criteria import Threshold
from ee_diffusion.core.policy import Policy
from ee_diffusion.decoding.cloud.client import CloudClient
from ee_diffusion.decoding.cloud.context import ContextManager, Limits
from ee_diffusion.decoding.cloud.edge import Edge
from ee_diffusion.decoding.cloud.encoding import KINDS
from ee_diffusion.decoding.cloud.remote import RemoteTransport
from ee_diffusion.decoding.cloud.server import CloudServer, serve
from ee_diffusion.decoding.cloud.split import load_part, split_model
from ee_diffusion.decoding.cloud.tokens import Tokens
from ee_diffusion.decoding.cloud.worker import Backend, Metrics, Worker

TOKEN = "EE_DIFFUSION_TOKEN"


def register(commands) -> None:
    """Add `cloud` and `edge` to the subparsers of a command line."""
    cloud = commands.add_parser("cloud", help="the upper layers of a model, for edges that ask")
    serving = cloud.add_subparsers(required=True).add_parser("serve", help="serve a cloud part")
    add_serve_flags(serving)
    serving.set_defaults(run=run_serve)
    edge = commands.add_parser("edge", help="the lower layers of a model").add_subparsers(required=True)
    split = edge.add_parser("split", help="write both parts of a model")
    split.add_argument("--model", required=True, help="Folder of a causal language model.")
    split.add_argument("--gguf_file", help="A GGUF file in that folder to load from.")
    split.add_argument("--exits", type=int, nargs=2, required=True, help="Depths of the edge's two exits.")
    split.add_argument("--output", required=True, help="Where edge/ and cloud/ go.")
    split.set_defaults(run=run_split)
    _generate_flags(edge.add_parser("generate", help="generate, alone or with a cloud"))


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """What a server can be told."""
    parser.add_argument("--model", required=True, help="What `edge split` wrote.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--tokens", help="JSON file: token -> client, perhaps with an expiry. Without it anybody may ask."
    )
    parser.add_argument("--certificate", help="PEM file, for TLS.")
    parser.add_argument("--key", help="PEM file, for TLS.")
    parser.add_argument("--metrics_port", type=int, help="Prometheus metrics on loopback.")
    parser.add_argument("--sessions", type=int, default=256, help="Most sessions in all.")
    parser.add_argument("--owner_sessions", type=int, default=64, help="Most sessions of a client.")
    parser.add_argument("--megabytes", type=int, default=2048, help="Most memory of all sessions.")
    parser.add_argument("--positions", type=int, default=4096, help="Most positions of a session.")
    parser.add_argument("--idle_seconds", type=float, default=300.0, help="A session is forgotten after so long.")
    parser.add_argument("--batch", type=int, default=64, help="Most questions answered in one pass.")
    parser.add_argument("--quiet", action="store_true", help="No line for every call in the log.")
    parser.add_argument("--slice", type=int, default=64, help="Most positions of one prompt in one pass.")
    parser.add_argument("--dtype", default="float32", choices=[name for name in KINDS if name != "int8"])


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="What `edge split` wrote.")
    parser.add_argument("--tokenizer", required=True, help="Folder of the tokenizer.")
    parser.add_argument("--gguf_file", help="A GGUF file in that folder to read the tokenizer from.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, required=True)
    sure = parser.add_mutually_exclusive_group(required=True)
    sure.add_argument("--threshold", type=float, help="The edge is sure above this largest probability.")
    sure.add_argument("--policy", help="A file that Policy.save wrote.")
    sure.add_argument("--always_ask", action="store_true", help="No exit is ever sure.")
    parser.add_argument("--cloud", help="host:port; without it the edge is alone.")
    parser.add_argument("--certificate", help="PEM file of the authority, for TLS.")
    parser.add_argument("--encoding", default="float16", choices=sorted(KINDS))
    parser.add_argument("--deadline", type=float, default=2.0, help="Seconds a token may wait for the cloud.")
    parser.add_argument("--retry_after", type=float, default=5.0, help="Seconds without trying after a loss.")
    parser.set_defaults(run=run_generate)


def run_split(options: argparse.Namespace) -> None:
    """Write both parts and print what they hold."""
    source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    model = AutoModelForCausalLM.from_pretrained(options.model, **source).eval()
    for side, part in split_model(model, options.output, exits=tuple(options.exits)).items():
        print(f"{options.output}/{side}: layers {part.layers.start}..{part.layers.stop - 1} of {part.num_layers}")


def run_serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model, part = load_part(options.model, "cloud", dtype=KINDS[options.dtype])
    manager = ContextManager(model, part, limits=limits_of(options))
    metrics = Metrics()
    serve_backend(Worker(manager, metrics, batch=options.batch, slice=options.slice), options, metrics=metrics)


def limits_of(options: argparse.Namespace) -> Limits:
    """The limits that the flags say."""
    return Limits(
        options.sessions, options.owner_sessions, options.megabytes * 10**6, options.positions, options.idle_seconds
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
    model, part = load_part(options.model, "edge", dtype=torch.float32)
    source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, **source)
    ids = tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    limits = {"max_new_tokens": options.max_new_tokens, "eos_token_id": tokenizer.eos_token_id}
    with ExitStack() as stack:
        cloud = None
        if options.cloud is not None:
            secret = {"token": os.environ.get(TOKEN), "certificate": options.certificate}
            transport = stack.enter_context(
                RemoteTransport(options.cloud, part, width=model.config.hidden_size, **secret)
            )
            waits = {"deadline": options.deadline, "retry_after": options.retry_after}
            cloud = stack.enter_context(CloudClient(transport, kind=options.encoding, **waits))
        out = Edge(model, part).generate(ids, _policy(options, part.exits), cloud, **limits)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    register(parser.add_subparsers(required=True))
    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
