"""A process of its own that takes OTLP over gRPC: `python otlp_collector.py FILE [CERT KEY]` prints
its endpoint, and writes each span to `FILE` as a line of JSON before it answers. It ends when its
standard input does.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, file: Path):
        self.file, self.lock = file.open("a"), Lock()

    def Export(self, request, context):  # noqa: N802
        found = [
            {
                "process": values(resource.resource.attributes)["service.name"],
                "trace": span.trace_id.hex(),
                "id": span.span_id.hex(),
                "parent": span.parent_span_id.hex(),
                "name": span.name,
                "status": span.status.code,
                "attributes": values(span.attributes),
            }
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self.lock:
            self.file.writelines(json.dumps(span) + "\n" for span in found)
            self.file.flush()
        return trace_service_pb2.ExportTraceServiceResponse()


def values(attributes) -> dict:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


file, *signed = map(Path, sys.argv[1:])
server = grpc.server(ThreadPoolExecutor(2))
trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(file), server)
if signed:
    cert, key = (path.read_bytes() for path in signed)
    credentials = grpc.ssl_server_credentials([(key, cert)])
    scheme, port = "https", server.add_secure_port("127.0.0.1:0", credentials)
else:
    scheme, port = "http", server.add_insecure_port("127.0.0.1:0")
server.start()
print(f"{scheme}://127.0.0.1:{port}", flush=True)
sys.stdin.read()
server.stop(None).wait()
