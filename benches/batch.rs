//! What a batch of 10,000 costs those who wait: `cargo bench --bench batch`, five minutes.
//!
//! Everything is real but the model. Runs are asked for one after the other while nothing else goes on and while a batch does, in turn;
//! compared are the 95th percentiles. Once the model takes three seconds for each of the batch's runs, and once it answers at once, so that the
//! batch does nothing but start processes.

#![allow(missing_docs, reason = "a program")]

mod server;

use std::thread::sleep;
use std::time::Duration;

use clawdforge::demo::{self, install, stub::Stub};
use server::{Server, median, ms, start_real, time};

/// Runs of each block, and blocks.
const RUNS: usize = 20;
const BLOCKS: usize = 2;
/// In which a standby is started.
const PAUSE: Duration = Duration::from_millis(1500);

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let clis = install::clis(&install::default_cache(), &|step| println!("{step}")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let stub = runtime.block_on(Stub::start()).unwrap();
    let home = tempfile::tempdir().unwrap();
    let environment = demo::environment(&clis, &stub.url(), home.path());
    let server = start_real(&environment, &clis, &[]);
    let token = server.mint();
    println!("{:<28} {:>10} {:>10} {:>8} {:>12}", "the batch's model", "alone", "beside it", "ratio", "batch/min");
    for (name, directive) in [("takes 3 s", r#"stub: {\"delay_ms\": 3000}"#), ("answers at once", "Hello.")] {
        let (mut alone, mut beside, mut made, mut took) = (Vec::new(), Vec::new(), 0, Duration::ZERO);
        for _ in 0..BLOCKS {
            alone.extend(block(&server, &token));
            let runs = vec![format!(r#"{{"prompt": "{directive}"}}"#); 10_000].join(",");
            let answer = server.ask("POST", "/batches", &token, &format!(r#"{{"runs": [{runs}]}}"#));
            let batch = answer.split("\"batch_id\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap().to_owned();
            sleep(Duration::from_secs(5));
            took += time(|| beside.extend(block(&server, &token)));
            let state = server.ask("DELETE", &format!("/batches/{batch}"), &token, "");
            made += number(&state, "succeeded");
            sleep(Duration::from_secs(5));
        }
        let [alone, beside] = [alone, beside].map(|times| ms(percentile(times)));
        let per_minute = f64::from(made) / (took.as_secs_f64() + 5.0 * 2.0) * 60.0;
        println!("{name:<28} {alone:>7.0} ms {beside:>7.0} ms {:>8.2} {per_minute:>12.0}", beside / alone);
    }
}

fn block(server: &Server, token: &str) -> Vec<Duration> {
    let run = || {
        sleep(PAUSE);
        time(|| assert!(server.ask("POST", "/run", token, r#"{"prompt": "Hello."}"#).contains("\"ok\":true")))
    };
    // The first has others started ahead.
    let times: Vec<_> = (0..=RUNS).map(|_| run()).skip(1).collect();
    println!("  median {:.0} ms", ms(median(times.clone())));
    times
}

fn percentile(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() * 95 / 100]
}

fn number(answer: &str, name: &str) -> u32 {
    let rest = answer.split(&format!("\"{name}\":")).nth(1).unwrap_or_default();
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or_default()
}
