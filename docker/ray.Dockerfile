# One image for the head and the workers of every Ray cluster: ingest, training, evaluation, serving, the shapes model.
# Its tag names its Ray version, which is the pin in constraints.txt and rayVersion in k8s/.
#
#   docker build -f docker/ray.Dockerfile -t dde-ray:0.1.0-ray2.60.0 .
#
# The torch that pip takes by default on x86-64 Linux is built for CUDA. For a build for CPUs, or for another CUDA, give pip
# the index that PyTorch's own installation page names: --build-arg PIP_ARGS="--extra-index-url ..."
FROM python:3.11-slim

ARG PIP_ARGS=""

# KubeRay's readiness probe for Serve workers runs wget inside the container; torch.compile (training.compile) needs a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends wget gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home dde

WORKDIR /src
COPY constraints.txt ./
# The large packages in a layer of their own, so that a change of our code does not fetch them again.
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt torch 'ray[default,train,data,serve]'
COPY pyproject.toml README.md ./
COPY dde_core dde_core
COPY services services
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt '.[ray]'

# No entry point: KubeRay writes the `ray start` command.
ENV PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/dde
