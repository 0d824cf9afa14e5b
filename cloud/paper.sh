#!/usr/bin/env bash
# Makes FIGURES at scale paper in the image IMAGE, and continues where another machine stopped: DVC's remote, dvc.lock,
# params.yaml, active.yaml and the judge's answers lie in SHARED, a bucket's mount or a shared folder. Asked to stop, it lets the runner
# end its stages. With SCRATCH, a folder that outlives the machine, a stage that was cut continues from its last checkpoint.
#     FIGURES=fig11 IMAGE=roads OPTIONS=JOBS=8 SHARED=/bucket bash cloud/paper.sh
set -euf -o pipefail # f: FIGURES and OPTIONS are words, and no patterns of file names
every=300 # seconds: a lost machine's answers since then are asked for again; of six times that, stages are made again
mkdir -p "$HOME/hub" "$SHARED/dvc" runs/.scratch ${SCRATCH:+"$SCRATCH"}

image() { # image [DOCKER OPTIONS...] -- ARGUMENTS...
  local options=()
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" -e OPENAI_API_KEY -e OPENAI_BASE_URL \
    -v "$PWD:/roads" -v "$HOME/hub:/hub" -v "$SHARED:/shared" ${SCRATCH:+-v "$SCRATCH:/roads/runs/.scratch"} \
    "${options[@]}" "$IMAGE" "${@:2}"
}
dvc() { image --entrypoint /opt/venv/bin/dvc -- --wait-for-lock "$@"; }
push() { # dvc.lock last: all that it names is there by then
  cp dvc.lock params.yaml active.yaml .dvc/tmp/
  dvc push --quiet --run-cache && cp .dvc/tmp/{params,active}.yaml .dvc/tmp/dvc.lock "$SHARED/"
}
answers() { # what was paid for; SQLite itself copies a file that is being written. If that fails, the rest continues
  [ -e runs/judge.sqlite ] || return 0
  local copy=judge.sqlite.$BASHPID
  {
    image --entrypoint /opt/venv/bin/python -- -c "import sqlite3, sys; ours, theirs = map(sqlite3.connect, sys.argv[1:])
ours.backup(theirs); theirs.close()" runs/judge.sqlite ".dvc/tmp/$copy" &&
      cp ".dvc/tmp/$copy" "$SHARED/" && mv "$SHARED/$copy" "$SHARED/judge.sqlite" && rm ".dvc/tmp/$copy"
  } || echo "The judge's answers were not copied to $SHARED."
}
stop() {
  docker stop --time 60 figures >/dev/null 2>&1 || true
  answers
  exit 143
}

image -- setup
dvc remote add --local --force --default shared /shared/dvc
[ -e runs/judge.sqlite ] || [ ! -e "$SHARED/judge.sqlite" ] || cp "$SHARED/judge.sqlite" runs/
if [ -e "$SHARED/dvc.lock" ]; then
  cp "$SHARED"/{dvc.lock,params.yaml,active.yaml} .
  # It fails for stages that have never run, and fetches the others all the same.
  dvc pull --run-cache >/dev/null 2>&1 || echo "Took what was finished from $SHARED; the rest is made."
fi
(
  trap 'kill $!; exit' TERM
  for ((n = 1; ; n++)); do
    sleep "$every" & wait $!
    answers
    ((n % 6)) || push || echo "A push failed; the next one is in $((6 * every)) s."
  done
) &
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap stop TERM INT
for figure in $FIGURES; do
  # shellcheck disable=SC2086
  image --name figures -- "$figure" SCALE=paper ${OPTIONS:-} &
  wait $! || { answers; push; exit 1; } # bash runs a trap while it waits, but not while a command in front runs
done
answers
push
image -- report
