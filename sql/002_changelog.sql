-- Numbers of changes, and the segment that writers use. The tables of the changelog are in 010_log.sql.

create sequence if not exists relay.change_number as bigint cache 1;
comment on sequence relay.change_number is
  'numbers of changes; CACHE must stay 1, or the changes of one row could be numbered out of order';

-- Created once, then replaced by relay.trim_changelog(): applying this file again must not move writers back.
do $$
begin
  if pg_catalog.to_regprocedure('relay.current_segment()') is null then
    create function relay.current_segment() returns int language sql immutable as 'select 0';
    comment on function relay.current_segment() is 'the segment of the changelog that writers use';
  end if;
end
$$;
