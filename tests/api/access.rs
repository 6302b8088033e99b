//! Who may call.

use reqwest::{Client, Method, StatusCode};
use serde_json::json;

use crate::harness::{ADMIN, Answer, Options, until};

#[tokio::test]
async fn health_is_for_anyone_and_says_what_the_contract_says() {
    let server = Options::stand_in().set("CLAWDFORGE_ACPX_BIN", "no-such-program").start();
    let answer = loop {
        let answer = Answer::of(Client::new().get(server.url("/healthz"))).await;
        if !answer.json["claude_version"].is_null() {
            break answer;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    assert_eq!(
        answer.keys(),
        ["ok", "version", "claude_present", "claude_version", "acpx_present", "acpx_version", "open_sessions", "sandbox", "claude_tested"]
    );
    let expected = json!({"ok": true, "version": env!("CARGO_PKG_VERSION"), "claude_present": true, "claude_version": "0.0.1",
        "acpx_present": false, "acpx_version": null, "open_sessions": 0, "sandbox": answer.json["sandbox"], "claude_tested": false});
    assert!(answer.json["sandbox"] == "off" || answer.json["sandbox"] == "landlock");
    assert_eq!(answer.json, expected);
}

#[tokio::test]
async fn a_cli_that_this_release_was_not_tested_with_is_used_and_said_to_be_so() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    assert_eq!(server.run(&token, "hello").await.json["result"], "ok");
    until("the version", || server.log().contains("this release was not tested with")).await;
    let health = server.get("/healthz", "").await.json;
    assert_eq!((&health["claude_version"], &health["claude_tested"]), (&json!("0.0.1"), &json!(false)));
}

#[tokio::test]
async fn no_unknown_and_revoked_credentials_are_the_same_401() {
    let server = Options::stand_in().start();
    let revoked = server.mint("app").await;
    assert_eq!(server.run(&revoked, "hello").await.status, StatusCode::OK);
    let answer = Answer::of(server.request(Method::DELETE, "/admin/tokens/app", ADMIN)).await;
    assert_eq!(answer.json, json!({"ok": true, "name": "app"}));

    let body = json!({"prompt": "hello"});
    let none = Answer::of(Client::new().post(server.url("/run")).json(&body)).await;
    let basic = Answer::of(Client::new().post(server.url("/run")).basic_auth("a", Some("b")).json(&body)).await;
    let unknown = server.post("/run", "cf_unknown", &body).await;
    let revoked = server.post("/run", &revoked, &body).await;
    for answer in [&none, &basic, &unknown, &revoked] {
        answer.problem(401);
        assert_eq!(answer.header("www-authenticate"), "Bearer");
        assert_eq!(answer.text, none.text);
    }
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 1);
}

#[tokio::test]
async fn a_credential_of_the_wrong_kind_is_403() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    server.get("/admin/tokens", &token).await.problem(403);
    server.run(ADMIN, "hello").await.problem(403);
    server.get("/admin/tokens", "unknown").await.problem(401);
}

#[tokio::test]
async fn without_an_admin_token_admin_is_closed_and_says_so() {
    let server = Options::stand_in().set("CLAWDFORGE_ADMIN_TOKEN", "").start();
    let answer = Answer::of(Client::new().get(server.url("/admin/tokens"))).await;
    assert!(answer.problem(403).contains("CLAWDFORGE_ADMIN_TOKEN"));
}

#[tokio::test]
async fn a_token_is_bound_to_its_networks() {
    let server = Options::stand_in().set("CLAWDFORGE_TRUSTED_PROXIES", "127.0.0.1").start();
    let body = json!({"name": "app", "ip_cidrs": ["10.1.0.0/16", "fd00::1"]});
    let minted = server.post("/admin/tokens", ADMIN, &body).await;
    assert_eq!(minted.keys(), ["name", "token", "ip_cidrs", "created_at"]);
    assert_eq!(minted.json["ip_cidrs"], json!(["10.1.0.0/16", "fd00::1/128"]));
    let token = minted.json["token"].as_str().unwrap();
    let run = |from: &str| {
        let request = server.request(Method::POST, "/run", token).header("x-forwarded-for", from).json(&json!({"prompt": "hello"}));
        Answer::of(request)
    };
    assert_eq!(run("10.1.2.3").await.status, StatusCode::OK);
    assert_eq!(run("::ffff:10.1.2.3").await.status, StatusCode::OK);
    assert_eq!(run("10.1.2.3, 127.0.0.1").await.status, StatusCode::OK);
    assert_eq!(run("fd00::1").await.status, StatusCode::OK);
    run("10.2.0.1").await.problem(403);
    run("10.1.2.3, 10.2.0.1").await.problem(403);
    run("garbage").await.problem(403);
    server.run(token, "hello").await.problem(403);
    assert_eq!(server.query::<String>("SELECT group_concat(DISTINCT client_ip) FROM runs ORDER BY run_id"), "10.1.2.3,fd00::1");
}

#[tokio::test]
async fn an_address_that_is_not_allowed_gets_403_everywhere() {
    let server = Options::stand_in().set("CLAWDFORGE_ALLOW_CIDRS", "10.0.0.0/8").start();
    for path in ["/healthz", "/run", "/openapi.json", "/nothing"] {
        // A header from a peer that is no trusted proxy does not count.
        let request = Client::new().get(server.url(path)).header("x-forwarded-for", "10.0.0.1");
        Answer::of(request).await.problem(403);
    }
}

#[tokio::test]
async fn tokens_are_listed_as_clients_expect() {
    let server = Options::stand_in().start();
    let used = server.mint("used").await;
    server.mint("revoked").await;
    server.post("/admin/tokens", ADMIN, &json!({"name": "bound", "ip_cidrs": ["172.24.0.0/16", "10.0.0.0/8"]})).await;
    server.run(&used, "hello").await;
    Answer::of(server.request(Method::DELETE, "/admin/tokens/revoked", ADMIN)).await;
    Answer::of(server.request(Method::DELETE, "/admin/tokens/never", ADMIN)).await.problem(404);

    let list = server.get("/admin/tokens", ADMIN).await;
    assert_eq!(list.json["count"], 3);
    let tokens = list.json["tokens"].as_array().unwrap();
    let summary: Vec<_> =
        tokens.iter().map(|t| (t["name"].as_str().unwrap(), t["ip_cidrs"].as_str().unwrap(), t["enabled"] == true)).collect();
    assert_eq!(summary, [("bound", "172.24.0.0/16,10.0.0.0/8", true), ("revoked", "", false), ("used", "", true)]);
    assert!(tokens[0]["last_used"].is_null() && tokens[2]["last_used"].is_i64(), "{list:?}");
    assert!(!list.text.contains("cf_") && !list.text.contains("sha256"));
    assert_eq!(server.query::<i64>("SELECT count(*) FROM tokens WHERE length(token_sha256) <> 64"), 0);
}

#[tokio::test]
async fn a_name_in_use_is_409_and_a_revoked_one_can_be_minted_again() {
    let server = Options::stand_in().start();
    let first = server.mint("app").await;
    server.post("/admin/tokens", ADMIN, &json!({"name": "app"})).await.problem(409);
    Answer::of(server.request(Method::DELETE, "/admin/tokens/app", ADMIN)).await;
    let second = server.mint("app").await;
    server.run(&first, "hello").await.problem(401);
    assert_eq!(server.run(&second, "hello").await.status, StatusCode::OK);
}

#[tokio::test]
async fn neither_agents_nor_other_processes_find_the_admin_token() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let environment = server.run(&token, "do: env").await.json["result"].as_str().unwrap().to_owned();
    assert!(environment.contains("PATH") && !environment.contains("CLAWDFORGE"), "{environment}");
    for file in ["environ", "cmdline"] {
        let text = std::fs::read(format!("/proc/{}/{file}", server.pid())).unwrap_or_default();
        assert!(!String::from_utf8_lossy(&text).contains(ADMIN), "{file}");
    }
    assert!(!server.log().contains(ADMIN) && !server.log().contains(&token));
}

#[tokio::test]
async fn a_rule_that_this_machine_can_not_keep_is_refused_at_its_making_and_at_its_use() {
    // Stand-ins are not in the sandbox.
    let server = Options::stand_in().start();
    let refused = server.post("/admin/tokens", ADMIN, &json!({"name": "bound", "network": "model", "home": "kept"})).await;
    refused.problem(422);
    assert_eq!(refused.json["errors"][0]["pointer"], "/network");
    assert!(refused.text.contains("CLAWDFORGE_SANDBOX is \\\"off\\\""), "{refused:?}");
    for (field, value) in [("network", "lan"), ("home", "mine")] {
        let refused = server.post("/admin/tokens", ADMIN, &json!({"name": "x", field: value})).await;
        assert_eq!((refused.status.as_u16(), &refused.json["errors"][0]["pointer"]), (422, &json!(format!("/{field}"))));
    }
    // As where it could be kept when it was made.
    let token = server.mint("app").await;
    let session = server.post("/sessions", &token, &json!({})).await;
    rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap().execute("UPDATE tokens SET network = 'web'", []).unwrap();
    for path in ["/run", "/sessions"] {
        let refused = server.post(path, &token, &json!({"prompt": "hello"})).await;
        assert!(refused.status == 503 && refused.problem(503).contains("can't be kept to here"), "{path}: {refused:?} {session:?}");
    }
    assert_eq!(server.get("/runs", &token).await.status, 200);
    let listed = server.get("/admin/tokens", ADMIN).await.json;
    assert_eq!((&listed["tokens"][0]["network"], &listed["tokens"][0]["home"]), (&json!("web"), &json!("fresh")));
    assert_eq!(server.query::<i64>("SELECT count(*) FROM runs"), 0);
}
