"""The calls of wire.proto by name, without a generated stub: path, request and reply of each, and statuses for refusals.

wire_pb2.py is generated from wire.proto: `make proto`.
"""

from __future__ import annotations

import grpc

from ee_diffusion.edge_cloud import wire_pb2 as wire

VERSION = 2
SERVICE = "ee_diffusion.cloud.v2.Cloud"
CALLS = {
    "Open": (wire.OpenRequest, wire.OpenReply),
    "Upload": (wire.UploadRequest, wire.UploadReply),
    "Next": (wire.NextRequest, wire.NextReply),
    "Rollback": (wire.RollbackRequest, wire.Empty),
    "Close": (wire.CloseRequest, wire.Empty),
}
ENCODINGS = {"float32": wire.FLOAT32, "float16": wire.FLOAT16, "bfloat16": wire.BFLOAT16, "int8": wire.INT8}
STATUS = {
    "unknown": grpc.StatusCode.NOT_FOUND,
    "limit": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "missing": grpc.StatusCode.FAILED_PRECONDITION,
    "unavailable": grpc.StatusCode.UNAVAILABLE,
}
