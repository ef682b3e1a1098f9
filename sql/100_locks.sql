-- Advisory locks: each has its numbers here and in relay/postgres/locks.rs, and nowhere else.
--
-- The bodies are parsed at creation, so no caller's search path can change what they compare with.

-- relay.lock_class(class) : first number of an advisory lock
create or replace function relay.lock_class(class text) returns int
language sql immutable parallel safe
return case class
  when 'relay' then 1919249009    -- the second number is one of relay.lock()
  when 'refresh' then 1919249010  -- the second number is the oid of a materialized view. Held by the one refresh that compares its rows.
  when 'job' then 1919249011      -- the second number is the id of a refresh job. Held by the relay that runs it.
  when 'relation' then 1919249012 -- the second number is the id of a watched relation. Held by the transaction that records its state.
  when 'signal' then 1919249013   -- the second number is the oid of a table that views on change read. Held as relay.note_signals() says.
  when 'node' then 1919249014     -- the second number is that of a relay's connection to the other relays, which holds it
end;
comment on function relay.lock_class(text) is 'first number of an advisory lock of the relay';

-- relay.lock(name) : second number of an advisory lock of class 'relay'
create or replace function relay.lock(name text) returns int
language sql immutable parallel safe
return case name
  when 'doorbell' then 1  -- exclusive by the relay while it sleeps, shared by writers that need not ring, until they commit
  when 'install' then 3   -- by the session that installs or updates the schema
  when 'trim' then 4      -- by the transaction that trims the changelog
  when 'leader' then 5    -- by the relay that writers wake
  when 'followers' then 6 -- shared by the other relays; the leader notifies them while any holds it
  when 'rights' then 7    -- by the transaction that changes the rights of the schema for a moment
  when 'rules' then 8     -- by the transaction that records changes of rules
  when 'collections' then 9 -- by the transaction that watches or unwatches a table for a collection
  when 'signals' then 10    -- by the relay that notes which views are due for a refresh on change
  when 'status' then 11     -- by the transaction that sets silent users and those of dead relays offline
  when 'webhooks' then 12   -- by the relay that delivers webhooks
end;
comment on function relay.lock(text) is 'second number of an advisory lock of class relay';
