#!/usr/bin/env bash
# The five systems on one page. `make systems` builds and installs what this needs first.
. "$(dirname "$(realpath "$0")")/../stage.sh"
begin systems
for file in examples/systems/*.sql; do
  PGOPTIONS=--client-min-messages=warning "$bin/psql" -qX -1 -o /dev/null -v ON_ERROR_STOP=1 -f "$file" "$database"
done

# A person of the page: their id in the sample data, what they may, further claims.
person() {
  printf '{ "id": "%s", "name": "%s", "role": "%s", "token": "%s"%s }' "$2" "$1" "$3" \
    "$(token --sub "$2" --claims "${4:-{\}}")" "${4:+, \"admin\": true}"
}
cat >$work/page/config.json <<T
{
  "url": "http://127.0.0.1:$relay_port",
  "key": "$(token --role anon)",
  "people": [
    $(person Ana a0000000-0000-4000-8000-000000000001 "user: talks with Ben and Chloe"),
    $(person Ben b0000000-0000-4000-8000-000000000002 "user: talks with Ana, Dev and Edda"),
    $(person Chloe c0000000-0000-4000-8000-000000000003 "user: talks with Ana"),
    $(person Edda e0000000-0000-4000-8000-000000000005 "admin, by a claim of the token" '{"app_metadata":{"role":"admin"}}')
  ]
}
T

serve_relay
export DATABASE_URL=$database PSQL=$psql
serve_page examples/systems/serve.mjs examples/demo/page/style.css examples/systems/page/*
wait_until_ready

cat <<T

  Open      http://127.0.0.1:$page_port

  Each statement of the page runs from a terminal, too, and so does any other:

    $psql $database -c "update user_status set \"isOnline\" = not \"isOnline\" where username = 'Chloe'"
    DATABASE_URL=$database examples/systems/alert.sh critical "Disk full"

  Relay     http://127.0.0.1:$relay_port, its log is $work/relay.log
  Database  $database

  Ctrl-C stops everything and removes the database.

T

stay
