#!/usr/bin/env bash
# 一条命令：建环境、安装、检查、测试。参数传给 pytest。
# One command: environment, install, checks, tests. Arguments go to pytest.
#
#   ./scripts/run_tests.sh                   全部 / everything
#   ./scripts/run_tests.sh tests/unit        半分钟，不用 torch / half a minute, without torch
#
# 每一部分用了多久：打印出来，也写进 $LORA_PRACTICE_TIMES（若设置）。
# How long each part took is printed, and added to the file $LORA_PRACTICE_TIMES if that is set.
set -euo pipefail
cd "$(dirname "$0")/.."
took() { # NAME: since the last call
    printf '%-8s %5d s\n' "$1" $((SECONDS - since)) | tee -a "${LORA_PRACTICE_TIMES:-/dev/null}"
    since=$SECONDS
}
since=$SECONDS
. scripts/environment.sh
prepare_environment test
# the report is opened in a real browser where there is one; only a throw-away machine gets it installed
if [ "${CI:-}" = true ] && ! command -v chromium > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    apt-get install -y -qq --no-install-recommends chromium > /dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 || true
fi
took set-up
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m bandit -q -c pyproject.toml -r lora_practice fine_tuning_practice.py inference.py scripts
took checks
if [ $# -gt 0 ]; then
    case " $* " in *" -s "* | *" --pdb "* | *" -n"*) exec "$PYTHON" -m pytest "$@" ;; esac
    exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
fi
# two files at a time, each on one core; each tier in a process of its own, since tests/unit holds that it loads no torch
side_by_side=(-n 2 --dist loadfile --no-loadscope-reorder --cov=lora_practice --cov-append)
"$PYTHON" -m coverage erase
"$PYTHON" -m pytest "${side_by_side[@]}" --cov-report= tests/unit
took unit
"$PYTHON" -m pytest "${side_by_side[@]}" --cov-report= tests/tiny
took tiny
"$PYTHON" -m pytest "${side_by_side[@]}" --cov-report=term tests/real
took real
