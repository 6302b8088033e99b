//! The operator's page, at `/ui`: rendered here, from what `/admin` is answered from. A page is a file with its template; `layout` is what
//! all have in common, and `sign_in` says who may see them.

mod app;
mod apps;
mod events;
mod format;
mod layout;
mod overview;
mod plot;
mod run;
mod runs;
mod session;
mod sessions;
mod sign_in;
mod try_it;
mod usage;

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};

use crate::api::error::ApiError;
use crate::app::App;
use layout::Oops;
use sign_in::{Operator, SignedIn};

/// What the pages share.
pub(crate) struct Ui {
    app: Arc<App>,
    operators: SignedIn,
}

impl Ui {
    /// Whether a page may still be followed by an operator: one who signs out sees no more, and none keeps the server from stopping.
    fn may_follow(&self, operator: &Operator) -> bool {
        self.operators.is_in(operator) && !self.app.jobs.is_stopping()
    }
}

/// Every page.
pub fn routes(app: Arc<App>) -> Router {
    let ui = Arc::new(Ui { app, operators: SignedIn::default() });
    let pages = [
        sign_in::routes(),
        overview::routes(),
        runs::routes(),
        run::routes(),
        sessions::routes(),
        session::routes(),
        usage::routes(),
        apps::routes(),
        app::routes(),
        try_it::routes(),
    ];
    pages
        .into_iter()
        .fold(Router::new(), Router::merge)
        .route("/ui/style.css", get(async || asset("text/css; charset=utf-8", include_str!("style.css"))))
        .route("/ui/script.js", get(async || asset("text/javascript; charset=utf-8", include_str!("script.js"))))
        .route("/ui/icon.svg", get(async || asset("image/svg+xml", include_str!("icon.svg"))))
        .route("/ui/{*nothing}", any(async || Oops(ApiError::NotFound)))
        .method_not_allowed_fallback(async || Oops(ApiError::MethodNotAllowed))
        .layer(map_response(guarded))
        .with_state(ui)
}

fn asset(kind: &'static str, text: &'static str) -> Response {
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// A page loads nothing from elsewhere, is shown in no frame, and is kept nowhere.
async fn guarded(mut response: Response) -> Response {
    const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; \
                          base-uri 'none'; frame-ancestors 'none'";
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::CACHE_CONTROL, "no-store"),
        // Not "no-referrer": with that, forms say that they come from nowhere.
        (header::REFERRER_POLICY, "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
