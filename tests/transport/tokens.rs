//! Tokens and keys as clients show them, through the socket; and that none of what they hold gets into the logs.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, crypto};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::support::database::Database;
use crate::support::socket::Socket;
use crate::support::stage::Stage;
use crate::support::{ANN, SECRET, eventually, token};

// Made with openssl: the public halves of throw-away keys, and what the private halves signed, namely `PAYLOAD`
// under the header of `published`.
const PAYLOAD: &str =
    r#"{"role":"authenticated","exp":4000000000,"sub":"0a000000-0000-4000-8000-00000000000a"}"#;
const RSA_N: &str = "8aYDKs4q7nudtYrdA6vbaCCL2u-RRfoUeKT8Vj0pyVZyDfpxSDuCVRxZ6ZAC5MsoTc_Ijeb5fvvwFgC3KwLQe9wY3PCkV6utDtR_\
    hw4Fh7zwi9tiQ4hQkX-cEFy5ucTxnskX7EUJuhZzgISV75A3MgGzx2k5QdSuD5AE0C9JyCYe2j3h-mIUsl1S9BuGlp-jOdMR1mQo\
    6nZANhPO-3DAM4v15R9cL4YfbiWKAcrq9Y6aSirs_XBpkv4KWj_djWbld36EO9ww00lWgECwevWr7OTqZ-mr8qxi-pSnkMZhqeUI\
    6O1RLcZERKPNzW0kXSnNlbSKvz32oXtbXdSFC8NAUQ";
const P256_X: &str = "zcXtyHHKLjNLWhNKbxalBXb55eZPE3Yfa84ksyzwZE8";
const P256_Y: &str = "KBiJpM2iyBWCInPXzuv8uNysVEp6JRrWSOgR72FeSOk";
const P384_X: &str = "WWyppelTHvqGHXvOjgWoeigvwt717_7wneZgm_KKJEd3-RCNFUq_StZ_2-63iC1W";
const P384_Y: &str = "-3wyhuSLrAtXee9HWNF9-q6dZN_D7P7K4NDWfJjz2AzMRMVqF21I5YLLOHjLlkwW";
const ED_X: &str = "h_pO8GpTGrMM03xuqrlg4fuioJw5VVtNxKCw-GHOiGY";
const BY_RS256: &str = "x_IGpC84w6qjMf0O9Yvw3I0DarGGqBl00atT1WQ9pOQPQ88Qd9M6YmVHlXJO7GfgVO2Mq5y8_0CFTQGboxpTIxCovgLrVZBX9yiR\
    towhuXk55GX2gXZTrJBEguVz3M1dZmipbXW1NJQ3UNWPwOG5HSmCY-atVvKilbjwh-HzHYkC-zbHHo7Rvaxp_fnFilx8BV5DueD6\
    RPjjkAZaiLnDDGSaFA0UT0IXKnYNE2JbmJiJmjD5tjvgHpOgfxlTaccGf_W-OX7CUi4gHTywLg1Mc69pZumyMvOwuO97QajhZAfg\
    cvjOaxgbAmHyuNt0Iz2wsStMRLYVniMhiYSDWPaLGg";
const BY_RS512: &str = "I1rBFvjvaPfVkKH5TDixG_ovqViLkT65gBs4d69aRgh51IZDzahZnAfyh1tyoSN8G0jQOHhgPKMwrxD2iozys3k8Yyx7-1ncVWS3\
    hT6zdqLRkAHQi_LXZFsUPG5D-apIgn3loFZoEtAgzrQO6MW9Zna4cdOTVMSOkCnHFZAutOj-EKSXRs7SgilTkk7WoU70Ddf7IwkH\
    YmwfPtpkgqbtORS0oOk5QxiKA4XCpj_v6f1S7nz4jHDv8PWmlkToOktnoqVLPViCpMXEvbP6Sb-xs-_K_M3Ls-syFEL5UWUUwMVt\
    mSnmqWKY56e7ufeJzgExVPUxhUR1ZXhEbOZm8BlN6A";
const BY_ES256: &str =
    "hkdRg7aFv6eklleV8xHDrWa_3obFnPAWcCWOSrT1ghdkB9ejXRjk71akCz_KAf_qR8tkHrL7jMpXwlw-hkkhZA";
const BY_ES384: &str = "A3lsLVERnRP5NAwPMBjLiWhScdJZAmnuVG58EC5-QAytKETHy2Ra5YrLTJMKUMjkn5dhZJQwTINDMvVAQcEgpHT_qcofCNY0jjQr\
    DU6gXXY6KJwRd14YRbBiMeO8UuEi";
const BY_EDDSA: &str =
    "b6AKJLWBXZgVBAzinDq5ZdVMOCi2UUORqcMnmfUBGepBZW_GCc4rs8kk2TMlTdedBnWMA6UDn-vWMnB66D34CA";
const RSA_PEM: &str = "-----BEGIN PUBLIC KEY-----\n\
    MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA8aYDKs4q7nudtYrdA6vb\n\
    aCCL2u+RRfoUeKT8Vj0pyVZyDfpxSDuCVRxZ6ZAC5MsoTc/Ijeb5fvvwFgC3KwLQ\n\
    e9wY3PCkV6utDtR/hw4Fh7zwi9tiQ4hQkX+cEFy5ucTxnskX7EUJuhZzgISV75A3\n\
    MgGzx2k5QdSuD5AE0C9JyCYe2j3h+mIUsl1S9BuGlp+jOdMR1mQo6nZANhPO+3DA\n\
    M4v15R9cL4YfbiWKAcrq9Y6aSirs/XBpkv4KWj/djWbld36EO9ww00lWgECwevWr\n\
    7OTqZ+mr8qxi+pSnkMZhqeUI6O1RLcZERKPNzW0kXSnNlbSKvz32oXtbXdSFC8NA\n\
    UQIDAQAB\n\
    -----END PUBLIC KEY-----\n";

const TABLE: &str =
    "create table t (id int primary key, owner uuid); alter table t enable row level security;
    create policy own on t for select to authenticated using (owner = (select auth.uid()));
    create policy none on t for select to anon using (id = 0);
    grant select on t to authenticated, anon, service_role; select relay.watch('t');";

fn encoded(header: &Value, payload: &str) -> String {
    let [header, payload] = [header.to_string().as_str(), payload].map(|part| URL_SAFE_NO_PAD.encode(part));
    format!("{header}.{payload}")
}

/// A token of one of the published keys.
fn published(algorithm: &str, kid: &str, signature: &str) -> String {
    format!("{}.{signature}", encoded(&json!({"alg": algorithm, "typ": "JWT", "kid": kid}), PAYLOAD))
}

/// A token of a shared secret, whatever its header says.
fn hashed(header: &Value, payload: &str, secret: &[u8], algorithm: Algorithm) -> String {
    let message = encoded(header, payload);
    let signature = crypto::sign(message.as_bytes(), &EncodingKey::from_secret(secret), algorithm).unwrap();
    format!("{message}.{signature}")
}

/// A relay that also knows published keys and opaque ones.
async fn stage() -> Stage {
    let keys = json!({"keys": [
        {"kid": "rsa", "kty": "RSA", "n": RSA_N, "e": "AQAB", "use": "sig"},
        {"kid": "p256", "kty": "EC", "crv": "P-256", "x": P256_X, "y": P256_Y},
        {"kid": "p384", "kty": "EC", "crv": "P-384", "x": P384_X, "y": P384_Y},
        {"kid": "ed", "kty": "OKP", "crv": "Ed25519", "x": ED_X},
        {"kid": "strange", "kty": "AKP", "x": ED_X},
    ]});
    let mut file = std::env::temp_dir();
    let stage = Stage::with(TABLE, |settings, url| {
        let (_, name) = url.rsplit_once('/').unwrap();
        file.push(format!("{name}.jwks"));
        std::fs::write(&file, keys.to_string()).unwrap();
        settings.jwks = Some(file.to_str().unwrap().to_owned());
        settings.publishable_key = vec!["sb_publishable_one".to_owned(), "sb_publishable_two".to_owned()];
        settings.secret_key = vec!["sb_secret_one".to_owned()];
    })
    .await;
    std::fs::remove_file(file).unwrap();
    stage
}

/// With which text the handshake is refused, if it is.
async fn refusal(stage: &Stage, token: &str) -> Option<String> {
    let path = format!("/realtime/v1/websocket?apikey={token}&vsn=2.0.0");
    let (status, body) = Socket::handshake(&stage.relay, &path, &[]).await.err()?;
    assert_eq!(status, 401, "{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    Some(body["error"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_any_supported_key_makes_its_bearer_who_it_says() {
    let stage = stage().await;
    let with_secret = |name: &str, algorithm| {
        hashed(&json!({"alg": name, "typ": "JWT"}), PAYLOAD, SECRET.as_bytes(), algorithm)
    };
    for (n, token) in [
        with_secret("HS256", Algorithm::HS256),
        with_secret("HS384", Algorithm::HS384),
        with_secret("HS512", Algorithm::HS512),
        hashed(&json!({"alg": "HS256", "kid": "unknown"}), PAYLOAD, SECRET.as_bytes(), Algorithm::HS256),
        published("RS256", "rsa", BY_RS256),
        published("RS512", "rsa", BY_RS512),
        published("ES256", "p256", BY_ES256),
        published("ES384", "p384", BY_ES384),
        published("EdDSA", "ed", BY_EDDSA),
    ]
    .into_iter()
    .enumerate()
    {
        let mut ann = stage.join(&token).await;
        stage
            .run(&format!("insert into t values ({n} * 2, '{ANN}'), ({n} * 2 + 1, gen_random_uuid())"))
            .await;
        let told = stage.told(&mut ann).await;
        assert_eq!(told, [format!(r#"INSERT {{"id":{},"owner":"{ANN}"}}"#, 2 * n)], "{token}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_cannot_choose_how_it_is_verified() {
    let stage = stage().await;
    let signer = "Failed to generate JWT signer, check your JWT secret or JWKS configuration";
    let signature = "Failed to validate JWT signature";
    let malformed = "The token provided is not a valid JWT";
    let none = |name: &str| format!("{}.", encoded(&json!({"alg": name, "typ": "JWT"}), PAYLOAD));
    let by = |secret: &[u8], header: Value| hashed(&header, PAYLOAD, secret, Algorithm::HS256);
    let modulus = URL_SAFE_NO_PAD.decode(RSA_N).unwrap();
    let good = hashed(&json!({"alg": "HS256"}), PAYLOAD, SECRET.as_bytes(), Algorithm::HS256);
    let forged = PAYLOAD.replace("authenticated", "service_role");
    let (header, rest) = good.split_once('.').unwrap();
    let (_, mac) = rest.split_once('.').unwrap();
    for (token, text) in [
        (none("none"), signer),
        (none("NONE"), signer),
        (none("HS256"), signature),
        (published("none", "rsa", BY_RS256), signer),
        // The public key as the secret of a hash: what is public must not sign.
        (by(RSA_PEM.as_bytes(), json!({"alg": "HS256", "kid": "rsa"})), signature),
        (by(RSA_PEM.trim().as_bytes(), json!({"alg": "HS256"})), signature),
        (by(&modulus, json!({"alg": "HS256", "kid": "rsa"})), signature),
        (by(RSA_N.as_bytes(), json!({"alg": "RS256", "kid": "rsa"})), signature),
        (by(b"another secret of more than thirty-two bytes", json!({"alg": "HS256"})), signature),
        // Keys of another type, or of none.
        (published("RS256", "p256", BY_ES256), signer),
        (published("ES256", "rsa", BY_RS256), signer),
        (published("RS256", "gone", BY_RS256), signer),
        (published("EdDSA", "strange", BY_EDDSA), signer),
        (published("ES256", "p256", BY_EDDSA), signature),
        (published("PS256", "rsa", BY_RS256), signature),
        // Another content under a good signature.
        (format!("{header}.{}.{mac}", URL_SAFE_NO_PAD.encode(&forged)), signature),
        (by(SECRET.as_bytes(), json!({"alg": "HS256", "crit": ["exp"]})), malformed),
        (format!("{good}."), malformed),
        (good.replace('.', ""), malformed),
        ("sb_publishable_three".to_owned(), malformed),
        ("sb_secret_on".to_owned(), malformed),
    ] {
        assert_eq!(refusal(&stage, &token).await.as_deref(), Some(text), "{token}");
    }
    assert_eq!(refusal(&stage, &good).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn times_audience_and_issuer_are_judged() {
    let make = |claims: &Value| {
        hashed(&json!({"alg": "HS256"}), &claims.to_string(), SECRET.as_bytes(), Algorithm::HS256)
    };
    let open = Stage::new(TABLE).await;
    let strict = Stage::with(TABLE, |settings, _| {
        settings.jwt_audience = Some("us".to_owned());
        settings.jwt_issuer = Some("https://issuer.example".to_owned());
    })
    .await;
    let fields = Some("Fields `role` and `exp` are required in JWT");
    let refused = Some("Token claims are not accepted");
    let end = 4_000_000_000_u64;
    for (claims, text, strictly) in [
        (json!({"role": "anon", "exp": end, "aud": "us", "iss": "https://issuer.example"}), None, None),
        (
            json!({"role": "anon", "exp": end, "aud": ["us", "them"], "iss": "https://issuer.example"}),
            None,
            None,
        ),
        (json!({"role": "anon", "exp": end, "aud": "them", "iss": "https://issuer.example"}), None, refused),
        (json!({"role": "anon", "exp": end, "aud": "us", "iss": "https://issuer.example/"}), None, refused),
        (json!({"role": "anon", "exp": end}), None, refused),
        (json!({"role": "anon", "exp": end, "nbf": end}), refused, refused),
        (json!({"role": "anon", "exp": end, "iat": end}), refused, refused),
        (json!({"role": "anon", "exp": end, "iat": "then"}), refused, refused),
        (json!({"role": "anon", "exp": 1000}), Some("Token has expired"), Some("Token has expired")),
        (
            json!({"role": "anon", "exp": "4000000000"}),
            Some("Token expiration time is invalid"),
            Some("Token expiration time is invalid"),
        ),
        (json!({"role": "anon"}), fields, fields),
        (json!({"role": null, "exp": end}), fields, fields),
        (json!({"role": ["anon"], "exp": end}), fields, fields),
        (json!({"exp": end}), fields, fields),
    ] {
        let token = make(&claims);
        assert_eq!(refusal(&open, &token).await.as_deref(), text, "{claims}");
        assert_eq!(refusal(&strict, &token).await.as_deref(), strictly, "strictly {claims}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_opaque_key_stands_for_its_role() {
    let stage = stage().await;
    let mut anon = stage.join("sb_publishable_two").await;
    let mut service = stage.join("sb_secret_one").await;
    stage.run("insert into t values (0, null), (1, gen_random_uuid())").await;
    let ids =
        |changes: Vec<Value>| changes.iter().map(|change| change["record"]["id"].clone()).collect::<Vec<_>>();
    assert_eq!(ids(stage.changes(&mut anon).await), [0]);
    assert_eq!(ids(stage.changes(&mut service).await), [0, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_a_role_that_is_not_there_connects_and_sees_nothing() {
    let stage = Stage::new(TABLE).await;
    for role in
        ["nobody", "", "postgres", "pg_monitor", "no\"body\"; --", "authenticated\u{0}", "AUTHENTICATED"]
    {
        let claims = json!({"role": role, "exp": 4_000_000_000_u64}).to_string();
        let token = hashed(&json!({"alg": "HS256"}), &claims, SECRET.as_bytes(), Algorithm::HS256);
        if role.is_empty() || role.contains('\0') {
            assert!(refusal(&stage, &token).await.is_some());
            continue;
        }
        let answer = stage.answer(&token, json!({"event": "*", "schema": "public", "table": "t"})).await;
        assert!(answer.contains("Please check Realtime is enabled"), "{role}: {answer}");
    }
    // No other client was affected.
    let mut service = stage.join(&token("service_role", None, json!({}))).await;
    stage.run("insert into t values (1, null)").await;
    assert_eq!(stage.told(&mut service).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_tokens_claims_and_rows_are_in_no_log_and_no_metric() {
    let database = Database::bare().await;
    let secret = "canary-secret-with-at-least-thirty-two-bytes";
    let url = database.url.replacen("postgres@", "postgres:canary-password@", 1);
    let relay = Command::new(env!("CARGO_BIN_EXE_relay"))
        .args(["serve", "--install", "--listen", "127.0.0.1:0", "--poll-ms", "50"])
        .envs([("DATABASE_URL", url.as_str()), ("RELAY_JWT_SECRET", secret), ("RELAY_LOG", "trace")])
        .env("RELAY_SECRET_KEY", "sb_secret_canary")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut relay = Ended(relay);
    let relay = &mut relay.0;
    let (mut out, mut err) = (relay.stdout.take().unwrap(), relay.stderr.take().unwrap());
    let (lines, mut said) = tokio::sync::mpsc::unbounded_channel();
    let reading = std::thread::spawn(move || {
        let (mut all, mut piece) = (String::new(), [0; 4096]);
        while let Ok(n @ 1..) = err.read(&mut piece) {
            all += &String::from_utf8_lossy(&piece[..n]);
            let _ = lines.send(all.clone());
        }
        all
    });
    let address = loop {
        let text =
            tokio::time::timeout(crate::support::PATIENCE, said.recv()).await.unwrap().expect("it ended");
        let at = text
            .split_once("http://")
            .map(|(_, rest)| rest.split(|c: char| c != '.' && c != ':' && !c.is_ascii_digit()).next());
        if let Some(Some(address)) =
            at.filter(|_| text.contains("reading the changelog") && text.ends_with('\n'))
        {
            break address.to_owned();
        }
    };
    database
        .run(
            "create table t (id int primary key, v text); alter table t enable row level security;
             create function loud() returns bool language plpgsql as
               $$ begin raise exception 'canary-raised %', current_setting('request.jwt.claims'); end $$;
             create policy quiet on t to authenticated using (v is not null); create policy loud on t to anon using (loud());
             grant select on t to authenticated, anon; select relay.watch('t')",
        )
        .await;
    let claims = |role: &str| {
        json!({"role": role, "sub": ANN, "email": "canary-email@example.org"}).as_object().unwrap().clone()
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let mint = |role: &str| {
        relay::auth::verifier::mint(secret, &claims(role), now, Duration::from_secs(60)).unwrap()
    };
    let (token, anon) = (mint("authenticated"), mint("anon"));
    let mut socket = Socket::at(&address, "2.0.0", &token).await;
    for (n, (filter, access)) in [
        (json!(null), json!(token)),
        (json!("v=eq.canary-row"), json!(token)),
        (json!("v=like.canary%"), json!(token)),
        (json!("id=eq.canary-filter"), json!(token)),
        (json!("canary-column=eq.1"), json!(token)),
        (json!(null), json!(anon)),
        (json!(null), json!("canary.bad.token")),
    ]
    .into_iter()
    .enumerate()
    {
        let bindings = json!([{"event": "*", "schema": "public", "table": "t", "filter": filter}]);
        let payload = json!({"config": {"postgres_changes": bindings}, "access_token": access});
        socket.push(json!("1"), json!("1"), &format!("realtime:{n}"), "phx_join", payload).await;
        let reply = socket.frame().await;
        if reply[4]["status"] == "ok" {
            assert_eq!(socket.frame().await[3], "system");
        }
    }
    socket.send(Message::text("canary-garbage")).await;
    assert_eq!(socket.frame().await[3], "system");
    socket
        .push(json!("1"), json!("2"), "realtime:0", "access_token", json!({"access_token": "canary.token"}))
        .await;
    assert_eq!((&socket.frame().await[3], &socket.frame().await[3]), (&json!("system"), &json!("phx_close")));
    for key in ["canary-key", "sb_secret_canary", &token] {
        drop(
            Socket::try_at(
                &address,
                &format!("/realtime/v1/websocket?apikey={key}&vsn=2.0.0&canary=query"),
                &[],
            )
            .await,
        );
    }
    database
        .run("insert into t values (1, 'canary-row'); update t set v = 'canary-after'; delete from t")
        .await;
    for _ in 0..4 {
        assert_eq!(socket.frame().await[3], "postgres_changes");
    }
    let seen = database
        .value("select string_agg(query, ' ') from pg_stat_activity where pid <> pg_backend_pid()")
        .await;
    let metrics = get(&address, "/metrics?apikey=sb_secret_canary").await;
    assert!(metrics.contains("relay_judgements_raised_total"), "{metrics}");
    eventually("the policy was loud", || async {
        let text = get(&address, "/metrics?apikey=sb_secret_canary").await;
        (!text.contains("relay_judgements_raised_total 0\n")).then_some(())
    })
    .await;
    let terminated = Command::new("kill").args(["-TERM", &relay.id().to_string()]).status().unwrap();
    assert!(terminated.success() && relay.wait().unwrap().success());
    let mut log = reading.join().unwrap();
    out.read_to_string(&mut log).unwrap();
    assert!(log.contains("listening") && log.lines().count() > 5, "{log}");
    let (_, mac) = token.rsplit_once('.').unwrap();
    let payload = token.split('.').nth(1).unwrap();
    for canary in ["canary", ANN, mac, payload] {
        assert!(!log.contains(canary), "{canary} in the log:\n{log}");
        assert!(!metrics.contains(canary), "{canary} in the metrics");
    }
    for canary in ["canary-email", "canary-row", "canary-secret", mac, payload] {
        assert!(!seen.contains(canary), "{canary} in pg_stat_activity: {seen}");
    }
}

/// A process that does not outlive the test, however that ends.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

pub async fn get(address: &str, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}
