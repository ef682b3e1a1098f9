-- Materialized views: the rows that a refresh changed, as changes; refresh by hand and on a schedule.
--
-- relay.told_rows holds the images of the rows that subscribers were told of. After a refresh by any session, the difference to these
-- is logged. Whether a view was refreshed since shows its row in pg_class, so nothing has to be noted in the refresh itself: the event
-- trigger only wakes the relay.

-- relay.refresh_mark(view) : differs after each refresh; null: the view was never filled, or with no data
-- Each refresh writes the view's row in pg_class, also a concurrent one, which keeps the file. So do a few other statements: then the
-- difference is empty.
create or replace function relay.refresh_mark(view oid) returns text
language sql stable as $$
  select pg_catalog.concat_ws(' ', c.xmin, c.ctid, c.relfilenode) from pg_catalog.pg_class c where c.oid = $1 and c.relispopulated
$$;
comment on function relay.refresh_mark(oid) is 'differs after each refresh of a materialized view';

-- relay.image_query(view) : the image of each of its rows, as the capture triggers would write it
-- Where a type of the user is among the columns, its cast to json runs as relay_image, a role without rights. Run it with the settings
-- that the functions below pin.
create or replace function relay.image_query(view regclass) returns text
language sql stable as $$
  select pg_catalog.format('select %s::text collate "C" as image from %s m',
    case when 'care' = any (relay.image_needs($1)) then 'relay.image(m)' else 'row_to_json(m)' end, $1)
$$;
comment on function relay.image_query(regclass) is 'query for the image of each row of a materialized view';

-- relay.image_key(image, key) : the values of the key columns in an image, as text
create or replace function relay.image_key(image json, key text[]) returns text
language sql immutable as $$
  select pg_catalog.string_agg((image -> k)::text, ',' order by n) from pg_catalog.unnest(key) with ordinality u (k, n)
$$;
comment on function relay.image_key(json, text[]) is 'key of a row image as text';

-- relay.check_reading(view) : raises if reading the view could run functions of users with the rights of the installer
-- The planner evaluates the expressions of indexes and statistics, as the role that reads.
create or replace function relay.check_reading(view regclass) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
declare
  found text;
begin
  with parts (class, object, name) as (
    select 'pg_class'::regclass, i.indexrelid, format('index %s', i.indexrelid::regclass) from pg_index i
    where i.indrelid = view and (i.indexprs is not null or i.indpred is not null)
    union all
    select 'pg_statistic_ext'::regclass, s.oid, format('statistics object %I', s.stxname) from pg_statistic_ext s where s.stxrelid = view
  )
  select p.name into found
  from parts p
  join pg_depend d on d.classid = p.class and d.objid = p.object
  where d.refobjid >= 16384 and d.refclassid in ('pg_proc'::regclass, 'pg_operator'::regclass, 'pg_type'::regclass)
  limit 1;
  if found is not null then
    raise exception '% of % calls a function that a user wrote', found, view using errcode = 'object_not_in_prerequisite_state',
      hint = 'The relay reads the view with the rights of the installer, and such a function would run with them: drop it.';
  end if;
end
$$;
comment on function relay.check_reading(regclass) is 'raises if reading the view could run functions of users with the rights of the installer';

-- relay.keep_images(id) : takes the rows that a materialized view has now as those that subscribers were told of
-- The mark is read before the rows: should a refresh end in between, the next look finds an empty difference.
create or replace function relay.keep_images(id int) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
set lc_monetary = 'C'
set jit = off as $$
declare
  view constant regclass := (select w.relation from relay.watch_list w where w.id = keep_images.id);
  found_mark constant text := relay.refresh_mark(view);
begin
  insert into relay.told_views as t (id, mark, shape) values (keep_images.id, found_mark, relay.shape(keep_images.id))
  on conflict on constraint told_views_pkey
    do update set mark = excluded.mark, shape = excluded.shape, at = excluded.at, tries = 0, next_try = null, error = null;
  delete from relay.told_rows r where r.view = keep_images.id;
  perform relay.check_reading(view);
  if found_mark is not null then
    execute format('insert into relay.told_rows (view, image, copies) select %s, q.image, count(*) from (%s) q group by q.image',
                   id, relay.image_query(view));
  end if;
end
$$;
comment on function relay.keep_images(int) is 'takes the current rows of a materialized view as those that subscribers were told of';

-- relay.tell(id) : logs how the rows of a materialized view differ from those that subscribers were told of; returns how many
-- Deletes, updates (same key) and inserts are ordinary changes; an equal row logs nothing. The caller holds the view's lock of class
-- `refresh`. Sorted and joined by PostgreSQL within work_mem, and read row by row, so the size of the view does not matter. A view
-- without data cannot be read: what was told of it stands until it is filled again.
create or replace function relay.tell(id int) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set timezone = 'UTC'
set datestyle = 'ISO'
set intervalstyle = 'postgres'
set bytea_output = 'hex'
set extra_float_digits = 1
set lc_monetary = 'C'
set jit = off as $$
declare
  view constant regclass := (select w.relation from relay.watch_list w where w.id = tell.id);
  key constant text[] := relay.key(view);
  -- Before the rows, as in relay.keep_images.
  found_mark constant text := relay.refresh_mark(view);
  told relay.told_views;
  now_shape int;
  difference record;
  oversize boolean;
  changed bigint := 0;
begin
  if found_mark is null then
    return 0;
  end if;
  perform relay.renew_shapes();
  now_shape := relay.shape(id);
  -- In a repeatable read transaction, the lock fails if others told the view since its snapshot.
  select t.* into told from relay.told_views t where t.id = tell.id for update;
  if told.mark = found_mark and told.shape = now_shape then
    return 0;
  elsif told.id is null or told.mark <> found_mark and told.shape <> now_shape then
    -- The old images have other columns, so they cannot be compared.
    perform relay.log_gap(id, 'rewritten'), relay.keep_images(id);
    return 0;
  elsif told.mark = found_mark then
    perform relay.keep_images(id);
    return 0;
  elsif key = '{}' then
    raise exception 'materialized view % has no unique index', view using errcode = 'object_not_in_prerequisite_state',
      hint = format('The index identifies rows: create unique index on %s (its key columns), without a condition.', view);
  end if;
  perform relay.check_reading(view);
  -- Equal rows cancel out first. A unique index allows several rows with a null key: these are paired in order.
  for difference in execute format($query$
    with counts as materialized (
      select i.image, min(i.place) as place, sum(i.copies) as more, coalesce(sum(i.copies) filter (where i.place is null), 0)::int as copies
      from (select t.image, t.ctid as place, -t.copies as copies from relay.told_rows t where t.view = %1$s
            union all select q.image, null::tid, 1 from (%2$s) q) i
      group by i.image having sum(i.copies) <> 0
    ), rows as (
      select c.image, c.place, c.more, c.copies, n, relay.image_key(c.image::json, %3$L) as key
      from counts c cross join generate_series(1, abs(c.more)) n
    ), gone as (
      select r.*, row_number() over (partition by r.key order by r.image, r.n) as nth from rows r where r.more < 0
    ), come as (
      select r.*, row_number() over (partition by r.key order by r.image, r.n) as nth from rows r where r.more > 0
    )
    select case when gone.key is null then 'I' when come.key is null then 'D' else 'U' end as operation,
           gone.image as old_image, gone.place as old_place, gone.copies as old_copies, gone.n as old_nth,
           come.image as new_image, come.place as new_place, come.copies as new_copies, come.n as new_nth
    from gone full join come using (key, nth)
    order by gone.key is null, come.key is not null$query$, id, relay.image_query(view), key)
  loop
    oversize := greatest(octet_length(difference.old_image), octet_length(difference.new_image)) > 1048576;
    perform relay.log_change(id, now_shape, difference.operation::"char", oversize,
      case when oversize then relay.shorten(difference.old_image::json, key) else difference.old_image::json end,
      case when oversize then relay.shorten(difference.new_image::json, key) else difference.new_image::json end);
    -- Of equal rows, the first sets the number.
    if difference.old_nth = 1 and difference.old_copies = 0 then
      delete from relay.told_rows t where t.ctid = difference.old_place;
    elsif difference.old_nth = 1 then
      update relay.told_rows t set copies = difference.old_copies where t.ctid = difference.old_place;
    end if;
    if difference.new_nth = 1 and difference.new_place is null then
      insert into relay.told_rows (view, image, copies) values (tell.id, difference.new_image, difference.new_copies);
    elsif difference.new_nth = 1 then
      update relay.told_rows t set copies = difference.new_copies where t.ctid = difference.new_place;
    end if;
    changed := changed + 1;
  end loop;
  update relay.told_views t
  set mark = found_mark, shape = now_shape, at = clock_timestamp(), tries = 0, next_try = null, error = null
  where t.id = tell.id;
  if changed > 0 and not pg_try_advisory_xact_lock_shared(relay.lock_class('relay'), relay.lock('doorbell')) then
    perform relay.ring(view::text, 'refresh');
  end if;
  return changed;
end
$$;
comment on function relay.tell(int) is 'logs how a materialized view differs from what subscribers were told of it; returns how many rows';

-- relay.refresh(relation) : number of rows changed
-- Refreshes the view and tells the difference in the caller's transaction. Concurrently, so that it blocks no readers, except if the
-- view is not yet populated. Runs as the installer, who must own the view. Waits for another refresh of the same view. The view's
-- query runs with the caller's settings. relay.refreshing is on meanwhile: the event trigger wakes no relay, and ignores the temporary
-- tables of a concurrent refresh.
drop function if exists relay.row_images(regclass);
create or replace function relay.refresh(relation regclass) returns bigint
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp
set client_min_messages = warning as $$
declare
  view record;
  changed bigint;
begin
  select c.relkind, relay.key(c.oid) as key, w.id into view
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

  -- Two refreshes must not be compared with the same images.
  perform pg_advisory_xact_lock(relay.lock_class('refresh'), relation::oid::int4);
  -- What a refresh of others changed: where the view was altered since, only that can be told as a gap.
  changed := relay.tell(view.id);
  perform set_config('relay.refreshing', 'on', true);
  execute format('refresh materialized view %s %s',
                 (select case when c.relispopulated then 'concurrently' end from pg_class c where c.oid = refresh.relation), relation);
  perform set_config('relay.refreshing', 'off', true);
  return changed + relay.tell(view.id);
end
$$;
comment on function relay.refresh(regclass) is 'refreshes a watched materialized view and logs what changed, row by row; returns how many';

-- relay.ring_jobs() : wakes the tasks of all relays that refresh views
create or replace function relay.ring_jobs() returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('relay.doorbell', true) is distinct from 'off' then
    perform pg_notify('relay_jobs', '');
  end if;
end
$$;
comment on function relay.ring_jobs() is 'wakes the relays to look at materialized views, unless relay.doorbell is off';

-- relay.note_refresh(view) : the part of the event trigger: wakes the relay if subscribers have to be told, or views that read this one are due
create or replace function relay.note_refresh(view oid) returns void
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('relay.refreshing', true) is distinct from 'on' and exists (select from relay.watch_list w where w.relation = view) then
    perform relay.ring_jobs();
  end if;
  if exists (select from relay.refresh_schedule s where view = any (s.sources))
     and not pg_try_advisory_xact_lock_shared(relay.lock_class('signal'), view::int4) then
    perform relay.signal(view);
  end if;
end
$$;
comment on function relay.note_refresh(oid) is 'wakes the relay after a refresh';

-- relay.tell_refreshed() : tells a view that others refreshed; returns the time until the next look, 0 after one was told, null: there is
-- nothing to look for
-- One that cannot be told now is tried again, more and more rarely, and delays no other. Without event trigger or doorbell, a look each
-- second finds a refresh.
create or replace function relay.tell_refreshed() returns interval
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  one record;
  failure text;
begin
  for one in
    select w.id, w.relation from relay.watch_list w
    join pg_class c on c.oid = w.relation and c.relkind = 'm' and c.relispopulated
    left join relay.told_views t on t.id = w.id
    where (t.mark, t.shape) is distinct from (relay.refresh_mark(c.oid), relay.shape(w.id))
      and coalesce(t.next_try, '-infinity') <= clock_timestamp()
    order by w.id
  loop
    continue when not pg_try_advisory_xact_lock(relay.lock_class('refresh'), one.relation::oid::int4);
    begin
      perform relay.tell(one.id);
      return interval '0';
    exception when query_canceled or others then
      failure := sqlerrm;
    end;
    -- No mark and no shape equals these: where nothing was told yet, the next attempt tells a gap.
    insert into relay.told_views as t (id, mark, shape, tries, next_try, error)
    values (one.id, '', 0, 1, clock_timestamp() + interval '1 second', failure)
    on conflict on constraint told_views_pkey do update
      set tries = t.tries + 1, next_try = clock_timestamp() + least(interval '1 second' * 2 ^ least(t.tries, 6), interval '1 minute'),
          error = excluded.error;
    return interval '0';
  end loop;
  return (
    select min(case when (t.mark, t.shape) is distinct from (relay.refresh_mark(c.oid), relay.shape(w.id))
                 -- Another session tells it, perhaps as of an earlier refresh.
                 then greatest(coalesce(t.next_try - clock_timestamp(), '0'), interval '200 milliseconds')
                 when not relay.schema_changes_are_logged() or current_setting('relay.doorbell', true) = 'off' then interval '1 second' end)
    from relay.watch_list w
    join pg_class c on c.oid = w.relation and c.relkind = 'm' and c.relispopulated
    left join relay.told_views t on t.id = w.id);
end
$$;
comment on function relay.tell_refreshed() is 'tells subscribers of views that others refreshed; returns when to look again';

-- relay.cron_schedule(every) : a schedule of pg_cron with this interval; null: there is none, or pg_cron is not in this database
-- Its schedules have minutes, and begin anew with each hour and day.
create or replace function relay.cron_schedule(every interval) returns text
language sql stable
set search_path = pg_catalog, pg_temp as $$
  select case
    when to_regprocedure('cron.schedule(text,text,text)') is null or not exists (select from pg_extension e where e.extname = 'pg_cron') then null
    when m.minutes = any ('{1,2,3,4,5,6,10,12,15,20,30}'::numeric[]) then format('*/%s * * * *', m.minutes::int)
    when m.minutes = any ('{60,120,180,240,360,480,720}'::numeric[]) then format('0 */%s * * *', (m.minutes / 60)::int)
    when m.minutes = 1440 then '0 0 * * *' end
  from (select extract(epoch from every) / 60 as minutes) m
$$;
comment on function relay.cron_schedule(interval) is 'schedule of pg_cron with this interval, if there is one';

-- relay.cron_grace() : a job of pg_cron that is overdue for so long is run by the relay
create or replace function relay.cron_grace() returns interval
language sql immutable as $$
  select interval '30 seconds'
$$;
comment on function relay.cron_grace() is 'how long a job of pg_cron may be overdue';

-- relay.set_cron(job, schedule) : makes, changes or, without a schedule, ends the job of pg_cron of a view; returns its id
-- Where the caller may not use pg_cron, the relay runs the schedule.
create or replace function relay.set_cron(job relay.refresh_schedule, schedule text) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  command constant text := format('select relay.run_refresh(%s)', job.id);
  cron_job bigint;
begin
  -- By its command, too: in a restored database, its number may be that of another job.
  if job.cron_job is not null and to_regclass('cron.job') is not null then
    execute 'select cron.unschedule(j.jobid) from cron.job j where j.jobid = $1 and j.command = $2' using job.cron_job, command;
  end if;
  if schedule is not null then
    execute 'select cron.schedule($1, $2, $3)' into cron_job using format('relay refresh %s', job.id), schedule, command;
  end if;
  return cron_job;
exception when insufficient_privilege then
  raise notice 'the relay runs the schedule, because pg_cron cannot be used: %', sqlerrm;
  return null;
end
$$;
comment on function relay.set_cron(relay.refresh_schedule, text) is 'sets the job of pg_cron that refreshes a view';

-- relay.check_view(relation) : raises unless it is a watched materialized view with a unique index
create or replace function relay.check_view(relation regclass) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
begin
  if (select c.relkind from pg_class c where c.oid = check_view.relation) is distinct from 'm' then
    raise exception '% is not a materialized view', relation using errcode = 'wrong_object_type',
      hint = 'Only materialized views are refreshed; a watched table publishes its changes by itself.';
  elsif not exists (select from relay.watch_list w where w.relation = check_view.relation) then
    raise exception '% is not watched', relation using errcode = 'object_not_in_prerequisite_state',
      hint = format('select relay.watch(%L)', relation);
  elsif relay.key(relation) = '{}' then
    raise exception 'materialized view % has no unique index', relation using errcode = 'object_not_in_prerequisite_state',
      hint = format('The index identifies rows: create unique index on %s (its key columns), without a condition.', relation);
  end if;
end
$$;
comment on function relay.check_view(regclass) is 'raises unless a relation is a watched materialized view with a unique index';

-- relay.refresh_every(relation, every) : puts the view on the schedule, or changes its interval; due at once
-- pg_cron runs it if it is installed in this database and has such a schedule: whole minutes that divide an hour, or hours that divide
-- a day. The relay runs all others, and what pg_cron does not.
create or replace function relay.refresh_every(relation regclass, every interval) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  job relay.refresh_schedule;
begin
  if every is null or every < interval '100 milliseconds' then
    raise exception 'the interval must be at least 100 milliseconds' using errcode = 'invalid_parameter_value',
      hint = 'select relay.refresh_every(''public.totals'', ''10 seconds'')';
  end if;
  perform relay.check_view(relation);
  delete from relay.refresh_schedule s where not exists (select from pg_class c where c.oid = s.relation);
  insert into relay.refresh_schedule as s (relation, every) values (refresh_every.relation, refresh_every.every)
  on conflict on constraint refresh_schedule_relation_key do update set every = excluded.every
  returning s.* into job;
  job.cron_job := relay.set_cron(job, relay.cron_schedule(every));
  update relay.refresh_schedule s
  set cron_job = job.cron_job, next_run = clock_timestamp() - case when job.cron_job is null then interval '0' else relay.cron_grace() end
  where s.id = job.id;
  perform relay.ring_jobs();
end
$$;
comment on function relay.refresh_every(regclass, interval) is 'refreshes a watched materialized view on a schedule, never overlapping';

-- relay.refresh_stop(relation) : takes a view off the schedule, and ends its refresh on change
create or replace function relay.refresh_stop(relation regclass) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  job relay.refresh_schedule;
begin
  delete from relay.refresh_schedule s where s.relation = refresh_stop.relation returning s.* into job;
  perform relay.set_cron(job, null);
  perform relay.drop_signal(s) from relay.idle_signals() s where s = any (job.sources);
  perform relay.ring_jobs();
end
$$;
comment on function relay.refresh_stop(regclass) is 'takes a materialized view off the schedule, and ends its refresh on change';

drop view if exists relay.refresh_jobs;
create view relay.refresh_jobs as
select s.relation, s.every, s.last_run, s.duration, s.rows_changed, s.error,
       case when s.every is not null then s.next_run end as next_run,
       s.at_most_every, s.dirty_since, s.unheard, s.cron_job
from relay.refresh_schedule s
join pg_catalog.pg_class c on c.oid = s.relation;
comment on view relay.refresh_jobs is
  'views that are refreshed on a schedule or on change: intervals, last run with duration, changed rows and error, next run, since when changes may be missing, sources whose changes are not noticed';

-- relay.refreshes : each watched materialized view and how stale it is
create or replace view relay.refreshes as
select w.relation,
       t.at as told_at,
       c.relispopulated and (t.mark, t.shape) is distinct from (relay.refresh_mark(c.oid), relay.shape(w.id)) as is_untold,
       s.dirty_since,
       s.last_run,
       coalesce(t.error, s.error) as error
from relay.watch_list w
join pg_catalog.pg_class c on c.oid = w.relation and c.relkind = 'm'
left join relay.told_views t on t.id = w.id
left join relay.refresh_schedule s on s.relation = w.relation;
comment on view relay.refreshes is
  'watched materialized views: when subscribers were last told of a refresh, whether one was not told yet, since when changes of its tables may be missing, last run by the relay, last error';

-- relay.try_refresh(job, is_forced) : runs a refresh if it is due and no other session runs it; `is_cancelled`: a statement_timeout ended it
-- An error is recorded in its job and does not affect the others.
create or replace function relay.try_refresh(job int, is_forced boolean, out is_run boolean, out is_cancelled boolean)
language plpgsql volatile
set search_path = pg_catalog, pg_temp as $$
declare
  was record;
  started timestamptz;
  changed bigint;
  failure text;
begin
  is_run := false;
  is_cancelled := false;
  if not pg_try_advisory_xact_lock(relay.lock_class('job'), job) then
    return;
  end if;
  -- Looked up under the lock: another session may have run the job meanwhile, or a writer signalled.
  select s.relation, s.sealed, d.by_schedule into was
  from relay.refresh_schedule s join relay.refreshes_due() d on d.id = s.id
  where s.id = job and (is_forced or d.due <= clock_timestamp());
  if not found then
    return;
  end if;
  is_run := true;
  started := clock_timestamp();
  begin
    -- Does not wait, because the other jobs would wait, too.
    if not pg_try_advisory_xact_lock(relay.lock_class('refresh'), was.relation::oid::int4) then
      raise exception 'another refresh of % is running', was.relation;
    end if;
    changed := relay.refresh(was.relation);
  exception
    when query_canceled then
      failure := sqlerrm;
      is_cancelled := true;
    when others then
      failure := sqlerrm;
  end;
  -- Counted from the start of this run and not from the due time, so that missed runs cause no burst. The view is up to date if each
  -- later change has been signalled since before the refresh, and none was.
  update relay.refresh_schedule s
  set last_run = started, duration = clock_timestamp() - started, rows_changed = changed, error = failure,
      next_run = case when was.by_schedule or is_forced then greatest(started + s.every, clock_timestamp()) else s.next_run end,
      dirty_since = case when failure is not null then s.dirty_since when was.sealed and s.sealed then null
                         when s.dirty_since is not null then started end,
      sealed = case when failure is null and was.sealed then s.sealed end,
      tries = case when failure is null then 0 else s.tries + 1 end,
      -- While a transaction that wrote to a source stays open, the view is refreshed for it again and again.
      not_before = case
        when s.at_most_every is null then s.not_before
        when failure is not null then clock_timestamp() + greatest(s.at_most_every, interval '1 second' * least(2 ^ least(s.tries, 6), 60))
        when changed = 0 and s.sealed is not true then greatest(started + s.at_most_every, clock_timestamp() + interval '1 second')
        else started + s.at_most_every end
  where s.id = job;
end
$$;
comment on function relay.try_refresh(int, boolean) is 'runs a refresh job if it is due and no other session runs it';

-- relay.refreshes_due() : when each job is due by its schedule or by a change; null: it is not. A change counts once its view is sealed, or
-- could not be: see relay.note_signals().
create or replace function relay.refreshes_due() returns table (id int, due timestamptz, by_schedule boolean)
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  select s.id, least(t.scheduled, t.changed), coalesce(t.scheduled <= clock_timestamp(), false)
  from relay.refresh_schedule s join pg_class c on c.oid = s.relation
  cross join lateral (
    select case when s.every is not null then s.next_run + case when s.cron_job is null then interval '0' else relay.cron_grace() end end,
           case when s.at_most_every is not null and s.dirty_since is not null and s.sealed is not null then s.not_before end) t (scheduled, changed)
$$;
comment on function relay.refreshes_due() is 'when each refresh job is due';

-- relay.run_refresh(job) : runs a job of pg_cron
create or replace function relay.run_refresh(job int) returns void
language sql volatile security definer
set search_path = pg_catalog, pg_temp as $$
  select relay.try_refresh($1, true)
$$;
comment on function relay.run_refresh(int) is 'runs a refresh job, for pg_cron';

-- relay.run_refreshes(most) : runs the jobs that are due, at most so many; returns the time until the next one, null when there is none
-- Before that, tells a view that others refreshed. A statement_timeout counts as an error of the running job, and ends the round. The
-- changes of all jobs of a call are committed together: call it with 1, so that no view waits for another, and with a lock_timeout,
-- because a job waits for locks on the tables of its view.
drop function if exists relay.run_refreshes();
create or replace function relay.run_refreshes(most int default null) returns interval
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp as $$
declare
  job int;
  outcome record;
  runs int := 0;
  look interval;
begin
  loop
    look := relay.tell_refreshed();
    exit when look is distinct from interval '0';
    runs := runs + 1;
    if runs = most then
      return interval '0';
    end if;
  end loop;
  for job in select d.id from relay.refreshes_due() d where d.due <= clock_timestamp() order by d.due loop
    outcome := relay.try_refresh(job, false);
    runs := runs + outcome.is_run::int;
    exit when outcome.is_cancelled or runs = most;
  end loop;
  return (select least(look, greatest(min(d.due) - clock_timestamp(), interval '0')) from relay.refreshes_due() d having min(d.due) is not null
          union all select look where not exists (select from relay.refreshes_due() d where d.due is not null));
end
$$;
comment on function relay.run_refreshes(int) is 'tells refreshed views and runs the refreshes that are due; returns the time until the next one';

-- Views that an older version watched, or that were restored without their images.
do $$
declare
  one record;
begin
  for one in
    select w.id, w.relation from relay.watch_list w join pg_catalog.pg_class c on c.oid = w.relation and c.relkind = 'm'
    where not exists (select from relay.told_views t where t.id = w.id)
  loop
    begin
      perform relay.keep_images(one.id);
    exception when others then
      raise notice 'the rows of % could not be kept, its next refresh is a gap: %', one.relation, sqlerrm;
    end;
  end loop;
end
$$;
