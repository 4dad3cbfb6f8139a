#!/usr/bin/env bash
# Runs the suites over real engines, each in an environment of its own, which is built where it is not there.
#
#   tests/live/run.sh [vllm] [sglang] [verl]     default: all of them
#
# An engine whose environment cannot be built is skipped; the last lines say why. Exit code 1 if a suite failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- vllm sglang verl
failed=0 account=()
for engine in "$@"; do
  if ! output=$("tests/live/build_$engine.sh" 2>&1 | tee >(cat >&2)); then
    account+=("$engine: SKIPPED, its environment could not be built: $(tail -n 1 <<<"$output")")
    continue
  fi
  begun=$SECONDS
  if ".venv-$engine/bin/python" -m pytest -c tests/live/pytest.ini tests/live/test_"$engine"*.py; then
    account+=("$engine: passed in $((SECONDS - begun)) s")
  else
    account+=("$engine: FAILED")
    failed=1
  fi
done
echo
printf '%s\n' "${account[@]}"
exit $failed
