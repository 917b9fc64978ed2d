# The control plane: FastAPI, SQLAlchemy, Ray's job client. torch, built for CPUs, checks the files of scorers in a
# process of its own; the control plane itself does not load it. Arguments and secrets: docs/deploy.md, "Images".
#
#   docker build -f docker/control.Dockerfile -t dde-control:0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" .
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b
FROM ${BASE}

RUN useradd --uid 1000 --create-home dde
WORKDIR /usr/local/share/dde

ARG PIP_INDEX_URL
ARG PIP_CERT=/etc/ssl/certs/ca-certificates.crt
ARG TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/

# From what changes least to what changes most: torch, the other packages, our code.
COPY docker/locks/torch-cpu.txt locks/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps --require-hashes --find-links "${TORCH_WHEELS}" -r locks/torch-cpu.txt
COPY docker/locks/control.txt locks/
RUN --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps --require-hashes -r locks/control.txt
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
    && python /docker/sbom.py dde-control "${VERSION}" > sbom.cdx.json && rm -r /opt/sbom

ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dde-control" \
      org.opencontainers.image.description="Control plane of preference alignment for diffusion models" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
# /tmp is the only folder that must be writable.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 1000:1000
WORKDIR /home/dde
EXPOSE 8080 9464
CMD ["python", "-m", "services.control"]
