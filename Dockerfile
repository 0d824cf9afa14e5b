# The experiment on NVIDIA GPUs (driver 580 or newer), for the scales lite and paper:
#     docker build -t roads .
#     docker run --gpus all --ipc=host -v roads:/roads -v hub:/hub roads fig11 SCALE=lite
# All that a run writes (runs, .dvc, reports, dvc.lock, active.yaml) lies under /roads, models of the hub under /hub.
# docs/cloud.md has the rest.

# CUDA's compiler stays in the image: vLLM's kernels are in part compiled when they are first used.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04@sha256:b7ae301dea2c162444795462ce17a05f6a516e5a75944b57af5b88540a1a2266 AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Ubuntu's archive keeps only the newest version of a package: one pinned here would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    ca-certificates fonts-dejavu-core g++ git make python3.12-dev python3.12-venv \
 && rm -rf /var/lib/apt/lists/*

FROM base AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements/build.txt requirements/gpu.txt requirements/flash.txt /tmp/requirements/
RUN python3.12 -m venv /opt/venv \
 && /opt/venv/bin/python -m pip install --no-deps --require-hashes -r /tmp/requirements/build.txt \
 && /opt/venv/bin/python -m pip install --no-deps --require-hashes --no-build-isolation -r /tmp/requirements/gpu.txt
# flash-attn is source only: an hour on four cores, and up to 5 GB of memory for each of MAX_JOBS. FORCE_BUILD: its
# setup would otherwise fetch a wheel without a hash. With SKIP_CUDA_BUILD=TRUE it comes without kernels, in a minute:
# enough for `attention: sdpa`.
ARG MAX_JOBS=4
ARG FLASH_ATTN_CUDA_ARCHS=80;90
ARG FLASH_ATTENTION_SKIP_CUDA_BUILD=FALSE
RUN FLASH_ATTENTION_FORCE_BUILD=TRUE CUDA_HOME=/usr/local/cuda /opt/venv/bin/python -m pip install \
    --no-deps --require-hashes --no-build-isolation -r /tmp/requirements/flash.txt \
 && touch /opt/venv/.installed /opt/venv/.dev

FROM base
COPY --from=packages /opt/venv /opt/venv
# Any user id will do (docker run --user "$(id -u)"), so it has a home to write to, and a name without /etc/passwd.
RUN install -d -m 1777 /hub /home/roads && install -d -o 1000 -g 1000 /roads
ENV HOME=/home/roads USER=roads HF_HOME=/hub DVC_SITE_CACHE_DIR=/roads/.dvc/tmp/site \
    VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
WORKDIR /roads
COPY --chown=1000:1000 . .
USER 1000:1000
VOLUME ["/roads", "/hub"]
# -o: a checkout may be newer than the two; the image's packages are the ones to use all the same.
ENTRYPOINT ["make", "VENV=/opt/venv", "-o", "/opt/venv/.installed", "-o", "/opt/venv/.dev"]
CMD ["help"]
