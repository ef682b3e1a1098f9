#!/usr/bin/env bash
# Installs the Autobahn test suite into target/autobahn and prints the Python that runs it. Quick when it is there.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."
say() { echo "autobahn: $*" >&2; }

find_python() {
  local python
  for python in ${PYTHON27:+"$PYTHON27"} python2.7 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/2.7.*/bin/python2.7 /usr/bin/python2.7; do
    if "$python" -c 'import sys, ssl; sys.exit(sys.version_info[:2] != (2, 7))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  return 1
}

python=$(find_python) || {
  say "the suite runs on Python 2.7 alone: install one (pyenv install 2.7.18), or name it with PYTHON27=…"
  exit 1
}
stamp=$({ "$python" --version; cat tests/autobahn/requirements.txt; } 2>&1 | sha256sum)
if [ "$(cat target/autobahn/.stamp 2>/dev/null)" != "$stamp" ]; then
  say "installing the Python packages of tests/autobahn/requirements.txt"
  rm -rf target/autobahn
  mkdir -p target/autobahn
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --user >&2
  "$python" -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --target target/autobahn/python \
    --requirement tests/autobahn/requirements.txt >&2
  echo "$stamp" >target/autobahn/.stamp
fi
echo "$python"
