#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pycryptodome>=3.20,<5", "qingstor-sdk==2.6.0"]
# ///
"""wxsync: mirror container images and files on a word typed into a WeCom (企业微信) app.

What it does. Somebody types `nginx:latest`; the line is committed to images.txt in a GitHub
repository, a workflow there runs `wxsync.py copy LINE` once per image (skopeo, registry to
registry), and the person is told per image what came of it. Somebody sends an https link; the file
is streamed into QingStor and the person gets the download link. At midnight the list is emptied.

Where each secret goes.
    TOKEN, ENCODING_AES_KEY     nowhere: they check and decrypt what WeCom posts to us
    SECRET                      WECOM_API_URL, for an access token; never through a proxy
    GITHUB_TOKEN                GITHUB_API_URL only, no redirect takes it to another host
    QINGSTOR_SECRET_ACCESS_KEY  nowhere: it signs requests; never through a proxy
    PROXY_URL's password        the proxy
    DOCKER_PASSWORD             only in the workflow's job: a 0600 auth file for skopeo
Log lines and messages are masked by `Log`, should an answer or a bug ever hand it one of these.

Who is trusted. WeCom, because it knows TOKEN and ENCODING_AES_KEY; through it the users, as far
as to name images and links, never addresses inside our network. GitHub, QingStor and download
servers are not trusted to answer sensibly: answers are bounded, typed and cleaned before use.

What survives a crash. STATE_DIR/wxsync.state holds accepted requests, unsent messages and the ids
of answered ones; a request is in it before it is acknowledged. STATE_DIR/images.txt is the list.

How to read it. Top to bottom; each section uses only those above it, `serve` wires the service:
limits, settings, log, network, crypto, WeCom, GitHub, QingStor, downloads, reading a message,
state on disk, tasks, copying an image, server, midnight, command line. One message travels:
Server -> Callback -> read_message -> State.accept, then in the thread of a lane sync_images or
relay_file -> State.finish -> deliver.

Verify a copy with `python wxsync.py --version`, which prints the file's own SHA-256.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import email.utils
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import json
import os
import re
import secrets
import select
import selectors
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TextIO
from xml.parsers import expat

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VERSION = "1.0.0"

# ---- Limits and texts --------------------------------------------------------------------------

# Callbacks. WeCom waits 5 s and sends a few KiB; the rest is room, not need.
MAX_BODY_BYTES = 64 * 1024
MAX_HEAD_BYTES = 16 * 1024
REQUEST_SECONDS = 10.0  # from connection (or last answer) to a whole request
MAX_CONNECTIONS = 600 if os.name == "posix" else 400  # Windows' select() takes 512 sockets
# Chat (WeCom's document 90236): a text holds 2048 bytes; 30 messages a minute to one person.
MAX_TEXT_BYTES = 2048
MESSAGE_INTERVAL_SECONDS = 2.1  # to one person: 28 a minute, whatever restarts do
DUPLICATE_CHECK_SECONDS = 4 * 3600  # the most WeCom allows; retries within it are never seen twice
MAX_RESULT_MESSAGES = 10
MAX_IMAGES = 256  # a GitHub matrix holds 256 jobs
MAX_INPUT_CHARACTERS = 60_000  # a dispatch holds 65,535 in all
MAX_LINKS = 20  # per message; more is a script, not a person
MAX_REMEMBERED = 1000  # answered messages, so that memory and the state file stay bounded
REMEMBER_SECONDS = 1800.0  # at least; WeCom repeats within half a minute
# Other servers.
CONNECT_SECONDS = 10.0
CALL_SECONDS = 20.0  # GitHub itself gives up a request after 10 s
STALL_SECONDS = 30.0  # a transfer in which not one byte moved for so long is dead
MAX_ANSWER_BYTES = 4 * 1024 * 1024  # 100 jobs with their steps are under 1 MiB
KEEP_SECONDS = 55.0  # servers close idle connections after a minute or more
MAX_REDIRECTS = 10
GITHUB_PAUSES = (1.0, 3.0, 6.0, 12.0)  # between tries of one call
GITHUB_WAIT_SECONDS = 600.0  # the longest wait a rate limit may ask of a request
POLL_SECONDS = 3.2  # 19 calls a minute; a finished run is told within 5 s
JOBS_SECONDS = 30.0  # how often the jobs of a running run are counted
ODD_ANSWERS = 5  # in a row, then following a run is given up; 16 s cover GitHub's own lag
FIND_RUN_SECONDS = 12.0  # GitHub's list of runs lags; less than 10 would start runs twice
WATCH_SECONDS = 6 * 3600.0  # a job may not run longer on GitHub
PROBE_SECONDS = 300.0
PART_BYTES = 4 * 1024 * 1024  # the smallest part QingStor takes; three of them are in memory
READ_BYTES = 256 * 1024  # moved at once
SLOWEST_BYTES = 16 * 1024  # in STALL_SECONDS; a source that drips would hold the lane for hours
TRIES = 3  # of a part, of a resumed download without progress
DOWNLOAD_SECONDS = 6 * 3600.0
MIDNIGHT_RETRY_SECONDS = 600.0
CHECK_SECONDS = 15.0  # for all of `check`; it asks side by side
CLOCK_LOOK_SECONDS = 60.0  # how late a jump of the clock may be noticed
# Copying, in the workflow's job (which has 60 minutes).
INSPECT_SECONDS = 120.0
COPY_SECONDS = 45 * 60.0

INTERNAL_ERROR = "❌ 内部错误，请查看日志"
HELP = """📖 wxsync 使用说明

同步镜像（每行一个，或用逗号隔开）：
nginx:latest
bitnami/redis:7.0
ghcr.io/open-webui/open-webui:main
指定架构：--platform=linux/arm64 nginx:latest
多架构：--platform=all nginx:latest
改名：registry.k8s.io/pause:3.9 => pause:3.9

上传文件：发送 https:// 开头的链接

状态：查看进度　列表：今天的镜像"""
# CODE of a failed copy -> cause and cure. The codes are the contract with the workflow.
COPY_REASONS = {
    "not-found": ("源镜像或标签不存在", "核对名称和标签；私有镜像要设置 Secrets 的 SOURCE_AUTH"),
    "source-denied": (
        "源仓库拒绝读取：镜像不存在，或需要登录",
        "核对名称；私有镜像要设置 Secrets 的 SOURCE_AUTH",
    ),
    "target-denied": (
        "目标仓库拒绝写入",
        "在 ACR 控制台确认命名空间已创建、属于该账号，并打开“自动创建仓库”",
    ),
    "target-login": (
        "登录目标仓库失败",
        "DOCKER_PASSWORD 要填 ACR“访问凭证”里的固定密码（不是阿里云登录密码）；并核对地域和用户名",
    ),
    "target-mismatch": (
        "GitHub Secrets 的目标与 wxsync 的设置不同，没有复制",
        "让两处的 DOCKER_REGISTRY、DOCKER_NAMESPACE 一致",
    ),
    "no-platform": ("源镜像没有这个架构", "换一个 --platform，或用 --platform=all"),
    "rate-limited": ("源仓库限制拉取次数", "过一会再发；或在 SOURCE_AUTH 里放 Docker Hub 账号"),
    "network": ("连接镜像仓库失败", "再发一次；若总是失败，核对仓库地址"),
    "rejected": ("目标仓库不接受这个镜像的格式", "试试只复制一个架构，如 --platform=linux/amd64"),
    "timeout": ("复制超时", "再发一次，已传的层不会重传"),
    "error": ("复制失败", "打开运行地址查看日志"),
}


class Failure(Exception):
    """Expected trouble. str() is Chinese, says what to do and is safe to show to anybody."""


class Unreachable(Failure):
    """A server could not be reached or broke off; trying again may help."""


class Rejected(Exception):
    """A request that is refused with an HTTP status and an empty body."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def shown(text: str, limit: int = 60) -> str:
    """Return foreign text on one line, harmless and at most `limit` characters, for chat or log."""
    text = "".join(c if c.isprintable() else " " for c in text).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def split_text(text: str, limit_bytes: int) -> list[str]:
    """Split at line ends into pieces of at most limit_bytes UTF-8; a longer line is cut."""
    if len(text.encode()) <= limit_bytes:
        return [text]
    pieces = [""]
    for line in text.split("\n"):
        while len(line.encode()) > limit_bytes:
            head = line.encode()[:limit_bytes].decode(errors="ignore")
            pieces.append(head)
            line = line[len(head) :]
        joined = f"{pieces[-1]}\n{line}" if pieces[-1] else line
        if len(joined.encode()) <= limit_bytes:
            pieces[-1] = joined
        else:
            pieces.append(line)
    return [piece for piece in pieces if piece.strip()]


# ---- Settings ----------------------------------------------------------------------------------


def setting(default: Any, pattern: str = r"[^\r\n]*", meaning: str = "不能换行") -> Any:
    """Declare a text setting: None makes it required, pattern is for the whole value."""
    found = {"pattern": pattern, "meaning": meaning}
    return field(metadata=found) if default is None else field(default=default, metadata=found)


def number(default: int | None, low: int, high: int) -> Any:
    """Declare a setting that is a whole number."""
    found = {"low": low, "high": high, "meaning": f"应为 {low} 到 {high} 的整数"}
    return field(metadata=found) if default is None else field(default=default, metadata=found)


NAME = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"  # a path component of an image reference
REGISTRY = (r"[a-z0-9-]+(\.[a-z0-9-]+)*(:\d+)?", "应只有主机名，不带 https:// 和路径")
NAMESPACE = (rf"{NAME}(?:/{NAME})*", "应为小写字母、数字和 . _ -")
ADDRESS = (r"https?://[A-Za-z0-9.-]+(:\d+)?(/[\w.~/-]*)?", "应为 http:// 或 https:// 开头的地址")
PROXY = (
    r"(http|socks5)://([^@/\s]*@)?([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):\d+/?",
    "应为 http://主机:端口 或 socks5://主机:端口，可带 用户:密码@（特殊字符写成 %XX）",
)
PRINTABLE = (r"[\x21-\x7e]+", "不能有空格")


@dataclass(frozen=True, repr=False)
class Settings:
    """All settings of the service, by their environment names. Has no repr: it holds secrets."""

    CORP_ID: str = setting(None, r"[A-Za-z0-9_-]{1,64}", "应为“我的企业”页底部的企业 ID")
    AGENT_ID: int = number(None, 1, 2**31 - 1)
    SECRET: str = setting(None, *PRINTABLE)
    TOKEN: str = setting(None, r"[A-Za-z0-9]{1,32}", "应为接收消息页的 Token，最多 32 个字母或数字")
    ENCODING_AES_KEY: str = setting(None, r"[A-Za-z0-9+/]{43}", "应为 43 个字母或数字")
    GITHUB_TOKEN: str = setting(None, *PRINTABLE)
    GITHUB_REPO: str = setting(None, r"[\w-]+/[\w.-]+", "应写成 owner/repo，不带网址")
    DOCKER_REGISTRY: str = setting(None, *REGISTRY)
    DOCKER_NAMESPACE: str = setting(None, *NAMESPACE)
    GITHUB_BRANCH: str = setting("main", r"(?!.*\.\.)[\w./-]+", "不是分支名")
    PORT: int = number(3000, 1, 65535)
    HOST: str = setting("0.0.0.0", r"[\w.:-]+", "应为 IP 地址")  # noqa: S104 - WeCom must get in
    STATE_DIR: str = setting(".")
    ALLOWED_USERS: tuple[str, ...] = setting(())
    QINGSTOR_ACCESS_KEY_ID: str = setting("", *PRINTABLE)
    QINGSTOR_SECRET_ACCESS_KEY: str = setting("", *PRINTABLE)
    QINGSTOR_ZONE: str = setting("pek3a", r"[a-z0-9-]+", "应为区域名，如 pek3a")
    QINGSTOR_BUCKET: str = setting("tmp", r"[a-z0-9][a-z0-9-]{1,62}", "不是存储桶名")
    QINGSTOR_LINK_SECONDS: int = number(0, 0, 365 * 86400)
    MAX_FILE_MB: int = number(2048, 1, 40_000)  # 10,000 parts of 4 MiB
    PROXY_URL: str = setting("", *PROXY)
    NO_PROXY_DOMAINS: tuple[str, ...] = setting(("localhost", "127.0.0.1", "qingstor.com"))
    SYNC_TIMEOUT: int = number(300, 1, 6 * 3600)
    QUEUE_SIZE: int = number(10, 0, 1000)
    CALLBACK_MAX_AGE: int = number(600, 0, 86400)
    LOG_LEVEL: str = setting("INFO", "(?i:DEBUG|INFO|WARNING|ERROR)", "应为 DEBUG、INFO 等")
    WECOM_API_URL: str = setting("https://qyapi.weixin.qq.com", *ADDRESS)
    GITHUB_API_URL: str = setting("https://api.github.com", *ADDRESS)
    QINGSTOR_URL: str = setting("https://qingstor.com", *ADDRESS)
    PROXY_TEST_URL: str = setting("https://www.google.com", *ADDRESS)
    DANGEROUSLY_ALLOW_PRIVATE_URLS: str = setting("", "1", "只能为空或 1")

    @property
    def target_prefix(self) -> str:
        return f"{self.DOCKER_REGISTRY}/{self.DOCKER_NAMESPACE}"

    def secret_values(self) -> list[str]:
        """Return every value that must never be written anywhere."""
        password = urllib.parse.urlsplit(self.PROXY_URL).password or ""
        values = [self.SECRET, self.TOKEN, self.ENCODING_AES_KEY, self.GITHUB_TOKEN]
        return [*values, self.QINGSTOR_SECRET_ACCESS_KEY, password, urllib.parse.unquote(password)]


class SettingsError(Exception):
    """Settings are wrong; `problems` has one Chinese line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


ENV_LINE = re.compile(
    r"""(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(?:"([^"]*)"|'([^']*)'|(.*?))\s*(?:(?:^|\s)\#.*)?"""
)


def read_env_file(path: Path) -> dict[str, str]:
    """Read KEY=value lines (comments, `export`, quotes allowed); raise SettingsError with lines."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{path}: 读不出来：{error}"]) from error
    values, problems = {}, []
    for line_number, line in enumerate(map(str.strip, lines), 1):
        if match := ENV_LINE.fullmatch(line):
            value = next((v for v in match.groups()[1:] if v is not None), "")
            values[match[1]] = "" if value.startswith("#") else value
        elif line and not line.startswith("#"):
            problems.append(f"{path} 第 {line_number} 行看不懂，应为 KEY=value")
    if problems:
        raise SettingsError(problems)
    return values


def _convert(kind: str, rule: Mapping[str, Any], text: str) -> Any:
    """Return the value of one setting in its type; raise ValueError where it breaks its rule."""
    if kind == "int":
        if re.fullmatch(r"[0-9]{1,10}", text) and rule["low"] <= int(text) <= rule["high"]:
            return int(text)
    elif kind == "str":
        port = re.search(r":(\d+)/?$", text) if "://" in text else None
        if re.fullmatch(rule["pattern"], text, re.ASCII) and (not port or int(port[1]) < 65536):
            return text.rstrip("/") if "://" in text else text
    elif items := tuple(item.strip().lower() for item in text.split(",") if item.strip()):
        return items  # a list of nothing but commas is wrong: it would mean everybody
    raise ValueError(rule["meaning"])


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Return the Settings in environ; raise SettingsError with everything that is wrong at once."""
    values: dict[str, Any] = {}
    problems = []
    for entry in fields(Settings):
        text = environ.get(entry.name, "").strip()
        if text and not text.lower().startswith("your_"):  # a placeholder is no value
            try:
                values[entry.name] = _convert(str(entry.type), entry.metadata, text)
            except ValueError as error:
                problems.append(f"{entry.name}: {error}")
        elif entry.default is MISSING:
            problems.append(f"{entry.name}: 没有设置")
        elif entry.name == "NO_PROXY_DOMAINS" and entry.name in environ:
            values[entry.name] = ()
    if bool(values.get("QINGSTOR_ACCESS_KEY_ID")) != bool(values.get("QINGSTOR_SECRET_ACCESS_KEY")):
        problems.append("QINGSTOR_ACCESS_KEY_ID, QINGSTOR_SECRET_ACCESS_KEY: 两个要一起设置")
    if problems:
        raise SettingsError(problems)
    return Settings(**values)


# ---- Log ---------------------------------------------------------------------------------------


class Log:
    """Lines on a stream: masked, with control characters made harmless, one write each."""

    LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

    def __init__(self, level: str, hidden: Iterable[str], stream: TextIO) -> None:
        self._least = self.LEVELS.index(level.upper())
        self._hidden = {variant for value in hidden for variant in self._variants(value)}
        self._token: set[str] = set()
        self._stream = stream
        self._lock = threading.Lock()

    @staticmethod
    def _variants(value: str) -> set[str]:
        # Very short values would mask half of every line and protect nobody.
        return {value, urllib.parse.quote(value, safe="")} if len(value) >= 5 else set()

    def hide(self, value: str) -> None:
        """Mask value from now on, in place of the last one given (access tokens change)."""
        self._token = self._variants(value)

    def _write(self, level: int, text: str) -> None:
        if level < self._least:
            return
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.mask(text))
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        # A log that cannot be written (a full disk) is no reason to stop working.
        with self._lock, contextlib.suppress(OSError):
            self._stream.write(f"{stamp} {self.LEVELS[level]} {text}\n")
            self._stream.flush()

    def mask(self, text: str) -> str:
        """Return text without any secret."""
        for value in self._hidden | self._token:
            text = text.replace(value, "***")
        return text

    def debug(self, text: str) -> None:
        self._write(0, text)

    def info(self, text: str) -> None:
        self._write(1, text)

    def warning(self, text: str) -> None:
        self._write(2, text)

    def error(self, text: str) -> None:
        self._write(3, text)

    def close(self) -> None:
        """Write nothing more: a thread that writes while Python exits would crash it."""
        self._lock.acquire()

    def bug(self, where: str) -> None:
        """Log the exception being handled with its traceback, a line each."""
        for line in traceback.format_exc().splitlines():
            self._write(3, f"{where} | {line}")


# ---- Network: addresses, vetted connections, proxies, calls ------------------------------------

DEFAULT_PORTS = {"http": 80, "https": 443}
HOST_PATTERN = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|[0-9a-f:]*:[0-9a-f:.]*")
LOCAL_NAME = re.compile(r"(.*\.)?(localhost|local|internal|lan|home\.arpa|localdomain)|[^.:]*")
URL_SAFE = "/%:@!$&'()*+,;=~-._?"


class Url(NamedTuple):
    """An absolute http(s) address in the only form that is ever connected to."""

    scheme: str
    host: str  # ASCII, lower case, without brackets or a final dot
    port: int
    target: str  # path and query, percent-encoded, starts with "/"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


def parse_url(text: str) -> Url:
    """Return the Url of an address; raise Failure where it is none that we would connect to.

    The host is brought to ASCII first (IDNA turns full-width digits and dots into plain ones), so
    that what is checked is what is connected to.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        host = (parts.hostname or "").encode("idna").decode("ascii").lower().removesuffix(".")
        port = parts.port if parts.port is not None else DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise Failure(f"链接格式不正确：{shown(text)}") from error
    odd = re.search(r"[\s\\\x00-\x1f\x7f]", text) or "@" in parts.netloc
    if odd or parts.scheme not in DEFAULT_PORTS or not HOST_PATTERN.fullmatch(host) or not port:
        raise Failure(f"链接格式不正确（不能有空格、反斜杠或用户名密码）：{shown(text)}")
    query = f"?{urllib.parse.quote(parts.query, safe=URL_SAFE)}" if parts.query else ""
    path = urllib.parse.quote(parts.path or "/", safe=URL_SAFE.replace("?", ""))
    return Url(parts.scheme, host, port, path + query)


def follow_location(url: Url, location: str) -> Url:
    """Return where a redirect from url leads; raise Failure."""
    try:
        return parse_url(urllib.parse.urljoin(str(url), location))
    except ValueError as error:
        raise Failure(f"{url.host} 的重定向格式不正确") from error


def is_outside(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet, seen through its disguises.

    IPv6 counts only as global unicast (2000::/3, RFC 4291) and without 6to4 (RFC 3056) and Teredo
    (RFC 4380), which hide an IPv4 address; NAT64 and IPv4-compatible addresses lie outside of it.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if isinstance(ip, ipaddress.IPv4Address):
        # 192.0.0.0/24 is for protocols, 192.88.99.0/24 relays 6to4; Python calls parts global.
        special = str(ip).startswith(("192.0.0.", "192.88.99."))
        return ip.is_global and not ip.is_multicast and not special
    hidden = ip.sixtofour or ip.teredo
    return ip in ipaddress.ip_network("2000::/3") and ip.is_global and not hidden


def refuse_local_name(host: str) -> None:
    """Raise Failure for an inside address or a local name, where a proxy would resolve it."""
    try:
        # inet_aton knows the old spellings (127.1, 0x7f000001, 2130706433), as resolvers do.
        address = host if ":" in host else socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        inside = bool(LOCAL_NAME.fullmatch(host))
    else:
        inside = not is_outside(address)
    if inside:
        raise Failure(f"不允许访问内网地址：{host}")


# The first that fits: subclasses before their bases.
TROUBLES: tuple[tuple[type[BaseException], str], ...] = (
    (TimeoutError, "超时"),
    (ssl.SSLCertVerificationError, "TLS 证书不可信"),
    (ssl.SSLError, "TLS 握手失败"),
    (socket.gaierror, "域名解析失败"),
    (ConnectionRefusedError, "连接被拒绝"),
    (ConnectionError, "连接中断"),
    (http.client.HTTPException, "对方的回答不是正常的 HTTP"),
)


def explain(error: BaseException) -> str:
    """Return in Chinese what went wrong on a connection."""
    if isinstance(error, Failure):
        return str(error)
    said = getattr(error, "strerror", None) or type(error).__name__
    return next((text for kind, text in TROUBLES if isinstance(error, kind)), shown(said))


@contextlib.contextmanager
def cut_off(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Shut sock down after `seconds`, so that the whole of what is done with it has a deadline.

    A socket's own timeout starts anew with each byte. Raises TimeoutError when it was cut.
    """
    fired: list[bool] = []

    def cut() -> None:
        fired.append(True)
        with contextlib.suppress(OSError):
            # Not SSLSocket.shutdown, which drops the TLS state under the reader's feet.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if fired:
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()


def resolve(host: str, port: int, seconds: float) -> list[tuple[Any, ...]]:
    """Return getaddrinfo's answers for TCP, in a thread for want of a deadline; raise OSError."""
    answers: list[Any] = [TimeoutError()]

    def look_up() -> None:
        try:
            answers[0] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            answers[0] = error if isinstance(error, OSError) else socket.gaierror(str(error))

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(seconds)
    if isinstance(answers[0], OSError):
        raise answers[0]
    found: list[tuple[Any, ...]] = answers[0]
    return found


def dial(host: str, port: int, seconds: float, vet: bool) -> socket.socket:
    """Return a connected TCP socket; with vet only to public addresses, those just resolved.

    Raises Failure when any address of the name is inside (a mixed answer is an attack), or OSError.
    """
    deadline = time.monotonic() + seconds
    found = resolve(host, port, seconds)
    if vet and not all(is_outside(str(entry[4][0])) for entry in found):
        raise Failure(f"不允许访问内网地址：{host}")
    problem: OSError = socket.gaierror("no address")
    for index, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            left = deadline - time.monotonic()
            sock.settimeout(max(0.1, left / (len(found) - index)))
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise problem


class Proxy(NamedTuple):
    scheme: str
    host: str
    port: int
    user: str
    password: str

    def __str__(self) -> str:
        """Return the address without its credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{'***:***@' if self.user else ''}{host}:{self.port}"

    def credentials(self) -> dict[str, str]:
        """Return the header that an http proxy wants (RFC 9110, 11.7.2), if any."""
        if not self.user:
            return {}
        pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Proxy-Authorization": f"Basic {pair}"}


def parse_proxy(url: str) -> Proxy | None:
    """Return the Proxy of a PROXY_URL that settings have checked; None when it is empty."""
    if not url:
        return None
    parts = urllib.parse.urlsplit(url)
    user, password = (urllib.parse.unquote(v or "") for v in (parts.username, parts.password))
    return Proxy(parts.scheme, parts.hostname or "", parts.port or 0, user, password)


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("proxy closed the connection")
        data += piece
    return data


def ask_http_proxy(sock: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """Turn sock into a tunnel to host:port by CONNECT (RFC 9110, 9.3.6); raise OSError."""
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    head = [f"CONNECT {name} HTTP/1.1", f"Host: {name}"]
    head += [f"{key}: {value}" for key, value in proxy.credentials().items()]
    sock.sendall("\r\n".join([*head, "", ""]).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        if len(answer) > MAX_HEAD_BYTES:
            raise OSError(0, "代理的回答过长")
        answer += _receive(sock, 1)  # not a byte more: what follows belongs to the tunnel
    status = answer.split(b" ", 2)[1:2]
    if status in ([b"401"], [b"407"]):
        raise OSError(0, "代理的用户名或密码不正确")
    if status != [b"200"]:
        raise OSError(0, f"代理拒绝连接 {host}（{shown(b''.join(status).decode('latin-1'), 8)}）")


SOCKS5_ERRORS = ("", "代理内部错误", "代理规则不允许", "网络不可达", "主机不可达", "连接被拒绝")


def ask_socks5_proxy(sock: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    """Turn sock into a tunnel to host:port by SOCKS5 (RFC 1928, 1929); the proxy resolves it."""
    user, password, name = proxy.user.encode(), proxy.password.encode(), host.encode()
    if max(len(user), len(password), len(name)) > 255:
        raise OSError(0, "代理的用户名、密码或主机名过长")
    sock.sendall(b"\x05\x01\x02" if user else b"\x05\x01\x00")
    method = _receive(sock, 2)
    if method == b"\x05\x02" and user:
        pair = bytes([1, len(user)]) + user + bytes([len(password)]) + password
        sock.sendall(pair)
        if _receive(sock, 2)[1] != 0:
            raise OSError(0, "代理的用户名或密码不正确")
    elif method != b"\x05\x00":
        raise OSError(0, "代理要求用户名和密码" if method[:1] == b"\x05" else "不是 SOCKS5 代理")
    sock.sendall(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack(">H", port))
    _, reply, _, kind = _receive(sock, 4)
    if reply != 0:
        raise OSError(0, SOCKS5_ERRORS[reply] if reply < len(SOCKS5_ERRORS) else "代理拒绝连接")
    length = {1: 4, 4: 16}.get(kind) or _receive(sock, 1)[0]
    _receive(sock, length + 2)


class Wire(http.client.HTTPConnection):
    """One HTTP connection over a socket that is connected already; it never reconnects."""

    auto_open = 0

    def __init__(self, url: Url, sock: socket.socket, proxy: Proxy | None) -> None:
        super().__init__(url.host, url.port, blocksize=READ_BYTES)
        self.default_port = DEFAULT_PORTS[url.scheme]
        self.sock = self.link = sock  # http.client forgets its `sock` before the body is read
        plain = proxy is not None and proxy.scheme == "http" and url.scheme == "http"
        # Plain http through an http proxy: the absolute form of the target (RFC 9112, 3.2.2).
        self.prefix = str(url._replace(target="")) if plain else ""
        self.extra = proxy.credentials() if proxy and plain else {}
        self.used = time.monotonic()

    def ask(
        self, method: str, target: str, headers: Mapping[str, str], body: Any = None
    ) -> http.client.HTTPResponse:
        """Send one request and return the response with its head read."""
        asked = {"User-Agent": f"wxsync/{VERSION}", "Accept-Encoding": "identity"}
        if body is not None and len(body) > self.blocksize:
            # In blocks, or the time allowed for one write would be that for the whole.
            asked["Content-Length"], body = str(len(body)), io.BytesIO(body)
        self.request(method, self.prefix + target, body, {**asked, **headers, **self.extra})
        return self.getresponse()

    def is_fresh(self) -> bool:
        """Tell whether the idle connection can be used again (the server has not closed it)."""
        if self.sock is None or time.monotonic() - self.used > KEEP_SECONDS:
            return False
        try:
            return not select.select([self.sock], [], [], 0)[0]
        except (OSError, ValueError):  # closed, or its number is over what select takes
            return False


class Network:
    """Opens connections, directly or through the proxy, whose state it owns."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.proxy = parse_proxy(settings.PROXY_URL)
        self._direct = settings.NO_PROXY_DOMAINS
        self._test_url = parse_url(settings.PROXY_TEST_URL)
        self._log = log
        self._lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None
        self._is_up: bool | None = None  # None: not proven yet
        self._probing = threading.Lock()
        self.probed = threading.Event()

    @property
    def proxy_state(self) -> str:
        """Return "off", "up" or "down"."""
        return "off" if self.proxy is None else "up" if self._is_up else "down"

    def is_direct(self, host: str) -> bool:
        """Tell whether NO_PROXY_DOMAINS names host: itself or, for a name, a parent domain."""
        names = [name.strip(".") for name in self._direct]
        return any(host == name or host.endswith("." + name) for name in names)

    def _connect(self, url: Url, proxy: Proxy | None, vet: bool, seconds: float) -> Wire:
        """Return a Wire to url's server; raise OSError or Failure."""
        host, port = (proxy.host, proxy.port) if proxy else (url.host, url.port)
        sock = dial(host, port, seconds, vet)
        try:
            with cut_off(sock, seconds):
                if proxy and proxy.scheme == "socks5":
                    ask_socks5_proxy(sock, proxy, url.host, url.port)
                elif proxy and url.scheme == "https":
                    ask_http_proxy(sock, proxy, url.host, url.port)
            if url.scheme == "https":
                sock = self._context().wrap_socket(
                    sock, server_hostname=url.host, do_handshake_on_connect=False
                )
                with cut_off(sock, seconds):  # wrapping has moved the descriptor to a new object
                    sock.do_handshake()
        except BaseException:
            sock.close()
            raise
        sock.settimeout(STALL_SECONDS)
        return Wire(url, sock, proxy)

    def _context(self) -> ssl.SSLContext:
        with self._lock:  # loading the authorities takes 20 ms: once
            self._tls = self._tls or ssl.create_default_context()
            return self._tls

    def open(self, url: Url, *, proxied: bool, vet: bool = False) -> Wire:
        """Return a Wire to url's server, through the proxy where one is due and up.

        When the proxy fails it is probed; where it is down the connection is made directly. Raises
        Unreachable, or Failure for an address that vet refuses.
        """
        proxy = self.proxy if proxied and not self.is_direct(url.host) else None
        if proxy and self.probed.wait(CONNECT_SECONDS) and self._is_up:
            if vet:
                refuse_local_name(url.host)
            try:
                return self._connect(url, proxy, False, CONNECT_SECONDS)
            except OSError as error:
                if self.probe():
                    raise Unreachable(f"通过代理连接 {url.host} 失败：{explain(error)}") from error
        try:
            return self._connect(url, None, vet, CONNECT_SECONDS)
        except OSError as error:
            raise Unreachable(f"连接 {url.host} 失败：{explain(error)}") from error

    def probe(self) -> bool:
        """Try the proxy with PROXY_TEST_URL, log a change of its state, return whether it is up."""
        with self._probing:
            problem = self._try_proxy()
            was_up, self._is_up = self._is_up, not problem
            self.probed.set()
            if problem and was_up is not False:
                self._log.warning(f"⚠️  代理连接失败: {problem}")
                self._log.warning("   将使用非代理模式继续运行")
            elif not problem and not was_up:
                self._log.info(f"✅ 代理可用: {self.proxy}")
                self._log.info("🔗 GitHub API 使用代理")
            return not problem

    def _try_proxy(self) -> str:
        """Return what is wrong with the proxy, "" for nothing."""
        try:
            wire = self._connect(self._test_url, self.proxy, False, CONNECT_SECONDS)
            with contextlib.closing(wire), cut_off(wire.link, CONNECT_SECONDS):
                status = wire.ask("GET", self._test_url.target, {}).status
        except (OSError, http.client.HTTPException) as error:
            return explain(error)
        return f"测试地址答 {status}" if status >= 400 else ""


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def clock_gap(date: str | None) -> float | None:
    """Return the seconds by which this machine's clock is ahead of a Date header."""
    try:
        there = email.utils.parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError):
        return None
    return time.time() - there - 0.5  # the header has whole seconds, rounded down


class Client:
    """Calls to one server, one at a time, over one connection that is kept."""

    def __init__(self, network: Network, base: str, proxied: bool) -> None:
        self.url = parse_url(base)
        self._network = network
        self._proxied = proxied
        self._lock = threading.Lock()
        self._wire: Wire | None = None
        self.clock_gap: float | None = None  # as its last answer showed it; for `check`

    def call(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | bytearray | None = None,
        seconds: float = CALL_SECONDS,
    ) -> Answer:
        """Make one call within `seconds` and return its Answer; raise Unreachable or Failure."""
        with self._lock:
            wire, self._wire = self._wire, None
            if wire is None or not wire.is_fresh():
                if wire:
                    wire.close()
                wire = self._network.open(self.url, proxied=self._proxied)
            try:
                with cut_off(wire.link, seconds):
                    response = wire.ask(method, target, headers, body)
                    data = response.read(MAX_ANSWER_BYTES + 1)
            except (OSError, http.client.HTTPException) as error:
                wire.close()
                raise Unreachable(f"{self.url.host}：{explain(error)}") from error
            if response.length or len(data) > MAX_ANSWER_BYTES:  # http.client is silent about it
                wire.close()
                raise Unreachable(f"{self.url.host}：回答不完整或过大")
            self.clock_gap = clock_gap(response.headers.get("Date"))
            if response.will_close:
                wire.close()
            else:
                wire.used = time.monotonic()
                self._wire = wire
            return Answer(response.status, response.headers, data)


# ---- Crypto: WeCom's signed and encrypted envelope (documents 90930, 90968) --------------------


class Crypto:
    """Signs, encrypts and decrypts with one application's Token and EncodingAESKey."""

    BLOCK = 32  # WeCom pads to 32 bytes, not to AES's 16

    def __init__(self, token: str, encoding_aes_key: str, corp_id: str) -> None:
        self._token = token
        # The last character often carries stray bits, so a round trip proves nothing.
        self._key = base64.b64decode(encoding_aes_key + "=")
        self._corp_id = corp_id.encode()

    def signature(self, timestamp: str, nonce: str, encrypted: str) -> str:
        """Return the hex SHA-1 over the four sorted values."""
        text = "".join(sorted([self._token, timestamp, nonce, encrypted]))
        return hashlib.sha1(text.encode(errors="replace"), usedforsecurity=False).hexdigest()

    def is_signed(self, given: str, timestamp: str, nonce: str, encrypted: str) -> bool:
        """Tell in constant time whether `given` is the right signature."""
        right = self.signature(timestamp, nonce, encrypted)
        return hmac.compare_digest(given.encode(errors="replace"), right.encode())

    def _aes(self) -> Any:
        from Crypto.Cipher import AES  # `plan` and `copy` run without it

        return AES.new(self._key, AES.MODE_CBC, iv=self._key[:16])

    def encrypt(self, text: str) -> str:
        """Return base64 of 16 random bytes, the length (big-endian), text, corp id and padding."""
        data = text.encode()
        plain = secrets.token_bytes(16) + struct.pack(">I", len(data)) + data + self._corp_id
        pad = self.BLOCK - len(plain) % self.BLOCK
        return base64.b64encode(self._aes().encrypt(plain + bytes([pad]) * pad)).decode()

    def decrypt(self, encrypted: str) -> bytes:
        """Return the message; raise Rejected 400 where it is malformed, 403 for another corp id."""
        try:
            data = base64.b64decode(encrypted, validate=True)
            plain: bytes = self._aes().decrypt(data)
        except ValueError as error:
            raise Rejected(400, "not base64 of whole blocks") from error
        pad = plain[-1] if plain else 0
        if len(plain) % self.BLOCK or not 1 <= pad <= self.BLOCK or len(plain) < pad + 20:
            raise Rejected(400, "bad padding")
        if plain[-pad:] != bytes([pad]) * pad:
            raise Rejected(400, "bad padding")
        (length,) = struct.unpack(">I", plain[16:20])
        message, corp_id = plain[20 : 20 + length], plain[20 + length : -pad]
        if len(message) != length or 20 + length > len(plain) - pad:
            raise Rejected(400, "bad length")
        if not hmac.compare_digest(corp_id, self._corp_id):
            raise Rejected(403, "corp id")
        return message


# ---- WeCom: reading what it posts, sending messages --------------------------------------------

USER_PATTERN = re.compile(r"(?!@all$)[\w.@-]{1,64}", re.IGNORECASE)  # no "|": it would be several


class Message(NamedTuple):
    """A decrypted message, as far as it matters here."""

    user: str
    kind: str
    content: str
    id: str  # what tells a repeat; WeCom's MsgId, or a stand-in where it is missing


def read_xml_fields(data: bytes) -> dict[str, str]:
    """Return the texts of the root's children by lower-case name; raise Rejected 400.

    Document types, and with them entities, are refused (they are no part of WeCom's messages).
    """
    found: dict[str, str] = {}
    path: list[str] = []

    def refuse(*_: Any) -> NoReturn:
        raise Rejected(400, "document type")

    def start(name: str, _: Any) -> None:
        path.append(name.lower())

    def text(piece: str) -> None:
        if len(path) == 2:
            found[path[1]] = found.get(path[1], "") + piece

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: path.pop()
    parser.CharacterDataHandler = text
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise Rejected(400, "not XML") from error
    return found


def read_fields(data: bytes) -> tuple[dict[str, str], bool]:
    """Return the fields of an XML or JSON document (lower-case names) and whether it was JSON."""
    if not data.lstrip().startswith(b"{"):
        return read_xml_fields(data), False
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Rejected(400, "not JSON") from error
    scalar = {k.lower(): str(v) for k, v in found.items() if isinstance(v, str | int)}
    return scalar, True


def read_message_fields(data: bytes) -> Message:
    """Return the Message in a decrypted document; raise Rejected 400 when there is no sender."""
    values, _ = read_fields(data)
    user = values.get("fromusername", "")
    if not USER_PATTERN.fullmatch(user):
        raise Rejected(400, "sender")
    # JSON can hold half of a surrogate pair, which nothing after this could encode.
    content = values.get("content", "").encode(errors="replace").decode()
    message_id = values.get("msgid", "")
    if not re.fullmatch(r"[\w-]{1,64}", message_id):
        stand_in = f"{user}\n{values.get('createtime')}\n{content}".encode(errors="replace")
        message_id = hashlib.sha256(stand_in).hexdigest()
    return Message(user, values.get("msgtype", ""), content, message_id)


def _cdata(text: str) -> str:
    # Characters that XML 1.0 (section 2.2) has no place for, and the one end CDATA cannot hold.
    if not text.replace("\n", "").isprintable():
        text = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", text)
    return "<![CDATA[" + text.replace("]]>", "]]]]><![CDATA[>") + "]]>"


def write_xml(values: Mapping[str, str]) -> str:
    """Return <xml> with one CDATA child per value."""
    return f"<xml>{''.join(f'<{k}>{_cdata(v)}</{k}>' for k, v in values.items())}</xml>"


def seal(crypto: Crypto, inner: Mapping[str, str], as_json: bool, now: float) -> bytes:
    """Return the encrypted and signed envelope of a message (names as in WeCom's XML)."""
    plain = json.dumps(dict(inner), ensure_ascii=False) if as_json else write_xml(inner)
    encrypted, timestamp, nonce = crypto.encrypt(plain), str(int(now)), secrets.token_hex(8)
    signature = crypto.signature(timestamp, nonce, encrypted)
    if as_json:
        envelope = {"encrypt": encrypted, "msgsignature": signature, "nonce": nonce}
        return json.dumps({**envelope, "timestamp": int(timestamp)}).encode()
    names = {"Encrypt": encrypted, "MsgSignature": signature, "TimeStamp": timestamp}
    return write_xml({**names, "Nonce": nonce}).encode()


# errcode -> what to tell the log, and the pause before the next try; 0: never try again.
WECOM_ERRORS = {
    **dict.fromkeys((-1, 45033), ("企业微信繁忙", 5.0)),
    40001: ("SECRET 不正确（见应用详情页）或应用已停用；反复尝试会被封，两小时后再试", 7200.0),
    40091: ("SECRET 属于另一个企业；两小时内不再尝试", 7200.0),
    40013: ("CORP_ID 不正确：见管理后台“我的企业”页底部", 7200.0),
    **dict.fromkeys((40014, 42001), ("access_token 失效", 5.0)),
    **dict.fromkeys((40056, 41011, 301002), ("AGENT_ID 不是这个应用的：见应用详情页", 600.0)),
    **dict.fromkeys((44004, 45002, 82001), ("消息为空、过长或没有收件人", 0.0)),
    45009: ("调用过于频繁，等待解除", 60.0),
    48002: ("应用没有发消息的权限", 600.0),
    50003: ("应用已停用：到管理后台启用", 600.0),
    60020: ("本机 IP 不在企业可信 IP 里", 60.0),
    **dict.fromkeys((40003, 60011, 60111, 81013), ("收件人不存在或不在应用可见范围内", 0.0)),
}


class WeComError(Failure):
    """WeCom answered with an errcode; `pause_seconds` before the next try, 0 for never.

    `is_known` tells whether it is one that would meet every message alike.
    """

    def __init__(self, code: int, message: str) -> None:
        advice, self.pause_seconds = WECOM_ERRORS.get(code, ("未知错误", 5.0))
        self.is_known = code in WECOM_ERRORS
        if code == 60020 and (found := re.search(r"from ip:\s*([0-9a-fA-F.:]+)", message)):
            advice = (
                f"到管理后台“应用管理 → 本应用 → 企业可信IP”添加 {found[1]}，约一分钟后生效"
            )
        super().__init__(f"企业微信 {code}：{advice}")
        self.code = code


class WeCom:
    """Sends messages. Owns the access token, which is fetched once and renewed when refused."""

    RENEW_CODES = (40014, 42001)

    def __init__(self, settings: Settings, client: Client, log: Log) -> None:
        self._settings = settings
        self.client = client
        self._log = log
        self._lock = threading.Lock()
        self._token = ""
        self._token_ends = 0.0
        self.trouble = ""

    def call(self, method: str, path: str, query: Mapping[str, str], body: str = "") -> Any:
        """Return the JSON object of an errcode 0 answer; raise WeComError or Unreachable."""
        target = f"{self.client.url.target.rstrip('/')}{path}?{urllib.parse.urlencode(query)}"
        headers = {"Content-Type": "application/json"} if body else {}
        answer = self.client.call(method, target, headers, body.encode() or None)
        try:
            found = json.loads(answer.body)
            code = int(found.get("errcode", 0))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Unreachable(f"企业微信的回答看不懂（HTTP {answer.status}）") from error
        if answer.status >= 400:
            raise Unreachable(f"企业微信答 HTTP {answer.status}")
        if code:
            raise WeComError(code, str(found.get("errmsg", "")))
        return found

    def token(self, stale: str = "") -> str:
        """Return the access token, a new one when the cached one is `stale` or has expired."""
        with self._lock:
            if self._token and self._token != stale and time.monotonic() < self._token_ends:
                return self._token
            pair = {"corpid": self._settings.CORP_ID, "corpsecret": self._settings.SECRET}
            found = self.call("GET", "/cgi-bin/gettoken", pair)
            token, seconds = found.get("access_token"), found.get("expires_in", 7200)
            odd = not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{1,1024}", token)
            if odd or not isinstance(seconds, int):
                raise Unreachable("企业微信的回答里没有 access_token")
            self._log.hide(token)
            self._token = str(token)
            self._token_ends = time.monotonic() + min(7200, max(60, seconds - 300))
            return self._token

    def call_with_token(
        self, method: str, path: str, query: Mapping[str, str], body: str = ""
    ) -> Any:
        """Make a call with the access token, renewing it once when it is refused."""
        token = self.token()
        try:
            return self.call(method, path, {"access_token": token, **query}, body)
        except WeComError as error:
            if error.code not in self.RENEW_CODES:
                raise
        return self.call(method, path, {"access_token": self.token(stale=token), **query}, body)

    def send(self, user: str, text: str) -> None:
        """Deliver text to one user; raise WeComError or Unreachable.

        The JSON depends on the arguments alone: a retry is the same to the letter, which is what
        WeCom's duplicate check compares, so a retry after a lost answer is safe.
        """
        message = {
            "touser": user,
            "msgtype": "text",
            "agentid": self._settings.AGENT_ID,
            "text": {"content": text},
            "enable_duplicate_check": 1,
            "duplicate_check_interval": DUPLICATE_CHECK_SECONDS,
        }
        body = json.dumps(message, ensure_ascii=False)
        found = self.call_with_token("POST", "/cgi-bin/message/send", {}, body)
        if found.get("invaliduser") or found.get("unlicenseduser"):
            self._log.warning(f"wecom: 消息没有送到 {shown(user)}（不在可见范围内或没有许可）")


# ---- GitHub: the list, one run per request, its jobs -------------------------------------------

WORKFLOW = "docker-image-sync.yml"
NO_BRANCH = "wxsync-check-no-such-branch"
LIST_PATH = "images.txt"
GITHUB_API_VERSION = "2022-11-28"  # the last one in which return_run_details exists


# The last step's name; "***" where one of the repository's Secrets happens to be "wxsync".
STEP_NAME = re.compile(r"(?:wxsync|\*\*\*): (copied|unchanged|failed ([a-z-]+))\s?(.*)")
JOB_CONCLUSIONS = {"cancelled": "任务被取消", "skipped": "任务被跳过", "stale": "任务没有开始"}


class GitHubError(Failure):
    """GitHub refused a call; `status` is the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Run(NamedTuple):
    id: int
    url: str


class Outcome(NamedTuple):
    """What came of one line: CODE and detail as the job's last step says them."""

    line: str
    code: str  # "copied", "unchanged", "" (done, no detail), "running" or a failure's CODE
    detail: str
    url: str

    @property
    def is_done(self) -> bool:
        return self.code in ("", "copied", "unchanged")


def pick(data: Any, name: str, kind: type) -> Any:
    """Return data[name] if data is an object and that is of this type; else raise Failure."""
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise Failure(f"GitHub 的回答看不懂：缺少 {name}")
    return value


def read_outcome(line: str, job: Any) -> Outcome:
    """Read one job. Its conclusion decides; the name of its last step adds the detail."""
    if not isinstance(job, dict):
        return Outcome(line, "missing", "", "")
    url = shown(str(job.get("html_url") or ""), 200)
    if job.get("status") != "completed":
        return Outcome(line, "running", "", url)
    listed = job.get("steps")
    steps = [s for s in listed if isinstance(s, dict)] if isinstance(listed, list) else []
    names = [str(s.get("name")) for s in steps if STEP_NAME.match(str(s.get("name")))]
    said = STEP_NAME.match((names or [""])[-1])
    if job.get("conclusion") == "success" and not (said and said[2]):
        return Outcome(line, said[1] if said else "", said[3] if said else "", url)
    if said and said[2] in COPY_REASONS:
        return Outcome(line, said[2], shown(said[3], 160), url)
    conclusion = str(job.get("conclusion"))
    if conclusion == "timed_out":
        return Outcome(line, "timeout", "", url)
    failed = [str(s.get("name")) for s in steps if s.get("conclusion") == "failure"]
    where = f"失败的步骤：{shown(failed[0])}" if failed else shown(conclusion)
    return Outcome(line, "error", JOB_CONCLUSIONS.get(conclusion, where), url)


class GitHub:
    """The calls of contract section 6, with retries, rate limits, ETags and words for errors."""

    def __init__(
        self, settings: Settings, client: Client, log: Log, sleep: Callable[[float], None]
    ) -> None:
        self._settings = settings
        self.client = client
        self._log = log
        self._sleep = sleep
        self._cache: dict[str, tuple[str, Any]] = {}  # path -> (ETag, answer), for polling only
        self._quiet_until = 0.0  # monotonic; set by rate limits
        self.trouble = ""
        self.token_ends = ""  # as GitHub's header says it; for `check`

    def _headers(self, etag: str) -> dict[str, str]:
        return {
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {self._settings.GITHUB_TOKEN}",
            "X-GitHub-Api-Version": GITHUB_API_VERSION,
            **({"If-None-Match": etag} if etag else {}),
        }

    def _call_once(self, method: str, target: str, body: bytes | None, etag: str) -> Answer:
        """Make one call, following redirects (renamed repositories) to the same server only."""
        url = self.client.url
        for _ in range(3):
            answer = self.client.call(method, target, self._headers(etag), body)
            if answer.status not in (301, 302, 307, 308):
                return answer
            location = follow_location(url, answer.headers.get("Location", ""))
            if location[:3] != url[:3]:
                raise GitHubError(answer.status, f"GitHub 转到别的主机 {location.host}，已拒绝")
            target = location.target
        raise GitHubError(310, "GitHub 不停地重定向，请核对 GITHUB_REPO")

    def _obey_limit(self, polling: bool) -> None:
        """Wait while GitHub wants no calls; raise GitHubError 429 when that is too long."""
        wait = self._quiet_until - time.monotonic()
        if wait > 0:
            if polling or wait > GITHUB_WAIT_SECONDS:
                raise GitHubError(429, f"GitHub 限制调用次数，请 {int(wait // 60) + 1} 分钟后再试")
            self._sleep(wait)
            self._quiet_until = 0.0

    def _wait_asked(self, answer: Answer, now: float) -> float:
        """Return the seconds a rate-limited answer asks to wait, 0 when it is no such answer."""
        if answer.status not in (403, 429):
            return 0.0
        numbers = r"[0-9]{1,12}"  # and no wait is longer than the hour of GitHub's own limits
        after = answer.headers.get("retry-after", "")
        if re.fullmatch(numbers, after):
            return min(3600.0, max(1.0, float(after)))
        reset = answer.headers.get("x-ratelimit-reset", "")
        if answer.headers.get("x-ratelimit-remaining") == "0" and re.fullmatch(numbers, reset):
            return min(3600.0, max(1.0, float(reset) - now + 1))
        limited = answer.status == 429 or b"rate limit" in answer.body.lower()
        return 60.0 if limited else 0.0

    def call(
        self, method: str, path: str, body: Any = None, needs: str = "", polling: bool = False
    ) -> Any:
        """Return the JSON of a 2xx answer (None for an empty one); raise GitHubError, Unreachable.

        GET and PUT are retried with growing pauses (PUT carries the sha it replaces), POST is not:
        it may have been done. A rate limit is waited for. `needs` names the token's permission.
        With polling the answer is cached by ETag and failures are left to the poller.
        """
        target = f"{self.client.url.target.rstrip('/')}/repos/{self._settings.GITHUB_REPO}{path}"
        data = json.dumps(body).encode() if body is not None else None
        etag, cached = self._cache.get(path, ("", None)) if polling else ("", None)
        pauses = list(() if polling else GITHUB_PAUSES)
        while True:
            self._obey_limit(polling)
            try:
                answer = self._call_once(method, target, data, etag)
                if answer.status >= 500:
                    raise Unreachable(f"GitHub 答 HTTP {answer.status}")
            except Unreachable as error:
                self.trouble = str(error)
                if method == "POST" or not pauses:
                    raise
                self._log.warning(f"github: {error}，稍后重试")
                self._sleep(pauses.pop(0))
                continue
            self.trouble = ""
            self.token_ends = answer.headers.get("GitHub-Authentication-Token-Expiration", "")
            if answer.status == 304:
                return cached
            if not (wait := self._wait_asked(answer, time.time())):
                break
            self._log.warning(f"github: 被限流，{wait:.0f} 秒")
            self._quiet_until = time.monotonic() + wait
        return self._read(answer, path, needs, polling)

    def _read(self, answer: Answer, path: str, needs: str, polling: bool) -> Any:
        try:
            found = json.loads(answer.body) if answer.body.strip() else None
        except (ValueError, RecursionError) as error:
            raise Unreachable("GitHub 的回答不是 JSON") from error
        if not 200 <= answer.status < 300:
            raise self._error(answer, found, needs)
        if polling and (etag := answer.headers.get("ETag")):
            while len(self._cache) >= 16:
                self._cache.pop(next(iter(self._cache)))
            self._cache[path] = (etag, found)
        return found

    def _error(self, answer: Answer, found: Any, needs: str) -> GitHubError:
        """Say in words what a refused call means for the user's token and settings."""
        said = shown(str(found.get("message", "")) if isinstance(found, dict) else "", 160)
        repo, status = self._settings.GITHUB_REPO, answer.status
        if status == 401:
            text = "GitHub 令牌无效或已过期：换一个新的 GITHUB_TOKEN"
        elif status == 403 and "not accessible" in said:
            text = f"GitHub 令牌缺少权限 {needs}：在令牌设置里加上，或用带 repo 的经典令牌"
        elif status == 404:
            text = f"GitHub 找不到 {repo} 里的内容：核对仓库名、分支 {self._settings.GITHUB_BRANCH}"
            text += f"，并确认令牌可访问该仓库且有权限 {needs}"
        else:
            known = {403: "GitHub 拒绝了请求", 409: "GitHub 上的内容同时被改动"}
            text = known.get(status, "GitHub 报错")
        return GitHubError(status, f"{text}（{status} {said}）".replace(" ）", "）"))

    def upload_list(self, content: bytes, message: str) -> bool:
        """Make images.txt on GITHUB_BRANCH equal content; return whether that took a commit."""
        path = f"/contents/{LIST_PATH}"
        branch = urllib.parse.quote(self._settings.GITHUB_BRANCH)
        for attempt in range(5):
            change: dict[str, Any] = {"message": message, "branch": self._settings.GITHUB_BRANCH}
            change["content"] = base64.b64encode(content).decode()
            try:
                found = self.call("GET", f"{path}?ref={branch}", needs="Contents: Read and write")
                change["sha"] = pick(found, "sha", str)
                if base64.b64decode(str(found.get("content"))) == content:
                    return False
            except GitHubError as error:
                if error.status != 404:
                    raise
            except ValueError:
                pass  # not shown (a large file) or not base64: then it is simply replaced
            try:
                self.call("PUT", path, change, needs="Contents: Read and write")
                return True
            except GitHubError as error:
                if error.status not in (409, 422) or attempt == 4:
                    raise
            self._sleep(1.0 + attempt)
        raise AssertionError("unreachable")

    def dispatch(self, lines: list[str], request_id: str) -> Run:
        """Start the workflow for these lines, return its Run; after Unreachable it may run, too."""
        inputs = {
            "images": json.dumps(lines, separators=(",", ":")),
            "request": request_id,
            "target": self._settings.target_prefix,
        }
        body = {"ref": self._settings.GITHUB_BRANCH, "inputs": inputs, "return_run_details": True}
        path = f"/actions/workflows/{WORKFLOW}/dispatches"
        needs = "Actions: Read and write"
        try:
            found = self.call("POST", path, body, needs)
        except GitHubError as error:
            if error.status != 400:
                raise
            del body["return_run_details"]  # GitHub Enterprise up to 3.20 does not know it
            found = self.call("POST", path, body, needs)
        run_id = found.get("workflow_run_id") if isinstance(found, dict) else None
        if isinstance(run_id, int):
            return self._run(run_id, found)
        for _ in range(5):  # 204, or an odd answer: it was accepted, so the run will show up
            if run := self.find_run(request_id):
                return run
        raise Failure("GitHub 接受了请求，但一直没有出现对应的运行，请到 Actions 页查看")

    def _run(self, run_id: int, data: Any) -> Run:
        url = data.get("html_url") if isinstance(data, dict) else None
        if not isinstance(url, str) or not re.fullmatch(r"https?://[\x21-\x7e]{1,200}", url):
            url = f"https://github.com/{self._settings.GITHUB_REPO}/actions/runs/{run_id}"
        return Run(run_id, url)

    def find_run(self, request_id: str) -> Run | None:
        """Return the run whose display_title carries request_id, looking for a while; else None."""
        path = f"/actions/workflows/{WORKFLOW}/runs?event=workflow_dispatch&per_page=50"
        for _ in range(int(FIND_RUN_SECONDS / 2) + 1):
            found = self.call("GET", path, needs="Actions: Read and write")
            for run in pick(found, "workflow_runs", list):
                if isinstance(run, dict) and request_id in str(run.get("display_title")):
                    return self._run(pick(run, "id", int), run)
            self._sleep(2.0)
        return None

    def is_completed(self, run: Run) -> bool:
        """Tell whether the run has ended (one call, 304 while nothing changed)."""
        found = self.call("GET", f"/actions/runs/{run.id}", needs="Actions: Read", polling=True)
        return bool(pick(found, "status", str) == "completed")

    def outcomes(self, run: Run, lines: list[str]) -> list[Outcome]:
        """Return an Outcome per line; a line without a job is "missing"."""
        jobs: dict[str, Any] = {}
        for page in range(1, 5):
            path = f"/actions/runs/{run.id}/jobs?per_page=100&page={page}"
            found = pick(self.call("GET", path, needs="Actions: Read", polling=True), "jobs", list)
            for job in found:
                jobs[str(job.get("name")) if isinstance(job, dict) else ""] = job
            if len(found) < 100:
                break
        return [read_outcome(line, jobs.get(line)) for line in lines]


# ---- QingStor: the SDK signs, our own connection sends -----------------------------------------


class Upload(NamedTuple):
    """An object on its way: what a restart needs to finish or to undo it."""

    key: str
    upload_id: str  # empty for a single PUT
    name: str


# What QingStor's code and message say, or its status -> cause and cure; the first that matches.
QINGSTOR_ERRORS = (
    (r"skew|expired|time_|date", "本机时钟不准：请校准时间"),
    (
        r"^401|signature|access_key",
        "密钥不正确：核对 QINGSTOR_ACCESS_KEY_ID 和 QINGSTOR_SECRET_ACCESS_KEY",
    ),
    (r"^404", "找不到存储桶：核对 QINGSTOR_BUCKET 和 QINGSTOR_ZONE"),
    (r"quota|exceed|full", "存储空间已满：清理存储桶或提高配额"),
    (r"^403", "没有权限写入存储桶：核对密钥的权限，账号是否欠费"),
    (r"", "上传被拒绝"),
)


class QingStor:
    """Objects of one bucket. The SDK's client has no timeouts and hides errors: it only signs."""

    def __init__(
        self, settings: Settings, network: Network, sleep: Callable[[float], None]
    ) -> None:
        self._settings = settings
        self._sleep = sleep
        self._base = parse_url(settings.QINGSTOR_URL)
        bare = self._base.host == "localhost" or not re.search("[a-z]", self._base.host)
        self._zone = "" if bare else settings.QINGSTOR_ZONE
        host = f"{self._zone}.{self._base.host}".removeprefix(".")
        self.client = Client(network, str(self._base._replace(host=host, target="/")), False)

    def _request(self, name: str, *words: str, **options: Any) -> Any:
        """Return the SDK's unsigned request for an operation, such as "put_object"."""
        from qingstor.sdk.service.bucket import Bucket  # 10 MiB, and only for files

        class Config:  # the SDK's own installs a root log handler
            host, port, protocol = self._base.host, self._base.port, self._base.scheme
            access_key_id = self._settings.QINGSTOR_ACCESS_KEY_ID
            secret_access_key = self._settings.QINGSTOR_SECRET_ACCESS_KEY
            enable_virtual_host_style = False

        place = {"bucket-name": self._settings.QINGSTOR_BUCKET, "zone": self._zone}
        return getattr(Bucket(Config, place, None), f"{name}_request")(*words, **options)

    def call(
        self,
        name: str,
        *words: str,
        body: bytes | bytearray = b"",
        tries: int = TRIES,
        **options: Any,
    ) -> Answer:
        """Do one operation, again after a passing fault; return its Answer, raise Unreachable."""
        if body:
            md5 = hashlib.md5(body, usedforsecurity=False).digest()
            options["content_md5"] = base64.b64encode(md5).decode()
        for attempt in range(1, tries + 1):
            signed = self._request(name, *words, **options).sign()  # anew: the Date is signed
            url = urllib.parse.urlsplit(signed.url)
            headers = {k: v for k, v in signed.headers.items() if k.lower() != "content-length"}
            data = body or (signed.body or "").encode() or None
            target = f"{url.path}?{url.query}".removesuffix("?")
            try:
                answer = self.client.call(signed.method, target, headers, data, DOWNLOAD_SECONDS)
                problem = Unreachable(f"QingStor 暂时不可用（HTTP {answer.status}），请稍后再试")
                if answer.status < 500:
                    return answer
            except Unreachable as error:
                problem = Unreachable(f"连接 QingStor 失败：{error}，请稍后再试")
            if attempt < tries:
                self._sleep(attempt)
        raise problem

    @staticmethod
    def require(answer: Answer) -> Answer:
        """Return a 2xx answer; raise Failure with cause and cure for any other."""
        if 200 <= answer.status < 300:
            return answer
        try:
            found = json.loads(answer.body)
            code, said = str(found.get("code", "")), str(found.get("message", ""))
        except (ValueError, AttributeError, RecursionError):
            code = said = ""
        text = f"{answer.status} {code} {said}".lower()
        cure = next(cure for pattern, cure in QINGSTOR_ERRORS if re.search(pattern, text))
        raise Failure(f"{cure}（QingStor {shown(f'{answer.status} {code}')}）")

    def put(self, key: str, body: bytes | bytearray, content_type: str) -> None:
        """Store a small object whole; an answer that got lost is settled by looking."""
        try:
            self.require(self.call("put_object", key, body=body, content_type=content_type))
        except Failure:
            if not self._is_stored(key):
                raise

    def initiate(self, key: str, content_type: str) -> str:
        """Begin an object in parts; return its upload id."""
        for attempt in range(1, TRIES + 1):
            try:
                name = "initiate_multipart_upload"
                answer = self.call(name, key, tries=1, content_type=content_type)
                return str(json.loads(self.require(answer).body)["upload_id"])
            except Unreachable:  # it may have begun all the same
                self._abort_strays(key)
                if attempt == TRIES:
                    raise
                self._sleep(attempt)
            except (ValueError, KeyError, TypeError) as error:
                raise Failure("QingStor 的回答里没有 upload_id") from error
        raise AssertionError

    def _abort(self, key: str, upload_id: str) -> None:
        answer = self.call("abort_multipart_upload", key, upload_id=upload_id)
        if answer.status != 404:  # already gone
            self.require(answer)

    def _abort_strays(self, key: str) -> None:
        """Drop uploads of a key that were begun without our learning their id."""
        with contextlib.suppress(Failure, ValueError, KeyError, TypeError, AttributeError):
            listed = json.loads(self.require(self.call("list_multipart_uploads", prefix=key)).body)
            for entry in listed["uploads"]:
                self._abort(entry["key"], entry["upload_id"])

    def put_part(self, upload: Upload, part: int, body: bytes | bytearray) -> None:
        """Store one part; they count from 0. (The SDK wants text: an int is a TypeError there.)"""
        options: dict[str, Any] = {"part_number": str(part), "upload_id": upload.upload_id}
        self.require(self.call("upload_multipart", upload.key, body=body, **options))

    def complete(self, upload: Upload, count: int) -> None:
        """Make an object of its parts; an answer that got lost is settled by looking."""
        parts = [{"part_number": part} for part in range(count)]
        done: dict[str, Any] = {"upload_id": upload.upload_id, "object_parts": parts}
        try:
            self.require(self.call("complete_multipart_upload", upload.key, **done))
        except Failure:
            if not self._is_stored(upload.key):
                raise

    def _is_stored(self, key: str) -> bool:
        with contextlib.suppress(Failure):
            return self.size_bytes(key) is not None
        return False

    def size_bytes(self, key: str) -> int | None:
        """Return the size of an object, None where there is none."""
        answer = self.call("head_object", key)
        if answer.status == 404:
            return None
        return int(self.require(answer).headers.get("Content-Length") or 0)

    def settle(self, upload: Upload) -> int | None:
        """Undo an interrupted upload; return the object's size if it was finished after all."""
        size_bytes = self.size_bytes(upload.key)
        if size_bytes is None and upload.upload_id:
            self._abort(upload.key, upload.upload_id)
        elif size_bytes is None:
            self._abort_strays(upload.key)
        return size_bytes

    def link(self, key: str, now: float) -> str:
        """Return the download link: plain, or signed for QINGSTOR_LINK_SECONDS."""
        settings = self._settings
        if settings.QINGSTOR_LINK_SECONDS:
            expires = int(now) + settings.QINGSTOR_LINK_SECONDS
            return str(self._request("get_object", key).sign_query(expires).url)
        host = f"{settings.QINGSTOR_BUCKET}.{self._zone}.{self._base.host}"
        if not self._zone:
            key, host = f"{settings.QINGSTOR_BUCKET}/{key}", self._base.host
        return str(self._base._replace(host=host, target="/" + urllib.parse.quote(key)))


# ---- Downloads ---------------------------------------------------------------------------------


def _header_text(value: str) -> str:
    """Return a header that http.client took for Latin-1: it is UTF-8, or in China GBK."""
    raw = value.encode("latin-1", "replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("gb18030", "replace")


DISPOSITION = re.compile(r';\s*([\w-]+\*?)\s*=\s*("(?:\\.|[^"\\])*"|[^;]*)')


def read_file_name(disposition: str, *urls: Url) -> str:
    """Return the name to show: from Content-Disposition (RFC 6266), else from the addresses.

    Folders, control characters and leading dots are taken off; the answer is never empty.
    """
    names = []
    given = {key.lower(): value.strip() for key, value in DISPOSITION.findall(disposition)}
    charset, quote, extended = given.get("filename*", "").partition("'")
    if quote:
        with contextlib.suppress(LookupError):
            names.append(urllib.parse.unquote(extended.partition("'")[2], charset, "replace"))
    plain = given.get("filename", "")
    names.append(re.sub(r"\\(.)", r"\1", plain[1:-1]) if plain.startswith('"') else plain)
    paths = [urllib.parse.unquote(url.target.partition("?")[0]) for url in urls]
    names += [p for p in paths if "." in p.rpartition("/")[2]] + paths
    for name in names:
        name = "".join(c for c in re.split(r"[/\\]", name)[-1] if c.isprintable())
        if name := name.strip(" ."):
            return name if len(name) <= 150 else name[:100] + name[-50:]
    return "download"


def make_key(name: str) -> str:
    """Return a new object key: a uuid and the cleaned extension of the name."""
    import uuid  # takes 2 ms at start, and only files need it

    found = re.search(r"(?i)(\.tar)?\.[a-z0-9]{1,10}$", name)
    return f"{uuid.uuid4()}{found[0].lower() if found else ''}"


class Source:
    """A file being downloaded, part by part, resumed where the server allows it."""

    STATUS_TEXTS = MappingProxyType(
        {
            401: "需要登录",
            403: "来源拒绝访问",
            404: "文件不存在",
            410: "文件已删除",
            429: "来源限流",
        }
    )

    def __init__(self, network: Network, link: str, vet: bool, limit_bytes: int) -> None:
        """Ask for the file and read the head of the answer; raise Failure."""
        self._network = network
        self._vet = vet
        self._limit = limit_bytes
        self._deadline = time.monotonic() + DOWNLOAD_SECONDS
        self._url = first = parse_url(link)
        self._response, self._wire = self._request({})
        headers = self._response.headers
        self._sent_bytes = self._response.length  # None: not known
        self._done_bytes = 0
        etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
        self._validator = etag if etag and not etag.startswith("W/") else modified
        disposition = _header_text(headers.get("Content-Disposition", ""))
        self.name = read_file_name(disposition, self._url, first)
        kind = headers.get("Content-Type", "")
        self.content_type = kind if re.fullmatch(r"[\w.+/-]+(; ?[\w.=\"-]+)*", kind) else ""
        encoding = headers.get("Content-Encoding", "").lower().strip()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            self.close()
            raise Failure(f"来源用了不支持的压缩方式 {shown(encoding)}，请换一个链接")
        # Some servers compress although we asked them not to; the file is what was compressed.
        self._inflate = zlib.decompressobj(47) if encoding not in ("", "identity") else None
        self.total_bytes = None if self._inflate else self._sent_bytes
        self._check_size(self._sent_bytes or 0)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._limit:
            self.close()
            raise Failure(f"文件超过上限 {self._limit // 2**20} MB（MAX_FILE_MB）")

    def _request(self, headers: Mapping[str, str]) -> tuple[http.client.HTTPResponse, Wire]:
        """Follow redirects, each to a checked address, to a 200 or 206; raise Failure."""
        for _ in range(MAX_REDIRECTS):
            wire = self._network.open(self._url, proxied=True, vet=self._vet)
            try:
                with cut_off(wire.link, STALL_SECONDS):
                    response = wire.ask("GET", self._url.target, {"Accept": "*/*", **headers})
            except (OSError, http.client.HTTPException) as error:
                wire.close()
                text = f"下载失败：{self._url.host} {explain(error)}，请检查链接"
                raise Unreachable(text) from error
            status = response.status
            if status in (200, 206):
                return response, wire
            wire.close()
            if status not in (301, 302, 303, 307, 308):
                why = self.STATUS_TEXTS.get(status, "来源出错" if status >= 500 else "来源拒绝")
                raise Failure(f"下载失败：{why}（HTTP {status}），请检查链接或稍后再试")
            location = _header_text(response.headers.get("Location", ""))
            self._url = follow_location(self._url, location)
        raise Failure("下载失败：链接不停地重定向")

    def _resume(self, error: Exception) -> None:
        """Continue at the next byte (RFC 9110, 14) of the very same file; raise Failure."""
        self._wire.close()
        done, total = self._done_bytes, self._sent_bytes
        if not self._validator or not total or self._inflate:
            raise Failure(f"下载中断：{explain(error)}，来源不支持续传，请再发一次") from error
        wanted = {"Range": f"bytes={done}-", "If-Range": self._validator}
        self._response, self._wire = self._request(wanted)
        given = self._response.headers.get("Content-Range", "").strip()
        if self._response.status != 206 or given != f"bytes {done}-{total - 1}/{total}":
            self.close()
            raise Failure("下载中断，续传时来源文件已变化或不支持续传，请再发一次") from error

    def _read(self) -> bytes:
        """Return some bytes as the server sends them, b"" at the end; raise OSError."""
        left = READ_BYTES
        if self._sent_bytes is not None:
            left = min(left, self._sent_bytes - self._done_bytes)
        piece = self._response.read1(left) if left else b""
        if left and not piece and self._sent_bytes is not None:
            raise ConnectionResetError("short body")
        self._done_bytes += len(piece)
        return piece

    def _raw_pieces(self) -> Iterator[bytes]:
        """Yield what the server sends, resuming broken transfers; raise Failure."""
        tries, window, mark = 0, time.monotonic() + STALL_SECONDS, 0
        broken: Exception | None = None
        while True:
            try:
                if broken:
                    self._resume(broken)
                    broken = None
                piece = self._read()
                if time.monotonic() > window:
                    if self._done_bytes - mark < SLOWEST_BYTES:
                        raise TimeoutError
                    tries, window, mark = 0, time.monotonic() + STALL_SECONDS, self._done_bytes
            except (OSError, http.client.HTTPException, ValueError, Unreachable) as error:
                broken = error
                tries += 1
                if tries > TRIES or time.monotonic() > self._deadline:
                    raise Unreachable(f"下载中断：{explain(error)}，请再发一次") from error
                continue
            if not piece:
                return
            yield piece

    def _pieces(self) -> Iterator[bytes]:
        """Yield the file, as it is before a server's compression; raise Failure."""
        if self._inflate is None:
            yield from self._raw_pieces()
            return
        for piece in self._raw_pieces():
            while piece:
                try:
                    yield self._inflate.decompress(piece, READ_BYTES)
                except zlib.error as error:
                    raise Failure("来源的压缩数据已损坏，请再发一次") from error
                piece = self._inflate.unconsumed_tail
        if not self._inflate.eof:
            raise Unreachable("下载中断：压缩数据不完整，请再发一次")

    def parts(self) -> Iterator[bytearray]:
        """Yield the file in parts of PART_BYTES (the last one shorter, an empty file as one)."""
        part, written = bytearray(), 0
        for piece in self._pieces():
            part += piece
            written += len(piece)
            self._check_size(written)
            if len(part) >= PART_BYTES:
                yield part[:PART_BYTES]
                part = part[PART_BYTES:]
        if part or not written:
            yield part

    def close(self) -> None:
        """Break off, even while another thread reads."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._wire.link, socket.SHUT_RDWR)
        self._wire.close()


# ---- Reading a message (contract section 5; no input or output in here) ------------------------

# distribution/reference: domain, path component, tag; a digest of the one algorithm in use.
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*(?::\d+)?"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
REFERENCE = re.compile(
    rf"(?:(?P<host>{_DOMAIN})/)?(?P<path>{NAME}(?:/{NAME})*)"
    rf"(?::(?P<tag>{_TAG}))?(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?"
)
PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9._]+)?")
DEFAULT_PLATFORM = "linux/amd64"
DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
BARE_NAME = re.compile(NAME)
ASK_BACK = "如需同步镜像 {0}，请发送 {0}:latest"
# Full-width ASCII (U+FF01 to U+FF5E) and what phones and Word make of quotes, dashes and arrows.
TIDY = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},
    **dict.fromkeys(map(ord, "\u3000\xa0\t"), " "),
    **dict.fromkeys(map(ord, "“”„「」『』"), '"'),
    **dict.fromkeys(map(ord, "‘’"), "'"),
    **dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060"), None),
    ord("–"): "-",
    ord("→"): "=>",
}
PASTED = re.compile(
    r"(?i)(?:[-*•]\s+)?(?:[$#]\s+)?(?:sudo\s+)?(?:docker\s+(?:image\s+)?pull\s+)?(?:image\s*:\s+)?"
)


class BadImage(ValueError):
    """An item that is no image line; str() is the reason, `suggestion` what was likely meant."""

    def __init__(self, reason: str, suggestion: str = "") -> None:
        super().__init__(reason)
        self.suggestion = suggestion


class Image(NamedTuple):
    """A valid image line, taken apart."""

    platforms: tuple[str, ...]  # () is the default, ("all",) everything
    source: str  # canonical reference: host unless Docker Hub, path, tag and/or digest
    name: str  # of the target
    tag: str  # of the target
    renamed: str  # what stands after =>, "" for the rule's name

    @property
    def line(self) -> str:
        """Return the canonical line."""
        option = f"--platform={'+'.join(self.platforms)} " if self.platforms else ""
        return option + self.source + (f" => {self.renamed}" if self.renamed else "")

    def target(self, prefix: str) -> str:
        return f"{prefix}/{self.name}:{self.tag}"


def _read_platforms(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split("+")))
    if names == ("all",):
        return names
    for name in names:
        if not PLATFORM.fullmatch(name):
            raise BadImage(f"架构 {shown(name, 30)} 应写成 linux/arm64，多个用 + 连接，全部用 all")
    return names


def _why_not(text: str) -> str:
    name, _, digest = text.partition("@")
    if re.search(r"\s", text):
        return "中间有空格；多个镜像请分行或用逗号隔开"
    if re.search(r"[^\x21-\x7e]", text):
        return "含有不允许的字符"
    if "@" in text and not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        return "摘要应为 @sha256: 加 64 位小写十六进制"
    if re.search(r"[A-Z]", name.rpartition(":")[0] or name):
        return "名称只能用小写字母"
    if name.endswith(":"):
        return "冒号后面缺少标签"
    return "不是镜像名"


def _read_reference(text: str) -> tuple[str, str, str, str]:
    """Return host ("" for Docker Hub), path, tag and digest of a SOURCE; raise BadImage."""
    if len(text) > 255 + 128 + 72:
        raise BadImage("太长")
    host, _, rest = text.partition("/")
    if rest and ("." in host or ":" in host or host.lower() == "localhost"):
        match = REFERENCE.fullmatch(text)
    else:  # without such a first part the whole is a path on Docker Hub
        match = REFERENCE.fullmatch(f"docker.io/{text}")
    if not match or len(match["path"]) > 255:
        raise BadImage(_why_not(text))
    host, path = match["host"].lower(), match["path"]
    if host in DOCKER_HUB:
        host, path = "", re.sub(r"^library/(?=[^/]+$)", "", path)
    digest = match["digest"] or ""
    return host, path, match["tag"] or ("" if digest else "latest"), digest


def _read_image(text: str) -> Image:
    source, arrow, renamed = (part.strip() for part in text.partition("=>"))
    option = re.search(r"(?:^|\s)--platform(?:=|\s+)(\S+)", source)
    platforms = _read_platforms(option[1].lower()) if option else ()
    if option:
        source = f"{source[: option.start()]} {source[option.end() :]}".strip()
    if source.startswith("-"):
        raise BadImage("只支持选项 --platform")
    host, path, tag, digest = _read_reference(source)
    prefix = f"{host.replace(':', '-')}_" if host else ""
    name, target_tag = prefix + path.replace("/", "_"), tag or f"sha256-{digest[7:19]}"
    if len(platforms) == 1 and platforms[0] not in (DEFAULT_PLATFORM, "all"):
        target_tag += "-" + platforms[0].removeprefix("linux/").replace("/", "-")
    if arrow:
        if not (match := re.fullmatch(rf"({NAME})(?::({_TAG}))?", renamed)):
            raise BadImage("=> 后面应为 名称 或 名称:标签，小写，不带 /")
        name, target_tag = match[1], match[2] or target_tag
    if len(name) > 255 or len(target_tag) > 128:
        raise BadImage("目标名称或标签太长")
    reference = (f"{host}/" if host else "") + path + (f":{tag}" if tag else "")
    return Image(platforms, reference + (f"@{digest}" if digest else ""), name, target_tag, renamed)


def _suggest(text: str) -> str:
    """Return the valid line that text was likely meant to be, or ""."""
    text = re.sub(r"\s*([:/@])\s*", r"\1", text.strip().rstrip(".。!！,，;；:"))
    text = re.sub(r"(?i)^https?://(?:hub\.docker\.com/(?:r/|_/))?", "", text).strip("/")
    words = text.split()
    for attempt in (text, text.lower(), *([", ".join(words)] if len(words) > 1 else [])):
        with contextlib.suppress(BadImage):
            lines = [_read_image(word).line for word in attempt.split(", ")]
            return ", ".join(lines)
    return ""


def read_image(text: str) -> Image:
    """Return the Image of one line (chat, images.txt, `copy`); raise BadImage with a suggestion."""
    try:
        return _read_image(text)
    except BadImage as error:
        raise BadImage(str(error), _suggest(text)) from error


class Reading(NamedTuple):
    """What a message asks for: a command, or images and links, with items that are neither."""

    command: str = ""  # "status", "list", "help", or "" when there is work
    images: tuple[Image, ...] = ()
    links: tuple[str, ...] = ()
    note: str = ""


def tidy(item: str) -> str:
    """Return an item without what comes with it from a phone, a terminal or a compose file."""
    item = re.sub("—+", "--", item).translate(TIDY)
    item = PASTED.sub("", item.strip().strip("\"'`").strip(), count=1)
    if re.match(r"(?i)image:[^/:\s]+[/:]", item):  # but not the image "image"
        item = item[6:]
    return re.sub(r"\s+", " ", item).strip("\"'` ")


def split_items(text: str) -> tuple[list[str], list[str]]:
    """Return the links (a line each) and the other items of a message, tidied."""
    links: list[str] = []
    items: list[str] = []
    for line in re.split(r"[\r\n\u2028\u2029]+", text):
        link = line.translate({0xFEFF: None, 0x200B: None}).strip(" \t\u3000\"'`“”‘’<>")
        if re.match(r"(?i)https?://", link):
            links.append(link)
        else:
            items += filter(None, map(tidy, re.split(r"[,，、;；]", line)))
    return links, items


def read_list(text: str) -> tuple[list[str], list[str]]:
    """Return the canonical lines of an images.txt, and a Chinese error for each bad line."""
    lines, errors = [], []
    for row, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("\ufeff")
        if line and not line.startswith("#"):
            try:
                lines.append(read_image(tidy(line)).line)
            except BadImage as error:
                errors.append(f"第 {row} 行 {shown(line)}：{error}")
    return list(dict.fromkeys(lines)), errors


HUB_PAGE = r"(?i)https?://hub\.docker\.com/(?:_|r)/([^?#\s]+?)(?:/tags.*)?/?(?:[?#].*)?"


def _check_links(links: list[str]) -> None:
    if len(links) > MAX_LINKS:
        raise Failure(f"❌ 一次最多 {MAX_LINKS} 个链接，请分开发送")
    for link in links:
        if page := re.fullmatch(HUB_PAGE, link):
            with contextlib.suppress(BadImage):
                line = read_image(page[1]).line
                text = f"❓ 这是镜像的网页，不是文件。\n同步镜像请发送：{line}\n"
                raise Failure(text + "要文件请发送文件本身的链接")
        try:
            parse_url(link)
        except Failure as error:
            raise Failure(f"❌ {error}\n一行一个链接，中间不要有空格") from error


def _read_images(items: list[str], prefix: str) -> tuple[Image, ...]:
    """Return the images of all items; raise Failure naming every bad one, or a clash of targets."""
    images: dict[str, Image] = {}
    bad = []
    for item in items:
        try:
            image = read_image(item)
            images[image.line] = image
        except BadImage as error:
            meant = f"\n   您是不是要：{shown(error.suggestion, 160)}" if error.suggestion else ""
            bad.append(f"• {shown(item, 80)}\n   {error}{meant}")
    if bad:
        more = [f"……还有 {len(bad) - 5} 项"] if len(bad) > 5 else []
        raise Failure("\n".join(["❌ 没有开始，请改好后重发：", *bad[:5], *more]))
    if len(images) > MAX_IMAGES or sum(map(len, images)) > MAX_INPUT_CHARACTERS:
        raise Failure(f"❌ 一次最多 {MAX_IMAGES} 个镜像（共 {len(images)} 个），请分开发送")
    targets: dict[str, Image] = {}
    for image in images.values():
        other = targets.setdefault(image.target(prefix), image)
        if other is not image:
            raise Failure(
                f"❌ 没有开始：{other.line} 和 {image.line} 的目标都是 {image.name}:{image.tag}\n"
                f"请给其中一个改名：{image.line.partition(' => ')[0]} => 新名称"
            )
    return tuple(images.values())


def read_message(text: str, prefix: str) -> Reading:
    """Return what a chat message asks for; raise Failure with the reply for one that is refused.

    `prefix` is DOCKER_REGISTRY/DOCKER_NAMESPACE.
    """
    word = text.translate(TIDY).strip().lower()
    if word in ("状态", "status"):
        return Reading("status")
    if word in ("列表", "list"):
        return Reading("list")
    links, items = split_items(text)
    if items and (
        any(re.search(r"[:/]|=>|--platform", item) for item in items)
        or (len(items) > 1 and all(BARE_NAME.fullmatch(item) for item in items))
    ):
        images = _read_images(items, prefix)
        items = []
    else:
        images = ()
    _check_links(links)
    if images or links:
        note = f"\n（没有处理：{shown('、'.join(items))}）" if items else ""
        return Reading(images=images, links=tuple(links), note=note)
    is_name = len(items) == 1 and len(items[0]) <= 128 and BARE_NAME.fullmatch(items[0])
    if is_name and word != "help":
        return Reading("help", note=ASK_BACK.format(items[0]))
    return Reading("help")


# ---- State on disk -----------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Replace path by a file that is wholly written (fsync, then rename); raise OSError."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # the rename itself must reach the disk; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class ImageList:
    """STATE_DIR/images.txt: what was asked for since midnight, comments and foreign bytes kept."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LIST_PATH

    def read(self) -> str:
        try:
            return self.path.read_bytes().decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            return ""

    def write(self, text: str) -> bytes:
        """Replace the file by text and return its bytes; raise OSError."""
        data = text.encode("utf-8", "surrogateescape")
        write_atomically(self.path, data)
        return data

    def add(self, lines: Iterable[str]) -> bytes:
        """Append the lines that are not there yet; return the whole content."""
        text = self.read()
        present = {line.strip() for line in text.splitlines()}
        new = [line for line in lines if line not in present]
        if not new and self.path.exists():
            return text.encode("utf-8", "surrogateescape")
        if text and not text.endswith("\n"):
            text += "\n"
        return self.write(text + "".join(f"{line}\n" for line in new))

    def remove(self, uploaded: bytes) -> None:
        """Take out what was uploaded; lines that came meanwhile stay."""
        gone = set(uploaded.decode("utf-8", "surrogateescape").splitlines())
        kept = [line for line in self.read().splitlines() if line not in gone]
        self.write("".join(f"{line}\n" for line in kept))


STAGES = ("queued", "committed", "dispatching", "running", "late")


@dataclass
class Task:
    """An accepted request. `stage` says how far it is, for a restart to go on from there."""

    id: str
    lane: str  # "images" or "files"
    user: str
    items: list[str]  # canonical lines, or links still to do
    accepted: float  # seconds since the epoch
    stage: str = "queued"  # one of STAGES
    run_id: int = 0
    run_url: str = ""
    started: float = 0.0  # when the run was started
    upload: list[str] = field(default_factory=list)  # an Upload, while a file is on its way
    # For this process, and not worth a write of its own.
    done: int = 0  # jobs or bytes
    total: int = 0
    since: float = 0.0  # monotonic: when its work, or its run, began

    @property
    def run(self) -> Run:
        return Run(self.run_id, self.run_url)

    @property
    def title(self) -> str:
        more = f" 等 {len(self.items)} 个" if len(self.items) > 1 else ""
        return shown(self.items[0], 80) + more if self.items else ""


def read_task(entry: dict[str, Any]) -> Task:
    """Return the Task that was written as entry; raise TypeError or ValueError where it is none."""
    task = Task(**entry)
    for name, value in vars(Task("", "", "", [], 0.0)).items():
        if not isinstance(getattr(task, name), (int, float) if value == 0 else type(value)):
            raise TypeError(name)
    if not task.items or len(task.upload) not in (0, 3):
        raise ValueError("items or upload")
    if not all(isinstance(text, str) for text in [*task.items, *task.upload]):
        raise TypeError("items or upload")
    if task.lane not in ("images", "files") or task.stage not in STAGES:
        raise ValueError("lane or stage")
    task.since = 0.0
    if task.lane == "images" and [read_image(line).line for line in task.items] != task.items:
        raise ValueError("not canonical")
    return task


class Letter(NamedTuple):
    """A message to be sent."""

    user: str
    text: str


class State:
    """All that must survive a restart, in one file, under one lock.

    Memory is the truth while the process lives. Every change is written before it is acted upon;
    `accept` and `advance` raise Failure when that is impossible, the others log it and go on, since
    the next successful write carries everything.
    """

    def __init__(self, folder: Path, log: Log, now: Callable[[], float], max_age: int) -> None:
        self._path = folder / "wxsync.state"
        self._log = log
        self._now = now
        # A message is valid for max_age before and after its time stamp; repeats come within that.
        self._remember_seconds = max(REMEMBER_SECONDS, 2.0 * max_age)
        self._changed = threading.Condition()
        self.tasks: list[Task] = []
        self.letters: list[Letter] = []
        self.orphans: list[list[str]] = []  # Uploads to abort
        self.seen: dict[str, tuple[float, str, bool]] = {}  # id -> time, reply, worth a write
        self.midnight = ""  # the day (YYYY-MM-DD) up to which the list was emptied
        self.last = ""  # the last result, for `状态`
        self.trouble = ""

    def load(self) -> None:
        """Read the file; one that is damaged is set aside, never a reason not to start."""
        try:
            data = json.loads(self._path.read_bytes())
            self.tasks = [read_task(entry) for entry in data["tasks"]]
            self.letters = [Letter(str(user), str(text)) for user, text in data["letters"]]
            self.orphans = [[str(v) for v in entry] for entry in data["orphans"]]
            self.seen = {str(k): (float(v[0]), str(v[1]), True) for k, v in data["seen"].items()}
            self.midnight, self.last = str(data["midnight"]), str(data["last"])
        except FileNotFoundError:
            return
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            aside = self._path.with_name(f"wxsync.state.damaged-{int(self._now())}")
            os.replace(self._path, aside)
            self.tasks, self.letters, self.orphans, self.seen = [], [], [], {}
            self._log.error(f"❌ 状态文件已损坏，另存为 {aside.name}；未完成的请求请重发")

    def _save(self) -> None:
        """Write the file (lock held); raise Failure where the disk does not take it."""
        data = {
            "version": 1,
            "tasks": [vars(task) for task in self.tasks],
            "letters": self.letters,
            "orphans": self.orphans,
            "seen": {k: [at, reply] for k, (at, reply, kept) in self.seen.items() if kept},
            "midnight": self.midnight,
            "last": self.last,
        }
        try:
            write_atomically(self._path, json.dumps(data, ensure_ascii=False).encode())
            self.trouble = ""
        except OSError as error:
            self.trouble = f"写入 {self._path.name} 失败：{error.strerror}"
            self._log.error(f"❌ {self.trouble}")
            raise Failure(
                f"❌ 无法保存：{error.strerror}（STATE_DIR）。请清理磁盘或检查目录权限后重发"
            ) from error

    def _save_or_log(self) -> None:
        with contextlib.suppress(Failure):  # _save has logged it
            self._save()
        self._changed.notify_all()

    # -- requests

    def recall(self, message_id: str) -> str | None:
        """Return the reply already given to a message, None for a new one."""
        with self._changed:
            found = self.seen.get(message_id)
            return found[1] if found else None

    def remember(self, message_id: str, reply: str) -> None:
        """Keep a reply for repeats of its message, in memory only."""
        with self._changed:
            if message_id not in self.seen:
                self._note_seen(message_id, reply, False)

    def _note_seen(self, message_id: str, reply: str, kept: bool) -> None:
        now = self._now()
        while self.seen and now - next(iter(self.seen.values()))[0] >= self._remember_seconds:
            del self.seen[next(iter(self.seen))]  # oldest first
        while len(self.seen) >= MAX_REMEMBERED:  # what started work goes last
            light = (old for old, (_, _, heavy) in self.seen.items() if not heavy)
            del self.seen[next(light, None) or next(iter(self.seen))]
        self.seen[message_id] = (now, reply, kept)

    def tasks_of(self, lane: str, late: bool = False) -> list[Task]:
        """Return the tasks of a lane: those in it, or those being watched after it let them go."""
        with self._changed:
            return [t for t in self.tasks if t.lane == lane and (t.stage == "late") is late]

    def count(self, lane: str, late: bool = False) -> int:
        return len(self.tasks_of(lane, late))

    def accept(self, tasks: list[Task], message_id: str, reply: str) -> None:
        """Put requests (or none, when all were refused) on disk with the reply to their message.

        Raises Failure, with nothing changed.
        """
        with self._changed:
            self.tasks += tasks
            self._note_seen(message_id, reply, True)
            try:
                self._save()
            except Failure:
                del self.tasks[len(self.tasks) - len(tasks) :], self.seen[message_id]
                raise
            self._changed.notify_all()

    def next_task(self, lane: str) -> Task | None:
        """Wait for the lane's first task and return it, left in its place.

        The lane of files gets None once in a while when there are only orphans to see to.
        """
        with self._changed:
            while True:
                for task in self.tasks:
                    if task.lane == lane and task.stage != "late":
                        return task
                idle = bool(self.orphans) and lane == "files"
                if not self._changed.wait(CLOCK_LOOK_SECONDS if idle else None):
                    return None

    def advance(self, task: Task, **changes: Any) -> None:
        """Change fields of a task and write; raise Failure, with the fields as they were."""
        with self._changed:
            before = {name: getattr(task, name) for name in changes}
            vars(task).update(changes)
            try:
                self._save()
            except Failure:
                vars(task).update(before)
                raise

    def finish(self, task: Task, text: str, mark: str, title: str, item: str = "") -> None:
        """In one write: queue the final message and drop the task (or just the one item of it).

        `mark` is what makes the message unlike any other; an upload left in the task is an orphan.
        """
        with self._changed:
            self._post(task.user, text, mark)
            self.last = f"{time.strftime('%m-%d %H:%M', time.localtime(self._now()))} {title}"
            if task.upload:
                self.orphans.append(task.upload)
            task.upload, task.done, task.total = [], 0, 0
            if item in task.items:
                task.items.remove(item)
            if not item or not task.items:
                self.tasks.remove(task)
            self._save_or_log()

    def keep_watching(self, task: Task, text: str) -> None:
        """In one write: queue the message that the run takes long, and free the lane."""
        with self._changed:
            self._post(task.user, text, task.run_url)
            task.stage = "late"
            self._save_or_log()

    # -- messages

    def _post(self, user: str, text: str, mark: str) -> None:
        """Queue text in messages of at most MAX_TEXT_BYTES, each unlike any other ever sent."""
        # Masked, for an answer that is quoted might quote a secret in turn.
        pieces = split_text(self._log.mask(text), MAX_TEXT_BYTES - 64)
        short = hashlib.sha256(mark.encode()).hexdigest()[:6]
        for number, piece in enumerate(pieces, 1):
            of = f" {number}/{len(pieces)}" if len(pieces) > 1 else ""
            self.letters.append(
                Letter(user, piece if mark in piece and not of else f"{piece}\n（#{short}{of}）")
            )

    def post(self, user: str, text: str, mark: str) -> None:
        """Queue text for one user; `mark` is unique to it."""
        with self._changed:
            self._post(user, text, mark)
            self._save_or_log()

    def next_letter(self, due: Mapping[str, float]) -> Letter:
        """Wait for a message that may go now and return it, left in its place.

        In order for each user; `due` tells when each may get the next one (monotonic).
        """
        with self._changed:
            while True:
                # Reversed, so that of each user's messages the first one stays.
                first = {letter.user: letter for letter in reversed(self.letters)}
                user = min(first, key=lambda user: due.get(user, 0.0), default="")
                wait = due.get(user, 0.0) - time.monotonic()
                if user and wait <= 0:
                    return first[user]
                self._changed.wait(wait if user else None)

    def sent(self, letter: Letter) -> None:
        """Forget a message that was delivered or given up."""
        with self._changed:
            self.letters.remove(letter)
            self._save_or_log()

    # -- loose ends

    def late_tasks(self) -> list[Task]:
        """Wait until there are late runs, then return them."""
        with self._changed:
            while not (late := [task for task in self.tasks if task.stage == "late"]):
                self._changed.wait()
            return late

    def forget_orphan(self, orphan: list[str]) -> None:
        with self._changed:
            self.orphans.remove(orphan)
            self._save_or_log()

    def set_midnight(self, day: str) -> None:
        with self._changed:
            self.midnight = day
            self._save_or_log()

    def close(self) -> None:
        """Write a last time and let nothing be changed any more: the lock is never given back."""
        self._changed.acquire()
        with contextlib.suppress(Failure):
            self._save()


class StateLock:
    """STATE_DIR/wxsync.lock: held while the process lives, freed by the system when it dies."""

    def __init__(self, folder: Path) -> None:
        """Take the lock; raise Failure when another process has it or it cannot be written."""
        path = folder / "wxsync.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 - open as long as the process
        except OSError as error:
            raise Failure(f"STATE_DIR {folder} 不能写：{error.strerror}") from error
        try:
            if fcntl:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                import msvcrt

                lock: Any = msvcrt
                self._file.seek(0)
                lock.locking(self._file.fileno(), lock.LK_NBLCK, 1)
        except OSError as error:
            self._file.close()
            raise Failure(f"另一个 wxsync 正在使用 STATE_DIR {folder}，请先停掉它") from error


# ---- Tasks: the lanes of images and files, late runs, the post ---------------------------------


@dataclass(frozen=True)
class App:
    """The parts of a running service; each owns its own state and lock."""

    settings: Settings
    log: Log
    now: Callable[[], float]  # seconds since the epoch
    sleep: Callable[[float], None]
    network: Network
    wecom: WeCom
    github: GitHub
    store: QingStor | None
    images: ImageList
    state: State
    list_lock: threading.Lock  # held while an image request runs; midnight waits for it
    started: float  # monotonic


def duration(seconds: float) -> str:
    """Return seconds in Chinese."""
    seconds = max(0, int(seconds))
    minutes = f"{seconds // 60} 分 " if seconds >= 60 else ""
    return f"{minutes}{seconds % 60} 秒"


def _failed_groups(outcomes: list[Outcome]) -> list[str]:
    """Return the lines for failed images, those with one cause together, so that all fit."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        detail = outcome.detail if outcome.code in ("error", "rejected") else ""
        groups.setdefault((outcome.code, detail), []).append(outcome)
    lines = []
    for (code, detail), members in groups.items():
        if code == "missing":
            cause, cure = "运行里没有这个镜像的任务", "请重发这一个"
        elif code == "running":
            cause, cure = "还没有结束", "打开运行地址查看"
        else:
            cause, cure = COPY_REASONS[code]
        lines += [f"❌ {member.line}" for member in members]
        lines += [f"   原因：{cause}{f'（{detail}）' if detail else ''}", f"   办法：{cure}"]
        if code == "error" and members[0].url:
            lines.append(f"   任务：{members[0].url}")
    return lines


def _done_lines(outcomes: list[Outcome], prefix: str) -> list[str]:
    lines = []
    for outcome in outcomes:
        mark = "（已是最新）" if outcome.code == "unchanged" else ""
        lines.append(f"docker pull {read_image(outcome.line).target(prefix)}{mark}")
    return lines


def result_text(outcomes: list[Outcome], prefix: str, seconds: float, run_url: str) -> str:
    """Return the final message of an image request: failures first, then what to copy."""
    done = [outcome for outcome in outcomes if outcome.is_done]
    failed = [outcome for outcome in outcomes if not outcome.is_done]
    count = f"成功 {len(done)} / {len(outcomes)}"
    head = f"❌ 镜像同步没有全部完成，{count}" if failed else f"✅ 镜像同步完成，{count}"
    lines = [head, f"用时 {duration(seconds)}", run_url, "", *_failed_groups(failed)]
    lines += ["", *_done_lines(done, prefix)] if failed and done else _done_lines(done, prefix)
    text, left = "\n".join(lines), 0
    while len(split_text(text, MAX_TEXT_BYTES - 64)) > MAX_RESULT_MESSAGES:
        lines.pop()
        left += 1
        text = "\n".join([*lines, f"……还有 {left} 行，见运行地址"])
    return text


def late_text(outcomes: list[Outcome], prefix: str, run_url: str) -> str:
    """Return the message of a run that outlives SYNC_TIMEOUT."""
    done = [outcome for outcome in outcomes if outcome.is_done]
    failed = [o for o in outcomes if not o.is_done and o.code not in ("running", "missing")]
    head = f"⏰ 还在同步，完成 {len(done)} / {len(outcomes)}，失败 {len(failed)}；结束后再通知您"
    lines = [head, run_url, "", *_failed_groups(failed), *_done_lines(done, prefix)]
    return split_text("\n".join(lines), MAX_TEXT_BYTES - 64)[0]


def find_or_start_run(app: App, task: Task) -> Run:
    """Return the task's run: found where it may have been started before, else started now."""
    for _ in range(TRIES):
        if task.stage == "dispatching" and (run := app.github.find_run(task.id)):
            return run
        app.state.advance(task, stage="dispatching")
        try:
            return app.github.dispatch(task.items, task.id)
        except Unreachable as error:
            app.log.warning(f"github: {error}；查找是否已经启动")
    if run := app.github.find_run(task.id):
        return run
    raise Unreachable("GitHub 没有回应，任务没有启动，请稍后重发")


def finish_images(app: App, task: Task, outcomes: list[Outcome]) -> None:
    seconds = app.now() - (task.started or task.accepted)
    text = result_text(outcomes, app.settings.target_prefix, seconds, task.run_url)
    done = sum(outcome.is_done for outcome in outcomes)
    app.log.info(f"images: id={task.id} done={done} of={len(outcomes)} seconds={seconds:.0f}")
    title = f"镜像 {task.title}：成功 {done} / {len(outcomes)}"
    app.state.finish(task, text, task.run_url, title)


def started_at(app: App, task: Task) -> float:
    """Return when the task's run was started, as a monotonic time; a restart has only the clock."""
    return time.monotonic() - min(max(0.0, app.now() - task.started), WATCH_SECONDS)


def follow(app: App, task: Task, seconds: float) -> bool:
    """Poll the task's run until it has ended, then finish the task.

    Returns False when it has taken `seconds` by then. Durations are monotonic, as clocks are set.
    """
    next_count, odd = time.monotonic() + JOBS_SECONDS, 0
    while True:
        try:
            if app.github.is_completed(task.run):
                finish_images(app, task, app.github.outcomes(task.run, task.items))
                return True
            if time.monotonic() >= next_count:
                next_count = time.monotonic() + JOBS_SECONDS
                outcomes = app.github.outcomes(task.run, task.items)
                task.done = sum(o.code not in ("running", "missing") for o in outcomes)
            odd = 0
        except Failure as failure:
            # A line that is bad or a limit passes; a run may be unknown (404) for some seconds
            # after it was started. What is refused or odd again and again does not.
            status = failure.status if isinstance(failure, GitHubError) else 0
            odd += not isinstance(failure, Unreachable) and status != 429
            if status in (401, 403) or odd > ODD_ANSWERS:
                raise
            app.log.debug(f"github: {failure}")
        if time.monotonic() >= task.since + seconds:
            return False
        app.sleep(POLL_SECONDS)


def sync_images(app: App, task: Task) -> None:
    """Run one image request from where it stands: commit, dispatch, follow; raise Failure."""
    with app.list_lock:
        task.since = started_at(app, task) if task.stage == "running" else time.monotonic()
        if task.stage == "queued":
            more = f" (+{len(task.items) - 1})" if len(task.items) > 1 else ""
            message = f"wxsync: {task.items[0]}{more} [skip ci]"
            try:
                content = app.images.add(task.items)
            except OSError as error:
                text = f"写入 {LIST_PATH} 失败：{error.strerror}，请检查 STATE_DIR"
                raise Failure(text) from error
            app.github.upload_list(content, message)
            app.state.advance(task, stage="committed")
        if task.stage in ("committed", "dispatching"):
            run = find_or_start_run(app, task)
            app.log.info(f"images: id={task.id} run={run.id}")
            app.state.advance(
                task, stage="running", run_id=run.id, run_url=run.url, started=app.now()
            )
            task.since = time.monotonic()
        if not follow(app, task, app.settings.SYNC_TIMEOUT):
            try:
                outcomes = app.github.outcomes(task.run, task.items)
            except Failure:
                outcomes = [Outcome(line, "running", "", "") for line in task.items]
            text = late_text(outcomes, app.settings.target_prefix, task.run_url)
            app.state.keep_watching(task, text)


def fail_images(app: App, task: Task, why: str) -> None:
    """Tell the person that the request failed as a whole."""
    run = f"\n运行：{task.run_url}" if task.run_url else ""
    names = "\n".join(shown(line, 100) for line in task.items[:10])
    more = f"\n等 {len(task.items)} 个" if len(task.items) > 10 else ""
    text = f"❌ 镜像同步失败，成功 0 / {len(task.items)}\n{why}{run}\n\n{names}{more}"
    app.state.finish(task, text, task.id, f"镜像 {task.title}：失败")


def read_ahead(source: Source) -> Iterator[bytearray]:
    """Yield the source's parts, each next one read while the last one is being worked on."""
    from concurrent.futures import ThreadPoolExecutor  # 5 ms at start

    parts = source.parts()
    with ThreadPoolExecutor(1) as pool:
        try:
            coming = pool.submit(next, parts, None)
            while (part := coming.result()) is not None:
                coming = pool.submit(next, parts, None)
                yield part
        finally:
            source.close()  # or the pool would wait for a read that nobody wants


def upload_parts(app: App, store: QingStor, task: Task, source: Source) -> tuple[str, int]:
    """Stream the source into the bucket; return the object's key and its size in bytes."""
    key, kind = make_key(source.name), source.content_type or "application/octet-stream"
    upload, count, size_bytes = Upload(key, "", source.name), 0, 0
    app.state.advance(task, upload=list(upload))
    for part in read_ahead(source):
        size_bytes += len(part)
        if count == 0 and len(part) < PART_BYTES:
            store.put(key, part, kind)
            return key, size_bytes
        if count == 0:
            upload = upload._replace(upload_id=store.initiate(key, kind))
            app.state.advance(task, upload=list(upload))
        store.put_part(upload, count, part)
        count += 1
        task.done = size_bytes
    store.complete(upload, count)
    return key, size_bytes


def relay_file(app: App, task: Task) -> None:
    """Bring the first link of a file request into the bucket and tell the person; raise Failure."""
    store, settings = app.store, app.settings
    if store is None:
        raise Failure("没有设置 QingStor，文件功能已关闭")
    name = key = ""
    size_bytes: int | None = None
    if task.upload:  # this process or one before it was interrupted here
        key, _, name = task.upload
        size_bytes = store.settle(Upload(*task.upload))
    if size_bytes is None:
        vet = settings.DANGEROUSLY_ALLOW_PRIVATE_URLS != "1"
        source = Source(app.network, task.items[0], vet, settings.MAX_FILE_MB * 2**20)
        name, task.total = source.name, source.total_bytes or 0
        try:
            key, size_bytes = upload_parts(app, store, task, source)
        finally:
            source.close()
    text = (
        f"✅ 文件上传成功！\n\n文件名: {name}\n文件大小: {size_bytes} 字节\n"
        f"存储桶: {settings.QINGSTOR_BUCKET}\n下载链接: {store.link(key, app.now())}"
    )
    app.log.info(f"files: id={task.id} bytes={size_bytes} key={key}")
    task.upload = []
    app.state.finish(task, text, key, f"文件 {shown(name)}：成功", item=task.items[0])


def fail_file(app: App, task: Task, why: str) -> None:
    """Tell the person that the first link failed; leave nothing in the bucket."""
    if task.upload and app.store:
        with contextlib.suppress(Failure):  # then it becomes an orphan, which is tried again
            app.store.settle(Upload(*task.upload))
            task.upload = []
    link, number = task.items[0], secrets.token_hex(3)
    text = f"❌ 文件上传失败\n{why}\n\n{shown(link, 300)}\n（#{number}）"
    app.state.finish(task, text, number, "文件：失败", item=link)


def settle_orphans(app: App) -> None:
    """Drop what uploads left behind that could not be dropped when they failed."""
    for orphan in list(app.state.orphans):
        try:
            if app.store:
                app.store.settle(Upload(*orphan))
            app.state.forget_orphan(orphan)
        except Failure as failure:
            app.log.warning(f"files: 清理未完成的上传失败，稍后再试：{failure}")


def work(app: App, lane: str) -> None:
    """Do one task of a lane: this is where a task's trouble becomes a message."""
    task = app.state.next_task(lane)
    if task is None:
        settle_orphans(app)
        return
    task.since = time.monotonic()
    run, fail = (sync_images, fail_images) if lane == "images" else (relay_file, fail_file)
    try:
        run(app, task)
    except Failure as failure:
        app.log.warning(f"{lane}: id={task.id} {failure}")
        fail(app, task, str(failure))
    except Exception:
        app.log.bug(f"{lane}: id={task.id}")
        fail(app, task, INTERNAL_ERROR)


def watch_late_runs(app: App) -> None:
    """Look once at every run that outlived SYNC_TIMEOUT."""
    for task in app.state.late_tasks():
        try:
            task.since = task.since or started_at(app, task)
            if not follow(app, task, 0.0) and time.monotonic() > task.since + WATCH_SECONDS:
                fail_images(app, task, "运行 6 小时仍没有结束，不再等待，请到运行地址查看")
        except Failure as failure:
            fail_images(app, task, str(failure))
    app.sleep(POLL_SECONDS)


def deliver(app: App, due: dict[str, float], tries: dict[str, int]) -> None:
    """Send one message. What fails for everybody holds up all, an odd errcode only its person.

    `due` tells when each person may get the next message (monotonic), `tries` counts failures.
    """
    letter = app.state.next_letter(due)
    for user in [user for user, at in due.items() if at < time.monotonic()]:
        del due[user]
    try:
        app.wecom.send(letter.user, letter.text)
    except Failure as failure:
        tries[letter.user] = tries.get(letter.user, 0) + 1
        is_known = not isinstance(failure, WeComError) or failure.is_known
        least = failure.pause_seconds if isinstance(failure, WeComError) else 1.0
        if least and (is_known or tries[letter.user] <= ODD_ANSWERS):
            pause = max(least, min(300.0, 2.0 ** min(tries[letter.user], 9)))
            app.log.warning(f"wecom: {failure}；{pause:.0f} 秒后重试")
            app.wecom.trouble = str(failure)
            if is_known:
                app.sleep(pause)
            else:
                due[letter.user] = time.monotonic() + pause
            return
        app.log.error(f"wecom: {failure}；给 {shown(letter.user)} 的消息已丢弃")
    app.wecom.trouble = ""
    tries.pop(letter.user, None)
    due[letter.user] = time.monotonic() + MESSAGE_INTERVAL_SECONDS
    app.state.sent(letter)


# ---- Copying an image (this is what each workflow job runs) ------------------------------------

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
JOB_SECRETS = ("DOCKER_USERNAME", "DOCKER_PASSWORD", "SOURCE_AUTH")
REGISTRIES_CONF = 'unqualified-search-registries = ["docker.io"]\n'
# What skopeo and registries say -> CODE, the first that matches. Where two codes stand, the first
# is for the source, the second for the target. Substrings, since wording differs by version.
COPY_MESSAGES: tuple[tuple[str, str, str], ...] = (
    (r"toomanyrequests|status: 429|too many requests", "rate-limited", "rate-limited"),
    (r"context deadline exceeded", "timeout", "timeout"),
    (r"unknown manifest class|manifest invalid|unsupported.*media ?type", "rejected", "rejected"),
    (r"no image found in (image index|manifest list)", "no-platform", "no-platform"),
    (r"no such host|server misbehaving|no route to host|is unreachable", "network", "network"),
    (r"connection (refused|reset)|broken pipe|use of closed network|\bEOF\b", "network", "network"),
    (r"i/o timeout|TLS handshake|x509:|HTTP response to HTTPS", "network", "network"),
    (r"HTTP status: 5|StatusCode: 5", "network", "network"),
    (r"invalid username/password|unable to retrieve auth token", "source-denied", "target-login"),
    (r"manifest unknown|name unknown|name not known|StatusCode: 404", "not-found", "error"),
    (r"denied|\b403\b", "source-denied", "target-denied"),
    (r"unauthorized|authentication required|\b401\b", "source-denied", "target-login"),
)
TARGET_MARKS = r"at destination|destination repository|initializing destination|uploading|writing"
# Names in skopeo's messages, which may look like a message themselves (an image called "eof").
NAMES = r'\w+://[^\s"\\]+|(?<=manifest )\S+ in \S+|(?<=exists in )\S+|(?<=repository )\S+'


class CopyFailure(Exception):
    """A copy that failed with one of the CODEs of the contract and a short English detail."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def classify(text: str, at_target: bool) -> str:
    """Return the CODE for what skopeo wrote to stderr."""
    for pattern, source_code, target_code in COPY_MESSAGES:
        if re.search(pattern, text, re.IGNORECASE):
            return target_code if at_target else source_code
    return "error"


class Skopeo:
    """Runs skopeo with auth files that only this user can read, never with secrets as arguments."""

    def __init__(self, environ: Mapping[str, str], registry: str, folder: Path) -> None:
        self._environ = {k: v for k, v in environ.items() if k not in JOB_SECRETS}
        conf = environ.get("CONTAINERS_REGISTRIES_CONF") or self._file(
            folder / "registries.conf", REGISTRIES_CONF
        )
        # Older skopeo ignores the variable, and runner images have shipped broken files.
        self._command = ["skopeo", "--registries-conf", conf]
        pair = f"{environ.get('DOCKER_USERNAME', '')}:{environ.get('DOCKER_PASSWORD', '')}"
        auth = {registry: {"auth": base64.b64encode(pair.encode()).decode()}} if pair != ":" else {}
        self._target = self._file(folder / "target.json", json.dumps({"auths": auth}))
        self._source = self._file(folder / "source.json", environ.get("SOURCE_AUTH") or "{}")

    @staticmethod
    def _file(path: Path, text: str) -> str:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        return str(path)

    def _run(self, arguments: list[str], seconds: float, at_target: bool) -> bytes:
        """Return stdout, trying again after a quick fault of the network; raise CopyFailure.

        skopeo's own --retry-times leaves out HTTP 500 and DNS, and repeats a 429 for minutes.
        """
        for pause in (1.0, 3.0):
            begun = time.monotonic()
            try:
                return self._run_once(arguments, seconds, at_target)
            except CopyFailure as failure:
                if failure.code != "network" or time.monotonic() - begun > CONNECT_SECONDS:
                    raise
            time.sleep(pause)
        return self._run_once(arguments, seconds, at_target)

    def _run_once(self, arguments: list[str], seconds: float, at_target: bool) -> bytes:
        import subprocess  # only here

        command = [*self._command, "--command-timeout", f"{seconds:.0f}s", *arguments]
        try:
            done = subprocess.run(  # noqa: S603 - a list, and the reference has been validated
                command, env=self._environ, capture_output=True, timeout=seconds + 30, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CopyFailure("timeout", "skopeo did not end in time") from error
        except OSError as error:
            raise CopyFailure("error", f"cannot run skopeo: {error.strerror}") from error
        if done.returncode == 0:
            return done.stdout
        text = done.stderr.decode(errors="replace")
        said = re.findall(r'msg="((?:\\.|[^"\\])*)"', text) or [text]
        text = re.sub(NAMES, "", text)
        at_target = at_target or re.search(TARGET_MARKS, text) is not None
        detail = re.sub(r'^Error parsing image name "[^"]*": ', "", said[-1].replace('\\"', '"'))
        raise CopyFailure(classify(text, at_target), detail)

    def raw(self, reference: str, at_target: bool = False) -> bytes:
        """Return the manifest or index of a reference as the registry has it."""
        auth = self._target if at_target else self._source
        arguments = ["inspect", "--raw", "--authfile", auth, f"docker://{reference}"]
        return self._run(arguments, INSPECT_SECONDS, at_target)

    def config(self, reference: str) -> Any:
        """Return the config of a single-platform image."""
        arguments = ["inspect", "--config", "--authfile", self._source, f"docker://{reference}"]
        return json.loads(self._run(arguments, INSPECT_SECONDS, False))

    def copy(self, source: str, target: str, *options: str) -> None:
        """Copy one manifest with its layers, or what the options say; the digest stays the same."""
        auth = ["--src-authfile", self._source, "--dest-authfile", self._target]
        arguments = ["copy", "--quiet", "--preserve-digests", *auth, *options, source]
        self._run([*arguments, f"docker://{target}"], COPY_SECONDS, False)


def digest_of(manifest: bytes) -> str:
    return "sha256:" + hashlib.sha256(manifest).hexdigest()


def _is_attestation(entry: Mapping[str, Any]) -> bool:
    platform = entry.get("platform") or {}
    marked = "vnd.docker.reference.type" in (entry.get("annotations") or {})
    return marked or platform.get("architecture") == "unknown"


def _platform(entry: Mapping[str, Any]) -> str:
    names = (entry.get(name) for name in ("os", "architecture", "variant"))
    return "/".join(str(name) for name in names if name)


def choose(entries: list[Any], wanted: str) -> Any:
    """Return the entry of an index for os/arch[/variant]; raise CopyFailure no-platform.

    arm64 and arm64/v8 are one, so are arm and arm/v7 (as containerd has it).
    """
    offered = [_platform(entry.get("platform") or {}) for entry in entries]
    common = {"linux/arm64/v8": "linux/arm64", "linux/arm/v7": "linux/arm"}
    for entry, platform in zip(entries, offered, strict=True):
        if common.get(platform, platform) == common.get(wanted, wanted):
            return entry
    raise CopyFailure("no-platform", f"no {wanted} among {', '.join(offered)}")


def target_digest(skopeo: Skopeo, target: str) -> str:
    """Return the digest that the target has now, "" where it has none or does not tell."""
    try:
        return digest_of(skopeo.raw(target, at_target=True))
    except CopyFailure as failure:
        # A denied look proves nothing (the repository may not exist yet): the copy decides.
        if failure.code in ("target-login", "network", "timeout"):
            raise
        return ""


def copy_index(
    skopeo: Skopeo, image: Image, raw: bytes, repository: str, target: str, folder: Path
) -> tuple[bool, str]:
    """Copy the wanted platforms by digest, then an index that holds just those."""
    index = json.loads(raw)
    entries = [entry for entry in index["manifests"] if not _is_attestation(entry)]
    if image.platforms != ("all",):
        wanted = [choose(entries, name) for name in image.platforms]
        entries = [entry for entry in entries if entry in wanted]  # in the source's order
    if entries != index["manifests"]:
        raw = json.dumps({**index, "manifests": entries}, indent=2).encode()
    digest = digest_of(raw)
    if target_digest(skopeo, target) == digest:
        return False, digest
    base = target.rpartition(":")[0]
    for entry in entries:
        skopeo.copy(f"docker://{repository}@{entry['digest']}", f"{base}@{entry['digest']}")
    layout = folder / "index"
    layout.mkdir()
    (layout / "manifest.json").write_bytes(raw)
    (layout / "version").write_text("Directory Transport Version: 1.1\n")
    skopeo.copy(f"dir:{layout}", target, "--multi-arch", "index-only")
    return True, digest


def check_platform(skopeo: Skopeo, image: Image, reference: str, manifest: dict[str, Any]) -> None:
    """Raise CopyFailure where a single-platform image is not of the wanted platform.

    skopeo would copy it all the same and say nothing.
    """
    if manifest.get("schemaVersion") != 2 or "config" not in manifest:
        raise CopyFailure("rejected", "docker schema 1 image, long out of use")
    if image.platforms == ("all",):
        return
    entries = [{"platform": skopeo.config(reference)}]
    for name in image.platforms or (DEFAULT_PLATFORM,):
        choose(entries, name)


def copy_image(skopeo: Skopeo, image: Image, prefix: str, folder: Path) -> tuple[bool, str]:
    """Copy one image; return whether anything was copied, and the target's digest."""
    name, _, digest = image.source.partition("@")
    repository = re.sub(r":[^/:]*$", "", name)
    # docker.io must be written out; a tag and a digest together are refused, the digest is exact.
    if not re.match(r"[^/]*[.:][^/]*/|localhost/", repository):
        repository = f"docker.io/{'' if '/' in repository else 'library/'}{repository}"
        name = f"{repository}:{name.rpartition(':')[2]}" if not digest else name
    target = image.target(prefix)
    raw = skopeo.raw(f"{repository}@{digest}" if digest else name)
    manifest = json.loads(raw)
    if manifest.get("mediaType") in INDEX_TYPES or "manifests" in manifest:
        if len(image.platforms) > 1 or image.platforms == ("all",):
            return copy_index(skopeo, image, raw, repository, target, folder)
        entries = [entry for entry in manifest["manifests"] if not _is_attestation(entry)]
        wanted = choose(entries, (image.platforms or (DEFAULT_PLATFORM,))[0])
        digest = wanted["digest"]
    else:
        digest = digest_of(raw)
        check_platform(skopeo, image, f"{repository}@{digest}", manifest)
    if target_digest(skopeo, target) == digest:
        return False, digest
    skopeo.copy(f"docker://{repository}@{digest}", target)
    return True, digest


def harmless(text: str) -> str:
    """Return text on one line for a job's log, where `##[` and a leading `::` are commands."""
    return shown(re.sub(r"[^\x20-\x7e]+", " ", text), 200).replace("##[", "# #[")


def run_copy(line: str, environ: Mapping[str, str]) -> int:
    """Do `wxsync.py copy LINE`: print the result, also to $GITHUB_OUTPUT; return the status."""
    import tempfile  # only here

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the auth files go, too
    try:
        image = read_image(line)
    except BadImage as error:
        print(f"wxsync: {harmless(line)}: {error}", file=sys.stderr)
        return 2
    registry, namespace = environ.get("DOCKER_REGISTRY", ""), environ.get("DOCKER_NAMESPACE", "")
    prefix = f"{registry}/{namespace}"
    print(f"{image.line} -> {image.target(prefix)}", file=sys.stderr, flush=True)
    try:
        if not re.fullmatch(REGISTRY[0], registry) or not re.fullmatch(NAMESPACE[0], namespace):
            raise CopyFailure("error", "DOCKER_REGISTRY or DOCKER_NAMESPACE is not valid")
        if environ.get("WXSYNC_TARGET", "") not in ("", prefix):
            raise CopyFailure("target-mismatch", f"asked for {environ['WXSYNC_TARGET']}")
        with tempfile.TemporaryDirectory(prefix="wxsync-") as folder:
            skopeo = Skopeo(environ, registry, Path(folder))
            copied, digest = copy_image(skopeo, image, prefix, Path(folder))
        status, result = 0, f"{'copied' if copied else 'unchanged'} {digest}"
    except CopyFailure as failure:
        detail = str(failure).replace(environ.get("DOCKER_PASSWORD") or "\0", "***")
        status, result = 1, f"failed {failure.code} {harmless(detail)}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        status, result = 1, f"failed error odd manifest ({type(error).__name__})"
    print(f"wxsync: {result}", flush=True)
    if path := environ.get("GITHUB_OUTPUT"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"result=wxsync: {result}\n")
    return status


# ---- Server: WeCom's callbacks -----------------------------------------------------------------


class Head(http.server.BaseHTTPRequestHandler):
    """The head of one request, read by http.server; constructing it may raise Rejected."""

    protocol_version = "HTTP/1.1"  # connections are kept

    def __init__(self, data: bytes) -> None:
        # Not the base class's: it would read from a socket, and answer.
        self.rfile, self.wfile = io.BytesIO(data), io.BytesIO()
        self.raw_requestline = self.rfile.readline(MAX_HEAD_BYTES)
        if not self.parse_request() or self.request_version == "HTTP/0.9":
            raise Rejected(400, "request line")
        self.continued = self.wfile.getvalue()  # "100 Continue", where it was asked for
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or (not lengths and self.command == "POST"):
            raise Rejected(411, "length required")
        length = lengths[0].strip() if lengths else "0"
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", length):
            raise Rejected(400, "Content-Length")
        self.body_bytes = int(length)
        if self.body_bytes > MAX_BODY_BYTES:
            raise Rejected(413, "body too large")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        raise Rejected(400, message or "head")

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"


class Connection:
    """What one client has sent and not been answered yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = b""
        self.head: Head | None = None
        self.need = 0  # bytes until the request is whole, once its head is read
        self.deadline = time.monotonic() + REQUEST_SECONDS
        self.answered = False  # for good; what still comes is thrown away

    def next_request(self) -> tuple[Head, bytes] | None:
        """Return the next whole request, None while there is none; raise Rejected."""
        if self.head is None:
            end = self.data.find(b"\r\n\r\n") + 4
            if end > MAX_HEAD_BYTES or (end < 4 and len(self.data) > MAX_HEAD_BYTES):
                raise Rejected(400, "head too large")
            if end < 4:
                return None
            self.head, self.data = Head(self.data[:end]), self.data[end:]
            self.need = self.head.body_bytes
            if self.head.continued and len(self.data) < self.need:
                self.sock.send(self.head.continued)
        if len(self.data) < self.need:
            return None
        head, body = self.head, self.data[: self.need]
        self.head, self.data = None, self.data[self.need :]
        return head, body


class Server:
    """One thread that holds every connection and answers whole requests as they come.

    An answer takes a millisecond and never waits for another server, so slow or silent clients cost
    a buffer each, and nothing else. Their number and time are bounded.
    """

    def __init__(
        self, address: tuple[str, int], answer: Callable[[str, str, bytes], Reply], log: Log
    ) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._answer = answer
        self._log = log
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # on Windows it would let others share the port
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(address)
        self._listener.listen(512)
        self._listener.setblocking(False)
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._open: dict[socket.socket, Connection] = {}  # the oldest deadline first

    def stop_on_signals(self) -> None:
        """Make SIGTERM and SIGINT end `run`."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until a signal comes."""
        while True:
            timeout = None  # nothing to do, nothing to wake up for
            if self._open:
                first = next(iter(self._open.values()))
                timeout = max(0.0, first.deadline - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.fileobj is self._wake:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif connection := self._open.get(key.fileobj):  # type: ignore[call-overload]
                    self._read(connection)
            now = time.monotonic()
            while self._open and (first := next(iter(self._open.values()))).deadline <= now:
                self._drop(first)

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: the oldest connection has to go
                self._log.warning(f"server: {error.strerror}")
                if self._open:
                    self._drop(next(iter(self._open.values())))
                return
            if len(self._open) >= MAX_CONNECTIONS:
                self._drop(next(iter(self._open.values())))
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open[sock] = Connection(sock)
            self._selector.register(sock, selectors.EVENT_READ)

    def _drop(self, connection: Connection) -> None:
        del self._open[connection.sock]
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def _read(self, connection: Connection) -> None:
        """Take what has come and answer every request that is whole now."""
        try:
            data = connection.sock.recv(MAX_BODY_BYTES)
            if not data:
                raise ConnectionResetError
            if connection.answered:
                return
            connection.data += data
            while request := connection.next_request():
                head, body = request
                reply = self._answer(head.command, head.path, body)
                self._send(connection, reply, close=head.close_connection)
                if head.close_connection:
                    break
                # To the end of the line: deadlines stay in order.
                connection.deadline = time.monotonic() + REQUEST_SECONDS
                self._open[connection.sock] = self._open.pop(connection.sock)
        except Rejected as refusal:
            with contextlib.suppress(OSError):
                self._send(connection, Reply(refusal.status), close=True)
        except OSError:
            self._drop(connection)

    def _send(self, connection: Connection, reply: Reply, close: bool) -> None:
        """Write a reply in one go; a client that does not take it loses the connection.

        When it is the last one, only our half is closed: closing both at once, with something of
        the request unread, would reset the connection before the client has read the reply.
        """
        phrase = http.client.responses.get(reply.status, "")
        head = f"HTTP/1.1 {reply.status} {phrase}\r\nContent-Length: {len(reply.body)}\r\n"
        head += f"Content-Type: {reply.content_type}\r\n" if reply.body else ""
        head += "Connection: close\r\n\r\n" if close else "\r\n"
        data = head.encode() + reply.body
        if connection.sock.send(data) != len(data):
            raise ConnectionAbortedError
        if close:
            connection.answered, connection.data = True, b""
            connection.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Stop listening and drop every connection."""
        for connection in list(self._open.values()):
            self._drop(connection)
        self._listener.close()


def fit(head: str, lines: list[str], room_bytes: int) -> str:
    """Return head and lines in room_bytes UTF-8, cut with a count where they are too many."""
    kept = list(lines)
    while len("\n".join([head, *kept]).encode()) > room_bytes and kept:
        kept.pop()
    left = len(lines) - len(kept)
    return "\n".join([head, *kept, *([f"……还有 {left} 个"] if left else [])])


def _bar(done: int, total: int) -> str:
    filled = min(10, 10 * done // total)
    return f"{'▓' * filled}{'░' * (10 - filled)} {100 * done // total}%"


def status_text(app: App) -> str:
    """Return what runs, what waits, how far, and the last result."""
    lines = ["📊 当前状态"]
    for lane, name in (("images", "镜像"), ("files", "文件")):
        tasks = app.state.tasks_of(lane)
        if not tasks:
            lines.append(f"{name}：空闲")
            continue
        task = tasks[0]
        seconds = max(1.0, time.monotonic() - task.since) if task.since else 1.0
        lines.append(f"{name}：进行中 {task.title}，已用 {duration(seconds)}")
        if lane == "images":
            total = len(task.items)
            lines.append(f"　{_bar(task.done, total)}，已完成 {task.done}/{total}")
        else:
            known = f"{_bar(task.done, task.total)}，" if task.total else ""
            of = f" / {task.total / 1e6:.1f}" if task.total else ""
            speed = task.done / seconds / 1e6
            lines.append(f"　{known}{task.done / 1e6:.1f}{of} MB，{speed:.1f} MB/s")
        if len(tasks) > 1:
            lines.append(f"　等待 {len(tasks) - 1} 个")
    if late := app.state.count("images", late=True):
        lines.append(f"超时后仍在跟踪：{late} 个")
    if trouble := app.state.trouble or app.github.trouble or app.wecom.trouble:
        lines.append(f"⚠️ {trouble}")
    return "\n".join([*lines, f"上一个结果：{app.state.last or '还没有'}"])


class Callback:
    """Answers requests: verification, messages, health. All of it at once, from memory and disk."""

    PATH = "/wechat/callback"

    def __init__(self, app: App, crypto: Crypto) -> None:
        self._app = app
        self._crypto = crypto

    def answer(self, method: str, path: str, body: bytes) -> Reply:
        """Return the Reply to one request. This is where a bug becomes an answer."""
        try:
            return self._route(method, path, body)
        except Rejected as refusal:
            self._app.log.debug(f"server: status={refusal.status} {refusal}")
            return Reply(refusal.status)
        except Exception:
            self._app.log.bug("server")
            return Reply(500)

    def _route(self, method: str, path: str, body: bytes) -> Reply:
        address, _, query = path.partition("?")
        if (method, address) == ("GET", "/health"):
            return Reply(200, json.dumps(self._health()).encode(), "application/json")
        if address != self.PATH or method not in ("GET", "POST"):
            raise Rejected(404, "path")
        try:
            values = dict(urllib.parse.parse_qsl(query, max_num_fields=20))
        except ValueError as error:
            raise Rejected(400, "query") from error
        if method == "GET":
            # An unescaped "+" has become a space on the way; base64 has no spaces.
            encrypted = values.get("echostr", "").replace(" ", "+")
            self._check(values, encrypted)
            echo = self._crypto.decrypt(encrypted)
            if not re.fullmatch(rb"[\w-]{1,128}", echo):  # a recorded message, to be decrypted
                raise Rejected(403, "echostr")
            return Reply(200, echo)
        envelope, as_json = read_fields(body)
        encrypted = envelope.get("encrypt", "")
        self._check(values, encrypted)
        message = read_message_fields(self._crypto.decrypt(encrypted))
        if message.user == self._app.settings.CORP_ID:  # our own reply, sent back to us
            raise Rejected(403, "sender")
        if message.kind != "text" or not (text := self._answer_message(message)):
            return Reply(200)
        inner = {"ToUserName": message.user, "FromUserName": self._app.settings.CORP_ID}
        now = self._app.now()
        inner |= {"CreateTime": str(int(now)), "MsgType": "text", "Content": text}
        kind = "application/json" if as_json else "application/xml"
        return Reply(200, seal(self._crypto, inner, as_json, now), kind)

    def _check(self, values: Mapping[str, str], encrypted: str) -> None:
        """Raise Rejected where a request is not WeCom's or not of these minutes."""
        given, timestamp = values.get("msg_signature", ""), values.get("timestamp", "")
        nonce = values.get("nonce", "")
        if not (given and nonce and encrypted and re.fullmatch(r"[0-9]{1,12}", timestamp)):
            raise Rejected(400, "parameters")
        if not self._crypto.is_signed(given, timestamp, nonce, encrypted):
            raise Rejected(403, "signature")
        limit = self._app.settings.CALLBACK_MAX_AGE
        if limit and abs(self._app.now() - int(timestamp)) > limit:
            self._app.log.warning("server: 回调的时间戳与本机时钟相差过大，已拒绝（核对本机时钟）")
            raise Rejected(403, "stale")

    def _health(self) -> dict[str, Any]:
        app = self._app
        running = queued = 0
        for lane in ("images", "files"):
            ahead = app.state.count(lane)
            running, queued = running + min(ahead, 1), queued + max(0, ahead - 1)
        proxy = app.network.proxy_state
        trouble = app.state.trouble or app.github.trouble or app.wecom.trouble
        return {
            "status": "degraded" if trouble or proxy == "down" else "ok",
            "version": VERSION,
            "uptime_seconds": int(time.monotonic() - app.started),
            "running": running,
            "queued": queued,
            "proxy": proxy,
        }

    def _answer_message(self, message: Message) -> str:
        """Return the passive reply to a text message, after everything it asks for is on disk."""
        app = self._app
        allowed = app.settings.ALLOWED_USERS
        if allowed and message.user.lower() not in allowed:
            return "抱歉，您没有使用权限，请联系管理员把您的账号加入 ALLOWED_USERS"
        if (reply := app.state.recall(message.id)) is not None:
            return reply
        try:
            reading = read_message(message.content, app.settings.target_prefix)
            reply = self._obey(reading, message)
        except Failure as failure:
            reply = split_text(str(failure), MAX_TEXT_BYTES)[0]
        except Exception:
            app.log.bug(f"message: id={shown(message.id)}")
            reply = INTERNAL_ERROR
        pieces = split_text(reply, MAX_TEXT_BYTES)
        app.state.remember(message.id, pieces[0])
        for number, piece in enumerate(pieces[1:], 2):
            app.state.post(message.user, piece, f"{message.id} {number}")
        return pieces[0]

    def _obey(self, reading: Reading, message: Message) -> str:
        """Return the reply to a message that was understood; queue its work. Raises Failure."""
        app = self._app
        if reading.command == "status":
            return status_text(app)
        if reading.command == "list":
            try:
                lines = app.images.read().encode(errors="replace").decode().strip()
            except OSError as error:
                text = f"❌ 读取 {LIST_PATH} 失败：{error.strerror}，请检查 STATE_DIR"
                raise Failure(text) from error
            return f"📋 今天的镜像列表：\n{lines}" if lines else "📋 今天的镜像列表是空的"
        if reading.command == "help":
            return f"{reading.note}\n\n{HELP}".strip()
        tasks: list[Task] = []
        replies = []
        room = MAX_TEXT_BYTES // (2 if reading.images and reading.links else 1) - 150
        if reading.images:
            prefix = app.settings.target_prefix
            items = [image.line for image in reading.images]
            pairs = [f"{image.line} → {image.target(prefix)}" for image in reading.images]
            pairs = [f"{number}. {pair}" for number, pair in enumerate(pairs, 1)]
            head = f"🔄 正在处理镜像同步请求...\n共 {len(items)} 个镜像："
            replies.append(self._queue(tasks, message, "images", items, fit(head, pairs, room)))
        if reading.links and app.store is None:
            replies.append("❌ 文件上传没有启用：请管理员设置 QINGSTOR_ACCESS_KEY_ID 等")
        elif reading.links:
            head = f"🔄 正在处理文件上传请求...\n共 {len(reading.links)} 个文件："
            text = fit(head, [shown(link, 100) for link in reading.links], room)
            replies.append(self._queue(tasks, message, "files", list(reading.links), text))
        reply = "\n\n".join(replies) + reading.note
        app.state.accept(tasks, message.id, reply)
        for task in tasks:
            count, user = len(task.items), shown(task.user)
            app.log.info(f"{task.lane}: id={task.id} user={user} accepted={count}")
        return reply

    def _queue(
        self, tasks: list[Task], message: Message, lane: str, items: list[str], text: str
    ) -> str:
        """Add a task where its lane has room; return what to say of it."""
        ahead = self._app.state.count(lane)
        if ahead > self._app.settings.QUEUE_SIZE:
            return "⏳ 已有任务正在处理中，请稍后再试"
        tasks.append(Task(secrets.token_hex(8), lane, message.user, items, self._app.now()))
        if not ahead:
            return text
        return f"⏳ 已有任务正在处理中，已排队，前面还有 {ahead} 个\n" + text.partition("\n")[2]


# ---- Midnight ----------------------------------------------------------------------------------


def day_of(moment: float) -> str:
    """Return the local day (YYYY-MM-DD, by TZ) of a moment in seconds since the epoch."""
    return time.strftime("%Y-%m-%d", time.localtime(moment))


def seconds_to_midnight(moment: float) -> float:
    """Return the seconds until the next local day begins; days may have 23 or 25 hours."""
    year, month, day, *_ = time.localtime(moment)
    return max(0.0, time.mktime((year, month, day + 1, 0, 0, 0, 0, 0, -1)) - moment)


def empty_list(app: App, day: str) -> None:
    """Upload images.txt and empty it, when no image request runs; raise Failure."""
    with app.list_lock:
        try:
            if app.images.path.exists():
                uploaded = app.images.read().encode("utf-8", "surrogateescape")
                app.github.upload_list(uploaded, f"wxsync: 每日列表 {day} [skip ci]")
                app.images.remove(uploaded)
        except OSError as error:
            raise Failure(f"清空 {LIST_PATH} 失败：{error.strerror}") from error
        app.state.set_midnight(day_of(app.now()))


def keep_midnight(app: App) -> float:
    """Do midnight's work if a day has begun since it was done; return the seconds to wait."""
    now, last = app.now(), app.state.midnight
    today = day_of(now)
    if not last or last > today:
        app.state.set_midnight(today)  # the first start, or the clock has been ahead
    elif last < today:
        try:
            empty_list(app, last)
            app.log.info(f"midnight: 列表已上传并清空 day={last}")
        except Failure as failure:
            app.log.warning(f"midnight: {failure}；{MIDNIGHT_RETRY_SECONDS:.0f} 秒后重试")
            return MIDNIGHT_RETRY_SECONDS
    # In short steps, for a clock that is set meanwhile does not end a long one.
    return min(CLOCK_LOOK_SECONDS, seconds_to_midnight(app.now()))


# ---- Command line ------------------------------------------------------------------------------


def repeat(app: App, step: Callable[[], object]) -> None:
    """Start a thread that does step for ever; a bug is logged and does not end it."""

    def loop() -> None:
        while True:
            try:
                step()
            except Exception:
                app.log.bug("thread")
                app.sleep(CLOCK_LOOK_SECONDS)

    threading.Thread(target=loop, daemon=True).start()


def build_app(
    settings: Settings, log: Log, now: Callable[[], float], sleep: Callable[[float], None]
) -> App:
    """Wire the parts of the service; opens no connection and starts no thread."""
    network, folder = Network(settings, log), Path(settings.STATE_DIR)
    github = Client(network, settings.GITHUB_API_URL, proxied=True)
    return App(
        settings=settings,
        log=log,
        now=now,
        sleep=sleep,
        network=network,
        wecom=WeCom(settings, Client(network, settings.WECOM_API_URL, proxied=False), log),
        github=GitHub(settings, github, log, sleep),
        store=QingStor(settings, network, sleep) if settings.QINGSTOR_ACCESS_KEY_ID else None,
        images=ImageList(folder),
        state=State(folder, log, now, settings.CALLBACK_MAX_AGE),
        list_lock=threading.Lock(),
        started=time.monotonic(),
    )


def keep_probing(app: App) -> None:
    app.network.probe()
    app.sleep(PROBE_SECONDS)


def warm_up(crypto: Crypto) -> None:
    """Load AES before the first message waits for it; give back what compiling this file took."""
    crypto.encrypt("")
    if sys.platform == "linux":
        import ctypes  # the AES library has loaded it already

        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).malloc_trim(0)


def start_threads(app: App, crypto: Crypto) -> None:
    """Start everything that does not answer requests."""
    if proxy := app.network.proxy:
        app.log.info(f"🌐 检测到代理配置: {proxy}")
        app.log.info(f"   直连域名: {', '.join(app.settings.NO_PROXY_DOMAINS)}")
        repeat(app, lambda: keep_probing(app))
    # Somebody may have got a message just before a restart.
    begin = time.monotonic() + MESSAGE_INTERVAL_SECONDS
    due = {letter.user: begin for letter in app.state.letters}
    tries: dict[str, int] = {}
    repeat(app, lambda: work(app, "images"))
    repeat(app, lambda: work(app, "files"))
    repeat(app, lambda: watch_late_runs(app))
    repeat(app, lambda: deliver(app, due, tries))
    repeat(app, lambda: app.sleep(keep_midnight(app)))
    threading.Thread(target=warm_up, args=(crypto,), daemon=True).start()


def serve(
    settings: Settings,
    log: Log,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run the service until a signal comes; return the exit status."""
    try:
        lock = StateLock(Path(settings.STATE_DIR))
        app = build_app(settings, log, now, sleep)
        crypto = Crypto(settings.TOKEN, settings.ENCODING_AES_KEY, settings.CORP_ID)
        app.state.load()
        server = Server((settings.HOST, settings.PORT), Callback(app, crypto).answer, log)
    except (Failure, OSError) as error:
        log.error(f"❌ 启动失败：{error}")
        return 1
    server.stop_on_signals()
    start_threads(app, crypto)
    log.info(f"🚀 wxsync {VERSION} 已启动，端口 {settings.PORT}，回调路径 {Callback.PATH}")
    server.run()
    server.close()
    app.state.close()
    log.info("👋 已停止，未完成的任务下次启动后继续")
    log.close()
    del lock  # held until here
    os._exit(0)  # returning would wait for a thread that reads a download


def send_text(settings: Settings, text: str, user: str) -> int:
    """Post text to the running service as WeCom would; print its immediate reply."""
    crypto = Crypto(settings.TOKEN, settings.ENCODING_AES_KEY, settings.CORP_ID)
    now = time.time()
    inner = {"ToUserName": settings.CORP_ID, "FromUserName": user, "CreateTime": str(int(now))}
    inner |= {"MsgType": "text", "Content": text, "MsgId": str(secrets.randbits(62))}
    envelope, _ = read_fields(seal(crypto, inner, False, now))
    query = {"msg_signature": envelope["msgsignature"], "timestamp": envelope["timestamp"]}
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.HOST, settings.HOST)  # noqa: S104
    target = f"{Callback.PATH}?{urllib.parse.urlencode({**query, 'nonce': envelope['nonce']})}"
    body = write_xml({"ToUserName": settings.CORP_ID, "Encrypt": envelope["encrypt"]}).encode()
    try:
        with contextlib.closing(
            http.client.HTTPConnection(host, settings.PORT, timeout=CALL_SECONDS)
        ) as connection:
            connection.request("POST", target, body)
            response = connection.getresponse()
            data = response.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        text = f"❌ 连不上 {host}:{settings.PORT}（{explain(error)}）：服务在运行吗？"
        print(text, file=sys.stderr)
        return 1
    if response.status != 200:
        print(f"❌ 服务答 {response.status}：它的设置和这里的一样吗？", file=sys.stderr)
        return 1
    if data:
        reply, _ = read_fields(data)
        values, _ = read_fields(crypto.decrypt(reply["encrypt"]))
        print(values.get("content", ""))
    return 0


class Finding(NamedTuple):
    """One line of `check`: ✅ ⚠️ or ❌, what it is about, what was found and how to mend it."""

    mark: str
    name: str
    text: str


def finding(name: str, good: bool, text: str, cure: str, mark: str = "❌") -> Finding:
    """Return ✅ with text, or the other mark with the cure."""
    return Finding("✅", name, text) if good else Finding(mark, name, cure)


def check_host(app: App, env_file: Path) -> Iterator[Finding]:
    """Look at this machine: folder, file modes, libraries."""
    import importlib.util

    folder = Path(app.settings.STATE_DIR).resolve()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    writable = place.is_dir() and os.access(place, os.W_OK)
    text = f"{folder} 不能写：chown 给运行 wxsync 的用户"
    yield finding("STATE_DIR", writable, f"{folder} 可写", text)
    if env_file.exists() and os.name == "posix":
        mode = env_file.stat().st_mode & 0o777
        text = f"{env_file} 权限 {mode:o}"
        cure = f"{text}，别人也能读：chmod 600 {env_file}"
        yield finding(".env", not mode & 0o077, text, cure, "⚠️")
    for module, package in (("Crypto", "pycryptodome"), ("qingstor", "qingstor-sdk")):
        if module == "Crypto" or app.store:
            found = importlib.util.find_spec(module) is not None
            yield finding(package, found, "已安装", f"没有安装：pip install {package}")


def check_clock(clients: Mapping[str, Client]) -> Iterator[Finding]:
    """Compare this machine's clock with the servers' Date headers; tell the largest difference."""
    gaps = {name: abs(client.clock_gap) for name, client in clients.items() if client.clock_gap}
    if gaps:
        name = max(gaps, key=gaps.__getitem__)
        text = f"与 {name} 相差 {gaps[name]:.0f} 秒"
        yield finding("时钟", gaps[name] <= 60, text, f"{text}：timedatectl set-ntp true")


def check_proxy(app: App) -> Iterator[Finding]:
    if app.network.proxy is None:
        yield Finding("✅", "代理", "没有设置，GitHub 直连")
        return
    test = app.settings.PROXY_TEST_URL
    cure = f"{app.network.proxy} 打不开 {test}：核对地址和密码，或换 PROXY_TEST_URL"
    yield finding("代理", app.network.probe(), f"{app.network.proxy} 可用", cure)


def check_wecom(app: App) -> Iterator[Finding]:
    """Ask for a token (CORP_ID, SECRET), then for the application (AGENT_ID, trusted IP)."""
    app.wecom.token()
    yield Finding("✅", "企业微信", "CORP_ID 和 SECRET 正确")
    query = {"agentid": str(app.settings.AGENT_ID)}
    found = app.wecom.call_with_token("GET", "/cgi-bin/agent/get", query)
    text = f"AGENT_ID 正确（{shown(str(found.get('name', '')))}），本机 IP 可信"
    yield finding("企业微信应用", not found.get("close"), text, "应用已停用：到管理后台启用")


def refused(app: App, method: str, path: str, body: Any, needs: str) -> str:
    """Return why the token may not make a call, "" where it may.

    The call names a branch that does not exist: GitHub looks at the permission first, then refuses
    it all the same, so nothing is changed.
    """
    try:
        app.github.call(method, path, body, needs)
    except GitHubError as error:
        return str(error) if error.status in (401, 403) else ""
    return ""


def check_workflow(app: App) -> Iterator[Finding]:
    """Look for the workflow: there, active, with the wxsync.py of this version beside it."""
    call = app.github.call
    with contextlib.suppress(GitHubError):  # needs Administration: Read, which is optional
        enabled = call("GET", "/actions/permissions").get("enabled") is not False
        cure = "没有开启：仓库 Settings → Actions → General"
        yield finding("GitHub Actions", enabled, "已开启", cure)
    try:
        found = call("GET", f"/actions/workflows/{WORKFLOW}", needs="Actions: Read and write")
        state = shown(pick(found, "state", str))
        path, body = f"/actions/workflows/{WORKFLOW}/dispatches", {"ref": NO_BRANCH}
        why = refused(app, "POST", path, body, "Actions: Read and write")
        cure = why or f"状态 {state}：到 Actions 页选中它，点 Enable workflow"
        yield finding("GitHub 工作流", state == "active" and not why, "已启用，可以启动", cure)
    except GitHubError as error:
        cure = f"默认分支要有 .github/workflows/{WORKFLOW}；复刻的仓库先到 Actions 页启用。{error}"
        yield Finding("❌", "GitHub 工作流", cure)
    branch = app.settings.GITHUB_BRANCH
    try:
        path = f"/contents/wxsync.py?ref={urllib.parse.quote(branch)}"
        found = call("GET", path, needs="Contents: Read and write")
        same = base64.b64decode(pick(found, "content", str)) == Path(__file__).read_bytes()
        cure = "与本机的版本不同：两边更新到同一版本"
        yield finding("GitHub 上的 wxsync.py", same, "与本机相同", cure, "⚠️")
    except (GitHubError, ValueError) as error:
        cure = f"分支 {branch} 里读不到，工作流需要它：{error}"
        yield Finding("❌", "GitHub 上的 wxsync.py", cure)


def check_github(app: App) -> Iterator[Finding]:
    """Ask for the repository, the branch, the workflow, Actions and the Secrets."""
    settings, call = app.settings, app.github.call
    found = call("GET", "", needs="Metadata: Read")
    kind = "细粒度令牌" if settings.GITHUB_TOKEN.startswith("github_pat_") else "经典令牌"
    yield Finding("✅", "GitHub 令牌", f"{kind}，能访问 {settings.GITHUB_REPO}")
    if ends := app.github.token_ends:
        yield Finding("⚠️", "GitHub 令牌", f"{shown(ends)} 到期，到期前请更换 GITHUB_TOKEN")
    if found.get("archived"):
        yield Finding("❌", "GitHub 仓库", "仓库已归档，不能写：Settings → Unarchive")
    needs, body = "Contents: Read and write", {"message": "", "content": "", "branch": NO_BRANCH}
    why = refused(app, "PUT", f"/contents/{LIST_PATH}", body, needs)
    push = bool((found.get("permissions") or {}).get("push")) and not why
    cure = why or f"令牌的主人没有写权限：换有权限的账号，令牌要有 {needs}"
    yield finding("GitHub 仓库", push, "可以写入", cure)
    yield from check_workflow(app)
    names = {"DOCKER_REGISTRY", "DOCKER_NAMESPACE", "DOCKER_USERNAME", "DOCKER_PASSWORD"}
    try:
        listed = pick(call("GET", "/actions/secrets?per_page=100"), "secrets", list)
    except GitHubError:
        text = f"令牌不能列出 Secrets，请自行确认有 {', '.join(sorted(names))}"
        yield Finding("⚠️", "GitHub Secrets", text)
        return
    missing = ", ".join(sorted(names - {entry.get("name") for entry in listed}))
    cure = f"缺少 {missing}：在仓库 Settings → Secrets and variables → Actions 添加"
    yield finding("GitHub Secrets", not missing, "四个都在", cure)


def check_target(app: App, client: Client) -> Iterator[Finding]:
    """Look at the target registry's name and ask whether it answers."""
    registry = app.settings.DOCKER_REGISTRY
    acr = r"(registry\.[a-z0-9-]+|crpi-[a-z0-9]+\.[a-z0-9-]+\.personal\.cr)\.aliyuncs\.com"
    cure = f"{registry} 不像 ACR 个人版的地址：registry.cn-….aliyuncs.com 或 crpi-….personal.cr.…"
    found = re.fullmatch(acr, registry) is not None
    yield finding("目标仓库", found, f"{registry} 是 ACR 地址", cure, "⚠️")
    answer = client.call("GET", "/v2/", {})
    text = f"{registry} 可以访问（账号密码只在工作流里用，这里无法检查）"
    cure = f"{registry} 答 HTTP {answer.status}，不像镜像仓库：核对 DOCKER_REGISTRY"
    yield finding("目标仓库", answer.status in (200, 401), text, cure)


def check_qingstor(app: App) -> Iterator[Finding]:
    """Ask for the bucket and who may read it."""
    if app.store is None:
        yield Finding("✅", "QingStor", "没有设置，文件功能关闭")
        return
    answer = app.store.call("get_acl")
    app.store.require(answer)
    yield Finding("✅", "QingStor", f"存储桶 {app.settings.QINGSTOR_BUCKET} 可以访问，密钥正确")
    seconds, public = app.settings.QINGSTOR_LINK_SECONDS, b"QS_ALL_USERS" in answer.body
    text = f"带签名，{seconds} 秒内有效" if seconds else "公开读"
    cure = "存储桶不是公开读，链接打不开：设置 QINGSTOR_LINK_SECONDS=86400，或把存储桶设为公开读"
    yield finding("QingStor 链接", bool(seconds) or public, text, cure)


CHECK_HINTS = {
    "本机": "检查 STATE_DIR",
    "代理": "检查 PROXY_URL",
    "企业微信": "检查网络和 WECOM_API_URL",
    "GitHub": "检查网络和 GITHUB_API_URL，连不上时设置 PROXY_URL",
    "目标仓库": "检查网络和 DOCKER_REGISTRY",
    "QingStor": "检查网络、QINGSTOR_URL 和 QINGSTOR_ZONE",
}


def run_checks(app: App, env_file: Path) -> list[Finding]:
    """Ask every system side by side, for CHECK_SECONDS in all; return what was found, in order."""
    target = Client(app.network, f"https://{app.settings.DOCKER_REGISTRY}", proxied=False)
    clients = {"企业微信": app.wecom.client, "GitHub": app.github.client, "目标仓库": target}
    clients |= {"QingStor": app.store.client} if app.store else {}
    checks: dict[str, Iterator[Finding]] = {
        "本机": check_host(app, env_file),
        "代理": check_proxy(app),
        "企业微信": check_wecom(app),
        "GitHub": check_github(app),
        "目标仓库": check_target(app, clients["目标仓库"]),
        "QingStor": check_qingstor(app),
    }
    findings: dict[str, list[Finding]] = {name: [] for name in checks}

    def collect(name: str) -> None:
        try:
            findings[name].extend(checks[name])
        except Unreachable as failure:
            findings[name].append(Finding("❌", name, f"{failure}；{CHECK_HINTS[name]}"))
        except Failure as failure:
            findings[name].append(Finding("❌", name, str(failure)))
        except (AttributeError, TypeError):
            findings[name].append(Finding("❌", name, "回答看不懂：核对地址"))

    waiting = {name: threading.Thread(target=collect, args=(name,), daemon=True) for name in checks}
    for thread in waiting.values():
        thread.start()
    deadline = time.monotonic() + CHECK_SECONDS
    while waiting and time.monotonic() < deadline:
        next(iter(waiting.values())).join(0.5)
        waiting = {name: thread for name, thread in waiting.items() if thread.is_alive()}
        if waiting and sys.stderr.isatty():
            print(f"\r等待 {'、'.join(waiting)} …\033[K", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    for name in waiting:
        text = f"{CHECK_SECONDS:.0f} 秒内没有回答；{CHECK_HINTS[name]}"
        findings[name].append(Finding("❌", name, text))
    findings["时钟"] = list(check_clock(clients))
    return [found for group in findings.values() for found in group]


def run_check(app: App, env_file: Path, as_json: bool) -> int:
    """Do `wxsync.py check`; return 0 when nothing is wrong."""
    findings = run_checks(app, env_file)
    if as_json:
        print(json.dumps([found._asdict() for found in findings], ensure_ascii=False))
    else:
        print("\n".join(f"{found.mark} {found.name}：{found.text}" for found in findings))
    return int(any(found.mark == "❌" for found in findings))


def make_parser() -> argparse.ArgumentParser:
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    about = "企业微信里发镜像名，经 GitHub Actions 复制到镜像仓库；发链接，存到 QingStor"
    parser = argparse.ArgumentParser(prog="wxsync.py", description=about)
    parser.add_argument("--version", action="version", version=f"wxsync {VERSION} sha256:{digest}")
    parser.add_argument("--env", metavar="FILE", help="设置文件（默认当前目录的 .env）")
    commands = parser.add_subparsers(dest="command", metavar="命令")
    commands.add_parser("serve", help="运行服务（默认）")
    check = commands.add_parser("check", help="检查全部设置和外部系统，并说明怎么改")
    check.add_argument("--json", action="store_true", help="输出 JSON")
    send = commands.add_parser("send", help="像企业微信一样给运行中的服务发一条消息")
    send.add_argument("text", metavar="TEXT")
    send.add_argument("--user", default="", metavar="ID", help="默认 ALLOWED_USERS 的第一个")
    plan = commands.add_parser("plan", help="读镜像列表，输出规范行的 JSON 数组")
    plan.add_argument("file", nargs="?", default=LIST_PATH, metavar="FILE", help="- 为标准输入")
    copy = commands.add_parser("copy", help="用 skopeo 复制一个镜像（工作流的任务运行它）")
    copy.add_argument("line", metavar="LINE")
    return parser


def run_plan(path: str) -> int:
    """Do `wxsync.py plan`: print the canonical lines as a JSON array, or every bad line."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        lines, errors = read_list(data.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        lines, errors = [], [f"{shown(path)}：{error}"]
    for error_line in errors:
        print(error_line, file=sys.stderr)
    if errors:
        return 2
    print(json.dumps(lines))
    return 0


def main(arguments: list[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run one command; return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console may know no Chinese
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    is_line = len(arguments) == 2 and arguments[1] not in ("-h", "--help")
    if arguments[:1] == ["copy"] and is_line:  # LINE may begin with --platform
        return run_copy(arguments[1], environ)
    options = make_parser().parse_args(arguments)
    if options.command == "plan":
        return run_plan(options.file)
    env_file = Path(options.env or ".env")
    try:
        stored = read_env_file(env_file) if options.env or env_file.exists() else {}
        settings = load_settings({**stored, **environ})
    except SettingsError as error:
        for problem in error.problems:
            print(f"❌ {problem}", file=sys.stderr)
        print("设置不完整：cp env.example .env 后填写，每一项的含义见其中的说明", file=sys.stderr)
        return 1
    log = Log(settings.LOG_LEVEL, settings.secret_values(), sys.stderr)
    if options.command == "check":
        quiet = Log("ERROR", settings.secret_values(), sys.stderr)
        app = build_app(settings, quiet, time.time, lambda seconds: None)
        return run_check(app, env_file, options.json)
    if options.command == "send":
        user = options.user or next(iter(settings.ALLOWED_USERS), "wxsync")
        return send_text(settings, options.text, user)
    return serve(settings, log)


if __name__ == "__main__":
    sys.exit(main())
