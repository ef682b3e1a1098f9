-- One round of the demo's writer, about three seconds; run.sh repeats it. It notifies neither the relay nor the page.

insert into document default values;
update document set state = 'working'
where id in (select id from document where state = 'waiting' order by id limit (random() * 3)::integer);
select pg_sleep(0.4);

update agent_access set enabled = not enabled, changed_at = now()
where (user_id, agent) in (select user_id, agent from agent_access order by random() limit 1);
select pg_sleep(0.6);

update document set state = case when random() < 0.15 then 'failed' else 'completed' end
where id in (select id from document where state = 'working' order by id limit 2);
select pg_sleep(0.5);

update user_status set is_online = not is_online, last_active_at = now()
where user_id in (select user_id from user_status order by not is_online and random() < 0.6 desc, random() limit 1);
select pg_sleep(0.5);

update worker set state = case when state = 'lost' or random() < 0.4 then 'idle' when random() < 0.1 then 'lost' else 'busy' end
where name in (select name from worker order by random() limit 1);
insert into system_alerts (severity, message)
select 'info', format('%s documents are waiting', count(*)) from document where state = 'waiting' having count(*) > 1 and random() < 0.25;
select pg_sleep(0.6);
