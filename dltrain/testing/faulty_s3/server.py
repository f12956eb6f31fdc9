"""The server: a thread for each connection, faults in front of S3's operations, and a way to steer it.

What steers it lies under ``/-/``, which is no name of a bucket: ``PUT /-/faults``, ``GET`` and ``DELETE /-/requests``,
``GET /-/uploads``, ``GET /-/folder``; all in JSON.

    with Objects(folder) as objects, Server(objects, port=0) as server:
        server.serve_forever()
"""

from __future__ import annotations

import json
import socketserver
import time
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, cast

from dltrain.testing.faulty_s3.api import Api
from dltrain.testing.faulty_s3.faults import Fate, Faults, FaultState, Throttle
from dltrain.testing.faulty_s3.objects import Objects, Received, Uploads
from dltrain.testing.faulty_s3.records import Journal, Record
from dltrain.testing.faulty_s3.wire import Answer, Request, S3Error, Span, read_request, send

HOST = "127.0.0.1"
CONTROL = "-"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Server(socketserver.ThreadingTCPServer):
    """Listens on the loopback address. Raises ``OSError`` where the port is taken."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, objects: Objects, port: int) -> None:
        super().__init__((HOST, port), Connection)
        self.objects = objects
        self.uploads = Uploads(objects)
        self.api = Api(objects, self.uploads)
        self.state = FaultState()
        self.journal = Journal()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}"


class Connection(socketserver.StreamRequestHandler):
    """One client's requests, one after the other."""

    rbufsize = 1 << 16
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client has gone, or a fault wants it to believe that we have
            while self._answer_one():
                pass

    def finish(self) -> None:
        with suppress(ConnectionError):
            super().finish()

    @property
    def _server(self) -> Server:
        return cast(Server, self.server)

    def _answer_one(self) -> bool:
        request = read_request(self.rfile, lambda: self.connection.sendall(_CONTINUE))
        if request is None:
            return False
        if request.bucket == CONTROL:
            send(self.connection, self._control(request), request.method, lambda _: None, Throttle())
        else:
            self._answer(request)
        return request.keeps_alive

    def _answer(self, request: Request) -> None:
        """Take in the body, meet the faults, answer."""
        state, journal = self._server.state, self._server.journal
        with self._server.objects.receiving(request, state.throttle(request.key)) as received:
            record = journal.begin(_record(request))
            fate = state.arrive(request)
            try:
                if fate.hangs:
                    self._hang(record)
                if fate.faults.latency:  # a sleep of 0 s takes 80 us
                    time.sleep(fate.faults.latency)
                self._send(self._result(request, received, fate), request, record)
            finally:
                state.leave(fate)
                journal.end(record)

    def _hang(self, record: Record) -> None:
        """Wait until the client gives up."""
        self._server.journal.end(record)
        while self.connection.recv(1 << 16):
            pass
        raise ConnectionAbortedError("never answered, on purpose")

    def _result(self, request: Request, received: Received, fate: Fate) -> Answer:
        if fate.refusal:
            return fate.refusal.answer()
        try:
            answer = self._server.api.answer(request, received)
        except S3Error as error:
            return error.answer()
        return self._struck(answer, answer.body, request, fate) if isinstance(answer.body, Span) else answer

    def _struck(self, answer: Answer, span: Span, request: Request, fate: Fate) -> Answer:
        """The answer with what befalls its body."""
        body = self._server.state.body(fate, request, span.length)
        if body.replaced:
            self._server.objects.invert(request.bucket, request.key)
        return replace(answer, body=replace(span, length=body.length, flip=body.flip, cut=body.cut))

    def _send(self, answer: Answer, request: Request, record: Record) -> None:
        def sent(count: int) -> None:
            record.bytes_sent += count

        record.status = answer.status
        try:
            send(self.connection, answer, request.method, sent, self._server.state.throttle(request.key))
        finally:
            answer.close()

    def _control(self, request: Request) -> Answer:
        server = self._server
        match request.method, request.key:
            case "PUT", "faults":
                return self._set_faults(request.body.read())
            case "GET", "requests":
                return _json([asdict(record) for record in server.journal.records()])
            case "DELETE", "requests":
                server.journal.forget()
                return Answer(204)
            case "GET", "uploads":
                return _json(server.uploads.unfinished())
            case "GET", "folder":
                return _json(str(server.objects.folder))
        return Answer(404)

    def _set_faults(self, body: bytes) -> Answer:
        try:
            given: dict[str, Any] = json.loads(body)
            for name in given:
                if isinstance(given[name], list):  # JSON has no tuples
                    given[name] = tuple(given[name])
            self._server.state.set(Faults(**given))
        except (ValueError, TypeError, AttributeError) as error:  # UserError is a ValueError
            return Answer(400, {}, f"{error}\n".encode())
        return Answer(204)


def _record(request: Request) -> Record:
    method = "LIST" if request.lists else request.method
    return Record(method, request.bucket, request.key, request.headers.get("range", ""), request.access_key)


def _json(value: Any) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())
