//! Patterns that the relay matches by itself match what PostgreSQL matches: on any type of text, under any collation.

use std::collections::BTreeMap;

use relay::model::catalog::relation::Relation;
use relay::model::row::image::Image;
use relay::model::row::pattern::{Folding, Pattern};
use relay::model::row::truth::Truth;
use relay::model::subscription::filter;
use relay::model::subscription::typed_filter::{TypedCondition, TypedFilter};
use serde_json::{Value, json};

use crate::support::database::Database;
use crate::support::dice::Dice;
use crate::support::stage::Stage;
use crate::support::token;

/// What patterns and texts are made of: letters whose small form is another's, in some language or as several characters,
/// and what patterns give a meaning to.
const CHARACTERS: [&str; 24] = [
    "a", "A", "b", "B", "i", "I", "k", "K", "ü", "Ü", "İ", "ı", "\u{212a}", "ſ", "ß", "Σ", "ς", "🦀",
    "\u{307}", " ", "'", "\n", "%", "_",
];
const TYPES: [&str; 6] = ["text", "varchar", "varchar(5)", "char(4)", "bpchar", "text[]"];
const COLLATIONS: [&str; 8] =
    ["default", "C", "POSIX", "C.utf8", "und-x-icu", "de-x-icu", "tr-x-icu", "lt-x-icu"];

/// Some of the characters; as a pattern it may have escapes.
fn text(dice: &mut Dice, most: u64, is_pattern: bool) -> String {
    let length = dice.below(most);
    let mut text = String::new();
    for _ in 0..length {
        // Half of a pattern means something.
        let of_meaning = if is_pattern && dice.below(2) == 0 { 22 } else { 0 };
        if is_pattern && dice.below(8) == 0 {
            text.push('\\');
        }
        let number = of_meaning + dice.below(CHARACTERS.len() as u64 - of_meaning);
        text.push_str(CHARACTERS[usize::try_from(number).unwrap()]);
    }
    text
}

/// A table with a column for each type and collation, and for names; and the relay's view of it.
async fn table(database: &Database) -> (Relation, Vec<String>) {
    let mut columns = vec![String::from("id int primary key"), String::from("n name")];
    for collation in COLLATIONS {
        let known = format!(
            "select exists (select from pg_collation where collname = '{collation}' and collencoding in (-1, 6))"
        );
        if database.value(&known).await == "t" {
            for kind in TYPES {
                columns.push(format!(r#""{kind} {collation}" {kind} collate "{collation}""#));
            }
        }
    }
    database.run(&format!("create table t ({}); select relay.watch('t')", columns.join(", "))).await;
    let catalog = database.value("select relay.catalog('{}') -> 'relations' -> 0").await;
    let relation: Relation = serde_json::from_str(&catalog).unwrap();
    let names = relation.columns.iter().skip(1).map(|column| column.name.clone()).collect();
    (relation, names)
}

fn bound(relation: &Relation, column: &str, operator: &str, pattern: &str) -> TypedFilter {
    let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let quoted = quote(pattern);
    let filter = filter::parse(&format!("{}={operator}.{quoted}", quote(column))).unwrap();
    let typed = filter.map(&mut |condition| {
        assert_eq!(
            (condition.column.as_str(), condition.values.as_slice()),
            (column, &[pattern.to_owned()][..])
        );
        TypedCondition::new(relation, condition.clone(), condition.values.clone())
    });
    TypedFilter::new(relation, typed, String::new(), "".into())
}

#[tokio::test(flavor = "multi_thread")]
async fn patterns_match_what_postgresql_matches_under_every_collation_and_type() {
    let database = Database::new().await;
    let (relation, columns) = table(&database).await;
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let texts: Vec<String> = (0..60).map(|_| text(&mut dice, 9, false)).chain([String::new()]).collect();
    let patterns: Vec<String> = (0..300)
        .map(|_| text(&mut dice, 8, true))
        .chain(texts.iter().take(30).map(|text| format!("%{text}_%")))
        .chain(["", "%", "_%", "a%", "%A", "\\%%", "%\\__"].map(str::to_owned))
        .collect();
    for (n, text) in texts.iter().enumerate() {
        // What does not fit a type is cut, as a cast does it.
        let values = columns.iter().map(|column| {
            let kind = column.rsplit_once(' ').map_or("name", |(kind, _)| kind);
            let literal = format!("'{}'::text", text.replace('\'', "''"));
            if kind.ends_with("[]") { format!("array[{literal}]") } else { format!("{literal}::{kind}") }
        });
        database.run(&format!("insert into t values ({n}, {})", values.collect::<Vec<_>>().join(", "))).await;
    }
    let images = database.value("select json_agg(row_to_json(t)::text order by id) from t").await;
    let images: Vec<String> = serde_json::from_str(&images).unwrap();
    let images: Vec<Image<'_>> =
        images.iter().map(|image| Image::parse(image, &relation.columns).unwrap()).collect();
    let list = serde_json::to_string(&patterns).unwrap().replace('\'', "''");
    let mut asked: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut told = 0;
    for column in columns.iter().filter(|column| !column.starts_with("text[]")) {
        let folding = relation.column(column).unwrap().folding;
        for (operator, negated) in [("like", false), ("like", true), ("ilike", false), ("ilike", true)] {
            let not = if negated { "not" } else { "" };
            // One that ends in its escape is refused when it is subscribed to.
            let answers = database
                .value(&format!(
                    "select json_agg(answers order by number) from (
                       select number, json_agg({not} (t.\"{column}\" {operator} p) order by id) as answers
                       from json_array_elements_text('{list}') with ordinality as patterns (p, number), t
                       where not (length(p) - length(rtrim(p, '\\'))) % 2 = 1 group by number) x"
                ))
                .await;
            let answers: Vec<Vec<bool>> = serde_json::from_str(&answers).unwrap();
            let usable = patterns
                .iter()
                .filter(|pattern| (pattern.len() - pattern.trim_end_matches('\\').len()).is_multiple_of(2));
            for (pattern, answers) in usable.zip(answers) {
                let wanted = format!("{}{operator}", if negated { "not." } else { "" });
                let filter = bound(&relation, column, &wanted, pattern);
                for (image, expected) in images.iter().zip(answers) {
                    match filter.truth(image) {
                        Truth::Undecided => *asked.entry((column, operator)).or_default() += 1,
                        truth => {
                            assert_eq!(
                                truth == Truth::True,
                                expected,
                                "{:?} {wanted} {pattern:?} in {column}",
                                image.row().value(column)
                            );
                            told += 1;
                        }
                    }
                }
            }
            let is_exact = operator == "like" || folding == Some(Folding::Ascii);
            let count = asked.get(&(column.as_str(), operator)).copied().unwrap_or_default();
            assert!(!is_exact || count == 0, "{column} {operator}: {count} are asked of PostgreSQL");
        }
    }
    let foldings = |wanted| relation.columns.iter().filter(|column| column.folding == Some(wanted)).count();
    assert!(foldings(Folding::Ascii) > 0 && foldings(Folding::Letters) > 0, "{asked:?}");
    assert!(told > 1_000_000, "{told} were told here, asked: {asked:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pattern_that_would_raise_for_each_row_is_refused_with_the_words_of_postgresql() {
    let stage = Stage::new(
        "create collation loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
         create table t (id int primary key, v text, l text collate loose, tags text[]);
         grant select on t to anon; select relay.watch('t')",
    )
    .await;
    let anon = token("anon", None, json!({}));
    // Since PostgreSQL 18 it matches by them, without regard to case where they have none.
    let can_match = stage.database.client.simple_query("select 'A' collate loose like 'a'").await.is_ok();
    let loosely = if can_match {
        "Subscribed to PostgreSQL"
    } else {
        "nondeterministic collations are not supported for LIKE"
    };
    let escape = "ERROR 22025 (invalid_escape_sequence) LIKE pattern must not end with escape character";
    for (filter, text) in [
        (r#"v=like."a\\""#, escape),
        (r#"v=not.like."a\\\\\\""#, escape),
        (r#"v=ilike."\\""#, escape),
        ("l=like.a%", loosely),
        ("l=not.ilike.a%", "nondeterministic collations are not supported for ILIKE"),
        ("tags=like.a%", "ERROR 42883 (undefined_function) operator does not exist: text[] ~~ text"),
    ] {
        let answer = stage.answer(&anon, json!({"table": "t", "filter": filter})).await;
        assert!(answer.ends_with(text), "{filter}: {answer}");
    }
    let answer = stage.answer(&anon, json!({"table": "t", "filter": r#"v=like."a\\\\""#})).await;
    assert_eq!(answer, "Subscribed to PostgreSQL");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_gets_another_collation_is_matched_by_that_one() {
    let stage = Stage::new(
        r#"create table t (id int primary key, v text collate "C"); grant select on t to anon; select relay.watch('t')"#,
    )
    .await;
    let anon = token("anon", None, json!({}));
    let by: Value = json!([{"event": "*", "schema": "public", "table": "t", "filter": "v=ilike.ü%"}]);
    let mut before = stage.subscribe(&anon, by.clone()).await;
    stage.run("insert into t values (1, 'Üx'), (2, 'üX')").await;
    assert_eq!(stage.told(&mut before).await, [r#"INSERT {"id":2,"v":"üX"}"#]);
    stage.run(r#"alter table t alter column v type text collate "de-x-icu""#).await;
    let mut after = stage.subscribe(&anon, by).await;
    stage.run("insert into t values (3, 'Üx'), (4, 'üX'), (5, 'ux')").await;
    let told = [r#"INSERT {"id":3,"v":"Üx"}"#, r#"INSERT {"id":4,"v":"üX"}"#];
    assert_eq!(stage.told(&mut after).await, told);
}

#[test]
fn a_pattern_of_many_runs_takes_no_longer_than_its_text() {
    let text = "a".repeat(20_000);
    for pattern in ["%a".repeat(5_000) + "b", "%a_".repeat(5_000) + "%b", "%_a".repeat(20_000) + "b"] {
        let started = std::time::Instant::now();
        assert_eq!(Pattern::new(&pattern, None).unwrap().matches(&text), Truth::False);
        assert!(started.elapsed().as_secs() < 2, "{:?}", started.elapsed());
    }
}
