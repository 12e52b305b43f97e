"""What Python's own reflection client learns of a service at an address: `python grpc_reflected.py
ADDRESS SERVICE` prints the names of the services there and of the methods of `SERVICE`.
"""

import json
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

address, service = sys.argv[1:]
with grpc.insecure_channel(address.removeprefix("http://")) as channel:
    database = ProtoReflectionDescriptorDatabase(channel)
    services = list(database.get_services())
    found = DescriptorPool(database).FindServiceByName(service)
    print(json.dumps([services, list(found.methods_by_name)]))
