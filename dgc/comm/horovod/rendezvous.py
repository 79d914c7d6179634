"""Where ranks meet when Horovod is begun again in one process under Gloo: at a store of their own.

horovodrun's store is for one life. Its server forgets who is done with one group of ranks when
another group is complete (Horovod 0.28.1, http_server.py: finished_list.clear()). So of some groups
it keeps the first life's addresses, and of others drops the second's before all have read them.
hvd.init() then ends the process ("Connection refused"), or waits until Gloo gives up: seen in 7 of
340 lives of two ranks, with and without dynamic process sets. So each further life gets a store of
rank 0's, found through horovodrun's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any

from dgc.comm.horovod import addresses
from dgc.comm.pieces import stall_seconds

_ADDRESS, _PORT = "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"
_ANSWER_WITHIN_S = 5.0
_LOOK_AGAIN_S = 0.05
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy


class _Handler(BaseHTTPRequestHandler):
    """What Horovod asks of a store: PUT, GET, and DELETE, which nothing depends on."""

    server: _Store

    def do_PUT(self) -> None:
        self.server.values[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, b"")

    def do_GET(self) -> None:
        value = self.server.values.get(self.path)
        self._answer(404 if value is None else 200, value or b"")

    def do_DELETE(self) -> None:
        self._answer(200, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Store(ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("", 0), _Handler)
        self.values: dict[str, bytes] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Meeting:
    """One rank's further life, from before hvd.init() until after hvd.shutdown()."""

    def __init__(self, number: int) -> None:
        """number: of the life, on all ranks the same. Waits for rank 0.

        Raises: TimeoutError if rank 0 does not come.
        """
        self._before = {name: os.environ[name] for name in (_ADDRESS, _PORT)}
        self._store = None
        url = f"http://{self._before[_ADDRESS]}:{self._before[_PORT]}/parsimony-life-{number}/store"
        if int(os.environ["HOROVOD_RANK"]) == 0:
            self._store = _Store()
            port = self._store.server_address[1]
            _put(url, json.dumps([socket.gethostname(), addresses.own(), port]).encode())
            found = addresses.LOOPBACK
        else:
            host, of_rank_0, port = json.loads(_get(url))
            found = _first_that_answers(addresses.to_try(host, of_rank_0), port)
        os.environ |= {_ADDRESS: found, _PORT: str(port)}

    def close(self) -> None:
        os.environ |= self._before
        if self._store is not None:
            self._store.shutdown()
            self._store.server_close()


def is_by_gloo() -> bool:
    return {_ADDRESS, _PORT, "HOROVOD_RANK"} <= os.environ.keys()


def _put(url: str, data: bytes) -> None:
    request = urllib.request.Request(url, data=data, method="PUT")
    _direct.open(request, timeout=_ANSWER_WITHIN_S).close()


def _get(url: str) -> bytes:
    """Wait until somebody has put something there."""
    limit, start = stall_seconds(), time.monotonic()
    while True:
        try:
            with _direct.open(url, timeout=_ANSWER_WITHIN_S) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
        if limit and time.monotonic() - start > limit:
            raise TimeoutError(f"waited {limit:g} s for rank 0 to begin Horovod again")
        time.sleep(_LOOK_AGAIN_S)


def _first_that_answers(candidates: list[str], port: int) -> str:
    for address in candidates:
        with contextlib.suppress(OSError), socket.create_connection((address, port), 5):
            return address
    raise RuntimeError(f"rank 0 cannot be reached at {', '.join(candidates)}, port {port}")
