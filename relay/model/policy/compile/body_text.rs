//! The body of an SQL function that PostgreSQL keeps as text, with each name resolved as PostgreSQL would when the function runs.
//!
//! `select exists (select from members where team = n and who = auth.uid())` becomes
//! `RETURN EXISTS (SELECT 1 FROM public.members WHERE ("members"."team" = $1) AND …)`, as PostgreSQL writes a body that it has parsed.
//! Only the forms here are understood. In any other body PostgreSQL resolves the names, each time that it evaluates the policy.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sqlparser::ast::SetExpr;

use super::list::{only_expression, projected};
use super::{Unsupported, parse_query, unsupported};
pub(super) use expressions::AGGREGATES;
use names::Resolver;

mod expressions;
mod names;
mod result_type;

/// A function whose body is text, and all that names in this text may mean: `relay.body_candidates()` lists it.
#[derive(Debug, Deserialize)]
pub struct BodyText {
    /// The name of the function, without the schema.
    pub function: String,
    /// The text.
    pub source: String,
    /// The names of the parameters; empty for those without one.
    pub names: Vec<String>,
    /// The types of the parameters, as SQL.
    pub types: Vec<String>,
    /// The type of the result, as SQL.
    pub returns: String,
    /// The schemas of its search path, besides `pg_catalog` and `pg_temp`; `None`: it has the caller's.
    pub path: Option<Vec<String>>,
    /// The relations that have one of the words in the text as their name.
    pub tables: Vec<NamedTable>,
    /// The functions that have, besides those of PostgreSQL.
    pub functions: Vec<NamedFunction>,
    /// The names of PostgreSQL's own functions among the words.
    pub system: BTreeSet<String>,
}

/// A relation.
#[derive(Debug, Deserialize)]
pub struct NamedTable {
    /// Its object id.
    pub oid: u32,
    /// Its schema.
    pub schema: String,
    /// Its name without the schema.
    pub name: String,
    /// Both as SQL.
    pub written: String,
    /// The columns, by name.
    pub columns: BTreeMap<String, NamedColumn>,
}

/// A column.
#[derive(Debug, Deserialize)]
pub struct NamedColumn {
    /// Its number.
    pub number: i32,
    /// Its type, as SQL.
    #[serde(rename = "type")]
    pub of: String,
}

/// A function.
#[derive(Debug, Deserialize)]
pub struct NamedFunction {
    /// Its object id.
    pub oid: u32,
    /// Its schema.
    pub schema: String,
    /// Its name without the schema.
    pub name: String,
    /// Both as SQL.
    pub written: String,
    /// The type that it returns, as SQL.
    pub returns: String,
}

/// A body whose names are resolved.
#[derive(Debug)]
pub struct ResolvedBody {
    /// The body as PostgreSQL writes one that it has parsed.
    pub sql: String,
    /// What it reads.
    pub parts: BTreeSet<Part>,
}

/// An object that a body reads, as in `pg_depend`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Part {
    /// The catalog in which it is: `pg_class` or `pg_proc`.
    pub class: u32,
    /// Its object id.
    pub object: u32,
    /// The number of the column; 0 is the whole object.
    pub part: i32,
}

/// The object ids of these catalogs, which are the same in each database.
const PG_CLASS: u32 = 1259;
const PG_PROC: u32 = 1255;

impl Part {
    fn column(table: &NamedTable, part: i32) -> Self {
        Self { class: PG_CLASS, object: table.oid, part }
    }

    fn function(function: &NamedFunction) -> Self {
        Self { class: PG_PROC, object: function.oid, part: 0 }
    }
}

/// Resolves the names in a body.
///
/// # Errors
/// Says why PostgreSQL has to.
pub fn resolve(body: &BodyText) -> Result<ResolvedBody, String> {
    resolved(body).map_err(|why| why.0)
}

fn resolved(body: &BodyText) -> Result<ResolvedBody, Unsupported> {
    if !body.source.is_ascii() || body.source.contains('\\') {
        return Err(unsupported("its body has a backslash or a character beyond ASCII"));
    }
    if body.path.iter().flatten().skip(1).any(|schema| schema == "pg_catalog") {
        return Err(unsupported("its search path has pg_catalog behind another schema"));
    }
    let mut query = parse_query(&body.source)?;
    let mut resolver = Resolver::of(body);
    resolver.query(&mut query)?;
    let given = match &*query.body {
        SetExpr::Select(select) => projected(select).and_then(|value| resolver.type_of(value)),
        _ => None,
    };
    // The call casts the result, and where that is not possible it raises.
    if !given.is_some_and(|given| {
        given == body.returns || (given == "character varying" && body.returns == "text")
    }) {
        return Err(unsupported(
            "its body gives a value of another type, or of one that the relay does not know",
        ));
    }
    let sql = match only_expression(&query) {
        Some(value) => format!("RETURN {value}"),
        None => format!("BEGIN ATOMIC\n {query};\nEND"),
    };
    Ok(ResolvedBody { sql, parts: resolver.parts })
}

/// Returns the position of the parameter `$n`.
fn parameter(number: &str) -> Option<usize> {
    number.strip_prefix('$')?.parse::<usize>().ok()?.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(source: &str, path: Option<&[&str]>) -> BodyText {
        let table = |oid: u32, schema: &str, name: &str, columns: &[&str]| NamedTable {
            oid,
            schema: schema.to_owned(),
            name: name.to_owned(),
            written: format!("{schema}.{name}"),
            columns: (1..)
                .zip(columns)
                .map(|(number, name)| {
                    let of = if matches!(*name, "who" | "boss") { "uuid" } else { "integer" };
                    ((*name).to_owned(), NamedColumn { number, of: of.to_owned() })
                })
                .collect(),
        };
        let function = |oid: u32, schema: &str, name: &str| NamedFunction {
            returns: String::from(if name == "uid" { "uuid" } else { "text" }),
            oid,
            schema: schema.to_owned(),
            name: name.to_owned(),
            written: format!("{schema}.{name}"),
        };
        BodyText {
            function: String::from("f"),
            source: source.to_owned(),
            names: vec![String::from("n"), String::from("team"), String::new()],
            types: ["integer", "integer", "uuid"].map(String::from).to_vec(),
            returns: String::from("boolean"),
            path: path.map(|path| path.iter().map(|schema| (*schema).to_owned()).collect()),
            tables: vec![
                table(1, "public", "members", &["team", "who", "role"]),
                table(2, "public", "teams", &["id", "boss"]),
                table(3, "app", "members", &["other"]),
            ],
            functions: vec![
                function(11, "auth", "uid"),
                function(12, "public", "twice"),
                function(13, "app", "twice"),
                function(14, "public", "lower"),
            ],
            system: ["lower", "count", "array_agg", "max", "unnest"].map(String::from).into(),
        }
    }

    const EMPTY: Option<&[&str]> = Some(&[]);
    const PUBLIC: Option<&[&str]> = Some(&["public"]);

    fn sql(source: &str, path: Option<&[&str]>) -> Result<String, String> {
        let types = ["boolean", "bigint", "integer", "integer[]", "text", "uuid"];
        let resolved =
            |returns: &&str| resolve(&BodyText { returns: (*returns).to_owned(), ..body(source, path) });
        let mut found: Vec<String> =
            types.iter().filter_map(|of| resolved(of).ok()).map(|one| one.sql).collect();
        assert!(found.len() < 2, "{found:?}");
        found.pop().ok_or_else(|| resolved(&"boolean").unwrap_err())
    }

    #[test]
    fn each_name_has_the_meaning_that_postgresql_gives_it() {
        for (path, source, expected) in [
            (EMPTY, "select n > 1;", "RETURN $1 > 1"),
            (EMPTY, "select f.n > 1 and $3 is null", "RETURN ($1 > 1) AND ($3 IS NULL)"),
            (EMPTY, "select N::int8 -- a comment", "RETURN $1::BIGINT"),
            (
                EMPTY,
                "select exists (select 1 from public.members m where m.team = n and who = (select auth.uid()) limit 1)",
                r#"RETURN EXISTS (SELECT 1 FROM public.members "m" WHERE ("m"."team" = $1) AND ("m"."who" = (SELECT auth.uid())))"#,
            ),
            // A column before a parameter, also one of an outer query.
            (
                PUBLIC,
                "select who from members where team = 1",
                "BEGIN ATOMIC\n SELECT \"members\".\"who\" FROM public.members WHERE \"members\".\"team\" = 1;\nEND",
            ),
            (
                PUBLIC,
                "select boss from teams where exists (select from members where f.team = team and id = n)",
                "BEGIN ATOMIC\n SELECT \"teams\".\"boss\" FROM public.teams WHERE EXISTS (SELECT 1 FROM public.members \
                 WHERE ($2 = \"members\".\"team\") AND (\"teams\".\"id\" = $1));\nEND",
            ),
            // The first schema of the path that has one.
            (
                Some(&["app", "public"]),
                "select other from members",
                "BEGIN ATOMIC\n SELECT \"members\".\"other\" FROM app.members;\nEND",
            ),
            (Some(&["app", "public"]), "select boss = who from teams join members on true", "!"),
            (Some(&["app", "pg_temp"]), "select (TWICE(n))", "RETURN (app.twice($1))"),
            (Some(&["app"]), "select lower(pg_catalog.lower('X''Y'))", "RETURN lower(lower(E'X\\'Y'))"),
            (
                PUBLIC,
                "select coalesce(array_agg(team), '{}') from members",
                "BEGIN ATOMIC\n SELECT coalesce(array_agg(\"members\".\"team\"), '{}') FROM public.members;\nEND",
            ),
            (
                PUBLIC,
                "select not n = 1 or n in (1, 2) and n = any (array(select team from members))",
                "RETURN (NOT ($1 = 1)) OR (($1 IN (1, 2)) AND ($1 = ANY(array(SELECT \"members\".\"team\" FROM public.members))))",
            ),
        ] {
            match expected {
                "!" => assert!(sql(source, path).is_err(), "{source}"),
                _ => assert_eq!(sql(source, path).as_deref(), Ok(expected), "{source}"),
            }
        }
    }

    #[test]
    fn what_is_not_certain_is_left_to_postgresql() {
        for (path, source) in [
            (EMPTY, "select exists (select from members)"),
            (None, "select exists (select from members)"),
            (EMPTY, "select exists (select from pg_roles)"),
            (PUBLIC, "select exists (select from pg_catalog.pg_roles)"),
            (EMPTY, "select exists (select from public.absent)"),
            // Names of several things, or of none.
            (PUBLIC, "select absent"),
            (PUBLIC, "select f.absent"),
            (PUBLIC, "select m.absent from members m"),
            (PUBLIC, "select members from members"),
            (PUBLIC, "select m from members m where m is null"),
            (PUBLIC, "select members.who from members m"),
            (PUBLIC, "select public.members.who from members"),
            (PUBLIC, "select team from members a, members b"),
            (PUBLIC, "select a.team from members a, teams a"),
            (PUBLIC, "select xmin::text from members"),
            (PUBLIC, "select a.team from members a join members b using (team)"),
            (PUBLIC, "select a.team from members a natural join members b"),
            (PUBLIC, "select a.team from members a, teams t join members b on a.team = b.team"),
            (PUBLIC, "select t.team from members t(team)"),
            (PUBLIC, "select 1 from members tablesample system (1)"),
            (PUBLIC, "select 1 from only members"),
            (PUBLIC, "select u from unnest(array[1]) u"),
            (PUBLIC, "select d.who from (select who from members) d"),
            (PUBLIC, "with members as (select 1) select 1 from members"),
            // Functions.
            (PUBLIC, "select lower('x')"),
            (None, "select twice(n)"),
            (None, "select lower('x')"),
            (PUBLIC, "select absent(n)"),
            (PUBLIC, "select auth.absent(n)"),
            (PUBLIC, "select count(distinct team) from members"),
            (PUBLIC, "select count(*) filter (where team = 1) from members"),
            (PUBLIC, "select count(*) over () from members"),
            (PUBLIC, "select max(n) from members"),
            (PUBLIC, "select 1 from teams where 1 = (select max(id) from members)"),
            (PUBLIC, "select current_user = 'x'"),
            (PUBLIC, "select row(1) is null"),
            (EMPTY, "select exists (select count(*) from public.members)"),
            // More than a value, tables and a condition.
            (PUBLIC, "select team from members order by 1"),
            (PUBLIC, "select team from members limit 1"),
            (PUBLIC, "select team from members group by team"),
            (PUBLIC, "select team from members having true"),
            (PUBLIC, "select team from members for update"),
            (PUBLIC, "select distinct on (team) team from members"),
            (PUBLIC, "select team from members union select 1"),
            (PUBLIC, "select team, who from members"),
            (PUBLIC, "select * from members"),
            (PUBLIC, "select m.* from members m"),
            (PUBLIC, "select team into x from members"),
            (PUBLIC, "select 1; select 2"),
            (PUBLIC, "insert into members values (1)"),
            (PUBLIC, ""),
            // Expressions.
            (PUBLIC, "select n + 1"),
            (PUBLIC, "select -n"),
            (PUBLIC, "select n between 1 and 2"),
            (PUBLIC, "select 'x' like 'y'"),
            (PUBLIC, "select n::mood"),
            (PUBLIC, "select n::varchar(3)"),
            (PUBLIC, "select 1.5"),
            (PUBLIC, "select E'x' = '\\x'"),
            (PUBLIC, "select $$x$$"),
            (PUBLIC, "select $4"),
            (PUBLIC, "select (n, 1) = (1, 2)"),
            // Of unknown types.
            (PUBLIC, "select null"),
            (PUBLIC, "select coalesce(n, who) from members"),
            (PUBLIC, "select case when n = 1 then n else who end from members"),
            (PUBLIC, "select n = any (select team from members)"),
            (PUBLIC, "select 'x' collate \"C\""),
            (PUBLIC, "select array[n]"),
            (PUBLIC, "select n operator(pg_catalog.=) 1"),
            (PUBLIC, "select n is null = true"),
            (PUBLIC, "select n = 1 = true"),
            (PUBLIC, "select n = 1 is null"),
            (PUBLIC, "select \"a\"\"b\""),
            (PUBLIC, "select 'ü'"),
            (Some(&["public", "pg_catalog"]), "select n"),
        ] {
            assert!(sql(source, path).is_err(), "{source}: {:?}", sql(source, path));
        }
    }

    #[test]
    fn every_table_column_and_function_is_listed() {
        let found = resolve(&body(
            "select exists (select * from teams where boss = auth.uid()) or n in (select team from members where who = $3)",
            PUBLIC,
        ))
        .unwrap();
        let part = |class, object, part| Part { class, object, part };
        let expected = [
            part(PG_PROC, 11, 0),
            part(PG_CLASS, 1, 0),
            part(PG_CLASS, 1, 1),
            part(PG_CLASS, 1, 2),
            part(PG_CLASS, 2, 0),
            part(PG_CLASS, 2, 1),
            part(PG_CLASS, 2, 2),
        ];
        assert_eq!(found.parts, expected.into());
    }
}
