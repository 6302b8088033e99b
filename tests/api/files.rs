//! Uploads.

use reqwest::multipart::{Form, Part};
use reqwest::{Body, Method, StatusCode};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::harness::{Answer, Options, Server, peak, until};

async fn send(server: &Server, token: &str, path: &str, form: Form) -> Answer {
    Answer::of(server.request(Method::POST, path, token).multipart(form)).await
}

fn file(name: &str, content: &'static str) -> Part {
    Part::text(content).file_name(name.to_owned())
}

fn left(server: &Server) -> usize {
    server.data().join("files").read_dir().unwrap().count()
}

#[tokio::test]
async fn an_upload_is_kept_with_its_lifetime_wherever_that_is_said() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let answer = send(&server, &token, "/files", Form::new().part("file", file("a.txt", "hello"))).await;
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert_eq!(answer.keys(), ["ok", "file_token", "ttl_secs", "size"]);
    assert_eq!((&answer.json["ttl_secs"], &answer.json["size"]), (&json!(3600), &json!(5)));
    let stored = server.data().join("files").join(answer.json["file_token"].as_str().unwrap());
    assert_eq!(std::fs::read_to_string(stored).unwrap(), "hello");

    let before = Form::new().text("ttl_secs", "60").part("file", file("a", ""));
    let after = Form::new().part("file", file("a", "")).text("ttl_secs", "86400");
    let query = Form::new().part("file", file("a", ""));
    assert_eq!(send(&server, &token, "/files", before).await.json["ttl_secs"], 60);
    assert_eq!(send(&server, &token, "/files", after).await.json["ttl_secs"], 86_400);
    assert_eq!(send(&server, &token, "/files?ttl_secs=90", query).await.json["ttl_secs"], 90);
}

#[tokio::test]
async fn what_is_refused_leaves_nothing() {
    let server = Options::stand_in().set("CLAWDFORGE_MAX_UPLOAD_BYTES", 1000).start();
    let token = server.mint("app").await;
    let small = || Form::new().part("file", file("a", "x"));
    for ttl in ["59", "86401", "-1", "1.5", "soon", ""] {
        send(&server, &token, "/files", small().text("ttl_secs", ttl)).await.problem(400);
        send(&server, &token, &format!("/files?ttl_secs={ttl}"), small()).await.problem(400);
    }
    send(&server, &token, "/files?ttl_secs=60&ttl_secs=61", small()).await.problem(400);
    send(&server, &token, "/files", Form::new().text("other", "x")).await.problem(422);
    send(&server, &token, "/files", small().part("file", file("b", "y"))).await.problem(400);
    send(&server, &token, "/files", (0..1000).fold(small(), |form, n| form.text(format!("part{n}"), "x"))).await.problem(400);
    send(&server, &token, "/files", small().text("other", "x".repeat(5000))).await.problem(400);
    let raw = |head: &str| format!("--b\r\ncontent-disposition: form-data{head}\r\n\r\nx\r\n--b--\r\n");
    for head in ["", "; filename=\"a\"", "; name=\"\"; filename=\"a\"", "; name=\"fi\0le\"; filename=\"a\""] {
        let request = server.request(Method::POST, "/files", &token).header("content-type", "multipart/form-data; boundary=b");
        let answer = Answer::of(request.body(raw(head))).await;
        assert!(answer.status == 400 || answer.status == 422, "{head:?}: {answer:?}");
    }
    send(&server, "cf_unknown", "/files", small()).await.problem(401);

    let sized = |bytes: usize| Form::new().part("file", Part::bytes(vec![b'x'; bytes]).file_name("a"));
    send(&server, &token, "/files", sized(1001)).await.problem(413);
    send(&server, &token, "/files", sized(50_000_000)).await.problem(413);
    assert_eq!(left(&server), 0);
    assert_eq!(send(&server, &token, "/files", sized(1000)).await.status, StatusCode::OK);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM files"), 1);
}

#[tokio::test]
async fn a_body_that_ends_early_leaves_nothing() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let begin = "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nhalf";
    let request = server.request(Method::POST, "/files", &token).header("content-type", "multipart/form-data; boundary=b");
    Answer::of(request.body(begin)).await.problem(400);
    assert_eq!(left(&server), 0);

    let mut leaves = TcpStream::connect(server.address()).await.unwrap();
    let head = format!(
        "POST /files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: 100000\r\n\r\n{begin}"
    );
    leaves.write_all(head.as_bytes()).await.unwrap();
    until("the upload to begin", || left(&server) == 1).await;
    drop(leaves);
    until("the partial file to go", || left(&server) == 0).await;
}

#[tokio::test]
async fn parts_without_an_end_are_refused_in_little_memory() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let head = "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\nx: ";
    let before = peak(&server);
    for begin in ["", head] {
        let body = format!("{begin}{}", "x".repeat(60 << 20));
        let request = server.request(Method::POST, "/files", &token).header("content-type", "multipart/form-data; boundary=b");
        Answer::of(request.body(body)).await.problem(400);
    }
    let more = peak(&server) - before;
    assert!(more < 12 << 10, "the server's memory went up by {more} KiB");
}

#[tokio::test]
async fn a_large_upload_is_streamed() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let before = peak(&server);
    let pieces = (0..800).map(|_| Ok::<_, std::io::Error>(vec![b'x'; 128 << 10]));
    let body = Part::stream(Body::wrap_stream(futures_util::stream::iter(pieces))).file_name("large");
    let answer = send(&server, &token, "/files", Form::new().part("file", body)).await;
    assert_eq!(answer.json["size"], 800 * (128 << 10), "{answer:?}");
    let more = peak(&server) - before;
    assert!(more < 12 << 10, "the server's memory went up by {more} KiB");
}

#[tokio::test]
async fn files_are_attached_under_safe_names_that_do_not_clash() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let mut files = Vec::new();
    let long = format!("{}.txt", "l".repeat(296));
    for name in ["a.txt", "A.txt", "../../up.txt", ".hidden", "b\u{202e}.txt", "..", "", &long] {
        files.push(server.upload(&token, name, "content").await);
    }
    files.push(files[0].clone());
    let answer = server.post("/run", &token, &json!({"prompt": "do: where", "files": files})).await;
    let (folder, names) = answer.json["result"].as_str().unwrap().split_once(' ').unwrap();
    assert_eq!(folder, server.data().canonicalize().unwrap().join("runs").join(answer.header("x-run-id")).to_str().unwrap());
    let names: Vec<_> = names.split_whitespace().collect();
    let (cut, others): (Vec<&str>, Vec<&str>) = names.into_iter().partition(|name| name.starts_with("ll"));
    assert_eq!(others, ["A-2.txt", "a.txt", "b.txt", "file", "file-2", "hidden", "up.txt"]);
    assert!(cut.len() == 1 && cut[0].len() <= 255 && cut[0].ends_with("l.txt"), "{cut:?}");
}

#[tokio::test]
async fn a_file_that_is_not_ones_own_is_unknown() {
    let server = Options::stand_in().start();
    let (mine, other) = (server.mint("mine").await, server.mint("other").await);
    let theirs = server.upload(&other, "a", "secret").await;
    let body = |file: &str| json!({"prompt": "x", "files": [file]});
    let never = format!("ff_{}", "0".repeat(32));
    let foreign = server.post("/run", &mine, &body(&theirs)).await;
    let unknown = server.post("/run", &mine, &body(&never)).await;
    assert!(foreign.problem(400).contains(&theirs));
    assert_eq!(foreign.text.replace(&theirs, ""), unknown.text.replace(&never, ""));
}

#[tokio::test]
async fn an_expired_file_is_unknown_and_then_gone() {
    let server = Options::stand_in().set("CLAWDFORGE_SWEEP_SECS", 1).start();
    let token = server.mint("app").await;
    let file = server.upload(&token, "a", "content").await;
    let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
    ledger.execute("UPDATE files SET expires_at = 1", []).unwrap();
    drop(ledger);
    let stored = server.data().join("files").join(&file);
    let answer = server.post("/run", &token, &json!({"prompt": "x", "files": [file]})).await;
    assert!(answer.problem(400).contains(&file));
    until("the sweeper", || !stored.exists()).await;
}
