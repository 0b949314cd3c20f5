#!/usr/bin/env bash
# 一条命令：建环境、安装、训练。参数同 fine_tuning_practice.py；再运行一次会跳过已完成的部分。
# One command: environment, install, train. Flags are those of fine_tuning_practice.py; a second call
# skips what is done.
#
#   ./scripts/train.sh --embedded
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
prepare_environment
if [ "$PYTHON" = "$PWD/.venv/bin/python" ]; then
    export LORA_PRACTICE_PYTHON=.venv/bin/python # for the next command that the run names: nothing is activated
fi
exec "$PYTHON" fine_tuning_practice.py "$@"
