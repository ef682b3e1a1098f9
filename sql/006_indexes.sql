-- The indexes of the changelog: by transaction for pages, by number for slices of a page.
--
-- Numbers rise with the place in the file, so a BRIN index finds a slice, and costs a writer next to nothing. Blocks
-- that it knows nothing of yet are read each time: relay.summarize() makes them known.

-- A transaction that wrote and stays open would make the lock wait, and all other writers behind it: it is asked for
-- again and again instead, for a moment only.
do $$
begin
  perform set_config('lock_timeout', '50ms', true);
  loop
    begin
      lock table relay.changes_0, relay.changes_1, relay.changes_2 in access exclusive mode;
      exit;
    exception when lock_not_available then
      perform pg_sleep(0.5);
    end;
  end loop;
end
$$;

drop index if exists relay.changes_0_xid_number, relay.changes_1_xid_number, relay.changes_2_xid_number;

create index if not exists changes_0_xid on relay.changes_0 (xid);
create index if not exists changes_1_xid on relay.changes_1 (xid);
create index if not exists changes_2_xid on relay.changes_2 (xid);

create index if not exists changes_0_number on relay.changes_0 using brin (number) with (pages_per_range = 16);
create index if not exists changes_1_number on relay.changes_1 using brin (number) with (pages_per_range = 16);
create index if not exists changes_2_number on relay.changes_2 using brin (number) with (pages_per_range = 16);
