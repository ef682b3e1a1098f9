//! Rules, roles, columns and labels change at random between random changes of rows. PostgreSQL itself is the judge of what
//! each reader is told, whichever way it reads and however late it comes.
#![allow(clippy::print_stdout, reason = "the seed repeats a run")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use tokio_postgres::Client as Session;

use crate::support::client::Client;
use crate::support::dice::Dice;
use crate::support::http::{Event, Events, get};
use crate::support::stage::Stage;
use crate::support::{PATIENCE, token};

/// `R` and `S` are roles of readers, `G` is a group.
const MADE: &str = "
    create role R; create role S; create role G; create schema s; grant usage on schema s to R, S;
    create type s.mood as enum ('l0', 'l1', 'l2');
    create table s.t (id int primary key, v int, team int, m s.mood, c0 text, c1 text, c2 text);
    create table s.members (team int); insert into s.members values (0), (1); grant select on s.members to public;
    alter table s.t enable row level security; create policy p on s.t using (team = CLAIM);
    grant select on s.t to R; grant select (id, v, m, c0) on s.t to S;
    select relay.watch('s.t');
    create function numbered(the_id int) returns jsonb language plpgsql as $$
    declare r constant jsonb := (select to_jsonb(t) from s.t t where t.id = the_id);
    begin
      return (select jsonb_object_agg(a.attnum, case
                when a.attname = 'm' then (select to_jsonb(e.oid::bigint) from pg_enum e
                                           where e.enumtypid = a.atttypid and e.enumlabel = r ->> a.attname)
                else r -> a.attname end)
              from pg_attribute a where a.attrelid = 's.t'::regclass and a.attnum > 0 and not a.attisdropped);
    end $$;
    create function put(image jsonb) returns void language plpgsql as $$
    begin
      delete from s.t where id = (image ->> '1')::int;
      execute (select format('insert into s.t (%s) values (%s)', string_agg(quote_ident(a.attname), ', '),
                 string_agg(case when a.attname = 'm' then (select quote_literal(e.enumlabel) || '::s.mood' from pg_enum e
                                                            where e.oid = (image ->> a.attnum::text)::bigint::oid)
                            else quote_nullable(image ->> a.attnum::text) end, ', '))
               from pg_attribute a
               where a.attrelid = 's.t'::regclass and a.attnum > 0 and not a.attisdropped and image ? a.attnum::text);
    end $$;
    create function written(id int, v int, team int, label text) returns void language plpgsql as $$
    begin
      execute (select format('insert into s.t (id, v, team, m, %s) values ($1, $2, $3, $4::s.mood, %s)',
                 string_agg(quote_ident(attname), ', '),
                 string_agg(quote_literal(format('row %s column %s', v, attnum)), ', '))
               from pg_attribute where attrelid = 's.t'::regclass and attname ~ '^c[0-9]$' and not attisdropped)
        using id, v, team, label;
    end $$;";

const CLAIM: &str = "(current_setting('request.jwt.claims', true)::jsonb ->> 'team')::int";

/// Changes of what a role may see; `X` is the role of a reader, `K` a number below three.
const RULES: &[&str] = &[
    "grant select on s.t to X",
    "grant select (id, v, cK) on s.t to X",
    "revoke select (cK) on s.t from X",
    "revoke select on s.t from X",
    "grant select on s.t to G",
    "revoke select on s.t from G",
    "drop policy if exists p on s.t; create policy p on s.t using (team = K)",
    "drop policy if exists p on s.t; create policy p on s.t using (team >= CLAIM)",
    "drop policy if exists p on s.t; create policy p on s.t using (true); alter policy p on s.t using (m <> 'lK')",
    "drop policy if exists p on s.t; create policy p on s.t using (exists (select from s.members x where x.team = t.team))",
    "drop policy if exists p on s.t",
    "drop policy if exists g on s.t; create policy g on s.t to G using (team <> K)",
    "drop policy if exists r on s.t; create policy r on s.t as restrictive using (team <> K)",
    "drop policy if exists r on s.t; create policy r on s.t as restrictive to G using (team = K)",
    "drop policy if exists r on s.t",
    "alter table s.t disable row level security",
    "alter table s.t enable row level security",
    "alter table s.t force row level security",
    "alter table s.t no force row level security",
    "alter table s.t owner to X",
    "alter table s.t owner to postgres; grant select on s.t to X",
    "revoke usage on schema s from X",
    "grant usage on schema s to X",
];

/// What PostgreSQL fires no event trigger for.
const ROLES: &[&str] = &[
    "grant G to X",
    "revoke G from X",
    "alter role X bypassrls",
    "alter role X nobypassrls",
    "alter role X noinherit",
    "alter role X inherit",
];

/// Changes of the columns and labels; `L` is another number than `K`.
const SHAPES: &[&str] = &[
    "alter table s.t rename cK to c9; alter table s.t rename cL to cK; alter table s.t rename c9 to cL",
    "alter type s.mood rename value 'lK' to 'l9'; alter type s.mood rename value 'lL' to 'lK';
     alter type s.mood rename value 'l9' to 'lL'",
    "alter table s.t drop column cK cascade; alter table s.t add column cK text",
    "alter table s.t alter cK type varchar(99)",
    "alter table s.t alter cK type text",
    "alter table s.t add column if not exists c3 text",
    "alter table s.t drop column if exists c3",
];

/// Replaces the words that stand for something.
fn named(sql: &str, words: &[(&str, &str)]) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$';
    let known = [("R", "$DB_r"), ("S", "$DB_s"), ("G", "$DB_g"), ("CLAIM", CLAIM)];
    let mut named = String::new();
    for part in sql.split_inclusive(|c: char| !is_word(c)) {
        let word = part.trim_end_matches(|c: char| !is_word(c));
        let other = words.iter().chain(&known).find(|(from, _)| *from == word);
        named += other.map_or(word, |(_, to)| to);
        named += &part[word.len()..];
    }
    named
}

/// A reader: its role, and the team in its claims.
struct Identity {
    role: String,
    claims: Value,
}

impl Identity {
    fn new(stage: &Stage, role: &str, team: u32) -> Self {
        Self { role: format!("{}_{role}", stage.name), claims: json!({"team": team.to_string()}) }
    }

    fn token(&self) -> String {
        token(&self.role, None, self.claims.clone())
    }
}

/// A change that was committed.
struct Written {
    /// How it is told apart: by its version, or a delete by its row.
    key: String,
    image: Value,
    /// What was shown to each reader right after the commit.
    then: Vec<Option<Map<String, Value>>>,
}

/// What PostgreSQL itself shows.
struct Judge {
    session: Session,
}

impl Judge {
    /// What is shown now of these images to a reader: in a transaction that ends with a rollback each of them stands in
    /// the table for a moment.
    async fn shown(&self, who: &Identity, images: &[&Value]) -> Vec<Option<Map<String, Value>>> {
        let mut shown = vec![None; images.len()];
        let mut left: Vec<usize> = (0..images.len()).collect();
        while !left.is_empty() {
            let mut ids = BTreeSet::new();
            let (now, later): (Vec<usize>, Vec<usize>) =
                left.into_iter().partition(|at| ids.insert(images[*at]["1"].as_i64().unwrap()));
            left = later;
            self.session.batch_execute("begin").await.unwrap();
            for at in &now {
                let put = format!("select put($i${}$i$)", images[*at]);
                self.session.batch_execute(&put).await.unwrap();
            }
            let columns = format!(
                "select coalesce(string_agg(quote_ident(attname), ', '), '') from pg_attribute
                 where attrelid = 's.t'::regclass and attnum > 0 and not attisdropped
                   and has_column_privilege('{}', attrelid, attnum, 'select')",
                who.role
            );
            let columns: String = self.session.query_one(&columns, &[]).await.unwrap().get(0);
            let become_reader = format!(
                "select set_config('request.jwt.claims', '{}', true); set local role \"{}\"",
                json!({"role": who.role, "team": who.claims["team"]}),
                who.role
            );
            self.session.batch_execute(&become_reader).await.unwrap();
            let select = format!("select to_jsonb(x)::text from (select {columns} from s.t) x");
            if let Ok(rows) = self.session.query(&select, &[]).await {
                for row in rows {
                    let row: Map<String, Value> = serde_json::from_str(row.get(0)).unwrap();
                    let same = now.iter().find(|at| Some(&images[**at]["1"]) == row.get("id"));
                    if let Some(at) = same {
                        shown[*at] = Some(row);
                    }
                }
            }
            self.session.batch_execute("rollback").await.unwrap();
        }
        shown
    }
}

/// What a reader received: each change, and whether it was a gap.
#[derive(Debug, Default)]
struct Told {
    changes: Vec<Value>,
    gap: bool,
    /// It may read nothing now.
    refused: bool,
}

fn key(change: &Value) -> String {
    match change["type"].as_str() {
        Some("DELETE") => format!("row {}", change["old_record"]["id"]),
        _ => format!("version {}", change["record"]["v"]),
    }
}

/// A socket up to now.
async fn heard(stage: &Stage, client: &mut Client) -> Told {
    let marker: i64 =
        stage.database.value("insert into marker default values returning id").await.parse().unwrap();
    let mut told = Told::default();
    loop {
        let frame = client.frame_within(PATIENCE).await.unwrap_or_else(|| panic!("no marker after {told:?}"));
        let data = &frame[4]["data"];
        if frame[3] == "system" {
            told.gap |= frame[4]["message"].as_str().is_some_and(|message| message.starts_with("Gap"));
        } else if frame[3] == "postgres_changes" && data["table"] == "marker" {
            if data["record"]["id"] == marker {
                return told;
            }
        } else if frame[3] == "postgres_changes" {
            told.changes.push(data.clone());
        }
    }
}

fn path(who: &Identity) -> String {
    format!("/realtime/v1/changes?schema=s&table=t&apikey={}", who.token())
}

/// A poll by a cursor, up to now; the cursor moves on.
async fn polled(stage: &Stage, who: &Identity, cursor: &mut String) -> Told {
    let mut told = Told::default();
    loop {
        let asked = format!("{}&wait=0&since={cursor}", path(who));
        let answer = get(stage.relay.address, &asked, "").await;
        match answer.status {
            200 => {
                told.changes.extend(answer.body["changes"].as_array().unwrap().iter().cloned());
                *cursor = answer.body["cursor"].as_str().unwrap().to_owned();
                if answer.body["more"] != true {
                    return told;
                }
            }
            410 => {
                *cursor = stage.database.value("select relay.cursor()").await;
                told.gap = true;
                return told;
            }
            403 | 400 => {
                told.refused = true;
                return told;
            }
            _ => panic!("{answer:?}"),
        }
    }
}

/// A stream by a cursor, until it has told all that is awaited, a gap, or its end.
async fn streamed(stream: &mut Events, awaited: &BTreeSet<String>, told: &mut Told) -> bool {
    while !awaited.is_subset(&told.changes.iter().map(key).collect()) {
        match stream.next().await {
            Some(Event { name, data, .. }) if name == "change" => told.changes.push(data),
            Some(Event { name, .. }) => {
                told.gap |= name == "gap";
                return false;
            }
            None => return false,
        }
    }
    true
}

/// One run of random changes.
struct Run {
    seed: u64,
    dice: Dice,
    stage: Stage,
    judge: Judge,
    writer: Session,
    readers: Vec<Identity>,
    written: Vec<Written>,
    /// Whether something but rows changed at each step.
    altered: Vec<bool>,
    next: [i64; 2],
    ids: Vec<i64>,
    script: String,
    exact: BTreeMap<&'static str, usize>,
}

impl Run {
    async fn new(seed: u64) -> Self {
        println!("RELAY_TEST_SEED={seed}");
        let stage = Stage::new(&named(MADE, &[])).await;
        let readers =
            vec![Identity::new(&stage, "r", 1), Identity::new(&stage, "r", 2), Identity::new(&stage, "s", 1)];
        let judge = Judge { session: stage.database.connect().await };
        let writer = stage.database.connect().await;
        Self {
            seed,
            dice: Dice(seed),
            stage,
            judge,
            writer,
            readers,
            written: Vec::new(),
            altered: Vec::new(),
            next: [1, 1],
            ids: Vec::new(),
            script: String::new(),
            exact: BTreeMap::new(),
        }
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[usize::try_from(self.dice.below(from.len() as u64)).unwrap()]
    }

    /// A statement that changes rules or columns.
    fn alteration(&mut self) -> String {
        let sql = match self.dice.below(8) {
            0..=3 => self.pick(RULES),
            4 | 5 => self.pick(ROLES),
            _ => self.pick(SHAPES),
        };
        let who = if self.dice.below(3) == 0 { "$DB_s" } else { "$DB_r" };
        let one = self.dice.below(3);
        let other = (one + 1 + self.dice.below(2)) % 3;
        let sql = sql.replace("cK", &format!("c{one}")).replace("cL", &format!("c{other}"));
        let sql = sql.replace("lK", &format!("l{one}")).replace("lL", &format!("l{other}"));
        let sql = named(&sql, &[("X", who), ("K", &one.to_string())]);
        match self.dice.below(5) {
            0 => format!(
                "set local session_replication_role = replica; {sql}; set local session_replication_role = origin"
            ),
            _ => sql,
        }
    }

    /// A statement that writes one row which this transaction has not written yet, and how the change is told apart.
    fn row(&mut self, taken: &mut BTreeSet<i64>, with_delete: bool) -> (String, i64, String) {
        let kind = self.dice.below(6);
        let old = match self.ids.is_empty() {
            true => None,
            false => {
                let at = usize::try_from(self.dice.below(self.ids.len() as u64)).unwrap();
                Some(self.ids[at]).filter(|id| !taken.contains(id))
            }
        };
        let (team, label, v) = (self.dice.below(3), self.dice.below(3), self.next[1]);
        let (id, sql, key) = match (kind, old) {
            (4, Some(id)) => {
                (id, format!("update s.t set v = {v}, team = {team} where id = {id}"), format!("version {v}"))
            }
            (5, Some(id)) if with_delete => {
                self.ids.retain(|other| *other != id);
                (id, format!("delete from s.t where id = {id}"), format!("row {id}"))
            }
            _ => {
                let id = self.next[0];
                self.next[0] += 1;
                self.ids.push(id);
                let sql = format!("select written({id}, {v}, {team}, 'l{label}')");
                (id, sql, format!("version {v}"))
            }
        };
        self.next[1] += 1;
        taken.insert(id);
        (sql, id, key)
    }

    /// A transaction, and what PostgreSQL shows of it right after its commit.
    async fn transaction(&mut self) -> bool {
        let (mut parts, mut keys, mut taken) = (Vec::new(), Vec::new(), BTreeSet::new());
        let mut alterations: Vec<String> = Vec::new();
        for _ in 0..self.dice.below(3) {
            alterations.push(self.alteration());
        }
        // A row that is deleted has to be read before.
        let with_delete = alterations.is_empty();
        for _ in 0..self.dice.below(3) {
            let (sql, id, key) = self.row(&mut taken, with_delete);
            let before = match key.starts_with("row") {
                true => Some(self.image(id).await),
                false => None,
            };
            keys.push((key, id, before));
            parts.push(sql);
        }
        let is_altered = !alterations.is_empty();
        for alteration in alterations {
            let at = usize::try_from(self.dice.below(parts.len() as u64 + 1)).unwrap();
            parts.insert(at, alteration);
        }
        let script = format!("begin; {}; commit", parts.join("; ")).replace("$DB", &self.stage.name);
        writeln!(self.script, "{script}").unwrap();
        if let Err(error) = self.writer.batch_execute(&script).await {
            panic!("{:?} {}", error.as_db_error(), self.context());
        }
        for (key, id, before) in keys {
            let image = match before {
                Some(image) => image,
                None => self.image(id).await,
            };
            let mut then = Vec::new();
            for who in &self.readers {
                then.push(self.judge.shown(who, &[&image]).await.remove(0));
            }
            self.written.push(Written { key, image, then });
        }
        is_altered
    }

    async fn image(&self, id: i64) -> Value {
        serde_json::from_str(&self.stage.database.value(&format!("select numbered({id})")).await).unwrap()
    }

    fn context(&self) -> String {
        format!("RELAY_TEST_SEED={}\n{}", self.seed, self.script)
    }

    /// Transactions that come one by one, or of which the relay reads several at once.
    async fn step(&mut self) {
        let count = if self.dice.below(3) == 0 { 2 + self.dice.below(3) } else { 1 };
        let holds = self.stage.database.connect().await;
        if count > 1 {
            let lock = "begin; lock table only relay.log in access exclusive mode";
            holds.batch_execute(lock).await.unwrap();
            writeln!(self.script, "-- at once:").unwrap();
        }
        let mut is_altered = false;
        for _ in 0..count {
            is_altered |= self.transaction().await;
        }
        if count > 1 {
            holds.batch_execute("rollback").await.unwrap();
            writeln!(self.script, "-- until here").unwrap();
        }
        self.altered.push(is_altered);
    }

    /// What a reader who stands at this place may be told now, by the keys.
    async fn allowed(&self, reader: usize, since: Place) -> BTreeMap<String, Map<String, Value>> {
        let missed = &self.written[since.written..];
        let images: Vec<&Value> = missed.iter().map(|written| &written.image).collect();
        let shown = self.judge.shown(&self.readers[reader], &images).await;
        let both = missed.iter().zip(shown).filter(|(written, _)| written.then[reader].is_some());
        both.filter_map(|(written, now)| Some((written.key.clone(), now?))).collect()
    }

    /// Compares what a reader was told who stood at this place.
    async fn check(&mut self, way: &'static str, reader: usize, since: Place, told: &Told) {
        let allowed = self.allowed(reader, since).await;
        let context =
            || format!("{way} of reader {reader}: {told:?}\nallowed: {allowed:?}\n{}", self.context());
        for change in &told.changes {
            let key = key(change);
            let Some(written) = self.written.iter().find(|written| written.key == key) else {
                panic!("{key} was never written\n{}", context());
            };
            let Some(then) = &written.then[reader] else { panic!("{key} was hidden\n{}", context()) };
            let is_missed = self.written[since.written..].iter().any(|written| written.key == key);
            if !is_missed {
                continue;
            }
            let Some(now) = allowed.get(&key) else { panic!("{key} is hidden now\n{}", context()) };
            let half = if change["type"] == "DELETE" { "old_record" } else { "record" };
            let record = change[half].as_object().unwrap();
            for (column, value) in record {
                assert_eq!(now.get(column), Some(value), "{key}, {column}\n{}", context());
                let is_text = value.as_str().is_some_and(|text| text.starts_with("row"));
                assert!(!is_text || then.values().any(|one| one == value), "{key}, {column}\n{}", context());
            }
            let is_told = |(column, value): (&String, &Value)| value.is_null() || record.contains_key(column);
            assert!(half == "old_record" || now.iter().all(is_told), "{key} is not whole\n{}", context());
        }
        if told.gap {
            let is_altered = self.altered[since.step..].iter().any(|altered| *altered);
            assert!(is_altered, "a gap of nothing\n{}", context());
            return;
        }
        let keys: BTreeSet<String> = told.changes.iter().map(key).collect();
        if told.refused {
            assert!(keys.is_empty(), "{}", context());
            return;
        }
        let missing: Vec<&String> = allowed.keys().filter(|key| !keys.contains(*key)).collect();
        assert!(missing.is_empty(), "{missing:?} is missing without a gap\n{}", context());
        *self.exact.entry(way).or_default() += usize::from(!keys.is_empty());
    }

    fn here(&self) -> Place {
        Place { written: self.written.len(), step: self.altered.len() }
    }
}

/// How far a reader has come.
#[derive(Debug, Clone, Copy)]
struct Place {
    written: usize,
    step: usize,
}

/// A reader of every way.
struct Reader {
    number: usize,
    socket: Client,
    stream: Option<Events>,
    /// The step from which on a gap may be on its way to the stream: it is read when a change is awaited.
    unread: usize,
    poll: (String, Place),
    late: [(String, Place); 2],
    /// The session, and the step that its bookmark has surely reached: it may be older than what was read last.
    session: (Place, usize),
}

impl Reader {
    async fn new(run: &Run, number: usize) -> Self {
        let who = &run.readers[number];
        let bindings = json!([{"event": "*", "schema": "s"}]);
        let socket = run.stage.subscribe(&who.token(), bindings).await;
        let stream = Events::try_open(run.stage.relay.address, &path(who), None).await.ok();
        come_back(&run.stage, number, who).await;
        let cursor: String = run.stage.database.value("select relay.cursor()").await;
        let here = run.here();
        let at = || (cursor.clone(), here);
        Self { number, socket, stream, unread: here.step, poll: at(), late: [at(), at()], session: (here, 0) }
    }

    /// Those who are here, after one step.
    async fn live(&mut self, run: &mut Run, before: Place) {
        let told = heard(&run.stage, &mut self.socket).await;
        run.check("socket", self.number, before, &told).await;
        let told = polled(&run.stage, &run.readers[self.number], &mut self.poll.0).await;
        run.check("poll", self.number, self.poll.1, &told).await;
        if !told.refused {
            self.poll.1 = run.here();
        }
        self.live_stream(run, before).await;
    }

    async fn live_stream(&mut self, run: &mut Run, before: Place) {
        let mut told = Told::default();
        let mut is_open = false;
        if let Some(stream) = &mut self.stream {
            let awaited: BTreeSet<String> = run.allowed(self.number, before).await.into_keys().collect();
            is_open = streamed(stream, &awaited, &mut told).await;
            told.refused = !is_open && !told.gap;
            run.check("stream", self.number, Place { step: self.unread, ..before }, &told).await;
            if !awaited.is_empty() {
                self.unread = run.here().step;
            }
        }
        if !is_open {
            let who = &run.readers[self.number];
            self.stream = Events::try_open(run.stage.relay.address, &path(who), None).await.ok();
            self.unread = run.here().step;
        }
    }

    /// Those who come back now.
    async fn late(&mut self, run: &mut Run) {
        match run.dice.below(9) {
            0 => {
                let (cursor, since) = &mut self.late[0];
                let told = polled(&run.stage, &run.readers[self.number], cursor).await;
                run.check("late poll", self.number, *since, &told).await;
                if !told.refused {
                    self.late[0].1 = run.here();
                }
            }
            1 => self.late_stream(run).await,
            2 => {
                let told = come_back(&run.stage, self.number, &run.readers[self.number]).await;
                let (since, step) = self.session;
                run.check("session", self.number, Place { step, ..since }, &told).await;
                self.session = (run.here(), since.step);
            }
            _ => {}
        }
    }

    async fn late_stream(&mut self, run: &mut Run) {
        let (cursor, since) = self.late[1].clone();
        let who = &run.readers[self.number];
        let mut told = Told::default();
        match Events::try_open(run.stage.relay.address, &path(who), Some(&cursor)).await {
            Ok(mut stream) => {
                let awaited = run.allowed(self.number, since).await.into_keys().collect();
                let is_open = streamed(&mut stream, &awaited, &mut told).await;
                told.refused = !is_open && !told.gap;
            }
            Err(_) => told.refused = true,
        }
        run.check("late stream", self.number, since, &told).await;
        if !told.refused {
            let cursor = run.stage.database.value("select relay.cursor()").await;
            self.late[1] = (cursor, run.here());
        }
    }
}

/// What a socket that named its session is told when it comes back; then it goes away again.
async fn come_back(stage: &Stage, number: usize, who: &Identity) -> Told {
    let session = format!("&session=5e551011-0000-4000-8000-00000000000{number}");
    let mut client = Client::at(stage.relay.address, &who.token(), &session).await.unwrap();
    let bindings =
        json!([{"event": "*", "schema": "s"}, {"event": "*", "schema": "public", "table": "marker"}]);
    client.subscribe("realtime:s", bindings).await;
    let told = heard(stage, &mut client).await;
    // Confirmed, so there is a bookmark from here on.
    client.push(None, "phoenix", "heartbeat", json!({})).await;
    while client.frame().await[3] != "phx_reply" {}
    told
}

async fn played(seed: u64) {
    let mut run = Run::new(seed).await;
    let mut readers = Vec::new();
    for number in 0..run.readers.len() {
        readers.push(Reader::new(&run, number).await);
    }
    // The sessions of the event trigger know it before it is locked.
    run.writer.batch_execute("create table warm (); drop table warm").await.unwrap();
    for _ in 0..STEPS {
        let before = run.here();
        run.step().await;
        for reader in &mut readers {
            reader.live(&mut run, before).await;
            reader.late(&mut run).await;
        }
    }
    println!("{:?} of {} changes", run.exact, run.written.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_becomes_of_rules_roles_and_columns_each_reader_is_told_what_postgresql_shows_or_of_a_gap() {
    let asked = |name: &str| std::env::var(name).ok().map(|number| number.parse::<u64>().unwrap());
    let (first, seconds) = (asked("RELAY_TEST_SEED"), asked("RELAY_TEST_SECONDS"));
    let Some(first) = first else {
        for seed in SEEDS {
            played(*seed).await;
        }
        return;
    };
    let started = Instant::now();
    for seed in first.. {
        played(seed).await;
        if started.elapsed() >= Duration::from_secs(seconds.unwrap_or(0)) {
            break;
        }
    }
}

/// Those of every run. `RELAY_TEST_SEED` names another one, and `RELAY_TEST_SECONDS` how long to go on from there.
const SEEDS: &[u64] = &[13, 24];
const STEPS: usize = 40;
