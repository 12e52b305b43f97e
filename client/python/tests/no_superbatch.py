"""A gRPC server that knows no method, in a process of its own: it prints its port, and then each
method that it is asked for. It ends when its standard input does.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import grpc


class Nothing(grpc.GenericRpcHandler):
    def service(self, call):
        print(call.method, flush=True)


server = grpc.server(ThreadPoolExecutor(1), handlers=[Nothing()])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
sys.stdin.read()
server.stop(None).wait()
