# What the demos stand on: a throwaway cluster, a database, a relay, and the end of all. Sourced by their run.sh.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."

cluster=tests/support/cluster.sh
relay=${CARGO_TARGET_DIR:-target}/release/relay
children=()

finish() {
  trap '' INT TERM HUP
  [ ${#children[@]} -eq 0 ] || kill "${children[@]}" 2>/dev/null || true
  for _ in {1..50}; do
    [ -n "$(jobs -rp)" ] || break
    sleep 0.1
  done
  jobs -rp | xargs -r kill -KILL 2>/dev/null || true
  $cluster drop $work/cluster
}

# begin NAME: the database NAME with the relay's schema, in target/NAME, once at a time.
begin() {
  work=target/$1
  mkdir -p $work/page
  exec 9>$work/lock
  if ! flock -n 9; then
    echo "The demo already runs from this folder." >&2
    exit 1
  fi
  trap finish EXIT
  trap 'echo; echo Stopped.; exit 0' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP

  $cluster drop $work/cluster
  server=$($cluster start $work/cluster)
  bin=$($cluster bin)
  database=${server%/postgres}/$1
  "$bin/psql" -qX "$server" -c "create database $1"
  psql=psql
  [ "$(command -v psql)" ] || psql=$bin/psql

  # Given by the environment, as a command line can be read by everyone on the machine.
  RELAY_JWT_SECRET=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
  export RELAY_JWT_SECRET
  relay_port=$($cluster port "${RELAY_PORT:-4000}")
  page_port=$($cluster port "${DEMO_PORT:-8000}")

  "$relay" install --database-url "$database" >$work/relay.log 2>&1 || { cat $work/relay.log >&2; exit 1; }
}

token() { "$relay" token --ttl 24h "$@"; }

serve_relay() {
  "$relay" serve --database-url "$database" --listen "127.0.0.1:$relay_port" >>$work/relay.log 2>&1 9>&- &
  children+=($!)
}

# serve_page SCRIPT FILE ...: these files and supabase-js, by a script for Node.js.
serve_page() {
  local script=$1
  shift
  cp "$@" tests/clients/node_modules/@supabase/supabase-js/dist/umd/supabase.js $work/page/
  node "$script" $work/page "$page_port" >$work/page.log 2>&1 9>&- &
  children+=($!)
}

# The helper of examples/client, compiled for a page.
compile_client() { examples/client/node_modules/.bin/tsc -p examples/client --outDir "$1"; }

ready() {
  local status
  exec 3<>"/dev/tcp/127.0.0.1/$relay_port" || return 1
  printf 'GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
  read -r -t 5 _ status _ <&3 && [[ $status == 2* ]]
}

wait_until_ready() {
  for _ in {1..100}; do
    if (ready) 2>/dev/null; then return; fi
    kill -0 "${children[0]}" 2>/dev/null || break
    sleep 0.1
  done
  cat $work/relay.log >&2
  echo "The relay did not become ready." >&2
  exit 1
}

# Until Ctrl-C, or until one of the programs ends.
stay() {
  wait -n "${children[@]}" || true
  tail -n 5 $work/*.log >&2
  echo "One of the demo's programs has stopped." >&2
  exit 1
}
