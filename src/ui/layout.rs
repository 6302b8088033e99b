//! What all pages have in common.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use maud::{DOCTYPE, Markup, html};

use super::sign_in::Operator;
use crate::api::error::ApiError;

/// The pages, in the order of the navigation.
const PAGES: [(&str, &str); 6] = [
    ("/ui", "Overview"),
    ("/ui/runs", "Runs"),
    ("/ui/sessions", "Sessions"),
    ("/ui/usage", "Usage"),
    ("/ui/apps", "Apps"),
    ("/ui/try", "Try it"),
];

/// A page of the part at `path`.
pub(super) fn page(operator: &Operator, path: &str, title: &str, main: Markup) -> Markup {
    let header = html! {
        nav aria-label="Pages" {
            ul {
                @for (page, name) in PAGES {
                    li { a href=(page) aria-current=[(page == path).then_some("page")] { (name) } }
                }
            }
        }
        form method="post" action="/ui/sign-out" { (operator.seal()) button { "Sign out" } }
    };
    whole(title, &header, &html! { main #main tabindex="-1" { (main) } })
}

/// A page without navigation.
pub(super) fn bare(title: &str, main: &Markup) -> Markup {
    whole(title, &html! {}, &html! { main.narrow #main tabindex="-1" { (main) } })
}

fn whole(title: &str, header: &Markup, main: &Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { (title) " · clawdforge" }
                link rel="icon" href="/ui/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/ui/style.css";
                script src="/ui/script.js" defer {}
            }
            body {
                a.skip href="#main" { "To the content" }
                header { a.brand href="/ui" { "clawdforge" } (header) }
                (main)
                footer { "clawdforge " (env!("CARGO_PKG_VERSION")) span.utc { " · times are in UTC" } }
            }
        }
    }
}

/// What a page can't show, and why.
pub(super) struct Oops(pub(super) ApiError);

impl<E: Into<ApiError>> From<E> for Oops {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Oops {
    fn into_response(self) -> Response {
        self.0.log_cause();
        let (status, detail) = self.0.status_and_detail();
        let title = status.canonical_reason().unwrap_or("Error");
        let main = html! {
            h1 { (title) }
            p.notice.bad { (detail) }
            p { a href="/ui" { "To the overview" } }
        };
        (status, bare(title, &main)).into_response()
    }
}

/// Why what a form asked for was not done, in words; `None` where there is no form to show it in.
pub(super) fn refusal(error: ApiError) -> Result<(StatusCode, Vec<String>), Oops> {
    match error {
        ApiError::Invalid(errors) => Ok((StatusCode::UNPROCESSABLE_ENTITY, errors.into_iter().map(|error| error.detail).collect())),
        error => match error.status_and_detail() {
            (status, _) if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE => Err(Oops(error)),
            (status, detail) => Ok((status, vec![detail])),
        },
    }
}

/// Refusals above a form.
pub(super) fn refusals(whys: &[String]) -> Markup {
    html! {
        @if !whys.is_empty() {
            div.notice.bad role="alert" { @for why in whys { p { (why) } } }
        }
    }
}
