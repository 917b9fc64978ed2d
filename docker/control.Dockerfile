# The control plane: FastAPI, SQLAlchemy, Ray's job client. torch, built for CPUs, checks the files of scorers in a
# process of its own; the control plane itself does not load it.
#
#   docker build -f docker/control.Dockerfile -t dde-control:0.1.0 .
FROM python:3.11-slim

ARG PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

RUN useradd --uid 1000 --create-home dde
WORKDIR /src
COPY constraints.txt pyproject.toml README.md ./
COPY dde_core dde_core
COPY services services
RUN pip install --no-cache-dir ${PIP_ARGS} -c constraints.txt '.[control]'

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /home/dde
EXPOSE 8080
CMD ["python", "-m", "services.control"]
