#!/usr/bin/env bash
# 一条命令：建环境、安装、检查、测试。参数传给 pytest。
# One command: environment, install, checks, tests. Arguments go to pytest.
#
#   ./scripts/run_tests.sh                   全部 / everything
#   ./scripts/run_tests.sh tests/unit        半分钟，不用 torch / half a minute, without torch
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
prepare_environment test
# the report is opened in a real browser where there is one; only a throw-away machine gets it installed
if [ "${CI:-}" = true ] && ! command -v chromium > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    apt-get install -y -qq --no-install-recommends chromium > /dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } > /dev/null 2>&1 || true
fi
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m bandit -q -c pyproject.toml -r lora_practice fine_tuning_practice.py inference.py scripts
if [ $# = 0 ]; then # two files at a time, each on one core; the long ones first
    set -- -n 2 --dist loadfile --no-loadscope-reorder tests/real tests/tiny tests/unit
fi
exec "$PYTHON" -m pytest --cov=lora_practice --cov-report=term "$@"
