"""Any gRPC client can talk to the service: plain grpcio, with descriptors that the server itself
tells.
"""

import signal

import pytest
from cluster import DEADLINE_SECONDS, Cluster
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory
from grpc_apart import Channel, Refused, Stream, printed
from grpc_reflection.v1alpha import reflection_pb2
from test_end_to_end import inputs, service  # noqa: F401

SELECTION = "superbatch.v1.SelectionService"
HEALTH = "grpc.health.v1.Health"
COORDINATOR, WORKER = "superbatch.v1.CoordinatorService", "superbatch.v1.WorkerService"
DELIVERY = "superbatch.v1.DeliveryService"
REFLECTION = {f"grpc.reflection.{version}.ServerReflection" for version in ("v1", "v1alpha")}
SERVICES = {SELECTION, COORDINATOR, HEALTH, *REFLECTION}


class Plain:
    """Calls by name, as grpcurl does: descriptors by reflection, messages and stubs made of
    them.
    """

    def __init__(self, address: str):
        self.channel = Channel(address)
        self.pool = descriptor_pool.DescriptorPool()
        self.files: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *_) -> None:
        self.channel.close()

    def reflect(self, **asked: str) -> reflection_pb2.ServerReflectionResponse:
        # Messages of v1 and v1alpha are the same on the wire.
        (answer,) = self.channel.call(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            [reflection_pb2.ServerReflectionRequest(**asked).SerializeToString()],
            "stream_stream",
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        return answer

    def services(self) -> set[str]:
        return {
            found.name for found in self.reflect(list_services="").list_services_response.service
        }

    def learn(self, **asked: str) -> None:
        """Takes the file that was asked for into the pool, after all that it imports."""
        for data in self.reflect(**asked).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            if file.name in self.files:
                continue
            self.files[file.name] = file
            for name in file.dependency:
                self.learn(file_by_filename=name)
            self.pool.Add(file)

    def service(self, name: str):
        try:
            return self.pool.FindServiceByName(name)
        except KeyError:
            self.learn(file_containing_symbol=name)
            return self.pool.FindServiceByName(name)

    def message(self, name: str, /, **fields):
        self.service(SELECTION)
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))(**fields)

    def call(self, service: str, method: str, /, requests=None, **fields):
        """One call. `requests`: what is sent where it is no single message of `fields`."""
        found = self.service(service).FindMethodByName(method)
        ask, answer = (
            message_factory.GetMessageClass(kind) for kind in (found.input_type, found.output_type)
        )
        kind = "_".join(
            "stream" if many else "unary"
            for many in (found.client_streaming, found.server_streaming)
        )
        sent = [message.SerializeToString() for message in requests or [ask(**fields)]]
        return self.channel.call(f"/{service}/{method}", sent, kind, answer.FromString)


def rpc_status():
    """The class of google.rpc.ErrorInfo and of the google.rpc.Status around it, by their published
    numbers.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="status_for_tests.proto",
        package="google.rpc",
        syntax="proto3",
        dependency=["google/protobuf/any.proto"],
    )
    status, info = file.message_type.add(name="Status"), file.message_type.add(name="ErrorInfo")
    for message, number, name, kind in [
        (status, 1, "code", field.TYPE_INT32),
        (status, 2, "message", field.TYPE_STRING),
        (info, 1, "reason", field.TYPE_STRING),
        (info, 2, "domain", field.TYPE_STRING),
    ]:
        message.field.add(name=name, number=number, type=kind, label=field.LABEL_OPTIONAL)
    status.field.add(
        name="details",
        number=3,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_REPEATED,
        type_name=".google.protobuf.Any",
    )
    entry = info.nested_type.add(name="MetadataEntry")
    entry.options.map_entry = True
    for number, name in enumerate(("key", "value"), 1):
        entry.field.add(
            name=name, number=number, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL
        )
    info.field.add(
        name="metadata",
        number=3,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_REPEATED,
        type_name=".google.rpc.ErrorInfo.MetadataEntry",
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    found = [pool.FindMessageTypeByName(f"google.rpc.{name}") for name in ("Status", "ErrorInfo")]
    return [message_factory.GetMessageClass(kind) for kind in found]


STATUS, ERROR_INFO = rpc_status()


def error_info(error: Refused):
    """The ErrorInfo among an error's details."""
    (packed,) = [value for key, value in error.metadata if key == "grpc-status-details-bin"]
    status = STATUS.FromString(packed)
    assert (status.code, status.message) == (error.number, error.details)
    (detail,) = [
        detail for detail in status.details if detail.type_url.endswith("/google.rpc.ErrorInfo")
    ]
    return ERROR_INFO.FromString(detail.value)


@pytest.fixture(scope="module")
def plain(service):
    with Plain(service.address) as plain:
        yield plain


def test_health_is_told_by_the_standard_service(plain):
    for name in ("", SELECTION, COORDINATOR):
        assert plain.call(HEALTH, "Check", service=name).status == 1, "SERVING"
    with pytest.raises(Refused) as caught:
        plain.call(HEALTH, "Check", service=WORKER)
    assert caught.value.code == "NOT_FOUND"


def test_a_worker_tells_of_its_own_services(tmp_path):
    with Cluster(tmp_path, workers=1) as cluster, Plain(cluster.workers[0].address) as worker:
        assert worker.services() == {WORKER, DELIVERY, HEALTH, *REFLECTION}
        assert worker.call(HEALTH, "Check", service=WORKER).status == 1, "SERVING"


def test_reflection_tells_enough_to_call(plain):
    assert plain.services() == SERVICES, "what is served, and no more"
    assert list(plain.call(SELECTION, "ListRuns").runs) == []
    file = plain.files["superbatch/v1/selection.proto"]
    methods = {method.name for found in file.service for method in found.method}
    assert methods >= {
        "OpenRun",
        "GetRun",
        "ListRuns",
        "CloseRun",
        "Rewind",
        "SelectBatch",
        "PushWeights",
        "GetReceipt",
    }


def test_older_clients_find_reflection_under_its_older_name(service):
    """Python's own reflection client, like much else, knows v1alpha alone."""
    services, methods = printed("grpc_reflected.py", service.address, SELECTION)
    assert set(services) == SERVICES and "SelectBatch" in methods


def test_a_run_is_opened_and_served_without_our_client(plain, inputs):
    phase = plain.message("superbatch.v1.Phase", policy=1, super_batch_size=48, sub_batch_size=24)
    source = plain.message("superbatch.v1.Source", uri=(inputs / "pool").as_uri())
    spec = plain.message("superbatch.v1.RunSpec", sources=[source], phases=[phase])
    opened = plain.call(SELECTION, "OpenRun", run_id="plain", spec=spec)
    assert (opened.dataset_rows, opened.next_step, opened.spec.max_ahead) == (768, 0, 2)
    messages = list(
        plain.call(SELECTION, "SelectBatch", run_id="plain", step=0, rank=1, world_size=2)
    )
    assert [messages[0].WhichOneof("message"), messages[-1].WhichOneof("message")] == [
        "header",
        "trailer",
    ]
    assert messages[0].header.rows == messages[-1].trailer.rows == 12
    assert messages[0].header.stream_bytes == sum(
        len(message.arrow_ipc) for message in messages[1:-1]
    )
    assert [run.run_id for run in plain.call(SELECTION, "ListRuns").runs] == ["plain"]


@pytest.mark.parametrize(
    ("method", "fields", "code", "reason", "metadata"),
    [
        (
            "GetRun",
            {"run_id": "nobody"},
            "NOT_FOUND",
            "RUN_NOT_FOUND",
            {"run_id": "nobody"},
        ),
        (
            "GetRun",
            {"run_id": "../state"},
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
            {"field": "run_id"},
        ),
        (
            "OpenRun",
            {"run_id": "empty"},
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
            {"field": "spec"},
        ),
        (
            "SelectBatch",
            {"run_id": "nobody"},
            "NOT_FOUND",
            "RUN_NOT_FOUND",
            {"run_id": "nobody"},
        ),
        (
            "Rewind",
            {"run_id": "nobody"},
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
            {"field": "mode"},
        ),
    ],
)
def test_errors_carry_their_reason_for_programs(plain, method, fields, code, reason, metadata):
    with pytest.raises(Refused) as caught:
        answer = plain.call(SELECTION, method, **fields)
        if isinstance(answer, Stream):
            list(answer)
    assert caught.value.code == code
    info = error_info(caught.value)
    assert (info.domain, info.reason, dict(info.metadata)) == ("superbatch", reason, metadata)


def test_a_service_that_is_told_to_stop_says_so_and_lets_its_callers_go(inputs, tmp_path):
    with Cluster(tmp_path) as cluster, Plain(cluster.address) as plain:
        watch = plain.call(HEALTH, "Watch", service=SELECTION)
        assert next(watch).status == 1, "SERVING"
        learner = plain.message(
            "superbatch.v1.LearnerSpec", model_uri=(inputs / "learner").as_uri(), first_push=True
        )
        phase = plain.message(
            "superbatch.v1.Phase", policy=3, criterion=2, super_batch_size=48, sub_batch_size=24
        )
        source = plain.message("superbatch.v1.Source", uri=(inputs / "pool").as_uri())
        spec = plain.message(
            "superbatch.v1.RunSpec", sources=[source], learner=learner, phases=[phase]
        )
        plain.call(SELECTION, "OpenRun", run_id="stops", spec=spec)
        # It waits for the first push, which never comes; PREFETCH, so no deadline runs.
        waiting = plain.call(SELECTION, "SelectBatch", run_id="stops", world_size=1, intent=1)
        cluster.coordinator.wait_for(
            "superbatch_stage_duration_seconds_count", lambda count: count > 0
        )
        cluster.coordinator.process.send_signal(signal.SIGTERM)
        assert next(watch).status == 2, "NOT_SERVING"
        with pytest.raises(Refused) as caught:
            next(waiting)
        assert caught.value.code == "UNAVAILABLE"
        assert error_info(caught.value).reason == "SHUTTING_DOWN"
        watch.cancel()
        assert cluster.coordinator.process.wait(DEADLINE_SECONDS) == 0


def test_grpcio_says_too_large_in_the_words_that_the_rust_client_knows():
    """gRPC's C core has no code of its own for a message over its limit: proxies use the same one
    for rate limits, so the client goes by the text.
    """
    code, details = printed("grpc_echo.py")
    assert code == "RESOURCE_EXHAUSTED" and "larger than max" in details
