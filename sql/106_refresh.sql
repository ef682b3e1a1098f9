-- Materialized views: refresh that logs the row-by-row difference, and its schedule.

-- relay.row_images(relation) : key and image of each current row, as the capture trigger would write them
-- The settings are pinned here and not in relay.refresh, so that the view's query runs with the caller's settings.
create or replace function relay.row_images(relation regclass) returns table (key text, image text)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
set lc_monetary = 'C'
as $$
begin
  return query execute format('select json_build_array(%s)::text, row_to_json(m)::text from %s m',
    (select string_agg('m.' || quote_ident(k), ', ') from unnest(relay.key(relation)) k), relation);
end
$$;
comment on function relay.row_images(regclass) is 'key and image of each row of a materialized view';

-- relay.refresh(relation) : number of rows changed
-- Refreshes the view and logs deletes, updates (same key) and inserts as ordinary changes; an unchanged row logs nothing.
-- Concurrently, so that it blocks no readers, except if the view is not yet populated. Runs as the installer, who must own the
-- view. Writes to the changelog; waits for another refresh of the same view. relay.refreshing is on meanwhile: a refresh
-- without it is logged by the event trigger as a gap.
create or replace function relay.refresh(relation regclass) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
  view record;
  difference record;
  changed bigint := 0;
  oversize boolean;
  shape int;
begin
  select c.relkind, c.relispopulated, relay.key(c.oid) as key, w.id into view
  from pg_class c left join relay.watch_list w on w.relation = c.oid
  where c.oid = refresh.relation;
  if view.relkind is distinct from 'm' then
    raise exception '% is not a materialized view', relation using errcode = 'wrong_object_type',
      hint = 'Only materialized views are refreshed; a watched table publishes its changes by itself.';
  elsif view.id is null then
    raise exception '% is not watched', relation using errcode = 'object_not_in_prerequisite_state',
      hint = format('select relay.watch(%L)', relation);
  elsif view.key = '{}' then
    raise exception 'materialized view % has no unique index', relation using errcode = 'object_not_in_prerequisite_state',
      hint = format('The index identifies rows: create unique index on %s (its key columns), without a condition.', relation);
  end if;

  -- Two refreshes must not compare with the same old rows.
  perform pg_advisory_xact_lock(relay.lock_class('refresh'), relation::oid::int8::bit(32)::int4);
  -- Truncated, not dropped: a second refresh in the transaction reuses them, and the event trigger logs no schema change.
  create temporary table if not exists relay_before (key text, image text) on commit drop;
  create temporary table if not exists relay_after (key text, image text) on commit drop;
  truncate pg_temp.relay_before, pg_temp.relay_after;
  if view.relispopulated then
    insert into pg_temp.relay_before select * from relay.row_images(relation);
  end if;
  perform set_config('relay.refreshing', 'on', true);
  execute format('refresh materialized view %s %s', case when view.relispopulated then 'concurrently' end, relation);
  perform set_config('relay.refreshing', 'off', true);
  insert into pg_temp.relay_after select * from relay.row_images(relation);
  perform relay.renew_shapes();
  shape := relay.shape(view.id);

  -- Equal rows cancel out first. A unique index allows several rows with a null key: these are paired in order.
  for difference in
    with gone as (
      select key, image, row_number() over (partition by key) as nth
      from (select key, image from pg_temp.relay_before except all select key, image from pg_temp.relay_after) x
    ), come as (
      select key, image, row_number() over (partition by key) as nth
      from (select key, image from pg_temp.relay_after except all select key, image from pg_temp.relay_before) x
    )
    select case when gone.key is null then 'I' when come.key is null then 'D' else 'U' end as operation,
           gone.image as old_image, come.image as new_image
    from gone full join come using (key, nth)
    order by gone.key is null, come.key is not null
  loop
    oversize := greatest(octet_length(difference.old_image), octet_length(difference.new_image)) > 1048576;
    perform relay.log_change(view.id, shape, difference.operation::"char",
      oversize,
      case when oversize then relay.shorten(difference.old_image::json, view.key) else difference.old_image::json end,
      case when oversize then relay.shorten(difference.new_image::json, view.key) else difference.new_image::json end);
    changed := changed + 1;
  end loop;
  if changed > 0 and not pg_try_advisory_xact_lock_shared(relay.lock_class('relay'), relay.lock('doorbell')) then
    perform relay.ring(relation::text, 'refresh');
  end if;
  return changed;
end
$$;
comment on function relay.refresh(regclass) is 'refreshes a watched materialized view and logs what changed, row by row; returns how many';

-- relay.refresh_every(relation, every) : puts the view on the schedule, or changes its interval; due at once
create or replace function relay.refresh_every(relation regclass, every interval) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  if every is null or every < interval '100 milliseconds' then
    raise exception 'the interval must be at least 100 milliseconds' using errcode = 'invalid_parameter_value',
      hint = 'select relay.refresh_every(''public.totals'', ''10 seconds'')';
  elsif (select c.relkind from pg_class c where c.oid = refresh_every.relation) is distinct from 'm' then
    raise exception '% is not a materialized view', relation using errcode = 'wrong_object_type';
  elsif not exists (select from relay.watch_list w where w.relation = refresh_every.relation) then
    raise exception '% is not watched', relation using errcode = 'object_not_in_prerequisite_state',
      hint = format('select relay.watch(%L)', relation);
  end if;
  delete from relay.refresh_schedule s where not exists (select from pg_class c where c.oid = s.relation);
  insert into relay.refresh_schedule as s (relation, every) values (refresh_every.relation, refresh_every.every)
  on conflict on constraint refresh_schedule_relation_key
    do update set every = excluded.every, next_run = clock_timestamp();
  perform pg_notify('relay', '{"refresh_jobs":true}');
end
$$;
comment on function relay.refresh_every(regclass, interval) is 'refreshes a watched materialized view on a schedule, never overlapping';

create or replace function relay.refresh_stop(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  delete from relay.refresh_schedule s where s.relation = refresh_stop.relation;
  perform pg_notify('relay', '{"refresh_jobs":true}');
end
$$;
comment on function relay.refresh_stop(regclass) is 'takes a materialized view off the schedule';

create or replace view relay.refresh_jobs as
select s.relation, s.every, s.last_run, s.duration, s.rows_changed, s.error, s.next_run
from relay.refresh_schedule s
join pg_catalog.pg_class c on c.oid = s.relation;
comment on view relay.refresh_jobs is 'the refresh schedule: interval, last run with duration, changed rows and error, next run';

-- relay.run_refreshes(most) : runs the jobs that are due, at most so many; returns the time until the next one, null when there is none
-- Skips a job that another session runs. An error is recorded in its job and does not affect the others. A statement_timeout
-- counts as an error of the running job, and ends the round. The changes of all jobs of a call are committed together: call it with
-- 1, so that no view waits for another, and with a lock_timeout, because a job waits for locks on the tables of its view.
drop function if exists relay.run_refreshes();
create or replace function relay.run_refreshes(most int default null) returns interval
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  job record;
  runs int := 0;
  started timestamptz;
  changed bigint;
  failure text;
  cancelled boolean := false;
begin
  for job in
    select s.id, s.relation, s.every from relay.refresh_schedule s join pg_class c on c.oid = s.relation
    where s.next_run <= clock_timestamp() order by s.next_run
  loop
    -- Checked again under the lock: another session may have run the job meanwhile.
    continue when not pg_try_advisory_xact_lock(relay.lock_class('job'), job.id);
    continue when not exists (select from relay.refresh_schedule s where s.id = job.id and s.next_run <= clock_timestamp());
    started := clock_timestamp();
    changed := null;
    failure := null;
    begin
      -- Does not wait, because the other jobs would wait, too.
      if not pg_try_advisory_xact_lock(relay.lock_class('refresh'), job.relation::oid::int8::bit(32)::int4) then
        raise exception 'another refresh of % is running', job.relation;
      end if;
      changed := relay.refresh(job.relation);
    exception
      when query_canceled then
        failure := sqlerrm;
        cancelled := true;
      when others then
        failure := sqlerrm;
    end;
    -- Counted from the start of this run and not from the due time, so that missed runs cause no burst.
    update relay.refresh_schedule s
    set last_run = started, duration = clock_timestamp() - started, rows_changed = changed, error = failure,
        next_run = greatest(started + s.every, clock_timestamp())
    where s.id = job.id;
    runs := runs + 1;
    exit when cancelled or runs = most;
  end loop;
  -- Not greatest() alone: it ignores null, so that no job would mean "at once".
  return (select case when count(*) > 0 then greatest(min(s.next_run) - clock_timestamp(), interval '0') end
          from relay.refresh_schedule s join pg_class c on c.oid = s.relation having count(*) > 0);
end
$$;
comment on function relay.run_refreshes(int) is 'runs the refreshes that are due; returns the time until the next one';
