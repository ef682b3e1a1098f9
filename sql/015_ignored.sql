-- Columns whose changes alone are not logged.

alter table relay.watch_list add column if not exists ignored jsonb;
comment on column relay.watch_list.ignored is
  'columns that relay.watch was told to ignore: {"table": oid, "columns": {number: name}}; null: none. Read it through relay.ignored()';
