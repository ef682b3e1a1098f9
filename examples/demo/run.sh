#!/usr/bin/env bash
# The whole demo: a cluster, the relay, a writer, a page. `make demo` builds and installs what this needs first.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."

cluster=tests/support/cluster.sh
relay=${CARGO_TARGET_DIR:-target}/release/relay
work=target/demo

mkdir -p $work/page
exec 9>$work/lock
if ! flock -n 9; then
  echo "The demo already runs from this folder." >&2
  exit 1
fi

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
trap finish EXIT
trap 'echo; echo Stopped.; exit 0' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

$cluster drop $work/cluster
server=$($cluster start $work/cluster)
bin=$($cluster bin)
database=${server%/postgres}/demo
"$bin/psql" -qX "$server" -c 'create database demo'

# Given by the environment, as a command line can be read by everyone on the machine.
RELAY_JWT_SECRET=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
export RELAY_JWT_SECRET
relay_port=$($cluster port "${RELAY_PORT:-4000}")
page_port=$($cluster port "${DEMO_PORT:-8000}")

"$relay" install --database-url "$database" >$work/relay.log 2>&1 || { cat $work/relay.log >&2; exit 1; }
"$bin/psql" -qX -v ON_ERROR_STOP=1 "$database" -f examples/demo/schema.sql >/dev/null

# The ids of schema.sql.
ana=a0000000-0000-4000-8000-000000000001
ben=b0000000-0000-4000-8000-000000000002
edda=e0000000-0000-4000-8000-000000000005
token() { "$relay" token --ttl 24h "$@"; }
ana_token=$(token --role authenticated --sub $ana)
ben_token=$(token --role authenticated --sub $ben)
edda_token=$(token --role authenticated --sub $edda --claims '{"app_metadata":{"role":"admin"}}')
# What supabase-js calls the anon key.
key=$(token --role anon)

"$relay" serve --database-url "$database" --listen "127.0.0.1:$relay_port" >>$work/relay.log 2>&1 9>&- &
children+=($!)

psql=psql
[ "$(command -v psql)" ] || psql=$bin/psql
lines=(
  "$psql $database -c \"update agent_access set enabled = not enabled where agent = 'web' and user_id = '$ana'\""
  "$psql $database -c \"update user_status set is_online = not is_online where username = 'Chloe'\""
  "$psql $database -c \"insert into system_alerts (severity, message) values ('critical', 'Hello from a terminal')\""
)
says=(
  "Switch Ana’s web agent. Ana and the admin see it, Ben does not."
  "Let Chloe come or go. Ana shares a conversation with Chloe, Ben does not."
  "Raise an alert. Only the admin sees it."
)

(
  umask 077
  printf 'export RELAY_URL=http://127.0.0.1:%s\nANA=%s\nBEN=%s\nEDDA=%s\n' \
    "$relay_port" "$ana_token" "$ben_token" "$edda_token" >$work/tokens
)
cp examples/demo/page/* tests/clients/node_modules/@supabase/supabase-js/dist/umd/supabase.js $work/page/
cat >$work/page/config.json <<T
{
  "url": "http://127.0.0.1:$relay_port",
  "key": "$key",
  "people": [
    { "id": "$ana", "name": "Ana", "role": "own rows, own conversations", "token": "$ana_token" },
    { "id": "$ben", "name": "Ben", "role": "own rows, own conversations", "token": "$ben_token" },
    { "id": "$edda", "name": "Edda", "role": "admin by a claim of the token", "token": "$edda_token", "admin": true }
  ],
  "try": [
    { "says": "${says[0]}", "line": "${lines[0]//\"/\\\"}" },
    { "says": "${says[1]}", "line": "${lines[1]//\"/\\\"}" },
    { "says": "${says[2]}", "line": "${lines[2]//\"/\\\"}" }
  ]
}
T
node examples/demo/serve.mjs $work/page "$page_port" >$work/page.log 2>&1 9>&- &
children+=($!)

ready() {
  local status
  exec 3<>"/dev/tcp/127.0.0.1/$relay_port" || return 1
  printf 'GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' >&3
  read -r -t 5 _ status _ <&3 && [[ $status == 2* ]]
}
for _ in {1..100}; do
  if (ready) 2>/dev/null; then break; fi
  kill -0 "${children[0]}" 2>/dev/null || break
  sleep 0.1
done
if ! (ready) 2>/dev/null; then
  cat $work/relay.log >&2
  echo "The relay did not become ready." >&2
  exit 1
fi

while "$bin/psql" -qX -v ON_ERROR_STOP=1 "$database" -f examples/demo/writer.sql; do :; done >/dev/null 2>$work/writer.log 9>&- &
children+=($!)

cat <<T

  Open      http://127.0.0.1:$page_port

  Then change rows from another terminal, and watch who sees it:

    ${lines[0]}
    ${lines[1]}
    ${lines[2]}

  The same without a page, as Ana, Ben and the admin Edda:

    . target/demo/tokens
    curl "\$RELAY_URL/realtime/v1/changes?table=agent_access" -H "Authorization: Bearer \$ANA"
    $relay tail system_alerts --token "\$EDDA"

  Relay     http://127.0.0.1:$relay_port, its log is $work/relay.log
  Database  $database

  Ctrl-C stops everything and removes the database.

T

wait -n "${children[@]}" || true
tail -n 5 $work/relay.log $work/writer.log $work/page.log >&2
echo "One of the demo's programs has stopped." >&2
exit 1
