#!/usr/bin/env bash
# Runs figures from the kit (scripts/kit.py) on a machine without a network:
#     run.sh FIGURE... [--minutes N] [--scale NAME] [--jobs N]
# It stops after N minutes; the same command continues from there. What comes home is written to home.tar.xz beside it.
set -euo pipefail
kit=$(cd "$(dirname "$0")" && pwd)
minutes=0 jobs="" figures=()
scale=$(sed -n 's/.*"scale": "\([^"]*\)".*/\1/p' "$kit/kit.json")
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) minutes=$2; shift 2 ;;
    --scale) scale=$2; shift 2 ;;
    --jobs) jobs=$2; shift 2 ;;
    -*) echo "error: $1: expected FIGURE... [--minutes N] [--scale NAME] [--jobs N]" >&2; exit 2 ;;
    *) figures+=("$1"); shift ;;
  esac
done
[ ${#figures[@]} -gt 0 ] || figures=(fig11)
python=$(command -v "${PYTHON:-python3}") || { echo "error: no python3 here; set PYTHON" >&2; exit 2; }

# Packages go into site/, once; scipy and matplotlib only where the machine has none.
export PYTHONPATH="$kit/site"
if [ ! -e "$kit/site/.done" ]; then
  "$python" - "$kit" <<'PYTHON'
import importlib.util
import sys
import zipfile
from pathlib import Path

kit = Path(sys.argv[1])
for name in ("torch", "transformers", "accelerate"):
    if importlib.util.find_spec(name) is None:
        sys.exit(f"error: no package {name} in {sys.executable}; the kit brings everything but torch, transformers "
                 "and accelerate")
version = f"cp{sys.version_info.major}{sys.version_info.minor}"
compiled = [w.name for w in kit.glob("wheels/pydantic_core-*.whl")]
if not any(version in name for name in compiled):
    sys.exit(f"error: this is Python {sys.version.split()[0]}, and the kit's wheels are {', '.join(compiled)}; set PYTHON")
wheels = sorted(kit.glob("wheels/*.whl"))
missing = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
if missing:
    more = sorted(kit.glob("extra/*.whl"))
    if not more:
        sys.exit(f"error: no package {' or '.join(missing)} here; bring the kit's extra.tar.* too and join again")
    wheels += more
for wheel in wheels:
    zipfile.ZipFile(wheel).extractall(kit / "site")
(kit / "site/.done").touch()
print(f"{len(wheels)} packages unpacked", flush=True)
PYTHON
fi

mkdir -p "$kit/bin"
printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" >"$kit/bin/python"
chmod +x "$kit/bin/python"
cd "$kit/roads"
export PATH="$kit/bin:$PATH" PYTHONPATH="$kit/site:src" PYTHONHASHSEED=0 MPLBACKEND=Agg OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false DVC_NO_ANALYTICS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456 # as the Makefile has it
export TORCHINDUCTOR_COMPILE_THREADS=4 # each of several stages has so many
[ -e .git ] || grep -qs no_scm .dvc/config.local || {
  python -m dvc config --local core.no_scm true
  python -m dvc config --local cache.type hardlink,copy # a checkpoint is there once
}
python -m roads.active set --scale "$scale"

started=$(date +%s) code=0
run=(python -m roads.runner.repro ${jobs:+--jobs "$jobs"} "${figures[@]}")
if [ "$minutes" != 0 ]; then run=(timeout --signal=TERM --kill-after=30 "${minutes}m" "${run[@]}"); fi
"${run[@]}" || code=$?
echo "run.sh: $(($(date +%s) - started)) s, exit code $code"
python scripts/kit.py pack --scale "$scale" "$kit/home.tar.xz"
exit $code
