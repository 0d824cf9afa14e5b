#!/usr/bin/env bash
# A quarter of an hour of a bare GPU, used well: parts of two minutes at most, what is worth most first. Results are
# written as they come, so that a part that is cut short has given what it had.
#     scripts/device.sh OUT [PART...]          # every part, in this order:
#         tests    the tests that need CUDA (make test-gpu)
#         check    what this card does for scale paper (make check-gpu), into OUT
#         sampler  our sampler against transformers' generate, and vLLM where it is installed
#         step     a DPO step, one way after another
#         scores   rewards in bf16 against fp32, Pythia-1.4B's shape
#     TINY=1 scripts/device.sh OUT [PART...]   # the same on a CPU, small: a rehearsal
# PYTHON names the interpreter, VLLM_SITE and TRL_SITE folders of packages that only their processes see (- where they are
# installed), SECONDS_EACH the limit (120; 240 for tests). benchmarks/gpu/table.py OUT writes what was found into
# docs/measured.md.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:?expected a folder for the results: scripts/device.sh OUT [PART...]}
shift
all=(tests check sampler step scores)
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=("${all[@]}")
for part in "${parts[@]}"; do
  case " ${all[*]} " in
    *" $part "*) ;;
    *) echo "error: $part: expected one of: ${all[*]}" >&2; exit 2 ;;
  esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python3} tiny=${TINY:+--tiny}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
[ -z "$tiny" ] || export OMP_NUM_THREADS=1
shape=1.4b prompts=32 worse=0
[ -z "$tiny" ] || shape=tiny prompts=2

for part in "${parts[@]}"; do
  case $part in
    tests) run=(-m pytest -q -p no:cacheprovider tests/test_gpu.py) ;;
    check) run=(benchmarks/gpu/check.py --scale paper --out "$out" ${tiny:+--tiny}) ;;
    sampler) run=(benchmarks/gpu/sampler.py --out "$out/sampler.jsonl" --prompts 192 ${tiny:+--tiny} ${VLLM_SITE:+--vllm "$VLLM_SITE"}) ;;
    step) run=(benchmarks/gpu/step.py --out "$out/step.jsonl" --minutes 1.5 ${tiny:+--tiny} ${TRL_SITE:+--trl "$TRL_SITE"}) ;;
    scores) run=(benchmarks/gpu/scores.py --out "$out/scores.jsonl" --shape "$shape" --prompts "$prompts" --minutes 1.5) ;;
  esac
  [ "$part$tiny" != tests--tiny ] || run=(-m pytest -q -p no:cacheprovider tests/test_device.py)
  started=$SECONDS code=0
  limit=${SECONDS_EACH:-$([ "$part" = tests ] && echo 240 || echo 120)} # the tests run every stage three times
  timeout --signal=INT --kill-after=10 "$limit" "$python" "${run[@]}" >"$out/$part.log" 2>&1 || code=$?
  echo "$part: $((SECONDS - started)) s, exit code $code: $(grep -v '^ *$' "$out/$part.log" | tail -1 | cut -c1-200)"
  [ $code = 0 ] || worse=1
done
exit $worse
