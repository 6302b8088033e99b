//! The operator's page, as whoever is no browser sees it.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::redirect::Policy;
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use rustix::process::Signal;

use crate::harness::{ADMIN, Options, Server, until};

/// A browser that does as it is told, and follows no redirects.
struct Browser<'a> {
    server: &'a Server,
    client: Client,
    cookie: String,
}

impl<'a> Browser<'a> {
    fn new(server: &'a Server) -> Self {
        Self { server, client: Client::builder().redirect(Policy::none()).build().unwrap(), cookie: String::new() }
    }

    async fn signed_in(server: &'a Server) -> Self {
        let mut browser = Self::new(server);
        let answer = browser.form("/ui/sign-in", &[("token", ADMIN)]).send().await.unwrap();
        assert_eq!((answer.status(), header(&answer, "location")), (StatusCode::SEE_OTHER, "/ui"));
        header(&answer, "set-cookie").split(';').next().unwrap().clone_into(&mut browser.cookie);
        browser
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, self.server.url(path)).header("cookie", &self.cookie)
    }

    async fn page(&self, path: &str) -> String {
        let answer = self.request(Method::GET, path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        answer.text().await.unwrap()
    }

    fn form(&self, path: &str, fields: &[(&str, &str)]) -> RequestBuilder {
        let body = fields.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&");
        let form = self.request(Method::POST, path).header("content-type", "application/x-www-form-urlencoded").body(body);
        form.header("origin", self.server.url(""))
    }

    async fn form_token(&self) -> String {
        let page = self.page("/ui/apps").await;
        let (_, rest) = page.split_once("name=\"form_token\" value=\"").unwrap();
        rest.split('"').next().unwrap().to_owned()
    }
}

fn header<'a>(answer: &'a Response, name: &str) -> &'a str {
    answer.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn nothing_is_shown_or_done_without_a_sign_in() {
    let server = Options::stand_in().start();
    let token = server.mint("app").await;
    let browser = Browser::new(&server);
    for path in [
        "/ui",
        "/ui/live",
        "/ui/runs",
        "/ui/runs/x",
        "/ui/runs/x/events",
        "/ui/sessions",
        "/ui/usage",
        "/ui/usage.csv",
        "/ui/apps",
        "/ui/try",
    ] {
        for cookie in ["", "clawdforge=", "clawdforge=0000", &format!("clawdforge={token}"), &format!("clawdforge={ADMIN}")] {
            let answer = browser.request(Method::GET, path).header("cookie", cookie).send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::SEE_OTHER, "{path} {cookie}");
            assert_eq!(header(&answer, "location"), format!("/ui/sign-in?next={path}"));
        }
        // Nor by a token: a cookie is what a browser sends only from these pages.
        let answer = browser.client.get(server.url(path)).bearer_auth(ADMIN).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::SEE_OTHER, "{path}");
    }
    for path in
        ["/ui/apps", "/ui/apps/app", "/ui/apps/app/rotate", "/ui/apps/app/revoke", "/ui/try", "/ui/sign-out", "/ui/sessions/x/close"]
    {
        let answer = browser.form(path, &[("name", "mine")]).send().await.unwrap();
        assert_eq!((answer.status(), header(&answer, "location")), (StatusCode::SEE_OTHER, "/ui/sign-in?next=/ui"), "{path}");
    }
    assert_eq!(server.query::<i64>("SELECT count(*) FROM tokens WHERE enabled"), 1);
    assert_eq!(server.get("/runs", &token).await.status, StatusCode::OK);
    for wrong in [token.as_str(), "", "an-admin-token-for-test"] {
        let answer = browser.form("/ui/sign-in", &[("token", wrong)]).send().await.unwrap();
        assert_eq!((answer.status(), header(&answer, "set-cookie")), (StatusCode::UNAUTHORIZED, ""));
    }
}

#[tokio::test]
async fn a_form_counts_only_from_the_page_itself() {
    let server = Options::stand_in().set("CLAWDFORGE_TRUSTED_PROXIES", "10.0.0.1").start();
    let browser = Browser::signed_in(&server).await;
    let seal = browser.form_token().await;
    let mint = async |origin: Option<&str>, seal: &str| {
        let body = format!("form_token={seal}&name=mine");
        let form = browser.request(Method::POST, "/ui/apps").header("content-type", "application/x-www-form-urlencoded").body(body);
        origin
            .map_or_else(|| form.try_clone().unwrap(), |origin| form.try_clone().unwrap().header("origin", origin))
            .send()
            .await
            .unwrap()
            .status()
    };
    let own = server.url("");
    let foreign = format!("http://evil.example:{}", server.address().port());
    for origin in [None, Some("null"), Some("http://evil.example"), Some(foreign.as_str()), Some("http://127.0.0.1"), Some("")] {
        assert_eq!(mint(origin, &seal).await, StatusCode::FORBIDDEN, "{origin:?}");
    }
    for wrong in ["", "0000", &"0".repeat(64)] {
        assert_eq!(mint(Some(&own), wrong).await, StatusCode::FORBIDDEN, "{wrong}");
    }
    // Whoever is no trusted proxy does not say what the server is called.
    let spoofed = browser.request(Method::POST, "/ui/apps").header("content-type", "application/x-www-form-urlencoded");
    let spoofed = spoofed.header("origin", "http://evil.example").header("x-forwarded-host", "evil.example");
    let spoofed = spoofed.body(format!("form_token={seal}&name=mine")).send().await.unwrap();
    assert_eq!(spoofed.status(), StatusCode::FORBIDDEN);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM tokens"), 0);
    assert_eq!(mint(Some(&own), &seal).await, StatusCode::OK);
    assert_eq!(server.query::<i64>("SELECT count(*) FROM tokens"), 1);
    // Another's form token is as good as none.
    let other = Browser::signed_in(&server).await;
    let stolen = other.form("/ui/apps", &[("form_token", &seal), ("name", "again")]).send().await.unwrap();
    assert_eq!(stolen.status(), StatusCode::FORBIDDEN);
    let elsewhere = Client::new().post(server.url("/ui/sign-in")).header("origin", "http://evil.example").body(format!("token={ADMIN}"));
    assert_eq!(elsewhere.send().await.unwrap().status(), StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn every_answer_says_what_a_browser_may_do_with_it() {
    let server = Options::stand_in().start();
    let browser = Browser::signed_in(&server).await;
    for path in [
        "/ui",
        "/ui/runs",
        "/ui/sign-in",
        "/ui/style.css",
        "/ui/script.js",
        "/ui/icon.svg",
        "/ui/usage.csv",
        "/ui/nothing",
        "/ui/runs/nothing",
    ] {
        let answer = browser.request(Method::GET, path).send().await.unwrap();
        let policy = header(&answer, "content-security-policy");
        assert!(
            policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe"),
            "{path}: {policy}"
        );
        assert_eq!((header(&answer, "x-content-type-options"), header(&answer, "cache-control")), ("nosniff", "no-store"), "{path}");
        let html = header(&answer, "content-type").starts_with("text/html");
        let text = answer.text().await.unwrap();
        assert!(!html || (!text.contains("style=\"") && !text.contains("<script>") && !text.contains("onclick")), "{path}: {text}");
    }
    // The API's answers are what they were.
    assert_eq!(header(&Client::new().get(server.url("/healthz")).send().await.unwrap(), "content-security-policy"), "");
}

#[tokio::test]
async fn a_cookie_is_for_tls_where_the_page_came_by_it_and_leads_nowhere_else() {
    let server = Options::stand_in().start();
    let browser = Browser::new(&server);
    let sign_in = async |scheme: &str, next: &str| {
        let body = format!("token={ADMIN}&next={next}");
        let form = browser.request(Method::POST, "/ui/sign-in").header("content-type", "application/x-www-form-urlencoded").body(body);
        form.header("origin", server.url("").replace("http", scheme)).send().await.unwrap()
    };
    let [plain, tls] = [sign_in("http", "").await, sign_in("https", "").await];
    assert!(!header(&plain, "set-cookie").contains("Secure") && header(&tls, "set-cookie").contains("; Secure"));
    for (next, led) in [
        ("/ui/runs?status=failed", "/ui/runs?status=failed"),
        ("//evil.example", "/ui"),
        ("https://evil.example", "/ui"),
        ("/uievil", "/ui"),
        ("/admin/tokens", "/ui"),
        ("", "/ui"),
    ] {
        assert_eq!(header(&sign_in("http", next).await, "location"), led, "{next}");
    }
}

#[tokio::test]
async fn the_page_can_be_taken_away_and_says_when_there_is_no_way_in() {
    let off = Options::stand_in().set("CLAWDFORGE_UI", "off").start();
    for path in ["/ui", "/ui/sign-in", "/ui/style.css"] {
        off.get(path, "").await.problem(404);
    }
    let closed = Options::stand_in().set("CLAWDFORGE_ADMIN_TOKEN", "").start();
    assert!(Browser::new(&closed).page("/ui/sign-in").await.contains("CLAWDFORGE_ADMIN_TOKEN"));
    let answer = Browser::new(&closed).form("/ui/sign-in", &[("token", "")]).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    let elsewhere = Options::stand_in().set("CLAWDFORGE_ALLOW_CIDRS", "10.0.0.0/8").start();
    elsewhere.get("/ui/sign-in", "").await.problem(403);
}

#[tokio::test]
async fn wrong_sign_ins_wait_too() {
    let server = Options::stand_in().start();
    let browser = Browser::new(&server);
    let begun = Instant::now();
    for _ in 0..10 {
        browser.form("/ui/sign-in", &[("token", "wrong")]).send().await.unwrap();
    }
    let (ten, begun) = (begun.elapsed(), Instant::now());
    browser.form("/ui/sign-in", &[("token", "wrong")]).send().await.unwrap();
    assert!(begun.elapsed() > Duration::from_millis(700), "{:?} after {ten:?}", begun.elapsed());
    let begun = Instant::now();
    Browser::signed_in(&server).await;
    assert!(begun.elapsed() < Duration::from_millis(700), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn the_pages_of_runs_hold_each_once() {
    let server = Options::stand_in().start();
    {
        let ledger = rusqlite::Connection::open(server.data().join("clawdforge.db")).unwrap();
        let mut insert = ledger
            .prepare(
                "INSERT INTO runs (run_id, app_name, client_ip, model, prompt, started_at, finished_at, duration_ms, ok, stop_reason, cost_usd)
                 VALUES (printf('%032d', ?1), 'app', '::1', 'sonnet', 'number ' || ?1 || ' 100% _of_ it', 1000 + ?1, 1001 + ?1, ?1 * 100, 1, 'end_turn', ?1 / 100.0)",
            )
            .unwrap();
        for number in 0..120 {
            insert.execute([number]).unwrap();
        }
    }
    let browser = Browser::signed_in(&server).await;
    let count = async |first: &str| {
        let (mut path, mut all) = (first.to_owned(), Vec::new());
        loop {
            let page = browser.page(&path).await;
            all.extend(page.split("href=\"/ui/runs/").skip(1).map(|rest| rest[..32].to_owned()));
            let older = page.split("<a href=\"").find(|link| link.contains("rel=\"next\""));
            let Some(older) = older else { return all };
            older.split('"').next().unwrap().replace("&amp;", "&").clone_into(&mut path);
        }
    };
    let all = count("/ui/runs").await;
    assert_eq!(all.len(), 120);
    assert!(all.is_sorted_by(|newer, older| newer > older));
    for (filter, expected) in [
        ("text=NUMBER%201", 31),
        ("text=100%25%20_of_", 120),
        ("text=100__of_", 0),
        ("app=app&status=succeeded&model=sonnet", 120),
        ("status=nonsense", 120),
        ("seconds=10", 20),
        ("usd=1.0", 20),
        ("from=1970-01-01&to=1970-01-01", 120),
        ("from=1970-01-02", 0),
        ("app=%27%20OR%201", 0),
    ] {
        assert_eq!(count(&format!("/ui/runs?{filter}")).await.len(), expected, "{filter}");
    }
}

#[tokio::test]
async fn what_is_followed_ends_with_the_sign_in_and_keeps_no_server_from_stopping() {
    let mut server = Options::stand_in().start();
    let token = server.mint("app").await;
    let browser = Browser::signed_in(&server).await;
    let seal = browser.form_token().await;
    let mut live = browser.request(Method::GET, "/ui/live").send().await.unwrap().bytes_stream();
    assert!(live.next().await.unwrap().unwrap().starts_with(b"event: html\ndata: \""));
    browser.form("/ui/sign-out", &[("form_token", &seal)]).send().await.unwrap();
    let end = async { while live.next().await.is_some_and(|piece| piece.is_ok()) {} };
    tokio::time::timeout(Duration::from_secs(5), end).await.unwrap();

    let browser = Browser::signed_in(&server).await;
    let mut live = browser.request(Method::GET, "/ui/live").send().await.unwrap().bytes_stream();
    live.next().await.unwrap().unwrap();
    assert_eq!(server.run(&token, "hello").await.status, StatusCode::OK);
    let begun = Instant::now();
    server.signal(Signal::TERM);
    assert!(server.ended().success());
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    until("it is in the log", || server.log().contains("stopped")).await;
}
