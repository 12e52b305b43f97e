"""Prints the name and the text of the status that grpcio's server gives for a message that is over
its limit. It echoes messages of up to 100 bytes.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import grpc
from cluster import DEADLINE_SECONDS

echo = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.max_receive_message_length", 100)])
server.add_generic_rpc_handlers(
    (grpc.method_handlers_generic_handler("test.Echo", {"Echo": echo}),)
)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    call = channel.unary_unary("/test.Echo/Echo")
    assert call(b"x", timeout=DEADLINE_SECONDS) == b"x"
    try:
        call(b"x" * 200, timeout=DEADLINE_SECONDS)
    except grpc.RpcError as refused:
        print(json.dumps([refused.code().name, refused.details()]))
server.stop(None).wait()
