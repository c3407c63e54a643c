# syntax=docker/dockerfile:1
#
#   docker build --target cuda -t onebase:cuda .
#   docker run --gpus all -p 8000:8000 -v onebase-cache:/var/cache/onebase \
#       -v onebase-data:/var/lib/onebase onebase:cuda
#
#   docker build --target cpu -t onebase:cpu .
#   docker run -p 8000:8000 -v onebase-cache:/var/cache/onebase -v onebase-data:/var/lib/onebase onebase:cpu
#
# /var/lib/onebase holds the adapters and what is active; /var/cache/onebase can be made again.
#
# It listens on the whole network, so it needs an API key before its first start:
#
#   docker run --rm -v onebase-data:/var/lib/onebase --entrypoint onebase onebase:cpu keys create --scope admin
#
# Arguments after the image's name go to `onebase serve`. PyTorch's wheels on PyPI carry the CUDA
# libraries, so the CUDA image needs only the driver, which NVIDIA's container toolkit brings in.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# The compiler is for the CPU's kernels, and stays behind in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv --without-pip /opt/onebase
ENV PIP_PYTHON=/opt/onebase/bin/python
WORKDIR /src

# The console: files for browsers, the same on every machine.
FROM --platform=$BUILDPLATFORM node:24-trixie-slim AS console
WORKDIR /src/clients/web
COPY clients/web/package.json clients/web/package-lock.json clients/web/.npmrc ./
RUN --mount=type=cache,target=/root/.npm npm ci
COPY clients/web ./
RUN npm run build

# What OneBase needs, one requirement a line: the layers with PyTorch are made again only when this list changes.
FROM build AS requirements
# More extras, as in --build-arg EXTRAS=ray, or EXTRAS="ray tinker".
ARG EXTRAS=
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; \
    print(*p['dependencies'], *(r for x in 'server train postgres s3 otel signing ${EXTRAS}'.split() for r in e[x]), sep='\n')" > requirements.txt

FROM build AS own
COPY pyproject.toml README.md LICENSE ./
COPY tools/package_page.py tools/package_page.py
COPY engine engine
COPY server server
COPY adapters adapters
COPY clients clients
COPY --from=console /src/server/onebase_server/web server/onebase_server/web
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps .

FROM build AS build-cuda
COPY --from=requirements /src/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip pip install --requirement requirements.txt
# Triton has its way to the driver compiled when it starts: by what stands in for a compiler, which has it ready.
COPY deploy/triton.sh ./
RUN sh triton.sh /opt/onebase

FROM build AS build-cpu
RUN --mount=type=cache,target=/root/.cache/pip pip install "torch>=2.9" --index-url https://download.pytorch.org/whl/cpu
COPY --from=requirements /src/requirements.txt ./
# bitsandbytes brings a library for each CUDA and ROCm: more than 100 MB.
RUN --mount=type=cache,target=/root/.cache/pip pip install --requirement requirements.txt \
    && rm --force /opt/onebase/lib/python*/site-packages/bitsandbytes/libbitsandbytes_cuda*.so \
        /opt/onebase/lib/python*/site-packages/bitsandbytes/libbitsandbytes_rocm*.so

FROM python:${PYTHON_VERSION}-slim-trixie AS runtime
LABEL org.opencontainers.image.title="OneBase" \
    org.opencontainers.image.description="One 4-bit base model, and every LoRA adapter on it, served without a restart." \
    org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 onebase \
    && useradd --uid 10001 --gid 10001 --create-home onebase \
    && install --directory --owner=10001 --group=10001 /var/cache/onebase \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/onebase
ENV PATH=/opt/onebase/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ONEBASE_CACHE=/var/cache/onebase \
    ONEBASE_DATA_DIR=/var/lib/onebase \
    HF_HOME=/var/cache/onebase/huggingface \
    ONEBASE_PORT=8000
USER 10001:10001
WORKDIR /home/onebase
VOLUME /var/cache/onebase /var/lib/onebase
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start downloads the base: it counts as starting, not as unhealthy, for half an hour.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/health' % os.environ['ONEBASE_PORT'], timeout=4)"]
ENTRYPOINT ["onebase", "serve", "--host", "0.0.0.0"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/onebase /opt/onebase
COPY --from=own /opt/onebase /opt/onebase

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/var/cache/onebase/triton CC=/opt/onebase/libexec/cc
COPY --from=build-cuda /opt/onebase /opt/onebase
COPY --from=own /opt/onebase /opt/onebase
