"""What CE-CoLLM is compared with: the whole model at the cloud, and the naive split that sends every state again for every token.

python -m ee_diffusion.edge_cloud.baselines MODEL    (serves the whole model on loopback, for measurements; prints its port)

N positions, D width.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ee_diffusion.edge_cloud.client import CloudLost, Transport, Upload
from ee_diffusion.edge_cloud.codec import encode

_SERVICE, _CALL = "ee_diffusion.cloud.whole", "Generate"


@dataclass(frozen=True)
class Told:
    """A whole answer: its new tokens, the cloud's seconds, and the seconds until it was there."""

    tokens: list[int]
    cloud: float
    total: float


@torch.no_grad()
def whole_answer(
    model: PreTrainedModel, input_ids: Tensor, *, max_new_tokens: int, eos_token_id: int | None = None
) -> tuple[list[int], list[float]]:
    """Greedy search of the whole model for one sequence (1, N): new tokens, and at each how far the best logit is above the second."""
    cache, new = DynamicCache(), input_ids
    tokens: list[int] = []
    gaps: list[float] = []
    for _ in range(max_new_tokens):
        logits = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        if tokens[-1] == eos_token_id:
            break
        new = best.indices[None, :1]
    return tokens, gaps


class WholeServer:
    """The whole model behind one call: token ids in, new token ids out. For measurements on loopback. A context manager."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._server = grpc.server(ThreadPoolExecutor(1))
        handler = grpc.unary_unary_rpc_method_handler(self._generate)  # bytes in, bytes out
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_CALL: handler}),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> WholeServer:
        self._server.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.stop(None).wait()

    def wait(self) -> None:
        """Until the process is ended."""
        self._server.wait_for_termination()

    def _generate(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        asked, begun = json.loads(request), time.monotonic()
        ids = torch.tensor([asked["ids"]])
        tokens, _ = whole_answer(self.model, ids, max_new_tokens=asked["count"], eos_token_id=asked["end"])
        return json.dumps({"tokens": tokens, "seconds": time.monotonic() - begun}).encode()


def ask_whole(
    address: str, input_ids: Tensor, *, max_new_tokens: int, eos_token_id: int | None = None, timeout: float
) -> Told:
    """The answer of a `WholeServer` at host:port. The connection is made before the clock starts, as an edge's is."""
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(timeout=timeout)
        call = channel.unary_unary(f"/{_SERVICE}/{_CALL}")
        begun = time.monotonic()
        request = {"ids": input_ids[0].tolist(), "count": max_new_tokens, "end": eos_token_id}
        said = json.loads(call(json.dumps(request).encode(), timeout=timeout))
        return Told(said["tokens"], said["seconds"], time.monotonic() - begun)


class NaiveSplit:
    """A client in the place of CloudClient that sends the states of all positions with every question, in float32, and waits for that.

    The cloud does keep what it computed (it would lose by far otherwise), so that only the sending is naive. `payload` as CloudClient's.
    """

    def __init__(self, transport: Transport, *, deadline: float):
        self.transport, self.deadline, self.payload = transport, deadline, 0
        self._states: list[Tensor] = []
        self._session: str | None = None

    def __enter__(self) -> NaiveSplit:
        return self

    def __exit__(self, *exception) -> None:
        if self._session is not None:
            try:
                self.transport.close(self._session, timeout=self.deadline)
            except CloudLost:
                self._session = None  # it expires by itself

    def upload(self, first: int, hidden: Tensor) -> None:
        """Keep the states (N, D) until somebody asks."""
        self._states.append(hidden)

    def ask(self, position: int, *, vocabulary: int) -> tuple[int, float]:
        """The token after `position`, and the cloud's own seconds. Raises CloudLost."""
        if self._session is None:
            self._session = self.transport.open(timeout=self.deadline)
        hidden = torch.cat(self._states)
        upload = Upload(0, len(hidden), "float32", encode(hidden, kind="float32"))
        self.transport.upload(self._session, upload, timeout=self.deadline)
        self.payload += len(upload.payload)
        sent: Future = Future()
        sent.set_result(None)
        return self.transport.next(self._session, position, sending=sent, timeout=self.deadline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Folder of a causal language model.")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    with WholeServer(model) as server:
        print(json.dumps({"listening": server.port}), flush=True)
        server.wait()


if __name__ == "__main__":
    main()
