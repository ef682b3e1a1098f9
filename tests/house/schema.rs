//! What an installation makes in a database, as a list: a change of the schema that the list does not have is a mistake.

use std::fs;
use std::path::Path;

use crate::support::database::{Database, connect};

/// Every object of the installed schemas, a line each: no bodies, which `sql/` has, and no object of the installer's other schemas.
/// Owners and rights are named where they are not the installer's.
const OBJECTS: &str = "
with ours as (select oid, nspname, nspowner, nspacl from pg_namespace where nspname in ('relay', 'auth', 'realtime')),
rights (class, object, owner, acl) as (
  select 'schema', oid, nspowner, nspacl from ours
  union all select 'relation', c.oid, c.relowner, c.relacl from pg_class c join ours o on o.oid = c.relnamespace
  union all select 'function', p.oid, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner))
    from pg_proc p join ours o on o.oid = p.pronamespace
  union all select 'column', a.attrelid::bigint * 10000 + a.attnum, c.relowner, a.attacl
    from pg_attribute a join pg_class c on c.oid = a.attrelid join ours o on o.oid = c.relnamespace
), granted (class, object, text) as (
  select r.class, r.object,
    case when r.owner <> current_user::regrole then '; owner ' || r.owner::regrole else '' end
    || coalesce('; ' || string_agg(g.grantee || ': ' || g.privileges, ', ' order by g.grantee) filter (where g.grantee is not null), '')
  from rights r
  left join lateral (
    select case x.grantee when 0 then 'public' else x.grantee::regrole::text end as grantee,
           string_agg(lower(x.privilege_type), ' ' order by x.privilege_type) as privileges
    from aclexplode(r.acl) x where x.grantee <> r.owner group by x.grantee) g on true
  group by r.class, r.object, r.owner
), lines (place, name, line) as (
  select 1, o.nspname::text, format('schema %s%s', o.nspname, g.text)
  from ours o join granted g on g.class = 'schema' and g.object = o.oid
  union all
  select 2, c.oid::regclass::text, format('%s %s%s%s',
    case c.relkind when 'r' then 'table' when 'p' then 'table' when 'v' then 'view' when 'S' then 'sequence' when 'm' then 'view' else 'type' end,
    c.oid::regclass,
    (select format(' (%s)', string_agg(format('%s %s%s%s', a.attname, format_type(a.atttypid, a.atttypmod), case when a.attnotnull then ' not null' end,
                              ' [' || nullif(ltrim(cg.text, '; '), '') || ']'), ', ' order by a.attnum))
     from pg_attribute a join granted cg on cg.class = 'column' and cg.object = a.attrelid::bigint * 10000 + a.attnum
     where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and c.relkind <> 'S' having count(*) > 0), g.text)
  from pg_class c join ours o on o.oid = c.relnamespace join granted g on g.class = 'relation' and g.object = c.oid
  where c.relkind in ('r', 'p', 'v', 'm', 'S', 'c')
  union all
  select 3, i.indrelid::regclass::text || i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid)
  from pg_index i join pg_class c on c.oid = i.indexrelid join ours o on o.oid = c.relnamespace
  union all
  select 4, t.conrelid::regclass::text || t.conname, format('constraint %s on %s: %s', t.conname, t.conrelid::regclass, pg_get_constraintdef(t.oid))
  from pg_constraint t join ours o on o.oid = t.connamespace where t.conrelid <> 0 and t.contype in ('c', 'f')
  union all
  select 5, t.tgrelid::regclass::text || t.tgname, pg_get_triggerdef(t.oid)
  from pg_trigger t join pg_class c on c.oid = t.tgrelid join ours o on o.oid = c.relnamespace where not t.tgisinternal
  union all
  select 6, p.oid::regprocedure::text, format('function %s.%s(%s) returns %s: %s %s%s%s%s', o.nspname, p.proname,
    pg_get_function_arguments(p.oid), coalesce(pg_get_function_result(p.oid), 'nothing'), l.lanname,
    case p.provolatile when 'i' then 'immutable' when 's' then 'stable' else 'volatile' end,
    case when p.prosecdef then ' security definer' end, ' set ' || array_to_string(p.proconfig, ', '), g.text)
  from pg_proc p join ours o on o.oid = p.pronamespace join pg_language l on l.oid = p.prolang
  join granted g on g.class = 'function' and g.object = p.oid
  union all
  select 7, e.evtname, format('event trigger %s on %s (%s), enabled %s, calls %s', e.evtname, e.evtevent, array_to_string(e.evttags, ', '),
    e.evtenabled, e.evtfoid::regproc)
  from pg_event_trigger e where e.evtname like 'relay%'
)
select string_agg(line, e'\\n' order by place, name collate \"C\") from lines";

#[tokio::test]
async fn an_installation_makes_the_objects_that_the_list_names_and_no_others() {
    let database = Database::new().await;
    let found: String = connect(&database.url).await.query_one(OBJECTS, &[]).await.unwrap().get(0);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let listed = fs::read_to_string(root.join("tests/house/schema.txt")).unwrap_or_default();
    let (found, listed): (Vec<&str>, Vec<&str>) = (found.lines().collect(), listed.lines().collect());
    let (new, gone) = (without(&found, &listed), without(&listed, &found));
    if !new.is_empty() || !gone.is_empty() {
        fs::write(root.join("target/schema.txt"), found.join("\n") + "\n").unwrap();
    }
    assert!(
        new.is_empty() && gone.is_empty(),
        "the installed schema differs from its list. If that is meant: cp target/schema.txt tests/house/schema.txt\n\
         not in the list:\n{}\nonly in the list:\n{}",
        new.join("\n"),
        gone.join("\n")
    );
}

/// The lines of `lines` that `others` does not have.
fn without<'a>(lines: &[&'a str], others: &[&str]) -> Vec<&'a str> {
    lines.iter().filter(|line| !others.contains(line)).copied().collect()
}
