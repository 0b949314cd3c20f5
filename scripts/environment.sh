# Sourced by train.sh and run_tests.sh: sets PYTHON to an interpreter in which everything is installed.
#
#   prepare_environment [EXTRA]    EXTRA: "test" or nothing
#
# An activated environment (or `uv run`) is used as it is, but for conda's base, which is not ours to fill; otherwise .venv is made. What is done is skipped.
# 由 train.sh 和 run_tests.sh 调用：准备好环境，把 PYTHON 指向它。已激活的环境直接用，否则建 .venv。

say() { # 中文 English
    case "${LORA_PRACTICE_LANG:-${LC_ALL:-${LC_MESSAGES:-${LANG:-}}}}" in
        zh*) printf '%s\n' "$1" >&2 ;;
        *) printf '%s\n' "$2" >&2 ;;
    esac
}

# Nothing is imported from the current folder, as `-m`, `-c` and `-` would; what PYTHONPATH and the user's own site hold
# is (an HPC module's torch, say), which -I would hide. Empty entries: sys.path[0], which PYTHONSAFEPATH leaves out.
ELSEWHERE='import sys; sys.path = [one for one in sys.path if one]'

run_module() { # MODULE ARGUMENT...: python -m, without the current folder
    "$PYTHON" -c "$ELSEWHERE; del sys.argv[0]; import runpy
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)" "$@"
}

prepare_environment() {
    local extra="${1:-}" stamp wanted
    if [ -n "${VIRTUAL_ENV:-}" ] || { [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; }; then
        PYTHON="$(command -v python)"
    else
        [ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null || make_venv
        PYTHON="$PWD/.venv/bin/python"
    fi
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.lora-practice-${extra:-run}"
    wanted="$(cat pyproject.toml requirements/*.txt | cksum) $PWD"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        run_module pip --version >/dev/null 2>&1 || run_module ensurepip -q
        install_all "$extra"
        printf '%s' "$wanted" >"$stamp"
    fi
    # without it the Hub is needed; if it cannot be fetched now, the run itself says what to do
    run_module lora_practice.sources.embedded || true
}

make_venv() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python python3.13 python3.12 python3.11 python3.10 python3.9; do
        [ -n "$candidate" ] || continue
        "$candidate" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 14))' 2>/dev/null || continue
        say "新建环境 .venv（$("$candidate" --version)）" "making .venv ($("$candidate" --version))"
        "$candidate" -I -m venv .venv && return
        say "错误：建不了 .venv（Debian/Ubuntu 上：sudo apt install python3-venv）" \
            "Error: cannot make .venv (on Debian/Ubuntu: sudo apt install python3-venv)"
        exit 2
    done
    say "错误：需要 Python 3.9 到 3.13；装一个，或写 PYTHON=路径" \
        "Error: Python 3.9 to 3.13 is needed; install one, or set PYTHON=path"
    exit 2
}

# An environment without torch gets the versions known to work. One that has it is somebody's own and keeps what it has,
# but for .venv, which only keeps its torch: that may have been chosen by hand, for the card.
install_all() { # EXTRA
    local versions
    versions="$(stack)"
    if ! "$PYTHON" -c "$ELSEWHERE; import torch" 2>/dev/null; then
        install_torch "$versions"
    elif [ "$PYTHON" != "$PWD/.venv/bin/python" ]; then
        versions=/dev/null
    fi
    say "安装其余依赖（可能要几分钟）……" "installing the other dependencies (this may take some minutes) ..."
    run_module pip install --disable-pip-version-check -q -c <(grep -v '^torch==' "$versions") -e ".${1:+[$1]}"
}

stack() { # the file of versions for this Python and this card
    if [ "$(card)" = old ] || "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 10))'; then
        echo requirements/cu126.txt
    elif [ "$(card)" = new ]; then
        echo requirements/newest.txt
    else
        echo requirements/cpu.txt
    fi
}

# The torch build follows the machine. PyPI's Linux wheels carry gigabytes of CUDA, so without an NVIDIA card
# the CPU build of pytorch.org is preferred; where pip already knows a CPU build, the same command takes that.
install_torch() { # FILE with its version
    local version index=""
    version="$(sed -n 's/^torch==//p' "$1")"
    case "$(uname -s)-$(card)" in
        Linux-none) index=https://download.pytorch.org/whl/cpu ;;
        Linux-old) index=https://download.pytorch.org/whl/cu126 ;; # the last CUDA with Maxwell, Pascal and Volta
    esac
    say "安装 torch $version（$(card_words)）……" "installing torch $version ($(card_words)) ..."
    if [ -n "$index" ] && ! answers "$index/torch/"; then
        say "连不上 $index，改用 pip 自己的源（可能下载约 3 GB 的 CUDA 版）" \
            "$index cannot be reached: using pip's own index (it may bring the CUDA build, about 3 GB)"
        index=""
    fi
    # torch==X+cpu sorts above torch==X, so the extra index wins where it has this version
    run_module pip install --disable-pip-version-check "torch==$version" ${index:+--extra-index-url "$index"}
}

card() { # none | old (before Turing: no kernels in newer CUDA builds) | new
    local capability
    capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')"
    case "$capability" in
        '' | *[!0-9]*) echo none ;;
        *) [ "$capability" -lt 75 ] && echo old || echo new ;;
    esac
}

card_words() {
    case "$(card)" in
        none) say "没有 NVIDIA 显卡：CPU 版" "no NVIDIA card: the CPU build" 2>&1 ;;
        old) say "老显卡：CUDA 12.6 版" "an older card: the CUDA 12.6 build" 2>&1 ;;
        new) say "有 NVIDIA 显卡：CUDA 版" "an NVIDIA card: the CUDA build" 2>&1 ;;
    esac
}

answers() { # does this address answer within five seconds?
    "$PYTHON" - "$1" <<'EOF' 2>/dev/null
import sys
sys.path = [one for one in sys.path if one]
import threading, urllib.request
ok = threading.Event()
def ask():
    urllib.request.urlopen(sys.argv[1], timeout=5).close()
    ok.set()
threading.Thread(target=ask, daemon=True).start()
sys.exit(0 if ok.wait(5) else 1)
EOF
}
