"""A TPU API for tests: nodes and queued resources like the real ones, in Google's messages.

Google's client reaches it by gRPC, and gcloud itself by REST. A test lists the states of the
machines in advance; each query returns the next one, and the last one repeats. A job preempts its
own machines by writing further states to the file `state` in the folder.
"""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from concurrent import futures

import grpc
from google.cloud import tpu_v2
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2, json_format

Operation = operations_pb2.Operation
Queued = tpu_v2.QueuedResourceState.State
READY = {"nodes": "READY", "queuedResources": "ACTIVE"}
# In which a queued resource can be deleted without `force`, though it has nodes.
IDLE = ("ACCEPTED", "FAILED", "SUSPENDED")
QUOTA = "Quota limit TPUV5sPerProjectPerZone has been exceeded"  # why a queued resource fails
HTTP = {"NOT_FOUND": 404, "PERMISSION_DENIED": 403, "ALREADY_EXISTS": 409}


class Refused(Exception):
    """What the API answers in place of a result; `code` is a name of gRPC's."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Api:
    """Nodes and queued resources, and all requests."""

    def __init__(self, folder):
        self.folder = folder
        self.requests = []
        self.lives = []  # states of every creation in turn; ready at once where there is none
        self.refusal = None  # what every question is answered with
        self.nodes, self.queued, self.states, self.operations = {}, {}, {}, {}

    @property
    def asked(self):
        """Names of the calls so far, without those for operations."""
        return [type(request).__name__.removesuffix("Request") for request in self.requests]

    def GetNode(self, request):
        node = self._found(self.nodes, request.name)
        if request.name in self.states:  # else it is one of a queued resource
            node.state = tpu_v2.Node.State[self._next_state(request.name)]
        return node

    def CreateNode(self, request):
        name = f"{request.parent}/nodes/{request.node_id}"
        self._add_node(name, request.node)
        self._begin(name)
        return self._operation(request.node)

    def DeleteNode(self, request):
        self._found(self.nodes, request.name)
        del self.nodes[request.name]
        return self._operation(empty_pb2.Empty())

    def GetQueuedResource(self, request):
        queued = self._found(self.queued, request.name)
        state = self._next_state(request.name)
        queued.state.state = Queued[state]
        if state == "FAILED":
            queued.state.failed_data.error.message = QUOTA
        [spec] = queued.tpu.node_spec
        node = f"{spec.parent}/nodes/{spec.node_id}"
        if state == "ACTIVE" and node not in self.nodes:
            self._add_node(node, spec.node)
            self.nodes[node].state = tpu_v2.Node.State.READY
        if state == "SUSPENDED":
            self.nodes.pop(node, None)
        return queued

    def CreateQueuedResource(self, request):
        name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        if name in self.queued:
            raise Refused("ALREADY_EXISTS", f"Resource '{name}' already exists")
        [spec] = request.queued_resource.tpu.node_spec
        if spec.parent != request.parent or not spec.node_id:
            raise Refused("INVALID_ARGUMENT", "The node has another parent, or no id")
        self.queued[name] = request.queued_resource
        self._begin(name)
        return self._operation(request.queued_resource)

    def DeleteQueuedResource(self, request):
        queued = self._found(self.queued, request.name)
        [spec] = queued.tpu.node_spec
        node = f"{spec.parent}/nodes/{spec.node_id}"
        if node in self.nodes and queued.state.state.name not in IDLE and not request.force:
            raise Refused("FAILED_PRECONDITION", f"{request.name} has nodes; use force")
        self.nodes.pop(node, None)
        del self.queued[request.name]
        return self._operation(empty_pb2.Empty())

    def GetOperation(self, request):
        """Done at the second look."""
        operation = self.operations[request.name]
        seen = Operation()
        seen.CopyFrom(operation)
        operation.done = True
        if not seen.done:
            seen.ClearField("response")
        return seen

    def answer(self, method, request):
        """What `method` answers; raises Refused."""
        if method != "GetOperation":
            self.requests.append(request)
            if self.refusal:
                raise self.refusal
        return getattr(self, method)(request)

    def _found(self, resources, name):
        if name not in resources:
            raise Refused("NOT_FOUND", f"Resource '{name}' was not found")
        return resources[name]

    def _add_node(self, name, node):
        if name in self.nodes:
            raise Refused("ALREADY_EXISTS", f"Resource '{name}' already exists")
        if not (node.accelerator_type and node.runtime_version):
            raise Refused("INVALID_ARGUMENT", "A node needs accelerator type and runtime version")
        self.nodes[name] = node

    def _begin(self, name):
        ready = READY[name.split("/")[-2]]
        self.states[name] = self.lives.pop(0) if self.lives else [ready]

    def _next_state(self, name):
        states, told = self.states[name], self.folder / "state"
        if told.exists():
            states[:] = told.read_text().split()
            told.unlink()
        return states.pop(0) if len(states) > 1 else states[0]

    def _operation(self, response):
        name = f"projects/p/locations/z/operations/operation-{len(self.operations)}"
        packed = any_pb2.Any()
        packed.Pack(getattr(type(response), "pb", lambda same: same)(response))
        self.operations[name] = Operation(name=name, response=packed)
        return Operation(name=name)


# Method -> what it takes and what it gives.
METHODS = {
    "GetNode": (tpu_v2.GetNodeRequest, tpu_v2.Node),
    "CreateNode": (tpu_v2.CreateNodeRequest, Operation),
    "DeleteNode": (tpu_v2.DeleteNodeRequest, Operation),
    "GetQueuedResource": (tpu_v2.GetQueuedResourceRequest, tpu_v2.QueuedResource),
    "CreateQueuedResource": (tpu_v2.CreateQueuedResourceRequest, Operation),
    "DeleteQueuedResource": (tpu_v2.DeleteQueuedResourceRequest, Operation),
}


@contextlib.contextmanager
def grpc_door(api):
    """Serves `api` by gRPC; gives the address."""

    def handler(method, takes, gives):
        def call(request, context):
            try:
                return api.answer(method, request)
            except Refused as refused:
                return context.abort(grpc.StatusCode[refused.code], str(refused))

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=getattr(takes, "deserialize", None) or takes.FromString,
            response_serializer=getattr(gives, "serialize", None) or gives.SerializeToString,
        )

    tpu = {method: handler(method, *messages) for method, messages in METHODS.items()}
    operations = {
        "GetOperation": handler("GetOperation", operations_pb2.GetOperationRequest, Operation)
    }
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler("google.cloud.tpu.v2.Tpu", tpu),
            grpc.method_handlers_generic_handler("google.longrunning.Operations", operations),
        ]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def rest_call(verb, path, query, body):
    """Method and request of an HTTP request, as the protos' HTTP rules say."""
    match = re.fullmatch(r"/v2/((projects/\w+/locations/\w+)/(\w+)(?:/([\w-]+))?)", path)
    name, parent, kind, _ = match.groups()
    if kind == "operations":
        return "GetOperation", operations_pb2.GetOperationRequest(name=name)
    noun = {"nodes": "Node", "queuedResources": "QueuedResource"}[kind]
    method = {"GET": "Get", "POST": "Create", "DELETE": "Delete"}[verb] + noun
    takes = METHODS[method][0]
    if verb == "POST":
        field, message = {
            "nodes": ("node", tpu_v2.Node),
            "queuedResources": ("queued_resource", tpu_v2.QueuedResource),
        }[kind]
        identity = {f"{field}_id": query.get(f"{noun[0].lower()}{noun[1:]}Id", "")}
        made = message.from_json(body, ignore_unknown_fields=False)
        return method, takes(parent=parent, **{field: made}, **identity)
    forced = {"force": True} if query.get("force", "").lower() == "true" else {}
    return method, takes(name=name, **forced)


@contextlib.contextmanager
def rest_door(api):
    """Serves `api` by REST; gives the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def _serve(self):
            url = urllib.parse.urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = dict(urllib.parse.parse_qsl(url.query))
            try:
                answer = api.answer(*rest_call(self.command, url.path, query, body))
            except Refused as refused:
                code = HTTP.get(refused.code, 400)
                said = {"code": code, "message": str(refused), "status": refused.code}
                self._send(code, {"error": said})
            else:
                message = getattr(type(answer), "pb", lambda same: same)(answer)
                self._send(200, json_format.MessageToDict(message))

        def _send(self, code, value):
            text = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
