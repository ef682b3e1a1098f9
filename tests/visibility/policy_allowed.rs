//! Policies of `relay.allow`, each by the way that it should be decided, compared with what PostgreSQL says of the images.

use relay::model::policy::plan::PlanKind::{Compiled, PerIdentity};
use serde_json::{Value, json};

use crate::support::ways::Ways;
use crate::support::{ANN, BOB};

const SCHEMA: &str = "
    create type mood as enum ('bad', 'good');
    create table members (team int, person uuid); grant select on members to authenticated;
    create function is_fine(mood mood) returns bool language sql immutable as $$ select mood = 'good' $$;
    create materialized view m as
      select n as id, n % 3 as team, ('{0a000000-0000-4000-8000-00000000000a,0b000000-0000-4000-8000-00000000000b}'::uuid[])[n % 3] as owner,
        ('{acme,beta,null}'::text[])[n % 4] as org, ('{bad,good}'::mood[])[n % 3] as mood, n % 2 = 0 as open, n * 1.5 as price
      from generate_series(1, 12) n;
    create unique index on m (id); grant select on m to authenticated; select relay.watch('m');
    insert into members values (1, '0a000000-0000-4000-8000-00000000000a')";

#[tokio::test(flavor = "multi_thread")]
async fn allowed_conditions_of_the_row_and_claims_cost_no_statement() {
    let ways = Ways::new(SCHEMA).await;
    let readers: Vec<Value> = [
        json!({"sub": ANN, "org": "acme", "level": 2, "orgs": ["acme"]}),
        json!({"sub": BOB, "org": null, "level": "1", "orgs": []}),
        json!({"sub": "no uuid", "org": 7, "level": "many"}),
    ]
    .into_iter()
    .map(|mut claims| {
        claims["role"] = json!("authenticated");
        claims["exp"] = json!(4_000_000_000_u64);
        claims
    })
    .collect();
    for (condition, way) in [
        ("owner = auth.uid()", Compiled),
        ("OWNER = AUTH.UID() -- the owner", Compiled),
        ("owner = (select auth.uid()) or open and org = 'acme'", Compiled),
        ("not open is not true", Compiled),
        ("org = any (array(select jsonb_array_elements_text(auth.jwt() -> 'orgs')))", Compiled),
        ("m.org in (auth.jwt() ->> 'org', 'beta') and team between 0 and 1", Compiled),
        ("mood = 'good'", Compiled),
        ("team <= (auth.jwt() ->> 'level')::int", Compiled),
        ("coalesce((auth.jwt() ->> 'admin')::bool, open)", Compiled),
        ("coalesce((auth.jwt() ->> 'admin')::bool, org is null)", PerIdentity),
        ("true", Compiled),
        ("price > 5", PerIdentity),
        ("public.is_fine(mood)", PerIdentity),
        ("team in (select team from public.members where person = auth.uid())", PerIdentity),
        ("m is not null", PerIdentity),
    ] {
        ways.database.run(&format!("select relay.allow('m', $policy${condition}$policy$)")).await;
        let catalog = ways.catalog().await;
        let relation = catalog.named("public", "m").unwrap();
        let images = ways.images("m").await;
        let plan = &relation.access("authenticated").unwrap().plan;
        assert_eq!(plan.kind, way, "{condition}: {:?}", plan.obstacles);
        let (seen, cost) = ways.ours(&catalog, relation, &images, &readers).await;
        assert_eq!(cost.statements == 0, way == Compiled, "{condition}");
        for (claims, seen) in readers.iter().zip(seen) {
            assert_eq!(seen, ways.one_by_one(relation, &images, claims).await, "{condition} for {claims}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allowed_condition_without_a_schema_is_refused_with_the_cure() {
    let ways = Ways::new(SCHEMA).await;
    for condition in [
        "is_fine(mood)",
        "team in (select team from members)",
        "nowhere.is_fine(mood)",
        "mood = 'good'::mood",
    ] {
        let allow = format!("select relay.allow('m', $policy${condition}$policy$)");
        let refused = ways.database.client.batch_execute(&allow);
        let error = refused.await.unwrap_err();
        let hint = error.as_db_error().and_then(|error| error.hint()).unwrap_or_default().to_owned();
        assert!(hint.contains("need their schema"), "{condition}: {error:?}");
    }
    // A column that there is not has nothing to do with the path.
    let refused =
        ways.database.client.batch_execute("select relay.allow('m', 'nothing = 1')").await.unwrap_err();
    assert_eq!(refused.as_db_error().and_then(|error| error.hint()), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_whose_columns_changed_is_left_to_postgresql() {
    let ways = Ways::new(SCHEMA).await;
    ways.database
        .run("select relay.allow('m', $$org = 'acme'$$); alter materialized view m rename column org to firm")
        .await;
    let catalog = ways.catalog().await;
    let plan = &catalog.named("public", "m").unwrap().access("authenticated").unwrap().plan;
    assert_eq!(plan.kind, PerIdentity);
}
