#!/usr/bin/env bash
# Makes FIGURES at scale paper in the image IMAGE, and goes on where another machine stopped: DVC's remote, dvc.lock and
# params.yaml lie in SHARED, a bucket's mount or a shared folder. Asked to stop, it lets the runner end its stages.
#     FIGURES=fig11 IMAGE=roads OPTIONS=JOBS=8 SHARED=/bucket bash cloud/paper.sh
set -euo pipefail
every=1800 # seconds between pushes: what a lost machine had finished since the last one is made again
mkdir -p "$HOME/hub" "$SHARED/dvc"

image() { # image [DOCKER OPTIONS...] -- ARGUMENTS...
  local options=()
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -e OPENAI_API_KEY -e OPENAI_BASE_URL \
    -v "$PWD:/roads" -v "$HOME/hub:/hub" -v "$SHARED:/shared" "${options[@]}" "$IMAGE" "${@:2}"
}
dvc() { image --entrypoint /opt/venv/bin/dvc -- --wait-for-lock "$@"; }
push() { # dvc.lock last: all that it names is there by then
  cp dvc.lock params.yaml .dvc/tmp/
  dvc push --quiet --run-cache && cp .dvc/tmp/dvc.lock .dvc/tmp/params.yaml "$SHARED/"
}
stop() {
  docker stop --time 60 figures >/dev/null 2>&1 || true
  exit 143
}

image -- setup
dvc remote add --local --force --default shared /shared/dvc
if [ -e "$SHARED/dvc.lock" ]; then
  cp "$SHARED/dvc.lock" "$SHARED/params.yaml" .
  # It fails for stages that have never run, and fetches the others all the same.
  dvc pull --run-cache >/dev/null 2>&1 || echo "Took what was finished from $SHARED; the rest is made."
fi
(
  trap 'kill $!; exit' TERM
  while sleep "$every" & wait $!; do push || echo "A push failed; the next one is in $every s."; done
) &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap stop TERM INT
for figure in $FIGURES; do
  # shellcheck disable=SC2086
  image --name figures -- "$figure" SCALE=paper ${OPTIONS:-} &
  wait $! || { push; exit 1; } # bash runs a trap while it waits, but not while a command in front runs
done
push
image -- report
