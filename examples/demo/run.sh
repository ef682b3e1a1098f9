#!/usr/bin/env bash
# The whole demo: a cluster, the relay, a writer, a page. `make demo` builds and installs what this needs first.
. "$(dirname "$(realpath "$0")")/../stage.sh"
begin demo
"$bin/psql" -qX -v ON_ERROR_STOP=1 "$database" -f examples/demo/schema.sql -f examples/todo.sql \
  -c "insert into todos (user_id, title, done) select person.id, todo.* from person, (values
      ('Water the plants', true), ('Answer the letters', false), ('Book a table for four', false)) todo
      where person.name = 'Ana'" >/dev/null

# The ids of schema.sql.
ana=a0000000-0000-4000-8000-000000000001
ben=b0000000-0000-4000-8000-000000000002
edda=e0000000-0000-4000-8000-000000000005
ana_token=$(token --role authenticated --sub $ana)
ben_token=$(token --role authenticated --sub $ben)
edda_token=$(token --role authenticated --sub $edda --claims '{"app_metadata":{"role":"admin"}}')
# What supabase-js calls the anon key.
key=$(token --role anon)

serve_relay

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
compile_client $work/page/client/dist
serve_page examples/demo/serve.mjs examples/demo/page/* examples/todo.html
wait_until_ready

while "$bin/psql" -qX -v ON_ERROR_STOP=1 "$database" -f examples/demo/writer.sql; do :; done >/dev/null 2>$work/writer.log 9>&- &
children+=($!)

cat <<T

  Open      http://127.0.0.1:$page_port

  Then change rows from another terminal, and watch who sees it:

    ${lines[0]}
    ${lines[1]}
    ${lines[2]}

  A list of todos of Ana, by the client of examples/client: it is right again after whatever was down.

    http://127.0.0.1:$page_port/todo.html
    $psql $database -c "insert into todos (user_id, title) values ('$ana', 'Water the plants')"
    $psql $database -c "update todos set done = not done"

  The same without a page, as Ana, Ben and the admin Edda:

    . target/demo/tokens
    curl "\$RELAY_URL/realtime/v1/changes?table=agent_access" -H "Authorization: Bearer \$ANA"
    $relay tail system_alerts --token "\$EDDA"

  Relay     http://127.0.0.1:$relay_port, its log is $work/relay.log
  Database  $database

  Ctrl-C stops everything and removes the database.

T

stay
