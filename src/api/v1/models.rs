//! `/v1/models`, in the form of either vendor.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::refusal::{Refusal, Vendor};
use crate::api::auth::Caller;
use crate::app::App;
use crate::models::Offered;

/// When the models were made is not known here; the vendors' libraries want a time.
const CREATED: i64 = 0;
const CREATED_AT: &str = "1970-01-01T00:00:00Z";

fn vendor(headers: &HeaderMap) -> Vendor {
    if headers.contains_key("anthropic-version") { Vendor::Anthropic } else { Vendor::OpenAi }
}

fn told(vendor: Vendor, Offered { id, name }: &Offered) -> Value {
    match vendor {
        Vendor::OpenAi => json!({"id": id, "object": "model", "created": CREATED, "owned_by": "anthropic"}),
        Vendor::Anthropic => json!({"type": "model", "id": id, "display_name": name, "created_at": CREATED_AT}),
    }
}

/// List the models
///
/// Those that the CLI names, and those of `CLAWDFORGE_MODEL_MAP`; others that your account has can be asked for too.
#[utoipa::path(get, path = "/v1/models", operation_id = "list_models", tag = "model APIs", security(("app" = []), ("key" = [])), responses(
    (status = OK, description = "In Anthropic's form where `anthropic-version` is sent, else in OpenAI's", body = Value),
))]
async fn list(State(app): State<Arc<App>>, _caller: Caller, headers: HeaderMap) -> Response {
    let vendor = vendor(&headers);
    let models = app.models.all().await;
    let data: Vec<_> = models.iter().map(|model| told(vendor, model)).collect();
    let id = |model: Option<&Offered>| model.map(|model| model.id.clone());
    match vendor {
        Vendor::OpenAi => Json(json!({"object": "list", "data": data})).into_response(),
        Vendor::Anthropic => {
            Json(json!({"data": data, "has_more": false, "first_id": id(models.first()), "last_id": id(models.last())})).into_response()
        }
    }
}

/// See a model
#[utoipa::path(get, path = "/v1/models/{id}", operation_id = "get_model", tag = "model APIs", security(("app" = []), ("key" = [])),
    params(("id" = String, Path)), responses(
    (status = OK, body = Value),
    (status = NOT_FOUND, description = "The vendor's form of error", body = Value),
))]
async fn one(State(app): State<Arc<App>>, _caller: Caller, id: Result<Path<String>, PathRejection>, headers: HeaderMap) -> Response {
    let vendor = vendor(&headers);
    let id = id.map(|Path(id)| id).unwrap_or_default();
    match app.models.all().await.iter().find(|model| model.id == id) {
        Some(model) => Json(told(vendor, model)).into_response(),
        None => Refusal {
            code: Some("model_not_found"),
            ..Refusal::new(StatusCode::NOT_FOUND, format!("There is no model \"{id}\" in the list."))
        }
        .into_response(vendor, Uuid::now_v7().simple()),
    }
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(one))
}
