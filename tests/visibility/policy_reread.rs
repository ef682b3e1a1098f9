//! After a change of the schema, only the relations that it concerns are read again, however many are watched.
#![allow(clippy::print_stdout, reason = "the figures are part of what is shown")]

use std::sync::Arc;
use std::time::Instant;

use crate::support::ways::Ways;

const TABLES: usize = 200;

#[tokio::test(flavor = "multi_thread")]
async fn any_ddl_beside_two_hundred_watched_tables_reads_only_the_tables_that_it_concerns() {
    let ways = Ways::new(&format!(
        "create table members (team int, person uuid); grant select on members to authenticated;
         create function helper() returns bool language sql stable as 'select true';
         do $$ begin
           for n in 1..{TABLES} loop
             execute format('create table w%s (id int primary key, team int, owner uuid);
               alter table w%1$s enable row level security; grant select on w%1$s to authenticated;
               create policy p on w%1$s using (owner = auth.uid() or exists (
                 select from members m where m.team = w%1$s.team and m.person = auth.uid()))', n);
           end loop;
           for n in 1..{TABLES} loop
             perform relay.watch(format('w%s', n)::regclass);
           end loop;
         end $$;"
    ))
    .await;
    let mut known = ways.catalog().await;
    let mut found = Vec::new();
    for (ddl, most) in [
        ("select 1", 0),
        ("create table other (id int)", 0),
        ("alter table other add column more text", 0),
        ("create index on w5 (owner)", 0),
        ("comment on table w5 is 'the fifth'", 0),
        ("create function unused() returns int language sql as 'select 1'", 0),
        ("alter table w7 add column note text", 1),
        ("create policy q on w9 using (team = 1)", 1),
        ("alter policy p on w11 using (owner = auth.uid())", 1),
        ("grant update on w13 to authenticated", 1),
        ("create policy h on w15 using (helper())", 1),
        ("revoke execute on function helper() from public", 1),
        ("alter table w17 rename to renamed", 1),
    ] {
        ways.database.run(ddl).await;
        let started = Instant::now();
        let catalog = ways.catalog().await;
        let took = started.elapsed();
        let is_known = |id| known.relation(id).cloned();
        let read = catalog
            .relations()
            .filter(|one| is_known(one.id()).is_none_or(|known| !Arc::ptr_eq(&known, one)))
            .count();
        println!("{read} of {TABLES} relations read in {took:?}: {ddl}");
        if read > most {
            found.push(format!("{ddl}: {read} relations were read, {most} are enough"));
        }
        known = catalog;
    }
    assert!(found.is_empty(), "{found:#?}");
}
