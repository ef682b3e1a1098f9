#!/usr/bin/env bash
# A throwaway PostgreSQL cluster of our own: free port, Unix socket and 127.0.0.1, never as root, no other server touched.
set -euo pipefail

usage() {
  cat <<'T'
cluster.sh start  [DIR] [-c NAME=VALUE ...]             starts it (made if missing); the last line is its URL
cluster.sh stop   [DIR]                                 stops it, keeps the data
cluster.sh kill   [DIR]                                 stops it without a checkpoint, as a crash would
cluster.sh drop   [DIR]                                 stops it and removes everything
cluster.sh status [DIR]                                 exit code 0 if it runs
cluster.sh url    [DIR]                                 postgres://postgres@127.0.0.1:PORT/postgres
cluster.sh socket [DIR]                                 the folder of its Unix socket
cluster.sh bin                                          the folder of the PostgreSQL programs
cluster.sh port   [FIRST]                               a free port on 127.0.0.1, from FIRST upwards
cluster.sh run    [DIR] [-c NAME=VALUE ...] -- COMMAND  a fresh cluster, COMMAND with its URL in
                                                        RELAY_TEST_DATABASE_URL, and the cluster stops
DIR is target/cluster unless given.
T
}

die() { echo "cluster.sh: $*" >&2; exit 1; }

# The newest server of at least version 14, or the one of RELAY_PG_BIN; an argument asks for that major version alone.
find_bin() {
  local wanted=${1:-} dir version best='' best_version=13
  for dir in ${RELAY_PG_BIN:+"$RELAY_PG_BIN"} /usr/lib/postgresql/*/bin /usr/pgsql-*/bin \
             "$(dirname "$(readlink -f "$(command -v postgres || echo /nowhere/postgres)")")"; do
    [ -x "$dir/initdb" ] && [ -x "$dir/pg_ctl" ] && [ -x "$dir/postgres" ] || continue
    version=$("$dir/postgres" --version | sed -E 's/^[^0-9]*([0-9]+).*/\1/')
    [ -z "$wanted" ] || [ "$version" = "$wanted" ] || continue
    [ "$version" -gt "$best_version" ] || continue
    best=$dir best_version=$version
    [ "$dir" != "${RELAY_PG_BIN:-}" ] || break
  done
  echo "$best"
}

port_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

free_port() {
  local port=${1:-$((20000 + RANDOM % 10000))}
  while port_taken "$port"; do port=$((port + 1)); done
  echo "$port"
}

# PostgreSQL refuses to run as root; another user runs it then.
owner=''
if [ "$(id -u)" = 0 ]; then
  owner=postgres
  getent passwd postgres >/dev/null || owner=nobody
fi
as_owner() {
  if [ -z "$owner" ]; then
    "$@"
  elif command -v runuser >/dev/null; then
    (cd / && runuser -u "$owner" -- "$@")
  elif command -v setpriv >/dev/null; then
    (cd / && setpriv --reuid "$owner" --regid "$(id -g "$owner")" --clear-groups "$@")
  else
    die "running as root needs runuser or setpriv (package util-linux)"
  fi
}

# Where the cluster really is: DIR, or what DIR.path says when the other user can't reach DIR.
locate() {
  home=$(realpath -m -- "$1")
  note=$home.path
  if [ -f "$note" ] && [ -d "$(cat "$note")" ]; then home=$(cat "$note"); fi
  data=$home/data log=$home/log
}

make_home() {
  mkdir -p "$home"
  if [ -n "$owner" ]; then
    chown "$owner" "$home"
    if ! as_owner test -w "$home"; then
      rmdir "$home"
      home=$(mktemp -d /tmp/relay-cluster.XXXXXX)
      chown "$owner" "$home"
      echo "$home" >"$note"
      data=$home/data log=$home/log
    fi
  fi
  chmod 700 "$home"
}

# 107 bytes is the longest path of a socket, of which "/.s.PGSQL.65535" takes 15.
socket_dir() {
  if [ -f "$home/socket" ] && [ -d "$(cat "$home/socket")" ]; then cat "$home/socket"; return; fi
  local dir=$home
  if [ "${#home}" -gt 90 ]; then
    dir=$(mktemp -d /tmp/relay-socket.XXXXXX)
    [ -z "$owner" ] || chown "$owner" "$dir"
  fi
  echo "$dir" | tee "$home/socket"
}

postmaster_line() { sed -n "$1p" "$data/postmaster.pid" 2>/dev/null; }

# A pid file can outlive its server and name a process that is not ours by now.
is_running() {
  local pid
  pid=$(postmaster_line 1) || return 1
  [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null || return 1
  [ ! -r "/proc/$pid/cmdline" ] || tr '\0' '\n' <"/proc/$pid/cmdline" | grep -qxF -- "$data"
}

url() { echo "postgres://postgres@127.0.0.1:$(postmaster_line 4)/postgres"; }

start() {
  if is_running; then url; return; fi
  bin=$(find_bin)
  [ -n "$bin" ] || die "no PostgreSQL server of version 14 or newer found; run 'make setup' or set RELAY_PG_BIN"
  # The process that interrupts this one stops the cluster afterwards, and can only do that once it is up. Hence setsid below too:
  # initdb and postgres put handlers of their own in the place of what is ignored here.
  trap '' INT TERM HUP
  make_home
  if [ -f "$data/PG_VERSION" ]; then
    bin=$(find_bin "$(cat "$data/PG_VERSION")")
    if [ -z "$bin" ]; then rm -rf "$data"; bin=$(find_bin); fi
  fi
  if [ ! -f "$data/PG_VERSION" ] || [ ! -f "$home/complete" ]; then
    rm -rf "$data"
    local locale=C
    if locale -a 2>/dev/null | grep -qixE 'C\.utf-?8'; then locale=C.UTF-8; fi
    as_owner setsid -w "$bin/initdb" -D "$data" -U postgres -A trust -E UTF8 --locale="$locale" --no-sync --no-instructions \
      >"$home/initdb.log" 2>&1 || { cat "$home/initdb.log" >&2; die "initdb failed"; }
    touch "$home/complete"
  fi
  rm -f "$data/postmaster.pid"
  local sockets port options='' option
  sockets=$(socket_dir)
  # The port of the last run is kept if it is free: a client that reconnects finds the server again.
  port=$(cat "$home/port" 2>/dev/null || true)
  for option in "$@"; do options+=" $(printf %q "$option")"; done
  for _ in {1..5}; do
    if [ -z "$port" ] || port_taken "$port"; then port=$(free_port); fi
    if as_owner setsid -w "$bin/pg_ctl" start -D "$data" -l "$log" -w -t 120 -s \
      -o "-p $port -k $(printf %q "$sockets") -c listen_addresses=127.0.0.1 -c max_connections=200$options" \
      </dev/null >"$home/start.log" 2>&1 9>&-; then
      echo "$port" >"$home/port"
      trap - INT TERM HUP
      url
      return
    fi
    port=''
    grep -q 'could not create any TCP/IP sockets' "$log" || break
  done
  cat "$home/start.log" >&2
  tail -n 20 "$log" >&2 || true
  die "PostgreSQL did not start"
}

stop() {
  is_running || return 0
  # Its own programs, as the server may be of another version than the newest installed.
  bin=$(find_bin "$(cat "$data/PG_VERSION")")
  as_owner "$bin/pg_ctl" stop -D "$data" -m "$1" -w -t 60 -s </dev/null
}

drop() {
  stop immediate
  if [ -f "$home/socket" ] && [ "$(cat "$home/socket")" != "$home" ]; then rm -rf "$(cat "$home/socket")"; fi
  rm -rf "$home" "$note"
}

run() {
  local settings=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do settings+=("$1"); shift; done
  [ $# -gt 1 ] || die "run: '-- COMMAND' is missing"
  shift
  mkdir -p "$(dirname "$home")"
  exec 9>"$home.lock"
  if ! flock -n 9; then echo "Waiting for another run to leave $home." >&2; flock 9; fi
  child=''
  trap 'trap "" INT TERM HUP; end_child; locate "$given"; stop immediate' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
  drop
  local started
  started=$(start ${settings[@]+"${settings[@]}"})
  # A process group of its own, so that a signal to us alone ends all of it.
  set -m
  RELAY_TEST_DATABASE_URL=$started "$@" </dev/null 9>&- &
  child=$!
  set +m
  local code=0
  wait "$child" || code=$?
  exit "$code"
}

end_child() {
  [ -n "$child" ] || return 0
  kill -INT -- "-$child" 2>/dev/null || return 0
  for _ in {1..50}; do
    kill -0 -- "-$child" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL -- "-$child" 2>/dev/null || true
}

command=${1:-help}
[ $# -eq 0 ] || shift
given=$(dirname "$(realpath "$0")")/../../target/cluster
if [ "$command" != port ] && [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then given=$1; shift; fi
locate "$given"

case $command in
  start) start "$@" ;;
  stop) stop fast ;;
  kill) stop immediate ;;
  drop) drop ;;
  status) if is_running; then echo "running at $(url)"; else echo "not running"; exit 3; fi ;;
  url) is_running || die "not running"; url ;;
  socket) is_running || die "not running"; postmaster_line 5 ;;
  bin) bin=$(find_bin); [ -n "$bin" ] || die "no PostgreSQL server of version 14 or newer found"; echo "$bin" ;;
  port) free_port "$@" ;;
  run) run "$@" ;;
  help | -h | --help) usage ;;
  *) usage >&2; exit 2 ;;
esac
