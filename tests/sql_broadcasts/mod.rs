//! Broadcasts from the database: rows that are inserted into `realtime.messages`.

pub mod installed;

/// The table and a function as Supabase has them: partitioned by day, of another role. `$DB` stands for the database's name.
const SUPABASE: &str = "
    create role $DB_admin;
    create role $DB_app;
    create schema realtime authorization $DB_admin;
    create table realtime.messages (
      topic text not null, extension text not null, payload jsonb, event text, private boolean default false,
      updated_at timestamp not null default now(), inserted_at timestamp not null default now(),
      id uuid not null default gen_random_uuid(), binary_payload bytea,
      primary key (id, inserted_at)
    ) partition by range (inserted_at);
    create table realtime.messages_today partition of realtime.messages
      for values from ('2000-01-01') to ('2100-01-01');
    alter table realtime.messages owner to $DB_admin;
    alter table realtime.messages_today owner to $DB_admin;
    alter table realtime.messages enable row level security;
    grant usage on schema realtime to $DB_app;
    grant insert on realtime.messages to $DB_app;
    create function realtime.topic() returns text language sql stable
      as $f$ select nullif(current_setting('realtime.topic', true), '')::text $f$;
    create function realtime.send(payload jsonb, event text, topic text, private boolean default true) returns void language sql
      as $f$ insert into realtime.messages (payload, event, topic, private, extension) values ($1, $2, $3, $4, 'broadcast') $f$;
    alter function realtime.topic() owner to $DB_admin;
    alter function realtime.send(jsonb, text, text, boolean) owner to $DB_admin;
";
