# wxsync in a container: docker build -t wxsync . ; settings come from the environment, state lives in /data.
# To pin the base, add what `docker buildx imagetools inspect python:3.13-slim` calls Digest:
# --build-arg BASE=python:3.13-slim@sha256:...
ARG BASE=python:3.13-slim
FROM ${BASE}

LABEL org.opencontainers.image.title="wxsync" \
      org.opencontainers.image.licenses="MIT"

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TZ=Asia/Shanghai \
    STATE_DIR=/data

# only for this build: --build-arg PIP_INDEX_URL=... where pypi.org is slow
ARG PIP_INDEX_URL

WORKDIR /app
COPY wxsync.py LICENSE ./

# hadolint ignore=DL3013
RUN set -eux; export PIP_ROOT_USER_ACTION=ignore; \
# the dependencies stand in wxsync.py alone; pip reads them from there since 26.0
    python -m pip install --no-cache-dir --upgrade "pip>=26"; \
    python -m pip install --no-cache-dir --requirements-from-script wxsync.py; \
# the file system is read-only later: compiled now, never looked at again
    python -m compileall -q --invalidation-mode unchecked-hash wxsync.py; \
# nothing is installed in the running container
    python -m pip uninstall --yes pip; \
# midnight is local time, so the zone must exist
    test -e "/usr/share/zoneinfo/$TZ"; \
    install -d -o 10001 -g 10001 -m 700 "$STATE_DIR"; \
# smoke test
    python -m wxsync --version; \
    python -c 'from Crypto.Cipher import AES; import qingstor.sdk'

USER 10001:10001
VOLUME /data
EXPOSE 3000

# a line for the shell, which puts in PORT
# hadolint ignore=DL3025
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD no_proxy=* \
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:${PORT:-3000}/health')"

# no ENTRYPOINT: `docker compose run --rm image-sync python wxsync.py check` works as written
CMD ["python", "-m", "wxsync"]
