//! `/batches`: many runs at once, made where nobody else wants the place.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{FromRequest, Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{StreamExt, stream};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::auth::Caller;
use super::body::{self, ValidJson, Validate};
use super::error::{ApiError, FieldError, Problem};
use super::render::Of;
use super::runs::{self, RunRequest};
use super::submission::{self, SubmitOptions};
use super::webhooks;
use super::{validate, view};
use crate::agent::turn::ASK;
use crate::app::App;
use crate::clock;
use crate::ledger::{Batch, BatchLine, BatchResult, JobId, Status};

/// Runs of a batch, at most.
const MOST: usize = 10_000;
/// The longest line in bytes: as of a JSON body.
const LONGEST: usize = body::MAX_JSON;
/// Lines that are written to the ledger at once, and results that are read from it.
const AT_ONCE: usize = 100;
const LONGEST_ID: usize = 128;
const NDJSON: &str = "application/x-ndjson";

/// A run of a batch: as `POST /run` takes it, but without `webhook`, and with what the app calls it.
#[derive(Debug, Serialize, ToSchema)]
struct BatchRun {
    /// Up to 128 characters; each once in a batch.
    custom_id: Option<String>,
    #[serde(flatten)]
    run: RunRequest,
}

// Not derived: what is flattened can't be kept to the letter, as a schema is.
impl<'de> Deserialize<'de> for BatchRun {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Id {
            custom_id: Option<String>,
        }
        let whole = Box::<RawValue>::deserialize(deserializer)?;
        let run = serde_json::from_str(whole.get()).map_err(D::Error::custom)?;
        let Id { custom_id } = serde_json::from_str(whole.get()).map_err(D::Error::custom)?;
        Ok(Self { custom_id, run })
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BatchBody {
    /// At most 10,000.
    #[schema(min_items = 1, max_items = 10_000)]
    runs: Vec<BatchRun>,
    /// Who is told of its end (`batch.finished`); the app's own webhook by default.
    #[schema(example = "https://app.lan/hook")]
    webhook: Option<String>,
}

impl Validate for BatchBody {
    fn errors(&self) -> Vec<FieldError> {
        Vec::new()
    }
}

/// How far a batch has come.
#[derive(Serialize, ToSchema)]
pub(super) struct BatchState {
    #[schema(pattern = "^[0-9a-f]{32}$")]
    batch_id: String,
    /// `running`; `paused`, where the app's budget is spent until midnight UTC; `cancelling`; `cancelled`; or `finished`.
    #[schema(example = "running")]
    status: &'static str,
    /// Its runs.
    total: i64,
    counts: Counts,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds.
    #[schema(required)]
    cancelled_at: Option<i64>,
    /// Unix seconds.
    #[schema(required)]
    finished_at: Option<i64>,
    /// Unix seconds, as far as it can be told from what has ended.
    #[schema(required)]
    estimated_end_at: Option<i64>,
    /// Unix seconds, where it is paused.
    #[schema(required)]
    paused_until: Option<i64>,
    #[schema(required)]
    webhook: Option<String>,
}

/// Its runs by their status.
#[derive(Default, Serialize, ToSchema)]
struct Counts {
    queued: i64,
    running: i64,
    succeeded: i64,
    failed: i64,
    timed_out: i64,
    cancelled: i64,
    interrupted: i64,
}

impl BatchState {
    /// As it is now; `spent` says whether the app's budget is.
    pub(super) fn new(batch: Batch, spent: bool) -> Self {
        let Batch { batch_id, webhook, created_at, cancelled_at, finished_at, total, counts, average_ms } = batch;
        let mut known = Counts::default();
        for (status, count) in counts {
            *match status {
                Status::Queued => &mut known.queued,
                Status::Running => &mut known.running,
                Status::Succeeded => &mut known.succeeded,
                Status::Failed => &mut known.failed,
                Status::TimedOut => &mut known.timed_out,
                Status::Cancelled => &mut known.cancelled,
                Status::Interrupted => &mut known.interrupted,
            } = count;
        }
        let status = match (finished_at, cancelled_at) {
            (Some(_), Some(_)) => "cancelled",
            (Some(_), None) => "finished",
            (None, Some(_)) => "cancelling",
            (None, None) if spent && known.queued > 0 => "paused",
            (None, None) => "running",
        };
        let paused = status == "paused";
        #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "an estimate")]
        let left = average_ms
            .filter(|_| known.running > 0)
            .map(|ms| ((known.queued + known.running) as f64 * ms / 1000.0 / known.running as f64).ceil() as i64);
        Self {
            batch_id,
            status,
            total,
            counts: known,
            created_at,
            cancelled_at,
            finished_at,
            estimated_end_at: left.filter(|_| finished_at.is_none() && !paused).map(|secs| clock::now() + secs),
            paused_until: paused.then(|| clock::now() + clock::until_midnight()),
            webhook,
        }
    }
}

async fn state_of(app: &App, caller: &Caller, batch: Batch) -> Result<BatchState, ApiError> {
    let spent = match caller.limits.daily_usd {
        Some(daily_usd) => app.ledger.spent(&caller.app, clock::midnight()).await? >= daily_usd,
        None => false,
    };
    Ok(BatchState::new(batch, spent))
}

/// What is read of a request, run by run.
struct Reading<'a> {
    app: &'a App,
    caller: &'a Caller,
    batch_id: String,
    read: usize,
    kept: Vec<BatchLine>,
}

impl Reading<'_> {
    async fn take(&mut self, asked: BatchRun) -> Result<(), ApiError> {
        self.read += 1;
        let line = self.read;
        if line > MOST {
            return Err(at(line, &[FieldError::new("", format!("a batch has at most {MOST} runs"))]));
        }
        let BatchRun { custom_id, run } = asked;
        let mut errors = run.errors();
        if custom_id.as_ref().is_some_and(|id| id.is_empty() || id.chars().count() > LONGEST_ID) {
            errors.push(FieldError::new("/custom_id", format!("it has 1 to {LONGEST_ID} characters")));
        }
        if run.webhook.is_some() {
            errors.push(FieldError::new("/webhook", "a batch has one for all of it; leave it out here"));
        }
        if run.permissions.as_deref() == Some(ASK) {
            errors.push(FieldError::new("/permissions", "nobody can be asked in a batch; leave ask out"));
        }
        if !errors.is_empty() {
            return Err(at(line, &errors));
        }
        let spec = runs::spec(self.app, self.caller, run).await.map_err(|error| match error {
            ApiError::Invalid(errors) => at(line, &errors),
            ApiError::BadRequest(detail) => ApiError::BadRequest(format!("Line {line}: {detail}")),
            other => other,
        })?;
        let uuid = Uuid::now_v7();
        let mut job = submission::job(self.app, self.caller, uuid, spec)?;
        job.spec.yields = true;
        self.kept.push(BatchLine {
            line: i64::try_from(line).unwrap_or(i64::MAX),
            custom_id,
            job: job.row(JobId::Run(uuid.simple().to_string()), 0),
            request: job.kept(),
        });
        if self.kept.len() >= AT_ONCE { self.keep().await } else { Ok(()) }
    }

    async fn keep(&mut self) -> Result<(), ApiError> {
        match self.app.ledger.keep_batch_lines(&self.batch_id, std::mem::take(&mut self.kept)).await? {
            None => Ok(()),
            Some(line) => {
                let twice = FieldError::new("/custom_id", "another run of the batch has this one");
                Err(at(usize::try_from(line).unwrap_or_default(), &[twice]))
            }
        }
    }
}

/// Errors of a run, which is named by its number in the request, from 1; pointers count from 0.
fn at(line: usize, errors: &[FieldError]) -> ApiError {
    let place = |error: &FieldError| {
        FieldError::new(format!("/{}{}", line.saturating_sub(1), error.pointer), format!("line {line}: {}", error.detail))
    };
    ApiError::Invalid(errors.iter().map(place).collect())
}

/// Lines of a body, none longer than it may be, of so many bytes together.
async fn read_lines(reading: &mut Reading<'_>, body: Body, most: u64) -> Result<(), ApiError> {
    let (mut pieces, mut rest, mut bytes) = (body.into_data_stream(), Vec::new(), 0_u64);
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| body::refusal(&error, most))?;
        bytes += piece.len() as u64;
        if bytes > most {
            return Err(ApiError::TooLarge(most));
        }
        rest.extend_from_slice(&piece);
        let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') else {
            if rest.len() > LONGEST {
                return Err(ApiError::TooLarge(LONGEST as u64));
            }
            continue;
        };
        let whole: Vec<u8> = rest.drain(..=end).collect();
        for line in whole.split(|byte| *byte == b'\n') {
            read_line(reading, line).await?;
        }
    }
    read_line(reading, &rest).await
}

async fn read_line(reading: &mut Reading<'_>, line: &[u8]) -> Result<(), ApiError> {
    if line.iter().all(u8::is_ascii_whitespace) {
        return Ok(());
    }
    let number = reading.read + 1;
    let run: BatchRun = serde_json::from_slice(line).map_err(|error| at(number, &[FieldError::new("", error.to_string())]))?;
    reading.take(run).await
}

/// Make many runs
///
/// As JSON, or as JSON Lines (`application/x-ndjson`), a run in each, which may be much longer; then `?webhook=` names who is told. They are made where nobody else
/// wants the place. Where one is wrong, none is made, and it is named by its number.
#[utoipa::path(post, path = "/batches", operation_id = "create_batch", tag = "batches", security(("app" = [])), params(WebhookQuery),
    request_body(content((BatchBody = "application/json"), (String = "application/x-ndjson"))), responses(
    (status = ACCEPTED, body = BatchState, headers(("location" = String, description = "Where to see it"))),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Result<Query<WebhookQuery>, QueryRejection>,
    request: Request,
) -> Result<Response, ApiError> {
    let Query(WebhookQuery { webhook }) = query.map_err(|_| ApiError::BadRequest("Set webhook, at most once.".to_owned()))?;
    let batch_id = Uuid::now_v7().simple().to_string();
    let mut reading = Reading { app: &app, caller: &caller, batch_id: batch_id.clone(), read: 0, kept: Vec::new() };
    let begun = begin(&mut reading, webhook, request).await;
    if begun.is_err()
        && let Err(error) = app.ledger.forget_batch_lines(&batch_id).await
    {
        tracing::warn!(%error, "what was read of a request for a batch is left to the sweeper");
    }
    begun?;
    app.jobs.wake_batches();
    let batch = app.ledger.batch(Some(&caller.app), &batch_id).await?.ok_or(ApiError::Defect)?;
    tracing::info!(batch_id, app = caller.app, runs = batch.total, "batch accepted");
    let state = state_of(&app, &caller, batch).await?;
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, format!("/batches/{batch_id}"))], Json(state)).into_response())
}

async fn begin(reading: &mut Reading<'_>, named: Option<String>, request: Request) -> Result<(), ApiError> {
    let (app, caller) = (reading.app, reading.caller);
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let lines =
        kind.split(';').next().is_some_and(|kind| [NDJSON, "application/jsonl"].contains(&kind.trim().to_ascii_lowercase().as_str()));
    let named = if lines {
        read_lines(reading, request.into_body(), app.uploads.max_bytes()).await?;
        named
    } else {
        let ValidJson(BatchBody { runs, webhook }) = ValidJson::from_request(request, &()).await?;
        for run in runs {
            reading.take(run).await?;
        }
        webhook.or(named)
    };
    if reading.read == 0 {
        return Err(ApiError::Invalid(vec![FieldError::new("/runs", "a batch has one run at least")]));
    }
    reading.keep().await?;
    let options = SubmitOptions { stream: false, background: true, key: None };
    let webhook = webhooks::told_of(app, caller, &options, named)?;
    app.ledger.begin_batch(&reading.batch_id, &caller.app, &caller.address.to_string(), webhook).await?;
    Ok(())
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct WebhookQuery {
    /// Who is told of its end.
    webhook: Option<String>,
}

async fn find(app: &App, caller: &Caller, id: Result<Path<String>, PathRejection>) -> Result<Batch, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NotFound)?;
    app.ledger.batch(Some(&caller.app), &id).await?.ok_or(ApiError::NotFound)
}

/// See a batch
#[utoipa::path(get, path = "/batches/{id}", operation_id = "get_batch", tag = "batches", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = BatchState),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn state(State(app): State<Arc<App>>, caller: Caller, id: Result<Path<String>, PathRejection>) -> Result<Json<BatchState>, ApiError> {
    let batch = find(&app, &caller, id).await?;
    state_of(&app, &caller, batch).await.map(Json)
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// How many at most, from 1 to 200; 50 by default.
    #[param(value_type = Option<i64>, minimum = 1, maximum = 200)]
    limit: Option<String>,
    /// A batch's id: only older ones.
    before: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct BatchList {
    batches: Vec<BatchState>,
    count: usize,
}

/// List one's batches, newest first
#[utoipa::path(get, path = "/batches", operation_id = "list_batches", tag = "batches", security(("app" = [])), params(ListQuery), responses(
    (status = OK, body = BatchList),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<BatchList>, ApiError> {
    let Query(ListQuery { limit, before }) = query.map_err(|_| ApiError::BadRequest("Set limit and before, at most once.".to_owned()))?;
    let limit = validate::limit(limit)?;
    let mut batches = Vec::new();
    for batch in app.ledger.batches(&caller.app, before, limit).await? {
        batches.push(state_of(&app, &caller, batch).await?);
    }
    Ok(Json(BatchList { count: batches.len(), batches }))
}

/// Cancel a batch
///
/// What waits of it and what goes on. When the answer comes, all of it is over.
#[utoipa::path(delete, path = "/batches/{id}", operation_id = "cancel_batch", tag = "batches", security(("app" = [])), params(("id" = String, Path)), responses(
    (status = OK, body = BatchState),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn cancel(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<BatchState>, ApiError> {
    let batch = find(&app, &caller, id).await?;
    if batch.finished_at.is_none() {
        app.jobs.cancel_batch(&batch).await?;
    }
    let batch = app.ledger.batch(Some(&caller.app), &batch.batch_id).await?.ok_or(ApiError::NotFound)?;
    state_of(&app, &caller, batch).await.map(Json)
}

/// What came of a run.
#[derive(Serialize, ToSchema)]
struct ResultLine {
    /// For `?after=`.
    seq: i64,
    #[schema(required)]
    custom_id: Option<String>,
    run_id: String,
    #[schema(example = "succeeded")]
    status: String,
    /// What `POST /run` would have answered.
    #[schema(value_type = std::collections::BTreeMap<String, serde_json::Value>)]
    answer: Option<Box<RawValue>>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct AfterQuery {
    /// The `seq` of a line: only those behind it.
    #[param(value_type = Option<i64>, minimum = 0)]
    after: Option<String>,
}

/// Read what came of a batch
///
/// JSON Lines, in the order in which the runs ended, of those that have.
#[utoipa::path(get, path = "/batches/{id}/results", operation_id = "batch_results", tag = "batches", security(("app" = [])), params(("id" = String, Path), AfterQuery), responses(
    (status = OK, content((ResultLine = "application/x-ndjson"))),
    (status = "default", body = Problem, content_type = "application/problem+json", description = "The request was refused"),
))]
async fn results(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
    query: Result<Query<AfterQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let batch = find(&app, &caller, id).await?;
    let wrong = || ApiError::BadRequest("Set after to the seq of a line, at most once.".to_owned());
    let Query(AfterQuery { after }) = query.map_err(|_| wrong())?;
    let after = after.map_or(Some(0), |after| after.parse().ok()).filter(|after: &i64| *after >= 0).ok_or_else(wrong)?;
    let pieces = stream::unfold((app, batch.batch_id, after), async |(app, batch_id, after)| {
        // A body that breaks off is all that can be said of a ledger that fails in the middle.
        let found = app.ledger.batch_results(&batch_id, after, u32::try_from(AT_ONCE).unwrap_or(u32::MAX)).await.ok()?;
        let last = found.last()?.seq;
        let text: Vec<u8> = found.into_iter().flat_map(line).collect();
        Some((Ok::<_, Infallible>(Bytes::from(text)), (app, batch_id, last)))
    });
    let mut response = Response::new(Body::from_stream(pieces));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(NDJSON));
    Ok(response)
}

fn line(BatchResult { seq, custom_id, run }: BatchResult) -> Vec<u8> {
    let answer = view::end_of(&run).map(|end| Of::Run.answer(&end).body);
    let answer = answer.and_then(|body| RawValue::from_string(String::from_utf8(body.to_vec()).ok()?).ok());
    let line = ResultLine { seq, custom_id, run_id: run.id.to_string(), status: run.status.to_string(), answer };
    let mut line = serde_json::to_vec(&line).expect("a result is JSON");
    line.push(b'\n');
    line
}

pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(state, cancel)).routes(routes!(results))
}
