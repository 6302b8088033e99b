//! HTTP and nothing else: one file per resource, its types above its handlers, its routes at its end. [`auth`] says who
//! calls, [`body`] how bodies are read, [`error`] what refusals look like.

mod answer;
pub mod auth;
mod batches;
pub mod body;
pub mod error;
mod files;
mod health;
mod history;
pub mod metrics;
mod permissions;
mod render;
mod reply;
pub(crate) mod runs;
mod sessions;
pub(crate) mod stream;
mod submission;
pub(crate) mod tokens;
mod turns;
pub mod v1;
pub(crate) mod validate;
mod view;
pub(crate) mod webhooks;
pub(crate) mod workers;

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Components, InfoBuilder, OpenApi, OpenApiBuilder};
use utoipa_axum::router::OpenApiRouter;

use crate::app::App;
use error::ApiError;

/// Every route of the server, and the document that describes them.
pub fn routes(app: Arc<App>) -> Router {
    let (router, document) = described().split_for_parts();
    let document = serde_json::to_string_pretty(&document).expect("the document is made of strings");
    router
        .route("/openapi.json", get(|| async move { ([(header::CONTENT_TYPE, "application/json")], document).into_response() }))
        .fallback(|| async { ApiError::NotFound })
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed })
        .with_state(app)
}

fn described() -> OpenApiRouter<Arc<App>> {
    let routes = [
        health::routes(),
        runs::routes(),
        history::routes(),
        metrics::routes(),
        files::routes(),
        sessions::routes(),
        turns::routes(),
        permissions::routes(),
        workers::routes(),
        tokens::routes(),
        webhooks::routes(),
        batches::routes(),
        v1::routes(),
    ];
    routes.into_iter().fold(OpenApiRouter::with_openapi(frame()), OpenApiRouter::merge)
}

fn frame() -> OpenApi {
    let bearer =
        |description: &str| SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(description)).build());
    let mut components = Components::new();
    components.add_security_scheme("app", bearer("An app's token, `cf_…`"));
    components.add_security_scheme(
        "key",
        SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::with_description(
            "x-api-key",
            "An app's token, as libraries of Anthropic's API send it",
        ))),
    );
    components.add_security_scheme("operator", bearer("The operator's token"));
    let webhooks = webhooks::described(&mut components);
    OpenApiBuilder::new()
        .info(
            InfoBuilder::new()
                .title("clawdforge")
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some("Runs the real claude CLI for the apps on a LAN.")),
        )
        .components(Some(components))
        .webhooks(Some(webhooks))
        .build()
}
