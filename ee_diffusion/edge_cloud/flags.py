"""Flags of `ee-diffusion cloud serve`, `edge split` and `edge generate`. Loads nothing; the work is in commands.py.

Tokens of clients are read from files or the environment, never from the command line.
"""

from __future__ import annotations

import argparse

COMMANDS = "ee_diffusion.edge_cloud.commands"
ENCODINGS = ("bfloat16", "float16", "float32", "int8")  # the names in codec.py
DTYPES = ENCODINGS[:-1]


def register(commands) -> None:
    """Add `cloud` and `edge` to the subparsers of a command line."""
    cloud = commands.add_parser("cloud", help="the upper layers of a model, for edges that ask")
    serving = cloud.add_subparsers(required=True).add_parser("serve", help="serve a cloud part")
    add_serve_flags(serving)
    serving.set_defaults(work=f"{COMMANDS}:run_serve")
    edge = commands.add_parser("edge", help="the lower layers of a model").add_subparsers(required=True)
    split = edge.add_parser("split", help="write both parts of a model")
    split.add_argument("--model", required=True, help="Folder of a causal language model.")
    split.add_argument("--gguf_file", help="A GGUF file in that folder to load from.")
    split.add_argument("--exits", type=int, nargs=2, required=True, help="Depths of the edge's two exits.")
    split.add_argument("--output", required=True, help="Where edge/ and cloud/ go.")
    split.set_defaults(work=f"{COMMANDS}:run_split")
    _generate_flags(edge.add_parser("generate", help="generate, alone or with a cloud"))


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """What a server can be told."""
    parser.add_argument("--model", required=True, help="What `edge split` wrote.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--tokens",
        help="JSON file: token -> client, perhaps with an expiry. Without it anybody may ask, and a client is an address.",
    )
    parser.add_argument("--certificate", help="PEM file, for TLS.")
    parser.add_argument("--key", help="PEM file, for TLS.")
    parser.add_argument("--metrics_port", type=int, help="Prometheus metrics on loopback.")
    parser.add_argument("--sessions", type=int, default=256, help="Most sessions in all.")
    parser.add_argument("--owner_sessions", type=int, default=64, help="Most sessions of a client.")
    parser.add_argument("--megabytes", type=int, default=2048, help="Most memory of all sessions.")
    parser.add_argument("--owner_megabytes", type=int, default=1024, help="Most memory of a client's sessions.")
    parser.add_argument("--positions", type=int, default=4096, help="Most positions of a session.")
    parser.add_argument("--idle_seconds", type=float, default=300.0, help="A session is forgotten after so long.")
    parser.add_argument("--batch", type=int, default=64, help="Most questions answered in one pass.")
    parser.add_argument("--quiet", action="store_true", help="No line for every call in the log.")
    parser.add_argument("--slice", type=int, default=64, help="Most positions of one prompt in one pass.")
    _place_flags(parser)


def _place_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="Of the states: the same at edge and cloud.")
    parser.add_argument("--device", default="cpu", help="Where the part runs: cpu, cuda, cuda:1, ...")


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="What `edge split` wrote.")
    parser.add_argument("--tokenizer", required=True, help="Folder of the tokenizer.")
    parser.add_argument("--gguf_file", help="A GGUF file in that folder to read the tokenizer from.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--chat", action="store_true", help="Ask through the tokenizer's chat template.")
    parser.add_argument("--max_new_tokens", type=int, required=True)
    sure = parser.add_mutually_exclusive_group(required=True)
    sure.add_argument("--threshold", type=float, help="The edge is sure above this largest probability.")
    sure.add_argument("--policy", help="A file that Policy.save wrote.")
    sure.add_argument("--always_ask", action="store_true", help="No exit is ever sure.")
    parser.add_argument(
        "--exits", help="File of trained exits (exits.safetensors); without it the model's own tail answers."
    )
    parser.add_argument("--cloud", help="host:port; without it the edge is alone.")
    parser.add_argument("--certificate", help="PEM file of the authority, for TLS.")
    parser.add_argument("--encoding", default="float16", choices=ENCODINGS)
    parser.add_argument("--deadline", type=float, default=2.0, help="Seconds a token may wait for the cloud.")
    _place_flags(parser)
    parser.add_argument("--retry_after", type=float, default=5.0, help="Seconds without trying after a loss.")
    parser.set_defaults(work=f"{COMMANDS}:run_generate")
