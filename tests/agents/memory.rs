//! What lasts of an app from one run to the next, by what the real CLI tells its model.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::Forge;
use crate::harness::{ADMIN, Options, Server, until};

const ECHO: &str = "stub: {\"echo\": true}";

async fn turn(server: &Server, token: &str, session: &Value, prompt: &str) -> String {
    let path = format!("/sessions/{}/turn", session["session_id"].as_str().unwrap());
    let answer = server.post(&path, token, &json!({"prompt": prompt})).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    answer.json["text"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn memories_last_where_a_token_says_so_and_for_its_app_alone() {
    let options = Options::default().set("CLAWDFORGE_STANDBY", 1).set("CLAWDFORGE_SWEEP_SECS", 1);
    let Some(forge) = Forge::start_with(options).await else { return };
    let server = &forge.server;
    let mut tokens = Vec::new();
    for name in ["gardener", "cook"] {
        let minted = server.post("/admin/tokens", ADMIN, &json!({"name": name, "home": "kept"})).await;
        tokens.push(minted.json["token"].as_str().unwrap().to_owned());
    }
    let [gardener, cook] = [&tokens[0], &tokens[1]];
    let memories = server.data().join("memories/gardener");
    let session = server.post("/sessions", gardener, &json!({})).await.json;
    let keep = format!("echo 'The fruit is a medlar.' > {}/MEMORY.md", memories.display());
    let keep = json!({"tool": {"name": "Bash", "input": {"command": keep, "description": "test"}}});
    turn(server, gardener, &session, &format!("stub: {keep}")).await;
    assert!(memories.join("MEMORY.md").is_file());
    // Cold, and from the pool.
    for _ in 0..2 {
        assert!(server.run(gardener, ECHO).await.text.contains("The fruit is a medlar."));
    }
    let another = server.post("/sessions", gardener, &json!({})).await.json;
    assert!(turn(server, gardener, &another, ECHO).await.contains("The fruit is a medlar."));
    // Nobody else has them, or any.
    for token in [cook, &forge.token] {
        for _ in 0..2 {
            assert!(!server.run(token, ECHO).await.text.contains("medlar"));
        }
    }
    let theirs = server.post("/sessions", cook, &json!({})).await.json;
    let read = json!({"tool": {"name": "Bash", "input": {"command": format!("cat {0}/*; ls {0}; true", memories.display()), "description": "test"}}});
    assert!(!turn(server, cook, &theirs, &format!("stub: {read}")).await.contains("medlar."));
    assert!(!server.data().join("memories/app").exists());
    // They go with the token.
    assert_eq!(server.request(Method::DELETE, "/admin/tokens/gardener", ADMIN).send().await.unwrap().status(), StatusCode::OK);
    until("nothing to be remembered", || !memories.exists()).await;
    assert!(server.data().join("memories/cook").exists());
}
