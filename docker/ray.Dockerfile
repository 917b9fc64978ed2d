# One image for the head and the workers of every Ray cluster: ingest, training, evaluation, serving, the shapes model,
# 8-bit Adam, Weights & Biases, MLflow. Its tag names its Ray version, which is the pin in constraints.txt and rayVersion
# in k8s/. Arguments and secrets: docs/deploy.md, "Images".
#
#   docker build -f docker/ray.Dockerfile -t dde-ray:0.1.0-ray2.60.0 --build-arg REVISION="$(git rev-parse HEAD)" .
#
# torch is PyPI's, built for CUDA 13.0, which needs NVIDIA's driver 580 or newer. For CPUs:
#   --build-arg TORCH=cpu --build-arg TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${BASE}

# KubeRay's readiness probe for Serve workers runs wget inside the container; torch.compile (training.compile) needs a C
# compiler. Debian keeps one version of a package at a time, so a pinned one could not be fetched for long.
ARG DEBIAN_MIRROR=http://deb.debian.org
# hadolint ignore=DL3008
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    find /etc/apt -type f -name '*.list' -exec sed -i "s|http://deb.debian.org|${DEBIAN_MIRROR}|" {} + \
    && find /etc/apt -type f -name '*.sources' -exec sed -i "s|http://deb.debian.org|${DEBIAN_MIRROR}|" {} + \
    && apt-get update && apt-get install -y --no-install-recommends wget gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/archives/*.deb && useradd --uid 1000 --create-home dde
WORKDIR /usr/local/share/dde

ARG PIP_INDEX_URL
ARG PIP_CERT=/etc/ssl/certs/ca-certificates.crt
ARG TORCH=cuda
ARG TORCH_WHEELS

# From what changes least to what changes most: torch with CUDA's libraries, the other packages, our code.
COPY docker/locks/torch-${TORCH}.txt locks/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps --require-hashes ${TORCH_WHEELS:+--find-links "${TORCH_WHEELS}"} \
    -r "locks/torch-${TORCH}.txt"
COPY docker/locks/ray.txt locks/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps --require-hashes -r locks/ray.txt
RUN --mount=type=bind,target=/context \
    mkdir /tmp/source \
    && cp -r /context/pyproject.toml /context/README.md /context/dde_core /context/services /tmp/source \
    && pip install --no-cache-dir --no-deps --no-index --no-build-isolation /tmp/source \
    && rm -r /tmp/source && pip check

ARG VERSION=0.1.0
RUN --mount=type=bind,source=docker,target=/docker \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir --no-compile --no-deps --require-hashes --target /opt/sbom -r /docker/locks/sbom.txt \
    && python /docker/sbom.py dde-ray "${VERSION}" > sbom.cdx.json && rm -r /opt/sbom

ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dde-ray" \
      org.opencontainers.image.description="Ray cluster of preference alignment for diffusion models" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}" \
      dde.ray="2.60.0" \
      dde.torch="${TORCH}" \
      dde.least-nvidia-driver="580"
# NVIDIA's container runtime refuses to start the container where the driver is too old for this CUDA. GKE mounts the
# driver at /usr/local/nvidia without that runtime. /tmp is the only folder that must be writable.
ENV NVIDIA_REQUIRE_CUDA="cuda>=13.0" NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp RAY_USAGE_STATS_ENABLED=0
# No entry point: KubeRay writes the `ray start` command.
USER 1000:1000
WORKDIR /home/dde
