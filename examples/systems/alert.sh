#!/usr/bin/env bash
# Raises an alert with psql alone: alert.sh SEVERITY MESSAGE. From a terminal, from a script, from cron.
# It connects as psql does: by DATABASE_URL, or by PGHOST and its like.
set -euo pipefail

if [ $# -ne 2 ]; then
  echo "Usage: $(basename "$0") info|warning|critical MESSAGE" >&2
  exit 2
fi

# psql's variables, not the shell's, put the words into the statement: it quotes them, whatever they contain.
psql ${DATABASE_URL:+"$DATABASE_URL"} -qXv ON_ERROR_STOP=1 -v severity="$1" -v message="$2" -v source="$(hostname)" <<'SQL'
insert into system_alerts (severity, message, source) values (:'severity', :'message', :'source');
SQL
