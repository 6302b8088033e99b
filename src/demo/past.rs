//! What a demonstration's ledger has of the days before: runs of three apps, each marked as the demo's, so that there is something to look at.

use uuid::{NoContext, Timestamp, Uuid};

use crate::clock::{self, DAY};
use crate::ledger::{JobEnd, PastRun};

/// The apps that the runs are of.
pub const APPS: [&str; 3] = ["demo-kitchen", "demo-garden", "demo-office"];
const DAYS: i64 = 30;
const PROMPTS: [&str; 6] = [
    "What can I cook from leeks, eggs and yesterday's rice?",
    "Sum up these minutes in five lines.",
    "Which of these seeds can go out before the last frost?",
    "Write a friendly reminder about the coffee fund.",
    "Turn this shopping list into JSON.",
    "Why does the pump run dry on Tuesdays?",
];
const MODELS: [&str; 3] = ["sonnet", "haiku", "opus"];
/// What a thousand tokens read and written cost of each, in US dollars.
const PRICES: [(f64, f64); 3] = [(0.003, 0.015), (0.001, 0.005), (0.005, 0.025)];

/// Numbers that look thrown, and are the same each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: i64) -> i64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33).cast_signed() % most
    }
}

/// The runs of the last weeks.
pub fn runs() -> Vec<PastRun> {
    let (mut dice, now) = (Dice(7), clock::now());
    let mut runs = Vec::new();
    for day in (0..DAYS).rev() {
        let midnight = clock::midnight() - day * DAY;
        for (number, app) in APPS.into_iter().enumerate() {
            let number = i64::try_from(number).unwrap_or_default();
            for _ in 0..4 + dice.below(9 + 5 * number) {
                // People are up from seven to eleven.
                let started_at = midnight + 7 * 3600 + dice.below(16 * 3600);
                let run = run(app, started_at, number, &mut dice);
                runs.extend((started_at < now - 600).then_some(run));
            }
        }
    }
    // Something to look into.
    runs.sort_by_key(|run| run.started_at);
    let newest = runs.len().saturating_sub(3);
    if let Some(run) = runs.get_mut(newest) {
        let overloaded = JobEnd { duration_ms: 14_200, ..JobEnd::failed("error", "API Error: 529 Overloaded".to_owned()) };
        run.end = overloaded;
    }
    runs
}

#[expect(clippy::cast_precision_loss, reason = "prices")]
fn run(app: &str, started_at: i64, number: i64, dice: &mut Dice) -> PastRun {
    let at = |index: i64| usize::try_from(index).unwrap_or_default();
    let model = at(if dice.below(3) == 0 { dice.below(3) } else { number });
    let prompt = PROMPTS[at(dice.below(6))];
    let (read, written) = (2000 + dice.below(9000), 80 + dice.below(1400));
    let cached = read * dice.below(80) / 100;
    let duration_ms = 900 + written * 9 + dice.below(2500);
    let (price_in, price_out) = PRICES[model];
    let failure = match dice.below(40) {
        0 => Some(("timeout", "claude ran out of time")),
        1 => Some(("error", "API Error: 529 Overloaded")),
        _ => None,
    };
    let ok = failure.is_none();
    PastRun {
        run_id: Uuid::new_v7(Timestamp::from_unix(NoContext, started_at.unsigned_abs(), 0)).simple().to_string(),
        app_name: app.to_owned(),
        model: MODELS[model].to_owned(),
        prompt: format!("[demo] {prompt}"),
        started_at,
        end: JobEnd {
            duration_ms,
            ok,
            stop_reason: failure.map_or("end_turn", |(reason, _)| reason).to_owned(),
            error: failure.map(|(_, error)| error.to_owned()),
            result: ok.then(|| "[demo] Not an answer: this run is only there to be looked at.".to_owned()),
            first_text_ms: ok.then(|| 500 + dice.below(duration_ms / 2)),
            input_tokens: ok.then_some(read),
            cached_tokens: ok.then_some(cached),
            output_tokens: ok.then_some(written),
            cost_usd: ok.then(|| (read - cached) as f64 / 1000.0 * price_in + written as f64 / 1000.0 * price_out),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_runs_of_each_app_on_several_days_and_each_is_marked() {
        let runs = runs();
        for app in APPS {
            let mut days: Vec<_> = runs.iter().filter(|run| run.app_name == app).map(|run| run.started_at / DAY).collect();
            days.dedup();
            assert!(days.len() >= 29, "{app}: {days:?}");
        }
        assert!(runs.iter().all(|run| run.prompt.starts_with("[demo] ") && run.started_at < clock::now()));
        assert!(runs.iter().any(|run| !run.end.ok));
    }
}
