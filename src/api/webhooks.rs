//! `/webhooks`: an app's own webhooks, sent and to be sent; and what they say.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn, PathsBuilder};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::{Components, ContentBuilder, HttpMethod, PathItem, Paths, Required, Response};
use utoipa::{IntoParams, PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::Caller;
use super::batches::BatchState;
use super::body::{ValidJson, Validate};
use super::error::{ApiError, FieldError, Problem};
use super::sessions::SessionState;
use super::submission::SubmitOptions;
use super::validate;
use super::view::{RunState, TurnStatus};
use crate::app::App;
use crate::clock;
use crate::ledger::{self, Delivery, JobId};
use crate::webhook_target::{Reach, Target};

/// What a receiver gets.
#[derive(Serialize, ToSchema)]
pub(super) struct Payload<T> {
    /// What happened.
    #[serde(rename = "type")]
    #[schema(example = "run.finished")]
    kind: String,
    /// When, in UTC (RFC 3339).
    timestamp: String,
    /// What it happened to.
    data: T,
}

/// What an app's budget was, and is spent.
#[derive(Serialize, ToSchema)]
pub(super) struct BudgetSpent {
    app_name: String,
    /// US dollars of today, in UTC.
    spent_usd: f64,
    /// US dollars a day.
    daily_usd: Option<f64>,
}

/// The app that asked for a try.
#[derive(Serialize, ToSchema)]
pub(super) struct Ping {
    app_name: String,
}

/// That claude's sign-in fails.
#[derive(Serialize, ToSchema)]
pub(super) struct SignInFailed {
    /// What to do.
    detail: String,
}

/// What is sent, as JSON; `None` where what it tells of is not kept any more.
pub(crate) async fn payload(app: &App, delivery: &Delivery) -> Result<Option<String>, ledger::Error> {
    let full = Url::parse(&delivery.url).is_ok_and(|url| url.query_pairs().any(|(name, value)| name == "full" && value == "1"));
    let subject = delivery.subject.clone().unwrap_or_default();
    Ok(match delivery.event.as_str() {
        "run.finished" => app.ledger.job_at_all(&JobId::Run(subject)).await?.map(|row| {
            let state = RunState::from(row);
            told(delivery, if full { state } else { state.without_answer() })
        }),
        "turn.finished" => {
            let Some(id @ JobId::Turn { .. }) = JobId::named(&subject) else { return Ok(None) };
            let row = app.ledger.job_at_all(&id).await?;
            let JobId::Turn { session_id, turn } = id else { return Ok(None) };
            row.map(|row| {
                let status = TurnStatus::new(&session_id, turn, row);
                told(delivery, if full { status } else { status.without_answer() })
            })
        }
        "batch.finished" => app.ledger.batch(None, &subject).await?.map(|batch| told(delivery, BatchState::new(batch, false))),
        "session.closed" => app.ledger.any_session(&subject).await?.map(|session| told(delivery, SessionState::from(session))),
        "budget.spent" => {
            let spent_usd = app.ledger.spent(&delivery.app_name, clock::midnight()).await?;
            let token = app.ledger.token(&delivery.app_name).await?;
            token.map(|token| told(delivery, BudgetSpent { app_name: token.name, spent_usd, daily_usd: token.limits.daily_usd }))
        }
        "signin.failed" => {
            let detail = "A run failed because claude is not signed in. Run claude where the server runs, then /login.";
            Some(told(delivery, SignInFailed { detail: detail.to_owned() }))
        }
        _ => Some(told(delivery, Ping { app_name: delivery.app_name.clone() })),
    })
}

fn told<T: Serialize>(delivery: &Delivery, data: T) -> String {
    let payload = Payload { kind: delivery.event.clone(), timestamp: rfc3339(delivery.created_at), data };
    serde_json::to_string(&payload).expect("what is told is JSON")
}

fn rfc3339(at: i64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(at).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    format!("{}T{:02}:{:02}:{:02}Z", time.date(), time.hour(), time.minute(), time.second())
}

/// Whether this can be the webhook of an app.
pub(super) fn check(app: &App, url: &str, networks: &crate::network::Networks, errors: &mut Vec<FieldError>) {
    let reach = Reach { setting: app.access.webhooks.as_ref(), token: Some(networks), allow: &app.access.allow, port: 0 };
    // What its name stands for is looked at when it is sent.
    let checked = Target::read(url).and_then(|target| target.literal().map_or(Ok(()), |address| reach.check(address, target.port)));
    if let Err(why) = checked {
        errors.push(FieldError::new("/webhook", why.to_string()));
    }
}

/// Who is told of the end of what a caller asks for: who is named, or else whoever is told of all that the app has in the background.
pub(super) fn told_of(app: &App, caller: &Caller, options: &SubmitOptions, named: Option<String>) -> Result<Option<String>, ApiError> {
    let Some(url) = named else { return Ok(caller.webhook.clone().filter(|_| options.background)) };
    let mut errors = Vec::new();
    check(app, &url, &caller.networks, &mut errors);
    if !options.background {
        errors.push(FieldError::new("/webhook", "a webhook is for what goes on in the background; send \"Prefer: respond-async\", too"));
    }
    if !caller.signs {
        errors.push(FieldError::new("/webhook", NO_SECRET));
    }
    if errors.is_empty() { Ok(Some(url)) } else { Err(ApiError::Invalid(errors)) }
}

const NO_SECRET: &str =
    "the app has no secret that webhooks are signed with; its operator makes one with POST /admin/tokens/{name}/webhook-secret";

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct DeliveriesQuery {
    /// How many at most, from 1 to 200; 50 by default.
    #[param(value_type = Option<i64>, minimum = 1, maximum = 200)]
    limit: Option<String>,
    /// A delivery's id: only older ones.
    before: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct DeliveryList {
    deliveries: Vec<ListedDelivery>,
    count: usize,
}

#[derive(Serialize, ToSchema)]
struct ListedDelivery {
    /// The receiver's `webhook-id`.
    delivery_id: String,
    /// What happened.
    #[schema(example = "run.finished")]
    event: String,
    /// The run, turn (`SESSION-TURN`) or session that it tells of.
    #[schema(required)]
    subject: Option<String>,
    url: String,
    /// `pending`, `delivered` or `failed` (given up).
    #[schema(example = "delivered")]
    status: &'static str,
    /// Unix seconds.
    created_at: i64,
    /// How often it was tried.
    attempts: u32,
    /// Unix seconds of the next try.
    #[schema(required)]
    next_at: Option<i64>,
    /// Unix seconds.
    #[schema(required)]
    delivered_at: Option<i64>,
    /// Of the last answer.
    #[schema(required)]
    http_status: Option<u16>,
    /// Why the last try failed, with the first 200 characters of its answer.
    #[schema(required)]
    error: Option<String>,
}

impl From<Delivery> for ListedDelivery {
    fn from(delivery: Delivery) -> Self {
        let Delivery { delivery_id, event, subject, url, created_at, attempts, next_at, delivered_at, http_status, error, .. } = delivery;
        let status = match (next_at, delivered_at) {
            (Some(_), _) => "pending",
            (None, Some(_)) => "delivered",
            (None, None) => "failed",
        };
        Self { delivery_id, event, subject, url, status, created_at, attempts, next_at, delivered_at, http_status, error }
    }
}

/// List one's webhooks, newest first
#[utoipa::path(get, path = "/webhooks/deliveries", operation_id = "list_deliveries", tag = "webhooks", security(("app" = [])), params(DeliveriesQuery), responses(
    (status = OK, body = DeliveryList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Result<Query<DeliveriesQuery>, QueryRejection>,
) -> Result<Json<DeliveryList>, ApiError> {
    let Query(DeliveriesQuery { limit, before }) =
        query.map_err(|_| ApiError::BadRequest("Set limit and before, at most once.".to_owned()))?;
    let limit = validate::limit(limit)?;
    let deliveries: Vec<_> = app.ledger.deliveries(&caller.app, before, limit).await?.into_iter().map(ListedDelivery::from).collect();
    Ok(Json(DeliveryList { count: deliveries.len(), deliveries }))
}

/// Send a webhook again
#[utoipa::path(post, path = "/webhooks/deliveries/{id}/retry", operation_id = "retry_delivery", tag = "webhooks", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = ListedDelivery),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn retry(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ListedDelivery>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NotFound)?;
    let delivery = app.ledger.retry_delivery(&caller.app, &id).await?.ok_or(ApiError::NotFound)?;
    Ok(Json(delivery.into()))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct TestBody {
    /// Where to; the app's own webhook by default.
    webhook: Option<String>,
}

impl Validate for TestBody {
    fn errors(&self) -> Vec<FieldError> {
        Vec::new()
    }
}

#[derive(Serialize, ToSchema)]
struct TestSent {
    ok: bool,
    /// For `GET /webhooks/deliveries`.
    delivery_id: String,
}

/// Send a webhook to try the receiver
#[utoipa::path(post, path = "/webhooks/test", operation_id = "test_webhook", tag = "webhooks", security(("app" = [])), request_body = TestBody, responses(
    (status = OK, body = TestSent),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn test(State(app): State<Arc<App>>, caller: Caller, ValidJson(asked): ValidJson<TestBody>) -> Result<Json<TestSent>, ApiError> {
    let none = || ApiError::Invalid(vec![FieldError::new("/webhook", "the app has no webhook; name one")]);
    let url = asked.webhook.or_else(|| caller.webhook.clone()).ok_or_else(none)?;
    let options = SubmitOptions { stream: false, background: true, key: None };
    let url = told_of(&app, &caller, &options, Some(url))?.ok_or(ApiError::Defect)?;
    let delivery_id = app.ledger.add_delivery(&caller.app, "ping", &url).await?;
    Ok(Json(TestSent { ok: true, delivery_id }))
}

/// What receivers are sent, for the description.
pub(super) fn described(components: &mut Components) -> Paths {
    fn event<T: ToSchema>(paths: PathsBuilder, name: &str, when: &str, components: &mut Components) -> PathsBuilder
    where
        Payload<T>: PartialSchema,
    {
        components.schemas.insert(T::name().into_owned(), T::schema());
        let headers = ["webhook-id", "webhook-timestamp", "webhook-signature"].map(|name| {
            ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Header)
                .required(Required::True)
                .schema(Some(String::schema()))
                .build()
        });
        let content = ContentBuilder::new().schema(Some(Payload::<T>::schema())).build();
        let operation = OperationBuilder::new()
            .operation_id(Some(name.replace('.', "_")))
            .tag("webhooks")
            .summary(Some(when))
            .parameters(Some(headers))
            .request_body(Some(RequestBodyBuilder::new().content("application/json", content).required(Some(Required::True)).build()))
            .response("2XX", Response::new("It arrived; 410 ends the subscription, and anything else has it sent again"));
        paths.path(name, PathItem::new(HttpMethod::Post, operation))
    }
    let paths = PathsBuilder::new();
    let paths = event::<RunState>(paths, "run.finished", "A run in the background has ended", components);
    let paths = event::<TurnStatus>(paths, "turn.finished", "A turn in the background has ended", components);
    let paths = event::<BatchState>(paths, "batch.finished", "A batch has ended", components);
    let paths = event::<SessionState>(paths, "session.closed", "A session is closed", components);
    let paths = event::<BudgetSpent>(paths, "budget.spent", "The app has spent what it may today", components);
    let paths = event::<Ping>(paths, "ping", "POST /webhooks/test asked for it", components);
    let paths = event::<SignInFailed>(paths, "signin.failed", "For the operator: claude is not signed in", components);
    paths.build()
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(retry)).routes(routes!(test))
}
