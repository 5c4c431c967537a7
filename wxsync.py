#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["pycryptodome>=3.20,<5", "qingstor-sdk==2.6.0"]
# ///
"""wxsync: mirror container images and files on a word typed into WeCom (企业微信).

What it does. Somebody types `nginx:latest` to an application or a smart robot; the line is
committed to images.txt in a GitHub repository, a workflow there runs `wxsync.py copy LINE` once per
image (skopeo, registry to registry), and the person is told per image what came of it. Somebody
sends an https link; the file is streamed into QingStor and the person gets the download link. At
midnight the list is emptied.

Where each secret goes.
    BOT_SECRET                  BOT_URL, in the first frame; never through a proxy
    TOKEN, ENCODING_AES_KEY     nowhere: they check and decrypt what WeCom posts to us
    SECRET                      WECOM_API_URL, for an access token; never through a proxy
    GITHUB_TOKEN                GITHUB_API_URL only, no redirect takes it to another host
    QINGSTOR_SECRET_ACCESS_KEY  nowhere: it signs requests; never through a proxy
    PROXY_URL's password        the proxy
    DOCKER_PASSWORD (its user), SOURCE_AUTH
                                only in the workflow's job: 0600 auth files for skopeo
Log lines, and what is quoted of foreign answers, are masked by `Log`.

Who is trusted. WeCom, because it knows TOKEN and ENCODING_AES_KEY, or because we called it over
TLS; through it the users, as far as to name images and links, never addresses inside our network.
GitHub, QingStor, registries and download servers are not trusted to answer sensibly: answers are
bounded, typed and cleaned before use.

Promises, each with the test that holds it (in test_wxsync.py).
 1. Nothing unvalidated reaches git, a shell, a file name or a log line.
    test_whatever_is_typed_canonical_lines_are_safe_and_stable, test_users_cannot_forge_log_lines
 2. Nobody without the keys is heard, nothing a stranger sends ends the service.
    test_forged_and_stale_callbacks_are_403_with_an_empty_body
    test_garbage_does_not_end_the_service
 3. No secret is written anywhere, no redirect takes the token to another host.
    test_no_secret_is_written_whatever_others_say, test_no_redirect_takes_the_token_elsewhere
 4. The registry's password is in no argument and goes to no registry but the promised one.
    test_passwords_are_in_no_argument_and_in_private_files, test_the_promised_target_is_copied_to
 5. No address inside our network is fetched, by name, redirect or proxy.
    test_forbidden_addresses, test_redirects_to_the_inside, test_names_with_an_inside_address
 6. What was accepted is on disk first, happens once and is told, whatever dies.
    test_a_request_is_on_disk_before_it_is_answered
    test_killed_at_random_moments_nothing_is_lost_or_done_twice
 7. An image of which the run does not say that it succeeded has failed; other bytes than the
    digest's are never copied. test_what_has_not_its_digest_is_never_copied
 8. Every wait has an end, every input a limit. test_nobody_holds_the_lane

What survives a crash. STATE_DIR/wxsync.state holds accepted requests, unsent messages and the ids
of answered ones; a request is in it before it is acknowledged. STATE_DIR/images.txt is the list.
What a crash leaves of a request, and what the next start does about it:
    queued          perhaps a run: looked for by the request's id; if there is none, the request
                    begins again (a list that is there already takes no second commit)
    running, late   a run: it is followed to its end
    a file's upload what was stored whole is told, anything else aborted and begun again
    finished        a letter: it is sent; WeCom drops one that it has had, the robot shows it again

Threads. The main one holds every HTTP connection and waits for nothing; one alone writes the state.
Each lane (images, files) is one; runs, those that take long, orphans, midnight, the proxy and
living messages have one each that looks now and then; letters go out by one for WeCom and four for
the robot, whose line is read by one. What waits for the disk, a message to the robot and a download
have their own while they last. Locks may be held together in this order only: App.list_lock
and any other; WeCom's, a Client's, Network's; State.changed, a Pace's; a Stream's, WebSocket's. All
others are held alone, the Log's last.

How to read it. Top to bottom; each part uses only those above it. One message travels: Callback or
Robot -> Chat.hear -> read_message -> State.accept; then in the thread of a lane sync_images, and
beside it follow_runs, or relay_file -> finish -> Post.step -> Channel.send.

Verify a copy with `python wxsync.py --version`, which prints how the file's own SHA-256 begins.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import email.utils
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import os
import queue
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
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TextIO, TypeVar, get_args, get_type_hints
from xml.parsers import expat

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VERSION = "1.1.0"

# ================================================================================================
# I. The job: limits, reading image lines, copying one image.
# May: read its arguments and environment, run skopeo, print. It is all that runs beside the
# registry's password. Never: open a connection of its own, or use anything that stands below it.
# ================================================================================================

# ---- Limits: each with its reason --------------------------------------------------------------

# Callbacks. WeCom waits 5 s and sends a few KiB; the rest is room, not need.
MAX_BODY_BYTES = 64 * 1024
MAX_HEAD_BYTES = 16 * 1024
REQUEST_SECONDS = 10.0  # from connection (or last answer) to a whole request
ANSWERS_IN_A_ROW = 8  # to one connection; WeCom sends one request and waits
MAX_CONNECTIONS = 600  # a buffer each, and a thread while one waits for the disk
# Chat (WeCom's document 90236): a text holds 2048 bytes; 30 messages a minute and 1,000 an hour to
# one person, what is over is dropped without a word.
MAX_TEXT_BYTES = 2048
MESSAGE_INTERVAL_SECONDS = 2.1  # to one person: 28 a minute, whatever restarts do
HOURLY_PACE = (500.0, 8.0)  # 500 at once and one more every 8 s: 950 an hour
DUPLICATE_CHECK_SECONDS = 4 * 3600  # the most WeCom allows; retries within it are never seen twice
MAX_RESULT_MESSAGES = 10
MAX_IMAGES = 256  # a GitHub matrix holds 256 jobs
MAX_LIST_LINES = 200  # kept in images.txt, so that one edit by hand still fits a matrix
MAX_INPUT_CHARACTERS = 60_000  # a dispatch holds 65,535 in all
MAX_LINKS = 20  # per message; more is a script, not a person
MAX_REMEMBERED = 1000  # answered messages, people's results: memory and state stay bounded
REMEMBER_SECONDS = 1800.0  # at least; WeCom repeats within half a minute
MAX_PASTE_BYTES = 256 * 1024  # of a sent file; a typed message is far shorter
MAX_LINE_CHARACTERS = 64 * 1024  # of a paste's line; a whole manifest may be one
KEEP_TRIES = 60  # of one message whose errcode nobody knows: about half a day
ODD_SECONDS = 900.0  # the longest pause between them
OUTAGE_SECONDS = 60.0  # the longest pause between looks at a service that is away
# The robot (facts of WeCom's document 101463).
MAX_MARKDOWN_BYTES = 20_480
MAX_FRAME_BYTES = 1024 * 1024
ROBOT_PACE = (8.0, 3.0)  # 8 at once and one more every 3 s: 28 a minute
ROBOT_STREAM_SECONDS = 330.0  # a stream may live for 6 minutes
ROBOT_PING_SECONDS = 30.0  # two without answer: the line is dead
REFRESH_SECONDS = 4.0
ACK_SECONDS = 10.0
TAKEOVER_SECONDS = 600.0  # before throwing out another program that uses the same robot
REFUSED_PAUSES = (60.0, 300.0, 600.0)  # after a refused subscription; there is frequency protection
# Other servers.
CONNECT_SECONDS = 10.0
LOOKUP_SECONDS = 3.0  # for a name that the proxy will resolve; where it is blocked, this is lost
CALL_SECONDS = 20.0  # GitHub itself gives up a request after 10 s
STALL_SECONDS = 30.0  # a transfer in which not one byte moved for so long is dead
MAX_ANSWER_BYTES = 4 * 1024 * 1024  # 100 jobs with their steps are under 1 MiB
KEEP_SECONDS = 55.0  # servers close idle connections after a minute or more
MAX_REDIRECTS = 10
GITHUB_PAUSES = (1.0, 3.0, 6.0, 12.0)  # between tries of one call
GITHUB_WAIT_SECONDS = 600.0  # the longest that rate limits may hold up one request, all in all
MIDNIGHT_WAIT_SECONDS = 60.0  # the same for midnight, which holds up requests meanwhile
POLL_SECONDS = 3.2  # 19 calls a minute; a finished run is told within 5 s
JOBS_SECONDS = 9.0  # how often the jobs of a running run are counted; shown counts are under 10 s
SETTLE_SECONDS = 30.0  # a completed run whose jobs still say "in_progress" is asked again so long
MAX_ETAGS = 64  # answers of up to READ_BYTES that are kept, two for each run that is followed
ODD_ANSWERS = 5  # in a row, then following a run is given up; 16 s cover GitHub's own lag
FIND_RUN_SECONDS = 12.0  # GitHub's list of runs lags; less than 10 would start runs twice
WATCH_SECONDS = 6 * 3600.0  # a job may not run longer on GitHub
TIMED_OUT_SECONDS = 55 * 60.0  # GitHub reports a job that met timeout-minutes as cancelled
PROBE_SECONDS = 300.0
PART_BYTES = 4 * 1024 * 1024  # the smallest part QingStor takes; three of them are in memory
PART_SECONDS = 600.0  # for one part; slower than 7 kB/s is no upload and no download
READ_BYTES = 256 * 1024  # moved at once
LEAST_BYTES = 16 * 1024  # from a source that broke off, or it counts as a try without progress
TRIES = 3  # of a part, of a resumed download without progress
DOWNLOAD_SECONDS = 6 * 3600.0
MAX_DEATHS = 2  # of the process, with the same upload on its way: it may be why
MIDNIGHT_RETRY_SECONDS = 600.0
CHECK_SECONDS = 15.0  # for all of `check`; it asks side by side
CLOCK_LOOK_SECONDS = 60.0  # how late a jump of the clock may be noticed
JOURNAL_BYTES = 1024 * 1024  # the state file is begun anew when it has grown past this
REWRITE_SECONDS = 5.0  # between tries to write to a disk that did not take it
# Copying, in the workflow's job (which has 60 minutes).
INSPECT_SECONDS = 120.0
TAGS_SECONDS = 20.0
COPY_SECONDS = 50 * 60.0  # all of it
MAX_TAGS = 20_000  # that are compared with a missing one

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

# ---- Small tools -------------------------------------------------------------------------------
# Text that others wrote is shown through `shown` and `quoted` only, cut by `split_text` only, tried
# again by `persist` only and parsed by `read_json` only: one place each to look at. (A copy's
# manifests are parsed where they are read; `try_copy` makes one result of all that is odd in them.)

T = TypeVar("T")


def shown(text: str, limit: int = 60) -> str:
    """Return foreign text on one line, harmless and at most `limit` characters, for chat or log."""
    text = "".join(c if c.isprintable() else " " for c in text.replace("`", "'")).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quoted(text: str, limit: int = 60) -> str:
    """Return foreign text between backticks: no markdown in it counts; plain channels drop them."""
    return f"`{shown(text, limit)}`"


def _counted(lines: list[str], left: int, limit_bytes: int, unit: str) -> list[str]:
    """Return lines with a count of those left out, shortened until the count has room."""
    while len(f"{chr(10).join(lines)}\n……还有 {left} {unit}".encode()) > limit_bytes and lines:
        lines, left = lines[:-1], left + 1
    return [*lines, f"……还有 {left} {unit}"]


def split_text(text: str, limit_bytes: int, most: int = 99, unit: str = "行") -> list[str]:
    """Split at line ends into at most `most` pieces of at most limit_bytes UTF-8.

    A longer line is cut. Lines that would make more pieces give way to their count. A ``` block
    that is cut is closed and opened again.
    """
    if len(text.encode()) <= limit_bytes:
        return [text]
    room = max(limit_bytes - (8 if "```" in text else 0), 64)
    lines: list[str] = []
    for line in text.split("\n"):
        while len(line.encode()) > room:
            lines.append(line.encode()[:room].decode(errors="ignore"))
            line = line[len(lines[-1]) :]
        lines.append(line)
    pieces: list[list[str]] = [[]]
    for line in lines:
        if pieces[-1] and len("\n".join([*pieces[-1], line]).encode()) > room:
            pieces.append([])
        pieces[-1].append(line)
    if left := sum(map(len, pieces[most:])):
        pieces[most - 1 :] = [_counted(pieces[most - 1], left, room, unit)]
    fence: list[str] = []
    for piece in pieces:
        piece[:0] = fence
        fence = ["```"] * (piece.count("```") % 2)
        piece += fence
    joined = ["\n".join(piece) for piece in pieces]
    return [piece for piece in joined if piece.strip("`\n ")] or [""]


def persist(
    attempt: Callable[[], T],
    pauses: Iterable[float],
    sleep: Callable[[float], None],
    passes: Callable[[Exception], bool],
) -> T:
    """Return attempt(), made again after each pause while it raises what passes."""
    for pause in pauses:
        try:
            return attempt()
        except Exception as error:
            if not passes(error):
                raise
        sleep(pause)
    return attempt()


def read_json(data: bytes | str, kind: type[T]) -> T | None:
    """Return foreign JSON, None where it is none (or too deep) or not of this kind."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, kind) else None


def newest(entries: Mapping[str, T], most: int) -> dict[str, T]:
    """Return the entries that came last."""
    return dict(list(entries.items())[-most:])


# ---- Reading an image line (contract section 5; no input or output in here) --------------------
# [--platform=P] SOURCE [=> NAME[:TAG]] and nothing else becomes an Image, and only the canonical
# line of an Image ever leaves this part: for git, GitHub's inputs, a job's name, skopeo's
# arguments. Pure functions: the same text gives the same answer on the host, in a job and in a
# test.

# distribution/reference: domain, path component, tag; a digest of the one algorithm in use.
NAME = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*(?::[0-9]+)?"
TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_HOST = "(?:[^/]*[.:][^/]*|(?i:localhost))/"  # a first part like this is one, any other is path
REFERENCE = re.compile(
    rf"(?:(?={_HOST})(?P<host>{_DOMAIN})/|(?!{_HOST}))(?P<path>{NAME}(?:/{NAME})*)"
    rf"(?::(?P<tag>{TAG}))?(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?"
)
MAX_REFERENCE = 255 + 128 + 72  # path, tag, digest
# os/arch[/variant], as in the OCI image index
PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9._]+)?")
DEFAULT_PLATFORM = "linux/amd64"
DOCKER_HUB = r"^(?:index\.|registry-1\.)?docker\.io/(?:library/(?=[^/]+$))?"
# a host as in DOCKER_REGISTRY, a namespace, and what to say of others
REGISTRY = (rf"(?!.*[A-Z]){_DOMAIN}", "应只有主机名，不带 https:// 和路径")
NAMESPACE = (rf"{NAME}(?:/{NAME})*", "应为小写字母、数字和 . _ -")
# Names that are images even where nothing else says so: what Docker Hub calls official.
OFFICIAL_NAMES = (
    "adminer alpine amazoncorretto busybox caddy cassandra centos clickhouse composer consul "
    "couchbase couchdb debian docker drupal eclipse-mosquitto eclipse-temurin elasticsearch "
    "erlang fedora flink fluentd gcc ghost gitea golang gradle groovy haproxy hello-world "
    "httpd influxdb jenkins jetty joomla julia kibana kong logstash mariadb matomo maven "
    "memcached mongo mongo-express mysql nats neo4j nextcloud nginx node odoo openjdk percona "
    "perl php phpmyadmin postgres python rabbitmq redis redmine registry rockylinux ruby rust "
    "solr sonarqube spark swift telegraf tomcat traefik ubuntu varnish vault wordpress "
    "zookeeper"
)
OFFICIAL = frozenset(OFFICIAL_NAMES.split(" "))
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
PASTED = (
    r"(?i)(?:[-*•]\s+)?(?:\$\s+|#\s+(?=(?:sudo\s+)?docker\s))?(?:sudo\s+)?"
    r"(?:docker\s+(?:image\s+)?pull\s+)?(?:image\s*:(?:\s+|(?=[^/:\s]+[/:])))?"
)  # but not the image "image"


# "# docker" is a prompt, "#2 [internal] …" a step of a build
COMMENT = r"\s*(?:#(?!\d+ \[| (?:sudo )?\S*(?:docker|podman|nerdctl|crictl|ctr) )|//)"


class BadImage(ValueError):
    """An item that is no image line; str() is the reason."""


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
        """Return where the image goes: REGISTRY/NAMESPACE/NAME:TAG."""
        return f"{prefix}/{self.name}:{self.tag}"


def _read_platforms(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split("+")))
    for name in names:
        if names != ("all",) and not PLATFORM.fullmatch(name):
            raise BadImage(f"架构 {quoted(name, 30)} 应写成 linux/arm64，多个用 + 连接，全部用 all")
    return names


def _why_not(text: str) -> str:
    name, _, digest = text.partition("@")
    if len(text) > MAX_REFERENCE:
        return "太长"
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


def read_reference(text: str) -> tuple[str, str, str]:
    """Return repository (host unless Docker Hub, path), tag and digest of a SOURCE."""
    match = REFERENCE.fullmatch(text) if len(text) <= MAX_REFERENCE else None
    if not match:
        raise BadImage(_why_not(text))
    host = (match["host"] or "docker.io").lower()
    repository = re.sub(DOCKER_HUB, "", f"{host}/{match['path']}")
    digest = match["digest"] or ""
    return repository, match["tag"] or ("" if digest else "latest"), digest


def read_image(text: str) -> Image:
    """Return the Image of one line (chat, images.txt, `copy`); raise BadImage."""
    source, arrow, renamed = (part.strip() for part in text.partition("=>"))
    before, *option = re.split(r"(?:^|\s)--platform(?:=|\s+)(\S+)", source, maxsplit=1)
    platforms = _read_platforms(option[0].lower()) if option else ()
    source = " ".join([before, *option[1:]]).strip()
    if source.startswith("-"):
        raise BadImage("只支持选项 --platform")
    repository, tag, digest = read_reference(source)
    name = repository.replace(":", "-").replace("/", "_")
    target_tag = tag or f"sha256-{digest[7:19]}"
    if len(platforms) == 1 and platforms[0] not in (DEFAULT_PLATFORM, "all"):
        target_tag += "-" + platforms[0].removeprefix("linux/").replace("/", "-")
    if arrow:
        if not (match := re.fullmatch(rf"({NAME})(?::({TAG}))?", renamed)):
            raise BadImage("=> 后面应为 名称 或 名称:标签，小写，不带 /")
        name, target_tag = match[1], match[2] or target_tag
    if len(repository) > 255 or len(name) > 255 or len(target_tag) > 128:
        raise BadImage("名称或标签太长")
    source = repository + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    return Image(platforms, source, name, target_tag, renamed)


def is_talk(word: str) -> bool:
    """Tell whether a word that the grammar would take as an image is one that people say.

    A time, fraction, number, address, `localhost`, `and/or`: contract section 5.
    """
    numeric = r"[\d.]+(?:[-:/][-\d.:/]*)?"  # 12:30, 3/4, 24/7, 192.168.1.1:8080
    plain = r"(?:localhost|(?:\d+\.){3}\d+)(?::\d+)?"
    pair = r"(?:and|or|he|she|his|yes|no|on|off|true|false|key|value|tcp|udp|am|pm|w|n|a|o)"
    host = r"[a-z][\w-]*(?:\.[a-z][\w-]*)+:\d{2,5}"  # example.com:8080, main.py:30
    return bool(re.fullmatch(rf"(?i){numeric}|{plain}|{pair}/{pair}|{host}|tel:\d+", word))


INTENT = r"\b(?:pull|sync|mirror|image)\b|同步|拉取|镜像"


def _lines_of(text: str) -> list[str]:
    """Return the canonical lines of a sentence's words that look like an image by themselves."""
    lines = []
    words = re.split(r"[\s\u2e80-\uffff\U00010000-\U0010ffff]+", text)
    words = [word.strip(":,.!?") for word in words]
    likely = r":[\w.-]+$|\.[^/]*/|@sha256" + ("|/" if re.search(INTENT, text) else "")
    for word in words:
        if re.search(likely, word) and not is_talk(word):
            with contextlib.suppress(BadImage):
                lines.append(read_image(word).line)
    return lines


def suggest(text: str) -> str:
    """Return the valid line that text was likely meant to be, or ""."""
    line = re.sub(r"\s*([:/@])\s*", r"\1", text.strip().rstrip(".。!！,，;；:"))
    line = re.sub(r"(?i)^https?://(?:hub\.docker\.com/(?:r/|_/))?", "", line).strip("/")
    for attempt in (line, line.lower()):
        with contextlib.suppress(BadImage):
            return read_image(attempt).line
    is_prose = not re.search(r"[&|;$=`<>]|(?:^|\s)-", line)
    return ", ".join(_lines_of(text)) if is_prose else ""


def tidy(item: str) -> str:
    """Return an item without what comes with it from a phone, a terminal or a compose file."""
    item = re.sub("—+", "--", item).translate(TIDY)
    item = re.sub(PASTED, "", item.strip().strip("\"'`").strip(), count=1)
    return re.sub(r"\s+", " ", item).strip("\"'` ")


def read_list(text: str) -> tuple[list[str], list[str]]:
    """Return the canonical lines of an images.txt, and a Chinese error for each bad line.

    Bad is also what one run cannot do: more lines than a matrix holds, two with one target.
    """
    found: list[str] = []
    targets: dict[str, str] = {}  # target -> row and line
    errors = []
    for row, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("\ufeff")
        if not line or line.startswith("#"):
            continue
        try:
            image = read_image(tidy(line))
        except BadImage as error:
            errors.append(f"第 {row} 行 {shown(line)}：{error}")
            continue
        if image.line in found:
            continue
        found.append(image.line)
        where = f"第 {row} 行 {shown(line)}"
        if (other := targets.setdefault(image.target(""), where)) != where:
            errors.append(f"{where}：目标与{other} 相同，给其中一个加 => 新名称")
        elif len(found) > MAX_IMAGES:
            errors.append(f"{where}：超过一次运行的上限 {MAX_IMAGES} 个")
    return found, errors


# ---- Copying an image (this is what each workflow job runs) ------------------------------------
# A tag is resolved to a digest once; from there on everything is asked for by digest, and bytes
# that do not have it are refused. skopeo moves the layers from registry to registry, nothing
# touches the job's disk but auth files that only this user can read and one small index.

INDEX_TYPE = r"application/vnd\.(oci\.image\.index|docker\.distribution\.manifest\.list)\."
PLATFORM_FIELDS = ("os", "architecture", "variant")
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


def digest_of(manifest: bytes) -> str:
    """Return the digest of a manifest's very bytes (OCI image spec, descriptor)."""
    return "sha256:" + hashlib.sha256(manifest).hexdigest()


class Skopeo:
    """Runs skopeo with auth files that only this user can read, never with secrets as arguments."""

    def __init__(self, environ: Mapping[str, str], registry: str, folder: Path) -> None:
        self._environ = {k: v for k, v in environ.items() if k not in JOB_SECRETS}
        self._deadline = time.monotonic() + COPY_SECONDS
        conf = self._file(folder / "registries.conf", REGISTRIES_CONF)
        conf = environ.get("CONTAINERS_REGISTRIES_CONF") or conf
        # Older skopeo ignores the variable, and runner images have shipped broken files.
        self._command = ["skopeo", "--registries-conf", conf]
        self._password = environ.get("DOCKER_PASSWORD") or "\0"
        pair = f"{environ.get('DOCKER_USERNAME', '')}:{environ.get('DOCKER_PASSWORD', '')}"
        auth = {registry: {"auth": base64.b64encode(pair.encode()).decode()}} if pair != ":" else {}
        self._target = self._file(folder / "target.json", json.dumps({"auths": auth}))
        self._source = self._file(folder / "source.json", environ.get("SOURCE_AUTH") or "{}")

    @staticmethod
    def _file(path: Path, text: str) -> str:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        return str(path)

    def _run(self, arguments: list[str], seconds: float, at_target: bool = False) -> bytes:
        """Return stdout, trying again after a fault of the network; raise CopyFailure.

        skopeo's own --retry-times leaves out HTTP 500 and DNS, and repeats a 429 for minutes.
        """

        def passes(error: Exception) -> bool:
            return isinstance(error, CopyFailure) and error.code == "network"

        once = functools.partial(self._run_once, arguments, seconds, at_target)
        return persist(once, (1.0, 3.0), time.sleep, passes)

    def _run_once(self, arguments: list[str], seconds: float, at_target: bool) -> bytes:
        import subprocess  # only here

        seconds = min(seconds, self._deadline - time.monotonic())
        command = [*self._command, *arguments]
        try:
            done = subprocess.run(  # noqa: S603 - a list, and the reference has been validated
                command, env=self._environ, capture_output=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CopyFailure("timeout", "skopeo was not done in time") from error
        if done.returncode == 0:
            return done.stdout
        text = done.stderr.decode(errors="replace").replace(self._password, "***")
        said = re.findall(r'msg="((?:\\.|[^"\\])*)"', text) or [text]
        text = re.sub(NAMES, "", text)
        at_target = at_target or re.search(TARGET_MARKS, text) is not None
        detail = re.sub(r'^Error parsing image name "[^"]*": ', "", said[-1].replace('\\"', '"'))
        raise CopyFailure(classify(text, at_target), detail)

    def inspect(self, what: str, reference: str, at_target: bool = False) -> bytes:
        """Return what skopeo inspect tells, `--raw` or `--config`."""
        auth = self._target if at_target else self._source
        arguments = ["inspect", what, "--authfile", auth, f"docker://{reference}"]
        return self._run(arguments, INSPECT_SECONDS, at_target)

    def raw(self, reference: str, at_target: bool = False) -> bytes:
        """Return the manifest or index of a reference as the registry has it.

        skopeo hands on whatever bytes came for a digest, so they are compared with it here.
        """
        data = self.inspect("--raw", reference, at_target)
        asked = reference.partition("@")[2]
        if asked and digest_of(data) != asked:
            raise CopyFailure("error", f"registry answered other bytes than the digest {asked}")
        return data

    def tags(self, repository: str) -> list[str]:
        """Return the tags of a source repository, none where it does not tell them in time."""
        arguments = ["list-tags", "--authfile", self._source, f"docker://{repository}"]
        try:
            found = json.loads(self._run_once(arguments, TAGS_SECONDS, False))
        except CopyFailure:  # that the tag is missing is told all the same
            return []
        listed = (found["Tags"] or [])[:MAX_TAGS]  # skopeo's own JSON, which it made of the answer
        return [tag for tag in listed if re.fullmatch(TAG, tag)]

    def copy(self, source: str, target: str, *options: str) -> None:
        """Copy one manifest with its layers, or what the options say; the digest stays the same.

        Of a source by digest skopeo itself refuses other bytes (containers/image, UnparsedImage).
        Signatures are left behind: ACR would not store them, and fetching them can fail.
        """
        auth = ["--src-authfile", self._source, "--dest-authfile", self._target]
        arguments = ["copy", "--quiet", "--preserve-digests", "--remove-signatures", *auth]
        self._run([*arguments, *options, source, f"docker://{target}"], COPY_SECONDS)


def _platform(described: Mapping[str, Any]) -> str:
    """Return os/arch[/variant] in the one spelling (as containerd normalises it)."""
    text = "/".join(str(described[name]) for name in PLATFORM_FIELDS if described.get(name))
    same = {"linux/arm64/v8": "linux/arm64", "linux/arm": "linux/arm/v7"}
    return {**same, "linux/amd64/v1": "linux/amd64"}.get(text, text)


def leaves(skopeo: Skopeo, repository: str, index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of an index that are images, then those of indexes inside it.

    Attestations are left out: ACR refuses them.
    """
    found = []
    entries = list(index["manifests"])
    for entry in entries:  # which grow meanwhile
        if len(entries) > MAX_IMAGES:
            raise CopyFailure("rejected", "index with too many entries")
        if re.match(INDEX_TYPE, str(entry.get("mediaType"))):
            inner = skopeo.raw(f"{repository}@{entry['digest']}")
            entries += json.loads(inner)["manifests"]
        elif (entry.get("platform") or {}).get("architecture") != "unknown":
            found.append(entry)
    return found


def with_list(detail: str, word: str, names: Sequence[str]) -> str:
    """Return detail with a list at its end, whose length stands before it.

    A step's name may be cut off anywhere; the length tells whether the last name is whole.
    """
    text = " ".join(names)
    return f"{shown(detail, 80)} [{len(text)}]; {word} {text}" if names else detail


def choose(entries: Sequence[Mapping[str, Any]], wanted: str) -> Any:
    """Return the entry of an index for os/arch[/variant]; raise CopyFailure no-platform."""
    offered = [_platform(entry.get("platform") or {}) for entry in entries]
    platform = _platform(dict(zip(PLATFORM_FIELDS, wanted.split("/"), strict=False)))
    if platform in offered:
        return entries[offered.index(platform)]
    names = dict.fromkeys(name for name in offered if PLATFORM.fullmatch(name))
    raise CopyFailure("no-platform", with_list(f"no {wanted}", "has", list(names)[:12]))


def nearest_tags(wanted: str, tags: Sequence[str]) -> list[str]:
    """Return up to three tags nearest to a missing one: a `v` more or less, numbers, spelling."""
    from difflib import get_close_matches  # 5 ms, and only where a tag is missing

    numbers = re.findall(r"\d+", wanted)

    def distance(tag: str) -> tuple[bool, list[int]]:
        pairs = itertools.zip_longest(numbers, re.findall(r"\d+", tag), fillvalue="0")
        gaps = [abs(int(one[:9]) - int(other[:9])) for one, other in pairs]
        return tag.removeprefix("v") != wanted.removeprefix("v"), gaps

    alike = get_close_matches(wanted, tags, 200, 0.4)  # the most alike first
    return sorted(alike, key=distance)[:3]


def target_digest(skopeo: Skopeo, target: str) -> str:
    """Return the digest that the target has now, "" where it has none or does not tell."""
    try:
        return digest_of(skopeo.raw(target, at_target=True))
    except CopyFailure as failure:
        # A denied look proves nothing (the repository may not exist yet): the copy decides.
        if failure.code in ("target-login", "network", "timeout"):
            raise
        return ""


def read_source(skopeo: Skopeo, repository: str, tag: str, digest: str) -> bytes:
    """Return the manifest or index of a source; a missing tag is told with those nearest to it."""
    try:
        # A tag and a digest together are refused by skopeo; the digest is exact.
        return skopeo.raw(f"{repository}@{digest}" if digest else f"{repository}:{tag}")
    except CopyFailure as failure:
        if failure.code != "not-found" or digest:
            raise
        near = nearest_tags(tag, skopeo.tags(repository))
        raise CopyFailure("not-found", with_list(str(failure), "nearest", near)) from failure


def choose_images(
    skopeo: Skopeo, repository: str, raw: bytes, platforms: tuple[str, ...]
) -> tuple[list[str], bytes]:
    """Return the digests of the wanted images, and the index that is to hold them.

    The index is empty where one image is wanted, which needs none.
    """
    manifest, is_all = json.loads(raw), platforms == ("all",)
    is_index = "manifests" in manifest
    if is_index:
        entries = leaves(skopeo, repository, manifest)
    elif "config" in manifest:
        entries = [{"digest": digest_of(raw)}]
        if not is_all:  # skopeo would copy any platform and say nothing
            config = skopeo.inspect("--config", f"{repository}@{digest_of(raw)}")
            entries[0]["platform"] = json.loads(config)
    else:
        raise CopyFailure("rejected", "docker schema 1 image, long out of use")
    if not is_all:
        wanted = [choose(entries, name) for name in platforms]
        entries = [entry for entry in entries if entry in wanted]  # in the source's order
    if not entries:
        raise CopyFailure("no-platform", "no image in the index")
    digests = [entry["digest"] for entry in entries]
    if not is_index or (len(platforms) == 1 and not is_all):
        return digests[:1], b""
    if entries != manifest["manifests"]:
        raw = json.dumps({**manifest, "manifests": entries}, indent=2).encode()
    return digests, raw


def copy_image(skopeo: Skopeo, image: Image, prefix: str, folder: Path) -> tuple[bool, str]:
    """Copy one image, or several by digest and then the index that holds just those.

    Return whether anything was copied, and the target's digest.
    """
    repository, tag, digest = read_reference(image.source)
    raw = read_source(skopeo, repository, tag, digest)
    platforms = image.platforms or (DEFAULT_PLATFORM,)
    digests, index = choose_images(skopeo, repository, raw, platforms)
    digest, target = digest_of(index) if index else digests[0], image.target(prefix)
    if target_digest(skopeo, target) == digest:
        return False, digest
    for each in digests:
        by_digest = f"{target.rpartition(':')[0]}@{each}"
        skopeo.copy(f"docker://{repository}@{each}", by_digest if index else target)
    if index:
        layout = folder / "index"
        layout.mkdir()
        (layout / "manifest.json").write_bytes(index)
        (layout / "version").write_text("Directory Transport Version: 1.1\n")
        skopeo.copy(f"dir:{layout}", target, "--multi-arch", "index-only")
    return True, digest


def harmless(text: str, limit: int = 200) -> str:
    """Return text on one line for a job's log, where `##[` and a leading `::` are commands."""
    return shown(re.sub(r"[^\x20-\x7e]+", " ", text), limit).replace("##[", "# #[")


def try_copy(image: Image, environ: Mapping[str, str]) -> tuple[int, str]:
    """Copy one image as the environment says; return the exit status and the result's text."""
    import tempfile  # only here

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
        return 0, f"{'copied' if copied else 'unchanged'} {digest}"
    except CopyFailure as failure:
        return 1, f"failed {failure.code} {harmless(str(failure), 260)}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # Our disk, no skopeo, their odd manifest.
        return 1, f"failed error {harmless(f'{type(error).__name__}: {error}')}"


def run_copy(line: str, environ: Mapping[str, str]) -> int:
    """Do `wxsync.py copy LINE`: print the result, also to $GITHUB_OUTPUT; return the status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the auth files go, too
    try:
        image = read_image(line)
    except BadImage as error:
        print(f"wxsync: {harmless(line)}: {error}", file=sys.stderr)
        return 2
    status, result = try_copy(image, environ)
    print(f"wxsync: {result}", flush=True)
    if path := environ.get("GITHUB_OUTPUT"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"result=wxsync: {result}\n")
    return status


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


# ================================================================================================
# II. Edges: settings, log, network, and each foreign system. Each owns its connection.
# May: open connections, raise Failure with words that are safe to show.
# Never: know of requests, lanes or chats; take an answer for well-formed.
# ================================================================================================


class Failure(Exception):
    """Expected trouble. str() is Chinese, says what to do and is safe to show to anybody.

    `status` is the HTTP status of the answer that it comes from, if any.
    """

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Unreachable(Failure):
    """A server could not be reached or broke off; trying again may help."""


class Rejected(Exception):
    """A request that is refused with an HTTP status and an empty body."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


# ---- Settings ----------------------------------------------------------------------------------
# Read once, checked as a whole before anything starts, frozen. The type and the pattern stand
# beside each name, so that a new setting is one line here, one in env.example and one in
# README.md.


def setting(default: Any, rule: str | range = r"[^\r\n]*", meaning: str = "不能换行") -> Any:
    """Declare a setting: MISSING makes it required, rule is a pattern for the whole value."""
    return field(default=default, metadata={"rule": rule, "meaning": meaning})


def number(default: int, low: int, high: int) -> Any:
    """Declare a setting that is a whole number."""
    return setting(default, range(low, high + 1), f"应为 {low} 到 {high} 的整数")


ADDRESS = (rf"https?://{_DOMAIN}(/[\w.~/-]*)?", "应为 http:// 或 https:// 开头的地址")
BOT_ADDRESS = (
    rf"(wss://{_DOMAIN}|ws://(localhost|127(\.\d+){{3}}|\[::1\])(:\d+)?)(/[\w.~/-]*)?",
    "应为 wss:// 开头的地址（ws:// 只能用于本机）",
)
PROXY = (
    r"(http|socks5)://([^@/\s]*@)?([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):\d+/?",
    "应为 http://主机:端口 或 socks5://主机:端口，可带 用户:密码@（特殊字符写成 %XX）",
)
PRINTABLE = (r"[\x21-\x7e]+", "不能有空格")
# Either of these groups is a way in; of a begun one all are required.
ROBOT_NAMES = ("BOT_ID", "BOT_SECRET")
CALLBACK_NAMES = ("CORP_ID", "AGENT_ID", "SECRET", "TOKEN", "ENCODING_AES_KEY")
STORE_NAMES = ("QINGSTOR_ACCESS_KEY_ID", "QINGSTOR_SECRET_ACCESS_KEY")  # both or none


@dataclass(frozen=True, repr=False)
class Settings:
    """All settings of the service, by their environment names. Has no repr: it holds secrets."""

    GITHUB_TOKEN: str = setting(MISSING, *PRINTABLE)
    GITHUB_REPO: str = setting(MISSING, r"[\w-]+/[\w.-]+", "应写成 owner/repo，不带网址")
    DOCKER_REGISTRY: str = setting(MISSING, *REGISTRY)
    DOCKER_NAMESPACE: str = setting(MISSING, *NAMESPACE)
    BOT_ID: str = setting("", *PRINTABLE)
    BOT_SECRET: str = setting("", *PRINTABLE)
    BOT_URL: str = setting("wss://openws.work.weixin.qq.com", *BOT_ADDRESS)
    CORP_ID: str = setting("", r"[A-Za-z0-9_-]{1,64}", "应为“我的企业”页底部的企业 ID")
    AGENT_ID: int = number(0, 1, 2**31 - 1)
    SECRET: str = setting("", *PRINTABLE)
    TOKEN: str = setting("", r"[A-Za-z0-9]{1,32}", "应为接收消息页的 Token，最多 32 个字母或数字")
    ENCODING_AES_KEY: str = setting("", r"[A-Za-z0-9+/]{43}", "应为 43 个字母或数字")
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
        """Return REGISTRY/NAMESPACE, as the workflow compares it with its Secrets."""
        return f"{self.DOCKER_REGISTRY}/{self.DOCKER_NAMESPACE}"

    def secrets(self) -> dict[str, str]:
        """Return every value that must never be written anywhere, by its setting's name."""
        names = "SECRET TOKEN ENCODING_AES_KEY BOT_SECRET GITHUB_TOKEN QINGSTOR_SECRET_ACCESS_KEY"
        values = {name: str(getattr(self, name)) for name in names.split()}
        password = urllib.parse.urlsplit(self.PROXY_URL).password or ""
        values["PROXY_URL"] = urllib.parse.unquote(password)  # as log lines would hold it
        return {name: value for name, value in values.items() if value}

    def weak_secrets(self) -> str:
        """Return the names of secrets that are too short to be masked safely, else ""."""
        return "、".join(name for name, value in self.secrets().items() if len(value) < 8)


# KEY=value as a shell would write it: `export`, quotes, a comment behind a space
ENV_LINE = r"""(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(["']?)(.*?)\2\s*((?<=\s)#.*)?"""


def read_env_file(path: Path) -> dict[str, str]:
    """Read KEY=value lines (comments, `export`, quotes allowed); raise Failure with a line for
    each that is none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: 读不出来：{error}") from error
    values, problems = {}, []
    for line_number, line in enumerate(map(str.strip, lines), 1):
        if match := re.fullmatch(ENV_LINE, line):
            values[match[1]] = match[3]
        elif line and not line.startswith("#"):
            problems.append(f"{path} 第 {line_number} 行看不懂，应为 KEY=value")
    if problems:
        raise Failure("\n".join(problems))
    return values


def _convert(kind: str, rule: Mapping[str, Any], text: str) -> Any:
    """Return the value of one setting in its type; raise ValueError where it breaks its rule."""
    if kind == "int":
        if re.fullmatch(r"[0-9]{1,10}", text) and int(text) in rule["rule"]:
            return int(text)
    elif kind == "str":
        port = re.search(r":([0-9]+)(?:/|$)", text) if ":" in rule["rule"] else None
        if re.fullmatch(rule["rule"], text, re.ASCII) and (not port or int(port[1]) < 65536):
            return text.rstrip("/") if "://" in text else text
    elif items := tuple(item.strip().lower() for item in text.split(",") if item.strip()):
        return items  # a list of nothing but commas is wrong: it would mean everybody
    raise ValueError(rule["meaning"])


def _missing(given: Mapping[str, Any]) -> list[str]:
    """Return what is missing of the settings that are required, or of groups that are begun."""
    ways = (ROBOT_NAMES, CALLBACK_NAMES)
    groups = [tuple(entry.name for entry in fields(Settings) if entry.default is MISSING)]
    groups += [g for g in (*ways, STORE_NAMES) if any(name in given for name in g)]
    problems = [f"{name}: 没有设置" for group in groups for name in group if name not in given]
    if not set(ways) & set(groups):
        either, other = map(", ".join, ways)
        problems.append(f"{either}: 没有设置（智能机器人长连接）；或者 {other}（自建应用回调）")
    return problems


def load_settings(environ: Mapping[str, str]) -> Settings:
    """Return the Settings in environ; raise Failure, a line for each that is wrong."""
    values: dict[str, Any] = {}
    problems = []
    for entry in fields(Settings):
        text = environ.get(entry.name, "").strip()
        needed = entry.default is MISSING or entry.name in ROBOT_NAMES + CALLBACK_NAMES
        if text and not (needed and re.fullmatch(r"(?i)your_\S*", text)):  # no placeholder
            try:
                values[entry.name] = _convert(str(entry.type), entry.metadata, text)
            except ValueError as error:
                values[entry.name] = None  # given, though
                problems.append(f"{entry.name}: {error}")
        elif entry.name == "NO_PROXY_DOMAINS" and entry.name in environ:
            values[entry.name] = ()
    if problems := _missing(values) + problems:
        raise Failure("\n".join(problems))
    return Settings(**values)


# ---- Log ---------------------------------------------------------------------------------------
# The only way to stderr while the service runs. What others said is in a line only masked, and with
# its line ends made visible, so that nobody forges a line and no secret is kept by a log collector.


class Log:
    """Lines on a stream: masked, with control characters made harmless, one write each."""

    LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

    def __init__(self, level: str, hidden: Iterable[str], stream: TextIO) -> None:
        self._least = self.LEVELS.index(level.upper())
        # Very short values would mask half of every line and protect nobody.
        plain = [value for value in hidden if len(value) >= 5]
        self._hidden = sorted({*plain, *(urllib.parse.quote(v, safe="") for v in plain)}, key=len)
        self._stream = stream
        self._lock = threading.Lock()

    def _write(self, level: str, text: str) -> None:
        if self.LEVELS.index(level) < self._least:
            return
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.mask(text))
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        # A log that cannot be written (a full disk) is no reason to stop working.
        with self._lock, contextlib.suppress(OSError):
            self._stream.write(f"{stamp} {level} {text}\n")
            self._stream.flush()

    def mask(self, text: str) -> str:
        """Return text without any secret: for what is quoted from others."""
        for value in reversed(self._hidden):  # the longest first
            text = text.replace(value, "***")
        return text

    debug = functools.partialmethod(_write, "DEBUG")
    info = functools.partialmethod(_write, "INFO")
    warning = functools.partialmethod(_write, "WARNING")
    error = functools.partialmethod(_write, "ERROR")

    def bug(self, where: str) -> None:
        """Log the exception being handled with its traceback, a line each."""
        for line in traceback.format_exc().splitlines():
            self.error(f"{where} | {line}")


# ---- Network: addresses, vetted connections, proxies, calls ------------------------------------
# Every connection of the program begins in `dial` and speaks HTTP through `Wire`, within a deadline
# for the whole of it. A link of a chat user is parsed to the one form that is connected to, looked
# up once, and connected to at the very addresses that were found to be public.

DEFAULT_PORTS = {"http": 80, "https": 443}
# a registered name or an IPv6 address (RFC 3986, 3.2.2), as urlsplit leaves them
HOST_PATTERN = r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|[0-9a-f:]*:[0-9a-f:.]*"
LOCAL_NAME = r"(.*\.)?(localhost|local|internal|lan|home\.arpa|localdomain)|[^.:]*"


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


def parse_url(text: str, base: str = "") -> Url:
    """Return the Url of an address; raise Failure where it is none that we would connect to.

    The host is brought to ASCII first (IDNA turns full-width digits and dots into plain ones), so
    that what is checked is what is connected to. `base` is what a redirect's address is relative
    to.
    """
    try:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(base, text))
        host = (parts.hostname or "").encode("idna").decode("ascii").lower().removesuffix(".")
        port = parts.port or DEFAULT_PORTS[parts.scheme]
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        target = urllib.parse.quote(target, safe="/%:@!$&'()*+,;=?")
    except (ValueError, KeyError) as error:
        raise Failure(f"链接格式不正确：{quoted(text)}") from error
    odd = re.search(r"[\s\\\x00-\x1f\x7f]", text) or "@" in parts.netloc
    if odd or parts.scheme not in DEFAULT_PORTS or not re.fullmatch(HOST_PATTERN, host):
        raise Failure(f"链接格式不正确（不能有空格、反斜杠或用户名密码）：{quoted(text)}")
    return Url(parts.scheme, host, port, target)


def is_outside(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet, seen through its disguises.

    IPv6 counts only as global unicast (2000::/3, RFC 4291) and without 6to4 (RFC 3056) and Teredo
    (RFC 4380), which hide an IPv4 address; NAT64 and IPv4-compatible addresses lie outside of it.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    if isinstance(ip, ipaddress.IPv4Address):
        # 192.0.0.0/24 is for protocols, 192.88.99.0/24 relays 6to4, 168.63.129.16 is the host of
        # every virtual machine at Azure; Python calls parts of them global.
        special = str(ip).startswith(("192.0.0.", "192.88.99.")) or str(ip) == "168.63.129.16"
        return ip.is_global and not ip.is_multicast and not special
    hidden = ip.sixtofour or ip.teredo
    return ip in ipaddress.ip_network("2000::/3") and ip.is_global and not hidden


# The first that fits: subclasses before their bases.
TROUBLES: tuple[tuple[type[BaseException], str], ...] = (
    (TimeoutError, "超时"),
    (ssl.SSLCertVerificationError, "TLS 证书不可信"),
    (ssl.SSLEOFError, "连接中断"),
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


def shut(sock: socket.socket) -> None:
    """Break a connection off, even while another thread uses it."""
    with contextlib.suppress(OSError):
        # Not SSLSocket.shutdown, which drops the TLS state under the reader's feet.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


@contextlib.contextmanager
def cut_off(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Shut sock down after `seconds`, so that the whole of what is done with it has a deadline.

    A socket's own timeout starts anew with each byte. Raises OSError alone: TimeoutError when it
    took too long, and what http.client and the email parser make of an odd answer in words.
    """
    deadline = time.monotonic() + seconds
    timer = threading.Timer(seconds + 0.1, shut, [sock])  # later than the coarsest of clocks says
    timer.daemon = True
    timer.start()
    try:
        yield
        if time.monotonic() > deadline:  # what was read may have ended there for want of more
            raise TimeoutError
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        if time.monotonic() > deadline:
            raise TimeoutError from error
        if isinstance(error, OSError):
            raise
        raise OSError(0, "对方的回答不是正常的 HTTP") from error
    finally:
        timer.cancel()


def resolve(host: str, port: int, seconds: float, vet: bool) -> list[tuple[Any, ...]]:
    """Return getaddrinfo's answers for TCP, in a thread for want of a deadline; raise OSError.

    With vet it raises Failure for a name or an address of the inside, in any spelling that
    resolvers know (127.1, 0x7f000001); one inside answer is enough: a mixed one is an attack.
    """
    if vet and re.fullmatch(LOCAL_NAME, host):
        raise Failure(f"不允许访问内网地址：{quoted(host)}")
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
    if vet and not all(is_outside(str(entry[4][0])) for entry in found):
        raise Failure(f"不允许访问内网地址：{quoted(host)} 在本机解析到内网地址")
    return found


def dial(host: str, port: int, seconds: float, vet: bool) -> socket.socket:
    """Return a connected TCP socket; with vet only to public addresses, those just resolved.

    Raises Failure when any address of the name is inside, or OSError.
    """
    deadline = time.monotonic() + seconds
    found = resolve(host, port, seconds, vet)[:8]  # a thousand would have 0.1 s each
    problem: OSError = socket.gaierror("no address")
    for index, (*_, address) in enumerate(found):
        left = (deadline - time.monotonic()) / (len(found) - index)
        try:
            # an address, as getaddrinfo wrote it: nothing is looked up again
            sock = socket.create_connection(address[:2], max(0.1, left))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            problem = error
    raise problem


class Proxy:
    """A PROXY_URL that settings have checked. Has no repr of its own: it holds a password."""

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urllib.parse.urlsplit(url)
        self.scheme, self.host, self.port = parts.scheme, parts.hostname or "", parts.port or 0
        self.user = urllib.parse.unquote(parts.username or "")
        self.password = urllib.parse.unquote(parts.password or "")

    def __str__(self) -> str:
        """Return the address without its credentials."""
        return re.sub("//.*@", "//***:***@", self._url)

    def credentials(self) -> dict[str, str]:
        """Return the header that an http proxy wants (RFC 9110, 11.7.2), if any."""
        pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Proxy-Authorization": f"Basic {pair}"} if self.user else {}


class Answer(NamedTuple):
    """The whole answer to one exchange."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Lines(io.BufferedReader):
    """A reader to which an end where a line was due is no end: http.client would be content."""

    def readline(self, size: int | None = -1, /) -> bytes:
        if not (line := super().readline(size)):
            raise ConnectionResetError("closed inside of a head")
        return line


class Response(http.client.HTTPResponse):
    """A response whose head is whole, and its chunks have sizes."""

    def __init__(self, sock: socket.socket, **options: Any) -> None:
        super().__init__(sock, **options)
        self.fp.close()
        self.fp = Lines(sock.makefile("rb", buffering=0))

    def begin(self) -> None:
        super().begin()
        while 101 < self.status < 200:  # interim answers (103); http.client knows only 100
            self.headers = None  # type: ignore[assignment]
            super().begin()

    def _read_next_chunk_size(self) -> int:
        size_bytes = int(super()._read_next_chunk_size())  # type: ignore[misc]
        if size_bytes < 0:  # which http.client would take for the rest of the connection
            raise ValueError("chunk size")
        return size_bytes


class Wire(http.client.HTTPConnection):
    """One HTTP connection over a socket that is connected already; it never reconnects."""

    auto_open = 0
    response_class = Response

    def __init__(self, url: Url, sock: socket.socket, proxy: Proxy | None = None) -> None:
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

    def exchange(
        self, method: str, target: str, headers: Mapping[str, str], body: Any, seconds: float
    ) -> Answer:
        """Make one whole exchange within `seconds`; raise Unreachable and close the connection."""
        try:
            with cut_off(self.link, seconds):
                response = self.ask(method, target, headers, body)
                data = response.read(MAX_ANSWER_BYTES + 1)
        except OSError as error:
            self.close()
            raise Unreachable(f"{self.host}：{explain(error)}") from error
        if response.length or len(data) > MAX_ANSWER_BYTES:  # http.client is silent about it
            self.close()
            raise Unreachable(f"{self.host}：回答不完整或过大")
        if response.will_close:
            self.close()
        self.used = time.monotonic()
        return Answer(response.status, response.headers, data)

    def is_fresh(self) -> bool:
        """Tell whether the idle connection can be used again; close it where it cannot."""
        fresh = self.sock is not None and time.monotonic() - self.used < KEEP_SECONDS
        try:
            fresh = fresh and not select.select([self.sock], [], [], 0)[0]  # closed by the server
        except (OSError, ValueError):  # its number is over what select takes
            fresh = False
        if not fresh:
            self.close()
        return fresh


def ask_http_proxy(sock: socket.socket, proxy: Proxy, url: Url) -> None:
    """Turn sock into a tunnel to url's server by CONNECT (RFC 9110, 9.3.6); raise OSError."""
    name = f"[{url.host}]:{url.port}" if ":" in url.host else f"{url.host}:{url.port}"
    with contextlib.closing(Wire(url, sock.dup())) as wire:  # which closes its socket
        status = wire.ask("CONNECT", name, proxy.credentials()).status
    if status in (401, 407):
        raise OSError(0, "代理的用户名或密码不正确")
    if not 200 <= status < 300:
        raise OSError(0, f"代理拒绝连接 {url.host}（{status}）")


def receive(sock: socket.socket, size: int) -> bytes:
    """Return exactly `size` bytes; raise OSError."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("closed by the other side")
        data += piece
    return data


SOCKS5_ERRORS = ("", "代理内部错误", "代理规则不允许", "网络不可达", "主机不可达", "连接被拒绝")


def ask_socks5_proxy(sock: socket.socket, proxy: Proxy, url: Url) -> None:
    """Turn sock into a tunnel to url's server by SOCKS5 (RFC 1928, 1929); the proxy resolves it."""
    user, password, name = proxy.user.encode(), proxy.password.encode(), url.host.encode()
    if max(len(user), len(password), len(name)) > 255:
        raise OSError(0, "代理的用户名、密码或主机名过长")
    sock.sendall(b"\x05\x01\x02" if user else b"\x05\x01\x00")
    method = receive(sock, 2)
    if method == b"\x05\x02" and user:
        pair = bytes([1, len(user)]) + user + bytes([len(password)]) + password
        sock.sendall(pair)
        if receive(sock, 2)[1] != 0:
            raise OSError(0, "代理的用户名或密码不正确")
    elif method != b"\x05\x00":
        raise OSError(0, "代理要求用户名和密码" if method[:1] == b"\x05" else "不是 SOCKS5 代理")
    sock.sendall(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + struct.pack(">H", url.port))
    _, reply, _, kind = receive(sock, 4)
    if reply != 0:
        raise OSError(0, SOCKS5_ERRORS[reply] if reply < len(SOCKS5_ERRORS) else "代理拒绝连接")
    length = {1: 4, 4: 16}.get(kind) or receive(sock, 1)[0]
    receive(sock, length + 2)


class Network:
    """Opens connections, directly or through the proxy, whose state it owns."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.proxy = Proxy(settings.PROXY_URL) if settings.PROXY_URL else None
        self._direct = settings.NO_PROXY_DOMAINS
        self._test_url = parse_url(settings.PROXY_TEST_URL)
        self._log = log
        self._lock = threading.Lock()  # held while the proxy is probed
        self._is_up: bool | None = None  # None: not proven yet
        self.probed = threading.Event()
        self.clock_gaps: dict[str, float] = {}  # address -> seconds, by its last answer

    @property
    def proxy_state(self) -> str:
        """Return "off", "up" or "down"."""
        return "off" if self.proxy is None else "up" if self._is_up else "down"

    def is_direct(self, host: str) -> bool:
        """Tell whether NO_PROXY_DOMAINS names host: itself or, for a name, a parent domain."""
        names = [name.strip(".") for name in self._direct]
        parents = [name for name in names if not re.fullmatch(r"[\d.]*", name)]
        return host in names or any(host.endswith("." + name) for name in parents)

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        """Return the authorities: loading them takes 20 ms, so it is done once."""
        return ssl.create_default_context()

    def _connect(self, url: Url, proxy: Proxy | None, vet: bool) -> Wire:
        """Return a Wire to url's server; raise OSError or Failure."""
        if proxy and vet:
            # What cannot be looked up is left to the proxy: it is for what is blocked here.
            with contextlib.suppress(OSError):
                resolve(url.host, 0, LOOKUP_SECONDS, vet)
        host, port = (proxy.host, proxy.port) if proxy else (url.host, url.port)
        sock = dial(host, port, CONNECT_SECONDS, vet and not proxy)
        try:
            with cut_off(sock, CONNECT_SECONDS):
                if proxy and proxy.scheme == "socks5":
                    ask_socks5_proxy(sock, proxy, url)
                elif proxy and url.scheme == "https":
                    ask_http_proxy(sock, proxy, url)
            if url.scheme == "https":
                sock.settimeout(CONNECT_SECONDS)  # ssl gives it to the handshake as a whole
                # An end that TLS does not confirm is a break.
                sock = self._tls.wrap_socket(
                    sock, server_hostname=url.host, suppress_ragged_eofs=False
                )
        except BaseException:
            sock.close()
            raise
        sock.settimeout(STALL_SECONDS)
        return Wire(url, sock, proxy)

    def open(self, url: Url, *, proxied: bool, vet: bool = False) -> Wire:
        """Return a Wire to url's server, through the proxy where one is due and up.

        When the proxy fails it is probed; where it is down the connection is made directly. Raises
        Unreachable, or Failure for an address that vet refuses.
        """
        proxy = self.proxy if proxied and not self.is_direct(url.host) else None
        if proxy and not (self.probed.wait(CONNECT_SECONDS) and self._is_up):
            proxy = None
        try:
            return self._connect(url, proxy, vet)
        except OSError as error:
            if proxy and not self.probe():
                return self.open(url, proxied=False, vet=vet)
            way = "通过代理连接" if proxy else "连接"
            raise Unreachable(f"{way} {quoted(url.host)} 失败：{explain(error)}") from error

    def probe(self) -> bool:
        """Try the proxy with PROXY_TEST_URL, log a change of its state, return whether it is up."""
        with self._lock:
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
            wire = self._connect(self._test_url, self.proxy, False)
            # The head is enough: a search engine's page may be long.
            with contextlib.closing(wire), cut_off(wire.link, CONNECT_SECONDS):
                status = wire.ask("GET", self._test_url.target, {}).status
        except OSError as error:
            return explain(error)
        return f"测试地址答 {status}" if status >= 400 else ""


class Client:
    """Calls to one server, one at a time, over one connection that is kept."""

    def __init__(self, network: Network, base: str, proxied: bool) -> None:
        self.url = parse_url(base)
        self._network = network
        self._proxied = proxied
        self._lock = threading.Lock()
        self._wire: Wire | None = None

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
            if self._wire is None or not self._wire.is_fresh():
                self._wire = self._network.open(self.url, proxied=self._proxied)
            answer = self._wire.exchange(method, target, headers, body, seconds)
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                date = email.utils.parsedate_to_datetime(answer.headers.get("Date", ""))
                # The header has whole seconds, rounded down.
                gap = time.time() - date.timestamp() - 0.5
                self._network.clock_gaps[str(self.url)] = gap
            return answer


# ---- Crypto: WeCom's signed and encrypted envelope (documents 90930, 90968) --------------------
# AES-256-CBC without a MAC, as WeCom has it: therefore the signature is checked first, and what
# does not decrypt answers the same 400 whatever was wrong with it.


def aes(key: bytes) -> Any:
    """Return AES-256-CBC with the key's first half as its vector, as all of WeCom uses it."""
    from Crypto.Cipher import AES  # `plan` and `copy` run without it

    return AES.new(key, AES.MODE_CBC, iv=key[:16])


def decrypt(key: bytes, data: bytes) -> bytes:
    """Return data decrypted, without its padding (PKCS#7 to 32 bytes); raise ValueError."""
    from Crypto.Util.Padding import unpad

    return unpad(aes(key).decrypt(data), 32)


class Crypto:
    """Signs, encrypts and decrypts with one application's Token and EncodingAESKey."""

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

    def encrypt(self, text: str) -> str:
        """Return base64 of 16 random bytes, the length (big-endian), text, corp id and padding."""
        data = text.encode()
        plain = secrets.token_bytes(16) + struct.pack(">I", len(data)) + data + self._corp_id
        pad = 32 - len(plain) % 32
        return base64.b64encode(aes(self._key).encrypt(plain + bytes([pad]) * pad)).decode()

    def decrypt(self, encrypted: str) -> bytes:
        """Return the message; raise Rejected 400 where it is malformed, 403 for another corp id."""
        try:
            plain = decrypt(self._key, base64.b64decode(encrypted, validate=True))
        except ValueError as error:
            raise Rejected(400, str(error)) from error
        length = int.from_bytes(plain[16:20], "big")
        message, corp_id = plain[20 : 20 + length], plain[20 + length :]
        if len(plain) < 20 + length:
            raise Rejected(400, "bad length")
        if not hmac.compare_digest(corp_id, self._corp_id):
            raise Rejected(403, "corp id")
        return message


# ---- WeCom: reading what it posts, sending messages --------------------------------------------
# What it posts is XML or JSON from somebody who may not be WeCom: no document types, no entities.
# What it answers is an errcode, for which the table below has words and a pause.

# a member's id (document 90195); no "|", which would be several, and not everybody
USER_PATTERN = re.compile(r"(?!@all$)[\w.@-]{1,64}", re.IGNORECASE)


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
    found = read_json(data, dict)
    if found is None:
        raise Rejected(400, "not JSON")
    return {k.lower(): str(v) for k, v in found.items() if isinstance(v, str | int)}, True


def _cdata(text: str) -> str:
    # Characters that XML 1.0 (section 2.2) has no place for, and the one end CDATA cannot hold.
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


# errcode -> what to tell the log, and the pause before the next try; 0: never try again. A wrong
# secret that is tried again and again gets the IP address banned (document 90454).
WECOM_ERRORS = {
    **dict.fromkeys((-1, 45033), ("企业微信繁忙", 5.0)),
    40001: ("SECRET 不正确（见应用详情页）或应用已停用；反复尝试会被封，两小时后再试", 7200.0),
    40091: ("SECRET 属于另一个企业；两小时内不再尝试", 7200.0),
    40013: ("CORP_ID 不正确：见管理后台“我的企业”页底部", 7200.0),
    **dict.fromkeys((40014, 41001, 42001, 42007, 42009), ("access_token 失效", 5.0)),
    **dict.fromkeys((40056, 41011, 301002), ("AGENT_ID 不是这个应用的：见应用详情页", 60.0)),
    **dict.fromkeys((44004, 45002, 82001), ("消息为空、过长或没有收件人", 0.0)),
    45009: ("调用过于频繁，等待解除", 60.0),
    48002: ("应用没有发消息的权限", 60.0),
    50003: ("应用已停用：到管理后台启用", 60.0),
    60020: ("本机 IP 不在企业可信 IP 里", 60.0),
    **dict.fromkeys((40003, 60011, 60111, 81013), ("收件人不存在或不在应用可见范围内", 0.0)),
}


class ChannelError(Failure):
    """A message was refused: `pause_seconds` before the next try, 0 for never.

    `is_known` tells whether it is one that would meet every message alike.
    """

    def __init__(self, text: str, pause_seconds: float, is_known: bool) -> None:
        super().__init__(text)
        self.pause_seconds = pause_seconds
        self.is_known = is_known


def wecom_error(code: int, message: str) -> ChannelError:
    """Return the error for an errcode of WeCom's."""
    advice, pause = WECOM_ERRORS.get(code, ("未知错误", 5.0))
    if code == 60020 and (found := re.search(r"from ip:\s*([0-9a-fA-F.:]+)", message)):
        advice = f"到管理后台“应用管理 → 本应用 → 企业可信IP”添加 {found[1]}，约一分钟后生效"
    return ChannelError(f"企业微信 {code}：{advice}", pause, code in WECOM_ERRORS)


class WeCom:
    """Sends messages. Owns the access token, which is fetched once and renewed when refused."""

    RENEW = "access_token 失效"

    def __init__(self, settings: Settings, network: Network) -> None:
        self._settings = settings
        self.client = Client(network, settings.WECOM_API_URL, proxied=False)
        self._lock = threading.Lock()
        self._token = ""
        self._token_ends = 0.0

    def _ask(self, method: str, path: str, query: Mapping[str, str], body: str = "") -> Any:
        """Return the JSON object of an errcode 0 answer; raise ChannelError or Unreachable."""
        target = f"{self.client.url.target.rstrip('/')}{path}?{urllib.parse.urlencode(query)}"
        headers = {"Content-Type": "application/json"} if body else {}
        answer = self.client.call(method, target, headers, body.encode() or None)
        found = read_json(answer.body, dict) or {}
        code = found.get("errcode")
        if not isinstance(code, int) or answer.status >= 400:
            raise Unreachable(f"企业微信的回答看不懂（HTTP {answer.status}）")
        if code:
            raise wecom_error(code, str(found.get("errmsg", "")))
        return found

    def token(self, stale: str = "") -> str:
        """Return the access token, a new one when the cached one is `stale` or has expired."""
        with self._lock:
            if self._token and self._token != stale and time.monotonic() < self._token_ends:
                return self._token
            pair = {"corpid": self._settings.CORP_ID, "corpsecret": self._settings.SECRET}
            found = self._ask("GET", "/cgi-bin/gettoken", pair)
            token, seconds = str(found.get("access_token", "")), found.get("expires_in", 7200)
            if not re.fullmatch(r"[\x21-\x7e]{1,1024}", token) or not isinstance(seconds, int):
                raise Unreachable("企业微信的回答里没有 access_token")
            self._token = token
            self._token_ends = time.monotonic() + min(7200, max(60, seconds - 300))
            return self._token

    def call(self, method: str, path: str, query: Mapping[str, str], body: str = "") -> Any:
        """Make a call with the access token, renewing it once when it is refused."""
        token = self.token()
        try:
            return self._ask(method, path, {"access_token": token, **query}, body)
        except ChannelError as error:
            if self.RENEW not in str(error):
                raise
        return self._ask(method, path, {"access_token": self.token(stale=token), **query}, body)

    def send(self, user: str, text: str) -> None:
        """Deliver text to one user; raise ChannelError or Unreachable.

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
        found = self.call("POST", "/cgi-bin/message/send", {}, body)
        if found.get("invaliduser") or found.get("unlicenseduser"):
            raise ChannelError("收件人不在应用可见范围内或没有许可", 0.0, True)


# ---- GitHub: the list, one run per request, its jobs -------------------------------------------
# The run is found by the request's id and by nothing else, jobs by the canonical line they are
# named with. A dispatch alone is not tried again blindly: one that may have happened is looked for.

WORKFLOW = "docker-image-sync.yml"
LIST_PATH = "images.txt"
GITHUB_API_VERSION = "2022-11-28"  # the last one in which return_run_details exists
JOB_NAME_CHARACTERS = 100  # longer ones are cut to 97 and "..." (actions/runner, JobDisplayName)
# The last step's name; part of its "wxsync" is "***" where one of the Secrets happens to be that.
STEP_NAME = r"[a-z*]{1,12}: (copied|unchanged|failed ([a-z-]+))\b\s?(.*)"
JOB_CONCLUSIONS = {"cancelled": "任务被取消", "skipped": "任务被跳过", "stale": "任务没有开始"}
# What a branch that does not take commits says, with 403, 409 or 422.
PROTECTED = r"(?i)rule violation|protected|GH00[36]|pull request|not authorized to push|declined"


class GitHubError(Failure):
    """GitHub refused a call; `status` tells how."""


class Run(NamedTuple):
    """One run of the workflow."""

    id: int
    url: str


class Outcome(NamedTuple):
    """What came of one line: CODE and detail as the job's last step says them."""

    line: str
    code: str  # "copied", "unchanged", "" (done, no detail), "running", "missing" or a CODE
    detail: str
    url: str
    names: tuple[str, ...] = ()  # tags or platforms that do exist

    @property
    def is_done(self) -> bool:
        """Tell whether the target has the image now."""
        return self.code in ("", "copied", "unchanged")

    @property
    def is_open(self) -> bool:
        """Tell whether there is nothing to say yet: the job runs, or is not listed."""
        return self.code in ("running", "missing")


def pick(data: Any, name: str, kind: type) -> Any:
    """Return data[name] if data is an object and that is of this type; else raise Failure."""
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise Failure(f"GitHub 的回答看不懂：缺少 {name}")
    return value


def read_names(detail: str) -> tuple[str, ...]:
    """Return the tags or platforms at the end of a step's name, those that are surely whole.

    The number in brackets is the list's length; where less has come, the last name is cut off.
    """
    if not (found := re.search(r"(?:\[(\d{1,3})\])?; (nearest|has) ([\x21-\x7e ]+)$", detail)):
        return ()
    length, word, text = found.groups()
    names = text.split()
    if text.endswith("...") or (length and len(text) < int(length)):
        names = names[:-1]
    pattern = TAG if word == "nearest" else rf"(?=linux|windows|freebsd|darwin){PLATFORM.pattern}"
    return tuple(name for name in names if re.fullmatch(pattern, name))


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds between two of GitHub's times, 0 where one of them is none."""
    from datetime import datetime

    try:
        times = [datetime.fromisoformat(str(text)) for text in (start, end)]
        return max(0.0, (times[1] - times[0]).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def read_outcome(line: str, job: Any, run: Run, mask: Callable[[str], str]) -> Outcome:
    """Read one job. Its conclusion decides; the name of its last step adds the detail."""
    if job is None:
        return Outcome(line, "missing", "", "")
    url = f"{run.url}/job/{job['id']}"
    if job.get("status") != "completed":
        return Outcome(line, "running", "", url)
    listed = job.get("steps")
    steps = [s for s in listed if isinstance(s, dict)] if isinstance(listed, list) else []
    names = [str(s.get("name")) for s in steps if re.match(STEP_NAME, str(s.get("name")))]
    said = re.match(STEP_NAME, (names or [""])[-1])
    if job.get("conclusion") == "success" and not (said and said[2]):
        return Outcome(line, said[1] if said else "", said[3] if said else "", url)
    if said and said[2] in COPY_REASONS:
        detail = re.sub(r"(?: \[\d+\])?; (?:nearest|has) .*", "", said[3])
        return Outcome(line, said[2], shown(mask(detail), 160), url, read_names(said[3]))
    conclusion = str(job.get("conclusion"))
    seconds = seconds_between(job.get("started_at"), job.get("completed_at"))
    overdue = conclusion == "cancelled" and seconds >= TIMED_OUT_SECONDS
    if conclusion == "timed_out" or overdue:
        return Outcome(line, "timeout", "", url)
    failed = [str(s.get("name")) for s in steps if s.get("conclusion") == "failure"]
    where = f"失败的步骤：{shown(mask(failed[0]))}" if failed else shown(conclusion)
    return Outcome(line, "error", JOB_CONCLUSIONS.get(conclusion, where), url)


def match_jobs(lines: Sequence[str], jobs: Iterable[Any]) -> list[Any]:
    """Return the job of each line, None for a line without one.

    Jobs are named with their line, cut as GitHub cuts it. Those whose cut names are equal were made
    in the order of the lines, so they have ids in that order.
    """
    named: dict[str, dict[int, Any]] = {}
    for job in jobs:
        if isinstance(job, dict) and isinstance(number := job.get("id"), int):
            named.setdefault(str(job.get("name")), {})[number] = job
    limit = JOB_NAME_CHARACTERS
    names = [line if len(line) <= limit else f"{line[: limit - 3]}..." for line in lines]
    waiting: dict[str, list[Any]] = {}
    for name in set(names):
        found, count = named.get(name, {}), names.count(name)
        # Of those that look alike none may be missing, and none too many.
        is_sure = len(found) == count
        waiting[name] = [found[key] for key in sorted(found)] if is_sure else [None] * count
    return [waiting[name].pop(0) for name in names]


class GitHub:
    """The calls of contract section 6, with retries, rate limits, ETags and words for errors."""

    WRITE = "Contents: Read and write"
    ACTIONS = "Actions: Read and write"

    def __init__(
        self, settings: Settings, network: Network, log: Log, sleep: Callable[[float], None]
    ) -> None:
        self._settings = settings
        self.client = Client(network, settings.GITHUB_API_URL, proxied=True)
        self._log = log
        self._sleep = sleep
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[str, bytes]] = {}  # path -> (ETag, body), for polling only
        self._quiet_until = 0.0  # monotonic; set by rate limits
        # Left for waiting for limits. Who holds the list's lock sets it anew for each request.
        self.patience_seconds = GITHUB_WAIT_SECONDS
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
        try:
            for _ in range(3):
                answer = self.client.call(method, target, self._headers(etag), body)
                if answer.status >= 500:
                    raise Unreachable(f"GitHub 答 HTTP {answer.status}")
                if answer.status not in (301, 302, 307, 308):
                    self.trouble = ""
                    return answer
                location = parse_url(answer.headers.get("Location", ""), str(url))
                if location[:3] != url[:3]:
                    why = f"GitHub 转到别的主机 {location.host}，已拒绝"
                    raise GitHubError(why, answer.status)
                target = location.target
        except Unreachable as error:
            if self.trouble != str(error):
                self._log.warning(f"github: {error}，稍后重试")
            self.trouble = str(error)
            raise
        raise GitHubError("GitHub 不停地重定向，请核对 GITHUB_REPO", 310)

    def _obey_limit(self, polling: bool) -> None:
        """Wait while GitHub wants no calls; raise GitHubError 429 when that is too long."""
        while (wait := (until := self._quiet_until) - time.monotonic()) > 0:
            if polling or wait > self.patience_seconds:
                raise GitHubError(f"GitHub 限制调用次数，请 {int(wait // 60) + 1} 分钟后再试", 429)
            self.patience_seconds -= wait
            self._sleep(wait)
            with self._lock:
                if self._quiet_until == until:  # nobody has been told to wait longer meanwhile
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

        Calls are retried with growing pauses (PUT carries the sha it replaces) but for a dispatch:
        it may have been done. A rate limit is waited for, within patience_seconds. `needs` names
        the token's permission. With polling the answer is cached by ETag and failures are left to
        the poller.
        """
        target = f"{self.client.url.target.rstrip('/')}/repos/{self._settings.GITHUB_REPO}{path}"
        data = json.dumps(body).encode() if body is not None else None
        etag, cached = self._cache.get(path, ("", b"")) if polling else ("", b"")
        while True:
            self._obey_limit(polling)
            answer = persist(
                lambda: self._call_once(method, target, data, etag),
                () if polling or path.endswith("/dispatches") else GITHUB_PAUSES,
                self._sleep,
                lambda error: isinstance(error, Unreachable),
            )
            self.token_ends = answer.headers.get("GitHub-Authentication-Token-Expiration", "")
            if answer.status == 304:
                return read_json(cached, object)
            if not (wait := self._wait_asked(answer, time.time())):
                return self._read(answer, path, needs, polling)
            self.trouble = f"GitHub 限制调用次数，等待 {wait:.0f} 秒"
            self._log.warning(f"github: 被限流，{wait:.0f} 秒")
            with self._lock:
                self._quiet_until = max(self._quiet_until, time.monotonic() + wait)

    def _read(self, answer: Answer, path: str, needs: str, polling: bool) -> Any:
        """Return the JSON of an answer. Its status comes first: a gateway's page may be HTML."""
        found: Any = read_json(answer.body, object)
        if not 200 <= answer.status < 300:
            raise self._error(answer, found, needs)
        if answer.body.strip() and found is None:
            raise Unreachable("GitHub 的回答不是 JSON")
        etag = answer.headers.get("ETag", "")
        if polling and etag and len(answer.body) <= READ_BYTES:
            # Two threads at once may lose an entry: one answer is read again.
            self._cache = newest({**self._cache, path: (etag, answer.body)}, MAX_ETAGS)
        return found

    def _error(self, answer: Answer, found: Any, needs: str) -> GitHubError:
        """Say in words what a refused call means for the user's token and settings."""
        message = str(found.get("message", "")) if isinstance(found, dict) else ""
        said = shown(self._log.mask(message), 160)
        repo, branch = self._settings.GITHUB_REPO, self._settings.GITHUB_BRANCH
        status = answer.status
        if status == 401:
            text = "GitHub 令牌无效或已过期：换一个新的 GITHUB_TOKEN"
        elif re.search(PROTECTED, message):
            text = f"分支 {branch} 受保护，不接受提交：在仓库 Settings → Rules（或 Branches）里允许"
            text += "令牌的主人绕过，或把 GITHUB_BRANCH 换成不受保护的分支"
        elif status == 403 and "not accessible" in said:
            text = f"GitHub 令牌缺少权限 {needs}：在令牌设置里加上，或用带 repo 的经典令牌"
        elif status == 404:
            text = f"GitHub 找不到 {repo} 里的内容：核对仓库名、分支 {branch}"
            text += f"，并确认令牌可访问该仓库且有权限 {needs}"
        else:
            known = {403: "GitHub 拒绝了请求", 409: "GitHub 上的内容同时被改动"}
            text = known.get(status, "GitHub 报错")
        said = f" {quoted(said, 160)}" if said else ""
        return GitHubError(f"{text}（{status}{said}）", status)

    def upload_list(self, content: bytes, message: str) -> bool:
        """Make images.txt on GITHUB_BRANCH equal content; return whether that took a commit."""
        path, branch = f"/contents/{LIST_PATH}", self._settings.GITHUB_BRANCH

        def attempt() -> bool:
            change: dict[str, Any] = {"message": message, "branch": branch}
            change["content"] = base64.b64encode(content).decode()
            try:
                where = f"{path}?ref={urllib.parse.quote(branch)}"
                found = self.call("GET", where, needs=self.WRITE)
                change["sha"] = pick(found, "sha", str)
                with contextlib.suppress(ValueError):  # a large file is not shown: replace it
                    if base64.b64decode(str(found.get("content"))) == content:
                        return False
            except GitHubError as error:
                if error.status != 404:
                    raise
            self.call("PUT", path, change, needs=self.WRITE)
            return True

        def passes(error: Exception) -> bool:
            moved = isinstance(error, GitHubError) and error.status in (409, 422)
            return moved and "受保护" not in str(error)

        return persist(attempt, (1.0, 2.0, 3.0, 4.0), self._sleep, passes)

    def dispatch(self, lines: Sequence[str], request_id: str) -> Run:
        """Start the workflow for these lines, return its Run; after Unreachable it may run, too."""
        inputs = {
            "images": json.dumps(lines, separators=(",", ":")),
            "request": request_id,
            "target": self._settings.target_prefix,
        }
        body = {"ref": self._settings.GITHUB_BRANCH, "inputs": inputs, "return_run_details": True}
        path = f"/actions/workflows/{WORKFLOW}/dispatches"
        try:
            found = self.call("POST", path, body, self.ACTIONS)
        except GitHubError as error:
            if error.status != 400:
                raise
            del body["return_run_details"]  # GitHub Enterprise up to 3.20 does not know it
            found = self.call("POST", path, body, self.ACTIONS)
        if run := self._run(found, "workflow_run_id"):
            return run
        for _ in range(5):  # 204, or an odd answer: it was accepted, so the run will show up
            if run := self.find_run(request_id):
                return run
        raise Failure("GitHub 接受了请求，但一直没有出现对应的运行，请到 Actions 页查看")

    def _run(self, data: Any, name: str) -> Run | None:
        """Return the Run in an answer, None where it names none; its page is one of GitHub's."""
        number = data.get(name) if isinstance(data, dict) else None
        if type(number) is not int or not 0 < number < 2**63:
            return None
        host = rf"(?:github\.com|{re.escape(self.client.url.host)})(?::\d+)?"
        url = str(data.get("html_url"))
        if not re.fullmatch(rf"https?://{host}/[\x21-\x7e]{{1,200}}", url):
            url = f"https://github.com/{self._settings.GITHUB_REPO}/actions/runs/{number}"
        return Run(number, url)

    def find_run(self, request_id: str) -> Run | None:
        """Return the run whose display_title carries request_id, looking for a while; else None.

        Asked for without filters: filtered lists have been seen to lag by minutes.
        """
        path = f"/actions/workflows/{WORKFLOW}/runs?per_page=100"
        for _ in range(int(FIND_RUN_SECONDS / 2) + 1):
            found = self.call("GET", path, needs=self.ACTIONS)
            for entry in pick(found, "workflow_runs", list):
                run = self._run(entry, "id")
                if run and request_id in str(entry.get("display_title")):
                    return run
            self._sleep(2.0)
        return None

    def run_seconds(self, run: Run) -> float | None:
        """Return how long a run took, None while it has not ended (304 while nothing changed)."""
        found = self.call("GET", f"/actions/runs/{run.id}", needs="Actions: Read", polling=True)
        if pick(found, "status", str) != "completed":
            return None
        return seconds_between(found.get("run_started_at"), found.get("updated_at"))

    def outcomes(self, run: Run, lines: Sequence[str]) -> list[Outcome]:
        """Return an Outcome per line, of the last attempt; a line without a job is "missing"."""
        jobs: list[Any] = []
        for page in range(1, 6):  # until a page is not full: total_count grows while one reads
            path = f"/actions/runs/{run.id}/jobs?per_page=100&page={page}"
            found = pick(self.call("GET", path, needs="Actions: Read", polling=True), "jobs", list)
            jobs += found
            if len(found) < 100:
                break
        pairs = zip(lines, match_jobs(lines, jobs), strict=True)
        return [read_outcome(line, job, run, self._log.mask) for line, job in pairs]

    def cancel(self, run: Run) -> None:
        """Ask GitHub to cancel a run; one that has ended (409) is as good. Raises Failure."""
        try:
            self.call("POST", f"/actions/runs/{run.id}/cancel", None, self.ACTIONS)
        except GitHubError as error:
            if error.status != 409:
                raise


# ---- QingStor: the SDK signs, our own connection sends -----------------------------------------
# Objects are made in parts of PART_BYTES, so that memory does not grow with the file. What was
# begun is completed or aborted, after a restart as well: the key and the id are in the Task.


UPLOAD_ID = r"[\x21-\x7e]{1,512}"


class Upload(NamedTuple):
    """An object on its way: what a restart needs to finish or to undo it."""

    key: str
    upload_id: str  # empty for a single PUT
    name: str


# What QingStor's code and message say, or its status -> cause and cure; the first that matches.
QINGSTOR_ERRORS = (
    (r"skew|expired|time_|\bdate\b|invalid_date", "本机时钟不准：请校准时间"),
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
        self, settings: Settings, network: Network, log: Log, sleep: Callable[[float], None]
    ) -> None:
        self._settings = settings
        self._log = log
        self._sleep = sleep
        url = parse_url(settings.QINGSTOR_URL)
        self._has_name = url.host != "localhost" and bool(re.search("[a-z]", url.host))
        host = f"{settings.QINGSTOR_ZONE}.{url.host}" if self._has_name else url.host
        self.client = Client(network, str(url._replace(host=host, target="/")), False)

    def _request(self, name: str, *words: str, **options: Any) -> Any:
        """Return the SDK's unsigned request for an operation, such as "put_object"."""
        from types import SimpleNamespace

        from qingstor.sdk.service.bucket import Bucket  # 10 MiB, and only for files

        config = SimpleNamespace(  # the SDK's own Config installs a root log handler
            host=self.client.url.host,
            port=self.client.url.port,
            protocol=self.client.url.scheme,
            access_key_id=self._settings.QINGSTOR_ACCESS_KEY_ID,
            secret_access_key=self._settings.QINGSTOR_SECRET_ACCESS_KEY,
            enable_virtual_host_style=False,
        )
        place = {"bucket-name": self._settings.QINGSTOR_BUCKET}
        return getattr(Bucket(config, place, None), f"{name}_request")(*words, **options)

    def call(self, name: str, *words: str, fine: Container[int] = (), **options: Any) -> Answer:
        """Do one operation, again after a passing fault; return its Answer.

        Raises Unreachable, or Failure for a status that is neither 2xx nor `fine`.
        """
        if body := options.get("body"):
            md5 = hashlib.md5(body, usedforsecurity=False).digest()
            options["content_md5"] = base64.b64encode(md5).decode()
        seconds = PART_SECONDS if body else CALL_SECONDS * TRIES  # completing may take a while

        def attempt() -> Answer:
            signed = self._request(name, *words, **options).sign()  # anew: the Date is signed
            asked = (signed.method, signed.path_url, signed.headers, signed.body)
            try:
                answer = self.client.call(*asked, seconds)
            except Unreachable as error:
                raise Unreachable(f"连接 QingStor 失败：{error}，请稍后再试") from error
            if answer.status >= 500:
                raise Unreachable(f"QingStor 暂时不可用（HTTP {answer.status}），请稍后再试")
            return answer

        answer = persist(attempt, (1.0, 2.0), self._sleep, lambda e: isinstance(e, Unreachable))
        if 200 <= answer.status < 300 or answer.status in fine:
            return answer
        found = read_json(answer.body, dict) or {}
        code, said = (self._log.mask(str(found.get(name, ""))) for name in ("code", "message"))
        text = f"{answer.status} {code} {said}".lower()
        cure = next(cure for pattern, cure in QINGSTOR_ERRORS if re.search(pattern, text))
        raise Failure(f"{cure}（QingStor {quoted(f'{answer.status} {code}')}）")

    def put(self, key: str, body: bytes | bytearray, content_type: str) -> None:
        """Store a small object whole."""
        self.call("put_object", key, body=body, content_type=content_type)

    def initiate(self, key: str, content_type: str) -> str:
        """Begin an object in parts; return its upload id, the only one of the key from now on."""
        answer = self.call("initiate_multipart_upload", key, content_type=content_type)
        upload_id = str((read_json(answer.body, dict) or {}).get("upload_id", ""))
        if not re.fullmatch(UPLOAD_ID, upload_id):
            raise Failure("QingStor 的回答里没有 upload_id")
        self._abort(key, self._open_ids(key) - {upload_id})
        return upload_id

    def _open_ids(self, key: str) -> set[str]:
        """Return the ids of a key's uploads: an answer that named one may have got lost."""
        answer = self.call("list_multipart_uploads", fine=range(400, 500), prefix=key)
        listed = (read_json(answer.body, dict) or {}).get("uploads")
        entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
        return {str(entry.get("upload_id")) for entry in entries if entry.get("key") == key}

    def _abort(self, key: str, upload_ids: set[str]) -> None:
        for upload_id in upload_ids:
            if re.fullmatch(UPLOAD_ID, upload_id):
                self.call("abort_multipart_upload", key, fine=(404,), upload_id=upload_id)

    def put_part(self, upload: Upload, part: int, body: bytes | bytearray) -> None:
        """Store one part; they count from 0. (The SDK wants text: an int is a TypeError there.)"""
        options: dict[str, Any] = {"part_number": str(part), "upload_id": upload.upload_id}
        self.call("upload_multipart", upload.key, body=body, **options)

    def complete(self, upload: Upload, count: int) -> None:
        """Make an object of its parts; an answer that got lost is settled by looking."""
        parts = [{"part_number": part} for part in range(count)]
        done: dict[str, Any] = {"upload_id": upload.upload_id, "object_parts": parts}
        try:
            self.call("complete_multipart_upload", upload.key, **done)
        except Failure:
            if self.size_bytes(upload.key) is None:
                raise

    def size_bytes(self, key: str) -> int | None:
        """Return the size of an object, None where there is none or its size is not told."""
        answer = self.call("head_object", key, fine=(404,))
        length = answer.headers.get("Content-Length", "")
        return int(length) if answer.status == 200 and re.fullmatch("[0-9]{1,18}", length) else None

    def drop(self, upload: Upload) -> None:
        """Leave nothing of an upload, finished or not."""
        self._abort(upload.key, {upload.upload_id} | self._open_ids(upload.key))
        self.call("delete_object", upload.key, fine=(404,))

    def link(self, key: str, now: float) -> str:
        """Return the download link: plain, or signed for QINGSTOR_LINK_SECONDS."""
        url, bucket = self.client.url, self._settings.QINGSTOR_BUCKET
        if seconds := self._settings.QINGSTOR_LINK_SECONDS:
            return str(self._request("get_object", key).sign_query(int(now) + seconds).url)
        if self._has_name:
            return str(url._replace(host=f"{bucket}.{url.host}", target=f"/{key}"))
        return str(url._replace(target=f"/{bucket}/{key}"))


# ---- Downloads ---------------------------------------------------------------------------------
# The origin is whatever a chat user named: it lies about lengths, drips, cuts, redirects and packs.
# A file is taken for whole only if everything that came says so; in doubt it is refused.


def _header_text(value: str) -> str:
    """Return a header that http.client took for Latin-1: it is UTF-8, or in China GBK."""
    raw = value.encode("latin-1", "replace")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("gb18030", "replace")


# one parameter of Content-Disposition (RFC 6266, 4.1): token, or quoted-string with its escapes
DISPOSITION = r';\s*([\w-]+\*?)\s*=\s*("(?:\\.|[^"\\])*"|[^;]*)'


def read_file_name(disposition: str, *urls: Url) -> str:
    """Return the name to show: from Content-Disposition (RFC 6266), else from the addresses.

    Folders, control characters and leading dots are taken off; the answer is never empty.
    """
    names = []
    given = {key.lower(): value.strip() for key, value in re.findall(DISPOSITION, disposition)}
    charset, quote, extended = given.get("filename*", "").partition("'")
    if quote:
        with contextlib.suppress(LookupError, ValueError):  # a charset that is none, as "idna"
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


def make_key(name: str, seed: str) -> str:
    """Return an object key: a uuid that is the seed's, and the name's cleaned extension."""
    import uuid  # takes 2 ms at start, and only files need it

    found = re.search(r"(?i)(\.tar)?\.[a-z0-9]{1,10}$", name)
    return f"{uuid.uuid5(uuid.NAMESPACE_URL, seed)}{found[0].lower() if found else ''}"


STATUS_TEXTS = {
    401: "需要登录",
    403: "来源拒绝访问",
    404: "文件不存在",
    410: "文件已删除",
    429: "来源限流",
}
PACKED = r"(?i).*\.(gz|tgz|gzip|z|svgz|emz)"
GZIP_MAGIC = b"\x1f\x8b"


class Download:
    """A file being downloaded, part by part, resumed where the server allows it.

    One thread opens and reads it. Another may close it, whatever http.client is reading just then:
    a silent source is left by itself, one that drips is not.
    """

    def __init__(self, network: Network, link: str, vet: bool, limit_bytes: int) -> None:
        self._network = network
        self._vet = vet
        self._limit = limit_bytes
        self._first = parse_url(link)
        self._wire: Wire | None = None
        self._done_bytes = 0  # as they came over the wire
        self._is_closed = False

    def open(self) -> None:
        """Ask for the file and read the head of the answer; raise Failure."""
        self._request(self._first, {})
        headers = self._response.headers
        if self._response.status != 200:
            raise Failure("下载失败：来源只给了文件的一部分，请换一个链接")
        lengths = headers.get_all("Content-Length", [])
        odd = len(lengths) > 1 or not all(re.fullmatch(r"[0-9]+", n.strip(), re.A) for n in lengths)
        if odd or headers.defects:  # http.client would take the length for unknown
            raise Failure("下载失败：来源的回答头不合规范，无法确定文件大小，请换一个链接")
        coding = ", ".join(headers.get_all("Transfer-Encoding", ["chunked"]))
        if coding.strip().lower() != "chunked":
            raise Failure(f"来源用了不支持的传输方式 {quoted(coding)}，请换一个链接")
        self._sent_bytes = self._response.length  # None: not known
        self._validator, encoding = self._version(headers)
        disposition = _header_text(headers.get("Content-Disposition", ""))
        self.name = read_file_name(disposition, self._url, self._first)
        kind = headers.get("Content-Type", "")
        is_known = re.fullmatch(r"[\w.+/-]+(; ?[\w.=\"-]+)*", kind)
        self.content_type = kind if is_known else "application/octet-stream"
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise Failure(f"来源用了不支持的压缩方式 {quoted(encoding)}，请换一个链接")
        self._packed, self._encoding = encoding not in ("", "identity"), encoding
        self.total_bytes = None if self._packed else self._sent_bytes
        self._check_size(self._sent_bytes or 0)

    @staticmethod
    def _version(headers: http.client.HTTPMessage) -> tuple[str, str]:
        """Return what tells one version of a file from another, and how it is packed."""
        etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
        encoding = ", ".join(headers.get_all("Content-Encoding", [])).lower().strip()
        return etag if etag and not etag.startswith("W/") else modified, encoding

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._limit:
            raise Failure(f"文件超过上限 {self._limit // 2**20} MB（MAX_FILE_MB）")

    def _request(self, url: Url, headers: Mapping[str, str]) -> None:
        """Follow redirects, each to a checked address, to a 200 or 206; raise Failure."""
        for _ in range(MAX_REDIRECTS):
            self._hang_up()
            wire = self._wire = self._network.open(url, proxied=True, vet=self._vet)
            if self._is_closed:  # meanwhile
                self._hang_up()
                raise Failure("下载中断：已取消")
            try:
                with cut_off(wire.link, STALL_SECONDS):
                    response = wire.ask("GET", url.target, {"Accept": "*/*", **headers})
            except OSError as error:
                text = f"下载失败：{quoted(url.host)} {explain(error)}，请检查链接"
                raise Unreachable(text) from error
            if response.status in (200, 206):
                self._url, self._response = url, response
                return
            if response.status not in (301, 302, 303, 307, 308):
                why = STATUS_TEXTS.get(response.status, "来源拒绝或出错")
                text = f"下载失败：{why}（HTTP {response.status}），请检查链接或稍后再试"
                raise Failure(text, response.status)
            url = parse_url(_header_text(response.headers.get("Location", "")), str(url))
        raise Failure("下载失败：链接不停地重定向")

    def _resume(self) -> None:
        """Continue at the next byte (RFC 9110, 14) of the very same file; raise Failure.

        An address that was redirected to may have expired: then it is asked for anew.
        """
        done, total = self._done_bytes, self._sent_bytes or 0
        wanted = {"Range": f"bytes={done}-", "If-Range": self._validator}
        try:
            self._request(self._url, wanted)
        except Failure as failure:
            if failure.status not in (401, 403, 404, 410) or self._url == self._first:
                raise
            self._request(self._first, wanted)
        given = self._response.headers.get("Content-Range", "").strip()
        same = self._version(self._response.headers) == (self._validator, self._encoding)
        if self._response.status != 206 or given != f"bytes {done}-{total - 1}/{total}" or not same:
            raise Failure("下载中断，续传时来源文件已变化或不支持续传，请再发一次")

    def _read(self) -> bytes:
        """Return a block as the server sends it, b"" at the end; raise OSError."""
        total = self._sent_bytes
        left = READ_BYTES if total is None else min(READ_BYTES, total - self._done_bytes)
        piece = self._response.read(left)
        if left and not piece and total is not None:
            raise ConnectionResetError("short body")
        self._done_bytes += len(piece)
        self._check_size(self._done_bytes)
        return piece

    def _sent(self) -> Iterator[bytes]:
        """Yield what the server sends, resuming broken transfers; raise Failure."""
        tries, mark = 0, 0
        while True:
            try:
                if self._wire is None:
                    self._resume()
                piece = self._read()
            except (OSError, http.client.HTTPException, ValueError, Unreachable) as error:
                self._hang_up()
                tries = 1 if self._done_bytes - mark > LEAST_BYTES else tries + 1
                mark = self._done_bytes
                if not self._validator or not self._sent_bytes:
                    text = f"下载中断：{explain(error)}，来源不支持续传，请再发一次"
                    raise Failure(text) from error
                if self._is_closed or tries > TRIES:
                    raise Unreachable(f"下载中断：{explain(error)}，请再发一次") from error
                continue
            if not piece:
                return
            yield piece

    def _unpacked(self) -> Iterator[bytes]:
        """Yield the file without the compression that a server added unasked.

        All members count (RFC 1952, 2.2). A file that is packed by its name stays as it was sent
        (as wget stores it), unless it was packed once more for the way.
        """
        pieces, inflate = self._sent(), zlib.decompressobj(47)
        first = next(pieces, b"")
        is_packed_twice = zlib.decompressobj(47).decompress(first, 2) == GZIP_MAGIC
        if re.fullmatch(PACKED, self.name) and not is_packed_twice:
            yield first
            yield from pieces
            return
        for piece in itertools.chain([first], pieces):
            while piece:
                if inflate.eof:
                    if not piece.startswith(GZIP_MAGIC[: len(piece)]):
                        raise Failure("来源的压缩数据后面还有多余的内容，请换一个链接")
                    inflate = zlib.decompressobj(47)
                yield inflate.decompress(piece, READ_BYTES)
                piece = inflate.unconsumed_tail or inflate.unused_data
        if not inflate.eof:
            raise Unreachable("下载中断：压缩数据不完整，请再发一次")

    def parts(self) -> Iterator[bytearray]:
        """Yield the file in parts of PART_BYTES at least (but the last; an empty file is one)."""
        part, written = bytearray(), 0
        try:
            for piece in self._unpacked() if self._packed else self._sent():
                part += piece
                written += len(piece)
                self._check_size(written)
                if len(part) >= PART_BYTES:
                    yield part
                    part = bytearray()
        except zlib.error as error:
            raise Failure("来源的压缩数据已损坏，请再发一次") from error
        if part or not written:
            yield part

    def close(self) -> None:
        """Break off for good, even while another thread reads."""
        self._is_closed = True
        self._hang_up()

    def _hang_up(self) -> None:
        wire, self._wire = self._wire, None
        if wire:
            shut(wire.link)
            wire.close()


# ================================================================================================
# III. The heart: what must survive a restart. One owner, one lock, one way to change.
# May: read and write STATE_DIR. Never: open a connection, know of WeCom's bytes, calls or crypto,
# let anybody see a request that is not on disk yet, make somebody wait who only looks.
# ================================================================================================


def write_atomically(path: Path, data: bytes) -> None:
    """Replace path by a file that is wholly written (fsync, then rename); raise OSError."""
    temporary = path.with_name(path.name + ".tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

    # A virus scanner on Windows holds a file for a moment after it was written.
    move = functools.partial(os.replace, temporary, path)
    persist(move, (0.1, 0.3, 0.6), time.sleep, lambda e: isinstance(e, PermissionError))
    if os.name == "posix":  # the rename itself must reach the disk; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounts have no such thing
                raise
        finally:
            os.close(folder)


class ImageList:
    """STATE_DIR/images.txt: what was asked for since midnight, comments and foreign bytes kept."""

    def __init__(self, folder: Path, log: Log) -> None:
        self.path = folder / LIST_PATH
        self._log = log
        self._lock = threading.Lock()
        self._unwritten: bytes | None = None  # what the disk did not take
        self.trouble = ""

    def read(self) -> bytes:
        """Return the list; raise Failure."""
        if self._unwritten is not None:
            return self._unwritten
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            text = f"读取 {LIST_PATH} 失败：{error.strerror}，请检查 `STATE_DIR`"
            raise Failure(text) from error

    def _write(self, lines: Iterable[bytes]) -> bytes:
        """Replace the file, return its bytes; what a full disk does not take waits for `save`."""
        data = b"".join(line + b"\n" for line in lines)
        try:
            write_atomically(self.path, data)
            self._unwritten, self.trouble = None, ""
        except OSError as error:
            self._unwritten = data
            self.trouble = f"写入 {LIST_PATH} 失败：{error.strerror}，请检查 `STATE_DIR`"
            self._log.error(f"❌ {self.trouble}")
        return data

    def save(self) -> None:
        """Write what the disk has not taken yet."""
        with self._lock:
            if self._unwritten is not None:
                self._write(self._unwritten.splitlines())

    def add(self, lines: Sequence[str]) -> bytes:
        """Append the lines, if one is not there yet; return the whole content. Raises Failure.

        What `plan` would refuse is kept out, so that an edit by hand can always run: an older line
        with the target of one of these goes, and so do the oldest lines over MAX_LIST_LINES.
        """
        taken = {read_image(line).target("") for line in lines}

        def is_free(line: bytes) -> bool:
            images = read_list(line.decode(errors="replace"))[0]
            return taken.isdisjoint(read_image(image).target("") for image in images)

        with self._lock:
            old, new = self.read().splitlines(), [line.encode() for line in lines]
            if {line.strip() for line in old}.issuperset(new):
                return self.read()
            kept = [line for line in old if is_free(line)]
            over = len(kept) + len(new) - MAX_LIST_LINES
            return self._write([*kept[max(0, over) :], *new])

    def remove(self, uploaded: bytes) -> None:
        """Take out what was uploaded; lines that came meanwhile stay."""
        gone = set(uploaded.splitlines())
        with self._lock:
            self._write(line for line in self.read().splitlines() if line not in gone)


class Letter(NamedTuple):
    """A message to be sent: to an address, in the form of its channel.

    What has a default is of this process alone, never on disk.
    """

    address: str
    text: str
    message_id: str = ""  # where a message that lives can show it
    is_last: bool = True  # it ends the message that lives
    is_list: bool = False  # the rest of a long reply: any other message goes first


class Finished(NamedTuple):
    """A person's last finished request."""

    id: str
    at: float  # seconds since the epoch
    title: str
    failed: tuple[str, ...]  # lines and links, for `重试`


class Said(NamedTuple):
    """The reply to a message."""

    at: float  # seconds since the epoch
    reply: str


STAGES = ("queued", "running", "late")
OLD_STAGES = ("committed", "dispatching")  # of versions before: as good as queued


class Task(NamedTuple):
    """An accepted request. `stage` says how far it is, for a restart to go on from there."""

    id: str
    lane: str  # "images" or "files"
    user: str  # the address: who asked, and where the answer goes (see Channel)
    items: tuple[str, ...]  # canonical lines, or links still to do
    accepted: float = 0.0  # seconds since the epoch
    stage: str = "queued"  # one of STAGES
    run_id: int = 0
    run_url: str = ""
    started: float = 0.0  # when the run was started
    upload: tuple[str, ...] = ()  # an Upload, while a file is on its way
    deaths: int = 0  # of processes that had this upload on its way

    @property
    def run(self) -> Run:
        return Run(self.run_id, self.run_url)

    @property
    def person(self) -> str:
        """Return the user id in the address."""
        return self.user.partition(" ")[0]


@dataclass(frozen=True)
class Facts:
    """All that must survive a restart. Never changed: a change makes new Facts."""

    tasks: tuple[Task, ...] = ()
    letters: tuple[Letter, ...] = ()
    orphans: tuple[Upload, ...] = ()  # uploads to abort
    seen: Mapping[str, Said] = field(default_factory=dict)  # by message
    midnight: str = ""  # the day (YYYY-MM-DD) up to which the list was emptied
    finished: Mapping[str, Finished] = field(default_factory=dict)  # by person
    cancelled: tuple[str, ...] = ()  # ids of tasks that are to end

    def task(self, task_id: str, lane: str) -> Task | None:
        """Return a task as it is now, None when it has ended."""
        return next((t for t in self.tasks if t.id == task_id and t.lane == lane), None)

    def lane(self, lane: str) -> tuple[Task, ...]:
        """Return the tasks that run and wait in a lane, without those it has let go of."""
        return tuple(t for t in self.tasks if t.lane == lane and t.stage != "late")

    def late(self) -> tuple[Task, ...]:
        """Return the tasks whose runs have outlived SYNC_TIMEOUT."""
        return tuple(t for t in self.tasks if t.stage == "late")

    def with_task(self, task: Task, **changes: Any) -> Facts:
        """Return Facts in which a task has other fields."""
        same = self.task(task.id, task.lane)
        tasks = (t._replace(**changes) if t is same else t for t in self.tasks)
        return replace(self, tasks=tuple(tasks))

    def without_task(self, task: Task) -> Facts:
        """Return Facts without a task and what was kept about it."""
        left = tuple(t for t in self.tasks if (t.id, t.lane) != (task.id, task.lane))
        cancelled = tuple(i for i in self.cancelled if i in {t.id for t in left})
        return replace(self, tasks=left, cancelled=cancelled)

    def with_letters(self, letters: Iterable[Letter]) -> Facts:
        """Return Facts with more messages to be sent."""
        return replace(self, letters=(*self.letters, *letters))

    def with_list(self, rest: Sequence[Letter]) -> Facts:
        """Return Facts with the rest of a long reply, in place of an older one that still waits."""
        addresses = {letter.address for letter in rest}
        others = (a for a in self.letters if not (a.is_list and a.address in addresses))
        return replace(self, letters=(*others, *(a._replace(is_list=True) for a in rest)))

    def without_letter(self, letter: Letter) -> Facts:
        """Return Facts without a message, if it is still to be sent."""
        return replace(self, letters=tuple(a for a in self.letters if a != letter))

    def with_result(self, task: Task, at: float, title: str, failed: Iterable[str]) -> Facts:
        """Return Facts that know what came of a request, or of one more part of it."""
        last = self.finished.get(task.person)
        before = last.failed if last and last.id == task.id else ()
        others = {k: v for k, v in self.finished.items() if k != task.person}
        result = Finished(task.id, at, title, (*before, *failed))
        return replace(self, finished=newest({**others, task.person: result}, MAX_REMEMBERED))

    def with_seen(self, message_id: str, at: float, reply: str, keep_seconds: float) -> Facts:
        """Return Facts that remember the reply to a message, and no more than need be."""
        seen = {k: v for k, v in self.seen.items() if at - v.at < keep_seconds}
        return replace(self, seen=newest({**seen, message_id: Said(at, reply)}, MAX_REMEMBERED))


def revive(kind: Any, value: Any) -> Any:
    """Return what JSON has kept as it was; raise some error where that is no `kind`.

    A tuple is written as an object or as a list of its first fields; unknown fields are those of
    other versions.
    """
    if get_args(kind):  # tuple[X, ...]
        return tuple(revive(get_args(kind)[0], entry) for entry in revive(list, value))
    if issubclass(kind, tuple):
        hints = get_type_hints(kind)
        pairs = zip(hints, value, strict=False) if isinstance(value, list) else value.items()
        return kind(**{k: revive(hints[k], entry) for k, entry in pairs if k in hints})
    if not isinstance(value, (int, float) if kind is float else kind):
        raise TypeError(kind)
    return kind(value)


def read_task(entry: Any) -> Task:
    """Return the Task that was written as entry; raise some error where it is none.

    An upload that was on its way when the process died may be why.
    """
    task: Task = revive(Task, entry)
    is_known = task.lane in ("images", "files") and task.stage in STAGES + OLD_STAGES
    is_whole = task.items and len(task.upload) in (0, 3)
    if not is_known or not is_whole or not USER_PATTERN.fullmatch(task.person):
        raise ValueError("lane, stage, items, upload or user")
    if task.lane == "images":  # a line is taken as it is now canonical
        task = task._replace(items=tuple(read_image(line).line for line in task.items))
    if task.upload and "deaths" in entry:  # who stops in peace leaves it out
        task = task._replace(deaths=task.deaths + 1)
    return task


# What Facts hold many of -> its kind.
KINDS: dict[str, type[Any]] = {"tasks": Task, "letters": Letter, "orphans": Upload}
KINDS |= {"seen": Said, "finished": Finished, "cancelled": str}


def read_facts(data: Mapping[str, Any]) -> tuple[Facts, list[tuple[str, Any]]]:
    """Return the Facts written as data, and what could not be read, with its field's name."""
    bad: list[tuple[str, Any]] = []
    day = data.get("midnight")
    found: dict[str, Any] = {"midnight": day if isinstance(day, str) else ""}
    for name, kind in KINDS.items():
        written, kept = data.get(name, []), dict[Any, Any]()
        listed = written if isinstance(written, list) else [written]  # what is no list is bad
        for key, entry in written.items() if isinstance(written, dict) else enumerate(listed):
            try:
                kept[key] = read_task(entry) if kind is Task else revive(kind, entry)
            except (TypeError, ValueError, AttributeError, OverflowError):
                bad.append((name, entry))
        found[name] = kept if kind in (Said, Finished) else tuple(kept.values())
    return Facts(**found), bad


Change = Callable[[Facts], Facts]


class State:
    """The Facts, and STATE_DIR/wxsync.state, a journal: the last whole line counts.

    One thread writes; all changes that came while it wrote go into its next line, so that a slow
    disk delays everybody by two writes at most. `accept` is for what must be on disk to be true: it
    shows in `facts` only then. `change` is for what has happened anyway: it shows at once, returns
    when it is on disk, and where the disk is full the next line carries it.
    """

    VERSION = 1

    def __init__(self, folder: Path, log: Log) -> None:
        self._path = folder / "wxsync.state"
        self._log = log
        self.changed = threading.Condition()  # the one lock; notified after each change
        self.facts = self._next = Facts()  # _next: with what waits for the disk
        self.resumed: frozenset[str] = frozenset()  # ids of tasks of an earlier process
        self._since: list[Change] = []  # what has happened since the writer took _next
        self._waiting: list[list[str]] = []  # each gets why it could not be written, or ""
        self._size_bytes = JOURNAL_BYTES  # of the file; full: the first write begins it anew
        self._stopping = False
        self._writer = threading.Thread(target=self._write_for_ever, daemon=True)
        self.trouble = ""

    # -- reading

    def load(self) -> list[Any]:
        """Read the file and start writing; return the tasks in it that could not be read.

        What is damaged is set aside, never a reason not to start. Raises Failure for a file of a
        later version.
        """
        written = self._path.read_bytes() if self._path.exists() else b"{}"
        lines = (read_json(line, dict) for line in [written, *reversed(written.splitlines())])
        # A crash may tear the last line. Where none is whole that is damage, too.
        data = next((line for line in lines if line is not None), {"tasks": None})
        if (version := data.get("version", self.VERSION)) != self.VERSION:
            name = self._path.name
            raise Failure(f"{name} 是更新的版本写的（version {version}），请用新版本启动")
        facts, damaged = read_facts(data)
        if damaged:
            aside = self._path.with_name(f"wxsync.state.damaged-{int(time.time())}")
            with contextlib.suppress(OSError):
                write_atomically(aside, written)
            text = f"❌ 状态文件有 {len(damaged)} 处读不懂，原文件另存为 {aside.name}"
            self._log.error(f"{text}；受影响的请求请重发")
        self.facts = self._next = facts
        self.resumed = frozenset(task.id for task in facts.tasks)
        self._writer.start()
        return [entry for name, entry in damaged if name == "tasks"]

    def wait_for(self, look: Callable[[Facts], T]) -> T:
        """Wait until a look at the facts finds something, and return that."""
        with self.changed:
            return self.changed.wait_for(lambda: look(self.facts))

    def ready(self, lane: str) -> list[Task]:
        """Return the tasks of a lane but those whose end waits for the disk."""
        tasks = self.facts.lane(lane)
        return [task for task in tasks if self._next.task(task.id, lane)]

    def is_cancelled(self, task: Task) -> bool:
        """Tell whether the person has called a task off; it may be gone already."""
        return task.id in self.facts.cancelled or not self.facts.task(task.id, task.lane)

    # -- changing

    def accept(self, change: Change) -> None:
        """Make a change that is true only on disk; raise Failure, with nothing changed.

        It is given the facts as they will be when all that waits has been written.
        """
        with self.changed:
            self._next = change(self._next)
            if why := self._wait():
                text = f"❌ 无法保存：{why}（STATE_DIR）。请清理磁盘或检查目录权限后重发"
                raise Failure(text)

    def change(self, change: Change, is_waiting: bool = True) -> None:
        """Make a change of what has happened; it is on disk on return, if the disk takes it.

        Where nobody is waiting it goes to the disk all the same, as soon as that has time.
        """
        with self.changed:
            self.facts, self._next = change(self.facts), change(self._next)
            self._since.append(change)
            self._wait(is_waiting)

    def _wait(self, is_waiting: bool = True) -> str:
        """Wait for the writer; return why the disk did not take it, "" where it did."""
        answer: list[str] = []
        self._waiting.append(answer)
        self.changed.notify_all()
        while is_waiting and not answer:
            self.changed.wait()
        return "".join(answer)

    # -- writing

    def _write_for_ever(self) -> None:
        why = ""
        while True:
            with self.changed:  # after a failure it is tried again, though nothing may have come
                pause = REWRITE_SECONDS if why else None
                self.changed.wait_for(lambda: self._waiting or self._stopping, pause)
                if self._stopping and not self._waiting:
                    return
                batch, self._waiting, self._since = self._waiting, [], []
                facts = self._next
            why = self._write(facts)
            with self.changed:
                if why:  # what waits for the disk is refused, all of it
                    batch, self._waiting = batch + self._waiting, []
                    self._next = self.facts
                else:
                    self.facts = functools.reduce(lambda f, change: change(f), self._since, facts)
            if why:
                self._write(self.facts)  # a restart must not find what is refused
            with self.changed:
                for answer in batch:
                    answer.append(why)
                self.changed.notify_all()

    def _write(self, facts: Facts) -> str:
        """Add a line to the journal, or begin it anew; return why the disk did not take it."""
        why, is_append = "", False
        try:
            line = self._dump(facts)
            if hasattr(os, "statvfs") and not os.statvfs(self._path.parent).f_bavail:
                # A line might still fit where the file ends, but nothing else that follows from it.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if is_append := self._size_bytes + len(line) <= JOURNAL_BYTES:
                with open(self._path, "ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            else:
                write_atomically(self._path, line)
                self._size_bytes = 0
            self._size_bytes += len(line)
        except (OSError, MemoryError, ValueError) as error:
            if is_append:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, self._size_bytes)
            self._size_bytes = JOURNAL_BYTES  # whatever is there now: begun anew next time
            why = f"写入 {self._path.name} 失败：{explain(error)}"
            self._log.error(f"❌ {why}")
        self.trouble = why
        return why

    def _dump(self, facts: Facts, closed: bool = False) -> bytes:
        data = {"version": self.VERSION, **vars(facts)}
        data["tasks"] = [task._asdict() for task in facts.tasks]
        data["letters"] = [(letter.address, letter.text) for letter in facts.letters]
        # Version 1.0.0, should somebody go back to it, wants the one and cannot read the other.
        data["last"] = ""
        for task in data["tasks"] if closed else ():
            del task["deaths"]
        return json.dumps(data, ensure_ascii=False).encode(errors="replace") + b"\n"

    def close(self) -> None:
        """Write a last time, in one line that every version reads, and let nothing change after."""
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        self._writer.join(2.5)
        self.changed.acquire()  # never given back
        if not self._writer.is_alive():
            with contextlib.suppress(OSError):
                write_atomically(self._path, self._dump(self.facts, closed=True))


def take_lock(folder: Path) -> BinaryIO:
    """Return STATE_DIR/wxsync.lock, locked until it is closed or the process dies.

    Raises Failure when another process has it or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "wxsync.lock", "a+b")  # noqa: SIM115 - open as long as the process
    except OSError as error:
        raise Failure(f"STATE_DIR {folder} 不能写：{error.strerror}") from error
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            lock: Any = msvcrt
            file.seek(0)
            lock.locking(file.fileno(), lock.LK_NBLCK, 1)
    except OSError as error:
        file.close()
        raise Failure(f"另一个 wxsync 正在使用 STATE_DIR {folder}，请先停掉它") from error
    return file


# ================================================================================================
# IV. The chat: from words to requests, from outcomes to words. One text, whatever the channel:
# foreign things stand between backticks, commands in ``` blocks; a channel makes its form of it.
# May: read the facts, accept requests. Never: HTTP, crypto, a run, a copy, a connection.
# ================================================================================================

INTERNAL_ERROR = "❌ 内部错误，请查看日志"
HELP = """📖 wxsync 使用说明

同步镜像（每行一个，或用逗号隔开；也可以粘贴 compose、k8s、Dockerfile 或报错）：
nginx:latest
bitnami/redis:7.0
ghcr.io/open-webui/open-webui:main
指定架构：--platform=linux/arm64 nginx:latest
多架构：--platform=all nginx:latest
改名：registry.k8s.io/pause:3.9 => pause:3.9

上传文件：发送 https:// 开头的链接，独占一行

状态：查看进度　列表：今天的镜像
重试：再做一次失败的　取消：停掉自己的请求"""
ONLY_TEXT = "📖 只看得懂文字：镜像名（如 `nginx:latest`）、https:// 链接，或发送 帮助"
CHINESE = {"状态": "status", "列表": "list", "重试": "retry", "取消": "cancel", "帮助": "help"}
COMMANDS = CHINESE | {word: word for word in CHINESE.values()}

# ---- Pastes: texts that are read for their marked positions only -------------------------------
# What people have is a compose file, a manifest, an error. Each line is held against the marks
# below; what stands at a mark is an image, or is named with the reason; everything else is
# ignored.

# Options of docker and the like: those that stand alone; the others have a value, which may be the
# next word.
ALONE = (
    r"-[ditqPD]+|--(?:rm|privileged|init|detach|interactive|tty|read-only|publish-all|quiet|debug|"
    r"no-healthcheck|all-tags|all-platforms|plain-http|skip-verify|local|disable-content-trust)"
)
VALUE = r"""(?:=|\s+(?!-))(?:"[^"]*"|'[^']*'|(?!"[^"]*"|'[^']*')\S+)"""
# Each alternative shuts out the others: an option's value is never taken for the image. (Possessive
# quantifiers would say it shorter; they are wrong in Python 3.11.2.)
OPTION = rf"(?-i:{ALONE})(?=\s)|(?!(?-i:{ALONE})\s)-[^\s=]+(?:{VALUE}|(?!{VALUE}))"
OPTIONS = rf"(?:\s+(?:{OPTION})){{0,60}}"
# A line's marks: `ref` is what stands there, `loose` what is only taken when it has a
# tag (prose), `word` what stands in a command. What is no plain reference is named, nothing is
# guessed.
MARKS = (
    # YAML, JSON: a line of its own; without a blank where a colon or slash follows (phones)
    #     - image: "nginx:1.25"  # web        image:nginx:1.25        "image": &base redis:7,
    (
        r"""^(?:[-•]\s+)*["']?image["']?\s*:(?:\s+|(?=["'])|(?=[^\s:/]+[:/]))(?:&\S+\s+)?"""
        r"""(?P<ref>"[^"]*|'[^']*|[^\s"'#].*?(?=,?\s*$|\s#))"""
    ),
    # in one line, also with \" around it
    #     {name: web, image: nginx:1.25}        {"containers":[{"image":"nginx:1.25"}]}
    (
        r"""(?<=[{,])\s*\\*(?:["']image\\*["']\s*:\s*|image\s*:\s+)(?:&\S+\s+)?\\*"""
        r"""(?P<ref>"[^"\\]*|'[^'\\]*|[^\s"'{\[][^\s,}]*)"""
    ),
    # Dockerfile, also as a build shows it
    #     FROM --platform=linux/arm64 golang:1.22 AS build        >>> FROM node:20
    (
        r"^(?:>>>\s*)?FROM\s+(?:--platform=(?P<platform>\S+)\s+)?(?P<ref>\S+)"
        r"(?:\s+AS\s+(?P<stage>\S+))?\s*(?:#.*)?$"
    ),
    # kubelet, containerd, docker: in quotes (backslashes before them in logs) …
    #     Failed to pull image "nginx:1.25": rpc error: …        PullImage \"nginx:1.25\" failed
    (
        r"(?<![\w.-])(?:images?(?: tag| reference| name)?|pullimage|reference|"
        r"""(?:manifest|metadata) for)[:=]?\s+\\*(["'])(?P<ref>[^"'\\]{1,300})\\*\1"""
    ),
    # … and without
    #     manifest for nginx:9 not found        metadata for docker.io/library/nginx:1.25
    (
        r"(?<![\w.-])(?:image:?|metadata for|manifest for(?=\s+\S+\s+not found)|failed to "
        r"""solve:|trying to pull|pull(?:ing|ed)(?=\s+\\*["']))\s+\\*[\["']?"""
        r"""(?P<loose>[^\s"'\[\],\\]+)"""
    ),
    # shell
    #     sudo docker pull --platform linux/arm64 nginx:1        ctr -n k8s.io images pull a/b:1
    (
        rf"(?<![\w.-])(?:docker|podman|nerdctl|crictl|ctr){OPTIONS}(?:\s+(?:images?|i))?\s+"
        r"(?:pull|(?P<run>run|create))(?=\s)"
        r"""(?=(?:[^;|&]{0,300}?\s--platform[=\s]\s*["']?(?P<on>[^\s"';|&`]+))?)"""
        rf"{OPTIONS}\s+(?P<word>(?!-)[^\s;|&`]+)(?=(?P<end>`?\s*(?:$|&&|[;|#]))?)"
        rf"(?:{OPTIONS}\s+(?P<more>[\w.-]+[:/][\w.:/-]+)(?=\s|$))?"
    ),
)
# REPOSITORY   TAG   IMAGE ID …        CONTAINER   REPOSITORY   TAG …        IMAGE   ID   DISK USAGE
TABLE = (
    r"(?i)(?:(?P<name>REPOSITORY|IMAGE)|\S+\s+(?P<second>REPOSITORY))\s+TAG\s|"
    r"(?P<one>IMAGE)\s+ID\s+D"
)
# docker leaves the tag out here
#     pull access denied for team/app, repository does not exist or may require …
DENIED = r"""(?i)\bpull access denied for[ \t]+([^\s,"']{1,300})(?=,)"""
# a chart's values, near each other
#     registry: quay.io         image: elasticsearch
#     repository: a/b           imageTag: 8.5.1
#     tag: v1
CHART = (
    r"""(?i)(?:\bregistry["']?:\s*["']?(?P<host>[\w.:-]+)["']?,?\s+["']?)?"""
    r"""\b(?:repository|(?P<image>image))["']?:\s*["']?"""
    r"""(?P<name>(?!\S+://)[^\s"',#{}&]+)["']?[\s,]"""
    r"""(?:(?!\b(?:repository|image)["']?:)[^{}]){0,300}?"""
    r"""\b(?(image)imageTag|tag)["']?:[ \t]*["']?(?P<tag>[^\s"',#{}&]+)"""
)
# what stands at a mark and is none: ids, numbers, YAML's own signs, platforms, files
NO_IMAGE = (
    r"(?:sha256:)?[0-9a-f]{12,}|[\d.:/]+|null|~|[|>][-+]?|[&*].*|data:.*|(?:linux|windows)/\w+|"
    r"/.*|.*\.(?:png|jpe?g|gif|svg|webp|ico)"
)
PULL_TALK = frozenset(("failed", "fails", "error", "timeout", "slow", "stuck"))
INSTRUCTION = r"(?im)^[^\w\n]*(?:RUN|COPY|ADD|CMD|ENTRYPOINT|WORKDIR|ENV|EXPOSE|ARG|LABEL|USER)\s"
SQL = r"(?im)^[ \t]*(?:SELECT|DELETE|INSERT|UPDATE)\s"
KLOG = r"(?m)^[IWEF]\d{4} |kubeadm config images"
# what kubectl applied before, not what is
APPLIED = r"(?m)^([ \t]*+).*last-applied-configuration.*(?:(?<=[|>-])\s*\n.*)?(?:\n\1[ \t]+\S.*)*"


class Paste:
    """What a text has at its marked positions."""

    def __init__(self, text: str) -> None:
        self.images: dict[str, Image] = {}
        self.named: dict[str, str] = {}  # marked, but no plain reference -> why
        self.offers: dict[str, Image] = {}  # lines to send, where a person has to say so
        text = re.sub(r"\x1b\[[0-9;]*m", "", text.translate(TIDY)).replace("\\\n", " ")
        text = re.sub(APPLIED, "", text)
        text = re.sub(r"(?i)(image:) *[|>]-?\n\s*", r"\1 ", text)
        self._is_build = bool(re.search(INSTRUCTION, text))
        self._is_sql = bool(re.search(SQL, text))
        self._is_listed = bool(re.search(KLOG, text))
        self._marks = [re.compile(mark, re.IGNORECASE) for mark in MARKS]
        self._stages = {"scratch"}
        self._table: re.Match[str] | None = None
        lines = [" ".join(line[:MAX_LINE_CHARACTERS].split()) for line in text.split("\n")]
        lines = [re.sub(r"^(?:>+ |\d+ *\|)+", "", line).strip() for line in lines]
        if any(line.startswith(("@@ ", "diff --git")) for line in lines):
            lines = [line.removeprefix("+").strip() for line in lines if not line.startswith("-")]
        for line in lines:
            self._read_line(line)
        named = {re.split(r":[^/]*$|@", line)[0] for line in self.images}
        for name in re.findall(DENIED, text):
            if name not in named:
                self._take(name)
        self._read_charts(text)

    def _take(self, ref: str, platform: str = "", loose: bool = False, offer: bool = False) -> None:
        """Take what stands at a mark: an image, or named with the reason, or nothing."""
        ref = ref.strip(" \"'`")
        ref = ref.rstrip(".:,;)]}…") if loose else ref
        if not ref or re.fullmatch(NO_IMAGE, ref) or (loose and not re.search("[:@]", ref)):
            return
        line = f"--platform={platform} {ref}" if platform else ref
        try:
            if re.search(r"[$<]|\{\{", line):
                raise BadImage("含有变量，请换成实际的值")
            image = read_image(line)
        except BadImage as error:
            if not loose:
                self.named[line] = str(error)
            return
        (self.offers if offer else self.images)[image.line] = image

    def _read_line(self, line: str) -> None:
        if re.match(COMMENT, line):
            return
        if head := re.match(TABLE, line):
            self._table = head
        elif self._table and re.search(r"\s[0-9a-f]{12,13}(?=\s|$)", line):
            self._read_row(line.split(), self._table)
        elif self._is_listed and re.fullmatch(r"[\w.-]+/[\w./-]+:[\w.-]+", line):
            self._take(line)
        else:
            for mark in self._marks:
                for found in mark.finditer(line):
                    self._read_mark(found.groupdict())
                if mark is self._marks[0] and mark.match(line):
                    return  # what follows is a comment

    def _read_row(self, words: list[str], head: re.Match[str]) -> None:
        """Read name and tag below their header."""
        name, tag = words[1:3] if head["second"] else [*words, ""][:2]
        if "<" not in name + ("" if head["one"] else tag):
            self._take(name if head["one"] else f"{name}:{tag}", loose=True)

    def _read_mark(self, got: dict[str, str | None]) -> None:
        ref = got.get("ref") or ""
        if "stage" in got:  # a FROM: of SQL, of an earlier stage, of a Dockerfile
            is_sure = re.search("[:/@$]", ref) or ref in OFFICIAL or self._is_build
            known = ref.lower() in self._stages or ref.endswith(":")
            if is_sure and not self._is_sql and not known:
                platform = got["platform"] or ""
                self._take(ref, "" if "$" in platform else platform)
            self._stages.add((got["stage"] or "").lower())
        elif word := got.get("word"):
            is_name = re.fullmatch("[a-z0-9._-]+", word) and word not in PULL_TALK
            if got["run"] or re.search(r"[:/@$<{]", word) or (is_name and got["end"] is not None):
                self._take(word, got["on"] or "", offer=bool(got["run"]))
            if got["more"] and not got["run"]:
                self.named[got["more"]] = "一条 pull 只取一个镜像"
        else:
            self._take(ref or got.get("loose") or "", loose=not ref)

    def _read_charts(self, text: str) -> None:
        """Offer `repository:` with the `tag:` beside it, as in a chart's values."""
        for found in re.finditer(CHART, text):
            name = f"{found['host']}/{found['name']}" if found["host"] else found["name"]
            if found["image"]:  # which was taken without its tag
                with contextlib.suppress(BadImage):
                    self.images.pop(read_image(name).line, None)
            self._take(f"{name}:{found['tag']}", offer=True)

    def __bool__(self) -> bool:
        return bool(self.images or self.named or self.offers)

    def note(self) -> str:
        """Return what was not done and why, and what could be sent."""
        lines = [f"• {quoted(value, 80)}：{why}" for value, why in self.named.items()]
        text = "\n没有处理：\n" + "\n".join(lines) if lines else ""
        offers = [line for line in self.offers if line not in self.images]
        if offers:
            text += "\n没有开始，如需同步请发送：\n" + "\n".join(["```", *offers, "```"])
        return text


# ---- Reading a message (contract section 5) ----------------------------------------------------
# A command, links, a list (all or nothing), a paste, or talk, in this order. Talk starts nothing.


class Reading(NamedTuple):
    """What a message asks for: a command, or images and links, with items that are neither."""

    command: str = ""  # one of COMMANDS' values, or "" when there is work
    images: tuple[Image, ...] = ()
    links: tuple[str, ...] = ()
    note: str = ""


def split_items(text: str) -> tuple[list[str], list[str]]:
    """Return the links (a line each) and the other items of a message, tidied."""
    links: list[str] = []
    items: list[str] = []
    for line in text.split("\n"):
        link = line.translate({0xFEFF: None, 0x200B: None}).strip(" \t\u3000\"'`“”‘’<>")
        if re.match(r"(?i)https?://", link):
            links.append(link)
        elif not re.match(COMMENT, line):
            items += filter(None, map(tidy, re.split(r"[,，、;；]", line)))
    return list(dict.fromkeys(links)), items


HUB_PAGE = r"(?i)https?://hub\.docker\.com/(?:_|r)/([^?#\s]+?)(?:/tags.*)?/?(?:[?#].*)?"


def _check_links(links: list[str]) -> None:
    if len(links) > MAX_LINKS:
        raise Failure(f"❌ 一次最多 {MAX_LINKS} 个链接，请分开发送")
    for link in links:
        if page := re.fullmatch(HUB_PAGE, link):
            with contextlib.suppress(BadImage):
                line = read_image(page[1]).line
                text = f"❓ 这是镜像的网页，不是文件。\n同步镜像请发送：`{line}`\n"
                raise Failure(text + "要文件请发送文件本身的链接")
        try:
            parse_url(link)
        except Failure as error:
            raise Failure(f"❌ {error}\n一行一个链接，中间不要有空格") from error


def _check_images(images: Mapping[str, Image]) -> tuple[Image, ...]:
    """Return the images; raise Failure for too many, or for two with one target."""
    if len(images) > MAX_IMAGES or sum(map(len, images)) > MAX_INPUT_CHARACTERS:
        raise Failure(f"❌ 一次最多 {MAX_IMAGES} 个镜像（共 {len(images)} 个），请分开发送")
    targets: dict[str, Image] = {}
    for image in images.values():
        other = targets.setdefault(image.target(""), image)
        if other is not image:
            why = f"`{other.line}` 和 `{image.line}` 的目标都是 `{image.name}:{image.tag}`"
            renamed = f"{image.line.partition(' => ')[0]} => 新名称"
            raise Failure(f"❌ 没有开始：{why}\n请给其中一个改名：`{renamed}`")
    return tuple(images.values())


def _fit(head: str, entries: list[str], room_bytes: int, unit: str) -> str:
    """Return head and entries (of one or more lines each) in room_bytes, cut with a count."""
    lines = [entry.replace("\n", "\r") for entry in entries]  # so that none is cut in its middle
    return split_text("\n".join([head, *lines]), room_bytes, 1, unit)[0].replace("\r", "\n")


def _read_images(items: list[str]) -> tuple[Image, ...]:
    """Return the images of all items; raise Failure naming every bad one, or a clash of targets."""
    images: dict[str, Image] = {}
    bad = []
    for item in items:
        try:
            image = read_image(item)
            images[image.line] = image
        except BadImage as error:
            line = suggest(item)
            meant = f"\n   您是不是要：{quoted(line, 160)}" if line else ""
            bad.append(f"• {quoted(item, 80)}\n   {error}{meant}")
    if bad:
        raise Failure(_fit("❌ 没有开始，请改好后重发：", bad, MAX_TEXT_BYTES - 100, "项"))
    return _check_images(images)


def _is_attempt(item: str) -> bool:
    """Tell whether an item is meant as an image, well or badly written, or is just talk.

    Talk is a time, a path, an address, `key: value`, a sentence in which nothing looks like an
    image.
    """
    if re.search(r"=>|--platform", item):
        return True
    path = re.match(r"[~.]{0,2}[/\\]|[A-Za-z]:[\\/]", item) and not re.search(r":[\w.-]+/?$", item)
    address = re.fullmatch(r"(?:mailto:)?[^\s@:/]+@[\w.-]+\.\w+", item)
    command = item.split()[0].lower() in COMMANDS if item.split() else False
    if path or address or command or is_talk(item) or not re.search("[:/@]", item):
        return False
    name = re.match(r"\s*([\w./-]+?)\s*:", item)
    if name and (name[1] in OFFICIAL or "/" in name[1]):
        return True
    if re.search(r"[\u2e80-\uffff\U00010000-\U0010ffff]", item) or re.search(r"\s", item):
        likely = "" if re.match(r"[\w .-]+:\s", item) else suggest(item)
        return bool(likely) or re.search(r"(?:^|\s)-\w?-?\w", item) is not None
    return True


def _is_list(items: list[str]) -> bool:
    """Tell whether every item is a valid image, or at least one word that is no YAML key."""

    def fits(item: str) -> bool:
        with contextlib.suppress(BadImage):
            return bool(read_image(item))
        return bool(re.fullmatch(r"[\w./:@=+-]*[\w./@=+-]", item))

    return all(map(fits, items))


def _read_bare(items: list[str]) -> tuple[tuple[Image, ...], str]:
    """Read plain names: images where one of several is well known, else asked back."""
    names = [item.lower() if len(items) == 1 else item for item in items]
    is_plain = all(re.fullmatch(NAME, name) and len(name) <= 128 for name in names)
    if not is_plain or all(map(is_talk, names)):
        return (), ""
    if len(names) > 1 and not OFFICIAL.isdisjoint(names):
        return _read_images(names), ""
    lines = ", ".join(f"{name}:latest" for name in names)
    return (), f"如需同步镜像 {'、'.join(names)}，请发送 {lines}"


def read_message(text: str) -> Reading:
    """Return what a chat message asks for; raise Failure with the reply for one that is refused."""
    word = text.translate(TIDY).strip().lower()
    if len(word) < 20 and (word := re.sub(r"^[\W_]+|[\W_]+$", "", word)) in COMMANDS:
        return Reading(COMMANDS[word])
    text = re.sub(r"\r\n?|\u2028|\u2029", "\n", text)
    text = re.sub(r"\n[ \t\n]*\n", "\n", text)  # thousands of empty lines would take their time
    links, items = split_items(text)
    if links and re.search(r"[{\[]\s*\n", text.translate(TIDY)):
        links = []  # lines of JSON, such as a mirror in daemon.json
    is_list, attempted = _is_list(items), any(map(_is_attempt, items))
    if not (is_list and attempted) and (paste := Paste(text)):
        images, note = _check_images(paste.images), paste.note()
        # Terminals wrap errors so that a line begins with an address: no link of the person's.
        links = links if is_list else []
    elif attempted:
        images, note = _read_images(items), ""
    else:
        images, note = _read_bare(items)
        if not images and re.search(r"(?i)https?://", " ".join(items)):
            raise Failure("❓ 链接要独占一行：一行一个，前后不要有别的文字")
        if links and not images and items:
            note = f"\n（没有处理：{quoted('、'.join(items))}）"
    _check_links(links)
    return Reading("" if images or links else "help", images, tuple(links), note)


# ---- What came of it, in words -----------------------------------------------------------------
# Failures first, each with cause and cure; then what is there, as commands to copy. Success is only
# what an Outcome says; there is no text for "probably".

# CODE of an outcome -> cause and cure
REASONS = COPY_REASONS | {
    "missing": ("运行里没有这个镜像的任务", "请重发这一个"),
    "running": ("还没有结束", "打开运行地址查看"),
}
RETRY_CODES = ("network", "rate-limited", "timeout", "missing", "running")
RETRY = "发送 重试，再做一次失败的"
LATE = "⏰ 还没有完成，结束后再通知您"


def duration(seconds: float) -> str:
    """Return seconds in Chinese."""
    seconds = max(0, int(seconds))
    minutes = f"{seconds // 60} 分 " if seconds >= 60 else ""
    return f"{minutes}{seconds % 60} 秒"


def bar(done: int, total: int) -> str:
    """Return a bar of ten and the percentage; total is not 0."""
    filled = min(10, 10 * done // total)
    return f"{'▓' * filled}{'░' * (10 - filled)} {min(100, 100 * done // total)}%"


def _hints(outcome: Outcome) -> list[str]:
    """Return what could be sent instead: tags or platforms that do exist."""
    source = read_image(outcome.line).source
    if outcome.code == "not-found":
        option = outcome.line.partition(source)[0]
        repository = re.split(r":[^/:]*$|@", source)[0]
        lines = [f"{option}{repository}:{tag}" for tag in outcome.names[:3]]
    else:
        lines = [f"--platform={platform} {source}" for platform in outcome.names[:8]]
    return [f"   可以发：`{line}`" for line in lines]


def _failed_groups(outcomes: list[Outcome]) -> list[str]:
    """Return the lines for failed images, those with one cause together, so that all fit."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        detail = outcome.detail if outcome.code in ("error", "rejected") else ""
        groups.setdefault((outcome.code, detail), []).append(outcome)
    lines = []
    for (code, detail), members in groups.items():
        cause, cure = REASONS[code]
        for member in members:
            lines += [f"❌ `{member.line}`", *_hints(member)]
        said = f"（{quoted(detail, 160)}）" if detail else ""
        lines += [f"   原因：{cause}{said}", f"   办法：{cure}"]
        if code == "error" and members[0].url:
            lines.append(f"   任务：{members[0].url}")
    return lines


def _done_lines(outcomes: list[Outcome], prefix: str, with_tags: bool) -> list[str]:
    """Return the block with a command to copy for each image that is there."""
    lines = []
    for outcome in outcomes:
        image = read_image(outcome.line)
        target = image.target(prefix)
        lines.append(f"docker pull {target}{'（已是最新）' if outcome.code == 'unchanged' else ''}")
        if with_tags and "@" not in image.source:
            lines.append(f"docker tag {target} {image.source}")
    return ["```", *lines, "```"] if lines else []


def result_text(outcomes: list[Outcome], prefix: str, seconds: float, run_url: str) -> str:
    """Return the final message of an image request: failures first, then what to copy."""
    done = [outcome for outcome in outcomes if outcome.is_done]
    failed = [outcome for outcome in outcomes if not outcome.is_done]
    count = f"成功 {len(done)} / {len(outcomes)}"
    head = f"❌ 镜像同步没有全部完成，{count}" if failed else f"✅ 镜像同步完成，{count}"
    lines = [head, f"用时 {duration(seconds)}", run_url, "", *_failed_groups(failed)]
    lines += [RETRY] if any(outcome.code in RETRY_CODES for outcome in failed) else []
    lines += [""] if failed and done else []
    with_tags = len(outcomes) <= 5 and len("\n".join(lines)) < MAX_TEXT_BYTES // 3
    return "\n".join([*lines, *_done_lines(done, prefix, with_tags)])


def public_link(link: str, is_own: bool) -> str:
    """Return what may be shown of a link: one's own without its query, of others the host."""
    parts = urllib.parse.urlsplit(link)
    host = parts.netloc.rpartition("@")[2]
    return quoted(f"{parts.scheme}://{host}{parts.path}" if is_own else host, 100)


def title(task: Task, is_own: bool) -> str:
    """Return a request in a few words."""
    more = f" 等 {len(task.items)} 个" if len(task.items) > 1 else ""
    first = task.items[0]
    return (public_link(first, is_own) if task.lane == "files" else quoted(first, 80)) + more


@dataclass
class Work:
    """How far one task is. Written by its lane and by what follows its run."""

    outcomes: list[Outcome]
    since: float = 0.0  # monotonic; when the work began, 0 when it has not
    done_bytes: int = 0
    total_bytes: int = 0  # 0 for not known
    is_told: bool = False  # that it takes long
    # of following a run; in looks, not by the clock, what is patience with GitHub
    next_count: float = 0.0  # monotonic; when the jobs are counted again
    odd_looks: int = 0  # in a row
    open_looks: int = 0  # since the run ended, with jobs that have not
    is_cancelled: bool = False  # GitHub has been asked


class Progress:
    """How far the tasks are. Of this process alone, never on disk.

    Each method is one step of a dict, so that no lock is needed.
    """

    def __init__(self) -> None:
        self._works: dict[tuple[str, str], Work] = {}

    def of(self, task: Task) -> Work:
        """Return what is known of a task; at first all its lines are running."""
        fresh = Work([Outcome(line, "running", "", "") for line in task.items])
        return self._works.setdefault((task.lane, task.id), fresh)

    def is_begun(self, task: Task) -> bool:
        """Tell whether a lane has begun with a task, in this process."""
        work = self._works.get((task.lane, task.id))
        return bool(work and work.since)

    def end(self, task: Task) -> None:
        """Forget a task."""
        self._works.pop((task.lane, task.id), None)


def progress_text(task: Task, progress: Progress) -> str:
    """Return how far a running task is, in one line."""
    work = progress.of(task)
    if task.lane == "images":
        done, total = sum(not o.is_open for o in work.outcomes), len(work.outcomes)
        return f"　{bar(done, total)}，已完成 {done}/{total}"
    done, total = work.done_bytes, work.total_bytes
    known = f"{bar(done, total)}，" if total else ""
    of = f" / {total / 1e6:.1f}" if total else ""
    seconds = max(1.0, time.monotonic() - work.since)
    return f"　{known}{done / 1e6:.1f}{of} MB，{done / seconds / 1e6:.1f} MB/s"


def living_text(task: Task, progress: Progress) -> str:
    """Return what is shown of a request while it runs, or when it takes long."""
    if task.lane == "files":
        return f"🔄 正在上传 {title(task, True)}\n{progress_text(task, progress)}"
    outcomes = progress.of(task).outcomes
    ended = [outcome for outcome in outcomes if not outcome.is_open]
    head = f"🔄 正在同步镜像　{len(ended)} / {len(outcomes)}"
    marks = [f"{'✅' if outcome.is_done else '❌'} `{outcome.line}`" for outcome in ended]
    open_names = [f"⏳ `{outcome.line}`" for outcome in outcomes if outcome.is_open]
    text = "\n".join([head, bar(len(ended), len(outcomes)), "", *marks, *open_names])
    return split_text(text, MAX_MARKDOWN_BYTES // 2, 1, "个")[0]


# ---- Answers -----------------------------------------------------------------------------------
# What a message does is one change of the facts, made with its reply: both are on disk, or neither.
# A repeat of the message gets the reply again and does nothing.


class Message(NamedTuple):
    """What somebody typed, as far as it matters here."""

    user: str
    address: str  # where answers go: the user, then the channel's name and the group, if any
    content: str
    id: str  # what tells a repeat


def split_address(address: str) -> tuple[str, str, str]:
    """Return user, channel's name and group of an address."""
    user, name, group = [*address.split(" "), "", ""][:3]
    return user, name, group


class Channel:
    """How words reach a person, and all that the chat and the lanes know of it.

    An address is "USER", "USER NAME" or "USER NAME GROUP", with the channel's name in the middle.
    """

    name = ""
    limit_bytes = MAX_TEXT_BYTES
    senders = 1  # how many messages may be under way at once
    trouble = ""  # what is wrong with its line, "" while it is up

    def pace(self) -> list[tuple[float, float]]:
        """Return what the other side takes of one address: see Pace."""
        return [(1.0, MESSAGE_INTERVAL_SECONDS), HOURLY_PACE]

    def render(self, text: str) -> str:
        """Return text in this channel's form; here: without backticks and blocks."""
        return re.sub(r"(?m)^```$\n?|`", "", text).rstrip("\n")

    def letters(self, address: str, text: str, mark: str) -> list[Letter]:
        """Return the messages for a text; in a group each begins by naming whose it is.

        With a unique mark each is unlike any other ever sent.
        """
        letters, (user, _, group) = [], split_address(address)
        head = f"`{user}`：\n" if group else ""
        room_bytes = self.limit_bytes - len(head.encode()) - 64
        pieces = split_text(self.render(text), room_bytes, MAX_RESULT_MESSAGES)
        short = hashlib.sha256(mark.encode()).hexdigest()[:6]
        for index, piece in enumerate(pieces, 1):
            of = f" {index}/{len(pieces)}" if len(pieces) > 1 else ""
            tail = f"\n（#{short}{of}）" if mark and (of or mark not in piece) else ""
            letters.append(Letter(address, head + piece + tail))
        return letters

    def send(self, letter: Letter) -> None:
        """Deliver one message; raise Failure (ChannelError tells whether and when to try again)."""
        raise NotImplementedError

    def confirm(self, message: Message, text: str, tasks: Sequence[Task]) -> list[Letter]:
        """Return what goes on disk with a change and its new tasks, to be sent as its reply.

        Nothing where the reply is given otherwise.
        """
        return []

    def ending(self, request: str, letters: list[Letter]) -> list[Letter]:
        """Return the letters, the first as the end of the message that shows how far it is."""
        return letters


Saying = str | Callable[[], str]  # words, or what gives them when the disk has been waited for
Planned = tuple[Facts, str, tuple[Task, ...]]  # the facts as they will be, the reply, new tasks
LANES = {"images": ("镜像", "同步"), "files": ("文件", "上传")}


@dataclass
class Chat:
    """Answers messages: all that is said at once. Owns replies that are not on disk."""

    settings: Settings
    log: Log
    now: Callable[[], float]
    state: State
    images: ImageList
    progress: Progress
    trouble: Callable[[], str]
    lock: threading.Lock = field(default_factory=threading.Lock)
    heard: dict[str, str] = field(default_factory=dict)  # message -> reply, for repeats

    def recall(self, message_id: str) -> str | None:
        """Return the reply already given to a message, None for a new one."""
        if found := self.state.facts.seen.get(message_id):
            return found.reply
        return self.heard.get(message_id)

    def refusal(self, user: str) -> str:
        """Return what to say to somebody who is not in ALLOWED_USERS, "" for who may."""
        allowed = self.settings.ALLOWED_USERS
        if not allowed or user.lower() in allowed:
            return ""
        return "抱歉，您没有使用权限，请联系管理员把您的账号加入 `ALLOWED_USERS`"

    def answer(self, message: Message, channel: Channel, note: str = "") -> str:
        """Return the reply to a message, after all that it asks for is on disk.

        `note` is the reply to what cannot be read.
        """
        said = self.hear(message, channel, note)
        return said if isinstance(said, str) else said()

    def hear(self, message: Message, channel: Channel, note: str = "") -> Saying:
        """Return the reply at once, or where the disk is waited for what returns it then."""
        if (reply := self.recall(message.id)) is not None:
            return reply
        words = self.refusal(message.user) or note
        said: Saying = self._in_words(message, lambda: words or self._obey(message, channel))
        return said if isinstance(said, str) else lambda: self._in_words(message, said)

    def _in_words(self, message: Message, step: Callable[[], T]) -> T | str:
        """Return what step says, words kept for repeats. Here a bug in the chat becomes words."""
        said: T | str
        try:
            said = step()
        except Failure as failure:
            said = str(failure)
        except Exception:
            self.log.bug(f"message: id={shown(message.id)}")
            said = INTERNAL_ERROR
        if isinstance(said, str):
            with self.lock:
                while len(self.heard) >= MAX_REMEMBERED:
                    del self.heard[next(iter(self.heard))]
                self.heard[message.id] = said
        return said

    def _obey(self, message: Message, channel: Channel) -> Saying:
        """Return the reply to a message, or what queues its work; raise Failure."""
        reading = read_message(message.content)
        if reading.command == "status":
            return self.status(message.user)
        if reading.command == "list":
            return self._list()
        if reading.command == "help":
            return f"{reading.note}\n\n{HELP}".strip()
        begin = functools.partial(self._begin, reading)
        plan = self._cancel if reading.command == "cancel" else begin
        return functools.partial(self._accept, message, channel, plan)

    @staticmethod
    def _again(facts: Facts, user: str) -> Reading:
        """Return what failed of a person's last request; raise Failure for nothing.

        What of it has been asked for again, and has not ended yet, is left out.
        """
        last = facts.finished.get(user)
        begun = {item for task in facts.tasks if task.person == user for item in task.items}
        failed = [item for item in last.failed if item not in begun] if last else []
        if not failed:
            raise Failure("没有可以重试的：您上一个请求没有失败的项目")
        links = tuple(item for item in failed if re.match(r"(?i)https?://", item))
        images = tuple(read_image(item) for item in failed if item not in links)
        return Reading("", images, links)

    def _list(self) -> str:
        lines = self.images.read().decode(errors="replace").strip().replace("`", "'")
        return f"📋 今天的镜像列表：\n```\n{lines}\n```" if lines else "📋 今天的镜像列表是空的"

    # -- work

    def _accept(
        self, message: Message, channel: Channel, plan: Callable[[Facts, Message], Planned]
    ) -> str:
        """Make a change and return its reply, both on disk; a repeat gets the first one's reply.

        Raises Failure, as plan does.
        """
        reply, tasks = "", tuple[Task, ...]()

        def change(facts: Facts) -> Facts:
            nonlocal reply, tasks
            if said := facts.seen.get(message.id):  # the first is still being written
                reply = said.reply
                return facts
            facts, reply, tasks = plan(facts, message)
            facts = replace(facts, tasks=facts.tasks + tasks)
            facts = facts.with_letters(channel.confirm(message, reply, tasks))
            # It is valid for so long before and after its time stamp; repeats come within that.
            keep_seconds = max(REMEMBER_SECONDS, 2.0 * self.settings.CALLBACK_MAX_AGE)
            return facts.with_seen(message.id, self.now(), reply, keep_seconds)

        self.state.accept(change)
        for task in tasks:
            count, user = len(task.items), shown(message.user)
            self.log.info(f"{task.lane}: id={task.id} user={user} accepted={count}")
        return reply

    def _begin(self, reading: Reading, facts: Facts, message: Message) -> Planned:
        """Plan the tasks for which there is room; raise Failure where there is none."""
        if reading.command == "retry":
            reading = self._again(facts, message.user)
        prefix, request = self.settings.target_prefix, secrets.token_hex(8)
        lines = tuple(image.line for image in reading.images)
        targets = [f"`{image.line}` → `{image.target(prefix)}`" for image in reading.images]
        links = [quoted(link, 100) for link in reading.links]
        said: list[str] = []
        tasks, full = [], []
        for lane, items, entries in (("images", lines, targets), ("files", reading.links, links)):
            ahead, (name, work) = len(facts.lane(lane)), LANES[lane]
            what = f"（{name}）" if lines and links else ""
            if items and lane == "files" and not self.settings.QINGSTOR_ACCESS_KEY_ID:
                said.insert(0, "❌ 文件上传没有启用：请管理员设置 `QINGSTOR_ACCESS_KEY_ID` 等")
            elif items and ahead > self.settings.QUEUE_SIZE:
                full.append(what)
            elif items:
                tasks.append(Task(request, lane, message.address, items, self.now()))
                head = f"🔄 正在处理{name}{work}请求..."
                if ahead:
                    head = f"⏳ 已有任务正在处理中，已排队，前面还有 {ahead} 个{what}"
                first, *more = [f"{number}. {entry}" for number, entry in enumerate(entries, 1)]
                said += [f"\n{head}\n共 {len(items)} 个{name}：\n{first}", *more]
        if full:
            said.insert(0, f"⏳ 已有任务正在处理中，请稍后再试{''.join(full)}")
        note = split_text(reading.note, MAX_TEXT_BYTES // 2, 1)[0]
        reply = _fit("", said, MAX_TEXT_BYTES - len(note.encode()), "个").strip() + note
        if not tasks:
            raise Failure(reply)
        return facts, reply, tuple(tasks)

    @staticmethod
    def _cancel(facts: Facts, message: Message) -> Planned:
        """Cancel what is this person's; raise Failure for nothing."""
        own = [task for task in facts.tasks if task.person == message.user]
        left = [task for task in own if task.id not in facts.cancelled]
        if not left:
            nothing = "没有可以取消的：您没有正在进行或排队的请求"
            raise Failure("⏹ 正在停止，请稍候" if own else nothing)
        lines = ["⏹ 已取消您的请求："]
        for task in left:
            if task in facts.lane(task.lane)[1:]:
                lines.append(f"不再排队：{title(task, True)}")
                facts = facts.without_task(task)
            else:  # it has begun, or is about to
                lines.append(f"正在停止：{title(task, True)}")
                facts = replace(facts, cancelled=(*facts.cancelled, task.id))
        lines.append("已经完成的镜像不会撤回，结果照常通知")
        return facts, "\n".join(lines), ()

    # -- looking

    def status(self, person: str) -> str:
        """Return what runs, what waits and how far, as far as it is this person's business."""
        facts, lines = self.state.facts, ["📊 当前状态"]
        for lane, (name, _) in LANES.items():
            tasks = facts.lane(lane)
            lines += [] if tasks else [f"{name}：空闲"]
            for ahead, task in enumerate(tasks):
                what = title(task, task.person == person)
                if ahead == 0:
                    since = self.progress.of(task).since or time.monotonic()
                    used = duration(time.monotonic() - since)
                    lines.append(f"{name}：进行中 {what}，已用 {used}，等待 {len(tasks) - 1} 个")
                    lines.append(progress_text(task, self.progress))
                elif task.person == person:
                    lines.append(f"　您的 {what}：前面还有 {ahead} 个")
        if late := facts.late():
            lines.append(f"超时后仍在跟踪：{len(late)} 个")
        for task in (task for task in late if task.person == person):
            lines += [f"　您的 {title(task, True)}：", progress_text(task, self.progress)]
        if trouble := self.trouble():
            lines.append(f"⚠️ {trouble}")
        result = "还没有"
        if last := facts.finished.get(person):
            result = f"{time.strftime('%m-%d %H:%M', time.localtime(last.at))} {last.title}"
        return "\n".join([*lines, f"您的上一个结果：{result}"])


# ================================================================================================
# V. The lanes: what is done about accepted requests. Each step is one change of the facts.
# May: call the edges, change the facts, queue letters. Never: know how a message arrived or in
# which form an answer leaves; do what a restart could not go on from.
# ================================================================================================


class App:
    """The parts of a service; each owns its own state and lock. Making it begins nothing."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        now: Callable[[], float],  # seconds since the epoch
        sleep: Callable[[float], None],
    ) -> None:
        self.settings, self.log = settings, log
        self.now, self.sleep = now, sleep
        self.network = Network(settings, log)
        self.github = GitHub(settings, self.network, log, sleep)
        has_store = settings.QINGSTOR_ACCESS_KEY_ID
        self.store = QingStor(settings, self.network, log, sleep) if has_store else None
        folder = Path(settings.STATE_DIR)
        self.images, self.state = ImageList(folder, log), State(folder, log)
        self.progress = Progress()
        self.chat = Chat(settings, log, now, self.state, self.images, self.progress, self.trouble)
        self.channels: dict[str, Channel] = {}
        self.posts: dict[str, Post] = {}
        self.list_lock = threading.Lock()  # held while an image request runs; midnight waits for it
        self.started = time.monotonic()

    def channel(self, address: str) -> Channel:
        """Return the channel of an address; where it has been turned off, any other one."""
        name = split_address(address)[1]
        return self.channels.get(name) or next(iter(self.channels.values()))

    def trouble(self) -> str:
        """Return what is wrong now, "" for nothing."""
        own: list[Any] = [self.state, self.images, self.github]
        parts = [*own, *self.channels.values(), *self.posts.values()]
        return next((part.trouble for part in parts if part.trouble), "")


# ---- The post: messages on their way, one Post a channel ---------------------------------------
# Letters stand on disk in the order in which they were written and leave it when they were taken.


class Pace:
    """How many messages may go to one address: token buckets of (burst, seconds for one more)."""

    def __init__(self, buckets: Sequence[tuple[float, float]]) -> None:
        self._buckets = buckets
        self._lock = threading.Lock()
        self._full: dict[str, list[float]] = {}  # when each bucket is full again (monotonic)

    def wait_seconds(self, address: str, spare: float = 0.0) -> float:
        """Return the seconds until a message may go that leaves `spare` tokens."""
        now = time.monotonic()
        pairs = zip(self._buckets, self._full.get(address, []), strict=False)
        waits = [at - now - (burst - 1 - spare) * each for (burst, each), at in pairs]
        return max([0.0, *waits])

    def take(self, address: str, tokens: float = 1.0) -> None:
        """Count a message that has just arrived."""
        with self._lock:
            now = time.monotonic()
            before = self._full.get(address, [now] * len(self._buckets))
            pairs = zip(self._buckets, before, strict=True)
            full = [max(now, at) + tokens * each for (_, each), at in pairs]
            others = {k: v for k, v in self._full.items() if k != address}
            self._full = newest({**others, address: full}, MAX_REMEMBERED)


class Post:
    """Sends a channel's letters: for each address in order, the oldest first, at its pace.

    What fails for everybody holds up all, and is tried again every minute at least, or when a sign
    of life comes; an odd errcode holds up only its address. Lists (long replies) give way.
    """

    def __init__(self, app: App, channel: Channel) -> None:
        self._app = app
        self._channel = channel
        self._name = channel.name or "wecom"
        self.pace = Pace(channel.pace())
        self._busy: set[str] = set()  # addresses; this and the next one under state.changed
        # Of an address, or of "" for what meets all: when to try again (monotonic), tries in vain.
        self._not_before: dict[str, float] = {}
        self._tries: dict[str, int] = {}
        self.dropped = 0  # messages given up since the start
        self.trouble = ""  # until a message goes again
        for address in {letter.address for letter in app.state.facts.letters}:
            # It may have got as many as it may just before a restart.
            self.pace.take(address, channel.pace()[0][0])

    def sign_of_life(self, address: str = "") -> None:
        """Try at once what an outage or an errcode holds up: the other side was just heard.

        But not what is held up for hours, as after a wrong secret.
        """
        for who in ("", address):
            if 0 < self._not_before.get(who, 0.0) - time.monotonic() <= ODD_SECONDS:
                with self._app.state.changed:
                    self._not_before.pop(who, None)
                    self._app.state.changed.notify_all()

    def _next(self) -> Letter:
        """Wait for a message that may go now and return it, its address marked as busy."""
        app, state = self._app, self._app.state
        with state.changed:
            while True:
                passed, wait = set(self._busy), None
                for letter in sorted(state.facts.letters, key=lambda a: a.is_list):
                    address = letter.address
                    if address in passed or app.channel(address) is not self._channel:
                        continue
                    until = max(self._not_before.get(who, 0.0) for who in ("", address))
                    seconds = max(until - time.monotonic(), self.pace.wait_seconds(address))
                    if seconds <= 0:
                        self._busy.add(address)
                        return letter
                    passed.add(address)
                    wait = min(seconds, wait or seconds)
                state.changed.wait(wait)

    def step(self) -> None:
        """Send one message, or note why it could not be sent."""
        letter = self._next()
        try:
            self._try(letter)
        finally:
            with self._app.state.changed:
                self._busy.discard(letter.address)
                self._app.state.changed.notify_all()

    def _try(self, letter: Letter) -> None:
        """Send a message, and forget it once it was sent or is given up."""
        try:
            self._channel.send(letter)
        except Failure as failure:
            if not self._failed(letter, failure):
                return
        else:
            self.trouble = ""
        self.pace.take(letter.address)
        for who in ("", letter.address):
            self._tries.pop(who, None)
            self._not_before.pop(who, None)
        # A crash before it is written sends the letter again, whether it is waited for or not.
        self._app.state.change(lambda facts: facts.without_letter(letter), is_waiting=False)

    def _failed(self, letter: Letter, failure: Failure) -> bool:
        """Note a failure; tell whether the message is given up."""
        is_odd = isinstance(failure, ChannelError) and not failure.is_known
        least = failure.pause_seconds if isinstance(failure, ChannelError) else 0.01
        who, most = (letter.address, ODD_SECONDS) if is_odd else ("", OUTAGE_SECONDS)
        tries = self._tries[who] = self._tries.get(who, 0) + 1
        if not least or (is_odd and tries > KEEP_TRIES):
            self.dropped += 1
            self.trouble = f"有 {self.dropped} 条消息没有送到，已丢弃"
            self._app.log.error(f"{self._name}: {failure}；给 {shown(letter.address)} 的消息已丢弃")
            return True
        self.trouble = str(failure)
        pause = max(least, min(most, 2.0 ** min(tries, 10)))
        self._app.log.warning(f"{self._name}: {failure}；{pause:.0f} 秒后重试")
        self._not_before[who] = time.monotonic() + pause
        return False


# ---- What ends a request -----------------------------------------------------------------------
# Done, failed or cancelled, a task ends by `finish`: the task goes and its letters come in one line
# of the journal, so that no crash can do the one without the other.


def finish(
    app: App, task: Task, text: str, mark: str, end: str, failed: Sequence[str], item: str = ""
) -> None:
    """In one change: queue the final message and drop the task (or just the one item of it).

    `mark` is what makes the message unlike any other, `end` says in a few words what came of it.
    The upload of an item that has not failed is stored, any other in the task an orphan:
    `keep_settling` drops it. The rest of a task goes behind those of others.
    """
    channel = app.channel(task.user)
    letters = channel.ending(task.id, channel.letters(task.user, text, mark))
    done = task._replace(items=(item,)) if item else task
    at, what = app.now(), f"{LANES[task.lane][0]} {title(done, True)}：{end}"

    def change(facts: Facts) -> Facts:
        current = facts.task(task.id, task.lane)
        if current is None:  # cancelled while it waited
            return facts
        facts = facts.with_letters(letters).with_result(task, at, what, failed)
        if current.upload and (failed or not item):
            facts = replace(facts, orphans=(*facts.orphans, Upload(*current.upload)))
        items = tuple(other for other in current.items if item and other != item)
        if not items:
            return facts.without_task(task)
        others = [t for t in facts.tasks if t is not current]
        rest = current._replace(items=items, upload=(), deaths=0)
        return replace(facts, tasks=(*others, rest))

    app.state.change(change)
    app.progress.end(task)


def advance(app: App, task: Task, **changes: Any) -> None:
    """Change fields of a task; on disk on return."""
    app.state.change(lambda facts: facts.with_task(task, **changes))


def stop_if_cancelled(app: App, task: Task) -> None:
    """Raise Failure where the person does not want the request any more."""
    if app.state.is_cancelled(task):
        raise Failure("已取消")


def fail(app: App, task: Task, why: str, can_retry: bool) -> None:
    """Tell the person that the images as a whole, or the first link, failed."""
    items, item = task.items, ""
    head = f"镜像同步失败，成功 0 / {len(items)}"
    if task.lane == "files":
        items, item, head = items[:1], items[0], "文件上传失败"
    run = f"\n运行：{task.run_url}" if task.run_url else ""
    retry = f"；{RETRY}" if can_retry else ""
    names = [quoted(name, 300) for name in items]
    text = _fit(f"❌ {head}\n{why}{retry}{run}\n", names, MAX_TEXT_BYTES - 100, "个")
    finish(app, task, text, f"{task.id} {item}", "失败", items, item)


def attempt(app: App, task: Task, step: Callable[[App, Task], object]) -> None:
    """Do a step of a task: this is where a task's trouble becomes a message."""
    try:
        step(app, task)
        return
    except Failure as failure:
        why, can_retry = str(failure), isinstance(failure, Unreachable)
        app.log.warning(f"{task.lane}: id={task.id} {failure}")
    except Exception:
        why, can_retry = INTERNAL_ERROR, False
        app.log.bug(f"{task.lane}: id={task.id}")
    task = app.state.facts.task(task.id, task.lane) or task
    if app.state.is_cancelled(task) and not task.run_id:
        text = f"⏹ 已取消{LANES[task.lane][1]}：{title(task, True)}"
        finish(app, task, text, task.id, "已取消", ())
    else:
        fail(app, task, why, can_retry)


# ---- Images ------------------------------------------------------------------------------------
# queued -> running (-> late). A restart looks whether what is queued has been started already,
# before it is done again.


def start_run(app: App, task: Task) -> Run:
    """Commit the list and return a new run, looked for where a call for it got lost."""
    stop_if_cancelled(app, task)
    content = app.images.add(task.items)
    more = f" (+{len(task.items) - 1})" if len(task.items) > 1 else ""
    app.github.upload_list(content, f"wxsync: {task.items[0]}{more} [skip ci]")
    for _ in range(TRIES):
        stop_if_cancelled(app, task)
        try:
            return app.github.dispatch(task.items, task.id)
        except Unreachable as error:
            app.log.warning(f"github: {error}；查找是否已经启动")
        if run := app.github.find_run(task.id):
            return run
    raise Unreachable("GitHub 没有回应，任务没有启动，请稍后重发")


def finish_images(app: App, task: Task, outcomes: list[Outcome], seconds: float) -> None:
    """Tell what came of a run that has ended."""
    text = result_text(outcomes, app.settings.target_prefix, seconds, task.run_url)
    failed = [outcome.line for outcome in outcomes if not outcome.is_done]
    done = len(outcomes) - len(failed)
    app.log.info(f"images: id={task.id} done={done} of={len(outcomes)} seconds={seconds:.0f}")
    finish(app, task, text, task.run_url, f"成功 {done} / {len(outcomes)}", failed)


def cancel_run(app: App, task: Task) -> None:
    """Ask GitHub to cancel a run; where it does not, say so."""
    try:
        app.github.cancel(task.run)
    except Failure as failure:
        text = f"❌ 取消没有成功：{failure}\n运行还在继续，结果照常通知\n{task.run_url}"
        letters = app.channel(task.user).letters(task.user, text, f"cancel {task.id}")
        app.state.change(lambda facts: facts.with_letters(letters))


def look(app: App, task: Task, work: Work) -> None:
    """Look once at a run, now and then at its jobs; tell the result. Raises Failure.

    That is when the run has ended, or after WATCH_SECONDS, and its jobs have as well: their list
    lags behind the run.
    """
    now, seconds = time.monotonic(), None
    if is_counted := now >= work.next_count:
        work.next_count = now + JOBS_SECONDS
        work.outcomes = app.github.outcomes(task.run, task.items)
    # While a job runs its run is not asked for: that would be a call more.
    if not is_counted or not any(outcome.is_open for outcome in work.outcomes):
        seconds = app.github.run_seconds(task.run)
    if seconds is None and now - work.since > WATCH_SECONDS:
        seconds = WATCH_SECONDS
    if seconds is not None:
        work.outcomes = app.github.outcomes(task.run, task.items)
        is_open = any(outcome.is_open for outcome in work.outcomes)
        work.open_looks += is_open
        if not is_open or work.open_looks * POLL_SECONDS >= SETTLE_SECONDS:
            finish_images(app, task, work.outcomes, seconds)


def begun(app: App, task: Task) -> Work:
    """Return the Work of a task that is worked on; after a restart only the clock knows since when.

    (Task.started is the run's; what had none begins now.)
    """
    work = app.progress.of(task)
    age_seconds = max(0.0, app.now() - (task.started or app.now()))
    work.since = work.since or time.monotonic() - min(age_seconds, WATCH_SECONDS)
    return work


def tell_late(app: App, task: Task) -> None:
    """Where a request has outlived SYNC_TIMEOUT, waiting for GitHub included: say so, once.

    The lane lets go of it in the same change, if it has a run.
    """
    work, letters = app.progress.of(task), list[Letter]()
    age_seconds = time.monotonic() - work.since if work.since else 0.0
    is_known = task.stage == "late" or (work.is_told and not task.run_id)
    is_gone = app.state.facts.task(task.id, task.lane) is None
    if is_known or is_gone or age_seconds < app.settings.SYNC_TIMEOUT:
        return
    if not work.is_told:
        work.is_told = True
        if task.run_id:
            with contextlib.suppress(Failure):
                work.outcomes = app.github.outcomes(task.run, task.items)
        channel = app.channel(task.user)
        where = task.run_url or "（还在等 GitHub，没有开始运行）"
        text = f"{LATE}\n{where}\n\n{living_text(task, app.progress)}"
        text = split_text(text, channel.limit_bytes - 200, 1, "个")[0]
        letters = channel.letters(task.user, text, task.run_url or f"late {task.id}")[:1]
        letters = channel.ending(task.id, letters)
    stage = "late" if task.run_id else task.stage
    app.state.change(lambda facts: facts.with_task(task, stage=stage).with_letters(letters))


def sync_images(app: App, task: Task) -> None:
    """Run one image request from where it stands, and wait for its run; raise Failure."""
    with app.list_lock:
        app.github.patience_seconds = GITHUB_WAIT_SECONDS
        if not task.run_id:
            is_old = task.id in app.state.resumed
            if is_old and (run := app.github.find_run(task.id)):
                app.images.add(task.items)  # a full disk may not have taken it
            else:
                run = start_run(app, task)
            app.log.info(f"images: id={task.id} run={run.id}")
            found = {"run_id": run.id, "run_url": run.url, "started": app.now()}
            advance(app, task, stage="running", **found)
        # It is followed beside the lane, until it ends or takes long.
        app.state.wait_for(lambda facts: all(t.id != task.id for t in facts.lane("images")))


def follow(app: App, task: Task) -> None:
    """Look once at a run; raise Failure where it is given up."""
    work = begun(app, task)
    if app.state.is_cancelled(task) and not work.is_cancelled:
        work.is_cancelled = True
        cancel_run(app, task)
    try:
        look(app, task, work)
        work.odd_looks = 0
    except Failure as failure:
        # A line that is bad or a limit passes; a run may be unknown (404) for some seconds after it
        # was started, a token refused once. What is odd again and again does not.
        work.odd_looks += not isinstance(failure, Unreachable) and failure.status != 429
        if work.odd_looks > ODD_ANSWERS or time.monotonic() - work.since > WATCH_SECONDS:
            raise
        app.log.debug(f"github: {failure}")


def follow_runs(app: App, which: Callable[[Facts], tuple[Task, ...]]) -> None:
    """Look once at the runs of these tasks, and at the clock."""
    tasks = app.state.wait_for(which)
    began = time.monotonic()
    for task in tasks:
        if task.run_id:
            attempt(app, task, follow)
        tell_late(app, task)
    app.sleep(max(POLL_SECONDS / 4, POLL_SECONDS - (time.monotonic() - began)))


# ---- Files -------------------------------------------------------------------------------------
# One part is read while the one before it is written; three are in memory at most. The key is on
# disk before the first byte is stored under it.


def upload_file(app: App, store: QingStor, task: Task) -> tuple[Upload, int]:
    """Stream the first link into the bucket; return what it is there, and its size in bytes."""
    from concurrent.futures import Future, ThreadPoolExecutor, wait  # 5 ms at start

    deadline = time.monotonic() + DOWNLOAD_SECONDS

    def awaited(reading: Future[T]) -> T:
        """Return what the source gives, unless nobody wants it any more or it takes too long."""
        end, is_done = min(deadline, time.monotonic() + PART_SECONDS), False
        while not is_done:
            is_done = bool(wait([reading], 1.0).done)
            stop_if_cancelled(app, task)
            if time.monotonic() > end:
                raise Unreachable("下载中断：传输太慢，请换一个链接或稍后再试")
        return reading.result()

    vet = app.settings.DANGEROUSLY_ALLOW_PRIVATE_URLS != "1"
    source = Download(app.network, task.items[0], vet, app.settings.MAX_FILE_MB * 2**20)
    # The source is closed first: the pool waits for its thread.
    with ThreadPoolExecutor(1) as pool, contextlib.closing(source):
        awaited(pool.submit(source.open))
        kind, work = source.content_type, app.progress.of(task)
        upload = Upload(make_key(source.name, f"{task.id} {task.items[0]}"), "", source.name)
        advance(app, task, upload=tuple(upload))
        work.total_bytes = source.total_bytes or 0
        parts, count, size_bytes = source.parts(), 0, 0
        coming = pool.submit(next, parts, None)
        while (part := awaited(coming)) is not None:
            coming = pool.submit(next, parts, None)
            size_bytes += len(part)
            if count == 0 and len(part) < PART_BYTES:
                store.put(upload.key, part, kind)
                return upload, size_bytes
            if count == 0:
                upload = upload._replace(upload_id=store.initiate(upload.key, kind))
                advance(app, task, upload=tuple(upload))
            store.put_part(upload, count, part)
            count += 1
            work.done_bytes = size_bytes
        store.complete(upload, count)
    return upload, size_bytes


def relay_file(app: App, task: Task) -> None:
    """Bring the first link of a file request into the bucket and tell the person; raise Failure."""
    store = app.store
    if store is None:
        raise Failure("没有设置 QingStor，文件功能已关闭")
    upload = Upload(*task.upload) if task.upload else None  # of a process before this one
    size_bytes = store.size_bytes(upload.key) if upload else None
    if upload is None or size_bytes is None:
        if upload:
            store.drop(upload)
        if task.deaths >= MAX_DEATHS:
            raise Failure("传输时服务多次异常退出，不再尝试，请联系管理员查看日志")
        try:
            upload, size_bytes = upload_file(app, store, task)
        except Failure:
            current = app.state.facts.task(task.id, task.lane)
            with contextlib.suppress(Failure):  # then `keep_settling` goes on trying
                if current and current.upload:  # who is told finds nothing in the bucket
                    store.drop(Upload(*current.upload))
            raise
    link = store.link(upload.key, app.now())
    text = (
        f"✅ 文件上传成功！\n\n文件名: `{shown(upload.name, 150)}`\n文件大小: {size_bytes} 字节\n"
        f"存储桶: {app.settings.QINGSTOR_BUCKET}\n下载链接: {link}"
    )
    app.log.info(f"files: id={task.id} bytes={size_bytes} key={upload.key}")
    finish(app, task, text, upload.key, "成功", (), task.items[0])


def keep_settling(app: App) -> None:
    """Drop what failed uploads have left behind; what cannot be dropped is tried every minute."""
    for orphan in app.state.wait_for(lambda facts: facts.orphans):
        try:
            if app.store:
                app.store.drop(orphan)
        except Failure as failure:
            app.log.warning(f"files: 清理未完成的上传失败，稍后再试：{failure}")
            continue

        def change(facts: Facts, gone: Upload = orphan) -> Facts:
            return replace(facts, orphans=tuple(o for o in facts.orphans if o != gone))

        app.state.change(change)
    if app.state.facts.orphans:
        app.sleep(CLOCK_LOOK_SECONDS)


# ---- A lane, midnight --------------------------------------------------------------------------
# A lane is a thread that takes the oldest task and brings it to its end. Midnight waits for the
# images' lane and holds it up only while it uploads the list.


def work(app: App, lane: str) -> None:
    """Do one task of a lane, or the first part of one."""
    task = app.state.wait_for(lambda facts: app.state.ready(lane))[0]
    begun(app, task)
    attempt(app, task, sync_images if lane == "images" else relay_file)


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
        if uploaded := app.images.read():
            app.github.patience_seconds = MIDNIGHT_WAIT_SECONDS
            app.github.upload_list(uploaded, f"wxsync: 每日列表 {day} [skip ci]")
            app.images.remove(uploaded)
    app.log.info(f"midnight: 列表已上传并清空 day={day}")


def keep_midnight(app: App) -> float:
    """Do midnight's work if a day has begun since it was done; return the seconds to wait."""
    now, last = app.now(), app.state.facts.midnight
    app.images.save()
    try:
        if last and last < day_of(now):
            empty_list(app, last)
            now = app.now()
    except Failure as failure:
        app.log.warning(f"midnight: {failure}；{MIDNIGHT_RETRY_SECONDS:.0f} 秒后重试")
        return MIDNIGHT_RETRY_SECONDS
    # The list is today's now, as it is at the first start and where the clock has been ahead.
    if last != (today := day_of(now)):
        app.state.change(lambda facts: replace(facts, midnight=today))
    # In short steps, for a clock that is set meanwhile does not end a long one.
    return min(CLOCK_LOOK_SECONDS, seconds_to_midnight(now))


# ================================================================================================
# VI. Transports: how messages arrive and answers leave: the callback over HTTP, the robot over a
# WebSocket. May: decode, decrypt, ask the chat, encode. Never: understand what was typed, touch
# the facts but through the chat; let what a stranger sends end the service.
# ================================================================================================

# ---- The HTTP server ---------------------------------------------------------------------------
# http.server reads heads; holding connections is done here, since a thread for each of 100 busy
# ones took one and a half times the CPU that Flask takes, and one thread for all of them half of
# it.


class Head(http.server.BaseHTTPRequestHandler):
    """The head of one request, read by http.server; constructing it may raise Rejected."""

    protocol_version = "HTTP/1.1"  # connections are kept

    def __init__(self, data: bytes) -> None:
        # Not the base class's: it would read from a socket, and answer.
        self.rfile, self.wfile = io.BytesIO(data), io.BytesIO()
        self.raw_requestline = self.rfile.readline(MAX_HEAD_BYTES)
        try:
            is_whole = self.parse_request() and self.request_version != "HTTP/0.9"
        except (ValueError, LookupError):  # a header that the email parser chokes on
            is_whole = False
        if not is_whole:
            raise Rejected(400, "request line or headers")
        self.continued = self.wfile.getvalue()  # "100 Continue", where it was asked for
        # The email parser stops at a name with a blank behind it: what follows would not count.
        if self.headers.defects or any(name != name.strip() for name in self.headers):
            raise Rejected(400, "odd header")
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
    """What goes back for one HTTP request."""

    status: int
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"


# What answers a request: at once, or where the disk is waited for a function that waits.
Answering = Reply | Callable[[], Reply]


class Connection:
    """What one client has sent and not been answered yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.data = b""
        self.head: Head | None = None
        self.deadline = time.monotonic() + REQUEST_SECONDS
        self.is_done = False  # what still comes is thrown away

    def next_request(self) -> tuple[Head, bytes] | None:
        """Return the next whole request, None while there is none; raise Rejected, OSError.

        Empty lines before it are skipped and bare line feeds accepted (RFC 9112, 2.2).
        """
        if self.head is None:
            self.data = self.data.lstrip(b"\r\n")
            found = re.search(rb"\n\r?\n", self.data)
            if (found.end() if found else len(self.data)) > MAX_HEAD_BYTES:
                raise Rejected(400, "head too large")
            if not found:
                return None
            self.head, self.data = Head(self.data[: found.end()]), self.data[found.end() :]
            if self.head.continued and len(self.data) < self.head.body_bytes:
                self.sock.send(self.head.continued)
        head, need = self.head, self.head.body_bytes
        if len(self.data) < need:
            return None
        body, self.data, self.head = self.data[:need], self.data[need:], None
        return head, body


class Server:
    """One thread that holds every connection and answers whole requests as they come.

    An answer takes a millisecond (the longest paste half a second), so slow or silent clients cost
    a buffer each and nothing else; what waits for the disk does so in a thread of its own. Number
    and time of both are bounded.
    """

    def __init__(
        self, address: tuple[str, int], answer: Callable[[str, str, bytes], Answering], log: Log
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
        self._left: list[Connection] = []  # with more requests than fitted into their turn
        self._waiting = 0  # for the disk, a thread each
        self._replies: deque[tuple[Connection, Head, Reply]] = deque()

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
            for key, _ in self._selector.select(0.0 if self._left else timeout):
                if key.fileobj is self._wake:
                    if self._wake.recv(MAX_CONNECTIONS).strip(b"\0"):
                        return  # the number of a signal
                    self._send_waiting()
                elif key.fileobj is self._listener:
                    self._accept()
                elif (
                    connection := self._open.get(key.fileobj)  # type: ignore[call-overload]
                ) and connection not in self._left:
                    self._go_on(connection, functools.partial(self._receive, connection))
            left, self._left = self._left, []
            for connection in left:
                if connection.sock in self._open:
                    self._go_on(connection)
            now = time.monotonic()
            while self._open and (first := next(iter(self._open.values()))).deadline <= now:
                self._drop(first)

    def _accept(self) -> None:
        for _ in range(64):
            try:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: the oldest connection has to go
                self._log.warning(f"server: {error.strerror}")
                time.sleep(0.1)
                if self._open:
                    self._drop(next(iter(self._open.values())))
                return
            most = MAX_CONNECTIONS if os.name == "posix" else 400  # select on Windows takes 512
            if self._open and len(self._open) + self._waiting >= most:
                self._drop(next(iter(self._open.values())))
            self._hold(Connection(sock))

    def _hold(self, connection: Connection) -> None:
        """Give a connection the time for one request; the newest deadline stands last."""
        connection.deadline = time.monotonic() + REQUEST_SECONDS
        if self._open.pop(connection.sock, None) is None:
            self._selector.register(connection.sock, selectors.EVENT_READ)
        self._open[connection.sock] = connection

    def _let_go(self, connection: Connection) -> None:
        del self._open[connection.sock]
        self._selector.unregister(connection.sock)

    def _drop(self, connection: Connection) -> None:
        self._let_go(connection)
        connection.sock.close()

    def _go_on(self, connection: Connection, step: Callable[[], None] = lambda: None) -> None:
        """Do a step for a connection and answer its requests; drop it where it breaks."""
        try:
            step()
            self._answer_some(connection)
        except OSError:
            self._drop(connection)

    def _receive(self, connection: Connection) -> None:
        """Take what has come; raise OSError at the end."""
        data = connection.sock.recv(MAX_BODY_BYTES)
        if not data:
            raise ConnectionResetError
        connection.data += b"" if connection.is_done else data

    def _answer_some(self, connection: Connection) -> None:
        """Answer whole requests until none is left, one waits for the disk, or others have to.

        Raises OSError.
        """
        try:
            for _ in range(ANSWERS_IN_A_ROW):
                if connection.is_done or not (request := connection.next_request()):
                    return
                head, body = request
                reply = self._answer(head.command, head.path, body)
                if not isinstance(reply, Reply):
                    self._wait_for(connection, head, reply)
                    return
                self._send(connection, reply, head.close_connection)
            self._left.append(connection)
        except Rejected as refusal:
            self._send(connection, Reply(refusal.status), True)

    def _wait_for(self, connection: Connection, head: Head, answer: Callable[[], Reply]) -> None:
        """Have a reply made in a thread; what the disk takes is not the client's time."""

        def wait() -> None:
            self._replies.append((connection, head, answer()))
            with contextlib.suppress(OSError):  # full: it wakes up anyhow
                self._waker.send(b"\0")

        try:
            threading.Thread(target=wait, daemon=True).start()
        except RuntimeError as error:
            raise OSError("no more threads") from error
        self._let_go(connection)
        self._waiting += 1

    def _send_waiting(self) -> None:
        while self._replies:
            connection, head, reply = self._replies.popleft()
            self._waiting -= 1
            self._hold(connection)
            close = head.close_connection
            self._go_on(connection, functools.partial(self._send, connection, reply, close))

    def _send(self, connection: Connection, reply: Reply, close: bool) -> None:
        """Write a reply in one go; a client that does not take it loses the connection (OSError).

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
            connection.is_done = True
            connection.sock.shutdown(socket.SHUT_WR)
        self._hold(connection)

    def close(self) -> None:
        """Stop listening and drop every connection."""
        for connection in list(self._open.values()):
            self._drop(connection)
        self._listener.close()


# ---- WeCom's callback --------------------------------------------------------------------------
# Parameters, signature, age, decryption, sender, in this order; only then is anything read.


class Texts(Channel):
    """WeCom's application: passive replies at once, the rest by message/send."""

    def __init__(self, wecom: WeCom) -> None:
        self.wecom = wecom

    def send(self, letter: Letter) -> None:
        self.wecom.send(split_address(letter.address)[0], letter.text)


class Posted(NamedTuple):
    """A decrypted callback."""

    message: Message
    kind: str  # MsgType


def read_posted(data: bytes) -> Posted:
    """Return the message in a decrypted document; raise Rejected 400 when there is no sender."""
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
    return Posted(Message(user, user, content, message_id), values.get("msgtype", ""))


class Callback:
    """Answers requests: verification, messages, health. Knows crypto and envelopes, no words."""

    PATH = "/wechat/callback"

    def __init__(self, app: App, crypto: Crypto | None) -> None:
        self._app = app
        self._crypto = crypto  # None: the robot alone

    def answer(self, method: str, path: str, body: bytes) -> Answering:
        """Return the Reply to one request, or what makes it when the disk has been waited for."""
        return self._guard(lambda: self._route(method, path, body))

    def _guard(self, step: Callable[[], T]) -> T | Reply:
        """Return what step does, now or later. This is where a bug becomes an answer."""
        try:
            return step()
        except Rejected as refusal:
            self._app.log.debug(f"server: status={refusal.status} {refusal}")
            return Reply(refusal.status)
        except Exception:
            self._app.log.bug("server")
            return Reply(500)

    def _route(self, method: str, path: str, body: bytes) -> Answering:
        address, _, query = path.partition("?")
        if (method, address) == ("GET", "/health"):
            return Reply(200, json.dumps(self._health()).encode(), "application/json")
        crypto = self._crypto
        if address != self.PATH or method not in ("GET", "POST") or crypto is None:
            raise Rejected(404, "path")
        try:
            values = dict(urllib.parse.parse_qsl(query, max_num_fields=20))
        except ValueError as error:
            raise Rejected(400, "query") from error
        if method == "GET":
            # An unescaped "+" has become a space on the way; base64 has no spaces.
            encrypted = values.get("echostr", "").replace(" ", "+")
            self._check(crypto, values, encrypted)
            echo = crypto.decrypt(encrypted)
            if not re.fullmatch(rb"[\w-]{1,128}", echo):  # a recorded message, to be decrypted
                raise Rejected(403, "echostr")
            return Reply(200, echo)
        envelope, as_json = read_fields(body)
        encrypted = envelope.get("encrypt", "")
        self._check(crypto, values, encrypted)
        return self._reply(crypto, read_posted(crypto.decrypt(encrypted)), as_json)

    def _check(self, crypto: Crypto, values: Mapping[str, str], encrypted: str) -> None:
        """Raise Rejected where a request is not WeCom's or not of these minutes."""
        given, timestamp = values.get("msg_signature", ""), values.get("timestamp", "")
        nonce = values.get("nonce", "")
        if not (given and nonce and encrypted and re.fullmatch(r"[0-9]{1,12}", timestamp)):
            raise Rejected(400, "parameters")
        if not crypto.is_signed(given, timestamp, nonce, encrypted):
            raise Rejected(403, "signature")
        limit = self._app.settings.CALLBACK_MAX_AGE
        if limit and abs(self._app.now() - int(timestamp)) > limit:
            self._app.log.warning("server: 回调的时间戳与本机时钟相差过大，已拒绝（核对本机时钟）")
            raise Rejected(403, "stale")

    def _reply(self, crypto: Crypto, posted: Posted, as_json: bool) -> Answering:
        """Return the passive reply to a message."""
        app, message = self._app, posted.message
        if message.user == app.settings.CORP_ID:  # our own reply, sent back to us
            raise Rejected(403, "sender")
        channel, post = app.channels[""], app.posts[""]
        post.sign_of_life(message.address)
        if posted.kind == "event":
            return Reply(200)
        is_new = app.chat.recall(message.id) is None

        def say(text: str) -> Reply:
            reply = channel.render(text)
            if len(reply.encode()) > channel.limit_bytes:
                first, *rest = channel.letters(message.address, text, message.id)
                reply = first.text  # marked: no duplicate of an older one
                if is_new:
                    app.state.change(lambda facts: facts.with_list(rest), is_waiting=False)
            now = app.now()
            inner = {"ToUserName": message.user, "FromUserName": app.settings.CORP_ID}
            inner |= {"CreateTime": str(int(now)), "MsgType": "text", "Content": reply}
            kind = "application/json" if as_json else "application/xml"
            return Reply(200, seal(crypto, inner, as_json, now), kind)

        said = app.chat.hear(message, channel, "" if posted.kind == "text" else ONLY_TEXT)
        return say(said) if isinstance(said, str) else lambda: self._guard(lambda: say(said()))

    def _health(self) -> dict[str, Any]:
        app = self._app
        lanes = [len(app.state.facts.lane(lane)) for lane in ("images", "files")]
        proxy, robot = app.network.proxy_state, app.channels.get("robot")
        bot = "off" if robot is None else "down" if robot.trouble else "up"
        return {
            "status": "degraded" if proxy == "down" or app.trouble() else "ok",
            "version": VERSION,
            "uptime_seconds": int(time.monotonic() - app.started),
            "running": sum(min(ahead, 1) for ahead in lanes),
            "queued": sum(max(0, ahead - 1) for ahead in lanes),
            "dropped": sum(post.dropped for post in app.posts.values()),
            "proxy": proxy,
            "bot": bot,
        }


# ---- WebSocket (RFC 6455), the client's side ---------------------------------------------------
# Masked frames out, every kind of frame in, no extensions, every length bounded before it is
# believed.

WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


class WebSocket:
    """One connection. One thread reads; any may write, a whole frame at a time. OpenSSL wants one
    call at a time: the reader waits outside of the lock, a writer for ACK_SECONDS in it."""

    def __init__(self, wire: Wire, early: bytes) -> None:
        self._sock = wire.link
        self._wire = wire
        self._lock = threading.Lock()
        self._data = bytearray(early)
        self._message = bytearray()  # fragments

    @classmethod
    def connect(cls, network: Network, address: str) -> WebSocket:
        """Return an open WebSocket; raise Unreachable."""
        url = parse_url(re.sub("^ws", "http", address))
        wire = network.open(url, proxied=False)
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        digest = hashlib.sha1((key + WEBSOCKET_GUID).encode(), usedforsecurity=False).digest()
        accept = base64.b64encode(digest).decode()
        headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": key}
        try:
            with cut_off(wire.link, CONNECT_SECONDS):
                response = wire.ask("GET", url.target, {**headers, "Sec-WebSocket-Version": "13"})
            if response.status != 101 or response.headers.get("Sec-WebSocket-Accept") != accept:
                raise OSError(0, f"没有接受 WebSocket（{response.status} {response.reason}）")
        except OSError as error:
            wire.close()
            raise Unreachable(f"连接 {url.host} 失败：{explain(error)}") from error
        wire.link.settimeout(0.0)
        early = b""  # what came right behind the head
        with contextlib.suppress(ssl.SSLWantReadError):  # where nothing did, peek reads on
            early = response.fp.peek()
        return cls(wire, early)

    def send(self, kind: int, data: bytes) -> None:
        """Write one masked frame; raise OSError."""
        length = len(data)
        size = bytes([128 | length]) if length < 126 else struct.pack(">BH", 254, length & 0xFFFF)
        size = struct.pack(">BQ", 255, length) if length > 0xFFFF else size
        mask = secrets.token_bytes(4)
        mask_number = int.from_bytes((mask * (length // 4 + 1))[:length], "big")
        masked = (int.from_bytes(data, "big") ^ mask_number).to_bytes(length, "big")
        with self._lock:
            try:
                self._sock.settimeout(ACK_SECONDS)
                self._sock.sendall(bytes([128 | kind]) + size + mask + masked)
                self._sock.settimeout(0.0)
            except OSError:
                shut(self._sock)  # half a frame may be out: nothing may follow it
                raise

    def _receive(self, seconds: float) -> bool:
        """Take what comes within so long; tell whether something did; raise OSError."""
        select.select([self._sock], [], [], max(0.0, seconds))
        with self._lock:
            try:
                piece = self._sock.recv(READ_BYTES)  # a record of TLS as a whole: no rest stays
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
        if not piece:
            raise ConnectionResetError("closed by the other side")
        self._data += piece
        return True

    def _take(self, size: int) -> bytes:
        """Return the next bytes of a frame that has begun; raise OSError."""
        deadline = time.monotonic() + STALL_SECONDS
        while len(self._data) < size:
            if time.monotonic() > deadline:
                raise TimeoutError
            self._receive(1.0)
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken

    def read(self, seconds: float) -> bytes | None:
        """Read a frame that begins in time; return the message that it ends; raise OSError."""
        if not self._data and not self._receive(seconds):
            return None
        first, size = self._take(2)
        odd = first & 0x70 or size & 128
        if size in (126, 127):
            size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
        if odd or size + len(self._message) > MAX_FRAME_BYTES:
            raise ConnectionAbortedError("odd or too large a frame")
        kind, data = first & 15, self._take(size)
        if kind == PING:
            self.send(PONG, data[:125])
        elif kind == CLOSE:
            raise ConnectionResetError("closed by the other side")
        elif kind < CLOSE:  # text, binary or a piece: whoever parses it will see
            self._message += data
            if first & 128:
                message, self._message = bytes(self._message), bytearray()
                return message
        return None

    def close(self) -> None:
        shut(self._sock)
        self._wire.close()


# ---- WeCom's robot over a long connection (contract section 12, document 101463) ---------------
# One line for all: answers and results are frames of it with ids, acknowledged one by one. A
# message that lives is a stream: its first frame confirms, later ones show how far it is, the last
# one tells.

# names of settings, and bare domains, which a client might make a link of
CODE_WORDS = (
    r"(?<![\w/.-])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+(?![\w/.-])|"
    r"(?<![\w./:-])(?:[\w-]+\.)+[a-z]{2,}(?::\w+)?\b"
)
# what markdown and mentions are made of -> what looks like it
DEFANGED = str.maketrans("<[]*#~|", "＜［］＊＃～｜")
LINE_DOWN = "智能机器人的长连接断开了"
SEE_NEXT = "⏩ 这条消息不再更新，请看下一条"


@dataclass
class Stream:
    """A message that lives. Of this process and one connection alone; owned by the Robot."""

    message: Message  # which it answers, without its text
    req_id: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    begun: float = 0.0  # monotonic; its first frame
    text: str = ""
    request: str = ""  # id of the tasks that it shows; "" where its last frame is a letter
    lock: threading.Lock = field(default_factory=threading.Lock)  # one frame at a time


NO_NAME = r"(?i)[不别勿莫请看吗了]|更新|下午|上午|\bnot\b|n't\b|please"


def without_mention(text: str) -> str:
    """Return the text of a group message without the leading @NAME, which may have spaces.

    What belongs to the name is up to the first link, image or word of command on its line.
    """
    line, newline, rest = text.lstrip().partition("\n")
    if not line.startswith("@"):
        return text
    words = line.split()
    for index in range(1, len(words)):
        word = tidy(words[index])
        known = word.lower() in COMMANDS or word.startswith(("--platform", "http://", "https://"))
        if known or word in OFFICIAL or re.search(r"[:/,，]", word):
            # What is more than a name is talk, and read with what follows.
            start = 1 if re.search(NO_NAME, " ".join(words[1:index])) else index
            return " ".join(words[start:]) + newline + rest
    return " ".join(words[2:]) + newline + rest if len(words) > 2 and not rest else rest


def part(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an object in a foreign object, {} where there is none."""
    inside = found.get(name)
    return inside if isinstance(inside, dict) else {}


class Robot(Channel):
    """The robot's line: one thread reads, each message is answered in one of its own.

    Every text is a letter on disk or a finished stream; what is not acknowledged goes again by
    aibot_send_msg. A stream ends with the line, as its req_id does.
    """

    name = "robot"
    limit_bytes = MAX_MARKDOWN_BYTES
    senders = 4
    MOST_THREADS = 900  # of the process, one for each answer under way among them
    MOST_REPLIES = 100  # waiting for one address: each is on disk, and 28 go in a minute

    def __init__(self, settings: Settings, network: Network, log: Log) -> None:
        self._settings = settings
        self._network = network
        self._log = log
        self._lock = threading.Lock()  # a message has one stream, a stream one ending
        self._line: WebSocket | None = None  # subscribed
        self._acks: dict[str, queue.SimpleQueue[dict[str, Any]]] = {}  # by req_id
        self._streams: dict[str, Stream] = {}  # message id -> its stream, while it lives
        self._faults = 0  # of the line since something came over it
        self._refusals = 0  # in a row
        self.trouble = "智能机器人还没有连上"

    def pace(self) -> list[tuple[float, float]]:
        """Return what WeCom lets a robot send to one chat."""
        return [ROBOT_PACE, HOURLY_PACE]

    # -- the form of a text

    def render(self, text: str) -> str:
        """Return markdown in which, outside of code, only line ends count."""
        parts = re.split(r"(?ms)(^```$.*?^```$|`[^`\n]*`)", text)  # every other one is code
        for index in range(0, len(parts), 2):
            plain = re.sub(r"(?m)^(\s*)>", r"\1＞", parts[index].translate(DEFANGED))
            parts[index] = re.sub(CODE_WORDS, r"`\g<0>`", plain)
        return "".join(parts).replace("（已是最新）", "  # 已是最新")  # in a block, to be copied

    # -- what the chat and the lanes say

    def confirm(self, message: Message, text: str, tasks: Sequence[Task]) -> list[Letter]:
        first = self.letters(message.address, text, "")[0]
        if stream := self._streams.get(message.id):
            stream.request = tasks[0].id if tasks else ""
        return [first._replace(message_id=message.id, is_last=not tasks)]

    def ending(self, request: str, letters: list[Letter]) -> list[Letter]:
        with self._lock:
            for stream in list(self._streams.values()):
                if stream.request == request:
                    stream.request = ""
                    return [letters[0]._replace(message_id=stream.message.id), *letters[1:]]
        return letters

    # -- sending

    def send(self, letter: Letter) -> None:
        """Deliver a letter: as a frame of its stream where it has one, else as a new message."""
        stream = self._streams.get(letter.message_id)
        if stream and self._respond(stream, letter.text, letter.is_last):
            return
        user, _, group = split_address(letter.address)
        body: dict[str, Any] = {"chatid": group or user, "chat_type": 2 if group else 1}
        body |= {"msgtype": "markdown", "markdown": {"content": letter.text}}
        self._ask("aibot_send_msg", secrets.token_hex(12), body)

    def _respond(self, stream: Stream, text: str, finish: bool) -> bool:
        """Write one frame of a stream; tell whether it was acknowledged: if not, it is over."""
        content = {"id": stream.id, "finish": finish, "content": text}
        body = {"msgtype": "stream", "stream": content}
        with stream.lock:
            if self._streams.get(stream.message.id) is not stream:
                return False
            stream.begun, stream.text = stream.begun or time.monotonic(), text
            try:
                self._ask("aibot_respond_msg", stream.req_id, body)
            except Failure as failure:
                self._streams.pop(stream.message.id, None)
                # It must not stay open; only of a last frame without answer nobody knows.
                if isinstance(failure, ChannelError) or not finish:
                    content |= {"finish": True, "content": SEE_NEXT}
                    with contextlib.suppress(Failure):
                        self._write(self._line, "aibot_respond_msg", stream.req_id, body)
                return False
            if finish:
                self._streams.pop(stream.message.id, None)
            return True

    @staticmethod
    def _write(line: WebSocket | None, command: str, req_id: str, body: Any = None) -> None:
        """Send one frame; raise Unreachable."""
        frame = {"cmd": command, "headers": {"req_id": req_id}} | ({"body": body} if body else {})
        try:
            if line is None:
                raise ConnectionError
            line.send(TEXT, json.dumps(frame, ensure_ascii=False).encode())
        except OSError as error:
            raise Unreachable(LINE_DOWN) from error

    def _ask(self, command: str, req_id: str, body: Any) -> None:
        """Send a command and wait for its acknowledgement; raise Unreachable or ChannelError."""
        answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._acks[req_id] = answers
        try:
            self._write(self._line, command, req_id, body)
            found = answers.get(timeout=ACK_SECONDS)
        except queue.Empty as error:
            raise Unreachable("智能机器人没有确认收到") from error
        finally:
            self._acks.pop(req_id, None)
        if not found:
            raise Unreachable(LINE_DOWN)
        self._check(found, "智能机器人拒绝了一条消息", 5.0)

    def _check(self, found: Mapping[str, Any], what: str, pause_seconds: float) -> None:
        """Raise ChannelError where an answer has another errcode than 0."""
        if found.get("errcode") != 0:
            said = shown(self._log.mask(f"{found.get('errcode')} {found.get('errmsg', '')}"), 80)
            raise ChannelError(f"{what}（{said}）", pause_seconds, False)

    # -- the line

    def run(self, app: App) -> None:
        """Keep the line as long as it lasts: connect, subscribe, read; then wait a while."""
        line = None
        try:
            line = WebSocket.connect(self._network, self._settings.BOT_URL)
            self._read(app, line, self._subscribe(line))
        except (OSError, Failure) as error:
            self.trouble = f"{LINE_DOWN}：{explain(error)}"
            pause = min(30.0, 2.0**self._faults)
            if isinstance(error, ChannelError):  # refused, or taken over
                self.trouble, pause = str(error), error.pause_seconds
            self._faults = min(self._faults + 1, 5)
        finally:
            self._line, self.trouble = None, self.trouble or LINE_DOWN
            self._streams.clear()
            for answers in list(self._acks.values()):
                answers.put({})  # none will come
            if line:
                line.close()
        app.log.warning(f"robot: {self.trouble}；{pause:.0f} 秒后重试")
        app.sleep(pause)

    def try_once(self) -> None:
        """Subscribe and leave, for `check`; raise OSError or Failure."""
        with contextlib.closing(WebSocket.connect(self._network, self._settings.BOT_URL)) as line:
            self._subscribe(line)

    def _subscribe(self, line: WebSocket) -> list[bytes]:
        """Subscribe; return what came before that was acknowledged; raise OSError or Failure."""
        early: list[bytes] = []
        body = {"bot_id": self._settings.BOT_ID, "secret": self._settings.BOT_SECRET}
        req_id = secrets.token_hex(12)
        self._write(line, "aibot_subscribe", req_id, body)
        deadline = time.monotonic() + ACK_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            data = line.read(left) or b""
            found = self._parse(data)
            if part(found, "headers").get("req_id") == req_id:
                pause = REFUSED_PAUSES[min(self._refusals, len(REFUSED_PAUSES) - 1)]
                self._refusals += 1
                why = "智能机器人订阅被拒绝：核对 BOT_ID、BOT_SECRET 和长连接方式"
                self._check(found, why, pause)
                self._refusals = 0
                return early
            if data and len(early) < self.MOST_REPLIES:
                early.append(data)
        raise Unreachable("智能机器人没有回答订阅")

    @staticmethod
    def _parse(data: bytes) -> dict[str, Any]:
        """Return a frame without its control characters, {} for garbage."""
        return read_json(re.sub(rb"[\x00-\x08\x0b-\x1f]", b"", data), dict) or {}

    def _read(self, app: App, line: WebSocket, early: list[bytes]) -> NoReturn:
        """Read the line until it ends: OSError, ChannelError where another program took it."""
        self._line, self.trouble = line, ""
        app.log.info("🤖 智能机器人已连接")
        app.posts[self.name].sign_of_life()
        pings = 0  # without an answer
        next_ping = time.monotonic() + ROBOT_PING_SECONDS
        while True:
            data = early.pop(0) if early else line.read(next_ping - time.monotonic())
            if time.monotonic() >= next_ping:
                if pings == 2:
                    raise TimeoutError
                pings += 1
                self._write(line, "ping", secrets.token_hex(12))
                next_ping = time.monotonic() + ROBOT_PING_SECONDS
            if data is None:
                continue
            self._faults = 0
            frame = self._parse(data)
            req_id, body = str(part(frame, "headers").get("req_id")), part(frame, "body")
            if "cmd" not in frame:
                pings = 0
                if answers := self._acks.get(req_id):
                    answers.put(frame)
            elif frame["cmd"] in ("aibot_msg_callback", "aibot_event_callback"):
                event_type = part(body, "event").get("eventtype")
                if event_type == "disconnected_event":
                    text = "另一个程序正在使用同一个智能机器人，本机的长连接已被踢下线"
                    raise ChannelError(text, TAKEOVER_SECONDS, True)
                self._begin_answer(app, req_id, body, event_type)

    def _begin_answer(self, app: App, req_id: str, body: dict[str, Any], event_type: Any) -> None:
        """Answer in a thread of its own: the disk may take a while, the line must be read on."""
        if threading.active_count() >= self.MOST_THREADS:
            app.log.warning("robot: 同时来的消息过多，这一条没有处理")
            return

        def answer() -> None:
            try:
                if event_type == "enter_chat":
                    welcome = {"msgtype": "text", "text": {"content": Channel().render(HELP)}}
                    self._ask("aibot_respond_welcome_msg", req_id, welcome)
                elif not event_type:
                    self._answer(app, req_id, body)
            except Failure as failure:
                app.log.warning(f"robot: {failure}")
            except Exception:
                app.log.bug("robot")

        threading.Thread(target=answer, daemon=True).start()

    def _answer(self, app: App, req_id: str, body: dict[str, Any]) -> None:
        """Answer one message by a letter; where it is no work, that finishes its stream."""
        message = self._message(body)
        if message is None:
            return
        app.posts[self.name].sign_of_life(message.address)
        stream = Stream(message, req_id)
        with self._lock:
            if message.id in self._streams or app.chat.recall(message.id) is not None:
                return  # a repeat
            self._streams[message.id] = stream
        is_text = str(body.get("msgtype")) in ("text", "voice", "mixed", "file")
        text, note = "", app.chat.refusal(message.user) or ("" if is_text else ONLY_TEXT)
        try:
            text = "" if note else self._text(body)
        except Failure as failure:
            note = f"❌ {failure}"
        reply = app.chat.answer(message._replace(content=text), self, note)
        if message.id in app.state.facts.seen:
            return  # accepted, with its confirmation
        first, *more = self.letters(message.address, reply, "")
        waiting = sum(letter.address == first.address for letter in app.state.facts.letters)
        if waiting >= self.MOST_REPLIES:
            app.log.warning("robot: 同一个人的消息过多，这一条没有回答")
            self._streams.pop(message.id, None)
            return
        stream.request = ""
        first = first._replace(message_id=message.id)
        app.state.change(lambda facts: facts.with_letters([first]).with_list(more))

    # -- what people send

    def _message(self, body: Mapping[str, Any]) -> Message | None:
        """Return whose message it is, without its text; None where nobody could be answered."""
        user = str(part(body, "from").get("userid") or "")
        group = str(body.get("chatid") or "") if body.get("chattype") == "group" else ""
        if not USER_PATTERN.fullmatch(user) or not re.fullmatch(r"[\x21-\x7e]{0,128}", group):
            return None
        given = str(body.get("msgid") or body).encode(errors="replace")
        message_id = hashlib.sha256(given).hexdigest()[:32]
        return Message(user, f"{user} {self.name} {group}".strip(), "", message_id)

    def _text(self, body: Mapping[str, Any]) -> str:
        """Return the text of a message, "" where it has none; raise Failure."""
        kind = str(body.get("msgtype"))
        inside, pieces = part(body, kind), []
        if kind == "file":
            return self._file(str(inside.get("url")), str(inside.get("aeskey")))
        if kind in ("text", "voice"):
            pieces = [inside]
        elif kind == "mixed" and isinstance(items := inside.get("msg_item"), list):
            pieces = [part(item, "text") for item in items if isinstance(item, dict)]
        text = "\n".join(str(piece["content"]) for piece in pieces if piece.get("content"))
        text = text.encode(errors="replace").decode()  # JSON can hold half of a surrogate pair
        return without_mention(text) if body.get("chattype") == "group" else text

    def _file(self, link: str, key: str) -> str:
        """Return a sent text file of at most MAX_PASTE_BYTES; raise Failure for another."""
        url = parse_url(link)
        vet = self._settings.DANGEROUSLY_ALLOW_PRIVATE_URLS != "1"
        with contextlib.closing(self._network.open(url, proxied=False, vet=vet)) as wire:
            answer = wire.exchange("GET", url.target, {}, None, CALL_SECONDS)
        if answer.status != 200:
            raise Failure(f"这个文件取不到（HTTP {answer.status}），请再发一次")
        try:
            plain = decrypt(base64.b64decode(key + "=" * (-len(key) % 4)), answer.body)
            text = plain.decode("utf-8-sig")
            if len(plain) > MAX_PASTE_BYTES or "\0" in text:
                raise ValueError("no paste")
        except ValueError as error:
            what = "只看得懂 256 KiB 以内的文本文件（compose、清单、images.txt）"
            raise Failure(what) from error
        return text

    # -- messages that live

    def refresh(self, app: App) -> None:
        """Look once at the messages that live: show how far they are, end those that are old."""
        app.state.wait_for(lambda facts: self._streams)
        for stream in list(self._streams.values()):
            if stream.begun:
                self._look(app, stream, stream.request)
        app.sleep(REFRESH_SECONDS)

    def _look(self, app: App, stream: Stream, request: str) -> None:
        """Show how far a request is; end its message where that is old, or the request is gone."""
        age = time.monotonic() - stream.begun
        tasks = [task for task in app.state.facts.tasks if task.id == request]
        begun = [task for task in tasks if app.progress.is_begun(task)]
        text = "\n\n".join(living_text(task, app.progress) for task in begun)
        pace = app.posts[self.name].pace
        if request and tasks and age < ROBOT_STREAM_SECONDS:
            text = self.render(text)
            if text not in ("", stream.text) and not pace.wait_seconds(stream.message.address, 3):
                pace.take(stream.message.address)
                self._respond(stream, text, False)
        elif request:
            for task in begun:
                app.progress.of(task).is_told = True
            text = f"{LATE}\n\n{text}".strip() if tasks else "⏹ 已取消"
            letters = self.ending(request, self.letters(stream.message.address, text, "")[:1])
            if letters[0].message_id:  # else something else has ended it meanwhile
                app.state.change(functools.partial(Facts.with_letters, letters=letters))
        elif age > ROBOT_STREAM_SECONDS + ACK_SECONDS:
            # A last letter that still waits for the pace becomes a message of its own.
            pace.take(stream.message.address)
            self._respond(stream, SEE_NEXT, True)


# ================================================================================================
# VII. The doctor: `check` asks every system what it needs to know, side by side.
# May: make calls that change nothing. Never: start, write or throw out anything.
# ================================================================================================

NO_BRANCH = "wxsync-check-no-such-branch"


class Finding(NamedTuple):
    """One line of `check`: ✅ ⚠️ or ❌, what it is about, what was found and how to mend it."""

    mark: str
    name: str
    text: str


def finding(name: str, good: bool, text: str, cure: str, mark: str = "❌") -> Finding:
    """Return ✅ with text, or the other mark with the cure."""
    return Finding("✅", name, text) if good else Finding(mark, name, cure)


def missing_packages(settings: Settings) -> str:
    """Return the names of packages that these settings need and that cannot be imported."""
    import importlib.util

    needed = {"pycryptodome": "Crypto"}
    needed |= {"qingstor-sdk": "qingstor"} if settings.QINGSTOR_ACCESS_KEY_ID else {}
    return " ".join(name for name in needed if not importlib.util.find_spec(needed[name]))


def ask_service(settings: Settings, method: str, target: str, body: bytes) -> Answer:
    """Make one exchange with the service on this machine; raise Unreachable."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.HOST, settings.HOST)  # noqa: S104
    try:
        sock = dial(host, settings.PORT, CONNECT_SECONDS, vet=False)
    except OSError as error:
        text = f"连不上 {host}:{settings.PORT}（{explain(error)}）：服务在运行吗？"
        raise Unreachable(text) from error
    with contextlib.closing(Wire(Url("http", host, settings.PORT, "/"), sock)) as wire:
        return wire.exchange(method, target, {}, body or None, CALL_SECONDS)


@dataclass(frozen=True)
class Doctor:
    """What the checks look at."""

    app: App
    env_file: Path

    # -- this machine

    def host(self) -> Iterator[Finding]:
        """Look at this machine: folder, file modes, libraries."""
        folder = Path(self.app.settings.STATE_DIR).resolve()
        place = next(path for path in (folder, *folder.parents) if path.exists())
        writable = place.is_dir() and os.access(place, os.W_OK)
        text = f"{folder} 不能写：chown 给运行 wxsync 的用户"
        yield finding("STATE_DIR", writable, f"{folder} 可写", text)
        if self.env_file.exists() and os.name == "posix":
            mode = self.env_file.stat().st_mode & 0o777
            text = f"{self.env_file} 权限 {mode:o}"
            cure = f"{text}，别人也能读：chmod 600 {self.env_file}"
            yield finding(".env", not mode & 0o077, text, cure, "⚠️")
        if weak := self.app.settings.weak_secrets():
            yield Finding("⚠️", "密钥", f"{weak} 太短（不到 8 个字符），请换长的")
        missing = missing_packages(self.app.settings)
        yield finding("程序库", not missing, "已安装", f"没有安装：pip install {missing}")

    def clock(self) -> Iterator[Finding]:
        """Compare this machine's clock with the servers' Date headers; tell the largest gap."""
        gaps = [(abs(gap), host) for host, gap in dict(self.app.network.clock_gaps).items()]
        if gaps:
            gap, host = max(gaps)
            text = f"与 {host} 相差 {gap:.0f} 秒"
            yield finding("时钟", gap <= 60, text, f"{text}：timedatectl set-ntp true")

    def proxy(self) -> Iterator[Finding]:
        """Try the proxy as the service would."""
        if self.app.network.proxy is None:
            yield Finding("✅", "代理", "没有设置，GitHub 直连")
            return
        test = self.app.settings.PROXY_TEST_URL
        cure = f"{self.app.network.proxy} 打不开 {test}：核对地址和密码，或换 PROXY_TEST_URL"
        yield finding("代理", self.app.network.probe(), f"{self.app.network.proxy} 可用", cure)

    # -- WeCom

    def application(self) -> Iterator[Finding]:
        """Ask for a token (CORP_ID, SECRET), then for the application (AGENT_ID, trusted IP)."""
        channel = self.app.channels.get(Texts.name)
        if not isinstance(channel, Texts):
            yield Finding("✅", "企业微信应用", "没有设置，只用智能机器人")
            return
        channel.wecom.token()
        yield Finding("✅", "企业微信", "CORP_ID 和 SECRET 正确")
        query = {"agentid": str(self.app.settings.AGENT_ID)}
        found = channel.wecom.call("GET", "/cgi-bin/agent/get", query)
        text = f"AGENT_ID 正确（{shown(str(found.get('name', '')))}），本机 IP 可信"
        yield finding("企业微信应用", not found.get("close"), text, "应用已停用：到管理后台启用")

    def robot(self) -> Iterator[Finding]:
        """Subscribe and leave; where a service runs, that would throw it out: ask it instead."""
        settings, robot = self.app.settings, self.app.channels.get(Robot.name)
        if not isinstance(robot, Robot):
            yield Finding("✅", "智能机器人", "没有设置，只用应用的回调")
            return
        folder = Path(settings.STATE_DIR)
        try:  # where no service has ever been nothing is written
            lock = take_lock(folder) if (folder / "wxsync.lock").exists() else None
        except Failure:
            state = ask_service(settings, "GET", "/health", b"").body
            is_up = (read_json(state, dict) or {}).get("bot") == "up"
            cure = "服务正在运行，但长连接没有连上：看它的日志"
            yield finding("智能机器人", is_up, "服务正在运行，长连接已连上", cure)
            return
        robot.try_once()
        yield Finding("✅", "智能机器人", "BOT_ID 和 BOT_SECRET 正确")
        del lock  # held until here

    # -- GitHub

    def _refused(self, method: str, path: str, body: Any, needs: str) -> str:
        """Return why the token may not make a call, "" where it may.

        The call names a branch that does not exist: GitHub looks at the permission first, then
        refuses it all the same, so nothing is changed.
        """
        try:
            self.app.github.call(method, path, body, needs)
        except GitHubError as error:
            return str(error) if error.status in (401, 403) else ""
        return ""

    def _workflow(self) -> Iterator[Finding]:
        """Look for the workflow: there, active, with the wxsync.py of this version beside it."""
        call, needs = self.app.github.call, GitHub.ACTIONS
        with contextlib.suppress(GitHubError):  # needs Administration: Read, which is optional
            enabled = call("GET", "/actions/permissions").get("enabled") is not False
            cure = "没有开启：仓库 Settings → Actions → General"
            yield finding("GitHub Actions", enabled, "已开启", cure)
        path = f"/actions/workflows/{WORKFLOW}"
        try:
            state = shown(pick(call("GET", path, needs=needs), "state", str))
            why = self._refused("POST", f"{path}/dispatches", {"ref": NO_BRANCH}, needs)
            cure = why or f"状态 {state}：到 Actions 页选中它，点 Enable workflow"
            yield finding("GitHub 工作流", state == "active" and not why, "已启用，可以启动", cure)
        except GitHubError as error:
            cure = f"默认分支要有 .github/workflows/{WORKFLOW}；复刻的仓库先到 Actions 页启用。"
            yield Finding("❌", "GitHub 工作流", f"{cure}{error}")
        branch = self.app.settings.GITHUB_BRANCH
        try:
            path = f"/contents/wxsync.py?ref={urllib.parse.quote(branch)}"
            found = pick(call("GET", path, needs=GitHub.WRITE), "content", str)
            same = base64.b64decode(found) == Path(__file__).read_bytes()
            cure = "与本机的版本不同：两边更新到同一版本"
            yield finding("GitHub 上的 wxsync.py", same, "与本机相同", cure, "⚠️")
        except (GitHubError, ValueError) as error:
            cure = f"分支 {branch} 里读不到，工作流需要它：{error}"
            yield Finding("❌", "GitHub 上的 wxsync.py", cure)

    def repository(self) -> Iterator[Finding]:
        """Ask for the repository, the branch, the workflow, Actions and the Secrets."""
        settings, call = self.app.settings, self.app.github.call
        found = call("GET", "", needs="Metadata: Read")
        kind = "细粒度令牌" if settings.GITHUB_TOKEN.startswith("github_pat_") else "经典令牌"
        yield Finding("✅", "GitHub 令牌", f"{kind}，能访问 {settings.GITHUB_REPO}")
        if ends := self.app.github.token_ends:
            yield Finding("⚠️", "GitHub 令牌", f"{shown(ends)} 到期，到期前请更换 GITHUB_TOKEN")
        body = {"message": "", "content": "", "branch": NO_BRANCH}
        why = self._refused("PUT", f"/contents/{LIST_PATH}", body, GitHub.WRITE)
        if found.get("archived"):
            why = "仓库已归档，不能写：Settings → Unarchive"
        push = bool((found.get("permissions") or {}).get("push")) and not why
        cure = why or f"令牌的主人没有写权限：换有权限的账号，令牌要有 {GitHub.WRITE}"
        yield finding("GitHub 仓库", push, "可以写入", cure)
        yield from self._workflow()
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

    # -- where things go

    def registry(self) -> Iterator[Finding]:
        """Look at the target registry's name and ask whether it answers."""
        name = self.app.settings.DOCKER_REGISTRY
        acr = r"(registry\.[a-z0-9-]+|crpi-[a-z0-9]+\.[a-z0-9-]+\.personal\.cr)\.aliyuncs\.com"
        cure = f"{name} 不像 ACR 个人版的地址：registry.cn-….aliyuncs.com 或 crpi-….personal.cr.…"
        found = re.fullmatch(acr, name) is not None
        yield finding("目标仓库", found, f"{name} 是 ACR 地址", cure, "⚠️")
        target = Client(self.app.network, f"https://{name}", proxied=False)
        answer = target.call("GET", "/v2/", {})
        text = f"{name} 可以访问（账号密码只在工作流里用，这里无法检查）"
        cure = f"{name} 答 HTTP {answer.status}，不像镜像仓库：核对 DOCKER_REGISTRY"
        yield finding("目标仓库", answer.status in (200, 401), text, cure)

    def bucket(self) -> Iterator[Finding]:
        """Ask for the bucket and who may read it."""
        if self.app.store is None:
            yield Finding("✅", "QingStor", "没有设置，文件功能关闭")
            return
        answer = self.app.store.call("get_acl")
        name, seconds = self.app.settings.QINGSTOR_BUCKET, self.app.settings.QINGSTOR_LINK_SECONDS
        yield Finding("✅", "QingStor", f"存储桶 {name} 可以访问，密钥正确")
        is_public = b"QS_ALL_USERS" in answer.body
        text = f"带签名，{seconds} 秒内有效" if seconds else "公开读"
        cure = (
            "存储桶不是公开读，链接打不开：设置 QINGSTOR_LINK_SECONDS=86400，或把存储桶设为公开读"
        )
        yield finding("QingStor 链接", bool(seconds) or is_public, text, cure)


def run_checks(doctor: Doctor) -> list[Finding]:
    """Ask every system side by side, for CHECK_SECONDS in all; return what was found, in order."""
    steps = {
        "本机": (doctor.host, "检查 STATE_DIR"),
        "代理": (doctor.proxy, "检查 PROXY_URL"),
        "智能机器人": (doctor.robot, "检查网络和 BOT_URL"),
        "企业微信": (doctor.application, "检查网络和 WECOM_API_URL"),
        "GitHub": (doctor.repository, "检查网络和 GITHUB_API_URL，连不上时设置 PROXY_URL"),
        "目标仓库": (doctor.registry, "检查网络和 DOCKER_REGISTRY"),
        "QingStor": (doctor.bucket, "检查网络和 QINGSTOR_URL、QINGSTOR_ZONE"),
    }
    findings: dict[str, list[Finding]] = {name: [] for name in steps}

    def collect(name: str) -> None:
        check, hint = steps[name]
        try:
            findings[name].extend(check())
        except Failure as failure:
            text = f"{failure}；{hint}" if isinstance(failure, Unreachable) else str(failure)
            findings[name].append(Finding("❌", name, text))
        except Exception as error:  # whatever an odd answer led to
            text = f"看不懂对方的回答（{explain(error)}）：核对地址；{hint}"
            findings[name].append(Finding("❌", name, text))

    threads = {n: threading.Thread(target=collect, args=(n,), daemon=True) for n in steps}
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + CHECK_SECONDS
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            text = f"{CHECK_SECONDS:.0f} 秒内没有回答；{steps[name][1]}"
            findings[name].append(Finding("❌", name, text))
    findings["时钟"] = list(doctor.clock())
    return [found for group in findings.values() for found in group]


# ================================================================================================
# VIII. Main: wiring and the command line.
# May: everything, once. Never: anything that a part above could do itself.
# ================================================================================================


def repeat(log: Log, sleep: Callable[[float], None], step: Callable[[], object]) -> None:
    """Start a thread that does step for ever; a bug is logged and does not end it."""

    def loop() -> None:
        while True:
            try:
                step()
            except Exception:
                log.bug("thread")
                sleep(CLOCK_LOOK_SECONDS)

    threading.Thread(target=loop, daemon=True).start()


def build_app(
    settings: Settings, log: Log, now: Callable[[], float], sleep: Callable[[float], None]
) -> App:
    """Wire the parts of the service; opens no connection and starts no thread."""
    app = App(settings, log, now, sleep)
    if settings.CORP_ID:
        app.channels[Texts.name] = Texts(WeCom(settings, app.network))
    if settings.BOT_ID:
        app.channels[Robot.name] = Robot(settings, app.network, log)
    return app


def run_check(settings: Settings, env_file: Path, as_json: bool) -> int:
    """Do `wxsync.py check`; return 0 when nothing is wrong."""
    log = Log("ERROR", settings.secrets().values(), sys.stderr)
    app = build_app(settings, log, time.time, lambda seconds: None)
    app.github.patience_seconds = 0  # a limit is told, not waited for
    found = run_checks(Doctor(app, env_file))
    findings = [entry._replace(text=entry.text.replace("`", "")) for entry in found]
    if as_json:
        print(json.dumps([found._asdict() for found in findings], ensure_ascii=False))
    else:
        print("\n".join(f"{found.mark} {found.name}：{found.text}" for found in findings))
    return int(any(found.mark == "❌" for found in findings))


def keep_probing(app: App) -> None:
    """Look at the proxy, then wait."""
    app.network.probe()
    app.sleep(PROBE_SECONDS)


def take_up(app: App) -> None:
    """Read the state and tell people of what could not be read; raise Failure."""
    for entry in app.state.load():
        found = entry if isinstance(entry, dict) else {}
        user, items = str(found.get("user")), found.get("items")
        if USER_PATTERN.fullmatch(user.partition(" ")[0]) and "user" in found:
            items = [quoted(str(item), 100) for item in items] if isinstance(items, list) else []
            text = "\n".join(["❌ 您有一个请求在重启后读不出来，请重发：", *items[:10]])
            letters = app.channel(user).letters(user, text, secrets.token_hex(4))
            app.state.change(functools.partial(Facts.with_letters, letters=letters))
    app.posts.update({name: Post(app, channel) for name, channel in app.channels.items()})


def start_threads(app: App) -> None:
    """Start everything that does not answer requests."""
    start = functools.partial(repeat, app.log, app.sleep)
    if proxy := app.network.proxy:
        app.log.info(f"🌐 检测到代理配置: {proxy}")
        app.log.info(f"   直连域名: {', '.join(app.settings.NO_PROXY_DOMAINS)}")
        start(lambda: keep_probing(app))
    start(lambda: work(app, "images"))
    start(lambda: work(app, "files"))
    start(lambda: follow_runs(app, lambda facts: facts.lane("images")))
    start(lambda: follow_runs(app, Facts.late))
    start(lambda: keep_settling(app))
    start(lambda: app.sleep(keep_midnight(app)))
    for name, post in app.posts.items():
        for _ in range(app.channels[name].senders):
            start(post.step)
    robot = app.channels.get(Robot.name)
    if isinstance(robot, Robot):
        start(lambda: robot.run(app))
        start(lambda: robot.refresh(app))
    # Loads AES before the first message waits for it.
    threading.Thread(target=aes, args=(bytes(32),), daemon=True).start()


def serve(
    settings: Settings,
    log: Log,
    now: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Run the service until a signal comes; return the exit status."""
    try:
        if missing := missing_packages(settings):
            raise Failure(f"没有安装：pip install {missing}")
        lock = take_lock(Path(settings.STATE_DIR))
        app = build_app(settings, log, now, sleep)
        take_up(app)
        names = settings.TOKEN, settings.ENCODING_AES_KEY, settings.CORP_ID
        crypto = Crypto(*names) if settings.CORP_ID else None
        server = Server((settings.HOST, settings.PORT), Callback(app, crypto).answer, log)
    except (Failure, OSError) as error:
        log.error(f"❌ 启动失败：{error}")
        return 1
    if weak := settings.weak_secrets():
        log.warning(f"⚠️  {weak} 太短（不到 8 个字符），请换长的")
    server.stop_on_signals()
    start_threads(app)
    where = f"，回调路径 {Callback.PATH}" if crypto else ""
    log.info(f"🚀 wxsync {VERSION} 已启动，端口 {settings.PORT}{where}")
    server.run()
    server.close()
    app.state.close()
    log.info("👋 已停止，未完成的任务下次启动后继续")
    del lock  # held until here
    sys.stderr.flush()
    os._exit(0)  # returning would wait for a thread that reads a download


SEND_ERRORS = {
    400: "服务看不懂这条消息：--user 是正确的用户 ID 吗？",
    403: "签名或时间被拒绝：服务的设置（TOKEN 等）和这里的一样吗？时钟对吗？",
    404: "服务没有开启回调：它的设置里没有 CORP_ID 等五项",
    413: "消息太长：一次最多 64 KiB",
}


def send_text(settings: Settings, text: str, user: str) -> int:
    """Post text to the running service as WeCom would; print its immediate reply."""
    try:
        if not settings.CORP_ID:
            raise Failure("send 需要回调的设置：CORP_ID、AGENT_ID、SECRET、TOKEN、ENCODING_AES_KEY")
        user = user or next(iter(settings.ALLOWED_USERS), "")
        if not user:
            user = "wxsync"
            print(f"以用户 {user} 发送；后来的结果发给这个人，可用 --user 指明", file=sys.stderr)
        crypto = Crypto(settings.TOKEN, settings.ENCODING_AES_KEY, settings.CORP_ID)
        now = time.time()
        inner = {"ToUserName": settings.CORP_ID, "FromUserName": user, "CreateTime": str(int(now))}
        inner |= {"MsgType": "text", "Content": text, "MsgId": str(secrets.randbits(62))}
        sealed = seal(crypto, inner, False, now)
        envelope, _ = read_fields(sealed)
        query = {"msg_signature": envelope["msgsignature"], "timestamp": envelope["timestamp"]}
        target = f"{Callback.PATH}?{urllib.parse.urlencode({**query, 'nonce': envelope['nonce']})}"
        answer = ask_service(settings, "POST", target, sealed)
        if answer.status != 200:
            why = SEND_ERRORS.get(answer.status, "看它的日志")
            raise Failure(f"服务答 {answer.status}：{why}")
        if answer.body:
            reply, _ = read_fields(answer.body)
            values, _ = read_fields(crypto.decrypt(reply.get("encrypt", "")))
            print(values.get("content", ""))
    except Failure as failure:
        print(f"❌ {failure}", file=sys.stderr)
        return 1
    except Rejected as refusal:
        print(f"❌ 服务的回答看不懂（{refusal}）：那里运行的是 wxsync 吗？", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its help is what users read."""
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
    except Failure as failure:
        for problem in str(failure).splitlines():
            print(f"❌ {problem}", file=sys.stderr)
        print("设置不完整：cp env.example .env 后填写，每一项的含义见其中的说明", file=sys.stderr)
        return 1
    if options.command == "check":
        return run_check(settings, env_file, options.json)
    if options.command == "send":
        return send_text(settings, options.text, options.user)
    return serve(settings, Log(settings.LOG_LEVEL, settings.secrets().values(), sys.stderr))


if __name__ == "__main__":
    sys.exit(main())
