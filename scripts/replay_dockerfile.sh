#!/usr/bin/env bash
# Builds the Dockerfile where there is no Docker daemon and no registry of images, as root on Debian or Ubuntu with the
# packages buildah and debootstrap:
#     scripts/replay_dockerfile.sh FOLDER            # 60 GB free; the result is the image localhost/roads
# Every RUN, COPY and ENV is the Dockerfile's. In place of NVIDIA's image stands Ubuntu 24.04 from debootstrap, with
# this machine's /usr/local/cuda if it has one, and flash-attn comes without its kernels.
# EXTRA: options for `buildah bud`, for a proxy's certificate, say.
set -euo pipefail
folder=$(mkdir -p "${1:?usage: scripts/replay_dockerfile.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}
buildah() { command buildah --root "$folder/storage" --runroot "$folder/run" "$@"; }

if [ ! -e "$folder/base/.done" ]; then
  scripts=/usr/share/debootstrap/scripts # one script serves all releases of Ubuntu; an old debootstrap lacks the link
  script=$scripts/noble && [ -e "$script" ] || script=$scripts/gutsy
  debootstrap --variant=minbase --components=main,universe noble "$folder/base" "" "$script"
  touch "$folder/base/.done"
fi
if ! buildah inspect --type image localhost/stand-in >/dev/null 2>&1; then
  container=$(buildah from scratch)
  buildah add -q "$container" "$folder/base" /
  if [ -d /usr/local/cuda/ ]; then buildah add -q "$container" "$(readlink -f /usr/local/cuda)" /usr/local/cuda; fi
  buildah config --env PATH=/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah commit -q --rm "$container" localhost/stand-in
fi
# shellcheck disable=SC2086
buildah bud --from localhost/stand-in --build-arg FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE ${EXTRA:-} -t localhost/roads .
